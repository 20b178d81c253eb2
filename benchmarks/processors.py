"""Time calls on NumPy arrays with every instruction set, on one thread and more, beside PyTorch.

python benchmarks/processors.py --out benchmarks/results
python benchmarks/processors.py --isas avx2 --threads 1 --shapes 32x64,256x1024

The first writes processors.csv and processors.json (what it was measured on). The cases are those
of `batchnorm bench` and three small ones; in each, batchnorm, PyTorch eager and, where x is small,
NumPy as textbooks write it are compared with the exact answer, and then timed in interleaved rounds
with a plain copy of x. The columns are those of ``speed.csv`` (`batchnorm.bench.harness.SpeedRow`),
with ``isa``, ``threads`` and ``data``: ``floor_bytes`` must be moved at the least, and
``times_floor`` says how far off a call is. Data are in the ``cache`` where calls repeat on the same
arrays, and in ``memory`` where each call takes another copy of them, as the layers of a network do;
arrays from 256 KiB on are measured both ways. A geometric mean is over the cases of
`batchnorm bench`, a worst case over all.

PyTorch uses the best instruction set it knows of; ATEN_CPU_CAPABILITY=avx2 in the environment makes
it take AVX2, as on a machine that has no other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle

import command

from batchnorm import _core
from batchnorm.bench.cases import (
    OPS,
    SHAPES,
    Inputs,
    aligned_empty,
    make_cases,
    make_inputs,
    parse_shape,
)
from batchnorm.bench.environment import limited_threads
from batchnorm.bench.harness import Plan, SpeedRow, UsableProviders, measure
from batchnorm.bench.providers import PROVIDERS, Call, Provider, copies
from batchnorm.errors import ArgumentError
from batchnorm.progress import steps
from batchnorm.workers import usable_cpus

SMALL = ((32, 64), (128, 100), (256, 256))
#: Bytes of x up to which NumPy is timed as well.
TEXTBOOK = 1 << 18
#: Bytes of x below which calls are only timed on data in the cache.
NEAR = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Row(SpeedRow):
    """One provider on one case; a line of ``processors.csv``."""

    isa: str
    threads: int
    data: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """batchnorm's times as fast as PyTorch eager, over the cases of an operation."""

    op: str
    data: str
    isa: str
    threads: int
    mean: float
    worst: float
    worst_case: str


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Geometric means and worst cases of batchnorm, by operation, data, set and threads."""
    shapes = {"x".join(map(str, shape)) for shape in SHAPES}
    found = []
    for key in dict.fromkeys((row.op, row.data, row.isa, row.threads) for row in rows):
        ours = [
            row
            for row in rows
            if (row.op, row.data, row.isa, row.threads) == key
            and row.provider == "batchnorm"
            and row.status == "ok"
        ]
        if not ours:
            continue
        listed = [row.speedup for row in ours if row.shape in shapes] or [r.speedup for r in ours]
        worst = min(ours, key=lambda row: row.speedup)
        found.append(
            Summary(
                op=key[0],
                data=key[1],
                isa=key[2],
                threads=key[3],
                mean=statistics.geometric_mean(listed),
                worst=worst.speedup,
                worst_case=f"{worst.shape} {worst.layout}",
            )
        )
    return found


def away(provider: Provider) -> Provider:
    """The same, but each call on another copy of the arrays, so that it finds none in a cache."""

    def prepare(inputs: Inputs) -> Call:
        copies = 2 + 4 * _core.last_level_cache() // (2 * inputs.x.nbytes)
        calls = []
        for _ in range(copies):
            x, grad_y = (aligned_empty(inputs.x.shape) for _ in range(2))
            x[...], grad_y[...] = inputs.x, inputs.grad_y
            calls.append(provider.prepare(replace(inputs, x=x, grad_y=grad_y)))
        turn = cycle(calls)
        return Call(lambda: next(turn).run(), calls[0].answer)

    return replace(provider, prepare=prepare)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(command.at_least(1)(part.strip()) for part in text.split(","))


def shapes_of(text: str) -> tuple[tuple[int, ...], ...]:
    try:
        return tuple(parse_shape(part.strip()) for part in text.split(","))
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__file__, __doc__, rounds=9)
    add = parser.add_argument
    known = _core.instruction_sets()
    # The baseline is that of machines which hardly exist.
    isas = tuple(name for name in known if name != "baseline") or tuple(known)
    add("--isas", type=command.among(known), default=isas, metavar="A,B", help=", ".join(known))
    counts = "1,2 if left out"
    add("--threads", dest="counts", type=numbers, default=(1, 2), metavar="A,B", help=counts)
    add("--ops", type=command.among(OPS), default=OPS, metavar="A,B", help=", ".join(OPS))
    add("--shapes", type=shapes_of, default=SMALL + SHAPES, metavar="A,B", help="such as 32x64")
    return parser


def measure_all(options: argparse.Namespace, files: command.Files) -> list[str]:
    plan = Plan(shapes=options.shapes, ops=options.ops, min_rounds=options.rounds, budget_s=0.3)
    cases = make_cases(plan.shapes, plan.ops)
    threads = [count for count in options.counts if count <= usable_cpus()]
    before, rows, notes = _core.instruction_set(), list[Row](), list[str]()
    try:
        with steps(len(cases) * len(threads) * len(options.isas)) as started:
            for count in threads:
                with limited_threads(count):
                    wanted = [p for p in PROVIDERS if p.name in ("batchnorm", "torch", "numpy")]
                    for provider in wanted:
                        if provider.set_threads is not None:
                            provider.set_threads(count)
                    for case in cases:
                        inputs = make_inputs(case, seed=options.seed)
                        small = case.nbytes <= TEXTBOOK
                        chosen = [p for p in wanted if small or p.name != "numpy"]
                        for isa in options.isas:
                            started(f"{case.op} {case.label}, {isa}, threads: {count}")
                            _core.use_instruction_set(isa)
                            usable = UsableProviders(chosen, notes.append)
                            rows += [
                                Row(**asdict(row), isa=isa, threads=count, data="cache")
                                for row in measure(inputs, usable, copies(), plan)
                            ]
                            if case.nbytes < NEAR:
                                continue
                            usable = UsableProviders([away(p) for p in chosen], notes.append)
                            rows += [
                                Row(**asdict(row), isa=isa, threads=count, data="memory")
                                for row in measure(
                                    inputs, usable, [away(p) for p in copies()], plan
                                )
                            ]
    finally:
        _core.use_instruction_set(before)
    summary = summarize(rows)
    files["processors.csv"] = rows
    files["processors.json"] = {
        "aten_cpu_capability": os.environ.get("ATEN_CPU_CAPABILITY"),
        "rounds": options.rounds,
        "summary": [asdict(line) for line in summary],
    }
    command.show(
        [row for row in rows if row.provider in ("batchnorm", "numpy")],
        {
            "": "{0.label}",
            "data": "{0.data}",
            "isa": "{0.isa}",
            "threads": "{0.threads}",
            "provider": "{0.provider}",
            "p50 ms": "{0.p50_ms:.4f}",
            "times torch": "{0.speedup:.2f}",
            "times floor": "{0.times_floor:.2f}",
        },
    )
    command.show(
        summary,
        {
            "": "{0.op}",
            "data": "{0.data}",
            "isa": "{0.isa}",
            "threads": "{0.threads}",
            "geometric mean": "{0.mean:.2f}",
            "worst": "{0.worst:.2f}",
            "worst case": "{0.worst_case}",
        },
        title="times as fast as PyTorch eager",
    )
    return [
        f"{row.provider}, {row.label}: {row.status}, {row.detail}"
        for row in rows
        if row.status != "ok"
    ] + list(dict.fromkeys(notes))


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(make_parser(), measure_all, arguments, needs=("torch",))


if __name__ == "__main__":
    sys.exit(main())
