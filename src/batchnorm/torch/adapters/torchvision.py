"""torchvision's layer with constant statistics."""

# torchvision need not be installed.
# mypy: disable-error-code="import-not-found, import-untyped, misc"

from torchvision.ops import misc

from .layers import FrozenLayer

__all__ = ["FrozenBatchNorm2d"]


class FrozenBatchNorm2d(FrozenLayer, misc.FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d, faster: constructor, state dict and repr are its own."""
