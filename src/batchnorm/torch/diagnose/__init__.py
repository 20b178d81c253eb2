"""Look at the batch norms of a model: records for `batchnorm.diagnose`, and what can be mended."""

from .check import check as check
from .watch import Watch as Watch
from .watch import watch as watch

__all__ = ["Watch", "check", "watch"]
