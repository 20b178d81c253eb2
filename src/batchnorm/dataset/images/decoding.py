"""One image, from its bytes to exact sums over its pixels."""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..extras import first_line, import_extra

#: What Pillow may find in a file, whatever it is called. Others, such as EPS, run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")

#: Modes of one channel of light; all others have colours.
GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I")

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_VALUES = np.arange(256)
_POWERS = np.stack([_VALUES, _VALUES**2], axis=1)  # (256, 2)


class BrokenImage(Exception):
    """An image cannot be decoded, or not to 8 or 16 bits; the message says why, in a few words."""


class Sums(NamedTuple):
    """Exact sums over the values of one channel, which add up in any order."""

    pixels: int
    first: int
    second: int
    least: int
    greatest: int

    def __add__(self, other: tuple[Any, ...]) -> Sums:
        """Sums over the values of both."""
        pixels, first, second, least, greatest = other
        return Sums(
            self.pixels + pixels,
            self.first + first,
            self.second + second,
            min(self.least, least),
            max(self.greatest, greatest),
        )


class Decoded(NamedTuple):
    """What is known of one image.

    Attributes
    ----------
    mode
        Pillow's name for how pixels are stored in the file.
    size
        Width and height.
    bits
        8 or 16.
    sums
        Of grey, or of red, green and blue.
    transparent
        Whether it has an alpha channel or transparent colours, which are ignored.
    frames
        How many images the file holds; the first is measured.
    """

    mode: str
    size: tuple[int, int]
    bits: int
    sums: tuple[Sums, ...]
    transparent: bool
    frames: int


def pillow() -> Any:
    """Import Pillow.

    Raises
    ------
    BatchNormError
        It is not installed.
    """
    return import_extra("PIL.Image", "images", "Images")


@contextlib.contextmanager
def strict(most_pixels: int | None) -> Iterator[None]:
    """Set what Pillow lets through, for all images alike, in whatever process they are decoded.

    Parameters
    ----------
    most_pixels
        Half the number of pixels above which an image is taken for a decompression bomb; None for
        no limit. It is Pillow's ``Image.MAX_IMAGE_PIXELS``.
    """
    image, file = pillow(), import_extra("PIL.ImageFile", "images", "Images")
    before = image.MAX_IMAGE_PIXELS, file.LOAD_TRUNCATED_IMAGES
    image.MAX_IMAGE_PIXELS, file.LOAD_TRUNCATED_IMAGES = most_pixels, False
    try:
        with warnings.catch_warnings():
            # Of large images, of damaged EXIF, and of palettes with transparency.
            warnings.simplefilter("ignore")
            yield
    finally:
        image.MAX_IMAGE_PIXELS, file.LOAD_TRUNCATED_IMAGES = before


def measure_image(data: bytes) -> Decoded:
    """Decode an image and sum its pixels.

    Palettes, CMYK and YCbCr become red, green and blue by Pillow's ``convert("RGB")``, as in
    torchvision's loader.

    Raises
    ------
    BrokenImage
        It is damaged, or of a kind that has no 8 or 16 bits, or of which Pillow drops bits.
    """
    if not data:
        raise BrokenImage("an empty file")
    if data.startswith(_SIGNATURE):
        _check_png(data)
    try:
        with pillow().open(io.BytesIO(data), formats=FORMATS) as image:
            return _measure(image)
    except BrokenImage:
        raise
    except pillow().UnidentifiedImageError:
        raise BrokenImage("no PNG, JPEG, WebP or TIFF image") from None
    except Exception as error:  # decoders raise whatever damage leads to
        raise BrokenImage(first_line(error).rstrip(".")) from error


def _measure(image: Any) -> Decoded:
    mode, raw = image.mode, _raw_mode(image)
    frames = getattr(image, "n_frames", 1)
    transparent = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if mode == "F" or (mode == "I" and raw != "I;16B"):  # old Pillow reads 16 bits into 32
        raise BrokenImage(
            f"{'floats' if mode == 'F' else 'integers of 32 bits or with a sign'}, where images "
            "have 8 or 16 bits"
        )
    if ";16" in raw and mode not in GREY:
        raise BrokenImage("16 bits per colour, of which Pillow reads 8")
    image.load()
    if image.width * image.height == 0:
        raise BrokenImage("no pixels")
    if mode.startswith("I"):
        return Decoded(mode, image.size, 16, (_wide_sums(np.asarray(image)),), transparent, frames)
    grey = mode in GREY
    if mode not in ("L", "LA", "RGB", "RGBA", "RGBX"):
        image = image.convert("L" if grey else "RGB")
    histogram = np.array(image.histogram()[: 256 if grey else 768], np.int64)
    sums = tuple(map(_sums, histogram.reshape(-1, 256)))
    return Decoded(mode, image.size, 8, sums, transparent, frames)


def _sums(histogram: Any) -> Sums:
    """Sums from the number of pixels of each value from 0 to 255."""
    first, second = histogram @ _POWERS
    there = np.flatnonzero(histogram)
    return Sums(int(histogram.sum()), int(first), int(second), int(there[0]), int(there[-1]))


def _wide_sums(values: Any) -> Sums:
    """Sums over values of 16 bits; squares of 2³¹ of them fit 64 bits."""
    flat = values.reshape(-1)
    first = flat.sum(dtype=np.uint64)
    second = np.einsum("i,i->", flat, flat, dtype=np.uint64, casting="unsafe")
    return Sums(flat.size, int(first), int(second), int(flat.min()), int(flat.max()))


def _raw_mode(image: Any) -> str:
    """How pixels are stored in the file, in Pillow's words; "" where it does not say."""
    if not image.tile:
        return ""
    arguments = image.tile[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _check_png(data: bytes) -> None:
    """Verify the checksums of a PNG, which Pillow does not: it reads zeros for a missing end."""
    position, view = len(_SIGNATURE), memoryview(data)
    while True:
        size = int.from_bytes(data[position : position + 4], "big")
        end = position + 8 + size
        kind = data[position + 4 : position + 8]
        if end + 4 > len(data):
            raise BrokenImage("cut short")
        # Chunks in small letters, such as texts, change no pixel.
        critical = kind[:1].isupper()
        if critical and zlib.crc32(view[position + 4 : end]) != int.from_bytes(
            data[end : end + 4], "big"
        ):
            raise BrokenImage(f"wrong checksum of {kind.decode('latin-1')}")
        if kind == b"IEND":
            return
        position = end + 4
