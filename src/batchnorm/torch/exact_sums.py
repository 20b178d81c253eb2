"""Statistics that are bitwise the same however the same examples are divided among processes.

Sums of integers do not depend on the order of their terms. So each example is measured by itself,
its mean and variance are rounded to whole numbers of a unit that all processes agree on, and these
are summed. A second round, of differences to the first one's mean, brings what rounding left off,
as in the corrected two-pass algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .processes import Processes

#: Values that are turned into integers at once: what is made of them fits a core's cache.
_CHUNK = 1 << 16

#: A float64 of up to 2^51 added to this is rounded to a whole number, which its bits then hold.
_WHOLE = 1.5 * 2.0**52
_WHOLE_BITS = 0x4338000000000000


class Examples(NamedTuple):
    """Mean and variance of each example, (N, C), its weight and weight of squares, (N,).

    Each is measured by itself, so that it has the same bits on whatever process. Without axes
    behind the channels the mean is the value, and there is no variance (None). `square` is
    Σw²/Σw of an example's values; None, as `weight`, where both are one.
    """

    mean: Tensor
    var: Tensor | None
    weight: Tensor | None
    square: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, weights: Tensor | None, measure: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Examples:
        """Examples of x, (N, C, *S); `measure` gives the statistics (1, 5, C) of one."""
        if x.dim() == 2:
            return cls(x, None, weights, weights)
        found = x.new_zeros((len(x), 5, x.shape[1]), dtype=torch.float64)
        for n, statistics in enumerate(found):
            w = None if weights is None else weights[n : n + 1]
            statistics.copy_(measure(x[n : n + 1], w)[0])
        count, mean, _, m2, dof = found.unbind(1)
        weight = count[:, :1].sum(1)
        var = m2 / torch.where(count > 0, count, 1.0)
        return cls(mean, var, weight, weight - dof[:, :1].sum(1))

    def extent(self, seen: Tensor | int) -> Tensor:
        """Number of values seen, and of examples, the largest weight, |mean| and variance: (3+2C).

        Mean and variance are those of each channel.
        """
        rows, channels = self.mean.shape
        largest = torch.zeros((2, channels), dtype=torch.float64, device=self.mean.device)
        top: Tensor | float = 1.0 if self.weight is None else 0.0
        if rows:
            for k, values in enumerate((self.mean, self.var)):
                if values is not None:
                    if self.weight is not None:
                        values = torch.where(self.weight[:, None] > 0, values, 0.0)
                    largest[k] = values.abs().amax(0)
            if self.weight is not None:
                top = self.weight.max()
        numbers = [torch.as_tensor(v, device=largest.device).double() for v in (seen, rows, top)]
        return torch.cat([torch.stack(numbers), largest.flatten()])


def statistics_of(examples: Examples, extents: Tensor, processes: Processes) -> Tensor:
    """Statistics (1, 5, C) of all examples; `extents` of all processes, (parts, 3 + 2 C)."""
    means, variances, weight, square = examples
    bits = min(51, 62 - int(extents[:, 1].sum()).bit_length())
    top = extents[:, 2].max()
    one = _power(bits - torch.frexp(top).exponent)
    heaviest = _power(-torch.frexp(top).exponent)
    largest, widest = extents[:, 3:].amax(0).chunk(2)
    finite = _is_scalable(largest) & _is_scalable(widest)

    zero = torch.zeros_like(largest)
    sums = torch.zeros((4, len(zero)), dtype=torch.int64, device=zero.device)
    unit, wide = _unit_of(largest), _unit_of(widest)
    if weight is None or square is None:
        sums[0] = (one * len(means)).long()
        sums[1] = (one * heaviest * len(means)).long()
    else:
        sums[0] = (weight * one).round().long().sum()
        sums[1] = (weight * one * (square * heaviest)).round().long().sum()
    sums[2:3] = _whole(means, weight, zero, unit, one, 1)
    if variances is not None:
        sums[3:] = _whole(variances, weight, zero, wide, one, 1)
    total, squares, first, inner = processes.add("sums", sums).double()
    some = torch.where(total > 0, total, 1.0)
    mean = torch.where(finite, first / some / unit, 0.0)

    far = processes.gather_from(
        lambda: _farthest(means, weight, mean), len(mean), mean.device
    ).amax(0)
    finite &= _is_scalable(far)
    unit = _unit_of(far)
    sums = processes.add("sums", _whole(means, weight, mean, unit, one, 2))
    rest, spread = sums.double() / some / unit
    spread = spread / unit
    # Below zero is only the rounding of a spread that is nothing beside the mean's own.
    var = (spread - rest * rest).clamp(min=0) + inner / some / wide
    mean = torch.where(finite, mean + rest, math.nan)
    count = total / one
    m2 = torch.where(finite, var * count, math.nan)
    dof = (count - squares / some / heaviest).clamp(min=0)
    return torch.stack([count, mean, zero, m2, dof])[None]


def _differences(
    values: Tensor, weight: Tensor | None, shift: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Differences of values (N, C) to the shift (C,) in float64, with weights (N, 1), in parts."""
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


def _whole(
    values: Tensor,
    weight: Tensor | None,
    shift: Tensor,
    unit: Tensor,
    one: Tensor,
    powers: int,
) -> Tensor:
    """Sums over N of the first powers of (values - shift) * unit, in units of 1 / one: (powers, C).

    Each product with the weight is rounded to a whole number of them by itself. What is no number
    gives one that means nothing.
    """
    sums = torch.zeros((powers, len(shift)), dtype=torch.int64, device=shift.device)
    for part, w in _differences(values, weight, shift):
        part.mul_(unit)
        product = part * (one if w is None else one * w)
        for k in range(powers):
            if k:
                product.mul_(part)
            sums[k] += (product + _WHOLE).view(torch.int64).sub_(_WHOLE_BITS).sum(0)
    return sums


def _unit_of(largest: Tensor) -> Tensor:
    """What brings values up to these below one: a power of two, so that nothing is rounded."""
    return _power(-torch.frexp(torch.where(_is_scalable(largest), largest, 0.0)).exponent)


def _power(exponent: Tensor) -> Tensor:
    """2 to integers, exactly: by the bits of float64, for `pow` may be off in the last."""
    return ((exponent.long().clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


def _is_scalable(largest: Tensor) -> Tensor:
    """Where values up to these can be scaled by `_power`; a spread beyond overflows anyway."""
    return largest < 2.0**1000
