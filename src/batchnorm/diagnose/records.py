"""What is known of a network's batch norms. None, or nothing, where something is not known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.moments import Moments

__all__ = ["Array", "Batch", "Layer", "Network", "Operation", "Update"]

Array = NDArray[np.float64]

#: Probabilities of recorded quantiles, and number of bars of recorded histograms.
QUANTILES = (0.0, 0.05, 0.15, 0.5, 0.85, 0.95, 1.0)
BINS = 24


@dataclass(frozen=True)
class Batch:
    """What one forward of a layer in training normalized by.

    Attributes
    ----------
    moments
        Of the input, as the layer saw it: `count` values of each channel.
    examples
        That share the statistics: of one process, and of one group.
    call
        Number of the call, from 0, if a forward of the network calls the layer more than once.
    """

    moments: Moments
    examples: int
    call: int = 0


@dataclass(frozen=True)
class Update:
    """How one training forward, and the backward pass after it, changed the running statistics.

    Attributes
    ----------
    batch
        What the layer normalized by.
    var_before, var_after
        The running variance.
    counted, counted_in_backward
        By how much `num_batches_tracked` grew during the forward, and during the backward pass.
    """

    batch: Batch
    var_before: Array
    var_after: Array
    counted: int
    counted_in_backward: int = 0


@dataclass(kw_only=True)
class Layer:
    """One batch norm.

    Attributes
    ----------
    name, kind, channels
        Its path in the network, its class, and C.
    eps, momentum
        Momentum is the weight of the new value, None for the cumulative average.
    training
        Whether it normalizes by the batch.
    frozen
        Whether its statistics are constant because somebody has asked for that.
    tracks
        Whether it has running statistics.
    exact
        Whether it keeps its digits at any mean.
    synchronized
        Whether processes share their statistics.
    trainable
        Whether γ or β is trained; None without either.
    dtype
        Of the running statistics.
    mean, var, weight, bias : (C,)
        Running statistics, γ and β.
    updates
        Number of batches that the running statistics have seen.
    averaged
        Whether it belongs to a copy with averaged weights.
    population
        Moments of the input in evaluation, over the data.
    examples
        In the data.
    batches
        Forwards in training mode.
    update
        Of one training step.
    highest : (C,)
        The largest output of each channel by batch statistics, in front of a ReLU.
    decay
        Weight decay of γ and β.
    """

    name: str
    kind: str = "BatchNorm"
    channels: int = 0
    eps: float = 1e-5
    momentum: float | None = 0.1
    training: bool | None = None
    frozen: bool = False
    tracks: bool = True
    exact: bool = False
    synchronized: bool = False
    trainable: bool | None = None
    dtype: str = "float32"
    mean: Array | None = None
    var: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    updates: int | None = None
    averaged: bool = False
    population: Moments | None = None
    examples: int = 0
    batches: Sequence[Batch] = ()
    update: Update | None = None
    highest: Array | None = None
    decay: float = 0.0


@dataclass(frozen=True)
class Operation:
    """One operation of a network, in the order in which they run.

    Attributes
    ----------
    kind
        "batch norm", "convolution", "linear", "activation", "dropout", "pool", "identity" (the same
        values, perhaps in another type), "reshape", "add", "concat", "input", "output" or
        "other".
    name
        The path of the layer, or the name of the function.
    inputs
        Numbers of the operations whose results it reads.
    bias
        Whether it adds a bias of its own.
    on_last_axis
        Whether its features are, or may be, on the last axis of more than two.
    """

    kind: str
    name: str = ""
    inputs: tuple[int, ...] = ()
    bias: bool = False
    on_last_axis: bool = False


@dataclass(kw_only=True)
class Network:
    """What is known of a network.

    Attributes
    ----------
    layers
        Its batch norms, in their order.
    operations
        How they are wired.
    training
        The mode of the network as a whole.
    processes
        That train it together.
    remainder
        Examples in the last batch of an epoch, if it is smaller than the others and not dropped.
    single_class, label_batches, classes
        Batches whose labels are all the same, of how many, and the number of different labels.
    gap
        Root mean square difference of the outputs by running and by batch statistics, over the
        spread of the outputs.
    refused
        Batches that training refuses, for a channel has one value in them.
    ranks
        For each process, running mean and variance of each layer by name.
    steps
        Training steps that a recording covers.
    exported
        Whether it is a file for inference.
    """

    layers: list[Layer] = field(default_factory=list)
    operations: Sequence[Operation] = ()
    training: bool | None = None
    processes: int = 1
    remainder: int | None = None
    single_class: int = 0
    label_batches: int = 0
    classes: int = 0
    gap: float | None = None
    refused: int = 0
    ranks: Sequence[dict[str, tuple[Array, Array]]] = ()
    steps: int = 0
    exported: bool = False

    def layer(self, name: str) -> Layer | None:
        """The layer of this name."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def normalizations(self) -> Iterator[tuple[int, Operation]]:
        """The batch norms among the operations, with their numbers."""
        for number, operation in enumerate(self.operations):
            if operation.kind == "batch norm":
                yield number, operation

    def readers(self) -> list[list[int]]:
        """For each operation, the numbers of those that read its result."""
        found: list[list[int]] = [[] for _ in self.operations]
        for number, operation in enumerate(self.operations):
            for source in operation.inputs:
                found[source].append(number)
        return found

    def before(self, number: int, *through: str) -> Operation | None:
        """The operation whose result this one reads, past those of the kinds `through`."""
        while True:
            inputs = self.operations[number].inputs
            if len(inputs) != 1:
                return None
            number = inputs[0]
            if self.operations[number].kind not in through:
                return self.operations[number]


def array(values: Any) -> Array | None:
    """Values of any framework as float64, or None."""
    return None if values is None else np.asarray(values, dtype=np.float64)
