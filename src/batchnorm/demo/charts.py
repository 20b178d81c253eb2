"""The charts of the page: Vega-Lite, from counts and percentiles rather than raw activations."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import altair as alt
import numpy as np

from batchnorm.demo.results import DemoResult, TrainingRun
from batchnorm.demo.training import BINS
from batchnorm.report.charts import fan, step_axis

WITH, WITHOUT, BEFORE = "#1f6fb4", "#d9620f", "#7d8794"
# One hue for each kind of network; the darker, the larger the learning rate.
SHADES = {
    True: ("#8fc1e8", "#4f9bd6", "#1f6fb4", "#0b3c6d"),
    False: ("#fbc08a", "#f39145", "#d9620f", "#8a3606"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
BARS = 70
# Of all values ever recorded, the share that each end of the histogram leaves out.
TAIL = 0.003

Chart = alt.Chart | alt.LayerChart


def accuracy_chart(result: DemoResult) -> Chart:
    """Return the test accuracy of every run over training, one line each."""
    names = []
    colors = []
    records: list[dict[str, Any]] = []
    for batch_norm in (True, False):
        for rate, shade in zip(result.learning_rates, cycle(SHADES[batch_norm])):
            run = result.run_of(batch_norm=batch_norm, learning_rate=rate)
            names.append(run.name)
            colors.append(shade)
            records += [
                {"run": run.name, "step": step, "accuracy": round(accuracy, 4)}
                for step, accuracy in zip(run.evaluated_steps, run.accuracies, strict=True)
            ]

    picked = alt.selection_point(name="picked", fields=["run"], bind="legend")
    hovered = alt.selection_point(
        name="hovered", fields=["step", "run"], nearest=True, on="pointerover", empty=False
    )
    base = alt.Chart(alt.InlineData(values=records)).encode(
        x=step_axis("training step", tickCount=10),
        y=alt.Y(
            "accuracy:Q",
            title="test accuracy",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(format="%"),
        ),
        color=alt.Color(
            "run:N",
            scale=alt.Scale(domain=names, range=colors),
            legend=alt.Legend(
                title=None,
                orient="bottom",
                columns=alt.ExprRef(f"width < 560 ? 2 : {len(result.learning_rates)}"),
                symbolType="stroke",
            ),
        ),
        opacity=alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.1)),
    )
    lines = base.mark_line(strokeWidth=2).add_params(picked)
    points = (
        base.mark_point(filled=True, size=70)
        .encode(
            opacity=alt.when(hovered).then(alt.value(1)).otherwise(alt.value(0)),
            tooltip=[
                alt.Tooltip("run:N", title="network"),
                alt.Tooltip("step:Q", title="step", format=","),
                alt.Tooltip("accuracy:Q", title="accuracy", format=".1%"),
            ],
        )
        .add_params(hovered)
    )
    chart: Chart = (lines + points).properties(height=400)
    return chart


def histogram_chart(result: DemoResult) -> Chart:
    """Return the pre-activations of the last hidden layer, with a slider over training."""
    records = [
        record
        for rate in result.learning_rates
        for record in _histogram_records(
            result.run_of(batch_norm=True, learning_rate=rate),
            result.run_of(batch_norm=False, learning_rate=rate),
        )
    ]
    recorded = [recording.step for recording in result.runs[0].recordings]
    step = alt.param(
        name="step",
        value=recorded[-1],
        bind=alt.binding_range(
            min=0, max=recorded[-1], step=recorded[1] - recorded[0], name="Training step"
        ),
    )
    rate = alt.param(name="rate", value=result.learning_rates[0])
    series = ["with BN, before normalization", "with BN, after", "without BN"]
    chart: Chart = (
        alt.Chart(alt.InlineData(values=records))
        .transform_filter("datum.step == step && datum.rate == rate")
        .transform_calculate(bin="sequence(length(datum.share))")
        .transform_flatten(["bin", "share"])
        .transform_calculate(x="datum.low + (datum.bin + 0.5) * datum.width")
        .mark_area(interpolate="step", line={"strokeWidth": 1.8}, fillOpacity=0.22)
        .encode(
            x=alt.X(
                "x:Q",
                title="pre-activation",
                scale=alt.Scale(nice=False, zero=False),
                axis=alt.Axis(tickCount=12),
            ),
            y=alt.Y(
                "share:Q", title="share of values per bar", stack=None, axis=alt.Axis(format="%")
            ),
            color=alt.Color(
                "series:N",
                scale=alt.Scale(domain=series, range=[BEFORE, WITH, WITHOUT]),
                legend=alt.Legend(
                    title=None,
                    orient="bottom",
                    columns=alt.ExprRef("width < 560 ? 1 : 3"),
                    symbolOpacity=1,
                ),
            ),
            tooltip=[
                alt.Tooltip("series:N", title="values"),
                alt.Tooltip("x:Q", title="near", format=".2f"),
                alt.Tooltip("share:Q", title="share", format=".2%"),
            ],
        )
        .add_params(step, rate)
        .properties(height=340)
    )
    return chart


def _histogram_records(with_norm: TrainingRun, without: TrainingRun) -> list[dict[str, Any]]:
    """Return one record per recorded step and series, its bars as one array of shares.

    All records of a learning rate have the same bars, so that the slider moves the values and
    not the axis. They span all but the outermost values of the whole training.
    """
    series = []
    for one, other in zip(with_norm.recordings, without.recordings, strict=True):
        series += [
            ("with BN, before normalization", one.step, one.before, one.total),
            ("with BN, after", one.step, one.after, one.total),
            ("without BN", other.step, other.after, other.total),
        ]
    first, last = _span(np.sum([counts for _, _, counts, _ in series], axis=0))
    merged = max(1, -(-(last - first) // BARS))
    starts = np.arange(first, last, merged)
    return [
        {
            "rate": with_norm.learning_rate,
            "series": name,
            "step": step,
            "low": round(BINS.low + first * BINS.width, 4),
            "width": round(merged * BINS.width, 4),
            "share": np.round(
                np.add.reduceat(counts[: starts[-1] + merged], starts) / total, 5
            ).tolist(),
        }
        for name, step, counts, total in series
    ]


def _span(pooled: np.typing.NDArray[Any]) -> tuple[int, int]:
    """Return the bins [first, last) that leave a small tail out at each end of a histogram."""
    limit = TAIL * pooled.sum()
    below = int(np.searchsorted(pooled.cumsum(), limit, side="right"))
    above = int(np.searchsorted(pooled[::-1].cumsum(), limit, side="right"))
    first = min(below, len(pooled) - 1)
    return first, max(len(pooled) - above, first + 1)


def percentile_chart(result: DemoResult, *, batch_norm: bool) -> Chart:
    """Return the 15th, 50th and 85th percentile of one sigmoid's input over training."""
    records: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    for run in result.runs:
        rate = run.learning_rate
        # The other network's limits too: both charts then have the same axis.
        values = [value for r in run.recordings for value in r.percentiles]
        limits += [{"rate": rate, "limit": min(values)}, {"rate": rate, "limit": max(values)}]
        if run.batch_norm == batch_norm:
            for r in run.recordings:
                p15, p50, p85 = (round(value, 4) for value in r.percentiles)
                records.append({"rate": rate, "step": r.step, "p15": p15, "p50": p50, "p85": p85})

    color = WITH if batch_norm else WITHOUT
    rate_param = alt.param(name="rate", value=result.learning_rates[0])
    base = (
        alt.Chart(alt.InlineData(values=records))
        .transform_filter("datum.rate == rate")
        .encode(x=step_axis("training step", tickCount=5))
    )
    layers = fan(
        base.encode(color=alt.value(color)), "p15", "p50", "p85", title="input of the sigmoid"
    )
    shared_axis = (
        alt.Chart(alt.InlineData(values=limits))
        .transform_filter("datum.rate == rate")
        .mark_point(opacity=0, tooltip=None)
        .encode(y="limit:Q")
    )
    chart = alt.layer(*layers, shared_axis).add_params(rate_param)
    sized: Chart = chart.properties(height=280)
    return sized


def themed(chart: Chart) -> Chart:
    """Return the chart as wide as its place on the page, in the page's font and colours."""
    themed: Chart = (
        chart.properties(width="container", background="transparent")
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=12,
            titleFontSize=13,
            titleFontWeight="normal",
            titleColor="#46505c",
            labelColor="#46505c",
            gridColor="#e6e9ed",
            domainColor="#b8c0c9",
            tickColor="#b8c0c9",
            titlePadding=10,
            labelOverlap=True,
        )
        .configure_legend(labelFontSize=13, labelLimit=260, symbolStrokeWidth=3, columnPadding=18)
    )
    return themed
