"""The verdicts as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.study.declare import Study
from batchnorm.study.results import Results
from batchnorm.study.verdicts import DEPENDS, REPRODUCED, Verdict, shade

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show"]


def _style(verdict: Verdict) -> str:
    if verdict.text == REPRODUCED:
        return "green"
    return "yellow" if verdict.text.startswith(DEPENDS) else "red"


def show(study: Study, results: Results, console: Console) -> None:
    """Print each claim with its verdict, and the numbers that decide it."""
    import rich.box
    from rich.markup import escape
    from rich.table import Table

    seconds = sum(results.seconds.values())
    seeds = len(results.records)
    quick = ", quick tour" if results.quick else ""
    console.print(
        f"\n[bold]{study.name}[/]: {escape(study.question)} "
        f"[dim]({seeds} seeds, {seconds:.0f} s of one processor{quick})[/]",
        highlight=False,
    )
    for claim, verdict in results.verdicts(study):
        style, text = _style(verdict), shade(verdict.text, [o.holds for o in verdict.outcomes])
        console.print(
            f"\n[{style}]{text}[/]  {escape(claim.text)} [dim]{escape(claim.source)}[/]",
            highlight=False,
        )
        title = f"{claim.statistic}; claimed: {claim.side} {claim.threshold:g}"
        table = Table(
            title=escape(title), title_justify="left", title_style="", box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
        )  # fmt: skip
        table.add_column("")
        for name in ("mean", "± std", "95 % interval", "holds"):
            table.add_column(name, justify="right")
        for o in verdict.outcomes:
            table.add_row(
                escape(o.condition),
                f"{o.mean:.4g}",
                f"{o.std:.2g}",
                f"{o.low:.4g} to {o.high:.4g}",
                o.holds,
            )
        console.print(table)
