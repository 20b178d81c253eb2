"""One self-contained HTML page from a demo's result: text, tables and linked charts.

The page is ``page.html``, ``page.css`` and ``page.js`` beside this file, with values for the names
that begin with a dollar sign. It loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
from importlib import resources
from string import Template

import vl_convert

from batchnorm.demo import tables
from batchnorm.demo.charts import accuracy_chart, histogram_chart, percentile_chart, themed
from batchnorm.demo.results import DemoResult


def render_page(result: DemoResult) -> str:
    """Return the page, a complete HTML document."""
    charts = {
        "accuracy": accuracy_chart(result),
        "histogram": histogram_chart(result),
        "with": percentile_chart(result, batch_norm=True),
        "without": percentile_chart(result, batch_norm=False),
    }
    specs = {name: themed(chart).to_dict(validate=False) for name, chart in charts.items()}
    layers = "–".join(str(size) for size in result.sizes)
    return Template(_file("page.html")).substitute(
        title="Batch normalization on real digits",
        style=_file("page.css"),
        script=_file("page.js"),
        # The stub of vl-convert misses that the snippet may be left out.
        bundle=vl_convert.javascript_bundle(),  # type: ignore[call-arg]
        # "</" could end the script element early; in JSON it may be written "<\/".
        specs=json.dumps(specs, separators=(",", ":")).replace("</", "<\\/"),
        setup=f"{layers} units, batches of {result.batch_size}, "
        f"{result.steps:,} steps for each of {len(result.runs)} networks, seed {result.seed}, "
        f"{result.seconds:.0f} seconds in all",
        findings="".join(f"<li>{html.escape(text)}</li>" for text in tables.comparisons(result)),
        rates="".join(
            f'<option value="{rate!r}">{rate:g}</option>' for rate in result.learning_rates
        ),
        units=result.sizes[-2],
        test=f"{result.test_digits:,}",
        train=f"{result.training_digits:,}",
        accuracy_table=_html_table(tables.accuracy_table(result)),
        steps_table=_html_table(tables.steps_table(result)),
        input_table=_html_table(tables.input_table(result)),
        inference_table=_html_table(tables.inference_table(result)),
        gradient_table=_html_table(tables.gradient_table(result)),
    )


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _html_table(table: tables.Table) -> str:
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
