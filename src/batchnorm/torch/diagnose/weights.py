"""Records of the batch norms in a file of weights."""

from __future__ import annotations

from pathlib import Path

from ...diagnose.records import Network
from ...diagnose.weights import from_weights
from ..targets import load_weights
from .records import numpy_of

__all__ = ["network_of_weights"]


def network_of_weights(path: Path) -> Network:
    """Records of the batch norms in a file of weights."""
    weights = load_weights(path)
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in weights.items()}
    arrays = {name: numpy_of(t) for name, t in weights.items() if _matters(name)}
    return from_weights(arrays, str(path), dtypes)


def _matters(name: str) -> bool:
    return name.rpartition(".")[2] in (
        "running_mean", "running_var", "weight", "bias", "num_batches_tracked",
    )  # fmt: skip
