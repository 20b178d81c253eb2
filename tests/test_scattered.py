"""Moments of columns of which not every value is there: sparse, or dense with NaN."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batchnorm import Moments, _core
from batchnorm.scattered import moments_of_present, moments_of_sparse

EPS = np.finfo(np.float64).eps
NAN = np.nan


def compress(x, by_row, places=np.int32):
    """The arguments of `moments_of_sparse` for a matrix whose zeros are not stored."""
    lines = x if by_row else x.T
    kept = lines != 0
    starts = np.append(0, np.count_nonzero(kept, axis=1).cumsum())
    return lines[kept], starts, np.nonzero(kept)[1].astype(places), x.shape


def exact(x, weights=None):
    """Count, mean and m2 of each column without NaN, as rationals."""
    w = [Fraction(1)] * len(x) if weights is None else list(map(Fraction, weights.tolist()))
    for column in x.T.astype(np.float64).tolist():
        kept = [(a, Fraction(v)) for a, v in zip(w, column, strict=True) if v == v]
        n = sum(a for a, _ in kept)
        mean = sum(a * v for a, v in kept) / n if n else Fraction(0)
        yield n, mean, sum(a * (v - mean) ** 2 for a, v in kept)


def assert_exact(found, x, weights=None):
    """Each right to a few roundings, and means to one of their own."""
    for k, (n, mean, m2) in enumerate(exact(x, weights)):
        count = np.broadcast_to(found.count, found.mean.shape)[k]
        std = float(m2 / n) ** 0.5 if n else 0
        assert abs(Fraction(count) - n) <= 4 * EPS * n
        assert abs(Fraction(found.mean[k]) - mean) <= EPS * (abs(mean) + 4 * std)
        assert abs(Fraction(found.m2[k]) - m2) <= 16 * EPS * m2


@pytest.fixture(params=[0, 1e3, 1e6])
def x(request, rng):
    x = rng.normal(request.param, 1, (40, 6))
    x[rng.uniform(size=x.shape) < [0, 0.1, 0.5, 0.9, 1, 0]] = 0
    x[rng.uniform(size=x.shape) < [0, 0.2, 0.2, 0.2, 0, 1]] = NAN
    return x


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("places", [np.int32, np.int64])
def test_moments_of_sparse_are_exact(x, dtype, by_row, weighted, places, rng):
    x = (np.clip(x, -6e4, 6e4) if dtype == np.float16 else x).astype(dtype)
    weights = rng.uniform(size=len(x)) * (rng.uniform(size=len(x)) < 0.8) if weighted else None
    found = moments_of_sparse(*compress(x, by_row, places), by_row=by_row, weights=weights)
    assert_exact(found, x, weights)


@pytest.mark.parametrize("by_row", [True, False])
def test_mean_of_few_large_values_among_zeros_keeps_its_digits(by_row):
    x = np.zeros((1000, 1))
    x[:3, 0] = 1e6 + np.array([0.1, 0.2, 0.3])
    found = moments_of_sparse(*compress(x, by_row), by_row=by_row)
    ((_, mean, _),) = exact(x)
    assert abs(Fraction(found.mean[0]) - mean) <= EPS * mean


@pytest.mark.parametrize("order", ["C", "F", "sliced"])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_present_are_exact(x, order, weighted, rng):
    weights = rng.uniform(size=len(x)) if weighted else None
    lying = x.repeat(2, axis=1)[:, ::2] if order == "sliced" else np.asarray(x, order=order)
    assert_exact(moments_of_present(lying, weights), x, weights)


ELEMENTS = st.sampled_from([0.0, 0.0, 1.0, -2.5, 1e3, 7.25, NAN])


@given(
    x=hnp.arrays(
        np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=ELEMENTS
    ),
    by_row=st.booleans(),
    weights=hnp.arrays(np.float64, 7, elements=st.sampled_from([0.0, 0.5, 1.0, 3.0])),
)
def test_sparse_and_dense_matrices_have_the_same_moments(x, by_row, weights):
    w = weights[: len(x)]
    dense = moments_of_present(x, w)
    found = moments_of_sparse(*compress(x, by_row), by_row=by_row, weights=w)
    assert np.array_equal(found.count, dense.count)
    for name in ("mean", "m2"):
        np.testing.assert_allclose(getattr(found, name), getattr(dense, name), 1e-13, 1e-9)


@pytest.mark.parametrize("by_row", [True, False])
def test_first_value_far_from_the_others_costs_no_digits(by_row):
    x = np.array([[1e9, 1.0], *([1.0 + k % 3, 2.0 + k % 3] for k in range(99))])
    weights = np.ones(100)
    weights[0] = 1e-18  # the outlier is the center, and of no weight
    found = moments_of_sparse(*compress(x, by_row), by_row=by_row, weights=weights)
    assert_exact(found, x, weights)


@pytest.mark.parametrize("by_row", [True, False])
def test_weight_zero_hides_infinity(by_row):
    x = np.array([[np.inf, 1.0], [2.0, np.inf], [4.0, 3.0]])
    weights = np.array([0.0, 0.0, 1.0])
    for found in (
        moments_of_sparse(*compress(x, by_row), by_row=by_row, weights=weights),
        moments_of_present(np.asarray(x, order="C" if by_row else "F"), weights),
    ):
        assert found.mean.tolist() == [4, 3]
        assert found.m2.tolist() == [0, 0]


@pytest.mark.parametrize("by_row", [True, False])
def test_count_of_few_values_among_missing_ones_keeps_its_digits(by_row, rng):
    x, weights = np.full((100, 1), NAN), rng.uniform(size=100)
    x[50], x[70] = 3.0, 5.0
    weights[[50, 70]] = 1e-12, 3e-12
    assert_exact(
        moments_of_present(np.asarray(x, order="C" if by_row else "F"), weights), x, weights
    )


@pytest.mark.parametrize("by_row", [True, False])
def test_variance_is_never_negative(by_row, rng):
    x = np.append(np.full((1, 200), 1e9), rng.uniform(size=(1, 200)).repeat(50, axis=0), axis=0)
    weights = np.append(1e-300, rng.uniform(size=50))
    found = moments_of_sparse(*compress(x, by_row), by_row=by_row, weights=weights)
    assert (found.m2 >= 0).all()
    # The second center is off by a rounding of 1e9, 1.2e-7, whose square cancels to 2^-53 of it.
    assert (found.var() <= 1e-28).all()


@pytest.mark.parametrize("by_row", [True, False])
def test_rounding_errors_do_not_add_up_over_long_columns(by_row):
    x = np.full((400_000, 1), 0.1)
    x[::2] = 0.7
    found = moments_of_sparse(*compress(x, by_row), by_row=by_row)
    mean = (Fraction(0.1) + Fraction(0.7)) / 2
    var = (Fraction(0.7) - Fraction(0.1)) ** 2 / 4
    # Runs of 2^12 values, and the sum of 98 runs; in one run, the mean would be off by 2.6e-12.
    bound = (2**12 + 98) * EPS / 2
    assert abs(Fraction(found.mean[0]) - mean) <= bound * mean
    assert abs(Fraction(found.m2[0]) / 400_000 - var) <= 4 * bound * var


@pytest.mark.parametrize("by_row", [True, False])
def test_constant_columns_have_no_variance(by_row):
    x = np.full((1000, 2), [0.1, 1e30])
    found = moments_of_sparse(*compress(x, by_row), by_row=by_row)
    assert found.mean.tolist() == [0.1, 1e30]
    assert found.m2.tolist() == [0, 0]


def test_absent_rows_without_weight_count_for_nothing(rng):
    x, weights = rng.normal(1e6, 1, (300, 2)), 10.0 ** rng.uniform(-20, 0, 300)
    weights[::3] = 0
    x[::3] = 0
    found = moments_of_sparse(*compress(x, True), by_row=True, weights=weights)
    for k, (_, mean, m2) in enumerate(exact(x, weights)):
        assert abs(Fraction(found.mean[k]) - mean) <= 2 * EPS * mean
        # A rounding of the sum of the weights, times the squared offset, would be 1e-4 of it.
        assert abs(Fraction(found.m2[k]) / m2 - 1) <= 1e-9


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("by_row", [True, False])
def test_empty_matrices_have_empty_moments(shape, by_row):
    x = np.zeros(shape)
    assert moments_of_sparse(*compress(x, by_row), by_row=by_row) == Moments(
        np.full(shape[1], shape[0]), x.sum(axis=0), x.sum(axis=0)
    )
    assert moments_of_present(x).mean.shape == (shape[1],)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(
    ("starts", "places", "said"),
    [
        ([0, 1, 2], [0, 2], "places: outside"),
        ([0, 1, 2], [0, -1], "places: outside"),
        ([0, 1, 3], [0, 1], "starts: beyond"),
        ([0, 2, 1], [0, 1], "starts: not ascending"),
        ([-1, 1, 2], [0, 1], "starts: not ascending"),
        ([0, 2], [0, 1], "starts: not one for each line"),
        ([0, 1, 2], [0], "places: not one for each value"),
    ],
)
def test_entries_outside_of_the_matrix_are_refused(by_row, starts, places, said):
    entries = np.ones(2), np.array(starts), np.array(places, np.int32), (2, 2)
    with pytest.raises(ValueError, match=said):
        moments_of_sparse(*entries, by_row=by_row, weights=np.ones(2))


def test_core_refuses_what_it_cannot_read():
    rows = np.empty((6, 1))
    one, starts = np.ones(1), np.array([0, 1])
    for values, places in ((np.ones((1, 1)), None), (one, np.ones(1)), (one, starts[:1, None])):
        with pytest.raises((TypeError, ValueError)):
            _core.moments_of_entries(values, starts, places, 1, 1, True, None, *rows)
    with pytest.raises(ValueError, match="starts: not int64"):
        _core.moments_of_entries(one, starts.astype(np.int32), None, 1, 1, True, None, *rows)
