"""The results as tables of text: printed by rich, and set in HTML by the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.demo.results import DemoResult, TrainingRun

TARGETS = (0.80, 0.90, 0.95)
# Where accuracy is printed, as shares of all steps: dense at first, where most happens.
SHARES = (0.02, 0.06, 0.1, 0.2, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class Table:
    """A titled table whose cells are text already.

    Attributes
    ----------
    columns : (columns,)
    rows : (rows, columns)
    text_columns : scalar
        So many columns at the left hold words and are set flush left; the others numbers.
    group : scalar
        A little space follows every `group` rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 2
    group: int = 2


def all_tables(result: DemoResult) -> tuple[Table, ...]:
    """Return every table of the demo in the order of printing."""
    return (
        accuracy_table(result),
        steps_table(result),
        input_table(result),
        inference_table(result),
        gradient_table(result),
    )


def accuracy_table(result: DemoResult) -> Table:
    """Return the test accuracy of every run at a few steps."""
    grid = result.runs[0].evaluated_steps
    last = len(grid) - 1
    columns = sorted({max(1, round(share * last)) for share in SHARES})
    return Table(
        "Test accuracy after so many steps",
        ("rate", "batch norm", *(f"{grid[index]:,}" for index in columns)),
        tuple(
            (*_labels(run), *(percent(run.accuracies[index]) for index in columns))
            for run in result.runs
        ),
    )


def steps_table(result: DemoResult) -> Table:
    """Return how many steps each run took to a few accuracies."""

    def cell(step: int | None) -> str:
        return "not reached" if step is None else f"{step:,}"

    grid = result.runs[0].evaluated_steps
    return Table(
        f"Steps to reach a test accuracy (looked at every {grid[1] - grid[0]} steps)",
        ("rate", "batch norm", *(f"{target:.0%}" for target in TARGETS), "best", "seconds"),
        tuple(
            (
                *_labels(run),
                *(cell(run.steps_to(target)) for target in TARGETS),
                percent(max(run.accuracies)),
                f"{run.seconds:.1f}",
            )
            for run in result.runs
        ),
    )


def input_table(result: DemoResult) -> Table:
    """Return how steady the input of one sigmoid was, by three measures that may disagree."""
    return Table(
        "Input of one sigmoid in the last hidden layer, over training",
        ("rate", "batch norm", "final spread", "widest / narrowest", "travel of the median"),
        tuple(
            (
                *_labels(run),
                f"{run.final_spread():.2f}",
                f"{run.spread_ratio():.1f}",
                f"{run.median_travel():.1f}",
            )
            for run in result.runs
        ),
    )


def inference_table(result: DemoResult) -> Table:
    """Return each batch-norm network's accuracy, difference and time in its test-time forms."""
    return Table(
        "Batch norm at test time (difference of the logits, time per 1,000 digits)",
        ("rate", "form", "accuracy", "largest difference", "ms per 1,000"),
        tuple(
            (
                f"{row.learning_rate:g}",
                row.form,
                percent(row.accuracy),
                ("reference" if row.form == "population" else f"{row.largest_difference:.1e}"),
                f"{1000 * row.seconds_per_1000:.2f}",
            )
            for row in result.inference
        ),
        group=3,
    )


def gradient_table(result: DemoResult) -> Table:
    """Return the largest error of each kind of gradient."""
    kinds = sorted({error.kind for error in result.gradient_errors})
    by_kind = {(e.batch_norm, e.kind): e.relative_error for e in result.gradient_errors}

    def cell(batch_norm: bool, kind: str) -> str:
        error = by_kind.get((batch_norm, kind))
        return "–" if error is None else f"{error:.1e}"

    return Table(
        "Gradient check: largest relative difference from central differences, float64",
        ("batch norm", *kinds),
        tuple(
            ("with" if flag else "without", *(cell(flag, kind) for kind in kinds))
            for flag in (True, False)
        ),
        text_columns=1,
    )


def comparisons(result: DemoResult) -> list[str]:
    """Return one sentence for each learning rate, every word of it computed from the run."""
    return [
        _comparison(
            result.run_of(batch_norm=True, learning_rate=rate),
            result.run_of(batch_norm=False, learning_rate=rate),
            result.steps,
        )
        for rate in result.learning_rates
    ]


def _comparison(with_norm: TrainingRun, without: TrainingRun, steps: int) -> str:
    target = _shared_target((with_norm, without))
    opening = f"Rate {with_norm.learning_rate:g}: "
    if target is None:
        best = max(max(with_norm.accuracies), max(without.accuracies))
        return f"{opening}neither network reached {TARGETS[0]:.0%}; the best was {percent(best)}."
    first, second = with_norm.steps_to(target), without.steps_to(target)
    final = (
        f"after {steps:,} steps {percent(with_norm.accuracies[-1])} with, "
        f"{percent(without.accuracies[-1])} without."
    )
    if first is None or second is None:
        reached, missed = ("with", "without") if second is None else ("without", "with")
        step = first if second is None else second
        return (
            f"{opening}{target:.0%} in {step:,} steps {reached} batch norm, never {missed}; {final}"
        )
    factor = max(first, second) / max(1, min(first, second))
    return (
        f"{opening}{target:.0%} in {first:,} steps with batch norm and {second:,} without, "
        f"a factor of {factor:.1f}; {final}"
    )


def _shared_target(runs: Sequence[TrainingRun]) -> float | None:
    """Return the highest target that all runs reached; failing that, that any did."""
    for quantifier in (all, any):
        for target in reversed(TARGETS):
            if quantifier(run.steps_to(target) is not None for run in runs):
                return target
    return None


def _labels(run: TrainingRun) -> tuple[str, str]:
    return f"{run.learning_rate:g}", "with" if run.batch_norm else "without"


def percent(share: float) -> str:
    """Return 0.876 as "87.6%"."""
    return f"{share:.1%}"
