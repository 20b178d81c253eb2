"""Put the benchmark's numbers into README.md, or check that they are there.

python benchmarks/readme_table.py          write the table
python benchmarks/readme_table.py --check  exit 1 if README.md holds another one

The table is made from speed.csv, accuracy.csv and environment.json in benchmarks/results, which
`batchnorm bench --out benchmarks/results` writes.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- benchmark: made by benchmarks/readme_table.py -->"
END = "<!-- /benchmark -->"

NAMES = {
    "batchnorm": "batchnorm",
    "batchnorm-out": "batchnorm, `out=` given",
    "torch": "PyTorch",
    "torch.compile": "PyTorch, `torch.compile`",
    "jax": "JAX, `jit`",
    "numpy": "NumPy, textbook",
}
OPS = ("forward", "inference", "backward")


def make_table(results: Path) -> str:
    """The text between the two markers, without them."""
    speed = _rows(results / "speed.csv")
    accuracy = _rows(results / "accuracy.csv")
    environment = json.loads((results / "environment.json").read_text())
    offsets = sorted({float(row["offset"]) for row in accuracy})
    measured = {row["provider"] for row in (*speed, *accuracy)}

    columns = [*OPS, *(f"error, mean {_plain(offset)}" for offset in offsets)]
    lines = ["| | " + " | ".join(columns) + " |", "|:--|" + "--:|" * len(columns)]
    for provider, name in NAMES.items():
        if provider not in measured:
            continue
        cells = [_speedup(speed, provider, op) for op in OPS]
        cells += [_error(accuracy, provider, offset) for offset in offsets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    cases = {(row["shape"], row["layout"]) for row in speed}
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


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["provider"] != "copy"]


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


def insert(readme: str, table: str) -> str:
    """`readme` with `table` between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the table, or compare it with --check."""
    readme = README.read_text(encoding="utf-8")
    wanted = insert(readme, make_table(RESULTS))
    if "--check" not in arguments:
        README.write_text(wanted, encoding="utf-8")
        return 0
    if wanted == readme:
        return 0
    print(
        "README.md does not hold the table of benchmarks/results; "
        "run python benchmarks/readme_table.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
