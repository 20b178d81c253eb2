"""The kernels as custom operators ``torch.ops.batchnorm.*``, for those who look on.

A compiler, an exporter, a dispatch mode or a tensor subclass has to see the call; it sees one
operator, with its shapes, its mutated arguments and (from `functional`) its derivative. The
functions here have the operators' meaning, and skip the dispatcher where nobody looks on, which
costs several times as much as a small kernel. Statistics are tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernels
from .kernels import Form, Gradients, Statistics, groups_of, plain

_operators: Any = torch.ops.batchnorm


def _array(statistics: Tensor) -> Statistics:
    array: Statistics = statistics.detach().contiguous().numpy()
    return array


def given_statistics(mean: Tensor, var: Tensor) -> Tensor:
    """`kernels.given_statistics`."""
    run = _given_statistics if plain(mean, var) else _operators.given_statistics
    return run(mean, var)


def _given_statistics(mean: Tensor, var: Tensor) -> Tensor:
    return torch.from_numpy(kernels.given_statistics(mean, var))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """`kernels.forward`."""
    run = _forward if plain(x, weight, bias, residual, mask) else _operators.forward
    y, statistics = run(x, weight, bias, residual, mask, *form)
    return y, statistics


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    *form: Any,
) -> tuple[Tensor, Tensor]:
    y, statistics = kernels.forward(x, weight, bias, residual, mask, Form(*form))
    return y, torch.from_numpy(statistics)


def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> Tensor:
    """`kernels.normalize`."""
    looks_on = not plain(x, statistics, weight, bias, residual, mask)
    run = _operators.normalize if looks_on else _normalize
    y: Tensor = run(x, statistics, weight, bias, residual, mask, *form)
    return y


def _normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    *form: Any,
) -> Tensor:
    return kernels.normalize(x, _array(statistics), weight, bias, residual, mask, Form(*form))


def backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    form: Form,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """`kernels.backward`."""
    looks_on = not plain(grad_y, x, statistics, weight, bias, y, mask)
    run = _operators.backward if looks_on else _backward
    grads = run(grad_y, x, statistics, weight, bias, y, mask, *form, *needs)
    a, b, c, d = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return a, b, c, d


def _backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    *form_and_needs: Any,
) -> tuple[Tensor, ...]:
    form, needs = Form(*form_and_needs[:4]), form_and_needs[4:]
    grads = kernels.backward(grad_y, x, _array(statistics), weight, bias, y, mask, form, needs)
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # operators know no None


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    skipped: Tensor | None,
    statistics: Tensor,
    *policy: Any,
) -> None:
    """`kernels.update_running`."""
    looks_on = not plain(running_mean, running_var, tracked, skipped, statistics)
    run = _operators.update_running if looks_on else _update_running
    run(running_mean, running_var, tracked, skipped, statistics, *policy)


def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    skipped: Tensor | None,
    statistics: Tensor,
    *policy: Any,
) -> None:
    kernels.update_running(running_mean, running_var, tracked, skipped, _array(statistics), *policy)


def merge(total: Tensor, statistics: Tensor, *policy: Any) -> None:
    """`kernels.merge`."""
    run = _merge if plain(total, statistics) else _operators.merge
    run(total, statistics, *policy)


def _merge(total: Tensor, statistics: Tensor, *policy: Any) -> None:
    kernels.merge(total, statistics.detach().cpu().contiguous().numpy(), *policy)


# ---- definitions --------------------------------------------------------------------------------

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask"
_AFFINE_AND_Y = "Tensor? weight, Tensor? bias, Tensor? y, Tensor? mask"
_FORM = "float eps, int group_size, int activation, float slope"
_NEEDS = "bool need_x, bool need_weight, bool need_bias, bool need_residual"
_RUNNING = "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? tracked"


def _fake_forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    groups = groups_of(x, others[5])
    return torch.empty_like(x), x.new_empty((groups, 4, x.shape[1]), dtype=torch.float64)


def _fake_backward(grad_y: Tensor, x: Tensor, statistics: Tensor, *others: Any) -> Any:
    needs = others[8:]
    like = (x, others[0], others[1], x)
    return tuple(
        torch.empty_like(t) if needed and t is not None else x.new_empty(0)
        for t, needed in zip(like, needs, strict=True)
    )


_DEFINITIONS: tuple[tuple[str, Any, Any], ...] = (
    (
        "given_statistics(Tensor mean, Tensor var) -> Tensor",
        _given_statistics,
        lambda mean, var: mean.new_empty((1, 4, mean.shape[0]), dtype=torch.float64),
    ),
    (f"forward(Tensor x, {_AFFINE}, {_FORM}) -> (Tensor, Tensor)", _forward, _fake_forward),
    (
        f"normalize(Tensor x, Tensor statistics, {_AFFINE}, {_FORM}) -> Tensor",
        _normalize,
        lambda x, *others: torch.empty_like(x),
    ),
    (
        f"backward(Tensor grad_y, Tensor x, Tensor statistics, {_AFFINE_AND_Y}, {_FORM}, {_NEEDS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
    (
        f"update_running({_RUNNING}, Tensor(d!)? skipped, Tensor statistics, float? momentum, "
        "str on_nonfinite, bool count_empty, str name) -> ()",
        _update_running,
        lambda *arguments: None,
    ),
    (
        "merge(Tensor(a!) total, Tensor statistics, Tensor(b!)? skipped, str on_nonfinite, "
        "str name) -> ()",
        _merge,
        lambda *arguments: None,
    ),
)


def _define() -> None:
    for schema, kernel, fake in _DEFINITIONS:
        name, rest = schema.split("(", 1)
        operator = f"batchnorm::{name}"
        torch.library.define(operator, f"({rest}", tags=(torch.Tag.pt2_compliant_tag,))
        # Merging waits for statistics wherever they are.
        torch.library.impl(operator, "default" if name == "merge" else "cpu")(kernel)
        torch.library.register_fake(operator)(fake)


_define()
