"""The map that normalizes each feature by given statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import functional, native
from ..errors import ArgumentError, DTypeError, ShapeError
from ..native import Array
from .sources.values import floating_type, to_native
from .statistics import Statistics, feature_label


class Affine:
    """(x/scale − mean)/√(var + eps) of each feature, for arrays that hold some of the features.

    Parameters
    ----------
    statistics
        Mean, variance and scale of all features. A feature without any present value becomes NaN.
    eps
        Added to the variance; above zero if a feature is constant.
    dtype
        Floating type of the result; None for that of the values.
    inverse
        Whether to map y to x instead.
    """

    def __init__(
        self,
        statistics: Statistics,
        eps: float,
        dtype: DTypeLike | None,
        *,
        inverse: bool = False,
    ) -> None:
        seen = statistics.count > 0
        self.statistics = statistics
        self.eps = native.check_eps(eps)
        self.dtype = None if dtype is None else _check_floating(dtype)
        self.mean = np.where(seen, statistics.mean, 0.0)
        self.var = np.where(seen, statistics.var(), 1.0)
        self.unseen = ~seen
        native.check_variance(self.var)
        if self.eps == 0 and not self.var.all():
            constant = int(np.flatnonzero(self.var == 0)[0])
            raise ArgumentError(
                f"eps must be above zero, got 0: {feature_label(constant, statistics.names)} is "
                "constant. Leave eps out for 1e-5."
            )
        # In units of x itself, as arguments of `batch_norm_inference`.
        scale = statistics.scale
        mean, radicand = self.mean * scale, (self.var + self.eps) * scale * scale
        one, zero = np.ones_like(mean), np.zeros_like(mean)
        self._map = (zero, one, np.sqrt(radicand), mean) if inverse else (mean, radicand, one, zero)

    def check_features(self, label: str, features: int) -> None:
        """Raise unless the data have as many features as the statistics."""
        if features != self.statistics.features:
            raise ShapeError(
                f"{label}: must have as many features as the statistics, "
                f"{self.statistics.features}, got {features}. Choose the channel_axis that was "
                "measured, or measure this data."
            )

    def result_type(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the type of the result for values of type `dtype`."""
        return floating_type(dtype) if self.dtype is None else self.dtype

    def __call__(
        self, values: Array, axis: int, channels: slice = slice(None), *, label: str
    ) -> Array:
        """Normalize values of the features `channels`; `label` names them in messages."""
        result = self.result_type(values.dtype)
        values = to_native(values, label)
        if values.dtype.kind in "iub":
            values = values.astype(np.float64)
        elif result.itemsize > values.dtype.itemsize:
            values = values.astype(result)  # before, or the digits asked for would be lost
        mean, var, gamma, beta = (v[channels] for v in self._map)
        y = functional.batch_norm_inference(
            values, mean, var, gamma, beta, eps=0.0, channel_axis=axis
        )
        unseen = self.unseen[channels]
        if unseen.any():
            np.moveaxis(y, axis, 0)[unseen] = np.nan
        return narrow(y, result, values, label)


def narrow(y: Array, dtype: np.dtype[Any], values: Array, label: str) -> Array:
    """Convert normalized `values` to `dtype`, in which those of finite values must be finite."""
    with np.errstate(over="ignore"):
        y = y.astype(dtype, copy=False)
    infinite = np.isinf(y)
    if infinite.any() and np.isfinite(values[infinite]).any():
        raise ArgumentError(
            f"{label}: normalized values must fit into {dtype}, and some exceed it. Pass a larger "
            "dtype=, --dtype, such as float64, or a larger eps."
        )
    return y


def _check_floating(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or not native.is_supported(wanted):
        raise DTypeError(f"dtype must be float16, float32 or float64, got {dtype!r}.")
    return wanted
