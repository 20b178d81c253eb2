"""A run of a model, as a tree of the calls of its modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TENSOR", "Call", "Spec", "of_dict", "record"]


class _Tensor:
    def __repr__(self) -> str:
        return "Tensor"


#: Stands for a tensor in a `Spec`.
TENSOR: Final = _Tensor()


class Spec(NamedTuple):
    """What a module was called with; TENSOR in place of each tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Call:
    """A call of a module.

    Attributes
    ----------
    name
        Of the module; its first one.
    spec
        What it was called with.
    inner
        The calls that it made.
    rank
        Number of axes of its output, if that is a tensor.
    """

    name: str
    spec: Spec
    inner: list[Call] = field(default_factory=list)
    rank: int | None = None

    def __iter__(self) -> Iterator[Call]:
        """Over the call itself and all below it."""
        yield self
        for call in self.inner:
            yield from call

    def of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self if call.name == name and call is not self]

    def specs(self) -> dict[str, list[Spec]]:
        """For each module, what it was called with; once where only values differ."""
        found: dict[str, dict[Any, Spec]] = {}
        for call in self:
            if call is self:
                continue
            found.setdefault(call.name, {}).setdefault(_kind(call.spec), call.spec)
        return {name: list(kinds.values()) for name, kinds in found.items()}


def _kind(value: Any) -> Any:
    """What distinguishes calls: the structure, and the types of what is no tensor."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_kind, value))
    if isinstance(value, dict):
        return tuple((str(key), _kind(item)) for key, item in value.items())
    return value if value is None or value is TENSOR or isinstance(value, bool) else type(value)


def _structure(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TENSOR
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_structure, value))
    if type(value) in (list, tuple):
        return type(value)(map(_structure, value))
    if isinstance(value, dict):
        return of_dict(value, _structure)
    return value


def of_dict(value: Any, change: Callable[[Any], Any]) -> Any:
    """A dict of the same kind with other values."""
    changed = copy.copy(value)
    changed.update((key, change(item)) for key, item in value.items())
    return changed


def record(model: nn.Module, run: Callable[[nn.Module], Any]) -> Call:
    """The calls that ``run(model)`` makes of its modules, below one that stands for all."""
    top = Call("", Spec((), {}))
    stack = [top]

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(name, Spec(_structure(args), _structure(kwargs)))
            stack[-1].inner.append(call)
            stack.append(call)

        return hook

    def leave(_module: nn.Module, _args: Any, result: Any) -> None:
        stack.pop().rank = result.dim() if isinstance(result, Tensor) else None

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.callback(
                    module.register_forward_pre_hook(enter(name), with_kwargs=True).remove
                )
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        run(model)
    return top
