"""Charts that experiments share: means over the seeds, and the range of all seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from batchnorm.study.declare import Record

__all__ = ["bars", "lines"]

#: Hues that people with any colour vision tell apart (Okabe & Ito), light enough for dark pages.
COLORS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
PERCENT = {"error", "final error"}
#: What columns are called on axes.
TITLES = {
    "error": "test error",
    "final error": "test error",
    "arm": "network",
    "init": "initialization",
    "std": "size of the first weights",
    "size": "examples per group",
    "relative": "distance ÷ spread",
    "raw": "distance",
    "rate": "learning rate",
}
#: A bar is cut where it is so many times as long as most.
LONG = 4.0


def _axis(name: str) -> alt.Axis | alt.UndefinedType:
    return alt.Axis(format="%") if name in PERCENT else alt.Undefined


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _data(records: list[Record], columns: list[str | None]) -> alt.InlineData:
    kept = [name for name in ("seed", *columns) if name is not None]
    rows: list[Mapping[str, Any]] = [
        {
            # Booleans would be sorted, and shown as true and false.
            name: {True: "with batch norm", False: "without"}[r[name]]
            if isinstance(r[name], bool)
            else r[name]
            for name in kept
        }
        for r in records
        if all(name in r for name in kept)
    ]
    return alt.InlineData(values=rows)


def _color(name: str) -> alt.Color:
    legend = alt.Legend(title=None, orient="bottom", columns=3, labelLimit=260)
    return alt.Color(f"{name}:N", scale=alt.Scale(range=COLORS), legend=legend, sort=None)


def lines(
    records: list[Record],
    *,
    x: str,
    y: str,
    color: str,
    column: str | None = None,
    row: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> Any:
    """Draw a line of the mean over the seeds, and a band from the least to the largest."""
    base = alt.Chart().encode(
        x=alt.X(
            f"{x}:Q",
            title=_title(x),
            scale=alt.Scale(type="log" if log_x else "linear", nice=False),
        ),
        color=_color(color),
    )
    scale = alt.Scale(type="log" if log_y else "linear")
    top = alt.Y(f"mean({y}):Q", title=_title(y), scale=scale, axis=_axis(y))
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y(f"min({y}):Q", title=_title(y), scale=scale, axis=_axis(y)), y2=f"max({y}):Q"
    )
    tooltip = [alt.Tooltip(f"{color}:N"), alt.Tooltip(f"{x}:Q"), alt.Tooltip(f"mean({y}):Q")]
    line = base.mark_line(point=alt.OverlayMarkDef(size=18)).encode(y=top, tooltip=tooltip)
    data = _data(records, [x, y, color, column, row])
    return _split(alt.layer(band, line, data=data), records, column, row)


def bars(records: list[Record], *, x: str, y: str, color: str, column: str | None = None) -> Any:
    """Draw a bar of the mean over the seeds, and a line from the least to the largest."""
    base = alt.Chart().encode(
        x=alt.X(f"{x}:N", title=_title(x), sort=None, axis=alt.Axis(labelAngle=-35)),
        xOffset=alt.Undefined if color == x else alt.XOffset(f"{color}:N", sort=None),
    )
    tooltip = [alt.Tooltip(f"{x}:N"), alt.Tooltip(f"{color}:N"), alt.Tooltip(f"mean({y}):Q")]
    scale, title = _cut(records, y)
    bar = base.mark_bar(opacity=0.85, clip=True).encode(
        y=alt.Y(f"mean({y}):Q", title=title, axis=_axis(y), scale=scale),
        color=_color(color),
        tooltip=tooltip,
    )
    span = base.mark_rule(strokeWidth=1.5, color="#888", clip=True).encode(
        y=alt.Y(f"min({y}):Q", title=title, scale=scale), y2=f"max({y}):Q"
    )
    data = _data(records, [x, y, color, column])
    return _split(alt.layer(bar, span, data=data), records, column, None)


def _cut(records: list[Record], y: str) -> tuple[Any, str]:
    """Scale and title of an axis on which one long bar does not hide how the others differ."""
    values = sorted(float(r[y]) for r in records if y in r)
    if not values or values[-1] <= 0:
        return alt.Undefined, _title(y)
    most = 2 * values[len(values) // 2]
    if values[-1] < LONG * most:
        return alt.Undefined, _title(y)
    return alt.Scale(domain=[0, most], clamp=True), f"{_title(y)} (longer bars are cut)"


def _split(chart: Any, records: list[Record], column: str | None, row: str | None) -> Any:
    """Set the chart into rows and columns, in the order of the records."""
    facets: dict[str, Any] = {}

    def order(name: str) -> list[Any]:
        return list(dict.fromkeys(r[name] for r in records if name in r))

    if column is not None:
        facets["column"] = alt.Column(f"{column}:N", title=_title(column), sort=order(column))
    if row is not None:
        facets["row"] = alt.Row(f"{row}:N", title=_title(row), sort=order(row))
    if not facets:
        return chart.properties(width=460, height=260)
    return chart.properties(width=230, height=150 if row else 220).facet(**facets)
