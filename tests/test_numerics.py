"""The promises of docs on numerics, each against an oracle that is exact or wider."""

import math
from fractions import Fraction

import numpy as np
import pytest

import batchnorm
from batchnorm import Moments, reference

MEAN, VAR = 1e-12, 1e-9  # promise 1: mean relative to max(|mean|, std), variance relative
OUTPUT = 1e-6  # promise 2
GRADIENT = 1e-5  # promise 3, in norm
OFFSETS = [0.0, 1e2, 1e4, 1e6]
EPS = 1e-5

# longdouble (64 bits of significand) over n values: n·2⁻⁶⁴·κ ≤ 1e-9 at n = 1e5 and κ = 1e6 for a
# one-pass mean, and the corrected two-pass m2 below is far better.
wide_longdouble = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than float64 here"
)


def _exact(x):
    """Mean and biased variance per column of (n, C), as Fractions."""
    means, variances = [], []
    for column in np.asarray(x).astype(np.float64).T:
        values = [Fraction(float(v)) for v in column]
        mean = sum(values) / len(values)
        means.append(mean)
        variances.append(sum((v - mean) ** 2 for v in values) / len(values))
    return means, variances


def _exact_y(x, gamma, beta, eps=EPS, statistics=None):
    """y of (n, C): differences in rationals, then three roundings of float64 (below 1e-15)."""
    means, variances = statistics or _exact(x)
    y = np.empty(x.shape)
    for c, (mean, var) in enumerate(zip(means, variances, strict=True)):
        root = math.sqrt(float(var + Fraction(eps)))
        for i, v in enumerate(x[:, c].astype(np.float64)):
            y[i, c] = float(Fraction(float(v)) - mean) / root * gamma[c] + beta[c]
    return y


def _long(x):
    """Mean and variance per column in longdouble, by the corrected two-pass algorithm."""
    v = np.asarray(x).astype(np.longdouble)
    n = len(v)
    mean = v.sum(0) / n
    d = v - mean
    return mean + d.sum(0) / n, ((d * d).sum(0) - d.sum(0) ** 2 / n) / n


def _matrix(a, channel_axis=1):
    return np.moveaxis(np.asarray(a), channel_axis, -1).reshape(-1, a.shape[channel_axis])


def _assert_moments(m, means, variances):
    mean, var = np.array(means, np.float64), np.array(variances, np.float64)
    error = np.array([float(Fraction(float(a)) - b) for a, b in zip(m.mean, means, strict=True)])
    assert np.all(np.abs(error) <= MEAN * np.maximum(np.abs(mean), np.sqrt(var)))
    np.testing.assert_allclose(m.var(), var, rtol=VAR)


def _assert_output(y, exact, gamma, beta, half=None):
    """Promise 2; for float16 and bfloat16 that plus one rounding, half a unit in the last place."""
    g, b = np.maximum(1, np.abs(gamma)), np.abs(beta)
    bound = OUTPUT * np.maximum(1, np.abs(exact)) * g + b * 2.0**-23
    if half is not None:
        bits, smallest = {"float16": (10, -14), "bfloat16": (7, -126)}[half.name]
        exponent = np.frexp(np.maximum(np.abs(exact) + bound, 2.0**smallest))[1] - 1
        bound = bound + np.ldexp(0.5, exponent - bits)
    error = np.abs(y.astype(np.float64) - exact)
    assert np.all(error <= bound), (error / bound).max()


def _offset_values(rng, shape, offset, dtype):
    """offset + noise whose spread is no less than 8 units in the last place of the offset."""
    digits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[dtype.name]
    spread = max(1.0, offset * 2.0 ** (3 - digits))
    return (offset + spread * rng.normal(size=shape)).astype(dtype)


def _offsets_of(dtype):
    return [o for o in OFFSETS if dtype.name != "float16" or o < 1e4] + (
        [3e4] if dtype.name == "float16" else []
    )


# ---- statistics ---------------------------------------------------------------------------------


def test_moments_keep_their_bounds_at_every_offset_and_layout(layout, dtype):
    rng = np.random.default_rng(0)
    for offset in _offsets_of(dtype):
        v = _offset_values(rng, (4, 3, 5, 4), offset, dtype)
        m = Moments.of(layout.put(v), channel_axis=layout.channel_axis)
        _assert_moments(m, *_exact(_matrix(v)))


@pytest.mark.parametrize("offset", OFFSETS)
def test_moments_keep_their_bounds_when_float32(instruction_set, rng, offset):
    x = (offset + rng.normal(size=(150, 3))).astype(np.float32)
    _assert_moments(Moments.of(x), *_exact(x))


@wide_longdouble
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_moments_keep_their_bounds_when_large(instruction_set, rng, offset, channel_axis):
    x = (offset + rng.normal(size=(20, 6, 5000))).astype(np.float32)
    x = x if channel_axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    mean, var = _long(_matrix(x, channel_axis))
    m = Moments.of(x, channel_axis=channel_axis)
    assert np.all(np.abs(m.mean - mean) <= MEAN * np.maximum(np.abs(mean), np.sqrt(var)))
    np.testing.assert_allclose(m.var(), var.astype(np.float64), rtol=VAR)


@pytest.mark.parametrize("offset", [0.0, 1e6, 1e8])
@pytest.mark.parametrize("order", ["C", "F"])
def test_moments_var_of_float64_is_that_of_a_corrected_two_pass(
    instruction_set, rng, offset, order
):
    x = np.asarray(offset + rng.normal(size=(300, 3)), order=order)
    _, var = _exact(x)
    # n·u + n³κ²u³ = 7e-14 + 1e-24 at worst.
    np.testing.assert_allclose(Moments.of(x).var(), np.array(var, np.float64), rtol=300 * 2.0**-52)


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("where", [0, 50_000, 99_999])
def test_moments_var_is_kept_when_one_value_is_an_outlier(instruction_set, rng, kind, order, where):
    x = rng.normal(size=(100_000, 2))
    x[where] = 1e6
    x = np.asarray(x.astype(kind), order=order)
    mean, var = _long(x)
    m = Moments.of(x)
    np.testing.assert_allclose(m.var(), var.astype(np.float64), rtol=VAR)
    assert np.all(np.abs(m.mean - mean) <= MEAN * np.sqrt(var))


@pytest.mark.parametrize("order", ["C", "F"])
def test_moments_var_is_kept_when_three_probed_values_are_outliers(instruction_set, rng, order):
    # The driver takes a channel's center from the first, middle and last value; where all three
    # are far off, it must notice and sum about the mean again.
    x = 1e-3 * rng.normal(size=(2001, 3))
    x[[0, 1000, 2000]] = 1e6 + rng.normal(size=(3, 3))
    x = np.asarray(x.astype(np.float32), order=order)
    _assert_moments(Moments.of(x), *_exact(x))


def test_moments_var_is_kept_when_the_center_is_far_and_one_channel_only(instruction_set, rng):
    x = rng.normal(size=(999, 3)).astype(np.float32)
    x[:, 1] = (1e6 + rng.normal(size=999)).astype(np.float32)
    x[[0, 499, 998], 1] = -1e6
    _assert_moments(Moments.of(x), *_exact(x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_moments_nonfinite_value_stays_in_its_channel(instruction_set, rng, bad, channel_axis):
    x = rng.normal(size=(6, 19, 19)).astype(np.float32)
    dirty = x.copy()
    np.moveaxis(dirty, channel_axis, 0)[7, 2, 3] = bad
    a = Moments.of(x, channel_axis=channel_axis)
    b = Moments.of(dirty, channel_axis=channel_axis)
    others = np.arange(19) != 7
    np.testing.assert_array_equal(a.mean[others], b.mean[others])
    np.testing.assert_array_equal(a.m2[others], b.m2[others])
    assert not np.isfinite(b.mean[7])
    assert np.isnan(b.m2[7])


@pytest.mark.parametrize("dtype_name", ["float32", "float64"])
def test_moments_var_of_subnormal_values_is_what_it_is(instruction_set, dtype_name):
    tiny = np.finfo(dtype_name).smallest_subnormal
    x = np.array([[tiny], [3 * tiny]], dtype_name)
    m = Moments.of(x)
    assert m.mean[0] == float(2 * tiny)
    assert m.var()[0] == float(tiny) ** 2  # which is 0 for float64's


# ---- output -------------------------------------------------------------------------------------

GAMMA, BETA = np.array([1.0, -3.5, 0.25]), np.array([0.0, 100.0, -2.0])


def test_batch_norm_output_keeps_its_bound_at_every_offset_and_layout(layout, dtype):
    rng = np.random.default_rng(1)
    for offset in _offsets_of(dtype):
        v = _offset_values(rng, (4, 3, 5, 4), offset, dtype)
        y, _ = batchnorm.batch_norm(layout.put(v), GAMMA, BETA, channel_axis=layout.channel_axis)
        half = dtype if dtype.itemsize == 2 else None
        exact = _exact_y(_matrix(v), GAMMA, BETA)
        _assert_output(_matrix(layout.get(y, v.shape)), exact, GAMMA, BETA, half)


@pytest.mark.parametrize("offset", OFFSETS)
def test_batch_norm_output_keeps_its_bound_when_float32(instruction_set, rng, offset):
    x = (offset + rng.normal(size=(150, 3))).astype(np.float32)
    y, _ = batchnorm.batch_norm(x, GAMMA, BETA)
    _assert_output(y, _exact_y(x, GAMMA, BETA), GAMMA, BETA)


@pytest.mark.parametrize("offset", OFFSETS)
def test_inference_output_keeps_its_bound_with_float64_statistics(instruction_set, rng, offset):
    x = (offset + rng.normal(size=(150, 3))).astype(np.float32)
    m = Moments.of(x)
    y = batchnorm.batch_norm_inference(x, m.mean, m.var(), GAMMA, BETA)
    statistics = [Fraction(v) for v in m.mean], [Fraction(v) for v in m.var()]
    _assert_output(y, _exact_y(x, GAMMA, BETA, statistics=statistics), GAMMA, BETA)


@pytest.mark.parametrize("offset", [0.0, 1e2, 3e4])
def test_inference_output_is_one_rounding_from_exact_when_half(
    instruction_set, rng, half_dtype, offset
):
    x = _offset_values(rng, (100, 3), offset, half_dtype)
    m = Moments.of(x)
    y = batchnorm.batch_norm_inference(x, m.mean, m.var(), GAMMA, BETA)
    statistics = [Fraction(v) for v in m.mean], [Fraction(v) for v in m.var()]
    exact = _exact_y(x, GAMMA, BETA, statistics=statistics)
    _assert_output(y, exact, GAMMA, BETA, half_dtype)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batch_norm_output_is_one_rounding_from_exact_when_half(
    instruction_set, rng, half_dtype, offset
):
    x = _offset_values(rng, (100, 3), offset, half_dtype)
    y, _ = batchnorm.batch_norm(x, GAMMA, BETA)
    _assert_output(y, _exact_y(x, GAMMA, BETA), GAMMA, BETA, half_dtype)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_batch_norm_output_of_float64_keeps_float64_digits(instruction_set, rng, offset):
    x = offset + rng.normal(size=(150, 3))
    y, _ = batchnorm.batch_norm(x, GAMMA, BETA)
    # x - mean is exact to 2⁻⁵²·offset/2⁵³ thanks to mean_low; the rest is a handful of roundings
    # of values below 120, and n·u/2 of the standard deviation.
    np.testing.assert_allclose(y, _exact_y(x, GAMMA, BETA), rtol=0, atol=120 * 150 * 2.0**-53)


@wide_longdouble
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_output_keeps_its_bound_when_large(instruction_set, rng, offset, channel_axis):
    x = (offset + rng.normal(size=(20, 3, 5000))).astype(np.float32)
    x = x if channel_axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    y, _ = batchnorm.batch_norm(x, GAMMA, BETA, channel_axis=channel_axis)
    v = _matrix(x, channel_axis)
    mean, var = _long(v)
    exact = ((v - mean) / np.sqrt(var + EPS) * GAMMA + BETA).astype(np.float64)
    _assert_output(_matrix(y, channel_axis), exact, GAMMA, BETA)


# ---- gradients ----------------------------------------------------------------------------------


def _relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", [(8, 3, 9, 7), (500, 3), (2, 3, 1000)])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_backward_gradients_keep_their_bound_at_every_offset(
    instruction_set, rng, offset, shape, channel_axis
):
    x = (offset + rng.normal(size=shape)).astype(np.float32)
    g = rng.normal(size=shape).astype(np.float32)
    if channel_axis == -1:
        x, g = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, g))
    _, saved = batchnorm.batch_norm(x, GAMMA, BETA, channel_axis=channel_axis)
    ours = batchnorm.batch_norm_backward(g, saved)
    _, cache = reference.batch_norm(x, GAMMA, BETA, EPS, channel_axis)
    for a, b in zip(ours, reference.batch_norm_backward(g, cache), strict=True):
        assert _relative(a, b) <= GRADIENT


def test_backward_gradients_keep_their_bound_in_every_layout(layout, dtype):
    rng = np.random.default_rng(2)
    v = _offset_values(rng, (4, 3, 5, 4), 100.0, dtype)
    g = rng.normal(size=v.shape).astype(dtype)
    _, saved = batchnorm.batch_norm(layout.put(v), GAMMA, BETA, channel_axis=layout.channel_axis)
    grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(layout.put(g), saved)
    _, cache = reference.batch_norm(v.astype(np.float64), GAMMA, BETA)
    expected = reference.batch_norm_backward(g.astype(np.float64), cache)
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype.name, 0.0)
    assert _relative(layout.get(grad_x, v.shape), expected[0]) <= GRADIENT + unit
    assert _relative(grad_gamma, expected[1]) <= GRADIENT
    assert _relative(grad_beta, expected[2]) <= GRADIENT


@wide_longdouble
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_backward_gradients_of_float64_keep_float64_digits(instruction_set, rng, offset):
    x, g = offset + rng.normal(size=(400, 3)), rng.normal(size=(400, 3))
    _, saved = batchnorm.batch_norm(x, GAMMA)
    grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(g, saved)
    mean, var = _long(x)
    x_hat = (x - mean) / np.sqrt(var + EPS)
    sum_g, sum_gx = g.astype(np.longdouble).sum(0), (g * x_hat).sum(0)
    exact = GAMMA / np.sqrt(var + EPS) * (g - sum_g / 400 - x_hat * sum_gx / 400)
    # Sums of 400 terms that cancel to about √400 of their size: 400·√400·u = 1e-12.
    assert grad_beta is None
    assert _relative(grad_x, exact) <= 1e-12
    assert _relative(grad_gamma, sum_gx) <= 1e-12


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_backward_gradients_of_large_float32_keep_their_bound(instruction_set, rng, channel_axis):
    shape = (4, 3, 60_000) if channel_axis == 1 else (4, 60_000, 3)
    x = (100 + rng.normal(size=shape)).astype(np.float32)
    g = (1 + rng.normal(size=shape)).astype(np.float32)
    _, saved = batchnorm.batch_norm(x, GAMMA, BETA, channel_axis=channel_axis)
    ours = batchnorm.batch_norm_backward(g, saved)
    _, cache = reference.batch_norm(x, GAMMA, BETA, EPS, channel_axis)
    for a, b in zip(ours, reference.batch_norm_backward(g, cache), strict=True):
        assert _relative(a, b) <= GRADIENT


@pytest.mark.parametrize("size", [1e-3, 1e3, 1e8, 1e12])
def test_backward_gradients_scale_with_the_upstream_gradient(instruction_set, rng, size):
    x = rng.normal(size=(200, 3)).astype(np.float32)
    g = (size * rng.normal(size=(200, 3))).astype(np.float32)
    _, saved = batchnorm.batch_norm(x, GAMMA)
    grad_x, grad_gamma, _ = batchnorm.batch_norm_backward(g, saved)
    _, cache = reference.batch_norm(x, GAMMA)
    expected = reference.batch_norm_backward(g, cache)
    assert _relative(grad_x, expected[0]) <= GRADIENT
    assert _relative(grad_gamma, expected[1]) <= GRADIENT


@pytest.mark.parametrize("scale", [1e30, 1e25, 1e-10, 1e-15])
def test_backward_gradients_keep_their_bound_when_inputs_are_extreme(instruction_set, rng, scale):
    x = (scale * rng.normal(size=(200, 3))).astype(np.float32)
    g = (scale**0.3 * rng.normal(size=(200, 3))).astype(np.float32)
    _, saved = batchnorm.batch_norm(x)
    grad_x, _, _ = batchnorm.batch_norm_backward(g, saved)
    _, cache = reference.batch_norm(x)
    expected, _, _ = reference.batch_norm_backward(g, cache)
    # Below float32's smallest normal number a gradient is rounded to a multiple of 2⁻¹⁴⁹.
    slack = math.sqrt(600) * 2.0**-149 / np.linalg.norm(expected)
    assert _relative(grad_x, expected) <= GRADIENT + slack


def test_backward_gradients_keep_their_bound_when_products_exceed_float32(instruction_set, rng):
    # x and grad_y are far from overflow, and so are grad_x and grad_gamma; x · grad_y is not.
    x = (1e29 * rng.normal(size=(200, 3))).astype(np.float32)
    g = (1e10 * rng.normal(size=(200, 3))).astype(np.float32)
    _, saved = batchnorm.batch_norm(x, GAMMA)
    _, cache = reference.batch_norm(x, GAMMA)
    expected = reference.batch_norm_backward(g, cache)
    for a, b in zip(batchnorm.batch_norm_backward(g, saved)[:2], expected[:2], strict=True):
        assert _relative(a, b) <= GRADIENT


# ---- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.7, 1e7, 1e30])
@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 11, 3), (3, 3, 20_000)])
def test_batch_norm_of_a_constant_channel_is_exactly_beta(instruction_set, constant, shape):
    x = np.full(shape, constant, np.float32)
    y, saved = batchnorm.batch_norm(x, GAMMA, BETA)
    expected = BETA.astype(np.float32).reshape((1, 3) + (1,) * (len(shape) - 2))
    np.testing.assert_array_equal(y, np.broadcast_to(expected, shape))
    np.testing.assert_array_equal(saved.moments.m2, np.zeros(3))


def test_batch_norm_of_a_constant_channel_is_exactly_beta_in_every_layout(layout, dtype):
    v = np.full((4, 3, 5, 4), -3.7).astype(dtype)
    y, _ = batchnorm.batch_norm(layout.put(v), GAMMA, BETA, channel_axis=layout.channel_axis)
    expected = np.broadcast_to(BETA.astype(dtype).reshape(1, 3, 1, 1), v.shape)
    np.testing.assert_array_equal(layout.get(y, v.shape), expected)


def test_batch_norm_of_a_constant_channel_is_beta_when_the_constant_is_near_the_largest(
    instruction_set,
):
    # scikit-learn/scikit-learn#5602: a constant 1.8e301 gave NaN.
    y, saved = batchnorm.batch_norm(np.full((100, 3), 1.8e301), GAMMA, BETA)
    np.testing.assert_array_equal(y, np.broadcast_to(BETA, (100, 3)))
    np.testing.assert_array_equal(saved.moments.var(), np.zeros(3))


@pytest.mark.parametrize("constant", [1e7, 1e10, 1e30])
def test_inference_of_a_constant_channel_is_exactly_beta(instruction_set, constant):
    # torch 2.13 gives |y| = 25 at 1e7 and 97,634 at 1e10.
    x = np.full((9, 3), constant, np.float32)
    y = batchnorm.batch_norm_inference(x, x[0], np.zeros(3), GAMMA, BETA)
    np.testing.assert_array_equal(y, np.broadcast_to(BETA.astype(np.float32), (9, 3)))


def test_backward_of_a_constant_channel_is_finite(instruction_set, rng):
    _, saved = batchnorm.batch_norm(np.full((9, 3), 1e7, np.float32), GAMMA, BETA)
    g = rng.normal(size=(9, 3)).astype(np.float32)
    grad_x, grad_gamma, _ = batchnorm.batch_norm_backward(g, saved)
    expected = GAMMA / math.sqrt(EPS) * (g - g.astype(np.float64).mean(0))
    assert _relative(grad_x, expected) <= GRADIENT
    np.testing.assert_array_equal(grad_gamma, np.zeros(3))


@pytest.mark.parametrize("scale", [1e30, 1e37, 1e-17, 1e-30])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batch_norm_of_extreme_scales_is_standard_when_eps_allows(
    instruction_set, rng, scale, order
):
    x = np.asarray((scale * rng.normal(size=(500, 3))).astype(np.float32), order=order)
    y, _ = batchnorm.batch_norm(x, eps=0.0)
    _assert_output(y, _exact_y(x, np.ones(3), np.zeros(3), eps=0.0), np.ones(3), np.zeros(3))


def test_batch_norm_of_1e30_noise_is_standard_normal(instruction_set, rng):
    # torch 2.13 gives all zeros.
    y, _ = batchnorm.batch_norm((1e30 * rng.normal(size=(64, 3))).astype(np.float32))
    m = Moments.of(y)
    np.testing.assert_allclose(m.mean, np.zeros(3), atol=OUTPUT)
    np.testing.assert_allclose(m.std(), np.ones(3), rtol=2 * OUTPUT)


@pytest.mark.parametrize("dtype_name", ["float32", "float64"])
def test_batch_norm_of_subnormal_spreads_is_dominated_by_eps(instruction_set, rng, dtype_name):
    tiny = np.finfo(dtype_name).smallest_subnormal
    x = (rng.integers(-9, 9, (64, 3)) * tiny).astype(dtype_name)
    y, saved = batchnorm.batch_norm(x)
    grad_x, _, _ = batchnorm.batch_norm_backward(np.ones_like(x), saved)
    assert np.all(np.abs(y) <= 20 * float(tiny) / math.sqrt(EPS))
    assert np.isfinite(grad_x).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype_name", ["float32", "float64", "float16"])
def test_batch_norm_nonfinite_value_touches_no_other_channel(
    instruction_set, rng, bad, channel_axis, dtype_name
):
    x = rng.normal(size=(6, 19, 19)).astype(dtype_name)
    dirty = x.copy()
    np.moveaxis(dirty, channel_axis, 0)[7, 2, 3] = bad
    a, _ = batchnorm.batch_norm(x, channel_axis=channel_axis)
    b, _ = batchnorm.batch_norm(dirty, channel_axis=channel_axis)
    a, b = (np.moveaxis(v, channel_axis, 0) for v in (a, b))
    others = np.arange(19) != 7
    np.testing.assert_array_equal(a[others], b[others])
    assert np.isnan(b[7]).all()


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_backward_nonfinite_value_touches_no_other_channel(instruction_set, rng, channel_axis):
    x, g = rng.normal(size=(2, 6, 19, 19)).astype(np.float32)
    dirty = x.copy()
    np.moveaxis(dirty, channel_axis, 0)[7, 2, 3] = np.nan
    a, b = (
        batchnorm.batch_norm_backward(
            g, batchnorm.batch_norm(v, np.ones(19), channel_axis=channel_axis)[1]
        )
        for v in (x, dirty)
    )
    others = np.arange(19) != 7
    np.testing.assert_array_equal(
        np.moveaxis(a[0], channel_axis, 0)[others], np.moveaxis(b[0], channel_axis, 0)[others]
    )
    np.testing.assert_array_equal(a[1][others], b[1][others])


def test_inference_of_infinite_values_is_infinite(instruction_set):
    x = np.array([[np.inf, -np.inf, np.nan]] * 20, np.float32)
    y = batchnorm.batch_norm_inference(x, np.zeros(3), np.ones(3))
    np.testing.assert_array_equal(y, x)


# ---- statistics of a training step: float32 runs ------------------------------------------------

STEP = 1e-6  # mean relative to std, variance relative


@wide_longdouble
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("share", [0.45, 0.498, 0.6])
def test_training_variance_is_right_when_all_roundings_have_one_sign(
    instruction_set, rng, share, lanes
):
    # Eight values are added in float32, to each lane of a vector: here those whose additions round
    # up most, in squares, and down in values. Zeros are where the center is taken from, so that it
    # is as far off as `share` says.
    size, places = (1000, 256), 8
    chosen, sum_, squares = [], np.float32(0), np.float32(0)
    for _ in range(8):
        value = np.float32(1.7 * (1 + rng.uniform(-0.02, 0.02, 50_000)))
        wide = value.astype(np.float64)
        next_sum, next_squares = sum_ + value, np.float32(squares + wide * wide)
        gain = (next_squares - squares - wide * wide) / 1.7
        best = np.argmax(gain - 2 * share * (next_sum.astype(np.float64) - sum_ - wide))
        chosen.append(value[best])
        sum_, squares = next_sum[best], next_squares[best]
    x = np.zeros(size, np.float32)
    rows = round(share * size[0])
    x[100 : 100 + rows] = np.resize(np.repeat(chosen, 2 * lanes), rows * size[1]).reshape(rows, -1)
    x = x.reshape(1, 1, -1)
    for k in range(places):
        x[0, 0, k * (x.size - 1) // (places - 1)] = 0
    _, saved = batchnorm.batch_norm(x)
    exact = _long(x.reshape(-1, 1))[1][0]
    assert abs(saved.moments.var()[0] / exact - 1) < STEP


def _assert_step(x, y, saved, channel_axis, eps=EPS):
    """Statistics and y of `batch_norm` on a float32 array of any size, against longdouble."""
    values = _matrix(x, channel_axis)
    mean, var = _long(values)
    std = np.sqrt(var).astype(np.float64)
    assert np.all(np.abs(saved.moments.mean - mean) <= STEP * std)
    np.testing.assert_allclose(saved.moments.var(), var.astype(np.float64), rtol=STEP)
    exact = ((values - mean) / np.sqrt(var + eps)).astype(np.float64)
    one = np.ones(len(std))
    _assert_output(_matrix(y, channel_axis), exact, one, 0 * one)


def _step(x, channel_axis):
    """Normalize (N, C, S), or with channel_axis -1 the same values in (N, S, C)."""
    x = x if channel_axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    y, saved = batchnorm.batch_norm(x, channel_axis=channel_axis)
    return x, y, saved, channel_axis


both_axes = pytest.mark.parametrize("channel_axis", [1, -1])


@wide_longdouble
@both_axes
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", [(16, 70, 33), (5, 3, 4000), (2, 5000, 1), (300, 40, 1)])
def test_step_keeps_its_bounds_at_every_offset(instruction_set, rng, offset, shape, channel_axis):
    x = (offset + rng.normal(size=shape)).astype(np.float32)
    _assert_step(*_step(x, channel_axis))


@wide_longdouble
@pytest.mark.parametrize("values", [16, 255, 256, 300])
def test_step_keeps_its_bounds_with_few_values_in_many_channels(instruction_set, rng, values):
    # Rounding errors of float32 runs would not average out; of so many channels one is bad luck.
    x = rng.exponential(size=(values, 3000, 1)).astype(np.float32)
    _assert_step(*_step(x, 1))


@wide_longdouble
@both_axes
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-10, 1e10, 1e18, 1e30])
def test_step_keeps_its_bounds_where_squares_leave_float32(
    instruction_set, rng, scale, channel_axis
):
    x = (scale * rng.normal(size=(40, 11, 30))).astype(np.float32)
    _assert_step(*_step(x, channel_axis), eps=EPS)


@wide_longdouble
@both_axes
def test_step_keeps_its_bounds_when_the_probed_values_are_outliers(
    instruction_set, rng, channel_axis
):
    x = rng.normal(size=(1001, 12, 1))
    x[[0, 500, 1000], ::2] += 1e4
    _assert_step(*_step(x.astype(np.float32), channel_axis))


@wide_longdouble
@both_axes
def test_step_measures_each_channel_as_if_alone(instruction_set, rng, channel_axis):
    # Channels that are summed again, between channels that are not.
    x = rng.normal(size=(50, 40, 20)).astype(np.float32)
    plain = np.array(_step(x, channel_axis)[1])
    odd = x.copy()
    odd[:, 3], odd[:, 8:11] = 5.0, 1e-25 * x[:, 8:11]
    odd[:, 20] *= 1e25
    odd[0, 30, 0] = np.nan
    seen, y, saved, _ = _step(odd, channel_axis)
    ordinary = np.setdiff1d(np.arange(40), [3, 8, 9, 10, 20, 30])
    channels = y if channel_axis == 1 else np.moveaxis(y, -1, 1)
    before = plain if channel_axis == 1 else np.moveaxis(plain, -1, 1)
    np.testing.assert_array_equal(channels[:, ordinary], before[:, ordinary])
    assert (channels[:, 3] == 0).all()
    assert saved.moments.m2[3] == 0
    assert np.isnan(channels[:, 30]).all()
    _, var = _long(_matrix(seen, channel_axis))
    measured = [8, 9, 10, 20]
    np.testing.assert_allclose(
        saved.moments.var()[measured], var[measured].astype(float), rtol=STEP
    )


@wide_longdouble
@both_axes
@pytest.mark.parametrize("share", [0.5, 0.8, 0.85, 0.95])
def test_step_keeps_its_bounds_with_two_values(instruction_set, rng, share, channel_axis):
    # All additions of a run round the same way.
    low, high = np.float32(0), rng.uniform(0, 1, 64).astype(np.float32)
    x = np.where(rng.random((4096, 64)) < share, high, low)[:, :, None]
    x[[0, 2048, -1]] = low  # what the center of rows is taken from
    _assert_step(*_step(x, channel_axis))
