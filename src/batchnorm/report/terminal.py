"""A recording as a table on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from batchnorm.diagnose.findings import Findings
from batchnorm.diagnose.rules import examine

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.diagnose.recording import Recording

__all__ = ["show"]

_BARS = "▁▂▃▄▅▆▇█"


def show(recording: Recording, console: Console) -> None:
    """Print findings, and a row for each layer."""
    from rich.table import Table

    findings = examine(recording.network())
    codes: dict[str, list[str]] = {}
    for finding in findings:
        codes.setdefault(finding.layer, []).append(finding.code)
    table = Table(title=repr(recording), box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("values", "mean off", "over time", "std ×", "|γ|"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("findings", overflow="fold")
    for layer in recording.layers:
        seen = recording.of(layer)
        shift, factor = seen[-1].gap()
        table.add_row(
            layer,
            f"{seen[-1].values:,.0f}",
            _text(shift),
            sparkline([s.gap()[0] for s in seen]),
            _text(factor),
            _text(seen[-1].metrics().get("weight", math.nan)),
            ", ".join(dict.fromkeys(codes.get(layer, []))),
        )
    console.print(table)
    console.print(
        "values: per channel in a batch; mean off: running beside batch mean, in standard "
        "deviations,\nand over time; std ×: factor between running and batch standard deviation.\n"
    )
    console.print(str(Findings(findings)), soft_wrap=True)


def _text(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def sparkline(values: list[float], width: int = 10) -> str:
    """Values over time as a row of bars, from zero to the largest."""
    finite = [v if math.isfinite(v) else 0.0 for v in values]
    count = min(width, len(finite))
    picked = [finite[k * len(finite) // count] for k in range(count)]
    if len(finite) > width:
        picked[-1] = finite[-1]
    most = max(picked, default=0.0)
    if most <= 0:
        return _BARS[0] * len(picked)
    return "".join(_BARS[min(int(v / most * len(_BARS)), len(_BARS) - 1)] for v in picked)
