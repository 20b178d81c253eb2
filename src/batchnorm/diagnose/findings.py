"""What a rule has found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from batchnorm.errors import ArgumentError, printable

from .records import Network

__all__ = ["Finding", "Findings", "Rule", "page_of", "selected"]


def page_of(code: str) -> str:
    """The page of the documentation on a code."""
    return f"docs/findings/{code}.md"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a batch norm.

    Attributes
    ----------
    code
        Of the rule. It never gets another meaning.
    layer
        The path of the layer in the network; "" for the network as a whole.
    message
        One sentence with what was found.
    evidence
        The numbers behind it.
    fix
        What to do.
    title
        Of the rule, in some words.
    where
        File and line, for findings in the text of a program.
    level
        Of the rule: "warning", or "note" for what is not wrong.
    """

    code: str
    layer: str
    message: str
    evidence: dict[str, float] = field(default_factory=dict)
    fix: str = ""
    title: str = ""
    where: tuple[str, int] | None = None
    level: str = "warning"

    @property
    def url(self) -> str:
        """The page of the documentation."""
        return page_of(self.code)

    def __str__(self) -> str:
        """One line."""
        return f"{self.code} {self.layer or 'the network'}: {self.message}"


class Findings(Sequence[Finding]):
    """A sequence of findings that prints one paragraph for each code.

    Attributes
    ----------
    fixed
        What has been done, if it was asked for.
    skipped
        What could not be looked at, and why.
    """

    def __init__(
        self,
        findings: Iterable[Finding] = (),
        *,
        fixed: Sequence[str] = (),
        skipped: Sequence[str] = (),
    ) -> None:
        self._findings = tuple(findings)
        self.fixed, self.skipped = tuple(fixed), tuple(skipped)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Finding]: ...
    def __getitem__(self, index: int | slice) -> Finding | Sequence[Finding]:
        """One, or some."""
        return self._findings[index]

    def __len__(self) -> int:
        """Their number; 0 for a healthy network."""
        return len(self._findings)

    def __repr__(self) -> str:
        """The text, so that a prompt shows it."""
        return str(self)

    def by_code(self) -> Iterator[tuple[str, list[Finding]]]:
        """The findings of each code, in the order of codes."""
        ordered = sorted(self._findings, key=lambda finding: finding.code)
        for code, group in itertools.groupby(ordered, key=lambda finding: finding.code):
            yield code, list(group)

    def __str__(self) -> str:
        """A paragraph for each code: title, layers with their numbers, fix."""
        lines = []
        for code, group in self.by_code():
            first = group[0]
            lines.append(f"{code} {first.title}{' (note)' * (first.level == 'note')}")
            lines += [f"  {_place(finding)}{finding.message}" for finding in group[:5]]
            if len(group) > 5:
                others = ", ".join(finding.layer for finding in group[5:])
                lines.append(f"  and {len(group) - 5} more: {others}")
            lines += [f"  fix: {first.fix}", f"  see {first.url}", ""]
        count = len(self._findings)
        lines.append(f"{count} finding{'s' * (count != 1)}" if count else "no findings")
        lines += [f"fixed: {text}" for text in self.fixed]
        lines += [f"not checked: {text}" for text in self.skipped]
        return "\n".join(map(printable, lines))


def _place(finding: Finding) -> str:
    where = f"{finding.where[0]}:{finding.where[1]}: " if finding.where else ""
    return f"{where}{finding.layer}: " if finding.layer else where


@dataclass(frozen=True)
class Rule:
    """A kind of finding, and the function that looks for it.

    Attributes
    ----------
    code, title
        Bands: 1 statistics, 2 channels, 3 batches, 4 wiring and training, 5 deployment.
    fix
        What to do, in general.
    look
        Yields layer ("" for the network), message and evidence.
    level
        "warning", or "note" for what is not wrong: it fails no command, and is looked for in files
        for inference, or where it is selected.
    """

    code: str
    title: str
    fix: str
    look: Callable[[Network], Iterator[tuple[str, str, dict[str, float]]]]
    level: str = "warning"

    def findings(self, network: Network) -> Iterator[Finding]:
        """Look for it."""
        for layer, message, evidence in self.look(network):
            yield Finding(
                self.code, layer, message, evidence, self.fix, self.title, level=self.level
            )


def selected(
    rules: Sequence[Rule], select: Iterable[str] | None, ignore: Iterable[str] | None
) -> list[Rule]:
    """The rules whose codes begin with one of `select`, and with none of `ignore`.

    Raises
    ------
    ArgumentError
        One of these begins no code.
    """

    def prefixes(name: str, given: Iterable[str] | None) -> tuple[str, ...]:
        found = (given,) if isinstance(given, str) else tuple(given or ())
        for prefix in found:
            if not prefix or not any(rule.code.startswith(prefix) for rule in rules):
                raise ArgumentError(
                    f"{name} takes codes of findings or their beginnings, such as BN1 or "
                    f"{rules[0].code}, got {prefix!r}. The codes are "
                    f"{', '.join(rule.code for rule in rules)}."
                )
        return found

    wanted, unwanted = prefixes("select", select), prefixes("ignore", ignore)
    return [
        rule
        for rule in rules
        if (select is None or rule.code.startswith(wanted))
        and not (unwanted and rule.code.startswith(unwanted))
    ]
