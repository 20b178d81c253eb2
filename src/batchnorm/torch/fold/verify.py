"""Runs of the original and of the folded model, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...folding.sums import largest_difference
from .. import functional
from ..diagnose.records import eagerly
from ..population.batches import copy_of, tensors_in
from ..population.state import RngState
from .calls import of_dict
from .foldings import Folding, wide
from .layers import activation_of

__all__ = ["Examples", "cast", "compare_groups", "compare_outputs", "tolerance"]


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
                    args, kwargs = cast(args, dtype), cast(kwargs, dtype)
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


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with their real tensors in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(item, dtype) for item in value))
    if type(value) in (list, tuple):
        return type(value)(cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return of_dict(value, partial(cast, dtype=dtype))
    return value


# ---- each group ---------------------------------------------------------------------------------


def compare_groups(
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
            watch = _Sum(model, folding, dtype) if folding.group.beside else _Chain(folding, dtype)
            for name, hook in watch.hooks().items():
                module = model.get_submodule(name)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return examples.run(model)


@dataclass
class _Passing:
    """A tensor on its way through the layers of a group."""

    input: Tensor
    output: Tensor  # of the last layer; kept, so that no other tensor gets its address
    extra: tuple[tuple[Any, ...], dict[str, Any]] = field(default_factory=lambda: ((), {}))


class _Chain:
    """Compares a layer with batch norms before and after it."""

    def __init__(self, folding: Folding, dtype: torch.dtype | None) -> None:
        self._folding, self._dtype = folding, dtype
        self._passing: dict[int, _Passing] = {}

    def hooks(self) -> dict[str, Any]:
        return {name: partial(self._see, name) for name in self._folding.group.stages}

    def _see(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        folding, stages = self._folding, self._folding.group.stages
        x = args[0] if args else kwargs["input"]
        first = name == stages[0]
        state = _Passing(x, output) if first else self._passing.pop(x.data_ptr(), None)
        if state is None or not x.numel():
            return
        state.output = output
        if name == folding.group.layer:
            state.extra = args[1:], {k: v for k, v in kwargs.items() if args or k != "input"}
        if name != stages[-1]:
            self._passing[output.data_ptr()] = state
            return
        expected = output
        if name != folding.group.layer and activation_of(module) is not None:
            expected = _without_activation(module, x)
        given = state.input if self._dtype is None else state.input.to(self._dtype)
        folding.add(state.input, expected, folding.layer(given, *state.extra[0], **state.extra[1]))


class _Sum:
    """Compares a layer with parallel branches that are added."""

    def __init__(self, model: nn.Module, folding: Folding, dtype: torch.dtype | None) -> None:
        self._folding, self._dtype = folding, dtype
        self._last = [model.get_submodule(name) for name in folding.group.last]
        self._outputs: list[Tensor] = []

    def hooks(self) -> dict[str, Any]:
        group = self._folding.group
        calls = [group.call, *(branch.call for branch in group.beside if branch.call)]
        return {**dict.fromkeys(calls, self._keep), group.block: self._compare}

    def _keep(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> None:
        self._outputs.append(output.clone())  # which may be added to in place

    def _compare(self, _module: nn.Module, args: Any, _kwargs: Any, _output: Any) -> None:
        (x,) = args
        outputs, self._outputs = self._outputs, []
        if not x.numel():
            return
        outputs += [x for branch in self._folding.group.beside if not branch.call]
        expected = reduce(torch.add, outputs)
        for norm in self._last:
            expected = _without_activation(norm, expected)
        given = x if self._dtype is None else x.to(self._dtype)
        self._folding.add(x, expected, self._folding.layer(given))


def _without_activation(norm: Any, x: Tensor) -> Tensor:
    return functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


# ---- the whole model ----------------------------------------------------------------------------


def tolerance(model: nn.Module, *types: torch.dtype) -> float:
    """How far outputs may be apart, over the largest, if nothing but the order of sums differs.

    √ε of the coarsest of `types` and of those of the model.
    """
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}.union(types)
    return math.sqrt(max((torch.finfo(dtype).eps for dtype in found), default=1e-7))


def compare_outputs(one: list[Any], other: list[Any]) -> tuple[float | None, float | None]:
    """Largest difference of the real tensors in two lists of outputs, and that over the largest."""
    a, b = (
        [wide(t).cpu().numpy() for t in tensors_in(v) if t.is_floating_point()]
        for v in (one, other)
    )
    return largest_difference(a, b)
