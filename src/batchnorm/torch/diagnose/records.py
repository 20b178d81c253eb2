"""Records of a model: its layers as they are, and what they do on data.

The model is as it was afterwards: modes, running statistics and other buffers, gradients, hooks and
random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ...diagnose.records import Array, Batch, Layer, Network, Update
from ...errors import ArgumentError
from ...moments import Moments
from ..functional import as_weights
from ..modules import Layer as OurLayer
from ..population.batches import call_with_first_item, tensors_in
from ..population.layers import check_values, is_constant, unwrapped
from ..population.state import RngState, generators_of
from . import wiring

__all__ = ["MOST_BATCHES", "numpy_of", "observe", "record_layers"]

#: Batches of the data that are looked at.
MOST_BATCHES = 32
#: Numbers in the outputs that are compared.
MOST_OUTPUTS = 2**24

Forward = Callable[[nn.Module, Any], Any]


def numpy_of(t: Tensor | None) -> Any:
    """A tensor of any type and device as an array."""
    if t is None or t.is_meta or nn.parameter.is_lazy(t):
        return None
    t = t.detach()
    return (t.double() if t.dtype.itemsize > 4 else t.float()).cpu().numpy()


def float64_of(t: Tensor | None) -> Array | None:
    """A tensor as float64, copied."""
    found = numpy_of(t)
    return None if found is None else np.array(found, dtype=np.float64)


# ---- as they are --------------------------------------------------------------------------------


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a model by name."""
    inside = unwrapped(model)
    return {name: m for name, m in inside.named_modules() if wiring.is_batch_norm(m)}


def record_layers(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Network:
    """What a model shows without running."""
    decays = {
        id(parameter): float(group.get("weight_decay", 0.0))
        for group in (optimizer.param_groups if optimizer is not None else ())
        for parameter in group["params"]
    }
    averaged = any(isinstance(m, AveragedModel) and int(m.n_averaged) > 0 for m in model.modules())
    layers = [
        _record(name, module, decays, averaged) for name, module in batch_norms(model).items()
    ]
    processes = 1
    if isinstance(model, DistributedDataParallel):
        processes = torch.distributed.get_world_size(model.process_group)
    elif isinstance(model, DataParallel):
        processes = len(model.device_ids)
    return Network(layers=layers, training=unwrapped(model).training, processes=processes)


def _record(name: str, module: Any, decays: dict[int, float], averaged: bool) -> Layer:
    check_values(module, name, "check or watch")
    parameters = [p for p in (module.weight, module.bias) if isinstance(p, nn.Parameter)]
    constant = is_constant(module)
    mean, var = module.running_mean, module.running_var
    tracked = getattr(module, "num_batches_tracked", None)
    tracks = mean is not None and var is not None
    weight = getattr(module, "weight", None)
    affine_frozen = getattr(module, "affine_frozen", False)
    return Layer(
        name=name,
        kind=type(module).__name__,
        channels=len(mean) if tracks else getattr(module, "num_features", 0),
        eps=float(getattr(module, "eps", 1e-5)),
        momentum=getattr(module, "momentum", None),
        training=module.training and not constant,
        frozen=constant or getattr(module, "stats_frozen", False),
        tracks=tracks,
        exact=isinstance(module, OurLayer) and (mean is None or mean.is_cpu),
        synchronized=isinstance(module, nn.SyncBatchNorm),
        trainable=any(p.requires_grad for p in parameters) and not affine_frozen
        if parameters
        else None,
        dtype=str(mean.dtype).removeprefix("torch.") if tracks else "",
        mean=float64_of(mean),
        var=float64_of(var),
        weight=float64_of(weight),
        bias=float64_of(getattr(module, "bias", None)),
        updates=None if tracked is None or tracked.is_meta else int(tracked),
        averaged=averaged,
        decay=max((decays.get(id(p), 0.0) for p in parameters), default=0.0),
    )


# ---- on data ------------------------------------------------------------------------------------


def observe(
    model: nn.Module,
    network: Network,
    data: Any,
    forward: Forward | None = None,
    show: Callable[[str, int, int | None], None] = lambda text, done, total: None,
) -> list[str]:
    """Run the model on `data`, and add to `network` what its batch norms do there.

    Returns what could not be looked at, and why.
    """
    run = forward or call_with_first_item
    notes: list[str] = []
    batches = _take(data)
    inside = unwrapped(model)
    modules = batch_norms(model)
    records = {modules[layer.name]: layer for layer in network.layers}
    network.remainder = _remainder(data)
    _count_labels(network, batches)
    with unchanged(inside, data), eagerly():
        inside.eval()
        network.operations = wiring.by_running(inside, lambda: run(inside, batches[0]))
        relu = wiring.followed_by_relu(network.operations)
        by_running = _in_evaluation(inside, records, batches, run, show)
        by_batch = _in_training(inside, network, records, batches, run, relu, show)
        network.gap = _gap(by_running, by_batch)
        if isinstance(model, DistributedDataParallel) or _has_hooks(inside):
            notes.append("a training step, for hooks of parameters would run")
        else:
            _one_step(inside, records, batches[0], run)
    for layer in network.layers:
        if layer.population is not None and not np.isfinite(layer.population.mean).all():
            notes.append(f"{layer.name}, for its input on the data is not finite")
            break
    return notes


def _has_hooks(model: nn.Module) -> bool:
    """Whether a backward pass would run hooks of parameters, which may be an optimizer's."""
    return any(
        p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
        for p in model.parameters()
    )


def _take(data: Any) -> list[Any]:
    if isinstance(data, Tensor):
        data = [data]
    try:
        found = list(itertools.islice(data, MOST_BATCHES))
    except TypeError:
        raise ArgumentError(
            f"data must be an iterable of batches, such as a DataLoader, got {type(data).__name__}."
        ) from None
    if not found:
        raise ArgumentError("data must give at least one batch, got none.")
    return found


def _remainder(data: Any) -> int | None:
    """Examples in the last batch of a loader, if it is smaller than the others."""
    size, drop = getattr(data, "batch_size", None), getattr(data, "drop_last", True)
    dataset = getattr(data, "dataset", None)
    sampler = getattr(data, "sampler", None)
    if not isinstance(size, int) or size < 2 or drop or dataset is None:
        return None
    try:
        return len(dataset if sampler is None else sampler) % size or None
    except TypeError:
        return None


def _labels(batch: Any) -> Tensor | None:
    """One class for each example, if a batch holds such."""
    parts = list(batch.values()) if isinstance(batch, dict) else batch
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not isinstance(parts[0], Tensor):
        return None
    last = parts[1]
    whole = isinstance(last, Tensor) and last.dim() == 1 and not last.is_floating_point()
    return last if whole and last.shape[0] == parts[0].shape[0] else None


def _count_labels(network: Network, batches: list[Any]) -> None:
    found = [labels for labels in map(_labels, batches) if labels is not None and len(labels) > 1]
    if found:
        network.label_batches = len(found)
        network.single_class = sum(bool((labels == labels[0]).all()) for labels in found)
        network.classes = len({label for labels in found for label in labels.tolist()})


@contextmanager
def unchanged(model: nn.Module, data: Any = None) -> Iterator[None]:
    """Restore modes, buffers, gradients and random numbers of a model."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [
        (m, name, t, None if t is None else t.detach().clone())
        for m in model.modules()
        for name, t in m._buffers.items()
    ]
    counters = [
        (m, None if m._nonfinite is None else m._nonfinite.clone())
        for m in model.modules()
        if isinstance(m, OurLayer)
    ]
    gradients = [(p, p.grad) for p in model.parameters()]
    rng = RngState(generators_of(data))
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, t, value in buffers:
                if t is not None and value is not None:
                    t.copy_(value)
                module._buffers[name] = t
        for layer, counter in counters:
            layer._nonfinite = counter
        for parameter, gradient in gradients:
            parameter.grad = gradient
        rng.restore()


def moments_of(x: Tensor, weights: Tensor | None = None) -> Moments:
    """Of the input of a layer, with the weights of its mask."""
    given = None if weights is None else numpy_of(weights)
    return Moments.of(np.ascontiguousarray(numpy_of(x)), weights=given)


def weights_of(module: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    """The weights (N, *S) of a layer of ours that was given a mask."""
    mask = kwargs.get("mask", args[2] if len(args) > 2 else None)
    if mask is None or not isinstance(module, OurLayer):
        return None
    return as_weights(mask, x)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled functions uncompiled, if torch can do that."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        yield
        return
    with set_stance("force_eager"):
        yield


@contextmanager
def _watching(
    records: dict[Any, Layer], see: Callable[[Layer, Any, Tensor, Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Call `see` with layer, module, input, output and weights at each forward of a batch norm."""
    with ExitStack() as stack:
        for module, layer in records.items():

            def hook(m: Any, args: Any, kwargs: Any, y: Any, layer: Layer = layer) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[0]:
                    see(layer, m, x, y, weights_of(m, x, args, kwargs))

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _in_evaluation(
    model: nn.Module,
    records: dict[Any, Layer],
    batches: list[Any],
    run: Forward,
    show: Any,
) -> list[Tensor | None]:
    """By running statistics: moments of the inputs."""
    found: dict[str, list[Moments]] = {}

    def see(layer: Layer, module: Any, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        found.setdefault(layer.name, []).append(moments_of(x, weights))
        layer.examples += x.shape[0]

    outputs: list[Tensor | None] = []
    with _watching(records, see), torch.no_grad():
        for number, batch in enumerate(batches):
            show("evaluation", number, len(batches))
            outputs.append(_within_bounds(_first(run(model, batch)), outputs))
    for layer in records.values():
        if layer.name in found:
            layer.population = Moments.merge(found[layer.name])
    return outputs


def _first(value: Any) -> Tensor | None:
    """The first tensor of real numbers in what a model returns."""
    return next((t.detach() for t in tensors_in(value) if t.is_floating_point()), None)


def _within_bounds(output: Tensor | None, others: list[Tensor | None]) -> Tensor | None:
    """The output, if there is room for it beside the others."""
    size = sum(t.numel() for t in (output, *others) if t is not None)
    return output if size < MOST_OUTPUTS else None


def _in_training(
    model: nn.Module,
    network: Network,
    records: dict[Any, Layer],
    batches: list[Any],
    run: Forward,
    relu: set[str],
    show: Any,
) -> list[Tensor | None]:
    """By batch statistics, everything else in evaluation.

    What each batch is normalized by, and the largest outputs before a ReLU.
    """
    calls: dict[str, int] = {}

    def see(layer: Layer, module: Any, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        call = calls.get(layer.name, 0)
        calls[layer.name] = call + 1
        size = getattr(module, "group_size", None) or x.shape[0]
        for begin in range(0, len(x), size):
            part = x[begin : begin + size]
            share = None if weights is None else weights[begin : begin + size]
            seen.setdefault(layer.name, []).append(Batch(moments_of(part, share), len(part), call))
        fused = getattr(module, "activation", None)
        if layer.name in relu and not layer.frozen and not isinstance(fused, str):
            axes = [k for k in range(y.dim()) if k != 1]
            highest = np.asarray(numpy_of(y.amax(axes)), dtype=np.float64)
            before = layer.highest
            layer.highest = highest if before is None else np.maximum(before, highest)

    seen: dict[str, list[Batch]] = {}
    outputs: list[Tensor | None] = []
    with _by_batch(records), _watching(records, see), torch.no_grad():
        for number, batch in enumerate(batches):
            show("training", number, len(batches))
            calls.clear()
            try:
                outputs.append(_within_bounds(_first(run(model, batch)), outputs))
            except ValueError as error:  # one value per channel, which the loader's rule names
                if "more than 1 value" not in str(error):
                    raise
                network.refused += 1
                outputs.append(None)
    for layer in records.values():
        layer.batches = tuple(seen.get(layer.name, ()))
    return outputs


@contextmanager
def _by_batch(records: Iterable[Any]) -> Iterator[None]:
    """Let batch norms that are not frozen normalize by the batch."""
    modules = [m for m in records if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    try:
        for module in modules:
            module.training = not getattr(module, "stats_frozen", False)
        yield
    finally:
        for module in modules:
            module.training = False


def _gap(by_running: Sequence[Tensor | None], by_batch: Sequence[Tensor | None]) -> float | None:
    """Root mean square difference of the outputs, over how much they vary."""
    pairs = [
        (one.double().reshape(len(one), -1), other.double().reshape(len(other), -1))
        for one, other in zip(by_running, by_batch, strict=True)
        if one is not None and other is not None and one.dim() and one.shape == other.shape
    ]
    if len({one.shape[1] for one, _ in pairs}) != 1:
        return None
    one, other = (torch.cat(outputs) for outputs in zip(*pairs, strict=True))
    if len(one) < 2:
        return None
    spread = float((other - other.mean(0)).square().mean().sqrt())
    difference = float((one - other).square().mean().sqrt())
    return difference / spread if spread > 0 else None


def _one_step(model: nn.Module, records: dict[Any, Layer], batch: Any, run: Forward) -> None:
    """One training step: how the running statistics move, forward and backward."""
    before: dict[str, tuple[Array, int]] = {}
    for module, layer in records.items():
        count = getattr(module, "num_batches_tracked", None)
        var = float64_of(module.running_var)
        if var is not None and count is not None:
            before[layer.name] = var, int(count)
    for parameter in model.parameters():
        parameter.grad = None
    with _by_batch(records), torch.enable_grad():
        try:
            output = _first_with_gradient(run(model, batch))
        except ValueError:
            return
        middle = {
            layer.name: (float64_of(m.running_var), int(m.num_batches_tracked))
            for m, layer in records.items()
            if layer.name in before
        }
        if output is not None:
            output.float().square().mean().backward()  # type: ignore[no-untyped-call]
    for module, layer in records.items():
        once = [seen for seen in layer.batches if seen.call == 0]
        if layer.name not in before or not once or layer.frozen:
            continue
        var, count = before[layer.name]
        after, counted = middle[layer.name]
        assert after is not None
        layer.update = Update(
            once[0], var, after, counted - count, int(module.num_batches_tracked) - counted
        )


def _first_with_gradient(value: Any) -> Tensor | None:
    return next((t for t in tensors_in(value) if t.requires_grad), None)
