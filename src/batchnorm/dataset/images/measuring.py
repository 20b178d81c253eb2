"""`Statistics` of images: exact, resumable, and the same bits by however many processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np

from ... import workers
from ...errors import ArgumentError
from ...moments import Moments
from ..addresses import suffix_of
from ..extras import import_extra
from ..journal import Journal
from ..meter import Progress
from ..sources import FileOptions
from ..sources.archives import kind_of
from ..statistics import Statistics
from .chunks import (
    WEIGHT_BITS,
    Chunk,
    Found,
    add,
    cut,
    is_archive,
    is_image,
    items_of,
    measure_chunk,
    size_of,
)
from .decoding import GREY, Sums, pillow

#: What to do about images that cannot be decoded.
POLICIES = ("refuse", "skip")

#: Seconds of work here after which it is known how long the rest would take, and of work left from
#: which on it pays to start processes.
TRIAL_SECONDS = 0.2
ALONE_SECONDS = 1.0

#: Addresses that no other process can read.
PRIVATE = ("memory:",)

#: The options of files that apply to images.
APPLY = ("array", "only", "broken", "equal_images", "processes")


def holds_images(files: Sequence[str], options: FileOptions) -> bool:
    """Whether files are images or archives of them.

    Raises
    ------
    ArgumentError
        Some are and others are not, or an option does not apply.
    """
    images = [path for path in files if is_image(path)]
    archives = [path for path in files if is_archive(path)]
    others = [path for path in files if not is_image(path) and not is_archive(path)]
    if archives:  # they are all of one kind, which is checked when they are read
        (images if kind_of(archives[0], options.array) == "images" else others).extend(archives)
    if images and others:
        endings = {suffix_of(path) for path in images}
        choose = (
            f"='*{min(endings)}', --only '*{min(endings)}'" if len(endings) == 1 else "=, --only"
        )
        raise ArgumentError(
            f"source must be images or arrays and tables, got {images[0]} and {others[0]}. Choose "
            f"by only{choose}, or measure them apart."
        )
    if not images:
        for name in ("broken", "equal_images", "processes"):
            value = getattr(options, name)
            if value != getattr(FileOptions, name):
                raise ArgumentError(
                    f"{name} applies to images, got {value!r} for {files[0]}. Leave it out."
                )
    return bool(images)


def check_options(
    files: Sequence[str], options: FileOptions, axis: int, missing: str, client: Any
) -> None:
    """Raise if an option does not apply to images, or has a wrong value."""
    given = asdict(options) | {"channel_axis": axis, "missing": missing, "client": client}
    left_out = asdict(FileOptions()) | {"channel_axis": 1, "missing": "refuse", "client": None}
    has_archives = any(map(is_archive, files))
    for name, value in given.items():
        if name in APPLY and (name != "array" or has_archives):
            continue
        if value != left_out[name]:
            raise ArgumentError(
                f"{name} does not apply to images, got {value!r} for {files[0]}. Leave it out."
            )
    if options.broken not in POLICIES:
        raise ArgumentError(f"broken must be 'refuse' or 'skip', got {options.broken!r}.")
    if options.processes is not None and (
        not isinstance(options.processes, int) or options.processes < 1
    ):
        raise ArgumentError(f"processes must be 1 or more, got {options.processes!r}.")


def journal_options(options: FileOptions) -> dict[str, Any]:
    """Return what the sums over an unchanged image depend on: decoders may differ in last bits."""
    features = import_extra("PIL.features", "images", "Images")
    decoders = {name: features.version(name) for name in ("pil", "jpg", "webp", "libtiff")}
    return {"images": decoders, "limit": pillow().MAX_IMAGE_PIXELS, "equal": options.equal_images}


def measure_images(
    files: Sequence[str],
    given: Sequence[str],
    options: FileOptions,
    scale: float,
    journal: Journal | None,
    progress: Progress | None,
    note: Callable[[str], None] | None,
) -> Statistics:
    """Measure all images of some files and archives.

    Parameters
    ----------
    files
        Images and archives, in their order.
    given
        The files and folders that were asked for, for `Statistics.files`.
    options, scale, journal, progress, note
        As in `measure`; the values are not divided by `scale` yet.

    Raises
    ------
    ArgumentError
        Images are broken, or differ in the number of bits.
    """
    say = note or (lambda line: None)
    work = _Work(files, options, journal, progress)
    total = work.total()
    report = total.report
    if work.resumed:
        assert journal is not None
        say(
            f"resuming: {work.resumed:,} images were measured by an interrupted run and have not "
            f"changed since ({journal.path})"
        )
    if work.skipped:
        listed = ", ".join(f"{n:,} of {kind}" for kind, n in work.skipped.most_common(4))
        say(f"skipped {work.skipped.total():,} members of archives, which are no images: {listed}")
    if report.broken.number:
        _about_broken(total, options.broken == "skip", say)
    sums, bits = _channels(total)
    if report.transparent.number:
        say(
            f"alpha and transparent colours are ignored, in {report.transparent.number:,} of "
            f"{report.count:,} images"
        )
    if report.several_frames.number:
        say(
            f"only the first image is measured, of {report.several_frames.number:,} files with "
            "several"
        )
    if len(sums) == 3 and f"grey {bits}" in total.sums:
        grey = sum(kind.number for mode, kind in report.modes.items() if mode in GREY)
        say(f"grey counts as equal red, green and blue, in {grey:,} of {report.count:,} images")
    if scale == 1:
        most = 2**bits - 1
        say(
            f"values lie between 0 and {most}. If they are divided by {most} before they are "
            f"normalized, as by torchvision, do so here: scale={most}, --scale {most}"
        )
    return Statistics(
        _moments(sums, options.equal_images),
        np.zeros(len(sums), np.int64),
        ("grey",) if len(sums) == 1 else ("red", "green", "blue"),
        files=tuple(given),
        extremes=np.array([[s.least for s in sums], [s.greatest for s in sums]], np.float64),
        images=report,
    )


class _Work:
    """Chunks of images, measured here or by several processes, or known from a journal."""

    def __init__(
        self,
        files: Sequence[str],
        options: FileOptions,
        journal: Journal | None,
        progress: Progress | None,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.resumed = 0
        self._files, self._options = files, options
        self._journal, self._progress = journal, progress
        self._known = Found()
        self._done = 0
        self._whole = sum(map(size_of, files))

    def total(self) -> Found:
        """Measure everything."""
        if self._progress is not None:
            self._progress(self._files[0], 0, self._whole)
        total = Found()
        with closing(self._measured()) as measured:
            for chunk, data in measured:
                if self._journal is not None:
                    self._journal.add(chunk.fingerprint, data)
                total += Found.from_bytes(data)
                self._advance(chunk)
        return total + self._known

    def _chunks(self) -> Iterator[Chunk]:
        """Yield the chunks that the journal does not know."""
        items = items_of(self._files, self._options.array, self.skipped)
        for chunk in cut(items, pillow().MAX_IMAGE_PIXELS, self._options.equal_images):
            data = None if self._journal is None else self._journal.find(chunk.fingerprint)
            if data is None:
                yield chunk
            else:
                self._known += Found.from_bytes(data)
                self.resumed += len(chunk.items)
                self._advance(chunk)

    def _measured(self) -> Generator[tuple[Chunk, bytes], None, None]:
        """Measure chunks here as long as little work is left, and the others by processes."""
        processes = self._options.processes or workers.usable_cpus()
        if any(path.startswith(PRIVATE) for path in self._files):
            processes = 1
        chunks, spent, here = self._chunks(), 0.0, 0
        for chunk in chunks:
            begin = time.perf_counter()
            yield chunk, measure_chunk(chunk)
            spent, here = spent + time.perf_counter() - begin, here + chunk.nbytes
            left = spent / max(here, 1) * (self._whole - self._done)
            if processes > 1 and spent >= TRIAL_SECONDS and left > ALONE_SECONDS:
                break
        else:
            return
        with workers.pool(processes) as run:
            yield from run(measure_chunk, chunks)

    def _advance(self, chunk: Chunk) -> None:
        self._done = min(self._done + chunk.nbytes, self._whole)
        if self._progress is not None:
            self._progress(chunk.items[-1].name, self._done, self._whole)


def _about_broken(total: Found, skip: bool, say: Callable[[str], None]) -> None:
    """Say which images are broken, or raise."""
    report = total.report
    number, reasons = report.broken.number, report.reasons
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    if number > len(reasons):
        listed += f"; and {number - len(reasons):,} more"
    of = f"{number:,} of {number + report.count:,} images cannot be decoded"
    if not skip:
        raise ArgumentError(
            f"{of} ({listed}). Repair or remove them, or leave them out by broken='skip', "
            "--broken skip."
        )
    if not report.count:
        raise ArgumentError(f"{of} ({listed}). Name images that can be.")
    say(f"left out: {of} ({listed})")


def _channels(total: Found) -> tuple[tuple[Sums, ...], int]:
    """Return sums of each channel, and the number of bits."""
    first = {what.rpartition(" ")[2]: name for what, name in sorted(total.first.items())}
    if len(first) > 1:
        raise ArgumentError(
            f"images must all have 8 bits or all 16, got {first['8']} with 8 and {first['16']} "
            "with 16. Measure them apart, as by only=, --only."
        )
    (bits,) = map(int, first)
    grey, colour = (total.sums.get(f"{kind} {bits}") for kind in ("grey", "colour"))
    if colour is None:
        assert grey is not None
        return grey, bits
    return (colour if grey is None else add(colour, grey * 3)), bits


def _moments(channels: Sequence[Sums], equal: bool) -> Moments:
    """Return the moments of exact sums, each rounded once."""
    unit = 1 << WEIGHT_BITS if equal else 1
    count = Fraction(channels[0].pixels, unit)
    mean = [float(Fraction(s.first, s.pixels)) for s in channels]
    # With weights, sums are rounded down far below the digits of float64, and may fall short of 0.
    m2 = [
        float(max(Fraction(s.second * s.pixels - s.first**2, s.pixels * unit), Fraction()))
        for s in channels
    ]
    return Moments(float(count), mean, m2)
