"""Are running averages worse at test time than the statistics of the training set?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from batchnorm.study.charts import lines
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import convnet, cosine, digits, error, train
from batchnorm.torch import recalibrate

BATCH, EPOCHS, RATE = 512, 12, 0.5
SCHEDULES = ("constant rate", "rate decayed to zero")


def run(trial: Trial) -> Iterator[Record]:
    """Train with both schedules, and test each epoch with both kinds of statistics."""
    data, epochs = digits(trial), trial.choose(EPOCHS, 4)
    per_epoch = len(data.labels) // BATCH
    steps = epochs * per_epoch
    rates = {SCHEDULES[0]: lambda step: RATE, SCHEDULES[1]: cosine(RATE, steps)}
    for schedule in trial.each(SCHEDULES):
        model = convnet(trial)
        found: list[Record] = []

        def test(step: int, model: Any = model, found: list[Record] = found) -> None:
            if step % per_epoch:
                return
            exact = copy.deepcopy(model)
            recalibrate(exact, data.images.split(500), progress=False)
            for name, tested in (("running averages", model), ("training set", exact)):
                found.append(
                    {
                        "epoch": step // per_epoch,
                        "statistics": name,
                        "error": error(tested, data.test_images, data.test_labels),
                    }
                )

        batches = data.batches(trial, BATCH, shifted=False)
        train(model, batches, steps, rates[schedule], after=test)
        for record in found:
            yield {"schedule": schedule, "last": record["epoch"] == epochs, **record}


def _gain(records: Records, *, last: bool) -> float:
    running = records.values("error", statistics="running averages", last=last)
    exact = records.values("error", statistics="training set", last=last)
    return sum(running) / len(running) - sum(exact) / len(exact)


def gain_on_the_way(records: Records) -> dict[str, float]:
    """Error that exact statistics save, mean over all epochs but the last."""
    return {name: _gain(records.where(schedule=name), last=False) for name in SCHEDULES}


def gain_at_the_end(records: Records) -> dict[str, float]:
    """Error that exact statistics save after the last epoch."""
    return {name: _gain(records.where(schedule=name), last=True) for name in SCHEDULES}


def chart(records: list[Record]) -> Any:
    """Test error by epoch."""
    return lines(records, x="epoch", y="error", color="statistics", column="schedule")


STUDY = Study(
    name="population",
    title="Statistics at test time",
    question="Are running averages worse at test time than the statistics of the training set?",
    protocol="A network of three convolutions with batch norm (momentum 0.1) on 4,000 MNIST "
    f"digits: {EPOCHS} epochs of {4000 // BATCH} batches of {BATCH}, plain gradient descent at "
    f"a rate of {RATE}, constant or decayed to zero by a cosine. After each epoch the error on "
    "1,000 test digits, with the running averages and with statistics measured on the "
    "training set.",
    run=run,
    claims=(
        Claim(
            text="During training, running averages give a larger validation error than exact "
            "statistics.",
            source="Wu & Johnson (2021), section 3",
            statistic="test error by running averages minus by statistics of the training "
            "set, mean over all epochs but the last",
            measure=gain_on_the_way,
            side="above",
            threshold=0.0,
            depends_on="the schedule",
        ),
        Claim(
            text="When the rate has decayed to zero, both give the same.",
            source="Wu & Johnson (2021), section 3",
            statistic="the same difference after the last epoch, without its sign",
            measure=lambda records: abs(gain_at_the_end(records)[SCHEDULES[1]]),
            side="below",
            threshold=0.01,
        ),
        Claim(
            text="At a constant rate, exact statistics are still better after the last epoch.",
            source="Wu & Johnson (2021), section 3",
            statistic="the same difference after the last epoch",
            measure=lambda records: gain_at_the_end(records)[SCHEDULES[0]],
            side="above",
            threshold=0.0,
        ),
    ),
    chart=chart,
)
