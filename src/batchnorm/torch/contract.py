"""What the two back ends compute: the native core (`native`) and torch's operations (`portable`).

Both have the functions below. x is (N, C, *S), `mask` (N, *S) float64, and `config` a `Config`.
`statistics` are float64 of shape (groups, 5, C). Their rows are count, mean, low, m2 and dof, as in
`Moments`; `low` is what rounding has removed from the mean. Statistics are either measured on x, or
given and constant; an argument `measured` says which.

| function | in → out |
|---|---|
| ``moments(x, mask)`` | → statistics of one group |
| ``given(mean, var)`` | → statistics, constant |
| ``normalize(x, statistics, weight, bias, residual, mask, config)`` | → y |
| ``forward(x, weight, bias, residual, mask, config)`` | = moments, then normalize → y, statistics |
| ``backward_sums(grad_y, x, statistics, weight, bias, y, mask, config)`` | → Σgrad_z, Σgrad_z·x̂ |
| ``backward(grad_y, x, statistics, sums, …, need_residual)`` | → grad_x, grad_residual |
| ``gradients(grad_y, x, statistics, …, measured, needs)`` | = backward_sums, then backward → all |
| ``merge(statistics)`` | groups → one group |
| ``update_running(running_mean, running_var, …)`` | in place |

where z = weight·x̂ + bias + residual, y = activation(z), grad_z = grad_y·activation'(z). The
backward functions need `y` if a residual was added before an activation, whose derivative at z then
follows from y (except for hardswish and silu, which no residual precedes).
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NamedTuple

from torch import Tensor

from ..errors import ArgumentError, BatchNormError, ShapeError
from ..native import ROWS

COUNT, MEAN, LOW, M2, DOF = range(ROWS)

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
    """The statistics of a batch are not finite, and the layer has ``on_nonfinite="raise"``."""


class Config(NamedTuple):
    """The options of a call.

    Attributes
    ----------
    eps : float
    group_size : int
        Number of examples that share their statistics; 0 for all.
    activation : int
        The core's code for it.
    slope : float
        Of the leaky ReLU.
    """

    eps: float
    group_size: int = 0
    activation: int = IDENTITY
    slope: float = 0.01


#: Of layers without our options; `eps` has these values in most of them.
PLAIN_CONFIGS = {eps: Config(eps) for eps in (1e-5, 1e-3)}


def config_of(
    eps: float, group_size: int | None, activation: str | None, negative_slope: float
) -> Config:
    """Check the arguments that torch does not have, and return them as a `Config`."""
    try:
        code = ACTIVATIONS[activation]
    except (KeyError, TypeError):
        known = ", ".join(repr(name) for name in ACTIVATIONS if name)
        raise ArgumentError(
            f"activation must be None or one of {known}, got {activation!r}."
        ) from None
    if group_size is not None and not (
        isinstance(group_size, Integral) and 1 <= group_size < 1 << 63
    ):
        raise ArgumentError(f"group_size must be a positive integer or None, got {group_size!r}.")
    if type(negative_slope) is not float and not isinstance(negative_slope, Real):
        raise ArgumentError(f"negative_slope must be a number, got {negative_slope!r}.")
    return Config(eps, group_size or 0, code, negative_slope)


def groups_of(x: Tensor, group_size: int) -> int:
    """Number of groups. If the last has a single value per channel, it joins the one before."""
    n = x.shape[0]
    if group_size <= 0 or group_size >= n:
        return 1
    rest = n % group_size  # symbols have no divmod
    return n // group_size + (1 if rest * values_per_example(x) > 1 else 0)


def values_per_example(x: Tensor) -> int:
    """Values of one channel in one example."""
    return math.prod(x.shape[2:])


def saved_y(y: Tensor, residual: Tensor | None, config: Config) -> Tensor | None:
    """y, if the gradient of the activation needs it because a residual was added.

    The residual itself is not saved: as with torch's addition, it may change afterwards.
    """
    return y if residual is not None and config.activation != IDENTITY else None


def joins(residual: object, x: Tensor, config: Config) -> bool:
    """Whether a residual can be added in the same pass."""
    return (
        isinstance(residual, Tensor)
        # Otherwise y does not determine the activation's derivative.
        and config.slope >= 0
        and config.activation not in (HARDSWISH, SILU)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def check_mask(mask: Tensor, *, training: bool = False, shape: object = None) -> None:
    """Raise if weights are negative or not finite, or, in training, if only one is not zero."""
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
