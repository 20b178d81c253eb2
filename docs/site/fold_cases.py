"""The picture of what tools that fold make of many cases.

`python docs/site/fold_cases.py` draws it anew from benchmarks/results/fold_cases.csv.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path
from typing import Any

import altair as alt

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gallery
from tables import FOLDERS

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results" / "fold_cases.csv"
TOOLS = {key: name.replace(". ", ".") for key, name in FOLDERS.items()}
#: From the best to the worst; a line of several cases has the colour of its worst.
COLORS = {"right": "#009e73", "refused": "#a9b1bb", "crashed": "#9c5fb5", "wrong": "#d55e00"}
GAP = 1.5  # between kinds, in columns


def chart(rows: list[dict[str, str]]) -> Any:
    """Tools by lines of the table, grouped by kind."""
    order = list(COLORS)
    worst: dict[tuple[str, str], str] = {}
    kinds: dict[str, list[str]] = {}
    for row in rows:
        lines = kinds.setdefault(row["kind"], [])
        if row["line"] not in lines:
            lines.append(row["line"])
        if row["provider"] in TOOLS and row["verdict"] in order:
            key = (f"{row['kind']}/{row['line']}", TOOLS[row["provider"]])
            worst[key] = max(worst.get(key, order[0]), row["verdict"], key=order.index)
    places: dict[str, float] = {}
    names = []
    start = 0.0
    for kind, lines in kinds.items():
        names.append({"x": start + len(lines) / 2, "kind": kind})
        for line in lines:
            places[f"{kind}/{line}"] = start
            start += 1
        start += GAP
    values = [
        {"x": places[line] + 0.06, "x2": places[line] + 0.94, "tool": tool, "verdict": verdict}
        for (line, tool), verdict in worst.items()
    ]
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, start - GAP], nice=False))
    tiles = (
        alt.Chart(alt.InlineData(values=values))
        .mark_bar(height={"band": 0.86}, aria=False)  # a number for each would be 200 KB
        .encode(
            x=x,
            x2="x2:Q",
            y=alt.Y("tool:N", sort=list(TOOLS.values()), title=None, axis=alt.Axis(ticks=False)),
            color=alt.Color(
                "verdict:N",
                sort=order,
                scale=alt.Scale(domain=order, range=list(COLORS.values())),
                legend=alt.Legend(orient="bottom", title=None),
            ),
        )
    )
    labels = (
        alt.Chart(alt.InlineData(values=names))
        # A color that can be read on both pages.
        .mark_text(color="#7a828c", angle=325, align="left", baseline="bottom", y=-4, clip=False)
        .encode(x=x, text="kind:N")
    )
    frame = {
        "view": alt.ViewBackground(stroke=None),
        "padding": {"left": 25, "right": 5, "top": 15},
    }
    return alt.layer(tiles, labels, **frame).properties(width=760, height=170)


def fingerprint() -> str:
    """Of the results that are drawn."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()[:16]


def main() -> None:
    """Write docs/assets/fold-cases-light.svg and fold-cases-dark.svg."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        drawn = chart(list(csv.DictReader(file)))
    for theme, svg in gallery.pictures(drawn).items():
        marked = svg.replace(">", f"><!-- results {fingerprint()} -->", 1)
        (DOCS / "assets" / f"fold-cases-{theme}.svg").write_text(marked + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
