"""Findings as text that other programs read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from urllib.parse import quote

from batchnorm._version import __version__
from batchnorm.errors import printable

from .findings import Finding
from .rules import RULES

__all__ = ["FORMATS", "render"]


def _json(findings: Sequence[Finding], target: str) -> str:
    return json.dumps(
        {
            "target": target,
            "findings": [
                {
                    "code": f.code,
                    "title": f.title,
                    "level": f.level,
                    "layer": f.layer,
                    "message": f.message,
                    "evidence": f.evidence,
                    "fix": f.fix,
                    "url": f.url,
                    "file": f.where[0] if f.where else None,
                    "line": f.where[1] if f.where else None,
                }
                for f in findings
            ],
        },
        indent=2,
        ensure_ascii=False,
    )


def _text(findings: Sequence[Finding], target: str) -> str:
    lines = []
    for f in findings:
        place = f"{f.where[0]}:{f.where[1]}" if f.where else target
        text = f"{place}: {f.code} {f.layer + ': ' if f.layer else ''}{f.message}"
        lines.append(printable(text))
    return "\n".join(lines)


def _github(findings: Sequence[Finding], target: str) -> str:
    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def part(text: str) -> str:
        return escaped(text).replace(":", "%3A").replace(",", "%2C")

    lines = []
    for f in findings:
        place = f"file={part(f.where[0])},line={f.where[1]}," if f.where else ""
        title = part(f"{f.code} {f.title}")
        message = escaped(f"{f.layer + ': ' if f.layer else ''}{f.message}. {f.fix}")
        command = "notice" if f.level == "note" else "warning"
        lines.append(f"::{command} {place}title={title}::{message}")
    return "\n".join(lines)


def _sarif(findings: Sequence[Finding], target: str) -> str:
    codes = {f.code for f in findings}
    rules = [
        {
            "id": rule.code,
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": (rule.look.__doc__ or rule.title).strip()},
            "help": {"text": rule.fix},
        }
        for rule in RULES
        if rule.code in codes
    ]
    results = []
    for f in findings:
        file, line = f.where or (target, 1)
        results.append(
            {
                "ruleId": f.code,
                "level": f.level,
                "message": {"text": f"{f.layer + ': ' if f.layer else ''}{f.message}"},
                "locations": [
                    {
                        "physicalLocation": {
                            "artifactLocation": {"uri": quote(file.replace("\\", "/"))},
                            "region": {"startLine": line},
                        },
                        "logicalLocations": [{"fullyQualifiedName": f.layer}],
                    }
                ],
                "properties": {"evidence": f.evidence},
            }
        )
    driver = {"name": "batchnorm", "version": __version__, "rules": rules}
    return json.dumps(
        {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": results}],
        },
        indent=2,
        ensure_ascii=False,
    )


#: By name; each takes the findings and what was looked at.
FORMATS: dict[str, Callable[[Sequence[Finding], str], str]] = {
    "text": _text,
    "json": _json,
    "sarif": _sarif,
    "github": _github,
}


def render(findings: Sequence[Finding], target: str, form: str) -> str:
    """Findings in one of `FORMATS`."""
    return FORMATS[form](findings, target)
