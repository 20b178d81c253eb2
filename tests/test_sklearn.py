"""`batchnorm.sklearn.StandardScaler` takes the place of scikit-learn's, and is more exact."""

import csv
import importlib
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("sklearn")

import sklearn
from scipy import sparse
from sklearn import preprocessing
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator

import batchnorm.sklearn
from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.sklearn import StandardScaler

EPS = np.finfo(np.float64).eps
NAN = np.nan
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
OFFSETS = (0, 1e3, 1e6)
FLAGS = [{}, {"with_mean": False}, {"with_std": False}, {"with_mean": False, "with_std": False}]
CHECKED = [StandardScaler(), StandardScaler(with_mean=False), StandardScaler(with_std=False)]


def name_of(value):
    return getattr(getattr(value, "func", None), "__name__", None)


CHECKS = [
    (scaler, check)
    for one in CHECKED
    for scaler, check in estimator_checks_generator(one, mark="skip")
    if "array_api" not in name_of(check)  # these need SCIPY_ARRAY_API, and run in a process below
]


def data(offset=0.0, dtype=np.float64, rows=300):
    x = np.random.default_rng(0).normal(size=(rows, 3)) * [1, 0.1, 10] + offset
    return x.astype(dtype)


def exact(x, weights=None):
    """Mean, variance and standard deviation of each column, from rationals."""
    w = [Fraction(1)] * len(x) if weights is None else list(map(Fraction, weights.tolist()))
    means, variances = [], []
    for column in x.T.tolist():
        kept = [(a, Fraction(v)) for a, v in zip(w, column, strict=True) if v == v]
        n = sum(a for a, _ in kept)
        mean = sum(a * v for a, v in kept) / n
        means.append(mean)
        variances.append(sum(a * (v - mean) ** 2 for a, v in kept) / n)
    std = [np.sqrt(np.longdouble(v.numerator) / np.longdouble(v.denominator)) for v in variances]
    return means, variances, np.array(std)


def assert_exact(scaler, x, weights=None, tolerance=4):
    """Each mean is right but for its own rounding and some of a standard deviation, and each
    variance but for roundings that add up like a random walk."""
    means, variances, std = exact(x, weights)
    for k, (mean, var) in enumerate(zip(means, variances, strict=True)):
        allowed = EPS * abs(float(mean)) + tolerance * EPS * float(std[k])
        assert abs(Fraction(scaler.mean_[k]) - mean) <= allowed
        assert abs(Fraction(scaler.var_[k]) / var - 1) <= tolerance * len(x) ** 0.5 * EPS


# ---- in place of scikit-learn's ------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "check"), CHECKS, ids=name_of)
def test_standard_scaler_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def with_gaps():
    x = data(3)
    x[::7, 0] = x[5, 2] = NAN
    return x


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array, sparse.csc_matrix])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("make", [data, with_gaps])
def test_standard_scaler_has_the_attributes_of_scikit_learns(make, flags, weighted, kind):
    if kind is not np.asarray:
        flags = {**flags, "with_mean": False}
    x = make()
    x[x < 0.1] = 0
    weights = np.linspace(0, 1, len(x)) if weighted else None
    ours, theirs = StandardScaler(**flags), preprocessing.StandardScaler(**flags)
    for half in (slice(100), slice(100, None)):
        w = None if weights is None else weights[half]
        for scaler in (ours, theirs):
            scaler.partial_fit(kind(x[half]), sample_weight=w)
    assert ours.get_params() == theirs.get_params()
    assert ours.n_features_in_ == 3
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        if name == "n_samples_seen_" and weighted and flags == FLAGS[3] and kind is np.asarray:
            continue  # scikit-learn counts the rows there
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None)
        if other is not None:
            np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-12)
            assert np.shape(mine) == np.shape(other)
    results = [scaler.transform(kind(x)) for scaler in (ours, theirs)]
    assert type(results[0]) is type(results[1])
    for result in (results, [s.inverse_transform(kind(x)) for s in (ours, theirs)]):
        dense = [r.toarray() if sparse.issparse(r) else r for r in result]
        np.testing.assert_allclose(*dense, rtol=1e-12, atol=1e-12)


def test_standard_scaler_counts_in_integers_and_weights_in_floats():
    x = data()
    assert StandardScaler().fit(x).n_samples_seen_.dtype == np.int64
    assert StandardScaler().fit(with_gaps()).n_samples_seen_.dtype == np.int64
    weighted = StandardScaler().fit(x, sample_weight=np.full(len(x), 0.5))
    assert weighted.n_samples_seen_ == 150.0
    assert weighted.partial_fit(x).n_samples_seen_ == 450.0
    scaler = StandardScaler().fit(x).partial_fit(x, sample_weight=np.full(len(x), 0.25))
    assert scaler.n_samples_seen_ == 375.0
    assert scaler.n_samples_seen_.dtype == np.float64


def test_standard_scaler_scales_by_one_where_scikit_learns_does():
    rng = np.random.default_rng(0)
    means, spreads = 10.0 ** rng.uniform((-100, -17), (100, -13), (500, 2)).T
    x = means * (1 + spreads * rng.normal(size=(20, 500)))
    x[:, ::5] = x[0, ::5]
    theirs = preprocessing.StandardScaler().fit(x).scale_
    assert 0.2 < (theirs == 1).mean() < 0.8
    assert np.array_equal(StandardScaler().fit(x).scale_ == 1, theirs == 1)


def test_standard_scaler_goes_on_where_scikit_learns_was():
    x = data(5)
    scaler = preprocessing.StandardScaler().fit(x[:100])
    scaler.__class__ = StandardScaler
    np.testing.assert_allclose(scaler.partial_fit(x[100:]).var_, x.var(axis=0), rtol=1e-13)


def test_standard_scaler_works_in_a_search_over_pipelines():
    x, y = load_iris(return_X_y=True)
    scores = {}
    for kind in (StandardScaler, preprocessing.StandardScaler):
        columns = ColumnTransformer([("scaled", kind(), [0, 1])], remainder="passthrough")
        grid = {"columntransformer__scaled__with_std": [True, False]}
        search = GridSearchCV(make_pipeline(columns, LogisticRegression(max_iter=500)), grid, cv=3)
        scores[kind] = search.fit(x, y).cv_results_["mean_test_score"]
    assert np.array_equal(*scores.values())


def test_standard_scaler_takes_weights_by_metadata_routing():
    x, weights = data(), np.linspace(0, 1, 300)
    with sklearn.config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=True)
        pipeline = make_pipeline(scaler, Ridge().set_fit_request(sample_weight=True))
        pipeline.fit(x, x[:, 0], sample_weight=weights)
    expected = np.average(x, axis=0, weights=weights)
    np.testing.assert_allclose(pipeline[0].mean_, expected, rtol=1e-12)


def test_standard_scaler_survives_clone_and_pickle():
    x = data(1e6)
    scaler = StandardScaler(copy=False).fit(x[:100])
    assert not hasattr(clone(scaler), "mean_")
    assert clone(scaler).get_params() == scaler.get_params()
    again = pickle.loads(pickle.dumps(scaler))
    assert type(again) is StandardScaler
    for one in (scaler, again):
        one.partial_fit(x[100:])
    assert np.array_equal(again.mean_, scaler.mean_)
    assert np.array_equal(again.var_, scaler.var_)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_standard_scaler_gives_data_frames_with_the_names_of_the_columns(library):
    frames = pytest.importorskip(library)
    frame = frames.DataFrame({"a": [1.0, 3.0], "b": [2.0, 6.0]})
    ours, theirs = (
        kind().set_output(transform=library)
        for kind in (StandardScaler, preprocessing.StandardScaler)
    )
    result, expected = ours.fit_transform(frame), theirs.fit_transform(frame)
    assert isinstance(result, frames.DataFrame)
    assert result.to_numpy().tolist() == [[-1, -1], [1, 1]]
    # Old versions of scikit-learn do not find the names of new polars.
    assert list(result.columns) == list(expected.columns)
    if library == "pandas":
        assert ours.feature_names_in_.tolist() == ["a", "b"]
        assert ours.get_feature_names_out().tolist() == ["a", "b"]


def test_standard_scaler_leaves_other_libraries_arrays_to_scikit_learn():
    pytest.importorskip("torch")
    if not get_tags(preprocessing.StandardScaler()).array_api_support:
        pytest.skip("this scikit-learn's scaler takes NumPy arrays alone")
    script = """
import numpy, sklearn, torch
from sklearn.utils import estimator_checks
from batchnorm.sklearn import StandardScaler
x = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
with sklearn.config_context(array_api_dispatch=True):
    scaler = StandardScaler().fit(x)
    y = scaler.transform(x)
    assert type(scaler.mean_) is type(y) is type(scaler.inverse_transform(y)) is torch.Tensor
    assert y.tolist() == [[-1, -1], [1, 1]]
    assert type(scaler.fit(x.numpy()).transform(x.numpy())) is numpy.ndarray
for scaler, check in estimator_checks.estimator_checks_generator(StandardScaler(), mark="skip"):
    how = check.keywords
    if (how.get("array_namespace"), how.get("device_name")) == ("torch", "cpu"):
        check(scaler)
"""
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_standard_scaler_tells_callbacks_of_its_fit():
    pytest.importorskip("sklearn.callback")
    told = []

    class Callback:
        def setup(self, estimator, context):
            told.append("setup")

        def teardown(self, estimator, context):
            told.append("teardown")

        def on_fit_task_begin(self, estimator, context, *, X):
            told.append(X.shape)

        def on_fit_task_end(self, estimator, context, *, fitted_estimator):
            told.append(fitted_estimator.mean_.tolist())

    StandardScaler().set_callbacks(Callback()).fit([[1.0], [3.0]])
    assert told == ["setup", (2, 1), [2.0], "teardown"]


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_fit_is_exact(offset, dtype, order):
    x = data(offset, dtype)
    assert_exact(StandardScaler().fit(np.asarray(x, order=order)), x)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fit_is_exact_when_values_are_missing_and_weighted(offset, dtype):
    x, weights = data(offset, dtype), np.random.default_rng(1).uniform(size=300)
    x[::3, 0] = x[1, 1] = NAN
    weights[::5] = 0
    assert_exact(StandardScaler().fit(x), x)
    assert_exact(StandardScaler().fit(x, sample_weight=weights), x, weights)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_partial_fit_of_single_rows_loses_nothing(offset, dtype):
    x = data(offset, dtype, rows=1000)
    scaler = StandardScaler()
    for row in x:
        scaler.partial_fit(row[None])
    # Merged as they are, means would add a rounding of the offset for each row.
    assert_exact(scaler, x)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_array])
def test_fit_of_sparse_data_is_exact(kind, weighted, dtype, offset):
    x = data(offset, dtype)
    rng = np.random.default_rng(1)
    x[rng.uniform(size=x.shape) < [0.9, 0.5, 0]] = 0
    x[1, 1] = NAN
    weights = rng.uniform(size=300) if weighted else None
    scaler = StandardScaler(with_mean=False).fit(kind(x), sample_weight=weights)
    assert_exact(scaler, x, weights)


def test_fit_of_sparse_data_ignores_absent_rows_without_weight():
    x = data(1e6)
    weights = np.random.default_rng(1).uniform(size=300)
    weights[::3] = 0
    x[::3] = 0
    scaler = StandardScaler(with_mean=False).fit(sparse.csr_array(x), sample_weight=weights)
    _, variances, _ = exact(x, weights)
    # A rounding of the weights' sum, times the squared offset, would be 1e-4 of the variance.
    np.testing.assert_allclose(scaler.var_, np.array(variances, float), rtol=1e-9)


def test_fit_of_sparse_data_adds_entries_stored_twice():
    entries = [1.0, 2.0, 4.0], [0, 0, 0], [0, 2, 3]
    rows = sparse.csr_array(entries, shape=(2, 1))  # 1 + 2, 4
    column = sparse.csc_array((entries[0], [0, 0, 1], [0, 3]), shape=(2, 1))
    for x in (rows, column):
        scaler = StandardScaler(with_mean=False).fit(x)
        assert (scaler.mean_[0], scaler.var_[0], scaler.n_samples_seen_) == (3.5, 0.25, 2)
        assert x.nnz == 3


def test_fit_of_sparse_data_without_zeros_takes_any_weights():
    x = np.arange(6000.0).reshape(100, 60) + 1
    # Their sums differ in the last bit, by the order of summation.
    weights = 10.0 ** np.random.default_rng(0).uniform(-20, 0, 100)
    scaler = StandardScaler(with_mean=False).fit(sparse.csr_array(x), sample_weight=weights)
    expected = np.average(x, axis=0, weights=weights)
    np.testing.assert_allclose(scaler.mean_, expected, rtol=1e-14)


VALUES = st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.5, 1e3, 7.25, NAN])


@given(
    x=hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=VALUES),
    seed=st.integers(0, 3),
)
def test_sparse_and_dense_data_have_the_same_statistics(x, seed):
    weights = np.random.default_rng(seed).integers(0, 3, len(x)) if seed else None
    if weights is not None:
        weights[0] = 1
    scalers = [
        StandardScaler(with_mean=False).fit(kind(x), sample_weight=weights)
        for kind in (np.asarray, sparse.csr_array, sparse.csc_array)
    ]
    for name in ("mean_", "var_", "n_samples_seen_"):
        dense, *others = (getattr(scaler, name) for scaler in scalers)
        for other in others:
            np.testing.assert_allclose(other, dense, rtol=1e-13, atol=1e-10)


def test_partial_fit_learns_a_feature_that_had_no_values_at_first():
    scaler = StandardScaler().fit([[1.0, NAN], [2.0, NAN]])
    assert np.isnan(scaler.transform([[1.0, 5.0]])[0, 1])
    scaler.partial_fit([[3.0, 4.0], [4.0, 8.0]])
    assert (scaler.mean_[1], scaler.scale_[1]) == (6, 2)
    scaler.partial_fit([[3.0, NAN]])
    assert (scaler.mean_[1], scaler.scale_[1]) == (6, 2)


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transform_is_exact(offset, dtype):
    x = data(offset, dtype)
    means, _, std = exact(x)
    mean = np.array([np.longdouble(m.numerator) / m.denominator for m in means], np.longdouble)
    expected = (x.astype(np.longdouble) - mean) / std
    y = StandardScaler().fit(x).transform(x)
    assert y.dtype == dtype
    # float32: docs/numerics.md. float64: five roundings, and that of the mean.
    allowed = 1e-6 if dtype == np.float32 else 5 * EPS
    allowed = allowed * np.maximum(1, abs(expected)) + EPS * offset / std
    assert (abs(y - expected) <= allowed).all()


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_inverse_transform_goes_back(offset, dtype):
    x = data(min(offset, 1e4) if dtype == np.float16 else offset, dtype)
    scaler = StandardScaler().fit(x)
    back = scaler.inverse_transform(scaler.transform(x))
    assert back.dtype == dtype
    # Roundings of y, of the coefficients and of x.
    allowed = np.finfo(dtype).eps * (4 * abs(x - scaler.mean_) + abs(x) + abs(scaler.mean_))
    assert (abs(back.astype(np.float64) - x) <= allowed).all()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_transform_in_place_gives_the_same_bits(flags, order, monkeypatch):
    x = np.asarray(with_gaps(), order=order)
    kept = x.copy()
    scaler = StandardScaler(**flags).fit(x)
    y = scaler.transform(x)
    back = scaler.inverse_transform(y)
    assert np.array_equal(x, kept, equal_nan=True)
    assert y.flags.f_contiguous == (order == "F")
    monkeypatch.setattr(batchnorm.sklearn, "AT_ONCE", 70)
    scaler.set_params(copy=False)
    assert scaler.transform(x) is x
    assert np.array_equal(x, y, equal_nan=True)
    assert scaler.inverse_transform(x) is x
    assert np.array_equal(x, back, equal_nan=True)


def test_transform_in_place_copies_what_cannot_be_written():
    x = data()
    x.flags.writeable = False
    scaler = StandardScaler(copy=False).fit(x)
    for method in (scaler.transform, scaler.inverse_transform):
        y = method(x)
        assert not np.array_equal(x, y)
        assert np.array_equal(x, data())


@pytest.mark.parametrize("flags", FLAGS[:3], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transform_keeps_missing_values_and_makes_unseen_features_missing(dtype, flags):
    x = np.array([[1, NAN, 1], [NAN, NAN, 2], [4, NAN, 4]], dtype)
    scaler = StandardScaler(**flags).fit(x)
    y = scaler.transform(np.where(np.isnan(x), 7, x))
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()
    assert np.array_equal(np.isnan(scaler.transform(x)), np.isnan(x))
    assert np.isnan(scaler.inverse_transform(np.ones_like(x))[:, 1]).all()


def test_transform_takes_data_frames_of_sparse_columns():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame.sparse.from_spmatrix(sparse.csr_array([[0.0, 2.0], [4.0, 0.0]]))
    scaler = StandardScaler(with_mean=False).fit(frame)
    assert scaler.transform(frame).toarray().tolist() == [[0, 2], [2, 0]]
    assert scaler.inverse_transform(frame).toarray().tolist() == [[0, 2], [8, 0]]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1, 2]])
def test_fit_refuses_infinity_as_scikit_learn_does(weights):
    x = [[1.0], [np.inf]]
    said = "Input X contains infinity"
    with pytest.raises(ValueError, match=said):
        preprocessing.StandardScaler().fit(x, sample_weight=weights)
    with pytest.raises(ValueError, match=said):
        StandardScaler().fit(x, sample_weight=weights)
    with pytest.raises(ValueError, match=said):
        StandardScaler(with_mean=False).fit(sparse.csr_array(x), sample_weight=weights)


def test_fit_refuses_squares_beyond_float64():
    with pytest.raises(ArgumentError, match=r"too large in feature 1 \(1 such\)"):
        StandardScaler().fit([[1.0, 1e200], [2.0, 3e200]])
    assert StandardScaler(with_std=False).fit([[1e200], [3e200]]).mean_ == 2e200


@pytest.mark.parametrize("x", [[[1.0], [2.0]], sparse.csr_array([[1.0], [2.0]])])
def test_fit_refuses_negative_weights(x):
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        StandardScaler(with_mean=False).fit(x, sample_weight=[1, -1])


def test_sparse_data_are_not_centered():
    x = sparse.csr_array([[1.0, 0.0], [0.0, 2.0]])
    with pytest.raises(ArgumentError, match="pass `with_mean=False`"):
        StandardScaler().fit(x)
    scaler = StandardScaler().fit(x.toarray())
    for method in (scaler.transform, scaler.inverse_transform):
        with pytest.raises(ValueError, match="pass `with_mean=False`"):
            method(x)


@pytest.mark.parametrize("name", ["with_mean", "with_std"])
def test_partial_fit_refuses_what_it_did_not_measure_at_first(name):
    scaler = StandardScaler(with_mean=False, with_std=False).fit(data())
    scaler.set_params(**{name: True})
    with pytest.raises(ArgumentError, match=f"{name} must have been True since the first"):
        scaler.partial_fit(data())
    assert scaler.n_samples_seen_ == 300


def test_inverse_transform_refuses_another_number_of_features():
    with pytest.raises(ShapeError, match="X must have 3 features, as the data of fit had, got 1"):
        StandardScaler().fit(data()).inverse_transform([[1.0]])


def test_import_names_the_extra_where_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "batchnorm.sklearn")
    with pytest.raises(ImportError, match=r"pip install 'batchnorm\[sklearn\]'"):
        import batchnorm.sklearn  # noqa: F401


def test_benchmark_compares_both_scalers(monkeypatch, tmp_path):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark, tables = (importlib.import_module(name) for name in ("sklearn_scaler", "tables"))
    small = {"QUICK_ROWS": 300, "FEATURES": 3, "SPARSE_FEATURES": 64, "STORED": 0.1}
    for name, value in {**small, "BATCH_ROWS": 100, "OFFSETS": (0.0, 1e3)}.items():
        monkeypatch.setattr(benchmark, name, value)
    assert benchmark.main(["--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    with (tmp_path / "sklearn_scaler.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"scikit-learn", "batchnorm"}
    assert len(rows) == 2 * 2 * 2 * len(benchmark.CASES)
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        errors = [float(row[f"{name}_error"] or 0) for name in ("mean", "var", "result")]
        assert max(errors) < (1e-3 if row["provider"] == "scikit-learn" else 1e-6)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = [line for line in tables.sklearn_scaler().split("\n") if line.startswith("| ")]
    assert len(lines) == 1 + len(benchmark.CASES)


def test_benchmark_does_not_time_a_wrong_scaler(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("sklearn_scaler")
    for name, value in {"QUICK_ROWS": 30, "DTYPES": ("float32",), "OFFSETS": (0.0,)}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "CASES", [("dense", "transform")])
    monkeypatch.setattr(StandardScaler, "transform", lambda self, x: np.asarray(x) + 1)
    assert benchmark.main(["--quick"]) == 1
    assert "batchnorm, transform of dense float32 at 0: error" in capsys.readouterr().out
