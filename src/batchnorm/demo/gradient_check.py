"""The hand-written backward of a small network against central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.demo.network import Network, cross_entropy
from batchnorm.demo.results import GradientError

Array = npt.NDArray[Any]

SIZES = (8, 7, 6, 5, 4)
BATCH = 9
# The error of a central difference is about h²·|f'''| + u·|f|/h; both are small near u^(1/3).
STEP = 1e-5


def check_gradients(seed: int) -> list[GradientError]:
    """Compare every gradient of the demo's network, in float64, with central differences.

    A network of the same code and depth, only narrower, with and without batch norm. The error
    of an array is its largest difference over its largest entry, since a single entry may be 0.

    Returns
    -------
    errors : list of GradientError
        The largest error of each kind of array: weights, gammas, betas, biases, input.
    """
    errors = []
    for batch_norm in (True, False):
        rng = np.random.default_rng([seed, 3])
        network = Network(SIZES, batch_norm=batch_norm, rng=rng, weight_std=1.0, dtype=np.float64)
        x = rng.standard_normal((BATCH, SIZES[0]))
        labels = rng.integers(0, SIZES[-1], size=BATCH)
        errors += _errors_of(network, x, labels, rng, batch_norm=batch_norm)
    return errors


def _errors_of(
    network: Network, x: Array, labels: Array, rng: np.random.Generator, *, batch_norm: bool
) -> list[GradientError]:
    # Away from gamma = 1 and beta = 0, where an error in either would not show.
    for parameter in network.parameters():
        if not parameter.name.startswith("weight"):
            parameter.value += 0.5 * rng.standard_normal(parameter.value.shape)

    def loss() -> float:
        return cross_entropy(network(x), labels)[0]

    _, grad_logits = cross_entropy(network(x), labels)
    grad_x = network.backward(grad_logits, need_grad_x=True)
    assert grad_x is not None
    checked = [(p.name.rstrip("0123456789"), p.value, p.grad) for p in network.parameters()]
    checked.append(("input", x, grad_x))

    largest: dict[str, float] = {}
    for kind, value, grad in checked:
        numeric = np.empty_like(value)
        for index in np.ndindex(value.shape):
            kept = value[index]
            value[index] = kept + STEP
            above = loss()
            value[index] = kept - STEP
            below = loss()
            value[index] = kept
            numeric[index] = (above - below) / (2 * STEP)
        error = float(np.abs(numeric - grad).max() / np.abs(grad).max())
        largest[kind] = max(largest.get(kind, 0.0), error)
    return [GradientError(batch_norm, kind, error) for kind, error in largest.items()]
