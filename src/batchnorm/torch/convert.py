"""Convert the batch-norm layers of torch, timm and torchvision to ours and back, in place.

To convert a layer is to change its class. It remains the same object, so parents, optimizers and
hooks that refer to it are not affected. `adapters` has the table of classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ArgumentError
from . import modules
from .adapters import FrozenLayer, adapter_of, original_of
from .modules import Layer
from .undo import set_class, undone_on_error

__all__ = ["UNCHANGED", "Report", "convert", "explain", "revert"]

M = TypeVar("M", bound=nn.Module)


class Unchanged(Enum):
    """The type of `UNCHANGED`."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return self.name


#: Says that an option is not given.
UNCHANGED: Final = Unchanged.UNCHANGED


@dataclass
class Report:
    """The batch-norm layers of a model, by name: which are converted, and which are skipped.

    Attributes
    ----------
    converted : dict of str to str
        For each layer that is ours, or that `convert` would convert: the activation that runs in
        the same pass, or "".
    pending : set of str
        Layers in `converted` that are not converted yet.
    skipped : dict of str to str
        For each other batch-norm layer: the reason why `convert` skips it.
    synchronized : set of str
        Layers that are synchronized with other processes.
    classes : dict of str to str
        For each layer in `converted`: the name of its class.
    """

    converted: dict[str, str] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    synchronized: set[str] = field(default_factory=set)
    classes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A summary, then one line for each layer."""
        pending, skipped = len(self.pending), len(self.skipped)
        done = len(self.converted) - pending
        if pending and not done:
            summary = f"would convert {_layers(pending)}, skip {skipped}"
        else:
            more = f", would convert {pending} more" if pending else ""
            summary = f"converted {_layers(done)}{more}, skipped {skipped}"
        names = [*self.converted, *self.skipped]
        width = max(map(len, names), default=0)
        return "\n".join([summary, *(f"  {n:<{width}}  {self._line(n)}" for n in names)])

    def _line(self, name: str) -> str:
        if name in self.skipped:
            return f"skipped: {self.skipped[name]}"
        activation = self.converted[name]
        line = f"{self.classes[name]} with {activation}" if activation else self.classes[name]
        return f"{line}; synchronized" if name in self.synchronized else line


def _layers(count: int) -> str:
    return f"{count} batch-norm layer{'' if count == 1 else 's'}"


def convert(
    model: M,
    *,
    on_nonfinite: str | Unchanged = UNCHANGED,
    on_single: str | Unchanged = UNCHANGED,
    group_size: int | Unchanged | None = UNCHANGED,
    sync: bool | Unchanged = UNCHANGED,
    process_group: Any = UNCHANGED,
    reproducible: bool | Unchanged = UNCHANGED,
) -> M:
    """Convert the batch-norm layers of `model` to ours, in place.

    Layers remain the same objects under the same names, with their parameters, buffers, hooks and
    flags, and shared layers remain shared. State dicts are interchangeable in both directions.

    Layers are converted by exact type: `torch.nn.BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm`;
    timm's `BatchNormAct2d`, `SyncBatchNormAct` and `FrozenBatchNormAct2d`, whose activation then
    runs in the same pass if our layers have it; torchvision's `FrozenBatchNorm2d`; and classes
    given to `register_adapter`. Subclasses are skipped, because they may compute something else.
    `explain` lists the skipped layers, with the reason.

    Parameters
    ----------
    model : Module
        May itself be a batch-norm layer. Convert before `torch.compile` and before wrapping in
        `DistributedDataParallel`; revert before `torch.ao.quantization`.
    on_nonfinite, on_single, group_size
        As in `BatchNorm2d`. If an option is not given, layers that are ours already keep its value,
        and others get the default.
    sync : bool
        True makes every layer a `SyncBatchNorm`, which normalizes by the statistics of all
        processes. False undoes an earlier ``sync=True``.
    process_group, reproducible
        Of synchronized layers, as in `SyncBatchNorm`.

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    ArgumentError
        `model` is not a Module; an option has an unknown value; an option of synchronized layers is
        given, but there are none; or ``sync=True`` and a registered adapter has no synchronized
        class. After any exception, the model is as it was before.

    Examples
    --------
    >>> from torch import nn
    >>> from batchnorm.torch import convert, explain
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> net = convert(net)
    >>> print(explain(net))
    converted 1 batch-norm layer, skipped 0
      1  BatchNorm2d
    """
    _check_model(model, "convert")
    options = _given(on_nonfinite=on_nonfinite, on_single=on_single, group_size=group_size)
    modules.BatchNorm1d(1, **options)  # raises if one is not valid
    sync_options = _given(process_group=process_group, reproducible=reproducible)
    layers = {name: module for name, module, skipped in _found(model) if not skipped}
    _check_sync(layers, sync, sync_options)
    with undone_on_error(layers.values()):
        for name, module in layers.items():
            adapter = adapter_of(type(module))
            if adapter is not None:
                set_class(module, adapter.ours)
            if not isinstance(module, Layer):
                continue
            if adapter is not None:
                module.adopt(name)
            module.__dict__.update(options)
            if sync is True and not isinstance(module, nn.SyncBatchNorm):
                _synchronize(module)
            elif sync is False and getattr(module, "_class_before_sync", None) is not None:
                _desynchronize(module)
            if isinstance(module, nn.SyncBatchNorm):
                module.__dict__.update(sync_options)
    return model


def revert(model: M) -> M:
    """Give the layers that `convert` has converted their original classes back, in place.

    What the original classes do not have is lost: options like `group_size` are removed, and a
    layer with statistics frozen by `freeze` is put into evaluation mode.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    ArgumentError
        A layer has an activation that its original class does not have, is parametrized, or is
        inside `accumulate`. After any exception, the model is as it was before.
    """
    _check_model(model, "revert")
    originals: dict[nn.Module, type[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Layer, FrozenLayer)):
            original = original_of(getattr(module, "_class_before_sync", None) or type(module))
            _check_revertible(name, module, original)
            if original is not None:
                originals[module] = original
    with undone_on_error(originals):
        for module, original in originals.items():
            if isinstance(module, Layer):
                if module.stats_frozen:
                    module.training = False
                if getattr(module, "_class_before_sync", None) is not None:
                    _desynchronize(module)
                module.release()
            set_class(module, original)
    return model


def explain(model: nn.Module) -> Report:
    """Say for each batch-norm layer whether it is converted, or would be, or why not.

    Returns
    -------
    Report
        Prints as text.

    Raises
    ------
    ArgumentError
        `model` is not a Module.
    """
    _check_model(model, "explain")
    report = Report()
    for name, module, skipped in _found(model):
        if skipped:
            report.skipped[name] = skipped
            continue
        report.classes[name] = type(module).__name__
        adapter = adapter_of(type(module))
        if adapter is not None:
            report.pending.add(name)
        report.converted[name] = _activation(module, adapter.ours if adapter else None) or ""
        if isinstance(module, nn.SyncBatchNorm):
            report.synchronized.add(name)
    return report


def _check_model(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name} takes a torch.nn.Module, got {type(model).__name__}.")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not UNCHANGED}


# ---- which layers -------------------------------------------------------------------------------


def _found(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, layer, and the reason to skip it or "", for each batch-norm layer."""
    for name, module in model.named_modules():
        kind = type(module)
        known = (
            adapter_of(kind) is not None
            or original_of(kind) is not None
            or getattr(module, "_class_before_sync", None) is not None
        )
        if known:
            yield name, module, _reason_of_instance(module)
        elif isinstance(module, (_BatchNorm, FrozenLayer)):
            yield name, module, _reason(module)
        elif isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in getattr(
            module, "original_name", ""
        ):
            yield name, module, "it is compiled to TorchScript"


def _reason_of_instance(module: nn.Module) -> str:
    """Why a layer of a known class is skipped; "" if it is not."""
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    options = set() if isinstance(module, Layer) else {*Layer.EXTRAS} & module.__dict__.keys()
    if options:
        name = min(options)
        return f"it has an attribute '{name}' already, which our layers take for an option"
    return ""


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: convert after the first forward"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    return (
        f"{type(module).__name__} is a subclass, which may compute something else (see "
        "register_adapter)"
    )


def _activation(module: nn.Module, ours: type[nn.Module] | None) -> str | None:
    """The activation that runs in the same pass, or would in an instance of `ours`."""
    if ours is None:
        name: str | None = getattr(module, "activation", None)
        return name
    found = inspect.getattr_static(ours, "activation", None)
    return found.fget(module) if isinstance(found, property) and found.fget else None


def _check_revertible(name: str, module: nn.Module, original: type[nn.Module] | None) -> None:
    if hasattr(module, "parametrizations"):
        raise ArgumentError(
            f"'{name}' cannot be reverted, because its parameters are parametrized. Remove that "
            "first, with torch.nn.utils.parametrize.remove_parametrizations."
        )
    if original is None:
        return
    if getattr(module, "_accumulated", None) is not None:
        raise ArgumentError(
            f"'{name}' cannot be reverted inside accumulate, which updates its running statistics "
            "at the end. Leave the block first."
        )
    activation = module.__dict__.get("activation")
    if activation is not None:
        raise ArgumentError(
            f"'{name}' has activation={activation!r}, which {original.__name__} does not have. Put "
            "a module for it into the model and set the layer's activation to None first."
        )


# ---- synchronization ----------------------------------------------------------------------------


def _synchronized_class(module: nn.Module) -> type[nn.Module] | None:
    adapter = adapter_of(type(module)) or adapter_of(original_of(type(module)) or object)
    return None if adapter is None else adapter.synchronized


def _check_sync(
    layers: dict[str, nn.Module], sync: bool | Unchanged, options: dict[str, Any]
) -> None:
    """Raise for options of synchronized layers without any, and for layers that cannot be."""
    for name, value in (("sync", sync), ("reproducible", options.get("reproducible", False))):
        if value is not UNCHANGED and not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, got {value!r}.")
    some = sync is True
    for name, module in layers.items():
        if isinstance(module, nn.SyncBatchNorm):
            some = some or sync is UNCHANGED or getattr(module, "_class_before_sync", None) is None
        elif sync is True and isinstance(module, _BatchNorm) and not _synchronized_class(module):
            raise ArgumentError(
                f"'{name}' cannot be synchronized: register_adapter was given no synchronized "
                f"class for {(original_of(type(module)) or type(module)).__name__}."
            )
    if not some and (options.get("process_group") is not None or options.get("reproducible")):
        raise ArgumentError(
            "process_group and reproducible are options of synchronized layers, and the model has "
            "none: pass sync=True as well."
        )


def _synchronize(module: nn.Module) -> None:
    synchronized = _synchronized_class(module)
    assert synchronized is not None  # see `_check_sync`
    module.__dict__.update(_class_before_sync=type(module), process_group=None)
    set_class(module, synchronized)


def _desynchronize(module: Any) -> None:
    set_class(module, module._class_before_sync)
    for name in ("_class_before_sync", "process_group", "reproducible"):
        module.__dict__.pop(name, None)
