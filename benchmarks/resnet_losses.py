"""The losses of training a ResNet-18 by `convert`, and by PyTorch with other rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from resnet_worker import CONVERTED, EAGER, Case, make_data, make_model, make_step

#: So small that a loss is still far from zero after 50 steps: what is left of one that is close to
#: zero is mostly rounding.
LEARNING_RATE = 1e-4

BATCHES = 4
REVERSED, CHANNELS_LAST = "torch eager, batch reversed", "torch eager, channels_last"
YARDSTICKS = (REVERSED, CHANNELS_LAST)
#: How many times as far as the yardsticks the losses may be from PyTorch eager's.
ALLOWANCE = 2.0


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One run beside PyTorch eager's; a line of ``resnet_losses.csv``."""

    run: str
    seed: int
    batch: int
    image: int
    steps: int
    learning_rate: float = LEARNING_RATE
    first_loss: float
    last_loss: float
    largest_difference: float
    verdict: str = ""


def relative_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """Largest of ``|a - b| / |b|``; NaN if anything is."""
    a, b = np.asarray(values), np.asarray(expected)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def loss_curve(
    provider: str, case: Case, *, seed: int, steps: int, reverse: bool = False
) -> list[float]:
    """The losses of the first `steps` steps on `BATCHES` batches in turn.

    With `reverse` the examples of each batch come in the opposite order, which changes nothing but
    the order of summation.
    """
    model = make_model(provider, channels_last=case.channels_last, seed=seed)
    step = make_step(model, bfloat16=case.bfloat16, learning_rate=LEARNING_RATE)
    data = make_data(case, seed=seed, batches=BATCHES)
    if reverse:
        data = [(images.flip(0), labels.flip(0)) for images, labels in data]
    return [float(step(*data[k % BATCHES])) for k in range(steps)]


def compare_losses(
    case: Case, steps: int, seeds: Sequence[int], started: Callable[[str], None]
) -> list[LossRow]:
    """Loss curves of every seed beside PyTorch eager's, with a verdict on `convert`'s."""
    last = replace(case, channels_last=True)
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
                batch=case.batch,
                image=case.image,
                steps=steps,
                first_loss=losses[0],
                last_loss=losses[-1],
                largest_difference=relative_difference(losses, expected),
            )
            rows.append(row)
    return judge(rows)


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
