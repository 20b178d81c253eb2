"""Changes to layers, all of which are undone if there is an exception."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["set_class", "undone_on_error"]

_CLASS = vars(object)["__class__"]


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of an object, bypassing any `__setattr__` or `__class__` of that class."""
    _CLASS.__set__(module, kind)


@contextmanager
def undone_on_error(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Restore classes, attributes, buffers and `requires_grad` of `layers` if the block raises.

    Values of tensors are not restored.
    """
    before = [
        (
            layer,
            type(layer),
            dict(layer.__dict__),
            dict(layer._buffers),
            [(p, p.requires_grad, p.grad) for p in layer.parameters()],
        )
        for layer in layers
    ]
    try:
        yield
    except BaseException:
        for layer, kind, attributes, buffers, parameters in before:
            set_class(layer, kind)
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            layer._buffers.clear()
            layer._buffers.update(buffers)
            for parameter, requires_grad, grad in parameters:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = grad
        raise
