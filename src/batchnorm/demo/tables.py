"""The results as tables of text: printed by rich, and set in HTML by the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from batchnorm.demo.results import DemoResult, TrainingRun

TARGETS = (0.80, 0.90, 0.95)
# Where accuracy is printed, as shares of all steps: dense at first, where most happens.
SHARES = (0.02, 0.06, 0.1, 0.2, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class Table:
    """A titled table whose cells are text already.

    The first `text_columns` columns hold words and are set flush left, the others numbers; a
    little space follows every `group` rows.
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


def _of_runs(
    result: DemoResult,
    title: str,
    columns: Iterable[str],
    cells: Callable[[TrainingRun], Iterable[str]],
) -> Table:
    """Return a table with a row for every run."""
    rows = (
        (f"{run.learning_rate:g}", "with" if run.batch_norm else "without", *cells(run))
        for run in result.runs
    )
    return Table(title, ("rate", "batch norm", *columns), tuple(rows))


def accuracy_table(result: DemoResult) -> Table:
    """Return the test accuracy of every run at a few steps."""
    grid = result.runs[0].evaluated_steps
    shown = sorted({max(1, round(share * (len(grid) - 1))) for share in SHARES})
    return _of_runs(
        result,
        "Test accuracy after so many steps",
        (f"{grid[index]:,}" for index in shown),
        lambda run: (percent(run.accuracies[index]) for index in shown),
    )


def steps_table(result: DemoResult) -> Table:
    """Return how many steps each run took to a few accuracies."""

    def cells(run: TrainingRun) -> Iterable[str]:
        for step in map(run.steps_to, TARGETS):
            yield "not reached" if step is None else f"{step:,}"
        yield percent(max(run.accuracies))
        yield f"{run.seconds:.1f}"

    grid = result.runs[0].evaluated_steps
    return _of_runs(
        result,
        f"Steps to reach a test accuracy (looked at every {grid[1] - grid[0]} steps)",
        (*(f"{target:.0%}" for target in TARGETS), "best", "seconds"),
        cells,
    )


def input_table(result: DemoResult) -> Table:
    """Return how steady the input of one sigmoid was, by three measures that may disagree."""
    return _of_runs(
        result,
        "Input of one sigmoid in the last hidden layer, over training",
        ("final spread", "widest / narrowest", "travel of the median"),
        lambda run: (
            f"{run.final_spread():.2f}",
            f"{run.spread_ratio():.1f}",
            f"{run.median_travel():.1f}",
        ),
    )


def inference_table(result: DemoResult) -> Table:
    """Return each batch-norm network's accuracy, difference and time in its test-time forms."""
    rows = (
        (
            f"{row.learning_rate:g}",
            row.form,
            percent(row.accuracy),
            "reference" if row.form == "population" else f"{row.largest_difference:.1e}",
            f"{1000 * row.seconds_per_1000:.2f}",
        )
        for row in result.inference
    )
    return Table(
        "Batch norm at test time (difference of the logits, time per 1,000 digits)",
        ("rate", "form", "accuracy", "largest difference", "ms per 1,000"),
        tuple(rows),
        group=3,
    )


def gradient_table(result: DemoResult) -> Table:
    """Return the largest error of each kind of gradient."""
    kinds = sorted({error.kind for error in result.gradient_errors})
    found = {(e.batch_norm, e.kind): f"{e.relative_error:.1e}" for e in result.gradient_errors}
    rows = (
        ("with" if flag else "without", *(found.get((flag, kind), "–") for kind in kinds))
        for flag in (True, False)
    )
    return Table(
        "Gradient check: largest relative difference from central differences, float64",
        ("batch norm", *kinds),
        tuple(rows),
        text_columns=1,
    )


def comparisons(result: DemoResult) -> list[str]:
    """Return one sentence for each learning rate, every word of it computed from the run."""
    return [
        f"Rate {rate:g}: "
        + _comparison(
            result.run_of(batch_norm=True, learning_rate=rate),
            result.run_of(batch_norm=False, learning_rate=rate),
        )
        + "."
        for rate in result.learning_rates
    ]


def _comparison(with_norm: TrainingRun, without: TrainingRun) -> str:
    # The highest target that both reached; failing that, that either did.
    steps = {target: (with_norm.steps_to(target), without.steps_to(target)) for target in TARGETS}
    reached = [t for t in TARGETS if None not in steps[t]]
    reached = reached or [t for t in TARGETS if steps[t] != (None, None)]
    if not reached:
        best = max(*with_norm.accuracies, *without.accuracies)
        return f"neither network reached {TARGETS[0]:.0%}; the best was {percent(best)}"
    target = reached[-1]
    final = (
        f"after {with_norm.evaluated_steps[-1]:,} steps {percent(with_norm.accuracies[-1])} with, "
        f"{percent(without.accuracies[-1])} without"
    )
    match steps[target]:
        case (int(first), int(second)):
            factor = max(first, second) / max(1, min(first, second))
            text = (
                f"{first:,} steps with batch norm and {second:,} without, a factor of {factor:.1f}"
            )
        case (first, None):
            text = f"{first:,} steps with batch norm, never without"
        case (_, second):
            text = f"{second:,} steps without batch norm, never with"
    return f"{target:.0%} in {text}; {final}"


def percent(share: float) -> str:
    """Return 0.876 as "87.6%"."""
    return f"{share:.1%}"
