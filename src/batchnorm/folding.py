"""Fold a frozen batch norm into the linear layer before it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from batchnorm import native
from batchnorm.errors import ShapeError

Array = npt.NDArray[Any]


def fold_linear(
    weight: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Return the linear layer that equals `weight`, `bias` followed by a frozen batch norm.

    With scale = gamma / sqrt(var + eps), the folded layer is weight·scale (row by row) and
    (bias - mean)·scale + beta. Everything is computed in float64 and rounded once, to the
    dtype of `weight`.

    Parameters
    ----------
    weight : (out, in)
        Weight of the linear layer, which computes x @ weight.T + bias.
    bias : (out,)
        Bias of the linear layer; None means 0.
    mean, var : (out,)
        Statistics that the batch norm uses at test time: running or population statistics. The
        variance is used as given, biased or unbiased.
    gamma, beta : (out,)
        Scale and shift of the batch norm; None means 1 and 0.
    eps : scalar
        Added to the variance inside the root.

    Returns
    -------
    weight : (out, in)
        A new array in the dtype of `weight` (float64 for integers).
    bias : (out,)
        A new array of the same dtype.

    Raises
    ------
    ShapeError
        `weight` does not have two axes, or another array does not have one value per row of it.
    DTypeError
        `weight` is not float16, bfloat16, float32, float64 or integers, or another argument is not
        real numbers.
    ArgumentError
        `var` is negative or not finite, `mean` is not finite (the channel is named), `eps` is
        negative, or var + eps is zero.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.folding import fold_linear
    >>> weight, bias = fold_linear(
    ...     np.array([[1.0, 2.0]]), None, mean=np.array([3.0]), var=np.array([4.0]), eps=0.0
    ... )
    >>> weight.tolist(), bias.tolist()
    ([[0.5, 1.0]], [-1.5])
    """
    weight = native.as_values(native.as_real(weight, "weight"), "weight")
    if weight.ndim != 2:
        raise ShapeError(
            f"weight must have shape (out, in), got {weight.shape}. "
            "Flatten every axis after the first: weight.reshape(len(weight), -1)."
        )
    rows = weight.shape[0]
    bias64 = _per_row("bias", bias, rows, default=0.0)
    mean64 = _per_row("mean", mean, rows)
    var64 = _per_row("var", var, rows)
    gamma64 = _per_row("gamma", gamma, rows, default=1.0)
    beta64 = _per_row("beta", beta, rows, default=0.0)
    eps = native.check_eps(eps)
    native.check_statistics(mean64, var64, eps)

    scale = gamma64 / np.sqrt(var64 + eps)
    folded_weight = weight.astype(np.float64) * scale[:, np.newaxis]
    folded_bias = (bias64 - mean64) * scale + beta64
    return folded_weight.astype(weight.dtype), folded_bias.astype(weight.dtype)


def _per_row(
    name: str, values: npt.ArrayLike | None, rows: int, default: float | None = None
) -> npt.NDArray[np.float64]:
    """Convert to float64, and check that there is one value for each row of the weight."""
    if values is None and default is not None:
        return np.full(rows, default)
    converted = native.as_real(cast(Any, values), name).astype(np.float64)
    if converted.shape != (rows,):
        raise ShapeError(
            f"{name} must have shape (out,) = ({rows},), got {converted.shape}. "
            "weight is (out, in); pass weight.T if yours is (in, out)."
        )
    return converted
