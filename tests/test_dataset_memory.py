"""Arrays in memory: what is one array, what are batches, and what masks and strides mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import Moments, dataset
from batchnorm.dataset import Statistics
from batchnorm.dataset.sources import blocks
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError


def assert_same(found, x, **options):
    expected = dataset.measure(x, **options)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.missing, expected.missing)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.var(), expected.var(), rtol=1e-9)


# ---- batches ------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    kind=st.sampled_from([list, iter, "generator"]),
    seed=st.integers(0, 99),
)
def test_batches_are_the_rows_of_all(sizes, kind, seed):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(1e3, 1.0, (n, 3)).astype(np.float32) for n in sizes]
    given = (x for x in batches) if kind == "generator" else kind(batches)
    found = dataset.measure(given)
    assert found.files == ()
    assert_same(found, np.concatenate(batches))


def test_batches_are_not_stacked():
    found = dataset.measure([np.ones((5, 2)), np.ones((5, 2))])
    assert found.count.tolist() == [10, 10]


def test_batches_are_taken_one_at_a_time():
    alive = []

    def batches():
        for k in range(50):
            alive.append(k)
            yield np.full((4, 2), k)
            assert len(alive) == k + 1

    assert dataset.measure(batches()).mean.tolist() == [24.5, 24.5]


def test_batches_take_all_options(tmp_path, rng):
    x = rng.normal(100.0, 9.0, (60, 4, 5))
    x[rng.random(x.shape) < 0.1] = np.nan
    told = []
    options = {"channel_axis": -1, "missing": "skip", "extremes": True, "scale": 2.0}
    found = dataset.measure(
        (x[k : k + 7] for k in range(0, 60, 7)),
        out=tmp_path / "s.npz",
        progress=lambda *given: told.append(given[0]),
        **options,
    )
    assert_same(found, x, **options)
    np.testing.assert_array_equal(found.extremes[0], np.nanmin(x, (0, 1)) / 2.0)
    assert Statistics.load(tmp_path / "s.npz") == found
    assert told == [f"batch {k}" for k in range(9)]
    with pytest.raises(ArgumentError, match=r"batch 1: values must not be missing, got NaN in"):
        dataset.measure([np.ones((2, 2)), np.full((2, 2), np.nan)])


def test_masked_batches_keep_their_masks(rng):
    x = np.ma.MaskedArray(rng.standard_normal((30, 3)), rng.random((30, 3)) < 0.3)
    batches = [x[:11], x[11:20], x[20:].filled(7.0)]
    found = dataset.measure(batches, missing="skip")
    expected = np.concatenate([x[:20].filled(np.nan), batches[2]])
    assert_same(found, expected, missing="skip")
    with pytest.raises(ArgumentError, match="batch 0: values must not be missing"):
        dataset.measure(iter(batches))


def test_batches_of_torch_are_read(rng):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((20, 3)))
    for several in ([x[:9], x[9:]], iter([x[:9], x[9:]])):
        assert_same(dataset.measure(several), x.numpy())
    assert_same(dataset.measure(x), x.numpy())
    assert_same(dataset.measure(x.T, channel_axis=0), x.numpy())
    with pytest.raises(DTypeError, match=r"batch 0: must be an array, and cannot be made one"):
        dataset.measure([x.requires_grad_()])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x.detach(), torch.ones(20)), batch_size=7
    )
    assert_same(dataset.measure(x for x, _ in loader), x.detach().numpy())
    with pytest.raises(ArgumentError, match=r"batch 0: must be an array, got list\. Yield the"):
        dataset.measure(loader)


def test_dask_chunks_may_be_batches(rng):
    da = pytest.importorskip("dask.array")
    x = rng.standard_normal((20, 3))
    assert_same(dataset.measure([da.from_array(x[:9]), da.from_array(x[9:])]), x)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([], ArgumentError, "at least one file, folder or batch, got none"),
        (iter([]), ArgumentError, "at least one file, folder or batch, got none"),
        ((), ArgumentError, "at least one file, folder or batch, got none"),
        ((np.ones((2, 2)), np.ones(2)), ArgumentError, r"got a tuple of arrays, as of inputs"),
        ([(np.ones((2, 2)), np.ones(2))], DTypeError, "x: must be an array, and cannot be made"),
        (iter([(np.ones((2, 2)), np.ones(2))]), ArgumentError, "batch 0: must be an array, got tu"),
        ([np.ones((2, 2)), np.ones(2)], ShapeError, r"batch 1: must have at least 2 axes"),
        ([np.ones((2, 2)), np.ones((2, 3))], ShapeError, r"batch 1: must have as many .* 2, got 3"),
        (iter([np.ones((2, 2)), "x.npy"]), ArgumentError, "batch 1: must be an array, got str"),
        ([np.ones((2, 2)), "x.npy"], ArgumentError, "beside paths"),
        (["x.npy", np.ones((2, 2))], ArgumentError, "beside paths"),
        ([np.ones((2, 2)), None], ArgumentError, "batch 1: must be an array, got NoneType"),
        ([np.ones((2, 2), complex)], DTypeError, "batch 0: must hold real numbers.*complex128"),
        ({"x": np.ones((2, 2))}, ArgumentError, "got a dict of several by name"),
        ([[1, 2], [3]], DTypeError, "x: must be an array, and cannot be made one"),
        ([["a", "b"]], DTypeError, "x: must hold real numbers"),
        (3.0, ShapeError, r"x: must have at least 2 axes.*got shape \(\)"),
        (None, DTypeError, "x: must hold real numbers.*got object"),
        ([1.0, 2.0], ShapeError, r"x: must have at least 2 axes.*got shape \(2,\)"),
        (np.ones((2, 2), "f4,f4"), DTypeError, "x: must hold real numbers"),
        ([np.ones((2, 2)) * 1e200, -np.ones((2, 2)) * 1e200], ArgumentError, "source: .*too large"),
    ],
    ids=range(21),
)
def test_what_is_no_batches_is_refused(given, error, said):
    with pytest.raises(error, match=said) as caught:
        dataset.measure(given)
    assert "\n" not in str(caught.value)


def test_options_of_files_are_refused_for_batches():
    with pytest.raises(ArgumentError, match="client must be left out for arrays"):
        dataset.measure([np.ones((2, 2))], client=object())
    with pytest.raises(ArgumentError, match="only must be left out for arrays"):
        dataset.measure(iter([np.ones((2, 2))]), only="*.npy")


def test_normalize_refuses_batches():
    found = dataset.measure(np.eye(2))
    with pytest.raises(ArgumentError, match="source must be one array, .* got several arrays"):
        dataset.normalize([np.ones((2, 2)), np.ones((2, 2))], found)


# ---- one array ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [3, 4], [5, 9]],
        ((1, 2), (3, 4), (5, 9)),
        [np.array([1, 2]), np.array([3, 4]), np.array([5, 9])],
        [[[1], [2]], [[3], [4]], [[5], [9]]],
    ],
    ids=["lists", "tuples", "1-D arrays", "nested"],
)
def test_a_list_of_rows_is_one_array(rows):
    found = dataset.measure(rows)
    assert found.count.tolist() == [3, 3]
    assert found.mean.tolist() == [3, 5]
    y = dataset.normalize(rows, found)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-15)


def test_a_list_of_masked_rows_is_one_masked_array():
    rows = [np.ma.MaskedArray([1.0, 2.0], [0, 1]), np.ma.MaskedArray([3.0, 4.0], [0, 0])]
    found = dataset.measure(rows, missing="skip")
    assert found.count.tolist() == [2, 1]
    assert found.mean.tolist() == [2, 4]
    y = dataset.normalize(rows, found)
    np.testing.assert_array_equal(np.isnan(y), [[False, True], [False, False]])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i4", "u1", "?"])
def test_masked_arrays_of_every_type_and_stride(dtype, rng, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    data = rng.integers(0, 2, (40, 3, 5)).astype(dtype)
    x = np.ma.MaskedArray(data, rng.random(data.shape) < 0.2)
    for view in (x, x[::-2], x.transpose(2, 1, 0)):
        gaps = np.ma.filled(view.astype(float), np.nan)
        for axis in range(3):
            found = dataset.measure(view, channel_axis=axis, missing="skip", extremes=True)
            assert_same(found, gaps, channel_axis=axis, missing="skip")
            others = tuple({0, 1, 2} - {axis})
            np.testing.assert_array_equal(found.extremes[1], np.nanmax(gaps, others))
            y = dataset.normalize(view, found, channel_axis=axis)
            np.testing.assert_array_equal(np.isnan(y), np.isnan(gaps))


def test_a_mask_that_hides_all_leaves_nothing():
    x = np.ma.MaskedArray(np.ones((4, 2)), [[0, 1]] * 4)
    found = dataset.measure(x, missing="skip", extremes=True)
    assert found.missing.tolist() == [0, 4]
    assert np.isnan(found.extremes[:, 1]).all()
    with pytest.raises(ArgumentError, match=r"NaN in feature 1 at index \(0, 1\); 4 of 4"):
        dataset.measure(x)


def test_a_masked_array_without_a_mask_is_complete(rng):
    x = rng.standard_normal((9, 2))
    assert dataset.measure(np.ma.MaskedArray(x)).moments == Moments.of(x)


def test_masked_integers_beyond_float64_are_not_looked_at():
    x = np.ma.MaskedArray([[1, 2], [2**60, 4]], [[0, 0], [1, 0]])
    assert dataset.measure(x, missing="skip").mean.tolist() == [1, 3]


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i2"])
def test_memory_maps_are_read_and_normalized(dtype, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    x = rng.integers(0, 9, (50, 4)).astype(dtype)
    x.tofile(tmp_path / "x.raw")
    mapped = np.memmap(tmp_path / "x.raw", dtype, "r", shape=(50, 4))
    found = dataset.measure(mapped, extremes=True)
    assert_same(found, np.asarray(x, float))
    y = dataset.normalize(mapped, found)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, dataset.normalize(x, found))


# ---- paths --------------------------------------------------------------------------------------


def test_paths_may_come_from_a_generator(tmp_path, rng):
    x = rng.standard_normal((30, 3))
    for k in range(3):
        np.save(tmp_path / f"{k}.npy", x[10 * k : 10 * k + 10])
    assert_same(dataset.measure(tmp_path.glob("*.npy")), x)
    assert_same(dataset.measure(str(p) for p in sorted(tmp_path.glob("*.npy"))), x)
    assert_same(dataset.measure((tmp_path / "0.npy", tmp_path / "1.npy")), x[:20])
    with pytest.raises(BatchNormError, match="one file or folder, got 3"):
        dataset.normalize(tmp_path.glob("*.npy"), dataset.measure(x), tmp_path / "y.npy")


def test_paths_followed_by_arrays_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    with pytest.raises(ArgumentError, match="beside paths"):
        dataset.measure(iter([tmp_path / "x.npy", np.ones((2, 2))]))


# ---- tables of other libraries -------------------------------------------------------------------


def as_table(library, columns):
    if library == "pyarrow":
        return pytest.importorskip("pyarrow").table(columns)
    return pytest.importorskip(library).DataFrame(columns)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_measure_of_a_table_in_memory_has_its_names(library):
    pytest.importorskip("pyarrow")
    x = as_table(library, {"a": [1, 2, 6], "b": [0.5, np.nan, 2.5]})
    found = dataset.measure(x, missing="skip")
    assert found.names == ("a", "b")
    np.testing.assert_array_equal(found.mean, [3.0, 1.5])
    np.testing.assert_array_equal(found.missing, [0, 1])


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_measure_refuses_integers_of_a_table_that_float64_rounds(library):
    pytest.importorskip("pyarrow")
    x = as_table(library, {"id": [2**60 + 1, 2**60 + 2], "b": [0.5, 1.5]})
    with pytest.raises(ArgumentError, match=r"column 'id': integers must be below .* 115292150460"):
        dataset.measure(x)
    with pytest.raises(ArgumentError, match=r"batch 0: column 'id'"):
        dataset.measure([x, x])


def test_measure_refuses_integers_of_rows_that_float64_rounds():
    with pytest.raises(ArgumentError, match="got 1152921504606846977"):
        dataset.measure([[2**60 + 1, 0.5], [2**60 + 2, 1.5]])


def test_measure_of_a_table_in_memory_refuses_text():
    pytest.importorskip("pyarrow")
    x = as_table("pandas", {"a": [1.0], "b": ["text"]})
    with pytest.raises(DTypeError, match=r"x: columns must be numbers, got 'b'"):
        dataset.measure(x)


def test_normalize_refuses_a_table_in_memory_in_another_order():
    pytest.importorskip("pyarrow")
    x = as_table("pandas", {"a": [1.0, 2.0], "b": [3.0, 5.0]})
    found = dataset.measure(x)
    np.testing.assert_allclose(dataset.normalize(x, found, eps=0.0), [[-1, -1], [1, 1]])
    with pytest.raises(ArgumentError, match=r"must have the columns of the statistics"):
        dataset.normalize(x[["b", "a"]], found)
