"""What stands out among images: the darkest, the smallest, the constant, and those unlike most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .decoding import Decoded

#: The maximum number of images that are named for one reason.
NAMED = 5


class Brightness(NamedTuple):
    """Mean of all values of an image, as they are in the file, and its name."""

    mean: float
    name: str


class Size(NamedTuple):
    """Number of pixels, width and height of an image, and its name."""

    pixels: int
    width: int
    height: int
    name: str


class Kind(NamedTuple):
    """Number of images of a kind, and the first `NAMED` of them by name."""

    number: int = 0
    names: tuple[str, ...] = ()

    def __add__(self, other: tuple[Any, ...]) -> Kind:
        """Return the images of both."""
        number, names = other
        return Kind(self.number + number, _first({*self.names, *names}))


_NONE = Kind()


@dataclass(frozen=True)
class ImageReport:
    """What stands out among the images that were measured.

    Parameters
    ----------
    count
        Number of images.
    modes
        Images of each of Pillow's modes, such as RGB, L (grey) and P (palette).
    darkest, brightest
        The `NAMED` images of the least and of the greatest mean.
    smallest, largest
        The `NAMED` images of the fewest and of the most pixels.
    constant
        Images in which each channel has one value.
    transparent
        Images with an alpha channel or transparent colours, which were ignored.
    several_frames
        Files of several images, of which the first was measured.
    broken
        Images that cannot be decoded, and are not in `count`.
    reasons
        Why the first of them cannot: name and reason.

    Notes
    -----
    The sum of two reports is that of all their images. Images that are alike are ordered by name,
    so that a report does not depend on the order of measuring.
    """

    count: int = 0
    modes: Mapping[str, Kind] = field(default_factory=dict)
    darkest: tuple[Brightness, ...] = ()
    brightest: tuple[Brightness, ...] = ()
    smallest: tuple[Size, ...] = ()
    largest: tuple[Size, ...] = ()
    constant: Kind = _NONE
    transparent: Kind = _NONE
    several_frames: Kind = _NONE
    broken: Kind = _NONE
    reasons: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls, images: Sequence[tuple[str, Decoded]], broken: Sequence[tuple[str, str]] = ()
    ) -> ImageReport:
        """Report on images with their names, and on names with the reasons why they are broken."""
        means = [
            Brightness(sum(s.first for s in image.sums) / sum(s.pixels for s in image.sums), name)
            for name, image in images
        ]
        sizes = [Size(i.size[0] * i.size[1], *i.size, name) for name, i in images]
        modes: dict[str, list[str]] = {}
        for name, image in images:
            modes.setdefault(image.mode, []).append(name)
        return cls(
            len(images),
            {mode: _kind(names) for mode, names in sorted(modes.items())},
            _first(means),
            _last(means),
            _first(sizes),
            _last(sizes),
            _kind(n for n, i in images if all(s.least == s.greatest for s in i.sums)),
            _kind(n for n, i in images if i.transparent),
            _kind(n for n, i in images if i.frames > 1),
            _kind(name for name, _ in broken),
            _first(broken),
        )

    def __add__(self, other: ImageReport) -> ImageReport:
        """Report on the images of both."""
        return ImageReport(
            self.count + other.count,
            {
                mode: self.modes.get(mode, _NONE) + other.modes.get(mode, _NONE)
                for mode in sorted({*self.modes, *other.modes})
            },
            _first(self.darkest + other.darkest),
            _last(self.brightest + other.brightest),
            _first(self.smallest + other.smallest),
            _last(self.largest + other.largest),
            self.constant + other.constant,
            self.transparent + other.transparent,
            self.several_frames + other.several_frames,
            self.broken + other.broken,
            _first(self.reasons + other.reasons),
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return a table for people: what stands out, and a few words on it."""
        found = [("images", f"{self.count:,}")]
        if self.count:
            by_number = sorted(self.modes.items(), key=lambda item: -item[1].number)
            common, *others = by_number
            found.append(("mode", f"{common[0]} {common[1].number:,}"))
            found += [(f"mode {mode}", _listed(kind)) for mode, kind in others]
            small, large = self.smallest[0], self.largest[0]
            if small[:3] == large[:3]:
                found.append(("size", f"all {small.width}×{small.height}"))
            else:
                found += [
                    (title, f"{size.width}×{size.height}, {size.name}")
                    for title, size in (("smallest", small), ("largest", large))
                ]
            found += [
                (title, ", ".join(f"{b.name} ({b.mean:.4g})" for b in some[:3]))
                for title, some in (("darkest", self.darkest), ("brightest", self.brightest))
            ]
        for title, kind in (
            ("constant", self.constant),
            ("alpha dropped", self.transparent),
            ("first frame only", self.several_frames),
            ("left out, broken", self.broken),
        ):
            if kind.number:
                found.append((title, _listed(kind)))
        return found

    def as_json(self) -> dict[str, Any]:
        """Return plain values, which `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ImageReport:
        """Return the report of plain values."""
        return cls(
            count=content["count"],
            modes={mode: _as_kind(kind) for mode, kind in content["modes"].items()},
            darkest=tuple(Brightness(*b) for b in content["darkest"]),
            brightest=tuple(Brightness(*b) for b in content["brightest"]),
            smallest=tuple(Size(*s) for s in content["smallest"]),
            largest=tuple(Size(*s) for s in content["largest"]),
            constant=_as_kind(content["constant"]),
            transparent=_as_kind(content["transparent"]),
            several_frames=_as_kind(content["several_frames"]),
            broken=_as_kind(content["broken"]),
            reasons=tuple((name, reason) for name, reason in content["reasons"]),
        )


def _first(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(items)[:NAMED])


def _last(items: Iterable[Any]) -> tuple[Any, ...]:
    """Return the greatest first, and equal ones by name."""
    return tuple(sorted(items, key=lambda item: (-item[0], item[-1]))[:NAMED])


def _kind(names: Iterable[str]) -> Kind:
    several = list(names)
    return Kind(len(several), _first(set(several)))  # an archive may hold a name twice


def _as_kind(content: Any) -> Kind:
    number, names = content
    return Kind(number, tuple(names))


def _listed(kind: Kind) -> str:
    more = "" if kind.number <= len(kind.names[:3]) else ", …"
    return f"{kind.number:,}: {', '.join(kind.names[:3])}{more}"
