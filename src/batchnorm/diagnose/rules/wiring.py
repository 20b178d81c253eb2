"""How layers are connected, set and trained."""

from __future__ import annotations

import numpy as np

from batchnorm.moments import Moments

from ..records import Network
from .rule import Found, many, numbers, rule

#: What passes values on without changing their distribution.
PASSIVE = ("identity", "reshape")
#: What lies between a dropout and the batch norm that it disturbs.
BETWEEN = ("identity", "reshape", "activation", "convolution", "linear", "pool")
#: Inputs of one layer are different if their means are so many standard deviations apart.
DIFFERENT = 1.0
#: Examples per process from which statistics need not be synchronized.
ENOUGH = 16


@rule(
    "BN401",
    "bias before a batch norm",
    fix="bias=False in the layer before; batch norm has β",
)
def bias(network: Network) -> Found:
    """A bias that the batch norm behind removes."""
    for number, operation in network.normalizations():
        layer = network.layer(operation.name)
        if layer is not None and (layer.frozen or layer.trainable is False):
            continue  # with constant statistics, a bias does something
        source = _source(network, number, "identity")  # a reshape may move the channels
        if source is None:
            continue
        before = network.operations[source]
        alone = len(_real_readers(network, source)) == 1
        if before.kind in ("convolution", "linear") and before.bias and alone:
            yield (
                operation.name,
                f"the bias of {before.name!r} has no effect: batch norm subtracts it",
                {},
            )


def _source(network: Network, number: int, *through: str) -> int | None:
    """The operation that makes the input, past the kinds `through`."""
    while True:
        inputs = network.operations[number].inputs
        if len(inputs) != 1:
            return None
        number = inputs[0]
        if network.operations[number].kind not in through:
            return number


def _real_readers(network: Network, number: int) -> list[int]:
    """The operations that read a result, past reshapes."""
    readers, found = network.readers(), []
    queue = [number]
    while queue:
        for reader in readers[queue.pop()]:
            if network.operations[reader].kind in PASSIVE:
                queue.append(reader)
            else:
                found.append(reader)
    return found


@rule(
    "BN402",
    "dropout before a batch norm",
    fix="put dropout after the last batch norm; in a trained network, recalibrate",
)
def dropout(network: Network) -> Found:
    """Dropout, which changes the variance in training alone, in front of a batch norm."""
    for number, operation in network.normalizations():
        before = network.before(number, *BETWEEN)
        if before is not None and before.kind == "dropout":
            yield (
                operation.name,
                f"{before.name!r} makes the variance of its input larger in training than in "
                "evaluation",
                {},
            )


@rule(
    "BN403",
    "batch norm after the activation, unlike the rest",
    fix="put it where the others are, between the linear layer and the activation",
)
def after_activation(network: Network) -> Found:
    """One layer in another place than most."""
    found: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for number, operation in network.normalizations():
        if any(network.operations[k].kind == "add" for k in _real_readers(network, number)):
            continue  # a branch: its input is that of the block
        before = network.before(number, *PASSIVE)
        if before is not None and before.kind in ("activation", "convolution", "linear"):
            found[before.kind == "activation"].append((operation.name, before.name))
    behind, others = found[True], len(found[False])
    if others >= 2 and others >= 3 * len(behind):
        for name, activation in behind:
            yield (
                name,
                f"it comes after {activation!r}, while {many(others, 'other layer')} come before",
                numbers(others=others),
            )


@rule("BN404", "two batch norms in a row", fix="remove one of the two")
def twice(network: Network) -> Found:
    """A batch norm that normalizes what is normalized."""
    for number, operation in network.normalizations():
        before = network.before(number, *PASSIVE)
        if before is not None and before.kind == "batch norm":
            yield operation.name, f"its input comes from {before.name!r}, which normalizes it", {}


@rule(
    "BN405",
    "one layer for different distributions",
    fix="a layer of its own for each of them, or one call on both together",
)
def shared(network: Network) -> Found:
    """A layer that is called several times, with inputs that are unlike."""
    for layer in network.layers:
        calls: dict[int, list[Moments]] = {}
        for batch in layer.batches:
            calls.setdefault(batch.call, []).append(batch.moments)
        if len(calls) < 2:
            continue
        merged = [Moments.merge(moments) for moments in calls.values()]
        means = np.stack([moments.mean for moments in merged])
        stds = np.sqrt(np.stack([moments.var() for moments in merged]) + layer.eps)
        shift = float(np.median((means.max(0) - means.min(0)) / stds.mean(0)))
        factor = float(np.median(stds.max(0) / stds.min(0)))
        if shift > DIFFERENT or factor > 2 * DIFFERENT:
            yield (
                layer.name,
                f"it is called {len(calls)} times: means are {shift:.2g} spreads apart, "
                f"standard deviations differ by a factor of {factor:.2g} (medians over channels)",
                numbers(calls=len(calls), shift=shift, factor=factor),
            )


@rule(
    "BN406",
    "statistics updated twice in a step",
    fix="convert(model): batchnorm's layers know a recomputed forward",
)
def recomputed(network: Network) -> Found:
    """Activation checkpointing, which runs a forward again in the backward pass."""
    for layer in network.layers:
        if layer.update is not None and layer.update.counted_in_backward:
            yield (
                layer.name,
                "the backward pass updates the running statistics once more",
                numbers(forward=layer.update.counted, backward=layer.update.counted_in_backward),
            )


@rule(
    "BN407",
    "statistics that move while the parameters are frozen",
    fix="freeze(model) keeps statistics constant in every mode",
)
def moving(network: Network) -> Found:
    """A layer in training mode whose γ and β are not trained."""
    for layer in network.layers:
        if layer.training and not layer.frozen and layer.tracks and layer.trainable is False:
            yield (
                layer.name,
                "γ and β are not trained, but its statistics move with each batch",
                {},
            )


@rule(
    "BN408",
    "a layer in evaluation mode in a network that trains",
    fix="freeze(model, affine=...) makes it permanent: model.train() undoes .eval() on a layer",
)
def standing(network: Network) -> Found:
    """A layer that was put into evaluation mode by hand, with parameters that are trained."""
    for layer in network.layers:
        if (
            network.training
            and layer.training is False
            and not layer.frozen
            and layer.trainable is True
        ):
            yield (
                layer.name,
                "it is in evaluation mode while the network is in training mode and γ and β are "
                "trained; the next model.train() changes that",
                {},
            )


@rule(
    "BN409",
    "processes that do not share statistics",
    fix="convert(model, sync=True), before DistributedDataParallel",
)
def unsynchronized(network: Network) -> Found:
    """Layers whose statistics are those of a small part of the batch."""
    if network.processes < 2:
        return
    for layer in network.layers:
        if layer.synchronized or layer.frozen or not layer.training:
            continue
        examples = min((batch.examples for batch in layer.batches), default=0)
        if examples < ENOUGH:
            seen = f"of {examples} examples each" if examples else "on a part of the batch each"
            yield (
                layer.name,
                f"{network.processes} processes normalize by their own statistics, {seen}",
                numbers(processes=network.processes, examples=examples),
            )


@rule(
    "BN410",
    "weight decay on γ and β",
    fix="parameter_groups(model, weight_decay) for the optimizer",
)
def decay(network: Network) -> Found:
    """Scales that are pulled towards zero."""
    for layer in network.layers:
        if layer.decay and layer.trainable:
            yield (
                layer.name,
                f"weight decay of {layer.decay:g} pulls γ towards 0",
                numbers(weight_decay=layer.decay),
            )


@rule(
    "BN411",
    "no running statistics in evaluation",
    fix="track_running_stats=True, then train or recalibrate",
)
def untracked(network: Network) -> Found:
    """Outputs that depend on which examples come together."""
    for layer in network.layers:
        if not layer.tracks and layer.training is False:
            yield (
                layer.name,
                "it has none, so an answer depends on the other examples of its batch",
                {},
            )
