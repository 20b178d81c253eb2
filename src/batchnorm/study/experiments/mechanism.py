"""Is the gain due to less covariate shift?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.diagnose.shift import distances
from batchnorm.study.charts import bars
from batchnorm.study.declare import Claim, Record, Records, Study, Trial
from batchnorm.study.training import batch_norm, digits, error, gaussian, he, perceptron, train
from batchnorm.torch import BatchNorm1d

SIZES, BATCH, RATE, STEPS, EVERY = (784, *[100] * 5, 10), 60, 0.1, 3000, 100
INITS = {"He": he, "Gaussian 0.1": gaussian(0.1), "Gaussian 0.03": gaussian(0.03)}


class Noise(nn.Module):
    """Noise whose distribution changes at every step (Santurkar et al., Appendix A.2).

    Each unit has a mean and a scale of its own, drawn anew at each step, and each example deviates
    a little from these. There is none in evaluation.
    """

    def __init__(self, units: int, seed: int) -> None:
        super().__init__()
        self.units, self.generator = units, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift x."""
        if not self.training:
            return x
        mean = torch.rand(self.units, generator=self.generator) - 0.5
        scale = 1 + 0.25 * torch.rand(self.units, generator=self.generator)
        means = mean + 0.2 * torch.rand(x.shape, generator=self.generator) - 0.1
        scales = scale + 0.1 * torch.randn(x.shape, generator=self.generator)
        return x * scales + means


def norms(trial: Trial) -> dict[str, Any]:
    """The four arms."""
    return {
        "none": None,
        "batch norm": batch_norm,
        "noisy batch norm": lambda n: nn.Sequential(BatchNorm1d(n), Noise(n, trial.seed)),
        "noise": lambda n: Noise(n, trial.seed),
    }


def linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers in their order."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients of the loss with respect to each linear layer's weights."""
    loss = nn.functional.cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss, [layer.weight for layer in linears(model)])
    return [gradient.double().ravel() for gradient in found]


def gradient_shift(
    before: nn.Module, after: nn.Module, images: Tensor, labels: Tensor
) -> list[tuple[float, float]]:
    """How a layer's gradient changes when the layers below it are updated, for each layer.

    The relative change ‖G − G'‖ / ‖G‖ and the cosine of the angle between both (Santurkar et al.,
    Definition 2.1).
    """
    old = gradients(before, images, labels)
    found = []
    for i, gradient in enumerate(old):
        mixed = copy.deepcopy(before)
        new_layers = [child for child in after.children() if not isinstance(child, nn.ReLU)]
        old_layers = [child for child in mixed.children() if not isinstance(child, nn.ReLU)]
        at = next(k for k, layer in enumerate(old_layers) if layer is linears(mixed)[i])
        for old_layer, new_layer in zip(old_layers[:at], new_layers[:at], strict=True):
            old_layer.load_state_dict(new_layer.state_dict())
        changed = gradients(mixed, images, labels)[i]
        size = float(gradient.norm())
        found.append(
            (
                float((gradient - changed).norm()) / max(size, 1e-12),
                float(nn.functional.cosine_similarity(gradient, changed, dim=0)),
            )
        )
    return found


def run(trial: Trial) -> Iterator[Record]:
    """Train the four arms from three initializations, and measure both kinds of shift."""
    data, steps = digits(trial), trial.choose(STEPS, 150)
    probe = data.test_images[:500]
    for init, (arm, norm) in trial.each(product(INITS, norms(trial).items())):
        model = perceptron(SIZES, trial, INITS[init], nn.ReLU, norm)
        found: list[Record] = []
        batches = data.batches(trial, BATCH)
        activations = _activations(model, probe)
        for done in range(0, steps, EVERY):
            images, labels = next(batches)
            before = copy.deepcopy(model)
            train(model, iter([(images, labels)]), 1, RATE)
            if arm in ("none", "batch norm"):
                for layer, (change, cosine) in enumerate(
                    gradient_shift(before, model, images, labels), 1
                ):
                    found.append(
                        {"step": done + 1, "layer": layer, "gradient": change, "cosine": cosine}
                    )
            train(model, batches, EVERY - 1, RATE)
            now = _activations(model, probe)
            for layer, (old, new) in enumerate(zip(activations, now, strict=True), 1):
                raw, relative = distances(old.numpy(), new.numpy())
                found.append(
                    {"step": done + EVERY, "layer": layer, "raw": raw, "relative": relative}
                )
            activations = now
        for record in found:
            yield {"init": init, "arm": arm, **record}
        yield {
            "init": init,
            "arm": arm,
            "error": error(model, data.test_images, data.test_labels),
        }


@torch.no_grad()
def _activations(model: nn.Sequential, probe: Tensor) -> list[Tensor]:
    """What each ReLU receives in training mode, noise included."""
    found = []
    x = probe
    for layer in copy.deepcopy(model).train():  # running statistics and noise stay as they are
        if isinstance(layer, nn.ReLU):
            found.append(x)
        x = layer(x)
    return found


def errors(records: Records, one: str, other: str) -> dict[str, float]:
    """Test error of one arm minus that of another, by initialization."""
    return {
        init: records.value("error", init=init, arm=one)
        - records.value("error", init=init, arm=other)
        for init in INITS
    }


def _mean(records: Records, column: str) -> float:
    values = [r[column] for r in records if column in r and r["layer"] > 1]
    return sum(values) / len(values)


def shift_ratio(records: Records, column: str, one: str, other: str) -> dict[str, float]:
    """Mean over layers above the first and steps, of one arm over another's."""
    return {
        init: _mean(records.where(init=init, arm=one), column)
        / _mean(records.where(init=init, arm=other), column)
        for init in INITS
    }


def chart(records: list[Record]) -> Any:
    """Test error by arm."""
    return bars(
        [r for r in records if "error" in r], x="arm", y="error", color="arm", column="init"
    )


_SOURCE = "Santurkar et al. (2018), section 2"

STUDY = Study(
    name="mechanism",
    title="Where the gain comes from",
    question="Is the gain of batch norm due to less covariate shift?",
    protocol="Perceptrons of six layers with ReLU on 4,000 MNIST digits moved by up to two "
    f"pixels, {STEPS:,} steps of plain gradient descent at a rate of {RATE}, from three "
    "initializations: without normalization, with batch norm, with batch norm followed by "
    f"noise whose distribution changes at each step, and with that noise alone. Every {EVERY} "
    "steps: how the input of each ReLU has moved on 500 test digits (Wasserstein distance per "
    "unit, raw and divided by the spread), and how a layer's gradient changes when the layers "
    "below it are updated.",
    run=run,
    claims=(
        Claim(
            text="Batch norm improves training.",
            source=f"{_SOURCE}.1",
            statistic="test error without normalization minus with batch norm",
            measure=lambda records: errors(records, "none", "batch norm"),
            side="above",
            threshold=0.0,
            depends_on="the initialization",
        ),
        Claim(
            text="Batch norm followed by noise trains nearly as well as batch norm.",
            source=f"{_SOURCE}.1 and Figure 2",
            statistic="test error with noisy batch norm minus with batch norm",
            measure=lambda records: errors(records, "noisy batch norm", "batch norm"),
            side="below",
            threshold=0.03,
            depends_on="the initialization",
        ),
        Claim(
            text="The noise makes the distributions move more than without any normalization.",
            source=f"{_SOURCE}.1 and Figure 2",
            statistic=f"distance that inputs of the ReLUs move in {EVERY} steps, divided by "
            "their spread: noisy batch norm over none",
            measure=lambda records: shift_ratio(records, "relative", "noisy batch norm", "none"),
            side="above",
            threshold=1.0,
            depends_on="the initialization",
        ),
        Claim(
            text="Noise alone hurts.",
            source="control of this study",
            statistic="test error with noise alone minus without",
            measure=lambda records: errors(records, "noise", "none"),
            side="above",
            threshold=0.0,
            depends_on="the initialization",
        ),
        Claim(
            text="With batch norm, gradients change no less when the layers below are updated.",
            source="Santurkar et al. (2018), section 2.2 and Figure 3",
            statistic="relative change of a layer's gradient, mean over layers above the "
            "first and steps: with batch norm over without",
            measure=lambda records: shift_ratio(records, "gradient", "batch norm", "none"),
            side="above",
            threshold=1.0,
            depends_on="the initialization",
        ),
    ),
    chart=chart,
)
