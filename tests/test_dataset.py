"""Statistics of files and arrays: exact, whatever the blocks, the layout and what is missing."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import Moments, dataset
from batchnorm.dataset import Statistics, journal, measuring, sources
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError

# Float64 sums of n ≤ 1e4 values, in any order, about a value of the data: n·u with room.
ROUNDING = 1e-12


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 float32, so that small files have many."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 256)
    monkeypatch.setattr(sources, "BLOCK_ROWS", 1)


def exact(x, axis=1):
    """Count, mean and m2 of each feature's values that are no NaN, in extended precision."""
    rows = np.moveaxis(np.asarray(x), axis, 0).reshape(x.shape[axis], -1).astype(np.longdouble)
    there = ~np.isnan(rows)
    count = there.sum(1)
    mean = np.where(there, rows, 0).sum(1) / np.maximum(count, 1)
    m2 = (np.where(there, rows - mean[:, None], 0) ** 2).sum(1)
    return count, mean.astype(float), m2.astype(float)


def assert_exact(found, x, axis=1):
    count, mean, m2 = exact(x, axis)
    np.testing.assert_array_equal(found.count, count)
    spread = np.sqrt(m2 / np.maximum(count, 1))
    assert (abs(found.mean - mean) <= ROUNDING * np.maximum(abs(mean), spread)).all()
    np.testing.assert_allclose(found.moments.m2, m2, rtol=1e-9, atol=1e-300)


def saved(path, x):
    np.save(path, x)
    return path


# ---- arrays in files ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_measure_is_exact_at_any_offset(offset, tmp_path, rng, small_blocks):
    x = (rng.standard_normal((500, 7)) + offset).astype(np.float32)
    assert_exact(dataset.measure(saved(tmp_path / "x.npy", x)), x)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(40, 3), (2, 300), (3, 5, 4, 6), (2, 2, 150), (150, 2, 2)])
def test_measure_takes_every_axis_and_order(shape, order, tmp_path, rng, small_blocks):
    x = np.asarray(rng.normal(5.0, 2.0, shape).astype(np.float32), order=order)
    path = saved(tmp_path / "x.npy", x)
    for axis in range(-1, len(shape)):
        assert_exact(dataset.measure(path, channel_axis=axis), x, axis)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "u2", ">i4", "i8", "?"])
def test_measure_takes_every_real_type(dtype, tmp_path, rng, small_blocks):
    x = rng.integers(0, 2 if dtype == "?" else 100, (60, 3)).astype(dtype)
    assert_exact(dataset.measure(saved(tmp_path / "x.npy", x)), x.astype(float))


def test_measure_takes_bfloat16_as_numpy_saves_it(tmp_path, rng, small_blocks):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = rng.normal(3.0, 1.0, (60, 3)).astype(bfloat16)
    assert_exact(dataset.measure(saved(tmp_path / "x.npy", x)), x.astype(float))


@given(
    rows=st.integers(0, 60),
    features=st.integers(1, 9),
    block=st.sampled_from([8, 24, 100, 1000]),
    seed=st.integers(0, 99),
    gaps=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_measure_counts_what_is_missing_however_blocks_are_cut(
    rows, features, block, seed, gaps, tmp_path_factory
):
    rng = np.random.default_rng(seed)
    x = rng.normal(1e4, 1.0, (rows, features))
    x[rng.random(x.shape) < gaps] = np.nan
    path = saved(tmp_path_factory.mktemp("x") / "x.npy", x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(sources, "BLOCK_ROWS", 1)
        found = dataset.measure(path, missing="skip")
    assert_exact(found, x)
    np.testing.assert_array_equal(found.missing, np.isnan(x).sum(0))


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_measure_of_files_is_that_of_all_their_rows(sizes, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("files")
    parts = [rng.normal(100.0, 3.0, (n, 4)) for n in sizes]
    for k, part in enumerate(parts):
        saved(folder / f"{k}.npy", part)
    found = dataset.measure(folder)
    whole = np.concatenate(parts)
    assert_exact(found, whole)
    assert found.moments.count.shape == ()
    np.testing.assert_allclose(found.mean, Moments.of(whole).mean, rtol=ROUNDING)


def test_measure_of_a_memory_map_is_exact(tmp_path, rng, small_blocks):
    x = rng.normal(3.0, 2.0, (6, 5, 30)).astype(">f4")
    path = saved(tmp_path / "x.npy", x)
    mapped = np.load(path, mmap_mode="r")
    for view in (mapped, mapped[::-2, :, 1::3], mapped.transpose(2, 1, 0)):
        for axis in range(3):
            assert_exact(dataset.measure(view, channel_axis=axis), np.asarray(view, float), axis)


def test_measure_has_the_same_bits_each_time(tmp_path, rng, small_blocks):
    path = saved(tmp_path / "x.npy", rng.standard_normal((5000, 3)))
    assert dataset.measure(path) == dataset.measure(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_measure_streams_the_array_of_an_npz_file(save, tmp_path, rng, small_blocks):
    x = rng.standard_normal((300, 5))
    save(tmp_path / "x.npz", x=x, other=np.zeros(3))
    assert_exact(dataset.measure(tmp_path / "x.npz", array="x"), x)


def test_measure_defines_no_rows_and_no_features(tmp_path):
    found = dataset.measure(saved(tmp_path / "x.npy", np.ones((0, 3))))
    assert found.count.tolist() == [0, 0, 0]
    assert np.isnan(found.var()).all()
    assert dataset.measure(saved(tmp_path / "y.npy", np.ones((5, 0)))).features == 0


def test_measure_keeps_the_order_given(tmp_path):
    paths = [saved(tmp_path / name, np.ones((2, 1))) for name in ("b.npy", "a.npy")]
    assert dataset.measure(paths).files == tuple(map(str, paths))


def test_measure_finds_files_in_folders_by_name_without_hidden_ones(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.npy", "a.npy", ".hidden.npy", "_part.npy", "deep/c.npy"):
        saved(tmp_path / name, np.ones((2, 1)))
    (tmp_path / "readme.txt").write_text("")
    files = dataset.measure(tmp_path).files
    assert [Path(f).name for f in files] == ["a.npy", "b.npy", "c.npy"]


def test_measure_twice_into_the_folder_it_reads_ignores_what_it_wrote(tmp_path):
    saved(tmp_path / "a.npy", np.ones((2, 1)))
    first = dataset.measure(tmp_path, out=tmp_path / "stats.npz")
    assert dataset.measure(tmp_path, out=tmp_path / "stats.npz") == first


# ---- what cannot be measured --------------------------------------------------------------------


def test_measure_refuses_missing_values_and_says_where(tmp_path, small_blocks):
    x = np.ones((100, 4))
    x[50, 2] = x[51, 2] = np.nan
    with pytest.raises(ArgumentError, match=r"x\.npy.* NaN in feature 2 at index \(50, 2\), 2 in"):
        dataset.measure(saved(tmp_path / "x.npy", x))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_measure_says_where_infinity_is(axis, order, tmp_path, small_blocks):
    x = np.zeros((9, 8, 7), order=order)
    x[4, 5, 6] = -np.inf
    said = rf"finite, got -inf in feature {(4, 5, 6)[axis]} at index \(4, 5, 6\)"
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(saved(tmp_path / "x.npy", x), channel_axis=axis, missing="skip")
    with pytest.raises(ArgumentError, match=said):
        dataset.measure(x, channel_axis=axis)


def test_measure_refuses_values_whose_squares_overflow(tmp_path):
    x = np.array([[1.0, 1e200], [1.0, -1e200]])
    with pytest.raises(ArgumentError, match="too large, the squares of feature 1"):
        dataset.measure(saved(tmp_path / "x.npy", x))


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (np.ones(3), ShapeError, r"at least 2 axes.*got shape \(3,\).*x\[:, None\]"),
        (np.ones((3, 2), complex), DTypeError, "real numbers.*complex128"),
        (np.array([["a", "b"]]), DTypeError, "real numbers.*U1"),
        (np.array([[None, 1]]), DTypeError, "real numbers.*object"),
        (np.ones((3, 2), "f4,f4"), DTypeError, "real numbers"),
    ],
    ids=["1-D", "complex", "text", "objects", "records"],
)
def test_measure_refuses_what_has_no_statistics(x, error, said, tmp_path):
    with pytest.raises(error, match=said):
        dataset.measure(saved(tmp_path / "x.npy", x))


def _cut_short(path):
    saved(path, np.ones((10, 10)))
    with path.open("r+b") as file:
        file.truncate(500)


def _no_zip(path):
    path.write_bytes(b"PK of a kind")


def _two(path):
    np.savez(path, a=np.ones((2, 2)), b=np.ones((2, 2)))


def _damaged(path, save=np.savez):
    save(path, a=np.random.default_rng(0).standard_normal((2000, 2)))
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("x.npy", lambda p: p.write_bytes(b"text"), "NumPy's format"),
        ("x.npy", lambda p: p.write_bytes(b""), "NumPy's format"),
        ("x.npy", _cut_short, r"must have 928 bytes .* got 500.*cut short"),
        ("x.npz", _no_zip, r"must be a \.npz file"),
        ("x.npz", _two, "must hold one array.*2: a, b"),
        ("x.npz", _damaged, r"must be a \.npz file, and is not or is damaged"),
        ("x.npz", lambda p: _damaged(p, np.savez_compressed), "and is not or is damaged"),
        ("x.txt", lambda p: p.write_text("1"), r"must be a \.npy, \.npz, \.csv or \.parquet"),
        ("x.npy", lambda p: None, "there is no such file"),
        ("x.npy", lambda p: p.mkdir(), "holds none"),
    ],
    ids=[
        "text",
        "empty",
        "cut",
        "no zip",
        "two",
        "damaged",
        "packed",
        "suffix",
        "absent",
        "folder",
    ],
)
def test_measure_refuses_files_that_are_not_what_they_should_be(name, make, said, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ArgumentError, match=said) as caught:
        dataset.measure(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may read everything")
def test_measure_names_a_file_that_may_not_be_read(tmp_path):
    saved(tmp_path / "x.npy", np.ones((2, 2))).chmod(0)
    with pytest.raises(ArgumentError, match="cannot be read"):
        dataset.measure(tmp_path / "x.npy")


def test_measure_says_that_a_file_shrank_while_it_was_read(tmp_path, small_blocks):
    path = saved(tmp_path / "x.npy", np.ones((100, 10)))

    def shrink(name, done, whole):
        os.truncate(path, 4000)

    with pytest.raises(ArgumentError, match="ended while it was read"):
        dataset.measure(path, progress=shrink)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"missing": "drop"}, ArgumentError, "'refuse' or 'skip', got 'drop'"),
        ({"channel_axis": 2}, ShapeError, r"no axis 2, its shape is \(2, 2\)"),
        ({"array": "x"}, ArgumentError, r"\.npz"),
        ({"columns": ["a"]}, ArgumentError, "no named columns"),
        ({"columns": "a"}, ArgumentError, "must be a list of names"),
        ({"out": "s.txt"}, ArgumentError, r"\.npz or \.json"),
        ({"out": "none/s.npz"}, ArgumentError, "existing directory"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_measure_refuses_unusable_arguments(options, error, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        dataset.measure(saved(tmp_path / "x.npy", np.ones((2, 2))), **options)


def test_measure_refuses_files_of_different_features_before_it_reads_any(tmp_path):
    a = saved(tmp_path / "a.npy", np.full((2, 3), np.nan))
    b = saved(tmp_path / "b.npy", np.ones((2, 4)))
    with pytest.raises(ShapeError, match=r"b\.npy: .* as .*a\.npy, 3, got 4"):
        dataset.measure([a, b])


def test_measure_refuses_a_file_that_is_named_twice(tmp_path):
    saved(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(ArgumentError, match="named twice"):
        dataset.measure([tmp_path / "a.npy", tmp_path])


# ---- interrupted, and begun again ---------------------------------------------------------------


@pytest.fixture
def three_files(tmp_path, rng):
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(3):
        x = rng.normal(1e4, 1.0, (200, 3))
        x[k, 1] = np.nan
        saved(folder / f"{k}.npy", x)
    return folder


def interrupt_in(name):
    """Progress that is interrupted in the middle of a file."""

    def progress(label, done, whole):
        if Path(label).name == name and done % (200 * 3 * 8):
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def interrupted(three_files, tmp_path, small_blocks):
    """A run that ended in the middle of the last of three files."""
    out = tmp_path / "stats.npz"
    with pytest.raises(KeyboardInterrupt):
        dataset.measure(three_files, missing="skip", out=out, progress=interrupt_in("2.npy"))
    return three_files, out


def read_by(folder, out, **options):
    """Statistics, the files that were read for them, and what was said."""
    read, notes = [], []
    found = dataset.measure(
        folder,
        missing="skip",
        out=out,
        progress=lambda label, done, whole: read.append(Path(label).name),
        note=notes.append,
        **options,
    )
    return found, sorted(set(read)), notes


def test_measure_goes_on_after_the_files_that_were_done(interrupted):
    folder, out = interrupted
    assert not out.exists()
    found, read, notes = read_by(folder, out)
    assert read == ["2.npy"]
    assert len(notes) == 1
    assert "2 of 3 files" in notes[0]
    assert found == dataset.measure(folder, missing="skip")
    assert sorted(p.name for p in out.parent.iterdir()) == ["data", "stats.npz"]


def test_measure_reads_a_file_again_that_has_changed(interrupted, rng):
    folder, out = interrupted
    saved(folder / "0.npy", rng.standard_normal((100, 3)))
    found, read, _ = read_by(folder, out)
    assert read == ["0.npy", "2.npy"]
    assert found == dataset.measure(folder, missing="skip")


def test_measure_begins_anew_with_other_options(interrupted):
    folder, out = interrupted
    _, read, notes = read_by(folder, out, channel_axis=-1)
    assert read == ["0.npy", "1.npy", "2.npy"]
    assert notes == []


def test_measure_ignores_a_line_that_was_torn(interrupted):
    folder, out = interrupted
    kept = out.with_name("stats.npz.partial")
    kept.write_text(kept.read_text()[:-30])
    found, read, _ = read_by(folder, out)
    assert read == ["1.npy", "2.npy"]
    assert found == dataset.measure(folder, missing="skip")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}\n{}\n", b"[]\n1\n"])
def test_measure_ignores_a_journal_that_is_none(content, three_files, tmp_path):
    (tmp_path / "stats.npz.partial").write_bytes(content)
    _, read, _ = read_by(three_files, tmp_path / "stats.npz")
    assert len(read) == 3


def test_journal_refuses_numbers_that_do_not_fit(interrupted):
    folder, out = interrupted
    kept = out.with_name("stats.npz.partial")
    lines = kept.read_text().splitlines()
    entry = json.loads(lines[1])
    entry["mean"] = [0.0]
    kept.write_text("\n".join([lines[0], json.dumps(entry), *lines[2:], ""]))
    _, read, _ = read_by(folder, out)
    assert read == ["0.npy", "2.npy"]


def test_measure_of_one_file_leaves_nothing_when_interrupted(tmp_path, small_blocks):
    path = saved(tmp_path / "x.npy", np.ones((200, 3)))
    with pytest.raises(KeyboardInterrupt):
        dataset.measure(path, out=tmp_path / "s.npz", progress=interrupt_in("x.npy"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_measure_keeps_what_is_done_when_the_result_cannot_be_saved(
    three_files, tmp_path, monkeypatch
):
    def full(*_):
        raise ArgumentError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Statistics, "save", full)
        with pytest.raises(ArgumentError, match="no space left"):
            dataset.measure(three_files, missing="skip", out=tmp_path / "s.npz")
    _, read, _ = read_by(three_files, tmp_path / "s.npz")
    assert read == ["2.npy"]


def test_journal_names_itself_when_it_cannot_be_written(three_files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "replacing", full)
    with pytest.raises(ArgumentError, match=r"s\.npz\.partial: cannot be written \(No space"):
        dataset.measure(three_files, missing="skip", out=tmp_path / "s.npz")


# ---- the value ----------------------------------------------------------------------------------


def some_statistics(names=("a", "b", "c")):
    x = np.random.default_rng(0).normal(1e4, 1.0, (50, 3))
    x[:, 2] = np.nan
    x[3, 1] = np.nan
    found = dataset.measure(x, missing="skip")
    return Statistics(found.moments, found.missing, names, -1, ("x.npy", "y.npy"))


@pytest.mark.parametrize("name", ["s.npz", "s.json"])
@pytest.mark.parametrize("names", [None, ("a", "b", "ä")])
def test_statistics_come_back_to_the_last_bit(name, names, tmp_path):
    before = some_statistics(names)
    before.save(tmp_path / name)
    assert Statistics.load(tmp_path / name) == before


@pytest.mark.parametrize("name", ["s.npz", "s.json"])
def test_statistics_of_complete_data_come_back(name, tmp_path):
    before = dataset.measure(np.arange(12.0).reshape(4, 3))
    before.save(tmp_path / name)
    assert Statistics.load(tmp_path / name) == before


def test_statistics_are_plain_json(tmp_path):
    some_statistics().save(tmp_path / "s.json")

    def refuse(constant):
        pytest.fail(constant)

    content = json.loads((tmp_path / "s.json").read_text(), parse_constant=refuse)
    assert content["missing"] == [0, 1, 50]
    assert content["var"][2] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.json", b"{}"),
        ("s.json", b"[1]"),
        ("s.json", b"not json"),
        ("s.json", b'{"format": "batchnorm statistics 1", "mean": [1.0]}'),
        ("s.npz", b"not a zip"),
    ],
)
def test_statistics_refuse_a_file_that_holds_none(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match="must hold statistics") as caught:
        Statistics.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_statistics_refuse_a_data_file(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones(3))
    with pytest.raises(ArgumentError, match="must hold statistics"):
        Statistics.load(tmp_path / "x.npz")


def test_statistics_refuse_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ArgumentError, match="cannot be read"):
        Statistics.load(tmp_path / "s.npz")


def test_statistics_refuse_another_number_of_names_or_gaps():
    moments = Moments.of(np.ones((2, 3)))
    with pytest.raises(ShapeError, match="missing must have shape"):
        Statistics(moments, np.zeros(2, int))
    with pytest.raises(ShapeError, match="names must be one for each of 3"):
        Statistics(moments, np.zeros(3, int), ("a",))


def test_statistics_are_not_equal_to_others():
    found = some_statistics()
    assert found != some_statistics(None)
    assert found != 1
    assert "3 features" in repr(found)


# ---- normalize ----------------------------------------------------------------------------------


def textbook(x, found, eps, axis=1):
    shape = [1] * x.ndim
    shape[axis] = -1
    wide = x.astype(np.longdouble)
    return (wide - found.mean.reshape(shape)) / np.sqrt(found.var().reshape(shape) + eps)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_normalize_writes_each_value_in_its_place(axis, order, tmp_path, rng, small_blocks):
    x = np.asarray(rng.normal(1e4, 2.0, (6, 5, 70)).astype(np.float32), order=order)
    path = saved(tmp_path / "x.npy", x)
    found = dataset.measure(path, channel_axis=axis)
    dataset.normalize(path, found, tmp_path / "y.npy")
    y = np.load(tmp_path / "y.npy")
    assert y.dtype == np.float32
    assert y.flags.f_contiguous == x.flags.f_contiguous
    expected = textbook(x, found, 1e-5, axis % 3)
    assert (abs(y - expected) <= 1e-6 * np.maximum(1, abs(expected))).all()


@pytest.mark.parametrize(
    ("given", "asked", "got"),
    [
        ("f2", None, "f2"),
        (">f8", None, "f8"),
        ("i4", None, "f8"),
        ("i4", "f4", "f4"),
        ("f2", "f8", "f8"),
        ("f8", "f4", "f4"),
    ],
)
def test_normalize_gives_the_type_of_the_data_or_the_one_asked_for(given, asked, got, tmp_path):
    x = np.arange(60).reshape(20, 3).astype(given)
    path = saved(tmp_path / "x.npy", x)
    found = dataset.measure(path)
    dataset.normalize(path, found, tmp_path / "y.npy", dtype=asked)
    y = np.load(tmp_path / "y.npy")
    assert y.dtype == np.dtype(got)
    tolerance = 4 * np.finfo(y.dtype).eps
    np.testing.assert_allclose(y.astype(float), textbook(x, found, 1e-5), rtol=0, atol=tolerance)
    np.testing.assert_array_equal(dataset.normalize(x, found, dtype=asked), y)


def test_normalize_keeps_bfloat16(tmp_path, rng, small_blocks):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = rng.normal(3.0, 1.0, (60, 3)).astype(bfloat16)
    path = saved(tmp_path / "x.npy", x)
    found = dataset.measure(path)
    dataset.normalize(path, found, tmp_path / "y.npy")
    y = np.load(tmp_path / "y.npy").view(bfloat16).astype(float)
    np.testing.assert_allclose(y, textbook(x, found, 1e-5).astype(float), rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize("names", [("x.npz", "y.npz"), ("x.npz", "y.npy"), ("x.npy", "y.npz")])
def test_normalize_takes_and_writes_npz(names, tmp_path, rng, small_blocks):
    x = rng.standard_normal((300, 5))
    source, out = (tmp_path / name for name in names)
    if source.suffix == ".npz":
        np.savez_compressed(source, x=x)
    else:
        np.save(source, x)
    found = dataset.measure(source)
    dataset.normalize(source, found, out)
    y = np.load(out)
    if out.suffix == ".npz":
        (name,) = y.files
        assert name == ("x" if source.suffix == ".npz" else "arr_0")
        y = y[name]
        compressed = zipfile.ZipFile(out).infolist()[0].compress_type == zipfile.ZIP_DEFLATED
        assert compressed == (source.suffix == ".npz")
    np.testing.assert_array_equal(y, dataset.normalize(x, found))


def test_normalize_keeps_missing_values_and_gives_zero_for_a_constant():
    x = np.array([[1.0, 7.0, np.nan], [np.nan, 7.0, np.nan], [3.0, 7.0, np.nan]])
    y = dataset.normalize(x, dataset.measure(x, missing="skip"), eps=1e-12)
    np.testing.assert_allclose(y[:, 0], [-1, np.nan, 1])
    np.testing.assert_array_equal(y[:, 1], 0)
    assert np.isnan(y[:, 2]).all()


def test_normalize_gives_nan_for_a_feature_never_seen():
    found = dataset.measure(np.array([[1.0, np.nan], [2.0, np.nan]]), missing="skip")
    assert np.isnan(dataset.normalize(np.ones((2, 2)), found)[:, 1]).all()


def test_normalize_of_a_folder_gives_a_folder(tmp_path, rng):
    for name in ("a.npy", "deep/b.npy"):
        path = tmp_path / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.standard_normal((20, 3)))
    found = dataset.measure(tmp_path / "x")
    dataset.normalize(tmp_path / "x", found, tmp_path / "y")
    again = dataset.measure(tmp_path / "y")
    assert [Path(f).relative_to(tmp_path / "y").as_posix() for f in again.files] == [
        "a.npy",
        "deep/b.npy",
    ]
    np.testing.assert_allclose(again.mean, 0, atol=1e-15)


def test_normalize_leaves_no_file_when_interrupted(tmp_path, small_blocks):
    path = saved(tmp_path / "x.npy", np.arange(600.0).reshape(200, 3))
    found = dataset.measure(path)
    (tmp_path / "y.npy").write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        dataset.normalize(path, found, tmp_path / "y.npy", progress=interrupt_in("x.npy"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "y.npy"]
    assert (tmp_path / "y.npy").read_text() == "earlier"


def test_normalize_refuses_a_constant_feature_without_eps():
    x = np.array([[1.0, 5.0], [2.0, 5.0]])
    with pytest.raises(ArgumentError, match="eps must be above zero, got 0: feature 1 is const"):
        dataset.normalize(x, dataset.measure(x), eps=0.0)


def test_normalize_refuses_unusable_arguments(tmp_path):
    path = saved(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    found = dataset.measure(path)
    cases = [
        ((path, found), {}, "out must be the file to write"),
        ((path, found, path), {}, "must not be the file that is read"),
        ((path, found, tmp_path / "y.csv"), {}, r"end in \.npy or \.npz"),
        ((path, found, tmp_path), {}, "end in"),
        ((path, found, tmp_path / "no" / "y.npy"), {}, "existing directory"),
        ((path, found, tmp_path / "y.npy"), {"eps": -1}, "eps must be"),
        ((path, found, tmp_path / "y.npy"), {"dtype": "i4"}, "dtype must be"),
        ((path, found, tmp_path / "y.npy"), {"dtype": "floaty"}, "dtype must be"),
        ((path, found, tmp_path / "y.npy"), {"channel_axis": 0}, "as many features"),
        ((np.ones((3, 3)), found), {}, "as many features"),
        ((np.ones((3, 2)), found, path), {}, "out must be None"),
        (([path, path], found, path), {}, "one file or folder, got 2"),
        ((tmp_path, found, tmp_path / "y"), {}, "outside the folder"),
        ((tmp_path, found, path), {}, "out must be a folder"),
    ]
    for arguments, options, said in cases:
        with pytest.raises(BatchNormError, match=said):
            dataset.normalize(*arguments, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


# ---- reading ahead ------------------------------------------------------------------------------


def test_ahead_passes_on_what_is_raised_and_closes():
    closed = []

    def items():
        try:
            yield 1
            raise OSError("gone")
        finally:
            closed.append(True)

    ahead = sources.ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    assert closed == [True]


def test_ahead_closes_what_it_was_reading_when_it_is_left():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    ahead = sources.ahead(items())
    next(ahead)
    ahead.close()
    assert closed == [True]


def test_measure_tells_how_far_it_is(tmp_path, small_blocks):
    path = saved(tmp_path / "x.npy", np.ones((100, 10)))
    told = []
    dataset.measure(path, progress=lambda *given: told.append(given))
    assert told[0] == (str(path), 0, 8000)
    assert told[-1] == (str(path), 8000, 8000)
    assert [t[1] for t in told] == sorted(t[1] for t in told)


def test_paths_and_arrays_are_not_mixed(tmp_path):
    with pytest.raises(ArgumentError, match="paths or one array"):
        measuring.as_paths([tmp_path, np.ones(3)])
