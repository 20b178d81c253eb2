"""Batches on their way through the model; each may wait at a layer, in a thread of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...moments import Moments
from .baton import PausableThread, Suspended
from .measurement import Measurement
from .memory import Activations, Budget, addresses_of
from .state import (
    RngState,
    ThreadSettings,
    other_threads_can_run_the_model,
    process_settings,
    seed,
)
from .system import most_threads
from .target import Target


class BatchRun:
    """One batch on its way through the model.

    Attributes
    ----------
    waits_at : Target
        The layer before which it waits; None once it is through.
    moments : Moments
        Of its input to that layer.
    thread : PausableThread
        The thread in which it waits; None if it has to be run again from the start.
    passed : int
        Calls of layers that it has passed.
    rng : RngState
        Its random numbers; None at the start.
    nbytes : int
        Counted in the budget while it waits.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.waits_at: Target | None = None
        self.moments: Moments | None = None
        self.thread: PausableThread | None = None
        self.rng: RngState | None = None
        self.calls: Counter[Target] = Counter()
        self.passed = 0
        self.activations: Activations | None = None
        self.nbytes = 0


class BatchRunner:
    """Runs batches up to a layer, one at a time, and lets them wait there as memory allows.

    Attributes
    ----------
    active : BatchRun
        The batch that runs; one with the index -1 where no batch waits.
    budget : Budget
        The memory that waiting batches may keep.
    settings_changed : bool
        A batch waits where its forward has changed settings of the process, or replaced tensors of
        the model (`torch.func.functional_call`). Another batch would run with these, and leave its
        own behind.
    """

    def __init__(self, measurement: Measurement, memory: float) -> None:
        self.measurement = measurement
        self.budget = Budget(memory if other_threads_can_run_the_model() else 0.0)
        self.active = BatchRun(-1)
        self.settings_changed = False
        self._most_threads, self._threads = most_threads(), 0
        self._model_addresses = addresses_of(measurement.model)

    def enter(self, stack: ExitStack) -> None:
        """Take notice of tensors that go into modules and come out, until `stack` closes."""
        self._process_settings = process_settings()
        self._thread_settings = ThreadSettings(self.measurement.model)
        self._tensors = list(self._own_tensors())
        if not self.budget.limit:
            return
        for module in self.measurement.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                for register in (module.register_forward_pre_hook, module.register_forward_hook):
                    stack.callback(register(self._note, with_kwargs=True).remove)

    def _own_tensors(self) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor | None]]:
        """Where the model keeps its parameters and the statistics that are measured."""
        for module in self.measurement.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                for name, parameter in module._parameters.items():
                    yield cast(Any, module._parameters), name, parameter
        for target in self.measurement.targets:
            buffers = target.layer._buffers
            yield buffers, "running_mean", buffers["running_mean"]

    def _has_changed_settings(self) -> bool:
        replaced = any(tensors.get(name) is not own for tensors, name, own in self._tensors)
        return replaced or process_settings() != self._process_settings

    def _note(self, module: nn.Module, *values: Any) -> None:
        if self.active.thread is not None and self.active.activations is not None:
            self.active.activations.note(values)

    def prepare(self, run: BatchRun, batch: Any) -> None:
        """Get ready to run a batch from the beginning; in a thread if it may wait."""
        run.waits_at, run.rng, run.passed = None, None, 0
        run.calls.clear()
        run.activations = Activations(batch, self._model_addresses)
        if not (self.budget.has_room() and self._threads < self._most_threads):
            return
        run.thread = PausableThread(partial(self._run_in_thread, [batch]))
        try:
            run.thread.start()
            self._threads += 1
        except RuntimeError:  # the system allows no more of them
            run.thread, self._most_threads = None, self._threads

    def _run_in_thread(self, batch: list[Any]) -> None:
        """`batch` is a list of one, emptied so that nothing but the forward keeps the batch."""
        with self._thread_settings.applied():
            self.measurement.run_model(batch.pop())

    def run_on(self, run: BatchRun, batch: Any) -> None:
        """Run a batch until it waits at a layer or is through; raise the error of its forward.

        `batch` is used if it is not in a thread.
        """
        self.budget.release(run.nbytes)
        run.nbytes = 0
        with self.random_numbers_of(run):
            self.active = run
            if run.thread is not None:
                run.thread.resume()
            else:
                with suppress(Suspended):
                    self.measurement.run_model(batch)
        if run.thread is not None:
            self._let_wait(run)

    def _let_wait(self, run: BatchRun) -> None:
        """Keep the thread of a batch, if it waits and there is room for it; else stop it."""
        assert run.activations is not None
        waits = run.waits_at is not None
        if waits and self._has_changed_settings():
            self.settings_changed = True
        if waits and not self.settings_changed:
            nbytes = run.activations.nbytes()
            if self.budget.keep(nbytes):
                run.nbytes = nbytes
            else:
                self._stop(run)
            self.budget.return_freed()
        else:
            self._stop(run)

    def _stop(self, run: BatchRun) -> None:
        """End the thread of a batch, which is run again if it has layers before it."""
        assert run.thread is not None
        self.active = run
        run.thread.stop()
        run.thread, run.rng, run.nbytes = None, None, 0
        self._threads -= 1

    def stop_all(self, runs: list[BatchRun]) -> None:
        """End the threads of all batches, wherever they are."""
        for run in runs:
            if run.thread is not None:
                self.active = run
                run.thread.stop()
                run.thread = None
        self._threads = 0
        self.budget.clear()
        self.settings_changed = False

    @contextmanager
    def random_numbers_of(self, run: BatchRun) -> Iterator[None]:
        """The random numbers of a batch: the same each time that it is run."""
        outside = RngState()
        if run.rng is None:
            seed(run.index)
        else:
            run.rng.restore()
        try:
            yield
        finally:
            run.rng = RngState()
            outside.restore()
