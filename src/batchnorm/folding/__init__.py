"""Fold batch norms, which at test time are affine maps of each channel, into linear layers.

Everything is computed in float64 and rounded once, at the end. `Affine` is what a batch norm does
at test time, and `Linear` a linear layer or convolution; they compose:

>>> import numpy as np
>>> from batchnorm.folding import Affine, Linear
>>> layer = Linear(np.array([[1.0, 2.0]]), None)
>>> norm = Affine.of(mean=np.array([3.0]), var=np.array([4.0]), eps=0.0)
>>> folded = layer.then(norm).rounded(np.float32)
>>> folded.weight.tolist(), folded.bias.tolist()
([[0.5, 1.0]], [-1.5])
"""

from .algebra import Affine as Affine
from .algebra import Linear as Linear
from .algebra import fold_linear as fold_linear
from .algebra import round_to_odd as round_to_odd
from .report import FoldedLayer as FoldedLayer
from .report import FoldError as FoldError
from .report import FoldReport as FoldReport

__all__ = [
    "Affine",
    "FoldError",
    "FoldReport",
    "FoldedLayer",
    "Linear",
    "fold_linear",
    "round_to_odd",
]
