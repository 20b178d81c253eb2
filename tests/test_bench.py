"""The benchmark: what it measures, that it is even-handed, and that its files are whole."""

import contextlib
import csv
import gc
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import batchnorm
from batchnorm import progress
from batchnorm.bench import cases, environment, harness, memory, providers, report, rows, timing
from batchnorm.bench.cases import Case, Inputs
from batchnorm.bench.harness import AccuracyRow, Plan, Results, SpeedRow, UsableProviders
from batchnorm.bench.providers import Call, Provider, UnavailableError
from batchnorm.bench.timing import Sample
from batchnorm.bench.worker import Worker, WorkerError
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.workers import usable_cpus

SMALL = (6, 5, 4, 3)
BRIEF = Plan(
    shapes=(SMALL,),
    offsets=(0.0, 1e4),
    accuracy_shape=SMALL,
    min_rounds=2,
    budget_s=0.0,
    min_sample_s=0.0,
)


class FakeClock:
    """Nanoseconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def taking(self, *durations: int) -> Callable[[], None]:
        """A call that takes each duration in turn, over and over."""
        count = 0

        def run() -> None:
            nonlocal count
            self.now += durations[count % len(durations)]
            count += 1

        return run


def exactly(
    inputs: Inputs, *, off_by: float = 0.0, run: Callable[[], object] | None = None
) -> Call:
    """A call whose answer is the oracle's, or off by a known amount."""
    answer = {name: array + off_by for name, array in cases.exact(inputs).items()}
    return Call(run or (lambda: None), lambda result: answer)


def no_copy(inputs: Inputs, run: Callable[[], object] = lambda: None) -> Call:
    return Call(run, lambda result: {"x": inputs.x})


COPY = Provider("memcpy", no_copy)


def measure(*given: Provider, note: Callable[[str], None] = lambda text: None) -> list[SpeedRow]:
    """A small forward case, timed by a clock that ticks once whenever it is looked at."""
    ticks = itertools.count(step=1000)
    return harness.measure(
        cases.make_inputs(Case("forward", SMALL)),
        UsableProviders(given, note),
        (COPY,),
        BRIEF,
        clock=lambda: next(ticks),
    )


# --- cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "channels_last", "layout", "array_shape"),
    [
        ((8, 3), False, "NC", (8, 3)),
        ((8, 3, 5), True, "NLC", (8, 5, 3)),
        ((8, 3, 5, 6), False, "NCHW", (8, 3, 5, 6)),
        ((8, 3, 5, 6), True, "NHWC", (8, 5, 6, 3)),
        ((8, 3, 2, 5, 6), True, "NDHWC", (8, 2, 5, 6, 3)),
    ],
)
def test_case_names_layout(
    shape: tuple[int, ...], channels_last: bool, layout: str, array_shape: tuple[int, ...]
) -> None:
    case = Case("forward", shape, channels_last)
    assert (case.layout, case.array_shape) == (layout, array_shape)


def test_floor_counts_what_must_be_moved() -> None:
    # x in and y out; x and grad_y in and grad_x out; a copy is x in and out.
    x = 64 * 64 * 56 * 56 * 4
    forward, backward = (Case(op, (64, 64, 56, 56)) for op in ("forward", "backward"))
    assert (forward.floor_bytes, forward.floor_copies) == (2 * x, 1.0)
    assert (backward.floor_bytes, backward.floor_copies) == (3 * x, 1.5)


def test_make_cases_gives_two_layouts_to_images_and_one_to_rows() -> None:
    made = cases.make_cases([(4, 3), (4, 3, 2, 2)], ["forward"])
    assert [case.layout for case in made] == ["NC", "NCHW", "NHWC"]


def test_inputs_are_the_same_numbers_in_both_layouts_and_runs() -> None:
    first, last = (cases.make_inputs(Case("backward", SMALL, flag)) for flag in (False, True))
    assert np.array_equal(np.moveaxis(last.x, -1, 1), first.x)
    assert np.array_equal(np.moveaxis(last.grad_y, -1, 1), first.grad_y)
    assert np.array_equal(last.gamma, first.gamma)
    assert np.array_equal(first.x, cases.make_inputs(Case("forward", SMALL)).x)
    assert not np.array_equal(first.x, cases.make_inputs(Case("forward", SMALL), seed=1).x)


def test_inputs_are_aligned_and_contiguous() -> None:
    for flag in (False, True):
        x = cases.make_inputs(Case("forward", (3, 5, 7, 2), flag)).x
        assert x.ctypes.data % 64 == 0
        assert x.flags.c_contiguous


@pytest.mark.parametrize("op", cases.OPS)
def test_exact_is_the_same_in_both_layouts(op: cases.Op) -> None:
    first, last = (cases.exact(cases.make_inputs(Case(op, SMALL, flag))) for flag in (False, True))
    for name, array in last.items():
        seen = np.moveaxis(array, -1, 1) if array.ndim > 1 else array
        # The order of summation differs: 72 values per channel, so 72 roundings of 1.1e-16, and
        # a factor for what they go through afterwards.
        np.testing.assert_allclose(seen, first[name], rtol=1e-12, atol=1e-12)


def test_largest_error_is_absolute_for_y_and_relative_in_norm_for_gradients() -> None:
    assert cases.largest_error({"y": np.array([1.0, 5.5])}, {"y": np.array([1.0, 5.0])}) == 0.5
    error = cases.largest_error({"grad_x": np.array([3.0, 4.5])}, {"grad_x": np.array([3.0, 4.0])})
    assert error == pytest.approx(0.1)


def test_largest_error_is_nan_when_anything_is_nan() -> None:
    answer = {"grad_x": np.ones(2), "grad_gamma": np.array([1.0, math.nan])}
    assert math.isnan(cases.largest_error(answer, {name: np.ones(2) for name in answer}))


@pytest.mark.parametrize("answer", [{}, {"y": np.ones((2, 3))}])
def test_largest_error_is_infinite_when_an_array_is_missing_or_misshapen(
    answer: cases.Arrays,
) -> None:
    assert cases.largest_error(answer, {"y": np.ones((3, 2))}) == math.inf


def test_parse_shape_reads_what_a_case_prints() -> None:
    assert cases.parse_shape(Case("forward", SMALL).shape_label) == SMALL


@pytest.mark.parametrize("text", ["", "3", "axb", "4x-3", "0x3", "1x2x3x4x5x6", "1x8", "1x8x1x1"])
def test_parse_shape_refuses_what_cannot_be_normalized(text: str) -> None:
    with pytest.raises(ArgumentError, match=f"got {text!r}"):
        cases.parse_shape(text)


# --- providers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("name", ["batchnorm", "batchnorm-out", "numpy", "torch", "jax"])
def test_provider_gives_the_exact_answer(name: str, op: cases.Op, channels_last: bool) -> None:
    (provider,) = providers.choose([name])
    pytest.importorskip(provider.module)
    inputs = cases.make_inputs(Case(op, SMALL, channels_last))
    call = provider.prepare(inputs)
    # Float32 throughout: a few dozen roundings of 6e-8 each on values of about 1.
    assert cases.largest_error(call.answer(call.run()), cases.exact(inputs)) < 1e-5


@pytest.mark.parametrize("copy", providers.copies(), ids=lambda copy: copy.name)
def test_copy_copies_x_and_leaves_it_alone(copy: Provider) -> None:
    inputs = cases.make_inputs(Case("forward", SMALL))
    before = inputs.x.copy()
    call = copy.prepare(inputs)
    destination = call.answer(call.run())["x"]
    assert np.array_equal(destination, before)
    assert np.array_equal(inputs.x, before)
    assert not np.shares_memory(destination, inputs.x)


def test_choose_keeps_the_order_and_refuses_unknown_names() -> None:
    assert [one.name for one in providers.choose(["numpy", "batchnorm"])] == ["batchnorm", "numpy"]
    with pytest.raises(ArgumentError, match="got 'tensorflow'"):
        providers.choose(["tensorflow"])
    with pytest.raises(ArgumentError, match="got 'sideways'"):
        cases.choose_ops(["sideways"])


def test_missing_provider_names_the_install_command() -> None:
    reason = Provider("other", no_copy, "no_such_module", "pip install other").missing()
    assert reason == "other is skipped: no_such_module is not installed; pip install other adds it"


# --- harness --------------------------------------------------------------------------------------


def sampled(clock: FakeClock, run: Callable[[], object], repeats: int = 1) -> Callable[[], Sample]:
    return lambda: timing.sample(run, repeats=repeats, untimed=repeats, clock=clock)


def test_interleave_draws_the_order_anew_for_every_round() -> None:
    order: list[str] = []
    takes = {name: (lambda name=name: order.append(name) or Sample(1.0)) for name in "abc"}
    timing.interleave(takes, min_rounds=9)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def test_sample_is_one_call_after_untimed_ones() -> None:
    clock = FakeClock()
    assert sampled(clock, clock.taking(500), 4)().seconds == pytest.approx(500e-9)
    assert clock.now == 8 * 500


@pytest.mark.parametrize(
    ("min_rounds", "max_rounds", "budget_s", "rounds"),
    # A round takes 2 s: one call untimed and one timed.
    [(3, None, 0.0, 3), (3, 99, 9.0, 5), (3, 4, 1e9, 4)],
)
def test_interleave_ends_after_both_rounds_and_budget(
    min_rounds: int, max_rounds: int | None, budget_s: float, rounds: int
) -> None:
    clock = FakeClock()
    samples = timing.interleave(
        {"a": sampled(clock, clock.taking(10**9))},
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        budget_s=budget_s,
        clock=clock,
    )
    assert len(samples["a"]) == rounds


def test_interleave_goes_on_without_a_worker_that_failed() -> None:
    takes = iter([Sample(1.0), WorkerError("no memory left")])

    def fail() -> Sample:
        taken = next(takes)
        if isinstance(taken, WorkerError):
            raise taken
        return taken

    told: list[Any] = []
    samples = timing.interleave(
        {"a": fail, "b": lambda: Sample(2.0)},
        min_rounds=3,
        failed=lambda name, number, error: told.append((name, number, str(error))),
    )
    assert samples == {"b": [Sample(2.0)] * 3}
    assert told == [("a", 2, "no memory left")]


def test_sample_leaves_the_garbage_collector_on_when_interrupted() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.sample(interrupt)
    assert gc.isenabled()


def test_ratio_is_taken_within_rounds() -> None:
    # The ratio is 2 in two rounds of three, while that of the medians would be 3 / 2.
    assert timing.ratio_of([2.0, 4.0, 3.0], [1.0, 2.0, 3.0]) == 2.0
    # The machine slows down to a tenth from round to round.
    assert timing.ratio_of([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == 0.5


def test_interval_contains_the_ratio() -> None:
    baseline = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert timing.ratio_interval([t / 2 for t in baseline], baseline) == (0.5, 0.5)
    low, high = timing.ratio_interval([0.8, 1.8, 4.0, 8.8, 20.0], baseline)
    assert 0.8 <= low < 1.0 < high <= 1.25


@pytest.mark.parametrize(("duration", "repeats"), [(400_000, 3), (1_000_000, 1), (5_000_000, 1)])
def test_calls_per_sample_fill_the_shortest_sample(duration: int, repeats: int) -> None:
    clock = FakeClock()
    run = clock.taking(duration)
    assert timing.calls_per_sample(run, min_sample_s=1e-3, clock=clock) == repeats


def test_calls_per_sample_are_not_chosen_by_the_first_call() -> None:
    clock, calls = FakeClock(), []

    def run() -> None:
        calls.append(1)
        clock.taking(10**7 if len(calls) == 1 else 10**5)()

    assert timing.calls_per_sample(run, min_sample_s=1e-3, clock=clock) == 10


def test_wrong_provider_is_reported_and_not_timed() -> None:
    ran = []
    wrong = Provider("wrong", lambda inputs: exactly(inputs, off_by=0.5, run=lambda: ran.append(1)))
    row, _copy = measure(wrong)
    assert (row.status, row.rounds) == ("wrong", 0)
    assert row.max_error == pytest.approx(0.5)
    assert math.isnan(row.p50_ms)
    assert len(ran) == 1


def test_provider_that_answers_nan_is_wrong() -> None:
    row, _copy = measure(Provider("nan", lambda inputs: exactly(inputs, off_by=math.nan)))
    assert row.status == "wrong"


def test_provider_that_raises_is_reported_and_the_others_are_timed() -> None:
    def fail(inputs: Inputs) -> Call:
        raise ValueError("no such\nthing")

    failed, good, _copy = measure(Provider("bad", fail), Provider("good", exactly))
    assert (failed.status, failed.detail) == ("failed", "ValueError: no such thing")
    assert (good.status, good.rounds) == ("ok", 2)


def test_unavailable_provider_has_no_row_and_is_told_of() -> None:
    told: list[str] = []

    def prepare(inputs: Inputs) -> Call:
        raise UnavailableError("needs a compiler")

    found = measure(Provider("absent", prepare), note=told.append)
    assert [row.provider for row in found] == ["copy"]
    assert told == ["needs a compiler"]


def test_ratios_are_to_the_fastest_copy_and_to_torch() -> None:
    clock = FakeClock()
    inputs = cases.make_inputs(Case("backward", SMALL))

    def timed(name: str, duration: int) -> Provider:
        return Provider(name, lambda inputs: exactly(inputs, run=clock.taking(duration)))

    def copying(name: str, duration: int) -> Provider:
        return Provider(name, lambda inputs: no_copy(inputs, clock.taking(duration)))

    ours, torch, copy = harness.measure(
        inputs,
        UsableProviders((timed("batchnorm", 3000), timed("torch", 12000)), print),
        (copying("slow", 2500), copying("fast", 1000)),
        BRIEF,
        clock=clock,
    )
    assert (ours.ratio, torch.ratio, ours.speedup) == pytest.approx((0.25, 1.0, 4.0))
    assert ours.ratio_low == ours.ratio_high == pytest.approx(0.25)
    assert (ours.copies, ours.times_floor) == pytest.approx((3.0, 2.0))
    assert (copy.provider, copy.detail, copy.copies) == ("copy", "fast", 1.0)
    assert ours.p20_ms == ours.p50_ms == ours.p80_ms == pytest.approx(3e-3)
    assert ours.gb_per_s == pytest.approx(3 * inputs.case.nbytes / 3e-6 * 1e-9)


def test_copy_that_does_not_copy_is_refused() -> None:
    inputs = cases.make_inputs(Case("forward", SMALL))
    idle = Provider("idle", lambda inputs: Call(lambda: None, lambda _: {"x": inputs.x * 0}))
    with pytest.raises(RuntimeError, match="idle did not copy x"):
        harness.measure(inputs, UsableProviders((), print), (idle,), BRIEF)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_of_a_call_counts_output_and_scratch() -> None:
    def run() -> Any:
        scratch = np.ones(4_000_000, np.float32)
        return scratch * 2

    peak = memory.peak_of(run)
    if math.isnan(peak):
        pytest.skip("this kernel does not tell")
    # Two arrays of 16 MB, to within a huge page at the end of each.
    assert 31e6 < peak < 38e6


def test_run_measures_everything_and_says_what_it_left_out() -> None:
    absent = Provider("absent", no_copy, "no_such_module", "pip install absent")
    seen: list[str] = []
    plan = replace(BRIEF, providers=(*providers.choose(["batchnorm", "numpy"]), absent))
    results = harness.run(plan, started=seen.append)

    assert len(seen) == harness.steps(plan) == 6 + 4
    assert len(results.speed) == 6 * 3
    assert len(results.accuracy) == 4 * 2
    assert results.troubles == []
    assert "pip install absent" in results.notes[0]
    ours = [row for row in results.accuracy if row.provider == "batchnorm"]
    assert all(row.max_error < 1e-6 for row in ours)


def test_run_drops_a_provider_that_turns_out_unavailable() -> None:
    asked = []

    def prepare(inputs: Inputs) -> Call:
        asked.append(1)
        raise UnavailableError("needs a compiler")

    results = harness.run(replace(BRIEF, providers=(Provider("absent", prepare),)))
    assert len(asked) == 1
    assert results.notes[0] == "needs a compiler"
    assert {row.provider for row in results.speed} == {"copy"}


# --- workers --------------------------------------------------------------------------------------

COUNTER = """
import sys

class Counter:
    def __init__(self, start):
        print("noise on standard output")
        self.count = start

    def add(self, number):
        self.count += number
        return {"count": self.count}

    def fail(self):
        raise ValueError("no such\\nthing")

    def die(self):
        sys.exit("no memory left")

def refuse():
    raise OSError("no such disk")
"""


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    path = tmp_path / "counter.py"
    path.write_text(COUNTER)
    return path


def test_worker_keeps_its_object_between_calls(counter: Path) -> None:
    with Worker(counter, "Counter", start=3) as worker:
        assert worker.ask("add", number=2) == {"count": 5}
        worker.send("add", number=1)
        worker.send("add", number=1)
        assert [worker.receive(), worker.receive()] == [{"count": 6}, {"count": 7}]


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("Counter", "fail", "ValueError: no such thing"),
        ("Counter", "die", "the process ended with status 1: no memory left"),
        ("refuse", "add", "OSError: no such disk"),
    ],
)
def test_worker_that_fails_says_why(counter: Path, name: str, method: str, said: str) -> None:
    arguments = {"start": 0} if name == "Counter" else {}
    with Worker(counter, name, **arguments) as worker:
        with pytest.raises(WorkerError) as caught:
            worker.ask(method)
        assert str(caught.value) == said
        with pytest.raises(WorkerError, match="ended with status"):
            worker.ask(method)


def test_worker_has_its_own_environment(counter: Path, tmp_path: Path) -> None:
    package = tmp_path / "other" / "batchnorm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    counter.write_text(
        "import batchnorm\nclass Where:\n    def is_it(self):\n        return batchnorm.__file__"
    )
    # Another copy of the package needs nothing of this one.
    with Worker(counter, "Where", environment={"PYTHONPATH": str(package.parent)}) as worker:
        assert worker.ask("is_it") == str(package / "__init__.py")


# --- environment ----------------------------------------------------------------------------------


def test_environment_names_versions_and_neither_host_nor_paths() -> None:
    text = json.dumps(environment.describe(threads=1))
    assert f'"numpy": "{np.__version__}"' in text
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_resolve_threads_refuses_more_than_there_are(threads: int) -> None:
    with pytest.raises(ArgumentError, match=f"got {threads}"):
        environment.resolve_threads(threads)


def test_resolve_threads_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment.resolve_threads(None) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment.resolve_threads(None) == usable_cpus()


def test_noting_others_warns_of_a_busy_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    busy = iter([0.0, 1e9, 0.0, 0.0, math.nan, math.nan])
    monkeypatch.setattr(environment, "busy_seconds_of_others", lambda: next(busy))
    with environment.noting_others(seen):
        pass
    assert "need an idle machine" in str(environment.disturbance(seen))
    for share in (0.0, None):
        with environment.noting_others(seen):
            pass
        assert seen["share_of_others"] == share
        assert environment.disturbance(seen) is None


def test_limited_threads_restores_what_it_found() -> None:
    pytest.importorskip("threadpoolctl")
    before = usable_cpus()
    with environment.limited_threads(1):
        assert usable_cpus() == 1 or sys.platform != "linux"
    assert usable_cpus() == before


def test_check_memory_names_the_first_case_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan(shapes=((256, 1024), (512, 1024)), ops=("inference", "forward"))
    array = 512 * 1024 * 4
    for there_is, message in (
        (14 * array, None),
        (13 * array, "512x1024, for which forward takes about 0.0 GB"),
        (9 * array, "512x1024, for which inference"),
    ):
        monkeypatch.setattr(harness, "available", lambda there_is=there_is: there_is)
        if message is None:
            harness.check_memory(plan)
        else:
            with pytest.raises(ArgumentError, match=message):
                harness.check_memory(plan)


def test_available_memory_is_less_than_there_is() -> None:
    assert memory.available() > 0
    if sys.platform == "linux":
        assert memory.available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- progress -------------------------------------------------------------------------------------


def test_steps_move_the_bar_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def bar(*, shown: bool, remaining: bool) -> Iterator[Any]:
        yield lambda *shown: seen.append(shown)

    monkeypatch.setattr(progress, "bar", bar)
    with progress.steps(2) as started:
        started("first")
        started("second")
        started("one more")
    assert seen == [("first", 0, 2), ("second", 1, 2), ("one more", 2, 2)]


def test_bar_that_is_not_shown_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # importing it raises
    with progress.bar(shown=False) as show:
        show("first", 0, 2)


def test_progress_is_the_only_place_that_builds_a_bar() -> None:
    package = Path(batchnorm.__file__).parent
    scripts = Path(__file__).resolve().parent.parent / "benchmarks"
    builders = {
        path.name
        for path in (*package.rglob("*.py"), *scripts.glob("*.py"))
        if re.search(r"rich\.progress|import progress\b", path.read_text(encoding="utf-8"))
    }
    assert builders == {"progress.py"}


# --- report ---------------------------------------------------------------------------------------


def speed_row(**given: Any) -> SpeedRow:
    defaults: dict[str, Any] = {
        "op": "forward",
        "shape": "64x64x56x56",
        "layout": "NCHW",
        "nbytes": 51_380_224,
        "provider": "batchnorm",
        "rounds": 9,
        "p20_ms": 1.0,
        "p50_ms": 2.0,
        "p80_ms": 3.0,
        "floor_bytes": 102_760_448,
        "floor_copies": 1.0,
        "copies": 1.4,
        "ratio": 0.25,
        "max_error": 2e-7,
    }
    return SpeedRow(**defaults | given)


def accuracy_row(**given: Any) -> AccuracyRow:
    defaults: dict[str, Any] = {
        "offset": 1e6,
        "shape": "32x64x28x28",
        "layout": "NCHW",
        "provider": "batchnorm",
        "max_error": 2e-7,
    }
    return AccuracyRow(**defaults | given)


def some_results() -> Results:
    described = environment.describe(threads=2)
    return Results(
        speed=[
            speed_row(),
            speed_row(provider="batchnorm-out", copies=1.3),
            speed_row(provider="torch", ratio=1.0, copies=5.6),
            speed_row(provider="numpy", status="wrong", detail="off by 1", copies=math.nan),
            speed_row(provider="copy", copies=1.0),
        ],
        accuracy=[accuracy_row(), accuracy_row(provider="torch", max_error=0.04)],
        environment=described,
    )


def test_csv_has_a_column_for_each_field_and_nothing_for_what_is_not_known() -> None:
    given = [speed_row(), speed_row(status="wrong", detail="off, by 1", p50_ms=math.nan)]
    text = rows.as_csv(given).decode()
    first, second = csv.DictReader(io.StringIO(text))
    for column in ("p20_ms", "p50_ms", "p80_ms", "peak_bytes", "max_error", "floor_bytes"):
        assert column in first
    assert (first["p50_ms"], first["floor_bytes"]) == ("2", "102760448")
    assert (second["p50_ms"], second["detail"]) == ("", "off, by 1")


def test_claims_are_held_against_what_was_measured() -> None:
    texts = {claim.text: claim for claim in report.claims(some_results())}
    forward = texts["forward: geometric mean at least 3x PyTorch eager"]
    assert (forward.measured, forward.met) == ("4.00x", True)
    large = texts["forward of 40 MB and more with out=: at most 1.5 plain copies"]
    assert (large.measured, large.met) == ("1.30 copies", True)
    assert texts["backward: geometric mean at least 3x PyTorch eager"].met is None


def test_claims_are_not_met_by_the_worst_case() -> None:
    results = some_results()
    results.speed += [
        speed_row(shape="256x1024", layout="NC", ratio=2.0),
        speed_row(provider="batchnorm-out", layout="NHWC", copies=1.6),
    ]
    results.accuracy.append(accuracy_row(layout="NHWC", max_error=math.nan))
    unmet = [claim for claim in report.claims(results) if claim.met is False]
    assert [claim.measured for claim in unmet] == [
        "1.41x",  # the geometric mean of 4 and 1/2
        "0.50x, forward of 256x1024 NC",
        "1.60 copies",
        "nan",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_terminal(width: int) -> None:
    console = pytest.importorskip("rich.console")
    stream = io.StringIO()
    report.show(
        some_results(),
        console.Console(file=stream, width=width, force_terminal=True, no_color=True),
    )
    lines = stream.getvalue().splitlines()
    tables = [line for line in lines if line.startswith("   ")]
    assert tables
    assert all(len(line) <= width + 8 for line in tables)  # and a few escapes for dim and bold
    assert not any("…" in line for line in lines)
    assert any("wrong" in line for line in lines)


def test_write_writes_whole_files_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    directory = tmp_path / "results"
    written = report.write(some_results(), directory)
    names = ["accuracy.csv", "environment.json", "speed.csv", "speed.png", "speed.svg"]
    assert sorted(path.name for path in written) == names
    assert sorted(path.name for path in directory.iterdir()) == names
    assert (directory / "speed.svg").read_text().startswith("<svg")
    assert (directory / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((directory / "environment.json").read_text())["threads"] == 2


def test_write_says_in_one_line_what_stopped_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = Results(environment={"threads": 2})
    with pytest.raises(BatchNormError, match="could not be written"):
        report.write(results, tmp_path / "file")


def test_prepare_directory_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="must be in a directory"):
        rows.prepare_directory(tmp_path / "file")
    rows.prepare_directory(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_troubles_name_provider_case_and_what_was_wrong() -> None:
    (trouble,) = some_results().troubles
    assert trouble == "numpy, forward of 64x64x56x56 NCHW: wrong, off by 1"
