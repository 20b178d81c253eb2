"""The results of a study as a JSON file; docs/studies/index.md describes its schema."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batchnorm.atomic import explain_write_errors, replacing
from batchnorm.errors import ArgumentError
from batchnorm.study.declare import Claim, Record, Records, Study
from batchnorm.study.verdicts import Verdict, judge

__all__ = ["SCHEMA", "Results"]

SCHEMA = 1


@dataclass(kw_only=True)
class Results:
    """What a study has measured so far.

    Attributes
    ----------
    study, quick
        The name of the study, and whether this is the quick tour.
    fingerprint
        Of the study's source: seeds of different experiments must not meet in one mean.
    about
        Date, processor and versions.
    records, seconds
        By seed; seconds of processor time.
    """

    study: str
    quick: bool
    fingerprint: str
    about: dict[str, Any]
    records: dict[int, list[Record]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def add(self, seed: int, records: list[Record], seconds: float) -> None:
        """Add a finished seed."""
        self.records[seed], self.seconds[seed] = records, seconds

    def all_records(self) -> list[Record]:
        """The records of all seeds, each with its seed."""
        return [
            {"seed": seed, **record}
            for seed in sorted(self.records)
            for record in self.records[seed]
        ]

    def verdicts(self, study: Study) -> list[tuple[Claim, Verdict]]:
        """Decide the claims; empty if fewer than two seeds are finished."""
        if len(self.records) < 2:
            return []
        trials = [Records(self.records[seed]) for seed in sorted(self.records)]
        return [(claim, judge(claim, trials)) for claim in study.claims]

    def save(self, path: Path, study: Study) -> None:
        """Write the file, completely or not at all.

        Raises
        ------
        ArgumentError
            It cannot be written.
        """
        content = {
            "schema": SCHEMA,
            "study": self.study,
            "title": study.title,
            "question": study.question,
            "protocol": study.protocol,
            "quick": self.quick,
            "fingerprint": self.fingerprint,
            "about": self.about,
            "claims": [
                {
                    "text": claim.text,
                    "source": claim.source,
                    "statistic": claim.statistic,
                    "side": claim.side,
                    "threshold": claim.threshold,
                    "depends_on": claim.depends_on,
                    "verdict": verdict.text,
                    "outcomes": [asdict(outcome) for outcome in verdict.outcomes],
                }
                for claim, verdict in self.verdicts(study)
            ],
            "trials": [
                {
                    "seed": seed,
                    "seconds": round(self.seconds[seed], 1),
                    "records": _as_table(self.records[seed]),
                }
                for seed in sorted(self.records)
            ],
        }
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        # A row of numbers in a line.
        text = re.sub(
            r"\[\n\s+([^][{}]*?)\n\s+\]",
            lambda row: f"[{re.sub(',' + chr(10) + ' +', ', ', row[1])}]",
            text,
        )
        with explain_write_errors(path), replacing(path) as beside:
            beside.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file that `save` wrote.

        Raises
        ------
        ArgumentError
            It cannot be read, or is no such file.
        """
        path = Path(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ArgumentError(
                f"{path}: must be a file, got something else. Move it away, or name another folder."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, and this version reads {SCHEMA}")
            found = cls(
                study=content["study"],
                quick=content["quick"],
                fingerprint=content["fingerprint"],
                about=content["about"],
            )
            for trial in content["trials"]:
                seed, seconds = trial["seed"], float(trial["seconds"])
                if type(seed) is not int or seed < 0 or seed in found.records:
                    raise ValueError(f"seed {seed!r} is none, or is there twice")
                if not math.isfinite(seconds):
                    raise ValueError(f"seconds of seed {seed} are {seconds}")
                found.add(seed, _from_table(trial["records"]), seconds)
        except OSError as error:
            raise ArgumentError(f"{path}: cannot be read ({error.strerror or error}).") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ArgumentError(
                f"{path}: must be the results of a study, but {reason}. Move it away, or name "
                "another folder."
            ) from error
        return found


def _as_table(records: list[Record]) -> list[dict[str, Any]]:
    """Tables of records with the same columns: half as long as records with their keys."""
    return [
        {"columns": list(columns), "rows": [list(record.values()) for record in alike]}
        for columns, alike in itertools.groupby(records, key=tuple)
    ]


def _from_table(tables: list[Mapping[str, Any]]) -> list[Record]:
    found = []
    for table in tables:
        columns = table["columns"]
        if len(set(columns)) != len(columns) or not all(isinstance(c, str) for c in columns):
            raise ValueError(f"columns {columns} are no names, or are there twice")
        for row in table["rows"]:
            if not all(isinstance(v, (str, bool, int, float)) and v == v for v in row):
                raise ValueError(f"a row holds something that is no number or word: {row}")
            found.append(dict(zip(columns, row, strict=True)))
    return found
