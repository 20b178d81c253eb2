"""Some images at a time: what a process is given, and what it sends back."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from ...errors import ArgumentError
from ..addresses import (
    Fingerprint,
    explain_read_errors,
    fingerprint_of,
    is_remote,
    open_binary,
    suffix_of,
)
from ..files import ARCHIVES, IMAGES
from ..sources.archives import Member, examples, read_member
from .decoding import BrokenImage, Decoded, Sums, measure_image, strict
from .report import ImageReport

#: Images of a chunk on average, and bytes from which on it is complete: a second of work or less.
CHUNK_IMAGES = 256
CHUNK_BYTES = 1 << 23

#: A whole image counts 2^WEIGHT_BITS if all count alike, so that its mean is a whole number to far
#: beyond the digits of float64.
WEIGHT_BITS = 64


class Item(NamedTuple):
    """An image file, or a member of an archive: its name, where it is, and when it changed."""

    name: str
    address: str
    member: str | None
    offset: int
    size: int
    changed: int | str


@dataclass(frozen=True)
class Chunk:
    """Images for one process.

    Attributes
    ----------
    items
        The images.
    most_pixels
        Pillow's limit.
    equal
        Whether each image counts alike, whatever its size.
    """

    items: tuple[Item, ...]
    most_pixels: int | None
    equal: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)

    @property
    def fingerprint(self) -> Fingerprint:
        """Equal if and only if these are the same images, unchanged."""
        digest = hashlib.sha256(json.dumps(self.items).encode()).hexdigest()
        return self.items[0].address, digest, self.nbytes, 0


@dataclass(frozen=True)
class Found:
    """What is known of some images; the sum of two is that of all their images.

    Attributes
    ----------
    sums
        Sums per channel, by what they are: grey or colour, and bits.
    first
        The first image of each, by name.
    report
        What stands out.
    """

    sums: dict[str, tuple[Sums, ...]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    report: ImageReport = field(default_factory=ImageReport)

    def __add__(self, other: Found) -> Found:
        """Return what is known of the images of both."""
        sums, first = dict(self.sums), dict(self.first)
        for what, some in other.sums.items():
            _include(sums, first, what, some, other.first[what])
        return Found(sums, first, self.report + other.report)

    def to_bytes(self) -> bytes:
        """Write as JSON, whose integers have all digits."""
        return json.dumps([self.sums, self.first, self.report.as_json()]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Found:
        """Read what `to_bytes` has written."""
        sums, first, report = json.loads(data)
        return cls(
            {what: tuple(Sums(*channel) for channel in some) for what, some in sums.items()},
            first,
            ImageReport.from_json(report),
        )


def is_image(path: str) -> bool:
    """Whether this is an image, by its ending."""
    return suffix_of(path) in IMAGES


def is_archive(path: str) -> bool:
    """Whether this is an archive, by its ending."""
    return suffix_of(path) in ARCHIVES


def size_of(path: str) -> int:
    """Return the bytes of a file."""
    if is_remote(path):
        return fingerprint_of(path, fresh=False)[2]
    with explain_read_errors(path):
        return os.path.getsize(path)


def items_of(
    files: Iterable[str], array: str | None, skipped: Counter[str] | None = None
) -> Iterator[Item]:
    """Yield all images of some files and archives, in their order."""
    for path in files:
        _, _, size, changed = fingerprint_of(path, fresh=False)  # listed a moment ago
        if not is_archive(path):
            yield Item(path, path, None, 0, size, changed)
            continue
        for member in examples(path, "images", array, skipped):
            name = f"{path} ({member.name})"
            yield Item(name, path, member.name, member.offset, member.size, changed)


def cut(items: Iterable[Item], most_pixels: int | None, equal: bool) -> Iterator[Chunk]:
    """Cut images into chunks, after names alone where it can.

    Where a file comes or goes, only the chunk around it changes, so that a run that is resumed
    knows the others.
    """
    run: list[Item] = []
    size = 0
    for item in items:
        run.append(item)
        size += item.size
        name = os.path.basename(item.member or item.address).encode(errors="surrogatepass")
        if size >= CHUNK_BYTES or zlib.crc32(name) % CHUNK_IMAGES == 0:
            yield Chunk(tuple(run), most_pixels, equal)
            run, size = [], 0
    if run:
        yield Chunk(tuple(run), most_pixels, equal)


def measure_chunk(chunk: Chunk) -> bytes:
    """Measure images, in whatever process; returns `Found` as bytes.

    Raises
    ------
    ArgumentError
        A file cannot be read, or has changed. What cannot be decoded is in the report.
    """
    images: list[tuple[str, Decoded]] = []  # an archive may hold a name twice
    broken: list[tuple[str, str]] = []
    with strict(chunk.most_pixels), ExitStack() as stack:
        archives: dict[str, IO[bytes]] = {}
        for item in chunk.items:
            with explain_read_errors(item.address):
                if item.member is None:
                    with open_binary(item.address) as file:
                        data = _read(file, item)
                else:
                    if item.address not in archives:
                        archives[item.address] = stack.enter_context(open_binary(item.address))
                    data = _read(archives[item.address], item)
            try:
                images.append((item.name, measure_image(data)))
            except BrokenImage as error:
                broken.append((item.name, str(error)))
    sums: dict[str, tuple[Sums, ...]] = {}
    first: dict[str, str] = {}
    for name, image in images:
        what = f"{'grey' if len(image.sums) == 1 else 'colour'} {image.bits}"
        some = tuple(map(_equal, image.sums)) if chunk.equal else image.sums
        _include(sums, first, what, some, name)
    return Found(sums, first, ImageReport.of(images, broken)).to_bytes()


def _include(
    sums: dict[str, tuple[Sums, ...]],
    first: dict[str, str],
    what: str,
    some: tuple[Sums, ...],
    name: str,
) -> None:
    """Add sums of one kind, and the first name of it."""
    known = sums.get(what)
    sums[what] = some if known is None else add(known, some)
    first[what] = min(first.get(what, name), name)


def add(a: tuple[Sums, ...], b: tuple[Sums, ...]) -> tuple[Sums, ...]:
    """Add the sums of two channel by channel."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _read(file: IO[bytes], item: Item) -> bytes:
    if item.member is not None:
        data = read_member(item.address, file, Member(item.member, item.offset, item.size))
    else:
        data = file.read()
    same = len(data) == item.size
    if not is_remote(item.address):
        same = same and os.fstat(file.fileno()).st_mtime_ns == item.changed
    if not same:
        raise ArgumentError(
            f"{item.name}: changed while it was measured. Measure it again when it is complete."
        )
    return data


def _equal(sums: Sums) -> Sums:
    """Return sums as if the image had 2^WEIGHT_BITS pixels."""
    pixels, first, second, least, greatest = sums
    return Sums(
        1 << WEIGHT_BITS,
        (first << WEIGHT_BITS) // pixels,
        (second << WEIGHT_BITS) // pixels,
        least,
        greatest,
    )
