"""What both back ends compute: the native core (`native`) and torch's own operations (`portable`).

Each has the same functions. x is (N, C, *S), `mask` (N, *S) float64, `config` a `Config`, and
`statistics` float64 of shape (groups, 5, C), whose rows are `Moments` and what rounding left off
the mean: count, mean, low, m2, dof. They are measured on x, or given and then constant, which is
told beside them.

| function | in → out |
|---|---|
| ``moments(x, mask)`` | → statistics of one group |
| ``given(mean, var)`` | → statistics that are given |
| ``normalize(x, statistics, weight, bias, residual, mask, config)`` | → y |
| ``forward(x, weight, bias, residual, mask, config)`` | = moments, then normalize → y, statistics |
| ``backward_sums(grad_y, x, statistics, weight, bias, y, mask, config)`` | → Σgrad_z, Σgrad_z·x̂ |
| ``backward(grad_y, x, statistics, sums, …, need_residual)`` | → grad_x, grad_residual |
| ``gradients(grad_y, x, statistics, …, measured, needs)`` | = backward_sums, then backward → all |
| ``merge(statistics)`` | groups → one group |
| ``update_running(running_mean, running_var, …)`` | in place |

where z = weight·x̂ + bias + residual, y = activation(z), grad_z = grad_y·activation'(z). In the
backward functions `y` stands where a residual was added before the activation: it tells as much of
z as the activation's gradient needs (which is not so for hardswish and silu).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..errors import ArgumentError, BatchNormError, ShapeError

COUNT, MEAN, LOW, M2, DOF = range(5)
ROWS = 5

IDENTITY, RELU, LEAKY_RELU, RELU6, HARDSWISH, SILU = range(6)

#: Codes of the core by the names of `batch_norm`.
ACTIVATIONS: dict[str | None, int] = {
    None: IDENTITY,
    "relu": RELU,
    "leaky_relu": LEAKY_RELU,
    "relu6": RELU6,
    "hardswish": HARDSWISH,
    "silu": SILU,
}

#: Gradients with respect to x, weight, bias and residual; None where not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool, bool]


class NonFiniteError(BatchNormError, FloatingPointError):
    """A batch's statistics are not finite, and the layer was told to raise."""


class Config(NamedTuple):
    """What a call computes, besides its tensors.

    Attributes
    ----------
    eps : float
    group_size : int
        Examples that share their statistics; 0 for all.
    activation : int
        Code of the core.
    slope : float
        Of leaky ReLU.
    """

    eps: float
    group_size: int = 0
    activation: int = IDENTITY
    slope: float = 0.01


def config_of(
    eps: float, group_size: int | None, activation: str | None, negative_slope: float
) -> Config:
    """The arguments that torch does not have, checked."""
    if activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS if name)
        raise ArgumentError(f"activation must be None or one of {known}, got {activation!r}.")
    if group_size is not None and (group_size != int(group_size) or group_size < 1):
        raise ArgumentError(f"group_size must be a positive integer or None, got {group_size!r}.")
    return Config(eps, group_size or 0, ACTIVATIONS[activation], negative_slope)


def groups_of(x: Tensor, group_size: int) -> int:
    """Number of groups; a last one of a single value per channel joins the one before it."""
    n = x.shape[0]
    if group_size <= 0 or group_size >= n:
        return 1
    rest = n % group_size  # symbols have no divmod
    return n // group_size + (1 if rest * values_per_example(x) > 1 else 0)


def values_per_example(x: Tensor) -> int:
    """Values of one channel in one example."""
    return math.prod(x.shape[2:])


def saved_y(y: Tensor, residual: Tensor | None, config: Config) -> Tensor | None:
    """What tells the activation's gradient where a residual was added.

    Not the residual itself: as with torch's own addition and activation, it may change afterwards.
    """
    return y if residual is not None and config.activation != IDENTITY else None


def joins(residual: object, x: Tensor, config: Config) -> bool:
    """Whether a residual can be added in the same pass, not after it."""
    return (
        isinstance(residual, Tensor)
        # Otherwise y does not tell what the activation saw.
        and config.slope >= 0
        and config.activation not in (HARDSWISH, SILU)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def check_mask(mask: Tensor, *, training: bool = False, shape: object = None) -> None:
    """Raise if weights are negative or not finite, or if only one is left to train with."""
    if mask.numel() and not (bool(mask.isfinite().all()) and float(mask.min()) >= 0):
        raise ArgumentError(
            "mask must be finite and not negative; use 0 to leave a value out, got values from "
            f"{float(mask.min())} to {float(mask.max())}."
        )
    if training and int(mask.count_nonzero()) == 1:
        raise ShapeError(
            "Expected more than 1 value per channel when training, got one under the mask, "
            f"input size {shape}"
        )
