"""The functions of the NumPy face: what they compute, and what they refuse."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import batchnorm
from batchnorm import Moments, _core, reference
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError

SHAPES = [(2, 1), (7, 3), (3, 5, 4), (2, 3, 4, 5), (1, 4, 6), (2, 3, 2, 3, 2), (130, 65)]
# A few thousand terms of size below 10 in float64, in two orders.
FLOAT64 = 1e-11
FD = 1e-6  # of central differences (conftest.py)


def _parameters(rng, channels):
    return rng.normal(size=channels), rng.normal(size=channels)


# ---- against the reference ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_equals_the_reference(instruction_set, rng, shape):
    x = rng.normal(2, 3, shape)
    gamma, beta = _parameters(rng, shape[1])
    y, _ = batchnorm.batch_norm(x, gamma, beta, eps=1e-3)
    expected, _ = reference.batch_norm(x, gamma, beta, 1e-3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_equals_the_reference(instruction_set, rng, shape):
    x, g = rng.normal(2, 3, (2, *shape))
    gamma, beta = _parameters(rng, shape[1])
    _, saved = batchnorm.batch_norm(x, gamma, beta, eps=1e-3)
    _, cache = reference.batch_norm(x, gamma, beta, 1e-3)
    expected = reference.batch_norm_backward(g, cache)
    for a, b in zip(batchnorm.batch_norm_backward(g, saved), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=FLOAT64 * 100)


@pytest.mark.parametrize("shape", SHAPES)
def test_inference_equals_the_reference(instruction_set, rng, shape):
    x, mean, var = rng.normal(size=shape), rng.normal(size=shape[1]), rng.uniform(1, 2, shape[1])
    gamma, beta = _parameters(rng, shape[1])
    y = batchnorm.batch_norm_inference(x, mean, var, gamma, beta, eps=1e-3)
    expected = reference.batch_norm_inference(x, mean, var, gamma, beta, 1e-3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=FLOAT64)


def test_normalize_is_batch_norm_without_gamma_and_beta(rng):
    x = rng.normal(size=(4, 3, 5))
    np.testing.assert_array_equal(batchnorm.normalize(x), batchnorm.batch_norm(x)[0])


def test_normalize_passes_eps_and_channel_axis_on(rng):
    x = rng.normal(size=(4, 3, 5))
    y, _ = batchnorm.batch_norm(x, eps=0.5, channel_axis=-1)
    np.testing.assert_array_equal(batchnorm.normalize(x, eps=0.5, channel_axis=-1), y)


def test_batch_norm_takes_absent_gamma_and_beta_as_one_and_zero(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    y, _ = batchnorm.batch_norm(x, np.ones(3), np.zeros(3))
    np.testing.assert_array_equal(batchnorm.batch_norm(x)[0], y)


def test_batch_norm_saved_moments_are_those_of_x(rng):
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    _, saved = batchnorm.batch_norm(x)
    assert saved.moments == Moments.of(x)


def test_batch_norm_normalizes_by_the_biased_variance():
    y, _ = batchnorm.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    np.testing.assert_array_equal(y, [[-1.0], [1.0]])


def test_saved_repr_names_shape_and_mode(rng):
    _, saved = batchnorm.batch_norm(rng.normal(size=(4, 3)))
    assert repr(saved).startswith("Saved(x=(4, 3) float64, training")


def test_batch_norm_leaves_its_arguments_alone(rng):
    arguments = [rng.normal(size=(6, 3)), np.ones(3), np.zeros(3), np.ones(6)]
    before = [a.copy() for a in arguments]
    x, gamma, beta, weights = arguments
    _, saved = batchnorm.batch_norm(x, gamma, beta, weights=weights)
    batchnorm.batch_norm_backward(x, saved)
    for a, b in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batch_norm_reads_read_only_arrays(rng):
    x = rng.normal(size=(6, 3))
    x.flags.writeable = False
    assert batchnorm.normalize(x).flags.writeable


def test_batch_norm_earlier_saved_stays_valid_after_a_later_forward(rng):
    # pytorch/pytorch#73332: two forwards before a backward.
    first, second, g = rng.normal(size=(3, 6, 3))
    gamma = np.array([1.0, 2.0, 3.0])
    _, saved = batchnorm.batch_norm(first, gamma)
    expected = batchnorm.batch_norm_backward(g, saved)
    batchnorm.batch_norm(second, gamma)
    for a, b in zip(batchnorm.batch_norm_backward(g, saved)[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(a, b)


# ---- types --------------------------------------------------------------------------------------


def test_batch_norm_keeps_the_dtype_of_x(rng, dtype):
    y, _ = batchnorm.batch_norm(rng.normal(size=(4, 3)).astype(dtype), np.ones(3))
    assert y.dtype == dtype


def test_inference_keeps_the_dtype_of_x(rng, dtype):
    x = rng.normal(size=(4, 3)).astype(dtype)
    assert batchnorm.batch_norm_inference(x, np.zeros(3), np.ones(3)).dtype == dtype


def test_backward_keeps_the_dtypes_of_x_gamma_and_beta(rng, dtype):
    x = rng.normal(size=(4, 3)).astype(dtype)
    _, saved = batchnorm.batch_norm(x, np.ones(3, np.float32), np.zeros(3, np.float64))
    grads = batchnorm.batch_norm_backward(x, saved)
    assert [a.dtype for a in grads] == [dtype, np.float32, np.float64]


def test_backward_parameter_gradients_have_the_type_of_half_parameters(rng, half_dtype):
    x = rng.normal(size=(4, 3)).astype(half_dtype)
    _, saved = batchnorm.batch_norm(x, np.ones(3, half_dtype), np.zeros(3, half_dtype))
    assert {a.dtype for a in batchnorm.batch_norm_backward(x, saved)} == {half_dtype}


@pytest.mark.parametrize("kind", ["i1", "u2", "i8", "?"])
def test_batch_norm_of_integers_is_float64(kind):
    x = np.array([[0, 1], [1, 0], [1, 1]]).astype(kind)
    y, _ = batchnorm.batch_norm(x)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, batchnorm.normalize(x.astype(np.float64)))


def test_batch_norm_takes_nested_lists():
    np.testing.assert_array_equal(
        batchnorm.normalize([[1.0, 10.0], [3.0, 30.0]], eps=0), [[-1, -1], [1, 1]]
    )


def test_batch_norm_uses_the_digits_of_a_wider_beta():
    # 1 + 2⁻¹² is 1 in float16, and then y would be 0.
    x = np.array([[-1.0], [1.0]], np.float16)
    y, _ = batchnorm.batch_norm(x, [1.0], [1 + 2.0**-12], eps=0.0)
    assert y[0, 0] == 2.0**-12


def test_backward_converts_grad_y_to_the_type_of_x(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    _, saved = batchnorm.batch_norm(x)
    g = rng.integers(-3, 3, (4, 3))
    np.testing.assert_array_equal(
        batchnorm.batch_norm_backward(g, saved)[0],
        batchnorm.batch_norm_backward(g.astype(np.float32), saved)[0],
    )


# ---- out ----------------------------------------------------------------------------------------


def test_batch_norm_out_is_returned_with_the_same_values(rng, dtype):
    x = rng.normal(size=(4, 3, 5)).astype(dtype)
    out = np.empty_like(x)
    y, _ = batchnorm.batch_norm(x, out=out)
    assert y is out
    assert y.tobytes() == batchnorm.normalize(x).tobytes()


def test_inference_out_is_returned_with_the_same_values(rng, dtype):
    x = rng.normal(size=(4, 3, 5)).astype(dtype)
    out = np.empty_like(x)
    y = batchnorm.batch_norm_inference(x, np.zeros(3), np.ones(3), out=out)
    assert y is out
    assert y.tobytes() == batchnorm.batch_norm_inference(x, np.zeros(3), np.ones(3)).tobytes()


def test_backward_out_is_returned_with_the_same_values(rng, dtype):
    x, g = rng.normal(size=(2, 4, 3, 5)).astype(dtype)
    _, saved = batchnorm.batch_norm(x)
    out = np.empty_like(x)
    grad_x, _, _ = batchnorm.batch_norm_backward(g, saved, out=out)
    assert grad_x is out
    assert grad_x.tobytes() == batchnorm.batch_norm_backward(g, saved)[0].tobytes()


def _with_out(name, x, out):
    if name == "batch_norm":
        return batchnorm.batch_norm(x, out=out)
    if name == "inference":
        return batchnorm.batch_norm_inference(x, np.zeros(x.shape[1]), np.ones(x.shape[1]), out=out)
    _, saved = batchnorm.batch_norm(x)
    return batchnorm.batch_norm_backward(x.copy(), saved, out=out)


with_out = pytest.mark.parametrize("name", ["batch_norm", "inference", "backward"])


@with_out
def test_functional_refuses_out_when_it_is_x(name, rng):
    x = rng.normal(size=(4, 3))
    before = x.copy()
    with pytest.raises(ArgumentError, match=r"out must not share memory.*got an overlapping array"):
        _with_out(name, x, x)
    np.testing.assert_array_equal(x, before)


@with_out
def test_functional_refuses_out_when_it_overlaps_x(name, rng):
    memory = rng.normal(size=(5, 3))
    with pytest.raises(ArgumentError, match="out must not share memory"):
        _with_out(name, memory[:-1], memory[1:])


@with_out
def test_functional_takes_out_when_it_is_interleaved_with_x(name, rng):
    memory = rng.normal(size=(6, 3, 8))
    x, out = memory[..., ::2], memory[..., 1::2]
    before = x.copy()
    _with_out(name, x, out)
    np.testing.assert_array_equal(x, before)


def test_backward_refuses_out_when_it_is_grad_y(rng):
    x, g = rng.normal(size=(2, 4, 3))
    _, saved = batchnorm.batch_norm(x)
    with pytest.raises(ArgumentError, match="out must not share memory"):
        batchnorm.batch_norm_backward(g, saved, out=g)


def test_batch_norm_refuses_out_when_it_holds_gamma(rng):
    out = rng.normal(size=(4, 3))
    with pytest.raises(ArgumentError, match="out must not share memory"):
        batchnorm.batch_norm(rng.normal(size=(4, 3)), out[0], out=out)


@with_out
def test_functional_refuses_out_of_another_shape(name, rng):
    with pytest.raises(ShapeError, match=r"out must have.*\(4, 3\).*got \(3, 4\)"):
        _with_out(name, rng.normal(size=(4, 3)), np.empty((3, 4)))


@with_out
def test_functional_refuses_out_of_another_dtype(name, rng):
    with pytest.raises(DTypeError, match=r"out must have.*float64.*got.*float32"):
        _with_out(name, rng.normal(size=(4, 3)), np.empty((4, 3), np.float32))


@with_out
def test_functional_refuses_out_when_it_is_read_only(name, rng):
    out = np.empty((4, 3))
    out.flags.writeable = False
    with pytest.raises(ArgumentError, match="out must be writeable, got a read-only"):
        _with_out(name, rng.normal(size=(4, 3)), out)


@with_out
def test_functional_refuses_out_when_it_is_not_aligned(name, rng):
    packed = np.zeros(4, [("flag", "u1"), ("values", "f8", 3)])["values"]
    odd = np.zeros(8 * 12 + 1, np.uint8)[1:].view(np.float64).reshape(4, 3)
    for out, where in ((packed, r"strides \(25, 8\)"), (odd, "at an odd address")):
        with pytest.raises(ArgumentError, match=rf"out must be aligned.*{where}.*empty_like"):
            _with_out(name, rng.normal(size=(4, 3)), out)
        assert not out.any()


@with_out
def test_functional_refuses_out_when_it_is_masked(name, rng):
    with pytest.raises(
        DTypeError, match=r"out must be a numpy\.ndarray, got MaskedArray\. Pass its"
    ):
        _with_out(name, rng.normal(size=(4, 3)), np.ma.MaskedArray(np.empty((4, 3))))


@with_out
def test_functional_refuses_out_when_it_is_no_array(name, rng):
    with pytest.raises(DTypeError, match=r"out must be a numpy\.ndarray, got list"):
        _with_out(name, rng.normal(size=(2, 2)), [[0.0, 0.0], [0.0, 0.0]])


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 3), 1), ((2, 3, 4), 1), ((2, 3, 4), -1), ((3, 2, 4), 0)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_backward_equals_finite_differences_in_x(rng, differences, shape, axis, weighted):
    x, g = rng.normal(size=(2, *shape))
    gamma, beta = _parameters(rng, shape[axis])
    w = rng.choice([0.0, 0.5, 1.0, 2.0], [n for a, n in enumerate(shape) if a != axis % len(shape)])
    keywords = {"channel_axis": axis, "weights": w if weighted else None}

    def loss(v):
        return float((g * batchnorm.batch_norm(v, gamma, beta, **keywords)[0]).sum())

    _, saved = batchnorm.batch_norm(x, gamma, beta, **keywords)
    grad_x, _, _ = batchnorm.batch_norm_backward(g, saved)
    np.testing.assert_allclose(grad_x, differences(loss, x), rtol=0, atol=FD)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
def test_backward_equals_finite_differences_in_gamma_and_beta(rng, differences, weighted, axis):
    x, g = rng.normal(size=(2, 4, 3, 3))
    gamma, beta = _parameters(rng, 3)
    w = rng.choice([0.0, 0.5, 2.0], (4, 3)) if weighted else None

    def loss(a, b):
        return float((g * batchnorm.batch_norm(x, a, b, weights=w, channel_axis=axis)[0]).sum())

    _, saved = batchnorm.batch_norm(x, gamma, beta, weights=w, channel_axis=axis)
    _, grad_gamma, grad_beta = batchnorm.batch_norm_backward(g, saved)
    np.testing.assert_allclose(
        grad_gamma, differences(lambda a: loss(a, beta), gamma), rtol=0, atol=FD
    )
    np.testing.assert_allclose(
        grad_beta, differences(lambda b: loss(gamma, b), beta), rtol=0, atol=FD
    )


@pytest.mark.parametrize("shape", [(50, 3), (4, 3, 5, 5)])
def test_backward_norm_is_that_of_the_identity_when_eps_is_zero(instruction_set, rng, shape):
    x, g = rng.normal(1, 2, (2, *shape))
    gamma = np.array([0.5, -2.0, 3.0])
    _, saved = batchnorm.batch_norm(x, gamma, eps=0.0)
    grad_x, _, _ = batchnorm.batch_norm_backward(g, saved)
    for c in range(3):
        v, d = x[:, c].ravel(), g[:, c].ravel()
        m, var = v.size, v.var()
        x_hat = (v - v.mean()) / np.sqrt(var)
        expected = gamma[c] ** 2 / var * (d @ d - d.sum() ** 2 / m - (d @ x_hat) ** 2 / m)
        np.testing.assert_allclose((grad_x[:, c] ** 2).sum(), expected, rtol=1e-12)


def test_backward_of_a_constant_gradient_is_zero(instruction_set, rng):
    _, saved = batchnorm.batch_norm(rng.normal(size=(50, 3)), eps=0.0)
    grad_x, _, _ = batchnorm.batch_norm_backward(np.ones((50, 3)), saved)
    np.testing.assert_allclose(grad_x, np.zeros((50, 3)), atol=1e-14)


def test_backward_gives_no_gradient_of_an_absent_gamma(rng):
    x = rng.normal(size=(4, 3))
    _, saved = batchnorm.batch_norm(x, None, np.zeros(3))
    _, grad_gamma, grad_beta = batchnorm.batch_norm_backward(x, saved)
    assert grad_gamma is None
    np.testing.assert_allclose(grad_beta, x.sum(0), atol=1e-14)


def test_backward_gives_no_gradient_of_an_absent_beta(rng):
    x = rng.normal(size=(4, 3))
    _, saved = batchnorm.batch_norm(x, np.ones(3))
    _, grad_gamma, grad_beta = batchnorm.batch_norm_backward(x, saved)
    assert grad_beta is None
    assert grad_gamma.shape == (3,)


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_mask_equals_leaving_the_values_out(instruction_set, rng, channel_axis):
    x = rng.normal(size=(20, 3)).astype(np.float32)
    mask = np.arange(20) % 4 != 1
    gamma, beta = _parameters(rng, 3)
    y, saved = batchnorm.batch_norm(x, gamma, beta, weights=mask, channel_axis=channel_axis)
    expected, alone = batchnorm.batch_norm(x[mask], gamma, beta, channel_axis=channel_axis)
    # Both are within promise 2 of one exact value.
    np.testing.assert_allclose(y[mask], expected, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(saved.moments.var(), alone.moments.var(), rtol=2e-9)


def test_batch_norm_integer_weights_are_repetition(instruction_set, rng):
    x, g = rng.normal(size=(2, 12, 3))
    w = np.array([1, 2, 3, 1] * 3)
    y, saved = batchnorm.batch_norm(x, np.ones(3), weights=w)
    grad_x, _, _ = batchnorm.batch_norm_backward(g, saved)
    repeats = np.repeat(np.arange(12), w)
    expected, alone = batchnorm.batch_norm(x[repeats], np.ones(3))
    # The loss sees y once; each copy takes its share of grad_y, and x gets what its copies get.
    copies, _, _ = batchnorm.batch_norm_backward((g / w[:, None])[repeats], alone)
    gathered = np.zeros_like(x)
    np.add.at(gathered, repeats, copies)
    np.testing.assert_allclose(y[repeats], expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(grad_x, gathered, rtol=0, atol=1e-13)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_is_zero_where_the_weight_is(rng, dtype, channel_axis):
    x = rng.normal(size=(6, 5, 5)).astype(dtype)
    w = np.arange(30).reshape(6, 5) % 3
    y, _ = batchnorm.batch_norm(x, np.ones(5), np.ones(5), weights=w, channel_axis=channel_axis)
    covered = np.broadcast_to(np.expand_dims(w == 0, channel_axis), x.shape)
    np.testing.assert_array_equal(y[covered].astype(float), 0)
    assert np.all(y[~covered].astype(float) != 0)


def test_backward_is_zero_where_the_weight_is(rng, dtype):
    x, g = rng.normal(size=(2, 6, 5, 5)).astype(dtype)
    w = np.arange(30).reshape(6, 5) % 3
    _, saved = batchnorm.batch_norm(x, np.ones(5), weights=w)
    grad_x, _, _ = batchnorm.batch_norm_backward(g, saved)
    covered = np.broadcast_to((w == 0)[:, None], x.shape)
    np.testing.assert_array_equal(grad_x[covered].astype(float), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_x_under_zero_weight_does_not_matter(
    instruction_set, rng, dtype, bad, channel_axis
):
    x, g = rng.normal(size=(2, 6, 9, 9)).astype(dtype)
    w = np.arange(54).reshape(6, 9) % 3
    dirty = np.where(np.expand_dims(w == 0, channel_axis), np.array(bad, dtype), x)
    results = []
    for v in (x, dirty):
        y, saved = batchnorm.batch_norm(
            v, np.ones(9), np.ones(9), weights=w, channel_axis=channel_axis
        )
        results.append([y, *batchnorm.batch_norm_backward(g, saved)])
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_backward_grad_y_under_zero_weight_does_not_matter(
    instruction_set, rng, dtype, bad, channel_axis
):
    x, g = rng.normal(size=(2, 6, 9, 9)).astype(dtype)
    w = np.arange(54).reshape(6, 9) % 3
    dirty = np.where(np.expand_dims(w == 0, channel_axis), np.array(bad, dtype), g)
    _, saved = batchnorm.batch_norm(x, np.ones(9), np.ones(9), weights=w, channel_axis=channel_axis)
    for a, b in zip(
        batchnorm.batch_norm_backward(g, saved),
        batchnorm.batch_norm_backward(dirty, saved),
        strict=True,
    ):
        assert a.tobytes() == b.tobytes()


def test_batch_norm_of_an_all_masked_batch_is_zero(dtype):
    x = np.full((4, 3, 5), np.nan).astype(dtype)
    y, saved = batchnorm.batch_norm(x, np.ones(3), np.ones(3), weights=np.zeros((4, 5)))
    np.testing.assert_array_equal(y.astype(float), np.zeros(x.shape))
    assert saved.moments.count == 0


def test_backward_of_an_all_masked_batch_is_zero():
    x = np.full((4, 3, 5), np.nan)
    _, saved = batchnorm.batch_norm(x, np.ones(3), np.ones(3), weights=np.zeros((4, 5)))
    for grad in batchnorm.batch_norm_backward(x, saved):
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_batch_norm_weights_of_one_equal_no_weights(rng):
    x, g = rng.normal(size=(2, 6, 3))
    _, plain = batchnorm.batch_norm(x, np.ones(3))
    _, weighted = batchnorm.batch_norm(x, np.ones(3), weights=np.ones(6))
    a, b = batchnorm.batch_norm_backward(g, plain), batchnorm.batch_norm_backward(g, weighted)
    np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-13)


# ---- masked arrays ------------------------------------------------------------------------------


def _masked(rng, shape, dtype=np.float64, shared=False, axis=1):
    """Values, NaN where they are masked; each channel has two others, and channel 0 all."""
    x = rng.normal(3, 2, shape).astype(dtype)
    mask = rng.random(shape) < 0.4
    by_channel = np.moveaxis(mask, axis, 0).reshape(shape[axis], -1)
    if shared:
        mask[...] = mask.take([0], axis)
    else:
        mask[(slice(None),) * (axis % len(shape)) + (0,)] = False
    assert ((~by_channel).sum(1) > 1).all()
    x[mask] = np.nan
    return np.ma.MaskedArray(x, mask)


def _float64(a):
    return np.asarray(a).astype(np.float64)


_MASKED_SHAPES = [((12, 3), 1), ((4, 3, 5), 1), ((4, 5, 3), -1), ((3, 4, 5), 0), ((30, 1), 1)]


@pytest.mark.parametrize(("shape", "axis"), _MASKED_SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_batch_norm_of_a_masked_array_is_that_of_the_other_values(
    instruction_set, rng, dtype, shape, axis, weighted
):
    x = _masked(rng, shape, dtype, axis=axis)
    g = rng.normal(size=shape).astype(dtype)
    channels = shape[axis]
    gamma, beta = _parameters(rng, channels)
    others = [n for k, n in enumerate(shape) if k != axis % len(shape)]
    w = rng.choice([0.5, 1.0, 2.0], others) if weighted else None
    y, saved = batchnorm.batch_norm(x, gamma, beta, channel_axis=axis, weights=w)
    grads = batchnorm.batch_norm_backward(g, saved)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.mask, x.mask)
    values, of_y, of_g, of_x = (np.moveaxis(np.asarray(v), axis, 0) for v in (x, y, g, grads[0]))
    # Both sides are within promises 2 and 3 of the exact values, and rounded to the type.
    close = {"rtol": max(2e-6, 4 * _eps(dtype)), "atol": max(1e-5, 10 * _eps(dtype))}
    for c in range(channels):
        kept = ~np.moveaxis(x.mask, axis, 0)[c]
        alone, of_alone = batchnorm.batch_norm(
            values[c][kept][:, None], gamma[[c]], beta[[c]],
            weights=None if w is None else w[kept],
        )  # fmt: skip
        expected = batchnorm.batch_norm_backward(of_g[c][kept][:, None], of_alone)
        np.testing.assert_allclose(_float64(of_y[c][kept]), _float64(alone[:, 0]), **close)
        np.testing.assert_allclose(_float64(of_x[c][kept]), _float64(expected[0][:, 0]), **close)
        np.testing.assert_allclose([grads[1][c], grads[2][c]], np.ravel(expected[1:]), **close)
        for hidden in (of_y[c][~kept], of_x[c][~kept]):
            np.testing.assert_array_equal(_float64(hidden), 0)
        counts = np.broadcast_to(saved.moments.count, channels), of_alone.moments.count
        np.testing.assert_allclose(counts[0][c], counts[1], rtol=1e-15)
        np.testing.assert_allclose(saved.var[c], of_alone.var[0], rtol=2e-6)


def _eps(dtype):
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[
        dtype.name
    ]


def test_batch_norm_of_a_masked_array_equals_finite_differences(rng, differences):
    x, g = _masked(rng, (5, 3, 4)), rng.normal(size=(5, 3, 4))
    gamma, beta = _parameters(rng, 3)
    w = rng.choice([0.5, 1.0, 2.0], (5, 4))

    def loss(v):
        y, _ = batchnorm.batch_norm(np.ma.MaskedArray(v, x.mask), gamma, beta, weights=w)
        return float((g * y.data).sum())

    _, saved = batchnorm.batch_norm(x, gamma, beta, weights=w)
    grad_x, _, _ = batchnorm.batch_norm_backward(g, saved)
    start = np.where(x.mask, 0.0, x.data)
    np.testing.assert_allclose(grad_x, differences(loss, start), rtol=0, atol=FD)


def test_batch_norm_of_a_mask_that_channels_share_is_that_of_weights(rng, dtype):
    x, g = _masked(rng, (6, 3, 5), dtype, shared=True), rng.normal(size=(6, 3, 5)).astype(dtype)
    y, saved = batchnorm.batch_norm(x, np.ones(3), np.ones(3))
    expected, other = batchnorm.batch_norm(x.data, np.ones(3), np.ones(3), weights=~x.mask[:, 0])
    assert y.data.tobytes() == expected.tobytes()
    assert saved.moments == other.moments
    for a, b in zip(
        batchnorm.batch_norm_backward(g, saved),
        batchnorm.batch_norm_backward(g, other),
        strict=True,
    ):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("mask", [np.ma.nomask, np.zeros((6, 3), bool)])
def test_functions_on_a_masked_array_with_nothing_masked_give_the_same(rng, mask):
    x, g = rng.normal(size=(2, 6, 3))
    masked = np.ma.MaskedArray(x, mask)
    y, saved = batchnorm.batch_norm(masked, np.ones(3))
    expected, other = batchnorm.batch_norm(x, np.ones(3))
    inferred = batchnorm.batch_norm_inference(masked, np.zeros(3), np.ones(3))
    for result in (y, inferred, batchnorm.normalize(masked)):
        assert isinstance(result, np.ma.MaskedArray)
        assert not np.ma.is_masked(result)
    assert y.data.tobytes() == expected.tobytes()
    grads = batchnorm.batch_norm_backward(np.ma.MaskedArray(g, mask), saved)
    assert grads[0].tobytes() == batchnorm.batch_norm_backward(g, other)[0].tobytes()


def test_saved_moments_of_a_masked_array_are_those_of_moments_of(rng):
    x = _masked(rng, (9, 3, 2))
    _, saved = batchnorm.batch_norm(x)
    m = Moments.of(x)
    np.testing.assert_array_equal(saved.moments.count, m.count)
    np.testing.assert_array_equal(saved.moments.dof, m.dof)
    np.testing.assert_allclose(saved.moments.m2, m.m2, rtol=1e-14)


def test_normalize_of_a_masked_array_is_batch_norm_of_it(rng):
    x = _masked(rng, (9, 3, 2))
    y, (expected, _) = batchnorm.normalize(x), batchnorm.batch_norm(x)
    np.testing.assert_array_equal(y.mask, x.mask)
    assert y.data.tobytes() == expected.data.tobytes()


@pytest.mark.parametrize("shared", [True, False])
def test_inference_of_a_masked_array_is_that_of_its_data_and_zero_where_it_is_masked(
    rng, dtype, shared
):
    x = _masked(rng, (5, 3, 4), dtype, shared)
    mean, (gamma, beta) = rng.normal(size=3), _parameters(rng, 3)
    y = batchnorm.batch_norm_inference(x, mean, np.ones(3), gamma, beta)
    plain = batchnorm.batch_norm_inference(x.data, mean, np.ones(3), gamma, beta)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.mask, x.mask)
    np.testing.assert_array_equal(_float64(y.data), np.where(x.mask, 0, _float64(plain)))


def test_functions_on_a_masked_array_write_to_out(rng):
    x = _masked(rng, (6, 3))
    out = np.full((6, 3), 7.0)
    y, saved = batchnorm.batch_norm(x, out=out)
    assert np.shares_memory(y.data, out)
    np.testing.assert_array_equal(out, batchnorm.batch_norm(x)[0].data)
    y = batchnorm.batch_norm_inference(x, np.zeros(3), np.ones(3), out=out)
    assert np.shares_memory(y.data, out)
    np.testing.assert_array_equal(out[x.mask], 0)
    assert batchnorm.batch_norm_backward(np.ones((6, 3)), saved, out=out)[0] is out
    np.testing.assert_array_equal(out[x.mask], 0)


def test_batch_norm_mask_of_y_is_a_copy(rng):
    x = _masked(rng, (6, 3))
    kept = x.mask.copy()
    y, _ = batchnorm.batch_norm(x)
    y[...] = 1
    np.testing.assert_array_equal(x.mask, kept)


def test_functions_leave_a_masked_array_alone(rng):
    x = _masked(rng, (6, 3))
    data, mask = x.data.copy(), x.mask.copy()
    _, saved = batchnorm.batch_norm(x)
    batchnorm.batch_norm_backward(x, saved)
    batchnorm.batch_norm_inference(x, np.zeros(3), np.ones(3))
    np.testing.assert_array_equal(x.data, data)
    np.testing.assert_array_equal(x.mask, mask)


def test_batch_norm_of_a_channel_that_is_masked_is_zero(rng):
    x = np.ma.MaskedArray(rng.normal(size=(6, 3)))
    x[:, 1] = np.ma.masked
    y, saved = batchnorm.batch_norm(x, np.ones(3), np.ones(3))
    np.testing.assert_array_equal(y.data[:, 1], 0)
    np.testing.assert_array_equal(saved.moments.count, [6, 0, 6])
    grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(np.ones((6, 3)), saved)
    np.testing.assert_array_equal(grad_x[:, 1], 0)
    assert (grad_gamma[1], grad_beta[1]) == (0, 0)


def test_batch_norm_refuses_a_channel_of_one_value_that_is_not_masked(rng):
    x = np.ma.MaskedArray(rng.normal(size=(6, 3)))
    x[1:, 2] = np.ma.masked
    with pytest.raises(ShapeError, match="more than one value of non-zero weight.*channel 2 has"):
        batchnorm.batch_norm(x)


@pytest.mark.parametrize("masked_x", [True, False])
def test_backward_takes_masked_gradients_for_zero(rng, dtype, masked_x):
    x = _masked(rng, (6, 3), dtype) if masked_x else rng.normal(size=(6, 3)).astype(dtype)
    g = _masked(rng, (6, 3), dtype)
    _, saved = batchnorm.batch_norm(x, np.ones(3), np.ones(3))
    for a, b in zip(
        batchnorm.batch_norm_backward(g, saved),
        batchnorm.batch_norm_backward(g.filled(0), saved),
        strict=True,
    ):
        assert type(a) is np.ndarray
        np.testing.assert_array_equal(a, b)


def test_batch_norm_masked_weights_are_zero(rng):
    x, w = rng.normal(size=(4, 3)), np.ma.MaskedArray([1.0, np.nan, 2.0, 3.0], [0, 1, 0, 0])
    y, _ = batchnorm.batch_norm(x, weights=w)
    np.testing.assert_array_equal(y, batchnorm.batch_norm(x, weights=[1, 0, 2, 3])[0])


@pytest.mark.parametrize("argument", ["gamma", "beta", "mean", "var"])
def test_inference_refuses_masked_vectors(argument):
    with pytest.raises(ArgumentError, match=f"{argument} must not have masked values, got 1 of 3"):
        _per_channel(argument, np.ma.MaskedArray(np.ones(3), [0, 1, 0]))


# ---- the inverse --------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_inverse_of_inference_is_x(dtype, layout, seed):
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(1, 5, 4))
    c = shape[1]
    mean, var = random.normal(0, 4, c), random.uniform(0.25, 4, c)
    gamma, beta = random.uniform(0.25, 2, c) * random.choice([-1, 1], c), random.normal(0, 2, c)
    x = layout.put((mean[:, None, None] + 3 * random.normal(size=shape)).astype(dtype))
    given = (mean, var, gamma, beta)
    y = batchnorm.batch_norm_inference(x, *given, channel_axis=layout.channel_axis)
    found = batchnorm.batch_norm_inverse(y, *given, channel_axis=layout.channel_axis)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    before, after, of_y = (_float64(layout.get(v, shape)) for v in (x, found, y))
    # y has a few roundings of numbers below |y| + |beta|, which the way back multiplies, and x some
    # of numbers below |x| + |mean|.
    b, m, scale = (v[:, None, None] for v in (beta, mean, np.sqrt(var + 1e-5) / np.abs(gamma)))
    bound = 4 * _eps(dtype) * (scale * (abs(of_y) + abs(b)) + abs(before) + abs(m))
    assert (abs(after - before) <= bound).all()


def test_inverse_is_the_affine_map_that_undoes_the_reference(rng):
    y, mean, var = rng.normal(size=(4, 3, 5)), rng.normal(size=3), rng.uniform(1, 2, 3)
    gamma, beta = _parameters(rng, 3)
    x = batchnorm.batch_norm_inverse(y, mean, var, gamma, beta, eps=1e-3)
    again = reference.batch_norm_inference(x, mean, var, gamma, beta, 1e-3)
    np.testing.assert_allclose(again, y, rtol=0, atol=FLOAT64)


def test_inverse_undoes_a_training_batch_by_its_moments(rng):
    x, (gamma, beta) = rng.normal(3, 2, (20, 3)), _parameters(rng, 3)
    y, saved = batchnorm.batch_norm(x, gamma, beta)
    m = saved.moments
    found = batchnorm.batch_norm_inverse(y, m.mean, m.var(), gamma, beta)
    np.testing.assert_allclose(found, x, rtol=0, atol=FLOAT64)


def test_inverse_takes_absent_gamma_and_beta_as_one_and_zero(rng):
    y, mean, var = rng.normal(size=(4, 3)), rng.normal(size=3), rng.uniform(1, 2, 3)
    np.testing.assert_array_equal(
        batchnorm.batch_norm_inverse(y, mean, var),
        batchnorm.batch_norm_inverse(y, mean, var, np.ones(3), np.zeros(3)),
    )


def test_inverse_of_integers_is_float64():
    x = batchnorm.batch_norm_inverse([[1], [3]], [5.0], [4.0], eps=0.0)
    assert x.dtype == np.float64
    assert x.tolist() == [[7.0], [11.0]]


def test_inverse_of_a_masked_array_is_masked(rng, dtype):
    y = _masked(rng, (5, 3, 4), dtype)
    x = batchnorm.batch_norm_inverse(y, np.ones(3), np.ones(3))
    plain = batchnorm.batch_norm_inverse(y.data, np.ones(3), np.ones(3))
    np.testing.assert_array_equal(x.mask, y.mask)
    np.testing.assert_array_equal(_float64(x.data), np.where(y.mask, 0, _float64(plain)))


def test_inverse_writes_to_out(rng):
    y = rng.normal(size=(4, 3))
    out = np.empty_like(y)
    assert batchnorm.batch_norm_inverse(y, np.ones(3), np.ones(3), out=out) is out
    np.testing.assert_array_equal(out, batchnorm.batch_norm_inverse(y, np.ones(3), np.ones(3)))


def _inverse(**changed):
    given = {"y": np.ones((4, 3)), "mean": np.zeros(3), "var": np.ones(3), "gamma": np.ones(3)}
    return batchnorm.batch_norm_inverse(**{**given, **changed})


@pytest.mark.parametrize("bad", [0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324])
def test_inverse_refuses_a_gamma_that_cannot_be_divided_by_and_names_the_channel(bad):
    with pytest.raises(
        ArgumentError, match=r"gamma must be finite, and not zero.*channel 1 \(1 of 3"
    ):
        _inverse(gamma=[1.0, bad, 1.0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"y": np.ones(3)}, ShapeError, "y must have at least 2 axes"),
        ({"y": np.ones((4, 3), complex)}, DTypeError, "y must be real numbers"),
        ({"channel_axis": 2}, ShapeError, "channel_axis must be an axis of y"),
        ({"mean": None}, ArgumentError, "mean and var must be given"),
        ({"mean": [0, np.nan, 0]}, ArgumentError, "mean must be finite, got nan in channel 1"),
        ({"var": [1, 1, -1]}, ArgumentError, "var must be finite and not negative.*channel 2"),
        ({"var": [1, 0, 1], "eps": 0}, ArgumentError, r"var \+ eps must be above zero.*channel 1"),
        ({"eps": -1e-5}, ArgumentError, "eps must be finite and not negative"),
        ({"beta": [0, 0, np.inf]}, ArgumentError, "beta must be finite, got inf in channel 2"),
        ({"gamma": np.ones(2)}, ShapeError, "gamma must have shape"),
        ({"out": np.ones((3, 4))}, ShapeError, "out must have the shape and type of y"),
    ],
)
def test_inverse_refuses_what_inference_does(changed, error, message):
    with pytest.raises(error, match=message):
        _inverse(**changed)


# ---- empty --------------------------------------------------------------------------------------

EMPTY = [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0)]


@pytest.mark.parametrize("shape", EMPTY)
def test_batch_norm_of_empty_input_is_empty(shape, dtype):
    y, saved = batchnorm.batch_norm(np.empty(shape, dtype), np.ones(3), np.zeros(3))
    assert (y.shape, y.dtype, float(saved.moments.count)) == (shape, dtype, 0.0)


@pytest.mark.parametrize("shape", EMPTY)
def test_backward_of_empty_input_has_zero_parameter_gradients(shape):
    _, saved = batchnorm.batch_norm(np.empty(shape), np.ones(3), np.zeros(3))
    grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(np.empty(shape), saved)
    assert grad_x.shape == shape
    np.testing.assert_array_equal([grad_gamma, grad_beta], np.zeros((2, 3)))


@pytest.mark.parametrize("shape", EMPTY)
def test_inference_of_empty_input_is_empty(shape):
    assert batchnorm.batch_norm_inference(np.empty(shape), np.zeros(3), np.ones(3)).shape == shape


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 5), (1, 0), (0, 0)])
def test_batch_norm_of_no_channels_is_empty(shape):
    y, saved = batchnorm.batch_norm(np.empty(shape), np.ones(0), np.zeros(0))
    grads = batchnorm.batch_norm_backward(y, saved)
    assert [g.shape for g in grads] == [shape, (0,), (0,)]


def test_inference_of_one_value_per_channel_is_allowed():
    y = batchnorm.batch_norm_inference(np.array([[7.0]]), [3.0], [4.0], eps=0.0)
    assert y[0, 0] == 2.0


# ---- invariants ---------------------------------------------------------------------------------

batches = hnp.arrays(
    np.float64, st.tuples(st.integers(2, 9), st.integers(1, 4)), elements=st.integers(-8, 8)
)


def _spread(x):
    """`x` with the same non-constant pattern added to every channel, so that none is constant."""
    return x + 32.0 * (np.arange(len(x)) % 2)[:, None]


@given(batches, st.integers(-1000, 1000))
def test_normalize_does_not_see_a_shift(x, shift):
    x = _spread(x)
    # Small integers: x + shift is exact; mean and deviation round in the last place of 1000.
    np.testing.assert_allclose(
        batchnorm.normalize(x + shift, eps=0.0), batchnorm.normalize(x, eps=0.0), rtol=0, atol=1e-13
    )


@given(batches, st.integers(-20, 20))
def test_normalize_does_not_see_a_power_of_two_at_all(x, exponent):
    x = _spread(x)
    y = batchnorm.normalize(x * 2.0**exponent, eps=0.0)
    np.testing.assert_array_equal(y, batchnorm.normalize(x, eps=0.0))


@given(batches, st.floats(0.01, 100), st.booleans())
def test_normalize_sees_the_sign_of_a_scale_only(x, scale, negative):
    x, sign = _spread(x), -1 if negative else 1
    np.testing.assert_allclose(
        batchnorm.normalize(sign * scale * x, eps=0.0),
        sign * batchnorm.normalize(x, eps=0.0),
        rtol=0,
        atol=1e-13,
    )


@given(batches, st.randoms(use_true_random=False))
def test_batch_norm_permutes_with_its_examples(x, random):
    order = list(range(len(x)))
    random.shuffle(order)
    y = batchnorm.normalize(_spread(x))
    np.testing.assert_allclose(batchnorm.normalize(_spread(x)[order]), y[order], rtol=0, atol=1e-13)


@given(batches)
def test_normalize_gives_mean_zero_and_variance_one_when_eps_is_zero(x):
    m = Moments.of(batchnorm.normalize(_spread(x), eps=0.0))
    np.testing.assert_allclose(m.mean, np.zeros(x.shape[1]), atol=1e-14)
    np.testing.assert_allclose(m.var(), np.ones(x.shape[1]), rtol=1e-13)


# ---- refusals -----------------------------------------------------------------------------------


def _calls(x, **keywords):
    """The three functions that take x."""
    c = x.shape[1] if x.ndim > 1 else 1
    return {
        "normalize": lambda: batchnorm.normalize(x, **keywords),
        "batch_norm": lambda: batchnorm.batch_norm(x, **keywords),
        "inference": lambda: batchnorm.batch_norm_inference(x, np.zeros(c), np.ones(c), **keywords),
    }


takes_x = pytest.mark.parametrize("name", ["normalize", "batch_norm", "inference"])


@takes_x
@pytest.mark.parametrize("shape", [(), (4,)])
def test_functional_refuses_fewer_than_two_axes(name, shape):
    with pytest.raises(ShapeError, match="x must have at least 2 axes") as caught:
        _calls(np.ones(shape))[name]()
    assert str(shape) in str(caught.value)


@takes_x
@pytest.mark.parametrize(
    "dtype_name", ["complex64", "complex128", "U4", "S4", "O", "M8[s]", "m8[s]", "g", ">g"]
)
def test_functional_refuses_other_types_of_x(name, dtype_name):
    kind = np.dtype(dtype_name)
    if kind == np.float64:
        pytest.skip("longdouble is float64 here")
    x = np.zeros((3, 2), kind)
    with pytest.raises(DTypeError, match=r"x must be real numbers of type float16.*got"):
        _calls(x)[name]()


@takes_x
@pytest.mark.parametrize("axis", [2, -3, 100])
def test_functional_refuses_a_channel_axis_that_x_has_not(name, axis):
    with pytest.raises(ShapeError, match=rf"channel_axis must be an axis of x.*got {axis} for"):
        _calls(np.ones((3, 2)), channel_axis=axis)[name]()


@takes_x
@pytest.mark.parametrize("axis", [1.0, "1", None])
def test_functional_refuses_a_channel_axis_that_is_no_integer(name, axis):
    with pytest.raises(ArgumentError, match="channel_axis must be an integer, got"):
        _calls(np.ones((3, 2)), channel_axis=axis)[name]()


@takes_x
@pytest.mark.parametrize("eps", [-1e-9, np.nan, np.inf])
def test_functional_refuses_eps_that_is_negative_or_not_finite(name, eps):
    with pytest.raises(ArgumentError, match="eps must be finite and not negative, got"):
        _calls(np.ones((3, 2)), eps=eps)[name]()


@takes_x
@pytest.mark.parametrize("eps", ["small", None, [1e-5, 1e-5], 1j])
def test_functional_refuses_eps_that_is_no_number(name, eps):
    with pytest.raises(ArgumentError, match="eps must be a number, got"):
        _calls(np.ones((3, 2)), eps=eps)[name]()


def _per_channel(argument, value):
    x = np.arange(12.0).reshape(4, 3)
    arguments = {"mean": np.zeros(3), "var": np.ones(3), argument: value}
    return batchnorm.batch_norm_inference(x, **arguments)


@pytest.mark.parametrize("argument", ["gamma", "beta", "mean", "var"])
@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (1, 3), (1,)])
def test_inference_refuses_per_channel_arguments_of_another_shape(argument, shape):
    with pytest.raises(ShapeError, match=rf"{argument} must have shape \(C,\) = \(3,\), got") as e:
        _per_channel(argument, np.ones(shape))
    assert str(shape) in str(e.value)
    assert "channel_axis=-1" in str(e.value)


@pytest.mark.parametrize("argument", ["gamma", "beta"])
@pytest.mark.parametrize("shape", [(), (2,), (3, 1)])
def test_batch_norm_refuses_parameters_of_another_shape(argument, shape):
    with pytest.raises(ShapeError, match=rf"{argument} must have shape \(C,\) = \(3,\), got"):
        batchnorm.batch_norm(np.ones((4, 3)), **{argument: np.ones(shape)})


@pytest.mark.parametrize("argument", ["gamma", "beta", "mean", "var"])
@pytest.mark.parametrize("kind", [complex, "U3", object])
def test_inference_refuses_per_channel_arguments_of_another_type(argument, kind):
    with pytest.raises(DTypeError, match=f"{argument} must be real numbers, got"):
        _per_channel(argument, np.ones(3).astype(kind))


@pytest.mark.parametrize("argument", ["mean", "var"])
def test_inference_refuses_absent_statistics(argument):
    with pytest.raises(ArgumentError, match="mean and var must be given, got None"):
        _per_channel(argument, None)


@pytest.mark.parametrize("bad", [-1e-12, np.nan, np.inf, -np.inf])
def test_inference_refuses_a_variance_that_none_can_be_and_names_the_channel(bad):
    with pytest.raises(ArgumentError, match=r"var must be finite and not negative.*channel 2"):
        _per_channel("var", [1.0, 0.0, bad])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inference_refuses_a_mean_that_is_not_finite_and_names_the_channel(bad):
    with pytest.raises(ArgumentError, match=r"mean must be finite, got .* in channel 1"):
        _per_channel("mean", [1.0, bad, 0.0])


def test_inference_refuses_var_plus_eps_of_zero_and_names_the_channel():
    x = np.ones((4, 3))
    with pytest.raises(ArgumentError, match=r"var \+ eps must be above zero.*channel 1"):
        batchnorm.batch_norm_inference(x, np.zeros(3), [1.0, 0.0, 0.0], eps=0)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_batch_norm_refuses_one_value_per_channel(shape):
    with pytest.raises(ShapeError, match="x must have more than one value per channel") as caught:
        batchnorm.batch_norm(np.ones(shape))
    assert str(shape) in str(caught.value)


def test_batch_norm_refuses_one_value_of_non_zero_weight():
    with pytest.raises(ShapeError, match="more than one value of non-zero weight per channel"):
        batchnorm.batch_norm(np.ones((4, 3)), weights=[0, 1, 0, 0])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_batch_norm_refuses_weights_that_are_negative_or_not_finite(bad):
    with pytest.raises(ArgumentError, match=r"weights must be finite and not negative.*got"):
        batchnorm.batch_norm(np.ones((3, 2)), weights=[1.0, bad, 1.0])


def test_batch_norm_refuses_weights_of_another_shape():
    with pytest.raises(ShapeError, match=r"weights must broadcast.*\(3,\).*got \(3, 2\)"):
        batchnorm.batch_norm(np.ones((3, 2)), weights=np.ones((3, 2)))


def test_batch_norm_refuses_complex_weights():
    with pytest.raises(DTypeError, match="weights must be real numbers, got complex128"):
        batchnorm.batch_norm(np.ones((3, 2)), weights=np.ones(3, complex))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (3, 2, 1), (3, 1)])
def test_backward_refuses_grad_y_of_another_shape(shape):
    _, saved = batchnorm.batch_norm(np.ones((3, 2)))
    with pytest.raises(ShapeError, match=r"grad_y must have the shape of x, \(3, 2\), got"):
        batchnorm.batch_norm_backward(np.ones(shape), saved)


@pytest.mark.parametrize("kind", [complex, "U3", object])
def test_backward_refuses_grad_y_of_another_type(kind):
    _, saved = batchnorm.batch_norm(np.ones((3, 2)))
    with pytest.raises(DTypeError, match="grad_y must be real numbers of type float64, got"):
        batchnorm.batch_norm_backward(np.ones((3, 2)).astype(kind), saved)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="32 axes at most")
def test_functional_refuses_more_axes_than_the_kernels_know():
    with pytest.raises(ValueError, match="axes"):
        batchnorm.normalize(np.ones((2, 2) + (1,) * 31))


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(ShapeError, ValueError), (DTypeError, TypeError), (ArgumentError, ValueError)],
)
def test_errors_are_batch_norm_errors_and_the_builtin_that_fits(error, builtin):
    assert issubclass(error, BatchNormError)
    assert issubclass(error, builtin)


def test_batch_norm_backward_refuses_what_batch_norm_did_not_save():
    message = (
        r"saved must be the Saved that batch_norm returned.*got NoneType.*y, saved = batch_norm"
    )
    with pytest.raises(ArgumentError, match=message):
        batchnorm.batch_norm_backward(np.ones((4, 3)), None)


# ---- ordinary arguments take one crossing into the core, others the long way --------------------


def test_functions_read_ordinary_arrays_in_one_crossing(rng):
    x, gamma = rng.normal(size=(8, 3)).astype(np.float32), np.ones(3, np.float32)
    y, statistics, axis = _core.quick_forward(x, gamma, None, 1e-5, -1)
    assert (y.shape, statistics.shape, axis) == ((8, 3), (1, 5, 3), 1)
    assert _core.quick_inference(x, gamma, gamma, None, None, 1e-5, 1, False) is not None
    assert (
        _core.quick_backward(x, x, statistics, 1, 1e-5, gamma, gamma.dtype, None, True) is not None
    )


class _Subclass(np.ndarray):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.tolist(),
        lambda x: x.view(_Subclass),
        lambda x: x.astype(">f8"),
        lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
        lambda x: x.astype(np.longdouble).astype(np.float64)[::-1][::-1],
    ],
    ids=["list", "subclass", "big-endian", "unaligned", "strided"],
)
def test_functions_give_the_same_the_long_way(rng, change):
    x, grad_y = rng.normal(size=(2, 6, 3))
    gamma, beta, mean = rng.normal(size=(3, 3))
    seen = change(x)
    y, saved = batchnorm.batch_norm(x, gamma, beta)
    other, of_other = batchnorm.batch_norm(seen, gamma.tolist(), beta)
    np.testing.assert_array_equal(other, y)
    assert other.dtype == np.float64
    for a, b in zip(
        batchnorm.batch_norm_backward(change(grad_y), of_other),
        batchnorm.batch_norm_backward(grad_y, saved),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        batchnorm.batch_norm_inference(seen, mean, gamma**2, gamma),
        batchnorm.batch_norm_inference(x, mean, gamma**2, gamma),
    )


@pytest.mark.parametrize("kind", [">f2", ">f4", ">f8"])
def test_batch_norm_of_another_byte_order_is_in_the_machines_own(rng, kind):
    x = rng.normal(size=(6, 3)).astype(kind)
    native = x.astype(x.dtype.newbyteorder("="))
    y, saved = batchnorm.batch_norm(x)
    assert y.dtype == native.dtype
    assert y.dtype.isnative
    np.testing.assert_array_equal(y, batchnorm.normalize(native))
    assert saved.moments == batchnorm.batch_norm(native)[1].moments


def _unaligned(a):
    a = np.asarray(a)
    return np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)


@pytest.mark.parametrize("name", ["mean", "var", "gamma", "beta"])
def test_inference_takes_unaligned_vectors(rng, name):
    x = rng.normal(size=(6, 3))
    given = dict(zip(("mean", "var", "gamma", "beta"), rng.uniform(1, 2, (4, 3)), strict=True))
    expected = batchnorm.batch_norm_inference(x, **given)
    given[name] = _unaligned(given[name])
    np.testing.assert_array_equal(batchnorm.batch_norm_inference(x, **given), expected)


def test_functions_take_uint16_for_integers_not_for_bits_of_bfloat16():
    x = np.array([[1], [2], [6]], np.uint16)
    y, saved = batchnorm.batch_norm(x)
    assert y.dtype == np.float64
    assert saved.moments.mean == 3
    assert batchnorm.batch_norm_inference(x, [3.0], [1.0], eps=0.0).tolist() == [[-2], [-1], [3]]


def test_batch_norm_backward_refuses_an_x_whose_shape_was_changed(rng):
    x = rng.normal(size=(100, 1))
    _, saved = batchnorm.batch_norm(x)
    x.shape = (1, 100)
    with pytest.raises(ValueError, match="statistics"):
        batchnorm.batch_norm_backward(np.ones((1, 100)), saved)


@pytest.mark.parametrize("axis", [2**64, -(2**64), 10**30])
def test_batch_norm_refuses_an_axis_beyond_all_axes(axis):
    with pytest.raises(ShapeError, match="channel_axis"):
        batchnorm.batch_norm(np.ones((5, 4)), channel_axis=axis)
