"""The picture of the README: what batch norm does to one unit, and to training.

`python docs/site/overview.py` draws it anew from the results of the study `paper`.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import altair as alt

sys.path.insert(0, str(Path(__file__).parent))

import gallery

from batchnorm import study

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS / "studies" / "paper.json"
#: The settings of the paper's network that are drawn, and the steps of its beginning.
RATE, STD, STEPS = 0.1, 0.1, 4000
COLORS = ("#d55e00", "#0072b2")
NAMES = {False: "without batch norm", True: "with batch norm"}


def chart(records: list[study.Record]) -> Any:
    """Percentiles of one unit's input without and with batch norm, and the test error."""
    seed = min(record["seed"] for record in records)
    rows = [
        {**record, "arm": NAMES[record["batch norm"]]}
        for record in records
        if record["rate"] == RATE and record["std"] == STD and record["step"] <= STEPS
    ]
    color = alt.Color("arm:N", sort=None, scale=alt.Scale(range=COLORS), legend=None)
    axis = alt.Axis(values=[0, 2000, 4000], format=",d")
    base = alt.Chart().encode(x=alt.X("step:Q", axis=axis), color=color)
    fans = []
    one = [row for row in rows if row["seed"] == seed]
    for name in NAMES.values():
        data = alt.InlineData(values=[row for row in one if row["arm"] == name])
        fan = base.mark_area(opacity=0.3).encode(
            y=alt.Y("p15:Q", title="input of one unit", scale=alt.Scale(domain=[-2, 2])), y2="p85:Q"
        )
        middle = base.mark_line().encode(y="p50:Q")
        fans.append(alt.layer(fan, middle, data=data).properties(width=190, height=150, title=name))
    error = (
        base.mark_line()
        .encode(y=alt.Y("mean(error):Q", title=None, axis=alt.Axis(format="%")))
        .properties(
            width=190, height=150, title="test error of both", data=alt.InlineData(values=rows)
        )
    )
    return alt.hconcat(*fans, error, spacing=25)


def fingerprint() -> str:
    """Of the results that are drawn."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()[:16]


def main() -> None:
    """Write docs/assets/overview-light.svg and overview-dark.svg."""
    drawn = chart(study.Results.load(RESULTS).all_records())
    for theme, svg in gallery.pictures(drawn).items():
        marked = svg.replace(">", f"><!-- results {fingerprint()} -->", 1)
        (DOCS / "assets" / f"overview-{theme}.svg").write_text(marked + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
