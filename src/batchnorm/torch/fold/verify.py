"""Runs of the original and of the folded model, and how far apart they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...folding import Affine, Linear
from .. import functional
from ..adapters import FrozenLayer
from ..diagnose.records import eagerly
from ..population.batches import copy_of, tensors_in
from ..population.state import RngState
from .layers import activation_of, short
from .pairs import Group
from .report import FoldedLayer

__all__ = ["Examples", "Folding", "compare_outputs", "compare_pairs"]


class Examples:
    """Example inputs: a tensor, a tuple of arguments, a dict of keywords, or a list of these."""

    def __init__(self, inputs: Any) -> None:
        batches = inputs if type(inputs) is list else [inputs]
        if not batches:
            raise ArgumentError("example_inputs must hold at least one example, got an empty list.")
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for batch in batches:
            if isinstance(batch, Tensor):
                self._calls.append(((batch,), {}))
            elif isinstance(batch, tuple):
                self._calls.append((batch, {}))
            elif isinstance(batch, dict):
                self._calls.append(((), batch))
            else:
                raise ArgumentError(
                    "example_inputs must be a tensor, a tuple of arguments, a dict of keyword "
                    f"arguments, or a list of these, got {type(batch).__name__}. An argument that "
                    "is itself a list goes into a tuple."
                )
        self._rng = RngState()

    def run(self, model: nn.Module, dtype: torch.dtype | None = None) -> list[Any]:
        """What the model returns for each; with real inputs in `dtype`, if it is given."""
        self._rng.restore()
        outputs = []
        with _exactly():
            for args, kwargs in self._calls:
                args, kwargs = copy_of(args), copy_of(kwargs)
                if dtype is not None:
                    args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
                outputs.append(model(*args, **kwargs))
        return outputs


@contextmanager
def _exactly() -> Iterator[None]:
    """Without gradients, compilers, and arithmetic that is coarser than the types of tensors."""
    matmul: Any = torch.backends.cuda.matmul
    reduced = matmul.allow_fp16_reduced_precision_reduction
    reduced_bf16 = matmul.allow_bf16_reduced_precision_reduction
    precision = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eagerly())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(
            cudnn.flags(cudnn.enabled, False, cudnn.benchmark_limit, True, allow_tf32=False)
        )
        try:
            torch.set_float32_matmul_precision("highest")
            matmul.allow_fp16_reduced_precision_reduction = False
            matmul.allow_bf16_reduced_precision_reduction = False
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            matmul.allow_fp16_reduced_precision_reduction = reduced
            matmul.allow_bf16_reduced_precision_reduction = reduced_bf16


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(item, dtype) for item in value))
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, _cast(item, dtype)) for key, item in value.items())
        return copied
    return value


def _wide(t: Tensor) -> Tensor:
    """In float64, which some devices do not have."""
    t = t.detach()
    return (t.cpu() if t.device.type == "mps" else t).double()


# ---- each pair ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Folding:
    """A group that was folded: what was there, and what came of it.

    Attributes
    ----------
    group
    linear, before, after
        What the original layers compute.
    layer
        The folded layer.
    new_bias
        Whether it had none.
    error, output, input
        Of each channel, the largest seen.
    overflows
        Whether its output was not finite where the original's was.
    calls
        How many were compared.
    share
        Largest error of a channel over its bound.
    """

    group: Group
    linear: Linear
    before: Affine | None
    after: Affine | None
    layer: Any
    new_bias: bool
    error: Any = 0.0
    output: float = 0.0
    input: Any = 0.0
    overflows: bool = False
    calls: int = 0
    share: float = 0.0

    def problem(self) -> str:
        """Why the layer must not be folded, by what was seen; "" if it may."""
        if not self.calls:
            return "it could not be compared"
        if self.overflows:
            return "its output overflows"
        if self.share > 1:
            return (
                f"its error is {self.share:.3g} times the bound: the model may compute in coarser "
                "arithmetic than its types, by autocast for example"
            )
        return ""

    def record(self, original: dict[str, Any]) -> FoldedLayer:
        """As a line of the report; `original` are the modules of the original model."""
        stages = [original[name] for name in self.group.stages]
        bound = self._bound(original[self.group.layer].weight.dtype, stages)
        error = np.asarray(self.error)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.share = float(np.where(error > 0, error / bound, 0.0).max(initial=0.0))
        largest = float(error.max(initial=0.0))
        weights = (self.layer.weight, self.layer.bias)
        return FoldedLayer(
            self.group.layer,
            self.group.before,
            self.group.after,
            self.new_bias,
            max(float(t.detach().abs().max()) for t in weights if t.numel()),
            largest,
            largest / self.output if self.output else 0.0,
            float(bound.max(initial=0.0)),
            self.share,
        )

    def _bound(self, given: torch.dtype, stages: list[Any]) -> Any:
        """Of the error of each channel, on inputs no larger than those that were seen."""
        dtype = self.layer.weight.dtype
        double = torch.float64 in (dtype, given) and torch.float32 not in (dtype, given)
        steps = "float64" if double else "float32"
        if (narrow := _type_of_steps(stages)) is not None:
            if narrow == "float16" and _has_subnormal_variance(stages):
                return np.full(self.linear.outputs, math.inf)
            steps = narrow
        return self.linear.difference(
            self.after,
            self.input,
            short(dtype),
            before=self.before,
            sums="float64" if double and dtype == given else "float32",
            steps=steps,
            original=short(given),
        )


def _type_of_steps(stages: list[Any]) -> str | None:
    """The type in which a batch norm computes, if it is a narrow one: torch's computes in float32.

    Constant layers of torchvision and timm compute with tensors of the type of their buffers.
    """
    found = [
        short(stage.running_var.dtype)
        for stage in stages
        if hasattr(stage, "running_var")
        and not isinstance(stage, (nn.modules.batchnorm._BatchNorm, FrozenLayer))
        and stage.running_var.dtype.itemsize < 4
    ]
    return "bfloat16" if "bfloat16" in found else found[0] if found else None


def _has_subnormal_variance(stages: list[Any]) -> bool:
    tiny = torch.finfo(torch.float16).tiny
    return any(
        float(stage.running_var.min()) + stage.eps < tiny
        for stage in stages
        if hasattr(stage, "running_var") and stage.running_var.numel()
    )


@dataclass
class _Passing:
    """A tensor on its way through the layers of a group."""

    input: Tensor
    output: Tensor  # of the last layer; kept, so that no other tensor gets its address
    extra: tuple[tuple[Any, ...], dict[str, Any]] = field(default_factory=lambda: ((), {}))


def compare_pairs(
    model: nn.Module, examples: Examples, foldings: list[Folding], dtype: torch.dtype | None
) -> list[Any]:
    """Run the original model, and each folded layer beside the layers that it replaces.

    Returns
    -------
    list
        What the model returned for each example.
    """
    with ExitStack() as hooks:
        for folding in foldings:
            passing: dict[int, _Passing] = {}
            for name in folding.group.stages:
                module = model.get_submodule(name)
                hook = partial(_see, folding, name, passing, dtype)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return examples.run(model)


def _see(
    folding: Folding,
    name: str,
    passing: dict[int, _Passing],
    dtype: torch.dtype | None,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> None:
    stages = folding.group.stages
    x = args[0] if args else kwargs["input"]
    state = _Passing(x, output) if name == stages[0] else passing.pop(x.data_ptr(), None)
    if state is None or not x.numel():
        return
    state.output = output
    if name == folding.group.layer:
        state.extra = args[1:], {k: v for k, v in kwargs.items() if args or k != "input"}
    if name != stages[-1]:
        passing[output.data_ptr()] = state
        return
    expected = output
    if name != folding.group.layer and activation_of(module) is not None:
        expected = _without_activation(module, x)
    given = state.input if dtype is None else state.input.to(dtype)
    got = folding.layer(given, *state.extra[0], **state.extra[1])
    _measure(folding, state.input, expected, got)


def _without_activation(norm: Any, x: Tensor) -> Tensor:
    return functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def _measure(folding: Folding, x: Tensor, expected: Tensor, got: Tensor) -> None:
    """Add a call to what was seen."""
    one, other = _wide(expected), _wide(got)
    known = one.isfinite()
    folding.overflows |= bool((known & ~other.isfinite()).any())
    difference = torch.where(known & other.isfinite(), (one - other).abs(), 0.0)
    others = [axis for axis in range(one.dim()) if axis != 1]
    folding.error = np.maximum(folding.error, difference.amax(others).cpu().numpy())
    folding.output = max(folding.output, float(torch.where(known, one.abs(), 0.0).max()))
    largest = _wide(x).abs().amax([axis for axis in range(x.dim()) if axis != 1]).cpu().numpy()
    folding.input = np.fmax(folding.input, largest)
    folding.calls += 1


# ---- the whole model ----------------------------------------------------------------------------


def compare_outputs(one: list[Any], other: list[Any]) -> tuple[float | None, float | None]:
    """Largest difference of the real tensors in two lists of outputs, and that over the largest."""
    a, b = ([t for t in tensors_in(v) if t.is_floating_point()] for v in (one, other))
    if not a and not b:
        return None, None
    if [t.shape for t in a] != [t.shape for t in b]:
        return math.inf, math.inf
    error = largest = 0.0
    for s, t in zip(a, b, strict=True):
        if not s.numel():
            continue
        x, y = _wide(s), _wide(t)
        same = (x == y) | (x.isnan() & y.isnan())  # also of infinities
        difference = torch.where(same, 0.0, (x - y).abs()).nan_to_num(math.inf, math.inf)
        error = max(error, float(difference.max()))
        largest = max(largest, float(x.nan_to_num(0, 0, 0).abs().max()))
    return error, error / largest if largest else (0.0 if not error else math.inf)
