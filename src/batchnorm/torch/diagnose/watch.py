"""Record what the batch norms of a model do while it trains."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._version import __version__
from ...atomic import check_place
from ...diagnose.recording import Recording, Snapshot, of_rank
from ...diagnose.records import BINS, QUANTILES
from ...diagnose.shift import distances
from ...errors import ArgumentError, BatchNormError
from ...extras import require
from .. import native, portable
from ..internals import is_direct, is_recomputing
from ..modules import Layer as OurLayer
from ..population.batches import call_with_first_item
from ..population.layers import unwrapped
from .records import batch_norms, eagerly, numpy_of, record_layers, unchanged, weights_of

__all__ = ["Watch", "watch"]

#: Channels of a layer, and values of each, whose distribution is recorded.
CHANNELS, VALUES = 4, 512
#: Of the probe: units of a layer, and values of each, that are compared.
PROBED_UNITS, PROBED_VALUES = 64, 512
#: Writing may take this share of the time.
WRITING = 0.005

#: Called with metrics by name, and ``step=``, as `wandb.log` and `mlflow.log_metrics` are.
Log = Callable[..., Any]


@contextmanager
def watch(
    model: nn.Module,
    path: str | Path | None = None,
    every: int = 20,
    probe: Any = None,
    *,
    log: Log | Sequence[Log] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Iterator[Recording]:
    """Record what the batch norms of `model` do while the block trains it.

    A step is a forward of `model` in training mode, with gradients. At every `every`-th step, each
    layer's batch and running statistics, γ, β, norms of gradients, and quantiles and histograms of
    some channels before and after normalization are recorded; the other steps cost two hooks.
    Memory is bounded: the latest 64 recorded steps are kept, older ones are thinned evenly (at most
    192 in all, fewer for large models).

    Parameters
    ----------
    model : Module
        With batch norms of this package, of torch, or subclasses of these; on any device. It may be
        wrapped in `DistributedDataParallel`, where each process records, or by `torch.compile`;
        recorded steps then run uncompiled.
    path : str or Path, optional
        A Parquet file. It is replaced as a whole every now and then, so it can be read while the
        block runs, and after the process was killed. Processes but the first add ``.rank1`` and so
        on to the name.
    every : int
    probe : batch, optional
        The same examples are run at each recorded step, with batch statistics and without changing
        the model, to measure how far the inputs of each layer have moved.
    log : callable, `SummaryWriter`, or several
        Gets the numbers of each recorded step: called as ``log(metrics, step=step)``, as
        `wandb.log` and `mlflow.log_metrics` are.
    forward : function of model and batch, optional
        Calls the model with `probe`; by default with its first item.

    Yields
    ------
    Recording
        Grows while the block runs. ``recording.report("report.html")`` writes a page.

    Raises
    ------
    ArgumentError
        `model` is not a Module or has no batch norms, `every` is not positive, or `path` cannot be
        written.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from batchnorm.torch import watch
    >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    >>> with watch(net, every=2) as recording:
    ...     for _ in range(6):
    ...         net(torch.randn(16, 4)).square().mean().backward()
    >>> recording
    Recording of 1 layer, 3 steps from 0 to 4
    """
    watching = Watch(model, path, every, probe, log=log, forward=forward)
    hooks = watching.hooks()
    try:
        yield watching.recording
    finally:
        for hook in hooks:
            hook.remove()
        watching.close()


class Watch:
    """What `watch` does, for loops that tell by themselves when a step begins and ends."""

    def __init__(
        self,
        model: nn.Module,
        path: str | Path | None = None,
        every: int = 20,
        probe: Any = None,
        *,
        log: Log | Sequence[Log] = (),
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"watch takes a torch.nn.Module, got {type(model).__name__}.")
        self._layers = batch_norms(model)
        if not self._layers:
            raise ArgumentError("watch takes a model with batch norms, got one without any.")
        if any(m._compiled_call_impl is not None for m in unwrapped(model).modules()):
            raise ArgumentError(
                "watch takes a model that is not compiled in place, by model.compile(). Use "
                "torch.compile(model), and watch what it returns."
            )
        if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
            raise ArgumentError(f"every must be a positive number of steps, got {every!r}.")
        self._model, self._every, self._probe = model, int(every), probe
        self._forward = forward or call_with_first_item
        self._logs = tuple(log) if isinstance(log, (list, tuple)) else (log,)
        for each in self._logs:
            if not callable(each) and not hasattr(each, "add_scalar"):
                raise ArgumentError(
                    "log must be a function that takes numbers by name and step=, or a "
                    f"SummaryWriter, got {type(each).__name__}."
                )
        rank, processes = _processes()
        self._path = None if path is None else of_rank(Path(path), rank)
        if self._path is not None:
            require("Recording to a file", "report", "pyarrow")
            check_place(self._path, "a Parquet file", "run.parquet")
        self.recording = Recording(_about(model), rank=rank, processes=processes)
        self.step = 0
        self._open: list[Snapshot] = []  # of this step
        self._pending: list[Snapshot] = []  # of the last recorded one, whose gradients come
        # Arrays that wait for their device, and what takes them over.
        self._waiting: list[tuple[Tensor, Callable[[Any], None]]] = []
        self._state: list[tuple[Tensor, list[tuple[int, str, str]]]] = []
        self._samples: list[tuple[Tensor, Snapshot, str]] = []
        self._unused: list[list[Any]] = []  # hooks of parameters that may not have run
        self._hooks: list[Any] = []
        self._probed: dict[str, Any] = {}
        self._busy = self._warned = False
        self._written, self._cost = 0.0, 0.0
        self._uncompiled: Any = None

    def hooks(self) -> list[Any]:
        """Hooks of the model that begin and end each step."""

        def before(module: nn.Module, *_: Any) -> None:
            if self._is_step(module):
                self.begin()

        def after(module: nn.Module, *_: Any) -> None:
            if self._is_step(module):
                self.end()

        return [
            self._model.register_forward_pre_hook(_Hook(before)),
            self._model.register_forward_hook(_Hook(after), always_call=True),
        ]

    def _is_step(self, module: nn.Module) -> bool:
        """In training mode, with gradients, and no repetition by checkpointing."""
        training = module.training and torch.is_grad_enabled()
        return training and not self._busy and not is_recomputing()

    # ---- steps

    def begin(self) -> None:
        """Begin a step: before the forward."""
        if self.step % self._every == 0:
            self._flush()
            self._end_hooks()
            if self._probe is not None:
                self._run_probe()
            self._measure_state()
            calls: dict[str, int] = {}
            for name, module in self._layers.items():
                self._hooks.append(
                    module.register_forward_hook(
                        _Hook(self._seer(name, calls)), with_kwargs=True, prepend=True
                    )
                )
            if self._model is not unwrapped(self._model):
                self._uncompiled = eagerly()
                self._uncompiled.__enter__()

    def end(self) -> None:
        """End a step: after the forward. Gradients may still come."""
        self._end_hooks()
        if self._open:
            of_layer: dict[str, list[Snapshot]] = {}
            for snapshot in self._open:
                of_layer.setdefault(snapshot.layer, []).append(snapshot)
            for joined, parts in self._state:
                self._waiting.append((joined, partial(_put_state, parts, of_layer)))
            self._pending, self._open = self._open, []
        self.step += 1

    def close(self) -> None:
        """Finish the recording, and write it."""
        self._end_hooks()
        if not self.step:
            warnings.warn(
                f"watch saw no step: no forward of this {type(self._model).__name__} itself in "
                "training mode, with gradients. Watch what your loop calls.",
                RuntimeWarning,
                stacklevel=3,
            )
        self._flush(last=True)

    def _end_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._uncompiled is not None:
            self._uncompiled.__exit__(None, None, None)
            self._uncompiled = None

    def _flush(self, *, last: bool = False) -> None:
        """Take over what is complete, log it, and write the file if it is time."""
        self._receive()
        for once in self._unused:
            for hook in once:
                hook.remove()
        self._unused = []
        done, self._pending = self._pending, []
        self.recording.add(done)
        if done:
            self._log(done)
        now = time.perf_counter()
        due = self._written == 0 or (now - self._written) * WRITING > self._cost
        if self._path is not None and (last or (done and due)):
            try:
                self.recording.save(self._path)
            except BatchNormError as error:
                if last:
                    raise
                if not self._warned:  # a full disk must not end a training; it may get room
                    warnings.warn(str(error), RuntimeWarning, stacklevel=2)
                self._warned = True
            self._written = time.perf_counter()
            self._cost = self._written - now

    def _log(self, snapshots: list[Snapshot]) -> None:
        if not self._logs:
            return
        metrics = {
            f"batchnorm/{s.layer}/{name}": value
            for s in snapshots
            if s.call == 0
            for name, value in s.metrics().items()
        }
        for log in self._logs:
            try:
                if hasattr(log, "add_scalar"):
                    for name, value in metrics.items():
                        log.add_scalar(name, value, snapshots[0].step)
                else:
                    log(metrics, step=snapshots[0].step)
            except Exception as error:  # a training must not end for want of a plot
                self._logs = tuple(other for other in self._logs if other is not log)
                warnings.warn(
                    f"watch no longer logs to {log!r}: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    # ---- one layer

    def _seer(self, name: str, calls: dict[str, int]) -> Any:
        def see(module: Any, args: Any, kwargs: Any, y: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if is_recomputing() or not isinstance(x, Tensor) or x.dim() < 2 or not x.numel():
                return
            call = calls.get(name, 0)
            calls[name] = call + 1
            moved, relative = self._probed.get(name, (np.nan, np.nan))[-2:]
            snapshot = Snapshot(self.step, name, call, moved=moved, moved_relative=relative)
            frozen = getattr(module, "stats_frozen", False)
            snapshot.training = bool(module.training and not frozen)
            size = min(getattr(module, "group_size", None) or x.shape[0], x.shape[0])
            snapshot.examples = size
            with torch.no_grad():
                weights = weights_of(module, x, args, kwargs)
                weights = weights if weights is None else weights[:size]
                self._measure(snapshot, x.detach()[:size], y.detach(), weights)
            self._follow_gradients(snapshot, module, y)
            self._open.append(snapshot)

        return see

    def _measure(self, snapshot: Snapshot, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        # A GPU goes on meanwhile: nothing here waits for it, and few kernels are started.
        direct = x.is_cpu and is_direct(x)
        if direct or weights is not None:
            found = native.moments(x, weights) if direct else numpy_of(portable.moments(x, weights))
            n, mean, _, m2, _ = found[0]
            snapshot.values = float(n.min())
            snapshot.mean, snapshot.var = _f32(mean), _f32(m2 / np.maximum(n, 1))
        else:
            snapshot.values = x.numel() / x.shape[1]
            for name, t in zip(("mean", "var"), portable.mean_and_var(x, 0), strict=True):
                self._waiting.append((t.float(), partial(_put_array, snapshot, name)))
        apart = max(1, -(-x.shape[1] // CHANNELS))
        snapshot.channels = np.arange(0, x.shape[1], apart)
        self._samples += (
            (_sample(x, apart), snapshot, "before"),
            (_sample(y, apart), snapshot, "after"),
        )

    def _measure_state(self) -> None:
        """Running statistics, γ and β of all layers before the step, one copy for each type."""
        groups: dict[Any, list[tuple[Tensor, str, str]]] = {}
        for layer, module in self._layers.items():
            for name in ("running_mean", "running_var", "weight", "bias", "num_batches_tracked"):
                t = getattr(module, name, None)
                if isinstance(t, Tensor):
                    groups.setdefault((t.device, t.dtype), []).append((t, layer, name))
        self._state = []
        with torch.no_grad():
            for group in groups.values():
                joined = torch.cat([t.reshape(-1) for t, _, _ in group])
                joined = joined.float() if joined.is_floating_point() else joined
                self._state.append((joined, [(t.numel(), layer, name) for t, layer, name in group]))

    def _receive(self) -> None:
        """Take over what waits: one transfer for each device and type."""
        waiting, self._waiting = self._waiting, []
        samples, self._samples = self._samples, []
        rows: dict[Any, list[tuple[Tensor, Snapshot, str]]] = {}
        for sample in samples:
            rows.setdefault((sample[0].device, sample[0].shape[1]), []).append(sample)
        for alike in rows.values():
            found = _distributions(torch.cat([t for t, _, _ in alike]))
            waiting.append((found, partial(_put_distributions, alike)))
        groups: dict[Any, list[tuple[Tensor, Callable[[Any], None]]]] = {}
        for t, put in waiting:
            groups.setdefault((t.device, t.dtype), []).append((t, put))
        for group in groups.values():
            joined = torch.cat([t.reshape(-1) for t, _ in group]).cpu().numpy()
            _put_parts([(t.numel(), put) for t, put in group], joined)

    def _follow_gradients(self, snapshot: Snapshot, module: Any, y: Any) -> None:
        for name, tensor in (
            ("gradient", y),
            ("gradient_weight", module.weight),
            ("gradient_bias", module.bias),
        ):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                once: list[Any] = []

                def norm(grad: Tensor, name: str = name, once: list[Any] = once) -> None:
                    if once:
                        once.pop().remove()
                        found = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)
                        self._waiting.append((found, partial(_put_number, snapshot, name)))

                once.append(tensor.register_hook(norm))  # type: ignore[no-untyped-call]
                if tensor is not y:  # a parameter stays, and its hook if no backward pass came
                    self._unused.append(once)

    # ---- the probe

    def _run_probe(self) -> None:
        found: dict[str, Any] = {}
        inside = unwrapped(self._model)

        def seer(name: str) -> Any:
            def see(module: Any, args: Any) -> None:
                if name not in found and args and isinstance(args[0], Tensor):
                    found[name] = numpy_of(_values(args[0]))

            return see

        hooks = [m.register_forward_pre_hook(seer(name)) for name, m in self._layers.items()]
        self._busy = True
        try:
            with unchanged(inside), torch.no_grad():
                inside.eval()
                for module in self._layers.values():
                    module.training = not getattr(module, "stats_frozen", False)
                self._forward(inside, self._probe)
        finally:
            self._busy = False
            for hook in hooks:
                hook.remove()
        for name, values in found.items():
            old = self._probed.get(name)
            moved = distances(old[0], values) if old is not None else (np.nan, np.nan)
            self._probed[name] = (values, *moved)


def _values(x: Tensor) -> Tensor:
    """Some values of some units, (values, units), the same ones each time."""
    units = np.unique(np.linspace(0, x.shape[1] - 1, PROBED_UNITS).astype(int))
    flat = x[:, units].transpose(0, 1).flatten(1).t()
    return flat[:: max(1, len(flat) // PROBED_VALUES)]


class _Hook:
    """A hook that does nothing in copies and pickles of the model."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return None if self._function is None else self._function(*args)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()

    def __reduce__(self) -> Any:
        return _Hook, ()


def _sample(x: Tensor, apart: int) -> Tensor:
    """(channels, values) of each `apart`-th channel, a copy."""
    chosen = x[:, ::apart].flatten(2) if x.dim() > 2 else x[:, ::apart, None]
    places = min(chosen.shape[2], max(1, chosen.shape[0] * chosen.shape[2] // VALUES))
    chosen = chosen[:, :, ::places]
    examples = max(1, chosen.shape[0] * chosen.shape[2] // VALUES)
    copied = chosen[::examples].transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return copied.flatten(1)[:, :VALUES].float()


def _distributions(rows: Tensor) -> Tensor:
    """Quantiles and counts of the bars of each row, one after another.

    Values that are not finite count as the mean of the others.
    """
    finite = rows.isfinite()
    known = torch.where(finite, rows, 0.0)
    mean = known.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)
    rows = torch.where(finite, rows, mean).sort(1).values
    last = rows.shape[1] - 1
    place = [q * last for q in QUANTILES]
    below, above = rows[:, [int(k) for k in place]], rows[:, [math.ceil(k) for k in place]]
    share = torch.tensor([k - int(k) for k in place], device=rows.device)
    quantiles = below + share * (above - below)
    low, high = rows[:, :1], rows[:, -1:]
    flat = high == low
    start, stop = torch.where(flat, low - 0.5, low), torch.where(flat, high + 0.5, high)
    inner = torch.arange(1, BINS, device=rows.device) / BINS
    cuts = torch.searchsorted(rows, start + inner * (stop - start))
    ends = cuts.new_tensor([0, last + 1]).expand(len(rows), 2)
    counts = torch.cat([ends[:, :1], cuts, ends[:, 1:]], 1).diff(dim=1)
    return torch.cat([quantiles, counts.to(rows.dtype)], 1)


def _put_distributions(samples: list[tuple[Tensor, Snapshot, str]], values: Any) -> None:
    found = values.reshape(-1, len(QUANTILES) + BINS)
    begin = 0
    for rows, snapshot, name in samples:
        part = found[begin : begin + len(rows)]
        begin += len(rows)
        setattr(snapshot, name, part[:, : len(QUANTILES)].ravel())
        setattr(snapshot, f"low_{name}", part[:, 0].copy())
        setattr(snapshot, f"high_{name}", part[:, len(QUANTILES) - 1].copy())
        setattr(snapshot, f"counts_{name}", part[:, len(QUANTILES) :].astype(np.int64).ravel())


def _put_parts(parts: list[tuple[int, Callable[[Any], None]]], values: Any) -> None:
    begin = 0
    for size, put in parts:
        put(values[begin : begin + size])
        begin += size


def _put_array(snapshot: Snapshot, name: str, values: Any) -> None:
    setattr(snapshot, name, values.copy())


def _put_state(
    parts: list[tuple[int, str, str]], of_layer: dict[str, list[Snapshot]], values: Any
) -> None:
    begin = 0
    for size, layer, name in parts:
        part = values[begin : begin + size]
        begin += size
        for snapshot in of_layer.get(layer, ()):
            if name == "num_batches_tracked":
                snapshot.updates = int(part[0])
            else:
                setattr(snapshot, name, part.copy())


def _put_number(snapshot: Snapshot, name: str, values: Any) -> None:
    setattr(snapshot, name, float(values[0]))


def _f32(values: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32)


def _about(model: nn.Module) -> dict[str, Any]:
    """What a report says of the model."""
    layers = {
        layer.name: {
            "kind": layer.kind,
            "eps": layer.eps,
            "momentum": layer.momentum,
            "frozen": layer.frozen,
            "synchronized": layer.synchronized,
            "exact": layer.exact,
            "trainable": layer.trainable,
            "dtype": layer.dtype,
        }
        for layer in record_layers(model).layers
    }
    ours = sum(isinstance(m, OurLayer) for m in unwrapped(model).modules())
    return {
        "model": type(unwrapped(model)).__name__,
        "layers": layers,
        "ours": ours,
        "versions": {"batchnorm": __version__, "torch": version("torch")},
    }


def _processes() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
