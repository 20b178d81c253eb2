"""What a run found: tables and a summary of the claims on the terminal, and files."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.bench import chart
from batchnorm.bench.cases import ARRAYS_MOVED
from batchnorm.bench.environment import disturbance
from batchnorm.bench.harness import BASELINE, COPY, AccuracyRow, Results, SpeedRow
from batchnorm.bench.rows import write as write_files

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OURS = "batchnorm"
OURS_OUT = "batchnorm-out"

#: Where an array no longer fits in the last-level cache of the processors of today's desktops and
#: of a slice of a server, so that the memory's speed is what is measured.
LARGE_BYTES = 40_000_000


@dataclass(frozen=True)
class Claim:
    """A number that the project promises, beside the measured one; `met` is None without one."""

    text: str
    measured: str
    met: bool | None


def claims(results: Results) -> list[Claim]:
    """Compare a run with what the project promises about its speed and accuracy."""
    found: list[Claim] = []

    def claim(text: str, value: float | None, met: Callable[[float], bool], form: str) -> None:
        if value is None:
            found.append(Claim(text, "no such case in this run", None))
        else:
            found.append(Claim(text, form.format(value), met(value)))

    for op in ("forward", "backward"):
        speedups = _speedups(results.speed, OURS, op)
        claim(
            f"{op}: geometric mean at least 3x PyTorch eager",
            statistics.geometric_mean(speedups) if speedups else None,
            lambda value: value >= 3.0,
            "{:.2f}x",
        )
    compared = [row for row in results.speed if row.provider == OURS and row.ratio > 0]
    slowest = max(compared, key=lambda row: row.ratio, default=None)
    claim(
        "nowhere slower than 0.95x PyTorch eager",
        slowest.speedup if slowest else None,
        lambda value: value >= 0.95,
        f"{{:.2f}}x, {slowest.label}" if slowest else "",
    )
    for op, limit in (("forward", 1.5), ("backward", 2.6)):
        large = [
            row.copies
            for row in results.speed
            if (row.provider, row.op, row.status) == (OURS_OUT, op, "ok")
            and row.nbytes >= LARGE_BYTES
        ]
        claim(
            f"{op} of 40 MB and more with out=: at most {limit} plain copies",
            max(large, default=None),
            lambda value, limit=limit: value <= limit,  # type: ignore[misc]
            "{:.2f} copies",
        )
    errors = [
        row.max_error
        for row in results.accuracy
        if row.provider in (OURS, OURS_OUT) and row.status == "ok"
    ]
    claim(
        "y within 1e-6 of the exact one at |mean|/std up to 1e6",
        (math.nan if any(map(math.isnan, errors)) else max(errors)) if errors else None,
        lambda value: value <= 1e-6,
        "{:.1e}",
    )
    return found


def _speedups(rows: Iterable[SpeedRow], provider: str, op: str) -> list[float]:
    return [
        row.speedup for row in rows if row.provider == provider and row.op == op and row.ratio > 0
    ]


# --- on the terminal ------------------------------------------------------------------------------

_LEGEND = """\
ms       time of one call: percentiles over the samples
x torch  how many times as fast as PyTorch eager
copies   time in plain copies of x
x floor  time in floors: what moving each byte once between memory and processor would take
peak     memory newly made resident during one call
faults   page faults in one call
error    of y, the largest |y - y_exact|; of gradients, the largest relative error in norm"""

#: Heading to the cell of a row; those of NARROW fit on a terminal of 80 columns.
_COLUMNS = {
    "p20 ms": "{0.p20_ms:.3g}",
    "p50 ms": "{0.p50_ms:.3g}",
    "p80 ms": "{0.p80_ms:.3g}",
    "x torch": "{0.speedup:.2f}",
    "copies": "{0.copies:.2f}",
    "x floor": "{0.times_floor:.2f}",
    "GB/s": "{0.gb_per_s:.1f}",
    "peak MB": "{0.peak_mb:.1f}",
    "faults": "{0.page_faults:.0f}",
    "error": "{0.max_error:.0e}",
}
_NARROW = ("p50 ms", "x torch", "copies", "x floor", "peak MB", "error")
WIDE = 116


def make_table(title: str | None, columns: Iterable[str]) -> "Table":
    """An empty table; the first column holds words, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def cells(row: object, forms: Iterable[str]) -> list[str]:
    """Formats of a row filled in, blank where a number is not known."""
    texts = [form.format(row) for form in forms]
    return ["" if "nan" in text else text for text in texts]


def show(results: Results, console: "Console") -> None:
    """Print everything: the machine, the tables, the notes, the summary."""
    if not console.is_terminal:
        # A file or a pipe has no width, for which rich assumes 80.
        console.width = max(console.width, WIDE)
    console.print(machine(results.environment), highlight=False)
    versions = ", ".join(f"{name} {text}" for name, text in results.environment["versions"].items())
    console.print(versions, style="dim", highlight=False)
    for note in results.notes:
        console.print(note, style="yellow", highlight=False, markup=False)
    for op in dict.fromkeys(row.op for row in results.speed):
        console.print()
        members = [row for row in results.speed if row.op == op]
        console.print(_speed_table(members, width=console.width))
    if results.speed:
        console.print(_LEGEND, style="dim", highlight=False)
    if results.accuracy:
        console.print()
        console.print(_accuracy_table(results.accuracy))
    console.print()
    _show_summary(results, console)


def machine(environment: Mapping[str, Any]) -> str:
    """Processor, threads and system in one line."""
    return (
        f"[bold]{environment['cpu']}[/], {threads(environment)} for every provider, "
        f"{environment['instruction_set']}, {environment['system']}, Python {environment['python']}"
    )


def threads(environment: Mapping[str, Any]) -> str:
    """Such as "2 threads"."""
    return f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"


def _speed_table(rows: Sequence[SpeedRow], *, width: int) -> "Table":
    forms = {name: f for name, f in _COLUMNS.items() if width >= WIDE or name in _NARROW}
    moved = ARRAYS_MOVED[rows[0].op]
    table = make_table(
        f"{rows[0].op}: the floor is {moved / 2:g} plain {'copy' if moved == 2 else 'copies'}, "
        f"in MB beside each case",
        ["", *forms],
    )
    for shape, layout in dict.fromkeys((row.shape, row.layout) for row in rows):
        members = [row for row in rows if (row.shape, row.layout) == (shape, layout)]
        floor_mb = moved * members[0].nbytes / 1e6
        table.add_row(f"[bold]{shape} {layout}[/] [dim]{floor_mb:.1f}[/]")
        for row in members:
            failed = "" if row.status == "ok" else f" [red]{row.status}[/]"
            texts = cells(row, forms.values())
            table.add_row(f"  {row.provider}{failed}", *texts, style=_style(row.provider))
        table.add_section()
    return table


def _accuracy_table(rows: Sequence[AccuracyRow]) -> "Table":
    offsets = list(dict.fromkeys(row.offset for row in rows))
    table = make_table(
        f"accuracy: largest |y - y_exact|, float32 N(mean, 1) of {rows[0].shape}",
        ["", "layout", *(f"mean {offset:g}".replace("e+0", "e") for offset in offsets)],
    )
    found = {(row.provider, row.layout, row.offset): row for row in rows}
    for provider in dict.fromkeys(row.provider for row in rows):
        for layout in dict.fromkeys(row.layout for row in rows):
            several = (found.get((provider, layout, offset)) for offset in offsets)
            texts = ("" if row is None else _error(row) for row in several)
            table.add_row(provider, layout, *texts, style=_style(provider))
    return table


def _error(row: AccuracyRow) -> str:
    return "failed" if row.status == "failed" else f"{row.max_error:.0e}"


def _show_summary(results: Results, console: "Console") -> None:
    for op in dict.fromkeys(row.op for row in results.speed):
        for provider in (OURS, OURS_OUT):
            speedups = _speedups(results.speed, provider, op)
            if speedups:
                console.print(
                    f"{op:>10}  {provider:<14} {statistics.geometric_mean(speedups):6.2f}x "
                    f"{BASELINE} (geometric mean of {len(speedups)}), worst {min(speedups):.2f}x",
                    highlight=False,
                )
    console.print()
    marks = {
        True: "[green]met      [/]",
        False: "[bold red]not met  [/]",
        None: "[dim]not run  [/]",
    }
    for claim in claims(results):
        text = f"{marks[claim.met]} {claim.text}: {claim.measured}"
        console.print(text, highlight=False, soft_wrap=True)
    for trouble in results.troubles:
        console.print(trouble, style="red", highlight=False, markup=False, soft_wrap=True)
    if warning := disturbance(results.environment):
        console.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _style(provider: str) -> str:
    if provider == COPY:
        return "dim"
    return "green" if provider in (OURS, OURS_OUT) else ""


# --- in files -------------------------------------------------------------------------------------


def write(results: Results, directory: Path) -> list[Path]:
    """Write what there is of CSV files, environment and, with altair, the plot; list the files."""
    files: dict[Path, Any] = {
        directory / "environment.json": results.environment,
        directory / "accuracy.csv": results.accuracy,
        directory / "speed.csv": results.speed,
    }
    if results.speed and chart.can_plot():
        subtitle = f"{results.environment['cpu']}, {threads(results.environment)}"
        drawn = chart.plot(results.speed, subtitle)
        files |= {directory / f"speed.{form}": chart.render(drawn, form) for form in ("svg", "png")}
    return write_files(files)
