"""What is not of the model, and left as it was: random numbers, and how interrupts are handled."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Rng:
    """The state of the random number generators of torch, NumPy and Python, and of some others."""

    def __init__(self, others: Iterable[torch.Generator] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if uses_cuda() else None
        self._numpy = np.random.get_state()  # noqa: NPY002 (it is what others may use)
        self._python = random.getstate()
        self._others = [(generator, generator.get_state()) for generator in others]

    def restore(self) -> None:
        """Make it the state again."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)
        for generator, state in self._others:
            generator.set_state(state)


def uses_cuda() -> bool:
    """Whether there are random numbers and streams of CUDA; asking begins nothing."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seed(number: int) -> None:
    """Begin all random numbers at `number`."""
    torch.default_generator.manual_seed(number)
    if uses_cuda():
        torch.cuda.manual_seed_all(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def generators_of(data: Any) -> list[torch.Generator]:
    """Those of a data loader."""
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    found = (getattr(owner, "generator", None) for owner in (data, *samplers))
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold interrupts back until the block is through."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])
