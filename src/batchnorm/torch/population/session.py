"""`recalibrate`: one call of it, what that changes for the while, and how it is put back.

A layer is measured by the moments of what it is called with (`functional.measure`), in float64,
merged by count. The whole model is in evaluation meanwhile; where a layer is to normalize by the
batch, it is lent the batch's statistics as its running ones, so that nothing that training mode
brings with it (updates, counters, warnings, synchronization) takes place. What is lent are other
tensors: the layer's own are not touched before everything is known.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...errors import ArgumentError, ShapeError
from ...moments import Moments
from ...progress import Show, bar
from .batches import Source, first_item, sent
from .exact import Exact
from .ranks import Ranks
from .report import Recalibration
from .state import Rng, generators_of, undisturbed
from .target import Input, Target, Visit

Forward = Callable[[nn.Module, Any], Any]

_METHODS = ("precise", "exact")


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

    Mean and variance of a layer become those of all values that it is given, over all batches:
    `Moments`, merged by count, in float64 and rounded once. ``num_batches_tracked`` becomes the
    number of calls measured, so that training with ``momentum=None`` goes on from there.

    The layers are ours, torch's own, and subclasses of either. Left alone are those with frozen
    statistics (`freeze`), those in evaluation mode where the model as a whole is in training mode,
    those without running statistics, and those that the data never reach.

    Parameters
    ----------
    model : Module
        In any mode. The module inside `DistributedDataParallel` and `torch.compile` is taken, and
        run uncompiled.
    data : iterable of tensors, tuples or dicts
        Batches of any sizes, empty ones included. The model is called with the first item of a
        tuple or dict. "exact" may go through it several times: a generator is for "precise" only.
    method : "precise" or "exact"
        "precise" takes one pass, in which the layers normalize by the batch, as in training. A
        layer behind another thus gets other inputs than it will get in evaluation. "exact"
        measures layer by layer, in the order in which they run, each through layers that already
        use their population statistics: what the layer gets in evaluation.
    forward : callable
        ``forward(model, batch)`` runs the model, where the first item will not do.
    samples : int
        Stop after the batch with which so many examples (of this process) have been seen.
    device : device
        Where batches are sent; by default that of the model's first parameter.
    memory : int
        Bytes that "exact" may keep in activations of batches that wait for a layer to be measured.
        A batch that has no room is run again from the start, up to the next layer. ``math.inf``
        keeps all; 0 none, and runs all in the calling thread.
    process_group : ProcessGroup
        Whose processes measure together, each its own share of the data, if `torch.distributed` is
        initialized; None for the default group. All end with the same bits.
    progress : bool
        Show a bar on the terminal, in the first process.

    Returns
    -------
    Recalibration
        Per layer how far its statistics moved, what was left alone, and what it took.

    Raises
    ------
    ArgumentError
        An argument cannot be used, the model has no batch norm, or there are no data.
    ShapeError
        "precise" met a batch of one value per channel, or a layer saw one in all.
    NonFiniteError
        What a layer is given, or its statistics in the type of its buffers, are not finite.

    Whatever is raised, an interrupt included: the statistics are as they were, and so is everything
    else.

    Notes
    -----
    Mode, momentum, hooks, gradients and random number generators are as before, afterwards.
    Dropout and everything else is in evaluation mode meanwhile, without gradients, under the
    autocast of the caller.

    "exact" runs each batch in a thread of its own, one at a time, up to the first layer that has
    not been measured; there it waits for the other batches. So all costs one forward pass over the
    data, and, for each batch that waits, the activations that are alive at that layer. Counted
    against `memory` are tensors that go into modules and come out of them; the batch that is
    running comes on top. Without memory each layer costs a pass over the layers before it.

    What a forward keeps between two layers outside its own variables, as an attribute of a module,
    would be found by another batch. One batch is therefore run again at the end, and if it does not
    give the same, the work is done once more without waiting batches, and the report says so. So it
    is where a forward changes settings of the process for a part of the model, and where data
    overwrite a batch with the next. A lock held over a layer would stop all for good, and what is
    kept for each thread is not found in another: use ``memory=0``, which needs no threads.

    Passes over the data begin with the same random numbers, so that a loader shuffles and augments
    alike each time, in workers too unless they persist. Where passes differ all the same, no batch
    waits, each layer is measured over another pass, and the report says so.

    A layer that runs several times in a forward is measured over all its calls. As its statistics
    cannot be known before they are used then, it normalizes by the batch while it is measured, and
    so does what follows it.

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
    ranks = Ranks(process_group)
    session = ranks.together(
        lambda: Session(model, data, method, forward, samples, device, memory, ranks, progress)
    )
    ranks.compare(session.targets, method)
    try:
        # Twice: the first may be interrupted before it holds interrupts back.
        try:
            session.enter()
            session.measure()
        finally:
            session.leave()
    finally:
        session.leave()
    return session.write()


class Session:
    """One call of `recalibrate`: what it changes for the while, and how it is put back."""

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        method: str,
        forward: Forward | None,
        samples: int | None,
        device: Any,
        memory: float,
        ranks: Ranks,
        progress: bool,
    ) -> None:
        _check_arguments(model, data, method, samples, memory)
        self.started = time.perf_counter()
        self.ranks, self.method, self.memory = ranks, method, memory
        self.model = unwrapped(model)
        self.targets, self.skipped = _targets(self.model)
        self._with_bar = progress and ranks.number == 0
        self._show: Show = lambda text, done, total: None
        self.notes: list[str] = []
        self.forwards = 0
        self.device = _device_of(device, self.model)
        self.forward = first_item if forward is None else forward
        self.rng = Rng(generators_of(data))
        self.source = Source(data, samples, self.rng, method == "exact")
        self.visit: Visit = self._visit
        self.note: Callable[..., None] = lambda *values: None
        self.close: Callable[[], None] = lambda: None
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._entered: ExitStack | None = None

    def enter(self) -> None:
        """Put the model into evaluation mode, without gradients, and look on."""
        with undisturbed():
            self._entered = stack = ExitStack()
            if self._with_bar:
                self._show = stack.enter_context(bar())
            stack.callback(self.rng.restore)
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            torch.set_grad_enabled(False)
            stack.callback(self._restore)
            for module, _ in self._modes:
                module.training = False
                if isinstance(module, DistributedDataParallel):  # would wait for the others
                    sync = module.require_forward_param_sync
                    stack.callback(setattr, module, "require_forward_param_sync", sync)
                    module.require_forward_param_sync = False
            if self.method == "exact" and self.memory:
                for module, _ in self._modes:
                    if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                        stack.callback(
                            module.register_forward_pre_hook(self._pass_on, with_kwargs=True).remove
                        )
                        stack.callback(
                            module.register_forward_hook(self._pass_on, with_kwargs=True).remove
                        )
            for target in self.targets:
                target.watch(self._look, stack)
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                # A compiled part of the model would not see the hooks.
                stack.enter_context(torch.compiler.set_stance("force_eager"))

    def leave(self) -> None:
        """Put everything back; once more changes nothing."""
        with undisturbed():
            stack, self._entered = self._entered, None
            if stack is not None:
                with stack:
                    self.close()

    def _pass_on(self, module: nn.Module, *values: Any) -> None:
        self.note(*values)

    def _restore(self) -> None:
        for target in self.targets:
            target.take_back()
        for module, mode in self._modes:
            module.training = mode

    def _look(self, target: Target, x: Tensor, mask: Tensor | None) -> Input | None:
        return self.visit(target, x, mask)

    def call(self, batch: Any) -> None:
        """Run the model on a batch."""
        self.forwards += 1
        self.forward(self.model, batch if self.device is None else sent(batch, self.device))

    def show(self, text: str, done: int, total: int | None) -> None:
        """Tell the caller how far the work is."""
        self._show(f"recalibrate: {text}", done, total)

    def measure(self) -> None:
        """Find the population statistics of all targets that the data reach."""
        if not self.targets:
            return
        if self.method == "exact":
            Exact(self).measure()
        else:
            self.ranks.together(self._pass)
            self.check_data()
            for target in self.targets:
                self.settle(target)

    def _pass(self) -> None:
        for number, batch in enumerate(self.source.batches(), 1):
            self.call(batch)
            self.show("batch", number, self.source.length)

    def _visit(self, target: Target, x: Tensor, mask: Tensor | None) -> Input | None:
        seen = target.measure(x, mask)
        if seen is None:
            return None
        target.add(seen.moments)
        if seen.values == 1 and getattr(target.layer, "on_single", "raise") != "population":
            raise ShapeError(
                "recalibrate with method='precise' needs batches of more than one value per "
                f"channel, got input {tuple(x.shape)} at the layer '{target.name}'. Use larger "
                "batches or leave the last one out; or use method='exact', or layers with "
                "on_single='population', which take a batch of one."
            )
        return seen

    def check_data(self) -> None:
        """Refuse no data, in all processes together."""
        if not self.ranks.any(self.source.number > 0):
            raise ArgumentError(
                "data must give at least one batch, got none. A generator that has been used up "
                "gives nothing more."
            )

    def settle(self, target: Target) -> None:
        """Merge what all processes have measured of one layer."""
        moments, calls = self.ranks.merge(
            Moments.merge(target.parts), target.calls, target.channels
        )
        target.parts = []
        target.settle(moments, calls)

    def write(self) -> Recalibration:
        """Write all new statistics into the layers, in all processes, or none."""
        numbers = [self.source.examples, self.source.number, self.forwards]
        examples, batches, forwards = map(int, self.ranks.gather(numbers).sum(0))
        found = [target for target in self.targets if target.found is not None]
        skipped = dict(self.skipped)
        for target in self.targets:
            if target.found is None:
                skipped[target.name] = target.problem or "never reached by the data"
        report = Recalibration(
            method=self.method,
            examples=examples,
            batches=batches,
            forwards=forwards,
            seconds=time.perf_counter() - self.started,
            layers=tuple(sorted((target.shift() for target in found), key=lambda s: -s.shift)),
            skipped=skipped,
            notes=tuple(self.notes),
        )
        with undisturbed(), torch.no_grad():
            before = [(t, t.clone()) for target in found for t in target.own()]
            try:
                self.ranks.together(lambda: list(map(Target.write, found)))
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
    if method not in _METHODS:
        raise ArgumentError(f"method must be one of {', '.join(_METHODS)}, got {method!r}.")
    once_more = hasattr(type(data), "__iter__") or hasattr(type(data), "__getitem__")
    if isinstance(data, (Tensor, str)) or not once_more:
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
    """Where batches are sent."""
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data parallelism and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        else:
            return model


def _targets(model: nn.Module) -> tuple[list[Target], dict[str, str]]:
    """The layers to measure, and why others are not."""
    found: list[Target] = []
    skipped: dict[str, str] = {}
    inference = torch.is_inference_mode_enabled()
    for name, module in model.named_modules():
        own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        for t in own:
            lazy = nn.parameter.is_lazy(t)
            if lazy or t.is_meta:
                raise ArgumentError(
                    "recalibrate takes a model whose tensors have values, got one with "
                    f"{'uninitialized' if lazy else 'meta'} tensors in '{name}'. Load its weights, "
                    "or run it once, first."
                )
        if not isinstance(module, _BatchNorm):
            if "BatchNorm" in getattr(module, "original_name", ""):
                skipped[name] = "it is compiled by TorchScript"
            continue
        if getattr(module, "stats_frozen", False):
            skipped[name] = "its statistics are frozen"
        elif module._buffers.get("running_mean") is None or (
            module._buffers.get("running_var") is None
        ):
            skipped[name] = "it has no running statistics"
        elif module.num_features == 0:
            skipped[name] = "it has no channels"
        elif cast(Tensor, module.running_mean).is_inference() and not inference:
            raise ArgumentError(
                f"recalibrate takes a model that can be written to, got '{name}' made in "
                "torch.inference_mode. Make it outside, or call recalibrate inside."
            )
        elif model.training and not module.training:
            skipped[name] = "it is in evaluation mode while the model is in training mode"
        else:
            found.append(Target(module, name, len(found)))
    if not found and not skipped:
        raise ArgumentError("recalibrate takes a model with batch norms, got one without.")
    return found, skipped
