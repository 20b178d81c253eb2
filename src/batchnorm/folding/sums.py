"""What is folded into one layer, and how near that layer is to it on what was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from batchnorm.native import Array, Float64

from .algebra import Affine, Linear
from .report import FoldedLayer

__all__ = ["Part", "Sum", "largest_difference"]


@dataclass(eq=False)
class Part:
    """A linear layer with batch norms before and after it.

    Attributes
    ----------
    padded : bool
        Whether it pads with zeros.
    steps : int
        Additions and products between its sums and the batch norm, whose results are rounded.
    """

    linear: Linear
    before: Affine | None = None
    after: Affine | None = None
    padded: bool = False
    steps: int = 0

    def folded(self) -> Linear:
        """All of them as one, in float64."""
        linear = self.linear
        if self.before is not None:
            linear = linear.after(self.before, padded=self.padded)
        return linear if self.after is None else linear.then(self.after)


@dataclass(eq=False)
class Sum:
    """Parallel branches, often one, whose sum a layer computes.

    Attributes
    ----------
    parts : list of Part
        The first is that of the layer itself.
    report : FoldedLayer
        Is filled in by `compare`.
    last : Affine or None
        The batch norms after the sum.
    error, input : (out,), (in,)
        Of each channel, the largest difference and the largest input seen.
    output : float
        The largest output.
    overflows : bool
        Whether an output was not finite where the original's was.
    calls : int
        How many were compared.
    """

    parts: list[Part]
    report: FoldedLayer
    last: Affine | None = None
    error: Any = 0.0
    input: Any = 0.0
    output: float = 0.0
    overflows: bool = False
    calls: int = 0

    def folded(self) -> Linear:
        """The layer that computes all of it, in float64."""
        total: Linear = reduce(Linear.__add__, (part.folded() for part in self.parts))
        return total if self.last is None else total.then(self.last)

    def see(self, error: Array, input: Array, output: float, *, overflows: bool) -> None:
        """Add a call to what was seen; of what is finite, on which no other value had a part."""
        self.error = np.maximum(self.error, error)
        self.input = np.maximum(self.input, input)
        self.output = max(self.output, output)
        self.overflows |= overflows
        self.calls += 1

    def compare(
        self, dtype: DTypeLike, *, known: bool = True, coarser: str, **types: DTypeLike | None
    ) -> str:
        """Complete the report by what was seen.

        Parameters
        ----------
        dtype
            Of the layer.
        known
            Whether the bound is.
        coarser
            What may compute in coarser arithmetic, for the message.
        **types
            `sums`, `steps` and `original` of `Linear.difference`.

        Returns
        -------
        str
            Why the layer must not take the place of the others; "" if it may.
        """
        bound = self._bound(dtype, types) if known else np.full(1, math.inf)
        error = np.broadcast_to(self.error, np.broadcast_shapes(bound.shape, np.shape(self.error)))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = float(np.where(error > 0, error / bound, 0.0).max(initial=0.0))
        report = self.report
        report.error = float(error.max(initial=0.0))
        report.relative_error = report.error / self.output if self.output else 0.0
        report.bound, report.share = float(bound.max(initial=0.0)), share
        if not self.calls:
            return "it could not be compared on the inputs"
        if self.overflows:
            return "its output overflows"
        return (
            f"its error is {share:.3g} times the bound: {coarser} may compute in coarser "
            "arithmetic than the types of the model"
            if share > 1
            else ""
        )

    def _bound(self, dtype: DTypeLike, types: dict[str, DTypeLike | None]) -> Float64:
        """Of the error of each channel, on inputs no larger than those that were seen."""
        main = self.parts[0].linear
        products = None if main.transposed else math.prod(main.weight.shape[1:])
        total: Any = 0.0
        for part in self.parts:
            after = part.after
            if self.last is not None:
                after = self.last if after is None else after.then(self.last)
            total = total + part.linear.difference(
                after,
                self.input,
                dtype,
                before=part.before,
                additions=len(self.parts) - 1 + part.steps,
                products=products,
                **types,
            )
        bound: Float64 = total
        return bound


def largest_difference(
    one: Sequence[Array], other: Sequence[Array]
) -> tuple[float | None, float | None]:
    """Largest difference of two lists of real arrays, and that over the largest value of the first.

    None if there are no arrays; infinite if their shapes differ; NaN if no value is finite. Where a
    value of the first is not finite, as after an overflow, that of the second is not compared.
    """
    if not one and not other:
        return None, None
    if [v.shape for v in one] != [v.shape for v in other]:
        return math.inf, math.inf
    if all(v.size and not np.isfinite(v.astype(np.float64)).any() for v in one):
        return math.nan, math.nan
    error = largest = 0.0
    for s, t in zip(one, other, strict=True):
        x, y = s.astype(np.float64), t.astype(np.float64)
        known = np.isfinite(x)
        difference = np.nan_to_num(abs(x[known] - y[known]), nan=math.inf, posinf=math.inf)
        error = max(error, float(difference.max(initial=0.0)))
        largest = max(largest, float(abs(x[known]).max(initial=0.0)))
    return error, error / largest if largest else (0.0 if not error else math.inf)
