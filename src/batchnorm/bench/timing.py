"""Timing in interleaved rounds, and comparison within rounds.

A machine's speed drifts while a benchmark runs, with temperature, neighbours and the pages that an
array happens to get. Whatever two providers are compared by is therefore taken from the same
round: a ratio is the median over rounds of the ratio within a round, never a ratio of two medians.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from batchnorm.bench.memory import minor_faults
from batchnorm.bench.worker import WorkerError

Clock: TypeAlias = Callable[[], int]


class Sample(NamedTuple):
    """Seconds and minor page faults of one call."""

    seconds: float
    faults: float = math.nan


def sample(
    run: Callable[[], object],
    *,
    repeats: int = 1,
    untimed: int = 0,
    clock: Clock = time.perf_counter_ns,
) -> Sample:
    """Time a call as the mean of `repeats`, after `untimed` others, without garbage collection.

    With calls before it that are not timed, a call finds caches, branch predictors and thread pools
    as it leaves them itself, which is how its user finds them, and not as another provider does.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(untimed):
            run()
        faults = minor_faults()
        start = clock()
        for _ in range(repeats):
            run()
        elapsed = clock() - start
        faults = minor_faults() - faults
    finally:
        if collecting:
            gc.enable()
    return Sample(elapsed * 1e-9 / repeats, faults / repeats)


def calls_per_sample(
    run: Callable[[], object], *, min_sample_s: float, clock: Clock = time.perf_counter_ns
) -> int:
    """How often to repeat a call so that one sample is not lost in the clock's noise."""
    run()  # the first may pay for memory that the others find mapped
    fastest = math.inf
    for _ in range(3):
        fastest = min(fastest, sample(run, clock=clock).seconds)
        if fastest > min_sample_s:
            return 1
    return max(1, math.ceil(min_sample_s / max(fastest, 1e-9)))


def interleave(
    takes: Mapping[str, Callable[[], Sample]],
    *,
    min_rounds: int,
    max_rounds: int | None = None,
    budget_s: float = 0.0,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    started: Callable[[int], None] = lambda number: None,
    failed: Callable[[str, int, WorkerError], None] | None = None,
) -> dict[str, list[Sample]]:
    """Take one sample of each name in every round, in an order drawn anew for each round.

    Parameters
    ----------
    takes
        Name to what takes a sample: `sample` of a call, or a request to a worker process.
    min_rounds, max_rounds, budget_s
        Ends with the first round after both `min_rounds` and `budget_s`, or after `max_rounds`.
    started
        Told the number of each round, from 1.
    failed
        Told of a worker that failed, and in which round; the others go on without it. None raises.

    Returns
    -------
    dict
        Name to its samples, of those that did not fail; the k-th of each is from the k-th round.
    """
    names, samples = list(takes), {name: list[Sample]() for name in takes}
    shuffle, begin, number = random.Random(seed), clock(), 0
    while names and (number < min_rounds or (clock() - begin) * 1e-9 < budget_s):
        if number == max_rounds:
            break
        number += 1
        started(number)
        shuffle.shuffle(names)
        for name in tuple(names):
            try:
                samples[name].append(takes[name]())
            except WorkerError as error:
                if failed is None:
                    raise
                failed(name, number, error)
                names.remove(name)
                del samples[name]
    return samples


def ratio_of(times: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over rounds of the ratio of two samples of the same round."""
    return float(np.median(np.divide(times, baseline)))


def ratio_interval(
    times: Sequence[float], baseline: Sequence[float], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of `ratio_of`, by the percentile bootstrap over rounds."""
    ratios = np.divide(times, baseline)
    drawn = np.random.default_rng(seed).choice(ratios, (draws, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)
