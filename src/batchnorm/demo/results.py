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
    step : scalar
    before, after : (bins,)
        How many pre-activations of the last hidden layer, all units pooled, fall into each
        bin of `HistogramBins`, before and after normalization.
    total : scalar
        Number of pooled values, those outside every bin included.
    percentiles : (3,)
        15th, 50th and 85th percentile of what one unit's sigmoid receives.
    """

    step: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    total: int
    percentiles: tuple[float, ...]


def run_name(batch_norm: bool, learning_rate: float) -> str:
    """Return a name such as "with BN, rate 0.1"."""
    return f"{'with' if batch_norm else 'without'} BN, rate {learning_rate:g}"


@dataclass(frozen=True)
class TrainingRun:
    """One network trained at one learning rate.

    Attributes
    ----------
    evaluated_steps, accuracies : (evaluations,)
        Accuracy on the test digits after so many steps, in evaluation mode.
    recordings : (recordings,)
    seconds : scalar
        Duration of the run, its evaluations included.
    """

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
        for step, reached in zip(self.evaluated_steps, self.accuracies, strict=True):
            if reached >= accuracy:
                return step
        return None

    def final_spread(self) -> float:
        """Return the distance of the 15th and 85th percentile at the last recording."""
        low, _, high = self.recordings[-1].percentiles
        return high - low

    def spread_ratio(self) -> float:
        """Return the widest such distance during training over the narrowest."""
        spreads = [r.percentiles[2] - r.percentiles[0] for r in self.recordings]
        return max(spreads) / min(spreads) if min(spreads) > 0 else float("inf")

    def median_travel(self) -> float:
        """Return how far the median moved in all, from recording to recording."""
        medians = [r.percentiles[1] for r in self.recordings]
        return sum(abs(b - a) for a, b in pairwise(medians))


@dataclass(frozen=True)
class InferenceMeasurement:
    """A trained network with batch norm, evaluated in one of its forms at test time.

    Attributes
    ----------
    form : str
        "running averages", "population" or "folded".
    largest_difference : scalar
        Largest absolute difference of any logit of any test digit from the form
        "population".
    seconds_per_1000 : scalar
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
    """Everything that a run of the demo measured.

    Attributes
    ----------
    page : pathlib.Path
        The HTML page that was written.
    seconds : scalar
        Of the whole run, up to the writing of the page.
    """

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
        for run in self.runs:
            if run.batch_norm == batch_norm and run.learning_rate == learning_rate:
                return run
        raise KeyError((batch_norm, learning_rate))
