"""Do statistics measured anew restore a network whose data have changed?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.digits import SIDE
from batchnorm.study.charts import bars
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import convnet, cosine, digits, error, train
from batchnorm.torch import recalibrate

BATCH, STEPS, RATE = 64, 1500, 0.1
#: Each works on pixels from 0, black, to 1.
Corruption = Callable[[Tensor, torch.Generator], Tensor]


def blurred(pixels: Tensor, _: torch.Generator) -> Tensor:
    """A Gaussian of 1.5 pixels."""
    at = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-(at**2) / (2 * 1.5**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    images = pixels.view(-1, 1, SIDE, SIDE)
    return nn.functional.conv2d(images, kernel[None, None], padding=4).view_as(pixels)


def noisy(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise."""
    return (pixels + 0.5 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)


def shaded(pixels: Tensor, _: torch.Generator) -> Tensor:
    """Light that falls from the left."""
    light = torch.linspace(0.8, 0.0, SIDE).repeat(SIDE)
    return (pixels + light).clamp(0, 1)


CORRUPTIONS: dict[str, Corruption] = {
    "brightness": lambda pixels, _: 0.5 + 0.5 * pixels,
    "contrast": lambda pixels, _: 0.2 * pixels,
    "blur": blurred,
    "noise": noisy,
    "shade": shaded,
}
#: Black on white. No mean and no variance of a channel undoes this.
CONTROL = "inversion"
ALL: dict[str, Corruption] = {
    "none": lambda pixels, _: pixels,
    **CORRUPTIONS,
    CONTROL: lambda pixels, _: 1 - pixels,
}


def run(trial: Trial) -> Iterator[Record]:
    """Train once, and test on each corruption before and after the statistics are measured."""
    data, steps = digits(trial), trial.choose(STEPS, 200)
    black, white = data.background, float(data.images.max())
    model = convnet(trial)
    train(model, data.batches(trial, BATCH), steps, cosine(RATE, steps), momentum=0.9)
    for name in trial.each(ALL):
        generator = torch.Generator().manual_seed(trial.seed)
        pixels = (data.test_images - black) / (white - black)
        images = ALL[name](pixels, generator) * (white - black) + black
        adapted = copy.deepcopy(model)
        recalibrate(adapted, images.split(250), progress=False)
        for statistics, tested in (("training data", model), ("corrupted data", adapted)):
            yield {
                "corruption": name,
                "statistics": statistics,
                "error": error(tested, images, data.test_labels),
            }


def restored(records: Records, name: str) -> float:
    """The share of what a corruption costs that new statistics give back."""
    before = float(records.value("error", corruption=name, statistics="training data"))
    after = float(records.value("error", corruption=name, statistics="corrupted data"))
    clean = float(records.value("error", corruption="none", statistics="training data"))
    return (before - after) / (before - clean) if before > clean else 0.0


def cost(records: Records) -> float:
    """What it costs where there is nothing to restore."""
    of = records.where(corruption="none")
    return float(
        of.value("error", statistics="corrupted data")
        - of.value("error", statistics="training data")
    )


def chart(records: list[Record]) -> Any:
    """Test error by corruption."""
    return bars(records, x="corruption", y="error", color="statistics")


STUDY = Study(
    name="shift",
    title="Data that have changed",
    question="Do statistics measured anew restore a network whose data have changed?",
    protocol=f"A network of three convolutions with batch norm, trained for {STEPS:,} steps on "
    "4,000 MNIST digits moved by up to two pixels. It is tested on 1,000 digits that are "
    "brighter, paler, blurred, noisy or lit from the left, with the statistics of the "
    "training data and with those of the corrupted images, which takes no labels. Inverted "
    "digits are the control: their shapes have changed, not only their scale.",
    run=run,
    claims=(
        Claim(
            text="Statistics of the corrupted data restore most of the accuracy.",
            source="Schneider et al. (2020); Nado et al. (2020)",
            statistic="share of the additional error that the statistics of the corrupted "
            "data take away",
            measure=lambda records: {name: restored(records, name) for name in CORRUPTIONS},
            side="above",
            threshold=0.5,
            depends_on="the corruption",
        ),
        Claim(
            text="They do not restore what is more than a change of scale (inverted digits).",
            source="negative control of this study",
            statistic="the same share",
            measure=lambda records: restored(records, CONTROL),
            side="below",
            threshold=0.5,
        ),
        Claim(
            text="On clean data they cost little.",
            source="Nado et al. (2020)",
            statistic="test error on clean data by the statistics of the test data minus by "
            "those of the training data",
            measure=cost,
            side="below",
            threshold=0.01,
        ),
    ),
    chart=chart,
)
