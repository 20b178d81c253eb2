"""What is measured, as rows; and rows, facts and pictures as files that are whole or not there.

Every result file has one kind of row: who was measured, whether it went well, and for what was
timed the same columns everywhere.
"""

import csv
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from batchnorm.atomic import write_all
from batchnorm.bench.timing import Sample, ratio_interval, ratio_of
from batchnorm.errors import ArgumentError, BatchNormError

Status: TypeAlias = Literal["ok", "wrong", "failed"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider on one case; a line of a CSV file.

    Attributes
    ----------
    status
        ``ok``, ``wrong`` (the answer was too far off, so it was not timed) or ``failed``.
    detail
        Why it is not ``ok``.
    """

    provider: str
    status: Status = "ok"
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class TimedRow(Row):
    """One provider, timed on one case in interleaved rounds.

    Attributes
    ----------
    rounds
        Number of samples.
    p20_ms, p50_ms, p80_ms
        Percentiles over the samples of the time of one call.
    ratio, ratio_low, ratio_high
        Time over that of the baseline: median of the ratios within a round, and its 95 % interval.
    page_faults
        Minor page faults of one call, median over the samples.
    peak_bytes
        Most memory resident; of what, the file's benchmark says.
    """

    rounds: int = 0
    p20_ms: float = math.nan
    p50_ms: float = math.nan
    p80_ms: float = math.nan
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    page_faults: float = math.nan
    peak_bytes: float = math.nan

    @property
    def peak_mb(self) -> float:
        """`peak_bytes` in MB."""
        return self.peak_bytes / 1e6


R = TypeVar("R", bound=TimedRow)


def timed(row: R, samples: Sequence[Sample], baseline: Sequence[Sample] | None = None) -> R:
    """Fill in the columns of time from the samples, and from the baseline's of the same rounds."""
    seconds, faults = np.array(samples, dtype=float).T
    p20, p50, p80 = (float(value) * 1e3 for value in np.percentile(seconds, (20, 50, 80)))
    row = replace(
        row,
        rounds=len(samples),
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        page_faults=float(np.median(faults)),
    )
    if baseline is None:
        return row
    pair = seconds.tolist(), [one.seconds for one in baseline]
    low, high = ratio_interval(*pair)
    return replace(row, ratio=ratio_of(*pair), ratio_low=low, ratio_high=high)


def as_csv(rows: Sequence[Any]) -> bytes:
    """Dataclasses as CSV: numbers to 6 digits, nothing where a number is not known."""

    def cell(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return "" if math.isnan(value) else f"{value:.6g}"

    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    # The column `pass` is the field `pass_`, as Python reserves the word.
    writer.writerow(name.removesuffix("_") for name in asdict(rows[0]))
    writer.writerows(map(cell, asdict(row).values()) for row in rows)
    return stream.getvalue().encode()


def prepare_directory(directory: Path) -> None:
    """Make a directory for results, and see that they can be written, before any are measured.

    Raises
    ------
    ArgumentError
        It cannot be made, or no file can be made in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ArgumentError(
            f"out must be in a directory that files can be written to, got {str(directory)!r}, and "
            f"found: {error.strerror or error}. Name another directory."
        ) from None


def write(files: Mapping[Path, Sequence[Any] | dict[str, Any] | bytes]) -> list[Path]:
    """Write rows as CSV, a dict as JSON and bytes as they are, leaving out what is empty.

    Raises
    ------
    BatchNormError
        They could not be written, and those of an earlier run are as they were.
    """
    contents: dict[Path, bytes] = {}
    for path, content in files.items():
        if isinstance(content, dict):
            contents[path] = (json.dumps(content, indent=2) + "\n").encode()
        elif content:
            contents[path] = content if isinstance(content, bytes) else as_csv(content)
    try:
        write_all(contents)
    except OSError as error:
        raise BatchNormError(
            f"the results could not be written to {str(next(iter(contents)).parent)!r}: "
            f"{error.strerror or error}. Make room or name another directory."
        ) from error
    return list(contents)
