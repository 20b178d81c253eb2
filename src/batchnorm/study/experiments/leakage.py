"""Do batch statistics tell a network the class, if the batches are of one class?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.study.charts import bars
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import Data, convnet, digits, error, train
from batchnorm.torch import BatchNorm2d, recalibrate

GROUP, BATCH, STEPS, RATE = 8, 64, 1000, 0.1
KINDS = ("groups of one class", "groups of all classes")


def grouped(data: Data, trial: Trial, of_one_class: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of eight groups of eight digits."""
    rng = trial.rng(1)
    members = [torch.nonzero(data.labels == c).ravel() for c in range(10)]
    while True:
        if of_one_class:
            classes = rng.integers(0, 10, BATCH // GROUP)
            rows = torch.cat(
                [
                    members[c][torch.from_numpy(rng.permutation(len(members[c]))[:GROUP])]
                    for c in classes
                ]
            )
        else:
            rows = torch.from_numpy(rng.permutation(len(data.labels))[:BATCH])
        yield data.images[rows], data.labels[rows]


@torch.no_grad()
def error_by_groups(model: nn.Module, data: Data) -> float:
    """The error on groups of one class, each normalized by its own statistics."""
    order = data.test_labels.argsort(stable=True)  # 100 of each class
    images, labels = data.test_images[order], data.test_labels[order]
    keep = torch.arange(len(labels)).view(10, -1)[:, : 100 // GROUP * GROUP].ravel()
    model.train()
    answers = torch.cat([model(part) for part in images[keep].split(BATCH * 3)])
    return 1 - float((answers.argmax(1) == labels[keep]).double().mean())


def run(trial: Trial) -> Iterator[Record]:
    """Train on both kinds of groups, and test in three ways."""
    data, steps = digits(trial), trial.choose(STEPS, 150)
    for kind in trial.each(KINDS):
        model = convnet(trial, lambda units: BatchNorm2d(units, group_size=GROUP))
        train(model, grouped(data, trial, kind == KINDS[0]), steps, RATE, momentum=0.9)
        recalibrate(model, data.images.split(500), progress=False)
        population = error(model, data.test_images, data.test_labels)
        yield {"trained on": kind, "tested with": "training set", "error": population}
        of_groups = error_by_groups(model, data)
        yield {"trained on": kind, "tested with": "groups of one class", "error": of_groups}


def leak(records: Records) -> float:
    """How much worse a single digit is recognized than groups of one class are."""
    found = records.where(**{"trained on": KINDS[0]})
    return float(
        found.value("error", **{"tested with": "training set"})
        - found.value("error", **{"tested with": "groups of one class"})
    )


def chart(records: list[Record]) -> Any:
    """Test error by what the network was trained on and tested with."""
    return bars(records, x="trained on", y="error", color="tested with")


STUDY = Study(
    name="leakage",
    title="Batches that give the answer away",
    question="Do batch statistics tell a network the class, if the batches are of one class?",
    protocol=f"A network of three convolutions with batch norm over groups of {GROUP} digits, "
    f"trained for {STEPS:,} steps on 4,000 MNIST digits. Each group is of one class, or drawn "
    "from all. It is tested with the statistics of the training set, digit by digit, and on "
    "groups of one class with their own statistics.",
    run=run,
    claims=(
        Claim(
            text="A network trained on groups of one class reads the class from their "
            "statistics, and fails without them.",
            source="Wu & Johnson (2021), section 6",
            statistic="test error by statistics of the training set minus on groups of one "
            "class by their own",
            measure=leak,
            side="above",
            threshold=0.2,
        ),
        Claim(
            text="Shuffled groups prevent it.",
            source="Wu & Johnson (2021), section 6",
            statistic="test error by statistics of the training set, after training on groups "
            "of one class minus after training on groups of all classes",
            measure=lambda records: (
                records.value("error", **{"trained on": KINDS[0], "tested with": "training set"})
                - records.value("error", **{"trained on": KINDS[1], "tested with": "training set"})
            ),
            side="above",
            threshold=0.2,
        ),
    ),
    chart=chart,
)
