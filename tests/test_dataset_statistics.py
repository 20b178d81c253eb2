"""Statistics that add up, carry a scale and extremes, and normalization that can be undone."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import Moments, dataset
from batchnorm.dataset import Statistics, parts
from batchnorm.dataset.sources import arrays, blocks
from batchnorm.errors import ArgumentError, BatchNormError, ShapeError


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    monkeypatch.setattr(arrays, "BLOCK_ROWS", 1)


def saved(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x)
    return path


def assert_close(found, expected, rtol=1e-12):
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.missing, expected.missing)
    spread = np.maximum(abs(expected.mean), np.nan_to_num(expected.std()))
    assert (abs(found.mean - expected.mean) <= rtol * spread).all()
    np.testing.assert_allclose(found.moments.m2, expected.moments.m2, rtol=1e-9, atol=1e-300)


# ---- sums ---------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    seed=st.integers(0, 999),
    gaps=st.sampled_from([0.0, 0.2, 1.0]),
    how=st.sampled_from(["merge", "sum", "plus", "generator"]),
)
def test_merged_pieces_equal_the_whole(sizes, seed, gaps, how):
    rng = np.random.default_rng(seed)
    pieces = [rng.normal(1e4, 1.0, (n, 3)) for n in sizes]
    for piece in pieces:
        piece[rng.random(piece.shape) < gaps] = np.nan
    options = {"missing": "skip", "extremes": True, "scale": 4.0}
    several = [dataset.measure(piece, **options) for piece in pieces]
    if how == "merge":
        found = dataset.merge(several)
    elif how == "generator":
        found = dataset.merge(s for s in several)
    elif how == "sum":
        found = sum(several)
    else:
        found = several[0]
        for other in several[1:]:
            found += other
    expected = dataset.measure(np.concatenate(pieces), **options)
    assert_close(found, expected)
    assert found.scale == 4.0
    np.testing.assert_array_equal(found.extremes, expected.extremes)


def test_merging_has_the_bits_of_files_measured_together(tmp_path, rng):
    paths = [saved(tmp_path / f"{k}.npy", rng.standard_normal((20, 3))) for k in range(7)]
    assert dataset.merge(map(dataset.measure, paths)) == dataset.measure(paths)


def test_merging_keeps_names_and_files(rng):
    moments = Moments.of(rng.standard_normal((5, 2)))
    none = np.zeros(2, int)
    a = Statistics(moments, none, None, 1, ("a.npy",))
    b = Statistics(moments, none, ("u", "v"), 1, ("b.csv", "c.csv"))
    for found in (a + b, b + a, sum([a, b])):
        assert found.names == ("u", "v")
        assert found.count.tolist() == [10, 10]
    assert (a + b).files == ("a.npy", "b.csv", "c.csv")
    assert dataset.merge([a]) == a
    assert sum([a]) == a


def test_extremes_that_one_part_lacks_are_not_known():
    x = np.arange(6.0).reshape(3, 2)
    with_extremes, without = dataset.measure(x, extremes=True), dataset.measure(x)
    assert (with_extremes + without).extremes is None
    empty = dataset.measure(x[:0])
    assert (with_extremes + empty).extremes.tolist() == [[0, 1], [4, 5]]
    assert (empty + with_extremes).extremes.tolist() == [[0, 1], [4, 5]]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"moments": Moments.of(np.ones((2, 3)))}, ShapeError, "same number of features, got 2 an"),
        ({"names": ("a", "c")}, ArgumentError, r"same names, got \('a', 'b'\) and \('a', 'c'\)"),
        ({"channel_axis": -1}, ArgumentError, "same channel_axis, got 1 and -1"),
        ({"scale": 255.0}, ArgumentError, r"same scale, got 1\.0 and 255\.0"),
    ],
    ids=str,
)
def test_statistics_of_other_data_are_not_merged(change, error, said):
    fields = {"moments": Moments.of(np.ones((2, 2))), "names": ("a", "b")}
    first = Statistics(missing=np.zeros(2, int), **fields)
    features = 3 if "moments" in change else 2
    fields |= {"names": None} if "moments" in change else {}
    other = Statistics(missing=np.zeros(features, int), **(fields | change))
    for merge in (lambda: first + other, lambda: sum([first, other])):
        with pytest.raises(error, match=said):
            merge()


def test_what_is_no_statistics_is_not_merged():
    found = dataset.measure(np.eye(2))
    with pytest.raises(ArgumentError, match="at least one Statistics, got none"):
        dataset.merge([])
    with pytest.raises(ArgumentError, match="several must be Statistics, got Moments"):
        dataset.merge([found, found.moments])
    for wrong in (lambda: found + 1, lambda: 1 + found, lambda: found + found.moments):
        with pytest.raises(TypeError):
            wrong()


def test_merging_many_statistics_merges_in_pairs(rng, monkeypatch):
    """Rounding grows with the logarithm of their number."""
    several = [dataset.measure(rng.normal(1e4, 1.0, (3, 2))) for _ in range(64)]
    depths = {}

    def counted(a, b):
        merged = merge_pair(a, b)
        depths[id(merged.moments)] = 1 + max(depths.get(id(p.moments), 0) for p in (a, b))
        kept.append(merged)
        return merged

    kept, merge_pair = [], parts.merge_pair
    monkeypatch.setattr(parts, "merge_pair", counted)
    dataset.merge(several)
    assert max(depths.values()) == 6


def test_sums_survive_saving(tmp_path, rng):
    x = rng.standard_normal((40, 3))
    for name in ("a.npz", "b.json"):
        rows = x[:10] if name == "a.npz" else x[10:]
        dataset.measure(rows, scale=2.0, extremes=True).save(tmp_path / name)
    found = dataset.merge(Statistics.load(tmp_path / name) for name in ("a.npz", "b.json"))
    assert_close(found, dataset.measure(x, scale=2.0))
    found.save(tmp_path / "c.npz")
    assert Statistics.load(tmp_path / "c.npz") == found


# ---- scale --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8"])
@pytest.mark.parametrize("scale", [255, 1e-3, 7.0])
def test_scale_divides_the_values(dtype, scale, rng):
    x = rng.integers(0, 256, (500, 3)).astype(dtype)
    found = dataset.measure(x, scale=scale, extremes=True)
    wide = x.astype(float) / scale
    expected = dataset.measure(wide)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(found.std(), expected.std(), rtol=1e-14)
    np.testing.assert_allclose(found.extremes, [wide.min(0), wide.max(0)], rtol=1e-15)
    y = dataset.normalize(x, found, eps=1e-3, dtype="f8")
    z = (wide - found.mean) / np.sqrt(found.var() + 1e-3)
    np.testing.assert_allclose(y, z, rtol=1e-12, atol=1e-12)


def test_scale_holds_for_files_folders_and_resumed_runs(tmp_path, rng):
    for k in range(3):
        saved(tmp_path / "x" / f"{k}.npy", rng.integers(0, 256, (50, 3)).astype("u1"))
    expected = dataset.measure(tmp_path / "x").divided_by(255)

    def interrupt(label, done, whole):
        if label.endswith("2.npy"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.measure(tmp_path / "x", out=tmp_path / "s.npz", scale=3, progress=interrupt)
    notes = []
    found = dataset.measure(tmp_path / "x", out=tmp_path / "s.npz", scale=255, note=notes.append)
    assert found == expected
    assert "2 of 3 files" in notes[0]
    assert Statistics.load(tmp_path / "s.npz").scale == 255


@pytest.mark.parametrize("scale", [0, -1, np.nan, np.inf, None, "wide", [1, 2]], ids=str)
def test_a_scale_that_is_no_number_above_zero_is_refused(scale):
    with pytest.raises(ArgumentError, match="scale must be a number above zero"):
        dataset.measure(np.eye(2), scale=scale)


def test_a_scale_that_leaves_no_finite_values_is_refused():
    x = np.array([[1.0], [3.0]])
    for scale in (1e-300, 1e300):
        with pytest.raises(ArgumentError, match="scale"):
            dataset.measure(x, scale=scale)


# ---- extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "bfloat16", "f4", "f8", ">f4", "u1", "i8", "?"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_extremes_are_the_least_and_greatest_values(dtype, axis, tmp_path, rng, small_blocks):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = rng.integers(0, 2 if dtype == "?" else 100, (9, 8, 7)).astype(dtype)
    others = tuple({0, 1, 2} - {axis})
    expected = np.stack([x.astype(float).min(others), x.astype(float).max(others)])
    path = saved(tmp_path / "x.npy", x)
    for source in (x, path, [path, saved(tmp_path / "y.npy", x)], [x, x]):
        found = dataset.measure(source, channel_axis=axis, extremes=True)
        np.testing.assert_array_equal(found.extremes, expected)
        assert found.extremes.dtype == np.float64
        assert dataset.measure(source, channel_axis=axis).extremes is None


def test_extremes_leave_missing_values_out(tmp_path, rng, small_blocks):
    x = rng.standard_normal((60, 3)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = np.nan
    x[:, 2] = np.nan
    x[:30, 1] = np.nan  # whole blocks of one feature
    for source in (x, saved(tmp_path / "x.npy", x)):
        found = dataset.measure(source, missing="skip", extremes=True)
        with np.errstate(invalid="ignore"):
            expected = [np.fmin.reduce(x), np.fmax.reduce(x)]
        np.testing.assert_array_equal(found.extremes, expected)
    for name in ("s.npz", "s.json"):
        found.save(tmp_path / name)
        assert Statistics.load(tmp_path / name) == found


def test_extremes_of_no_values_are_undefined(tmp_path):
    for source in (np.ones((0, 3)), saved(tmp_path / "x.npy", np.ones((0, 3)))):
        found = dataset.measure(source, extremes=True)
        assert np.isnan(found.extremes).all()
        assert found.extremes.shape == (2, 3)
    full = saved(tmp_path / "y.npy", np.ones((2, 3)))
    found = dataset.measure([tmp_path / "x.npy", full], extremes=True)
    assert found.extremes.tolist() == [[1, 1, 1]] * 2


def test_extremes_of_blocks_that_hold_some_features(tmp_path, rng, small_blocks):
    x = rng.standard_normal((3, 5000))
    found = dataset.measure(saved(tmp_path / "x.npy", x), extremes=True)
    np.testing.assert_array_equal(found.extremes, [x.min(0), x.max(0)])


@pytest.mark.parametrize("chunks", [(50, 6), (7, 6), (50, 4), (7, 4)])
def test_extremes_of_a_dask_array(chunks, rng):
    da = pytest.importorskip("dask.array")
    x = rng.standard_normal((50, 6))
    x[3, 2] = np.nan
    found = dataset.measure(da.from_array(x, chunks=chunks), missing="skip", extremes=True)
    np.testing.assert_array_equal(found.extremes, [np.nanmin(x, 0), np.nanmax(x, 0)])


def test_extremes_survive_an_interruption(tmp_path, rng):
    values = rng.standard_normal((90, 3))
    values[:30, 1] = np.nan
    for k in range(3):
        saved(tmp_path / "x" / f"{k}.npy", values[30 * k : 30 * k + 30])
    options = {"missing": "skip", "extremes": True}

    def interrupt(label, done, whole):
        if label.endswith("2.npy"):
            raise KeyboardInterrupt

    for first in (options, {"missing": "skip"}):
        with pytest.raises(KeyboardInterrupt):
            dataset.measure(tmp_path / "x", out=tmp_path / "s.npz", progress=interrupt, **first)
        notes = []
        found = dataset.measure(
            tmp_path / "x", out=tmp_path / "s.npz", note=notes.append, **options
        )
        assert len(notes) == ("extremes" in first)  # what has none is measured anew
        np.testing.assert_array_equal(
            found.extremes, [np.fmin.reduce(values), np.fmax.reduce(values)]
        )


def test_statistics_refuse_extremes_of_another_shape():
    with pytest.raises(ShapeError, match=r"extremes must have shape \(2, 3\), got \(3, 2\)"):
        Statistics(Moments.of(np.ones((2, 3))), np.zeros(3, int), extremes=np.ones((3, 2)))


# ---- and back -----------------------------------------------------------------------------------


def with_oddities(rng):
    """A feature with gaps, a constant one, and a large mean."""
    x = rng.normal([0.0, 1e4, -3.0], [1.0, 2.0, 1e-3], (80, 3))
    x[::7, 0] = np.nan
    return np.concatenate([x, np.full((80, 1), 7.0)], axis=1)


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_inverse_returns_arrays(eps, scale, rng):
    x = with_oddities(rng)
    found = dataset.measure(x, missing="skip", scale=scale)
    y = dataset.normalize(x, found, eps=eps)
    back = dataset.normalize(y, found, inverse=True, eps=eps)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(x))
    np.testing.assert_array_equal(back[:, 3], 7.0)
    np.testing.assert_allclose(back, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16"])
def test_inverse_returns_arrays_of_each_type(dtype, rng):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = rng.normal(3.0, 2.0, (50, 4)).astype(dtype)
    found = dataset.measure(x)
    back = dataset.normalize(dataset.normalize(x, found), found, inverse=True)
    assert back.dtype == x.dtype
    unit = {2: 2.0**-7, 4: 2.0**-23, 8: 2.0**-52}[x.dtype.itemsize]
    error = abs(back.astype(float) - x.astype(float))
    assert (error <= 4 * unit * (abs(x.astype(float)) + 2)).all()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_inverse_returns_files_and_folders(axis, order, tmp_path, rng, small_blocks):
    x = np.asarray(rng.normal(5.0, 2.0, (6, 5, 70)), order=order)
    saved(tmp_path / "x" / "a.npy", x)
    (tmp_path / "x" / "deep").mkdir()
    np.savez(tmp_path / "x" / "deep" / "b.npz", x=x + 1)
    found = dataset.measure(tmp_path / "x", channel_axis=axis)
    dataset.normalize(tmp_path / "x", found, tmp_path / "y")
    dataset.normalize(tmp_path / "y", found, tmp_path / "z", inverse=True)
    np.testing.assert_allclose(np.load(tmp_path / "z" / "a.npy"), x, rtol=1e-13)
    np.testing.assert_allclose(np.load(tmp_path / "z" / "deep" / "b.npz")["x"], x + 1, atol=1e-13)
    dataset.normalize(tmp_path / "y" / "a.npy", found, tmp_path / "a.npy", inverse=True)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "z" / "a.npy"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_inverse_returns_tables(suffix, tmp_path, rng):
    pa = pytest.importorskip("pyarrow")
    csv, parquet = pytest.importorskip("pyarrow.csv"), pytest.importorskip("pyarrow.parquet")
    x = with_oddities(rng)
    columns = {name: pa.array(x[:, k], from_pandas=True) for k, name in enumerate("abcd")}
    table = pa.table(columns | {"label": pa.array([f"row {k}" for k in range(80)])})
    write = csv.write_csv if suffix == ".csv" else parquet.write_table
    write(table, str(tmp_path / f"x{suffix}"))
    found = dataset.measure(tmp_path / f"x{suffix}", columns=list("abcd"), missing="skip")
    dataset.normalize(tmp_path / f"x{suffix}", found, tmp_path / f"y{suffix}")
    dataset.normalize(tmp_path / f"y{suffix}", found, tmp_path / f"z{suffix}", inverse=True)
    read = csv.read_csv if suffix == ".csv" else parquet.read_table
    back = read(str(tmp_path / f"z{suffix}"))
    assert back["label"] == table["label"]
    for k, name in enumerate("abcd"):
        values = back[name].to_numpy()
        np.testing.assert_allclose(values.astype(float), x[:, k], rtol=1e-13, atol=1e-13)


def test_inverse_of_a_dask_array_is_lazy(rng):
    da = pytest.importorskip("dask.array")
    x = rng.normal(5.0, 2.0, (60, 4))
    array = da.from_array(x, chunks=(13, 3))
    found = dataset.measure(array)
    back = dataset.normalize(dataset.normalize(array, found), found, inverse=True)
    assert isinstance(back, da.Array)
    np.testing.assert_allclose(back.compute(), x, rtol=1e-13)


def test_inverse_of_a_feature_never_seen_is_missing():
    found = dataset.measure(np.array([[1.0, np.nan], [2.0, np.nan]]), missing="skip")
    assert np.isnan(dataset.normalize(np.ones((2, 2)), found, inverse=True)[:, 1]).all()


def test_inverse_refuses_results_that_exceed_their_type():
    found = dataset.measure(np.array([[0.0], [1e6]]))
    with pytest.raises(ArgumentError, match=r"values must fit into float16"):
        dataset.normalize(np.array([[1.0]], np.float16), found, inverse=True)


@given(
    mean=st.floats(-1e6, 1e6), spread=st.floats(1e-3, 1e6), eps=st.floats(0, 1), seed=st.integers(0)
)
def test_inverse_is_an_inverse(mean, spread, eps, seed):
    x = np.random.default_rng(seed).normal(mean, spread, (20, 1))
    found = dataset.measure(x)
    back = dataset.normalize(dataset.normalize(x, found, eps=eps), found, inverse=True, eps=eps)
    # |y| ≤ √20, so each of the two maps is right to a few units of |mean| + √(20·var).
    bound = 8 * 2.0**-52 * (abs(mean) + 25 * spread + np.sqrt(eps))
    assert (abs(back - x) <= bound).all()


# ---- which files, and what is kept --------------------------------------------------------------


def test_only_takes_files_by_their_names(tmp_path, rng):
    for name in ("a_x.npy", "a_y.npy", "deep/b_x.npy", "deep/b_X.npz"):
        saved(tmp_path / "data" / name.replace(".npz", ".npy"), np.ones((2, 3)))
    found = dataset.measure(tmp_path / "data", only="*_x.npy")
    assert [os.path.basename(name) for name in found.files] == ["a_x.npy", "b_x.npy"]
    dataset.normalize(tmp_path / "data", found, tmp_path / "out", only="a*")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.npy")) == ["a_x.npy", "a_y.npy"]
    with pytest.raises(ArgumentError, match=r"must contain .* files called \*\.h5, got none"):
        dataset.measure(tmp_path / "data", only="*.h5")
    assert dataset.measure(tmp_path / "data" / "a_x.npy", only="b*").count.tolist() == [2, 2, 2]


def test_kinds_that_are_skipped_are_noted(tmp_path):
    saved(tmp_path / "a.npy", np.ones((2, 3)))
    for name in ("b.txt", "c.txt", "d.jpeg2", "README", ".hidden", "_private.txt"):
        (tmp_path / name).write_text("")
    notes = []
    dataset.measure(tmp_path, note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith(f"skipped 4 in {tmp_path} of kinds that are not read: 2 of .txt")
    assert "1 of .jpeg2" in notes[0]
    assert "1 of no suffix" in notes[0]


@pytest.mark.parametrize("name", ["s.npz", "s.json"])
@pytest.mark.parametrize("source", ["file", "array", "batches"])
def test_statistics_are_not_written_over_another_file(name, source, tmp_path):
    x = np.eye(3)
    given = {"file": saved(tmp_path / "x.npy", x), "array": x, "batches": [x]}[source]
    out = tmp_path / name
    if name == "s.npz":
        np.savez(out, x=x)
    else:
        out.write_text('{"a": 1}')
    before = out.read_bytes()
    with pytest.raises(ArgumentError, match=r"out must not hold anything but statistics.*lost"):
        dataset.measure(given, out=out)
    assert out.read_bytes() == before
    out.write_bytes(b"")  # as tempfile makes one
    first = dataset.measure(given, out=out)
    assert dataset.measure(given, out=out) == first
    assert Statistics.load(out) == first


def test_a_file_that_normalize_replaces_is_noted(tmp_path):
    path = saved(tmp_path / "x.npy", np.eye(3))
    found, notes = dataset.measure(path), []
    dataset.normalize(path, found, tmp_path / "y.npy", note=notes.append)
    assert notes == []
    dataset.normalize(path, found, tmp_path / "y.npy", note=notes.append)
    assert notes == [f"replaced {tmp_path / 'y.npy'}, which was there before"]


def test_normalize_does_not_write_over_statistics_of_either_kind(tmp_path):
    path = saved(tmp_path / "x.npy", np.eye(3))
    found = dataset.measure(path, out=tmp_path / "s.npz")
    with pytest.raises(BatchNormError, match="out must not be saved statistics"):
        dataset.normalize(path, found, tmp_path / "s.npz")
