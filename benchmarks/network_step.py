"""Time whole networks by PyTorch, by torch.compile, and after `convert`.

python benchmarks/network_step.py --out benchmarks/results
python benchmarks/network_step.py --out benchmarks/results --isa avx2
python benchmarks/network_step.py --out benchmarks/results --profile
python benchmarks/network_step.py --out benchmarks/results --losses
python benchmarks/network_step.py --quick

The first writes network_step.csv and network_step.json (what it was measured on), the second
network_step_avx2.csv and .json, the third network_profile.csv and .json, the fourth
network_losses.csv and .json, the fifth nothing. Files of an earlier run are replaced.

Training: a run is zero_grad, forward, loss, backward, and SGD with momentum. Inference: a run is a
forward of a model in evaluation mode, trained for a few steps, without gradients. The networks are
those of `networks.py`; inputs and targets are random. Each provider runs in a process of its own
(`network_worker.py`); in every round each of them runs once, in an order drawn anew, while the
others wait; of small networks, several processes share the rounds. A short run is repeated, and the
mean taken. Providers that keep memory run under the environment variables of
`network_worker.KEEP_MEMORY`, and with ``--isa`` all run under those of `ISA`.

network_step.csv
    ``isa``: instruction set of batchnorm's core. ``ratio`` is to PyTorch eager. ``peak_bytes``: the
    most memory resident during the rounds, less what was before the model and its inputs were made;
    ``warmup_peak_bytes`` the same until the end of the warm-up, compilation included.
    ``loss_error, gradient_error``: largest relative difference to PyTorch eager of the losses of
    the warm-up, and of the gradient norms of all parameters after its first step.
    ``output_error``: norm of the difference of an inference's outputs, relative to their norm.

network_losses.csv
    Largest relative difference between the losses of 50 float32 steps of ResNet-18 and those of
    PyTorch eager, channels first, for several seeds. Rounding grows from step to step, so what a
    run has to be compared with is not zero but PyTorch against itself, when only its rounding
    differs: with the examples of each batch in the opposite order, and channels-last. ``verdict``
    is ``pass`` where the median over the seeds is at most twice the larger of these two's.

network_profile.csv
    ``ms`` and ``share`` of a run by group of operators, by torch.profiler, and in the row ``run``
    the median time by the clock without the profiler, and page faults. What torch.compile makes
    of the operators cannot be told apart, so it has this row only.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import command
import network_worker
import numpy as np
from network_losses import compare_losses, relative_difference
from network_worker import (
    COMPILED,
    CONVERTED,
    EAGER,
    INFERENCE,
    KEEP_MEMORY,
    KEPT,
    LEARNING_RATE,
    PROVIDERS,
    TRAINING,
    WIDTHS,
    Case,
)

import batchnorm
from batchnorm.bench.environment import resolve_threads
from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import Sample, interleave
from batchnorm.bench.worker import Worker, WorkerError
from batchnorm.errors import ArgumentError
from batchnorm.progress import steps
from batchnorm.workers import usable_cpus

#: The file that defines the worker's class.
WORKER = Path(network_worker.__file__)

#: Networks to batch sizes of training and of inference. Those of `WIDTHS` have only one batch size,
#: and only contiguous inputs.
NETWORKS = {
    "resnet18": {TRAINING: (8,), INFERENCE: (1, 8)},
    "mobilenet_v2": {TRAINING: (8,), INFERENCE: (1, 8)},
    "densenet121": {TRAINING: (4,), INFERENCE: (1, 8)},
    "critic": {TRAINING: (256,), INFERENCE: (256,)},
    "policy": {TRAINING: (32,), INFERENCE: (32,)},
}
PASSES = (TRAINING, INFERENCE)
FORMATS = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16")

#: Instruction set to the environment that keeps batchnorm, PyTorch and oneDNN to it. torch.compile
#: would take what it has compiled for another one from its cache, and crash at times.
ISA = {
    "avx2": {
        "BATCHNORM_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
}

#: Number of processes, one after the other, that share the rounds of a small network: its steps
#: differ by 10 % from process to process.
PROCESSES = 8

#: What a provider may be off by, relative to PyTorch eager, before it is not worth timing: losses
#: of the warm-up, gradient norms, and outputs. It is to catch mistakes, not rounding: in a
#: MobileNetV2, channels-last, gradient norms of both are 0.8 % off those in float64.
TOLERANCE = {"float32": (1e-3, 3e-2, 1e-3), "bfloat16": (2e-2, 0.5, 0.1)}

#: A linear layer's bias ahead of a batch norm has a gradient of zero, of which rounding is left. A
#: gradient norm below this share of the largest is compared as if it were as large.
GRADIENT_FLOOR = 1e-2

LOSS_SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how long."""

    cases: tuple[Case, ...]
    providers: tuple[str, ...]
    rounds: int = 30
    warmup: int = 5
    seed: int = 0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepRow(Case, TimedRow):
    """One provider on one case; a line of ``network_step.csv``."""

    warmup_peak_bytes: float = math.nan
    loss_error: float = math.nan
    gradient_error: float = math.nan
    output_error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class ProfileRow(Case):
    """One group of operators of one provider; a line of ``network_profile.csv``."""

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
            environment = {"OMP_NUM_THREADS": str(case.threads)} | plan.environment
            worker = Worker(
                WORKER,
                "Runner",
                environment=environment | (KEEP_MEMORY if provider.endswith(KEPT) else {}),
                provider=provider,
                case=asdict(case),
                seed=plan.seed,
                warmup=plan.warmup,
            )
            return stack.enter_context(worker)

        yield start


def sets_of_processes(case: Case, plan: Plan) -> int:
    """How many processes of each provider share the rounds."""
    return min(PROCESSES, plan.rounds) if case.network in WIDTHS else 1


def measure_case(case: Case, plan: Plan, started: Started) -> list[StepRow]:
    """Measure in one set of processes, or in several, with as many rounds in all."""
    sets = sets_of_processes(case, plan)
    rows: dict[str, StepRow] = {}
    samples: dict[str, list[Sample]] = {}
    for number in range(sets):
        rounds = plan.rounds * (number + 1) // sets - plan.rounds * number // sets
        part = replace(plan, rounds=rounds)
        measured, found = measure_in_processes(case, part, started, order=plan.seed + number)
        for provider, row in measured.items():
            if provider not in rows or rows[provider].status == "ok":
                rows[provider] = row
        for provider, taken in found.items():
            samples.setdefault(provider, []).extend(taken)
    return [
        # Not if one of its processes has failed.
        timed(row, samples[provider], samples.get(EAGER))
        if len(samples.get(provider, ())) == plan.rounds
        else row
        for provider, row in rows.items()
    ]


def measure_in_processes(
    case: Case, plan: Plan, started: Started, *, order: int
) -> tuple[dict[str, StepRow], dict[str, list[Sample]]]:
    """Check every provider against PyTorch eager, then sample those that are right in rounds.

    `order` is the seed of the providers' order within the rounds.
    """
    rows: dict[str, StepRow] = {}
    ready: dict[str, Worker] = {}
    eager: dict[str, Any] | None = None

    def failed(provider: str, number: int, error: WorkerError) -> None:
        detail = f"in round {number}: {error}" if number else str(error)
        rows[provider] = replace(rows[provider], status="failed", detail=detail)

    with workers(plan, case) as start:
        for provider in plan.providers:
            started(f"{case.label}: warm-up of {provider}")
            rows[provider] = StepRow(provider=provider, **asdict(case))
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
            return Sample(*worker.ask("run"))

        samples = interleave(
            {provider: partial(take, worker) for provider, worker in ready.items()},
            min_rounds=plan.rounds,
            seed=order,
            started=lambda number: started(f"{case.label}: round {number} of {plan.rounds}"),
            failed=failed,
        )
        for provider in samples:
            rows[provider] = replace(rows[provider], **ready[provider].ask("memory"))
    return rows, samples


def check(row: StepRow, found: dict[str, Any], eager: dict[str, Any] | None) -> StepRow:
    """Hold what a provider's warm-up gave against PyTorch eager's."""
    if eager is None:
        return row
    losses, gradients, outputs = TOLERANCE[row.dtype]
    if row.pass_ == TRAINING:
        loss_error = relative_difference(found["losses"], eager["losses"])
        gradient_error = relative_difference(
            found["gradient_norms"], eager["gradient_norms"], floor=GRADIENT_FLOOR
        )
        row = replace(row, loss_error=loss_error, gradient_error=gradient_error)
        errors = {
            "losses": (loss_error, losses),
            "gradient norms": (gradient_error, gradients),
        }
    else:
        difference = np.subtract(found["outputs"], eager["outputs"])
        output_error = float(np.linalg.norm(difference) / np.linalg.norm(eager["outputs"]))
        row = replace(row, output_error=output_error)
        errors = {"outputs": (output_error, outputs)}
    for what, (error, allowed) in errors.items():
        if not error <= allowed:
            detail = f"{what} off by {error:.2g}, where at most {allowed:g} is right"
            return replace(row, status="wrong", detail=detail)
    return row


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How many times as fast as PyTorch eager a provider is."""

    pass_: str
    dtype: str
    isa: str
    threads: int
    provider: str
    speedup: float
    worst: float
    worst_case: str


def summarize(rows: Sequence[StepRow]) -> list[Summary]:
    """Geometric means over networks, of which each counts the same however many cases it has."""
    groups: dict[tuple[Any, ...], list[StepRow]] = {}
    for row in rows:
        if row.provider != EAGER and row.ratio > 0:
            key = (row.pass_, row.dtype, row.isa, row.threads, row.provider)
            groups.setdefault(key, []).append(row)
    found = []
    for (pass_, dtype, isa, threads, provider), group in groups.items():
        networks: dict[str, list[float]] = {}
        for row in group:
            networks.setdefault(row.network, []).append(1 / row.ratio)
        worst = max(group, key=lambda row: row.ratio)
        summary = Summary(
            pass_=pass_,
            dtype=dtype,
            isa=isa,
            threads=threads,
            provider=provider,
            speedup=statistics.geometric_mean(map(statistics.geometric_mean, networks.values())),
            worst=1 / worst.ratio,
            worst_case=worst.label,
        )
        found.append(summary)
    return found


# --- profile --------------------------------------------------------------------------------------


def profile(case: Case, plan: Plan, started: Started) -> list[ProfileRow]:
    """Where the time of a run goes, for each provider."""
    rows = []
    for provider in plan.providers:
        started(f"{case.label}: profile of {provider}")
        try:
            with workers(plan, case) as start:
                worker = start(provider)
                worker.ask("warmed_up")
                taken = [Sample(*worker.ask("run")) for _ in range(plan.rounds)]
                groups = {}
                if provider != COMPILED:
                    groups = worker.ask("profile", runs=plan.rounds)
        except WorkerError as error:
            raise WorkerError(f"{provider}, {case.label}: {error}") from error
        row = ProfileRow(
            provider=provider,
            group="run",
            ms=float(np.median([one.seconds for one in taken])) * 1e3,
            page_faults=float(np.median([one.faults for one in taken])),
            **asdict(case),
        )
        total = sum(groups.values())
        rows += [
            replace(row, group=name, ms=ms, share=ms / total, page_faults=math.nan)
            for name, ms in groups.items()
            if ms > 0
        ]
        rows.append(row)
    return rows


# --- the command line -----------------------------------------------------------------------------


def integers(least: int) -> Callable[[str], tuple[int, ...]]:
    """A reader of integers joined by commas."""
    read = command.at_least(least)
    return lambda text: tuple(read(part.strip()) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    of_rounds = "timed runs; 30 if left out, 5 with --profile"
    parser = command.make_parser(__file__, __doc__, rounds=None, of_rounds=of_rounds)
    add, among, at_least = parser.add_argument, command.among, command.at_least
    instead = parser.add_mutually_exclusive_group().add_argument
    instead(
        "--profile",
        action="store_true",
        help="profile the largest batch in float32, with the most threads, instead",
    )
    instead("--losses", action="store_true", help="compare loss curves of ResNet-18 instead")
    add("--quick", action="store_true", help="small images, one case of each, no torch.compile")
    for name, known in (("networks", tuple(NETWORKS)), ("passes", PASSES), ("formats", FORMATS)):
        add(f"--{name}", type=among(known), metavar="A,B", help=", ".join(known))
    add(
        "--dtypes",
        type=among(DTYPES),
        default=DTYPES[:1],
        metavar="A,B",
        help=f"{' and '.join(DTYPES)}; float32 if left out",
    )
    add(
        "--batches",
        type=integers(1),
        metavar="A,B",
        help="batch sizes of networks for images; 8 in training (DenseNet-121: 4) and 1,8 "
        "in inference if left out",
    )
    add("--image", type=at_least(32), help="height and width; 224 if left out")
    add(
        "--providers",
        type=among(PROVIDERS),
        metavar="A,B",
        help=f"{', '.join(PROVIDERS)}; the first three if left out",
    )
    add("--warmup", type=at_least(1), help="runs before the rounds; 5 if left out")
    add(
        "--threads",
        dest="thread_counts",
        type=integers(1),
        metavar="A,B",
        help="threads for every provider; 1,2 if left out",
    )
    add("--isa", choices=tuple(ISA), help="instruction set; what the machine has if left out")
    return parser


def make_plan(options: argparse.Namespace) -> Plan:
    """What the options ask for."""
    quick = options.quick
    threads = options.thread_counts or (
        (1,) if quick else tuple(range(1, min(2, usable_cpus()) + 1))
    )
    threads = tuple(map(resolve_threads, threads))
    formats = options.formats or (FORMATS[:1] if quick else FORMATS)
    isa = options.isa or batchnorm.show_config()["instruction_set"]
    dtypes = options.dtypes
    if options.profile:
        threads, dtypes = (max(threads),), DTYPES[:1]
    cases = []
    for network, pass_ in product(options.networks or NETWORKS, options.passes or PASSES):
        batches, image = NETWORKS[network][pass_], None
        kinds: tuple[str, ...] = FORMATS[:1]
        if network not in WIDTHS:
            batches = options.batches or (batches[-1:] if quick else batches)
            image = options.image or (64 if quick else 224)
            kinds = formats
        if options.profile:
            batches = (max(batches),)
        cases += [
            Case(
                network=network,
                pass_=pass_,
                batch=batch,
                image=image,
                format=name,
                dtype=dtype,
                threads=count,
                isa=isa,
            )
            for dtype, batch, name, count in product(dtypes, batches, kinds, threads)
        ]

    return Plan(
        cases=tuple(cases),
        providers=options.providers or ((EAGER, CONVERTED) if quick else PROVIDERS[:3]),
        rounds=options.rounds or (3 if quick else 5 if options.profile else 30),
        warmup=options.warmup or (2 if quick else 5),
        seed=options.seed,
        environment=ISA.get(options.isa, {}),
    )


STEP_COLUMNS = {
    "": "{0.label}",
    "dtype": "{0.dtype}",
    "threads": "{0.threads:d}",
    "provider": "{0.provider}",
    "status": "{0.status}",
    "ms": "{0.p50_ms:.4g}",
    "time of eager's": "{0.ratio:.3f}",
    "95 %": "{0.ratio_low:.3f} to {0.ratio_high:.3f}",
    "faults": "{0.page_faults:.0f}",
    "peak MB": "{0.peak_mb:.0f}",
}
SUMMARY_COLUMNS = {
    "": "{0.pass_} {0.dtype} {0.isa}",
    "threads": "{0.threads:d}",
    "provider": "{0.provider}",
    "speedup": "{0.speedup:.3f}",
    "worst": "{0.worst:.3f}",
    "of": "{0.worst_case}",
}
LOSS_COLUMNS = {
    "run": "{0.run}",
    "seed": "{0.seed:d}",
    "largest difference": "{0.largest_difference:.1e}",
    "verdict": "{0.verdict}",
}
PROFILE_COLUMNS = {
    "": "{0.label}",
    "provider": "{0.provider}",
    "group": "{0.group}",
    "ms": "{0.ms:.4g}",
    "share": "{0.share:.1%}",
    "faults": "{0.page_faults:.0f}",
}


def measure_losses(options: argparse.Namespace, files: command.Files) -> list[str]:
    """Compare loss curves, in this process."""
    import torch

    if options.isa:
        raise ArgumentError(
            "isa cannot be given with --losses, which runs in a process that has started. Set "
            "BATCHNORM_ISA instead."
        )
    if options.rounds:
        raise ArgumentError("rounds mean nothing with --losses, which times nothing; leave it out.")
    quick, threads = options.quick, resolve_threads(max(options.thread_counts or (1,)))
    torch.set_num_threads(threads)
    case = Case(network="resnet18", pass_=TRAINING, batch=8, image=32 if quick else 64)
    seeds = LOSS_SEEDS[:1] if quick else LOSS_SEEDS
    number = 5 if quick else 50
    with steps(5 * len(seeds)) as started:
        rows = compare_losses(case, number, seeds, started)
    files |= {"network_losses.csv": rows, "network_losses.json": {"threads": threads}}
    title = f"largest relative difference of {number} losses to {EAGER}"
    command.show(rows, LOSS_COLUMNS, title=title)
    if any(row.verdict == "fail" for row in rows):
        return ["the losses after convert differ by more than rounding explains"]
    return []


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    if options.losses:
        return measure_losses(options, files)
    plan = make_plan(options)
    name = ("network_profile" if options.profile else "network_step") + (
        f"_{options.isa}" if options.isa else ""
    )
    files[f"{name}.json"] = {
        "instruction_set": plan.cases[0].isa,
        "environment": plan.environment,
        "threads": sorted({case.threads for case in plan.cases}),
        "seed": plan.seed,
        "rounds": plan.rounds,
        "warmup": plan.warmup,
        "learning_rate": LEARNING_RATE,
    }
    if options.profile:
        with steps(len(plan.cases) * len(plan.providers)) as started:
            profiles = [row for case in plan.cases for row in profile(case, plan, started)]
        files[f"{name}.csv"] = profiles
        command.show(profiles, PROFILE_COLUMNS)
        return []
    warm_ups = sum(sets_of_processes(case, plan) for case in plan.cases) * len(plan.providers)
    with steps(warm_ups + len(plan.cases) * plan.rounds) as started:
        rows = [row for case in plan.cases for row in measure_case(case, plan, started)]
    files[f"{name}.csv"] = rows
    command.show(rows, STEP_COLUMNS)
    title = f"geometric means over networks of the time of {EAGER} over the provider's"
    command.show(summarize(rows), SUMMARY_COLUMNS, title=title)
    return [
        f"{row.provider}, {row.label} {row.dtype}, threads {row.threads}: {row.status}, "
        f"{row.detail}"
        for row in rows
        if row.status != "ok"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(make_parser(), measure, arguments, needs=("torch",))


if __name__ == "__main__":
    sys.exit(main())
