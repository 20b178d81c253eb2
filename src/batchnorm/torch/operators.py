"""The kernels of `native` as custom operators ``torch.ops.batchnorm.*``, on tensors.

They are used for calls that go through torch's dispatcher: under a compiler, an exporter, a
dispatch mode or a transform, or with a tensor subclass. Here are the operators' shapes, the
arguments that they change, and their rules for vmap; `autograd` adds the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..native import ROWS
from . import native, running
from .contract import Config, Gradients, Needs, groups_of
from .internals import gradient_format_of, memory_format_of, uncompiled

_operators: Any = torch.ops.batchnorm


def given(mean: Tensor, var: Tensor) -> Tensor:
    """`native.given`."""
    statistics: Tensor = _operators.given(mean.detach(), var.detach())
    return statistics


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """`native.forward`."""
    y, statistics = _operators.forward(x, weight, bias, residual, mask, *config)
    return y, statistics


def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    config: Config,
) -> Tensor:
    """`native.normalize`."""
    y: Tensor = _operators.normalize(x, statistics, weight, bias, residual, mask, *config)
    return y


def gradients(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    config: Config,
    measured: bool,
    needs: Needs,
) -> Gradients:
    """`native.gradients`."""
    tensors = (grad_y, x, statistics, weight, bias, y, mask)
    found = _operators.backward(*tensors, *config, measured, *needs)
    a, b, c, d = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return a, b, c, d


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    nonfinite: Tensor | None,
    statistics: Tensor,
    *policy: Any,
) -> None:
    """`running.update_native`."""
    _operators.update_running(running_mean, running_var, tracked, nonfinite, statistics, *policy)


def merge_into(total: Tensor, statistics: Tensor, nonfinite: Tensor | None, *policy: Any) -> None:
    """`running.merge_into`."""
    _operators.merge_into(total, statistics, nonfinite, *policy)


# ---- kernels ------------------------------------------------------------------------------------


def array(statistics: Tensor) -> native.Statistics:
    """Statistics as a NumPy array, for the native back end."""
    found: native.Statistics = statistics.detach().cpu().contiguous().numpy()
    return found


def _given_statistics(mean: Tensor, var: Tensor) -> Tensor:
    return torch.from_numpy(native.given(mean, var))


_MaybeTensor = Tensor | None


def _forward(
    x: Tensor,
    weight: _MaybeTensor,
    bias: _MaybeTensor,
    residual: _MaybeTensor,
    mask: _MaybeTensor,
    *config: Any,
) -> tuple[Tensor, Tensor]:
    y, statistics = native.forward(x, weight, bias, residual, mask, Config(*config))
    return y, torch.from_numpy(statistics)


def _normalize(
    x: Tensor,
    statistics: Tensor,
    weight: _MaybeTensor,
    bias: _MaybeTensor,
    residual: _MaybeTensor,
    mask: _MaybeTensor,
    *config: Any,
) -> Tensor:
    return native.normalize(x, array(statistics), weight, bias, residual, mask, Config(*config))


def _backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: _MaybeTensor,
    bias: _MaybeTensor,
    y: _MaybeTensor,
    mask: _MaybeTensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    config, measured, needs = Config(*rest[:4]), rest[4], rest[5:]
    found = native.gradients(
        grad_y, x, array(statistics), weight, bias, y, mask, config, measured, needs
    )
    # An operator cannot return None.
    return tuple(x.new_empty(0) if g is None else g for g in found)


def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    nonfinite: Tensor | None,
    statistics: Tensor,
    *policy: Any,
) -> None:
    buffers = (running_mean, running_var, tracked, nonfinite)
    running.update_native(*buffers, array(statistics), *policy)


def _merge_into(total: Tensor, statistics: Tensor, *others: Any) -> None:
    running.merge_into(total, array(statistics), *others)


# ---- shapes -------------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _fake_forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    groups = groups_of(x, others[5])
    return _like(x), x.new_empty((groups, ROWS, x.shape[1]), dtype=torch.float64)


def _fake_backward(grad_y: Tensor, x: Tensor, statistics: Tensor, *others: Any) -> Any:
    weight, bias, needs = others[0], others[1], others[9:]
    gradient = torch.empty_like(x, memory_format=gradient_format_of(x))
    like = (gradient, weight, bias, gradient)
    return tuple(
        torch.empty_like(t) if needed and t is not None else x.new_empty(0)
        for t, needed in zip(like, needs, strict=True)
    )


# ---- batching -----------------------------------------------------------------------------------


def _batched_forward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """A vmap of B calls is one call with B times as many channels."""
    size = info.batch_size
    if in_dims[4] is not None:  # one mask for all channels of a call
        return _one_by_one(_operators.forward, size, in_dims, arguments)
    axes = (2, 1, 1, 2)
    folded = [_fold(t, d, size, a) for t, d, a in zip(arguments, in_dims, axes, strict=False)]
    y, statistics = _operators.forward(*folded, *arguments[4:])
    return (y.unflatten(1, (size, -1)), statistics.unflatten(2, (size, -1))), (1, 2)


def _batched_normalize(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    size = info.batch_size
    if in_dims[5] is not None:
        return _one_by_one(_operators.normalize, size, in_dims, arguments)
    axes = (2, 3, 1, 1, 2)
    folded = [_fold(t, d, size, a) for t, d, a in zip(arguments, in_dims, axes, strict=False)]
    return _operators.normalize(*folded, *arguments[5:]).unflatten(1, (size, -1)), 1


def _batched_given(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    size = info.batch_size
    folded = [_fold(t, d, size, 1) for t, d in zip(arguments, in_dims, strict=True)]
    return _operators.given(*folded).unflatten(2, (size, -1)), 2


def _batched_backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    return _one_by_one(_operators.backward, info.batch_size, in_dims, arguments)


def _batched_update(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    if in_dims[0] is None or in_dims[1] is None:
        raise RuntimeError(
            "batch_norm got a batched input under vmap, while running_mean and running_var, "
            "which it updates in place, are not batched. Batch them too, or leave them out "
            "(track_running_stats=False)."
        )
    for k in range(info.batch_size):
        _operators.update_running(*_selected(arguments, in_dims, k))
    return None, None


def _one_by_one(
    operator: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], arguments: Any
) -> Any:
    found = [operator(*_selected(arguments, in_dims, k)) for k in range(size)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


def _selected(arguments: Any, in_dims: tuple[int | None, ...], k: int) -> list[Any]:
    pairs = zip(arguments, in_dims, strict=True)
    return [a if d is None else a.select(d, k) for a, d in pairs]


def _fold(t: Tensor | None, dim: int | None, size: int, channel_axis: int) -> Tensor | None:
    """Move the batch axis of a vmap before the channel axis, and flatten the two into one.

    `channel_axis` is the channel axis after the move.
    """
    if t is None:
        return None
    before = channel_axis - 1
    if dim is None:
        t = t.unsqueeze(before).expand(*t.shape[:before], size, *t.shape[before:])
    else:
        t = t.movedim(dim, before)
    return t.flatten(before, channel_axis)


# ---- definitions --------------------------------------------------------------------------------

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask"
_AFFINE_AND_Y = "Tensor? weight, Tensor? bias, Tensor? y, Tensor? mask"
_CONFIG = "float eps, int group_size, int activation, float slope"
_NEEDS = "bool need_x, bool need_weight, bool need_bias, bool need_residual"
_RUNNING = "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? tracked"
_POLICY = "str on_nonfinite, bool count_empty, str name"

_DEFINITIONS: tuple[tuple[str, Any, Any, Any], ...] = (
    (
        "given(Tensor mean, Tensor var) -> Tensor",
        _given_statistics,
        lambda mean, var: mean.new_empty((1, ROWS, mean.shape[0]), dtype=torch.float64),
        _batched_given,
    ),
    (
        f"forward(Tensor x, {_AFFINE}, {_CONFIG}) -> (Tensor, Tensor)",
        _forward,
        _fake_forward,
        _batched_forward,
    ),
    (
        f"normalize(Tensor x, Tensor statistics, {_AFFINE}, {_CONFIG}) -> Tensor",
        _normalize,
        lambda x, *others: _like(x),
        _batched_normalize,
    ),
    (
        f"backward(Tensor grad_y, Tensor x, Tensor statistics, {_AFFINE_AND_Y}, {_CONFIG}, "
        f"bool measured, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
        _batched_backward,
    ),
    (
        f"update_running({_RUNNING}, Tensor(d!)? nonfinite, Tensor statistics, float? momentum, "
        f"{_POLICY}) -> ()",
        _update_running,
        lambda *arguments: None,
        _batched_update,
    ),
    (
        "merge_into(Tensor(a!) total, Tensor statistics, Tensor(b!)? nonfinite, "
        "str on_nonfinite, str name) -> ()",
        _merge_into,
        lambda *arguments: None,
        None,
    ),
)


def _define() -> None:
    for schema, kernel, fake, batched in _DEFINITIONS:
        name, rest = schema.split("(", 1)
        operator = f"batchnorm::{name}"
        torch.library.define(operator, f"({rest}", tags=(torch.Tag.pt2_compliant_tag,))
        # Merging takes statistics from any device, and waits for them.
        torch.library.impl(operator, "default" if name == "merge_into" else "cpu")(
            uncompiled(kernel)
        )
        torch.library.register_fake(operator)(fake)
        if batched is not None:
            torch.library.register_vmap(operator, batched)


_define()
