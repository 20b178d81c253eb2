"""The pages of the studies, made from their committed results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from batchnorm import study as studies
from batchnorm.study.verdicts import shade

ORDER = (
    "paper",
    "learning-rate",
    "covariate-shift",
    "mechanism",
    "population",
    "batch-size",
    "leakage",
    "shift",
    "numerics",
)
THEMES = {"light": ("#1c1e21", "#d0d4da"), "dark": ("#e4e6ea", "#4a4f57")}


def files(folder: Path) -> dict[str, str]:
    """Name to content of the pages and pictures of all studies that have results."""
    made: dict[str, str] = {}
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    for name, content in found.items():
        study = studies.find(name)
        records = studies.Results.load(folder / f"{name}.json").all_records()
        for theme, svg in pictures(study.chart(records)).items():
            made[f"studies/{name}-{theme}.svg"] = svg
        made[f"studies/{name}.md"] = page(content)
    ordered = [found[name] for name in (*ORDER, *sorted(set(found) - set(ORDER))) if name in found]
    made["studies/verdicts.md"] = overview(ordered)
    return made


def pictures(chart: alt.TopLevelMixin) -> dict[str, str]:
    """The chart for light and for dark pages."""
    made = {}
    for theme, (ink, grid) in THEMES.items():
        spec = copy.deepcopy(chart.to_dict(validate=False))
        spec["background"] = "transparent"
        spec["config"] = {
            "font": "sans-serif",
            "axis": {
                "labelColor": ink, "titleColor": ink, "gridColor": grid, "domainColor": grid,
                "tickColor": grid, "gridOpacity": 0.6,
            },
            "legend": {"labelColor": ink, "titleColor": ink},
            "header": {"labelColor": ink, "titleColor": ink},
            "title": {"color": ink},
            "view": {"stroke": grid},
        }  # fmt: skip
        made[theme] = vl_convert.vegalite_to_svg(spec)
    return made


def _verdict(claim: dict[str, Any]) -> str:
    """The verdict, and whether a claim that is not reproduced is refuted or only undecided."""
    kind = claim["verdict"].split()[0]  # reproduced, not, depends
    text = shade(claim["verdict"], [outcome["holds"] for outcome in claim["outcomes"]])
    if kind == "not" and text != claim["verdict"]:
        kind = "undecided"
    return f'<span class="verdict {kind}">{text}</span>'


def _picture(title: str, stem: str) -> list[str]:
    """The chart, of which a page shows the one that suits its colours."""
    # A link to the picture alone, which phones enlarge.
    return [
        *(f"[![{title}]({stem}-{theme}.svg#only-{theme})]({stem}-{theme}.svg)" for theme in THEMES),
        "",
    ]


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' * (minutes != 1)}"


def overview(found: list[dict[str, Any]]) -> str:
    """One table of all claims."""
    lines = [
        "# Every claim and its verdict",
        "",
        "Made from the results in this folder; `batchnorm study all` repeats them. "
        "[What the verdicts mean](index.md#verdicts).",
        "",
        "| verdict | claim | source | study |",
        "|:--|:--|:--|:--|",
    ]
    for content in found:
        for claim in content["claims"]:
            lines.append(
                f"| {_verdict(claim)} | {claim['text']} | {claim['source']} | "
                f"[{content['study']}]({content['study']}.md) |"
            )
    return "\n".join(lines) + "\n"


def summary(path: Path, here: str) -> str:
    """Picture and verdicts of a study, for a page from which `here` leads to the site's root."""
    if not path.exists():
        return f"*No results yet: `batchnorm study {path.stem} --out docs/studies`.*"
    content = json.loads(path.read_text("utf-8"))
    name, title = content["study"], content["title"]
    lines = [
        *_picture(title, f"{here}studies/{name}"),
        f"Mean of {len(content['trials'])} seeds, from the least to the largest of them.",
        "",
        "| verdict here | claim |",
        "|:--|:--|",
    ]
    lines += [
        f"| {_verdict(claim)} | {claim['text']} ({claim['source']}) |"
        for claim in content["claims"]
    ]
    lines += ["", f"[All numbers of this study]({here}studies/{name}.md): `batchnorm study {name}`"]
    return "\n".join(lines)


def page(content: dict[str, Any]) -> str:
    """A study: question, protocol, picture, claims with their numbers, command."""
    name, about = content["study"], content["about"]
    seeds, seconds = len(content["trials"]), sum(t["seconds"] for t in content["trials"])
    lines = [
        f"# {content['title']}",
        "",
        f"**{content['question']}**",
        "",
        content["protocol"],
        "",
        *_picture(content["title"], name),
        f"Mean of {seeds} seeds; bands and thin lines reach from the least to the largest of them.",
        "",
        "## Claims",
        "",
    ]
    for claim in content["claims"]:
        lines += [
            f"### {claim['text']}",
            "",
            f"{_verdict(claim)} · {claim['source']}",
            "",
            f"What decides: {claim['statistic']}. The claim holds where this is {claim['side']} "
            f"{claim['threshold']:g}.",
            "",
            "| | holds | mean | 95 % interval | ± std |",
            "|:--|:--|--:|--:|--:|",
        ]
        lines += [
            f"| {outcome['condition'] or 'all seeds'} | {outcome['holds']} | "
            f"{outcome['mean']:.4g} | {outcome['low']:.4g} to {outcome['high']:.4g} | "
            f"{outcome['std']:.2g} |"
            for outcome in claim["outcomes"]
        ]
        lines.append("")
    lines += [
        "## Repeat it",
        "",
        "```sh",
        f"batchnorm study {name}",
        "```",
        "",
        f"takes about {_minutes(seconds)} of one processor for {seeds} seeds. These results: "
        f"{about['date']}, {about['cpu']}, PyTorch {about['versions'].get('torch', '–')}; "
        f"[all numbers]({name}.json).",
        "",
    ]
    return "\n".join(lines)
