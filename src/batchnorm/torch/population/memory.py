"""The memory that waiting batches keep."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from torch import Tensor, nn

from .batches import address, is_dense, tensors_in
from .system import return_freed_memory

# More than half full, the budget returns freed memory to the system after each so many bytes.
_RETURN_AFTER = 1 << 25


class Activations:
    """The tensors of one forward that are still alive.

    Counted are tensors that go into modules and come out of them, but not those of the model.
    """

    def __init__(self, batch: Any, model_addresses: set[int]) -> None:
        self._model_addresses = model_addresses
        # If batches are parts of one tensor, each keeps its part of it.
        self._inputs = {address(t): t.nbytes for t in tensors_in(batch) if is_dense(t)}
        self._refs: list[weakref.ref[Tensor]] = []

    def note(self, values: Any) -> None:
        """Take notice of the tensors in `values`, without keeping them alive."""
        self._refs += map(weakref.ref, tensors_in(values))

    def nbytes(self) -> int:
        """Bytes of those that are alive."""
        self._refs = [ref for ref in self._refs if ref() is not None]
        sizes: dict[int, int] = {}
        for ref in self._refs:
            t = ref()
            if t is not None and is_dense(t):
                at = address(t)
                sizes[at] = self._inputs.get(at, t.untyped_storage().nbytes())
        return sum(size for at, size in sizes.items() if at not in self._model_addresses)


def addresses_of(model: nn.Module) -> set[int]:
    """Addresses of the parameters and buffers of a model."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return {address(t) for t in tensors if is_dense(t)}


class Budget:
    """The bytes that waiting batches may keep, together.

    Attributes
    ----------
    limit : float
        Bytes; with 0 no batch waits.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._kept = self._expected = self._since_return = 0

    def clear(self) -> None:
        """No batch waits any more."""
        self._kept = 0

    def begin_layer(self) -> None:
        """Expect nothing: batches keep other tensors at the next layer."""
        self._expected = 0

    def has_room(self) -> bool:
        """True if a batch that keeps as much as the last one fits in."""
        return self.limit > 0 and self._kept + self._expected <= self.limit

    def keep(self, nbytes: int) -> bool:
        """Count what a batch keeps at a layer; False, and nothing is counted, without room."""
        self._expected = nbytes
        self._since_return += nbytes
        if self._kept + nbytes > self.limit:
            return False
        self._kept += nbytes
        return True

    def release(self, nbytes: int) -> None:
        """A batch that kept so much goes on."""
        self._kept -= nbytes

    def return_freed(self) -> None:
        """Return freed memory to the system, if the budget gets short and it is worth the call."""
        if self._since_return >= _RETURN_AFTER and self._kept > self.limit / 2:
            self._since_return = 0
            return_freed_memory()
