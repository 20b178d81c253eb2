"""Batch normalization of torch tensors: one function with torch's signature, differentiable."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..errors import ArgumentError, ShapeError
from ..moments import Moments
from . import derivatives, kernels, operators
from .kernels import IDENTITY, LEAKY_RELU, RELU, Form, Statistics

__all__ = ["batch_norm"]

# What torch need not know is a NumPy array.
AnyStatistics = Statistics | Tensor

_CODES = {None: IDENTITY, "relu": RELU, "leaky_relu": LEAKY_RELU}


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    group_size: int | None = None,
) -> Tensor:
    """Normalize each channel, as `torch.nn.functional.batch_norm`, and more in the same pass.

    Parameters
    ----------
    input : (N, C, *S)
        Contiguous, channels-last or any other strides; the output keeps the memory format.
    running_mean, running_var : (C,)
        In training they take up the batch's statistics, in place; None where there are none. In
        evaluation they normalize.
    weight, bias : (C,)
        Scale and shift, None for 1 and 0; of any floating type.
    training : bool
        Whether the batch's own statistics normalize.
    momentum : float
        Weight of the new value in the running statistics.
    eps : float
        Added to the variance, inside the root.
    residual : broadcasts with (N, C, *S)
        Added before the activation.
    mask : broadcasts to (N, *S)
        Weight of each value in the statistics: booleans, or numbers that are finite and not
        negative; not differentiated. Where it is zero, neither the input nor gradients matter (NaN
        and infinity included), and the output is zero.
    activation : None, "relu" or "leaky_relu"
        Applied to the result.
    negative_slope : float
        Of "leaky_relu".
    group_size : int
        Examples that share their statistics in training (ghost batches); None for all. What is
        left over forms a smaller group, or joins the last where it had one value per channel. The
        running statistics are those of the whole batch.

    Returns
    -------
    (N, C, *S)
        In the type of `input`; with a residual of another type or shape, in those of the sum.

    Raises
    ------
    ValueError, RuntimeError
        Where torch's function raises them, with its messages; and `ArgumentError` or `ShapeError`,
        which are ValueErrors, for the arguments that it does not have, and for a negative
        `running_var`. A call that raises changes nothing.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 1; ghost batches: Hoffer et al. (2017), Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import functional
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> functional.batch_norm(x, None, None, training=True, activation="relu", eps=1e-12)
    tensor([[0., 0.],
            [1., 1.]])
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        result: Tensor = handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            mask=mask,
            activation=activation,
            negative_slope=negative_slope,
            group_size=group_size,
        )
        return result
    form = form_of(eps, group_size, activation, negative_slope)
    y, statistics = layer(
        input, running_mean, running_var, weight, bias, training, form, residual, mask
    )
    if training and running_mean is not None and running_var is not None:
        update_running(
            running_mean, running_var, None, None, statistics, momentum, "propagate", mask, ""
        )
    return y


def form_of(
    eps: float, group_size: int | None, activation: str | None, negative_slope: float
) -> Form:
    """The arguments that torch does not have, checked."""
    if activation not in _CODES:
        raise ArgumentError(f"activation must be None, 'relu' or 'leaky_relu', got {activation!r}.")
    if group_size is not None and (group_size != int(group_size) or group_size < 1):
        raise ArgumentError(f"group_size must be a positive integer or None, got {group_size!r}.")
    return Form(eps, group_size or 0, _CODES[activation], negative_slope)


def layer(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    form: Form,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, AnyStatistics | None]:
    """Check, normalize, and leave the running statistics alone.

    Returns the batch's statistics as well (in evaluation, None).
    """
    if residual is None and mask is None and _is_quick(x, running_mean, running_var, weight, bias):
        # The core and torch check what is left to check, before anything has been changed; if they
        # refuse, the longer way says why, or does what they cannot.
        try:
            return _quick(x, running_mean, running_var, weight, bias, training, form)
        except (KeyError, RuntimeError, ValueError):
            pass
    check(x, running_mean, running_var, weight, bias, training, form)
    weights = None if mask is None else as_weights(mask, x)
    if residual is not None and not joins(residual, x, form):
        y, statistics = layer(
            x, running_mean, running_var, weight, bias, training,
            form._replace(activation=IDENTITY), None, mask,
        )  # fmt: skip
        return finish(y, residual, weights, form), statistics
    tensors = (x, weight, bias, residual, weights)
    if not kernels.fits(*tensors, running_mean, running_var):
        return _torchs(
            x, running_mean, running_var, weight, bias, training, form, residual, weights
        )
    if training:
        return _normalized(*tensors, None, form)
    assert running_mean is not None
    assert running_var is not None
    given = _given_statistics(running_mean, running_var)
    return _normalized(*tensors, given, form)[0], None


def joins(residual: Any, x: Tensor, form: Form) -> bool:
    """Whether a residual can be added in the same pass."""
    return (
        isinstance(residual, Tensor)  # a converted model may add a number
        and form.slope >= 0  # or y would not have the sign of what the activation sees
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def _is_quick(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    if torch._C._are_functorch_transforms_active():
        return False
    vectors = (running_mean, running_var, weight, bias)
    for t in vectors:
        if t is not None and not (t.is_cpu and t.dim() == 1):
            return False
    return x.is_cpu and kernels.plain(x, *vectors)


def _quick(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    form: Form,
) -> tuple[Tensor, Statistics | None]:
    if x.dim() < 2 or form.eps <= 0 or form.group_size == 1:
        raise ValueError
    channels = x.shape[1]
    if x.numel() == channels:
        raise ValueError
    if running_mean is None or running_var is None:
        if running_mean is not running_var or not training:
            raise ValueError
    elif not (_takes_up(running_mean, channels) and _takes_up(running_var, channels)):
        raise ValueError
    statistics = None
    if not training:
        assert running_mean is not None
        assert running_var is not None
        statistics = kernels.given_statistics(running_mean, running_var)
    if _is_differentiated(x, weight, bias, None):
        call = _Call(None, statistics, form)
        y = _apply_eager(x, weight, bias, None, call)
        measured = call.statistics if training else None
        assert not isinstance(measured, Tensor)
        return y, measured
    if statistics is None:
        return kernels.forward(x, weight, bias, None, None, form)
    return kernels.normalize(x, statistics, weight, bias, None, None, form), None


def _takes_up(running: Tensor, channels: int) -> bool:
    """Whether this can be a running statistic."""
    fits = running.shape[0] == channels and running.is_floating_point()
    return fits and not running.requires_grad


def _is_differentiated(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor | None,
    form: Form,
) -> tuple[Tensor, AnyStatistics]:
    """Normalize by `statistics`, or where they are None by those of x; differentiable."""
    tensors = (x, weight, bias, residual, mask)
    if not (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None):
        if torch._C._are_functorch_transforms_active():
            if _is_forward_twice():
                return derivatives.value(*tensors, statistics, form)
            y, s = _apply_transformed(*tensors, statistics, form)
            return y, s
        if _is_differentiated(*tensors):
            call = _Call(mask, statistics, form)
            y = _apply_eager(x, weight, bias, residual, call)
            assert call.statistics is not None
            return y, call.statistics
    if statistics is None:
        return operators.forward(*tensors, form)
    return operators.normalize(x, statistics, weight, bias, residual, mask, form), statistics


def _is_forward_twice() -> bool:
    """Whether forward mode is nested, where torch takes no Function's own `jvp`.

    https://github.com/pytorch/pytorch/issues/197867
    """
    levels = retrieve_all_functorch_interpreters()
    return sum(level.key() == TransformType.Jvp for level in levels) > 1


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    skipped: Tensor | None,
    statistics: AnyStatistics | None,
    momentum: float | None,
    on_nonfinite: str,
    mask: Tensor | None,
    name: str,
) -> None:
    """Bring a batch's statistics into the running ones (`kernels.update_running`)."""
    policy = (momentum, on_nonfinite, mask is None, name)
    buffers = (running_mean, running_var, tracked, skipped)
    if isinstance(statistics, np.ndarray):
        if kernels.fits(running_mean, running_var) and kernels.plain(*buffers):
            return kernels.update_running(*buffers, statistics, *policy)
        statistics = torch.from_numpy(statistics)
    assert statistics is not None
    if not kernels.fits(running_mean, running_var):
        _update_by_torch(*buffers, statistics, *policy)
    elif not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        _apply_update(*buffers, statistics, *policy)
    else:
        operators.update_running(*buffers, statistics, *policy)
    return None


def merge(
    total: Tensor, statistics: AnyStatistics | None, skipped: Tensor | None, *policy: str
) -> None:
    """Merge a batch's statistics into `total` (`kernels.merge`)."""
    if isinstance(statistics, np.ndarray):
        statistics = torch.from_numpy(statistics)
    assert statistics is not None
    operators.merge(total, statistics, skipped, *policy)


def measure(x: Tensor, mask: Tensor | None) -> Moments:
    """Moments of a tensor, (N, C, *S), on any device; `mask` as in `batch_norm`."""
    weights = None if mask is None else as_weights(mask, x)
    return kernels.as_moments(statistics_of(x.detach(), weights)[0].cpu().numpy())


def statistics_of(x: Tensor, weights: Tensor | None) -> Tensor:
    """The statistics (1, 4, C) of x, which is detached, on its device and without waiting for it.

    Row by row count, mean, zero, biased variance, in float64. What the core does not read is summed
    in its own type: `derivatives` has the formula in float64, to be differentiated.
    """
    if kernels.reads(x, weights):
        return torch.from_numpy(kernels.moments(x, weights))
    axes = [a for a in range(x.dim()) if a != 1]
    wide = torch.promote_types(x.dtype, torch.float32)
    if weights is None:
        values, w = x.to(wide), torch.ones((), dtype=wide, device=x.device)
        count = torch.full((), x.numel() / max(x.shape[1], 1), dtype=torch.float64, device=x.device)
    else:
        w = weights.unsqueeze(1)
        values, count, w = torch.where(w > 0, x, 0.0).to(wide), w.sum(), w.to(wide)

    def total(v: Tensor) -> Tensor:
        return (v * w).sum(axes, keepdim=True, dtype=torch.float64)

    some = torch.where(count > 0, count, 1.0)
    mean = total(values) / some
    centered = values - mean.to(wide)
    rest = total(centered) / some  # what rounding left off the mean, and off `mean.to(wide)`
    var = total(centered * centered) / some - rest * rest
    mean = mean.to(wide).double() + rest
    rows = (count, mean, 0 * mean, torch.where(count > 0, var, 1.0))
    return torch.stack([r.expand_as(mean).flatten() for r in rows])[None]


# ---- checks -------------------------------------------------------------------------------------


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    form: Form,
    *,
    alone: bool = True,
) -> None:
    """Refuse what torch refuses. `alone`: whether x is all of the batch."""
    if torch._C._get_tracing_state() is not None:
        return  # to compare a traced size is to fix it; the core will check
    good = x.dim() >= 2 and (form.eps > 0 or (form.eps == 0 and not training))
    if good:
        channels = x.shape[1]
        for t in (running_mean, running_var, weight, bias):
            if t is not None and (t.dim() != 1 or t.shape[0] != channels or t.device != x.device):
                good = False
        for t in (running_mean, running_var):
            if good and t is not None and not _takes_up(t, channels):
                good = False
        good = good and (running_mean is None) == (running_var is None)
        if training:
            per_example = kernels.values_per_example(x)
            good = good and not (alone and x.shape[0] * per_example == 1)
            if good and form.group_size * per_example == 1:
                raise ShapeError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{x.shape} in groups of {form.group_size}"
                )
        else:
            good = good and running_mean is not None and running_var is not None
    if good:
        return
    # Torch says best what it would have said.
    mean, var = (
        None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
        for t in (running_mean, running_var)
    )
    F.batch_norm(x, mean, var, weight, bias, training, 0.1, form.eps)
    raise ShapeError(
        "weight, bias and the running statistics must have shape (C,) and lie on one device with "
        f"input, got input {tuple(x.shape)} on {x.device}."
    )


def as_weights(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` as (N, *S) float64."""
    shape = x.shape[:1] + x.shape[2:]
    if mask.requires_grad:
        raise ArgumentError("mask is not differentiated; pass mask.detach().")
    if mask.is_complex():
        raise ArgumentError(f"mask must be real numbers or booleans, got {mask.dtype}.")
    if mask.dim() == x.dim() and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    try:
        # A copy, since the backward pass needs it as it is now.
        weights = torch.broadcast_to(mask.to(x.device, torch.float64, copy=True), shape)
    except RuntimeError:
        raise ShapeError(
            f"mask must broadcast to the shape of input without its channel axis, {tuple(shape)}, "
            f"got {tuple(mask.shape)}."
        ) from None
    return weights.contiguous()


# ---- autograd -----------------------------------------------------------------------------------


class _Call:
    """What a call in eager mode is besides its differentiable tensors."""

    __slots__ = ("fixed", "form", "mask", "statistics")

    def __init__(self, mask: Tensor | None, statistics: AnyStatistics | None, form: Form) -> None:
        self.mask = mask
        self.statistics = statistics  # set by the forward pass where None
        self.fixed = statistics is not None
        self.form = form

    def given(self) -> Tensor | None:
        """The statistics, where they do not depend on x."""
        return self.tensor() if self.fixed else None

    def tensor(self) -> Tensor:
        """The statistics as torch knows them."""
        s = self.statistics
        assert s is not None
        return torch.from_numpy(s) if isinstance(s, np.ndarray) else s


class _Eager(torch.autograd.Function):
    """The quick way: torch's newer protocol with `setup_context` costs several times as much."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        tensors = (weight, bias, residual, call.mask)
        if isinstance(call.statistics, np.ndarray):
            y = kernels.normalize(x, call.statistics, *tensors, call.form)
        elif call.fixed:
            y = operators.normalize(x, call.tensor(), *tensors, call.form)
        elif kernels.plain(x, *tensors):
            y, call.statistics = kernels.forward(x, *tensors, call.form)
        else:
            y, call.statistics = operators.forward(x, *tensors, call.form)
        saved = (x, weight, bias, saved_y(y, residual, call.form))
        ctx.save_for_backward(*saved)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*saved)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        call = ctx.call
        saved = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or torch._C._functorch.is_legacy_batchedtensor(grad_y)  # is_grads_batched=True
        ):
            grads = _differentiable(
                grad_y, saved, call.mask, call.given(), call.form, ctx.needs_input_grad[3]
            )
        else:
            quick = isinstance(call.statistics, np.ndarray) and kernels.plain(grad_y, *saved)
            run = kernels.backward if quick else operators.backward
            statistics = call.statistics if quick else call.tensor()
            needs = ctx.needs_input_grad
            grads = _gradients(run, grad_y, saved, call.mask, statistics, call.form, needs)
        return (*grads, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        call = ctx.call
        x, weight, bias, y = ctx.saved_tensors
        return derivatives.tangent(
            x, weight, bias, y, call.mask, call.given(), call.form, *tangents[:4]
        )


def saved_y(y: Tensor, residual: Tensor | None, form: Form) -> Tensor | None:
    """What tells the activation's gradient where a residual was added.

    Not the residual itself: as with torch's own addition and activation, it may change afterwards.
    """
    return y if residual is not None and form.activation != IDENTITY else None


class _Transformed(torch.autograd.Function):
    """The same for torch.func's transforms: x, weight, bias, residual, mask, statistics, form."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, residual, mask, statistics, form = inputs
        if statistics is None:
            return operators.forward(x, weight, bias, residual, mask, form)
        y = operators.normalize(x, statistics, weight, bias, residual, mask, form)
        return y, statistics.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, residual, mask, statistics, ctx.form = inputs
        y = saved_y(output[0], residual, ctx.form)
        ctx.save_for_backward(x, weight, bias, y, mask, statistics)
        ctx.save_for_forward(x, weight, bias, y, mask, statistics)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> Any:
        *saved, mask, statistics = ctx.saved_tensors
        grads = _differentiable(grad_y, saved, mask, statistics, ctx.form, ctx.needs_input_grad[3])
        return (*grads, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, weight, bias, y, mask, statistics = ctx.saved_tensors
        moved = derivatives.tangent(x, weight, bias, y, mask, statistics, ctx.form, *tangents[:4])
        return moved, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        """A batch of calls is one call with so many times the channels."""
        size, form = info.batch_size, inputs[6]
        if in_dims[4] is not None:  # a mask is of examples, not of channels
            calls = [
                _apply_transformed(
                    *(_select(t, d, k) for t, d in zip(inputs[:6], in_dims[:6], strict=True)), form
                )
                for k in range(size)
            ]
            ys, statistics = zip(*calls, strict=True)
            return (torch.stack(ys), torch.stack(statistics)), (0, 0)
        x, residual = (_fold(inputs[i], in_dims[i], size, 2) for i in (0, 3))
        weight, bias = (_fold(inputs[i], in_dims[i], size, 1) for i in (1, 2))
        given = _fold(inputs[5], in_dims[5], size, 3)
        y, statistics = _apply_transformed(x, weight, bias, residual, inputs[4], given, form)
        return (y.unflatten(1, (size, -1)), statistics.unflatten(2, (size, -1))), (1, 2)


def _select(t: Any, dim: int | None, k: int) -> Any:
    return t if dim is None else t.select(dim, k)


def _fold(t: Tensor | None, dim: int | None, size: int, channel_axis: int) -> Tensor | None:
    """Put the batch of a vmap before the channels, and make one axis of both.

    `channel_axis`: of the channels, once the batch stands before them.
    """
    if t is None:
        return None
    before = channel_axis - 1
    if dim is None:
        t = t.unsqueeze(before).expand(*t.shape[:before], size, *t.shape[before:])
    else:
        t = t.movedim(dim, before)
    return t.flatten(before, channel_axis)


def _gradients(
    run: Any,
    grad_y: Tensor,
    saved: Any,
    mask: Tensor | None,
    statistics: Any,
    form: Form,
    needs: Any,
) -> Any:
    """Gradients by `kernels.backward` or its operator."""
    x, weight, bias, y = saved
    if grad_y.dtype != x.dtype:
        grad_y = grad_y.to(x.dtype)
    need_x, need_weight, need_bias, need_residual = needs[:4]
    # Without an activation the residual's gradient is grad_y itself.
    passed = need_residual and form.activation == IDENTITY and mask is None
    needed = (
        need_x,
        need_weight and weight is not None,
        need_bias and bias is not None,
        need_residual and not passed,
    )
    a, b, c, d = run(grad_y, x, statistics, weight, bias, y, mask, form, needed)
    return a, b, c, grad_y if passed else d


def _differentiable(
    grad_y: Tensor,
    saved: Any,
    mask: Tensor | None,
    given: Tensor | None,
    form: Form,
    need_residual: bool,
) -> Any:
    """The same gradients, to be differentiated themselves."""
    x, weight, bias, y = saved
    *grads, grad_residual = derivatives.gradient(grad_y, x, weight, bias, y, mask, given, form)
    return (*grads, grad_residual if need_residual else None)


class _Update(torch.autograd.Function):
    """The update of running statistics under torch.func: where it sees tensors as they are."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        operators.update_running(*arguments)
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        if in_dims[0] is None or in_dims[1] is None:
            raise RuntimeError(
                "batch_norm got a batched input under vmap, while running_mean and running_var, "
                "which it updates in place, are not batched. Batch them too, or leave them out "
                "(track_running_stats=False)."
            )
        for k in range(info.batch_size):
            _apply_update(*(_select(a, d, k) for a, d in zip(arguments, in_dims, strict=True)))
        return torch.zeros(()), None


class _Given(torch.autograd.Function):
    """`kernels.given_statistics` under torch.func."""

    @staticmethod
    def forward(mean: Tensor, var: Tensor) -> Tensor:
        return operators.given_statistics(mean, var)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], mean: Tensor, var: Tensor) -> Any:
        size = info.batch_size
        folded = (_fold(t, d, size, 1) for t, d in zip((mean, var), in_dims, strict=True))
        return _apply_given(*folded).unflatten(2, (size, -1)), 2


def _given_statistics(mean: Tensor, var: Tensor) -> Tensor:
    mean, var = mean.detach(), var.detach()
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        given: Tensor = _apply_given(mean, var)
        return given
    return operators.given_statistics(mean, var)


# Untyped in torch's stubs, and looked up once.
_apply_eager: Any = _Eager.apply
_apply_transformed: Any = _Transformed.apply
_apply_update: Any = _Update.apply
_apply_given: Any = _Given.apply


# ---- what the core does not read: torch's own operators behind the same semantics ---------------


def _torchs(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    form: Form,
    residual: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if not training:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, form.eps)
        return finish(y, residual, weights, form), None
    parts = [
        _torchs_group(
            x[examples], weight, bias, None if weights is None else weights[examples], form
        )
        for examples in derivatives.slices(x, form.group_size)
    ]
    ys, statistics = zip(*parts, strict=True)
    y = ys[0] if len(ys) == 1 else torch.cat(ys)
    return finish(y, residual, weights, form), torch.stack(statistics)


def _torchs_group(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weights: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    axes = [a for a in range(x.dim()) if a != 1]
    wide = torch.promote_types(x.dtype, torch.float32)
    if weights is not None:
        y, statistics = derivatives.value(x, weight, bias, None, weights, None, Form(form.eps))
        return y, statistics[0]
    count = x.numel() // max(x.shape[1], 1)
    if torch._C._are_functorch_transforms_active():
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, form.eps)
        var, mean = torch.var_mean(x.detach().to(wide), axes, correction=0)
    else:
        # What a momentum of one leaves in the running statistics are the batch's.
        mean, var = torch.zeros((2, x.shape[1]), dtype=wide, device=x.device)
        var += 1
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, form.eps)
        var = var * ((count - 1) / count) if count else var
    return y, torch.stack([torch.full_like(mean, count), mean, torch.zeros_like(mean), var])


def check_residual(x: Tensor, residual: Any) -> None:
    """Refuse a residual that does not broadcast with x."""
    shape = getattr(residual, "shape", ())
    try:
        torch.broadcast_shapes(x.shape, shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ShapeError(
            f"residual must broadcast with input, {tuple(x.shape)}, got {tuple(shape)}."
        ) from None


def finish(y: Tensor, residual: Tensor | None, weights: Tensor | None, form: Form) -> Tensor:
    """What follows the normalization, in torch's operations."""
    if residual is not None:
        check_residual(y, residual)
        y = y + residual
    if form.activation == RELU:
        y = F.relu(y)
    elif form.activation == LEAKY_RELU:
        y = F.leaky_relu(y, form.slope)
    if weights is not None:
        y = torch.where(weights.unsqueeze(1) > 0, y, 0.0)
    return y


def _update_by_torch(
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
    """`kernels.update_running` on another device, without waiting for it unless it is to raise."""
    if running_mean.is_meta:
        return
    with torch.no_grad():
        if statistics.shape[0] > 1:
            groups = kernels.merged(statistics.cpu().numpy())
            statistics = torch.from_numpy(groups).to(running_mean.device)
        count, mean, _, var = statistics[0].to(running_mean.dtype)
        finite = torch.isfinite(statistics[0]).all()
        if on_nonfinite == "raise" and not bool(finite):
            bad = int(torch.nonzero(~torch.isfinite(statistics[0]).all(0))[0])
            kernels.not_finite(statistics.cpu().numpy(), bad, on_nonfinite, skipped, name)
        used = torch.ones_like(finite) if on_nonfinite == "propagate" else finite
        if skipped is not None:
            skipped.add_(~used)
        if not count_empty:
            used = used & (count > 0).any()
        if tracked is not None:
            tracked.add_(used)
        if momentum is None:
            share: Tensor | float = 1.0 if tracked is None else 1.0 / tracked.to(mean.dtype)
        else:
            share = momentum
        takes = used & (count > 1)
        unbiased = var * count / torch.where(count > 1, count - 1, 1.0)
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(torch.where(takes, running + share * (new - running), running))


# ---- autograd of the operators ------------------------------------------------------------------


def _operator_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    names = ("x", "weight", "bias", "residual", "mask")
    if isinstance(output, Tensor):  # normalize: the statistics stand second
        x, statistics, *others = inputs
        inputs, ctx.fixed = (x, *others), True
    else:
        statistics, ctx.fixed = output[1], False
    ctx.form = Form(*inputs[len(names) :])
    x, weight, bias, residual, mask = inputs[: len(names)]
    y = saved_y(output if ctx.fixed else output[0], residual, ctx.form)
    ctx.save_for_backward(x, weight, bias, y, mask, statistics)


def _operator_backward(ctx: Any, grad_y: Tensor, *_: Any) -> Any:
    *saved, mask, statistics = ctx.saved_tensors
    if not torch.compiler.is_compiling() and (
        torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    ):
        given = statistics if ctx.fixed else None
        need_residual = ctx.needs_input_grad[4 if ctx.fixed else 3]
        grads = _differentiable(grad_y, saved, mask, given, ctx.form, need_residual)
    else:
        needs = [n for i, n in enumerate(ctx.needs_input_grad) if not (ctx.fixed and i == 1)]
        grads = _gradients(operators.backward, grad_y, saved, mask, statistics, ctx.form, needs)
    form = (None,) * len(ctx.form)
    if ctx.fixed:
        return (grads[0], None, *grads[1:], None, *form)
    return (*grads, None, *form)


for _name in ("forward", "normalize"):
    torch.library.register_autograd(
        f"batchnorm::{_name}", _operator_backward, setup_context=_operator_context
    )
