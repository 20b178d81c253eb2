"""Batch norms that stay as they are while the rest of a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from ..errors import ArgumentError
from .modules import Layer

__all__ = ["freeze", "unfreeze"]

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, *, stats: bool = True, affine: bool = False) -> M:
    """Keep the batch norms of `model` as they are, whatever mode it is put into.

    Parameters
    ----------
    model : Module
        Its batch norms are ours (see `convert`); may itself be one.
    stats : bool
        Normalize by the running statistics and leave them alone, through ``model.train()`` too.
        A layer without running statistics has none to keep, and goes on with the batch's.
    affine : bool
        Give scale and shift no gradient. What gradient they have is dropped, so that no optimizer
        applies it.

    Returns
    -------
    Module
        `model`. Layers show what is frozen; state dicts do not hold it.

    Raises
    ------
    ArgumentError
        `model` has no batch norm, or one of torch's own, which cannot be kept frozen; nothing has
        been frozen then.

    Examples
    --------
    >>> from torch import nn
    >>> from batchnorm.torch import convert, freeze
    >>> net = freeze(convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    >>> net.train()[1].stats_frozen
    True
    """
    for layer in list(layers_of(model, "freeze")):
        if stats:
            layer.stats_frozen = True
        if affine and not layer.affine_frozen:
            layer.affine_frozen = True
            for name in ("weight", "bias"):
                parameter = getattr(layer, name)
                if parameter is not None and parameter.requires_grad:
                    layer._thawed = (*layer._thawed, name)
                    parameter.requires_grad_(False)
                    parameter.grad = None
    return model


def unfreeze(model: M, *, stats: bool = True, affine: bool = True) -> M:
    """Let frozen batch norms train again: what `freeze` does, undone.

    Parameters
    ----------
    model : Module
    stats, affine : bool
        What to unfreeze. Parameters that had no gradient before they were frozen get none.

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    ArgumentError
        As `freeze`.
    """
    for layer in list(layers_of(model, "unfreeze")):
        if stats:
            layer.stats_frozen = False
        if affine and layer.affine_frozen:
            layer.affine_frozen = False
            for name in layer._thawed:
                getattr(layer, name).requires_grad_(True)
            layer._thawed = ()
    return model


def layers_of(model: nn.Module, name: str) -> Iterator[Layer]:
    """Our layers in a model; refuses one with torch's own, or with none."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name} takes a torch.nn.Module, got {type(model).__name__}.")
    found = False
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            found = True
            yield module
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ArgumentError(
                f"{name} takes a model whose batch norms are of batchnorm.torch, got a "
                f"{type(module).__name__} of torch's at '{path}'. Call convert(model) first; "
                "explain(model) says why a layer cannot be converted."
            )
    if not found:
        raise ArgumentError(f"{name} takes a model with batch norms, got one without.")
