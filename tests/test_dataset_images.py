"""Statistics of images: exact in every mode, and what cannot be measured is named."""

import io
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from batchnorm import dataset
from batchnorm.dataset.images import chunks, decoding, measuring
from batchnorm.dataset.images.chunks import Chunk, Found, Item
from batchnorm.dataset.images.decoding import BrokenImage, measure_image
from batchnorm.dataset.images.report import ImageReport
from batchnorm.dataset.sources import archives, blocks
from batchnorm.errors import ArgumentError, BatchNormError, ShapeError

RNG_SIZE = (11, 9)


def pixels(seed, channels=3, size=RNG_SIZE, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    shape = size if channels == 1 else (*size, channels)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def smooth(seed=0, size=(40, 48)):
    """Like a photograph: what is damaged in it shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / 20
    colours = [128 + 80 * np.sin(x * k + y) + rng.normal(0, 8, size) for k in (1, 2, 3)]
    return np.clip(np.stack(colours, -1), 0, 255).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(values, colour, *, depth=None, palette=None, transparency=None):
    """A PNG as the format says, also of kinds that Pillow does not write."""
    values = np.asarray(values)
    height, width = values.shape[:2]
    depth = depth or values.dtype.itemsize * 8
    rows = values.reshape(height, -1).astype(values.dtype.newbyteorder(">"))
    if depth < 8:
        bits = np.unpackbits(rows[..., None], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", transparency)]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))]
    parts += [(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
        if data is not None
    )


def exact(arrays):
    """Count, mean, m2 and extremes of the last axis over all pixels, each rounded once."""
    rows = np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays]).astype(object)
    n = len(rows)
    first, second = rows.sum(0), (rows**2).sum(0)
    mean = [float(Fraction(int(s), n)) for s in first]
    m2 = [float(Fraction(int(q) * n - int(s) ** 2, n)) for s, q in zip(first, second, strict=True)]
    return n, mean, m2, [rows.min(0).tolist(), rows.max(0).tolist()]


def assert_exact(found, arrays):
    n, mean, m2, extremes = exact(arrays)
    assert found.moments.count == n
    assert found.mean.tolist() == mean
    assert found.moments.m2.tolist() == m2
    assert found.extremes.tolist() == extremes
    assert not found.missing.any()


def save_images(folder, number, seed=0):
    """PNGs and JPEGs of several modes and sizes; returns what a loader makes of them."""
    folder.mkdir(exist_ok=True)
    arrays = []
    for k in range(number):
        size = (5 + (seed + k) % 7, 4 + k % 3)
        image = Image.fromarray(pixels(seed + k, 1 if k % 5 == 4 else 3, size))
        path = folder / f"{k:03}.{'jpg' if k % 3 == 2 else 'png'}"
        image.save(path)
        with Image.open(path) as read:
            arrays.append(np.asarray(read.convert("RGB")))
    return arrays


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few images."""
    monkeypatch.setattr(chunks, "CHUNK_IMAGES", 3)


@pytest.fixture
def many_processes(monkeypatch, small_chunks):
    """Processes for little work, too."""
    monkeypatch.setattr(measuring, "TRIAL_SECONDS", 0)
    monkeypatch.setattr(measuring, "ALONE_SECONDS", 0)


# ---- modes and formats --------------------------------------------------------------------------

PALETTE = bytes(pixels(99, 3, (256,)).reshape(-1))

#: Pillow's mode and how it is written, by name.
WRITTEN = {
    "png 1": ("1", "PNG", {}),
    "png L": ("L", "PNG", {}),
    "png LA": ("LA", "PNG", {}),
    "png P": ("P", "PNG", {}),
    "png RGB": ("RGB", "PNG", {}),
    "png RGBA": ("RGBA", "PNG", {}),
    "jpeg L": ("L", "JPEG", {}),
    "jpeg RGB": ("RGB", "JPEG", {}),
    "jpeg RGB progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg CMYK": ("CMYK", "JPEG", {}),
    "webp RGB": ("RGB", "WEBP", {}),
    "webp RGBA": ("RGBA", "WEBP", {"lossless": True}),
    "tiff 1": ("1", "TIFF", {}),
    "tiff L": ("L", "TIFF", {"compression": "tiff_lzw"}),
    "tiff LA": ("LA", "TIFF", {}),
    "tiff P": ("P", "TIFF", {}),
    "tiff PA": ("PA", "TIFF", {}),
    "tiff RGB": ("RGB", "TIFF", {"compression": "tiff_deflate"}),
    "tiff RGBA": ("RGBA", "TIFF", {}),
    "tiff CMYK": ("CMYK", "TIFF", {}),
    "tiff LAB": ("LAB", "TIFF", {}),
    "tiff YCbCr": ("YCbCr", "TIFF", {"compression": "tiff_deflate"}),
}


def image_of(mode):
    if mode in ("P", "PA"):
        image = Image.fromarray(pixels(1, 1)).convert("P")
        image.putpalette(PALETTE)
        return image.convert(mode)
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode in ("1", "L"):
        return Image.fromarray(pixels(1, 1)).convert(mode)
    return Image.merge(mode, [Image.fromarray(pixels(k, 1)) for k in range(bands)])


@pytest.mark.parametrize("name", WRITTEN)
def test_images_are_exact_in_every_mode_and_format(name, tmp_path):
    mode, kind, options = WRITTEN[name]
    path = tmp_path / f"x.{kind.lower()}"
    image_of(mode).save(path, kind, **options)
    found = dataset.measure(path)
    grey = mode in ("1", "L", "LA")
    with Image.open(path) as image:
        values = np.asarray(image.convert("L" if grey else "RGB"))
    assert_exact(found, [values[..., None] if grey else values])
    assert found.names == (("grey",) if grey else ("red", "green", "blue"))
    assert bool(found.images.transparent.number) == (mode in ("LA", "PA", "RGBA"))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_fewer_bits_reaches_from_0_to_255(depth, tmp_path):
    values = pixels(0, 1) >> (8 - depth)
    (tmp_path / "x.png").write_bytes(png(values, 0, depth=depth))
    full = values.astype(int) * 255 // (2**depth - 1)
    assert_exact(dataset.measure(tmp_path), [full[..., None]])


@pytest.mark.parametrize("colours", [256, 10])
def test_palettes_count_as_their_colours(colours, tmp_path):
    index = (pixels(0, 1).astype(int) % colours).astype(np.uint8)
    palette = np.frombuffer(PALETTE, np.uint8).reshape(-1, 3)[:colours]
    data = png(index, 3, palette=palette.tobytes(), transparency=bytes(range(colours)))
    (tmp_path / "x.png").write_bytes(data)
    found = dataset.measure(tmp_path)
    assert_exact(found, [palette[index]])
    assert found.images.transparent.names == (str(tmp_path / "x.png"),)


def saved_wide(kind, values):
    if kind == "png":
        return png(values, 0)
    mode = "I;16B" if kind == "tiff big" else "I;16"
    raw = values.astype(">u2" if kind == "tiff big" else "<u2").tobytes()
    image = Image.frombytes(mode, values.shape[::-1], raw)
    return encoded(image, "TIFF", compression="tiff_deflate" if kind == "tiff deflate" else None)


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big", "tiff deflate"])
def test_grey_of_16_bits_keeps_all_of_them(kind, tmp_path):
    values = pixels(0, 1, dtype=np.uint16)
    (tmp_path / f"x.{kind[:4].strip()}").write_bytes(saved_wide(kind, values))
    found = dataset.measure(tmp_path)
    assert_exact(found, [values[..., None]])
    assert found.names == ("grey",)


def test_squares_of_16_bits_do_not_overflow(tmp_path):
    values = np.full((700, 700), 65535, np.uint16)  # 4.9e5 squares of 4.3e9
    values[0] = 0
    (tmp_path / "x.png").write_bytes(png(values, 0))
    assert_exact(dataset.measure(tmp_path), [values[..., None]])


def test_exif_rotation_changes_nothing(tmp_path):
    image, exif = Image.fromarray(smooth()), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.jpg", exif=exif)
    one, two = (dataset.measure(tmp_path / name) for name in ("a.jpg", "b.jpg"))
    assert one.moments == two.moments


def test_grey_images_count_as_equal_channels_beside_coloured_ones(tmp_path):
    grey, colour = pixels(0, 1), pixels(1, 3, (4, 5))
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(colour).save(tmp_path / "b.png")
    notes = []
    found = dataset.measure(tmp_path, note=notes.append)
    assert_exact(found, [np.stack([grey] * 3, -1), colour])
    assert "grey counts as equal red, green and blue, in 1 of 2 images" in notes


def test_each_pixel_counts_once_and_by_choice_each_image(tmp_path):
    arrays = [np.full((2, 3, 3), 10, np.uint8), pixels(1, 3, (20, 30)), pixels(2, 3, (7, 1))]
    for k, a in enumerate(arrays):
        Image.fromarray(a).save(tmp_path / f"{k}.png")
    assert_exact(dataset.measure(tmp_path), arrays)
    found = dataset.measure(tmp_path, equal_images=True)
    assert found.count.tolist() == [3, 3, 3]
    for c in range(3):
        rows = [[int(v) for v in a[..., c].ravel()] for a in arrays]
        mean = sum(Fraction(sum(row), len(row)) for row in rows) / 3
        var = sum(sum((v - mean) ** 2 for v in row) / len(row) for row in rows) / 3
        assert found.mean[c] == float(mean)
        assert found.var()[c] == pytest.approx(float(var), rel=1e-15)


def test_constant_images_have_variance_zero_also_if_each_counts_alike(tmp_path):
    for k, size in enumerate([(3, 7), (11, 13), (1, 3)]):
        Image.fromarray(np.full((*size, 3), 77, np.uint8)).save(tmp_path / f"{k}.png")
    found = dataset.measure(tmp_path, equal_images=True)
    assert (found.mean == 77).all()
    assert not found.var().any()


# ---- what Pillow does not give whole ------------------------------------------------------------

UNMEASURED = {
    "rgb16.png": (png(pixels(0, 3, dtype=np.uint16), 2), "16 bits per colour"),
    "rgba16.png": (png(pixels(0, 4, dtype=np.uint16), 6), "16 bits per colour"),
    "la16.png": (png(pixels(0, 2, dtype=np.uint16), 4), "16 bits per colour"),
    "float.tif": (encoded(Image.new("F", (3, 3)), "TIFF"), "floats"),
    "int.tif": (encoded(Image.new("I", (3, 3)), "TIFF"), "32 bits"),
    "gif.png": (encoded(Image.new("L", (3, 3)), "GIF"), "no PNG, JPEG, WebP or TIFF image"),
}


@pytest.mark.parametrize("name", UNMEASURED)
def test_kinds_of_which_bits_would_be_lost_are_refused(name, tmp_path):
    data, reason = UNMEASURED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArgumentError, match=reason) as caught:
        dataset.measure(tmp_path)
    assert name in str(caught.value)


def test_signed_16_bits_are_refused(tmp_path):
    data = bytearray(encoded(Image.frombytes("I;16", (2, 2), bytes(8)), "TIFF"))
    with Image.open(io.BytesIO(bytes(data))) as image:
        image.tag_v2[339] = 2  # SampleFormat: signed
        tags = image.tag_v2
        stream = io.BytesIO()
        Image.frombytes("I;16", (2, 2), bytes(8)).save(stream, "TIFF", tiffinfo=tags)
    with Image.open(io.BytesIO(stream.getvalue())) as image:
        assert image.tile[0][3][0] == "I;16S"
    with pytest.raises(BrokenImage, match="sign"):
        measure_image(stream.getvalue())


def test_8_and_16_bits_together_are_refused_by_an_example_of_each(tmp_path):
    Image.fromarray(pixels(0)).save(tmp_path / "narrow.png")
    (tmp_path / "wide.png").write_bytes(png(pixels(0, 1, dtype=np.uint16), 0))
    with pytest.raises(ArgumentError, match=r"narrow\.png with 8 and .*wide\.png with 16"):
        dataset.measure(tmp_path)


def test_first_of_several_frames_is_measured_with_a_note(tmp_path):
    a, b = Image.fromarray(pixels(0)), Image.fromarray(pixels(1))
    a.save(tmp_path / "x.tif", save_all=True, append_images=[b])
    a.save(tmp_path / "y.png", save_all=True, append_images=[b])
    notes = []
    found = dataset.measure(tmp_path, note=notes.append)
    assert_exact(found, [pixels(0)] * 2)
    assert "only the first image is measured, of 2 files with several" in notes


# ---- broken images ------------------------------------------------------------------------------


def broken_images():
    whole = encoded(Image.fromarray(smooth()), "PNG")
    jpeg = encoded(Image.fromarray(smooth()), "JPEG")
    return {
        "a_empty.png": b"",
        "b_text.jpg": b"<html>404 Not Found</html>",
        "c_cut.png": whole[: len(whole) // 2],
        "d_cut.jpg": jpeg[: len(jpeg) * 3 // 4],
        "e_zeros.png": whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        "f_flipped.png": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        "g_endless.png": whole[:-12],
    }


def test_broken_images_are_named_counted_and_refused(tmp_path):
    for name, data in broken_images().items():
        (tmp_path / name).write_bytes(data)
    save_images(tmp_path, 4)
    with pytest.raises(ArgumentError) as caught:
        dataset.measure(tmp_path)
    text = str(caught.value)
    assert "7 of 11 images cannot be decoded" in text
    assert f"{tmp_path / 'a_empty.png'}: an empty file" in text
    assert "b_text.jpg: no PNG, JPEG, WebP or TIFF image" in text
    assert "and 2 more" in text
    assert "--broken skip" in text
    assert "\n" not in text


def test_broken_images_are_left_out_by_choice(tmp_path):
    for name, data in broken_images().items():
        (tmp_path / name).write_bytes(data)
    arrays = save_images(tmp_path, 4)
    notes = []
    found = dataset.measure(tmp_path, broken="skip", note=notes.append)
    assert_exact(found, arrays)
    assert found.images.broken.number == 7
    assert found.images.count == 4
    assert any("left out: 7 of 11 images cannot be decoded" in note for note in notes)


def test_nothing_but_broken_images_is_refused_though_they_may_be_skipped(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ArgumentError, match="1 of 1 images cannot be decoded"):
        dataset.measure(tmp_path, broken="skip")


def test_truncated_images_are_broken_whatever_the_program_has_set(tmp_path, monkeypatch):
    data = encoded(Image.fromarray(smooth()), "JPEG")
    (tmp_path / "x.jpg").write_bytes(data[: len(data) * 3 // 4])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ArgumentError, match="truncated"):
        dataset.measure(tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("processes", [1, 2])
def test_limit_of_pixels_is_pillows(processes, tmp_path, monkeypatch, many_processes):
    for k in range(8):
        Image.fromarray(pixels(k, size=(9, 9))).save(tmp_path / f"{k}.png")
    Image.fromarray(pixels(9, size=(30, 30))).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ArgumentError, match=r"1 of 9 .*large\.png: .*decompression bomb"):
        dataset.measure(tmp_path, processes=processes)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert dataset.measure(tmp_path, processes=processes).images.count == 9


def test_a_missing_file_is_no_broken_image(tmp_path):
    item = Item("x.png", str(tmp_path / "x.png"), None, 0, 1, 0)
    with pytest.raises(ArgumentError, match="there is no such file"):
        chunks.measure_chunk(Chunk((item,), None, False))


@pytest.mark.parametrize("change", ["size", "changed"])
def test_a_file_that_changes_while_it_is_measured_is_refused(change, tmp_path):
    Image.fromarray(pixels(0)).save(tmp_path / "x.png")
    (item,) = chunks.items_of([str(tmp_path / "x.png")], None)
    item = item._replace(**{change: getattr(item, change) + 1})
    with pytest.raises(ArgumentError, match="changed while it was measured"):
        chunks.measure_chunk(Chunk((item,), None, False))


DAMAGED = {
    "png": encoded(Image.fromarray(smooth()), "PNG"),
    "png16": png(pixels(0, 1, (30, 30), np.uint16), 0),
    "jpeg": encoded(Image.fromarray(smooth()), "JPEG"),
    "webp": encoded(Image.fromarray(smooth()), "WEBP"),
    "tiff": encoded(Image.fromarray(smooth()), "TIFF"),
    "tiff_lzw": encoded(Image.fromarray(smooth()), "TIFF", compression="tiff_lzw"),
    "tiff_jpeg": encoded(Image.fromarray(smooth()), "TIFF", compression="jpeg"),
}


def damage(data, draw):
    """Cut, flip a bit, overwrite, or fill the rest with zeros, as an interrupted download does."""
    at = draw.randrange(len(data))
    how = draw.randrange(4)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    length = draw.randrange(50) if how == 2 else len(data)
    return (data[:at] + bytes(length) + data[at + length :])[: len(data)]


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_images_are_broken_or_measured_and_nothing_else(kind, capfd):
    draw, whole = random.Random(kind), measure_image(DAMAGED[kind])
    said = []
    with decoding.strict(10**6):
        for _ in range(300):
            try:
                image = measure_image(damage(DAMAGED[kind], draw))
            except BrokenImage as error:
                said.append(str(error))
            else:
                # A PNG has checksums.
                assert not kind.startswith("png") or image.sums == whole.sums
    assert len(said) > 50
    assert all(said)
    assert not any("\n" in text for text in said)


# ---- order, processes, interruption -------------------------------------------------------------


def test_order_and_number_of_processes_change_no_bit(tmp_path, many_processes):
    arrays = save_images(tmp_path, 40)
    paths = sorted(map(str, tmp_path.iterdir()))
    one = dataset.measure(paths, processes=1)
    assert_exact(one, arrays)
    random.Random(0).shuffle(paths)
    two = dataset.measure(paths, processes=2)
    assert two.moments == one.moments
    assert two.images == one.images


def test_work_is_done_by_processes_only_if_there_is_enough(tmp_path, small_chunks, monkeypatch):
    save_images(tmp_path, 20)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(measuring.workers, "pool", refuse)
    assert dataset.measure(tmp_path).images.count == 20
    monkeypatch.setattr(measuring, "TRIAL_SECONDS", 0)
    monkeypatch.setattr(measuring, "ALONE_SECONDS", 0)
    with pytest.raises(AssertionError):
        dataset.measure(tmp_path, processes=2)
    assert dataset.measure(tmp_path, processes=1).images.count == 20


def decoded(seed):
    rng = random.Random(seed)
    size = (rng.randint(1, 4), rng.randint(1, 4))
    grey, value = rng.random() < 0.3, rng.randint(0, 3)
    shape = size if grey else (*size, 3)
    draw = np.random.default_rng(seed).integers(0, 4, shape, np.uint8)
    image = Image.fromarray(np.full_like(draw, value) if rng.random() < 0.3 else draw)
    return measure_image(encoded(image))


def found_of(images):
    report = ImageReport.of([(f"{k % 50:02}", i) for k, i in images], [])
    total = Found(report=report)
    for k, image in images:
        what = "grey 8" if len(image.sums) == 1 else "colour 8"
        total += Found({what: image.sums}, {what: f"{k:02}"})
    return total


@given(st.lists(st.integers(0, 99), min_size=1, max_size=12), st.randoms())
def test_what_is_found_does_not_depend_on_order_and_cuts(seeds, rng):
    images = [(k, decoded(k)) for k in seeds]
    whole = found_of(images)
    rng.shuffle(images)
    at = rng.randint(0, len(images))
    parts = [found_of(images[:at]), found_of(images[at:])]
    assert parts[0] + parts[1] == whole
    assert Found.from_bytes(whole.to_bytes()) == whole


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def interrupt_after(monkeypatch, number):
    """Let measuring stop after so many chunks, in this process; returns those it has measured."""
    monkeypatch.setattr(measuring, "ALONE_SECONDS", 1e9)
    measure = chunks.measure_chunk
    calls = []

    def interrupted(chunk):
        if len(calls) == number:
            raise Interrupted
        calls.append(chunk)
        return measure(chunk)

    monkeypatch.setattr(measuring, "measure_chunk", interrupted)
    return calls


def test_an_interrupted_run_is_resumed_with_the_same_bits(tmp_path, small_chunks, monkeypatch):
    arrays = save_images(tmp_path / "x", 30)
    out = tmp_path / "s.npz"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            dataset.measure(tmp_path / "x", out=out)
    assert not out.exists()
    notes = []
    with monkeypatch.context() as patch:
        calls = interrupt_after(patch, 99)
        found = dataset.measure(tmp_path / "x", out=out, note=notes.append)
    assert_exact(found, arrays)
    known = 30 - sum(len(chunk.items) for chunk in calls)
    assert known >= 4
    assert any(f"resuming: {known} images were measured" in note for note in notes)
    assert found == dataset.measure(tmp_path / "x")
    assert found.images == dataset.measure(tmp_path / "x").images
    assert sorted(os.listdir(tmp_path)) == ["s.npz", "x"]


def test_a_changed_image_is_measured_again_and_most_others_are_not(
    tmp_path, small_chunks, monkeypatch
):
    save_images(tmp_path / "x", 60)
    out = tmp_path / "s.npz"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        with pytest.raises(Interrupted):
            dataset.measure(tmp_path / "x", out=out)
    Image.fromarray(pixels(1000)).save(tmp_path / "x" / "003.png")  # changed
    Image.fromarray(pixels(1001)).save(tmp_path / "x" / "001b.png")  # new
    calls = interrupt_after(monkeypatch, 99)
    found = dataset.measure(tmp_path / "x", out=out)
    again = {Path(item.address).name for chunk in calls for item in chunk.items}
    assert {"003.png", "001b.png"} <= again
    assert len(again) < 50
    assert found == dataset.measure(tmp_path / "x")


def test_after_broken_images_are_removed_the_others_are_not_measured_again(
    tmp_path, small_chunks, monkeypatch
):
    save_images(tmp_path / "x", 40)
    (tmp_path / "x" / "020.png").write_bytes(b"")
    out = tmp_path / "s.npz"
    with pytest.raises(ArgumentError, match="1 of 41"):
        dataset.measure(tmp_path / "x", out=out)
    skipped = dataset.measure(tmp_path / "x", out=tmp_path / "t.npz", broken="skip")
    (tmp_path / "x" / "020.png").unlink()
    calls = interrupt_after(monkeypatch, 99)
    found = dataset.measure(tmp_path / "x", out=out)
    assert sum(len(chunk.items) for chunk in calls) < 20
    assert found == skipped


PROGRAM = """
import sys
from batchnorm import dataset
from batchnorm.dataset.images import chunks, measuring
chunks.CHUNK_IMAGES, measuring.ALONE_SECONDS, measuring.TRIAL_SECONDS = 3, 0, 0
show = lambda *progress: print(*progress, flush=True)
dataset.measure(sys.argv[1], out=sys.argv[2], processes=2, progress=show)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
def test_a_killed_run_is_resumed_with_the_same_bits(tmp_path, small_chunks):
    folder, out = tmp_path / "x", tmp_path / "s.npz"
    folder.mkdir()
    for k in range(60):
        Image.fromarray(smooth(k, (300, 300))).save(folder / f"{k:03}.png")
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(6):  # by then, processes work
            process.stdout.readline()
        process.kill()
    assert not out.exists()
    notes = []
    found = dataset.measure(folder, out=out, note=notes.append)
    assert any("resuming" in note for note in notes)
    assert found == dataset.measure(folder)


def test_progress_counts_the_bytes_of_all_files(tmp_path, many_processes):
    save_images(tmp_path, 20)
    seen = []
    dataset.measure(tmp_path, processes=2, progress=lambda *a: seen.append(a))
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert {total for _, _, total in seen} == {whole}
    done = [done for _, done, _ in seen]
    assert done == sorted(done)
    assert done[-1] == whole
    assert len(done) > 4


# ---- the report ---------------------------------------------------------------------------------


def test_report_names_what_stands_out(tmp_path):
    for k in range(8):
        Image.fromarray(pixels(k, 3, (10, 10))).save(tmp_path / f"{k}.png")
    Image.fromarray(np.full((10, 10, 3), 3, np.uint8)).save(tmp_path / "dark.png")
    Image.fromarray(np.full((10, 10, 3), (200, 250, 255), np.uint8)).save(tmp_path / "light.png")
    Image.fromarray(pixels(9, 1, (4, 30))).save(tmp_path / "wide.png")
    Image.fromarray(pixels(9, 1, (2, 3))).save(tmp_path / "little.png")
    report = dataset.measure(tmp_path).images
    at = {name: str(tmp_path / f"{name}.png") for name in ("dark", "light", "wide", "little")}
    assert report.count == 12
    assert {mode: kind.number for mode, kind in report.modes.items()} == {"L": 2, "RGB": 10}
    assert report.darkest[0] == (3, at["dark"])
    assert report.brightest[0] == (235, at["light"])
    assert report.smallest[0] == (6, 3, 2, at["little"])
    assert report.largest[0] == (120, 30, 4, at["wide"])
    assert report.constant == (2, (at["dark"], at["light"]))
    rows = dict(report.rows())
    assert rows["images"] == "12"
    assert rows["mode"] == "RGB 10"
    assert rows["mode L"] == f"2: {at['little']}, {at['wide']}"
    assert rows["smallest"] == f"3×2, {at['little']}"
    assert rows["constant"] == f"2: {at['dark']}, {at['light']}"


def test_report_is_neither_compared_nor_saved_nor_merged(tmp_path):
    save_images(tmp_path / "x", 5)
    found = dataset.measure(tmp_path / "x", out=tmp_path / "s.npz")
    loaded = dataset.Statistics.load(tmp_path / "s.npz")
    assert loaded == found
    assert loaded.images is None
    assert found.divided_by(255).images == found.images
    assert (found + loaded).images is None


# ---- scale and the line to paste ----------------------------------------------------------------


def test_scale_divides_and_the_line_is_ready_to_paste(tmp_path):
    arrays = save_images(tmp_path, 10)
    notes = []
    found = dataset.measure(tmp_path, scale=255, note=notes.append)
    _, mean, m2, extremes = exact(arrays)
    np.testing.assert_allclose(found.mean, np.array(mean) / 255, rtol=1e-15)
    np.testing.assert_allclose(found.moments.m2, np.array(m2) / 255**2, rtol=1e-15)
    np.testing.assert_allclose(found.extremes, np.array(extremes) / 255, rtol=1e-15)

    class transforms:
        Normalize = staticmethod(lambda mean, std: (mean, std))

    means, stds = eval(found.normalize_line(), {"transforms": transforms})
    assert np.float32(means).tolist() == np.float32(found.mean).tolist()
    assert np.float32(stds).tolist() == np.float32(found.std()).tolist()
    assert not any("scale" in note for note in notes)


@pytest.mark.parametrize(("bits", "most"), [(8, 255), (16, 65535)])
def test_without_a_scale_a_note_gives_the_usual_one(bits, most, tmp_path):
    data = png(pixels(0, 1, dtype=np.uint8 if bits == 8 else np.uint16), 0)
    (tmp_path / "x.png").write_bytes(data)
    notes = []
    dataset.measure(tmp_path, note=notes.append)
    assert any(f"--scale {most}" in note for note in notes)


def test_line_is_refused_for_a_constant_feature():
    found = dataset.measure(np.array([[1.0, 2.0], [1.0, 3.0]]))
    with pytest.raises(ArgumentError, match="feature 0 must have values that differ"):
        found.normalize_line()


# ---- what does not apply ------------------------------------------------------------------------


def test_images_beside_other_data_are_refused_unless_only_names_them(tmp_path):
    arrays = save_images(tmp_path, 3)
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "readme.txt").write_text("no data")
    with pytest.raises(ArgumentError, match=r"labels\.csv.*by only=, --only, or"):
        dataset.measure(tmp_path)
    assert_exact(dataset.measure(tmp_path, only="*.*g"), arrays)
    (tmp_path / "002.jpg").unlink()
    with pytest.raises(ArgumentError, match=r"labels\.csv.*--only '\*\.png'"):
        dataset.measure(tmp_path)
    assert_exact(dataset.measure(tmp_path, only="*.png"), arrays[:2])


@pytest.mark.parametrize(
    "options",
    [
        {"channel_axis": -1},
        {"missing": "skip"},
        {"columns": ["a"]},
        {"numeric": True},
        {"header": False},
        {"separator": ";"},
        {"decimal": ","},
        {"nulls": ["-"]},
        {"array": "x"},
        {"client": object()},
        {"broken": "ignore"},
        {"processes": 0},
        {"processes": 1.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_do_not_apply_to_images_are_refused(options, tmp_path):
    save_images(tmp_path, 2)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        dataset.measure(tmp_path, **options)


@pytest.mark.parametrize("options", [{"broken": "skip"}, {"equal_images": True}, {"processes": 2}])
@pytest.mark.parametrize("where", ["file", "memory"])
def test_options_of_images_are_refused_for_other_data(options, where, tmp_path):
    x = np.ones((3, 2))
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        dataset.measure(x if where == "memory" else tmp_path, **options)


def test_images_are_not_normalized_but_the_line_for_it_is_shown(tmp_path):
    save_images(tmp_path, 5)
    found = dataset.measure(tmp_path, scale=255)
    with pytest.raises(ArgumentError) as caught:
        dataset.normalize(tmp_path, found)
    assert found.normalize_line() in str(caught.value)


def test_without_pillow_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    save_images(tmp_path, 1)
    for name in [name for name in sys.modules if name.split(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BatchNormError, match="pip install pillow adds it"):
        dataset.measure(tmp_path)


# ---- archives -----------------------------------------------------------------------------------


def save_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def npy(x):
    stream = io.BytesIO()
    np.save(stream, x)
    return stream.getvalue()


@pytest.mark.parametrize("processes", [1, 2])
def test_images_in_archives_are_measured_like_those_in_folders(processes, tmp_path, many_processes):
    arrays = save_images(tmp_path / "x", 24)
    files = sorted((tmp_path / "x").iterdir())
    (tmp_path / "tars").mkdir()
    for k in range(2):
        members = [("._junk.png", b"?"), ("folder/", b"")][:1]
        for path in files[k::2]:
            members += [(f"train/{path.name}", path.read_bytes()), (f"train/{path.stem}.cls", b"3")]
        save_tar(tmp_path / "tars" / f"{k}.tar", members)
    notes = []
    found = dataset.measure(tmp_path / "tars", processes=processes, note=notes.append)
    assert_exact(found, arrays)
    assert found.moments == dataset.measure(tmp_path / "x").moments
    assert found.images.darkest[0].name.startswith(str(tmp_path / "tars"))
    assert any("skipped 24 members of archives" in note and "24 of .cls" in note for note in notes)


def test_a_run_over_archives_is_resumed(tmp_path, small_chunks, monkeypatch):
    members = [(f"{k:03}.png", encoded(Image.fromarray(pixels(k)))) for k in range(20)]
    path = save_tar(tmp_path / "x.tar", members)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            dataset.measure(path, out=tmp_path / "s.npz")
    calls = interrupt_after(monkeypatch, 99)
    found = dataset.measure(path, out=tmp_path / "s.npz")
    assert_exact(found, [pixels(k) for k in range(20)])
    assert sum(len(chunk.items) for chunk in calls) < 18


def test_an_image_that_is_twice_in_an_archive_counts_twice(tmp_path):
    data = encoded(Image.fromarray(pixels(0)))
    other = encoded(Image.fromarray(pixels(1)))
    path = save_tar(tmp_path / "x.tar", [("a.png", data), ("b.png", other), ("a.png", data)])
    assert_exact(dataset.measure(path), [pixels(0), pixels(1), pixels(0)])


def test_array_chooses_among_several_images_of_an_example(tmp_path):
    members = []
    for k in range(4):
        members += [(f"{k}.jpg.png", encoded(Image.fromarray(pixels(k))))]
        members += [(f"{k}.seg.png", encoded(Image.fromarray(pixels(k, 1))))]
    path = save_tar(tmp_path / "x.tar", members)
    with pytest.raises(ArgumentError, match=r"several of '/0'.*--array seg\.png"):
        dataset.measure(path)
    assert_exact(dataset.measure(path, array="jpg.png"), [pixels(k) for k in range(4)])
    assert dataset.measure(path, array=".seg.png").names == ("grey",)
    with pytest.raises(ArgumentError, match="whose names end in 'webp', got 4 of"):
        dataset.measure(path, array="webp")


@pytest.mark.parametrize("axis", [1, -1])
def test_arrays_in_archives_are_examples_without_an_axis_of_the_batch(axis, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 * 2 * 5 * 4)
    x = np.random.default_rng(0).normal(5, 2, (20, 2, 5)).astype(np.float32)
    x[7, 1, 3] = np.nan
    members = []
    for k, one in enumerate(x):
        members += [(f"{k:03}.cls", b"1"), (f"{k:03}.npy", npy(one))]
    path = save_tar(tmp_path / "x.tar", members)
    notes = []
    found = dataset.measure(path, channel_axis=axis, missing="skip", note=notes.append)
    whole = dataset.measure(x, channel_axis=axis, missing="skip")
    assert found.missing.tolist() == whole.missing.tolist()
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(found.var(), whole.var(), rtol=1e-13)
    assert any(".cls" in note for note in notes)
    with pytest.raises(ArgumentError, match=r"NaN in feature .* of 007\.npy"):
        dataset.measure(path, channel_axis=axis)


def test_vectors_in_archives_are_rows(tmp_path):
    path = save_tar(tmp_path / "x.tar", [(f"{k}.npy", npy(np.arange(3) + k)) for k in range(4)])
    assert dataset.measure(path).mean.tolist() == [1.5, 2.5, 3.5]


def test_examples_of_other_lengths_are_measured_and_of_other_features_refused(tmp_path):
    arrays = [np.full((2, n), float(n)) for n in (3, 5, 5, 4)]
    path = save_tar(tmp_path / "x.tar", [(f"{k}.npy", npy(a)) for k, a in enumerate(arrays)])
    assert dataset.measure(path).count.tolist() == [17, 17]
    save_tar(path, [("0.npy", npy(np.ones((2, 3)))), ("1.npy", npy(np.ones((3, 3))))])
    with pytest.raises(ShapeError, match=r"1\.npy.*got 3"):
        dataset.measure(path)


def test_archives_of_images_and_arrays_are_refused_unless_one_is_chosen(tmp_path):
    members = []
    for k in range(3):
        members += [(f"{k}.png", encoded(Image.fromarray(pixels(k))))]
        members += [(f"{k}.npy", npy(np.full(4, k)))]
    path = save_tar(tmp_path / "x.tar", members)
    with pytest.raises(ArgumentError, match=r"got 0\.npy.*--array npy"):
        dataset.measure(path)
    assert dataset.measure(path, array="npy").features == 4
    assert_exact(dataset.measure(path, array="png"), [pixels(k) for k in range(3)])


BAD_MEMBERS = {
    "damaged": (b"\x93NUMPY?", "in NumPy's format"),
    "objects": (npy(np.array([{}, 1], object)), "in NumPy's format"),
    "text": (npy(np.array(["a"])), "real numbers"),
    "scalar": (npy(np.array(1.0)), "at least 2 axes"),
    "more": (npy(np.ones(3)) + b"x", "something follows"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_members_that_are_no_examples_are_named(name, tmp_path):
    data, reason = BAD_MEMBERS[name]
    path = save_tar(tmp_path / "x.tar", [("0.npy", npy(np.ones(3))), ("1.npy", data)])
    with pytest.raises(BatchNormError, match=reason) as caught:
        dataset.measure(path)
    assert "1.npy" in str(caught.value)


def damaged_tars(folder):
    members = [(f"{k}.png", encoded(Image.fromarray(pixels(k)))) for k in range(4)]
    whole = save_tar(folder / "whole.tar", members).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    import gzip

    return {
        "empty": b"",
        "cut in a header": whole[: end - 600],
        "cut in a member": whole[: end - 400],
        "cut after a member": whole[:end],
        "damaged header": whole[:1024] + whole[1024:].replace(b"ustar", b"u?tar", 1),
        "two in a row": whole + whole,
        "compressed": gzip.compress(whole),
        "text": b"no archive" * 200,
        "no files": whole[:0] + bytes(10240),
    }


@pytest.mark.parametrize(
    "name",
    [
        "empty",
        "cut in a header",
        "cut in a member",
        "cut after a member",
        "damaged header",
        "two in a row",
        "compressed",
        "text",
        "no files",
    ],
)
def test_damaged_archives_are_refused_in_one_line(name, tmp_path):
    data = damaged_tars(tmp_path)[name]
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ArgumentError, match=r"x\.tar: must") as caught:
        dataset.measure(tmp_path / "x.tar")
    assert "\n" not in str(caught.value)


def test_members_that_are_cut_short_are_not_read(tmp_path):
    (tmp_path / "x.tar").write_bytes(damaged_tars(tmp_path)["cut in a member"])
    found = archives.members(str(tmp_path / "x.tar"))
    assert [next(found).name for _ in range(3)] == ["0.png", "1.png", "2.png"]
    with pytest.raises(ArgumentError, match=r"cut short in 3\.png"):
        next(found)
    names = [member.name for member in archives.members(str(tmp_path / "whole.tar"))]
    assert names == [f"{k}.png" for k in range(4)]


def test_examples_are_stacked_up_to_the_size_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 * 40)
    path = save_tar(tmp_path / "x.tar", [(f"{k}.npy", npy(np.ones(5))) for k in range(8)])
    source = archives.open_arrays_in_tar(str(path), array=None, channel_axis=1)
    assert [block.values.shape for block in source.blocks()] == [(3, 5), (3, 5), (2, 5)]


def test_damage_to_archives_never_escapes_as_another_error(tmp_path):
    draw = random.Random(0)
    members = [(f"{k}.png", encoded(Image.fromarray(pixels(k)))) for k in range(3)]
    images = save_tar(tmp_path / "a.tar", members).read_bytes().rstrip(b"\0") + bytes(1536)
    arrays = save_tar(tmp_path / "b.tar", [(f"{k}.npy", npy(np.ones(3))) for k in range(3)])
    said = []
    for whole in (images, arrays.read_bytes()[:5120]):
        for _ in range(150):
            (tmp_path / "x.tar").write_bytes(damage(whole, draw))
            try:
                dataset.measure(tmp_path / "x.tar", missing="refuse")
            except BatchNormError as error:
                said.append(str(error))
    assert len(said) > 100
    assert not any("\n" in text for text in said)


# ---- addresses ----------------------------------------------------------------------------------


@pytest.fixture
def memory():
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def test_images_at_an_address_are_measured_where_they_are(memory, many_processes):
    for k in range(12):
        memory.pipe(f"/data/{k:02}.png", encoded(Image.fromarray(pixels(k))))
    assert_exact(dataset.measure("memory://data"), [pixels(k) for k in range(12)])


def test_archives_at_an_address_are_measured_where_they_are(memory, tmp_path):
    members = [(f"{k}.png", encoded(Image.fromarray(pixels(k)))) for k in range(6)]
    memory.pipe("/data/x.tar", save_tar(tmp_path / "x.tar", members).read_bytes())
    assert_exact(dataset.measure("memory://data/x.tar"), [pixels(k) for k in range(6)])
    rows = [(f"{k}.npy", npy(np.arange(3) + k)) for k in range(4)]
    memory.pipe("/rows/x.tar", save_tar(tmp_path / "y.tar", rows).read_bytes())
    assert dataset.measure("memory://rows").mean.tolist() == [1.5, 2.5, 3.5]
