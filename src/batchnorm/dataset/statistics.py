"""`Statistics` of the features of a data set, which can be saved and loaded."""

from __future__ import annotations

import json
import math
import operator
import os
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic import explain_write_errors, replacing
from ..errors import ArgumentError, ShapeError
from ..moments import Moments
from ..native import Float64
from .addresses import open_binary, suffix_of
from .extras import first_line
from .hints import hints
from .images.report import ImageReport
from .parts import Part, merge_all

#: Marks every saved file, and is checked when one is loaded.
FORMAT = "batchnorm statistics 1"
SUFFIXES = (".npz", ".json")

#: Most bytes of all arrays in a file, which memory is to hold.
MOST_BYTES = 1 << 31


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
        Files that were measured, in the order in which they were merged; of images the files and
        folders that were asked for.
    scale : float
        What the values were divided by before they were measured, such as 255 for images.
    extremes : (2, C), or None
        The least and the greatest value of each feature, if asked for, and of images always; NaN
        where none is present.
    images : ImageReport, or None
        What stands out among images; neither saved nor compared.

    Notes
    -----
    The sum of two `Statistics` is that of all their values together; ``sum(several)`` works too.
    """

    moments: Moments
    missing: NDArray[np.int64]
    names: tuple[str, ...] | None = None
    channel_axis: int = 1
    files: tuple[str, ...] = ()
    scale: float = 1.0
    extremes: Float64 | None = None
    images: ImageReport | None = None

    def __post_init__(self) -> None:
        """Copy `missing` and `extremes`, make them read-only, and check the shapes."""
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
        object.__setattr__(self, "scale", check_scale(self.scale))
        if self.extremes is not None:
            extremes = np.array(self.extremes, np.float64)
            if extremes.shape != (2, *shape):
                raise ShapeError(f"extremes must have shape (2, {shape[0]}), got {extremes.shape}.")
            extremes.flags.writeable = False
            object.__setattr__(self, "extremes", extremes)

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

    def divided_by(self, scale: float) -> Statistics:
        """Statistics of the same values, divided by `scale`.

        Raises
        ------
        ArgumentError
            Variances leave the range of float64.
        """
        if scale == 1:
            return self
        m = self.moments
        with np.errstate(over="ignore", under="ignore"):
            mean, m2 = m.mean / scale, m.m2 / scale / scale
        if not (np.isfinite(mean) & np.isfinite(m2) & ((m2 > 0) == (m.m2 > 0))).all():
            raise ArgumentError(
                f"scale must leave variances within the range of float64, got {scale!r}. It is 255 "
                "for images of 8 bits."
            )
        return replace(
            self,
            moments=Moments(m.count, mean, m2),
            scale=self.scale * scale,
            extremes=None if self.extremes is None else self.extremes / scale,
        )

    @property
    def like_images(self) -> bool:
        """Whether these are values of images, divided as `ToTensor` divides them, in channels."""
        return (
            self.scale != 1
            and self.features in (1, 3)
            and (self.images is not None or self.names is None)
        )

    def normalize_line(self) -> str:
        """Return the line that normalizes by these statistics in torchvision, ready to paste.

        It has the digits that float32 holds. `ToTensor` divides images of 8 bits by 255 before, so
        measure them with ``scale=255``.

        Raises
        ------
        ArgumentError
            A feature has no values or one value alone, so that its deviation is 0.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import dataset
        >>> x = np.array([[0, 50], [255, 150]], np.uint8)
        >>> print(dataset.measure(x, scale=255).normalize_line())
        transforms.Normalize(mean=[0.5, 0.39215687], std=[0.5, 0.19607843])
        """
        std = self.std()
        if (wrong := np.flatnonzero(~(std > 0))).size:
            raise ArgumentError(
                f"{feature_label(int(wrong[0]), self.names)} must have values that differ, to be "
                "divided by their deviation. Leave it out."
            )
        texts = (
            ", ".join(str(np.float32(v)) for v in values.tolist()) for values in (self.mean, std)
        )
        return "transforms.Normalize(mean=[{}], std=[{}])".format(*texts)

    def __add__(self, other: Statistics) -> Statistics:
        """Merge the statistics of two data sets with the same features.

        Raises
        ------
        ShapeError, ArgumentError
            They differ in the number or names of features, in the axis, or in the scale.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        return merge([self, other])

    def __radd__(self, other: object) -> Statistics:
        """Let `sum` begin with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Whether moments, missing values, names, axis, files, scale and extremes are the same."""
        if not isinstance(other, Statistics):
            return NotImplemented
        return (
            self.moments == other.moments
            and np.array_equal(self.missing, other.missing)
            and (self.names, self.channel_axis, self.files, self.scale)
            == (other.names, other.channel_axis, other.files, other.scale)
            and (self.extremes is None) == (other.extremes is None)
            and (
                self.extremes is None
                or np.array_equal(self.extremes, other.extremes, equal_nan=True)  # type: ignore[arg-type]
            )
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
        if self.scale != 1:
            content["scale"] = self.scale
        if self.extremes is not None:
            content["min"], content["max"] = self.extremes
        with explain_write_errors(path), replacing(path) as beside, beside.open("wb") as file:
            if path.suffix.lower() == ".npz":
                np.savez(file, **content)
                return
            # One array at a time: the text of all takes several times their memory.
            for k, (name, value) in enumerate(content.items()):
                line = json.dumps(value, default=_as_list, allow_nan=False)
                file.write(f'{"," if k else "{"}\n "{name}": {line}'.encode())
            file.write(b"\n}\n")

    def report(self, path: str | Path, *, notes: Iterable[str] = ()) -> None:
        """Write one HTML page of the features, with the `hints`, that needs nothing else.

        Parameters
        ----------
        path
            Of the page.
        notes
            Lines to show above the hints, such as those that `measure` gave to `note`.

        Raises
        ------
        ArgumentError
            The page cannot be written there.
        BatchNormError
            An optional package is not installed.
        """
        from batchnorm.report import write_features
        from batchnorm.report.records import Features, Note, Table

        said = [Note("note", text) for text in notes]
        said += [Note(h.kind, h.what, h.remedy, h.features) for h in hints(self)]
        images = self.images
        write_features(
            Path(path),
            Features(
                title=_title(self.files),
                count=self.count,
                missing=self.missing,
                mean=self.mean,
                std=self.std(),
                extremes=self.extremes,
                names=self.names,
                scale=self.scale,
                files=self.files,
                notes=said,
                ready=self.normalize_line() if self.like_images and (self.var() > 0).all() else "",
                tables=[] if images is None else [Table("Images", images.rows())],
            ),
        )

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
                with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                    content = _read_members(archive)
            if not isinstance(content, dict) or str(content.get("format")) != FORMAT:
                raise ValueError("no mark of its format")
            return _from_content(content)
        except OSError as error:
            raise ArgumentError(
                f"{path}: cannot be read ({error.strerror or error}). Name a file that "
                "`batchnorm stats --out` or Statistics.save has written."
            ) from error
        except Exception as error:  # readers raise whatever damage leads to
            raise ArgumentError(
                f"{path}: must hold statistics, and does not ({first_line(error)}). Name a file "
                "that `batchnorm stats --out` or Statistics.save has written."
            ) from error


def _from_content(content: dict[str, Any]) -> Statistics:
    """Make statistics of what a file holds, or raise what does not fit."""
    count, mean, m2 = (np.asarray(content[name], float) for name in ("count", "mean", "m2"))
    missing = np.asarray(content["missing"], np.int64).reshape(-1)
    if not (np.isfinite(count).all() and np.isfinite(mean).all() and np.isfinite(m2).all()):
        raise ValueError("moments that are not finite")
    if (missing < 0).any():
        raise ValueError("a negative number of missing values")
    names, extremes = content.get("names"), None
    if "min" in content:
        extremes = np.array([content["min"], content["max"]], float)  # null is NaN
    return Statistics(
        Moments(count, mean, m2),
        missing,
        None if names is None else tuple(map(str, names)),
        operator.index(np.asarray(content["channel_axis"]).item()),
        tuple(map(str, content["files"])),
        float(content.get("scale", 1)),
        extremes,
    )


def _read_members(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Read the arrays of a .npz file, if it is marked as one of statistics and of bounded size."""
    if not _is_marked(archive):
        raise ValueError("no mark of its format")
    if (size := sum(info.file_size for info in archive.infolist())) > MOST_BYTES:
        raise ValueError(f"{size} bytes")
    return {name.removesuffix(".npy"): _read(archive, name) for name in archive.namelist()}


def _read(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(name) as member, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd texts in damaged headers
        return np.lib.format.read_array(member, allow_pickle=False)


def _is_marked(archive: zipfile.ZipFile) -> bool:
    mark = archive.getinfo("format.npy")
    return mark.file_size < 1000 and str(_read(archive, mark.filename)) == FORMAT


def is_statistics(address: str | Path) -> bool:
    """Whether a .npz file holds saved statistics; False if it cannot be read."""
    if suffix_of(address) != ".npz":
        return False
    try:
        with open_binary(address) as file, zipfile.ZipFile(file) as archive:
            return _is_marked(archive)
    except Exception:  # a damaged file may raise anything; reading it as data explains the error
        return False


def merge(several: Iterable[Statistics]) -> Statistics:
    """Merge statistics of data sets with the same features, in the order given.

    Raises
    ------
    ArgumentError, ShapeError
        There are none, or they differ in the number or names of features, axis or scale.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import dataset
    >>> x = np.array([[1.0, 10.0], [3.0, 20.0], [5.0, 30.0]])
    >>> dataset.merge([dataset.measure(x[:1]), dataset.measure(x[1:])]).mean
    array([ 3., 20.])
    """
    parts = [several] if isinstance(several, Statistics) else list(several)
    for part in parts:
        if not isinstance(part, Statistics):
            raise ArgumentError(
                f"several must be Statistics, got {type(part).__name__}. measure returns them, "
                "Statistics.load reads them from a file."
            )
    if not parts:
        raise ArgumentError("several must be at least one Statistics, got none.")
    first = parts[0]
    for other in parts[1:]:
        if first.features != other.features:
            raise ShapeError(
                "statistics to merge must have the same number of features, got "
                f"{first.features} and {other.features}."
            )
        for what in ("names", "channel_axis", "scale"):
            mine, others = getattr(first, what), getattr(other, what)
            if mine != others and not (what == "names" and None in (mine, others)):
                raise ArgumentError(
                    f"statistics to merge must have the same {what}, got {mine} and {others}. "
                    "Measure the data sets alike."
                )
    found = merge_all((Part(s.moments, _total(s), s.extremes) for s in parts), first.features)
    return replace(
        first,
        moments=found.moments,
        missing=np.sum([s.missing for s in parts], axis=0),
        names=next((s.names for s in parts if s.names is not None), None),
        files=tuple(file for s in parts for file in s.files),
        extremes=found.extremes,
        images=None,
    )


def _title(files: Sequence[str]) -> str:
    """Name the data set after its file, or the folder that holds all of them."""
    if not files:
        return "Data set"
    try:
        common = os.path.commonpath(files)
    except ValueError:  # absolute and relative paths, or different drives
        common = ""
    return Path(common).name or f"{Path(files[0]).name} … {Path(files[-1]).name}"


def _total(s: Statistics) -> int:
    """Number of values of a feature, with missing ones."""
    return int(s.count[0] + s.missing[0]) if s.features else 0


def check_scale(scale: Any) -> float:
    """Return what values are divided by, as a float above zero.

    Raises
    ------
    ArgumentError
        It is something else.
    """
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not (0 < value < math.inf):
        raise ArgumentError(
            f"scale must be a number above zero that values are divided by, got {scale!r}. It is "
            "255 for images of 8 bits."
        )
    return value


def check_replaceable(path: Path) -> None:
    """Raise if there is a file that is not empty and holds no statistics."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        Statistics.load(path)
    except ArgumentError:
        raise ArgumentError(
            f"out must not hold anything but statistics, got {str(path)!r}, which would be lost. "
            "Choose another path, or remove the file."
        ) from None


def check_suffix(path: Path, what: str = "out") -> None:
    """Raise unless the suffix is .npz or .json."""
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(
            f"{what} must be a file that ends in .npz or .json, got {str(path)!r}. "
            f"Name it '{path.stem or 'stats'}.npz'."
        )


def _as_list(value: Any) -> Any:
    """Convert an array to a list for JSON; Python writes as many digits as a number needs.

    JSON has no NaN: an undefined variance or extreme becomes null.
    """
    if np.isnan(value).any():
        return [None if np.isnan(v) else v for v in value.tolist()]
    return value.tolist()


def feature_label(index: int, names: tuple[str, ...] | None = None) -> str:
    """Name a feature in messages, as in "feature 2 ('age')"."""
    return f"feature {index} ({names[index]!r})" if names else f"feature {index}"
