"""The charts of a report: Vega-Lite without data, which page.js gives them for each layer."""

from __future__ import annotations

from typing import Any

import altair as alt

__all__ = ["COLORS", "fan", "specs", "step_axis"]

#: Hues that people with any colour vision tell apart (Okabe & Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
ROWS = alt.NamedData(name="rows")


def step_axis(title: str = "step", **axis: Any) -> alt.X:
    """Training steps on the horizontal axis."""
    return alt.X(
        "step:Q", title=title, scale=alt.Scale(nice=False), axis=alt.Axis(format=",d", **axis)
    )


def fan(base: Any, low: str, middle: str, high: str, **encodings: Any) -> Any:
    """A band from `low` to `high`, and the line of `middle`; both also in the tooltip.

    `encodings` are those of the line alone, such as its dashes.
    """
    title = encodings.pop("title", None)
    tooltip = [
        *encodings.pop("tooltip", ()),
        alt.Tooltip("step:Q", format=","),
        *(alt.Tooltip(f"{name}:Q", format=".3g") for name in (high, middle, low)),
    ]
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y(f"{low}:Q", title=title), y2=f"{high}:Q", tooltip=tooltip
    )
    line = base.mark_line(strokeWidth=2.2).encode(
        y=alt.Y(f"{middle}:Q", title=title), tooltip=tooltip, **encodings
    )
    return band, line


def specs(recordings: list[str], layers: int) -> dict[str, Any]:
    """The charts by the id of their place in the page."""
    charts = {
        "glance": _glance(layers),
        "histogram": _histogram(recordings),
        "means": _bands(recordings),
        "stds": _bands(recordings),
        "affine": _bands(recordings),
        "gradients": _lines(recordings, "norm", log=True),
        "moved": _lines(recordings, "distance on the probe ÷ spread"),
    }
    return {name: chart.to_dict(validate=False) for name, chart in charts.items()}


def _glance(layers: int) -> Any:
    """All layers over time: running beside batch statistics, or another number."""
    picked = alt.selection_point(name="picked", fields=["layer", "step"], on="click", clear=False)
    return (
        alt.Chart(ROWS)
        .mark_rect(stroke=None)
        .encode(
            x=alt.X("order:O", title="step", axis=alt.Axis(
                labelExpr="datum.value % 8 == 0 ? steps[datum.value] : ''",
                labelAngle=0, ticks=False,
            )),
            y=alt.Y("layer:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color(
                "value:Q",
                title=None,
                scale=alt.Scale(scheme="cividis"),
                legend=alt.Legend(orient="top", gradientLength=220),
            ),
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("step:Q", format=","),
                alt.Tooltip("value:Q", format=".3g"),
            ],
        )
        .add_params(picked, alt.param(name="steps", value=[]))
        .properties(
            width="container",
            height=16 * layers,
        )
    )  # fmt: skip


def _histogram(recordings: list[str]) -> Any:
    """Input and output of one channel at one step; the axis is that of all steps."""
    chart = (
        alt.Chart()
        .mark_bar(opacity=0.55, binSpacing=0)
        .encode(
            x=alt.X(
                "low:Q",
                title="value",
                bin="binned",
                scale=alt.Scale(domain=alt.ExprRef("extent"), nice=False),
            ),
            x2="high:Q",
            y=alt.Y("density:Q", title="density", stack=None),
            color=alt.Color(
                "side:N",
                title=None,
                scale=alt.Scale(domain=["before", "after"], range=[COLORS[1], COLORS[0]]),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=[
                alt.Tooltip("side:N"),
                alt.Tooltip("low:Q", format=".3g"),
                alt.Tooltip("high:Q", format=".3g"),
                alt.Tooltip("share:Q", format=".1%"),
            ],
        )
    )
    if len(recordings) == 1:
        sized = chart.properties(data=ROWS, width="container", height=220)
    else:
        sized = (
            chart.properties(width=380, height=200)
            .facet(column=alt.Column("recording:N", sort=None, title=None), data=ROWS)
            .resolve_scale(y="independent")
        )
    return sized.add_params(alt.param(name="extent", value=[-4, 4]))


def _color() -> Any:
    return alt.Color(
        "what:N", sort=None, title=None, scale=alt.Scale(range=list(COLORS)),
        legend=alt.Legend(orient="top", symbolOpacity=1),
    )  # fmt: skip


def _dash(recordings: list[str]) -> Any:
    if len(recordings) == 1:
        return alt.Undefined
    return alt.StrokeDash(
        "recording:N", sort=None, title=None,
        scale=alt.Scale(range=[[1, 0], [5, 4]]), legend=alt.Legend(orient="top"),
    )  # fmt: skip


def _bands(recordings: list[str]) -> Any:
    """Medians over the channels, and the 15th to 85th percentile."""
    base = alt.Chart(ROWS).encode(x=step_axis(), color=_color(), detail="recording:N")
    layers = fan(
        base, "low", "mid", "high", strokeDash=_dash(recordings), tooltip=[alt.Tooltip("what:N")]
    )
    return alt.layer(*layers).properties(width="container", height=180)


def _lines(recordings: list[str], title: str, *, log: bool = False) -> Any:
    return (
        alt.Chart(ROWS)
        .mark_line()
        .encode(
            x=step_axis(),
            y=alt.Y("mid:Q", title=title, scale=alt.Scale(type="log" if log else "linear")),
            color=_color(),
            strokeDash=_dash(recordings),
            tooltip=[
                alt.Tooltip("what:N"),
                alt.Tooltip("step:Q", format=","),
                alt.Tooltip("mid:Q", format=".3g"),
            ],
        )
        .properties(width="container", height=180)
    )
