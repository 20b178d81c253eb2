"""Fold batch norms, which at test time are affine maps of each channel, into linear layers.

Everything is computed in float64 and rounded once, at the end. `Affine` is what a batch norm does
at test time, and `Linear` a linear layer or convolution; they compose:

>>> import numpy as np
>>> from batchnorm.folding import Affine, Linear
>>> layer = Linear(np.array([[1.0, 2.0]]), None)
>>> norm = Affine.of(mean=np.array([3.0]), var=np.array([4.0]), eps=0.0)
>>> folded = layer.then(norm).rounded(np.float32)
>>> folded.weight.tolist(), folded.bias.tolist()
([[0.5, 1.0]], [-1.5])
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import native
from .errors import ArgumentError, DTypeError, ShapeError
from .native import Array, Float64

__all__ = ["Affine", "Linear", "fold_linear"]


@dataclass(frozen=True, eq=False)
class Affine:
    """scale·x + shift of each channel, in float64: what a batch norm does at test time.

    Parameters
    ----------
    scale, shift : (C,)
    terms : (C,)
        Sum of the magnitudes of what `shift` is the sum of, such as |β| + |μ·scale|: they may
        cancel, while their rounding errors do not.
    """

    scale: Float64
    shift: Float64
    terms: Float64

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
            They are not one real number per channel, or a variance is negative or not finite, or
            var + eps is zero.

        References
        ----------
        Ioffe & Szegedy (2015), Algorithm 2, step 11.
        """
        channels = np.asarray(var).shape[0] if np.ndim(var) == 1 else -1
        values = [native.per_channel(v, channels, name, 0) for v, name in (
            (mean, "mean"), (var, "var"), (gamma, "gamma"), (beta, "beta"),
        )]  # fmt: skip
        mu, variance, g, b = values
        assert mu is not None
        assert variance is not None
        native.check_variance(variance)
        eps = native.check_eps(eps)
        if eps == 0 and not variance.all():
            c = int(np.flatnonzero(variance == 0)[0])
            raise ArgumentError(
                f"var + eps must be above zero, got 0 in channel {c}. Pass the eps of the layer."
            )
        scale = (1.0 if g is None else g) / np.sqrt(variance + eps)
        offset = np.zeros(channels) if b is None else b
        return cls(scale, offset - mu * scale, abs(offset) + abs(mu * scale))

    def then(self, after: Affine) -> Affine:
        """The composition of this map and `after`, which comes second."""
        _check_channels(after, self.scale.size, "affine maps to compose")
        return Affine(
            self.scale * after.scale,
            self.shift * after.scale + after.shift,
            self.terms * abs(after.scale) + after.terms,
        )


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer, a convolution, or a transposed convolution, without stride and padding.

    Parameters
    ----------
    weight : (out, in/groups, *K), or (in, out/groups, *K) if transposed
        As in PyTorch and ONNX; (out, in) of a linear layer, which computes x @ weight.T + bias.
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
        w = np.asarray(self.weight)
        if w.ndim < 2:
            raise ShapeError(
                f"weight must have at least 2 axes, (out, in, *K), got shape {w.shape}."
            )
        if w.dtype.kind in "iub":
            w = w.astype(np.float64)
        if not native.is_supported(w.dtype):
            raise DTypeError(f"weight must be real numbers, got {w.dtype}.")
        if not (isinstance(self.groups, int) and self.groups > 0) or w.shape[0] % self.groups:
            raise ShapeError(
                f"groups must divide the {w.shape[0]} {'in' if self.transposed else 'out'}put "
                f"channels of the weight, got {self.groups!r}."
            )
        object.__setattr__(self, "weight", w)
        if self.bias is not None:
            b = np.asarray(self.bias)
            if b.shape != (self.outputs,):
                raise ShapeError(f"bias must have shape (out,) = ({self.outputs},), got {b.shape}.")
            object.__setattr__(self, "bias", b)

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        axis = 1 if self.transposed else 0
        return int(self.weight.shape[axis]) * (self.groups if self.transposed else 1)

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        axis = 0 if self.transposed else 1
        return int(self.weight.shape[axis]) * (1 if self.transposed else self.groups)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of the kernel, () of a linear layer."""
        return tuple(self.weight.shape[2:])

    @classmethod
    def identity(cls, channels: int, kernel: Sequence[int] = (), groups: int = 1) -> Linear:
        """The layer that returns its input, with an odd kernel and padding of half of it."""
        if any(k % 2 == 0 for k in kernel):
            raise ShapeError(f"kernel must be odd to have a centre, got {tuple(kernel)}.")
        inside = channels // groups
        weight = np.zeros((channels, inside, *kernel))
        centre = tuple(k // 2 for k in kernel)
        for c in range(channels):
            place = (c, c % inside, *centre)
            weight[place] = 1.0
        return cls(weight, np.zeros(channels), groups)

    def then(self, norm: Affine) -> Linear:
        """One layer for this one with `norm` after it, in float64."""
        _check_channels(norm, self.outputs, "weight and batch norm after it")
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
            be added.

        Raises
        ------
        ArgumentError
            Folding would be wrong: a shift is not zero, and the layer is padded, or transposed,
            where the bias would differ from place to place.
        """
        _check_channels(norm, self.inputs, "weight and batch norm before it")
        if (padded or (self.transposed and self.kernel)) and norm.shift.any():
            why = "is transposed" if self.transposed else "pads with zeros, which do not pass it"
            raise ArgumentError(
                "shift of a batch norm before a convolution must be zero, since the convolution "
                f"{why}, got {norm.shift[norm.shift != 0][0]}. Leave it in place, or add `border`."
            )
        split = self._split()
        w = split * _along(norm.scale, self.groups, 2, len(self.kernel))
        shifts = split * _along(norm.shift, self.groups, 2, len(self.kernel))
        taps = (2, *range(3, split.ndim))
        return self._with(w, self._bias64() + shifts.sum(axis=taps).reshape(-1))

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
        """
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
            place = (slice(None), *tap)
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
        same = [
            (layer.outputs, layer.inputs, layer.groups, layer.transposed, len(layer.kernel))
            for layer in (self, other)
        ]
        if same[0] != same[1]:
            raise ShapeError(
                "layers to add must agree in outputs, inputs, groups, kind and number of kernel "
                f"axes, got {same[0]} and {same[1]}."
            )
        kernel = tuple(map(max, zip(self.kernel, other.kernel, strict=True)))
        a, b = (layer._widened(kernel) for layer in (self, other))
        return replace(a, weight=a.weight + b.weight, bias=self._bias64() + other._bias64())

    def rounded(self, dtype: DTypeLike) -> Linear:
        """Weight and bias in the type of a model.

        Raises
        ------
        DTypeError
            It is no floating type.
        ArgumentError
            Something overflows it, as happens in half precision where a variance is tiny.
        """
        kind = np.dtype(dtype)
        if not native.is_supported(kind):
            raise DTypeError(f"dtype must be a floating type, got {kind}.")
        bias = None if self.bias is None else _narrow(self.bias, kind, "bias")
        return replace(self, weight=_narrow(self.weight, kind, "weight"), bias=bias)

    def difference(
        self,
        norm: Affine,
        largest: ArrayLike,
        dtype: DTypeLike,
        *,
        sums: DTypeLike | None = None,
    ) -> Float64:
        """Bound of how much folding `norm` after this layer changes the output by rounding.

        Parameters
        ----------
        norm
            The batch norm after it.
        largest : () or (in,)
            Bound of the magnitudes of the input, or of those of each channel.
        dtype
            Type of weights and outputs.
        sums
            Type in which products are summed; None for `dtype`.

        Returns
        -------
        (out,)
            With M = |scale|·(Σ|w|·largest + |b|) + terms, n products in a sum, and u the unit
            roundoff: (γ₂ₙ₊₂(sums) + γ₁₃(dtype))·M, with γₖ = ku/(1 − ku). Infinite where ku ≥ 1.

        Notes
        -----
        Both layers round each product and each sum, at most n + 1 times each term; the batch norm
        rounds at most nine times, in whatever order, and the folded weights once. Products that are
        summed after a transform (Winograd, FFT) are not covered.

        References
        ----------
        Higham (2002), Accuracy and Stability of Numerical Algorithms, sections 3.1 and 3.3.
        """
        _check_channels(norm, self.outputs, "weight and batch norm after it")
        bounds = np.broadcast_to(np.asarray(largest, np.float64), (self.inputs,))
        split = abs(self._split()) * _along(bounds, self.groups, 2, len(self.kernel))
        size = split.sum(axis=(2, *range(3, split.ndim))).reshape(-1)
        magnitude = abs(norm.scale) * (size + abs(self._bias64())) + norm.terms
        n = math.prod(split.shape[2:])
        relative = _gamma(2 * n + 2, sums or dtype) + _gamma(13, dtype)
        least = float(np.finfo(np.float64).tiny) if np.dtype(dtype).itemsize == 8 else 2.0**-149
        if np.dtype(dtype) == np.float16:
            least = 2.0**-24
        bound: Float64 = relative * magnitude + (2 * n + 13) * least * np.maximum(
            1, abs(norm.scale)
        )
        return bound

    def _split(self) -> Float64:
        """The weight as (groups, out/groups, in/groups, *K) in float64."""
        w = self.weight.astype(np.float64)
        w = w.reshape(self.groups, -1, *w.shape[1:])
        return np.swapaxes(w, 1, 2) if self.transposed else w

    def _with(self, split: Float64, bias: Float64) -> Linear:
        w = np.swapaxes(split, 1, 2) if self.transposed else split
        return replace(self, weight=w.reshape(self.weight.shape), bias=bias)

    def _bias64(self) -> Float64:
        if self.bias is None:
            return np.zeros(self.outputs)
        return np.asarray(self.bias).astype(np.float64)

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
        A new array in the dtype of `weight`.
    bias : (out,)
        A new array in the dtype of `weight`.

    Raises
    ------
    ShapeError
        `weight` does not have two axes, or another array does not have one value per row of it.
    ArgumentError
        `var + eps` is not positive, or is NaN.

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
    layer = Linear(np.asarray(weight), None if bias is None else np.asarray(bias))
    if layer.kernel:
        raise ShapeError(
            f"weight must have shape (out, in), got {layer.weight.shape}. "
            "Flatten every axis after the first: weight.reshape(len(weight), -1)."
        )
    folded = layer.then(Affine.of(mean, var, gamma, beta, eps=eps)).rounded(layer.weight.dtype)
    assert folded.bias is not None
    return folded.weight, folded.bias


def _narrow(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    if not np.isfinite(narrow.astype(np.float64)).all():
        largest = abs(values.astype(np.float64)).max()
        raise ArgumentError(
            f"{name} must fit into {dtype}, and the largest is {largest:.3g}. Fold in a wider "
            "type, or leave the batch norm in place."
        )
    return narrow


def _along(values: Float64, groups: int, axis: int, rank: int) -> Float64:
    """Values of channels, shaped to multiply (groups, out, in, *K) along `axis`."""
    shape = [groups, 1, 1, *[1] * rank]
    shape[axis] = values.size // groups
    shaped: Float64 = values.reshape(shape)
    return shaped


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _gamma(k: int, dtype: DTypeLike) -> float:
    kind = np.dtype(dtype)
    bits = 8 if native.is_bfloat16(kind) else np.finfo(kind).nmant + 1
    ku = k * 2.0**-bits
    return ku / (1 - ku) if ku < 1 else math.inf


def _check_channels(norm: Affine, channels: int, what: str) -> None:
    if norm.scale.size != channels:
        raise ShapeError(
            f"{what} must have the same number of channels, got {channels} and {norm.scale.size}."
        )
