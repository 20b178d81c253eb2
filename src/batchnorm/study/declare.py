"""What a study declares: an experiment, and claims that its measurements decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from batchnorm.errors import ArgumentError

__all__ = ["Claim", "Record", "Records", "Study", "Trial"]

Item = TypeVar("Item")

#: Numbers and the words that say what they are of: one row of a long table.
Record = dict[str, Any]


class Records(Sequence[Record]):
    """The measurements of one seed, a long table.

    Examples
    --------
    >>> found = Records([{"norm": "batch", "error": 0.1}, {"norm": "none", "error": 0.3}])
    >>> found.value("error", norm="none")
    0.3
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, at: Any) -> Any:
        return self._records[at]

    def where(self, **equal: Any) -> Records:
        """Return the records in which each of these columns has this value, to six digits."""
        return Records(
            r for r in self._records if all(_same(r.get(key), v) for key, v in equal.items())
        )

    def values(self, column: str, **equal: Any) -> list[Any]:
        """Return a column of the records that match, in the order of measurement."""
        return [r[column] for r in self.where(**equal) if column in r]

    def value(self, column: str, **equal: Any) -> Any:
        """Return a column of the one record that matches.

        Raises
        ------
        LookupError
            None matches, or several do.
        """
        found = self.values(column, **equal)
        if len(found) != 1:
            raise LookupError(f"{len(found)} records have {column} and {equal}, where one should")
        return found[0]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-5)
    return bool(one == other)


class Trial:
    """One seed of a study: how long it lasts, what is random, and how far it is.

    Attributes
    ----------
    seed
        Of this repetition.
    quick
        Whether this is a tour of a few seconds rather than the experiment.
    """

    def __init__(
        self, seed: int, *, quick: bool = False, report: Callable[[float], None] | None = None
    ) -> None:
        self.seed, self.quick = seed, quick
        self._report = report or (lambda share: None)

    def rng(self, purpose: int) -> np.random.Generator:
        """Return a generator of its own for each purpose, so that arms see the same data."""
        return np.random.default_rng([self.seed, purpose])

    def choose(self, full: Item, quick: Item) -> Item:
        """Return the first, or the second in a quick tour."""
        return quick if self.quick else full

    def each(self, arms: Iterable[Item]) -> Iterator[Item]:
        """Iterate over the arms of the experiment, and report how many are done."""
        listed = list(arms)
        for number, arm in enumerate(listed):
            self._report(number / len(listed))
            yield arm
        self._report(1.0)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the literature, and the number that decides whether it holds here.

    Attributes
    ----------
    text
        The claim.
    source
        Who made it: author, year, and the place in the paper.
    statistic
        The deciding number, in words.
    measure
        Computes it from the records of one seed. Where the claim is examined under several
        conditions, it returns a number for each, by the condition's name.
    side, threshold
        The claim holds where the number is above (below) this.
    depends_on
        What the conditions differ in, as in "the initialization".
    """

    text: str
    source: str
    statistic: str
    measure: Callable[[Records], float | Mapping[str, float]]
    side: Literal["above", "below"]
    threshold: float
    depends_on: str = ""

    def __post_init__(self) -> None:
        """Refuse a side that does not exist."""
        if self.side not in ("above", "below"):
            raise ArgumentError(f"side must be 'above' or 'below', got {self.side!r}.")

    def numbers(self, records: Records) -> dict[str, float]:
        """Return the deciding number of one seed by condition; "" is the only one's name."""
        found = self.measure(records)
        return dict(found) if isinstance(found, Mapping) else {"": float(found)}


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment.

    Attributes
    ----------
    name
        As on the command line.
    title, question
        A heading, and what the study asks, in a sentence.
    protocol
        What is trained on what, and what is measured, in a paragraph.
    run
        Runs one seed, and returns its records: numbers that are finite, strings and booleans.
    claims
        What the records decide.
    chart
        Draws the records of all seeds, each with its ``seed``, as an Altair chart.
    """

    name: str
    title: str
    question: str
    protocol: str
    run: Callable[[Trial], Iterable[Record]]
    claims: tuple[Claim, ...]
    chart: Callable[[list[Record]], Any]
