"""Base classes of adapters: layers with an activation module, and with constant statistics."""

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
    """Keep the activations that our layers can apply in the same pass."""
    kept = {}
    for kind, name in names.items():
        try:
            modules.BatchNorm1d(1, activation=name)
        except ArgumentError:
            continue
        kept[kind] = name
    return kept


#: The name of our equivalent activation, by the exact type of the module.
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
    """Whether the module must be called, because it has hooks or a forward of its own."""
    d = module.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


class OwnActivation:
    """A layer with modules `drop` and `act`, as in timm; `act` runs in the same pass if possible.

    This is decided anew in each call, so the modules may be replaced, get hooks or change their
    mode at any time.
    """

    _modules: dict[str, nn.Module | None]

    @property
    def activation(self) -> str | None:
        """The activation to apply in the same pass; None to call `drop` and `act` instead."""
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
        """Call `drop` and `act`, unless the activation was applied in the same pass."""
        if self.activation is None:
            for name in ("drop", "act"):
                module = self._modules.get(name)
                if module is not None:
                    y = module(y)
        return y


class ActivatedLayer(OwnActivation, nn.Module):
    """The first base class of an adapter, before one of our layers and the original."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then drop and activate."""
        y: Tensor = super().forward(x)
        # For torch.fx, the layer is a leaf module.
        return y if isinstance(x, Proxy) else self.finish(y)


class FrozenLayer(nn.Module):
    """The first base class of an adapter for layers with constant statistics, scale and shift.

    The original class must have the attributes `weight`, `bias`, `running_mean`, `running_var`,
    (C,) each, and `eps`, and take inputs (N, C, H, W). If our kernels would compute something else
    than the original (a result of another type, shapes that broadcast), its forward is called.
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
        """Return y; subclasses may apply an activation."""
        return y

    def __prepare_scriptable__(self) -> nn.Module:
        raise ArgumentError(modules.NOT_SCRIPTABLE.format(type(self).__name__))


def _fits(x: Tensor, mean: Tensor, var: Tensor, *affine: Tensor) -> bool:
    """Whether `functional.batch_norm` computes the same as torch's multiplication and addition."""
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
