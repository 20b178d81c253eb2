"""ONNX files: records of their batch norms, and folding."""

from .fold import FoldedLayer as FoldedLayer
from .fold import FoldError as FoldError
from .fold import FoldReport as FoldReport
from .fold import fold as fold
from .fold import fold_file as fold_file
from .records import network_of_onnx as network_of_onnx

__all__ = [
    "FoldError",
    "FoldReport",
    "FoldedLayer",
    "fold",
    "fold_file",
    "network_of_onnx",
]
