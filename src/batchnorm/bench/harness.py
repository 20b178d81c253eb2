"""How `batchnorm bench` measures: every answer is checked first, then all are timed in rounds."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

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
    describe,
    limited_threads,
    noting_others,
    resolve_threads,
)
from batchnorm.bench.memory import available, peak_of
from batchnorm.bench.providers import PROVIDERS, Call, Provider, UnavailableError, copies
from batchnorm.bench.rows import Row, TimedRow, timed
from batchnorm.bench.timing import Clock, Sample, calls_per_sample, interleave, ratio_of, sample
from batchnorm.bench.worker import one_line
from batchnorm.errors import ArgumentError

#: How large an error may be, at an offset of 0, before a provider is not worth timing. It is to
#: catch mistakes, not inaccuracy: float32 sums over 2e5 values of a channel that is not
#: contiguous, as the textbook takes them, leave y off by 2e-4.
TOLERANCE = 1e-3

#: Memory that measuring a case takes at its peak, in arrays of the size of x: inputs, the exact
#: answer in float64, and four results of a provider. As measured, with all providers.
PEAK_ARRAYS: dict[Op, int] = {"forward": 14, "inference": 10, "backward": 18}

COPY = "copy"
BASELINE = "torch"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how long.

    Every operation runs on every shape in every layout by every provider. `offsets` are the means
    of the inputs whose outputs are compared with the exact ones; `threads` None means as many as
    there are processors; a call shorter than `min_sample_s` is repeated within one sample. For
    rounds and budget see `timing.interleave`.
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
class SpeedRow(TimedRow):
    """One provider on one case; a line of ``speed.csv``.

    The baseline of `ratio` is PyTorch eager; `detail` of the copy says which copy was the fastest;
    `peak_bytes` is memory newly made resident during one call, see `memory.peak_of`.

    Attributes
    ----------
    calls_per_sample
        Calls that one sample is the mean of.
    copies
        This time over that of a plain copy of x: median of the ratios within a round.
    floor_bytes, floor_copies
        What has to be moved at the least, and the same in copies of x.
    times_floor
        `copies` over `floor_copies`: 1 is as fast as memory allows, when x fits in no cache.
    gb_per_s
        `floor_bytes` over `p50_ms`.
    max_error
        See `cases.largest_error`.
    """

    op: Op
    shape: str
    layout: str
    dtype: str = "float32"
    nbytes: int
    calls_per_sample: int = 0
    copies: float = float("nan")
    floor_bytes: int
    floor_copies: float
    times_floor: float = float("nan")
    gb_per_s: float = float("nan")
    max_error: float = float("nan")

    @property
    def speedup(self) -> float:
        """How many times as fast as PyTorch eager; NaN where that is not known."""
        return 1 / self.ratio

    @property
    def label(self) -> str:
        """Operation, shape and layout as text."""
        return f"{self.op} of {self.shape} {self.layout}"


@dataclass(frozen=True, kw_only=True)
class AccuracyRow(Row):
    """Largest ``|y - y_exact|`` of one provider on float32 N(offset, 1); see ``accuracy.csv``."""

    offset: float
    shape: str
    layout: str
    dtype: str = "float32"
    max_error: float = float("nan")

    @property
    def label(self) -> str:
        """Shape and layout as text."""
        return f"accuracy of {self.shape} {self.layout}"


@dataclass
class Results:
    """Everything a run found; `notes` say what was left out, and what would bring it in."""

    speed: list[SpeedRow] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def troubles(self) -> list[str]:
        """One line for each provider that gave a wrong answer or none."""
        rows: list[SpeedRow | AccuracyRow] = [*self.speed, *self.accuracy]
        return [
            f"{row.provider}, {row.label}: {row.status}, {row.detail}"
            for row in rows
            if row.status != "ok"
        ]


R = TypeVar("R", bound=Row)


class UsableProviders:
    """The providers that can run here; of the others, `note` is told once, with the reason."""

    def __init__(self, providers: Iterable[Provider], note: Callable[[str], None]) -> None:
        self._note = note
        self.usable = list(providers)
        for provider in tuple(self.usable):
            if reason := provider.missing():
                self._remove(provider, reason)

    def check(
        self, inputs: Inputs, template: R, judge: Callable[[R, Provider, Call, float], R]
    ) -> list[R]:
        """Give each provider its row: as `judge` makes it of the answer's error, or failed."""
        expected = exact(inputs)
        rows = []
        for provider in tuple(self.usable):
            row = replace(template, provider=provider.name)
            try:
                call = provider.prepare(inputs)
                error = largest_error(call.answer(call.run()), expected)
                row = judge(row, provider, call, error)
            except UnavailableError as reason:
                self._remove(provider, str(reason))
                continue
            except Exception as reason:
                # A provider that fails on one case says nothing about the others, and must not
                # take an hour of measurements with it.
                row = replace(row, status="failed", detail=one_line(reason))
            rows.append(row)
        return rows

    def _remove(self, provider: Provider, reason: str) -> None:
        self.usable.remove(provider)
        self._note(reason)


def measure(
    inputs: Inputs,
    providers: UsableProviders,
    yardsticks: Sequence[Provider],
    plan: Plan,
    *,
    clock: Clock = time.perf_counter_ns,
) -> list[SpeedRow]:
    """Check and time every provider on one case; return their rows, the copy's last.

    `yardsticks` are ways to copy x; the one with the lowest median becomes the row named `COPY`.
    """
    case = inputs.case
    template = SpeedRow(
        op=case.op,
        shape=case.shape_label,
        layout=case.layout,
        nbytes=case.nbytes,
        provider="",
        floor_bytes=case.floor_bytes,
        floor_copies=case.floor_copies,
    )
    runs: dict[str, Callable[[], object]] = {}

    def judge(row: SpeedRow, provider: Provider, call: Call, error: float) -> SpeedRow:
        row = replace(row, max_error=error)
        if not error <= TOLERANCE:
            detail = f"off by {error:.2g}, where at most {TOLERANCE:g} is right"
            return replace(row, status="wrong", detail=detail)
        row = replace(row, peak_bytes=peak_of(call.run))
        runs[provider.name] = call.run
        return row

    rows = {row.provider: row for row in providers.check(inputs, template, judge)}

    # Prefixed, because a yardstick may have a provider's name.
    runs |= {f"{COPY}:{one.name}": _checked_copy(one, inputs) for one in yardsticks}
    repeats = {
        name: calls_per_sample(run, min_sample_s=plan.min_sample_s, clock=clock)
        for name, run in runs.items()
    }

    def take(name: str) -> Sample:
        return sample(runs[name], repeats=repeats[name], untimed=repeats[name], clock=clock)

    samples = interleave(
        {name: partial(take, name) for name in runs},
        min_rounds=plan.min_rounds,
        max_rounds=plan.max_rounds,
        budget_s=plan.budget_s,
        clock=clock,
    )
    times = {name: [one.seconds for one in found] for name, found in samples.items()}

    copy = min(
        (name for name in runs if name.startswith(f"{COPY}:")),
        key=lambda name: statistics.median(times[name]),
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
    for name, row in rows.items():
        key = copy if name == COPY else name
        if key in samples:
            row = timed(row, samples[key], samples.get(BASELINE))
            in_copies = ratio_of(times[key], times[copy])
            rows[name] = replace(
                row,
                calls_per_sample=repeats[key],
                copies=in_copies,
                times_floor=in_copies / row.floor_copies,
                gb_per_s=row.floor_bytes / row.p50_ms * 1e-6,
            )
    return list(rows.values())


def _checked_copy(provider: Provider, inputs: Inputs) -> Callable[[], object]:
    call = provider.prepare(inputs)
    if not np.array_equal(call.answer(call.run())["x"], inputs.x):
        raise RuntimeError(f"{provider.name} did not copy x")
    return call.run


def measure_accuracy(
    inputs: Inputs, offset: float, providers: UsableProviders
) -> list[AccuracyRow]:
    """Compare every provider's forward with the exact one, without judging it."""
    template = AccuracyRow(
        offset=offset, shape=inputs.case.shape_label, layout=inputs.case.layout, provider=""
    )
    return providers.check(
        inputs, template, lambda row, provider, call, error: replace(row, max_error=error)
    )


def check_memory(plan: Plan) -> None:
    """Raise if a case needs more memory than there is.

    Raises
    ------
    ArgumentError
        Names the first such shape and operation.
    """
    there_is = available()
    for case in make_cases(plan.shapes, plan.ops):
        needed = PEAK_ARRAYS[case.op] * case.nbytes
        if needed > there_is:
            raise ArgumentError(
                f"shapes must fit in memory, got {case.shape_label}, for which {case.op} takes "
                f"about {needed / 1e9:,.1f} GB, and there are {there_is / 1e9:,.1f} GB. Choose a "
                "smaller shape."
            )


def steps(plan: Plan) -> int:
    """How many times `run` reports progress."""
    accuracy = len(plan.offsets) * len(layouts_of(plan.accuracy_shape))
    return len(make_cases(plan.shapes, plan.ops)) + accuracy


def run(plan: Plan, *, started: Callable[[str], None] = lambda description: None) -> Results:
    """Carry out a plan; `started` is told what is about to be measured, `steps(plan)` times."""
    threads = resolve_threads(plan.threads)
    results = Results(environment=describe(threads=threads))
    results.environment |= {
        "seed": plan.seed,
        "min_rounds": plan.min_rounds,
        "budget_s": plan.budget_s,
        "min_sample_s": plan.min_sample_s,
        "tolerance": TOLERANCE,
    }
    with noting_others(results.environment), limited_threads(threads):
        yardsticks = copies()
        providers = UsableProviders(plan.providers, results.notes.append)
        for provider in (*providers.usable, *yardsticks):
            if provider.set_threads is not None:
                provider.set_threads(threads)
        for case in make_cases(plan.shapes, plan.ops):
            started(f"{case.op} {case.label}")
            inputs = make_inputs(case, seed=plan.seed)
            results.speed += measure(inputs, providers, yardsticks, plan)
        for offset in plan.offsets:
            for channels_last in layouts_of(plan.accuracy_shape):
                case = Case("forward", plan.accuracy_shape, channels_last)
                started(f"accuracy {case.label} at {offset:g}")
                inputs = without_affine(make_inputs(case, seed=plan.seed, offset=offset))
                results.accuracy += measure_accuracy(inputs, offset, providers)
    return results


def without_affine(inputs: Inputs) -> Inputs:
    """The same inputs with a scale of 1 and a shift of 0, so that the error is that of x_hat."""
    ones = np.ones(inputs.case.shape[1], dtype=np.float32)
    return replace(inputs, gamma=ones, beta=0 * ones)
