"""Do the inputs of a layer move less with batch norm, while the layers before it learn?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.diagnose.shift import distances
from batchnorm.study.charts import lines
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import (
    batch_norm,
    digits,
    error,
    gaussian,
    he,
    perceptron,
    train,
    xavier,
)

SIZES, BATCH, RATE, STEPS, EVERY = (784, *[100] * 4, 10), 60, 0.1, 2000, 50
INITS = {"He": he, "Xavier": xavier, "Gaussian 0.05": gaussian(0.05)}
MEASURES = {"raw": "raw", "relative": "divided by the spread"}


@torch.no_grad()
def inputs_of_layers(model: nn.Sequential, probe: Tensor) -> list[Tensor]:
    """What each linear layer but the first receives on the probe, by the probe's statistics."""
    found: list[Tensor] = []
    x = probe
    for layer in copy.deepcopy(model).train():
        if isinstance(layer, nn.Linear) and x is not probe:
            found.append(x)
        x = layer(x)
    return found


def run(trial: Trial) -> Iterator[Record]:
    """Train from each initialization, with and without batch norm."""
    data, steps = digits(trial), trial.choose(STEPS, 200)
    probe = data.test_images[:500]
    for init, norm in trial.each(product(INITS, (None, batch_norm))):
        model = perceptron(SIZES, trial, INITS[init], nn.ReLU, norm)
        arm = {"init": init, "batch norm": norm is not None}
        found: list[Record] = []
        last = inputs_of_layers(model, probe)

        def watch(step: int, model: nn.Sequential = model, found: list[Record] = found) -> None:
            nonlocal last
            if step % EVERY:
                return
            now = inputs_of_layers(model, probe)
            for layer, (old, new) in enumerate(zip(last, now, strict=True), 2):
                raw, relative = distances(old.numpy(), new.numpy())
                found.append({"step": step, "layer": layer, "raw": raw, "relative": relative})
            last = now

        train(model, data.batches(trial, BATCH), steps, RATE, after=watch)
        for record in found:
            yield {**arm, **record}
        yield {**arm, "final error": error(model, data.test_images, data.test_labels)}


def ratios(records: Records) -> dict[str, float]:
    """How far inputs move with batch norm over how far without, by initialization and measure."""
    found = {}
    for init, (column, name) in product(INITS, MEASURES.items()):
        total = {
            norm: sum(records.values(column, init=init, **{"batch norm": norm}))
            for norm in (False, True)
        }
        found[f"{init}, {name}"] = total[True] / total[False]
    return found


def first_to_last_layer(records: Records) -> dict[str, float]:
    """How much further the inputs of the last layer move than those of the second."""
    found = {}
    for init, norm in product(INITS, (False, True)):
        of = records.where(init=init, **{"batch norm": norm})
        last = max(of.values("layer"))
        found[f"{init}, {'with' if norm else 'without'} batch norm"] = sum(
            of.values("relative", layer=last)
        ) / sum(of.values("relative", layer=2))
    return found


def chart(records: list[Record]) -> Any:
    """The relative movement by layer."""
    moved = [r for r in records if "relative" in r]
    return lines(moved, x="step", y="relative", color="batch norm", column="init", row="layer")


STUDY = Study(
    name="covariate-shift",
    title="Covariate shift, measured",
    question="Does the distribution of a layer's input move less with batch norm while the "
    "layers before it learn?",
    protocol="Perceptrons of five layers with ReLU on 4,000 MNIST digits moved by up to two "
    f"pixels, {STEPS:,} steps of plain gradient descent at a rate of {RATE}, with and without "
    f"batch norm, from three initializations. Every {EVERY} steps: how far the input of each "
    "linear layer has moved on 500 test digits, as the Wasserstein distance of each unit's "
    "values then and now, raw and divided by their spread, mean over the units.",
    run=run,
    claims=(
        Claim(
            text="Batch norm reduces the change of the distributions of layers' inputs.",
            source="Ioffe & Szegedy (2015), sections 1 and 2",
            statistic="distance that the inputs of layers 2 to 5 move in all, with batch norm "
            "over without",
            measure=ratios,
            side="below",
            threshold=1.0,
            depends_on="initialization and measure",
        ),
        Claim(
            text="Small changes amplify as the network becomes deeper: the inputs of later "
            "layers move more.",
            source="Ioffe & Szegedy (2015), section 1",
            statistic="distance, divided by the spread, that the inputs of the last layer "
            "move over that of the second layer's",
            measure=first_to_last_layer,
            side="above",
            threshold=1.0,
            depends_on="initialization and batch norm",
        ),
    ),
    chart=chart,
)
