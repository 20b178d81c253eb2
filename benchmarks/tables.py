"""Put the benchmarks' numbers into README.md and docs, or check that they are there.

python benchmarks/tables.py          write the tables
python benchmarks/tables.py --check  exit 1 if a page holds another one

A table stands between two markers, of which the first names it: see `TABLES`. Each is made from the
files of that name in benchmarks/results, and left out while there are none.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, str]


# --- reading and writing --------------------------------------------------------------------------


def read(name: str) -> list[Row]:
    """The rows of a CSV file."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_about(name: str) -> dict[str, Any]:
    """What was measured on."""
    about: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return about


def markdown(
    caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], *, words: int = 1
) -> str:
    """A caption and a table, whose first `words` columns hold words and the others numbers."""
    columns = list(head)
    lines = [caption, ""] if caption else []
    lines.append(f"| {' | '.join(columns)} |".replace("|  |", "| |"))
    lines.append("|" + ":--|" * words + "--:|" * (len(columns) - words))
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def by(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows of each case, that is with the same values in `names`, by their provider."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["provider"]] = row
    return found


def plain(value: float) -> str:
    """1e6 and 3e-7 rather than 1e+06 and 3e-07."""
    if value == 0 or 1 <= value < 1000:
        return f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- one function for each table ------------------------------------------------------------------

NAMES = {
    "batchnorm": "batchnorm",
    "batchnorm-out": "batchnorm, `out=` given",
    "torch": "PyTorch",
    "torch.compile": "PyTorch, `torch.compile`",
    "jax": "JAX, `jit`",
    "numpy": "NumPy, textbook",
}
OPS = ("forward", "inference", "backward")


def speed() -> str:
    """Speed and accuracy of all providers: `batchnorm bench --out benchmarks/results`."""
    timed, accuracy, about = read("speed"), read("accuracy"), read_about("environment")
    offsets = sorted({float(row["offset"]) for row in accuracy})

    def speedup(provider: str, op: str) -> str:
        found = [
            1 / float(row["ratio"])
            for row in timed
            if row["provider"] == provider and row["op"] == op and row["ratio"]
        ]
        if not found:
            return "–"
        if provider == "torch":
            return "1"
        return f"{statistics.geometric_mean(found):.2f} ({min(found):.2f})"

    def error(provider: str, offset: float) -> str:
        """The worse of the layouts to one digit; NaN where any is."""
        found = [
            float(row["max_error"] or "nan")
            for row in accuracy
            if (row["provider"], float(row["offset"]), row["status"]) == (provider, offset, "ok")
        ]
        if any(map(math.isnan, found)):
            return "NaN"
        return plain(float(f"{max(found):.0e}")) if found else "–"

    measured = {row["provider"] for row in (*timed, *accuracy)}
    cases = {(row["shape"], row["layout"]) for row in timed}
    versions = about["versions"]
    against = ", ".join(
        f"{name} {versions[package]}"
        for package, name in (("numpy", "NumPy"), ("torch", "PyTorch"), ("jax", "JAX"))
        if package in versions
    )
    return markdown(
        f"Speed: times as fast as PyTorch eager, geometric mean over {len(cases)} cases (float32, "
        "channel-first and channel-last), in parentheses the worst of them. Error: largest "
        f"|y − y_exact| of the forward pass on float32 N(mean, 1). {about['cpu']}, "
        f"{plural(about['threads'], 'thread')}; {against}.",
        ["", *OPS, *(f"error, mean {plain(offset)}" for offset in offsets)],
        [
            [name, *(speedup(key, op) for op in OPS), *(error(key, offset) for offset in offsets)]
            for key, name in NAMES.items()
            if key in measured
        ],
    )


def resnet_step() -> str:
    """Training steps of a ResNet-18: `benchmarks/resnet_step.py`."""
    rows, about = read("resnet_step"), read_about("resnet_step")
    providers = list(dict.fromkeys(row["provider"] for row in rows))

    def cell(row: Row) -> str:
        text = f"{1 / float(row['ratio']):.2f}" if row["status"] == "ok" else row["status"]
        if row["provider"] == "torch eager":
            text = f"{float(row['p50_ms']) / 1e3:.2f} s"
        return f"{text}, {float(row['peak_bytes']) / 1e6:.0f} MB"

    return markdown(
        "Training steps of a ResNet-18 at 224×224. First column: seconds, others: times as fast as "
        f"it, median of {about['rounds']} interleaved rounds; and peak memory. {about['cpu']}, "
        f"{about['threads']} threads, PyTorch {about['versions']['torch']}.",
        ["", *providers],
        [
            [f"{dtype}, batch {batch}, {form}", *(cell(found[name]) for name in providers)]
            for (dtype, batch, form), found in by(rows, "dtype", "batch", "format").items()
        ],
    )


def resnet_profile() -> str:
    """Where a step's time goes: `benchmarks/resnet_step.py --profile`."""
    norms = ("batch norm forward", "batch norm backward", "relu", "add")
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read("resnet_profile"):
        case = f"batch {row['batch']}, {row['format']}", row["provider"]
        cases.setdefault(case, {})[row["group"]] = row
    lines = []
    for case, groups in cases.items():
        step = groups.pop("step")
        if not groups:  # torch.compile
            continue
        ms = {group: float(row["ms"]) for group, row in groups.items()}
        convolutions = sum(value for group, value in ms.items() if group.startswith("convolution"))
        normalization = sum(ms[group] for group in norms)
        rest = sum(ms.values()) - convolutions - normalization
        numbers = (convolutions, normalization, rest, float(step["ms"]), float(step["page_faults"]))
        lines.append([*case, *(f"{number:.0f}" for number in numbers)])
    return markdown(
        "Milliseconds of a step under torch.profiler, and by the clock without it.",
        [
            "",
            "provider",
            "convolutions",
            "batch norm, ReLU, additions",
            "the rest",
            "by the clock",
            "page faults",
        ],
        lines,
        words=2,
    )


def sync_step() -> str:
    """What shared statistics cost: `benchmarks/sync_step.py`."""
    rows, about = read("sync_step"), read_about("sync_step")
    first, *others = dict.fromkeys(row["provider"] for row in rows)
    return markdown(
        f"Forward and backward pass, float32, {about['processes']} processes with gloo on one "
        f"machine, one thread each, median of {about['rounds']} rounds. {about['cpu']}.",
        ["input of each process", first, *others],
        [
            [
                shape.replace("x", "×"),
                f"{float(found[first]['p50_ms']):.1f} ms",
                *(f"{float(found[name]['ratio']):.1f} times" for name in others),
            ]
            for (shape,), found in by(rows, "shape").items()
        ],
    )


WAYS = {
    "forward pass": "a forward pass in evaluation",
    "running averages": "running averages, 20 passes at momentum 0.1",
    "update_bn": "`torch.optim.swa_utils.update_bn`",
    "fvcore": "fvcore's `update_bn_stats`",
    "precise": '`recalibrate`, "precise"',
    "exact": '`recalibrate`, "exact"',
    "exact, 256 MB": '`recalibrate`, "exact", 256 MiB',
    "exact, no memory": '`recalibrate`, "exact", no memory',
}


def recalibrate() -> str:
    """What recalibration costs: `benchmarks/recalibrate.py`."""
    rows, about = read("recalibrate"), read_about("recalibrate")
    return markdown(
        f"ResNet-18, {rows[0]['batches']} batches of {rows[0]['batch']} images of "
        f"{rows[0]['image']}², processor time, median of {rows[0]['rounds']} rounds. "
        f"{about['cpu']}, one thread; PyTorch {about['versions']['torch']}.",
        ["", "time, in forward passes", "extra memory", "forwards begun"],
        [
            [
                WAYS[row["provider"]],
                f"{float(row['ratio']):.2f}",
                f"{float(row['peak_bytes']) / 2**20:,.0f} MiB",
                row["forwards"],
            ]
            for row in rows
        ],
    )


def recalibrate_errors() -> str:
    """How far from brute force the statistics are: `benchmarks/recalibrate.py --errors`."""
    shown = ("1", "2", "4", "8")
    errors: dict[str, dict[str, float]] = {}
    for row in read("recalibrate_errors"):
        errors.setdefault(row["estimator"], {})[row["layer"]] = float(row["error"])

    def cell(error: float) -> str:
        return f"{error:.2f}" if error >= 0.1 else plain(error)

    return markdown(
        "",
        ["", *(f"layer {k}" for k in shown)],
        [[WAYS[name], *(cell(found[k]) for k in shown)] for name, found in errors.items()],
    )


def dataset_stats() -> str:
    """A file larger than memory: `benchmarks/dataset_stats.py`."""
    rows, about = read("dataset_stats"), read_about("dataset_stats")
    first = rows[0]

    def cells(row: Row) -> Iterable[str]:
        yield f"`{row['provider']}`"
        yield f"{float(row['p50_ms']) / 1e3:.1f} s, {float(row['ratio']):.2f} × cat"
        yield f"{float(row['gb_per_s']):.2f} GB/s"
        yield f"{float(row['peak_bytes']) / 1e6:,.0f} MB" if row["peak_bytes"] else ""
        for name in ("mean_error", "var_error"):
            yield plain(float(row[name])) if row[name] else ""

    return markdown(
        f"float32 ({int(first['rows']):,}, {first['features']}), "
        f"{int(first['bytes']) / 1e9:.0f} GB, at mean 10,000 and deviation 1; "
        f"median of {first['rounds']} interleaved rounds, file not "
        f"in the system's cache. {about['cpu']}, {about['threads']} threads; scikit-learn "
        f"{about['versions']['scikit-learn']}.",
        ["", "time", "throughput", "most memory", "error of mean", "error of variance"],
        map(cells, rows),
    )


def small_calls() -> str:
    """What small calls cost: `benchmarks/small_calls.py`."""
    rows, about = read("small_calls"), read_about("small_calls")
    lines = []
    for (op,), found in by(rows, "op").items():
        for provider in found:
            of = {r["shape"]: r for r in rows if (r["op"], r["provider"]) == (op, provider)}
            cells = (
                f"{1e3 * float(r['p50_ms']):.1f} µs, {float(r['ratio']):.2f}" for r in of.values()
            )
            lines.append([op, f"`{provider}`", *cells])
    shapes = dict.fromkeys(row["shape"] for row in rows)
    return markdown(
        "Whole calls on small arrays, float32: microseconds, and times torch's layer. Median of "
        f"{about['rounds']} interleaved rounds. {about['cpu']}, one thread; PyTorch "
        f"{about['versions']['torch']}.",
        ["", "", *(shape.replace("x", "×") for shape in shapes)],
        lines,
        words=2,
    )


#: Name of a table to the page that holds it and what makes it.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "speed": ("README.md", speed),
    "resnet_step": ("docs/torch.md", resnet_step),
    "resnet_profile": ("docs/torch.md", resnet_profile),
    "small_calls": ("docs/torch.md", small_calls),
    "sync_step": ("docs/howto/distributed.md", sync_step),
    "recalibrate": ("docs/statistics.md", recalibrate),
    "recalibrate_errors": ("docs/statistics.md", recalibrate_errors),
    "dataset_stats": ("docs/howto/large-data.md", dataset_stats),
}
END = "<!-- /benchmark -->"


def insert(page: str, name: str, table: str) -> str:
    """`page` with `table` between the markers of this name."""
    begin = f"<!-- benchmark: {name}, made by benchmarks/tables.py -->"
    before, found, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise SystemExit(f"the page of table {name!r} must hold the lines {begin} and {END}")
    return f"{before}{begin}\n{table}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the tables, or compare them with --check."""
    wrong = []
    for name, (page, make) in TABLES.items():
        if not (RESULTS / f"{name}.csv").exists():
            continue
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        wanted = insert(text, name, make())
        if wanted == text:
            continue
        if "--check" in arguments:
            wrong.append(f"{page} does not hold the table {name!r} of benchmarks/results")
        else:
            path.write_text(wanted, encoding="utf-8")
    for line in wrong:
        print(f"{line}; run python benchmarks/tables.py", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
