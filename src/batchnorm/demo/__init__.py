"""`batchnorm demo`: the network of Ioffe & Szegedy's Figure 1, with and without batch norm.

784-100-100-100-10 sigmoid units, batches of 60, plain gradient descent, on real digits. The
network is NumPy matrix products and this library's `BatchNorm`; PyTorch is not involved.

    network         forward and backward by hand
    training        the loop, and what it records
    inference       running averages, population statistics, folded
    gradient_check  the backward against central differences
    results         what a run returns: plain data
    tables          the results as text
    charts          the results as charts
    page            all of it as one self-contained HTML page
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.atomic import check_page, replacing
from batchnorm.demo.gradient_check import check_gradients
from batchnorm.demo.inference import measure_inference
from batchnorm.demo.network import Network
from batchnorm.demo.results import (
    DemoResult,
    GradientError,
    InferenceMeasurement,
    Recording,
    TrainingRun,
    run_name,
)
from batchnorm.demo.tables import Table, all_tables, comparisons
from batchnorm.demo.training import train
from batchnorm.digits import Digits, ShiftedBatches, load_digits
from batchnorm.errors import ArgumentError
from batchnorm.extras import require
from batchnorm.progress import Show, bar

if TYPE_CHECKING:
    import rich.console

__all__ = ["DemoResult", "GradientError", "InferenceMeasurement", "Recording", "TrainingRun", "run"]

SIZES = (784, 100, 100, 100, 10)
BATCH_SIZE = 60
WEIGHT_STD = 0.1
# From a rate at which sigmoid units barely move to one at which they saturate.
LEARNING_RATES = (0.1, 0.5, 2.0, 10.0)
STEPS = 5000
QUICK_STEPS = 300
# Fewer would leave nothing to see, and the running averages near where they started.
MIN_STEPS = 10
# Of the packages, by the name they are imported by, that the extra [demo] installs.
REQUIRED = ("rich", "mlxtend", "altair", "vl_convert", "threadpoolctl")


def run(
    *,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    quick: bool = False,
    console: rich.console.Console | None = None,
) -> DemoResult:
    """Train the networks, print what happened, and write the page.

    Parameters
    ----------
    out : pathlib.Path
        The HTML page to write. It appears complete or not at all; an earlier page in its place
        stays until then.
    seed : scalar
        Of split, weights, batches and shifts. On one machine all but the durations repeats; on
        another the last bit of a matrix product may differ, and at the largest learning rate
        training amplifies it.
    steps : scalar
        Training steps per network. None means 5,000, or 300 if `quick`.
    quick : bool
        A tour of a few seconds.
    console : rich.console.Console
        Where to print; None means standard output.

    Returns
    -------
    result : DemoResult

    Raises
    ------
    ArgumentError
        `out`, `steps` or `seed` is unusable; nothing was trained.
    BatchNormError
        The extra [demo] is not installed; nothing was trained.

    References
    ----------
    Ioffe & Szegedy (2015), section 4.1 and Figure 1.

    Examples
    --------
    >>> from pathlib import Path
    >>> from batchnorm import demo
    >>> result = demo.run(out=Path("demo.html"), quick=True)  # doctest: +SKIP
    """
    require("The demo", "demo", *REQUIRED)
    if steps is None:
        steps = QUICK_STEPS if quick else STEPS
    _check_count("steps", steps, MIN_STEPS)
    _check_count("seed", seed, 0)
    out = Path(out)
    check_page(out, "demo.html")

    from rich.console import Console
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from batchnorm.demo.page import render_page

    console = console if console is not None else Console()
    started = time.perf_counter()
    digits = load_digits(np.random.default_rng([seed, 0]))
    layers = "-".join(str(size) for size in SIZES)
    console.print(
        f"[bold]batchnorm demo[/]: {layers} sigmoid units, batches of {BATCH_SIZE}, "
        f"{len(digits.train_labels):,} digits to train on, {len(digits.test_labels):,} to test on",
        highlight=False,
    )

    # The arrays are too small to share out: on cores that are busy with something else, threads
    # that wait for each other were seen to take ten times as long as one thread alone.
    with threadpool_limits(limits=1), bar() as show:
        runs, measurements = _train_all(digits, seed, steps, show)

    result = DemoResult(
        page=out,
        seed=seed,
        steps=steps,
        batch_size=BATCH_SIZE,
        sizes=SIZES,
        training_digits=len(digits.train_labels),
        test_digits=len(digits.test_labels),
        runs=tuple(runs),
        inference=tuple(measurements),
        gradient_errors=tuple(check_gradients(seed)),
        seconds=time.perf_counter() - started,
    )
    for table in all_tables(result):
        _print_table(console, table)
    error = f"Largest relative error of any gradient: {result.largest_gradient_error:.1e}\n"
    for sentence in (error, *comparisons(result)):
        console.print(sentence, highlight=False)
    _write(out, render_page(result))
    console.print(f"\nPage written to [bold]{out}[/]", highlight=False, soft_wrap=True)
    return result


def _train_all(
    digits: Digits, seed: int, steps: int, show: Show
) -> tuple[list[TrainingRun], list[InferenceMeasurement]]:
    """Train every network at every learning rate, and measure those with batch norm."""
    runs: list[TrainingRun] = []
    measurements: list[InferenceMeasurement] = []
    for learning_rate, batch_norm in product(LEARNING_RATES, (True, False)):
        # Both networks of a rate begin at the same weights and see the same batches.
        network = Network(
            SIZES,
            batch_norm=batch_norm,
            rng=np.random.default_rng([seed, 1]),
            weight_std=WEIGHT_STD,
        )
        batches = ShiftedBatches(
            digits.train_images,
            digits.train_labels,
            batch_size=BATCH_SIZE,
            background=digits.background,
            rng=np.random.default_rng([seed, 2]),
        )
        name, done = run_name(batch_norm, learning_rate), len(runs) * steps

        def evaluated(step: int, reached: float, *, name: str = name, done: int = done) -> None:
            show(f"{name}: {reached:.1%}", done + step, 2 * len(LEARNING_RATES) * steps)

        run = train(
            network,
            batches,
            digits,
            batch_norm=batch_norm,
            learning_rate=learning_rate,
            steps=steps,
            on_evaluation=evaluated,
        )
        runs.append(run)
        if batch_norm:
            measurements += measure_inference(
                network, batches.population(), digits, learning_rate=learning_rate
            )
    return runs, measurements


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ArgumentError(
            f"{name} must be a whole number of at least {least}, got {value!r}. "
            "Leave it out for the default."
        )


def _write(out: Path, text: str) -> None:
    with replacing(out) as beside:
        beside.write_text(text, encoding="utf-8")


def _print_table(console: rich.console.Console, table: Table) -> None:
    import rich.box
    import rich.table

    # Not the table's own title, which would wrap at the table's width.
    console.print(f"\n[bold]{table.title}[/]", highlight=False)
    printed = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        words = index < table.text_columns
        printed.add_column(column, justify="left" if words else "right")
    for index, row in enumerate(table.rows, start=1):
        printed.add_row(*row, end_section=index % table.group == 0)
    console.print(printed)
