"""The private parts of torch that this package uses, each behind a function that says what for.

All were checked with torch 2.13.0, the pinned version, and exist since 2.4. No other module of this
package imports from ``torch._C``, ``torch._functorch`` or other private modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

is_compiling = torch.compiler.is_compiling
#: Whether `torch.export` is recording. Torch before 2.7 does not say.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

F = TypeVar("F", bound=Callable[..., Any])

# Not subclasses, which may override operations.
_EXACT_TYPES = (Tensor, nn.Parameter)


def is_direct(*tensors: Tensor | None) -> bool:
    """True if no compiler, tracer, dispatch mode, transform or subclass must see the call.

    The kernels may then use raw pointers and bypass torch's dispatcher, which costs several times
    as much as a small kernel.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in _EXACT_TYPES or t.is_neg()):
            return False
    return forward_ad._current_level < 0 or not _have_tangents(*tensors)


_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing, _backward_pass = torch._C._get_tracing_state, torch._C._current_graph_task_id


def is_eager(x: Tensor) -> bool:
    """`is_direct(x)` in less time, but for its type, and never in forward mode."""
    return not (
        is_compiling()
        or _dispatch_modes()
        or _transforms()
        or _tracing() is not None
        or forward_ad._current_level >= 0
        or x.is_neg()
    )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of `torch.func`, or forward mode for one of these, is active."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and _have_tangents(*tensors)


def _have_tangents(*tensors: Tensor | None) -> bool:
    # All threads share the level, so it says nothing about these tensors.
    unpack: Any = forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in tensors)


def is_batched(t: Tensor) -> bool:
    """Whether `torch.func.vmap` maps over this tensor."""
    return bool(torch._C._functorch.is_batchedtensor(t))


def can_change_attributes(t: Tensor) -> bool:
    """Whether a call on `t` may change tensors that are neither arguments nor buffers.

    Exporters, tracers, transforms and dispatch modes would lose such a change, or refuse it.
    """
    if torch.compiler.is_dynamo_compiling():
        return not is_exporting()
    return is_direct(t)


def is_vmapped_gradient(t: Tensor) -> bool:
    """Whether this is a gradient of ``torch.autograd.grad(is_grads_batched=True)``."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(t))


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is recording. Comparing a size would then make it constant."""
    return torch._C._get_tracing_state() is not None


def is_exporting_to_onnx() -> bool:
    """Whether one of torch's ONNX exporters is recording. They know only torch's operators."""
    return (is_tracing() or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export()


def uncompiled(function: F) -> F:
    """Exclude a function from `torch.compile`.

    `torch.compiler.disable` does the same, but imports the compiler immediately.
    """
    disable: Any = torch._disable_dynamo  # type: ignore[attr-defined]
    return cast(F, disable(function))


def is_recomputing() -> bool:
    """Whether a backward pass is running. A forward inside it is a recomputation."""
    return not is_compiling() and _backward_pass() != -1


#: Tell autograd that these tensors have changed, as `torch.autograd.graph.increment_version`.
increment_versions: Callable[[list[Tensor]], None] = torch._C._increment_version


def below_autograd() -> Any:
    """A context in which operators are called without recording derivatives."""
    return torch._C._AutoDispatchBelowAutograd()


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format that torch's batch norm gives its output."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return torch.contiguous_format
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) else gradient_format_of(x)


def gradient_format_of(x: Tensor) -> torch.memory_format:
    """The format that torch's batch norm gives the gradient of its input.

    It differs where an axis has length one, and its stride leaves the format open.
    """
    if x.is_contiguous() or x.dim() not in (4, 5) or x.stride(1) == 0:
        return torch.contiguous_format
    # As c10::TensorImpl::is_strides_like_channels_last, to which Python has no access.
    sizes, strides, least = x.shape, x.stride(), 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        ambiguous = d == 0 and least == strides[1]
        if sizes[d] == 0 or strides[d] < least or ambiguous:
            return torch.contiguous_format
        least = strides[d] * max(sizes[d], 1)
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def has_dispatch_modes() -> bool:
    """Whether a dispatch mode is active in this thread."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_function_modes() -> bool:
    """Whether a function mode, other than a default device, is active in this thread."""
    modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def is_aten(target: object) -> bool:
    """Whether the target of a node in a graph is an operator, as in programs of `torch.export`."""
    return isinstance(target, OpOverload)


def has_global_hooks() -> bool:
    """Whether hooks are registered that every module of the process calls."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


@contextmanager
def fx_patches_undone() -> Iterator[None]:
    """Undo what torch.fx replaces while it traces, also if it is interrupted as it undoes it.

    Else every module of the process raises, at once or after the next `torch.compile`.
    """
    place: Any = torch.fx._symbolic_trace
    before, tracing = getattr(place, "CURRENT_PATCHER", None), place._is_fx_tracing_flag
    methods = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__")}
    try:
        yield
    finally:
        patcher = getattr(place, "CURRENT_PATCHER", None)
        if patcher is not None and patcher is not before:
            patcher.__exit__(None, None, None)
            place.CURRENT_PATCHER = before
        place._is_fx_tracing_flag = tracing
        for name, method in methods.items():
            setattr(nn.Module, name, method)
