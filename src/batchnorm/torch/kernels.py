"""The core's kernels on torch tensors, as functions and as custom operators of the same names.

The functions hand the core raw addresses. Where something has to see the call (a compiler, a
dispatch mode, a tensor subclass), they go through the operators ``torch.ops.batchnorm.*`` instead,
whose implementation they are. Nothing here knows autograd, and all of it is for CPU tensors.

A call's statistics are one float64 tensor of shape (groups, 4, C) with the rows count, mean, what
rounding left off the mean, and biased variance; a count of zero says that they do not depend on x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _core
from ..errors import ArgumentError, BatchNormError, ShapeError
from ..moments import Moments

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# Above this many bytes outputs come from the core's pool, whose pages are already mapped.
_POOLED_BYTES = 1 << 18

IDENTITY, RELU, LEAKY_RELU = 0, 1, 2


class NonFiniteError(BatchNormError, FloatingPointError):
    """A batch's statistics are not finite, and the layer was told to raise."""


class Form(NamedTuple):
    """What a call computes, besides its tensors.

    Attributes
    ----------
    eps : float
    group_size : int
        Examples that share their statistics; 0 for all.
    activation : int
        Code of the core: 0 none, 1 ReLU, 2 leaky ReLU.
    slope : float
        Of leaky ReLU.
    """

    eps: float
    group_size: int = 0
    activation: int = IDENTITY
    slope: float = 0.01


def fits(*tensors: Tensor | None) -> bool:
    """Whether the core can read these: dense CPU tensors of a supported floating type."""
    return all(
        t is None or (t.dtype in _TYPES and t.device.type == "cpu" and t.layout is torch.strided)
        for t in tensors
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but the caller looks on, so that addresses may be used at once."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
        if t is not None and t.is_neg():
            return False
    return True


def groups_of(x: Tensor, group_size: int) -> int:
    """Number of groups; a last one of a single value per channel joins the one before it."""
    n = x.shape[0]
    if group_size <= 0 or group_size >= n:
        return 1
    whole, rest = divmod(n, group_size)
    return whole + (1 if rest * values_per_example(x) > 1 else 0)


def values_per_example(x: Tensor) -> int:
    """Values of one channel in one example."""
    return math.prod(x.shape[2:])


def given_statistics(mean: Tensor, var: Tensor) -> Tensor:
    """Statistics that do not depend on x; refuses a negative variance."""
    if plain(mean, var):
        return _given_statistics(mean, var)
    s: Tensor = torch.ops.batchnorm.given_statistics(mean, var)
    return s


def _given_statistics(mean: Tensor, var: Tensor) -> Tensor:
    statistics = torch.empty((1, 4, mean.shape[0]), dtype=torch.float64)
    negative = _core.given_statistics(_seen(mean), _seen(var), _seen(statistics))
    if negative >= 0:
        raise ArgumentError(
            f"running_var must not be negative, got {float(var[negative])} in channel {negative}. "
            "Recompute the statistics; a clamped variance would only hide where they went wrong."
        )
    return statistics


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Normalize by the statistics of x; also return these.

    `mask`: (N, *S) float64 weights. `residual`: as x.
    """
    if plain(x, weight, bias, residual, mask):
        return _forward(x, weight, bias, residual, mask, *form)
    y, s = torch.ops.batchnorm.forward(x, weight, bias, residual, mask, *form)
    return y, s


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    group_size: int,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    number = groups_of(x, group_size)
    if mask is not None:
        _check_mask(mask, x)
    y = empty_like(x)
    statistics = torch.empty((number, 4, x.shape[1]), dtype=torch.float64)
    _core.layer_forward(
        _seen(x),
        _seen(y),
        1,
        eps,
        _seen(statistics),
        group_size,
        _seen(weight),
        _seen(bias),
        _weights(mask, x),
        _seen(residual),
        activation,
        slope,
    )
    return y, statistics


def normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
) -> Tensor:
    """Normalize by given statistics."""
    if plain(x, statistics, weight, bias, residual, mask):
        return _normalize(x, statistics, weight, bias, residual, mask, *form)
    y: Tensor = torch.ops.batchnorm.normalize(x, statistics, weight, bias, residual, mask, *form)
    return y


def _normalize(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    group_size: int,
    activation: int,
    slope: float,
) -> Tensor:
    statistics = statistics.contiguous()  # an address keeps nothing alive
    y = empty_like(x)
    _core.layer_normalize(
        _seen(x),
        _seen(y),
        1,
        eps,
        _seen(statistics),
        group_size,
        _seen(weight),
        _seen(bias),
        _weights(mask, x),
        _seen(residual),
        activation,
        slope,
    )
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to x, weight, bias and residual; None where not needed."""
    need_x, need_weight, need_bias, need_residual = needs
    if grad_y.dtype != x.dtype:
        grad_y = grad_y.to(x.dtype)
    # Without an activation the residual's gradient is grad_y itself.
    passed = need_residual and form.activation == IDENTITY and mask is None
    needs = (need_x, need_weight and weight is not None, need_bias, need_residual and not passed)
    if plain(grad_y, x, statistics, weight, bias, residual, mask):
        run = _backward
    else:
        run = torch.ops.batchnorm.backward
    grads = run(grad_y, x, statistics, weight, bias, residual, mask, *form, *needs)
    a, b, c, d = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return a, b, c, grad_y if passed else d


def _backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    group_size: int,
    activation: int,
    slope: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = statistics.contiguous()
    grads = _gradients(x, weight, bias, need_x, need_weight, need_bias, need_residual, empty_like)
    grad_x, grad_weight, grad_bias, grad_residual = grads
    if need_residual and not need_x:
        grad_x = empty_like(x)  # the core writes both or none
    _core.layer_backward(
        _seen(grad_y),
        _seen(x),
        _seen(grad_x) if need_x or need_residual else None,
        1,
        eps,
        _seen(statistics),
        group_size,
        _seen(weight),
        _seen(bias),
        _seen(grad_weight) if need_weight else None,
        _seen(grad_bias) if need_bias else None,
        _weights(mask, x),
        # Without an activation x alone decides the gradients.
        _seen(residual) if activation != IDENTITY or need_residual else None,
        _seen(grad_residual) if need_residual else None,
        activation,
        slope,
    )
    return grads


def _gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
    empty_like: Callable[[Tensor], Tensor] = torch.empty_like,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients; an operator has no None to return, so an empty tensor it is."""
    nothing = x.new_empty(0)
    return (
        empty_like(x) if need_x else nothing,
        nothing if weight is None or not need_weight else torch.empty_like(weight),
        nothing if bias is None or not need_bias else torch.empty_like(bias),
        empty_like(x) if need_residual else nothing,
    )


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    skipped: Tensor | None,
    statistics: Tensor,
    momentum: float | None,
    on_nonfinite: str,
    count_empty: bool,
    name: str,
) -> None:
    """Bring one batch's statistics into the running averages, in place.

    Parameters
    ----------
    running_mean, running_var : (C,)
    tracked : () int64
        Counts batches.
    skipped : () int64
        Counts batches left out because they were not finite.
    statistics : (groups, 4, C)
        Groups are merged: the running statistics are those of the whole batch.
    momentum : float or None
        Weight of the new value; None averages all batches equally.
    on_nonfinite : "skip", "raise" or "propagate"
    count_empty : bool
        Whether a batch without values counts as tracked; it changes nothing else.
    name : str
        Of the layer, for messages.
    """
    if plain(running_mean, running_var, tracked, skipped, statistics):
        run = _update_running
    else:
        run = torch.ops.batchnorm.update_running
    run(
        running_mean,
        running_var,
        tracked,
        skipped,
        statistics,
        momentum,
        on_nonfinite,
        count_empty,
        name,
    )


def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    skipped: Tensor | None,
    statistics: Tensor,
    momentum: float | None,
    on_nonfinite: str,
    count_empty: bool,
    name: str,
) -> None:
    if statistics.shape[0] > 1:
        statistics = merged(statistics)
    statistics = statistics.contiguous()
    bad = _core.update_running(
        _seen(statistics),
        _seen(running_mean),
        _seen(running_var),
        0 if tracked is None else tracked.data_ptr(),
        -1.0 if momentum is None else momentum,
        on_nonfinite == "propagate",
        count_empty,
    )
    if bad >= 0 and on_nonfinite != "propagate":
        not_finite(statistics, bad, on_nonfinite, skipped, name)
        return
    changed = (
        (running_mean, running_var) if tracked is None else (running_mean, running_var, tracked)
    )
    torch.autograd.graph.increment_version(changed)


def merge(
    total: Tensor, statistics: Tensor, skipped: Tensor | None, on_nonfinite: str, name: str
) -> None:
    """Merge a batch's statistics into `total`, (1, 4, C), in place; as `update_running`."""
    run = _merge if plain(total, statistics) else torch.ops.batchnorm.merge
    run(total, statistics, skipped, on_nonfinite, name)


def _merge(
    total: Tensor, statistics: Tensor, skipped: Tensor | None, on_nonfinite: str, name: str
) -> None:
    batch = merged(statistics)
    bad = torch.nonzero(~torch.isfinite(batch[0]).all(0))
    if len(bad) and on_nonfinite != "propagate":
        not_finite(batch, int(bad[0]), on_nonfinite, skipped, name)
        return
    total.copy_(of_moments(as_moments(total[0]) + as_moments(batch[0])))


def not_finite(
    statistics: Tensor, channel: int, on_nonfinite: str, skipped: Tensor | None, name: str
) -> None:
    """Raise, or count and warn the first time."""
    mean, var = (float(statistics[0, row, channel]) for row in (1, 3))
    what = f"{name}: the batch's statistics are not finite (channel {channel}: mean {mean}, variance {var})"
    if on_nonfinite == "raise":
        raise NonFiniteError(
            f"{what}. Look for an overflow or a division by zero before this layer; "
            "on_nonfinite='skip' leaves such batches out of the running statistics."
        )
    if skipped is not None:
        skipped.add_(1)
        if int(skipped) > 1:
            return
    warnings.warn(
        f"{what}; the running statistics leave it out. Further such batches are only counted, in "
        "nonfinite_batches.",
        RuntimeWarning,
        stacklevel=2,
    )


def merged(statistics: Tensor) -> Tensor:
    """Statistics of several groups as those of one, (1, 4, C)."""
    return of_moments(Moments.merge(as_moments(group) for group in statistics))


def as_moments(statistics: Tensor) -> Moments:
    """`Moments` of one group's (4, C)."""
    count, mean, _, var = statistics.detach().cpu().numpy()
    return Moments(count, mean, var * count)


def of_moments(moments: Moments) -> Tensor:
    """The statistics (1, 4, C) of one group."""
    var = moments.var()
    var[~(moments.count > 0)] = 1.0
    rows = [moments.count, moments.mean, var * 0, var]
    return torch.stack([torch.from_numpy(r + var * 0) for r in rows])[None]


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised, with the shape, type and strides that `torch.empty_like` gives."""
    bytes = x.numel() * x.itemsize
    if bytes < _POOLED_BYTES:
        return torch.empty_like(x)
    if x.is_contiguous():
        strides = x.stride()
    else:
        strides = torch.empty_like(x, device="meta").stride()
    memory = torch.frombuffer(_core.take(bytes, _seen(x)), dtype=x.dtype)
    # Not a view: autograd forbids changing views that a Function returns in place.
    y = torch.empty(0, dtype=x.dtype)
    return y.set_(memory.untyped_storage(), 0, x.shape, strides)


def _seen(t: Tensor | None) -> Any:
    """A tensor as the core takes it."""
    return None if t is None else (t.data_ptr(), _TYPES[t.dtype], t.shape, t.stride())


def _weights(mask: Tensor | None, x: Tensor) -> Any:
    return None if mask is None else _seen(mask.unsqueeze(1).expand(x.shape))


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if mask.numel() and not (bool(torch.isfinite(mask).all()) and float(mask.min()) >= 0):
        raise ArgumentError(
            "mask must be finite and not negative; use 0 to leave a value out, got values from "
            f"{float(mask.min())} to {float(mask.max())}."
        )
    if int(torch.count_nonzero(mask)) == 1:
        raise ShapeError(
            "Expected more than 1 value per channel when training, got one under the mask, "
            f"input size {x.shape}"
        )


# ---- the operators ------------------------------------------------------------------------------

_FORM = "float eps, int group_size, int activation, float slope"
_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask"
_SCHEMAS = {
    "given_statistics": "(Tensor mean, Tensor var) -> Tensor",
    "forward": f"(Tensor x, {_AFFINE}, {_FORM}) -> (Tensor, Tensor)",
    "normalize": f"(Tensor x, Tensor statistics, {_AFFINE}, {_FORM}) -> Tensor",
    "backward": f"(Tensor grad_y, Tensor x, Tensor statistics, {_AFFINE}, {_FORM}, "
    "bool need_x, bool need_weight, bool need_bias, bool need_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "update_running": "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? tracked, "
    "Tensor(d!)? skipped, Tensor statistics, float? momentum, str on_nonfinite, bool count_empty, str name) -> ()",
    "merge": "(Tensor(a!) total, Tensor statistics, Tensor(b!)? skipped, str on_nonfinite, "
    "str name) -> ()",
}


def _define() -> None:
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"batchnorm::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"batchnorm::{name}", "cpu")(globals()[f"_{name}"])
    fake = torch.library.register_fake
    fake("batchnorm::given_statistics")(
        lambda mean, var: mean.new_empty((1, 4, mean.shape[0]), dtype=torch.float64)
    )
    fake("batchnorm::forward")(
        lambda x, weight, bias, residual, mask, eps, group_size, activation, slope: (
            torch.empty_like(x),
            x.new_empty((groups_of(x, group_size), 4, x.shape[1]), dtype=torch.float64),
        )
    )
    fake("batchnorm::normalize")(lambda x, *others: torch.empty_like(x))
    fake("batchnorm::backward")(
        lambda grad_y, x, statistics, weight, bias, residual, mask, eps, group_size, activation, slope, *needs: (
            _gradients(x, weight, bias, *needs)
        )
    )
    fake("batchnorm::update_running")(lambda *arguments: None)
    fake("batchnorm::merge")(lambda *arguments: None)


_define()
