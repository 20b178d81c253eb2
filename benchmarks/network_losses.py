"""The losses of training a network by `convert`, and by PyTorch with other rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from network_worker import (
    CONVERTED,
    EAGER,
    LEARNING_RATE,
    Case,
    make_data,
    make_model,
    make_step,
)

BATCHES = 4
REVERSED, CHANNELS_LAST = "torch eager, batch reversed", "torch eager, channels_last"
YARDSTICKS = (REVERSED, CHANNELS_LAST)
#: How many times as far as the yardsticks the losses may be from PyTorch eager's.
ALLOWANCE = 2.0


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One run beside PyTorch eager's; a line of ``network_losses.csv``."""

    run: str
    seed: int
    network: str
    batch: int
    image: int | None
    steps: int
    learning_rate: float = LEARNING_RATE
    first_loss: float
    last_loss: float
    largest_difference: float
    verdict: str = ""


def relative_difference(
    values: Sequence[float], expected: Sequence[float], *, floor: float = 0.0
) -> float:
    """Largest of ``|a - b| / |b|``; NaN if anything is.

    With a `floor`, a ``|b|`` below this share of the largest counts as that much.
    """
    a, b = np.asarray(values), np.abs(expected)
    return float(np.max(np.abs(a - expected) / np.maximum(b, floor * b.max())))


def loss_curve(
    provider: str, case: Case, *, seed: int, steps: int, reverse: bool = False
) -> list[float]:
    """The losses of the first `steps` steps on `BATCHES` batches in turn.

    With `reverse` the examples of each batch come in the opposite order, which changes nothing but
    the order of summation.
    """
    step = make_step(make_model(provider, case, seed=seed), case)
    data = make_data(case, seed=seed, batches=BATCHES)
    if reverse:
        data = [(inputs.flip(0), targets.flip(0)) for inputs, targets in data]
    return [float(step(*data[k % BATCHES])) for k in range(steps)]


def compare_losses(
    case: Case, steps: int, seeds: Sequence[int], started: Callable[[str], None]
) -> list[LossRow]:
    """Loss curves of every seed beside PyTorch eager's, with a verdict on `convert`'s."""
    last = replace(case, format="channels_last")
    runs = {
        EAGER: (EAGER, case, False),
        REVERSED: (EAGER, case, True),
        CHANNELS_LAST: (EAGER, last, False),
        CONVERTED: (CONVERTED, case, False),
        f"{CONVERTED}, channels_last": (CONVERTED, last, False),
    }
    rows = []
    for seed in seeds:
        expected: list[float] = []
        for name, (provider, seen, reverse) in runs.items():
            started(f"losses of {name}, seed {seed}")
            losses = loss_curve(provider, seen, seed=seed, steps=steps, reverse=reverse)
            expected = expected or losses
            row = LossRow(
                run=name,
                seed=seed,
                network=case.network,
                batch=case.batch,
                image=case.image,
                steps=steps,
                first_loss=losses[0],
                last_loss=losses[-1],
                largest_difference=relative_difference(losses, expected),
            )
            rows.append(row)
    return judge(rows) if len(seeds) > 1 else rows  # of one seed, the difference is chance


def judge(rows: Sequence[LossRow]) -> list[LossRow]:
    """Say of the runs of `convert` whether they differ by no more than rounding does."""
    median = {
        run: float(np.median([row.largest_difference for row in rows if row.run == run]))
        for run in dict.fromkeys(row.run for row in rows)
    }
    limit = ALLOWANCE * max(median[name] for name in YARDSTICKS)
    return [
        replace(row, verdict="pass" if median[row.run] <= limit else "fail")
        if row.run.startswith(CONVERTED)
        else row
        for row in rows
    ]
