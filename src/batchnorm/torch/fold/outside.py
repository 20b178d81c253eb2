"""What forwards change outside of a model: classes, global names, and what these contain."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["kept_outside"]


@contextmanager
def kept_outside(model: nn.Module) -> Iterator[None]:
    """Restore what forwards change in the classes of modules, which copies have in common.

    And take placeholders out of global names and containers, where models keep tensors for later.
    """
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    kinds = {k for k in kinds if k.__module__.partition(".")[0] not in ("torch", "builtins")}
    classes = [(kind, dict(vars(kind))) for kind in kinds]
    places = {kind.__module__ for kind in kinds} & sys.modules.keys()
    names = [(vars(sys.modules[place]), dict(vars(sys.modules[place]))) for place in places]
    values = [v for _, known in (*classes, *names) for v in known.values()]
    containers = [(v, copy.copy(v)) for v in values if type(v) in (dict, list, set)]
    try:
        yield
    finally:
        for kind, known in classes:
            for name, value in list(vars(kind).items()):
                if name not in known:
                    delattr(kind, name)
                elif value is not known[name]:
                    setattr(kind, name, known[name])
        for held, known in (*names, *containers):
            _purge(held, known)


def _purge(held: Any, known: Any) -> None:
    """Put back what was in a container in place of placeholders."""
    if isinstance(held, dict):
        for key, value in list(held.items()):
            if _is_placeholder((key, value)):
                del held[key]
                if key in known:
                    held[key] = known[key]
    elif any(map(_is_placeholder, held)):
        left = [v for v in held if not _is_placeholder(v)]
        held.clear()
        (held.extend if isinstance(held, list) else held.update)(left)


def _is_placeholder(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_is_placeholder, value))
    return issubclass(type(value), Proxy)
