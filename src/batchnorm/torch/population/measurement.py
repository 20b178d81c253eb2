"""What both methods work on: the model, its layers to measure, the data and the processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...moments import Moments
from ...progress import Show
from ..processes import Processes
from .batches import Source, to_device
from .layers import find_targets
from .state import RngState, generators_of
from .target import LayerInput, Target

Forward = Callable[[nn.Module, Any], Any]


class Strategy(Protocol):
    """A method to measure all layers. Those that it finishes have population statistics."""

    def enter(self, stack: ExitStack) -> None:
        """Prepare; `stack` undoes it, whatever happens."""

    def measure(self) -> None:
        """Finish all layers."""

    def on_input(self, target: Target, x: Tensor, mask: Tensor | None) -> LayerInput | None:
        """Measure what a layer is about to normalize (see `target.OnInput`)."""


class Measurement:
    """One measurement of population statistics, by any method.

    Attributes
    ----------
    targets : list of Target
        The layers to measure.
    skipped : dict
        Why, by the name of each layer that is not measured.
    forwards : int
        Forwards started in this process.
    notes : list of str
        For the report.
    show : callable
        Moves the progress bar on.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        samples: int | None,
        forward: Forward,
        device: torch.device | None,
        processes: Processes,
        compare_passes: bool,
    ) -> None:
        self.model, self.processes = model, processes
        self.targets, self.skipped = find_targets(model)
        self.rng = RngState(generators_of(data))
        self.source = Source(data, samples, self.rng, compare_passes)
        self.forwards = 0
        self.notes: list[str] = []
        self.show: Show = lambda text, done, total: None
        self._forward, self._device = forward, device

    def run_model(self, batch: Any) -> None:
        """Run the model on a batch."""
        self.forwards += 1
        if self._device is not None:
            batch = to_device(batch, self._device)
        self._forward(self.model, batch)

    # ---- with the other processes

    def check_same_model(self, method: str) -> None:
        """Raise in all processes if models or methods differ."""
        about = repr([method, *((target.name, target.channels) for target in self.targets)])
        digest = hashlib.sha256(about.encode()).digest()[:6]  # float64 holds 6 bytes exactly
        found = self.processes.gather([int.from_bytes(digest, "big"), len(self.targets)])
        if (found != found[0]).any():
            raise ArgumentError(
                "model must have the same batch norms to measure in every process (names, order "
                "and channels), and method must be the same, got models with "
                f"{', '.join(str(int(n)) for n in found[:, 1])} batch norms. Use the same model, "
                "frozen layers, mode and method in all processes."
            )

    def check_data(self) -> None:
        """Raise in all processes if none has data."""
        if not self.processes.any(self.source.batch_count > 0):
            raise ArgumentError(
                "data must give at least one batch, got none. A generator that has been used up "
                "gives nothing more."
            )

    def finish(self, target: Target) -> None:
        """Merge what all processes have measured of a layer, in the order of ranks."""
        moments, calls = Moments.merge(target.parts), target.calls
        if self.processes.size > 1:
            channels = target.channels
            fields = (moments.count, moments.mean, moments.m2, moments.dof)
            own = [np.broadcast_to(v, channels) for v in fields]
            rows = self.processes.gather(np.concatenate([*own, [calls]]))
            moments = Moments.merge(Moments(*row[:-1].reshape(4, channels)) for row in rows)
            calls = int(rows[:, -1].sum())
        target.finish(moments, calls)
