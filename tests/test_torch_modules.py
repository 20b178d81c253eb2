"""BatchNorm1d, 2d and 3d: what a drop-in for torch's layers keeps, and what they add."""

import copy
import inspect
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import batchnorm.torch  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, NonFiniteError  # noqa: E402
from batchnorm.torch.functional import batch_norm  # noqa: E402

SHAPES = {
    "features": ("BatchNorm1d", (6, 3)),
    "sequences": ("BatchNorm1d", (5, 3, 4)),
    "images": ("BatchNorm2d", (4, 3, 5, 2)),
    "volumes": ("BatchNorm3d", (2, 3, 2, 3, 2)),
}
NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
# Sums of some tens of terms of size below 10 in float64, in two orders.
FLOAT64 = {"rtol": 0, "atol": 1e-12}
# The same in float32, by torch's layer with n·u = 2⁻¹⁸ and ours within 1e-6.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}

kinds = pytest.mark.parametrize("kind", SHAPES)
names = pytest.mark.parametrize("name", NAMES)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture
def randn():
    """randn(*shape, dtype=...): normal values from one seed, rounded from float64."""
    generator = torch.Generator().manual_seed(20150211)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


def _pair(name, *arguments, **keywords):
    """Our layer and torch's, with the same state that is not the initial one."""
    theirs = getattr(nn, name)(*arguments, **keywords)
    with torch.no_grad():
        for k, t in enumerate([*theirs.parameters(), *theirs.buffers()]):
            if t.is_floating_point():
                t.copy_(torch.linspace(0.5, 1.5 + k, t.numel()))
    ours = getattr(batchnorm.torch, name)(*arguments, **keywords)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _assert_same_state(ours, theirs, **bound):
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, **(bound or FLOAT64), msg=key)


def _state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def _assert_state(layer, state):
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key


# ---- constructor and repr -----------------------------------------------------------------------


@names
def test_constructor_takes_torchs_positional_arguments(name):
    def positional(cls):
        parameters = inspect.signature(cls.__init__).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(getattr(batchnorm.torch, name)) == positional(getattr(nn, name))


@names
def test_constructor_takes_torchs_keywords(name):
    parameters = inspect.signature(getattr(nn, name).__init__).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    getattr(batchnorm.torch, name)(3, **keywords)


@names
def test_constructor_gives_arguments_torchs_meaning(name):
    arguments = (3, 1e-3, 0.2, False, False, "cpu", torch.float64)
    ours, theirs = _pair(name, *arguments)
    kept = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    assert [getattr(ours, k) for k in kept] == [getattr(theirs, k) for k in kept]
    assert ours.running_mean is None
    assert ours.weight is None


def test_constructor_puts_parameters_and_statistics_in_the_type_asked_for():
    layer = BatchNorm1d(3, dtype=torch.float64)
    assert [t.dtype for t in layer.state_dict().values()] == [torch.float64] * 4 + [torch.int64]


def test_constructor_makes_no_bias_when_torch_can_leave_it_out(randn):
    if "bias" not in inspect.signature(nn.BatchNorm1d.__init__).parameters:
        pytest.skip("torch's layer has no bias= here")
    ours, theirs = _pair("BatchNorm1d", 3, bias=False)
    assert ours.bias is None
    x = randn(6, 3)
    torch.testing.assert_close(ours(x), theirs(x), **FLOAT32)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("activation", "gelu"),
        ("on_nonfinite", "ignore"),
        ("on_single", "skip"),
        ("group_size", 0),
    ],
)
@names
def test_constructor_refuses_what_it_does_not_know(name, argument, value):
    with pytest.raises(ArgumentError, match=f"{argument} must be .*got {value!r}"):
        getattr(batchnorm.torch, name)(3, **{argument: value})


@names
def test_layer_is_an_instance_of_torchs(name):
    layer = getattr(batchnorm.torch, name)(3)
    assert isinstance(layer, getattr(nn, name))
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"affine": False}, {"momentum": None, "eps": 1e-3}, {"track_running_stats": False}],
    ids=str,
)
@names
def test_repr_is_torchs_when_nothing_is_added(name, keywords):
    layers = (getattr(m, name)(3, **keywords) for m in (batchnorm.torch, nn))
    ours, theirs = map(repr, layers)
    assert ours == theirs


@pytest.mark.parametrize(
    ("keywords", "shown"),
    [
        ({"activation": "relu"}, "activation=relu"),
        (
            {"activation": "leaky_relu", "negative_slope": 0.2},
            "activation=leaky_relu, negative_slope=0.2",
        ),
        ({"on_nonfinite": "raise"}, "on_nonfinite=raise"),
        ({"on_single": "population"}, "on_single=population"),
        ({"group_size": 8}, "group_size=8"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_repr_shows_what_is_added(keywords, shown):
    assert repr(BatchNorm2d(3, **keywords)) == f"{repr(nn.BatchNorm2d(3))[:-1]}, {shown})"


@pytest.mark.parametrize("attribute", ["stats_frozen", "affine_frozen"])
def test_repr_shows_what_is_frozen(attribute):
    layer = BatchNorm1d(3)
    setattr(layer, attribute, True)
    assert f"frozen={attribute.split('_')[0]}" in repr(layer)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.3},
    ],
    ids=str,
)
@kinds
def test_layer_equals_torchs_over_several_steps(randn, kind, keywords):
    name, shape = SHAPES[kind]
    ours, theirs = _pair(name, 3, dtype=torch.float64, **keywords)
    for step in range(6):
        x, g = randn(*shape, dtype=torch.float64), randn(*shape, dtype=torch.float64)
        for layer in (ours, theirs):
            layer.train(step not in (2, 5))
            layer.zero_grad()
        ys = [layer(x) for layer in (ours, theirs)]
        torch.testing.assert_close(*ys, **FLOAT64)
        for y in ys:
            if y.requires_grad:
                y.backward(g)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, **FLOAT64)
        _assert_same_state(ours, theirs)


@modes
def test_layer_equals_torchs_in_a_network(randn, training):
    def run(module):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), module.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
            nn.Linear(27, 4), module.BatchNorm1d(4),
        ).double().train(training)  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in data:
            optimizer.zero_grad()
            model(x).square().sum().sin().backward()
            optimizer.step()
        return model.state_dict()

    data = [randn(6, 2, 5, 5, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(run(batchnorm.torch), run(nn), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "keywords",
    [
        {"activation": "relu"},
        {"activation": "leaky_relu", "negative_slope": 0.3},
        {"group_size": 2},
        {"eps": 0.1},
    ],
    ids=str,
)
@modes
def test_layer_equals_the_function(randn, keywords, training):
    layer, _ = _pair("BatchNorm1d", 3)
    x, residual, mask = randn(5, 3, 4), randn(5, 3, 4), randn(5, 4) > -0.5
    made = BatchNorm1d(3, **keywords).train(training)
    made.load_state_dict(layer.state_dict())
    buffers = [t.clone() for t in (layer.running_mean, layer.running_var)]
    y = made(x, residual, mask)
    expected = batch_norm(
        x, *buffers, layer.weight, layer.bias, training, residual=residual, mask=mask, **keywords
    )
    assert torch.equal(y, expected)
    assert torch.equal(made.running_var, buffers[1])


def test_layer_takes_residual_and_mask_by_name(randn):
    layer = BatchNorm1d(3).eval()
    x, residual, mask = randn(5, 3, 4), randn(5, 3, 4), randn(5, 4) > 0
    assert torch.equal(layer(x, residual=residual, mask=mask), layer(x, residual, mask))


def test_layer_counts_nothing_when_everything_is_masked(randn):
    layer, _ = _pair("BatchNorm1d", 3)
    state = _state(layer)
    assert not layer(randn(5, 3, 4), mask=torch.zeros(5, 4)).any()
    _assert_state(layer, state)


def test_layer_counts_a_batch_of_which_something_is_shown(randn):
    layer = BatchNorm1d(3)
    layer(randn(5, 3, 4), mask=randn(5, 4) > 0)
    assert int(layer.num_batches_tracked) == 1


def test_layer_trains_one_image_of_several_pixels(randn):
    ours, theirs = _pair("BatchNorm2d", 3, dtype=torch.float64)
    x = randn(1, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **FLOAT64)
    _assert_same_state(ours, theirs)


@modes
def test_layer_keeps_channels_last(randn, training):
    x = randn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last)
    layer = BatchNorm2d(3).to(memory_format=torch.channels_last).train(training)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_layer_runs_its_hooks(randn):
    layer, seen = BatchNorm1d(3), []
    layer.register_forward_pre_hook(lambda *a: seen.append("before"))
    layer.register_forward_hook(lambda *a: seen.append("after"))
    layer.register_full_backward_hook(lambda *a: seen.append("backward"))
    layer(randn(6, 3).requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layer_runs_where_only_deterministic_algorithms_are_allowed(randn):
    x = randn(6, 3)
    expected = BatchNorm1d(3)(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(BatchNorm1d(3)(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- what torch's layers refuse -----------------------------------------------------------------

REFUSED = {
    "one axis": ("BatchNorm1d", (3,), {}, True),
    "an image for 1d": ("BatchNorm1d", (2, 3, 4, 4), {}, True),
    "a vector for 2d": ("BatchNorm2d", (2, 3), {}, True),
    "a volume for 2d": ("BatchNorm2d", (2, 3, 2, 2, 2), {}, False),
    "an image for 3d": ("BatchNorm3d", (2, 3, 4, 4), {}, True),
    "one value": ("BatchNorm1d", (1, 3), {}, True),
    "one pixel": ("BatchNorm2d", (1, 3, 1, 1), {}, True),
    "one value, untracked, in evaluation": (
        "BatchNorm1d",
        (1, 3),
        {"track_running_stats": False},
        False,
    ),
    "eps of zero": ("BatchNorm1d", (4, 3), {"eps": 0.0}, True),
    "negative eps in evaluation": ("BatchNorm1d", (4, 3), {"eps": -1.0}, False),
    "other channels": ("BatchNorm1d", (4, 5), {}, True),
    "other channels in evaluation": ("BatchNorm1d", (4, 5), {}, False),
    "other channels without statistics": (
        "BatchNorm1d",
        (4, 5),
        {"track_running_stats": False},
        True,
    ),
}
refused = pytest.mark.parametrize("case", REFUSED)


@refused
def test_layer_raises_what_torchs_raises(case):
    name, shape, keywords, training = REFUSED[case]
    errors = []
    for layer in _pair(name, 3, **keywords):
        with pytest.raises((ValueError, RuntimeError)) as error:
            layer.train(training)(torch.ones(shape))
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]


@refused
def test_layer_changes_nothing_when_it_raises(case):
    # torch's layer counts the batch (seen in 2.13).
    name, shape, keywords, training = REFUSED[case]
    layer, _ = _pair(name, 3, **keywords)
    state = _state(layer)
    with pytest.raises((ValueError, RuntimeError)):
        layer.train(training)(torch.ones(shape))
    _assert_state(layer, state)


def test_eps_is_checked_when_it_is_used():
    layer = BatchNorm1d(3, eps=-1.0)
    layer.eps = 1e-5
    layer(torch.ones(4, 3))


@pytest.mark.parametrize("momentum", [-0.5, 1.5, 100.0])
def test_momentum_is_not_checked(randn, momentum):
    ours, theirs = _pair("BatchNorm1d", 3, momentum=momentum, dtype=torch.float64)
    x = randn(6, 3, dtype=torch.float64)
    ours(x)
    theirs(x)
    # Statistics of size below 10, a hundred times.
    _assert_same_state(ours, theirs, rtol=0, atol=1e-10)


# ---- state dict ---------------------------------------------------------------------------------


@names
def test_state_dict_has_torchs_keys_and_version(name):
    ours, theirs = _pair(name, 3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert ours._version == theirs._version == 2


@pytest.mark.parametrize(
    "keywords", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@names
@pytest.mark.parametrize("towards", ["ours", "theirs"])
def test_state_dict_goes_between_the_libraries(name, keywords, towards):
    ours, theirs = _pair(name, 3, **keywords)
    source, fresh = (theirs, batchnorm.torch) if towards == "ours" else (ours, nn)
    target = getattr(fresh, name)(3, **keywords)
    target.load_state_dict(source.state_dict(), strict=True)
    _assert_state(target, source.state_dict())


@names
@pytest.mark.parametrize("version", [None, 1])
def test_state_dict_without_a_counter_keeps_the_current_one(name, version):
    layer, _ = _pair(name, 3)
    layer.num_batches_tracked.fill_(7)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    state._metadata = {"": {} if version is None else {"version": version}}
    state["running_mean"] = torch.full((3,), 5.0)
    layer.load_state_dict(state, strict=True)
    assert int(layer.num_batches_tracked) == 7
    assert float(layer.running_mean[0]) == 5.0


def test_state_dict_of_version_two_without_a_counter_is_refused():
    layer = BatchNorm1d(3)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key.*num_batches_tracked"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_half_statistics_gives_wide_ones(assign):
    state = {
        k: v.half() if v.is_floating_point() else v
        for k, v in _pair("BatchNorm1d", 3)[1].state_dict().items()
    }
    layer = BatchNorm1d(3)
    layer.load_state_dict(state, assign=assign)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_var, state["running_var"].float())


def test_state_dict_assigned_gives_parameters_its_type():
    state = nn.BatchNorm1d(3).half().state_dict()
    layer = BatchNorm1d(3)
    layer.load_state_dict(state, assign=True)
    assert layer.weight.dtype == torch.float16
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_loads_into_a_layer_without_values(assign):
    layer = BatchNorm1d(3, device="meta")
    state = _pair("BatchNorm1d", 3)[1].state_dict()
    if not assign:
        layer = layer.to_empty(device="cpu")
    layer.load_state_dict(state, assign=assign)
    _assert_state(layer, state)


def test_state_dict_is_as_before_when_extras_are_used():
    layer = BatchNorm1d(3, activation="relu", group_size=4, on_nonfinite="raise")
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())


# ---- running statistics -------------------------------------------------------------------------


def test_momentum_of_none_averages_all_batches_equally(randn):
    layer = BatchNorm1d(3, momentum=None, dtype=torch.float64)
    batches = [randn(n, 3, dtype=torch.float64) for n in (4, 5, 6)]
    for x in batches:
        layer(x)
    mean = torch.stack([x.mean(0) for x in batches]).mean(0)
    var = torch.stack([x.var(0) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean, **FLOAT64)
    torch.testing.assert_close(layer.running_var, var, **FLOAT64)


def test_momentum_of_zero_still_counts(randn):
    layer = BatchNorm1d(3, momentum=0.0)
    layer(randn(6, 3))
    assert int(layer.num_batches_tracked) == 1
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_training_updates_without_gradients_too(randn):
    layer = BatchNorm1d(3)
    with torch.no_grad():
        layer(randn(6, 3))
    assert int(layer.num_batches_tracked) == 1
    assert layer.running_mean.any()


def test_training_updates_in_inference_mode(randn):
    layer, plain = BatchNorm1d(3), BatchNorm1d(3)
    x = randn(6, 3)
    with torch.inference_mode():
        layer(x)
    plain(x)
    _assert_state(layer, plain.state_dict())


def test_training_updates_a_layer_made_in_inference_mode(randn):
    with torch.inference_mode():
        layer = BatchNorm1d(3)
        layer(randn(6, 3))
    assert int(layer.num_batches_tracked) == 1


def test_evaluation_changes_nothing(randn):
    layer, _ = _pair("BatchNorm1d", 3)
    state = _state(layer)
    layer.eval()(randn(6, 3))
    _assert_state(layer, state)


def test_training_keeps_the_identity_of_the_buffers(randn):
    layer = BatchNorm1d(3)
    before = list(layer.buffers())
    layer(randn(6, 3))
    assert all(a is b for a, b in zip(layer.buffers(), before, strict=True))


def test_untracked_layer_uses_the_batch_in_evaluation(randn):
    layer = BatchNorm1d(3, track_running_stats=False)
    x = randn(6, 3)
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_tracking_switched_off_later_leaves_evaluation_to_the_buffers(randn):
    ours, theirs = _pair("BatchNorm1d", 3, dtype=torch.float64)
    x = randn(6, 3, dtype=torch.float64)
    ours.track_running_stats = theirs.track_running_stats = False
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **FLOAT64)


def test_tracking_switched_off_later_leaves_the_buffers_alone_in_training(randn):
    ours, theirs = _pair("BatchNorm1d", 3, dtype=torch.float64)
    state, x = _state(ours), randn(6, 3, dtype=torch.float64)
    ours.track_running_stats = theirs.track_running_stats = False
    torch.testing.assert_close(ours(x), theirs(x), **FLOAT64)
    _assert_state(ours, state)


def test_reset_running_stats_resets(randn):
    layer = BatchNorm1d(3)
    layer(randn(6, 3))
    layer.reset_running_stats()
    _assert_state(layer, BatchNorm1d(3).state_dict())


@names
def test_empty_batch_counts_and_keeps_the_statistics(name):
    layer, theirs = _pair(name, 3)
    shape = (0, *SHAPES[{"1": "features", "2": "images", "3": "volumes"}[name[-2]]][1][1:])
    layer(torch.ones(shape))
    theirs(torch.ones(shape))
    _assert_same_state(layer, theirs)
    assert int(layer.num_batches_tracked) == 1


@modes
def test_empty_batch_gives_parameters_a_gradient_of_zero(training):
    layer = BatchNorm2d(3).train(training)
    layer(torch.ones(0, 3, 4, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))


# ---- parameters ---------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameter_has_no_gradient_while_the_other_has(randn, frozen, training):
    ours, theirs = _pair("BatchNorm1d", 3, dtype=torch.float64)
    x = randn(6, 3, dtype=torch.float64)
    for layer in (ours, theirs):
        getattr(layer, frozen).requires_grad_(False)
        layer.train(training)(x).square().sum().backward()
    assert getattr(ours, frozen).grad is None
    other = {"weight": "bias", "bias": "weight"}[frozen]
    # Six terms of size below a hundred.
    torch.testing.assert_close(
        getattr(ours, other).grad, getattr(theirs, other).grad, rtol=0, atol=1e-11
    )


@modes
def test_stats_frozen_normalizes_by_the_running_statistics(randn, training):
    layer, _ = _pair("BatchNorm1d", 3)
    x, state = randn(6, 3), _state(layer)
    expected = layer.eval()(x)
    layer.stats_frozen = True
    assert torch.equal(layer.train(training)(x), expected)
    _assert_state(layer, state)


def test_stats_frozen_leaves_the_parameters_to_train(randn):
    layer, _ = _pair("BatchNorm1d", 3)
    layer.stats_frozen = True
    layer(randn(6, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


@modes
def test_affine_frozen_gives_the_parameters_no_gradient(randn, training):
    layer, _ = _pair("BatchNorm1d", 3)
    x = randn(6, 3).requires_grad_()
    expected = layer.train(training)(x).detach()
    layer.load_state_dict(_pair("BatchNorm1d", 3)[1].state_dict())
    layer.affine_frozen = True
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y, expected)
    assert layer.weight.grad is layer.bias.grad is None
    assert x.grad is not None


def test_affine_frozen_leaves_the_statistics_to_train(randn):
    layer, plain = BatchNorm1d(3), BatchNorm1d(3)
    layer.affine_frozen = True
    x = randn(6, 3)
    layer(x)
    plain(x)
    _assert_state(layer, plain.state_dict())


@modes
def test_parametrized_weight_is_used_and_trained(randn, training):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, plain = BatchNorm1d(3).train(training), BatchNorm1d(3).train(training)
    nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    nn.init.constant_(plain.weight, 2.0)
    x = randn(6, 3)
    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    # Twice another float32 is exact; the sums are the same.
    assert torch.equal(layer.parametrizations.weight.original.grad, 2 * plain.weight.grad)


# ---- types --------------------------------------------------------------------------------------

HALVING = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to with a device": lambda m: m.to("cpu", torch.float16),
    "inside a model": lambda m: nn.Sequential(m).half()[0],
    "twice": lambda m: m.half().bfloat16(),
}
halving = pytest.mark.parametrize("how", HALVING)


@halving
def test_narrowing_keeps_the_statistics_as_they_are(how):
    layer, _ = _pair("BatchNorm1d", 3)
    layer.running_mean.fill_(1 + 2.0**-20)
    state = _state(layer)
    layer = HALVING[how](layer)
    assert layer.weight.itemsize == 2
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(layer, name), state[name])
        assert getattr(layer, name).dtype == state[name].dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_constructor_of_a_half_layer_makes_wide_statistics(dtype):
    layer = BatchNorm1d(3, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_widening_widens_the_statistics():
    layer = BatchNorm1d(3).double()
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float64
    assert layer.num_batches_tracked.dtype == torch.int64


def test_narrowing_a_wide_layer_leaves_at_least_float32():
    layer = BatchNorm1d(3).double().half()
    assert layer.running_mean.itemsize >= 4
    assert layer.weight.dtype == torch.float16


def test_narrowing_and_widening_again_gives_float32():
    layer = BatchNorm1d(3).half().float()
    assert {t.dtype for t in layer.state_dict().values()} == {torch.float32, torch.int64}


@halving
@modes
def test_narrowed_layer_runs(randn, how, training):
    layer = HALVING[how](BatchNorm1d(3)).train(training)
    x = randn(6, 3, dtype=layer.weight.dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == layer.weight.dtype


@modes
def test_autocast_gives_bfloat16_for_bfloat16_and_wide_statistics(randn, training):
    layer = BatchNorm2d(3).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(randn(4, 3, 5, 2, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_torchs_types_in_a_network(randn, dtype, training):
    def types(module):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), module.BatchNorm2d(3)).train(training)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            y = model(x)
        y.float().square().sum().backward()
        return [y.dtype, *(p.grad.dtype for p in model.parameters())]

    x = randn(4, 2, 5, 5)
    assert types(batchnorm.torch) == types(nn)


# ---- copies and files ---------------------------------------------------------------------------


def _used(randn):
    """A layer with every extra, and something in its state."""
    layer = BatchNorm1d(
        3, activation="leaky_relu", negative_slope=0.2, on_nonfinite="skip",
        on_single="population", group_size=4,
    )  # fmt: skip
    layer(randn(8, 3))
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(torch.full((8, 3), float("nan")))
    layer.affine_frozen = True
    return layer


def _through_torch_save(layer):
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _through_torch_save,
}
copies = pytest.mark.parametrize("how", COPIES)


@copies
def test_copy_is_the_same_layer(randn, how):
    layer = _used(randn)
    other = COPIES[how](layer)
    assert repr(other) == repr(layer)
    assert other.nonfinite_batches == 1
    _assert_state(other, layer.state_dict())
    x = randn(8, 3)
    assert torch.equal(other.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("how", [k for k in COPIES if k != "copy"])
def test_copy_has_a_state_of_its_own(randn, how):
    layer = _used(randn)
    state = _state(layer)
    other = COPIES[how](layer)
    other(randn(8, 3))
    other(torch.full((8, 3), float("nan")))
    _assert_state(layer, state)
    assert (layer.nonfinite_batches, other.nonfinite_batches) == (1, 2)


def test_saved_state_dict_loads_with_weights_only(randn):
    layer = _used(randn)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = BatchNorm1d(3)
    other.load_state_dict(torch.load(stream, weights_only=True))
    _assert_state(other, layer.state_dict())


def test_layer_shares_its_memory(randn):
    layer = BatchNorm1d(3).share_memory()
    before = layer.running_mean.data_ptr()
    layer(randn(6, 3))
    assert layer.running_mean.is_shared()
    assert layer.running_mean.data_ptr() == before


# ---- batches that are not finite ----------------------------------------------------------------


def _bad(randn, value=float("nan")):
    x = randn(6, 3)
    x[2, 1] = value
    return x


def _skipping(randn, **keywords):
    """A layer that has skipped, and warned of, one batch."""
    layer = BatchNorm1d(3, **keywords)
    with pytest.warns(RuntimeWarning, match="statistics are not finite"):
        layer(_bad(randn))
    return layer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_skip_leaves_such_a_batch_out(randn, value, momentum):
    layer, plain = BatchNorm1d(3, momentum=momentum), BatchNorm1d(3, momentum=momentum)
    first, last = randn(6, 3), randn(6, 3)
    layer(first)
    with pytest.warns(RuntimeWarning, match="statistics are not finite"):
        layer(_bad(randn, value))
    layer(last)
    plain(first)
    plain(last)
    _assert_state(layer, plain.state_dict())


def test_skip_counts_such_batches(randn):
    layer = _skipping(randn)
    layer(_bad(randn))
    layer(randn(6, 3))
    assert layer.nonfinite_batches == 2


def test_skip_names_layer_and_channel_in_its_warning(randn):
    with pytest.warns(RuntimeWarning, match=r"BatchNorm1d\(3\).*channel 1"):
        BatchNorm1d(3)(_bad(randn))


def test_skip_warns_once(randn):
    layer = _skipping(randn)
    layer(_bad(randn))  # a warning would be an error


def test_skip_normalizes_the_channels_that_are_finite(randn):
    layer = BatchNorm1d(3)
    x = _bad(randn)
    with pytest.warns(RuntimeWarning, match="not finite"):
        y = layer(x)
    expected = nn.BatchNorm1d(3)(x)
    torch.testing.assert_close(y[:, ::2], expected[:, ::2], **FLOAT32)
    assert bool(y[:, 1].isnan().all())


def test_skip_leaves_a_batch_out_when_one_group_is_not_finite(randn):
    layer = BatchNorm1d(3, group_size=2)
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(_bad(randn))
    _assert_state(layer, BatchNorm1d(3).state_dict())


def test_skip_takes_a_batch_in_which_the_mask_hides_what_is_not_finite(randn):
    layer = BatchNorm1d(3)
    x, mask = _bad(randn), torch.ones(6)
    mask[2] = 0
    layer(x, mask=mask)
    assert layer.nonfinite_batches == 0
    assert int(layer.num_batches_tracked) == 1


def test_raise_names_layer_and_channel(randn):
    with pytest.raises(NonFiniteError, match=r"BatchNorm1d\(3\).*channel 1: mean nan"):
        BatchNorm1d(3, on_nonfinite="raise")(_bad(randn))


def test_raise_leaves_the_layer_as_it_was(randn):
    layer = BatchNorm1d(3, on_nonfinite="raise")
    layer(randn(6, 3))
    state = _state(layer)
    with pytest.raises(NonFiniteError):
        layer(_bad(randn))
    _assert_state(layer, state)
    assert layer.nonfinite_batches == 0


def test_propagate_does_what_torchs_layer_does(randn):
    ours, theirs = BatchNorm1d(3, on_nonfinite="propagate"), nn.BatchNorm1d(3)
    x = _bad(randn)
    ours(x)
    theirs(x)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, equal_nan=True)
    assert ours.nonfinite_batches == 0


@pytest.mark.parametrize("mode", ["skip", "raise", "propagate"])
def test_evaluation_takes_what_is_not_finite(randn, mode):
    layer = BatchNorm1d(3, on_nonfinite=mode).eval()
    assert bool(layer(_bad(randn))[2, 1].isnan())
    assert layer.nonfinite_batches == 0


# ---- one value per channel ----------------------------------------------------------------------


def test_single_value_is_refused_by_default(randn):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BatchNorm1d(3)(randn(1, 3))


@pytest.mark.parametrize("kind", ["features", "images"])
def test_single_value_is_normalized_by_the_population_when_asked(randn, kind):
    name = SHAPES[kind][0]
    shape = (1, 3) if kind == "features" else (1, 3, 1, 1)
    layer = getattr(batchnorm.torch, name)(3, on_single="population")
    layer.load_state_dict(_pair(name, 3)[1].state_dict())
    x, state = randn(*shape), _state(layer)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    _assert_state(layer, state)


def test_single_value_under_a_mask_is_normalized_by_the_population_when_asked(randn):
    layer = BatchNorm1d(3, on_single="population")
    x, state, mask = randn(6, 3), _state(layer), torch.zeros(6)
    mask[4] = 1.0
    assert torch.equal(layer.train()(x, mask=mask), layer.eval()(x, mask=mask))
    _assert_state(layer, state)


def test_single_value_gives_the_gradients_of_evaluation_when_asked(randn):
    x = randn(1, 3)
    grads = []
    for training in (True, False):
        layer = BatchNorm1d(3, on_single="population").train(training)
        layer(x).square().sum().backward()
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


def test_several_values_are_normalized_by_the_batch_when_single_ones_are_not(randn):
    layer, plain = BatchNorm1d(3, on_single="population"), BatchNorm1d(3)
    x = randn(2, 3)
    assert torch.equal(layer(x), plain(x))
    _assert_state(layer, plain.state_dict())


def test_single_value_is_refused_when_there_is_no_population(randn):
    layer = BatchNorm1d(3, on_single="population", track_running_stats=False)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(randn(1, 3))


# ---- torch's own tools --------------------------------------------------------------------------


def _model(module):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), module.BatchNorm1d(3), nn.Linear(3, 2)).double()


@pytest.fixture
def gloo(tmp_path):
    """A process group of one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("forwards", [1, 2])
def test_distributed_data_parallel_equals_the_model_alone(randn, gloo, forwards):
    data = [randn(6, 4, dtype=torch.float64) for _ in range(forwards)]

    def run(model):
        sum(model(x).square().sum() for x in data).backward()
        return [p.grad for p in model.parameters()]

    alone, inner = _model(batchnorm.torch), _model(batchnorm.torch)
    parallel = nn.parallel.DistributedDataParallel(inner)
    for a, b in zip(run(parallel), run(alone), strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
    _assert_same_state(inner, alone)


@pytest.mark.parametrize("buffers", [False, True])
def test_averaged_model_equals_that_of_torchs_layers(randn, buffers):
    def run(module):
        model = _model(module)
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=buffers)
        for x in data:
            model(x)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1)
            averaged.update_parameters(model)
        return averaged.state_dict()

    data = [randn(6, 4, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(run(batchnorm.torch), run(nn), **FLOAT64)


def test_update_bn_gives_the_statistics_of_torchs_layers(randn):
    def run(module):
        model = _model(module)
        torch.optim.swa_utils.update_bn(data, model)
        return model.state_dict()

    data = [randn(6, 4, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(run(batchnorm.torch), run(nn), **FLOAT64)


def test_fuse_conv_bn_eval_folds_the_layer(randn):
    conv = nn.Conv2d(2, 3, 3).eval()
    layer, _ = _pair("BatchNorm2d", 3)
    layer.eval()
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv, layer)
    x = randn(2, 2, 5, 5)
    # 18 products of size below ten in float32.
    torch.testing.assert_close(fused(x), layer(conv(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("foreach", [False, True])
def test_parameters_to_vector_and_clipping_see_the_parameters(randn, foreach):
    model = _model(batchnorm.torch)
    model(randn(6, 4, dtype=torch.float64)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=foreach)
    clipped = nn.utils.parameters_to_vector(p.grad for p in model.parameters()).norm()
    assert float(clipped) <= 1e-3 < float(norm)


def test_multiprocessing_reduction_sends_a_layer(randn):
    from torch.multiprocessing.reductions import init_reductions

    init_reductions()
    layer = _used(randn)
    assert repr(pickle.loads(pickle.dumps(layer))) == repr(layer)


def test_layers_are_those_that_the_module_exports():
    exported = {BatchNorm1d, BatchNorm2d, BatchNorm3d, NonFiniteError}
    assert exported <= {getattr(batchnorm.torch, name) for name in batchnorm.torch.__all__}


# ---- batches that the running statistics cannot take up -----------------------------------------


def test_variance_that_the_buffer_cannot_hold_is_left_out():
    layer = BatchNorm1d(1)
    with pytest.warns(RuntimeWarning, match="too large for the running statistics .channel 0"):
        layer(torch.tensor([[-1e20], [1e20]]))
    assert (float(layer.running_mean), float(layer.running_var)) == (0, 1)
    assert (int(layer.num_batches_tracked), layer.nonfinite_batches) == (0, 1)


def test_variance_that_the_buffer_cannot_hold_raises_when_asked():
    layer = BatchNorm1d(1, on_nonfinite="raise")
    with pytest.raises(NonFiniteError, match="too large for the running statistics"):
        layer(torch.tensor([[-1e20], [1e20]]))
    assert (float(layer.running_var), int(layer.num_batches_tracked)) == (1, 0)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_running_variance_of_softmax_weights_is_that_of_pairs(randn, scale):
    x, mask = randn(64, 3), scale * torch.softmax(randn(64), 0)
    layer = BatchNorm1d(3, momentum=1.0)
    layer(x, mask=mask)
    w, v = mask.double(), x.double()
    pairs = w[:, None] * w * (1 - torch.eye(64))
    exact = (pairs[..., None] * (v[:, None] - v) ** 2 / 2).sum((0, 1)) / pairs.sum()
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-6, atol=0)


def test_all_masked_batch_changes_nothing_in_either_face(randn):
    layer, numpys = BatchNorm1d(3), batchnorm.BatchNorm(3)
    x, mask = randn(4, 3), torch.zeros(4)
    layer(x, mask=mask)
    numpys(x.numpy(), weights=mask.numpy())
    for mean, var, tracked in (
        (layer.running_mean, layer.running_var, layer.num_batches_tracked),
        (numpys.running_mean, numpys.running_var, numpys.num_batches_tracked),
    ):
        assert (mean.tolist(), var.tolist(), int(tracked)) == ([0, 0, 0], [1, 1, 1], 0)


@pytest.mark.parametrize("weights", ["ones", "mask", "real", "small"])
def test_both_faces_update_by_one_rule(randn, weights):
    x, w = randn(20, 3), randn(20).abs()
    mask = {"ones": torch.ones(20), "mask": (w > 0.5).float(), "real": w, "small": w / 100}[weights]
    layer, numpys = BatchNorm1d(3, dtype=torch.float64), batchnorm.BatchNorm(3)
    for _ in range(3):
        layer(x, mask=mask)
        numpys(x.numpy(), weights=mask.numpy())
    assert layer.running_mean.tolist() == numpys.running_mean.tolist()
    assert layer.running_var.tolist() == numpys.running_var.tolist()


def test_batches_are_counted_without_running_statistics_as_in_torch(randn):
    counts = []
    for kind in (BatchNorm1d, nn.BatchNorm1d):
        layer = kind(3)
        layer.running_mean = layer.running_var = None
        layer(randn(4, 3))
        layer.eval()(randn(4, 3))
        counts.append(int(layer.num_batches_tracked))
    assert counts == [1, 1]


def test_reset_forgets_the_batches_that_were_left_out(randn):
    layer = BatchNorm1d(3)
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer(torch.full((4, 3), float("nan")))
    layer.reset_running_stats()
    assert layer.nonfinite_batches == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_layer_made_on_meta_trains_with_the_tensors_it_is_given(randn, compiled):
    torch._dynamo.reset()
    with torch.device("meta"):
        layer = BatchNorm1d(3)
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict(), assign=True)
    step = torch.compile(layer, backend="eager") if compiled else layer
    step(randn(4, 3) + 5)
    assert int(layer.num_batches_tracked) == 1
    assert (layer.running_mean > 0.1).all()
    with pytest.warns(RuntimeWarning, match="not finite"):
        step(torch.full((4, 3), float("nan")))
    assert layer.to("cpu").nonfinite_batches == 1


def test_forward_mode_of_another_thread_changes_no_bit(randn):
    import threading

    from torch.autograd import forward_ad

    layer, x = BatchNorm1d(3), randn(40, 3) + 100
    found = []
    with forward_ad.dual_level():
        thread = threading.Thread(target=lambda: found.append(layer(x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], layer(x))
    assert found[0].grad_fn.name() == "BatchNormFunctionBackward"  # no operations of torch's
