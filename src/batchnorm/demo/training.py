"""Train one network by plain gradient descent, and record what there is to see."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.demo.network import Network, cross_entropy
from batchnorm.demo.results import PERCENTILES, Recording, TrainingRun
from batchnorm.digits import Digits

Array = npt.NDArray[Any]

# At most so many of each per run, and no closer than so many steps unless the run is very short:
# enough for a smooth curve, and cheap beside the training.
EVALUATIONS, EVALUATION_GAP = 100, 10
RECORDINGS, RECORDING_GAP = 50, 20
UNIT = 0


@dataclass(frozen=True)
class HistogramBins:
    """Equal bins, finer and wider than any picture needs: the page merges neighbours.

    The range a layer will use is known only when training has ended, so it cannot be chosen
    while counting.
    """

    low: float = -40.0
    width: float = 0.05
    count: int = 1600

    def counts(self, x: Array) -> tuple[int, ...]:
        """Return how many values of `x` (any shape) fall into each bin; outliers into none."""
        # numpy.histogram does the same with uniform bins, but takes about ten times as long.
        index = np.floor((x.ravel() - self.low) / self.width)
        inside = index[(index >= 0) & (index < self.count)].astype(np.intp)
        return tuple(np.bincount(inside, minlength=self.count).tolist())


BINS = HistogramBins()


def accuracy(network: Network, digits: Digits) -> float:
    """Return the share of test digits that `network` classifies correctly as it is set now."""
    guesses = network(digits.test_images).argmax(axis=1)
    return float(np.count_nonzero(guesses == digits.test_labels) / len(guesses))


def train(
    network: Network,
    batches: Iterable[tuple[Array, Array]],
    digits: Digits,
    *,
    batch_norm: bool,
    learning_rate: float,
    steps: int,
    on_evaluation: Callable[[int, float], None],
) -> TrainingRun:
    """Train `network` in place by plain gradient descent, and return what was seen on the way.

    `batches` are images (B, 784) and labels (B,), at least `steps` of them; `on_evaluation` is
    called with the step and the accuracy at each evaluation.
    """
    started = time.perf_counter()
    evaluate_every = _round_interval(max(steps / EVALUATIONS, min(EVALUATION_GAP, steps / 10)))
    record_every = _round_interval(max(steps / RECORDINGS, min(RECORDING_GAP, steps / 10)))
    evaluated_steps: list[int] = []
    accuracies: list[float] = []
    recordings: list[Recording] = []
    stream = iter(batches)

    for step in range(steps + 1):
        if step % evaluate_every == 0 or step == steps:
            network.eval()
            evaluated_steps.append(step)
            accuracies.append(accuracy(network, digits))
            network.train()
            on_evaluation(step, accuracies[-1])
        if step % record_every == 0:
            recordings.append(_record(network, digits.test_images, step))
        if step < steps:
            images, labels = next(stream)
            _, grad_logits = cross_entropy(network(images), labels)
            network.backward(grad_logits)
            network.descend(learning_rate)

    network.eval()
    return TrainingRun(
        batch_norm=batch_norm,
        learning_rate=learning_rate,
        evaluated_steps=tuple(evaluated_steps),
        accuracies=tuple(accuracies),
        recordings=tuple(recordings),
        seconds=time.perf_counter() - started,
    )


def _round_interval(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    decade = 1
    while True:
        for interval in (decade, 2 * decade, 5 * decade):
            if interval >= least:
                return interval
        decade *= 10


def _record(network: Network, images: Array, step: int) -> Recording:
    before, after = network.pre_activations(images)
    counts_before = BINS.counts(before)
    return Recording(
        step=step,
        before=counts_before,
        after=counts_before if after is before else BINS.counts(after),
        total=before.size,
        percentiles=tuple(np.percentile(after[:, UNIT], PERCENTILES).tolist()),
    )
