"""What forwards change outside of a model: classes, global names, and what these contain."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import Proxy

from ..internals import fx_patches_undone

__all__ = ["collecting_what_is_new", "kept_outside", "without_placeholders"]

#: How deep in tuples and lists placeholders are looked for.
DEPTH = 3


@contextmanager
def kept_outside(model: nn.Module) -> Iterator[None]:
    """Restore what forwards and tracing change in the classes of modules, also of copies."""
    classes = [(kind, dict(vars(kind))) for kind in _classes(model)]
    try:
        with fx_patches_undone():
            yield
    finally:
        for kind, known in classes:
            for name, value in list(vars(kind).items()):
                if name not in known:
                    delattr(kind, name)
                elif value is not known[name]:
                    setattr(kind, name, known[name])


@contextmanager
def without_placeholders(model: nn.Module, alive: Iterable[Proxy]) -> Iterator[None]:
    """Take placeholders out of global names and containers, where models keep tensors for later.

    Parameters
    ----------
    alive
        Those that are left at the end; if there are none, nothing has to be looked through.
    """
    modules = (sys.modules.get(str(kind.__module__)) for kind in _classes(model))
    names = list({id(m): vars(m) for m in modules if hasattr(m, "__dict__")}.values())
    spaces = [(held, dict(held)) for held in (*names, *map(vars, _classes(model)))]
    values = [v for _, known in spaces for v in known.values()]
    containers = [(v, copy.copy(v)) for v in values if type(v) in (dict, list, set)]
    try:
        yield
    finally:
        if any(True for _ in alive):
            for held, known in (*spaces[: len(names)], *containers):
                _purge(held, known)


def _classes(model: nn.Module) -> list[type]:
    """The classes of modules that are not of torch."""
    kinds = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
    return [k for k in kinds if str(k.__module__).partition(".")[0] not in ("torch", "builtins")]


def _purge(held: Any, known: Any) -> None:
    """Put back what was in a container in place of placeholders."""
    if isinstance(held, dict):
        for key, value in list(held.items()):
            if _is_placeholder((key, value)):
                del held[key]
                if key in known:
                    held[key] = known[key]
    elif isinstance(held, set):
        held.difference_update([v for v in list(held) if _is_placeholder(v)])
    elif any(map(_is_placeholder, list(held))):
        held[:] = [v for v in held if not _is_placeholder(v)]


def _is_placeholder(value: Any, depth: int = DEPTH) -> bool:
    if type(value) in (tuple, list) and depth:
        return any(_is_placeholder(v, depth - 1) for v in list(value))
    return issubclass(type(value), Proxy)


@contextmanager
def collecting_what_is_new() -> Iterator[None]:
    """Let the garbage collector look at nothing that is there already, which takes long."""
    if gc.get_freeze_count():  # of somebody else
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
