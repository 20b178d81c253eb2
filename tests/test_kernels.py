"""batchnorm._core as another face calls it: activations, residuals, weights, raw addresses."""

import numpy as np
import pytest

from batchnorm import _core

IDENTITY, RELU, LEAKY, RELU6, HARDSWISH, SILU = range(6)
SLOPE, EPS = 0.2, 1e-3
CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
# Half a unit in the last place, relative; and the promise for float32 (1e-6) with γ < 3, z < 20.
UNIT = {"float32": 0.0, "float64": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
OUTPUT = {"float32": 3e-6, "float64": 1e-12, "float16": 3e-6, "bfloat16": 3e-6}
GRADIENT = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-5, "bfloat16": 1e-5}

activations = pytest.mark.parametrize(
    "activation",
    [IDENTITY, RELU, LEAKY, RELU6, HARDSWISH, SILU],
    ids=["identity", "relu", "leaky", "relu6", "hardswish", "silu"],
)

NOT_AFTER_A_RESIDUAL = (HARDSWISH, SILU)

# Where the gradient of an activation jumps.
KINKS = {IDENTITY: [], RELU: [0], LEAKY: [0], RELU6: [0, 6], HARDSWISH: [-3, 3], SILU: []}


def activated(activation, z):
    """The activation of z, and its derivative, in float64."""
    if activation == SILU:
        sigmoid = 1 / (1 + np.exp(-z))
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    if activation == HARDSWISH:
        inside = np.where(z < 3, z / 3 + 0.5, 1)
        return z * np.clip(z + 3, 0, 6) / 6, np.where(z > -3, inside, 0)
    if activation == RELU6:
        return np.clip(z, 0, 6), np.where((z > 0) & (z < 6), 1.0, 0)
    below = {IDENTITY: 1.0, RELU: 0.0, LEAKY: SLOPE}[activation]
    slope = np.where(z > 0, 1.0, below)
    return z * slope, slope


def _seen(a):
    """As the core takes it: bfloat16 as its bits."""
    return a.view(np.uint16) if a is not None and a.dtype.name == "bfloat16" else a


def _address(a):
    if a is None:
        return None
    return (
        a.__array_interface__["data"][0],
        CODES[a.dtype.name],
        a.shape,
        tuple(s // a.itemsize for s in a.strides),
    )


class Case:
    """Arrays of one call, and what float64 NumPy makes of them."""

    def __init__(self, dtype, *, rows=True, activation=IDENTITY, residual=False, weighted=False,
                 shape=(5, 7, 37), seed=0, put=None):  # fmt: skip
        # A value at the kink of an activation would fall to either side by float32's rounding:
        # take the first seed that has none.
        for attempt in range(seed, seed + 20):
            self._draw(np.random.default_rng(attempt), dtype, rows, activation, residual,
                       weighted, shape, put or np.ascontiguousarray)  # fmt: skip
            z = self._oracle()
            # A residual's y is rounded to the type, and may reach a kink that z is short of.
            near = 2e-2 if residual and activation == RELU6 else 1e-5
            if all(np.abs(z - kink).min() > (near if kink else 1e-5) for kink in KINKS[activation]):
                return
        raise AssertionError("no seed without a value at the kink")

    def _draw(self, rng, dtype, rows, activation, residual, weighted, shape, put):
        n, c, s = shape
        self.axis = 1 if rows else 2
        self.activation = activation
        self.shape = shape if rows else (n, s, c)
        self.put = put

        def array():
            return put(rng.normal(0.5, 1.5, self.shape).astype(dtype))

        self.x, self.grad_y = array(), array()
        self.residual = array() if residual else None
        self.gamma, self.beta = rng.normal(size=c), rng.normal(size=c)
        self.weights = None
        if weighted:
            w = rng.choice([0.0, 0.5, 1.0, 2.0], (n, s))
            self.weights = np.broadcast_to(np.expand_dims(w, self.axis), self.shape)
        self.dtype = np.dtype(dtype)

    def _column(self, v):
        shape = [1, 1, 1]
        shape[self.axis] = -1
        return np.asarray(v).reshape(shape)

    def _oracle(self):
        axes = tuple(a for a in range(3) if a != self.axis)
        x, g = self.x.astype(np.float64), self.grad_y.astype(np.float64)
        r = 0.0 if self.residual is None else self.residual.astype(np.float64)
        w = np.ones(self.shape) if self.weights is None else self.weights
        self.count = float(w.sum() / self.x.shape[self.axis])
        mean = (w * x).sum(axes) / self.count
        d = x - self._column(mean)
        self.mean, self.m2 = mean, (w * d * d).sum(axes)
        self.var = self.m2 / self.count
        inv = self._column(1 / np.sqrt(self.var + EPS))
        x_hat = d * inv
        z = self._column(self.gamma) * x_hat + self._column(self.beta) + r
        y, derivative = activated(self.activation, z)
        gz = np.where(w > 0, g * derivative, 0)
        self.y = np.where(w > 0, y, 0)
        self.sum_grad, self.sum_grad_x_hat = gz.sum(axes), (gz * x_hat).sum(axes)
        mean_part = self._column(self.sum_grad) / self.count
        x_part = x_hat * self._column(self.sum_grad_x_hat) / self.count
        scale = self._column(self.gamma) * inv
        self.grad_x = np.where(w > 0, scale * (gz - w * (mean_part + x_part)), 0)
        self.grad_x_fixed = scale * gz
        self.grad_residual = gz
        return z

    @property
    def extras(self):
        return {
            "weights": self.weights,
            "residual": _seen(self.residual),
            "activation": self.activation,
            "slope": SLOPE,
        }

    @property
    def backward_extras(self):
        extras = self.extras
        del extras["residual"]
        y = None if self.residual is None else self.put(self.y.astype(self.dtype))
        return {**extras, "y": _seen(y)}

    def empty(self):
        return self.put(np.zeros(self.shape, self.dtype))

    def forward(self):
        y = self.empty()
        mean, low, m2 = np.empty((3, len(self.gamma)))
        count, _ = _core.forward(
            _seen(self.x), _seen(y), self.axis, EPS, mean, low, m2, self.gamma, self.beta,
            **self.extras,
        )  # fmt: skip
        return y, count, mean, low, m2

    def normalize(self):
        y = self.empty()
        _core.normalize(
            _seen(self.x), _seen(y), self.axis, self.mean, None, self.var, EPS, self.gamma,
            self.beta, **self.extras,
        )  # fmt: skip
        return y

    def _statistics(self):
        return self.mean, None, self.var, EPS

    def fused(self, count=None, grad_residual=None):
        grad_x = self.empty()
        sums = np.empty((2, len(self.gamma)))
        _core.backward_fused(
            _seen(self.grad_y), _seen(self.x), _seen(grad_x), self.axis,
            self.count if count is None else count, *self._statistics(), *sums,
            self.gamma, self.beta, grad_residual=_seen(grad_residual), **self.backward_extras,
        )  # fmt: skip
        return grad_x, *sums

    def pair(self, count=None, grad_residual=None):
        grad_x = self.empty()
        sums = np.empty((2, len(self.gamma)))
        _core.backward_sums(
            _seen(self.grad_y), _seen(self.x), self.axis, *self._statistics(), *sums,
            self.gamma, self.beta, **self.backward_extras,
        )  # fmt: skip
        _core.backward(
            _seen(self.grad_y), _seen(self.x), _seen(grad_x), self.axis,
            self.count if count is None else count, *self._statistics(), *sums,
            self.gamma, self.beta, grad_residual=_seen(grad_residual), **self.backward_extras,
        )  # fmt: skip
        return grad_x, *sums

    def assert_output(self, y):
        bound = OUTPUT[self.dtype.name] * np.maximum(1, np.abs(self.y))
        bound += UNIT[self.dtype.name] * (np.abs(self.y) + 2.0**-14)
        assert np.all(np.abs(y.astype(np.float64) - self.y) <= bound)

    def assert_gradient(self, got, expected):
        tolerance = GRADIENT[self.dtype.name] + UNIT[self.dtype.name]
        error = np.linalg.norm((got.astype(np.float64) - expected).ravel())
        assert error <= tolerance * np.linalg.norm(expected.ravel())


def _grid_of_gaps(a):
    """The same values where no (outer, channels, inner) view exists."""
    n, b, c = a.shape
    memory = np.empty((2 * n, 2 * b, 2 * c), a.dtype)
    memory.fill(np.nan)
    memory[::2, ::2, ::2] = a
    return memory[::2, ::2, ::2]


@pytest.fixture(params=["rows", "columns"])
def rows(request):
    return request.param == "rows"


@pytest.fixture(params=[False, True], ids=["plain", "residual"])
def residual(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["all", "weighted"])
def weighted(request):
    return request.param


@pytest.fixture
def case(dtype, rows, residual, weighted, request):
    """Every type, layout, residual and weights, with leaky_relu unless `activation` is given."""
    activation = request.node.callspec.params.get("activation", LEAKY)
    if residual and activation in NOT_AFTER_A_RESIDUAL:
        pytest.skip("follows no residual")
    options = {"rows": rows, "residual": residual, "weighted": weighted}
    return Case(dtype, activation=activation, **options)


@pytest.fixture
def residual_case(dtype, rows, weighted):
    return Case(dtype, rows=rows, activation=LEAKY, residual=True, weighted=weighted)


# ---- against the oracle -------------------------------------------------------------------------


@activations
def test_kernels_forward_equals_the_oracle(instruction_set, case, activation):
    y, count, mean, low, m2 = case.forward()
    case.assert_output(y)
    assert count == case.count
    np.testing.assert_allclose(mean + low, case.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(m2, case.m2, rtol=1e-9)


@activations
def test_kernels_normalize_equals_the_oracle(instruction_set, case, activation):
    case.assert_output(case.normalize())


@activations
def test_kernels_backward_equals_the_oracle(instruction_set, case, activation):
    grad_x, sum_grad, sum_grad_x_hat = case.fused()
    case.assert_gradient(grad_x, case.grad_x)
    # In norm over the channels: the inputs are exact here, so no half rounding enters.
    for got, expected in ((sum_grad, case.sum_grad), (sum_grad_x_hat, case.sum_grad_x_hat)):
        bound = GRADIENT[case.dtype.name] * np.linalg.norm(expected)
        assert np.linalg.norm(got - expected) <= bound


@activations
def test_kernels_backward_in_evaluation_equals_the_oracle(instruction_set, case, activation):
    grad_x, _, _ = case.fused(count=0.0)
    case.assert_gradient(grad_x, case.grad_x_fixed)


def test_kernels_grad_residual_equals_the_oracle(instruction_set, residual_case):
    case = residual_case
    grad_residual = case.empty()
    case.fused(grad_residual=grad_residual)
    case.assert_gradient(grad_residual, case.grad_residual)


def test_kernels_fused_backward_is_the_pair_to_the_last_bit(instruction_set, case):
    for a, b in zip(case.fused(), case.pair(), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", [(3, 40, 9000), (700, 70, 3), (2, 3, 70_000)])
def test_kernels_fused_backward_is_the_pair_to_the_last_bit_when_large(rows, shape):
    case = Case(np.float32, rows=rows, shape=shape)
    for a, b in zip(case.fused(), case.pair(), strict=True):
        assert a.tobytes() == b.tobytes()


def test_kernels_fused_grad_residual_is_the_pairs_to_the_last_bit(instruction_set, residual_case):
    case = residual_case
    a, b = case.empty(), case.empty()
    case.fused(grad_residual=a)
    case.pair(grad_residual=b)
    assert a.tobytes() == b.tobytes()


def test_kernels_pair_in_evaluation_is_the_fused_one_to_the_last_bit(instruction_set, case):
    for a, b in zip(case.fused(count=0.0), case.pair(count=0.0), strict=True):
        assert a.tobytes() == b.tobytes()


def test_kernels_forward_is_moments_then_normalize_to_the_last_bit(instruction_set, case):
    # From 8192 values on, the moments are sums of float32 runs: tests/test_numerics.py.
    y, _, mean, low, m2 = case.forward()
    alone = np.empty((3, len(mean)))
    count, _ = _core.forward(_seen(case.x), None, case.axis, EPS, *alone, weights=case.weights)
    z = case.empty()
    _core.normalize(
        _seen(case.x), _seen(z), case.axis, mean, low, m2 / count, EPS, case.gamma, case.beta,
        **case.extras,
    )  # fmt: skip
    assert np.array([mean, low, m2]).tobytes() == alone.tobytes()
    assert y.tobytes() == z.tobytes()


@pytest.mark.parametrize("shape", [(8, 3, 10_000), (600, 300, 1), (3, 2, 50_001)])
def test_kernels_backward_equals_the_oracle_when_large(instruction_set, rows, shape):
    # Longer than a run, a chunk and a block; no activation, so no value lies at its kink.
    case = Case(np.float32, rows=rows, residual=True, shape=shape)
    grad_x, sum_grad, sum_grad_x_hat = case.fused()
    case.assert_gradient(grad_x, case.grad_x)
    case.assert_gradient(sum_grad, case.sum_grad)
    case.assert_gradient(sum_grad_x_hat, case.sum_grad_x_hat)


# Shapes (n, c, s) that are cut anew: few channels, odd numbers of them, rows of 7x7 with many and
# few of the outer index, more channels than a table holds.
CUT = [
    (40, 3, 70), (5, 10, 300), (3, 64, 50), (2, 100, 130), (9, 256, 20), (1, 1024, 65),
    (1, 2100, 9), (20, 30, 49), (3, 30, 49), (64, 1, 33), (2, 5, 3000),
]  # fmt: skip
cut_shapes = pytest.mark.parametrize("shape", CUT, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture
def past_the_cache():
    """Every output, however small, is written past the cache."""
    _core.assume_last_level_cache(0)
    yield
    _core.assume_last_level_cache(-1)


def _shifted(by):
    """Put an array `by` elements after the beginning of a cache line."""

    def put(a):
        memory = np.empty(a.size + 128, a.dtype)
        start = -memory.ctypes.data % 64 // a.itemsize + by
        placed = memory[start : start + a.size].reshape(a.shape)
        placed[...] = a
        return placed

    return put


@cut_shapes
def test_kernels_rows_cut_anew_equal_the_oracle(instruction_set, dtype, rows, shape, residual):
    # No activation, so no value lies at its kink.
    case = Case(dtype, rows=rows, shape=shape, residual=residual, put=_shifted(3))
    case.assert_output(case.forward()[0])
    grad_x, sum_grad, sum_grad_x_hat = case.fused()
    case.assert_gradient(grad_x, case.grad_x)
    case.assert_gradient(sum_grad, case.sum_grad)
    case.assert_gradient(sum_grad_x_hat, case.sum_grad_x_hat)


@cut_shapes
@pytest.mark.parametrize("shift", [0, 1, 4, 13])
def test_kernels_past_the_cache_the_bits_are_the_same(
    instruction_set, dtype, rows, shape, shift, request
):
    case = Case(dtype, rows=rows, shape=shape, put=_shifted(shift))
    y, grad_x = case.forward()[0], case.fused()[0]
    request.getfixturevalue("past_the_cache")
    assert case.forward()[0].tobytes() == y.tobytes()
    assert case.fused()[0].tobytes() == grad_x.tobytes()


@cut_shapes
def test_kernels_past_the_cache_with_a_residual_of_its_own_place(
    instruction_set, rows, shape, past_the_cache
):
    case = Case(np.float32, rows=rows, shape=shape, residual=True, put=_shifted(1))
    statistics = case.mean, None, case.var, EPS, case.sum_grad, case.sum_grad_x_hat, case.gamma
    for place in (1, 2):  # where grad_x lies, and elsewhere
        grad_x = _shifted(1)(np.zeros_like(case.x))
        grad_residual = _shifted(place)(np.zeros_like(case.x))
        _core.backward(
            case.grad_y, case.x, grad_x, case.axis, case.count, *statistics,
            grad_residual=grad_residual, **case.backward_extras,
        )  # fmt: skip
        case.assert_gradient(grad_x, case.grad_x)
        np.testing.assert_array_equal(grad_residual, case.grad_y)


@pytest.mark.parametrize("shift", [1, 4, 13])
@cut_shapes
def test_kernels_sums_do_not_depend_on_the_address(instruction_set, rows, shape, shift):
    here, there = (Case(np.float32, rows=rows, shape=shape, put=_shifted(by)) for by in (0, shift))
    assert np.array(here.forward()[2:]).tobytes() == np.array(there.forward()[2:]).tobytes()
    assert np.array(here.fused()[1:]).tobytes() == np.array(there.fused()[1:]).tobytes()


def test_kernels_write_nothing_beside_an_output_past_the_cache(
    instruction_set, rows, past_the_cache
):
    for shape in CUT:
        case = Case(np.float32, rows=rows, shape=shape)
        memory = np.full(case.x.size + 128, 7.0, np.float32)
        y = memory[61 : 61 + case.x.size].reshape(case.x.shape)
        _core.normalize(case.x, y, case.axis, case.mean, None, case.var, EPS)
        assert (memory[:61] == 7).all()
        assert (memory[61 + case.x.size :] == 7).all()


# ---- activations at their edges -----------------------------------------------------------------


def _relu_of(values, dtype, activation=RELU, rows=True, slope=SLOPE):
    """activation(values) by identity statistics, one channel an array element apart."""
    x = np.array(values, dtype).reshape(1, 1, -1)
    x = x if rows else np.ascontiguousarray(x.transpose(0, 2, 1))
    y = np.empty_like(x)
    axis = 1 if rows else 2
    _core.normalize(
        _seen(x), _seen(y), axis, np.zeros(1), None, np.ones(1), 0.0, activation=activation,
        slope=slope,
    )  # fmt: skip
    return y.ravel().astype(np.float64)


def test_kernels_relu_of_minus_infinity_is_zero(instruction_set, dtype, rows):
    np.testing.assert_array_equal(_relu_of([-np.inf] * 40, dtype, rows=rows), np.zeros(40))


def test_kernels_relu_of_nan_is_nan(instruction_set, dtype, rows):
    assert np.isnan(_relu_of([np.nan] * 40, dtype, rows=rows)).all()


def test_kernels_relu_gives_no_negative_zero(instruction_set, dtype, rows):
    y = _relu_of([-1.0, -0.0, 0.0, -np.inf, -1e-30] * 8, dtype, rows=rows)
    assert not np.signbit(y).any()


def test_kernels_relu_of_infinity_is_infinite(instruction_set, dtype, rows):
    assert np.isposinf(_relu_of([np.inf] * 40, dtype, rows=rows)).all()


def test_kernels_leaky_relu_of_minus_infinity_is_minus_infinity(instruction_set, dtype, rows):
    assert np.isneginf(_relu_of([-np.inf] * 40, dtype, LEAKY, rows)).all()


def test_kernels_leaky_relu_of_slope_zero_is_relu(instruction_set, dtype, rows):
    values = [-np.inf, -1.0, -0.0, 2.0, np.inf] * 8
    np.testing.assert_array_equal(
        _relu_of(values, dtype, LEAKY, rows, slope=0.0), _relu_of(values, dtype, RELU, rows)
    )


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 2.0, -0.5])
def test_kernels_leaky_relu_takes_any_slope(instruction_set, slope):
    y = _relu_of([-2.0, 2.0] * 20, np.float64, LEAKY, slope=slope)
    np.testing.assert_array_equal(y, [-2.0 * slope, 2.0] * 20)


def test_kernels_relu_lets_no_gradient_through_at_zero(instruction_set, dtype, rows):
    # As torch: the derivative at 0 is that of the left side.
    x = np.zeros((1, 1, 40) if rows else (1, 40, 1), dtype)
    g, grad_x = np.ones_like(x), np.ones_like(x)
    sums = np.empty((2, 1))
    _core.backward_fused(
        _seen(g), _seen(x), _seen(grad_x), 1 if rows else 2, 0.0, np.zeros(1), None, np.ones(1),
        0.0, *sums, activation=RELU,
    )  # fmt: skip
    np.testing.assert_array_equal(grad_x.astype(float), np.zeros(x.shape))
    np.testing.assert_array_equal(sums, np.zeros((2, 1)))


def test_kernels_relu_lets_through_in_backward_what_it_let_through_forward(
    instruction_set, dtype, rows
):
    # z near zero is where a gradient mask computed otherwise than y would differ from y > 0.
    rng = np.random.default_rng(0)
    shape = (4, 9, 500) if rows else (4, 500, 9)
    axis = 1 if rows else 2
    x = (100 + 1e-2 * rng.integers(-3, 4, shape)).astype(dtype)
    y, grad_x, grad_residual = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    residual, ones = np.zeros_like(x), np.ones_like(x)
    mean, low, m2, sum1, sum2 = np.empty((5, 9))
    count, _ = _core.forward(
        _seen(x), _seen(y), axis, EPS, mean, low, m2, activation=RELU, residual=_seen(residual)
    )
    _core.backward_fused(
        _seen(ones), _seen(x), _seen(grad_x), axis, count, mean, low, m2 / count, EPS, sum1, sum2,
        grad_residual=_seen(grad_residual), activation=RELU, y=_seen(y),
    )  # fmt: skip
    np.testing.assert_array_equal(grad_residual.astype(float) > 0, y.astype(float) > 0)


def test_kernels_relu_mask_is_that_of_forward_when_one_channel_exceeds_float32(instruction_set):
    # That channel's last step is float64. Whatever width the others have, forward and backward
    # must agree on it: the residual puts every z within a rounding of zero.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 64, 4000)).astype(np.float32)
    x[:, 0] *= 1e31
    y, grad_x, grad_residual = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    mean, low, m2, sum1, sum2 = np.empty((5, 64))
    _core.forward(x, y, 1, EPS, mean, low, m2)
    residual = -y
    count, _ = _core.forward(x, y, 1, EPS, mean, low, m2, activation=RELU, residual=residual)
    _core.backward_fused(
        np.ones_like(x), x, grad_x, 1, count, mean, low, m2 / count, EPS, sum1, sum2,
        grad_residual=grad_residual, activation=RELU, y=y,
    )  # fmt: skip
    np.testing.assert_array_equal(grad_residual > 0, y > 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@activations
def test_kernels_values_under_zero_weight_do_not_matter(
    instruction_set, dtype, rows, activation, bad
):
    residual = activation not in NOT_AFTER_A_RESIDUAL
    case = Case(dtype, rows=rows, activation=activation, residual=residual, weighted=True)
    grad_residual = case.empty()
    expected = [*case.forward(), *case.fused(grad_residual=grad_residual), grad_residual]
    covered = case.weights == 0
    for array in (case.x, case.grad_y, case.residual) if residual else (case.x, case.grad_y):
        array[covered] = bad
    grad_residual = case.empty()
    got = [*case.forward(), *case.fused(grad_residual=grad_residual), grad_residual]
    for a, b in zip(got, expected, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# ---- how arrays arrive --------------------------------------------------------------------------


def test_kernels_take_raw_addresses_as_they_take_buffers(instruction_set, case):
    y, grad_x, grad_residual = case.empty(), case.empty(), case.empty()
    mean, low, m2, sum1, sum2 = np.empty((5, len(case.gamma)))
    extras = {
        **case.extras,
        "weights": _address(case.weights),
        "residual": _address(case.residual),
    }
    gamma, beta = _address(case.gamma), _address(case.beta)
    y_of_case = None if case.residual is None else case.put(case.y.astype(case.dtype))
    _core.forward(
        _address(case.x), _address(y), case.axis, EPS, _address(mean), _address(low),
        _address(m2), gamma, beta, **extras,
    )  # fmt: skip
    _core.backward_fused(
        _address(case.grad_y), _address(case.x), _address(grad_x), case.axis, case.count,
        _address(case.mean), None, _address(case.var), EPS, _address(sum1), _address(sum2), gamma,
        beta, grad_residual=_address(grad_residual) if case.residual is not None else None,
        **{**case.backward_extras, "weights": _address(case.weights), "y": _address(y_of_case)},
    )  # fmt: skip
    expected_y, _, expected_mean, expected_low, expected_m2 = case.forward()
    expected_grad, *expected_sums = case.fused()
    for a, b in zip(
        (y, mean, low, m2, grad_x, sum1, sum2),
        (expected_y, expected_mean, expected_low, expected_m2, expected_grad, *expected_sums),
        strict=True,
    ):
        assert a.tobytes() == b.tobytes()


@activations
def test_kernels_take_strides_that_fit_no_view(instruction_set, dtype, residual, activation):
    if residual and activation in NOT_AFTER_A_RESIDUAL:
        pytest.skip("follows no residual")
    case = Case(dtype, activation=activation, residual=residual, put=_grid_of_gaps)
    case.assert_output(case.forward()[0])
    grad_residual = case.empty() if residual else None
    case.assert_gradient(case.fused(grad_residual=grad_residual)[0], case.grad_x)
    if residual:
        case.assert_gradient(grad_residual, case.grad_residual)


def test_kernels_take_weights_with_strides_that_fit_no_view(instruction_set, rows):
    case = Case(
        np.float32, rows=rows, activation=RELU, residual=True, weighted=True, put=_grid_of_gaps
    )
    case.assert_output(case.forward()[0])
    case.assert_gradient(case.fused()[0], case.grad_x)


def test_kernels_take_five_axes_sliced_in_the_middle(instruction_set, dtype):
    rng = np.random.default_rng(0)
    memory = rng.normal(size=(3, 4, 6, 8, 5)).astype(dtype)
    x = memory[:, :, ::2, ::2]
    out = np.zeros_like(memory)
    statistics = 1, np.zeros(4), None, np.ones(4), EPS
    _core.normalize(_seen(x), _seen(out)[:, :, ::2, ::2], *statistics)
    expected = np.zeros(x.shape, dtype)
    _core.normalize(_seen(np.ascontiguousarray(x)), _seen(expected), *statistics)
    np.testing.assert_array_equal(out[:, :, ::2, ::2], expected)
    assert not np.any(out[:, :, 1::2].astype(float))


def test_kernels_take_operands_of_different_layouts(instruction_set, dtype):
    case = Case(dtype, activation=RELU, residual=True)
    expected = case.forward()[0], case.fused()[0]
    case.residual = np.asfortranarray(case.residual)
    case.grad_y = np.ascontiguousarray(case.grad_y.transpose(0, 2, 1)).transpose(0, 2, 1)
    case.assert_output(case.forward()[0])
    case.assert_gradient(case.fused()[0], case.grad_x)
    case.assert_output(expected[0])


def test_kernels_statistics_alone_write_no_output(instruction_set, dtype, rows):
    case = Case(dtype, rows=rows)
    mean, low, m2 = np.empty((3, 7))
    count, _ = _core.forward(_seen(case.x), None, case.axis, EPS, mean, low, m2)
    assert count == case.count
    np.testing.assert_allclose(m2, case.m2, rtol=1e-9)


def test_kernels_mean_low_holds_what_rounding_left_off_the_mean(instruction_set):
    # The mean, 1e8 + 1/3, lies between two values of float64 that are 1.5e-8 apart.
    x = np.array([[1e8], [1e8], [1e8 + 1]])
    mean, low, m2 = np.empty((3, 1))
    _core.forward(x, None, 1, 0.0, mean, low, m2)
    assert low[0] != 0
    assert abs((mean[0] - 1e8) + low[0] - 1 / 3) < 1e-16


# ---- refusals -----------------------------------------------------------------------------------


def _forward(**changes):
    arguments = {
        "x": np.zeros((4, 3)), "y": np.zeros((4, 3)), "channel_axis": 1, "eps": EPS,
        "mean": np.zeros(3), "mean_low": np.zeros(3), "m2": np.zeros(3),
    }  # fmt: skip
    return _core.forward(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": np.zeros((3, 4))}, ValueError, "y: not the shape"),
        ({"y": np.zeros((4, 3), np.float32)}, ValueError, "y: not the shape and type"),
        ({"residual": np.zeros((4, 2))}, ValueError, "residual: not the shape"),
        ({"weights": np.zeros((4, 3), np.float32)}, ValueError, "weights: not float64"),
        ({"weights": np.zeros(4)}, ValueError, "weights: not the shape"),
        ({"mean": np.zeros(2)}, ValueError, "mean: not a float64 vector"),
        ({"gamma": np.zeros(3, np.float32)}, ValueError, "gamma: not a float64 vector"),
        ({"gamma": np.zeros(6)[::2]}, ValueError, "gamma: not a float64 vector"),
        ({"channel_axis": 2}, ValueError, "channel_axis out of range"),
        ({"channel_axis": -1}, ValueError, "channel_axis out of range"),
        ({"activation": 7}, ValueError, "activation: unknown code"),
        ({"x": np.zeros((4, 3), complex)}, TypeError, "x: unsupported buffer format"),
        ({"x": np.zeros((4, 3), int)}, TypeError, "x: unsupported buffer format"),
        ({"x": (0, 0)}, ValueError, "x: not a 4-tuple"),
    ],
)
def test_kernels_refuse_arguments_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        _forward(**changes)


def test_kernels_refuse_an_instruction_set_that_does_not_exist():
    before = _core.instruction_set()
    with pytest.raises(ValueError, match=r"one of those this machine runs \(baseline.*got 'mmx'"):
        _core.use_instruction_set("mmx")
    assert _core.instruction_set() == before


def test_kernels_copy_copies(rng):
    x = rng.normal(size=(100, 1001)).astype(np.float32)
    y = np.zeros_like(x)
    _core.copy(y, x)
    np.testing.assert_array_equal(y, x)


def test_kernels_copy_refuses_strided_arrays():
    with pytest.raises(ValueError, match="C-contiguous"):
        _core.copy(np.zeros((4, 3)), np.zeros((3, 4)).T)
