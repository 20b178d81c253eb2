"""Parameter groups for an optimizer, with and without weight decay."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import nn

from ..errors import ArgumentError

__all__ = ["parameter_groups"]

_NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide parameters into two groups: weights, and scales, shifts and biases without decay.

    Weight decay pulls parameters towards zero, which is no natural value for a scale. The output of
    a batch norm hardly depends on the size of the weights before it, but directly on its scale.

    Parameters
    ----------
    model : Module
    weight_decay : float
        Of the first group.

    Returns
    -------
    list of dict
        For any optimizer of torch. The second group contains the parameters of all normalization
        layers, and those with "bias" in their name. Each parameter is in one group, once.

    Raises
    ------
    ArgumentError
        `model` is not a Module, or `weight_decay` is negative.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from batchnorm.torch import parameter_groups
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> groups = parameter_groups(net, weight_decay=5e-4)
    >>> [len(g["params"]) for g in groups], [g["weight_decay"] for g in groups]
    ([1, 3], [0.0005, 0.0])
    >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"parameter_groups takes a torch.nn.Module, got {type(model).__name__}."
        )
    if not (isinstance(weight_decay, Real) and weight_decay >= 0):
        raise ArgumentError(f"weight_decay must not be negative, got {weight_decay!r}.")
    normalizing = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMALIZATIONS)
        for name, parameter in module.named_parameters()
        # Not those of a module in the layer, such as the activation of timm's layers.
        if "." not in name or name.startswith("parametrizations.")
    }
    decay: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        own = name.rpartition("parametrizations.")[2].split(".")
        own_name = own[0] if "parametrizations." in name else own[-1]
        exempt = id(parameter) in normalizing or "bias" in own_name
        (others if exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
