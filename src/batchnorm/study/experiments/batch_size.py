"""How many examples does batch norm need?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import Moments
from batchnorm.study.charts import bars
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import convnet, cosine, digits, error, train
from batchnorm.torch import BatchNorm2d, freeze, functional, recalibrate

BATCH, STEPS, RATE = 64, 1000, 0.1
SIZES = (2, 4, 8, 16, 32, 64)
#: The size at which renormalization is tried.
SMALL = 4
#: Sizes whose statistics are frozen, and after which share of the steps.
FROZEN_SIZES, FROZEN_FROM = (2, 4), {"two thirds": 2 / 3, "three quarters": 3 / 4}
#: Of renormalization: bounds of r and d, the share of the training over which they open, and the
#: weight of a new value in the running statistics.
LARGEST_R, LARGEST_D, OPENING, MOMENTUM = 3.0, 5.0, 0.2, 0.05


class Renorm2d(BatchNorm2d):
    """Batch renormalization (Ioffe, 2017): batch norm with weight γ·r and bias γ·d + β.

    r and d, which are not differentiated, make of the batch's statistics the running ones.
    """

    def __init__(self, units: int, size: int, opens_after: int) -> None:
        super().__init__(units)
        self.size, self.opens_after, self.steps = size, opens_after, 0

    def forward(self, input: Tensor, *args: Any, **options: Any) -> Tensor:
        """Normalize parts of `size` examples each by their own statistics."""
        if not self.training:
            return super().forward(input, *args, **options)
        running_mean: Any = self.running_mean
        running_var: Any = self.running_var
        mean, std = running_mean, (running_var + self.eps).sqrt()
        opened = min(1.0, self.steps / self.opens_after)
        most_r, most_d = 1 + opened * (LARGEST_R - 1), opened * LARGEST_D
        parts, moments = [], []
        for part in input.split(self.size):
            of_part = Moments.of(part.detach().numpy())
            moments.append(of_part)
            batch_mean = torch.tensor(of_part.mean, dtype=input.dtype)
            batch_std = torch.tensor(of_part.var() + self.eps, dtype=input.dtype).sqrt()
            r = (batch_std / std).clamp(1 / most_r, most_r)
            d = ((batch_mean - mean) / std).clamp(-most_d, most_d)
            weight, bias = self.weight * r, self.weight * d + self.bias
            parts.append(functional.batch_norm(part, None, None, weight, bias, training=True))
        whole = Moments.merge(moments)
        running_mean.lerp_(torch.tensor(whole.mean, dtype=input.dtype), MOMENTUM)
        running_var.lerp_(torch.tensor(whole.var(ddof=1), dtype=input.dtype), MOMENTUM)
        self.steps += 1
        return torch.cat(parts)


@dataclass(frozen=True)
class Arm:
    """A way to normalize, and over how many examples."""

    method: str
    size: int
    norm: Callable[[int], nn.Module]
    freeze_at: int | None = None


def _of_groups(size: int) -> Callable[[int], nn.Module]:
    return lambda units: BatchNorm2d(units, group_size=size)


def arms(steps: int) -> list[Arm]:
    """Batch norm at each size, and the remedies."""
    return [
        *(Arm("batch norm", size, _of_groups(size)) for size in SIZES),
        *(
            Arm(f"frozen after {share}", size, _of_groups(size), round(FROZEN_FROM[share] * steps))
            for share, size in product(FROZEN_FROM, FROZEN_SIZES)
        ),
        Arm("renormalization", SMALL, lambda n: Renorm2d(n, SMALL, round(OPENING * steps))),
        Arm("group norm", 1, lambda units: nn.GroupNorm(4, units)),
    ]


def run(trial: Trial) -> Iterator[Record]:
    """Train with each arm from the same weights on the same mini-batches of 64."""
    data, steps = digits(trial), trial.choose(STEPS, 150)
    for arm in trial.each(arms(steps)):
        model = convnet(trial, arm.norm)
        batches = data.batches(trial, BATCH)

        def freeze_late(step: int, model: nn.Module = model, arm: Arm = arm) -> None:
            if step == arm.freeze_at:
                recalibrate(model, data.images.split(500), progress=False)
                freeze(model, affine=False)

        rate = cosine(RATE, steps)
        train(model, batches, steps, rate, momentum=0.9, after=freeze_late)
        if arm.method == "batch norm":
            recalibrate(model, data.images.split(500), progress=False)
        yield {
            "method": arm.method,
            "size": arm.size,
            "error": error(model, data.test_images, data.test_labels),
        }


def of(records: Records, method: str, size: int) -> float:
    """The test error of an arm."""
    return float(records.value("error", method=method, size=size))


def against_16(records: Records, *sizes: int) -> dict[str, float]:
    """Errors relative to batches of 16."""
    best = of(records, "batch norm", 16)
    return {f"{n} examples": of(records, "batch norm", n) - best for n in sizes}


def chart(records: list[Record]) -> Any:
    """Test error by method and size."""
    return bars(records, x="size", y="error", color="method")


_SAVED = "test error of batch norm over as many examples minus that of the remedy"

STUDY = Study(
    name="batch-size",
    title="How many examples batch norm needs",
    question="How many examples does batch norm need, and what helps where there are fewer?",
    protocol="A network of three convolutions, trained with momentum on mini-batches of "
    f"{BATCH} from 4,000 MNIST digits moved by up to two pixels, {STEPS:,} steps at a rate of "
    f"{RATE} decaying to zero. Each mini-batch is normalized in groups of 2 to 64, so that "
    "nothing differs but the number of examples that share statistics. Batch norm is tested "
    "with the statistics of the training set. Remedies: statistics frozen after two thirds or "
    f"three quarters of the steps, renormalization in groups of {SMALL}, group norm.",
    run=run,
    claims=(
        Claim(
            text="Small batches hurt.",
            source="Wu & Johnson (2021), section 4",
            statistic="test error with groups of this size minus with groups of 16",
            measure=lambda records: against_16(records, 2, 4, 8),
            side="above",
            threshold=0.0,
            depends_on="the size",
        ),
        Claim(
            text="Groups smaller than the mini-batch (ghost batches) regularize.",
            source="Hoffer et al. (2017); Summers & Dinneen (2020)",
            statistic="test error with all 64 together minus with groups of this size",
            measure=lambda records: {
                f"{n} examples": of(records, "batch norm", 64) - of(records, "batch norm", n)
                for n in (8, 16, 32)
            },
            side="above",
            threshold=0.0,
            depends_on="the size",
        ),
        Claim(
            text="Statistics frozen late in training make up for small batches.",
            source="Wu & Johnson (2021), section 4",
            statistic=_SAVED,
            measure=lambda records: {
                f"{n} examples, after {share}": of(records, "batch norm", n)
                - of(records, f"frozen after {share}", n)
                for share, n in product(FROZEN_FROM, FROZEN_SIZES)
            },
            side="above",
            threshold=0.0,
            depends_on="the size and the time",
        ),
        Claim(
            text="Renormalization makes up for small batches.",
            source="Ioffe (2017)",
            statistic=_SAVED,
            measure=lambda records: (
                of(records, "batch norm", SMALL) - of(records, "renormalization", SMALL)
            ),
            side="above",
            threshold=0.0,
        ),
        Claim(
            text="Group norm is better than batch norm where batches are small.",
            source="Wu & He (2018), Figure 1",
            statistic=_SAVED,
            measure=lambda records: {
                f"{n} examples": of(records, "batch norm", n) - of(records, "group norm", 1)
                for n in (2, 4)
            },
            side="above",
            threshold=0.0,
            depends_on="the size",
        ),
    ),
    chart=chart,
)
