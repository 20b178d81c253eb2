"""How it is measured: checked first, then timed in interleaved rounds, and compared in pairs.

A machine's speed drifts while a benchmark runs, with temperature, neighbours and the pages an
array happens to get. Whatever two providers are compared by is therefore taken from the same
round: a ratio is the median over rounds of the ratio within a round, never a ratio of two medians.
"""

import contextlib
import ctypes
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from batchnorm.bench.cases import (
    ACCURACY_SHAPE,
    OFFSETS,
    OPS,
    SHAPES,
    Case,
    Inputs,
    Op,
    exact,
    largest_error,
    layouts_of,
    make_cases,
    make_inputs,
)
from batchnorm.bench.environment import (
    busy_seconds_of_others,
    describe,
    limited_threads,
    resolve_threads,
    usable_cpus,
)
from batchnorm.bench.providers import PROVIDERS, Call, Provider, UnavailableError, copies

try:
    import resource
except ImportError:  # Windows
    _resource: Any = None
else:
    _resource = resource

Clock: TypeAlias = Callable[[], int]
Status: TypeAlias = Literal["ok", "wrong", "failed"]

#: What an answer may be off by, at an offset of 0, before its provider is not worth timing. It is
#: to catch mistakes, not inaccuracy: float32 sums over 2e5 values of a channel that is not
#: contiguous, as the textbook takes them, leave y off by 2e-4.
TOLERANCE = 1e-3

#: The share of the processors that other programs may take before a run says so.
QUIET = 0.05

COPY = "copy"
BASELINE = "torch"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how long.

    Attributes
    ----------
    shapes, ops, providers
        Every operation on every shape in every layout by every provider.
    offsets
        The means of the inputs whose outputs are compared with the exact ones; none for no
        comparison.
    seed
        Of the inputs.
    threads
        For every provider; None for as many as there are processors.
    min_rounds, budget_s
        A case ends with the first round that satisfies both, or with `max_rounds`.
    min_sample_s
        A call shorter than this is repeated within one sample.
    """

    shapes: tuple[tuple[int, ...], ...] = SHAPES
    ops: tuple[Op, ...] = OPS
    providers: tuple[Provider, ...] = PROVIDERS
    offsets: tuple[float, ...] = OFFSETS
    accuracy_shape: tuple[int, ...] = ACCURACY_SHAPE
    seed: int = 0
    threads: int | None = None
    min_rounds: int = 9
    max_rounds: int = 1000
    budget_s: float = 2.0
    min_sample_s: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One provider on one case; a line of ``speed.csv``.

    Attributes
    ----------
    status
        ``ok``, ``wrong`` (the answer was too far off, so it was not timed) or ``failed``.
    detail
        Why it is not ``ok``; for the copy, which copy was the fastest.
    rounds, calls_per_sample
        Number of samples, and calls that one of them is the mean of.
    p20_ms, p50_ms, p80_ms
        Percentiles over the samples of the time of one call.
    speedup_vs_torch
        PyTorch eager's time over this one's: median of the ratios within a round.
    copies
        This time over that of a plain copy of x: median of the ratios within a round.
    floor_bytes, floor_copies
        What has to be moved at the least, and the same in copies of x.
    times_floor
        `copies` over `floor_copies`: 1 is as fast as memory allows, when x fits in no cache.
    gb_per_s
        `floor_bytes` over `p50_ms`.
    peak_bytes
        Memory newly made resident during one call, at its peak; see `peak_bytes`.
    page_faults
        Minor page faults of one call, median over the samples.
    max_error
        See `cases.largest_error`.
    """

    op: Op
    shape: str
    layout: str
    dtype: str = "float32"
    nbytes: int
    provider: str
    status: Status = "ok"
    detail: str = ""
    rounds: int = 0
    calls_per_sample: int = 0
    p20_ms: float = math.nan
    p50_ms: float = math.nan
    p80_ms: float = math.nan
    speedup_vs_torch: float = math.nan
    copies: float = math.nan
    floor_bytes: int
    floor_copies: float
    times_floor: float = math.nan
    gb_per_s: float = math.nan
    peak_bytes: float = math.nan
    page_faults: float = math.nan
    max_error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """Largest ``|y - y_exact|`` of one provider on float32 N(offset, 1); see ``accuracy.csv``."""

    offset: float
    shape: str
    layout: str
    dtype: str = "float32"
    provider: str
    status: Status = "ok"
    detail: str = ""
    max_error: float = math.nan


@dataclass
class Results:
    """Everything a run found.

    Attributes
    ----------
    notes
        What was left out, and what would bring it in; one line each.
    """

    speed: list[SpeedRow] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def troubles(self) -> list[str]:
        """One line for each provider that gave a wrong answer or none."""
        return [
            f"{row.provider}, {row.op} of {row.shape} {row.layout}: {row.status}, {row.detail}"
            for row in self.speed
            if row.status != "ok"
        ] + [
            f"{row.provider}, accuracy of {row.shape} {row.layout}: {row.status}, {row.detail}"
            for row in self.accuracy
            if row.status != "ok"
        ]


@dataclass
class Samples:
    """What the rounds gave for one call: times in seconds, page faults, both of one call."""

    times: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)


def column_names(row: type[SpeedRow] | type[AccuracyRow]) -> list[str]:
    """Columns of a CSV of such rows, in order."""
    return [column.name for column in fields(row)]


def calls_per_sample(
    run: Callable[[], object], *, min_sample_s: float, clock: Clock = time.perf_counter_ns
) -> int:
    """How often to repeat a call so that one sample is not lost in the clock's noise."""
    run()  # the first may pay for memory that the others find mapped
    fastest = math.inf
    for _ in range(3):
        start = clock()
        run()
        fastest = min(fastest, (clock() - start) * 1e-9)
        if fastest > min_sample_s:
            return 1
    return max(1, math.ceil(min_sample_s / max(fastest, 1e-9)))


def interleave(
    runs: Mapping[str, Callable[[], object]],
    repeats: Mapping[str, int],
    *,
    min_rounds: int,
    max_rounds: int,
    budget_s: float,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Samples]:
    """Time calls in rounds, each of which takes one sample of every call.

    The order is drawn anew for every round, so that no call always follows the same one. A sample
    is preceded by as many calls that are not timed, so that each finds the caches, the branch
    predictors and the thread pools as it leaves them itself, which is how its user finds them,
    and not as its neighbour does.

    Parameters
    ----------
    runs
        Name to call.
    repeats
        Name to calls per sample.
    min_rounds, max_rounds, budget_s
        Ends with the first round after both `min_rounds` and `budget_s`, or after `max_rounds`.
    clock
        Nanoseconds.

    Returns
    -------
    dict
        Name to its samples; the k-th sample of every name is from the k-th round.
    """
    names = list(runs)
    samples = {name: Samples() for name in names}
    shuffle = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin, rounds = clock(), 0
        while names and rounds < max_rounds:
            shuffle.shuffle(names)
            for name in names:
                run, repeat = runs[name], repeats[name]
                for _ in range(repeat):
                    run()
                faults = _minor_faults()
                start = clock()
                for _ in range(repeat):
                    run()
                elapsed = clock() - start
                samples[name].times.append(elapsed * 1e-9 / repeat)
                samples[name].faults.append((_minor_faults() - faults) / repeat)
            rounds += 1
            if rounds >= min_rounds and (clock() - begin) * 1e-9 >= budget_s:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of the ratio of two samples of the same round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_bytes(run: Callable[[], object], release: Callable[[], None] | None = None) -> float:
    """Memory that one call newly makes resident, at its peak, outputs included.

    This is the rise of the process's resident set (``VmHWM``, reset through
    ``/proc/self/clear_refs``) during a call, whoever allocates: NumPy, PyTorch, XLA or ours. Memory
    that is kept from earlier calls would hide what this one needs, and is given back first, by the
    provider and by the C library (``malloc_trim``); the results of the earlier calls stay alive.
    Good to a few pages, which may be of 2 MB each; the median of three calls.

    Parameters
    ----------
    release
        Gives back what the provider keeps.

    Returns
    -------
    float
        Bytes; NaN where the kernel does not offer this, which is everywhere but on Linux.
    """
    if sys.platform != "linux":
        return math.nan
    held, rises = [run()], []
    try:
        # Three, because a framework may free what it no longer needs a little later, in a thread
        # of its own, and so hide as much in one of them.
        for _ in range(3):
            _give_back(release)
            Path("/proc/self/clear_refs").write_text("5")
            before = _high_water_mark()
            held.append(run())
            rises.append(max(0.0, _high_water_mark() - before))
    except OSError:
        return math.nan
    finally:
        # So many results at once are more than the provider would otherwise keep memory for, and
        # memory that comes round less often is less likely to be in the cache.
        held.clear()
        _give_back(release)
    return statistics.median(rises)


def _give_back(release: Callable[[], None] | None) -> None:
    if release is not None:
        release()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _high_water_mark() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return math.nan


def _minor_faults() -> float:
    return float(_resource.getrusage(_resource.RUSAGE_SELF).ru_minflt) if _resource else math.nan


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def measure(
    inputs: Inputs,
    providers: Iterable[Provider],
    yardsticks: Iterable[Provider],
    plan: Plan,
    *,
    clock: Clock = time.perf_counter_ns,
    unavailable: Callable[[Provider, str], None] = lambda provider, reason: None,
) -> list[SpeedRow]:
    """Check and time every provider on one case.

    Parameters
    ----------
    yardsticks
        Ways to copy x; the one with the lowest median becomes the row named `COPY`.
    unavailable
        Told of a provider that cannot run here at all; such a one gets no row.

    Returns
    -------
    list of SpeedRow
        In the order of `providers`, the copy last.
    """
    case, expected = inputs.case, exact(inputs)
    template = SpeedRow(
        op=case.op,
        shape=case.shape_label,
        layout=case.layout,
        nbytes=case.nbytes,
        provider="",
        floor_bytes=case.floor_bytes,
        floor_copies=case.floor_copies,
    )
    rows: dict[str, SpeedRow] = {}
    calls: dict[str, Call] = {}
    for provider in providers:
        row = replace(template, provider=provider.name)
        try:
            call = provider.prepare(inputs)
            error = largest_error(call.answer(call.run()), expected)
            if error <= TOLERANCE:
                calls[provider.name] = call
                row = replace(
                    row, max_error=error, peak_bytes=peak_bytes(call.run, provider.release)
                )
            else:
                detail = f"off by {error:.2g}, where at most {TOLERANCE:g} is right"
                row = replace(row, status="wrong", detail=detail, max_error=error)
        except UnavailableError as reason:
            unavailable(provider, str(reason))
            continue
        except Exception as reason:
            # A provider that fails on one case says nothing about the others, and must not take
            # an hour of measurements with it.
            row = replace(row, status="failed", detail=_one_line(reason))
        rows[provider.name] = row
    del expected

    # Prefixed, because a yardstick may bear a provider's name.
    runs = {name: call.run for name, call in calls.items()}
    runs |= {f"{COPY}:{one.name}": _checked_copy(one, inputs) for one in yardsticks}
    samples = interleave(
        runs,
        repeats := {
            name: calls_per_sample(run, min_sample_s=plan.min_sample_s, clock=clock)
            for name, run in runs.items()
        },
        min_rounds=plan.min_rounds,
        max_rounds=plan.max_rounds,
        budget_s=plan.budget_s,
        clock=clock,
    )

    copy = min(
        (name for name in runs if name.startswith(f"{COPY}:")),
        key=lambda name: statistics.median(samples[name].times),
    )
    rows[COPY] = replace(
        template,
        provider=COPY,
        detail=copy.removeprefix(f"{COPY}:"),
        floor_bytes=2 * case.nbytes,
        floor_copies=1.0,
        peak_bytes=0.0,
        max_error=0.0,
    )
    baseline = samples.get(BASELINE)
    for name, row in rows.items():
        key = copy if name == COPY else name
        if key not in samples:
            continue
        times = samples[key].times
        p20, p50, p80 = np.percentile(times, (20, 50, 80))
        in_copies = paired_ratio(times, samples[copy].times)
        rows[name] = replace(
            row,
            rounds=len(times),
            calls_per_sample=repeats[key],
            p20_ms=float(p20) * 1e3,
            p50_ms=float(p50) * 1e3,
            p80_ms=float(p80) * 1e3,
            speedup_vs_torch=paired_ratio(baseline.times, times) if baseline else math.nan,
            copies=in_copies,
            times_floor=in_copies / row.floor_copies,
            gb_per_s=row.floor_bytes / float(p50) * 1e-9,
            page_faults=statistics.median(samples[key].faults),
        )
    return list(rows.values())


def _checked_copy(provider: Provider, inputs: Inputs) -> Callable[[], object]:
    call = provider.prepare(inputs)
    if not np.array_equal(call.answer(call.run())["x"], inputs.x):
        raise RuntimeError(f"{provider.name} did not copy x")
    return call.run


def measure_accuracy(
    inputs: Inputs,
    offset: float,
    providers: Iterable[Provider],
    *,
    unavailable: Callable[[Provider, str], None] = lambda provider, reason: None,
) -> list[AccuracyRow]:
    """Compare every provider's forward with the exact one, without judging it."""
    expected = exact(inputs)
    rows = []
    for provider in providers:
        row = AccuracyRow(
            offset=offset,
            shape=inputs.case.shape_label,
            layout=inputs.case.layout,
            provider=provider.name,
        )
        try:
            call = provider.prepare(inputs)
            row = replace(row, max_error=largest_error(call.answer(call.run()), expected))
        except UnavailableError as reason:
            unavailable(provider, str(reason))
            continue
        except Exception as reason:
            row = replace(row, status="failed", detail=_one_line(reason))
        rows.append(row)
    return rows


def steps(plan: Plan) -> int:
    """How many times `run` reports progress."""
    accuracy = len(plan.offsets) * len(layouts_of(plan.accuracy_shape))
    return len(make_cases(plan.shapes, plan.ops)) + accuracy


def run(
    plan: Plan,
    *,
    started: Callable[[str], None] = lambda description: None,
    noted: Callable[[str], None] = lambda note: None,
) -> Results:
    """Carry out a plan.

    Parameters
    ----------
    started
        Told what is about to be measured, `steps(plan)` times.
    noted
        Told of each note at once, besides its place in `Results.notes`.
    """
    threads = resolve_threads(plan.threads)
    results = Results(environment=describe(threads=threads))
    results.environment |= {
        "seed": plan.seed,
        "min_rounds": plan.min_rounds,
        "budget_s": plan.budget_s,
        "min_sample_s": plan.min_sample_s,
        "tolerance": TOLERANCE,
    }
    providers: list[Provider] = []

    def note(text: str) -> None:
        results.notes.append(text)
        noted(text)

    def unavailable(provider: Provider, reason: str) -> None:
        if provider in providers:
            providers.remove(provider)
            note(reason)

    begin, others = time.perf_counter(), busy_seconds_of_others()
    with limited_threads(threads):
        yardsticks = copies()
        for provider in plan.providers:
            reason = provider.missing()
            if reason is None:
                providers.append(provider)
            else:
                note(reason)
        for provider in (*providers, *yardsticks):
            if provider.set_threads is not None:
                provider.set_threads(threads)
        for case in make_cases(plan.shapes, plan.ops):
            started(f"{case.op} {case.label}")
            inputs = make_inputs(case, seed=plan.seed)
            results.speed += measure(
                inputs, tuple(providers), yardsticks, plan, unavailable=unavailable
            )
        for offset in plan.offsets:
            for channels_last in layouts_of(plan.accuracy_shape):
                case = Case("forward", plan.accuracy_shape, channels_last)
                started(f"accuracy {case.label} at {offset:g}")
                inputs = make_inputs(case, seed=plan.seed, offset=offset)
                inputs = without_affine(inputs)
                results.accuracy += measure_accuracy(
                    inputs, offset, tuple(providers), unavailable=unavailable
                )
    available = usable_cpus() * (time.perf_counter() - begin)
    share = (busy_seconds_of_others() - others) / available
    results.environment["share_of_others"] = None if math.isnan(share) else round(share, 3)
    if share > QUIET:
        note(
            f"other programs took {share:.0%} of the processors during the run, and threads that "
            f"wait for one another wait for those too; numbers to keep need an idle machine"
        )
    return results


def without_affine(inputs: Inputs) -> Inputs:
    """The same inputs with a scale of 1 and a shift of 0, so that the error is that of x_hat."""
    channels = inputs.case.shape[1]
    return replace(
        inputs,
        gamma=np.ones(channels, dtype=np.float32),
        beta=np.zeros(channels, dtype=np.float32),
    )
