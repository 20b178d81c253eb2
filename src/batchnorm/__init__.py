"""Accurate and fast batch normalization of NumPy arrays.

>>> import numpy as np
>>> import batchnorm
>>> y, saved = batchnorm.batch_norm(np.random.default_rng(0).normal(5.0, 2.0, (64, 3)))
>>> bool(abs(batchnorm.Moments.of(y).mean).max() < 1e-12)
True
"""

from . import errors as errors
from . import native as _native
from ._version import __version__ as __version__
from .errors import BatchNormError as BatchNormError
from .functional import batch_norm as batch_norm
from .functional import batch_norm_backward as batch_norm_backward
from .functional import batch_norm_inference as batch_norm_inference
from .functional import batch_norm_inverse as batch_norm_inverse
from .functional import normalize as normalize
from .layer import BatchNorm as BatchNorm
from .moments import Moments as Moments
from .native import show_config as show_config

_native.use_environment()
_native.read_arrays_in_place()

__all__ = [
    "BatchNorm",
    "BatchNormError",
    "Moments",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inverse",
    "errors",
    "normalize",
    "show_config",
]
