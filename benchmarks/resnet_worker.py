"""The processes that `resnet_step.py` measures: one provider on one case each."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batchnorm.bench import memory
from batchnorm.bench.timing import Sample, sample

EAGER, COMPILED, CONVERTED = "torch eager", "torch.compile", "batchnorm convert"

#: At the end of a provider's name: with `KEEP_MEMORY` in the environment.
KEPT = " (memory kept)"
PROVIDERS = (EAGER, COMPILED, CONVERTED, EAGER + KEPT, CONVERTED + KEPT)

#: glibc's allocator gives freed memory back to the operating system, which has to clear every page
#: of it when it is wanted again; above these bytes only, so never. Other allocators ignore it.
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**40))

MOMENTUM = 0.9


@dataclass(frozen=True)
class Case:
    """What is trained on; `channels_last` is the memory format of inputs and weights."""

    batch: int
    image: int
    channels_last: bool = False
    bfloat16: bool = False

    @property
    def format(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bfloat16 else "float32"

    @property
    def columns(self) -> dict[str, Any]:
        """What the case puts into a row."""
        return {
            "batch": self.batch,
            "image": self.image,
            "format": self.format,
            "dtype": self.dtype,
        }

    @property
    def label(self) -> str:
        return f"{self.batch}x3x{self.image}x{self.image} {self.format} {self.dtype}"


# --- a training step ------------------------------------------------------------------------------


def make_model(provider: str, *, channels_last: bool, seed: int) -> Any:
    """ResNet-18 as the provider has it, in training mode, with weights that depend on the seed."""
    import torch
    from networks import ResNet18

    torch.manual_seed(seed)
    model = ResNet18()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if provider == CONVERTED:
        from batchnorm.torch import convert

        return convert(model)
    if provider == COMPILED:
        return torch.compile(model, fullgraph=True)
    return model


def make_data(case: Case, *, seed: int, batches: int = 1) -> list[tuple[Any, Any]]:
    """Images from N(0, 1) with random labels; the numbers are the same in both memory formats."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    data = []
    for _ in range(batches):
        images = torch.randn(case.batch, 3, case.image, case.image, generator=generator)
        labels = torch.randint(0, 1000, (case.batch,), generator=generator)
        data.append((images.contiguous(memory_format=layout), labels))
    return data


def make_step(model: Any, *, bfloat16: bool, learning_rate: float) -> Callable[[Any, Any], Any]:
    """One step of SGD with momentum; returns the loss."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=MOMENTUM)

    def step(images: Any, labels: Any) -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# --- where the time of a step goes ----------------------------------------------------------------

GROUPS = (
    "convolution forward",
    "convolution backward",
    "batch norm forward",
    "batch norm backward",
    "relu",
    "add",
    "optimizer",
    "other",
)

#: Outermost event of a group; whatever happens within it is the group's.
_GROUP_OF = {
    "aten::conv2d": "convolution forward",
    "ConvolutionBackward0": "convolution backward",
    "batch norm forward": "batch norm forward",  # `_labelled`
    "aten::relu": "relu",
    "aten::relu_": "relu",
    "ReluBackward0": "relu",
    "aten::add": "add",  # autograd's sum of the gradients of both branches is one as well
    "aten::add_": "add",
    "AddBackward0": "add",
    "Optimizer.step#SGD.step": "optimizer",
    "Optimizer.zero_grad#SGD.zero_grad": "optimizer",
}

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


def profile(model: Any, step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Milliseconds of a step that each of `GROUPS` takes, by torch.profiler."""
    import torch

    with (
        _labelled(model) as group_of,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
    ):
        for _ in range(steps):
            with torch.profiler.record_function("step"):
                step()
    ms = dict.fromkeys(GROUPS, 0.0)

    def visit(event: Any, within: str) -> None:
        group = group_of.get(event.name)
        if group is not None:
            ms[group] += event.time_range.elapsed_us() / 1e3 / steps
            return
        # The engine's part in a derivative is mostly to free what was saved for it.
        within = group_of.get(event.name.removeprefix(_ENGINE), within)
        ms[within] += event.self_cpu_time_total / 1e3 / steps
        for child in event.cpu_children:
            visit(child, within)

    for event in profiler.events():
        if event.name == "step" and event.cpu_parent is None:
            visit(event, "other")
    return ms


# --- the worker -----------------------------------------------------------------------------------


class Training:
    """A provider that trains on a case, warmed up."""

    def __init__(
        self,
        provider: str,
        case: dict[str, Any],
        *,
        threads: int,
        seed: int,
        warmup: int,
        rate: float,
    ) -> None:
        import torch

        provider, on = provider.removesuffix(KEPT), Case(**case)
        # What is imported later would count as memory of the model's.
        needs = {CONVERTED: "batchnorm.torch", COMPILED: "torch._inductor.compile_fx"}
        if provider in needs:
            importlib.import_module(needs[provider])
        torch.set_num_threads(threads)
        gc.collect()
        self.baseline = memory.resident()
        memory.reset_peak()
        ((images, labels),) = make_data(on, seed=seed)
        self.model = make_model(provider, channels_last=on.channels_last, seed=seed)
        run = make_step(self.model, bfloat16=on.bfloat16, learning_rate=rate)
        self._step = lambda: run(images, labels)
        self.losses = [float(self._step())]
        self.gradient_norms = [float(p.grad.norm()) for p in self.model.parameters()]
        self.losses += [float(self._step()) for _ in range(warmup - 1)]
        gc.collect()
        gc.freeze()  # what is there stays, and need not be looked through before every step
        self.warmup_peak = memory.peak()
        memory.reset_peak()

    def warmed_up(self) -> dict[str, list[float]]:
        """Losses of the warm-up, and gradient norms of all parameters after its first step."""
        return {"losses": self.losses, "gradient_norms": self.gradient_norms}

    def step(self) -> Sample:
        """Time one step."""
        gc.collect()
        return sample(self._step)

    def profile(self, steps: int) -> dict[str, float]:
        """See `profile`."""
        return profile(self.model, self._step, steps)

    def memory(self) -> dict[str, float]:
        """Most bytes resident since the warm-up, and during it, above those before the model."""
        return {
            "peak_bytes": memory.peak() - self.baseline,
            "warmup_peak_bytes": self.warmup_peak - self.baseline,
        }
