from fractions import Fraction

import numpy as np
import pytest

from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.folding import fold_linear


def _parts(rng, rows=5, columns=7, dtype=np.float64):
    weight, bias = rng.standard_normal((rows, columns)), rng.standard_normal(rows)
    mean, var = rng.standard_normal(rows), rng.uniform(0.1, 4, rows)
    gamma, beta = rng.standard_normal(rows), rng.standard_normal(rows)
    return tuple(part.astype(dtype) for part in (weight, bias, mean, var, gamma, beta))


def test_fold_linear_equals_linear_then_frozen_batch_norm():
    rng = np.random.default_rng(0)
    weight, bias, mean, var, gamma, beta = _parts(rng)
    x = rng.standard_normal((20, 7))
    u = x @ weight.T + bias
    expected = gamma * (u - mean) / np.sqrt(var + 1e-3) + beta

    folded_weight, folded_bias = fold_linear(weight, bias, mean, var, gamma, beta, 1e-3)

    # A dot product of 7 terms and a handful of roundings on values below about 50.
    np.testing.assert_allclose(x @ folded_weight.T + folded_bias, expected, rtol=0, atol=1e-12)


def test_fold_linear_takes_absent_bias_gamma_and_beta_as_neutral():
    rng = np.random.default_rng(1)
    weight, _, mean, var, _, _ = _parts(rng)
    absent = fold_linear(weight, None, mean, var)
    neutral = fold_linear(weight, np.zeros(5), mean, var, np.ones(5), np.zeros(5))
    for ours, theirs in zip(absent, neutral, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_fold_linear_rounds_once_when_weights_are_float32():
    rng = np.random.default_rng(2)
    parts = _parts(rng, dtype=np.float32)
    wide = fold_linear(*(part.astype(np.float64) for part in parts), 1e-5)
    narrow = fold_linear(*parts, 1e-5)
    for folded, exact in zip(narrow, wide, strict=True):
        assert folded.dtype == np.float32
        np.testing.assert_array_equal(folded, exact.astype(np.float32))


def test_fold_linear_is_exact_when_the_deviation_is_a_power_of_two():
    weight, bias = np.array([[0.375, -3.0]]), np.array([1.5])
    folded_weight, folded_bias = fold_linear(
        weight, bias, np.array([0.25]), np.array([4.0]), np.array([3.0]), np.array([-1.0]), 0.0
    )
    scale = Fraction(3, 2)
    assert [Fraction(w) for w in folded_weight[0]] == [Fraction(3, 8) * scale, -3 * scale]
    assert Fraction(folded_bias[0]) == (Fraction(3, 2) - Fraction(1, 4)) * scale - 1


def test_fold_linear_leaves_its_arguments_alone():
    parts = _parts(np.random.default_rng(3))
    kept = [part.copy() for part in parts]
    fold_linear(*parts)
    for part, before in zip(parts, kept, strict=True):
        np.testing.assert_array_equal(part, before)


@pytest.mark.parametrize("name", ["bias", "mean", "var", "gamma", "beta"])
def test_fold_linear_names_the_array_of_the_wrong_shape(name):
    names = ("weight", "bias", "mean", "var", "gamma", "beta")
    arguments = dict(zip(names, _parts(np.random.default_rng(4)), strict=True))
    arguments[name] = np.ones(7)
    with pytest.raises(ShapeError, match=rf"{name} must have shape \(out,\) = \(5,\), got \(7,\)"):
        fold_linear(**arguments)


def test_fold_linear_refuses_a_weight_that_is_not_a_matrix():
    with pytest.raises(ShapeError, match=r"weight must have shape \(out, in\), got \(2, 3, 3\)"):
        fold_linear(np.ones((2, 3, 3)), None, np.zeros(2), np.ones(2))


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_fold_linear_refuses_a_variance_without_a_root(bad):
    with pytest.raises(ArgumentError, match="channel 1"):
        fold_linear(np.ones((2, 3)), None, np.zeros(2), np.array([1.0, bad]))
