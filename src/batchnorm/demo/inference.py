"""One trained network at test time: running averages, population statistics, folded."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.bench.timing import interleave, sample
from batchnorm.demo.network import Network
from batchnorm.demo.results import InferenceMeasurement
from batchnorm.demo.training import accuracy
from batchnorm.digits import Digits

Array = npt.NDArray[Any]

REPEATS = 15


def measure_inference(
    network: Network, population: Iterable[Array], digits: Digits, *, learning_rate: float
) -> list[InferenceMeasurement]:
    """Evaluate a trained network with batch norm in the three forms it can take at test time.

    Running averages are over the latest few batches, each as earlier weights saw it; folding
    is algebra, and may differ from what it folds by rounding alone. `population` is all that
    training draws its batches from. The shifts belong to it: the plain images have other
    statistics, and would be no reference for running averages over shifted ones.
    """
    network.eval()
    reference = network.with_population_statistics(population)
    forms = {"running averages": network, "population": reference, "folded": reference.folded()}
    exact = reference(digits.test_images)
    runs = {form: partial(candidate, digits.test_images) for form, candidate in forms.items()}
    samples = interleave(
        {form: partial(sample, run) for form, run in runs.items()}, min_rounds=REPEATS
    )
    return [
        InferenceMeasurement(
            learning_rate=learning_rate,
            form=form,
            accuracy=accuracy(candidate, digits),
            largest_difference=float(np.abs(runs[form]() - exact).max()),
            seconds_per_1000=1000 / len(exact) * statistics.median(s for s, _ in samples[form]),
        )
        for form, candidate in forms.items()
    ]
