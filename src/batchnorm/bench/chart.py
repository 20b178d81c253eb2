"""The plot of `batchnorm bench`, and charts as pictures without a browser."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from batchnorm.bench.harness import COPY, SpeedRow

_COLOURS = {
    "batchnorm": "#1b7f5c",
    "batchnorm-out": "#74c69d",
    "torch": "#d1495b",
    "torch.compile": "#edae49",
    "jax": "#5b6fb5",
    "numpy": "#8d99ae",
}


def can_plot() -> bool:
    """Whether what draws the plot is installed."""
    return find_spec("altair") is not None and find_spec("vl_convert") is not None


def plot(results: Iterable[SpeedRow], subtitle: str) -> Any:
    """Draw the time of every provider in plain copies: a panel an operation, a line a case."""
    import altair as alt

    rows: list[dict[str, Any]] = [
        {
            "op": row.op,
            "case": f"{row.shape.replace('x', '×')} {row.layout}",
            "provider": row.provider,
            "copies": row.copies,
            "floor": row.floor_copies,
        }
        for row in results
        if row.status == "ok" and row.provider != COPY and row.copies > 0
    ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    present = {row["provider"] for row in rows}
    shown = [name for name in _COLOURS if name in present] + sorted(present - _COLOURS.keys())
    colour = alt.Color(
        "provider:N",
        sort=shown,
        scale=alt.Scale(domain=shown, range=[_COLOURS.get(name, "#222222") for name in shown]),
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
        # One rule for the panel, not one for each row of the data.
        floor = (
            alt.Chart(alt.InlineData([{"copies": members[0]["floor"]}]))
            .mark_rule(color="#444444", strokeDash=[4, 3], strokeWidth=1.5)
            .encode(x=position)
        )
        # Each provider has its own height within a line, lest equals hide one another.
        dots = (
            alt.Chart(alt.InlineData(members))
            .mark_point(filled=True, size=70, opacity=1)
            .encode(y=line, x=position, color=colour, yOffset=alt.YOffset("provider:N", sort=shown))
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
    title = alt.TitleParams(
        text="Batch normalization on the CPU, float32: left is faster",
        subtitle=subtitle,
        anchor="start",
        fontSize=16,
        subtitleColor="#666666",
        offset=10,
    )
    return themed(
        alt.hconcat(*panels).resolve_scale(x="shared", y="shared").properties(title=title)
    ).configure_view(stroke="#dddddd")


def themed(chart: Any) -> Any:
    """The chart in the font and on the background that all pictures share."""
    return chart.configure(font="Helvetica, Arial, sans-serif", background="white", padding=16)


def render(chart: Any, form: str) -> bytes:
    """A chart as ``svg`` or ``png``, without a browser."""
    import vl_convert

    if form == "svg":
        return str(vl_convert.vegalite_to_svg(chart.to_dict())).encode()
    return bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=2))
