"""Statistics that are bitwise the same however the same examples are divided among processes.

Sums of integers do not depend on the order of their terms. So each example is measured separately,
its mean and variance are scaled by powers of two that all processes agree on and rounded to
integers, and these are summed. A second round sums the differences to the mean of the first, which
recovers what the rounding lost, as in the corrected two-pass algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import ROWS
from .processes import Processes

#: Values that are converted to integers at a time, so that intermediate results fit the cache.
_CHUNK = 1 << 16

#: Adding a float64 of up to 2^51 to this rounds it to an integer, which the low bits then hold.
_ROUNDER = 1.5 * 2.0**52
_ROUNDER_BITS = 0x4338000000000000


class Examples(NamedTuple):
    """Mean and variance of each example, (N, C), and the sums of its weights, (N,).

    Each example is measured separately, so it has the same bits in every process. If there are no
    axes after the channels, the mean is the value, and `var` is None. `weight` is Σw and `square`
    Σw²/Σw of the values of an example; both are None without weights.
    """

    mean: Tensor
    var: Tensor | None
    weight: Tensor | None
    square: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, weights: Tensor | None, measure: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Examples:
        """Measure the examples of x, (N, C, *S); `measure` returns the statistics of one."""
        if x.dim() == 2:
            return cls(x, None, weights, weights)
        found = x.new_zeros((len(x), ROWS, x.shape[1]), dtype=torch.float64)
        for n, statistics in enumerate(found):
            w = None if weights is None else weights[n : n + 1]
            statistics.copy_(measure(x[n : n + 1], w)[0])
        count, mean, _, m2, dof = found.unbind(1)
        weight = count[:, :1].sum(1)
        var = m2 / torch.where(count > 0, count, 1.0)
        return cls(mean, var, weight, weight - dof[:, :1].sum(1))

    def extent(self, values: Tensor | int) -> Tensor:
        """Message of this process, (3 + 2 C), from which all processes choose the same scales.

        Number of values, number of examples, largest weight; then for each channel the largest
        |mean|, then for each channel the largest variance.
        """
        rows, channels = self.mean.shape
        largest = torch.zeros((2, channels), dtype=torch.float64, device=self.mean.device)
        top: Tensor | float = 1.0 if self.weight is None else 0.0
        if rows:
            for k, v in enumerate((self.mean, self.var)):
                if v is not None:
                    if self.weight is not None:
                        v = torch.where(self.weight[:, None] > 0, v, 0.0)
                    largest[k] = v.abs().amax(0)
            if self.weight is not None:
                top = self.weight.max()
        numbers = [torch.as_tensor(v, device=largest.device).double() for v in (values, rows, top)]
        return torch.cat([torch.stack(numbers), largest.flatten()])


def statistics_of(examples: Examples, extents: Tensor, processes: Processes) -> Tensor:
    """Statistics (1, 5, C) of the examples of all processes.

    `extents` holds the messages of all processes, (processes, 3 + 2 C).
    """
    means, variances, weight, square = examples
    # At most 51 bits for one term (see `_ROUNDER`), and 62 for the sum over all examples.
    bits = min(51, 62 - int(extents[:, 1].sum()).bit_length())
    top = extents[:, 2].max()
    weight_scale = _power(bits - torch.frexp(top).exponent)
    square_scale = _power(-torch.frexp(top).exponent)
    largest_mean, largest_var = extents[:, 3:].amax(0).chunk(2)
    finite = _is_scalable(largest_mean) & _is_scalable(largest_var)

    zero = torch.zeros_like(largest_mean)
    sums = torch.zeros((4, len(zero)), dtype=torch.int64, device=zero.device)
    mean_scale, var_scale = _scale_of(largest_mean), _scale_of(largest_var)
    if weight is None or square is None:
        sums[0] = (weight_scale * len(means)).long()
        sums[1] = (weight_scale * square_scale * len(means)).long()
    else:
        sums[0] = (weight * weight_scale).round().long().sum()
        sums[1] = (weight * weight_scale * (square * square_scale)).round().long().sum()
    sums[2:3] = _integer_sums(means, weight, zero, mean_scale, weight_scale, 1)
    if variances is not None:
        sums[3:] = _integer_sums(variances, weight, zero, var_scale, weight_scale, 1)
    total, squares, first, within = processes.add("sums", sums).double()
    divisor = torch.where(total > 0, total, 1.0)
    mean = torch.where(finite, first / divisor / mean_scale, 0.0)

    farthest = processes.gather_from(
        lambda: _farthest(means, weight, mean), len(mean), mean.device
    ).amax(0)
    finite &= _is_scalable(farthest)
    scale = _scale_of(farthest)
    sums = processes.add("sums", _integer_sums(means, weight, mean, scale, weight_scale, 2))
    correction, between = sums.double() / divisor / scale
    between = between / scale
    # Negative only through rounding, if the means of the examples hardly differ.
    var = (between - correction * correction).clamp(min=0) + within / divisor / var_scale
    mean = torch.where(finite, mean + correction, math.nan)
    count = total / weight_scale
    m2 = torch.where(finite, var * count, math.nan)
    dof = (count - squares / divisor / square_scale).clamp(min=0)
    return torch.stack([count, mean, zero, m2, dof])[None]


def _differences(
    values: Tensor, weight: Tensor | None, shift: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield values - shift in float64, (n, C), and their weights, (n, 1), part by part."""
    rows = max(1, _CHUNK // max(1, len(shift)))
    for n in range(0, len(values), rows):
        part = values[n : n + rows].double() - shift
        if weight is None:
            yield part, None
        else:
            w = weight[n : n + rows, None]
            yield part.masked_fill_(w <= 0, 0.0), w


def _farthest(values: Tensor, weight: Tensor | None, shift: Tensor) -> Tensor:
    far = torch.zeros_like(shift)
    for part, _ in _differences(values, weight, shift):
        far = torch.maximum(far, part.abs_().amax(0))
    return far


def _integer_sums(
    values: Tensor,
    weight: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    powers: int,
) -> Tensor:
    """Σ weight·weight_scale·d^k over N, for d = (values - shift)·scale and k = 1 … powers.

    Each term is rounded to an integer before it is added. The result is (powers, C); it is
    meaningless for channels with NaN or infinity.
    """
    sums = torch.zeros((powers, len(shift)), dtype=torch.int64, device=shift.device)
    for part, w in _differences(values, weight, shift):
        part.mul_(scale)
        product = part * (weight_scale if w is None else weight_scale * w)
        for k in range(powers):
            if k:
                product.mul_(part)
            sums[k] += (product + _ROUNDER).view(torch.int64).sub_(_ROUNDER_BITS).sum(0)
    return sums


def _scale_of(largest: Tensor) -> Tensor:
    """The power of two that scales `largest` to below 1; the scaling rounds nothing."""
    return _power(-torch.frexp(torch.where(_is_scalable(largest), largest, 0.0)).exponent)


def _power(exponent: Tensor) -> Tensor:
    """2 to integer exponents, made from the bits of float64, because `pow` may be inexact."""
    return ((exponent.long().clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


def _is_scalable(largest: Tensor) -> Tensor:
    """Whether `_power` can scale values up to this; the squares of larger ones overflow anyway."""
    return largest < 2.0**1000
