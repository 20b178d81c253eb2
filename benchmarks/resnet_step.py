"""Time training steps of a ResNet-18 by PyTorch, by torch.compile, and after `convert`.

python benchmarks/resnet_step.py --out benchmarks/results/resnet_step.csv
python benchmarks/resnet_step.py --out benchmarks/results/resnet_step.csv --profile
python benchmarks/resnet_step.py --quick

The first writes resnet_step.csv, resnet_losses.csv and resnet_step.json (what it was measured on),
the second resnet_profile.csv and resnet_profile.json beside them, the third nothing. Without
--out, results are only printed.

A step is zero_grad, forward, cross entropy, backward, and SGD with momentum. Each provider trains
in a process of its own (`resnet_worker.py`); in every round each of them takes one step, in an
order drawn anew, while the others wait. Providers that keep memory run under the environment
variables of `resnet_worker.KEEP_MEMORY`.

resnet_step.csv
    ``p20_s, p50_s, p80_s``: percentiles of the seconds of a step. ``ratio``: median over rounds of
    the time over PyTorch eager's in the same round, ``ratio_low, ratio_high`` its 95 % interval
    (bootstrap over rounds). ``page_faults``: minor page faults of a step, median. ``peak_bytes``:
    the most memory resident during the rounds, less what was before the model and its inputs were
    made; ``warmup_peak_bytes`` the same until the end of the warm-up, compilation included.
    ``loss_error, gradient_error``: largest relative difference to PyTorch eager of the losses of
    the warm-up, and of the gradient norms of all parameters after its first step.

resnet_losses.csv
    Largest relative difference between the losses of 50 float32 steps and those of PyTorch eager,
    channels first, for several seeds. Rounding grows from step to step, so what a run has to be
    compared with is not zero but PyTorch against itself, when only its rounding differs: with the
    examples of each batch in the opposite order, and channels-last. ``verdict`` is ``pass`` where
    the median over the seeds is at most twice the larger of these two's.

resnet_profile.csv
    ``ms`` and ``share`` of a step by group of operators, by torch.profiler, and in the row ``step``
    the median time by the clock without the profiler, and page faults. What torch.compile makes
    of the operators cannot be told apart, so it has this row only.

Exit status: 0 done; 1 a provider failed or was wrong; 2 the call was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import resnet_worker
from numpy.typing import NDArray
from resnet_worker import (
    COMPILED,
    CONVERTED,
    EAGER,
    GROUPS,
    KEEP_MEMORY,
    KEPT,
    PROVIDERS,
    Case,
)

from batchnorm.bench.environment import (
    busy_seconds_of_others,
    describe,
    resolve_threads,
    usable_cpus,
)
from batchnorm.bench.harness import QUIET, paired_ratio
from batchnorm.bench.report import prepare_directory, write_all
from batchnorm.errors import ArgumentError, BatchNormError

FORMATS = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16")

#: So small that a loss is still far from zero after 50 steps: what is left of one that is close to
#: zero is mostly rounding.
LEARNING_RATE = 1e-4

#: What a provider may be off by, relative to PyTorch eager, before it is not worth timing: losses
#: of the warm-up, and gradient norms. It is to catch mistakes, not rounding.
TOLERANCE = {"float32": (1e-3, 1e-2), "bfloat16": (2e-2, 0.5)}

#: Columns of text where there is no terminal.
WIDE = 120

LOSS_SEEDS = (0, 1, 2, 3, 4)
LOSS_CASE = Case(batch=8, image=64)
LOSS_BATCHES = 4
REVERSED, CHANNELS_LAST = "torch eager, batch reversed", "torch eager, channels_last"
YARDSTICKS = (REVERSED, CHANNELS_LAST)
ALLOWANCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how long."""

    cases: tuple[Case, ...]
    providers: tuple[str, ...] = PROVIDERS
    rounds: int = 30
    warmup: int = 5
    threads: int = 2
    seed: int = 0
    loss_steps: int = 50
    loss_seeds: tuple[int, ...] = LOSS_SEEDS
    loss_case: Case = LOSS_CASE


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One provider on one case; a line of ``resnet_step.csv``."""

    batch: int
    image: int
    format: str
    dtype: str
    provider: str
    status: str = "ok"
    detail: str = ""
    rounds: int = 0
    p20_s: float = math.nan
    p50_s: float = math.nan
    p80_s: float = math.nan
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    page_faults: float = math.nan
    peak_bytes: float = math.nan
    warmup_peak_bytes: float = math.nan
    loss_error: float = math.nan
    gradient_error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One run beside PyTorch eager's; a line of ``resnet_losses.csv``."""

    run: str
    seed: int
    batch: int
    image: int
    steps: int
    learning_rate: float = LEARNING_RATE
    first_loss: float
    last_loss: float
    largest_difference: float
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One group of operators of one provider; a line of ``resnet_profile.csv``."""

    batch: int
    image: int
    format: str
    dtype: str
    provider: str
    group: str
    ms: float
    share: float = math.nan
    page_faults: float = math.nan


Started = Callable[[str], None]


# --- workers --------------------------------------------------------------------------------------


class WorkerError(Exception):
    """A worker could not do what it was told; the message says why in one line."""


class Worker:
    """A process that trains with one provider on one case; see `resnet_worker`."""

    def __init__(self, provider: str, case: Case, plan: Plan) -> None:
        request = {
            "provider": provider,
            "case": asdict(case),
            "threads": plan.threads,
            "seed": plan.seed,
            "warmup": plan.warmup,
            "rate": LEARNING_RATE,
        }
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, __file__, "worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                # Told to PyTorch as well; ours cannot know otherwise before it starts its threads.
                "OMP_NUM_THREADS": str(plan.threads),
                **(KEEP_MEMORY if provider.endswith(KEPT) else {}),
            },
        )

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Have it do something, and wait for what it says."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": do, **more}), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next answer; the first is that it is ready, and what its warm-up gave."""
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it said nothing"]
            raise WorkerError(f"the process ended with status {status}: {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """Let it end; it does when there is nothing more to read."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


@contextlib.contextmanager
def workers() -> Iterator[Callable[..., Worker]]:
    """Start workers that end with the block."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any) -> Worker:
            worker = Worker(*arguments)
            stack.callback(worker.close)
            return worker

        yield start


# --- time and memory ------------------------------------------------------------------------------


def relative_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """Largest of ``|a - b| / |b|``; NaN if anything is."""
    a, b = np.asarray(values), np.asarray(expected)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def ratio_interval(
    times: Sequence[float], baseline: Sequence[float], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the median of the paired ratios, by the percentile bootstrap."""
    ratios = np.asarray(times) / np.asarray(baseline)
    drawn = np.random.default_rng(seed).choice(ratios, (draws, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def measure(case: Case, plan: Plan, started: Started) -> list[StepRow]:
    """Check every provider against PyTorch eager, then time those that are right in rounds."""
    template = StepRow(
        batch=case.batch, image=case.image, format=case.format, dtype=case.dtype, provider=""
    )
    rows: dict[str, StepRow] = {}
    with workers() as start:
        ready: dict[str, Worker] = {}
        eager: dict[str, Any] | None = None
        for provider in plan.providers:
            started(f"{case.label}: warm-up of {provider}")
            row = replace(template, provider=provider)
            try:
                # One after another: the warm-up of one would be in the way of another's compiler.
                worker = start(provider, case, plan)
                found = worker.answer()
            except WorkerError as error:
                rows[provider] = replace(row, status="failed", detail=str(error))
                continue
            if provider == EAGER:
                eager = found
            rows[provider] = check(row, found, eager)
            if rows[provider].status == "ok":
                ready[provider] = worker
        seconds: dict[str, list[float]] = {provider: [] for provider in ready}
        faults: dict[str, list[float]] = {provider: [] for provider in ready}
        order, shuffle = list(ready), random.Random(plan.seed)
        for k in range(plan.rounds):
            started(f"{case.label}: round {k + 1} of {plan.rounds}")
            shuffle.shuffle(order)
            for provider in tuple(order):
                try:
                    taken = ready[provider].ask("step")
                except WorkerError as error:
                    # The others' rounds are good without it.
                    rows[provider] = replace(
                        rows[provider], status="failed", detail=f"in round {k + 1}: {error}"
                    )
                    order.remove(provider)
                    del ready[provider], seconds[provider], faults[provider]
                    continue
                seconds[provider].append(taken["seconds"])
                faults[provider].append(taken["faults"])
        for provider, worker in ready.items():
            memory, times = worker.ask("memory"), seconds[provider]
            p20, p50, p80 = np.percentile(times, (20, 50, 80))
            row = replace(
                rows[provider],
                rounds=len(times),
                p20_s=float(p20),
                p50_s=float(p50),
                p80_s=float(p80),
                page_faults=float(np.median(faults[provider])),
                peak_bytes=memory["peak"],
                warmup_peak_bytes=memory["warmup_peak"],
            )
            if EAGER in seconds:
                low, high = ratio_interval(times, seconds[EAGER], seed=plan.seed)
                ratio = paired_ratio(times, seconds[EAGER])
                row = replace(row, ratio=ratio, ratio_low=low, ratio_high=high)
            rows[provider] = row
    return list(rows.values())


def check(row: StepRow, found: dict[str, Any], eager: dict[str, Any] | None) -> StepRow:
    """Hold the losses and gradients of a provider's warm-up against PyTorch eager's."""
    if eager is None:
        return row
    loss_error = relative_difference(found["losses"], eager["losses"])
    gradient_error = relative_difference(found["gradient_norms"], eager["gradient_norms"])
    row = replace(row, loss_error=loss_error, gradient_error=gradient_error)
    for what, error, allowed in zip(
        ("losses", "gradient norms"),
        (loss_error, gradient_error),
        TOLERANCE[row.dtype],
        strict=True,
    ):
        if not error <= allowed:
            detail = f"{what} off by {error:.2g}, where at most {allowed:g} is right"
            return replace(row, status="wrong", detail=detail)
    return row


# --- losses ---------------------------------------------------------------------------------------


def compare_losses(plan: Plan, started: Started) -> list[LossRow]:
    """Loss curves of every seed beside PyTorch eager's, with a verdict on `convert`'s."""
    import torch

    torch.set_num_threads(plan.threads)
    case = plan.loss_case
    last = replace(case, channels_last=True)
    runs = {
        EAGER: (EAGER, case, False),
        REVERSED: (EAGER, case, True),
        CHANNELS_LAST: (EAGER, last, False),
        CONVERTED: (CONVERTED, case, False),
        f"{CONVERTED}, channels_last": (CONVERTED, last, False),
    }
    rows = []
    for seed in plan.loss_seeds:
        expected: list[float] = []
        for name, (provider, seen, reverse) in runs.items():
            started(f"losses of {name}, seed {seed}")
            losses = resnet_worker.loss_curve(
                provider,
                seen,
                seed=seed,
                steps=plan.loss_steps,
                batches=LOSS_BATCHES,
                learning_rate=LEARNING_RATE,
                reverse=reverse,
            )
            expected = expected or losses
            row = LossRow(
                run=name,
                seed=seed,
                batch=case.batch,
                image=case.image,
                steps=plan.loss_steps,
                first_loss=losses[0],
                last_loss=losses[-1],
                largest_difference=relative_difference(losses, expected),
            )
            rows.append(row)
    return judge(rows)


def over_seeds(rows: Sequence[LossRow]) -> dict[str, NDArray[np.float64]]:
    """Run to its differences, one a seed."""
    runs = dict.fromkeys(row.run for row in rows)
    return {
        run: np.array([row.largest_difference for row in rows if row.run == run]) for run in runs
    }


def judge(rows: Sequence[LossRow]) -> list[LossRow]:
    """Say of the runs of `convert` whether they differ by no more than rounding does."""
    median = {run: float(np.median(found)) for run, found in over_seeds(rows).items()}
    limit = ALLOWANCE * max(median[name] for name in YARDSTICKS)
    return [
        replace(row, verdict="pass" if median[row.run] <= limit else "fail")
        if row.run.startswith(CONVERTED)
        else row
        for row in rows
    ]


# --- profile --------------------------------------------------------------------------------------


def profile(case: Case, plan: Plan, started: Started) -> list[ProfileRow]:
    """Where the time of a step goes, for each provider."""
    rows = []
    for provider in plan.providers:
        started(f"{case.label}: profile of {provider}")
        row = ProfileRow(
            batch=case.batch,
            image=case.image,
            format=case.format,
            dtype=case.dtype,
            provider=provider,
            group="step",
            ms=math.nan,
        )
        try:
            with workers() as start:
                worker = start(provider, case, plan)
                worker.answer()
                taken = [worker.ask("step") for _ in range(plan.rounds)]
                groups = {}
                if provider != COMPILED:
                    groups = worker.ask("profile", steps=plan.rounds)
        except WorkerError as error:
            raise WorkerError(f"{provider}, {case.label}: {error}") from error
        rows += [
            replace(row, group=name, ms=groups[name], share=groups[name] / sum(groups.values()))
            for name in GROUPS
            if name in groups
        ]
        rows.append(
            replace(
                row,
                ms=float(np.median([one["seconds"] for one in taken])) * 1e3,
                page_faults=float(np.median([one["faults"] for one in taken])),
            )
        )
    return rows


# --- results --------------------------------------------------------------------------------------


def as_csv(rows: Sequence[StepRow] | Sequence[LossRow] | Sequence[ProfileRow]) -> bytes:
    """Rows as CSV: numbers to 6 digits, nothing where a number is not known."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(column.name for column in fields(rows[0]))
    for row in rows:
        writer.writerow(
            ("" if math.isnan(value) else f"{value:.6g}") if isinstance(value, float) else value
            for value in astuple(row)
        )
    return stream.getvalue().encode()


def show_steps(rows: Sequence[StepRow], console: Any) -> None:
    from rich.table import Table

    table = Table("", "provider", "s", "of eager", "95 %", "faults", "peak MB", box=None)
    seen = ""
    for row in rows:
        case = Case(row.batch, row.image, row.format == "channels_last", row.dtype == "bfloat16")
        label, seen = ("" if case.label == seen else case.label), case.label
        if row.status != "ok":
            table.add_row(label, row.provider, row.status)
            continue
        known = not math.isnan(row.ratio)
        table.add_row(
            label,
            row.provider,
            f"{row.p50_s:.3f}",
            f"{row.ratio:.3f}" if known else "",
            f"{row.ratio_low:.3f} to {row.ratio_high:.3f}" if known else "",
            f"{row.page_faults:.0f}",
            f"{row.peak_bytes / 1e6:.0f}",
        )
    console.print(table)


def show_losses(rows: Sequence[LossRow], console: Any) -> None:
    verdicts = {row.run: row.verdict for row in rows}
    seeds = len({row.seed for row in rows})
    console.print(
        f"largest relative difference of {rows[0].steps} losses to {EAGER}: "
        f"median and largest of {seeds} seed{'s' * (seeds != 1)}"
    )
    for run, found in over_seeds(rows).items():
        if run != EAGER:
            console.print(
                f"  {run:<36} {np.median(found):.1e}  {np.max(found):.1e}  {verdicts[run]}"
            )


def show_profile(rows: Sequence[ProfileRow], console: Any) -> None:
    from rich.table import Table

    table = Table("", "provider", "group", "ms", "share", "faults", box=None)
    for row in rows:
        table.add_row(
            f"{row.batch}x3x{row.image}x{row.image} {row.format}",
            row.provider,
            row.group,
            f"{row.ms:.1f}",
            "" if math.isnan(row.share) else f"{row.share:.1%}",
            "" if math.isnan(row.page_faults) else f"{row.page_faults:.0f}",
        )
    console.print(table)


# --- the command line -----------------------------------------------------------------------------


def among(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of names joined by commas."""

    def read(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"must be among {', '.join(known)}, joined by commas, got {name!r}"
                )
        return tuple(name for name in known if name in names)

    return read


def at_least(least: int) -> Callable[[str], int]:
    """A reader of an integer."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be an integer of {least} or more, got {text!r}")
        return number

    return read


def batch_sizes(text: str) -> tuple[int, ...]:
    # In the last stage an image may be one value: a batch of one would leave nothing to normalize.
    return tuple(at_least(2)(part.strip()) for part in text.split(","))


def csv_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".csv" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file that ends in .csv, got {text!r}")
    return path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resnet_step.py",
        description="Time training steps of a ResNet-18 by PyTorch, by torch.compile, and after "
        "batchnorm.torch.convert.",
    )
    add = parser.add_argument
    add("--out", type=csv_file, help="CSV file to write; the others lie beside it")
    add("--profile", action="store_true", help="profile the largest batch in float32 instead")
    add("--quick", action="store_true", help="one small case, few rounds")
    add("--batches", type=batch_sizes, metavar="A,B", help="batch sizes; 8,16 if left out")
    add("--image", type=at_least(32), help="height and width; 224 if left out")
    add("--formats", type=among(FORMATS), metavar="A,B", help=" and ".join(FORMATS))
    add("--dtypes", type=among(DTYPES), metavar="A,B", help=" and ".join(DTYPES))
    add("--providers", type=among(PROVIDERS), metavar="A,B", help=", ".join(PROVIDERS))
    add("--rounds", type=at_least(1), help="timed steps; 30 if left out, 5 with --profile")
    add("--warmup", type=at_least(1), help="steps before them; 5 if left out")
    add("--loss-steps", type=at_least(0), help="steps of a loss curve; 50 if left out, 0 for none")
    add("--threads", type=at_least(1), help="threads for every provider; 2 if left out")
    add("--seed", type=at_least(0), default=0, help="of weights, data and order")
    return parser


def make_plan(options: argparse.Namespace) -> Plan:
    """What the options ask for."""
    quick = options.quick
    formats = options.formats or (FORMATS[:1] if quick else FORMATS)
    dtypes = options.dtypes or (DTYPES[:1] if quick else DTYPES)
    batches = options.batches or ((8,) if quick else (8, 16))
    image = options.image or (64 if quick else 224)
    if options.profile:
        batches, dtypes = (max(batches),), DTYPES[:1]

    def given(value: Any, otherwise: int) -> int:
        return otherwise if value is None else value

    return Plan(
        cases=tuple(
            Case(batch, image, name == "channels_last", dtype == "bfloat16")
            for dtype in dtypes
            for name in formats
            for batch in batches
        ),
        providers=options.providers or PROVIDERS,
        rounds=given(options.rounds, 3 if quick else 5 if options.profile else 30),
        warmup=given(options.warmup, 2 if quick else 5),
        threads=resolve_threads(given(options.threads, min(2, usable_cpus()))),
        seed=options.seed,
        loss_steps=given(options.loss_steps, 5 if quick else 50),
        loss_seeds=LOSS_SEEDS[:1] if quick else LOSS_SEEDS,
        loss_case=replace(LOSS_CASE, image=32) if quick else LOSS_CASE,
    )


@contextlib.contextmanager
def progress_of(total: int) -> Iterator[Started]:
    """A bar on the terminal; call what it gives with what begins, `total` times."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task, begun = bar.add_task("starting", total=total), 0

        def started(description: str) -> None:
            nonlocal begun
            bar.update(task, description=description, completed=begun)
            begun += 1

        yield started


def require_packages() -> None:
    """See that what the benchmark needs is there, before anything is measured."""
    for module, extra in (("torch", "torch"), ("rich", "bench")):
        if importlib.util.find_spec(module) is None:
            raise ArgumentError(
                f"this benchmark needs {module}, which is not installed. "
                f"pip install 'batchnorm[{extra}]' adds it."
            )


def run(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    plan = make_plan(options)
    require_packages()
    from rich.console import Console

    if options.out is not None:
        prepare_directory(options.out.parent)
    environment = describe(threads=plan.threads) | {
        "seed": plan.seed,
        "rounds": plan.rounds,
        "warmup": plan.warmup,
        "learning_rate": LEARNING_RATE,
    }
    compares = plan.loss_steps > 0 and not options.profile and CONVERTED in plan.providers
    if options.profile:
        total = len(plan.cases) * len(plan.providers)
    else:
        total = len(plan.cases) * (len(plan.providers) + plan.rounds)
        total += compares * 5 * len(plan.loss_seeds)
    steps: list[StepRow] = []
    losses: list[LossRow] = []
    profiles: list[ProfileRow] = []
    begin, others = time.perf_counter(), busy_seconds_of_others()
    with progress_of(total) as started:
        for case in plan.cases:
            if options.profile:
                profiles += profile(case, plan, started)
            else:
                steps += measure(case, plan, started)
        if compares:
            losses = compare_losses(plan, started)
    share = (busy_seconds_of_others() - others) / (usable_cpus() * (time.perf_counter() - begin))
    environment["share_of_others"] = None if math.isnan(share) else round(share, 3)

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A file or a pipe has no width, for which rich assumes 80.
        console.width = max(console.width, WIDE)
    for rows, show in ((steps, show_steps), (losses, show_losses), (profiles, show_profile)):
        if rows:
            show(rows, console)
    troubles = [
        f"{row.provider}, {row.batch} {row.format} {row.dtype}: {row.status}, {row.detail}"
        for row in steps
        if row.status != "ok"
    ]
    if any(row.verdict == "fail" for row in losses):
        troubles.append("the losses after convert differ by more than rounding explains")
    for trouble in troubles:
        console.print(trouble, style="red")
    if share > QUIET:
        console.print(
            f"other programs took {share:.0%} of the processors during the run; "
            f"numbers to keep need an idle machine"
        )
    if options.out is not None:
        beside = options.out.with_name
        contents = {}
        if profiles:
            contents[beside("resnet_profile.csv")] = as_csv(profiles)
        if losses:
            contents[beside("resnet_losses.csv")] = as_csv(losses)
        if steps:
            contents[options.out] = as_csv(steps)
        about = beside("resnet_profile.json") if profiles else options.out.with_suffix(".json")
        contents[about] = (json.dumps(environment, indent=2) + "\n").encode()
        try:
            write_all(contents)
        except OSError as error:
            raise BatchNormError(
                f"the results could not be written beside {str(options.out)!r}: "
                f"{error.strerror or error}. Make room or name another directory."
            ) from error
        for path in contents:
            console.print(f"wrote {path}")
    return 1 if troubles else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or serve it as one of its workers."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["worker"]:
        return resnet_worker.main(given[1])
    try:
        return run(make_parser().parse_args(given))
    except (BatchNormError, WorkerError) as error:
        print(f"resnet_step.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, WorkerError) else 2
    except KeyboardInterrupt:
        print("resnet_step.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
