"""Any memory layout of the same values gives the same answer, and outputs lie as inputs do."""

import sys

import numpy as np
import pytest

import batchnorm
from batchnorm import Moments

GAMMA, BETA = np.array([1.0, -3.5, 0.25]), np.array([0.0, 1.0, -2.0])


def _values(dtype, shape=(4, 3, 5, 4)):
    return np.random.default_rng(0).normal(3.0, 2.0, shape).astype(dtype)


def _bound(dtype):
    """Two results, each right to its promise (1e-6·4 with |y| < 12), on values of this type."""
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 0.0, "float32": 0.0}[dtype.name]
    return {"float64": 1e-13}.get(dtype.name, 1e-4) + 2 * 16 * unit


def test_layout_does_not_change_moments(layout, dtype):
    v = _values(dtype)
    a = Moments.of(np.moveaxis(v, 1, -1).reshape(-1, 3))
    b = Moments.of(layout.put(v), channel_axis=layout.channel_axis)
    np.testing.assert_allclose(b.mean, a.mean, rtol=2e-12)
    np.testing.assert_allclose(b.m2, a.m2, rtol=2e-9)


def test_layout_does_not_change_y(layout, dtype, instruction_set):
    v = _values(dtype)
    a, _ = batchnorm.batch_norm(v, GAMMA, BETA)
    b, _ = batchnorm.batch_norm(layout.put(v), GAMMA, BETA, channel_axis=layout.channel_axis)
    np.testing.assert_allclose(
        layout.get(b, v.shape).astype(float), a.astype(float), rtol=0, atol=_bound(dtype)
    )


def test_layout_does_not_change_inference(layout, dtype):
    v = _values(dtype)
    mean, var = np.arange(3.0), np.arange(1.0, 4.0)
    a = batchnorm.batch_norm_inference(v, mean, var, GAMMA, BETA)
    b = batchnorm.batch_norm_inference(
        layout.put(v), mean, var, GAMMA, BETA, channel_axis=layout.channel_axis
    )
    np.testing.assert_allclose(
        layout.get(b, v.shape).astype(float), a.astype(float), rtol=0, atol=_bound(dtype)
    )


def test_layout_does_not_change_weighted_gradients(layout, dtype):
    v, g = _values(dtype), _values(dtype)[::-1].copy()
    w = np.random.default_rng(1).integers(0, 3, (4, 5, 4)).astype(float)

    def gradients(put, get, axis, weights):
        _, saved = batchnorm.batch_norm(put(v), GAMMA, BETA, channel_axis=axis, weights=weights)
        grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(put(g), saved)
        return get(grad_x, v.shape).astype(float), grad_gamma, grad_beta

    # The weights follow the layout with a single channel in place of three.
    one = layout.put(np.ascontiguousarray(w[:, None]))
    if layout.name == "sliced_borders" or one.size != w.size:
        one = layout.put(np.repeat(w[:, None], 3, 1)).take([0], layout.channel_axis)
    b = gradients(layout.put, layout.get, layout.channel_axis, one.squeeze(layout.channel_axis))
    a = gradients(np.ascontiguousarray, lambda y, _: y, 1, w)
    np.testing.assert_allclose(b[0], a[0], rtol=0, atol=_bound(dtype))
    np.testing.assert_allclose(b[1], a[1], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(b[2], a[2], rtol=1e-4, atol=1e-3)


def test_layout_of_out_need_not_be_that_of_x(layout, dtype):
    v = _values(dtype)
    out = layout.put(np.zeros_like(v))
    x = np.ascontiguousarray(layout.put(v))
    expected, _ = batchnorm.batch_norm(x, GAMMA, BETA, channel_axis=layout.channel_axis)
    y, _ = batchnorm.batch_norm(x, GAMMA, BETA, channel_axis=layout.channel_axis, out=out)
    assert y is out
    np.testing.assert_allclose(y.astype(float), expected.astype(float), rtol=0, atol=_bound(dtype))


def test_layout_of_out_is_written_between_the_gaps_only(dtype):
    v = _values(dtype)
    memory = np.full((4, 3, 10, 8), 77).astype(dtype)
    batchnorm.batch_norm(v, out=memory[:, :, ::2, ::2])
    assert np.all(memory[:, :, 1::2].astype(float) == 77)
    assert np.all(memory[:, :, ::2, 1::2].astype(float) == 77)
    assert not np.any(memory[:, :, ::2, ::2].astype(float) == 77)


def test_layout_of_grad_y_need_not_be_that_of_x(layout):
    v, g = _values(np.float32), _values(np.float32)[::-1].copy()
    x = np.ascontiguousarray(layout.put(v))
    _, saved = batchnorm.batch_norm(x, GAMMA, BETA, channel_axis=layout.channel_axis)
    expected, _, _ = batchnorm.batch_norm_backward(np.ascontiguousarray(layout.put(g)), saved)
    grad_x, _, _ = batchnorm.batch_norm_backward(layout.put(g), saved)
    np.testing.assert_allclose(grad_x, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 5, 4), (64, 3, 40, 40)])
def test_layout_of_y_is_the_memory_order_of_x(layout, shape):
    x = layout.put(_values(np.float32, shape))
    y, _ = batchnorm.batch_norm(x, channel_axis=layout.channel_axis)

    def order(a):
        return sorted(range(a.ndim), key=lambda axis: (-abs(a.strides[axis]), axis))

    assert order(y) == order(x)
    assert (
        y.size * y.itemsize
        == sum((n - 1) * abs(s) for n, s in zip(y.shape, y.strides, strict=True)) + 4
    )


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4, -1, -5])
def test_layout_any_axis_may_be_the_channel_axis(rng, axis):
    x = rng.normal(size=(2, 3, 4, 5, 6))
    y, _ = batchnorm.batch_norm(x, channel_axis=axis)
    expected, _ = batchnorm.batch_norm(np.ascontiguousarray(np.moveaxis(x, axis, 1)))
    np.testing.assert_allclose(np.moveaxis(y, axis, 1), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "perm", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3), (1, 3, 0, 4, 2)]
)
def test_layout_any_permutation_of_memory_gives_the_same(rng, perm):
    v = rng.normal(size=(2, 3, 4, 5, 6))
    x = np.ascontiguousarray(v.transpose(perm)).transpose(np.argsort(perm))
    y, _ = batchnorm.batch_norm(x)
    np.testing.assert_allclose(y, batchnorm.normalize(v), rtol=0, atol=1e-13)


def test_layout_repeated_memory_is_read_as_many_values(rng):
    x = np.broadcast_to(rng.normal(size=(3, 1, 4)), (5, 3, 6, 4))
    y, _ = batchnorm.batch_norm(x)
    np.testing.assert_allclose(y, batchnorm.normalize(x.copy()), rtol=0, atol=1e-13)


def test_layout_misaligned_memory_is_read(rng):
    memory = bytearray(4 * 6 * 3 + 1)
    x = np.frombuffer(memory, np.uint8)[1:].view(np.float32).reshape(6, 3)
    x[...] = rng.normal(size=(6, 3))
    np.testing.assert_array_equal(batchnorm.normalize(x), batchnorm.normalize(x.copy()))


def test_layout_fields_of_a_structured_array_are_read(rng):
    records = np.zeros((6, 3), [("a", "f4"), ("b", "u1")])
    records["a"] = rng.normal(size=(6, 3))
    x = records["a"]
    np.testing.assert_array_equal(batchnorm.normalize(x), batchnorm.normalize(x.copy()))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129])
def test_layout_every_remainder_of_a_vector_is_handled(instruction_set, rng, size):
    for shape, axis in [((3, 2, size), 1), ((5, size), 1), ((2, 3, size), -1)]:
        x = rng.normal(size=shape).astype(np.float32)
        y, saved = batchnorm.batch_norm(x, channel_axis=axis)
        v = x.astype(np.float64)
        axes = tuple(a for a in range(v.ndim) if a != axis % v.ndim)
        mean = v.mean(axes, keepdims=True)
        expected = (v - mean) / np.sqrt(v.var(axes, keepdims=True) + 1e-5)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(saved.moments.mean, mean.ravel(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_layout_a_type_given_with_this_machines_byte_order_is_the_same_type(name, rng):
    x = rng.standard_normal((20, 3)).astype(name)
    marked = x.astype(np.dtype(name).newbyteorder("<" if sys.byteorder == "little" else ">"))
    assert memoryview(marked).format != memoryview(x).format
    expected, saved = batchnorm.batch_norm(x)
    out = np.empty_like(marked)
    y, found = batchnorm.batch_norm(marked, out=out)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(out, expected)
    assert found.moments == saved.moments
    assert Moments.of(marked) == Moments.of(x)
