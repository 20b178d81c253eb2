"""The processes that `network_step.py` measures: one provider on one case each."""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from batchnorm.bench import memory
from batchnorm.bench.timing import Sample, calls_per_sample, sample

EAGER, COMPILED, CONVERTED = "torch eager", "torch.compile", "batchnorm convert"

#: At the end of a provider's name: with `KEEP_MEMORY` in the environment.
KEPT = " (memory kept)"
PROVIDERS = (EAGER, COMPILED, CONVERTED, EAGER + KEPT, CONVERTED + KEPT)

#: glibc's allocator gives freed memory back to the operating system, which has to clear every page
#: of it when it is wanted again; above these bytes only, so never. Other allocators ignore it.
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**40))

TRAINING, INFERENCE = "training", "inference"

#: So small that a loss is still far from zero after 50 steps: what is left of one that is close to
#: zero is mostly rounding.
LEARNING_RATE, MOMENTUM = 1e-4, 0.9

#: A run that takes less is repeated, after one that is not timed: other providers have filled the
#: caches, and threads sleep.
SHORTEST_SAMPLE_S = 0.02

#: So long other providers' threads may wait for work, and take a core for it, before they sleep.
SPIN_S = 0.02

#: Networks whose inputs are rows of so many numbers, as wide as their layers.
WIDTHS = {"critic": 256, "policy": 64}

#: Training before inference: steps, and examples and largest image of each. Small images leave less
#: memory behind, which would count as the inference's.
EARLIER_STEPS, EARLIER_BATCH, EARLIER_IMAGE = 5, 8, 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a network is run on; the first columns of a row.

    Attributes
    ----------
    network
        Its name in `networks.NETWORKS`.
    pass_
        ``training`` or ``inference``; the column ``pass``.
    image
        Height and width; None where inputs are rows of numbers.
    format
        Memory format of inputs and weights.
    isa
        Instruction set of batchnorm's core.
    """

    network: str
    pass_: str
    batch: int
    image: int | None
    format: str = "contiguous"
    dtype: str = "float32"
    threads: int = 1
    isa: str = ""

    @property
    def label(self) -> str:
        """What differs between cases of one type and number of threads."""
        shape = f"{WIDTHS[self.network]}" if self.image is None else f"3x{self.image}x{self.image}"
        return f"{self.network} {self.pass_} {self.batch}x{shape} {self.format}"


# --- a training step and an inference -------------------------------------------------------------


def make_model(provider: str, case: Case, *, seed: int) -> Any:
    """The network as the provider has it, with weights that depend on the seed.

    For inference, PyTorch eager trains it first, so that running statistics are not those of a new
    layer, and the same for all providers.
    """
    import torch
    from networks import NETWORKS

    torch.manual_seed(seed)
    model = NETWORKS[case.network]()
    if case.format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    if case.pass_ == INFERENCE:
        image = case.image and min(case.image, EARLIER_IMAGE)
        earlier = replace(case, batch=EARLIER_BATCH, image=image, dtype="float32")
        step = make_step(model, earlier)
        for inputs, targets in make_data(earlier, seed=seed, batches=EARLIER_STEPS):
            step(inputs, targets)
        model.zero_grad(set_to_none=True)
        model.eval()
    if provider == CONVERTED:
        from batchnorm.torch import convert

        return convert(model)
    if provider == COMPILED:
        return torch.compile(model, fullgraph=True)
    return model


def make_data(case: Case, *, seed: int, batches: int = 1) -> list[tuple[Any, Any]]:
    """Inputs from N(0, 1) with random targets; the numbers are the same in both memory formats."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(batches):
        if case.image is None:
            inputs = torch.randn(case.batch, WIDTHS[case.network], generator=generator)
            targets = torch.randn(case.batch, 1, generator=generator)
        else:
            inputs = torch.randn(case.batch, 3, case.image, case.image, generator=generator)
            targets = torch.randint(0, 1000, (case.batch,), generator=generator)
            if case.format == "channels_last":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
        data.append((inputs, targets))
    return data


def make_step(model: Any, case: Case) -> Callable[[Any, Any], Any]:
    """One step of SGD with momentum; returns the loss."""
    import torch

    functions = torch.nn.functional
    loss_of = functions.mse_loss if case.image is None else functions.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)

    def step(inputs: Any, targets: Any) -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def make_inference(model: Any, case: Case) -> Callable[[Any], Any]:
    """One inference; returns the outputs."""
    import torch

    def infer(inputs: Any) -> Any:
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"),
        ):
            return model(inputs)

    return infer


# --- where the time goes --------------------------------------------------------------------------

#: Group of operators to the outermost events of it; whatever happens within them is the group's.
_EVENTS = {
    "convolution forward": ("aten::conv2d",),
    "convolution backward": ("ConvolutionBackward0",),
    "linear": ("aten::linear", "AddmmBackward0"),
    "batch norm forward": ("batch norm forward",),  # `_labelled`
    "batch norm backward": (),
    "relu": (
        *("aten::relu", "aten::relu_", "ReluBackward0"),
        *("aten::relu6", "aten::relu6_", "aten::hardtanh", "aten::hardtanh_", "HardtanhBackward0"),
    ),
    # Autograd's sum of the gradients of two branches is an addition as well.
    "add": ("aten::add", "aten::add_", "AddBackward0"),
    "cat": ("aten::cat", "CatBackward0"),
    "pooling": (
        *("aten::max_pool2d", "MaxPool2DWithIndicesBackward0"),
        *("aten::avg_pool2d", "AvgPool2DBackward0"),
        *("aten::adaptive_avg_pool2d", "MeanBackward1", "AdaptiveAvgPool2DBackward0"),
    ),
    "optimizer": ("Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"),
    "other": (),
}
GROUPS = tuple(_EVENTS)
_GROUP_OF = {event: group for group, events in _EVENTS.items() for event in events}

_ENGINE = "autograd::engine::evaluate_function: "


@contextlib.contextmanager
def _labelled(model: Any) -> Iterator[dict[str, str]]:
    """Let the profiler see the forward of every batch norm under one name; yield `_GROUP_OF`,
    with the names of their backwards.

    Of batchnorm's layers it would only see the autograd function, and not the update of the
    running statistics.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    group_of = dict(_GROUP_OF)

    def label(forward: Callable[..., Any]) -> Callable[..., Any]:
        def labelled(*arguments: Any, **named: Any) -> Any:
            with torch.profiler.record_function("batch norm forward"):
                y = forward(*arguments, **named)
            if y.grad_fn is not None:
                group_of[y.grad_fn.name()] = "batch norm backward"
            return y

        return labelled

    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.forward = label(layer.forward)
    try:
        yield group_of
    finally:
        for layer in layers:
            del layer.forward


def profile(model: Any, run: Callable[[], Any], runs: int) -> dict[str, float]:
    """Milliseconds of a run that each of `GROUPS` takes, by torch.profiler."""
    import torch

    with (
        _labelled(model) as group_of,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
    ):
        for _ in range(runs):
            with torch.profiler.record_function("run"):
                run()
    ms = dict.fromkeys(GROUPS, 0.0)

    def visit(event: Any, within: str) -> None:
        group = group_of.get(event.name)
        if group is not None:
            ms[group] += event.time_range.elapsed_us() / 1e3 / runs
            return
        # The engine's part in a derivative is mostly to free what was saved for it.
        within = group_of.get(event.name.removeprefix(_ENGINE), within)
        ms[within] += event.self_cpu_time_total / 1e3 / runs
        for child in event.cpu_children:
            visit(child, within)

    for event in profiler.events():
        if event.name == "run" and event.cpu_parent is None:
            visit(event, "other")
    return ms


# --- the worker -----------------------------------------------------------------------------------


class Runner:
    """A provider on a case, warmed up."""

    def __init__(self, provider: str, case: dict[str, Any], *, seed: int, warmup: int) -> None:
        import torch

        provider, on = provider.removesuffix(KEPT), Case(**case)
        # What is imported later would count as memory of the model's.
        needs = {CONVERTED: "batchnorm.torch", COMPILED: "torch._inductor.compile_fx"}
        if provider in needs:
            importlib.import_module(needs[provider])
        torch.set_num_threads(on.threads)
        gc.collect()
        self.baseline = memory.resident()
        memory.reset_peak()
        ((inputs, targets),) = make_data(on, seed=seed)
        self.model = make_model(provider, on, seed=seed)
        if on.pass_ == TRAINING:
            step = make_step(self.model, on)
            self._run = lambda: step(inputs, targets)
            losses = [float(self._run())]
            norms = [float(p.grad.norm()) for p in self.model.parameters()]
            losses += [float(self._run()) for _ in range(warmup - 1)]
            self.results = {"losses": losses, "gradient_norms": norms}
        else:
            infer = make_inference(self.model, on)
            self._run = lambda: infer(inputs)
            self.results = {"outputs": self._run().double().flatten().tolist()}
            for _ in range(warmup - 1):
                self._run()
        self._repeats = calls_per_sample(self._run, min_sample_s=SHORTEST_SAMPLE_S)
        gc.collect()
        gc.freeze()  # what is there stays, and need not be looked through before every run
        self.warmup_peak = memory.peak()
        memory.reset_peak()

    def warmed_up(self) -> dict[str, list[float]]:
        """Of training the losses of the warm-up, and gradient norms of all parameters after its
        first step; of inference the outputs."""
        return self.results

    def run(self) -> Sample:
        """Time a step or an inference."""
        gc.collect()
        time.sleep(SPIN_S)
        return sample(self._run, repeats=self._repeats, untimed=int(self._repeats > 1))

    def profile(self, runs: int) -> dict[str, float]:
        """See `profile`."""
        return profile(self.model, self._run, runs)

    def memory(self) -> dict[str, float]:
        """Most bytes resident since the warm-up, and during it, above those before the model."""
        return {
            "peak_bytes": memory.peak() - self.baseline,
            "warmup_peak_bytes": self.warmup_peak - self.baseline,
        }
