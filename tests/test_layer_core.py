"""What batchnorm._core offers to frameworks' layers: groups, parameters of any type, averages."""

import numpy as np
import pytest

from batchnorm import Moments, _core

EPS = 1e-3
COUNT, MEAN, LOW, M2, DOF = range(5)


def _forward(x, groups=1, size=0, **keywords):
    y = np.empty_like(x)
    statistics = np.full((groups, 5, x.shape[1]), np.nan)
    _core.layer_forward(x, y, 1, EPS, statistics, size, **keywords)
    return y, statistics


@pytest.fixture
def x(rng):
    return rng.normal(3, 2, (7, 5, 6)).astype(np.float32)


def test_layer_forward_gives_the_moments_of_x(x):
    _, statistics = _forward(x)
    moments = Moments.of(x)
    np.testing.assert_array_equal(statistics[0, COUNT], 42.0)
    np.testing.assert_array_equal(statistics[0, MEAN], moments.mean)
    np.testing.assert_array_equal(statistics[0, M2], moments.m2)
    np.testing.assert_array_equal(statistics[0, DOF], 41.0)


def test_layer_forward_normalizes_each_group_by_itself(x):
    y, statistics = _forward(x, groups=3, size=2)  # 2, 2 and what is left: 3 examples
    for k, part in enumerate((x[:2], x[2:4], x[4:])):
        alone, of_part = _forward(part.copy())
        np.testing.assert_array_equal(y[2 * k : 2 * k + len(part)], alone)
        np.testing.assert_array_equal(statistics[k], of_part[0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("step", [1, 2])
def test_layer_forward_takes_parameters_of_any_type_and_stride(x, rng, dtype, step):
    gamma, beta = rng.normal(size=(2, 5 * step)).astype(dtype)[:, ::step]
    y, _ = _forward(x, gamma=gamma, beta=beta)
    wide, _ = _forward(x, gamma=gamma.astype(np.float64), beta=beta.astype(np.float64))
    np.testing.assert_array_equal(y, wide)


def test_layer_normalize_repeats_what_forward_gave(x):
    y, statistics = _forward(x, groups=2, size=4)
    again = np.empty_like(x)
    _core.layer_normalize(x, again, 1, EPS, statistics, 4)
    np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("with_grad_x", [True, False])
def test_layer_backward_adds_the_parameters_gradients_of_all_groups(x, rng, with_grad_x):
    grad_y = rng.normal(size=x.shape).astype(np.float32)
    gamma = rng.normal(size=5)
    _, statistics = _forward(x, groups=3, size=2, gamma=gamma)
    grad_x = np.empty_like(x) if with_grad_x else None
    grad_gamma, grad_beta = np.empty((2, 5))
    _core.layer_backward(
        grad_y, x, grad_x, 1, EPS, statistics, True, 2, gamma, None, grad_gamma, grad_beta
    )
    sums = np.zeros((2, 5))
    for k, part in enumerate((slice(0, 2), slice(2, 4), slice(4, 7))):
        alone = np.empty_like(x[part])
        of_gamma, of_beta = np.empty((2, 5))
        _core.layer_backward(
            grad_y[part], x[part], alone, 1, EPS, statistics[k : k + 1], True, 0, gamma, None,
            of_gamma, of_beta,
        )  # fmt: skip
        sums += of_gamma, of_beta
        if with_grad_x:
            np.testing.assert_array_equal(grad_x[part], alone)
    # float32 sums of runs, in other runs where there is no second pass: 1e-6 of about 40 terms
    np.testing.assert_allclose((grad_gamma, grad_beta), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 7, 8])
def test_layer_forward_refuses_groups_that_do_not_cut_the_examples(x, size):
    with pytest.raises(ValueError, match="group_size"):
        _forward(x, groups=2, size=size)


def test_given_statistics_are_moments_of_that_mean_and_variance(rng):
    mean, var = rng.normal(size=4).astype(np.float32), rng.random(4)
    statistics = np.full((1, 5, 4), np.nan)
    assert _core.given_statistics(mean, var, statistics) == -1
    zero = np.zeros(4)
    np.testing.assert_array_equal(statistics[0], [zero + 1, mean, zero, var, zero])


def test_given_statistics_names_the_first_negative_variance():
    var = np.array([1.0, -1e-9, -2.0])
    assert _core.given_statistics(np.zeros(3), var, np.empty((1, 5, 3))) == 1


# ---- running averages ---------------------------------------------------------------------------


def _update(statistics, mean, var, tracked, momentum, *, propagate=False, count_empty=True):
    address = tracked.__array_interface__["data"][0] if tracked is not None else 0
    return _core.update_running(statistics, mean, var, address, momentum, propagate, count_empty)


def _running(dtype=np.float32):
    return np.array([1.0, 2.0], dtype), np.array([3.0, 4.0], dtype), np.array(5)


def _statistics(count=10.0, mean=(5.0, 6.0), var=(9.0, 18.0)):
    counts, dofs = np.full(2, count), np.full(2, max(count - 1, 0))
    return np.array([[counts, mean, np.zeros(2), np.multiply(count, var), dofs]], np.float64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_update_running_blends_mean_and_unbiased_variance(dtype):
    mean, var, tracked = _running(dtype)
    assert _update(_statistics(), mean, var, tracked, 0.25) == -1
    np.testing.assert_array_equal(mean, [2.0, 3.0])
    np.testing.assert_array_equal(var, [4.75, 8.0])  # 10/9 of 9 and 18
    assert tracked == 6


def test_update_running_weighs_all_batches_equally_when_momentum_is_nan():
    mean, var, tracked = _running(np.float64)
    _update(_statistics(), mean, var, tracked, np.nan)
    np.testing.assert_allclose(mean, [1 + 4 / 6, 2 + 4 / 6], rtol=1e-15)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", [MEAN, M2])
def test_update_running_leaves_all_alone_when_a_channel_is_not_finite(bad, row):
    mean, var, tracked = _running()
    statistics = _statistics()
    statistics[0, row, 1] = bad
    assert _update(statistics, mean, var, tracked, 0.25) == 1
    np.testing.assert_array_equal(np.r_[mean, var, tracked], [1, 2, 3, 4, 5])


def test_update_running_lets_in_what_is_not_finite_when_told_to():
    mean, var, tracked = _running()
    assert _update(_statistics(mean=(np.nan, 6)), mean, var, tracked, 0.25, propagate=True) == 0
    np.testing.assert_array_equal(mean, [np.nan, 3.0])


@pytest.mark.parametrize(("count_empty", "counted"), [(True, 6), (False, 5)])
def test_update_running_keeps_the_averages_when_the_batch_is_empty(count_empty, counted):
    mean, var, tracked = _running()
    empty = _statistics(0.0, (0, 0), (0, 0))
    _update(empty, mean, var, tracked, 0.25, count_empty=count_empty)
    np.testing.assert_array_equal(np.r_[mean, var, tracked], [1, 2, 3, 4, counted])


@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e20), ("float16", 300.0)])
def test_update_running_leaves_out_a_variance_that_the_averages_cannot_hold(dtype, large):
    mean, var, tracked = _running(dtype)
    batch = _statistics(2.0, (0, 0), (1, large**2))
    assert _update(batch, mean, var, tracked, 1e-6) == 1  # though a millionth of it could be held
    np.testing.assert_array_equal(np.r_[mean, var, tracked], [1, 2, 3, 4, 5])


def test_update_running_keeps_the_averages_of_a_batch_without_degrees_of_freedom():
    mean, var, tracked = _running()
    assert _update(_statistics(1.0, (5, 6), (0, 0)), mean, var, tracked, 0.25) == -1
    np.testing.assert_array_equal(np.r_[mean, var, tracked], [1, 2, 3, 4, 6])


def test_update_running_divides_by_the_degrees_of_freedom_of_weights(x, rng):
    w = rng.random((7, 6)) / 42  # weights that sum to about 1/2: Σw - 1 would be negative
    _, statistics = _forward(x, weights=np.broadcast_to(w[:, None], x.shape))
    mean, var = np.zeros((2, 5))
    _update(statistics, mean, var, None, 1.0)
    pairs = (x.astype(float)[:, :, :, None, None] - x.transpose(1, 0, 2)[None, :, None]) ** 2 / 2
    of_pairs = w[:, :, None, None] * w * (1 - np.eye(42).reshape(7, 6, 7, 6))
    exact = (pairs * of_pairs[:, None]).sum((0, 2, 3, 4)) / of_pairs.sum()
    np.testing.assert_allclose(var, exact, rtol=1e-12)
