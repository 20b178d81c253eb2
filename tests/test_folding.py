import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import batch_norm_inference
from batchnorm.errors import ArgumentError, DTypeError, ShapeError
from batchnorm.folding import Affine, Linear, fold_linear, round_to_odd
from batchnorm.folding.sums import largest_difference


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


@pytest.mark.parametrize("name", ["weight", "mean", "gamma"])
def test_fold_linear_refuses_what_is_not_finite(name):
    names = ("weight", "bias", "mean", "var", "gamma", "beta")
    arguments = dict(zip(names, _parts(np.random.default_rng(5)), strict=True))
    arguments[name].reshape(-1)[3] = np.inf
    with pytest.raises(ArgumentError, match=rf"{name} must be finite"):
        fold_linear(**arguments)


def test_fold_linear_refuses_weights_that_overflow_half_precision():
    weight = np.ones((1, 2), np.float16)
    with pytest.raises(ArgumentError, match=r"weight must fit into float16, and the largest is 7"):
        fold_linear(weight, None, [0.0], [1e-12], eps=1e-12)


# ---- the algebra, against the definition in extended precision ----------------------------------


def _convolve(x, layer, stride=1, padding=0, dilation=1):
    """(in, *S) → (out, *S'), by the definition, in the type of x."""
    w = np.asarray(layer.weight).astype(x.dtype)
    rank = w.ndim - 2
    sizes = x.shape[1:]
    kernel = w.shape[2:]
    spans = [dilation * (k - 1) for k in kernel]
    groups, inside = layer.groups, layer.inputs // layer.groups
    each = layer.outputs // groups
    if layer.transposed:
        whole = [(n - 1) * stride + s + 1 for n, s in zip(sizes, spans, strict=True)]
    else:
        x = np.pad(x, [(0, 0), *[(padding, padding)] * rank])
        whole = [(n - s - 1) // stride + 1 for n, s in zip(x.shape[1:], spans, strict=True)]
    y = np.zeros((layer.outputs, *whole), x.dtype)
    for tap in np.ndindex(*kernel):
        at = [t * dilation for t in tap]
        for o, i in itertools.product(range(layer.outputs), range(inside)):
            g = o // each
            if layer.transposed:
                place = tuple(
                    slice(a, a + (n - 1) * stride + 1, stride)
                    for a, n in zip(at, sizes, strict=True)
                )
                y[(o, *place)] += w[(g * inside + i, o % each, *tap)] * x[g * inside + i]
            else:
                place = tuple(
                    slice(a, a + (n - 1) * stride + 1, stride)
                    for a, n in zip(at, whole, strict=True)
                )
                y[o] += w[(o, i, *tap)] * x[(g * inside + i, *place)]
    if layer.transposed and padding:
        y = y[(slice(None), *[slice(padding, -padding)] * rank)]
    b = np.zeros(layer.outputs) if layer.bias is None else np.asarray(layer.bias)
    return y + _column(b, x)


def _column(v, x):
    return v.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _normalize(x, statistics):
    mean, var, gamma, beta, eps = statistics
    mean, var, gamma, beta = (_column(v, x) for v in (mean, var, gamma, beta))
    return gamma * (x - mean) / np.sqrt(var + x.dtype.type(eps)) + beta


def _statistics(rng, channels):
    gamma = rng.standard_normal(channels) * rng.integers(0, 2, channels)  # some zero, some negative
    return (
        rng.standard_normal(channels), rng.uniform(0.1, 4, channels), gamma,
        rng.standard_normal(channels), 1e-3,
    )  # fmt: skip


def _affine(statistics):
    *arrays, eps = statistics
    return Affine.of(*arrays, eps=eps)


def _layer(rng, rank, groups, transposed, kernel=3, inputs=None, outputs=None):
    inputs, outputs = inputs or 2 * groups, outputs or 3 * groups
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    weight = rng.standard_normal((first, second // groups, *[kernel] * rank))
    return Linear(weight, rng.standard_normal(outputs), groups, transposed)


def _input(rng, channels, rank, size=6):
    return rng.standard_normal((channels, *[size] * rank)).astype(np.longdouble)


def _assert_same(ours, expected):
    # Everything is of size 10 and below, folded in float64, and evaluated in extended precision.
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours.astype(float), expected.astype(float), rtol=0, atol=1e-12)


KINDS = st.fixed_dictionaries(
    {
        "rank": st.integers(0, 3),
        "groups": st.integers(1, 3),
        "transposed": st.booleans(),
        "seed": st.integers(0, 2**32),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
    }
)


def _made(kind, **options):
    """A generator, a layer, an input, and the options of its convolution."""
    rng = np.random.default_rng(kind["seed"])
    linear = kind["rank"] == 0
    layer = _layer(
        rng, kind["rank"], 1 if linear else kind["groups"], not linear and kind["transposed"],
        **options,
    )  # fmt: skip
    places = {k: kind[k] for k in ("stride", "padding", "dilation")} if not linear else {}
    return rng, layer, _input(rng, layer.inputs, kind["rank"]), places


@given(KINDS)
def test_then_equals_the_layer_followed_by_the_batch_norm(kind):
    rng, layer, x, places = _made(kind)
    norm = _statistics(rng, layer.outputs)
    expected = _normalize(_convolve(x, layer, **places), norm)
    _assert_same(_convolve(x, layer.then(_affine(norm)), **places), expected)


@given(KINDS)
def test_then_takes_a_chain_of_batch_norms(kind):
    rng, layer, x, places = _made(kind)
    norms = [_statistics(rng, layer.outputs) for _ in range(2)]
    expected = _normalize(_normalize(_convolve(x, layer, **places), norms[0]), norms[1])
    first, second = map(_affine, norms)
    _assert_same(_convolve(x, layer.then(first).then(second), **places), expected)
    _assert_same(_convolve(x, layer.then(first.then(second)), **places), expected)
    assert first.then(second).norms == 2


@given(KINDS)
def test_after_equals_the_batch_norm_followed_by_the_layer(kind):
    rng, layer, x, places = _made({**kind, "transposed": False, "padding": 0})
    norm = _statistics(rng, layer.inputs)
    expected = _convolve(_normalize(x, norm), layer, **places)
    _assert_same(_convolve(x, layer.after(_affine(norm)), **places), expected)


@given(KINDS)
def test_after_equals_any_layer_when_the_shift_is_zero(kind):
    rng, layer, x, places = _made(kind)
    _, var, gamma, _, eps = _statistics(rng, layer.inputs)
    norm = (np.zeros(layer.inputs), var, gamma, np.zeros(layer.inputs), eps)
    expected = _convolve(_normalize(x, norm), layer, **places)
    folded = layer.after(_affine(norm), padded=True)
    _assert_same(_convolve(x, folded, **places), expected)


@given(KINDS)
def test_border_makes_after_right_where_zeros_are_padded(kind):
    rng, layer, x, places = _made({**kind, "rank": max(kind["rank"], 1), "transposed": False})
    norm = _statistics(rng, layer.inputs)
    expected = _convolve(_normalize(x, norm), layer, **places)
    affine = _affine(norm)
    border = layer.border(affine, x.shape[1:], **places)
    _assert_same(_convolve(x, layer.after(affine), **places) + border, expected)


@pytest.mark.parametrize(
    ("transposed", "padded", "message"),
    [
        (False, True, "pads with zeros, which do not pass through the batch norm, must be zero"),
        (True, False, "transposed convolution, whose outputs do not all see every weight"),
    ],
)
def test_after_refuses_what_would_be_wrong_at_the_border(transposed, padded, message):
    rng = np.random.default_rng(0)
    layer = _layer(rng, 2, 1, transposed)
    norm = _affine((np.zeros(2), np.ones(2), np.ones(2), np.array([0.0, 0.5]), 0.0))
    with pytest.raises(ArgumentError, match=message) as error:
        layer.after(norm, padded=padded)
    assert "got 0.5 in channel 1 (1 of 2 channels)" in str(error.value)


def test_border_refuses_transposed_convolutions():
    layer = _layer(np.random.default_rng(0), 1, 1, True)
    norm = _affine(_statistics(np.random.default_rng(0), layer.inputs))
    with pytest.raises(ArgumentError, match="border must be asked of a convolution"):
        layer.border(norm, (4,))


@given(KINDS)
def test_layers_add_up_with_their_kernels_centred(kind):
    rng, layer, x, places = _made({**kind, "padding": 0, "rank": max(kind["rank"], 1)})
    places["padding"] = places["dilation"]  # half of a kernel of three
    small = _layer(rng, x.ndim - 1, layer.groups, layer.transposed, kernel=1)
    expected = _convolve(x, layer, **places) + _convolve(x, small, places["stride"], 0)
    _assert_same(_convolve(x, layer + small, **places), expected)
    _assert_same(_convolve(x, small + layer, **places), expected)


@given(KINDS)
def test_repvgg_block_becomes_one_convolution(kind):
    rng = np.random.default_rng(kind["seed"])
    rank, groups = max(kind["rank"], 1), kind["groups"]
    channels = 2 * groups
    layers = [_layer(rng, rank, groups, False, k, channels, channels) for k in (3, 1)]
    norms = [_statistics(rng, channels) for _ in range(3)]
    x = _input(rng, channels, rank)
    expected = (
        _normalize(_convolve(x, layers[0], padding=1), norms[0])
        + _normalize(_convolve(x, layers[1]), norms[1])
        + _normalize(x, norms[2])
    )
    alone = Linear.identity(channels, [1] * rank, groups)
    one, two, three = (
        layer.then(_affine(norm)) for layer, norm in zip([*layers, alone], norms, strict=True)
    )
    _assert_same(_convolve(x, one + two + three, padding=1), expected)


@given(KINDS)
def test_identity_returns_its_input(kind):
    rng = np.random.default_rng(kind["seed"])
    rank, groups = kind["rank"], kind["groups"] if kind["rank"] else 1
    x = _input(rng, 2 * groups, rank)
    layer = Linear.identity(2 * groups, [3] * rank, groups)
    _assert_same(_convolve(x, layer, padding=1 if rank else 0), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(np.ones(3)), r"weight must have at least 2 axes, .* got shape \(3,\)"),
        (lambda: Linear(np.ones((3, 1, 1)), groups=2), "groups must divide the 3 output channels"),
        (lambda: Linear(np.ones((3, 1, 1)), groups=2, transposed=True), "the 3 input channels"),
        (lambda: Linear(np.ones((3, 1, 1)), groups=1.5), "got 1.5"),
        (lambda: Linear(np.ones((3, 1)), np.ones(1)), r"bias must have shape \(out,\) = \(3,\)"),
        (lambda: Linear.identity(4, [3, 2]), r"kernel must be odd to have a centre, got \(3, 2\)"),
        (lambda: Linear.identity(4, [3], 3), "groups must divide the 4 channels, got 3"),
        (lambda: Linear(np.ones((3, 1))) + Linear(np.ones((3, 2))), r"layers to add must agree"),
        (
            lambda: Linear(np.ones((1, 1, 3))) + Linear(np.ones((1, 1, 2))),
            r"kernels to add must have a common middle, got \(2,\) and \(3,\)",
        ),
        (lambda: Affine.of(np.ones(2), np.ones(3)), r"var must have shape \(C,\) = \(2,\), got"),
        (lambda: Affine.of(1.0, 1.0), r"mean must have shape \(C,\), got \(\)"),
        (
            lambda: Linear(np.ones((3, 1))).then(Affine.of([0.0], [1.0])),
            "batch norm after a layer must have its 3 output channels, got 1",
        ),
        (
            lambda: Linear(np.ones((3, 2))).after(Affine.of([0.0], [1.0])),
            "batch norm before a layer must have its 2 input channels, got 1",
        ),
        (
            lambda: Affine.of([0.0], [1.0]).then(Affine.of([0.0] * 2, [1.0] * 2)),
            "batch norm after another must have its 1 channels, got 2",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(make, message):
    with pytest.raises(ShapeError, match=message):
        make()


def test_layers_without_channels_fold():
    layer = Linear(np.ones((0, 3, 1)), groups=1).then(Affine.of(np.ones(0), np.ones(0)))
    assert (layer.weight.shape, layer.bias.shape) == ((0, 3, 1), (0,))


# ---- rounding -----------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.integers(-60, 60))
def test_rounded_takes_the_nearest_number_of_each_type(value, exponent):
    exact = value * 2.0**exponent
    for dtype in _types():
        if abs(exact) > 60_000 and dtype == np.float16:
            continue
        with np.errstate(under="ignore"):
            got = Linear(np.array([[exact]])).rounded(dtype).weight[0, 0]
            around = [np.nextafter(got, dtype.type(s * np.inf)) for s in (-1, 1)]
        distance = abs(Fraction(float(got)) - Fraction(exact))
        assert all(
            distance <= abs(Fraction(float(other)) - Fraction(exact))
            for other in around
            if np.isfinite(float(other))
        )


def _types():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]


@pytest.mark.parametrize(("bits", "dtype"), [(8, 1), (11, 0)])
def test_rounded_rounds_once_where_float32_would_be_a_tie(bits, dtype):
    dtype = _types()[dtype]
    above = 1 + 2.0**-bits + 2.0**-40  # float32 is the middle between 1 and its neighbour
    rounded = Linear(np.array([[above, -above]])).rounded(dtype).weight
    assert rounded.astype(float).tolist() == [[1 + 2.0 ** (1 - bits), -1 - 2.0 ** (1 - bits)]]


def test_round_to_odd_keeps_what_float32_holds_and_what_is_not_finite():
    values = np.array([0.0, -0.0, 1.5, 1e-45, np.inf, -np.inf, np.nan, 1e300])
    odd = round_to_odd(values)
    np.testing.assert_array_equal(odd[:7], values[:7].astype(np.float32))
    assert odd[7] == np.finfo(np.float32).max  # which overflows any narrower type


@pytest.mark.parametrize("dtype", [np.int32, complex, np.longdouble])
def test_rounded_refuses_types_without_fractions(dtype):
    if np.dtype(dtype) == np.float64:
        pytest.skip("longdouble is float64 here")
    with pytest.raises(DTypeError, match="dtype must be a floating type"):
        Linear(np.ones((1, 1))).rounded(dtype)


# ---- the bound ----------------------------------------------------------------------------------


def _in_order(values, order, dtype):
    """A sum in which every addition is rounded to `dtype`."""
    total = dtype.type(0)
    for k in order:
        total = dtype.type(total + values[k])
    return total


def _dot(w, x, b, order, dtype, sums):
    """One output of a linear layer, stored in `dtype`."""
    products = w.astype(sums) * x.astype(sums)
    return dtype.type(sums.type(_in_order(products, order, sums) + sums.type(b)))


def _one_by_one(z, mean, var, gamma, beta, eps, way, dtype, steps):
    """One value of a batch norm, in one of three orders; every operation rounds to `steps`."""
    z, mean, var, gamma, beta, eps = (steps.type(v) for v in (z, mean, var, gamma, beta, eps))
    inverse = steps.type(1) / np.sqrt(var + eps)
    if way == 0:
        y = (z - mean) * inverse * gamma + beta
    elif way == 1:
        scale = gamma * inverse
        y = z * scale + (beta - mean * scale)
    else:
        y = gamma * ((z - mean) / np.sqrt(var + eps)) + beta
    return dtype.type(y)


# Numbers of any size, numbers with a long tail, and powers of two, between which rounding is worst.
_VALUES = st.one_of(
    st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3),
    st.integers(-7, 2).map(lambda e: 2.0**e),
    st.sampled_from([1.0, -1.0, 1 + 2**-7, 1 - 2**-8, 1 + 2**-10, -1 - 2**-10, 0.0]),
)


@given(data=st.data())
def test_difference_bounds_what_folding_changes(data):
    dtype = data.draw(st.sampled_from(_types()))
    sums = data.draw(st.sampled_from([dtype, np.dtype(np.float32)]))
    if sums.itemsize < dtype.itemsize:
        sums = dtype
    n = data.draw(st.integers(1, 12))
    draw = lambda count: np.array(data.draw(st.lists(_VALUES, min_size=count, max_size=count)))  # noqa: E731
    w, x = draw(n).astype(dtype), draw(n).astype(dtype)
    if data.draw(st.booleans()):  # terms that cancel
        x = np.concatenate([x, x])
        w = np.concatenate([w, -w])
    (b, mean, gamma, beta), var = draw(4).astype(dtype), dtype.type(abs(draw(1)[0]) + 0.0625)
    eps = 2.0**-10
    if data.draw(st.booleans()):  # a batch norm whose shifts cancel
        mean = _dot(w, x, b, range(len(w)), dtype, sums)
    z = _dot(w, x, b, data.draw(st.permutations(range(len(w)))), dtype, sums)
    way = data.draw(st.integers(0, 2))
    original = _one_by_one(z, mean, var, gamma, beta, eps, way, dtype, sums)

    layer = Linear(w[None], np.array([b]))
    norm = Affine.of([mean], [var], [gamma], [beta], eps=eps)
    once = layer.then(norm).rounded(dtype)
    order = data.draw(st.permutations(range(len(w))))
    folded = _dot(once.weight[0], x, once.bias[0], order, dtype, sums)

    bound = layer.difference(norm, abs(x.astype(float)), dtype, sums=sums)
    assert bound.shape == (1,)
    assert abs(Fraction(float(original)) - Fraction(float(folded))) <= Fraction(float(bound[0]))


@given(data=st.data())
def test_difference_bounds_a_batch_norm_before_and_a_narrower_type(data):
    types = _types()
    given_type = np.dtype(np.float32)
    dtype = data.draw(st.sampled_from(types[:3]))
    n = data.draw(st.integers(1, 8))
    draw = lambda count: np.array(data.draw(st.lists(_VALUES, min_size=count, max_size=count)))  # noqa: E731
    w, x, mean, gamma, beta = (draw(n).astype(given_type) for _ in range(5))
    var, eps = (abs(draw(n)) + 0.0625).astype(given_type), 2.0**-10
    b = given_type.type(draw(1)[0])
    u = np.array(
        [
            _one_by_one(*values, eps, data.draw(st.integers(0, 2)), given_type, given_type)
            for values in zip(x, mean, var, gamma, beta, strict=True)
        ]
    )
    original = _dot(w, u, b, data.draw(st.permutations(range(n))), given_type, given_type)
    layer, norm = Linear(w[None], np.array([b])), Affine.of(mean, var, gamma, beta, eps=eps)
    once = layer.after(norm).rounded(dtype)
    order = data.draw(st.permutations(range(n)))
    folded = _dot(once.weight[0], x.astype(dtype), once.bias[0], order, dtype, given_type)
    bound = layer.difference(None, abs(x), dtype, before=norm, sums=given_type, original=given_type)
    assert abs(Fraction(float(original)) - Fraction(float(folded))) <= Fraction(float(bound[0]))


@given(data=st.data())
def test_difference_bounds_a_batch_norm_beside_a_multiple_before_a_layer(data):
    dtype, n = np.dtype(np.float32), data.draw(st.integers(1, 6))
    draw = lambda count: np.array(data.draw(st.lists(_VALUES, min_size=count, max_size=count)))  # noqa: E731
    w, x, mean, gamma, beta = (draw(n).astype(dtype) for _ in range(5))
    var, eps = (abs(draw(n)) + 0.0625).astype(dtype), 2.0**-10
    norm = Affine.of(mean, var, gamma, beta, eps=eps)
    multiple = draw(n).astype(dtype)
    if data.draw(st.booleans()):  # what is added cancels
        multiple = -norm.scale.astype(dtype)
    y = [
        _one_by_one(*values, eps, data.draw(st.integers(0, 2)), dtype, dtype)
        for values in zip(x, mean, var, gamma, beta, strict=True)
    ]
    original = _dot(w, np.array(y) + multiple * x, 0, range(n), dtype, dtype)
    layer, both = Linear(w[None]), norm + Affine.scaling(multiple)
    once = layer.after(both).rounded(dtype)
    folded = _dot(once.weight[0], x, once.bias[0], range(n), dtype, dtype)
    bound = layer.difference(None, abs(x), dtype, before=both)
    assert abs(Fraction(float(original)) - Fraction(float(folded))) <= Fraction(float(bound[0]))


def test_difference_counts_maps_that_cancel():
    """x·s − x·s of float32: the sum has no scale, but the errors of both."""
    f = np.float32
    gamma, x = f(1.1), f(1.7)
    norm = Affine.of([0.0], [2.0], [gamma], eps=0.0)
    both = norm + Affine.scaling(-norm.scale)
    original = gamma * (x / np.sqrt(f(2))) + f(-norm.scale[0]) * x
    assert original != 0
    bound = Linear(np.ones((1, 1), f)).difference(None, x, f, before=both)
    assert abs(original) <= bound[0]


def test_a_batch_norm_beside_a_multiple_is_one_map():
    norm = Affine.of([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], eps=0.0)
    both = norm + Affine.scaling([0.5, -1.0])
    x = np.array([0.25, -3.0])
    np.testing.assert_allclose(
        both.scale * x + both.shift, norm.scale * x + norm.shift + x * [0.5, -1.0]
    )


def test_scaling_and_sums_name_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"factors must have shape \(C,\), got \(\)"):
        Affine.scaling(2.0)
    with pytest.raises(ArgumentError, match="factors must be finite"):
        Affine.scaling([np.inf])
    with pytest.raises(ShapeError, match="map to add must have its 2 channels, got 1"):
        Affine.scaling([1.0, 1.0]) + Affine.scaling([1.0])


@given(data=st.data())
def test_difference_bounds_branches_that_are_added(data):
    dtype = data.draw(st.sampled_from(_types()))
    sums = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
    n, branches = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 3))
    draw = lambda count: np.array(data.draw(st.lists(_VALUES, min_size=count, max_size=count)))  # noqa: E731
    x, eps = draw(n).astype(dtype), 2.0**-10
    layers, norms, outputs = [], [], []
    for _ in range(branches):
        w, (b, mean, gamma, beta) = draw(n).astype(dtype), draw(4).astype(dtype)
        var = dtype.type(abs(draw(1)[0]) + 0.0625)
        z = _dot(w, x, b, range(n), dtype, sums)
        outputs.append(_one_by_one(z, mean, var, gamma, beta, eps, 0, dtype, sums))
        layers.append(Linear(w[None], np.array([b])))
        norms.append(Affine.of([mean], [var], [gamma], [beta], eps=eps))
    original = _in_order(outputs, data.draw(st.permutations(range(branches))), dtype)
    folded = [layer.then(norm) for layer, norm in zip(layers, norms, strict=True)]
    once = sum(folded[1:], start=folded[0]).rounded(dtype)
    found = _dot(once.weight[0], x, once.bias[0], range(n), dtype, sums)
    bound = sum(
        layer.difference(norm, abs(x.astype(float)), dtype, sums=sums, additions=branches - 1)[0]
        for layer, norm in zip(layers, norms, strict=True)
    )
    assert abs(Fraction(float(original)) - Fraction(float(found))) <= Fraction(float(bound))


@pytest.mark.parametrize("n", [10, 1000])
def test_difference_is_reached_within_a_factor_of_two(n):
    # Next to 1, the small terms are lost one by one. Times 1.5 they are more than half of a unit in
    # the last place, and are rounded up one by one.
    u = np.float32(2.0**-24)
    w, x = np.full(n, u), np.ones(n, np.float32)
    w[0] = 1
    layer, norm = Linear(w[None]), Affine.of([0.0], [1.0], [1.5], eps=0.0)
    original = np.float32(1.5) * np.add.accumulate(w * x)[-1]
    folded = np.add.accumulate(layer.then(norm).rounded(np.float32).weight[0] * x)[-1]
    bound = layer.difference(norm, 1.0, np.float32)[0]
    found = abs(float(original) - float(folded))
    assert bound / (2 if n > 100 else 4) < found < bound


def test_difference_counts_every_rounding_to_half_precision():
    # Of four roundings by up to 2^-11, found by search: those of z, y, the weight and the output.
    half = np.float16
    w, x, gamma = half(1.014), half(1.035), np.float32(1.0274597)
    layer, norm = Linear(np.array([[w]])), Affine.of([0.0], [1.0], [gamma], eps=0.0)
    original = half(gamma * np.float32(half(np.float32(w) * np.float32(x))))
    folded = half(np.float32(layer.then(norm).rounded(half).weight[0, 0]) * np.float32(x))
    bound = layer.difference(norm, x, half, sums=np.float32)[0]
    assert 0.9 * bound < abs(float(original) - float(folded)) < bound


@pytest.mark.parametrize("after", [None, Affine.of([0.0], [1e-10], eps=0.0)])
def test_difference_counts_terms_of_the_shift_that_cancel(after):
    # β = μ·scale but for rounding, and z is 0: what is left of y are rounding errors.
    f = np.float32
    mean, var, eps = f(1000.1), f(1 / 3), f(1e-3)
    scale = f(1) / np.sqrt(var + eps)
    beta = mean * scale
    norm = Affine.of([mean], [var], None, [beta], eps=float(eps))
    original = float(f(0) * scale + (beta - mean * scale))
    layer = Linear(np.zeros((1, 1), f))
    if after is not None:
        norm, original = norm.then(after), 1e5 * original
    folded = float(layer.then(norm).rounded(f).bias[0])
    bound = layer.difference(norm, 0.0, f)[0]
    assert bound / 1e3 < abs(original - folded) < bound


def test_difference_covers_weights_that_underflow_half_precision():
    # 65,000 · 2^-24 would be lost if only relative errors counted.
    layer, norm = Linear(np.full((1, 64), 2.0**-13)), Affine.of([0.0], [1.0], [2.0**-12], eps=0.0)
    assert not layer.then(norm).rounded(np.float16).weight.any()
    x = np.full(64, 60_000.0)
    exact = (layer.weight[0] * 2.0**-12) @ x
    assert layer.difference(norm, 60_000.0, np.float16, sums=np.float32)[0] > exact


def test_difference_is_infinite_where_no_digit_is_certain():
    norm = Affine.of([0.0], [1.0])
    assert Linear(np.ones((1, 300))).difference(norm, 1.0, "bfloat16") == np.inf
    assert Linear(np.ones((1, 300))).difference(norm, 1.0, "bfloat16", sums=np.float32) < 10
    assert Linear(np.full((1, 3), 1e300)).difference(norm, 1e300, np.float64) == np.inf


def test_difference_takes_a_bound_for_each_channel():
    layer = Linear(np.array([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 2, 1))
    norm = Affine.of([0.0, 0.0], [1.0, 1.0])
    small, large = layer.difference(norm, [1.0, 1e6], np.float32)
    assert large > 1e5 * small
    grouped = Linear(np.ones((2, 1, 1)), groups=2).difference(norm, [1.0, 1e6], np.float32)
    assert grouped[1] > 1e5 * grouped[0]


def test_difference_of_transposed_convolutions_is_that_of_their_outputs():
    weight = np.zeros((1, 2, 1))
    weight[0, 1] = 1e6
    norm = Affine.of([0.0, 0.0], [1.0, 1.0])
    first, second = Linear(weight, transposed=True).difference(norm, 1.0, np.float32)
    assert second > 1e5 * first


@pytest.mark.parametrize("largest", [-1.0, np.nan])
def test_difference_refuses_a_bound_of_the_input_that_is_none(largest):
    with pytest.raises(ArgumentError, match="largest must not be negative or NaN"):
        Linear(np.ones((1, 1))).difference(Affine.of([0.0], [1.0]), largest, np.float32)


def test_difference_names_types_without_precision():
    with pytest.raises(DTypeError, match="dtype must be a floating type, got int32"):
        Linear(np.ones((1, 1))).difference(Affine.of([0.0], [1.0]), 1.0, np.int32)


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        ([1.0, INF, NAN], [1.5, 0.0, INF], 0.5),  # where the first is not finite, any value will do
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, 2.0], [1.0, -INF], INF),
        ([NAN, INF], [0.0, 0.0], NAN),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_largest_difference_counts_values_where_the_first_are_finite(one, other, error):
    found, _ = largest_difference([np.array(one)], [np.array(other)])
    np.testing.assert_equal(found, error)
