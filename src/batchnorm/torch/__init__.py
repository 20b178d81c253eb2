"""Batch normalization for PyTorch: accurate layers, and functions for their statistics.

>>> import torch
>>> from batchnorm.torch import BatchNorm2d
>>> layer = BatchNorm2d(8, activation="relu")
>>> layer(torch.randn(4, 8, 5, 5)).shape
torch.Size([4, 8, 5, 5])
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as missing:
    raise ImportError("batchnorm.torch needs PyTorch: pip install torch") from missing

from . import functional as functional
from .accumulate import accumulate as accumulate
from .adapters import register_adapter as register_adapter
from .contract import NonFiniteError as NonFiniteError
from .convert import convert as convert
from .convert import explain as explain
from .convert import revert as revert
from .diagnose import check as check
from .diagnose import watch as watch
from .fold import FoldError as FoldError
from .fold import FoldReport as FoldReport
from .fold import fold as fold
from .freeze import freeze as freeze
from .freeze import unfreeze as unfreeze
from .modules import BatchNorm1d as BatchNorm1d
from .modules import BatchNorm2d as BatchNorm2d
from .modules import BatchNorm3d as BatchNorm3d
from .parameters import parameter_groups as parameter_groups
from .population import Recalibration as Recalibration
from .population import recalibrate as recalibrate
from .processes import SynchronizationError as SynchronizationError
from .sync import DistributedDataParallel as DistributedDataParallel
from .sync import SyncBatchNorm as SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DistributedDataParallel",
    "FoldError",
    "FoldReport",
    "NonFiniteError",
    "Recalibration",
    "SyncBatchNorm",
    "SynchronizationError",
    "accumulate",
    "check",
    "convert",
    "explain",
    "fold",
    "freeze",
    "functional",
    "parameter_groups",
    "recalibrate",
    "register_adapter",
    "revert",
    "unfreeze",
    "watch",
]
