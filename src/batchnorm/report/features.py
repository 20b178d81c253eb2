"""The features of a data set as one self-contained HTML page: features.html, filled."""

from __future__ import annotations

import html
import math
from collections import Counter
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

from .charts import COLORS, ROWS
from .records import Features, Table
from .template import as_json, fill

__all__ = ["render"]

#: Features and names of files that a page holds at most, and features that it shows at a time.
MOST, MOST_FILES, SHOWN = 5000, 200, 40
#: Length of a name, and height of a row.
NAME_LENGTH, ROW = 80, 20
USUAL = alt.ExprRef("usual")
#: 0.01, 1, 100 and 1e+6, as an expression of Vega.
POWER = (
    "datum.value && (abs(datum.value) >= 1e5 || abs(datum.value) < 1e-3)"
    " ? format(datum.value, '~e') : toString(datum.value)"
)


def render(features: Features) -> str:
    """Return the page, a complete HTML document."""
    chosen = _chosen(features)
    return fill(
        "features",
        title=html.escape(features.title),
        summary=_summary(features, len(chosen)),
        notes=_notes(features),
        ready=_ready(features.ready),
        tables="".join(map(_table, features.tables)),
        specs=as_json(_specs(features.extremes is not None)),
        data=as_json(_data(features, chosen)),
    )


def _chosen(features: Features) -> NDArray[np.int64]:
    """Choose all features, or as many as a page holds, those with notes first."""
    total = features.mean.size
    noted = [k for note in features.notes for k in note.features]
    first = list(dict.fromkeys(noted))[: MOST // 2]
    if total <= MOST:
        return np.arange(total)
    return np.sort(list(dict.fromkeys([*first, *range(MOST)]))[:MOST])


def _data(features: Features, chosen: NDArray[np.int64]) -> dict[str, Any]:
    """Return what features.js draws: a list for each column, with every digit."""
    names = [str(k) for k in chosen]
    if features.names is not None:
        names = [_cut(features.names[k]) for k in chosen]
        number = Counter(names)  # cut names may be alike
        names = [
            f"{name} ({k})" if number[name] > 1 else name
            for name, k in zip(names, chosen, strict=True)
        ]
    columns: dict[str, Any] = {
        "name": names,
        "count": [int(n) for n in features.count[chosen]],
        "missing": features.missing[chosen].tolist(),
        "mean": _numbers(np.where(features.count > 0, features.mean, np.nan)[chosen]),
        "std": _numbers(features.std[chosen]),
    }
    if features.extremes is not None:
        columns["min"], columns["max"] = (_numbers(e[chosen]) for e in features.extremes)
    marks: dict[int, list[str]] = {}
    for note in features.notes:
        for k in note.features:
            marks.setdefault(k, []).append(note.kind)
    return {
        "columns": columns,
        "marks": [", ".join(marks.get(int(k), ())) for k in chosen] if marks else [],
        "page": SHOWN,
    }


def _cut(name: str) -> str:
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


# ---- charts -------------------------------------------------------------------------------------


def _specs(ranges: bool) -> dict[str, Any]:
    """Return the two charts on a linear and on a symmetrically logarithmic axis.

    features.js sets `constant`, below which the latter is linear, its `ticks`, and the colours.
    """
    values = {"usual": COLORS[0], "noted": COLORS[1], "letters": 32, "constant": 1, "ticks": []}
    parameters = [alt.param(name=name, value=value) for name, value in values.items()]
    return {
        name: {
            "rows": _rows(name, ranges).add_params(*parameters).to_dict(validate=False),
            "overview": _overview(name, ranges).add_params(*parameters).to_dict(validate=False),
        }
        for name in ("linear", "symlog")
    }


def _scale(name: str, **axis: Any) -> dict[str, Any]:
    """Return scale and axis of the values."""
    if name == "symlog":
        constant = alt.ExprRef("constant")
        return {
            "scale": alt.Scale(type="symlog", constant=constant, nice=False),
            "axis": alt.Axis(values=alt.ExprRef("ticks"), labelExpr=POWER, **axis),
        }
    return {"scale": alt.Scale(zero=False), "axis": alt.Axis(**axis)}


def _rows(scale: str, ranges: bool) -> Any:
    """Draw mean and mean ± std of some features, a row each, and the range of all values."""
    cut = "slice(datum.label, 0, letters / 2) + '…' + slice(datum.label, -letters / 2)"
    label = f"length(datum.label) > letters ? {cut} : datum.label"
    base = alt.Chart().encode(
        y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelExpr=label, labelLimit=400)),
        color=alt.condition("datum.marks", alt.value(alt.ExprRef("noted")), alt.value(USUAL)),
        tooltip=_tooltips(ranges),
    )

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=None, **_scale(scale, orient="top"))

    layers = [
        base.mark_bar(height=8, opacity=0.45).encode(x=x("low"), x2="high"),
        base.mark_point(size=36, filled=True, opacity=1).encode(x=x("mean")),
    ]
    if ranges:
        layers.insert(0, base.mark_rule(strokeWidth=1.2).encode(x=x("min"), x2="max"))
    # The height is that of a row, which features.js multiplies by their number.
    return alt.layer(*layers, data=ROWS).properties(width="container", height=ROW)


def _overview(scale: str, ranges: bool) -> Any:
    """Draw the same of all features by their position, and which of them are in the rows."""
    place = alt.X(
        "position:Q",
        title="position in this order",
        scale=alt.Scale(nice=False, zero=False),
        axis=alt.Axis(format=",d"),
    )
    base = alt.Chart(ROWS).encode(x=place)

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=None, **_scale(scale))

    layers = [
        alt.Chart(alt.NamedData(name="window"))
        .mark_rect(opacity=0.25, color="#888")
        .encode(x=place, x2="end:Q"),
        base.mark_area(opacity=0.4, color=USUAL).encode(y=y("low"), y2="high"),
        base.mark_line(strokeWidth=1.2, color=USUAL).encode(y=y("mean")),
    ]
    if ranges:
        layers.insert(1, base.mark_area(opacity=0.2, color=USUAL).encode(y=y("min"), y2="max"))
    return alt.layer(*layers).properties(width="container", height=150)


def _tooltips(ranges: bool) -> list[alt.Tooltip]:
    numbers = ["mean", "std", *(("min", "max") if ranges else ())]
    return [
        alt.Tooltip("name:N", title="feature"),
        *(alt.Tooltip(f"{name}:Q", format=".6~g") for name in numbers),
        *(alt.Tooltip(f"{name}:Q", format=",") for name in ("count", "missing")),
    ]


# ---- text ---------------------------------------------------------------------------------------


def _summary(features: Features, held: int) -> str:
    count, missing = features.count, features.missing
    size = count.size
    low, high = (int(f(count)) if size else 0 for f in (np.min, np.max))
    values = f"{low:,} values each" if low == high else f"{low:,} to {high:,} values each"
    parts = [f"{_many(size, 'feature')}, {values}"]
    if missing.any():
        total = float(missing.sum())
        share = total / (total + float(count.sum()))
        parts.append(f"{100 * share:.2g} % of all values missing")
    if features.scale != 1:
        parts.append(f"divided by {features.scale:g} first")
    text = f"<p>{html.escape('; '.join(parts))}.</p>"
    if held < size:
        text += f"<p>This page holds {held:,} of them: those with hints, and the first.</p>"
    if len(features.files) > 1:
        listed = "".join(f"<li>{html.escape(name)}</li>" for name in features.files[:MOST_FILES])
        if len(features.files) > MOST_FILES:
            listed += f"<li>and {len(features.files) - MOST_FILES:,} more</li>"
        text += (
            f"<details><summary>{_many(len(features.files), 'file')}</summary>"
            f'<ol class="files">{listed}</ol></details>'
        )
    return text


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _notes(features: Features) -> str:
    items = "".join(
        f'<li><strong class="{"sick" if note.remedy else "soft"}">{html.escape(note.kind)}'
        f"</strong> {html.escape(note.what)} "
        f'<span class="soft">{html.escape(note.remedy)}</span></li>'
        for note in features.notes
    )
    text = f'<ul class="notes">{items}</ul>' if items else ""
    if not any(note.remedy for note in features.notes):
        text += '<p class="healthy">Nothing looks wrong.</p>'
    if features.extremes is None:
        text += '<p class="soft">Extremes were not measured, so outliers do not show.</p>'
    return text


def _ready(line: str) -> str:
    if not line:
        return ""
    return (
        '<section aria-labelledby="ready-title"><h2 id="ready-title">For torchvision</h2>'
        f'<pre class="scroll" tabindex="0"><code id="ready">{html.escape(line)}</code></pre>'
        '<p><button data-copy="ready">Copy</button></p></section>'
    )


def _table(table: Table) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(what)}</th><td>{html.escape(words)}</td></tr>"
        for what, words in table.rows
    )
    title = html.escape(table.title)
    return (
        f'<section><h2>{title}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{title}"><table class="words"><tbody>{rows}</tbody></table></div></section>'
    )
