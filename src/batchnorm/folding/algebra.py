"""Affine maps and linear layers that compose, in arrays."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from batchnorm import native
from batchnorm.errors import ArgumentError, DTypeError, ShapeError
from batchnorm.native import Array, Float64

__all__ = ["Affine", "Linear", "fold_linear", "round_to_odd"]

# Rounding errors of a batch norm, in whatever order it computes: each of its terms takes part in
# at most this many operations, of which a reciprocal root that is off by two units counts as four.
_PER_NORM = 9
# Rounding errors in float64 while one batch norm is folded.
_PER_FOLD = 6


@dataclass(frozen=True, eq=False)
class Affine:
    """scale·x + shift of each channel, in float64: what a batch norm does at test time.

    Parameters
    ----------
    scale, shift : (C,)
    terms : (C,)
        Sum of the magnitudes of what `shift` is the sum of, such as |β| + |μ·scale|: they may
        cancel, while their rounding errors do not.
    norms : int
        Number of batch norms, and of other maps, that this composes.
    factors : (C,)
        Likewise of `scale`; None for its magnitude.
    """

    scale: Float64
    shift: Float64
    terms: Float64
    norms: int = 1
    factors: Float64 | None = None

    def __post_init__(self) -> None:
        """Fill in `factors`."""
        if self.factors is None:
            object.__setattr__(self, "factors", abs(self.scale))

    @property
    def size(self) -> Float64:
        """`factors`, which are known."""
        return cast(Float64, self.factors)

    @classmethod
    def of(
        cls,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        eps: float = 1e-5,
    ) -> Affine:
        """γ(x − mean)/√(var + ε) + β of each channel.

        Parameters
        ----------
        mean, var, gamma, beta : (C,)
            gamma and beta None mean 1 and 0.
        eps : float
            Added to the variance, inside the root.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            They are not one finite real number for each channel, a variance is negative, or
            var + eps is zero.

        References
        ----------
        Ioffe & Szegedy (2015), Algorithm 2, step 11.
        """
        if np.ndim(mean) != 1:
            raise ShapeError(f"mean must have shape (C,), got {np.shape(mean)}.")
        channels = len(np.asarray(mean))
        given = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
        vectors = {
            name: _vector(values, channels, name, "(C,)", "There is one value for each channel.")
            for name, values in given.items()
            if values is not None
        }
        mu, variance, eps = vectors["mean"], vectors["var"], native.check_eps(eps)
        native.check_statistics(mu, variance, eps)
        for name in ("gamma", "beta"):
            if name in vectors:
                native.check_finite(vectors[name], name)
        scale = vectors.get("gamma", np.ones(channels)) / np.sqrt(variance + eps)
        offset = vectors.get("beta", np.zeros(channels))
        return cls(scale, offset - mu * scale, abs(offset) + abs(mu * scale))

    def then(self, after: Affine) -> Affine:
        """The composition of this map and `after`, which comes second."""
        _check_channels(after, self.scale.size, "batch norm after another", "channels")
        return Affine(
            self.scale * after.scale,
            self.shift * after.scale + after.shift,
            self.terms * after.size + after.terms,
            self.norms + after.norms,
            self.size * after.size,
        )

    @classmethod
    def scaling(cls, factors: ArrayLike) -> Affine:
        """Each channel times a factor, (C,); of ones it is the identity.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            They are not one finite real number for each channel.
        """
        if np.ndim(factors) != 1:
            raise ShapeError(f"factors must have shape (C,), got {np.shape(factors)}.")
        channels = len(np.asarray(factors))
        scale = _vector(
            factors, channels, "factors", "(C,)", "There is one value for each channel."
        )
        native.check_finite(scale, "factors")
        return cls(scale, np.zeros(channels), np.zeros(channels))

    def __add__(self, other: Affine) -> Affine:
        """The sum of two maps of the same input, as in RepBN: a batch norm beside a multiple of x.

        References
        ----------
        Guo et al. (2024), SLAB: Efficient Transformers with Simplified Linear Attention and
        Progressive Re-parameterized Batch Normalization.
        """
        if not isinstance(other, Affine):
            return NotImplemented
        _check_channels(other, self.scale.size, "map to add", "channels")
        return Affine(
            self.scale + other.scale,
            self.shift + other.shift,
            self.terms + other.terms,
            self.norms + other.norms,  # each of which counts what its result is stored in
            self.size + other.size,
        )


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer, a convolution, or a transposed convolution, without stride and padding.

    Parameters
    ----------
    weight : (out, in/groups, *K), or (in, out/groups, *K) if transposed
        As in PyTorch and ONNX; (out, in) of a linear layer, which computes x @ weight.T + bias.
        Integers become float64.
    bias : (out,)
        None means 0.
    groups : int
        Number of groups of channels that do not mix.
    transposed : bool
        Whether it is a transposed convolution.
    """

    weight: Array
    bias: Array | None = None
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        """Check the shapes and types."""
        w = native.as_values(native.as_real(self.weight, "weight"), "weight")
        if w.ndim < 2:
            raise ShapeError(
                f"weight must have at least 2 axes, (out, in, *K), got shape {w.shape}."
            )
        try:
            groups = operator.index(self.groups)
        except TypeError:
            groups = 0
        if groups < 1 or w.shape[0] % groups:
            raise ShapeError(
                f"groups must divide the {w.shape[0]} {'in' if self.transposed else 'out'}put "
                f"channels of the weight, got {self.groups!r}."
            )
        object.__setattr__(self, "weight", w)
        object.__setattr__(self, "groups", groups)
        if self.bias is not None:
            b = native.as_values(native.as_real(self.bias, "bias"), "bias")
            if b.shape != (self.outputs,):
                raise ShapeError(f"bias must have shape (out,) = ({self.outputs},), got {b.shape}.")
            object.__setattr__(self, "bias", b)

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[1]) * self.groups if self.transposed else len(self.weight)

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return len(self.weight) if self.transposed else int(self.weight.shape[1]) * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of the kernel, () of a linear layer."""
        return tuple(self.weight.shape[2:])

    @classmethod
    def identity(cls, channels: int, kernel: Sequence[int] = (), groups: int = 1) -> Linear:
        """The layer that returns its input, with an odd kernel and padding of half of it.

        Raises
        ------
        ShapeError
            A kernel is even, or `groups` does not divide `channels`.
        """
        if any(k % 2 == 0 for k in kernel):
            raise ShapeError(f"kernel must be odd to have a centre, got {tuple(kernel)}.")
        if groups < 1 or channels % groups:
            raise ShapeError(f"groups must divide the {channels} channels, got {groups}.")
        inside = channels // groups
        weight = np.zeros((channels, inside, *kernel))
        each = np.arange(channels)
        centre: Any = (each, each % inside, *(k // 2 for k in kernel))
        weight[centre] = 1.0
        return cls(weight, None, groups)

    def then(self, norm: Affine) -> Linear:
        """One layer for this one with `norm` after it, in float64."""
        _check_channels(norm, self.outputs, "batch norm after a layer", "output channels")
        w = self._split() * _along(norm.scale, self.groups, 1, len(self.kernel))
        return self._with(w, self._bias64() * norm.scale + norm.shift)

    def after(self, norm: Affine, *, padded: bool = False) -> Linear:
        """One layer for this one with `norm` before it, in float64.

        Parameters
        ----------
        norm
            Of the input channels.
        padded
            Whether the layer pads its input with zeros. What is padded has not passed through
            `norm`, so this is right only where its shift is zero; `border` returns what else is to
            be added. Padding by values of the input (reflect, replicate, circular) does not count.

        Raises
        ------
        ArgumentError
            Folding would be wrong: a shift is not zero, and the layer is padded, or transposed,
            where the bias would differ from place to place.
        """
        _check_channels(norm, self.inputs, "batch norm before a layer", "input channels")
        if (padded or (self.transposed and self.kernel)) and norm.shift.any():
            why = (
                "transposed convolution, whose outputs do not all see every weight"
                if self.transposed
                else "convolution that pads with zeros, which do not pass through the batch norm"
            )
            raise ArgumentError(
                f"shift of a batch norm before a {why}, must be zero, got "
                f"{native.in_channel(norm.shift, norm.shift != 0)}."
                + ("" if self.transposed else " Leave it in place, or add `border`.")
            )
        split = self._split()
        rank = len(self.kernel)
        shifts = split * _along(norm.shift, self.groups, 2, rank)
        return self._with(
            split * _along(norm.scale, self.groups, 2, rank),
            self._bias64() + _over_inputs(shifts),
        )

    def border(
        self,
        norm: Affine,
        size: Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> Float64:
        """What to add to the output of a padded convolution that `after` has folded.

        Parameters
        ----------
        norm
            The batch norm before it.
        size
            Of the input, along the kernel's axes.
        stride, padding, dilation
            Of the convolution; padding is that of each side.

        Returns
        -------
        (out, *S)
            Minus the shifts that the bias has counted for values that were padded; S is the size of
            the output.

        Raises
        ------
        ArgumentError
            The convolution is transposed.
        """
        _check_channels(norm, self.inputs, "batch norm before a layer", "input channels")
        if self.transposed:
            raise ArgumentError("border must be asked of a convolution, got a transposed one.")
        rank = len(self.kernel)
        steps, pads, gaps = (_each(v, rank) for v in (stride, padding, dilation))
        split = self._split() * _along(norm.shift, self.groups, 2, rank)
        taps = split.sum(axis=2).reshape(self.outputs, *self.kernel)
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, pads, gaps, self.kernel, steps, strict=True)
        ]
        total = np.zeros((self.outputs, *sizes))
        for tap in itertools.product(*map(range, self.kernel)):
            inside: Any = np.ones((), bool)
            for axis in range(rank):
                at = np.arange(sizes[axis]) * steps[axis] + tap[axis] * gaps[axis] - pads[axis]
                within = (at >= 0) & (at < size[axis])
                inside = inside[..., None] & within
            place: Any = (slice(None), *tap)
            total -= taps[place].reshape(-1, *[1] * rank) * ~inside
        return total

    def __add__(self, other: Linear) -> Linear:
        """The sum of two layers with the same input, as one layer, in float64.

        The smaller kernel is laid in the middle of the larger one: the convolutions must have the
        same stride and dilation, and differ in padding by half of what their kernels differ by.

        Raises
        ------
        ShapeError
            They differ in channels, groups or kind, or in their kernels by an odd number.
        """
        if not isinstance(other, Linear):
            return NotImplemented
        kinds = [
            (layer.outputs, layer.inputs, layer.groups, layer.transposed, len(layer.kernel))
            for layer in (self, other)
        ]
        if kinds[0] != kinds[1]:
            raise ShapeError(
                "layers to add must agree in outputs, inputs, groups, transposed and number of "
                f"kernel axes, got {kinds[0]} and {kinds[1]}."
            )
        kernel = tuple(map(max, zip(self.kernel, other.kernel, strict=True)))
        a, b = (layer._widened(kernel) for layer in (self, other))
        return replace(a, weight=a.weight + b.weight, bias=self._bias64() + other._bias64())

    def rounded(self, dtype: DTypeLike) -> Linear:
        """Weight and bias in the type of a model, each rounded once.

        Raises
        ------
        DTypeError
            It is no floating type.
        ArgumentError
            Something overflows it, as happens in half precision where a variance is tiny, or is
            not finite already.
        """
        kind = np.dtype(dtype)
        if not native.is_supported(kind):
            raise DTypeError(f"dtype must be a floating type, got {kind}.")
        bias = None if self.bias is None else _narrow(self.bias, kind, "bias")
        return replace(self, weight=_narrow(self.weight, kind, "weight"), bias=bias)

    def difference(
        self,
        norm: Affine | None,
        largest: ArrayLike,
        dtype: DTypeLike,
        *,
        before: Affine | None = None,
        sums: DTypeLike | None = None,
        steps: DTypeLike | None = None,
        original: DTypeLike | None = None,
        additions: int = 0,
        products: int | None = None,
    ) -> Float64:
        """Bound of how much folding changes the output, by rounding.

        Parameters
        ----------
        norm
            The batch norm after it; None for none.
        largest : () or (in,)
            Bound of the magnitudes of the input, or of those of each channel.
        dtype
            Type of the folded layer and its output; "bfloat16" needs no package.
        before
            The batch norm before it.
        sums
            Type in which products are summed; None for `dtype`.
        steps
            Type in which the batch norms are computed; None for `sums`.
        original
            Type of the layers that were folded, if it is another than `dtype`: their input is then
            rounded to `dtype`.
        additions
            Number of other branches that are added to this one and folded into the same layer. The
            sum of the bounds of all is then that of the sum.
        products
            Number of products in an output of that layer; None for those of this one.

        Returns
        -------
        (out,)
            Bound of |original − folded|, of outputs on the same input.

        Notes
        -----
        `docs/numerics.md` derives it. It holds for products that are summed directly in any order,
        with or without fused multiply-adds, and with results that are flushed to zero; not after a
        transform (Winograd, FFT), nor where something overflows, or underflows inside the batch
        norm.

        References
        ----------
        Higham (2002), Accuracy and Stability of Numerical Algorithms, sections 2.2, 3.1 and 3.3.
        """
        first, last = before or _none(self.inputs), norm or _none(self.outputs)
        _check_channels(first, self.inputs, "batch norm before a layer", "input channels")
        _check_channels(last, self.outputs, "batch norm after a layer", "output channels")
        bounds = np.broadcast_to(np.asarray(largest, np.float64), (self.inputs,))
        if not (bounds >= 0).all():
            raise ArgumentError(f"largest must not be negative or NaN, got {bounds.min()}.")
        stored, summed = _precision(dtype), _precision(sums or dtype)
        given, step = _precision(original or dtype), _precision(steps or sums or dtype)

        split, rank, scale = abs(self._split()), len(self.kernel), last.size
        n = math.prod(split.shape[2:])
        entering = first.size * bounds + first.terms

        def total(values: Float64) -> Float64:
            return _over_inputs(split * _along(values, self.groups, 2, rank))

        # Numbers of float64, of which a product may be too large for the last few channels only.
        with np.errstate(over="ignore", invalid="ignore"):
            magnitude = scale * (total(entering) + abs(self._bias64())) + last.terms
            norms = first.norms + last.norms
            unfolded = (
                (1 + _gamma(n + 1, summed[0]))
                * (1 + _gamma(_PER_NORM * norms, step[0]))
                * (1 + given[0]) ** (1 + norms + additions)
            )
            in_float64 = _PER_FOLD * norms + 2 + additions + (n if first.norms else 0)
            terms = n if products is None else products
            folded = (
                (1 + _gamma(terms + 1, summed[0]))
                * (1 + _gamma(in_float64, 2.0**-53))
                * (1 + stored[0]) ** (2 + (stored != given))
            )
            relative = (unfolded - 1) + (folded - 1)
            # What flushing to zero, or rounding a number below the normal ones, adds.
            inputs = scale * total(first.size)
            ones = np.ones_like(split) * _along(bounds, self.groups, 2, rank)
            lost = (
                (1 + scale) * (max(n, terms) * summed[1] + given[1])
                + scale * total(np.ones(self.inputs)) * given[1]
                + stored[1] * (2 + _over_inputs(ones) + inputs)
            )
            bound: Float64 = relative * magnitude + (1 + relative) * lost
        return np.where(np.isnan(bound), math.inf, bound)

    def _split(self) -> Float64:
        """The weight as (groups, out/groups, in/groups, *K) in float64."""
        w = self.weight.astype(np.float64)
        w = w.reshape(self.groups, len(w) // self.groups, *w.shape[1:])
        return np.swapaxes(w, 1, 2) if self.transposed else w

    def _with(self, split: Float64, bias: Float64) -> Linear:
        w = np.swapaxes(split, 1, 2) if self.transposed else split
        return replace(self, weight=w.reshape(self.weight.shape), bias=bias)

    def _bias64(self) -> Float64:
        return np.zeros(self.outputs) if self.bias is None else self.bias.astype(np.float64)

    def _widened(self, kernel: tuple[int, ...]) -> Linear:
        """The same layer with a larger kernel, zero around its own."""
        more = [large - small for large, small in zip(kernel, self.kernel, strict=True)]
        if any(m % 2 for m in more):
            raise ShapeError(
                f"kernels to add must have a common middle, got {self.kernel} and {kernel}."
            )
        pad = [(0, 0), (0, 0), *((m // 2, m // 2) for m in more)]
        return replace(self, weight=np.pad(self.weight.astype(np.float64), pad))


def fold_linear(
    weight: ArrayLike,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
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
        `var` is negative or not finite, another argument is not finite (the channel is named),
        `eps` is negative, var + eps is zero, or a result overflows the dtype.

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
    if np.ndim(weight) != 2:
        raise ShapeError(
            f"weight must have shape (out, in), got {np.shape(weight)}. "
            "Flatten every axis after the first: weight.reshape(len(weight), -1)."
        )
    layer = Linear(cast(Any, weight))
    remedy = "weight is (out, in); pass weight.T if yours is (in, out)."
    given = {"bias": bias, "mean": mean, "var": var, "gamma": gamma, "beta": beta}
    rows = {
        name: None
        if values is None and name in ("bias", "gamma", "beta")
        else _vector(values, layer.outputs, name, "(out,)", remedy)
        for name, values in given.items()
    }
    layer = replace(layer, bias=rows.pop("bias"))
    norm = Affine.of(**cast(Any, rows), eps=eps)
    folded = layer.then(norm).rounded(layer.weight.dtype)
    assert folded.bias is not None
    return folded.weight, folded.bias


def round_to_odd(values: Float64) -> NDArray[np.float32]:
    """Round float64 to float32 such that rounding again, to a narrower type, is as rounding once.

    What is not exact is rounded to the neighbour whose last bit is one.

    References
    ----------
    Boldo & Melquiond (2008), Emulation of a FMA and correctly rounded sums: proved algorithms using
    rounding to odd.
    """
    with np.errstate(over="ignore", under="ignore"):
        nearest = values.astype(np.float32)
    beyond = abs(nearest.astype(np.float64)) > abs(values)
    toward_zero = np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)
    inexact = np.isfinite(values) & (toward_zero.astype(np.float64) != values)
    odd: NDArray[np.float32] = (toward_zero.view(np.uint32) | inexact).view(np.float32)
    return odd


# ---- checks and shapes --------------------------------------------------------------------------


def _vector(values: Any, size: int, name: str, axes: str, remedy: str) -> Float64:
    """One real number for each channel, in float64."""
    v = native.as_real(values, name)
    if v.shape != (size,):
        raise ShapeError(f"{name} must have shape {axes} = ({size},), got {v.shape}. {remedy}")
    return v.astype(np.float64)


def _check_channels(norm: Affine, channels: int, what: str, of: str) -> None:
    if norm.scale.size != channels:
        raise ShapeError(f"{what} must have its {channels} {of}, got {norm.scale.size}.")


def _narrow(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Round once, and raise if something does not fit."""
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ArgumentError(
            f"{name} must be finite to be folded, got {wide[~np.isfinite(wide)][0]}."
        )
    with np.errstate(over="ignore", under="ignore"):
        # ml_dtypes would round to float32 first, as torch does, but to the nearest.
        narrow = (round_to_odd(wide) if native.is_bfloat16(dtype) else wide).astype(dtype)
    if not np.isfinite(narrow.astype(np.float64)).all():
        raise ArgumentError(
            f"{name} must fit into {dtype}, and the largest is {abs(wide).max():.3g}. Fold in a "
            "wider type, or leave the batch norm in place."
        )
    return narrow


def _along(values: Float64, groups: int, axis: int, rank: int) -> Float64:
    """Values of channels, shaped to multiply (groups, out, in, *K) along `axis`."""
    shape = [groups, 1, 1, *[1] * rank]
    shape[axis] = values.size // groups
    shaped: Float64 = values.reshape(shape)
    return shaped


def _over_inputs(values: Float64) -> Float64:
    """(groups, out, in, *K) summed over inputs and kernel, for each output."""
    summed: Float64 = values.sum(axis=tuple(range(2, values.ndim))).reshape(-1)
    return summed


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _none(channels: int) -> Affine:
    """No batch norm."""
    zero = np.zeros(channels)
    return Affine(np.ones(channels), zero, zero, norms=0)


def _gamma(k: int, u: float) -> float:
    """γₖ = ku/(1 − ku), which bounds k rounding errors with unit roundoff u."""
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def _precision(dtype: DTypeLike) -> tuple[float, float]:
    """Unit roundoff, and the largest error of a result that is not a normal number."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        return 2.0**-8, 2.0**-126
    kind = np.dtype(dtype)
    if not native.is_supported(kind):
        raise DTypeError(f"dtype must be a floating type, got {kind}.")
    if native.is_bfloat16(kind):
        return 2.0**-8, 2.0**-126
    if kind == np.float16:  # which nothing flushes to zero
        return 2.0**-11, 2.0**-25
    about = np.finfo(kind)
    return float(about.eps) / 2, float(about.tiny)
