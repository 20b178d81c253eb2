"""relu6, hardswish and silu in the kernels, beside PyTorch's in float64."""

import numpy as np
import pytest

from batchnorm import _core

torch = pytest.importorskip("torch")
F = torch.nn.functional

CODES = {"relu6": (3, F.relu6), "hardswish": (4, F.hardswish), "silu": (5, F.silu)}
DIGITS = {"float32": 23, "float64": 52, "float16": 10, "bfloat16": 7}
# The kernels' own float32 or float64 rounds an activation 4 times, its exponential among them,
# which is right to 2 units; a narrower type rounds the result once more.
ROUNDINGS = 6


@pytest.fixture(params=list(CODES))
def name(request):
    return request.param


@pytest.fixture(params=["rows", "columns", "short rows"])
def place(request):
    """Puts a vector into one of the layouts: (array, channel axis)."""
    if request.param == "rows":
        return lambda v: (v.reshape(1, 1, -1), 1)
    if request.param == "columns":  # not a whole number of vectors
        return lambda v: (np.ascontiguousarray(v.reshape(1, -1, 11)), 2)
    return lambda v: (np.ascontiguousarray(v.reshape(-1, 1, 11)), 1)


def _seen(a):
    return a.view(np.uint16) if a.dtype.name == "bfloat16" else a


def _kernels(name, values, place, weighted=False):
    """The activation and its derivative as `normalize` and `backward` compute them.

    The statistics are those that leave x as it is, so z is x.
    """
    x, axis = place(values)
    c = x.shape[axis]
    statistics = np.zeros(c), None, np.ones(c), 0.0
    extras = {"activation": CODES[name][0]}
    if weighted:
        extras["weights"] = np.broadcast_to(1.0, x.shape)
    y, grad_x, ones = np.zeros_like(x), np.zeros_like(x), np.ones_like(x)
    sums = np.zeros((2, c))
    _core.normalize(_seen(x), _seen(y), axis, *statistics, **extras)
    _core.backward(
        _seen(ones), _seen(x), _seen(grad_x), axis, 0.0, *statistics, *sums, **extras
    )  # fmt: skip
    _core.backward_sums(_seen(ones), _seen(x), axis, *statistics, *sums, **extras)
    return y.reshape(values.shape), grad_x.reshape(values.shape), sums[0]


def _torch(name, values):
    z = torch.tensor(values.astype(np.float64), requires_grad=True)
    y = CODES[name][1](z)
    (gradient,) = torch.autograd.grad(y.sum(), z)
    return y.detach().numpy(), gradient.numpy()


def _bound(dtype, size):
    """Of an error beside values of this size."""
    own = 2.0 ** -DIGITS["float64" if dtype == np.float64 else "float32"]
    return ROUNDINGS * own * size + 2.0 ** -(DIGITS[dtype.name] + 1) * size + 2.0**-24


def _sweep(dtype, count=11 * 400):
    """Values over the whole range in which an exponential is neither 0 nor infinite, and near 0."""
    end = 750 if dtype == np.float64 else 110
    even = np.linspace(-end, end, count // 2)
    near = np.linspace(-8, 8, count - count // 2)
    return np.concatenate([even, near]).astype(dtype)


@pytest.mark.parametrize("weighted", [False, True], ids=["all", "weighted"])
def test_activations_equal_those_of_torch(instruction_set, dtype, name, place, weighted):
    x = _sweep(dtype)
    y, gradient, _ = _kernels(name, x, place, weighted)
    expected, expected_gradient = _torch(name, x)
    assert np.all(np.abs(y.astype(float) - expected) <= _bound(x.dtype, np.abs(expected)))
    # A derivative is a difference of terms of up to 1 + |z| / 4 where it is below one.
    size = np.abs(expected_gradient) + 1
    error = np.abs(gradient.astype(float) - expected_gradient)
    assert np.all(error <= _bound(x.dtype, size))


def test_activations_sums_of_gradients_equal_those_of_torch(instruction_set, dtype, name, place):
    x = _sweep(dtype)
    _, _, sums = _kernels(name, x, place)
    _, gradient = _torch(name, x)
    # In norm, as the kernels promise it: 1e-5 where sums of float32 are taken.
    assert abs(sums.sum() - gradient.sum()) <= 1e-5 * np.abs(gradient).sum()


def test_activations_silu_is_right_to_few_units_in_the_last_place(instruction_set, place):
    for dtype in (np.float32, np.float64):
        x = _sweep(np.dtype(dtype))
        # Where e^-z overflows silu is zero, as PyTorch's own is.
        x = x[(x > -87) if dtype == np.float32 else (x > -709)]
        x = x[: len(x) // 11 * 11]
        y, _, _ = _kernels("silu", x, place)
        exact = x.astype(np.longdouble)
        exact = exact / (1 + np.exp(-exact))
        assert np.max(np.abs(y - exact) / np.spacing(np.abs(exact).astype(dtype))) <= 4


def test_activations_of_values_that_are_not_finite_are_those_of_torch(
    instruction_set, dtype, name, place
):
    x = np.array([-np.inf, np.inf, np.nan, 0, -0.0, 1, 2, 3, 4, 5, 6], dtype)
    y, _, _ = _kernels(name, x, place)
    finite = np.isfinite(y.astype(float))
    expected, _ = _torch(name, x)
    np.testing.assert_array_equal(finite, np.isfinite(expected))
    np.testing.assert_array_equal(y[~finite].astype(float), expected[~finite])


def test_activations_gradients_at_the_edges_are_those_of_torch(instruction_set, dtype, place):
    edges = np.array([-np.inf, -3, 0, 3, 6, np.inf, -4, -2, 2, 4, 7], dtype)
    for name in ("relu6", "hardswish"):
        _, gradient, _ = _kernels(name, edges, place)
        _, expected = _torch(name, edges)
        np.testing.assert_allclose(gradient.astype(float), expected, rtol=2.0**-7, atol=0)
    _, gradient, _ = _kernels("hardswish", edges, place)
    assert gradient[1] == 0
    assert gradient[3] == 1


def test_activations_relu6_with_a_residual_goes_by_y(instruction_set, dtype, place):
    x, axis = place(np.linspace(-8, 8, 11 * 9).astype(dtype))
    c = x.shape[axis]
    statistics = np.zeros(c), None, np.ones(c), 0.0
    residual = np.full_like(x, 1)
    y, grad_x, grad_residual, ones = (np.zeros_like(x) for _ in range(4))
    ones[...] = 1
    _core.normalize(
        _seen(x), _seen(y), axis, *statistics, residual=_seen(residual), activation=3
    )  # fmt: skip
    expected = np.clip(x.astype(float) + 1, 0, 6)
    assert np.all(np.abs(y.astype(float) - expected) <= _bound(x.dtype, expected))
    sums = np.zeros((2, c))
    _core.backward(
        _seen(ones), _seen(x), _seen(grad_x), axis, 0.0, *statistics, *sums, y=_seen(y),
        grad_residual=_seen(grad_residual), activation=3,
    )  # fmt: skip
    passes = (y > 0) & (y < 6)
    np.testing.assert_array_equal(grad_residual != 0, passes)
    np.testing.assert_array_equal(grad_x, grad_residual)


@pytest.mark.parametrize("name", ["hardswish", "silu"])
def test_activations_without_an_inverse_refuse_a_residual(name):
    x, y, sums = np.ones((4, 3)), np.ones((4, 3)), np.ones((2, 3))
    statistics, block = (np.zeros(3), None, np.ones(3), 0.0), np.ones((1, 5, 3))
    code = CODES[name][0]
    calls = [
        lambda **r: _core.forward(x, y, 1, 0.0, *np.ones((3, 3)), **r),
        lambda **r: _core.normalize(x, y, 1, *statistics, **r),
        lambda **r: _core.layer_forward(x, y, 1, 0.0, block, **r),
        lambda **r: _core.layer_normalize(x, y, 1, 0.0, block, **r),
    ]
    backwards = [
        lambda **r: _core.backward_sums(x, x, 1, *statistics, *sums, **r),
        lambda **r: _core.backward(x, x, y, 1, 4.0, *statistics, *sums, **r),
        lambda **r: _core.backward_fused(x, x, y, 1, 4.0, *statistics, *sums, **r),
        lambda **r: _core.layer_backward(x, x, y, 1, 0.0, block, True, **r),
    ]
    for call, argument in [(c, "residual") for c in calls] + [(c, "y") for c in backwards]:
        call(activation=code)
        with pytest.raises(ValueError, match="cannot follow a residual"):
            call(activation=code, **{argument: x})
