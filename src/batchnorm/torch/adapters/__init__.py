"""The table of `convert`: which class is converted to which, by exact type.

An adapter is a subclass of the original class that computes the same with our kernels. `convert`
changes the class of a layer, and `revert` changes it back, so the layer remains the same object.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from torch import nn

from ...errors import ArgumentError
from ..modules import Layer
from ..undo import set_class
from .layers import FrozenLayer

__all__ = [
    "Adapter",
    "FrozenLayer",
    "adapter_of",
    "is_built_in",
    "original_of",
    "register_adapter",
]


class Adapter(NamedTuple):
    """The classes that a class is converted to.

    Attributes
    ----------
    ours : type
        Subclass of the original.
    synchronized : type or None
        The class used with ``sync=True``.
    """

    ours: type[nn.Module]
    synchronized: type[nn.Module] | None = None


_SYNC = "sync.SyncBatchNorm"

# By name, so that timm and torchvision are imported only if a model has one of their layers.
_NAMES: dict[str, tuple[str, str | None]] = {
    "torch.nn.modules.batchnorm.BatchNorm1d": ("modules.BatchNorm1d", _SYNC),
    "torch.nn.modules.batchnorm.BatchNorm2d": ("modules.BatchNorm2d", _SYNC),
    "torch.nn.modules.batchnorm.BatchNorm3d": ("modules.BatchNorm3d", _SYNC),
    "torch.nn.modules.batchnorm.SyncBatchNorm": (_SYNC, _SYNC),
    "timm.layers.norm_act.BatchNormAct2d": (
        "adapters.timm.BatchNormAct2d",
        "adapters.timm.SyncBatchNormAct",
    ),
    "timm.layers.norm_act.SyncBatchNormAct": (
        "adapters.timm.SyncBatchNormAct",
        "adapters.timm.SyncBatchNormAct",
    ),
    "timm.layers.norm_act.FrozenBatchNormAct2d": ("adapters.timm.FrozenBatchNormAct2d", None),
    "torchvision.ops.misc.FrozenBatchNorm2d": ("adapters.torchvision.FrozenBatchNorm2d", None),
}

_ADAPTERS: dict[type, Adapter] = {}


def adapter_of(kind: type) -> Adapter | None:
    """The adapter for layers of exactly this class."""
    found = _ADAPTERS.get(kind)
    if found is None:
        names = _NAMES.get(f"{kind.__module__}.{kind.__qualname__}")
        if names is None:
            return None
        ours, synchronized = names
        made = Adapter(_named(ours), None if synchronized is None else _named(synchronized))
        if issubclass(made.ours, kind):  # not another class with the same name
            found = _ADAPTERS[kind] = made
    return found


def original_of(kind: type) -> type[nn.Module] | None:
    """The class that becomes `kind` when it is converted; None if there is none."""
    for base in kind.__mro__[1:]:
        adapter = adapter_of(base)
        if adapter is not None and adapter.ours is kind:
            return base
    return None


def is_built_in(kind: type) -> bool:
    """Whether layers of exactly this class are known to normalize and activate, and no more.

    Classes given to `register_adapter` may do anything.
    """
    original = kind if adapter_of(kind) is not None else original_of(kind)
    return original is not None and f"{original.__module__}.{original.__qualname__}" in _NAMES


def register_adapter(
    original: type[nn.Module],
    ours: type[nn.Module],
    *,
    synchronized: type[nn.Module] | None = None,
) -> None:
    """Make `convert` change layers of exactly the class `original` to `ours`, and `revert` back.

    Parameters
    ----------
    original : type
        A class that `convert` skips, for example a subclass of `torch.nn.BatchNorm2d`.
    ours : type
        A subclass of `original` and of one of our layers; or of `original` and
        `adapters.FrozenLayer` if statistics, scale and shift are constant buffers. Its instances
        were made by the constructor of `original`. Define it in a module that can be imported;
        otherwise converted models cannot be pickled.
    synchronized : type
        A subclass of `original` and of our `SyncBatchNorm`, for ``convert(model, sync=True)``.
        Without it, that call raises an error.

    Raises
    ------
    ArgumentError
        A class is not such a subclass, or `original` already has another adapter.

    Examples
    --------
    >>> from torch import nn
    >>> from batchnorm.torch import BatchNorm1d, convert, register_adapter
    >>> class Doubled(nn.BatchNorm1d):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> class OurDoubled(Doubled, BatchNorm1d):  # its super().forward is now ours
    ...     pass
    >>> register_adapter(Doubled, OurDoubled)
    >>> isinstance(convert(nn.Sequential(Doubled(3)))[0], BatchNorm1d)
    True
    """
    _check_class("original", original, nn.Module)
    if original is nn.Module or issubclass(original, (Layer, FrozenLayer)):
        raise ArgumentError(
            f"original must be the class that convert replaces, got {original.__qualname__}, which "
            "is one of batchnorm.torch already, or the base class of every module."
        )
    _check_class("ours", ours, original)
    if ours is original or not issubclass(ours, (Layer, FrozenLayer)):
        raise ArgumentError(
            f"ours must be a subclass of a layer of batchnorm.torch, for example class Ours("
            f"{original.__name__}, batchnorm.torch.BatchNorm2d), or of adapters.FrozenLayer; got "
            f"{ours.__name__}."
        )
    if synchronized is not None:
        _check_class("synchronized", synchronized, _named(_SYNC))
    known = adapter_of(original)
    if known is not None and known != (ours, synchronized):
        raise ArgumentError(
            f"{original.__name__} already has an adapter, {known.ours.__module__}."
            f"{known.ours.__qualname__}; got {ours.__name__}."
        )
    probe = object.__new__(original)
    try:
        for kind in (ours, *(() if synchronized is None else (synchronized,))):
            set_class(probe, kind)
    except TypeError as error:
        raise ArgumentError(
            f"layers of {original.__name__} cannot become {kind.__name__}: {error}. A class with "
            "__slots__ cannot be converted."
        ) from None
    _ADAPTERS[original] = Adapter(ours, synchronized)


def _named(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    kind: type[nn.Module] = getattr(import_module(f"..{module}", __package__), attribute)
    return kind


def _check_class(name: str, kind: object, base: type) -> None:
    if not (isinstance(kind, type) and issubclass(kind, base)):
        got = kind.__qualname__ if isinstance(kind, type) else repr(kind)
        raise ArgumentError(f"{name} must be a subclass of {base.__name__}, got {got}.")
