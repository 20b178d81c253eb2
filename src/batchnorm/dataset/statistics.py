"""`Statistics` of the features of a data set, which can be saved and loaded."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic import explain_write_errors, replacing
from ..errors import ArgumentError, ShapeError
from ..moments import Moments
from ..native import Float64

#: Marks every saved file, and is checked when one is loaded.
FORMAT = "batchnorm statistics 1"
SUFFIXES = (".npz", ".json")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of each feature of a data set, and the number of missing values.

    Parameters
    ----------
    moments : Moments
        Moments of the present values. `count` is () if it is the same for all features, else (C,).
    missing : (C,)
        Number of missing values: NaN, masked values, and null in tables.
    names : C names, or None
        Names of the columns, if a table was measured.
    channel_axis : int
        Axis of the features in the arrays that were measured.
    files : tuple of str
        Files that were measured, in the order in which they were merged.
    """

    moments: Moments
    missing: NDArray[np.int64]
    names: tuple[str, ...] | None = None
    channel_axis: int = 1
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Copy `missing`, make it read-only, and check the shapes."""
        missing = np.array(self.missing, np.int64)
        shape = self.moments.mean.shape
        if missing.shape != shape or len(shape) != 1:
            raise ShapeError(f"missing must have shape (C,) = {shape}, got {missing.shape}.")
        if self.names is not None and len(self.names) != missing.size:
            raise ShapeError(
                f"names must be one for each of {missing.size} features, got {len(self.names)}."
            )
        missing.flags.writeable = False
        object.__setattr__(self, "missing", missing)

    @property
    def features(self) -> int:
        """Number of features, C."""
        return self.moments.mean.size

    @property
    def count(self) -> Float64:
        """Number of present values of each feature: (C,)."""
        return np.broadcast_to(self.moments.count, self.moments.mean.shape)

    @property
    def mean(self) -> Float64:
        """Mean of each feature: (C,); zero where no value is present."""
        return self.moments.mean

    def var(self, ddof: float = 0) -> Float64:
        """Variance of each feature: (C,); NaN where count ≤ ddof."""
        return self.moments.var(ddof)

    def std(self, ddof: float = 0) -> Float64:
        """Standard deviation of each feature: (C,)."""
        return self.moments.std(ddof)

    def __eq__(self, other: object) -> bool:
        """Whether moments, missing values, names, axis and files are the same."""
        if not isinstance(other, Statistics):
            return NotImplemented
        return (
            self.moments == other.moments
            and np.array_equal(self.missing, other.missing)
            and (self.names, self.channel_axis, self.files)
            == (other.names, other.channel_axis, other.files)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Numbers of features, values and missing values."""
        return (
            f"Statistics({self.features} features, {int(self.count.sum())} values, "
            f"{int(self.missing.sum())} missing)"
        )

    def save(self, path: str | Path) -> None:
        """Save to a .npz or .json file, by the suffix, with every digit.

        The file holds count, mean, m2, missing, names, channel_axis and files, and the biased
        variance for readers without this library.

        Raises
        ------
        ArgumentError
            The suffix is neither .npz nor .json, or the file cannot be written.
        """
        path = Path(path)
        check_suffix(path)
        content: dict[str, Any] = {
            "format": FORMAT,
            "channel_axis": self.channel_axis,
            "count": self.moments.count,
            "mean": self.moments.mean,
            "m2": self.moments.m2,
            "var": self.moments.var(),
            "missing": self.missing,
            "files": list(self.files),
        }
        if self.names is not None:
            content["names"] = list(self.names)
        with explain_write_errors(path), replacing(path) as beside, beside.open("wb") as file:
            if path.suffix.lower() == ".npz":
                np.savez(file, **content)
                return
            # One array at a time: the text of all takes several times their memory.
            for k, (name, value) in enumerate(content.items()):
                line = json.dumps(value, default=_as_list, allow_nan=False)
                file.write(f'{"," if k else "{"}\n "{name}": {line}'.encode())
            file.write(b"\n}\n")

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Load a file that `save` has written.

        Raises
        ------
        ArgumentError
            There is no such file, or it does not hold statistics.
        """
        path = Path(path)
        check_suffix(path, "statistics")
        try:
            if path.suffix.lower() == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
            else:
                with np.load(path, allow_pickle=False) as file:
                    content = {name: file[name] for name in file.files}
            if str(content.get("format")) != FORMAT:
                raise ValueError("no mark of its format")
            names = content.get("names")
            return cls(
                Moments(*(np.asarray(content[name], float) for name in ("count", "mean", "m2"))),
                np.asarray(content["missing"], np.int64).reshape(-1),
                None if names is None else tuple(map(str, names)),
                int(content["channel_axis"]),
                tuple(map(str, content["files"])),
            )
        except OSError as error:
            raise ArgumentError(
                f"{path}: cannot be read ({error.strerror or error}). Name a file that "
                "`batchnorm stats --out` or Statistics.save has written."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ArgumentError(
                f"{path}: must hold statistics, and does not ({error}). Name a file that "
                "`batchnorm stats --out` or Statistics.save has written."
            ) from error


def is_statistics(path: Path) -> bool:
    """Whether a .npz file holds saved statistics; False if it cannot be read."""
    if path.suffix.lower() != ".npz":
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            mark = file.zip.getinfo("format.npy")
            return mark.file_size < 1000 and str(file["format"]) == FORMAT
    except Exception:  # a damaged file may raise anything; reading it as data explains the error
        return False


def check_suffix(path: Path, what: str = "out") -> None:
    """Raise unless the suffix is .npz or .json."""
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(
            f"{what} must be a file that ends in .npz or .json, got {str(path)!r}. "
            f"Name it {path.with_suffix('.npz').name or 'stats.npz'!r}."
        )


def _as_list(value: Any) -> Any:
    """Convert an array to a list for JSON; Python writes as many digits as a number needs.

    JSON has no NaN: an undefined variance becomes null, which `load` does not read.
    """
    if np.isnan(value).any():
        return [None if np.isnan(v) else v for v in value.tolist()]
    return value.tolist()


def feature_label(index: int, names: tuple[str, ...] | None = None) -> str:
    """Name a feature in messages, as in "feature 2 ('age')"."""
    return f"feature {index} ({names[index]!r})" if names else f"feature {index}"
