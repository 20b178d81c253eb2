"""Time training steps of a ResNet-18 by PyTorch, by torch.compile, and after `convert`.

python benchmarks/resnet_step.py --out benchmarks/results
python benchmarks/resnet_step.py --out benchmarks/results --profile
python benchmarks/resnet_step.py --quick

The first writes resnet_step.csv, resnet_losses.csv and resnet_step.json (what it was measured on),
the second resnet_profile.csv and resnet_profile.json, the third nothing.

A step is zero_grad, forward, cross entropy, backward, and SGD with momentum. Each provider trains
in a process of its own (`resnet_worker.py`); in every round each of them takes one step, in an
order drawn anew, while the others wait. Providers that keep memory run under the environment
variables of `resnet_worker.KEEP_MEMORY`.

resnet_step.csv
    ``ratio`` is to PyTorch eager. ``peak_bytes``: the most memory resident during the rounds, less
    what was before the model and its inputs were made; ``warmup_peak_bytes`` the same until the end
    of the warm-up, compilation included. ``loss_error, gradient_error``: largest relative
    difference to PyTorch eager of the losses of the warm-up, and of the gradient norms of all
    parameters after its first step.

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
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import command
import numpy as np
import resnet_worker
from resnet_losses import LEARNING_RATE, LossRow, compare_losses, relative_difference
from resnet_worker import COMPILED, CONVERTED, EAGER, KEEP_MEMORY, KEPT, PROVIDERS, Case

from batchnorm.bench.environment import resolve_threads, usable_cpus
from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import Sample, interleave
from batchnorm.bench.worker import Worker, WorkerError
from batchnorm.progress import steps

#: The file that defines the worker's class.
WORKER = Path(resnet_worker.__file__)

FORMATS = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16")

#: What a provider may be off by, relative to PyTorch eager, before it is not worth timing: losses
#: of the warm-up, and gradient norms. It is to catch mistakes, not rounding.
TOLERANCE = {"float32": (1e-3, 1e-2), "bfloat16": (2e-2, 0.5)}

LOSS_SEEDS = (0, 1, 2, 3, 4)
LOSS_CASE = Case(batch=8, image=64)


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
class StepRow(TimedRow):
    """One provider on one case; a line of ``resnet_step.csv``."""

    batch: int
    image: int
    format: str
    dtype: str
    warmup_peak_bytes: float = math.nan
    loss_error: float = math.nan
    gradient_error: float = math.nan


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


# --- time and memory ------------------------------------------------------------------------------


@contextlib.contextmanager
def workers(plan: Plan, case: Case) -> Iterator[Callable[[str], Worker]]:
    """Start workers by the name of their provider; they end with the block."""
    with contextlib.ExitStack() as stack:

        def start(provider: str) -> Worker:
            # Told to PyTorch as well; batchnorm must know before it starts its threads.
            environment = {"OMP_NUM_THREADS": str(plan.threads)}
            worker = Worker(
                WORKER,
                "Training",
                environment=environment | (KEEP_MEMORY if provider.endswith(KEPT) else {}),
                provider=provider,
                case=asdict(case),
                threads=plan.threads,
                seed=plan.seed,
                warmup=plan.warmup,
                rate=LEARNING_RATE,
            )
            return stack.enter_context(worker)

        yield start


def measure_case(case: Case, plan: Plan, started: Started) -> list[StepRow]:
    """Check every provider against PyTorch eager, then time those that are right in rounds."""
    rows: dict[str, StepRow] = {}
    ready: dict[str, Worker] = {}
    eager: dict[str, Any] | None = None

    def failed(provider: str, number: int, error: WorkerError) -> None:
        detail = f"in round {number}: {error}" if number else str(error)
        rows[provider] = replace(rows[provider], status="failed", detail=detail)

    with workers(plan, case) as start:
        for provider in plan.providers:
            started(f"{case.label}: warm-up of {provider}")
            rows[provider] = StepRow(provider=provider, **case.columns)
            try:
                # One after another: the warm-up of one would be in the way of another's compiler.
                worker = start(provider)
                found = worker.ask("warmed_up")
            except WorkerError as error:
                failed(provider, 0, error)
                continue
            if provider == EAGER:
                eager = found
            rows[provider] = check(rows[provider], found, eager)
            if rows[provider].status == "ok":
                ready[provider] = worker

        def take(worker: Worker) -> Sample:
            return Sample(*worker.ask("step"))

        samples = interleave(
            {provider: partial(take, worker) for provider, worker in ready.items()},
            min_rounds=plan.rounds,
            seed=plan.seed,
            started=lambda number: started(f"{case.label}: round {number} of {plan.rounds}"),
            failed=failed,
        )
        for provider, found in samples.items():
            row = timed(rows[provider], found, samples.get(EAGER))
            rows[provider] = replace(row, **ready[provider].ask("memory"))
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


# --- profile --------------------------------------------------------------------------------------


def profile(case: Case, plan: Plan, started: Started) -> list[ProfileRow]:
    """Where the time of a step goes, for each provider."""
    rows = []
    for provider in plan.providers:
        started(f"{case.label}: profile of {provider}")
        try:
            with workers(plan, case) as start:
                worker = start(provider)
                worker.ask("warmed_up")
                taken = [Sample(*worker.ask("step")) for _ in range(plan.rounds)]
                groups = {}
                if provider != COMPILED:
                    groups = worker.ask("profile", steps=plan.rounds)
        except WorkerError as error:
            raise WorkerError(f"{provider}, {case.label}: {error}") from error
        row = ProfileRow(
            provider=provider,
            group="step",
            ms=float(np.median([one.seconds for one in taken])) * 1e3,
            page_faults=float(np.median([one.faults for one in taken])),
            **case.columns,
        )
        total = sum(groups.values())
        rows += [
            replace(row, group=name, ms=ms, share=ms / total, page_faults=math.nan)
            for name, ms in groups.items()
        ]
        rows.append(row)
    return rows


# --- the command line -----------------------------------------------------------------------------


def batch_sizes(text: str) -> tuple[int, ...]:
    # In the last stage an image may be one value: a batch of one would leave nothing to normalize.
    return tuple(command.at_least(2)(part.strip()) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    of_rounds = "timed steps; 30 if left out, 5 with --profile"
    parser = command.make_parser(__file__, __doc__, rounds=None, of_rounds=of_rounds)
    add, among, at_least = parser.add_argument, command.among, command.at_least
    add("--profile", action="store_true", help="profile the largest batch in float32 instead")
    add("--quick", action="store_true", help="one small case, few rounds")
    add("--batches", type=batch_sizes, metavar="A,B", help="batch sizes; 8,16 if left out")
    add("--image", type=at_least(32), help="height and width; 224 if left out")
    add("--formats", type=among(FORMATS), metavar="A,B", help=" and ".join(FORMATS))
    add("--dtypes", type=among(DTYPES), metavar="A,B", help=" and ".join(DTYPES))
    add("--providers", type=among(PROVIDERS), metavar="A,B", help=", ".join(PROVIDERS))
    add("--warmup", type=at_least(1), help="steps before the rounds; 5 if left out")
    add("--loss-steps", type=at_least(0), help="steps of a loss curve; 50 if left out, 0 for none")
    add("--threads", type=at_least(1), help="threads for every provider; 2 if left out")
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
            for dtype, name, batch in product(dtypes, formats, batches)
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


STEP_COLUMNS = {
    "": "{0.batch}x3x{0.image}x{0.image} {0.format} {0.dtype}",
    "provider": "{0.provider}",
    "status": "{0.status}",
    "ms": "{0.p50_ms:.1f}",
    "of eager": "{0.ratio:.3f}",
    "95 %": "{0.ratio_low:.3f} to {0.ratio_high:.3f}",
    "faults": "{0.page_faults:.0f}",
    "peak MB": "{0.peak_mb:.0f}",
}
LOSS_COLUMNS = {
    "run": "{0.run}",
    "seed": "{0.seed:d}",
    "largest difference": "{0.largest_difference:.1e}",
    "verdict": "{0.verdict}",
}
PROFILE_COLUMNS = {
    "": "{0.batch}x3x{0.image}x{0.image} {0.format}",
    "provider": "{0.provider}",
    "group": "{0.group}",
    "ms": "{0.ms:.1f}",
    "share": "{0.share:.1%}",
    "faults": "{0.page_faults:.0f}",
}


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    plan = make_plan(options)
    about = {
        "threads": plan.threads,
        "seed": plan.seed,
        "rounds": plan.rounds,
        "warmup": plan.warmup,
        "learning_rate": LEARNING_RATE,
    }
    if options.profile:
        with steps(len(plan.cases) * len(plan.providers)) as started:
            profiles = [row for case in plan.cases for row in profile(case, plan, started)]
        files |= {"resnet_profile.csv": profiles, "resnet_profile.json": about}
        command.show(profiles, PROFILE_COLUMNS)
        return []
    losses: list[LossRow] = []
    compares = plan.loss_steps > 0 and CONVERTED in plan.providers
    total = len(plan.cases) * (len(plan.providers) + plan.rounds)
    with steps(total + compares * 5 * len(plan.loss_seeds)) as started:
        rows = [row for case in plan.cases for row in measure_case(case, plan, started)]
        if compares:
            import torch

            torch.set_num_threads(plan.threads)
            losses = compare_losses(plan.loss_case, plan.loss_steps, plan.loss_seeds, started)
    files |= {"resnet_losses.csv": losses, "resnet_step.csv": rows, "resnet_step.json": about}
    command.show(rows, STEP_COLUMNS)
    if losses:
        title = f"largest relative difference of {plan.loss_steps} losses to {EAGER}"
        command.show(losses, LOSS_COLUMNS, title=title)
    troubles = [
        f"{row.provider}, {row.batch} {row.format} {row.dtype}: {row.status}, {row.detail}"
        for row in rows
        if row.status != "ok"
    ]
    if any(row.verdict == "fail" for row in losses):
        troubles.append("the losses after convert differ by more than rounding explains")
    return troubles


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(make_parser(), measure, arguments, needs=("torch",))


if __name__ == "__main__":
    sys.exit(main())
