"""What ``batchnorm check`` and ``fold`` are given: a model by name, or a file of some kind."""

from .checking import check as check
from .checking import explain as explain
from .folding import Folded as Folded
from .folding import NotWrittenError as NotWrittenError
from .folding import fold as fold

__all__ = ["Folded", "NotWrittenError", "check", "explain", "fold"]
