"""BatchNorm: running statistics, modes, state, and that a call which raises changes nothing."""

import copy
import io
import pickle

import numpy as np
import pytest

import batchnorm
from batchnorm import BatchNorm, Moments
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError

H, FD = 1e-5, 1e-6  # as in test_functional


def _batches(rng, steps=4, shape=(6, 3, 4)):
    return [rng.normal(2 * k, 1 + k, shape) for k in range(steps)]


def _state(layer):
    """Everything that a call may change, as comparable bytes."""
    names = ["gamma", "beta", "grad_gamma", "grad_beta", "running_mean", "running_var"]
    arrays = [getattr(layer, name) for name in names]
    return (
        [None if a is None else (a.dtype, a.shape, a.tobytes()) for a in arrays],
        layer.num_batches_tracked,
        layer.training,
        id(layer._saved),
    )


# ---- running statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 0.37])
def test_layer_running_statistics_are_the_exponential_average(rng, momentum):
    layer = BatchNorm(3, momentum=momentum)
    mean, var = np.zeros(3), np.ones(3)
    for x in _batches(rng):
        layer(x)
        mean = (1 - momentum) * mean + momentum * x.mean((0, 2))
        var = (1 - momentum) * var + momentum * x.var((0, 2), ddof=1)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)


def test_layer_running_statistics_are_the_plain_average_when_momentum_is_none(rng):
    layer, batches = BatchNorm(3, momentum=None), _batches(rng)
    for x in batches:
        layer(x)
    mean = np.mean([x.mean((0, 2)) for x in batches], axis=0)
    var = np.mean([x.var((0, 2), ddof=1) for x in batches], axis=0)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)


def test_layer_counts_batches_when_momentum_is_zero(rng):
    layer = BatchNorm(3, momentum=0.0)
    for x in _batches(rng):
        layer(x)
    assert layer.num_batches_tracked == 4


def test_layer_weighted_running_statistics_are_those_of_the_kept_values(rng):
    x, mask = rng.normal(3, 2, (20, 3)), np.arange(20) % 3 > 0
    masked, kept = BatchNorm(3), BatchNorm(3)
    masked(x, weights=mask)
    kept(x[mask])
    np.testing.assert_allclose(masked.running_mean, kept.running_mean, rtol=1e-13)
    np.testing.assert_allclose(masked.running_var, kept.running_var, rtol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (5, 3, 0)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_layer_counts_an_empty_batch_and_keeps_its_statistics(rng, shape, momentum):
    layer = BatchNorm(3, momentum=momentum)
    layer(rng.normal(size=(6, 3)))
    before = layer.running_mean.copy(), layer.running_var.copy()
    assert layer(np.empty(shape)).shape == shape
    np.testing.assert_array_equal((layer.running_mean, layer.running_var), before)
    assert layer.num_batches_tracked == 2


def test_layer_is_unchanged_by_an_all_masked_batch():
    layer = BatchNorm(3)
    y = layer(np.full((4, 3), np.nan), weights=np.zeros(4))
    np.testing.assert_array_equal(y, np.zeros((4, 3)))
    np.testing.assert_array_equal(layer.running_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.running_var, np.ones(3))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1 / 16, 1, 1e200])
def test_layer_running_statistics_do_not_depend_on_the_scale_of_weights(rng, scale):
    x, w = rng.normal(3, 2, (20, 3)), rng.random(20)
    expected, scaled = BatchNorm(3, momentum=1.0), BatchNorm(3, momentum=1.0)
    expected(x, weights=w)
    scaled(x, weights=scale * w)
    np.testing.assert_allclose(scaled.running_mean, expected.running_mean, rtol=1e-13)
    np.testing.assert_allclose(scaled.running_var, expected.running_var, rtol=1e-13)


# At 1e200 the variance of a finite batch is infinite.
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_layer_leaves_a_batch_out_whose_statistics_are_not_finite(rng, bad):
    layer = BatchNorm(3)
    x = rng.normal(size=(6, 3))
    layer(x)
    before = _state(layer)[:2]
    x[:2, 1] = bad, -bad
    with np.errstate(all="ignore"):
        with pytest.warns(RuntimeWarning, match="not finite .channel 1"):
            layer(x)
        layer(x)  # warns once
    assert _state(layer)[:2] == before
    assert layer.nonfinite_batches == 2


def test_layer_gradients_of_an_empty_batch_are_zero_not_none():
    layer = BatchNorm(3)
    layer(np.empty((0, 3)))
    assert layer.backward(np.empty((0, 3))).shape == (0, 3)
    np.testing.assert_array_equal([layer.grad_gamma, layer.grad_beta], np.zeros((2, 3)))


def test_layer_does_not_track_in_evaluation(rng):
    layer = BatchNorm(3).eval()
    before = _state(layer)[:2]
    layer(rng.normal(size=(6, 3)))
    assert _state(layer)[:2] == before


def test_layer_statistics_are_float64_when_the_layer_is_half(rng, half_dtype):
    layer = BatchNorm(3, momentum=1e-3, dtype=half_dtype)
    x = (10 + 300 * rng.normal(size=(50, 3))).astype(half_dtype)
    for _ in range(20):
        layer(x)
    share = 1 - (1 - 1e-3) ** 20
    # In bfloat16 a step of 1e-3 would be rounded away, and 300² is infinite in float16.
    assert layer.running_var.dtype == np.float64
    np.testing.assert_allclose(layer.running_mean, share * Moments.of(x).mean, rtol=1e-12)
    assert np.isfinite(layer.running_var).all()


def test_layer_parameters_have_its_dtype(dtype):
    layer = BatchNorm(3, dtype=dtype)
    assert (layer.gamma.dtype, layer.beta.dtype) == (dtype, dtype)


def test_layer_output_has_the_dtype_of_x(rng, dtype):
    assert BatchNorm(3)(rng.normal(size=(4, 3)).astype(dtype)).dtype == dtype


def test_layer_evaluation_at_a_large_offset_keeps_the_digits_of_training(rng):
    x = (1e6 + rng.normal(size=(500, 3))).astype(np.float32)
    layer = BatchNorm(3, momentum=1.0)
    trained = layer(x)
    m = Moments.of(x)
    scale = np.sqrt((m.var() + 1e-5) / (m.var(ddof=1) + 1e-5))
    # Promise 2 on either side.
    np.testing.assert_allclose(layer.eval()(x), trained * scale, rtol=2e-6, atol=2e-6)


# ---- forward and backward -----------------------------------------------------------------------


@pytest.mark.parametrize("channel_axis", [1, -1, 0])
def test_layer_in_training_is_batch_norm(rng, channel_axis):
    x, g = rng.normal(size=(2, 3, 3, 3))
    layer = BatchNorm(3, channel_axis=channel_axis, eps=1e-3, dtype=np.float64)
    layer.gamma[:], layer.beta[:] = rng.normal(size=(2, 3))
    y, saved = batchnorm.batch_norm(x, layer.gamma, layer.beta, eps=1e-3, channel_axis=channel_axis)
    np.testing.assert_array_equal(layer(x), y)
    expected = batchnorm.batch_norm_backward(g, saved)
    got = layer.backward(g), layer.grad_gamma, layer.grad_beta
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_layer_in_evaluation_is_batch_norm_inference(rng):
    layer = BatchNorm(3, dtype=np.float64)
    layer(rng.normal(3, 2, (10, 3)))
    x = rng.normal(size=(4, 3, 2))
    expected = batchnorm.batch_norm_inference(
        x, layer.running_mean, layer.running_var, layer.gamma, layer.beta
    )
    np.testing.assert_array_equal(layer.eval()(x), expected)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_layer_backward_in_evaluation_equals_finite_differences(rng, channel_axis):
    layer = BatchNorm(3, dtype=np.float64, channel_axis=channel_axis)
    layer.gamma[:], layer.beta[:] = rng.normal(size=(2, 3))
    layer(rng.normal(3, 2, (10, 3)))
    layer.eval()
    shape = (4, 3, 2) if channel_axis == 1 else (4, 2, 3)
    x, g = rng.normal(size=(2, *shape))
    layer(x)
    grad_x, grads = layer.backward(g), (layer.grad_gamma, layer.grad_beta)
    expected = np.empty_like(x)
    for at in np.ndindex(shape):
        step = np.zeros(shape)
        step[at] = H
        expected[at] = (g * (layer(x + step) - layer(x - step))).sum() / (2 * H)
    np.testing.assert_allclose(grad_x, expected, rtol=0, atol=FD)
    for values, grad in zip((layer.gamma, layer.beta), grads, strict=True):
        for c in range(3):
            kept = values[c]
            values[c] = kept + H
            up = (g * layer(x)).sum()
            values[c] = kept - H
            down = (g * layer(x)).sum()
            values[c] = kept
            assert abs(grad[c] - (up - down) / (2 * H)) <= FD


def test_layer_backward_uses_the_mode_of_its_call(rng):
    x, g = rng.normal(size=(2, 6, 3))
    layer = BatchNorm(3, dtype=np.float64)
    layer(x)
    expected = layer.backward(g)
    layer.eval()
    np.testing.assert_array_equal(layer.backward(g), expected)


@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 6), (4, 5, 3, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_layer_equals_torch_over_several_steps(rng, shape, momentum):
    torch = pytest.importorskip("torch")
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
    theirs = getattr(torch.nn, kind)(5, momentum=momentum, dtype=torch.float64)
    ours = BatchNorm(5, momentum=momentum, dtype=np.float64)
    with torch.no_grad():
        for name, p in (("gamma", theirs.weight), ("beta", theirs.bias)):
            value = rng.normal(size=5)
            p.copy_(torch.tensor(value))
            setattr(ours, name, value)
    for training in (True, True, True, False, True, False):
        ours.train(training)
        theirs.train(training)
        x, g = rng.normal(1, 2, (2, *shape))
        tensor = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        y = theirs(tensor)
        y.backward(torch.tensor(g))
        pairs = [
            (ours(x), y.detach()),
            (ours.backward(g), tensor.grad),
            (ours.grad_gamma, theirs.weight.grad),
            (ours.grad_beta, theirs.bias.grad),
            (ours.running_mean, theirs.running_mean),
            (ours.running_var, theirs.running_var),
        ]
        for a, b in pairs:
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-11, atol=1e-12)
        assert ours.num_batches_tracked == int(theirs.num_batches_tracked)


# ---- masked arrays ------------------------------------------------------------------------------


def _masked(rng, shape=(8, 3, 4)):
    x, mask = rng.normal(3, 2, shape), rng.random(shape) < 0.3
    x[mask] = np.nan
    return np.ma.MaskedArray(x, mask)


def test_layer_in_training_honours_a_mask(rng):
    x, g = _masked(rng), rng.normal(size=(8, 3, 4))
    layer = BatchNorm(3, momentum=1.0, dtype=np.float64)
    y = layer(x)
    expected, saved = batchnorm.batch_norm(x, np.ones(3), np.zeros(3))
    np.testing.assert_array_equal(y.mask, x.mask)
    np.testing.assert_array_equal(y.data, expected.data)
    np.testing.assert_array_equal(layer.running_mean, saved.moments.mean)
    np.testing.assert_array_equal(layer.running_var, saved.moments.var(ddof=1))
    grad_x, grad_gamma, grad_beta = batchnorm.batch_norm_backward(g, saved)
    np.testing.assert_array_equal(layer.backward(g), grad_x)
    np.testing.assert_array_equal(layer.grad_gamma, grad_gamma)
    np.testing.assert_array_equal(layer.grad_beta, grad_beta)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_layer_in_evaluation_honours_a_mask(rng, channel_axis):
    x = _masked(rng, (8, 3, 3))
    layer = BatchNorm(3, channel_axis=channel_axis, dtype=np.float64)
    layer(rng.normal(1, 2, (9, 3, 3)))
    y = layer.eval()(x)
    np.testing.assert_array_equal(y.mask, x.mask)
    grad_x = layer.backward(np.ones((8, 3, 3)))
    sums = layer.grad_gamma, layer.grad_beta
    plain = layer(x.filled(5))
    np.testing.assert_array_equal(y.data, np.where(x.mask, 0, plain))
    # A value whose gradient is zero counts as little as one that is masked.
    np.testing.assert_allclose(grad_x, layer.backward(~x.mask), rtol=1e-15)
    np.testing.assert_allclose(sums, (layer.grad_gamma, layer.grad_beta), rtol=1e-13)


def test_layer_keeps_the_statistics_of_a_channel_that_is_masked(rng):
    x = np.ma.MaskedArray(rng.normal(3, 2, (8, 3)))
    x[:, 0] = np.ma.masked
    layer = BatchNorm(3)
    layer(x)
    assert layer.num_batches_tracked == 1
    assert (layer.running_mean[0], layer.running_var[0]) == (0, 1)
    np.testing.assert_allclose(layer.running_mean[1:], 0.1 * x.data[:, 1:].mean(0), rtol=1e-13)


def test_layer_is_unchanged_by_a_batch_that_is_masked():
    layer = BatchNorm(3)
    y = layer(np.ma.MaskedArray(np.full((4, 3), np.nan), True))
    np.testing.assert_array_equal(y.data, np.zeros((4, 3)))
    np.testing.assert_array_equal(layer.running_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.running_var, np.ones(3))
    assert layer.num_batches_tracked == 0


def test_layer_refuses_a_masked_array_of_another_number_of_channels():
    with pytest.raises(ShapeError, match=r"x must have num_features = 3.*got shape \(4, 2\)"):
        BatchNorm(3)(np.ma.MaskedArray(np.ones((4, 2)), True))


# ---- the inverse --------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_layer_inverse_undoes_evaluation(rng, channel_axis):
    layer = BatchNorm(3, channel_axis=channel_axis, eps=1e-3, dtype=np.float64)
    layer.gamma[:], layer.beta[:] = rng.uniform(1, 2, (2, 3))
    layer(rng.normal(3, 2, (9, 3, 3)))
    x = rng.normal(size=(4, 3, 3))
    y = layer.eval()(x)
    before = _state(layer)
    np.testing.assert_allclose(layer.inverse(y), x, rtol=0, atol=1e-14)
    assert _state(layer) == before


def test_layer_inverse_of_a_masked_array_is_masked(rng):
    y = _masked(rng)
    np.testing.assert_array_equal(BatchNorm(3).eval().inverse(y).mask, y.mask)


def test_layer_inverse_refuses_training_mode():
    with pytest.raises(
        BatchNormError, match=r"inverse needs.*evaluation mode.*call eval\(\) first"
    ):
        BatchNorm(3).inverse(np.ones((4, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_layer_inverse_refuses_a_layer_without_running_statistics(training):
    layer = BatchNorm(3, track_running_stats=False).train(training)
    with pytest.raises(BatchNormError, match="inverse needs.*track_running_stats=True"):
        layer.inverse(np.ones((4, 3)))


def test_layer_inverse_names_y_in_errors():
    with pytest.raises(ShapeError, match="y must have num_features = 3"):
        BatchNorm(3).eval().inverse(np.ones((4, 2)))
    with pytest.raises(DTypeError, match="y must be real numbers"):
        BatchNorm(3).eval().inverse(np.ones((4, 3), complex))


# ---- modes and options --------------------------------------------------------------------------


def test_layer_train_and_eval_return_the_layer():
    layer = BatchNorm(3)
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.training


def test_layer_without_affine_has_no_parameters(rng):
    layer = BatchNorm(3, affine=False)
    x = rng.normal(size=(4, 3))
    np.testing.assert_array_equal(layer(x), batchnorm.normalize(x))
    layer.backward(x)
    assert (layer.gamma, layer.beta, layer.grad_gamma, layer.grad_beta) == (None,) * 4


def test_layer_without_running_statistics_uses_the_batch_in_evaluation(rng):
    layer = BatchNorm(3, track_running_stats=False).eval()
    x = rng.normal(5, 1, (4, 3))
    np.testing.assert_array_equal(layer(x), batchnorm.normalize(x))
    assert (layer.running_mean, layer.running_var) == (None, None)
    assert layer.num_batches_tracked == 0


def test_layer_backward_without_running_statistics_goes_through_the_batch_in_evaluation(rng):
    layer = BatchNorm(3, track_running_stats=False).eval()
    layer(rng.normal(size=(9, 3)))
    np.testing.assert_allclose(layer.backward(np.ones((9, 3))), np.zeros((9, 3)), atol=1e-13)


def test_layer_repr_names_the_constructors_arguments():
    assert repr(BatchNorm(3, momentum=None, channel_axis=-1)) == (
        "BatchNorm(3, eps=1e-05, momentum=None, affine=True, track_running_stats=True, "
        "channel_axis=-1, dtype=float32)"
    )


@pytest.mark.parametrize("bad", [2.5, "3", None, True])
def test_layer_refuses_num_features_that_is_no_integer(bad):
    with pytest.raises(ArgumentError, match="num_features must be an integer, got"):
        BatchNorm(bad)


def test_layer_refuses_negative_num_features():
    with pytest.raises(ArgumentError, match="num_features must not be negative, got -1"):
        BatchNorm(-1)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_layer_refuses_momentum_outside_zero_to_one(bad):
    with pytest.raises(ArgumentError, match="momentum must be None or from 0 to 1, got"):
        BatchNorm(3, momentum=bad)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), "x"])
def test_layer_refuses_unusable_eps(bad):
    with pytest.raises(ArgumentError, match="eps must be"):
        BatchNorm(3, eps=bad)


@pytest.mark.parametrize("bad", ["eval", 1, None])
def test_layer_refuses_a_mode_that_is_no_boolean(bad):
    layer = BatchNorm(3)
    with pytest.raises(ArgumentError, match="mode must be True or False, got"):
        layer.train(bad)
    assert layer.training is True


@pytest.mark.parametrize("bad", [int, complex, object, "nonsense"])
def test_layer_refuses_dtypes_that_do_not_float(bad):
    with pytest.raises(DTypeError, match="dtype must be a floating type"):
        BatchNorm(3, dtype=bad)


# ---- calls that raise ---------------------------------------------------------------------------

_UNUSABLE = {
    "wrong channels": (lambda layer: layer(np.ones((4, 2))), ShapeError),
    "one value": (lambda layer: layer(np.ones((1, 3))), ShapeError),
    "rank": (lambda layer: layer(np.ones(3)), ShapeError),
    "type": (lambda layer: layer(np.ones((4, 3), complex)), DTypeError),
    "weights": (lambda layer: layer(np.ones((4, 3)), weights=-np.ones(4)), ArgumentError),
    "weights' shape": (lambda layer: layer(np.ones((4, 3)), weights=np.ones(5)), ShapeError),
    "grad_y's shape": (lambda layer: layer.backward(np.ones((1, 3))), ShapeError),
    "grad_y's type": (lambda layer: layer.backward(np.ones((6, 3), complex)), DTypeError),
}


@pytest.mark.parametrize("case", _UNUSABLE)
def test_layer_call_that_raises_changes_nothing(rng, case):
    call, error = _UNUSABLE[case]
    layer = BatchNorm(3)
    layer(rng.normal(size=(6, 3)))
    layer.backward(np.ones((6, 3)))
    before = _state(layer)
    with pytest.raises(error):
        call(layer)
    assert _state(layer) == before


def test_layer_call_in_evaluation_that_raises_changes_nothing(rng):
    layer = BatchNorm(3)
    layer(rng.normal(size=(6, 3)))
    layer.eval()
    layer.running_var = np.array([1.0, -1.0, 1.0])
    before = _state(layer)
    with pytest.raises(ArgumentError, match=r"var must be finite and not negative.*channel 1"):
        layer(np.ones((4, 3)))
    assert _state(layer) == before


def test_layer_refuses_weights_in_evaluation():
    with pytest.raises(ArgumentError, match="weights must be None in evaluation"):
        BatchNorm(3).eval()(np.ones((4, 3)), weights=np.ones(4))


def test_layer_refuses_another_number_of_channels():
    with pytest.raises(ShapeError, match=r"x must have num_features = 3.*got shape \(4, 2\)"):
        BatchNorm(3)(np.ones((4, 2)))


def test_layer_backward_needs_a_forward():
    with pytest.raises(BatchNormError, match="backward needs a forward pass first"):
        BatchNorm(3).backward(np.ones((4, 3)))


# ---- exact statistics ---------------------------------------------------------------------------


def test_layer_set_population_stores_mean_and_unbiased_variance(rng):
    x = rng.normal(3, 2, (50, 3))
    layer = BatchNorm(3)
    layer(x)
    layer.set_population(Moments.merge(Moments.of(part) for part in np.split(x, 5)))
    np.testing.assert_allclose(layer.running_mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, x.var(0, ddof=1), rtol=1e-13)


def test_layer_set_population_starts_the_count_again(rng):
    layer = BatchNorm(3)
    layer(rng.normal(size=(5, 3)))
    layer.set_population(Moments.of(rng.normal(size=(5, 3))))
    assert layer.num_batches_tracked == 0


def test_layer_set_population_leaves_the_moments_alone(rng):
    m = Moments.of(rng.normal(size=(5, 3)))
    kept = m.mean.copy()
    layer = BatchNorm(3)
    layer.set_population(m)
    layer.running_mean += 1
    np.testing.assert_array_equal(m.mean, kept)


@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        (Moments(5, np.zeros(2), np.ones(2)), ShapeError, "num_features = 3 channels, got mean"),
        (Moments(), ShapeError, "num_features = 3"),
        (Moments(1, np.zeros(3), np.zeros(3)), ArgumentError, "more than one value.*got count 1"),
        (Moments([5, 5, 0], np.zeros(3), np.zeros(3)), ArgumentError, "more than one value"),
        (Moments(5, [0, np.nan, 0], np.ones(3)), ArgumentError, r"moments.mean must.*channel 1"),
        (Moments(5, np.zeros(3), [1, 1, np.nan]), ArgumentError, r"moments.var\(\).*channel 2"),
    ],
)
def test_layer_set_population_refuses_what_cannot_be_used(moments, error, message):
    layer = BatchNorm(3)
    before = _state(layer)
    with pytest.raises(error, match=message):
        layer.set_population(moments)
    assert _state(layer) == before


@pytest.mark.parametrize("bad", [None, 3, np.ones((4, 3))])
def test_layer_set_population_refuses_what_is_not_moments(bad):
    with pytest.raises(ArgumentError, match=r"moments must be Moments, got .*Moments\.of\(x"):
        BatchNorm(3).set_population(bad)


def test_layer_set_population_refuses_a_variance_that_evaluation_would_refuse():
    layer = BatchNorm(3, eps=0.0)
    before = _state(layer)
    with pytest.raises(
        ArgumentError, match=r"moments.var\(\) \+ eps must be above zero.*channel 2"
    ):
        layer.set_population(Moments(5, np.zeros(3), [1, 1, 0]))
    assert _state(layer) == before


def test_layer_set_population_refuses_a_layer_without_running_statistics():
    layer = BatchNorm(3, track_running_stats=False)
    with pytest.raises(ArgumentError, match="track_running_stats=True"):
        layer.set_population(Moments(5, np.zeros(3), np.ones(3)))


# ---- state --------------------------------------------------------------------------------------


def _through_file(state):
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    return np.load(file)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_layer_state_survives_a_file(rng, dtype, affine, track):
    options = {"affine": affine, "track_running_stats": track, "dtype": dtype}
    layer, other = BatchNorm(3, **options), BatchNorm(3, **options)
    layer(rng.normal(size=(5, 3)))
    if affine:
        layer.gamma[:] = rng.normal(size=3)
    with _through_file(layer.state_dict()) as loaded:
        other.load_state_dict(loaded)
    assert _state(other)[:2] == _state(layer)[:2]


def test_layer_state_holds_copies(rng):
    layer = BatchNorm(3)
    state = layer.state_dict()
    layer.gamma[:] = 7
    layer(rng.normal(size=(5, 3)))
    np.testing.assert_array_equal(state["gamma"], np.ones(3))
    np.testing.assert_array_equal(state["running_mean"], np.zeros(3))


def test_layer_loads_copies():
    layer, state = BatchNorm(3, dtype=np.float64), BatchNorm(3, dtype=np.float64).state_dict()
    layer.load_state_dict(state)
    state["gamma"][:] = 7
    state["running_var"][:] = 7
    np.testing.assert_array_equal(layer.gamma, np.ones(3))
    np.testing.assert_array_equal(layer.running_var, np.ones(3))


_BAD_STATES = {
    "missing": ({"gamma": None}, ArgumentError, "missing.*gamma"),
    "unknown": ({"weight": np.ones(3)}, ArgumentError, "unknown.*weight"),
    "shape": (
        {"beta": np.ones(2)},
        ShapeError,
        r"beta must have shape \(C,\) = \(3,\), got \(2,\)",
    ),
    "type": ({"beta": np.ones(3, complex)}, DTypeError, "beta must be real numbers, got complex"),
    "negative": ({"running_var": np.array([1, -1, 1.0])}, ArgumentError, "running_var.*channel 1"),
    "mean": ({"running_mean": [0, np.inf, 0]}, ArgumentError, "running_mean must be.*channel 1"),
    "masked": (
        {"running_var": np.ma.MaskedArray(np.ones(3), [0, 1, 0])},
        ArgumentError,
        "running_var must not have masked values",
    ),
    "nan": ({"running_var": np.array([1, 1, np.nan])}, ArgumentError, "running_var.*channel 2"),
    "count": ({"num_batches_tracked": np.array(-1)}, ArgumentError, "num_batches_tracked must"),
    "float count": ({"num_batches_tracked": np.array(1.5)}, ArgumentError, "num_batches_tracked"),
}


@pytest.mark.parametrize("case", _BAD_STATES)
def test_layer_loads_all_or_nothing(rng, case):
    change, error, message = _BAD_STATES[case]
    other = BatchNorm(3)
    other(rng.normal(9, 9, (5, 3)))
    other.gamma[:] = 9
    state = {k: v for k, v in {**other.state_dict(), **change}.items() if v is not None}
    layer = BatchNorm(3)
    before = _state(layer)
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    assert _state(layer) == before


@pytest.mark.parametrize("bad", [None, 3, [("gamma", np.ones(3))]])
def test_layer_load_state_dict_refuses_what_is_no_mapping(bad):
    with pytest.raises(ArgumentError, match="state must be a mapping of names to arrays, got"):
        BatchNorm(3).load_state_dict(bad)


_COPIES = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", _COPIES)
@pytest.mark.parametrize("training", [True, False])
def test_layer_copies_are_without_the_last_batch(rng, how, training):
    layer = BatchNorm(3, momentum=None, eps=1e-3, channel_axis=-1)
    x = rng.normal(size=(50, 3))
    layer(x)
    layer.backward(x)
    layer.train(training)(x)
    other = _COPIES[how](layer)
    assert _state(other)[:3] == _state(layer)[:3]
    assert repr(other) == repr(layer)
    with pytest.raises(BatchNormError, match="backward needs a forward pass first"):
        other.backward(x)
    layer.backward(x)  # the original still has it


def test_layer_pickled_is_as_large_as_its_parameters(rng):
    layer = BatchNorm(3)
    before = len(pickle.dumps(layer))
    layer(rng.normal(size=(10_000, 3)))
    assert len(pickle.dumps(layer)) < before + 100


def test_layer_copies_share_no_memory(rng):
    layer = BatchNorm(3)
    other = copy.deepcopy(layer)
    layer(rng.normal(size=(5, 3)))
    layer.gamma[:] = 7
    np.testing.assert_array_equal(other.gamma, np.ones(3))
    np.testing.assert_array_equal(other.running_mean, np.zeros(3))


def test_layer_in_evaluation_takes_statistics_of_any_alignment_and_byte_order(rng):
    x, g = rng.normal(size=(2, 5, 3))
    layer, other = BatchNorm(3).eval(), BatchNorm(3).eval()
    layer.running_mean, layer.running_var = rng.uniform(1, 2, (2, 3))
    other.running_mean = layer.running_mean.astype(">f8")
    odd = b"\0" + layer.running_var.tobytes()
    other.running_var = np.frombuffer(odd, np.uint8)[1:].view(np.float64)
    np.testing.assert_array_equal(other(x), layer(x))
    np.testing.assert_array_equal(other.backward(g), layer.backward(g))


def test_layer_goes_on_from_a_loaded_state_as_if_nothing_had_happened(rng):
    batches = _batches(rng)
    whole, first, second = (BatchNorm(3, momentum=None) for _ in range(3))
    for x in batches:
        whole(x)
    for x in batches[:2]:
        first(x)
    second.load_state_dict(first.state_dict())
    for x in batches[2:]:
        second(x)
    assert _state(second)[:2] == _state(whole)[:2]
