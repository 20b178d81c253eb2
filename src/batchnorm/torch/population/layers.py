"""Which layers of a model are measured, and why others are not."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...errors import ArgumentError
from ..adapters import FrozenLayer
from .target import Target

# Classes whose statistics nothing ever changes, by name: those of torchvision and detectron2, of
# timm, and subclasses of them.
_FROZEN = {"FrozenBatchNorm2d", "FrozenBatchNormAct2d"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data parallelism and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        else:
            return model


def find_targets(model: nn.Module) -> tuple[list[Target], dict[str, str]]:
    """The layers to measure, and for each skipped layer the reason."""
    found: list[Target] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        check_values(module, name, "recalibrate")
        reason = _reason_to_skip(module, name, model)
        if reason:
            skipped[name] = reason
        elif isinstance(module, _BatchNorm):
            found.append(Target(module, name, len(found)))
    if not found and not skipped:
        raise ArgumentError("recalibrate takes a model with batch norms, got one without.")
    return found, skipped


def check_values(module: nn.Module, name: str, caller: str) -> None:
    """Raise if a tensor of this module has no values yet."""
    tensors = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    for t in tensors:
        lazy = nn.parameter.is_lazy(t)
        if lazy or t.is_meta:
            raise ArgumentError(
                f"{caller} takes a model whose tensors have values, got one with "
                f"{'uninitialized' if lazy else 'meta'} tensors in '{name}'. Load its weights, "
                "or run it once, first."
            )


def is_constant(module: nn.Module) -> bool:
    """Whether nothing ever changes the statistics of this module, by its class."""
    named = _FROZEN.intersection(c.__name__ for c in type(module).__mro__)
    return isinstance(module, FrozenLayer) or bool(named)


def _reason_to_skip(module: nn.Module, name: str, model: nn.Module) -> str:
    """Why a batch-norm layer is not measured; "" if it is, and for all other modules."""
    if is_constant(module):
        return "its statistics are frozen"
    if not isinstance(module, _BatchNorm):
        scripted = "BatchNorm" in getattr(module, "original_name", "")
        return "it is compiled by TorchScript" if scripted else ""
    if getattr(module, "stats_frozen", False):
        return "its statistics are frozen"
    mean, var = (module._buffers.get(f"running_{what}") for what in ("mean", "var"))
    if mean is None or var is None:
        return "it has no running statistics"
    if module.num_features == 0:
        return "it has no channels"
    if mean.is_inference() and not torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"recalibrate takes a model that can be written to, got '{name}' made in "
            "torch.inference_mode. Make it outside, or call recalibrate inside."
        )
    if model.training and not module.training:
        return "it is in evaluation mode while the model is in training mode"
    return ""
