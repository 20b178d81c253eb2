"""Records of the batch norms in a file of weights, by the names of its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from batchnorm.errors import ArgumentError

from .records import Layer, Network, array

__all__ = ["from_weights"]


def from_weights(weights: Mapping[str, Any], name: str, dtypes: Mapping[str, str]) -> Network:
    """Records of each pair of ``running_mean`` and ``running_var``.

    What a file does not say, such as ε and momentum, is taken for torch's default, or not looked
    at.

    Parameters
    ----------
    weights
        Arrays by name, as in a state dict.
    name
        Of the file, for the error.
    dtypes
        Of the arrays, as far as they differ from the files'.

    Raises
    ------
    ArgumentError
        There is none.
    """
    layers = []
    for key in weights:
        path, _, last = key.rpartition(".")
        if last != "running_mean":
            continue
        dot = f"{path}." if path else ""
        mean, var = array(weights[key]), array(weights.get(f"{dot}running_var"))
        if (
            mean is None
            or var is None
            or mean.ndim != 1
            or not mean.size
            or mean.shape != var.shape
        ):
            continue
        updates = weights.get(f"{dot}num_batches_tracked")
        layers.append(
            Layer(
                name=path,
                channels=len(mean),
                momentum=None,
                training=False,
                dtype=dtypes.get(key, "float32"),
                mean=mean,
                var=var,
                weight=array(weights.get(f"{dot}weight")),
                bias=array(weights.get(f"{dot}bias")),
                updates=None if updates is None else int(np.asarray(updates)),
            )
        )
    if not layers:
        some = ", ".join(list(weights)[:3]) or "nothing"
        raise ArgumentError(
            f"{name}: must hold batch norms, that is arrays named *.running_mean and "
            f"*.running_var, but holds {some}, ... Name the file of a model that has some."
        )
    return Network(layers=layers)
