"""timm's layers, which contain an activation."""

# timm need not be installed; and some attributes are overridden by properties.
# mypy: disable-error-code="import-not-found, misc, override"

from __future__ import annotations

from typing import Any

from timm.layers import activations, activations_me, norm_act

from .. import modules, sync
from .layers import ACTIVATIONS, ActivatedLayer, FrozenLayer, OwnActivation, supported

__all__ = ["BatchNormAct2d", "FrozenBatchNormAct2d", "SyncBatchNormAct"]

ACTIVATIONS.update(
    supported(
        {
            activations.Swish: "silu",
            activations.HardSwish: "hardswish",
            activations_me.SwishMe: "silu",
            activations_me.HardSwishMe: "hardswish",
        }
    )
)


class BatchNormAct2d(ActivatedLayer, modules.BatchNorm2d, norm_act.BatchNormAct2d):
    """timm's BatchNormAct2d: constructor, state dict and repr are its own."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        norm_act.BatchNormAct2d.__init__(self, *args, **keywords)
        self.adopt()


class SyncBatchNormAct(ActivatedLayer, sync.SyncBatchNorm, norm_act.SyncBatchNormAct):
    """timm's SyncBatchNormAct; BatchNormAct2d is converted to this with ``sync=True``."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        norm_act.SyncBatchNormAct.__init__(self, *args, **keywords)
        self.adopt()


class FrozenBatchNormAct2d(OwnActivation, FrozenLayer, norm_act.FrozenBatchNormAct2d):
    """timm's FrozenBatchNormAct2d, faster: constructor, state dict and repr are its own."""
