"""Channels that carry nothing, or few digits."""

from __future__ import annotations

import numpy as np

from batchnorm.moments import Moments

from ..records import Array, Layer, Network
from .rule import Found, many, numbers, rule

#: A channel whose variance is this much smaller than ε is constant.
CONSTANT = 1e-3
#: A dead channel has a β so many γ below zero.
DEAD = 3.0
#: γ so small that the channel contributes nothing.
TINY = 1e-5
#: A layer whose γ began at zero has others by now if most are this large, or after so many updates.
USUAL, MANY_UPDATES = 0.1, 100
#: |mean| / std at which float32 by torch's way has three digits left.
FAR = 1000.0


def seen(layer: Layer) -> tuple[Array, Array] | None:
    """Mean and variance of the input.

    By batch statistics, for a layer behind wrong running statistics gets inputs of any size; of
    evaluation, where the layer does not use those of batches; or as the running statistics say.
    """
    if layer.batches and not layer.frozen:
        moments = Moments.merge(batch.moments for batch in layer.batches)
    elif layer.population is not None and layer.examples > 1:
        moments = layer.population
    elif layer.tracks and layer.mean is not None and layer.var is not None:
        return layer.mean, layer.var
    else:
        return None
    return moments.mean, moments.var()


@rule(
    "BN201",
    "dead channels",
    fix="prune them, or look for a learning rate that has thrown β far below zero",
)
def dead(network: Network) -> Found:
    """Channels whose output is below zero for all data, in front of a ReLU."""
    for layer in network.layers:
        if layer.highest is None or layer.weight is None or layer.bias is None:
            continue
        # Units that are only rare are above zero sometimes, with more examples.
        far_below = layer.bias < -DEAD * np.abs(layer.weight)
        count = int(((layer.highest < 0) & far_below).sum())
        if count:
            yield (
                layer.name,
                f"{many(count, 'channel', layer.channels)} never above zero, so the ReLU "
                f"after it outputs only zeros, on {many(layer.examples, 'example')}",
                numbers(channels=count, of=layer.channels, examples=layer.examples),
            )


@rule(
    "BN202",
    "constant channels",
    fix="remove the channel, or find out why its input never changes",
)
def constant(network: Network) -> Found:
    """Channels whose input does not vary: their output is β."""
    for layer in network.layers:
        found = seen(layer)
        if found is None:
            continue
        var = found[1]
        count = int((var < CONSTANT * layer.eps).sum())
        if count:
            yield (
                layer.name,
                f"{many(count, 'channel', layer.channels)} constant: the output is always β",
                numbers(channels=count, of=layer.channels, smallest=float(np.min(var))),
            )


@rule(
    "BN203",
    "variance below ε",
    fix="scale the input of the layer, or choose a smaller ε",
)
def dominated(network: Network) -> Found:
    """Channels that ε normalizes rather than their variance."""
    for layer in network.layers:
        found = seen(layer)
        if found is None:
            continue
        var = found[1]
        small = (var < layer.eps) & (var >= CONSTANT * layer.eps)
        if small.any():
            worst = float(var[small].min())
            yield (
                layer.name,
                f"{many(int(small.sum()), 'channel', layer.channels)} with a variance below "
                f"ε = {layer.eps:g}; the smallest is {worst:.2g}, and the output has a standard "
                f"deviation of {np.sqrt(worst / (worst + layer.eps)):.2g} instead of 1",
                numbers(
                    channels=int(small.sum()), of=layer.channels, smallest=worst, eps=layer.eps
                ),
            )


@rule(
    "BN204",
    "γ of zero",
    fix="prune these channels; if they should learn, exclude γ from weight decay",
)
def zero_weight(network: Network) -> Found:
    """Channels that contribute nothing but β."""
    for layer in network.layers:
        if layer.weight is None:
            continue
        size = np.abs(layer.weight)
        count = int((size < TINY).sum())
        # In residual blocks all begin at zero.
        grown = float(np.median(size)) > USUAL or (layer.updates or 0) >= MANY_UPDATES
        if count and grown:
            yield (
                layer.name,
                f"{many(count, 'channel', layer.channels)} with |γ| below {TINY:g}",
                numbers(channels=count, of=layer.channels, smallest=float(size.min())),
            )


@rule(
    "BN205",
    "all γ negative",
    fix="look at where the weights come from: training alone hardly turns every sign",
)
def negative_weight(network: Network) -> Found:
    """A layer that turns the sign of every channel."""
    for layer in network.layers:
        if layer.weight is not None and layer.channels > 1 and (layer.weight < -TINY).all():
            yield (
                layer.name,
                f"all {layer.channels} γ are negative, from {layer.weight.min():.2g} to "
                f"{layer.weight.max():.2g}",
                numbers(channels=layer.channels, largest=float(layer.weight.max())),
            )


@rule(
    "BN206",
    "mean far from zero beside the spread",
    fix="convert(model): batchnorm's layers keep their digits; or subtract a constant before",
)
def far(network: Network) -> Found:
    """Channels in which a plain float32 computation loses digits."""
    for layer in network.layers:
        found = seen(layer)
        if layer.exact or found is None:
            continue
        mean, var = found
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(var > CONSTANT * layer.eps, np.abs(mean) / np.sqrt(var), 0.0)
        worst = float(np.nanmax(ratio, initial=0.0))
        if worst >= FAR:
            lost = float(np.log10(worst))
            yield (
                layer.name,
                f"in {many(int((ratio >= FAR).sum()), 'channel', layer.channels)} |mean| is up to "
                f"{worst:,.0f} standard deviations: {lost:.1f} of 7 digits are lost",
                numbers(
                    channels=int((ratio >= FAR).sum()), of=layer.channels, ratio=worst, lost=lost
                ),
            )
