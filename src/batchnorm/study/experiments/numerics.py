"""How many digits are left where the mean is large beside the spread?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm import Moments
from batchnorm.bench.cases import Case, make_inputs
from batchnorm.bench.harness import UsableProviders, measure_accuracy, without_affine
from batchnorm.bench.providers import choose
from batchnorm.study.charts import lines
from batchnorm.study.declare import Claim, Record, Records, Study, Trial

#: Means of data whose standard deviation is 1.
OFFSETS = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
COUNT = 2**14
PROVIDERS = ("batchnorm", "numpy", "torch", "jax")
SHAPE = (16, 8, 16, 16)

Values = npt.NDArray[np.float32]


def textbook(x: Values) -> float:
    """E[x²] − E[x]², in float32, as Flax computes it by default."""
    return float(np.mean(x * x) - np.mean(x) ** 2)


def textbook_in_float64(x: Values) -> float:
    """The same in float64."""
    wide = x.astype(np.float64)
    return float(np.mean(wide * wide) - np.mean(wide) ** 2)


def two_pass(x: Values) -> float:
    """E[(x − E[x])²], in float32, as NumPy computes it."""
    return float(x.var())


def welford(x: Values) -> float:
    """Welford's update, value by value in float32."""
    mean = m2 = np.float32(0)
    for count, value in enumerate(x, 1):
        step = value - mean
        mean += step / np.float32(count)
        m2 += step * (value - mean)
    return float(m2 / np.float32(len(x)))


def ours(x: Values) -> float:
    """`Moments.of`."""
    return float(Moments.of(x[:, None]).var()[0])


METHODS: dict[str, Callable[[Values], float]] = {
    "E[x²] − E[x]²": textbook,
    "E[x²] − E[x]², float64": textbook_in_float64,
    "two passes": two_pass,
    "Welford": welford,
    "batchnorm.Moments": ours,
}


def exact_variance(x: Values) -> Fraction:
    """By rational numbers."""
    values = [Fraction(float(value)) for value in x]
    mean = sum(values, Fraction(0)) / len(values)
    return sum(((value - mean) ** 2 for value in values), Fraction(0)) / len(values)


def run(trial: Trial) -> Iterator[Record]:
    """Variances by each method, and normalized values by each library, at each mean."""
    count = trial.choose(COUNT, 2**10)
    providers = UsableProviders(choose(PROVIDERS), lambda note: None)
    for offset in trial.each(OFFSETS):
        x = (trial.rng(0).standard_normal(count) + offset).astype(np.float32)
        exact = exact_variance(x)
        for name, method in METHODS.items():
            error = abs(Fraction(method(x)) - exact) / exact
            yield {"mean": offset, "method": name, "relative error": max(float(error), 1e-17)}
        for channels_last in (False, True):
            case = Case("forward", SHAPE, channels_last)
            inputs = without_affine(make_inputs(case, seed=trial.seed, offset=offset))
            for row in measure_accuracy(inputs, offset, providers):
                # What is not a number is wrong by more than any number.
                found = row.max_error if math.isfinite(row.max_error) else 1e30
                yield {
                    "mean": offset,
                    "library": row.provider,
                    "layout": "channels last" if channels_last else "channels first",
                    "error of y": max(found, 1e-17),
                }


def digits(error: float) -> float:
    """How many decimal digits are right, if this is the relative error."""
    return -math.log10(error)


def digits_at(offset: float, *methods: str) -> Callable[[Records], dict[str, float]]:
    """Right digits of variances where the mean is this."""
    return lambda records: {
        name: digits(records.value("relative error", mean=offset, method=name)) for name in methods
    }


def lost_by_others(records: Records) -> dict[str, float]:
    """How many digits of y others have lost at a mean of 10⁴ that this library has kept."""
    worst = {
        name: max(records.values("error of y", library=name, mean=1e4))
        for name in dict.fromkeys(records.values("library"))
    }
    return {
        name: math.log10(e / worst["batchnorm"]) for name, e in worst.items() if name != "batchnorm"
    }


def chart(records: list[Record]) -> Any:
    """Relative error of the variance over the mean."""
    of_methods = [r for r in records if "method" in r]
    return lines(of_methods, x="mean", y="relative error", color="method", log_x=True, log_y=True)


STUDY = Study(
    name="numerics",
    title="Numbers far from zero",
    question="How many digits are left where the mean is large beside the spread?",
    protocol=f"{COUNT:,} float32 numbers of standard deviation 1 and means from 1 to 10⁶. "
    "Their variance by five methods, against rational arithmetic; and batch norm of 16 × 8 × "
    "16 × 16 values by each library that is installed, in both memory layouts, against "
    "float64.",
    run=run,
    claims=(
        Claim(
            text="E[x²] − E[x]² in float32 has no correct digit left at a mean of 10⁴.",
            source="Chan, Golub & LeVeque (1983)",
            statistic="right decimal digits of the variance",
            measure=digits_at(1e4, "E[x²] − E[x]²"),
            side="below",
            threshold=1.0,
        ),
        Claim(
            text="Two passes and Welford's update keep three digits there.",
            source="Chan, Golub & LeVeque (1983)",
            statistic="right decimal digits of the variance",
            measure=digits_at(1e4, "two passes", "Welford"),
            side="above",
            threshold=3.0,
            depends_on="the method",
        ),
        Claim(
            text="Moments keeps nine digits at every mean.",
            source="this library's documentation on numerics",
            statistic="fewest right decimal digits of the variance at any mean",
            measure=lambda records: digits(
                max(records.values("relative error", method="batchnorm.Moments"))
            ),
            side="above",
            threshold=9.0,
        ),
        Claim(
            text="Normalized values are right to six digits after the point at every mean.",
            source="this library's documentation on numerics",
            statistic="fewest right digits of batchnorm's y at any mean and in any layout",
            measure=lambda records: digits(max(records.values("error of y", library="batchnorm"))),
            side="above",
            threshold=6.0,
        ),
        Claim(
            text="Others lose digits of y as the mean grows: two at least at a mean of 10⁴.",
            source="this library's documentation on numerics",
            statistic="digits that y has fewer than ours, in the worse of both layouts",
            measure=lost_by_others,
            side="above",
            threshold=2.0,
            depends_on="the library",
        ),
    ),
    chart=chart,
)
