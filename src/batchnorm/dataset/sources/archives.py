"""Tar archives of examples, as WebDataset writes them: their members, and those that are arrays."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from ...errors import ArgumentError, BatchNormError, ShapeError
from ...native import Array
from ..addresses import Fingerprint, explain_read_errors, fingerprint_of, open_binary, suffix_of
from ..extras import first_line, import_extra
from ..files import IMAGES
from . import blocks
from .blocks import Block, Source
from .values import check_array

#: Endings of members that are measured: each is an example.
KINDS = {"images": IMAGES, "arrays": (".npy",)}


class Member(NamedTuple):
    """A file in an archive: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def members(path: str) -> Iterator[Member]:
    """Yield the files in an archive in their order, reading nothing but their headers.

    Files that begin with a dot or an underscore are left out, as in folders.

    Raises
    ------
    ArgumentError
        It is damaged, cut short, compressed, or something follows its end.
    """
    with explain_read_errors(path), open_binary(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep all
                    if not info.isreg() or PurePosixPath(info.name).name[:1] in "._":
                        continue
                    if info.issparse():
                        raise tarfile.TarError(f"{info.name} is sparse")
                    if info.offset_data + info.size > size:
                        raise tarfile.TarError(f"it is cut short in {info.name}")
                    yield Member(info.name, info.offset_data, info.size)
                _check_end(file, archive.offset)
        except (OSError, BatchNormError, MemoryError):
            raise
        except Exception as error:  # the parser of headers raises whatever damage leads to
            raise ArgumentError(
                f"{path}: must be a tar archive without compression, and is damaged or of another "
                f"kind ({first_line(error)}). Write it again."
            ) from error


def _check_end(file: IO[bytes], end: int) -> None:
    """Raise unless zeros follow up to the end of the file: a damaged header ends reading, too."""
    file.seek(end)
    rest = file.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.TarError("it is cut short, for the mark of its end is missing")
    while rest:
        if rest.count(0) < len(rest):
            raise tarfile.TarError(f"what follows byte {end} is no member")
        rest = file.read(1 << 20)


def examples(
    path: str, kind: str, array: str | None, skipped: Counter[str] | None = None
) -> Iterator[Member]:
    """Yield the members of an archive that are to be measured.

    Parameters
    ----------
    kind
        One of `KINDS`.
    array
        Ending of their names, such as "jpg" or "seg.png"; None for all that are of this kind.
    skipped
        Counts the endings of the others.

    Raises
    ------
    ArgumentError
        The archive is damaged, holds examples of both kinds, or two of one name.
    """
    others = {ending for name, endings in KINDS.items() if name != kind for ending in endings}
    last = ""
    for member in members(path):
        if not _is_wanted(member.name, KINDS[kind], array):
            suffix = suffix_of(member.name)
            if array is None and suffix in others:
                raise ArgumentError(
                    f"{path}: must hold {kind} alone, like all that is measured with it, got "
                    f"{member.name}. Choose by array={suffix[1:]!r}, --array {suffix[1:]}, or "
                    "another ending, or measure it apart."
                )
            if skipped is not None:
                skipped[suffix or "no suffix"] += 1
            continue
        key, ending = _split(member.name)
        if array is None and key == last:
            raise ArgumentError(
                f"{path}: must hold one file to measure of each example, and holds several of "
                f"{key!r}. Choose by array={ending!r}, --array {ending}, or another ending."
            )
        last = key
        yield member


def kind_of(path: str, array: str | None) -> str:
    """Return which of `KINDS` an archive holds, by its first member of one.

    Raises
    ------
    ArgumentError
        It holds none, or is damaged.
    """
    seen: Counter[str] = Counter()
    for member in members(path):
        seen[_split(member.name)[1] or "no suffix"] += 1
        for kind, endings in KINDS.items():
            if _is_wanted(member.name, endings, array):
                return kind
    listed = ", ".join(f"{n} of {ending}" for ending, n in seen.most_common(4)) or "no files"
    raise ArgumentError(
        f"{path}: must hold images or .npy arrays"
        f"{'' if array is None else f' whose names end in {array!r}'}, got {listed}. Name another "
        f"archive{'' if array is None else ', or another ending'}."
    )


def _split(name: str) -> tuple[str, str]:
    """Split a name at the first dot, as WebDataset does: the key of an example, and the ending."""
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}/{key}", ending.lower()


def _is_wanted(name: str, endings: tuple[str, ...], array: str | None) -> bool:
    lower = name.lower()
    return lower.endswith(endings) and (
        array is None or lower.endswith(f".{array.lower().lstrip('.')}")
    )


@dataclass(frozen=True)
class ArraysInTar:
    """The .npy files in a tar archive, each an example (C, *S).

    Attributes
    ----------
    path, fingerprint
        Where the archive is, and its fingerprint when it was opened.
    features
        Length of the channel axis.
    channel_axis
        In a batch of examples.
    array
        Ending of the names of members.
    block_bytes
        Memory that a block may take, unless an example takes more.
    """

    path: str
    fingerprint: Fingerprint
    features: int
    channel_axis: int
    array: str | None
    block_bytes: int

    names = None

    @property
    def label(self) -> str:
        """The path."""
        return self.path

    @property
    def nbytes(self) -> int:
        """Bytes of the archive."""
        return self.fingerprint[2]

    def split(self, blocks: int) -> list[Source]:
        """Return the archive alone: its members are found one by one."""
        return [self]

    def with_path(self, path: str) -> ArraysInTar:
        """Return the same archive under another path."""
        return replace(self, path=path)

    def blocks(self) -> Iterator[Block]:
        """Yield runs of examples of one shape and type, stacked."""
        run: list[Array] = []
        names: list[str] = []
        number = 0
        with explain_read_errors(self.path), open_binary(self.path) as file:
            for member in examples(self.path, "arrays", self.array):
                x = read_example(self.path, file, member)
                axis = _axis(self.path, member.name, x, self.channel_axis)
                if x.shape[axis - 1] != self.features:
                    raise ShapeError(
                        f"{self.path} ({member.name}): must have as many features as the first "
                        f"example, {self.features}, got {x.shape[axis - 1]} in shape {x.shape}. "
                        "Choose channel_axis, counted as in a batch (N, C, *S)."
                    )
                full = sum(one.nbytes for one in run) + x.nbytes > self.block_bytes
                if run and (full or (x.shape, x.dtype) != (run[0].shape, run[0].dtype)):
                    yield self._block(run, names, number)
                    run, names, number = [], [], number + 1
                run.append(x)
                names.append(member.name)
        if run:
            yield self._block(run, names, number)

    def _block(self, run: list[Array], names: list[str], number: int) -> Block:
        values = np.stack(run)
        axis = self.channel_axis % values.ndim

        def where(index: tuple[int, ...]) -> str:
            return f"index {index[1:]} of {names[index[0]]}"

        return Block(values, axis, slice(0, self.features), number, where, values.nbytes)


def open_arrays_in_tar(path: str, *, array: str | None, channel_axis: int) -> ArraysInTar:
    """Read the first example of an archive.

    Raises
    ------
    BatchNormError
        The archive is damaged, or the example is no array of real numbers.
    """
    fingerprint = fingerprint_of(path)
    with explain_read_errors(path), open_binary(path) as file:
        first = next(examples(path, "arrays", array), None)
        if first is None:
            raise ArgumentError(
                f"{path}: must hold .npy arrays, like all that is measured with it, got none. "
                "Leave it out."
            )
        x = read_example(path, file, first)
        axis = _axis(path, first.name, x, channel_axis)
    return ArraysInTar(
        path, fingerprint, x.shape[axis - 1], channel_axis, array, blocks.BLOCK_BYTES
    )


def read_member(path: str, file: IO[bytes], member: Member) -> bytes:
    """Return the bytes of a member of an open archive."""
    file.seek(member.offset)
    pieces, left = [], member.size
    while left > 0:
        piece = file.read(left)  # one call gives at most 2 GiB
        if not piece:
            raise ArgumentError(
                f"{path} ({member.name}): ended while it was read. The archive has changed; "
                "measure it again when it is complete."
            )
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_example(path: str, file: IO[bytes], member: Member) -> Array:
    """Read a member as an array."""
    label = f"{path} ({member.name})"
    data = io.BytesIO(read_member(path, file, member))
    try:
        x: Array = np.lib.format.read_array(data, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # NumPy's parser of headers raises whatever damage leads to
        raise ArgumentError(
            f"{label}: must be an array in NumPy's format, and is not ({first_line(error)}). Write "
            "it with numpy.save."
        ) from error
    if data.read(1):
        raise ArgumentError(
            f"{label}: must hold one array, and something follows it. Write it with numpy.save."
        )
    if x.dtype == np.dtype("V2"):  # numpy.save writes bfloat16 as two bytes of unknown type
        x = x.view(import_extra("ml_dtypes", "data", "bfloat16 arrays").bfloat16)
    return x


def _axis(path: str, name: str, x: Array, channel_axis: int) -> int:
    """Return the channel axis in a batch of such examples, counted from the front."""
    label = f"{path} ({name})"
    axis = check_array(label, (1, *x.shape), x.dtype, channel_axis)
    if axis == 0:
        raise ShapeError(
            f"{label}: channel_axis must be that of the features in a batch (N, C, *S) of such "
            f"examples, got {channel_axis}, that of the batch. Choose another."
        )
    return axis


def shown_endings(path: str, array: str | None) -> str:
    """List the endings of the files of the first example that are not measured."""
    endings: list[Any] = []
    first = None
    for member in members(path):
        key, ending = _split(member.name)
        first = key if first is None else first
        if key != first:
            break
        if not _is_wanted(member.name, KINDS["arrays"], array):
            endings.append(f".{ending}")
    return ", ".join(endings)
