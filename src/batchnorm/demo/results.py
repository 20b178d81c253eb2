"""What a run of the demo returns: plain data, from which the tables and the page are made."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PERCENTILES = (15, 50, 85)


@dataclass(frozen=True)
class Recording:
    """What enters and leaves one layer's batch norm at one moment of training.

    Measured on the 1,000 test digits as one batch. Without batch norm, both are the same.

    Attributes
    ----------
    before, after : (bins,)
        How many pre-activations of the last hidden layer, all units pooled, fall into each
        bin of `HistogramBins`, before and after normalization.
    total
        Number of pooled values, those outside every bin included.
    percentiles : (3,)
        15th, 50th and 85th percentile of what one unit's sigmoid receives.
    """

    step: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    total: int
    percentiles: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Distance of the 15th and 85th percentile."""
        return self.percentiles[2] - self.percentiles[0]


@dataclass(frozen=True)
class TrainingRun:
    """One network trained at one learning rate: its accuracy on the test digits, and recordings."""

    batch_norm: bool
    learning_rate: float
    evaluated_steps: tuple[int, ...]
    accuracies: tuple[float, ...]
    recordings: tuple[Recording, ...]
    seconds: float

    @property
    def name(self) -> str:
        """Such as "with BN, rate 0.1"."""
        return run_name(self.batch_norm, self.learning_rate)

    def steps_to(self, accuracy: float) -> int | None:
        """Return the first evaluated step that reached `accuracy`; None where none did."""
        pairs = zip(self.evaluated_steps, self.accuracies, strict=True)
        return next((step for step, reached in pairs if reached >= accuracy), None)

    def final_spread(self) -> float:
        """Return the spread at the last recording."""
        return self.recordings[-1].spread

    def spread_ratio(self) -> float:
        """Return the widest spread during training over the narrowest."""
        spreads = [recording.spread for recording in self.recordings]
        return max(spreads) / min(spreads) if min(spreads) > 0 else float("inf")

    def median_travel(self) -> float:
        """Return how far the median moved in all, from recording to recording."""
        medians = [recording.percentiles[1] for recording in self.recordings]
        return sum(abs(b - a) for a, b in pairwise(medians))


def run_name(batch_norm: bool, learning_rate: float) -> str:
    """Return a name such as "with BN, rate 0.1"."""
    return f"{'with' if batch_norm else 'without'} BN, rate {learning_rate:g}"


@dataclass(frozen=True)
class InferenceMeasurement:
    """A trained network with batch norm, evaluated in one of its forms at test time.

    Attributes
    ----------
    form
        "running averages", "population" or "folded".
    largest_difference
        Of any logit of any test digit from the form "population", absolute.
    seconds_per_1000
        For a forward pass of 1,000 digits, the median of several.
    """

    learning_rate: float
    form: str
    accuracy: float
    largest_difference: float
    seconds_per_1000: float


@dataclass(frozen=True)
class GradientError:
    """Largest difference of a gradient from central differences, relative to its size."""

    batch_norm: bool
    kind: str
    relative_error: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that a run of the demo measured, up to the writing of `page`."""

    page: Path
    seed: int
    steps: int
    batch_size: int
    sizes: tuple[int, ...]
    training_digits: int
    test_digits: int
    runs: tuple[TrainingRun, ...]
    inference: tuple[InferenceMeasurement, ...]
    gradient_errors: tuple[GradientError, ...]
    seconds: float

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rates of the runs, in rising order."""
        return tuple(sorted({run.learning_rate for run in self.runs}))

    @property
    def largest_gradient_error(self) -> float:
        """The largest relative error of any gradient that was checked."""
        return max(error.relative_error for error in self.gradient_errors)

    def run_of(self, *, batch_norm: bool, learning_rate: float) -> TrainingRun:
        """Return the run of that network at that learning rate."""
        wanted = batch_norm, learning_rate
        return next(r for r in self.runs if (r.batch_norm, r.learning_rate) == wanted)
