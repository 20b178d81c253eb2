"""Keep batch-norm layers constant while the rest of a model trains."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..errors import ArgumentError
from .adapters import FrozenLayer, adapter_of
from .modules import Layer
from .undo import undone_on_error

__all__ = ["freeze", "unfreeze"]

M = TypeVar("M", bound=nn.Module)


def freeze(model: M, *, stats: bool = True, affine: bool = False) -> M:
    """Keep the batch-norm layers of `model` constant, in every mode.

    Parameters
    ----------
    model : Module
        Its batch-norm layers must be ours (see `convert`); it may itself be one. Layers that are
        constant by their class, such as torchvision's `FrozenBatchNorm2d`, are left as they are.
    stats : bool
        Normalize by the running statistics, and neither update nor reset them, even after
        ``model.train()``. A layer without running statistics still uses those of the batch.
    affine : bool
        Compute no gradients of scale and shift, also if pruning or a parametrization computes them
        from other parameters. Gradients that they have are dropped, so no optimizer applies them.

    Returns
    -------
    Module
        `model`. The repr of a layer shows what is frozen; state dicts do not hold it.

    Raises
    ------
    ArgumentError
        `model` has no batch-norm layer, or has one that is not ours. After any exception, the model
        is as it was before.

    Examples
    --------
    >>> from torch import nn
    >>> from batchnorm.torch import convert, freeze
    >>> net = freeze(convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    >>> net.train()[1].stats_frozen
    True
    """
    layers = layers_of(model, "freeze")
    with undone_on_error(layers):
        for layer in layers:
            if stats:
                layer.stats_frozen = True
            if affine and not layer.affine_frozen:
                layer.affine_frozen = True
                for name, parameters in _affine_parameters(layer).items():
                    trained = [p for p in parameters if p.requires_grad]
                    if trained:
                        layer._to_unfreeze = (*layer._to_unfreeze, name)
                    for parameter in trained:
                        parameter.requires_grad_(False)
                        parameter.grad = None
    return model


def unfreeze(model: M, *, stats: bool = True, affine: bool = True) -> M:
    """Let frozen batch-norm layers train again: undo `freeze`.

    Parameters
    ----------
    model : Module
    stats, affine : bool
        What to unfreeze. Parameters that did not train before `freeze` still do not.

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    ArgumentError
        As `freeze`.
    """
    layers = layers_of(model, "unfreeze")
    with undone_on_error(layers):
        for layer in layers:
            if stats:
                layer.stats_frozen = False
            if affine and layer.affine_frozen:
                layer.affine_frozen = False
                for name in layer._to_unfreeze:
                    for parameter in _affine_parameters(layer)[name]:
                        parameter.requires_grad_(True)
                layer._to_unfreeze = ()
    return model


def layers_of(model: nn.Module, name: str) -> list[Layer]:
    """Our layers in a model; raises if it has none, or has batch-norm layers that are not ours."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name} takes a torch.nn.Module, got {type(model).__name__}.")
    layers, constant = [], False
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            layers.append(module)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ArgumentError(
                f"{name} takes a model whose batch-norm layers are of batchnorm.torch, got a "
                f"{type(module).__name__} of {type(module).__module__.partition('.')[0]}'s at "
                f"'{path}'. Call convert(model) first; explain(model) says why a layer cannot be "
                "converted."
            )
        elif _is_constant(type(module)):
            constant = True
    if not layers and not constant:
        raise ArgumentError(f"{name} takes a model with batch-norm layers, got one without.")
    return layers


def _is_constant(kind: type[nn.Module]) -> bool:
    """Whether statistics, scale and shift of layers of this class never change."""
    adapter = adapter_of(kind)
    return issubclass(kind if adapter is None else adapter.ours, FrozenLayer)


def _affine_parameters(layer: Layer) -> dict[str, list[nn.Parameter]]:
    """The parameters that scale and shift are, or are computed from.

    Pruning computes `weight` from `weight_orig`; parametrizations, from
    `parametrizations.weight.original`.
    """
    found: dict[str, list[nn.Parameter]] = {"weight": [], "bias": []}
    for path, parameter in layer.named_parameters():
        own = path.removeprefix("parametrizations.")
        if own == path and "." in path:
            continue  # of a module in the layer, such as an activation
        for name, parameters in found.items():
            if own.startswith(name):
                parameters.append(parameter)
    return found
