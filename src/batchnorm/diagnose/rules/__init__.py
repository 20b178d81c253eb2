"""One function for each finding. To add one, write it in a file here and its page in docs/findings.

Codes never change their meaning: docs/findings/index.md has the policy.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..findings import Finding, Rule, selected
from ..records import Network
from . import batches, channels, deployment, statistics, wiring

__all__ = ["RULES", "examine"]

#: All rules, by code.
RULES: tuple[Rule, ...] = tuple(
    sorted(
        (
            value
            for module in (statistics, channels, batches, wiring, deployment)
            for value in vars(module).values()
            if isinstance(value, Rule)
        ),
        key=lambda rule: rule.code,
    )
)


def examine(
    network: Network, select: Iterable[str] | None = None, ignore: Iterable[str] | None = None
) -> list[Finding]:
    """Look for everything, or for what is selected, and order it by code.

    Notes on a network that is no file for inference are only looked for if they are selected.

    Raises
    ------
    ArgumentError
        `select` or `ignore` names no code.
    """
    return [
        finding
        for rule in selected(RULES, select, ignore)
        if rule.level == "warning" or network.exported or select is not None
        for finding in rule.findings(network)
    ]
