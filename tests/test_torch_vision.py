"""Adapters for the layers of timm and torchvision: what they compute, keep and let others do."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import vision  # noqa: E402  before torchvision and timm
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm2d,
    NonFiniteError,
    SyncBatchNorm,
    accumulate,
    adapters,
    convert,
    explain,
    freeze,
    parameter_groups,
    recalibrate,
    revert,
    unfreeze,
)
from batchnorm.torch.adapters.layers import ACTIVATIONS  # noqa: E402

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from timm.layers import norm_act  # noqa: E402
from torchvision.ops import misc  # noqa: E402

C = 4
U = 2.0**-24  # half a unit in the last place of float32
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

pytestmark = pytest.mark.usefixtures("one_thread")


def _x(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(20150211)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _step(net, x):
    """Output, gradients and state of one forward and backward."""
    torch.manual_seed(0)
    net = copy.deepcopy(net)
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    (y * torch.arange(y.numel()).sin().view(y.shape)).sum().backward()
    seen = {"y": y.detach(), "gradient of x": leaf.grad}
    seen.update({f"gradient of {n}": p.grad for n, p in net.named_parameters()})
    return {**seen, **net.state_dict()}


def _assert_same(ours, theirs, bound):
    """Equal to `bound` times the largest value."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is None:
            assert ours[name] is None
            continue
        atol = bound * max(float(value.abs().max()), 1e-3) if value.numel() else 0.0
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- whole models -------------------------------------------------------------------------------

# How to make it, batch-norm layers, and those with a ReLU or leaky ReLU of their own.
MODELS = {
    "timm densenet121": (lambda: timm.create_model("densenet121"), 121, 121),
    "timm resnet18": (lambda: timm.create_model("resnet18"), 20, 0),
    "timm regnetx_002": (lambda: timm.create_model("regnetx_002"), 44, 27),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 34, 5),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 49, 0),
    "timm ese_vovnet19b_dw": (lambda: timm.create_model("ese_vovnet19b_dw"), 23, 23),
    "timm dpn48b": (lambda: timm.create_model("dpn48b"), 54, 52),
    "timm darknet17": (lambda: timm.create_model("darknet17"), 16, 16),
    "timm ghostnet_050": (lambda: timm.create_model("ghostnet_050"), 80, 1),
    "timm mixnet_s": (lambda: timm.create_model("mixnet_s"), 49, 7),
    "torchvision resnet18": (torchvision.models.resnet18, 20, 0),
    "torchvision resnet18, frozen": (
        lambda: torchvision.models.resnet18(norm_layer=misc.FrozenBatchNorm2d), 20, 0,
    ),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, 52, 0),
    "torchvision shufflenet": (torchvision.models.shufflenet_v2_x0_5, 56, 0),
    "torchvision mnasnet": (torchvision.models.mnasnet0_5, 52, 0),
}  # fmt: skip
# In float64, u = 2⁻⁵³. In training a channel that is almost constant is divided by √(var + eps),
# which may multiply errors by 1/√eps = 3e2 a layer; three of them in a row make 3e7·u = 3e-9.
# Whatever a layer got wrong would be a million times as large.
MODEL_BOUND = 1e-8


@pytest.mark.parametrize("name", MODELS)
def test_converted_model_computes_what_it_did_and_reverts_to_what_it_was(name):
    make, layers, rectified = MODELS[name]
    torch.manual_seed(0)
    theirs = vision.filled(make().double())
    ours = convert(copy.deepcopy(theirs))
    report = explain(ours)
    assert (len(report.converted), report.skipped, report.pending) == (layers, {}, set())
    acts = [m.act for m in theirs.modules() if type(m) is norm_act.BatchNormAct2d]
    assert sum(v in ("relu", "leaky_relu") for v in report.converted.values()) == rectified
    assert sum(v != "" for v in report.converted.values()) == sum(
        type(a) in ACTIVATIONS for a in acts
    )

    x = _x(3, 3, 64, 64, dtype=torch.float64)
    for training in (True, False):
        _assert_same(_step(ours.train(training), x), _step(theirs.train(training), x), MODEL_BOUND)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)

    revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert [m.__dict__.keys() for m in ours.modules()] == [
        m.__dict__.keys() for m in theirs.modules()
    ]


# ---- timm's layer with an activation ------------------------------------------------------------

# Relative to the largest value: sums of 150 terms, each right to a few u, and as much by each of
# the two sides.
BOUND = 1e3 * U

ACTS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "timm swish": timm.layers.activations.Swish,
    "timm swish me": timm.layers.activations_me.SwishMe,
    "timm hard swish": timm.layers.activations.HardSwish,
    "timm hard swish me": timm.layers.activations_me.HardSwishMe,
    "timm hard mish": timm.layers.activations.HardMish,
    "timm prelu": timm.layers.activations.PReLU,
}


def _layer(act=nn.ReLU, **keywords):
    """timm's layer, and the same converted."""
    theirs = vision.filled(norm_act.BatchNormAct2d(C, act_layer=act, **keywords))
    return theirs, convert(copy.deepcopy(theirs))


def _assert_equal_layers(ours, theirs, training=True):
    x = 2 * _x(6, C, 5, 5)
    _assert_same(_step(ours.train(training), x), _step(theirs.train(training), x), BOUND)


@modes
@pytest.mark.parametrize("act", ACTS)
def test_layer_with_activation_computes_what_it_did(act, training):
    theirs, ours = _layer(ACTS[act])
    assert isinstance(ours, BatchNorm2d)
    assert isinstance(ours, norm_act.BatchNormAct2d)
    assert ours.activation == ACTIVATIONS.get(ACTS[act])
    _assert_equal_layers(ours, theirs, training)


def test_activations_that_our_layers_have_run_in_the_same_pass():
    called = []
    for kind, name in ACTIVATIONS.items():
        _, ours = _layer(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "forward", lambda self, x: called.append(self) or x)
            ours(_x(6, C, 5, 5))
        assert explain(ours).converted == {"": name}
    assert called == []
    assert {nn.ReLU, nn.LeakyReLU} <= ACTIVATIONS.keys()


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.2, 1.5])
def test_leaky_relu_keeps_its_slope(slope):
    theirs, ours = _layer(nn.LeakyReLU, act_kwargs={"negative_slope": slope}, inplace=False)
    _assert_equal_layers(ours, theirs)


def _swap(layer):
    layer.act = nn.Sigmoid()


def _take_away(layer):
    layer.act = nn.Identity()


def _drop(layer):
    layer.drop = nn.Dropout(0.5)


def _hook(layer):
    layer.act.register_forward_hook(lambda module, args, y: 2 * y)


def _pre_hook(layer):
    layer.act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _backward_hook(layer):
    layer.act.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))


def _hook_on_drop(layer):
    layer.drop.register_forward_hook(lambda module, args, y: y - 1)


def _forward(layer):
    layer.act.forward = torch.sigmoid


def _subclass(layer):
    class Twice(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.act = Twice()


def _range(layer):
    layer.act = nn.ReLU6()
    layer.act.max_val = 1.0


CHANGES = [
    _swap, _take_away, _drop, _hook, _pre_hook, _backward_hook, _hook_on_drop, _forward, _subclass,
    _range,
]  # fmt: skip


@modes
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_change_to_the_modules_inside_counts(change, when, training):
    theirs, ours = _layer(inplace=False)  # in place, full backward hooks raise
    if when == "before":
        ours = copy.deepcopy(theirs)
        change(ours)
        convert(ours)
    else:
        change(ours)
    change(theirs)
    _assert_equal_layers(ours, theirs, training)


def test_hook_for_all_modules_sees_the_activation():
    theirs, ours = _layer()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(type(module).__name__)
    )
    try:
        for layer in (theirs, ours):
            layer(_x(6, C, 5, 5))
    finally:
        handle.remove()
    assert seen == ["Identity", "ReLU", "BatchNormAct2d"] * 2


def test_hook_of_the_layer_sees_what_it_saw():
    theirs, ours = _layer()
    seen = []
    for layer in (theirs, ours):
        layer.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
        layer(_x(6, C, 5, 5))
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=BOUND * float(seen[0].max()))


def test_layer_passes_nan_on_as_its_activation_does():
    theirs, ours = _layer()
    x = _x(6, C, 5, 5)
    x[0, 1, 0, 0] = float("nan")
    theirs.eval(), ours.eval()
    assert torch.equal(ours(x).isnan(), theirs(x).isnan())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layer_keeps_type_and_memory_format(dtype):
    theirs, ours = _layer()
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x = _x(6, C, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype == dtype
    assert a.is_contiguous(memory_format=torch.channels_last)
    # theirs rounds before the activation, ours after: two roundings of values below 8.
    torch.testing.assert_close(a, b, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_repr_and_state_dict_are_those_of_timm():
    theirs, ours = _layer()
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_constructor_is_that_of_timm():
    ours = adapters.adapter_of(norm_act.BatchNormAct2d).ours
    made = ours(C, 1e-3, 0.2, True, True, True, nn.LeakyReLU, {"negative_slope": 0.3})
    assert (made.eps, made.momentum, made.act.negative_slope) == (1e-3, 0.2, 0.3)
    assert explain(made).converted == {"": "leaky_relu"}
    assert type(revert(made)) is norm_act.BatchNormAct2d


@pytest.mark.parametrize("way", ["copy", "pickle", "save"])
def test_copies_are_of_the_same_class(way):
    _, ours = _layer()
    if way == "copy":
        other = copy.deepcopy(ours)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(ours)
    assert type(revert(other)) is norm_act.BatchNormAct2d


def test_options_apply():
    _, ours = _layer()
    convert(ours, on_nonfinite="raise", group_size=2)
    assert ours.group_size == 2
    with pytest.raises(NonFiniteError):
        ours(torch.full((6, C, 5, 5), torch.nan))


@modes
def test_layer_compiles_exports_and_traces(training):
    torch._dynamo.reset()
    theirs = vision.filled(nn.Sequential(nn.Conv2d(3, C, 3), norm_act.BatchNormAct2d(C))).train(
        training
    )
    ours, x = convert(copy.deepcopy(theirs)), _x(6, 3, 7, 7)
    y = copy.deepcopy(theirs)(x)
    for way in (
        torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager"),
        torch.export.export(copy.deepcopy(ours), (x,)).module(),
        torch.fx.symbolic_trace(copy.deepcopy(ours)),
    ):
        torch.testing.assert_close(way(x), y, rtol=0, atol=BOUND * float(y.detach().max()))
    torch._dynamo.reset()


def test_recalibrate_measures_what_it_did():
    nets = [vision.filled(timm.create_model("ese_vovnet19b_dw").double()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    convert(nets[1])
    for net in nets:
        recalibrate(net, [_x(3, 3, 64, 64, dtype=torch.float64)], method="exact")
    _assert_same(nets[1].state_dict(), nets[0].state_dict(), MODEL_BOUND)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_script_names_the_remedy():
    for layer in (_layer()[1], convert(misc.FrozenBatchNorm2d(C))):
        with pytest.raises(ArgumentError, match=r"revert\(model\) first"):
            torch.jit.script(layer)


# ---- synchronized -------------------------------------------------------------------------------


def test_sync_keeps_the_activation_and_can_be_undone():
    theirs, ours = _layer(nn.LeakyReLU)
    once = type(ours)
    convert(ours, sync=True)
    assert isinstance(ours, SyncBatchNorm)
    assert isinstance(ours, norm_act.SyncBatchNormAct)
    assert explain(ours).converted == {"": "leaky_relu"}
    _assert_equal_layers(ours, theirs)  # without a process group
    assert type(convert(ours, sync=False)) is once
    assert type(revert(convert(ours, sync=True))) is norm_act.BatchNormAct2d
    assert ours.__dict__.keys() == theirs.__dict__.keys()


def test_timms_synchronized_layer_is_converted():
    theirs, _ = _layer()
    net = norm_act.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(theirs)))
    convert(net)
    assert isinstance(net[0], SyncBatchNorm)
    _assert_equal_layers(net[0], theirs)
    assert type(revert(net)[0]) is norm_act.SyncBatchNormAct


# ---- timm's own conversions, on converted layers ------------------------------------------------


@pytest.mark.parametrize(
    "function", [norm_act.convert_sync_batchnorm, norm_act.freeze_batch_norm_2d]
)
def test_timms_own_conversion_keeps_the_activation(function):
    theirs, ours = (function(nn.Sequential(layer)).eval() for layer in _layer())
    assert type(ours[0]) is type(theirs[0])
    x = _x(6, C, 5, 5)
    y = theirs(x)
    assert float(y.detach().min()) == 0
    torch.testing.assert_close(ours(x), y, rtol=0, atol=BOUND * float(y.detach().max()))


# ---- constant statistics ------------------------------------------------------------------------

FROZEN = {
    "torchvision": lambda **k: misc.FrozenBatchNorm2d(C, **k),
    "timm relu": lambda **k: norm_act.FrozenBatchNormAct2d(C, **k),
    "timm silu": lambda **k: norm_act.FrozenBatchNormAct2d(C, act_layer=nn.SiLU, **k),
    "timm drop": lambda **k: norm_act.FrozenBatchNormAct2d(
        C, drop_layer=lambda: nn.Dropout(0.5), **k
    ),
}
frozen_ = pytest.mark.parametrize("kind", FROZEN)


def _frozen(kind, dtype=torch.float32, **keywords):
    theirs = vision.filled(FROZEN[kind](**keywords)).to(dtype)
    return theirs, convert(copy.deepcopy(theirs))


@frozen_
@modes
@pytest.mark.parametrize("eps", [1e-5, 0.0, 0.1])
def test_frozen_layer_computes_what_it_did(kind, training, eps):
    theirs, ours = _frozen(kind, eps=eps)
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, adapters.FrozenLayer)
    _assert_equal_layers(ours, theirs, training)


@pytest.mark.parametrize("of_x", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_layer", [torch.float16, torch.float32, torch.float64])
def test_frozen_layer_gives_the_type_that_it_gave(of_x, of_layer):
    theirs, ours = _frozen("torchvision", of_layer)
    x = _x(6, C, 5, 5, dtype=of_x)
    a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype
    # scale and shift of theirs are computed in the type of the layer
    narrowest = max(torch.finfo(a.dtype).eps, torch.finfo(of_layer).eps)
    torch.testing.assert_close(a, b, rtol=0, atol=16 * narrowest)


@pytest.mark.parametrize("shape", [(C, 5, 5), (2, 3, C, 5, 5), (6, 1, 5, 5), (0, C, 5, 5)], ids=str)
def test_frozen_layer_gives_the_shape_that_it_gave(shape):
    theirs, ours = _frozen("torchvision")
    x = _x(*shape)
    try:
        y = theirs(x)
    except RuntimeError as error:
        with pytest.raises(type(error)):
            ours(x)
    else:
        torch.testing.assert_close(ours(x), y, rtol=0, atol=16 * U)


def test_frozen_layer_takes_integers_and_keeps_channels_last():
    theirs, ours = _frozen("torchvision")
    numbers = torch.arange(6 * C * 25).view(6, C, 5, 5)
    assert torch.equal(ours(numbers), theirs(numbers))
    assert ours(_x(6, C, 5, 5).to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_frozen_layer_lets_statistics_have_a_gradient():
    theirs, ours = _frozen("torchvision")
    grads = []
    for layer in (theirs, ours):
        layer.running_mean.requires_grad_()
        layer(_x(6, C, 5, 5)).sum().backward()
        grads.append(layer.running_mean.grad)
    assert torch.equal(*grads)


def test_frozen_layer_loads_what_a_batch_norm_has_saved():
    theirs, ours = _frozen("torchvision")
    saved = vision.filled(nn.BatchNorm2d(C), seed=1).state_dict()
    for layer in (theirs, ours):
        layer.load_state_dict(saved.copy(), strict=True)
    _assert_same(ours.state_dict(), theirs.state_dict(), 0.0)
    assert repr(ours) == repr(theirs)


@frozen_
def test_frozen_layer_reverts(kind):
    theirs, ours = _frozen(kind)
    other = revert(pickle.loads(pickle.dumps(ours)))
    assert type(other) is type(theirs)
    assert other.__dict__.keys() == theirs.__dict__.keys()


@modes
def test_frozen_layer_compiles_exports_and_traces(training):
    torch._dynamo.reset()
    theirs, ours = (layer.train(training) for layer in _frozen("timm relu"))
    x = _x(6, C, 5, 5)
    y = theirs(x)
    for way in (
        torch.compile(ours, fullgraph=True, backend="aot_eager"),
        torch.export.export(ours, (x,)).module(),
        torch.fx.symbolic_trace(ours),
    ):
        torch.testing.assert_close(way(x), y, rtol=0, atol=BOUND * float(y.max()))
    torch._dynamo.reset()


@frozen_
@pytest.mark.parametrize("converted", [True, False], ids=["converted", "original"])
def test_frozen_layers_have_nothing_to_freeze_or_accumulate(kind, converted):
    theirs, ours = _frozen(kind)
    net = nn.Sequential(ours if converted else theirs)
    before = copy.deepcopy(net.state_dict())
    unfreeze(freeze(net, affine=True))
    with accumulate(net):
        net(_x(6, C, 5, 5))
    _assert_same(net.state_dict(), before, 0.0)
    assert [group["params"] for group in parameter_groups(net, 0.1)] == [[], []]
    assert net[0].__dict__.keys() == theirs.__dict__.keys()


def test_options_pass_frozen_layers_by():
    net = nn.Sequential(misc.FrozenBatchNorm2d(C), nn.BatchNorm2d(C))
    convert(net, on_single="population", sync=True)
    assert [type(m).__name__ for m in net] == ["FrozenBatchNorm2d", "SyncBatchNorm"]
    assert "on_single" not in net[0].__dict__


# ---- freeze, accumulate, parameter_groups on timm's layer ---------------------------------------


def test_freeze_keeps_statistics_and_affine_and_lets_the_activation_train():
    _, ours = _layer(timm.layers.activations.PReLU)
    freeze(ours, affine=True)
    before = copy.deepcopy(ours.state_dict())
    ours(_x(6, C, 5, 5)).sum().backward()
    _assert_same(ours.state_dict(), before, 0.0)
    assert ours.weight.grad is None
    assert ours.act.weight.grad is not None
    unfreeze(ours)
    assert all(p.requires_grad for p in ours.parameters())


def test_accumulate_updates_once():
    _, ours = _layer()
    large, x = copy.deepcopy(ours), _x(6, C, 5, 5)
    with accumulate(ours):
        for part in x.split(2):
            ours(part)
    large(x)
    _assert_same(ours.state_dict(), large.state_dict(), 4 * U)


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "original"])
def test_weight_of_an_activation_decays_as_it_does_elsewhere(converted):
    layer = _layer(timm.layers.activations.PReLU)[converted]
    decaying, others = (group["params"] for group in parameter_groups(layer, 0.1))
    assert [id(p) for p in decaying] == [id(layer.act.weight)]
    assert {id(p) for p in others} == {id(layer.weight), id(layer.bias)}
