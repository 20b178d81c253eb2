"""Put the benchmarks' numbers into README.md and docs, or check that they are there.

python benchmarks/tables.py          write the tables
python benchmarks/tables.py --check  exit 1 if a page holds another one

A table stands between two markers, of which the first names it: see `TABLES`. All are made from the
files in benchmarks/results.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

NAMES = {
    "batchnorm": "batchnorm",
    "batchnorm-out": "batchnorm, `out=` given",
    "torch": "PyTorch",
    "torch.compile": "PyTorch, `torch.compile`",
    "jax": "JAX, `jit`",
    "numpy": "NumPy, textbook",
}
OPS = ("forward", "inference", "backward")


def speed(results: Path) -> str:
    """Speed and accuracy of all providers: `batchnorm bench --out benchmarks/results`."""
    timed = _rows(results / "speed.csv")
    accuracy = _rows(results / "accuracy.csv")
    environment = json.loads((results / "environment.json").read_text())
    offsets = sorted({float(row["offset"]) for row in accuracy})
    measured = {row["provider"] for row in (*timed, *accuracy)}

    columns = [*OPS, *(f"error, mean {_plain(offset)}" for offset in offsets)]
    lines = ["| | " + " | ".join(columns) + " |", "|:--|" + "--:|" * len(columns)]
    for provider, name in NAMES.items():
        if provider not in measured:
            continue
        cells = [_speedup(timed, provider, op) for op in OPS]
        cells += [_error(accuracy, provider, offset) for offset in offsets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    cases = {(row["shape"], row["layout"]) for row in timed}
    versions = environment["versions"]
    against = ", ".join(
        f"{name} {versions[package]}"
        for package, name in (("numpy", "NumPy"), ("torch", "PyTorch"), ("jax", "JAX"))
        if package in versions
    )
    threads = environment["threads"]
    caption = (
        f"Speed: times as fast as PyTorch eager, geometric mean over {len(cases)} cases (float32, "
        "channel-first and channel-last), in parentheses the worst of them. Error: largest "
        f"|y − y_exact| of the forward pass on float32 N(mean, 1). {environment['cpu']}, "
        f"{threads} thread{'s' * (threads != 1)}; {against}."
    )
    return "\n".join([caption, "", *lines])


def _rows(path: Path, by: str = "provider") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row[by] != "copy"]


def _speedup(rows: list[dict[str, str]], provider: str, op: str) -> str:
    found = [
        float(row["speedup_vs_torch"])
        for row in rows
        if row["provider"] == provider and row["op"] == op and row["speedup_vs_torch"]
    ]
    if not found:
        return "–"
    if provider == "torch":
        return "1"
    return f"{statistics.geometric_mean(found):.2f} ({min(found):.2f})"


def _error(rows: list[dict[str, str]], provider: str, offset: float) -> str:
    """The worse of the layouts to one digit; NaN where any is."""
    found = [
        float(row["max_error"] or "nan")
        for row in rows
        if row["provider"] == provider and float(row["offset"]) == offset and row["status"] == "ok"
    ]
    if not found:
        return "–"
    if any(map(math.isnan, found)):
        return "NaN"
    return _plain(float(f"{max(found):.0e}"))


def _plain(value: float) -> str:
    """1e6 and 3e-7 rather than 1e+06 and 3e-07."""
    if value == 0 or 1 <= value < 1000:
        return f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def resnet_step(results: Path) -> str:
    """Training steps of a ResNet-18: `benchmarks/resnet_step.py`."""
    rows = _rows(results / "resnet_step.csv")
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [
        "| | " + " | ".join(providers) + " |",
        "|:--|" + "--:|" * len(providers),
    ]
    for case in dict.fromkeys(_case(row) for row in rows):
        found = {row["provider"]: row for row in rows if _case(row) == case}
        cells = []
        for provider in providers:
            row = found[provider]
            text = f"{1 / float(row['ratio']):.2f}" if row["status"] == "ok" else row["status"]
            if provider == "torch eager":
                text = f"{float(row['p50_s']):.2f} s"
            cells.append(f"{text}, {float(row['peak_bytes']) / 1e6:.0f} MB")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    about = json.loads((results / "resnet_step.json").read_text())
    caption = (
        "Training steps of a ResNet-18 at 224×224. First column: seconds, others: times as fast as "
        f"it, median of {about['rounds']} interleaved rounds; and peak memory. {about['cpu']}, "
        f"{about['threads']} threads, PyTorch {about['versions']['torch']}."
    )
    return "\n".join([caption, "", *lines])


def _case(row: dict[str, str]) -> str:
    return f"{row['dtype']}, batch {row['batch']}, {row['format']}"


def resnet_profile(results: Path) -> str:
    """Where a step's time goes: `benchmarks/resnet_step.py --profile`."""
    rows = _rows(results / "resnet_profile.csv")
    groups = [g for g in dict.fromkeys(row["group"] for row in rows) if g != "step"]
    norms = ("batch norm forward", "batch norm backward", "relu", "add")
    lines = [
        "| | provider | convolutions | batch norm, ReLU, additions | the rest | by the clock "
        "| page faults |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["group"] != "step" or row["provider"] == "torch.compile":
            continue
        case, provider = _case_of_profile(row), row["provider"]
        ms = {
            r["group"]: float(r["ms"])
            for r in rows
            if _case_of_profile(r) == case and r["provider"] == provider and r["group"] in groups
        }
        convolutions = sum(v for g, v in ms.items() if g.startswith("convolution"))
        normalization = sum(ms[g] for g in norms)
        rest = sum(ms.values()) - convolutions - normalization
        lines.append(
            f"| {case} | {provider} | {convolutions:.0f} | {normalization:.0f} | {rest:.0f} "
            f"| {float(row['ms']):.0f} | {float(row['page_faults']):.0f} |"
        )
    return "\n".join(
        ["Milliseconds of a step under torch.profiler, and by the clock without it.", "", *lines]
    )


def _case_of_profile(row: dict[str, str]) -> str:
    return f"batch {row['batch']}, {row['format']}"


def sync_step(results: Path) -> str:
    """What shared statistics cost: `benchmarks/sync_step.py`."""
    rows = _rows(results / "sync_step.csv", by="layer")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    lines = ["| input of each process | " + " | ".join(layers) + " |"]
    lines.append("|:--|" + "--:|" * len(layers))
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = {row["layer"]: row for row in rows if row["shape"] == shape}
        cells = [
            f"{float(found[layer]['p50_ms']):.1f} ms"
            if layer == layers[0]
            else f"{float(found[layer]['ratio']):.1f} times"
            for layer in layers
        ]
        lines.append(f"| {shape.replace('x', '×')} | " + " | ".join(cells) + " |")
    about = json.loads((results / "sync_step.json").read_text())
    caption = (
        f"Forward and backward pass, float32, {about['processes']} processes with gloo on one "
        f"machine, one thread each, median of {about['rounds']} rounds. {about['cpu']}."
    )
    return "\n".join([caption, "", *lines])


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


def recalibrate(results: Path) -> str:
    """What recalibration costs: `benchmarks/recalibrate.py`."""
    rows = _rows(results / "recalibrate.csv", by="way")
    about = json.loads((results / "recalibrate.json").read_text())
    lines = [
        f"ResNet-18, {rows[0]['batches']} batches of {rows[0]['batch']} images of "
        f"{rows[0]['image']}², processor time, median of {rows[0]['rounds']} rounds. "
        f"{about['cpu']}, one thread; PyTorch {about['versions']['torch']}.",
        "",
        "| | time, in forward passes | extra memory | forwards begun |",
        "|:--|--:|--:|--:|",
    ]
    lines += [
        f"| {WAYS[row['way']]} | {float(row['ratio']):.2f} "
        f"| {int(row['extra_bytes']) / 2**20:,.0f} MiB | {row['forwards']} |"
        for row in rows
    ]
    return "\n".join(lines)


def recalibrate_errors(results: Path) -> str:
    """How far from brute force the statistics are: `benchmarks/recalibrate.py --errors`."""
    rows = _rows(results / "recalibrate_errors.csv", by="estimator")
    shown = ("1", "2", "4", "8")
    lines = ["| | " + " | ".join(f"layer {k}" for k in shown) + " |", "|:--|" + "--:|" * 4]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        found = {row["layer"]: float(row["error"]) for row in rows if row["estimator"] == name}
        cells = (f"{found[k]:.2f}" if found[k] >= 0.1 else _plain(found[k]) for k in shown)
        lines.append(f"| {WAYS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dataset_stats(results: Path) -> str:
    """A file larger than memory: `benchmarks/dataset_stats.py`."""
    rows = _rows(results / "dataset_stats.csv")
    about = json.loads((results / "dataset_stats.json").read_text())
    first = rows[0]
    lines = [
        f"float32 ({int(first['rows']):,}, {first['features']}), "
        f"{int(first['bytes']) / 1e9:.0f} GB, at mean 10,000 and deviation 1; "
        f"median of {first['rounds']} interleaved rounds, file not "
        f"in the system's cache. {about['cpu']}, {about['threads']} threads; scikit-learn "
        f"{about['versions']['scikit-learn']}.",
        "",
        "| | time | throughput | most memory | error of mean | error of variance |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = ["", "", ""]
        if row["peak_bytes"]:
            cells = [f"{int(row['peak_bytes']) / 1e6:,.0f} MB"]
            cells += [_plain(float(row[what])) for what in ("mean_error", "var_error")]
        lines.append(
            f"| `{row['provider']}` | {float(row['p50_s']):.1f} s, {float(row['ratio']):.2f} × cat "
            f"| {float(row['gb_per_s']):.2f} GB/s | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


#: Name of a table to the page that holds it and what makes it.
TABLES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "speed": ("README.md", speed),
    "resnet_step": ("docs/torch.md", resnet_step),
    "resnet_profile": ("docs/torch.md", resnet_profile),
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
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        wanted = insert(text, name, make(RESULTS))
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
