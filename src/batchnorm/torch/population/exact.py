"""The method "exact": layer by layer, each through finished layers, without running these again.

README.md explains how batches wait for a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError
from ...moments import Moments
from .batches import copy_of, fingerprint
from .baton import Suspended
from .measurement import Measurement
from .order import CallOrder, sorted_layers
from .runs import BatchRun, BatchRunner
from .target import LayerInput, OnInput, Target


class Restart(IntEnum):
    """Why all layers have to be measured again, from the first one."""

    NO = 0
    ORDER = 1  # an input came to a layer that was finished
    VARIES = 2
    OVERWRITES = 3
    SETTINGS = 4


# What the report says where no batch can wait.
_REASONS = {
    Restart.VARIES: "the data differ from pass to pass",
    Restart.OVERWRITES: "the loader reuses a batch's memory for the next one",
    Restart.SETTINGS: (
        "the forward changes settings of the process or tensors of the model between layers"
    ),
}


class Witness(NamedTuple):
    """A batch that has waited, and what its layers saw, to be compared with an unbroken run."""

    run: BatchRun
    batch: Any
    moments: dict[Target, Moments]


class Exact:
    """Layer by layer: batches run up to the first layer that is not finished, and wait there."""

    def __init__(self, measurement: Measurement, memory: float) -> None:
        self.measurement = measurement
        self.targets, self.source = measurement.targets, measurement.source
        self.processes = measurement.processes
        self._runner = BatchRunner(measurement, memory)
        self._runs: list[BatchRun] = []
        self._on_input: OnInput = self._measure_and_wait
        self._order: dict[int, int] | None = None  # rank of each target, once it was looked up
        # Layers that get inputs after they are finished, in whatever order layers are finished.
        self._unordered: set[Target] = set()
        self._restart = Restart.NO
        self._witness: Witness | None = None
        self._noted = False

    def enter(self, stack: ExitStack) -> None:
        """Prepare to run batches; end all threads when `stack` closes."""
        self._runner.enter(stack)
        stack.callback(self._stop_all)

    def _stop_all(self) -> None:
        self._runner.stop_all(self._runs)  # may be interrupted, and called again
        self._runs = []

    # ---- sweeps

    def measure(self) -> None:
        """Finish all layers."""
        started_again = False
        while True:
            restart = self._sweep()
            if restart == Restart.ORDER:
                self._find_order()
            elif restart == Restart.VARIES and not started_again:
                started_again = True
                self.source.forget_first_pass()
            elif restart:
                self._let_no_batch_wait(_REASONS[restart])
            elif self.processes.any(self.processes.together(self._differs_from_unbroken_run)):
                self._let_no_batch_wait("the forward keeps something between layers")
            else:
                break
        if self.processes.any(self.source.varies) and not self._noted:
            self._note_passes(_REASONS[Restart.VARIES])

    def _let_no_batch_wait(self, why: str) -> None:
        self._runner.budget.limit = 0.0
        self._note_passes(why)

    def _note_passes(self, why: str) -> None:
        self._noted = True
        self.measurement.notes.append(
            f"{why}; so no batch waited for a layer, and each layer took a pass over the layers "
            "before it"
        )

    def _sweep(self) -> Restart:
        """Finish layer after layer, or return why all have to be measured again."""
        self._stop_all()
        for target in self.targets:
            target.start_over()
        self._restart, self._witness = Restart.NO, None
        self.processes.together(self._run_to_first_layer)
        self.measurement.check_data()
        done = 0
        while True:
            restart, nearest = self._next()
            if restart or nearest is None:
                return restart
            if nearest in self._unordered:
                self.processes.together(partial(self._measure_in_whole_pass, nearest))
            self.measurement.finish(nearest)
            done += 1
            self.measurement.show(f"layer {nearest.name}", done, len(self.targets))
            self.processes.together(partial(self._run_to_next_layer, nearest))

    def _next(self) -> tuple[Restart, Target | None]:
        """The layer to finish now: the one before which the least advanced batch waits."""
        best: tuple[float, int] | None = None
        for run in self._runs:
            if run.waits_at is not None:
                advance: float = run.passed
                if self._order is not None:
                    advance = self._order.get(run.waits_at.index, len(self.targets))
                if best is None or advance < best[0]:
                    best = advance, run.waits_at.index
        rows = self.processes.gather([self._restart, *((math.inf, -1) if best is None else best)])
        # Of processes that are equally advanced, the first decides.
        _, least, index = min(rows, key=lambda row: float(row[1]))
        restart = Restart(int(rows[:, 0].max()))
        return restart, None if math.isinf(least) else self.targets[int(index)]

    def _run_to_first_layer(self) -> None:
        """Run every batch up to its first layer."""
        self._runs = []
        self._runner.budget.begin_layer()
        last, found = None, None
        for index, batch in enumerate(self.source.batches()):
            self._check_source()
            if found is not None and fingerprint(last) != found:
                self._restart = Restart.OVERWRITES
            run = BatchRun(index)
            self._runs.append(run)
            self._start(run, batch)
            self.measurement.show("first layer, batch", index + 1, self.source.length)
            if self._restart:
                return
            last, found = batch, None if run.thread is None else fingerprint(batch)

    def _run_to_next_layer(self, target: Target) -> None:
        """Run every batch that waits at a layer, now finished, up to its next one."""
        waiting = [run for run in self._runs if run.waits_at is target]
        self._runner.budget.begin_layer()
        if all(run.thread is not None for run in waiting):
            for run in waiting:
                self._run_on(run)
                if self._restart:
                    return
            return
        left = {run.index: run for run in waiting}
        for index, batch in enumerate(self.source.batches()):
            self._check_source()
            if index in left and not self._restart:
                run = left.pop(index)
                if run.thread is None:
                    self._start(run, batch)
                else:
                    self._run_on(run)
            if self._restart or not left:
                return
        raise ArgumentError(
            f"data must give the same number of batches in every pass, got {len(self._runs)} in "
            f"the first, and then no batch {min(left)}. Pass a list, or use method='precise'."
        )

    def _check_source(self) -> None:
        if self.source.varies and self._runner.budget.limit:
            self._restart = Restart.VARIES

    # ---- one batch

    def _start(self, run: BatchRun, batch: Any) -> None:
        """Run a batch from the beginning."""
        if self._restart:
            return
        self._runner.prepare(run, batch)
        # The forward may change the batch.
        copied = copy_of(batch) if run.thread is not None and self._witness is None else None
        self._run_on(run, batch)
        if run.thread is not None and self._witness is None and run.waits_at is not None:
            assert run.moments is not None
            self._witness = Witness(run, copied, {run.waits_at: run.moments})

    def _run_on(self, run: BatchRun, batch: Any = None) -> None:
        """Run a batch up to its next layer; `batch` is needed if it is not in a thread."""
        self._runner.run_on(run, batch)
        if self._runner.settings_changed:
            self._restart = Restart.SETTINGS

    # ---- at a layer

    def on_input(self, target: Target, x: Tensor, mask: Tensor | None) -> LayerInput | None:
        """Measure the input of a layer, as the present pass requires."""
        return self._on_input(target, x, mask)

    def _measure_and_wait(
        self, target: Target, x: Tensor, mask: Tensor | None
    ) -> LayerInput | None:
        """Measure the input of a layer that is not finished, and wait until it is."""
        run = self._runner.active
        ended = run.waits_at is not None if run.thread is None else run.thread.stopping
        if ended:  # the forward caught Suspended, and goes on
            raise Suspended
        run.calls[target] += 1
        if target.finished:
            if target not in self._unordered and (
                run.calls[target] > 1 or run.index not in target.batches
            ):
                self._missed(target)
            run.passed += 1
            return None
        seen = target.measure(x, mask)
        if seen is None:
            return None
        target.add(seen.moments, run.index)
        run.waits_at, run.moments = target, seen.moments
        if self._witness is not None and self._witness.run is run:
            self._witness.moments[target] = seen.moments
        if run.thread is None:
            raise Suspended
        run.thread.pause()
        run.waits_at = None
        run.passed += 1
        return None

    def _missed(self, target: Target) -> None:
        """An input came to a layer that is finished."""
        if self._order is None:
            self._restart = Restart.ORDER
            raise Suspended
        note = (
            f"'{target.name}': which layers run depends on statistics, and some of its inputs were "
            "not measured"
        )
        if note not in self.measurement.notes:
            self.measurement.notes.append(note)

    # ---- passes in which no batch waits

    def _run_whole_pass(
        self, on_input: OnInput, end_batch: Callable[[], None] = lambda: None
    ) -> None:
        """Run every batch from the beginning to the end."""
        self._on_input, self._runner.active = on_input, BatchRun(-1)
        for index, batch in enumerate(self.source.batches()):
            with self._runner.random_numbers_of(BatchRun(index)):
                self.measurement.run_model(batch)
            end_batch()
        self._on_input = self._measure_and_wait

    def _measure_in_whole_pass(self, target: Target) -> None:
        """Measure a layer over all its calls; layers not finished normalize by the batch."""

        def on_input(other: Target, x: Tensor, mask: Tensor | None) -> LayerInput | None:
            seen = None if other.finished else other.measure(x, mask)
            if seen is not None and other is target:
                target.add(seen.moments)
            return seen

        target.parts, target.calls = [], 0
        self._run_whole_pass(on_input)

    def _find_order(self) -> None:
        """Run all batches once to see in what order layers run, and how often."""
        self._stop_all()
        for target in self.targets:
            target.start_over()
        n = len(self.targets)
        calls = CallOrder(n)

        def on_input(target: Target, x: Tensor, mask: Tensor | None) -> LayerInput | None:
            calls.called(target.index)
            return target.measure(x, mask)

        self.processes.together(lambda: self._run_whole_pass(on_input, calls.end_batch))
        rows = self.processes.gather(np.append(calls.before.ravel(), calls.repeated))
        before, repeated = rows[:, : n * n].max(0).reshape(n, n), rows[:, n * n :].max(0)
        order, circular = sorted_layers(before)
        self._order = {layer: rank for rank, layer in enumerate(order)}
        self._unordered = {
            target for target in self.targets if repeated[target.index] or target.index in circular
        }
        for target in self.targets:
            if target in self._unordered:
                self.measurement.notes.append(
                    f"'{target.name}': it runs several times in a forward, or in another order "
                    "from batch to batch, and was measured while it normalized by the batch"
                )

    def _differs_from_unbroken_run(self) -> bool:
        """True if a batch that has waited saw other inputs than it sees in an unbroken run."""
        if self._witness is None or len(self._runs) == 1:
            return False
        run, batch, recorded = self._witness
        same = True

        def on_input(target: Target, x: Tensor, mask: Tensor | None) -> None:
            nonlocal same
            moments = recorded.get(target)
            if moments is not None and target not in self._unordered and same:
                seen = target.measure(x, mask)
                same = seen is not None and _agree(seen, moments)

        self._on_input, self._runner.active = on_input, BatchRun(-1)
        with self._runner.random_numbers_of(BatchRun(run.index)):
            self.measurement.run_model(batch)
        self._on_input = self._measure_and_wait
        return not same


def _agree(seen: LayerInput, recorded: Moments) -> bool:
    """True if two moments of the same input differ by rounding alone.

    Operations that are not deterministic may differ by some units of the type; more than the power
    3/4 of one unit counts as another input. A false alarm costs time, and nothing else.
    """
    allowed = torch.finfo(seen.x.dtype).eps ** 0.75
    mean = np.abs(seen.moments.mean - recorded.mean) <= allowed * recorded.std()
    var = np.abs(seen.moments.m2 - recorded.m2) <= allowed * recorded.m2
    same = np.array_equal(seen.moments.count, recorded.count)
    return bool(seen.moments == recorded or (same and mean.all() and var.all()))
