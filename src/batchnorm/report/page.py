"""One self-contained HTML page from one or two recordings: page.html, filled."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from batchnorm.diagnose.findings import Finding
from batchnorm.diagnose.records import BINS
from batchnorm.diagnose.rules import examine

from .charts import specs
from .template import as_json, fill

if TYPE_CHECKING:
    from batchnorm.diagnose.recording import Recording, Snapshot

__all__ = ["render"]

#: Steps whose histograms a page holds.
STEPS = 48
#: Findings of one code that are listed before the others.
MANY = 5
#: What the overview can show: name → title.
MEASURES = {
    "running_shift": "|running mean − batch mean|, in standard deviations",
    "running_factor": "running over batch standard deviation, or the inverse",
    "ratio": "|mean| of the input, in standard deviations",
    "std": "standard deviation of the input",
    "gradient": "norm of the output's gradient",
    "moved_relative": "how far the input has moved on the probe, in standard deviations",
}


def render(recording: Recording, other: Recording | None = None) -> str:
    """The page, a complete HTML document."""
    shown = [recording] if other is None else [recording, other]
    names = [r.name for r in shown]
    if len(set(names)) < len(names) or not all(names):
        names = ["first", "second"][: len(shown)]
    found = [examine(r.network()) for r in shown]
    layers = list(dict.fromkeys(name for r in shown for name in r.layers))
    data: dict[str, Any] = {
        "names": names,
        "layers": layers,
        "measures": _measures(shown),
        "recordings": [_data(r) for r in shown],
        "first": next((f.layer for f in found[0] if f.layer in layers), layers[0]),
    }
    return fill(
        "page",
        specs=as_json(specs(names, len(layers))),
        data=as_json(data),
        summary=_summary(shown, names),
        findings="".join(
            _findings(findings, name if other is not None else "")
            for findings, name in zip(found, names, strict=True)
        ),
        table=_table(recording, found[0]),
        options="".join(f"<option>{html.escape(name)}</option>" for name in layers),
        measures="".join(
            f'<option value="{name}">{html.escape(MEASURES[name])}</option>'
            for name in data["measures"]
        ),
    )


def _number(value: float, digits: int = 4) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _measure(snapshot: Snapshot, name: str) -> float:
    if name == "ratio":
        with np.errstate(all="ignore"):
            ratio = np.abs(snapshot.mean) / np.sqrt(snapshot.var)
        return float(np.median(ratio)) if len(ratio) else math.nan
    return snapshot.metrics().get(name, math.nan)


def _measures(shown: list[Recording]) -> list[str]:
    """Those that are known."""
    snapshots = [s for r in shown for s in r.snapshots]
    known = [n for n in MEASURES if any(math.isfinite(_measure(s, n)) for s in snapshots)]
    return known or ["running_shift"]


def _data(recording: Recording) -> dict[str, Any]:
    """What page.js draws, by layer."""
    chosen = _thinned(recording.steps, STEPS)
    return {
        "steps": recording.steps,
        "shown": chosen,
        "layers": {name: _layer(recording.of(name), set(chosen)) for name in recording.layers},
    }


def _thinned(steps: list[int], most: int) -> list[int]:
    picked = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).astype(int))
    return [steps[k] for k in picked]


def _layer(snapshots: list[Snapshot], chosen: set[int]) -> dict[str, Any]:
    bands: dict[str, list[Any]] = {}
    for snapshot in snapshots:
        with np.errstate(all="ignore"):
            parts = {
                "batch mean": snapshot.mean,
                "running mean": snapshot.running_mean,
                "batch std": np.sqrt(snapshot.var),
                "running std": np.sqrt(np.maximum(snapshot.running_var, 0)),
                "γ": snapshot.weight,
                "β": snapshot.bias,
            }
        for name, values in parts.items():
            found = np.quantile(values, (0.15, 0.5, 0.85)) if len(values) else [math.nan] * 3
            bands.setdefault(name, []).append([_number(v) for v in found])
    return {
        "steps": [s.step for s in snapshots],
        "bands": bands,
        "lines": {
            name: [_number(getattr(s, name)) for s in snapshots]
            for name in ("gradient", "gradient_weight", "gradient_bias", "moved", "moved_relative")
        },
        "measures": {n: [_number(_measure(s, n)) for s in snapshots] for n in MEASURES},
        "values": _number(snapshots[-1].values),
        "channels": snapshots[-1].channels.tolist(),
        "histograms": {str(s.step): _histograms(s) for s in snapshots if s.step in chosen},
    }


def _histograms(snapshot: Snapshot) -> list[Any]:
    """For each channel, before and after: low, high, counts."""
    found = []
    for k in range(len(snapshot.channels)):
        for side in ("before", "after"):
            counts = getattr(snapshot, f"counts_{side}")[k * BINS : (k + 1) * BINS]
            low, high = (float(getattr(snapshot, f"{end}_{side}")[k]) for end in ("low", "high"))
            found.append([_number(low, 5), _number(high, 5), *counts.tolist()])
    return found


# ---- text ---------------------------------------------------------------------------------------


def anchor(layer: str) -> str:
    """The id of a layer's row."""
    return f"layer-{layer}"


def _link(layer: str) -> str:
    name = html.escape(layer)
    return f'<a href="#{quote(anchor(layer))}" data-layer="{name}">{name or "the network"}</a>'


def _summary(shown: list[Recording], names: list[str]) -> str:
    parts = []
    for recording, name in zip(shown, names, strict=True):
        steps = recording.steps
        rank = f", process {recording.rank} of {recording.processes}" * (recording.processes > 1)
        title = f"{name}: " if len(shown) > 1 else ""
        count = len(recording.layers)
        parts.append(
            f"<p>{title}{html.escape(str(recording.about.get('model', 'a model')))}, "
            f"{count} layer{'s' * (count != 1)}, {len(steps)} steps from {steps[0]:,} to "
            f"{steps[-1]:,}{rank}</p>"
        )
    return "".join(parts)


def _findings(findings: list[Finding], name: str) -> str:
    title = f"<h3>{name}</h3>" if name else ""
    if not findings:
        text = "No findings in what was recorded; labels, data and the optimizer are not."
        return f'{title}<p class="healthy">{text}</p>'
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.code, []).append(finding)
    parts = [title]
    for code, group in groups.items():
        items = [
            f"<li>{_link(f.layer) if f.layer else 'the network'}: {html.escape(f.message)}</li>"
            for f in group
        ]
        parts.append(
            f'<details open class="finding"><summary><strong>{code}</strong> '
            f"{html.escape(group[0].title)} ({len(group)})</summary>{_list(items)}"
            f"<p><em>What to do:</em> {html.escape(group[0].fix)}. "
            f"<code>batchnorm check --explain {code}</code></p></details>"
        )
    return "".join(parts)


def _list(items: list[str]) -> str:
    """The first ones, and the others on demand."""
    first, others = "".join(items[:MANY]), "".join(items[MANY:])
    more = f"<details><summary>and {len(items) - MANY} more</summary><ul>{others}</ul></details>"
    return f"<ul>{first}</ul>{more if others else ''}"


def _table(recording: Recording, findings: list[Finding]) -> str:
    codes: dict[str, list[str]] = {}
    for finding in findings:
        codes.setdefault(finding.layer, []).append(finding.code)
    rows = []
    for name in recording.layers:
        last = recording.of(name)[-1]
        shift, factor = last.gap()
        kind = recording.about.get("layers", {}).get(name, {}).get("kind", "")
        found = ", ".join(dict.fromkeys(codes.get(name, [])))
        mark = f'<span class="sick">{found}</span>' if found else '<span class="well">✓</span>'
        cells = [
            _link(name), mark, html.escape(kind), str(len(last.mean)), f"{last.values:,.0f}",
            _text(shift), _text(factor), _text(last.metrics().get("weight", math.nan)),
        ]  # fmt: skip
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr id="{anchor(html.escape(name))}">{row}</tr>')
    return "".join(rows)


def _text(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
