"""Running statistics that are not those of the data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..records import Array, Layer, Network
from .rule import Found, many, numbers, rule

#: A channel is apart if its mean differs by so many standard deviations, or its standard deviation
#: by such a factor, beyond what the number of examples explains.
SHIFT, FACTOR = 0.5, 1.5
#: Examples without which nothing is said of the population.
FEWEST_EXAMPLES = 16
#: The share of channels that must be apart.
CHANNELS = 0.05
#: Outputs are apart if they differ by as much as they vary.
GAP = 1.0
#: The share of the initial values that running statistics may still hold.
REMAINDER, MANY_UPDATES = 0.05, 100
#: Values per channel up to which it matters which variance is stored.
FEW_VALUES = 200
#: Of the new value: above, running statistics are those of the last batch or two.
LARGE_MOMENTUM = 0.9


def _has_running(layer: Layer) -> bool:
    return layer.tracks and layer.mean is not None and layer.var is not None


def is_initial(layer: Layer) -> bool:
    """Whether the running statistics are still 0 and 1."""
    if layer.mean is None or layer.var is None or layer.updates:
        return False
    return bool(layer.channels and (layer.mean == 0).all() and (layer.var == 1).all())


class Distance(NamedTuple):
    """Of running statistics from those of the data: channels apart, and the worst."""

    apart: int
    shift: float
    factor: float


def distance(layer: Layer) -> Distance | None:
    """How far the running statistics are from the population's; None if that is not known."""
    population, mean, var = layer.population, layer.mean, layer.var
    if population is None or mean is None or var is None or layer.examples < FEWEST_EXAMPLES:
        return None
    if not np.isfinite(population.mean).all() or not np.isfinite(mean).all():
        return None
    truth = population.var()
    spread = np.sqrt(truth + layer.eps)
    shift = np.abs(mean - population.mean) / spread
    factor = np.exp(np.abs(np.log((np.maximum(var, 0) + layer.eps) / (truth + layer.eps))) / 2)
    noise = 3 / np.sqrt(layer.examples)
    apart = (shift > SHIFT + noise) | (factor > FACTOR + noise)
    return Distance(int(apart.sum()), float(shift.max()), float(factor.max()))


def _is_apart(layer: Layer) -> bool:
    found = distance(layer)
    return found is not None and found.apart > CHANNELS * layer.channels


def _left(layer: Layer) -> float:
    """The share of the running statistics that is still the initial 0 and 1."""
    if layer.momentum is None or layer.updates is None:
        return 0.0
    return float((1 - layer.momentum) ** layer.updates)


def _may_hold_initial(layer: Layer, left: float) -> bool:
    """Whether no variance is smaller than what must be left of the initial 1."""
    return layer.var is not None and bool((layer.var >= 0.999 * left).all())


def _begins(layer: Layer) -> bool:
    """Whether it is in training, and its statistics have not had the time to follow."""
    return (
        bool(layer.training)
        and not layer.frozen
        and _left(layer) > REMAINDER
        and (layer.updates or 0) < MANY_UPDATES
    )


@rule(
    "BN101",
    "running statistics never updated",
    fix="train with the layer in training mode, or measure its statistics with recalibrate",
)
def never_updated(network: Network) -> Found:
    """Statistics that are still 0 and 1 where they are used, or while others have moved."""
    others = sum(bool(layer.updates) for layer in network.layers)
    for layer in network.layers:
        if not _has_running(layer) or layer.averaged or not is_initial(layer):
            continue
        if layer.training is False or layer.frozen:
            why = "and evaluation uses them" if not layer.frozen else "and they are frozen"
        elif others or network.steps:
            why = (
                f"while {many(others, 'other layer')} have been updated"
                if others
                else (f"in {many(network.steps, 'step')}")
            )
        else:
            continue  # a network that has not been trained yet
        yield (
            layer.name,
            f"its running mean is still 0 and its variance 1, {why}",
            numbers(updates=0, layers_updated=others, steps=network.steps),
        )


@rule(
    "BN102",
    "running statistics do not match the data",
    fix="recalibrate(model, data) measures them exactly",
)
def apart(network: Network) -> Found:
    """Running statistics that are not those of the layer's input in evaluation."""
    for layer in network.layers:
        found = distance(layer)
        if found is None or layer.averaged or _begins(layer) or is_initial(layer):
            continue
        if not _is_apart(layer):
            continue
        yield (
            layer.name,
            f"{many(found.apart, 'channel', layer.channels)} off; the worst mean by "
            f"{found.shift:.2g} standard deviations, the worst standard deviation by a factor of "
            f"{found.factor:.2g}",
            numbers(
                channels=found.apart,
                of=layer.channels,
                largest_shift=found.shift,
                largest_factor=found.factor,
                examples=layer.examples,
            ),
        )


@rule(
    "BN103",
    "training and evaluation give different outputs",
    fix="recalibrate(model, data); if that does not help, batches are too small or of one kind",
)
def outputs_apart(network: Network) -> Found:
    """Outputs by running statistics that have little to do with those by batch statistics."""
    if any(map(_begins, network.layers)):
        return
    if network.gap is not None and network.gap > GAP:
        yield (
            "",
            f"by running statistics the outputs differ from those by batch statistics by "
            f"{network.gap:.2g} times their spread",
            numbers(gap=network.gap),
        )


@rule(
    "BN104",
    "values that are not finite, or a negative variance",
    fix="recalibrate(model, data); batchnorm's layers do not let such a batch in",
)
def not_finite(network: Network) -> Found:
    """Values that make every output NaN."""
    for layer in network.layers:
        if layer.mean is None or layer.var is None:
            continue
        bad = ~np.isfinite(layer.mean) | ~np.isfinite(layer.var)
        negative = layer.var < 0
        if bad.any() or negative.any():
            what = "not finite" if bad.any() else "negative"
            channel = int(np.flatnonzero(bad | negative)[0])
            yield (
                layer.name,
                f"{many(int((bad | negative).sum()), 'channel', layer.channels)} {what}; channel "
                f"{channel} has mean {layer.mean[channel]:.4g}, variance {layer.var[channel]:.4g}",
                numbers(channels=int((bad | negative).sum()), first=channel),
            )
            continue
        for name, values in (("γ", layer.weight), ("β", layer.bias)):
            if values is not None and not np.isfinite(values).all():
                count = int((~np.isfinite(values)).sum())
                yield (
                    layer.name,
                    f"{name} is not finite in {many(count, 'channel')}",
                    numbers(channels=count),
                )


@rule(
    "BN105",
    "momentum too small for the steps seen",
    fix="a larger momentum, more steps, momentum=None for the plain average, or recalibrate",
)
def remainder(network: Network) -> Found:
    """Running statistics that still hold much of their initial 0 and 1."""
    for layer in network.layers:
        if not _has_running(layer) or not layer.updates or layer.momentum is None:
            continue
        if layer.averaged or (distance(layer) is not None and not _is_apart(layer)):
            continue
        left = _left(layer)
        if not _may_hold_initial(layer, left):
            continue  # they were measured
        if left > REMAINDER and (layer.training is False or layer.updates >= MANY_UPDATES):
            yield (
                layer.name,
                f"{left:.0%} of its running statistics are still the initial 0 and 1, after "
                f"{layer.updates:,} batches at momentum {layer.momentum:g}",
                numbers(left=left, updates=layer.updates, momentum=layer.momentum),
            )


@rule(
    "BN106",
    "biased running variance",
    fix="store the unbiased variance, as torch does: m2 / (n − 1); convert gives layers that do",
)
def biased(network: Network) -> Found:
    """A running variance that is updated with m2 / n, where batches are small."""
    for layer in network.layers:
        update = layer.update
        if update is None or layer.momentum is None or not 0 < layer.momentum <= 1:
            continue
        n = float(np.min(update.batch.moments.count))
        if not 2 <= n <= FEW_VALUES or update.counted != 1:
            continue
        stored = (update.var_after - (1 - layer.momentum) * update.var_before) / layer.momentum
        small, right = update.batch.moments.var(), update.batch.moments.var(ddof=1)
        tells = (right - small) * layer.momentum > 1e-5 * np.maximum(update.var_before, right)
        if not tells.any():
            continue
        where = float(np.median((right - stored)[tells] / (right - small)[tells]))
        if abs(where - 1) < 0.1:
            yield (
                layer.name,
                f"it stores the variance divided by n = {n:.0f}, which is too small by a factor of "
                f"{(n - 1) / n:.3g}, where its framework stores it divided by n − 1",
                numbers(values=n, factor=(n - 1) / n),
            )


@rule(
    "BN107",
    "running statistics in half precision",
    fix="keep them in float32: convert(model) gives layers that do, also after .half()",
)
def half(network: Network) -> Found:
    """Buffers that cannot hold small changes, or variances above 65,504."""
    for layer in network.layers:
        if _has_running(layer) and layer.dtype in ("float16", "bfloat16"):
            digits = {"float16": 11, "bfloat16": 8}[layer.dtype]
            yield (
                layer.name,
                f"they are {layer.dtype}, of {digits} bits: an update smaller than one part in "
                f"{2**digits} changes nothing",
                numbers(bits=digits),
            )


@rule(
    "BN108",
    "processes with different running statistics",
    fix="synchronize the layers (convert with sync=True), or keep broadcast_buffers=True",
)
def ranks_apart(network: Network) -> Found:
    """Running statistics that depend on which process saves them."""
    if len(network.ranks) < 2:
        return
    for layer in network.layers:
        found = [rank[layer.name] for rank in network.ranks if layer.name in rank]
        if len(found) < 2:
            continue
        means, variances = (np.stack(part) for part in zip(*found, strict=True))
        shift, factor = _range(means, variances, layer.eps)
        if shift > SHIFT or factor > FACTOR:
            yield (
                layer.name,
                f"over {len(found)} processes, a mean differs by {shift:.2g} standard deviations, "
                f"a standard deviation by a factor of {factor:.2g}",
                numbers(processes=len(found), largest_shift=shift, largest_factor=factor),
            )


def _range(means: Array, variances: Array, eps: float) -> tuple[float, float]:
    spread = np.sqrt(np.maximum(variances, 0).mean(0) + eps)
    shift = (means.max(0) - means.min(0)) / spread
    stds = np.sqrt(np.maximum(variances, 0) + eps)
    return float(shift.max()), float((stds.max(0) / stds.min(0)).max())


@rule(
    "BN109",
    "averaged weights with statistics of another model",
    fix="recalibrate the averaged model on training data: its layers see other inputs",
)
def stale(network: Network) -> Found:
    """A copy with averaged weights whose running statistics nobody has measured."""
    for layer in network.layers:
        if not layer.averaged or not _has_running(layer):
            continue
        if is_initial(layer):
            yield layer.name, "its running statistics are still 0 and 1", numbers(updates=0)
        elif (found := distance(layer)) is not None and _is_apart(layer):
            yield (
                layer.name,
                f"{many(found.apart, 'channel', layer.channels)} apart from what the averaged "
                f"weights give it; the worst mean is {found.shift:.2g} standard deviations off",
                numbers(channels=found.apart, of=layer.channels, largest_shift=found.shift),
            )


@rule(
    "BN110",
    "momentum of another framework",
    fix="momentum is the weight of the new value here: write 0.01 for Keras' 0.99",
)
def large_momentum(network: Network) -> Found:
    """Running statistics that are those of the last batch or two."""
    for layer in network.layers:
        momentum = layer.momentum
        if layer.tracks and momentum is not None and LARGE_MOMENTUM <= momentum <= 1:
            yield (
                layer.name,
                f"momentum {momentum:g} keeps {1 - momentum:.0%} of the old statistics per step",
                numbers(momentum=momentum),
            )
