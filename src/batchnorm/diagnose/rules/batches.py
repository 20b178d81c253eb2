"""Batches that are too small, or tell too much."""

from __future__ import annotations

import statistics

import numpy as np

from ..records import Network
from .rule import Found, numbers, rule

#: Values per channel, and examples, that statistics need at least.
VALUES, EXAMPLES = 16, 4
#: The share of batches with one class alone.
ALONE = 0.5


@rule(
    "BN301",
    "too few examples in a batch",
    fix="larger batches; accumulate, or synchronize over processes; or freeze the statistics",
)
def small(network: Network) -> Found:
    """Layers that normalize by a handful of values."""
    if network.refused and network.remainder != 1:  # which has a code of its own
        yield (
            "",
            f"batches with one value per channel, which training refuses: {network.refused}",
            numbers(batches=network.refused),
        )
    for layer in network.layers:
        if layer.frozen or not layer.batches:
            continue
        examples = statistics.median(batch.examples for batch in layer.batches)
        values = statistics.median(float(np.min(batch.moments.count)) for batch in layer.batches)
        if values < VALUES or examples < EXAMPLES:
            yield (
                layer.name,
                f"a batch gives it {values:g} values per channel, of {examples:g} examples; their "
                f"mean is off by {1 / np.sqrt(max(examples, 1)):.0%} of a standard deviation",
                numbers(examples=examples, values=values),
            )


@rule(
    "BN302",
    "a last batch of one example",
    fix='drop_last=True in the loader, or convert(model, on_single="population")',
)
def last(network: Network) -> Found:
    """The batch at the end of an epoch that fails, or normalizes an example by itself."""
    if network.remainder == 1 and any(not layer.frozen for layer in network.layers):
        yield "", "the last batch of each epoch has one example", numbers(examples=1)


@rule(
    "BN303",
    "batches of one class",
    fix="shuffle, so that a batch is a random choice of the data",
)
def one_class(network: Network) -> Found:
    """Batches whose statistics tell the label."""
    count, total = network.single_class, network.label_batches
    if network.classes > 1 and total > 1 and count >= ALONE * total:
        yield (
            "",
            f"{count} of {total} batches contain a single class of {network.classes}, so their "
            "statistics reveal it",
            numbers(batches=count, of=total, classes=network.classes),
        )
