"""What `fold` has done, and how near the result is to the original."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from batchnorm.errors import ArgumentError, BatchNormError, printable

__all__ = ["FoldError", "FoldReport", "FoldedLayer"]


@dataclass
class FoldedLayer:
    """A linear layer or convolution that has taken batch norms in.

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

    A layer is a linear layer or a convolution.

    Attributes
    ----------
    pairs : list of FoldedLayer
        What was folded.
    refused : dict of str to str
        Batch norms next to a layer that were left in place, and why.
    alone : dict of str to str
        Batch norms that have no layer next to them, and what is there.
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
        """Everything in it, as JSON has it: a number that is not finite becomes None.

        Also `folded`, and the numbers of batch norms.
        """
        counts = {name: len(getattr(self, name)) for name in ("folded", "refused", "alone")}
        found: dict[str, Any] = _finite(asdict(self))
        return {"counts": counts, "folded": self.folded, **found}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def check(self, tol: float | None = None) -> None:
        """Raise if a batch norm next to a layer was refused, or an error is too large.

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
            more = f" (problem 1 of {len(problems)})" if len(problems) > 1 else ""
            raise FoldError(f"not accepted, as strict demands: {problems[0]}{more}", self)

    def check_finite(self, dtype: str | None = None) -> None:
        """Raise if outputs of the folded model are not finite, and say whose fault it is.

        Parameters
        ----------
        dtype : str
            The type of the folded model, if not that of the folded layers.

        Raises
        ------
        FoldError
        """
        errors = [e for e in (self.error, self.optimized_error) if e is not None]
        if any(map(math.isnan, errors)):
            raise FoldError(
                "no output of the original is finite on these inputs, so nothing can be compared: "
                "look for infinities and NaN in them and in its weights",
                self,
            )
        if all(map(math.isfinite, errors)):
            return
        kind = dtype or self.dtype
        remedy = {"float16": ": choose bfloat16 or float32", "bfloat16": ": choose float32"}
        raise FoldError(
            f"outputs are not finite in {kind or 'its type'} where those of the original are"
            f"{remedy.get(kind, '')}",
            self,
        )

    def summary(self, most: int | None = None) -> list[str]:
        """What was folded, and how far outputs are apart: a sentence a line.

        Parameters
        ----------
        most : int
            The maximum number of layers that are named; None names all.
        """
        count, refused, alone = len(self.folded), len(self.refused), len(self.alone)
        total = count + refused + alone
        lines = [
            f"folded {count} of {total} batch norm{'s' * (total != 1)}; {refused} refused; "
            f"{alone} {'has' if alone == 1 else 'have'} no layer next to "
            f"{'it' if alone == 1 else 'them'}"
        ]
        if self.error is not None and self.relative_error is not None:
            lines.append(
                f"outputs differ by at most {self.error:.2g} ({self.relative_error:.2g} of the "
                "largest)"
            )
        if self.optimized_error is not None:
            lines.append(f"if a runtime optimizes both, by at most {self.optimized_error:.2g}")
        if not self.verified:
            lines.append("not verified: there were no inputs to run the models on")
        elif self.pairs:
            lines.append(f"each layer differs by at most {self.share:.2g} of its bound")
        if self.original_error is not None and self.folded_error is not None:
            lines.append(
                f"against float64: the original {self.original_error:.2g}, folded "
                f"{self.folded_error:.2g}"
            )
        biased = [pair.layer for pair in self.pairs if pair.new_bias]
        if biased:
            names = ", ".join(biased[:most]) + ", …" * (len(biased) > len(biased[:most]))
            lines.append(f"{len(biased)} layer{'s' * (len(biased) != 1)} got a bias ({names})")
        return lines

    def lines(self, width: int | None = None, most: int | None = None) -> list[str]:
        """The summary, batch norms that are not folded, and layers, nearest to their bound first.

        Parameters
        ----------
        width : int
            The maximum length of a line; None breaks none.
        most : int
            The maximum number of folded layers, and of batch norms that have no layer next to them;
            None shows all.
        """
        found = [
            part
            for line in self.summary(None if most is None else 3)
            for part in _wrapped(line, width)
        ]
        stay = [(name, f"refused: {why}") for name, why in self.refused.items()]
        stay += [(name, f"alone: {why}") for name, why in [*self.alone.items()][:most]]
        if stay:
            found += ["", "not folded:"]
        longest = max((len(name) for name, _ in stay), default=0)
        for name, why in stay:
            found += _wrapped(f"  {name:<{min(longest, 24)}}  ", width, why)
        found += _more(len(self.refused) + len(self.alone) - len(stay))
        pairs = sorted(self.pairs, key=lambda pair: -pair.share) if self.verified else self.pairs
        if pairs:
            found += [
                "",
                "  error    bound    batch norm into layer" if self.verified else "folded:",
            ]
        for pair in pairs[:most]:
            numbers = f"  {pair.error:<7.2g}  {pair.bound:<7.2g}  " if self.verified else "  "
            found += _wrapped(numbers, width, f"{', '.join(pair.norms)} into {pair.layer}")
        return found + _more(len(pairs) - len(pairs[:most]))

    def __str__(self) -> str:
        """All `lines`."""
        return "\n".join(self.lines())


class _Wrapper(textwrap.TextWrapper):
    """Breaks names of layers after one of ``_./`` as well, but no numbers."""

    wordsep_re = re.compile(r"(\s+|(?:[^\s_./]|\.(?=\d))*(?:[_/]|\.(?!\d))+)")


def _wrapped(start: str, width: int | None, text: str = "") -> list[str]:
    """Lines of `start` and `text`, indented as far as `text` is, but no further than 24."""
    start, text = printable(start), printable(text)
    if width is None:
        return [f"{start}{text}".rstrip()]
    indent = " " * (min(len(start), 24) if text else 2)
    return _Wrapper(width, subsequent_indent=indent).wrap(f"{start}{text}")


def _more(number: int) -> list[str]:
    return [f"  … and {number} more (--json has all)"] * (number > 0)


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
    """A batch norm was refused or an error is too large, with ``strict=True``; or outputs overflow.

    Attributes
    ----------
    report : FoldReport
    """

    def __init__(self, message: str, report: FoldReport) -> None:
        super().__init__(message)
        self.report = report
