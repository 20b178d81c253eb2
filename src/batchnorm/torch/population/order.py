"""The order in which layers run, if it is not the same in every batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray


class CallOrder:
    """Records which layers run in what order, and how often, batch by batch.

    Attributes
    ----------
    before : (layers, layers)
        1 where the first call of one layer comes before that of another in some batch.
    repeated : (layers,)
        1 for layers that run several times in a forward.
    """

    def __init__(self, layers: int) -> None:
        self.before = np.zeros((layers, layers))
        self.repeated = np.zeros(layers)
        self._calls: Counter[int] = Counter()

    def called(self, layer: int) -> None:
        """A layer runs."""
        self._calls[layer] += 1

    def end_batch(self) -> None:
        """The forward of a batch has ended."""
        sequence = list(self._calls)  # in the order of first calls
        for i, first in enumerate(sequence):
            self.before[first, sequence[i + 1 :]] = 1
            self.repeated[first] += self._calls[first] > 1
        self._calls.clear()


def sorted_layers(before: NDArray[np.float64]) -> tuple[list[int], set[int]]:
    """Layers, each after all that run before it in some batch, and those where this is impossible.

    Among layers that run before and after each other, the one with the fewest before it is first.
    """
    left, order, circular = list(range(len(before))), list[int](), set[int]()
    while left:
        predecessors = {i: sum(before[j, i] for j in left if j != i) for i in left}
        first = min(left, key=lambda i: predecessors[i])
        if predecessors[first]:
            circular.add(first)
        order.append(first)
        left.remove(first)
    return order, circular
