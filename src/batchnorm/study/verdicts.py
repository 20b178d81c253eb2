"""From the numbers of several seeds to a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from batchnorm.errors import ArgumentError
from batchnorm.study.declare import Claim, Records

__all__ = ["CONFIDENCE", "Outcome", "Verdict", "judge", "shade"]

CONFIDENCE = 0.95
REPRODUCED, NOT_REPRODUCED, DEPENDS = "reproduced", "not reproduced", "depends on"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The deciding number of a claim under one condition.

    Attributes
    ----------
    condition
        Its name; empty if there is only one.
    values : (seeds,)
        The number of each seed.
    low, high
        Ends of the confidence interval of the mean, by Student's t.
    holds
        "yes" if all of the interval is on the claim's side of the threshold, "no" if all of it is
        on the other side, and "undecided" otherwise.
    """

    condition: str
    values: tuple[float, ...]
    mean: float
    std: float
    low: float
    high: float
    holds: Literal["yes", "no", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the seeds say of a claim: "reproduced", "not reproduced" or "depends on …"."""

    text: str
    outcomes: tuple[Outcome, ...]


def judge(claim: Claim, trials: Sequence[Records]) -> Verdict:
    """Decide a claim.

    Parameters
    ----------
    claim
        What is claimed.
    trials : (seeds,)
        The records of each seed; two at least, or nothing can be said of their spread.

    Returns
    -------
    Verdict
        "reproduced" if the claim holds under every condition, "not reproduced" if under none, and
        "depends on …" otherwise. A claim holds where its number is on the claimed side of the
        threshold with a confidence of 95 %; an interval that contains the threshold is no proof.

    Raises
    ------
    ArgumentError
        The measure gives no number, or other conditions for one seed than for another.
    """
    by_seed = [claim.numbers(records) for records in trials]
    if not by_seed or not by_seed[0] or any(n.keys() != by_seed[0].keys() for n in by_seed):
        raise ArgumentError(
            f"the measure of a claim must give the same conditions for each seed, and one, got "
            f"{[sorted(numbers) for numbers in by_seed]} for {claim.text!r}."
        )
    if len(by_seed[0]) > 1 and not claim.depends_on:
        raise ArgumentError(f"depends_on must say what the conditions of {claim.text!r} differ in.")
    outcomes = tuple(_outcome(claim, name, [n[name] for n in by_seed]) for name in by_seed[0])
    held = [outcome.holds == "yes" for outcome in outcomes]
    if all(held):
        text = REPRODUCED
    elif not any(held):
        text = NOT_REPRODUCED
    else:
        text = f"{DEPENDS} {claim.depends_on}"
    return Verdict(text=text, outcomes=outcomes)


def shade(text: str, outcomes: Sequence[str]) -> str:
    """A verdict's text, with what is only undecided.

    Parameters
    ----------
    text
        Of a `Verdict`.
    outcomes
        "yes", "no" or "undecided" for each condition.
    """
    if text == REPRODUCED or "no" in outcomes:
        return text
    return f"{text} (undecided)" if text == NOT_REPRODUCED else f"{text} (others undecided)"


def _outcome(claim: Claim, condition: str, values: list[float]) -> Outcome:
    from scipy import stats  # type: ignore[import-untyped]

    mean = float(np.mean(values))
    known = len(values) > 1 and math.isfinite(mean)
    std = float(np.std(values, ddof=1)) if known else math.nan
    low = high = mean if std == 0 else math.nan
    if std > 0:
        error = std / math.sqrt(len(values))
        low, high = map(float, stats.t.interval(CONFIDENCE, len(values) - 1, mean, error))
    above, below = low > claim.threshold, high < claim.threshold
    if claim.side == "below":
        above, below = below, above
    return Outcome(
        condition=condition,
        values=tuple(values),
        mean=mean,
        std=std,
        low=low,
        high=high,
        holds="yes" if above else "no" if below else "undecided",
    )
