"""scikit-learn's `StandardScaler`, with statistics and results computed by this library.

>>> from batchnorm.sklearn import StandardScaler
>>> StandardScaler().fit_transform([[1.0, 10.0], [3.0, 30.0]])
array([[-1., -1.],
       [ 1.,  1.]])
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from sklearn import get_config, preprocessing
    from sklearn.base import _fit_context
    from sklearn.utils import assert_all_finite, check_array
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as missing:
    raise ImportError(
        "batchnorm.sklearn needs scikit-learn 1.6 or later: pip install 'batchnorm[sklearn]'"
    ) from missing
from scipy import sparse  # type: ignore[import-untyped]

from .errors import ArgumentError, ShapeError
from .functional import batch_norm_inference
from .moments import Moments
from .native import Array, Float64
from .scattered import moments_of_present, moments_of_sparse

__all__ = ["StandardScaler"]

FLOATS = (np.float64, np.float32, np.float16)

#: Values that are normalized at once where the result replaces them.
AT_ONCE = 1 << 18


class StandardScaler(preprocessing.StandardScaler):
    """Standardize features by removing the mean and scaling to unit variance.

    Takes the place of `sklearn.preprocessing.StandardScaler`: parameters, attributes and rules are
    the same, and a test passes it through scikit-learn's own checks. Statistics are those of
    `batchnorm.Moments`, in float64 for every type of X, and `transform` and `inverse_transform` of
    dense data are `batchnorm.batch_norm_inference`.

    Parameters
    ----------
    copy : bool
        False lets `transform` and `inverse_transform` overwrite X.
    with_mean, with_std : bool
        Whether to center, and to scale. Sparse data cannot be centered.

    Attributes
    ----------
    mean_, var_ : (C,)
        Mean and biased variance of each feature; NaN without values. None if not needed.
    scale_ : (C,)
        √var_, and 1 where a feature is constant as far as float64 can tell, that is where
        var ≤ n·ε·var + (n·mean·ε)². None if `with_std` is False.
    n_samples_seen_ : int, or (C,) if values are missing
        Number of values; with `sample_weight`, the sum of their weights.
    n_features_in_, feature_names_in_
        As of every estimator.

    Notes
    -----
    What differs from scikit-learn's, besides digits and speed:

    - A feature that had no values in the first `partial_fit` gets the statistics of later ones.
    - Sums of weights are float64 even if X is float32. Weights must not be negative.
    - Entries of a sparse matrix that are stored twice count as their sum, which is what they mean.
    - Values whose squares exceed float64 are refused.

    NaN counts as missing: ignored in `fit`, kept by `transform`. Arrays of other libraries, with
    scikit-learn's ``array_api_dispatch``, and the values of sparse matrices are scaled by
    scikit-learn's own code.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.sklearn import StandardScaler
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 5.0]])
    >>> scaler = StandardScaler().fit(x)
    >>> scaler.mean_, scaler.scale_
    (array([2., 5.]), array([1., 1.]))
    >>> scaler.transform(x)
    array([[-1.,  0.],
           [ 1.,  0.],
           [nan,  0.]])

    References
    ----------
    Chan, Golub & LeVeque (1983), "Algorithms for computing the sample variance: analysis and
    recommendations", The American Statistician 37(3), for the bound on a constant feature.
    """

    mean_: Any
    var_: Any
    scale_: Any
    n_samples_seen_: Any
    _mean_low: Any = None  # what rounding has removed from mean_

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Merge the statistics of X into those of the data seen so far.

        Parameters
        ----------
        X : (N, C), dense or sparse
            The data.
        y
            Ignored.
        sample_weight : (N,)
            Weight of each row, finite and not negative.

        Returns
        -------
        StandardScaler
            Itself.

        Raises
        ------
        ArgumentError
            X is sparse and `with_mean` is True, the square of a value exceeds float64, or
            `with_mean` or `with_std` were turned on since the first call.
        ValueError
            scikit-learn's validation refuses X or `sample_weight`: there is infinity, a weight is
            negative, or X has other features than before.
        """
        if _is_foreign(X):
            super().partial_fit(X, y, sample_weight)
            self._mean_low = None if self.mean_ is None else 0 * self.mean_
            return self
        is_first = not hasattr(self, "n_samples_seen_")
        x = validate_data(
            self,
            X,
            accept_sparse=("csr", "csc"),
            dtype=FLOATS,
            ensure_all_finite=False,  # the moments tell
            reset=is_first,
        )
        context = None
        if hasattr(self, "_init_callback_context"):  # scikit-learn 1.9 and later
            context = self._init_callback_context()
            told = {"estimator": self, "X": x, "y": y, "metadata": {"sample_weight": sample_weight}}
            context.call_on_fit_task_begin(**told)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(
                sample_weight, x, dtype=np.float64, ensure_non_negative=True
            )
        if sparse.issparse(x) and self.with_mean:
            raise ArgumentError(
                "Cannot center sparse matrices: pass `with_mean=False` instead. Subtracting the "
                "mean would fill them with values."
            )
        if weights is not None or sparse.issparse(x):
            _refuse_infinity(x)
        found = _of_sparse(x, weights) if sparse.issparse(x) else _of_dense(x, weights)
        weighted, mean_low = weights is not None, np.zeros(x.shape[1])
        if not is_first:
            weighted = weighted or np.asarray(self.n_samples_seen_).dtype.kind == "f"
            found, mean_low = self._merge(found)
        self._store(found, mean_low, weighted)
        if context is not None:
            context.call_on_fit_task_end(**told, reconstruction_attributes={})
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Subtract the mean and divide by the scale.

        Parameters
        ----------
        X : (N, C), dense or sparse
            The data.
        copy : bool
            False to overwrite X if it is an array or a CSR matrix of floats; None for `self.copy`.

        Returns
        -------
        (N, C)
            In the floating type of X, float64 for integers. NaN where X is.
        """
        if _is_foreign(X) or sparse.issparse(X):
            return super().transform(X, copy)
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        x = validate_data(
            self,
            X,
            reset=False,
            accept_sparse="csr",
            dtype=FLOATS,
            force_writeable=not copy,
            ensure_all_finite="allow-nan",
        )
        if sparse.issparse(x):  # a data frame of sparse columns
            return super().transform(X, copy)
        mean = self.mean_ if self.with_mean else None
        return _apply(x, copy, mean, 1 / self.scale_ if self.with_std else None, None)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """Multiply by the scale and add the mean.

        Parameters
        ----------
        X : (N, C), dense or sparse
            Standardized data.
        copy : bool
            As in `transform`.

        Returns
        -------
        (N, C)
            In the floating type of X, float64 for integers.

        Raises
        ------
        ShapeError
            X has another number of features than the data of `fit`.
        """
        if _is_foreign(X) or sparse.issparse(X):
            return super().inverse_transform(X, copy)
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        x = check_array(
            X,
            accept_sparse="csr",
            dtype=FLOATS,
            force_writeable=not copy,
            ensure_all_finite="allow-nan",
        )
        if sparse.issparse(x):
            return super().inverse_transform(X, copy)
        if x.shape[1] != self.n_features_in_:
            raise ShapeError(
                f"X must have {self.n_features_in_} features, as the data of fit had, got "
                f"{x.shape[1]}."
            )
        scale = self.scale_ if self.with_std else None
        return _apply(x, copy, None, scale, self.mean_ if self.with_mean else None)

    def _merge(self, found: Moments) -> tuple[Moments, Float64]:
        """Moments of all data, and what rounding has removed from their mean."""
        for name, attribute in (("with_mean", self.mean_), ("with_std", self.var_)):
            if getattr(self, name) and attribute is None:
                raise ArgumentError(
                    f"{name} must have been True since the first partial_fit, got True now and "
                    "False then. Call fit with all of the data."
                )
        count, zeros = np.zeros((2, self.n_features_in_))
        count += self.n_samples_seen_
        stored = (self.mean_, self._mean_low, self.var_)
        mean, low, var = (zeros if v is None else np.asarray(v) for v in stored)
        known = count > 0
        m2 = np.where(known, count * var, 0.0)
        # Means are merged as differences to the mean so far. Thousands of small parts at a large
        # offset would add a rounding of the offset each.
        center = np.where(known, mean, found.mean)
        total = Moments(count, low, m2) + Moments(found.count, found.mean - center, found.m2)
        merged = Moments(total.count, center + total.mean, total.m2)
        return merged, (center - merged.mean) + total.mean

    def _store(self, moments: Moments, mean_low: Float64, weighted: bool) -> None:
        count, mean, var = moments.count, moments.mean, moments.var()
        known = count > 0
        wrong = np.flatnonzero(known & ~np.isfinite(var))
        if self.with_std and wrong.size:
            raise ArgumentError(
                "X must have squares that float64 holds, got values that are too large in feature "
                f"{wrong[0]} ({wrong.size} such). Divide them by a constant, or pass "
                "with_std=False."
            )
        scale = None
        if self.with_std:
            eps = np.finfo(np.float64).eps
            with np.errstate(over="ignore"):
                constant = var <= count * eps * var + (count * mean * eps) ** 2
            scale = np.where(constant, 1.0, np.sqrt(var))
        if count.ndim and count.min() == count.max():
            count = count[0]
        self.n_samples_seen_ = (count if weighted else count.astype(np.int64))[()]
        needed = self.with_mean or self.with_std
        self.mean_ = np.where(known, mean, np.nan) if needed else None
        self._mean_low = mean_low if needed else None
        self.var_ = var if self.with_std else None
        self.scale_ = scale


def _is_foreign(x: object) -> bool:
    """Whether scikit-learn computes with the library that `x` is an array of."""
    return (
        get_config()["array_api_dispatch"]
        and hasattr(x, "__dlpack__")
        and not isinstance(x, np.ndarray)
    )


def _refuse_infinity(x: Any) -> None:
    assert_all_finite(x, allow_nan=True, estimator_name="StandardScaler", input_name="X")


def _apply(
    x: Array, copy: bool, mean: Float64 | None, gamma: Float64 | None, beta: Float64 | None
) -> Array:
    """(x − mean)·gamma + beta, in a new array or in place."""
    zeros, ones = np.zeros(x.shape[1]), np.ones(x.shape[1])
    mean = zeros if mean is None else np.asarray(mean)
    unknown = ~np.isfinite(mean)
    if unknown.any():  # without values, and all of y is NaN
        mean = np.where(unknown, 0.0, mean)
        gamma = np.where(unknown, np.nan, ones if gamma is None else gamma)
    if copy:
        return batch_norm_inference(x, mean, ones, gamma, beta, eps=0.0)
    step = max(1, AT_ONCE // x.shape[1])
    for k in range(0, len(x), step):
        some = slice(k, k + step)
        x[some] = batch_norm_inference(x[some], mean, ones, gamma, beta, eps=0.0)
    return x


def _of_dense(x: Array, weights: Float64 | None) -> Moments:
    """Moments of each column, without NaN."""
    found = Moments.of(x, channel_axis=1, weights=weights)
    # A NaN makes the moments of its own feature NaN and of no other.
    suspect = ~(np.isfinite(found.mean) & np.isfinite(found.m2))
    if not suspect.any():
        return found
    _refuse_infinity(x)
    part = moments_of_present(x if suspect.all() else x[:, suspect], weights)
    values = [np.array(np.broadcast_to(v, x.shape[1])) for v in (found.count, found.mean, found.m2)]
    for whole, some in zip(values, (part.count, part.mean, part.m2), strict=True):
        whole[suspect] = some
    return Moments(*values)


def _of_sparse(x: Any, weights: Float64 | None) -> Moments:
    """Moments of each column of a CSR or CSC matrix."""
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    entries = x.data, x.indptr, x.indices
    return moments_of_sparse(*entries, x.shape, by_row=x.format == "csr", weights=weights)
