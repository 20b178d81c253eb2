"""What was found: a table, a summary of the claims, and files that are whole or not there."""

import csv
import io
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.atomic import write_all
from batchnorm.bench.cases import ARRAYS_MOVED, Op
from batchnorm.bench.harness import (
    COPY,
    AccuracyRow,
    Results,
    SpeedRow,
    column_names,
)
from batchnorm.errors import ArgumentError, BatchNormError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OURS = "batchnorm"
OURS_OUT = "batchnorm-out"

#: Where an array no longer fits in the last-level cache of the processors of today's desktops and
#: of a slice of a server, so that the memory's speed is what is measured.
LARGE_BYTES = 40_000_000

_COLOURS = {
    "batchnorm": "#1b7f5c",
    "batchnorm-out": "#74c69d",
    "torch": "#d1495b",
    "torch.compile": "#edae49",
    "jax": "#5b6fb5",
    "numpy": "#8d99ae",
}


@dataclass(frozen=True)
class Claim:
    """A number that the project promises, beside what this run measured.

    Attributes
    ----------
    met
        None where the run holds nothing to judge it by.
    """

    text: str
    measured: str
    met: bool | None


def claims(results: Results) -> list[Claim]:
    """Hold a run against what the project promises about its speed and accuracy."""
    found = []
    for op in ("forward", "backward"):
        speedups = _speedups(results.speed, OURS, op)
        found.append(
            _claim(
                f"{op}: geometric mean at least 3x PyTorch eager",
                statistics.geometric_mean(speedups) if speedups else None,
                lambda value: value >= 3.0,
                "{:.2f}x",
            )
        )
    everywhere = [row for row in results.speed if row.provider == OURS and row.speedup_vs_torch > 0]
    slowest = min(everywhere, key=lambda row: row.speedup_vs_torch, default=None)
    found.append(
        _claim(
            "nowhere slower than 0.95x PyTorch eager",
            slowest.speedup_vs_torch if slowest else None,
            lambda value: value >= 0.95,
            f"{{:.2f}}x, {slowest.op} of {slowest.shape} {slowest.layout}" if slowest else "",
        )
    )
    for op, limit in (("forward", 1.5), ("backward", 2.6)):
        large = [
            row.copies
            for row in results.speed
            if row.provider == OURS_OUT
            and row.op == op
            and row.nbytes >= LARGE_BYTES
            and row.status == "ok"
        ]
        found.append(
            _claim(
                f"{op} of 40 MB and more with out=: at most {limit} plain copies",
                max(large, default=None),
                lambda value, limit=limit: value <= limit,
                "{:.2f} copies",
            )
        )
    errors = [
        row.max_error
        for row in results.accuracy
        if row.provider in (OURS, OURS_OUT) and row.status == "ok"
    ]
    worst = (math.nan if any(map(math.isnan, errors)) else max(errors)) if errors else None
    found.append(
        _claim(
            "y within 1e-6 of the exact one at |mean|/std up to 1e6",
            worst,
            lambda value: value <= 1e-6,
            "{:.1e}",
        )
    )
    return found


def _claim(text: str, value: float | None, met: Any, form: str) -> Claim:
    if value is None:
        return Claim(text, "no such case in this run", None)
    return Claim(text, form.format(value), bool(met(value)))


def _speedups(rows: Iterable[SpeedRow], provider: str, op: str) -> list[float]:
    return [
        row.speedup_vs_torch
        for row in rows
        if row.provider == provider and row.op == op and row.speedup_vs_torch > 0
    ]


# --- on the terminal ------------------------------------------------------------------------------


def show(results: Results, console: "Console") -> None:
    """Print everything: the machine, the tables, the notes, the summary."""
    if not console.is_terminal:
        # A file or a pipe has no width, for which rich assumes 80.
        console.width = max(console.width, _WIDE)
    environment = results.environment
    console.print(
        f"[bold]{environment['cpu']}[/], {_threads(environment)} for every provider, "
        f"{environment['instruction_set']}, {environment['system']}, "
        f"Python {environment['python']}",
        highlight=False,
    )
    versions = ", ".join(f"{name} {text}" for name, text in environment["versions"].items())
    console.print(versions, style="dim", highlight=False)
    for note in results.notes:
        console.print(note, style="yellow", highlight=False, markup=False)
    for op in dict.fromkeys(row.op for row in results.speed):
        console.print()
        members = [row for row in results.speed if row.op == op]
        console.print(_speed_table(op, members, width=console.width))
    if results.speed:
        console.print(_LEGEND, style="dim", highlight=False)
    if results.accuracy:
        console.print()
        console.print(_accuracy_table(results.accuracy))
    console.print()
    _show_summary(results, console)


def _threads(environment: dict[str, Any]) -> str:
    return f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"


_LEGEND = """\
ms       time of one call: percentiles over the samples
x torch  how many times as fast as PyTorch eager
copies   time in plain copies of x
x floor  time in floors: what moving each byte once between memory and processor would take
peak     memory newly made resident during one call
faults   page faults in one call
error    of y, the largest |y - y_exact|; of gradients, the largest relative error in norm"""

_HEADINGS = (
    "p20 ms",
    "p50 ms",
    "p80 ms",
    "x torch",
    "copies",
    "x floor",
    "GB/s",
    "peak MB",
    "faults",
    "error",
)

# What still fits on a terminal of 80 columns.
_NARROW_HEADINGS = ("p50 ms", "x torch", "copies", "x floor", "peak MB", "error")
_WIDE = 116


def _speed_table(op: Op, rows: Sequence[SpeedRow], *, width: int) -> "Table":
    from rich import box
    from rich.table import Table

    shown = [
        index
        for index, heading in enumerate(_HEADINGS)
        if width >= _WIDE or heading in _NARROW_HEADINGS
    ]
    moved = ARRAYS_MOVED[op]
    table = Table(
        title=f"{op}: the floor is {moved / 2:g} plain {'copy' if moved == 2 else 'copies'}, "
        f"in MB beside each case",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("", no_wrap=True)
    for index in shown:
        table.add_column(_HEADINGS[index], justify="right", no_wrap=True)
    for shape, layout in dict.fromkeys((row.shape, row.layout) for row in rows):
        members = [row for row in rows if (row.shape, row.layout) == (shape, layout)]
        floor_mb = moved * members[0].nbytes / 1e6
        table.add_row(f"[bold]{shape} {layout}[/] [dim]{floor_mb:.1f}[/]")
        for row in members:
            cells = _speed_cells(row)
            table.add_row(
                f"  {row.provider}", *[cells[index] for index in shown], style=_style(row.provider)
            )
        table.add_section()
    return table


def _speed_cells(row: SpeedRow) -> list[str]:
    if row.status != "ok":
        return [*[""] * 3, f"[red]{row.status}[/]", *[""] * 5, _error(row)]
    is_copy = row.provider == COPY
    return [
        _three_digits(row.p20_ms),
        _three_digits(row.p50_ms),
        _three_digits(row.p80_ms),
        "" if is_copy else _number(row.speedup_vs_torch, "{:.2f}"),
        _number(row.copies, "{:.2f}"),
        "" if is_copy else _number(row.times_floor, "{:.2f}"),
        _number(row.gb_per_s, "{:.1f}"),
        "" if is_copy else _number(row.peak_bytes / 1e6, "{:.1f}"),
        _number(row.page_faults, "{:.0f}"),
        "" if is_copy else _error(row),
    ]


def _accuracy_table(rows: Sequence[AccuracyRow]) -> "Table":
    from rich import box
    from rich.table import Table

    offsets = list(dict.fromkeys(row.offset for row in rows))
    table = Table(
        title=f"accuracy: largest |y - y_exact|, float32 N(mean, 1) of {rows[0].shape}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("", no_wrap=True)
    table.add_column("layout")
    for offset in offsets:
        table.add_column(f"mean {offset:g}".replace("e+0", "e"), justify="right")
    cell = {(row.provider, row.layout, row.offset): row for row in rows}
    for provider in dict.fromkeys(row.provider for row in rows):
        for layout in dict.fromkeys(row.layout for row in rows):
            found = [cell.get((provider, layout, offset)) for offset in offsets]
            table.add_row(
                provider,
                layout,
                *["" if row is None else _error(row) for row in found],
                style=_style(provider),
            )
    return table


def _show_summary(results: Results, console: "Console") -> None:
    for op in dict.fromkeys(row.op for row in results.speed):
        for provider in (OURS, OURS_OUT):
            speedups = _speedups(results.speed, provider, op)
            if speedups:
                console.print(
                    f"{op:>10}  {provider:<14} {statistics.geometric_mean(speedups):6.2f}x torch "
                    f"(geometric mean of {len(speedups)}), worst {min(speedups):.2f}x",
                    highlight=False,
                )
    console.print()
    for claim in claims(results):
        mark = {
            True: "[green]met      [/]",
            False: "[bold red]not met  [/]",
            None: "[dim]not run  [/]",
        }
        console.print(
            f"{mark[claim.met]} {claim.text}: {claim.measured}", highlight=False, soft_wrap=True
        )
    for trouble in results.troubles:
        console.print(trouble, style="red", highlight=False, markup=False, soft_wrap=True)


def _style(provider: str) -> str:
    if provider == COPY:
        return "dim"
    return "green" if provider in (OURS, OURS_OUT) else ""


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def _three_digits(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{max(0, min(4, 2 - math.floor(math.log10(value))))}f}" if value > 0 else "0"


def _error(row: SpeedRow | AccuracyRow) -> str:
    if row.status == "failed":
        return "failed"
    return f"{row.max_error:.0e}"


# --- in files -------------------------------------------------------------------------------------


def as_csv(rows: Sequence[SpeedRow] | Sequence[AccuracyRow], columns: Sequence[str]) -> str:
    """Rows as CSV: numbers to 6 digits, nothing where a number is not known."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(_cell(value) for value in astuple(row))
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def prepare_directory(directory: Path) -> None:
    """Make a directory for results, and see that they can be written, before any are measured.

    Raises
    ------
    ArgumentError
        It cannot be made, or no file can be made in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ArgumentError(
            f"out must be a directory that files can be written to, got {str(directory)!r}, and "
            f"found: {error.strerror or error}. Name another directory."
        ) from None


def write(results: Results, directory: Path) -> list[Path]:
    """Write a run's results.

    Returns
    -------
    list of Path
        ``speed.csv``, ``accuracy.csv`` and ``environment.json``, and with ``altair`` installed
        ``speed.svg`` and ``speed.png``; those that have something to hold.

    Raises
    ------
    BatchNormError
        They could not be written, and those of an earlier run are as they were.
    """
    contents: dict[Path, bytes] = {}

    def add(name: str, text: str | bytes) -> None:
        contents[directory / name] = text.encode() if isinstance(text, str) else text

    add("environment.json", json.dumps(results.environment, indent=2) + "\n")
    if results.accuracy:
        add("accuracy.csv", as_csv(results.accuracy, column_names(AccuracyRow)))
    if results.speed:
        add("speed.csv", as_csv(results.speed, column_names(SpeedRow)))
        if can_plot():
            chart = plot(results)
            add("speed.svg", render(chart, "svg"))
            add("speed.png", render(chart, "png"))
    try:
        write_all(contents)
    except OSError as error:
        raise BatchNormError(
            f"the results could not be written to {str(directory)!r}: {error.strerror or error}. "
            f"Make room or name another directory."
        ) from error
    return list(contents)


def can_plot() -> bool:
    """Whether what draws the plot is installed."""
    from importlib.util import find_spec

    return find_spec("altair") is not None and find_spec("vl_convert") is not None


def plot(results: Results) -> Any:
    """Draw the time of every provider on every case in plain copies, beside the floor.

    Returns
    -------
    altair.Chart
        One panel an operation, one line a case.
    """
    import altair as alt

    rows: list[dict[str, Any]] = [
        {
            "op": row.op,
            "case": f"{row.shape.replace('x', '×')} {row.layout}",
            "provider": row.provider,
            "copies": row.copies,
            "floor": row.floor_copies,
        }
        for row in results.speed
        if row.status == "ok" and row.provider != COPY and row.copies > 0
    ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    present = {row["provider"] for row in rows}
    shown = [name for name in _COLOURS if name in present] + sorted(present - _COLOURS.keys())
    colour = alt.Color(
        "provider:N",
        sort=shown,
        scale=alt.Scale(
            domain=shown, range=[_COLOURS.get(provider, "#222222") for provider in shown]
        ),
        legend=alt.Legend(title=None, orient="top", symbolSize=110, labelFontSize=12),
    )
    position = alt.X(
        "copies:Q",
        title="time, in plain copies of x (log scale)",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(
            values=[1, 2, 5, 10, 20, 50, 100, 200, 500],
            format="~g",
            gridColor="#eeeeee",
            domain=False,
        ),
    )
    panels: list[Any] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        members = [row for row in rows if row["op"] == op]
        line = alt.Y(
            "case:N",
            sort=cases,
            title=None,
            scale=alt.Scale(paddingInner=0.25),
            axis=alt.Axis(
                labels=not panels,
                ticks=False,
                domain=False,
                labelFontSize=11,
                labelLimit=200,
                bandPosition=0.5,
            ),
        )
        base = alt.Chart(alt.InlineData(members)).encode(y=line)
        # One rule for the panel, not one for each row of the data.
        floor = (
            alt.Chart(alt.InlineData([{"copies": members[0]["floor"]}]))
            .mark_rule(color="#444444", strokeDash=[4, 3], strokeWidth=1.5)
            .encode(x=position)
        )
        # Each provider has its own height within a line, lest equals hide one another.
        dots = base.mark_point(filled=True, size=70, opacity=1).encode(
            x=position, color=colour, yOffset=alt.YOffset("provider:N", sort=shown)
        )
        panels.append(
            (floor + dots).properties(
                width=290,
                height=(8 * len(shown) + 12) * len(cases),
                title=alt.TitleParams(
                    text=str(op),
                    subtitle=f"dashed: the floor, {members[0]['floor']:g}",
                    anchor="start",
                    subtitleColor="#666666",
                ),
            )
        )
    environment = results.environment
    return (
        alt.hconcat(*panels)
        .resolve_scale(x="shared", y="shared")
        .properties(
            title=alt.TitleParams(
                text="Batch normalization on the CPU, float32: left is faster",
                subtitle=f"{environment['cpu']}, {_threads(environment)}",
                anchor="start",
                fontSize=16,
                subtitleColor="#666666",
                offset=10,
            )
        )
        .configure_view(stroke="#dddddd")
        .configure(font="Helvetica, Arial, sans-serif", background="white", padding=16)
    )


def render(chart: Any, form: str) -> bytes:
    """A chart as SVG or PNG, without a browser.

    Raises
    ------
    ValueError
        `form` is neither ``svg`` nor ``png``.
    """
    import vl_convert

    if form == "svg":
        return str(vl_convert.vegalite_to_svg(chart.to_dict())).encode()
    if form == "png":
        return bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=2))
    raise ValueError(f"form must be svg or png, got {form!r}")
