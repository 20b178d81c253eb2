"""What goes wrong with batch normalization elsewhere: shown on torch's layers, and right on ours.

A test that is given `library` runs on both. Where torch's layer has the fault, the test is expected
to fail on it, for the reason named; a torch that no longer has it makes the test fail, and then its
mark can go.
"""

import io

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # noqa: E402

import batchnorm.torch  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402

# float32's rounding, a few times over.
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}
OUTPUT = {"rtol": 1e-6, "atol": 1e-6}  # docs on numerics, promise 2

OURS, TORCHS = pytest.param(batchnorm.torch, id="ours"), pytest.param(nn, id="torch")
both = pytest.mark.parametrize("library", [OURS, TORCHS])


def torch_fails(reason, raises=AssertionError):
    """Run on both libraries; torch's layer has this fault."""
    mark = pytest.mark.xfail(reason=f"torch's layer: {reason}", raises=raises)
    return pytest.mark.parametrize("library", [OURS, pytest.param(nn, marks=mark, id="torch")])


@pytest.fixture
def randn():
    """randn(*shape): float32 from one seed."""
    generator = torch.Generator().manual_seed(20150211)
    return lambda *shape: torch.randn(shape, generator=generator)


def _state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def _assert_state(layer, state):
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key


def _ours_only(library, **keywords):
    """Keywords that torch's layer does not have."""
    return keywords if library is batchnorm.torch else {}


# ---- statistics and state -----------------------------------------------------------------------


# https://github.com/pytorch/pytorch/issues/4534
# https://github.com/pytorch/pytorch/issues/7716
@torch_fails("refuses the last batch, of one", ValueError)
def test_last_batch_of_one_is_taken_when_asked(library, randn):
    layer = library.BatchNorm1d(3, **_ours_only(library, on_single="population"))
    for batch in randn(5, 3).split(2):
        layer(batch)
    assert int(layer.num_batches_tracked) == 2


# https://github.com/pytorch/pytorch/issues/96136
# https://github.com/pytorch/pytorch/issues/62471
@torch_fails("updates twice")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_updates_once(library, randn, reentrant):
    layer, plain = library.BatchNorm1d(3), library.BatchNorm1d(3)
    x = randn(6, 3).requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    plain(x.detach())
    _assert_state(layer, plain.state_dict())


@both
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_gives_the_same_gradients(library, randn, reentrant):
    x = randn(6, 3)
    grads = []
    for run in (lambda m, x: checkpoint(m, x, use_reentrant=reentrant), lambda m, x: m(x)):
        layer, t = library.BatchNorm1d(3), x.clone().requires_grad_()
        run(layer, t).exp().sum().backward()
        grads.append((t.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


# https://github.com/pytorch/pytorch/issues/62471
@torch_fails("updates twice")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_updates_once_inside_a_network(library, randn, reentrant):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 4), library.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4),
            library.BatchNorm1d(4), nn.Linear(4, 2),
        )  # fmt: skip

    model, plain = network(), network()
    x = randn(6, 3).requires_grad_()
    checkpoint_sequential(model, 2, x, use_reentrant=reentrant).sum().backward()
    plain(x.detach())
    _assert_state(model, plain.state_dict())


@both
def test_checkpointing_leaves_later_steps_to_update(library, randn):
    layer = library.BatchNorm1d(3)
    checkpoint(layer, randn(6, 3).requires_grad_(), use_reentrant=False).sum().backward()
    before = int(layer.num_batches_tracked)
    layer(randn(6, 3))
    assert int(layer.num_batches_tracked) == before + 1


# https://github.com/pytorch/pytorch/issues/1206
# https://github.com/pytorch/pytorch/issues/10008
# https://github.com/pytorch/pytorch/issues/115500
@torch_fails("is NaN for ever")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:BatchNorm1d:RuntimeWarning")
def test_one_bad_value_does_not_stay(library, randn, bad):
    layer = library.BatchNorm1d(3)
    x = randn(6, 3)
    x[2, 1] = bad
    layer(x)
    for _ in range(3):
        layer(randn(6, 3))
    assert bool(layer.eval()(randn(6, 3)).isfinite().all())


@torch_fails("counts it")
@pytest.mark.parametrize("shape", [(1, 3), (6, 5)], ids=["one value", "wrong channels"])
def test_failed_forward_is_not_counted(library, shape):
    layer = library.BatchNorm1d(3)
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.ones(shape))
    assert int(layer.num_batches_tracked) == 0


@torch_fails("running_var is inf")
def test_half_layer_keeps_a_variance_above_65504(library, randn):
    layer = library.BatchNorm1d(3, momentum=1.0).half()
    x = (randn(64, 3) * 300).half()
    layer(x)
    torch.testing.assert_close(layer.running_var.double(), x.double().var(0), rtol=1e-6, atol=0)


@torch_fails("the statistics stand still")
def test_bfloat16_layer_keeps_moving_when_the_momentum_is_small(library, randn):
    layer = library.BatchNorm1d(3, momentum=1e-3).bfloat16()
    x = (randn(64, 3) * 1.3).bfloat16()
    for _ in range(50):
        layer(x)
    var = 1 + (x.double().var(0) - 1) * (1 - 0.999**50)
    # Fifty roundings to float32.
    torch.testing.assert_close(layer.running_var.double(), var, rtol=50 * 2.0**-24, atol=0)


# https://github.com/pytorch/pytorch/issues/65907
# https://github.com/pytorch/pytorch/issues/73332
# https://github.com/pytorch/pytorch/issues/110363
# https://github.com/pytorch/pytorch/issues/175024
@torch_fails("modified by an inplace operation", RuntimeError)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_buffers_may_be_broadcast_before_backward(library, randn, training):
    # What DistributedDataParallel does to them before every forward.
    layer = library.BatchNorm1d(3).train(training)
    x = randn(6, 3).requires_grad_()
    y = layer(x)
    for buffer in (layer.running_mean, layer.running_var):
        buffer.copy_(buffer.clone())
    y.square().sum().backward()


def _two_forwards(library, values, first, second, together):
    """Gradients of two forwards, both before the backward or each followed by its own."""
    layer = library.BatchNorm1d(3, momentum=0.9)
    inputs = [v.clone().requires_grad_() for v in values]
    losses = []
    for x, training in zip(inputs, (first, second), strict=True):
        losses.append(layer.train(training)(x).exp().sum())
        if not together:
            losses.pop().backward()
    if together:
        sum(losses).backward()
    return [t.grad for t in (*inputs, layer.weight, layer.bias)]


def _assert_two_forwards(library, randn, first, second):
    values = randn(6, 3), randn(6, 3) * 3
    expected = _two_forwards(library, values, first, second, False)
    for a, b in zip(_two_forwards(library, values, first, second, True), expected, strict=True):
        # Two gradients of the parameters, added in either order: one rounding of about 50.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


# https://github.com/pytorch/pytorch/issues/13402
@torch_fails("the backward of evaluation uses what training changed")
def test_two_forwards_before_a_backward_when_training_follows_evaluation(library, randn):
    _assert_two_forwards(library, randn, False, True)


@both
@pytest.mark.parametrize("second", [True, False], ids=["training", "evaluation"])
def test_two_forwards_before_a_backward_when_training_comes_first(library, randn, second):
    _assert_two_forwards(library, randn, True, second)


@both
def test_two_forwards_before_a_backward_in_evaluation(library, randn):
    _assert_two_forwards(library, randn, False, False)


# https://github.com/pytorch/pytorch/issues/70529
# https://github.com/pytorch/pytorch/issues/30414
@torch_fails("has no mask")
def test_padding_stays_out_of_the_statistics(library, randn):
    x, mask = randn(4, 3, 5) + 2, torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    layer = library.BatchNorm1d(3, momentum=1.0)
    layer(x * mask[:, None], **_ours_only(library, mask=mask))
    shown = x.movedim(1, -1)[mask].double()
    torch.testing.assert_close(layer.running_mean.double(), shown.mean(0), **FLOAT32)
    torch.testing.assert_close(layer.running_var.double(), shown.var(0), **FLOAT32)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nan_under_the_mask_does_not_poison_gradients(randn, training):
    layer = batchnorm.torch.BatchNorm1d(3, activation="relu").train(training)
    x, mask = randn(4, 3, 5), torch.ones(4, 5)
    x[1, :, 2], mask[1, 2] = float("nan"), 0
    x.requires_grad_()
    layer(x, mask=mask).square().sum().backward()
    for grad in (x.grad, layer.weight.grad, layer.bias.grad):
        assert bool(grad.isfinite().all())


def test_batch_that_is_all_masked_leaves_the_layer_as_it_was(randn):
    layer = batchnorm.torch.BatchNorm1d(3)
    layer(randn(4, 3, 5))
    state = _state(layer)
    layer(randn(4, 3, 5), mask=torch.zeros(4, 5))
    _assert_state(layer, state)


def test_mask_is_taken_when_there_is_one_channel(randn):
    layer, mask = batchnorm.torch.BatchNorm1d(1), torch.arange(20).view(4, 5) % 2
    assert torch.equal(layer(randn(4, 1, 5), mask=mask) != 0, mask[:, None] > 0)


# https://github.com/keras-team/keras/issues/15790
# https://github.com/dreamquark-ai/tabnet/issues/384
@pytest.mark.parametrize(
    ("n", "last"), [(7, 4), (8, 2), (9, 3), (10, 4)], ids=["7=3+4", "8=3+3+2", "9", "10=3+3+4"]
)
def test_ghost_batches_take_any_number_of_examples(randn, n, last):
    x = randn(n, 3)
    y = batchnorm.torch.BatchNorm1d(3, group_size=3)(x)
    exact = nn.BatchNorm1d(3, dtype=torch.float64)
    torch.testing.assert_close(y[:3].double(), exact(x[:3].double()), **OUTPUT)
    torch.testing.assert_close(y[-last:].double(), exact(x[-last:].double()), **OUTPUT)


# ---- numbers ------------------------------------------------------------------------------------


@torch_fails("wrong in the fifth digit here, by a factor of 56 on larger batches")
def test_channels_last_statistics_are_right_when_the_mean_is_large(library, randn):
    x = (randn(16, 16, 28, 28) + 1e4).contiguous(memory_format=torch.channels_last)
    layer = library.BatchNorm2d(16, momentum=1.0)
    layer(x)
    var = x.double().movedim(1, -1).reshape(-1, 16).var(0)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=0)


@torch_fails("off by 6e-4, and by 1.8e-2 in channels_last")
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_training_is_right_when_the_mean_is_large(library, randn, memory_format):
    x = (randn(16, 8, 14, 14) + 1e4).contiguous(memory_format=memory_format)
    exact = nn.BatchNorm2d(8, dtype=torch.float64)(x.double())
    torch.testing.assert_close(library.BatchNorm2d(8)(x).double(), exact, **OUTPUT)


@torch_fails("off by 2.1e-3")
def test_evaluation_is_right_when_the_mean_is_large(library, randn):
    layer = library.BatchNorm1d(3).eval()
    layer.running_mean.fill_(1e4)
    layer.running_var.fill_(1e-2)
    x = randn(64, 3) * 0.1 + 1e4
    mean, var = layer.running_mean.double(), layer.running_var.double()
    torch.testing.assert_close(layer(x).double(), (x - mean) / (var + 1e-5).sqrt(), **OUTPUT)


@torch_fails("gives 56 at 1e7, and 105,121 at 1e10")
@pytest.mark.parametrize("constant", [1e7, 1e10])
def test_constant_channel_is_its_bias_in_evaluation(library, constant):
    layer = library.BatchNorm1d(3, momentum=1.0)
    x = torch.full((6, 3), constant)
    layer(x)
    assert not layer.eval()(x).any()


@torch_fails("gives zeros")
def test_huge_values_are_normalized(library, randn):
    x = randn(64, 3)
    exact = nn.BatchNorm1d(3, dtype=torch.float64)(x.double() * 1e30)
    layer = library.BatchNorm1d(3, momentum=0.0)
    if library is batchnorm.torch:  # their variance is not one that float32 can hold
        layer.on_nonfinite = "propagate"
    # 1e30 scales x with one rounding more.
    torch.testing.assert_close(layer(x * 1e30).double(), exact, **OUTPUT)


@torch_fails("gives NaN and says nothing", pytest.fail.Exception)
def test_negative_running_variance_is_named(library, randn):
    layer = library.BatchNorm1d(3).eval()
    layer.running_var[2] = -0.25
    with pytest.raises(ArgumentError, match=r"running_var must not be negative, got -0.25.* 2"):
        layer(randn(6, 3))


@torch_fails("differs between 1 and 2 threads")
def test_channels_last_is_bitwise_the_same_on_any_number_of_threads(library, randn):
    x = (randn(16, 16, 28, 28) + 1e4).contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            layer = library.BatchNorm2d(16)
            results.append([layer(x).detach(), layer.running_mean, layer.running_var])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@both
@pytest.mark.parametrize("steps", [1, 100])
def test_exponential_average_is_not_debiased(library, steps):
    layer = library.BatchNorm1d(1, dtype=torch.float64)
    for _ in range(steps):
        layer(torch.tensor([[3.0], [7.0]], dtype=torch.float64))
    left = 0.9**steps
    # A hundred roundings of values of size ten.
    assert float(layer.running_mean) == pytest.approx(5 * (1 - left), abs=1e-12)
    assert float(layer.running_var) == pytest.approx(left + 8 * (1 - left), abs=1e-12)


@both
@pytest.mark.parametrize("steps", [1, 100])
def test_cumulative_average_is_that_of_all_batches(library, steps):
    layer = library.BatchNorm1d(1, momentum=None, dtype=torch.float64)
    for k in range(steps):
        layer(torch.tensor([[3.0 + k], [7.0 + k]], dtype=torch.float64))
    assert float(layer.running_mean) == pytest.approx(5 + (steps - 1) / 2, abs=1e-11)
    assert float(layer.running_var) == pytest.approx(8, abs=1e-11)


# https://github.com/scikit-learn/scikit-learn/issues/5602
@both
@pytest.mark.parametrize("momentum", [0.1, None])
def test_huge_constant_does_not_overflow_the_statistics(library, momentum):
    layer = library.BatchNorm1d(1, momentum=momentum, dtype=torch.float64)
    layer.running_mean.fill_(1.8e301)
    for _ in range(3):
        layer(torch.full((4, 1), 1.8e301, dtype=torch.float64))
    assert float(layer.running_mean) == pytest.approx(1.8e301, rel=1e-15)
    assert bool(layer.running_var.isfinite().all())


# ---- what a drop-in must keep -------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("name", "shape", "keywords", "message"),
    [
        ("BatchNorm1d", (2, 3, 4, 4), {}, "expected 2D or 3D input (got 4D input)"),
        ("BatchNorm2d", (2, 3), {}, "expected 4D input (got 2D input)"),
        ("BatchNorm3d", (2, 3, 4, 4), {}, "expected 5D input (got 4D input)"),
        (
            "BatchNorm1d",
            (1, 3),
            {},
            "Expected more than 1 value per channel when training, got input size "
            "torch.Size([1, 3])",
        ),
        (
            "BatchNorm1d",
            (4, 3),
            {"eps": 0.0},
            "batch_norm eps must be positive during training, but got 0.0",
        ),
    ],
)
def test_value_errors_read_as_always(library, name, shape, keywords, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        getattr(library, name)(3, **keywords)(torch.ones(shape))
    assert str(error.value) == message


@both
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_wrong_channels_read_as_always(library, training):
    with pytest.raises(RuntimeError) as error:
        library.BatchNorm1d(3).train(training)(torch.ones(4, 5))
    assert str(error.value) == "running_mean should contain 5 elements not 3"


@both
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_missing_statistics_read_as_always_in_evaluation(library, name):
    layer = library.BatchNorm1d(3).eval()
    setattr(layer, name, None)
    with pytest.raises(RuntimeError) as error:
        layer(torch.ones(4, 3))
    assert str(error.value) == f"{name} must be defined in evaluation mode"


@both
def test_eps_is_not_checked_before_forward(library):
    library.BatchNorm1d(3, eps=-1.0)


@both
def test_counter_stays_an_integer_in_a_half_layer(library):
    layer = library.BatchNorm1d(3).half()
    assert layer.num_batches_tracked.dtype == torch.int64
    assert layer.num_batches_tracked.shape == ()


# A layer turned by .type(), or given a state dict of other types, has a counter of another type.
@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.float64], ids=str)
def test_counter_of_another_type_counts(library, randn, dtype):
    layer = library.BatchNorm1d(3)
    state = {**layer.state_dict(), "num_batches_tracked": torch.tensor(2, dtype=dtype)}
    layer.load_state_dict(state, assign=True)
    for _ in range(3):
        layer(randn(6, 3))
    assert int(layer.num_batches_tracked) == 5


@both
def test_empty_batch_counts_and_gives_gradients_of_zero(library):
    layer = library.BatchNorm2d(3)
    layer(torch.ones(0, 3, 4, 4)).sum().backward()
    assert int(layer.num_batches_tracked) == 1
    assert torch.equal(layer.running_var, torch.ones(3))
    assert torch.equal(layer.weight.grad, torch.zeros(3))


@both
def test_one_image_trains_when_it_has_several_pixels(library, randn):
    layer = library.BatchNorm2d(3)
    layer(randn(1, 3, 2, 2))
    assert int(layer.num_batches_tracked) == 1


@both
def test_channels_last_stays(library, randn):
    x = randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert library.BatchNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)


@both
def test_old_state_dict_without_a_counter_loads(library):
    layer = library.BatchNorm1d(3)
    layer.num_batches_tracked.fill_(4)
    state = {k: v for k, v in layer.state_dict().items() if k != "num_batches_tracked"}
    layer.load_state_dict(state)  # a plain dict has no version
    assert int(layer.num_batches_tracked) == 4


@both
def test_whole_layer_goes_through_a_file(library, randn):
    layer, stream = library.BatchNorm1d(3), io.BytesIO()
    layer(randn(6, 3))
    torch.save(layer, stream)
    stream.seek(0)
    _assert_state(torch.load(stream, weights_only=False), layer.state_dict())


@both
def test_autocast_gives_bfloat16_with_float32_statistics(library, randn):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), library.BatchNorm2d(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(randn(4, 2, 5, 5))
    assert y.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32


@both
def test_frozen_weight_has_no_gradient_while_the_bias_has(library, randn):
    layer = library.BatchNorm1d(3)
    layer.weight.requires_grad_(False)
    layer(randn(6, 3)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((3,), 6.0))


# https://github.com/pytorch/pytorch/issues/186256
@torch_fails("takes the batch's statistics for constants from the third derivative on")
def test_third_derivative_is_right(library, randn):
    def directional(f):
        """Three times the derivative along v."""
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = (f(x + t * v) * g).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return value

    def definition(x):
        d = x - x.mean(0)
        return d / ((d * d).mean(0) + 1e-5).sqrt()

    x, v, g = (randn(6, 2).double() for _ in range(3))
    layer = library.BatchNorm1d(2, dtype=torch.float64)
    torch.testing.assert_close(directional(layer), directional(definition), rtol=1e-9, atol=1e-9)
