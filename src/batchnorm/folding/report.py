"""What `fold` has done, and how near the result is to the original."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from batchnorm.errors import ArgumentError, BatchNormError

__all__ = ["FoldError", "FoldReport", "FoldedLayer"]


@dataclass
class FoldedLayer:
    """A linear layer that has taken batch norms in.

    Attributes
    ----------
    layer : str
    before, after : list of str
        The batch norms that ran before and after it, in their order.
    beside, merged : list of str
        Batch norms and layers of other branches that it has taken in, whose outputs were added to
        its own.
    new_bias : bool
        Whether it had no bias: a model that is built with ``bias=False`` cannot load its state.
    largest_weight : float
        Largest magnitude of its weights and biases.
    error, relative_error : float
        Largest difference of its output from that of the original layers on the same input, before
        an activation; and the same over the largest output.
    bound : float
        Of `error`, on inputs that are in each channel no larger than those of the examples; of the
        channel where it is largest.
    share : float
        Largest error of a channel over its own bound; at most 1.
    """

    layer: str
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    new_bias: bool = False
    largest_weight: float = 0.0
    error: float = 0.0
    relative_error: float = 0.0
    bound: float = 0.0
    share: float = 0.0

    @property
    def norms(self) -> list[str]:
        """All batch norms that it has taken in."""
        return [*self.before, *self.after, *self.beside]


@dataclass
class FoldReport:
    """What `fold` has done with each batch norm of a model.

    Attributes
    ----------
    pairs : list of FoldedLayer
        What was folded.
    refused : dict of str to str
        Batch norms next to a linear layer that were left in place, and why.
    alone : dict of str to str
        Batch norms that no linear layer is next to, and what is.
    dtype : str
        Type of the folded weights.
    error, relative_error : float or None
        Largest difference of the outputs of the folded model from those of the original on the
        examples, and the same over the largest output; infinite if their shapes differ; None if
        there is no tensor of real numbers in them.
    optimized_error : float or None
        The same difference if a runtime that optimizes models has done so with both; None if it
        has not.
    original_error, folded_error : float or None
        Largest difference of each model's outputs from those of the original computed in float64;
        None if it does not run in float64, or is in float64 itself.
    verified : bool
        Whether both models ran on examples. If not, errors are None or NaN.
    """

    pairs: list[FoldedLayer] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    error: float | None = None
    relative_error: float | None = None
    optimized_error: float | None = None
    original_error: float | None = None
    folded_error: float | None = None
    verified: bool = True

    @property
    def folded(self) -> dict[str, str]:
        """For each batch norm that was folded: the layer that took it in."""
        return {norm: pair.layer for pair in self.pairs for norm in pair.norms}

    @property
    def share(self) -> float:
        """Largest error of a pair over its bound."""
        return max((pair.share for pair in self.pairs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything in it, as JSON has it: a number that is not finite becomes None."""
        found: dict[str, Any] = _finite(asdict(self))
        return found

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def check(self, tol: float | None = None) -> None:
        """Raise if a batch norm next to a linear layer was refused, or an error is too large.

        Parameters
        ----------
        tol : float
            The largest error allowed of a pair and of the outputs. None allows the outputs any
            error that is finite.

        Raises
        ------
        FoldError
            It names the first problem.
        """
        problems = [f"'{name}' was refused: {why}" for name, why in self.refused.items()]
        if tol is not None:
            problems += [
                f"'{pair.layer}' differs by {pair.error:.3g}, more than {tol:.3g}"
                for pair in self.pairs
                if pair.error > tol
            ]
        most = sys.float_info.max if tol is None else tol
        if self.error is not None and not self.error <= most:
            problems.append(f"outputs of the model differ by {self.error:.3g}")
        if self.optimized_error is not None and not self.optimized_error <= most:
            problems.append(f"outputs of the optimized model differ by {self.optimized_error:.3g}")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise FoldError(
                f"the model was not folded as strict=True demands: {problems[0]}{more}", self
            )

    def summary(self) -> list[str]:
        """What was folded, and how far outputs are apart: a sentence a line."""
        count = len(self.folded)
        lines = [
            f"folded {count} batch norm{'' if count == 1 else 's'}, refused {len(self.refused)}, "
            f"left {len(self.alone)} that no linear layer is next to"
        ]
        if self.error is not None and self.relative_error is not None:
            lines.append(
                f"largest difference of outputs {self.error:.2g} ({self.relative_error:.2g} of the "
                f"largest output), of a pair {self.share:.2g} of its bound"
            )
        if self.optimized_error is not None:
            lines.append(f"largest difference if both are optimized {self.optimized_error:.2g}")
        if not self.verified:
            lines.append("not verified: there were no inputs to run the models on")
        if self.original_error is not None and self.folded_error is not None:
            lines.append(
                f"from float64: the original {self.original_error:.2g}, folded "
                f"{self.folded_error:.2g}"
            )
        return lines

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """For each batch norm: its name, the layer it is in, error, bound; or why it is not."""
        rows = [
            (
                norm,
                p.layer,
                *((f"{p.error:.2g}", f"{p.bound:.2g}") if self.verified else ("", "")),
                "",
            )
            for p in self.pairs
            for norm in p.norms
        ]
        rows += [(name, "", "", "", f"refused: {why}") for name, why in self.refused.items()]
        return rows + [(name, "", "", "", f"left: {why}") for name, why in self.alone.items()]

    def __str__(self) -> str:
        """The summary, and a line for each batch norm."""
        rows = self.rows()
        width = max((len(name) for name, *_ in rows), default=0)
        lines = [
            f"  {name:<{width}}  {why or f'into {layer!r}'}"
            + (f": error {error}, bound {bound}" if error else "")
            for name, layer, error, bound, why in rows
        ]
        return "\n".join([*self.summary(), *lines])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def check_tol(tol: object, *, strict: bool) -> None:
    """Raise ArgumentError if `tol` is no number that is not negative, or is not asked for."""
    if tol is None:
        return
    if not (isinstance(tol, (int, float)) and tol >= 0):
        raise ArgumentError(f"tol must be a number that is not negative, or None, got {tol!r}.")
    if not strict:
        raise ArgumentError(f"tol must come with strict=True, which raises beyond it, got {tol!r}.")


class FoldError(BatchNormError):
    """With ``strict=True``: a batch norm was refused, or an error is too large.

    Attributes
    ----------
    report : FoldReport
    """

    def __init__(self, message: str, report: FoldReport) -> None:
        super().__init__(message)
        self.report = report
