"""What the layers of other packages add to a batch norm: an activation, constant statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ...errors import ArgumentError
from .. import functional, modules
from ..internals import has_global_hooks

__all__ = ["ACTIVATIONS", "ActivatedLayer", "FrozenLayer", "OwnActivation", "supported"]


def supported(names: dict[type[nn.Module], str]) -> dict[type[nn.Module], str]:
    """Those activations that our layers apply in the same pass."""
    kept = {}
    for kind, name in names.items():
        try:
            modules.BatchNorm1d(1, activation=name)
        except ArgumentError:
            continue
        kept[kind] = name
    return kept


#: Modules, by exact type, to the name of the activation that computes the same in the same pass.
ACTIVATIONS = supported(
    {
        nn.ReLU: "relu",
        nn.LeakyReLU: "leaky_relu",
        nn.ReLU6: "relu6",
        nn.Hardswish: "hardswish",
        nn.SiLU: "silu",
    }
)


def _is_observed(module: nn.Module) -> bool:
    """Whether somebody expects a call of the module: hooks, or a forward of the instance."""
    d = module.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


class OwnActivation:
    """The modules `drop` and `act` of a layer, as in timm; `act` runs in the same pass if it can.

    They are looked at in each call, so they may be replaced, hooked or put into another mode at any
    time.
    """

    _modules: dict[str, nn.Module | None]

    @property
    def activation(self) -> str | None:
        """What runs in the same pass; None if `drop` and `act` are called instead."""
        drop: Any = self._modules.get("drop")
        act: Any = self._modules.get("act")
        if act is None or _is_observed(act):
            return None
        if drop is not None and (type(drop) is not nn.Identity or _is_observed(drop)):
            return None
        if has_global_hooks():
            return None
        name = ACTIVATIONS.get(type(act))
        if name == "relu6" and (act.min_val, act.max_val) != (0, 6):
            return None
        return name

    @property
    def negative_slope(self) -> float:
        """Of the leaky ReLU."""
        slope: Any = getattr(self._modules.get("act"), "negative_slope", 0.01)
        return float(slope)

    def finish(self, y: Tensor) -> Tensor:
        """Apply what has not been applied in the same pass."""
        if self.activation is None:
            for name in ("drop", "act"):
                module = self._modules.get(name)
                if module is not None:
                    y = module(y)
        return y


class ActivatedLayer(OwnActivation, nn.Module):
    """Stands before one of our layers and the original among the bases."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then drop and activate."""
        y: Tensor = super().forward(x)
        # torch.fx takes the layer as a whole.
        return y if isinstance(x, Proxy) else self.finish(y)


class FrozenLayer(nn.Module):
    """Stands before a class whose statistics, scale and shift are constant buffers.

    The class has the attributes `weight`, `bias`, `running_mean`, `running_var`, (C,) each, and
    `eps`, and takes inputs (N, C, H, W). What our kernels compute otherwise than the original (a
    result of another type, shapes that broadcast) is left to it.
    """

    activation: str | None = None
    negative_slope: float = 0.01

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the constant statistics."""
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if not _fits(x, mean, var, weight, bias):
            y: Tensor = super().forward(x)
            return y
        return self.finish(
            functional.batch_norm(
                x, mean, var, weight, bias, eps=self.eps,
                activation=self.activation, negative_slope=self.negative_slope,
            )
        )  # fmt: skip

    def finish(self, y: Tensor) -> Tensor:
        """Nothing follows."""
        return y

    def __prepare_scriptable__(self) -> nn.Module:
        raise ArgumentError(modules.NOT_SCRIPTABLE.format(type(self).__name__))


def _fits(x: Tensor, mean: Tensor, var: Tensor, *affine: Tensor) -> bool:
    """Whether `functional.batch_norm` computes what torch's multiplication and addition would."""
    if isinstance(x, Proxy) or x.dim() != 4 or not x.is_floating_point():
        return False
    if mean.requires_grad or var.requires_grad:
        return False
    return all(
        v.dim() == 1
        and v.shape[0] == x.shape[1]
        and v.device == x.device
        and torch.promote_types(x.dtype, v.dtype) == x.dtype
        for v in (mean, var, *affine)
    )
