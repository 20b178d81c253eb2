from fractions import Fraction

import numpy as np
import pytest

from batchnorm import batch_norm_inference
from batchnorm.errors import ArgumentError, DTypeError, ShapeError
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


@pytest.mark.parametrize("kind", [np.int8, np.uint32, bool, int])
def test_fold_linear_of_integers_is_float64(kind):
    weight = np.array([[1, 0]], kind)
    folded_weight, folded_bias = fold_linear(weight, None, [1.0], [4.0], eps=0.0)
    assert (folded_weight.dtype, folded_bias.dtype) == (np.float64, np.float64)
    assert (folded_weight.tolist(), folded_bias.tolist()) == ([[0.5, 0.0]], [-0.5])


def test_fold_linear_keeps_the_type_of_weight(dtype):
    weight = np.array([[1, -2, 3]]).astype(dtype)
    folded_weight, folded_bias = fold_linear(weight, None, [0.5], [4.0], [3.0], eps=0.0)
    assert (folded_weight.dtype, folded_bias.dtype) == (dtype, dtype)
    assert folded_weight.astype(float).tolist() == [[1.5, -3.0, 4.5]]


def test_fold_linear_takes_another_byte_order():
    folded_weight, _ = fold_linear(np.array([[3.0]], ">f4"), None, [0.0], [4.0], eps=0.0)
    assert folded_weight.dtype == np.dtype("=f4")
    assert folded_weight == 1.5


@pytest.mark.parametrize("kind", [complex, "U3", object, "M8[s]", np.longdouble])
def test_fold_linear_refuses_a_weight_of_another_type(kind):
    if np.dtype(kind) == np.float64:
        pytest.skip("longdouble is float64 here")
    with pytest.raises(DTypeError, match="weight must be real numbers"):
        fold_linear(np.zeros((2, 3), kind), None, np.zeros(2), np.ones(2))


@pytest.mark.parametrize("name", ["bias", "mean", "var", "gamma", "beta"])
@pytest.mark.parametrize("kind", [complex, "U3"])
def test_fold_linear_refuses_vectors_of_another_type(name, kind):
    given = {"bias": None, "mean": np.zeros(2), "var": np.ones(2), name: np.ones(2).astype(kind)}
    with pytest.raises(DTypeError, match=f"{name} must be real numbers, got"):
        fold_linear(np.ones((2, 3)), **given)


@pytest.mark.parametrize("name", ["weight", "bias", "mean", "var", "gamma", "beta"])
def test_fold_linear_refuses_masked_values(name):
    names = ("weight", "bias", "mean", "var", "gamma", "beta")
    given = dict(zip(names, _parts(np.random.default_rng(5)), strict=True))
    given[name] = np.ma.MaskedArray(
        given[name], np.arange(given[name].size).reshape(given[name].shape) == 3
    )
    with pytest.raises(ArgumentError, match=f"{name} must not have masked values, got 1 of"):
        fold_linear(**given)


# What one refuses, the other has to refuse, in the same words.
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"var": [1.0, -1.0]}, "var must be finite and not negative, got -1.0 in channel 1"),
        ({"var": [1.0, np.nan]}, "var must be finite and not negative, got nan in channel 1"),
        ({"var": [np.inf, 1.0]}, "var must be finite and not negative, got inf in channel 0"),
        ({"mean": [0.0, np.nan]}, "mean must be finite, got nan in channel 1"),
        ({"mean": [-np.inf, 0.0]}, "mean must be finite, got -inf in channel 0"),
        ({"var": [1.0, 0.0], "eps": 0}, r"var \+ eps must be above zero, got 0.0 in channel 1"),
        ({"eps": -1e-5}, "eps must be finite and not negative, got -1e-05"),
        ({"eps": np.nan}, "eps must be finite and not negative, got nan"),
        ({"eps": "small"}, "eps must be a number, got 'small'"),
    ],
)
@pytest.mark.parametrize(
    "divide",
    [
        lambda **v: fold_linear(np.ones((2, 3)), None, **v),
        lambda **v: batch_norm_inference(np.ones((3, 2)), **v),
    ],
    ids=["fold_linear", "batch_norm_inference"],
)
def test_fold_linear_refuses_what_inference_refuses(divide, changed, message):
    with pytest.raises(ArgumentError, match=message):
        divide(**{"mean": [0.0, 0.0], "var": [1.0, 1.0], **changed})
