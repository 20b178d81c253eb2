"""`recalibrate`: temporary changes to the model, and how they are undone.

A layer is measured by the moments of its input, in float64, merged by count. The whole model is in
evaluation mode meanwhile. A layer that shall normalize by the batch is given the statistics of the
batch in place of its running statistics, so that nothing else of training mode takes place: no
updates, counters, warnings or synchronization. The buffers of the layers are untouched until all
statistics are known.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import ArgumentError
from ...progress import bar
from ..processes import Processes
from .batches import call_with_first_item
from .exact import Exact
from .layers import unwrapped
from .measurement import Forward, Measurement, Strategy
from .precise import Precise
from .report import Recalibration
from .system import interrupts_delayed
from .target import Target

METHODS = ("precise", "exact")


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: str = "precise",
    forward: Forward | None = None,
    samples: int | None = None,
    device: Any = None,
    memory: float = 2 << 30,
    process_group: Any = None,
    progress: bool = True,
) -> Recalibration:
    """Replace running statistics by the population statistics of `data`.

    The mean and variance of a layer become those of all values that reach it, over all batches,
    merged by count in float64 and rounded once. ``num_batches_tracked`` becomes the number of calls
    measured, so that training with ``momentum=None`` continues from there.

    Measured are our layers, torch's, and subclasses of either, such as timm's ``BatchNormAct2d``.
    Skipped are layers with frozen statistics (`freeze`, torchvision's ``FrozenBatchNorm2d``),
    layers in evaluation mode while the model as a whole is in training mode, layers without running
    statistics, and layers that the data never reach.

    Parameters
    ----------
    model : Module
        In any mode. `DistributedDataParallel` and `torch.compile` are unwrapped, and the model runs
        uncompiled.
    data : iterable of tensors, tuples or dicts
        Batches of any size, also empty ones. The model is called with the first item of a tuple or
        dict. "exact" may go through the data several times: a generator is for "precise" only.
    method : "precise" or "exact"
        "precise" takes one pass, in which all layers normalize by the batch, as in training. A
        layer behind another therefore gets other inputs than in evaluation. "exact" measures layer
        by layer, in the order in which they run, each through layers that already use their
        population statistics: on the inputs that the layer gets in evaluation.
    forward : callable
        ``forward(model, batch)`` runs the model, if the first item of a batch is not its input.
    samples : int
        Stop after the batch that completes this number of examples in this process.
    device : device
        Where batches are sent; by default the device of the model's first parameter.
    memory : int
        Bytes that "exact" may keep in activations of batches that wait for a layer to be measured.
        A batch for which there is no room runs again from the start, up to the next layer.
        ``math.inf`` keeps all; with 0 no batch waits, and all run in the calling thread.
    process_group : ProcessGroup
        The processes that measure together, each its own share of the data, if `torch.distributed`
        is initialized; None for the default group. All end with the same bits.
    progress : bool
        Show a progress bar on the terminal, in the first process.

    Returns
    -------
    Recalibration
        How far the statistics of each layer moved, which layers were skipped, and what it took.

    Raises
    ------
    ArgumentError
        An argument cannot be used, the model has no batch norm, or there are no data.
    ShapeError
        "precise" met a batch of one value per channel, or a layer saw one value in all.
    NonFiniteError
        The input of a layer, or its statistics in the type of its buffers, are not finite.
    SynchronizationError
        Another process raised, or could not be reached.

    Whatever is raised, also by an interrupt: the statistics and everything else are as before.

    Notes
    -----
    Modes, momentum, hooks, gradients and random number generators are the same afterwards. During
    the measurement dropout and all other modules are in evaluation mode, without gradients, under
    the autocast of the caller.

    "exact" runs each batch in a thread of its own, one at a time, up to the first layer that has
    not been measured; there it waits for the other batches. The total cost is one forward pass over
    the data and, for each batch that waits, the activations that are alive at that layer. Tensors
    that go into modules and come out of them count towards `memory`; the batch that is running
    comes on top. Without memory each layer costs a pass over the layers before it.

    If a forward keeps something between two layers outside its own variables, for example in an
    attribute of a module, another batch would find it there. Therefore one batch runs again at the
    end, and if its results differ, the work is done once more without waiting batches, and the
    report says so. The same holds if a forward changes settings of the process for a part of the
    model, or replaces its parameters (`torch.func.functional_call`), and if the loader reuses a
    batch's memory for the next one. A lock that is held across a
    layer would block everything, and thread-local values are not found in another thread: use
    ``memory=0``, which needs no threads.

    Every pass over the data starts with the same random numbers, so that a loader shuffles and
    augments alike each time, also in workers unless they persist. If passes differ nevertheless, no
    batch waits, each layer is measured over another pass, and the report says so.

    A layer that runs several times in a forward is measured over all its calls. Its statistics
    cannot be known before they are used, so it normalizes by the batch while it is measured, and so
    do the layers behind it.

    A subclass of torch's layer is measured where its forward calls
    `torch.nn.functional.batch_norm` with its running statistics, as torch's own does. If it
    computes the normalization in another way, it is skipped.

    References
    ----------
    Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3: what running averages lack.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from batchnorm.torch import recalibrate
    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> x = torch.randn(100, 2) + 5
    >>> report = recalibrate(net, x.split(32), method="exact")
    >>> bool(net.eval()(x).mean(0).abs().max() < 1e-6)
    True
    >>> [layer.name for layer in report.layers][0]
    '0'
    """
    processes = Processes(process_group, "recalibrate")

    def prepare() -> Session:
        _check_arguments(model, data, method, samples, memory)
        inside = unwrapped(model)
        measurement = Measurement(
            inside,
            data,
            samples,
            call_with_first_item if forward is None else forward,
            _device_of(device, inside),
            processes,
            compare_passes=method == "exact",
        )
        exact = method == "exact"
        strategy = Exact(measurement, memory) if exact else Precise(measurement)
        return Session(measurement, strategy, with_bar=progress and processes.rank == 0)

    started = time.perf_counter()
    session = processes.together(prepare)
    session.measurement.check_same_model(method)
    try:
        # Twice: the first may be interrupted before it delays interrupts.
        try:
            session.enter()
            session.measure()
        finally:
            session.leave()
    finally:
        session.leave()
    return session.write(method, started)


class Session:
    """The temporary changes of one call of `recalibrate`, and how they are undone."""

    def __init__(self, measurement: Measurement, strategy: Strategy, with_bar: bool) -> None:
        self.measurement, self.strategy = measurement, strategy
        self._with_bar = with_bar
        self._modes = [(module, module.training) for module in measurement.model.modules()]
        self._entered: ExitStack | None = None

    def enter(self) -> None:
        """Put the model into evaluation mode, without gradients, and intercept its layers."""
        measurement = self.measurement
        with interrupts_delayed():
            self._entered = stack = ExitStack()
            show = stack.enter_context(bar(shown=self._with_bar))
            measurement.show = lambda text, done, total: show(f"recalibrate: {text}", done, total)
            stack.callback(measurement.rng.restore)
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            torch.set_grad_enabled(False)
            stack.callback(self._restore_modes)
            for module, _ in self._modes:
                module.training = False
                if isinstance(module, DistributedDataParallel):  # would wait for the others
                    sync = module.require_forward_param_sync
                    stack.callback(setattr, module, "require_forward_param_sync", sync)
                    module.require_forward_param_sync = False
            for target in measurement.targets:
                target.intercept(self.strategy.on_input, stack)
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                # Compiled parts of the model would bypass hooks and interception.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.strategy.enter(stack)

    def _restore_modes(self) -> None:
        for module, mode in self._modes:
            module.training = mode

    def measure(self) -> None:
        """Measure all layers that the data reach."""
        if self.measurement.targets:
            self.strategy.measure()

    def leave(self) -> None:
        """Undo all changes; to call it again does no harm."""
        with interrupts_delayed():
            stack, self._entered = self._entered, None
            if stack is not None:
                stack.close()

    def write(self, method: str, started: float) -> Recalibration:
        """Write all new statistics into the layers, in all processes, or none; report."""
        measurement = self.measurement
        processes, source = measurement.processes, measurement.source
        numbers = [source.example_count, source.batch_count, measurement.forwards]
        examples, batches, forwards = map(int, processes.gather(numbers).sum(0))
        found = [target for target in measurement.targets if target.found is not None]
        skipped = dict(measurement.skipped)
        for target in measurement.targets:
            if target.found is None:
                skipped[target.name] = target.problem or "never reached by the data"
        report = Recalibration(
            method=method,
            examples=examples,
            batches=batches,
            forwards=forwards,
            seconds=time.perf_counter() - started,
            layers=tuple(sorted((target.shift() for target in found), key=lambda s: -s.shift)),
            skipped=skipped,
            notes=tuple(measurement.notes),
        )
        with interrupts_delayed(), torch.no_grad():
            before = [(t, t.clone()) for target in found for t in target.own_buffers()]
            try:
                processes.together(lambda: list(map(Target.write, found)))
            except BaseException:
                for t, old in before:
                    t.copy_(old)
                raise
        return report


def _check_arguments(
    model: Any, data: Any, method: str, samples: int | None, memory: float
) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"recalibrate takes a torch.nn.Module, got {type(model).__name__}.")
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    iterable = hasattr(type(data), "__iter__") or hasattr(type(data), "__getitem__")
    if isinstance(data, (Tensor, str)) or not iterable:
        raise ArgumentError(
            f"data must be an iterable of batches, got {type(data).__name__}. Pass a DataLoader or "
            "a list; for one tensor, tensor.split(batch_size)."
        )
    if method == "exact" and isinstance(data, Iterator):
        raise ArgumentError(
            "data must be iterable more than once for method='exact', got an iterator of type "
            f"{type(data).__name__}. Pass the loader itself or list(data), or use method='precise'."
        )
    if samples is not None and not (isinstance(samples, Integral) and samples >= 1):
        raise ArgumentError(f"samples must be a positive integer or None, got {samples!r}.")
    if not (isinstance(memory, Real) and memory >= 0):
        raise ArgumentError(
            f"memory must be a number of bytes, 0 for none and math.inf for all, got {memory!r}."
        )


def _device_of(given: Any, model: nn.Module) -> torch.device | None:
    """The device that batches are sent to."""
    if given is None:
        tensors = itertools.chain(model.parameters(), model.buffers())
        return next((t.device for t in tensors), None)
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise ArgumentError(
            f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {given!r} ({said})."
        ) from error
