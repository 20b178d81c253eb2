"""What the files of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..findings import Rule
from ..records import Network

__all__ = ["Found", "many", "numbers", "rule"]

#: Layer ("" for the network), message, evidence.
Found = Iterator[tuple[str, str, dict[str, float]]]


def rule(
    code: str, title: str, *, fix: str, level: str = "warning"
) -> Callable[[Callable[[Network], Found]], Rule]:
    """Make a `Rule` of a function."""
    return lambda look: Rule(code, title, fix, look, level)


def numbers(**values: Any) -> dict[str, float]:
    """Evidence: plain numbers by name."""
    return {
        name: int(value) if isinstance(value, int) else float(value)
        for name, value in values.items()
    }


def many(count: int, noun: str, of: int | None = None) -> str:
    """As in "3 of 8 channels"."""
    if of is not None:
        return f"{count} of {of} {noun}{'s' * (of != 1)}"
    return f"{count} {noun}{'s' * (count != 1)}"
