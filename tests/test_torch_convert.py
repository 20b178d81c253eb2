"""convert, revert, explain: torch's layers into ours in place, and what may join them.

A converted network has to compute what it computed before: outputs, gradients, running statistics,
whatever its forward does besides. Networks are one block with a forward of its own each, in three
tables: those that fuse, those that must not, and those where only the results matter.
"""

import copy
import functools
import io
import pickle
import random
import types

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import batchnorm.torch  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    convert,
    explain,
    freeze,
    revert,
)

pytestmark = [  # torch's tracers and compilers run into torch's own deprecated functions
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

C = 4
TYPES = [torch.float32, torch.float64]
types_ = pytest.mark.parametrize("dtype", TYPES, ids=["float32", "float64"])
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# Relative to the largest value: sums of some hundreds of terms are right to 1e2·u, and a few layers
# and three steps of the optimizer amplify that by less than 1e2.
BOUNDS = {dtype: 1e4 * torch.finfo(dtype).eps / 2 for dtype in TYPES}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """For tensors this small, threads cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- networks -----------------------------------------------------------------------------------


def _conv():
    return nn.Conv2d(C, C, 3, padding=1, bias=False)


class Block(nn.Module):
    """What a forward needs; networks differ in the forward, and in attributes."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = _conv(), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = _conv(), nn.BatchNorm2d(C)
        self.conv3, self.bn3 = _conv(), nn.BatchNorm2d(C)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(C, C, 1)


def _block(forward, *, base=Block, **attributes):
    made = type(forward.__name__, (base,), {"forward": forward})()
    for name, value in attributes.items():
        if type(value) is torch.Tensor:
            made.register_buffer(name, value.clone())
        else:
            setattr(made, name, copy.copy(value))
    return made


def _of(forward, **attributes):
    """What makes blocks with this forward."""
    return functools.partial(_block, forward, **attributes)


class Around(nn.Module):
    """A module with more before and behind it."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.behind = _conv(), inner, _conv()

    def forward(self, x):
        return self.behind(self.inner(self.before(x)))


class BasicBlock(nn.Module):
    """As in torchvision, line by line."""

    def __init__(self, downsample=None):
        super().__init__()
        self.conv1, self.bn1 = _conv(), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv(), nn.BatchNorm2d(C)
        self.downsample = downsample
        self.stride = 1

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Net(nn.Module):
    """One of each: an activation that steps aside, forwards written anew, nothing to join."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.LeakyReLU(0.2))
        self.layer1 = nn.Sequential(BasicBlock(), BasicBlock(_downsample()))
        self.last = nn.BatchNorm2d(C)
        self.fc = nn.Linear(C, 3)

    def forward(self, x):
        x = self.last(self.layer1(self.stem(x)))
        return self.fc(x.mean((2, 3)))


def _downsample():
    return nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))


NET = {
    "stem.1": "leaky ReLU '2'",
    "layer1.0.bn1": "ReLU 'relu'",
    "layer1.0.bn2": "the residual addition and ReLU 'relu'",
    "layer1.1.bn1": "ReLU 'relu'",
    "layer1.1.bn2": "the residual addition and ReLU 'relu'",
    "layer1.1.downsample.1": "",
    "last": "",
}


def _made(factory, dtype=torch.float32, seed=0):
    """A network whose parameters and statistics are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    net = factory().to(dtype)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            noise = torch.rand(t.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("running_mean", "bias")):
                t.copy_(noise - 0.5)
            elif name.endswith("running_var") or (name.endswith("weight") and t.dim() == 1):
                t.copy_(noise + 0.5)
            elif t.dim() > 1:
                t.copy_((noise - 0.5) / 2)
    return net


def _batches(count=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(20150211)
    return [
        torch.randn((6, C, 5, 5), generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(count)
    ]


def _history(net, call=None, *, dtype=torch.float32, autocast=False, backward=True, rate=0.01):
    """What can be seen of three steps of training and one of evaluation, by name."""
    torch.manual_seed(0)
    random.seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    seen = {}
    for step, batch in enumerate(_batches(4, dtype)):
        net.train(step < 3)
        leaf = batch.clone().requires_grad_()
        given = leaf.clone()
        with torch.set_grad_enabled(backward), torch.autocast("cpu", enabled=autocast):
            outputs = (call or (lambda n, x: n(x)))(net, given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seen[f"input after step {step}"] = given.detach()
        seen.update({f"output {i} of step {step}": o.detach() for i, o in enumerate(outputs)})
        losses = [(o * torch.arange(o.numel()).sin().view(o.shape)).sum() for o in outputs]
        optimizer.zero_grad()
        loss = sum(losses)
        if not loss.requires_grad:
            continue
        loss.backward()
        for name, t in (("input", leaf), *net.named_parameters()):
            if t.grad is not None:
                seen[f"gradient of {name} in step {step}"] = t.grad.clone()
        if step < 3:
            optimizer.step()
    return {**seen, **net.state_dict()}


def _assert_same(ours, theirs, bound):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        largest = float(value.abs().max()) if value.numel() else 0.0
        atol = bound * max(largest, 1.0)
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def _assert_converts(factory, call=None, *, dtype=torch.float32, backward=True):
    theirs = _made(factory, dtype)
    ours = convert(copy.deepcopy(theirs))
    _assert_same(
        _history(ours, call, dtype=dtype, backward=backward),
        _history(theirs, call, dtype=dtype, backward=backward),
        BOUNDS[dtype],
    )


# ---- networks that fuse -------------------------------------------------------------------------


def relu_module(self, x):
    return self.relu(self.bn1(self.conv1(x)))


def functional_relu(self, x):
    return F.relu(self.bn1(self.conv1(x)))


def functional_relu_in_place(self, x):
    return F.relu(self.bn1(self.conv1(x)), inplace=True)


def torch_relu(self, x):
    return torch.relu(self.bn1(self.conv1(x)))


def torch_relu_in_place(self, x):
    return torch.relu_(self.bn1(self.conv1(x)))


def relu_method(self, x):
    return self.bn1(self.conv1(x)).relu()


def relu_method_in_place(self, x):
    return self.bn1(self.conv1(x)).relu_()


def functional_leaky_relu(self, x):
    return F.leaky_relu(self.bn1(self.conv1(x)), 0.2)


def functional_leaky_relu_by_keyword(self, x):
    return F.leaky_relu(self.bn1(self.conv1(x)), negative_slope=0.2, inplace=True)


def one_relu_used_twice(self, x):
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def basic_block(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    out += x
    return self.relu(out)


def bottleneck(self, x):
    identity = self.shortcut(x)
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.relu(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(out))
    out += identity
    return self.relu(out)


def shortcut_added(self, x):
    return self.relu(self.bn1(self.conv1(x)) + self.shortcut(x))


def shortcut_after_the_layer(self, x):
    out = self.bn1(self.conv1(x))
    return F.relu(out + self.shortcut(x))


def identity_first(self, x):
    return self.relu(x + self.bn1(self.conv1(x)))


def functional_addition(self, x):
    return F.relu(torch.add(self.bn1(self.conv1(x)), x))


def addition_by_method(self, x):
    return self.bn1(self.conv1(x)).add(x).relu()


def addition_by_method_in_place(self, x):
    return self.bn1(self.conv1(x)).add_(x).relu_()


def leaky_relu_of_a_sum(self, x):
    return F.leaky_relu(self.bn1(self.conv1(x)) + x, 0.2)


def addition_alone(self, x):
    return self.bn1(self.conv1(x)) + x


def addition_in_place_alone(self, x):
    out = self.bn1(self.conv1(x))
    out += x
    return out


def residual_that_broadcasts(self, x):
    return F.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


def pre_activation(self, x):
    out = self.conv1(self.relu(self.bn1(x)))
    out = self.conv2(self.relu(self.bn2(out)))
    return out + x


def two_blocks_in_a_row(self, x):
    x = self.relu(self.bn1(self.conv1(x)) + x)
    return self.relu(self.bn2(self.conv2(x)) + x)


RELU, LEAKY, SUM = "ReLU", "leaky ReLU", "the residual addition"
RELU_MODULE, SUM_RELU = f"{RELU} 'relu'", f"{SUM} and {RELU}"
SUM_RELU_MODULE = f"{SUM} and {RELU_MODULE}"

# Factory, layers that something joins, and what.
FUSED = {
    forward.__name__: (_of(forward), joined)
    for forward, joined in [
        (relu_module, {"bn1": RELU_MODULE}),
        (functional_relu, {"bn1": RELU}),
        (functional_relu_in_place, {"bn1": RELU}),
        (torch_relu, {"bn1": RELU}),
        (torch_relu_in_place, {"bn1": RELU}),
        (relu_method, {"bn1": RELU}),
        (relu_method_in_place, {"bn1": RELU}),
        (functional_leaky_relu, {"bn1": LEAKY}),
        (functional_leaky_relu_by_keyword, {"bn1": LEAKY}),
        (one_relu_used_twice, {"bn1": RELU_MODULE, "bn2": RELU_MODULE}),
        (basic_block, {"bn1": RELU_MODULE, "bn2": SUM_RELU_MODULE}),
        (bottleneck, {"bn1": RELU_MODULE, "bn2": RELU_MODULE, "bn3": SUM_RELU_MODULE}),
        (shortcut_added, {"bn1": SUM_RELU_MODULE}),
        (shortcut_after_the_layer, {"bn1": SUM_RELU}),
        (identity_first, {"bn1": SUM_RELU_MODULE}),
        (functional_addition, {"bn1": SUM_RELU}),
        (addition_by_method, {"bn1": SUM_RELU}),
        (addition_by_method_in_place, {"bn1": SUM_RELU}),
        (leaky_relu_of_a_sum, {"bn1": SUM}),
        (addition_alone, {"bn1": SUM}),
        (addition_in_place_alone, {"bn1": SUM}),
        (residual_that_broadcasts, {"bn1": SUM_RELU}),
        (pre_activation, {"bn1": RELU_MODULE, "bn2": RELU_MODULE}),
        (two_blocks_in_a_row, {"bn1": SUM_RELU_MODULE, "bn2": SUM_RELU_MODULE}),
    ]
}


def _in_place(forward):
    return _of(forward, relu=nn.ReLU(inplace=True))


FUSED |= {
    "sequential": (
        lambda: nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.ReLU(), _conv()),
        {"1": "ReLU '2'"},
    ),
    "sequential_in_place": (
        lambda: nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.ReLU(inplace=True), _conv()),
        {"1": "ReLU '2'"},
    ),
    "sequential_leaky": (
        lambda: nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.LeakyReLU(0.2), _conv()),
        {"1": "leaky ReLU '2'"},
    ),
    "sequential_pre_activation": (
        lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), _conv()),
        {"0": "ReLU '1'"},
    ),
    "sequential_in_sequential": (
        lambda: nn.Sequential(
            _conv(), nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
        ),
        {"1.1.0": "ReLU '1'"},
    ),
    "basic_block_relu_in_place": (_in_place(basic_block), FUSED["basic_block"][1]),
    "bottleneck_relu_in_place": (_in_place(bottleneck), FUSED["bottleneck"][1]),
    "net": (Net, {name: what for name, what in NET.items() if what}),
    "inside_another": (
        lambda: Around(BasicBlock()),
        {"inner.bn1": "ReLU 'relu'", "inner.bn2": "the residual addition and ReLU 'relu'"},
    ),
}

fused = pytest.mark.parametrize("name", FUSED)


@fused
def test_explain_says_what_joined_before_and_after(name):
    factory, joined = FUSED[name]
    net = _made(factory)
    before = explain(net)
    after = explain(convert(net))
    assert {layer: what for layer, what in after.converted.items() if what} == joined
    assert before == after


@types_
@fused
def test_fused_network_computes_what_it_did(name, dtype):
    _assert_converts(FUSED[name][0], dtype=dtype)


@fused
def test_network_converted_without_fusing_computes_what_it_did(name):
    theirs = _made(FUSED[name][0])
    ours = convert(copy.deepcopy(theirs), fuse=False)
    assert all(m.activation is None for m in ours.modules() if isinstance(m, BatchNorm2d))
    _assert_same(_history(ours), _history(theirs), BOUNDS[torch.float32])


@fused
def test_fused_network_computes_what_it_did_under_autocast(name):
    # Each of a few roundings to bfloat16, 2⁻⁹ of the largest value, differs between the two: 2⁻⁵.
    # That much off zero an activation's derivative is another one; about two in a hundred values of
    # each of a few layers lie there, so that gradients agree to √0.06 in the norm.
    theirs = _made(FUSED[name][0])
    ours = convert(copy.deepcopy(theirs))
    ours, theirs = (_history(net, autocast=True, rate=0.0) for net in (ours, theirs))
    assert {k: t.dtype for k, t in ours.items()} == {k: t.dtype for k, t in theirs.items()}
    for key, value in theirs.items():
        error, value = (ours[key] - value).double(), value.double()
        if key.startswith("gradient"):
            assert error.norm() <= 0.25 * value.norm() + 2**-5 * value.numel() ** 0.5, key
        elif value.numel():
            assert error.abs().max() <= 2**-5 * max(float(value.abs().max()), 1.0), key


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "forward", [addition_in_place_alone, addition_by_method_in_place, addition_alone]
)
def test_sum_has_the_type_it_had_under_autocast(forward, residual):
    def typed(self, x):
        return forward(self, x)

    theirs = _made(_of(typed))
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1, residual)[0]
    with torch.autocast("cpu"):
        ours, theirs = ours(x), theirs(x)
    assert ours.dtype == theirs.dtype
    # Values below 8 in bfloat16, rounded once by one and twice by the other.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 8 * 2**-8)


def test_fused_layer_passes_nan_on_as_the_relu_did():
    theirs = _made(lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())).eval()
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    x[0, 0, 0, 0], x[1, 1, 1, 1] = float("nan"), -float("inf")
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def _leaky_residual(slope):
    def forward(self, x):
        return self.act(self.bn1(self.conv1(x)) + x)

    return _block(forward, act=nn.LeakyReLU(slope))


def _leaky(slope):
    return nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.LeakyReLU(slope))


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.2, 1.0, 1.5])
@pytest.mark.parametrize("make", [_leaky, _leaky_residual])
def test_fused_leaky_relu_keeps_its_slope(make, slope):
    _assert_converts(functools.partial(make, slope), dtype=torch.float64)


@pytest.mark.parametrize("forward", [basic_block, relu_module])
def test_fused_layer_has_the_gradient_at_zero_when_scale_and_shift_are_zero(forward):
    def zeroed():
        net = _block(forward)
        net.bn1.weight, net.bn1.bias = (nn.Parameter(torch.zeros(C)) for _ in range(2))
        return net

    theirs = zeroed()
    _assert_same(_history(convert(copy.deepcopy(theirs))), _history(theirs), BOUNDS[torch.float32])


@pytest.mark.parametrize(
    ("layer", "ours", "shape"),
    [
        (nn.BatchNorm1d, BatchNorm1d, (6, 3)),
        (nn.BatchNorm1d, BatchNorm1d, (6, 3, 4)),
        (nn.BatchNorm2d, BatchNorm2d, (6, 3, 4, 2)),
        (nn.BatchNorm3d, BatchNorm3d, (6, 3, 2, 2, 2)),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_fused_layer_takes_inputs_of_any_rank(layer, ours, shape):
    theirs = nn.Sequential(layer(3), nn.ReLU())
    net = convert(copy.deepcopy(theirs))
    x = torch.linspace(-1, 2, torch.Size(shape).numel()).sin().view(shape)
    assert type(net[0]) is ours
    torch.testing.assert_close(net(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


def test_fused_block_keeps_channels_last():
    net = convert(_made(lambda: Around(BasicBlock())))
    x = _batches(1)[0].contiguous(memory_format=torch.channels_last)
    assert net(x).is_contiguous(memory_format=torch.channels_last)


def test_fused_block_takes_its_input_by_name():
    def forward(self, input):
        return F.relu(self.bn1(self.conv1(input)) + input)

    _assert_converts(_of(forward), lambda net, x: net(input=x))


# ---- networks that must not fuse ----------------------------------------------------------------


def output_used_twice(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out) + out


def output_returned_too(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out), out


def layer_called_twice(self, x):
    return self.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def branch_on_data(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out) if out.sum() > 0 else out


def branch_on_training(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out) if self.training else out


def residual_of_a_layer_on_the_input(self, x):
    return self.relu(self.bn1(x) + self.shortcut(x))


def residual_is_the_layers_input(self, x):
    out = self.conv1(x)
    return self.relu(self.bn1(out) + out)


def input_changed_before_the_addition(self, x):
    out = self.conv1(x)
    y = self.bn1(out)
    out.mul_(2)
    return self.relu(y + x)


def _with_hook(name):
    def factory():
        net = _block(relu_module)
        net.get_submodule(name).register_forward_hook(lambda module, args, out: out * 2)
        return net

    return factory


class _Siamese(nn.Module):
    """Two modules that share a batch norm."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.ReLU())
        self.b = nn.Sequential(_conv(), self.a[1])

    def forward(self, x):
        return self.b(self.a(x))


class _Taps(nn.Module):
    """Takes features from inside a Sequential, as style transfer and detection do."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        taps = []
        for i, module in enumerate(self.features):
            x = module(x)
            if i == 1:
                taps.append(x)
        return x, taps[0]


class _Inside(_Taps):
    def forward(self, x):
        return self.features(x), self.features[1](self.features[0](x))


class _Slice(_Taps):
    def forward(self, x):
        return self.features(x), self.features[:2](x)


class _Embeds(Block):
    """Has another way in than its forward."""

    def embed(self, x):
        return self.bn1(self.conv1(x))

    def forward(self, x):
        return self.relu(self.embed(x))


class _CallsAnotherMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = _Embeds()

    def forward(self, x):
        return self.block(x), self.block.embed(x)


# Factory, layer that nothing may join, a part of the reason ("" for any).
REFUSED = {
    "output_used_twice": (_of(output_used_twice), "bn1", "output is used by more"),
    "output_returned_too": (_of(output_returned_too), "bn1", "output is used by more"),
    "layer_called_twice": (_of(layer_called_twice), "bn1", "more than once"),
    "branch_on_data": (_of(branch_on_data), "bn1", ""),
    "branch_on_training": (_of(branch_on_training), "bn1", ""),
    "residual_of_a_layer_on_the_input": (_of(residual_of_a_layer_on_the_input), "bn1", "input"),
    "residual_is_the_layers_input": (_of(residual_is_the_layers_input), "bn1", "input"),
    "input_changed_before_the_addition": (_of(input_changed_before_the_addition), "bn1", "input"),
    "hook_on_the_layer": (_with_hook("bn1"), "bn1", "hooks"),
    "hook_on_the_relu": (_with_hook("relu"), "bn1", "hooks"),
    "layer_shared_by_two_modules": (_Siamese, "a.1", "shared"),
    "taps_inside_a_sequential": (_Taps, "features.1", ""),
    "parts_of_a_sequential_called": (_Inside, "features.1", ""),
    "slice_of_a_sequential_called": (_Slice, "features.1", ""),
    "another_method_called": (_CallsAnotherMethod, "block.bn1", ""),
}

refused_ = pytest.mark.parametrize("name", REFUSED)


@refused_
def test_explain_says_why_an_activation_did_not_join(name):
    factory, layer, reason = REFUSED[name]
    net = convert(_made(factory))
    report = explain(net)
    assert report.converted[layer] == ""
    assert reason in report.unfused[layer]
    assert type(net.get_submodule(layer)) is BatchNorm2d


@refused_
def test_network_that_must_not_fuse_computes_what_it_did(name):
    # torch's layer keeps its input for its gradient, and refuses one that was changed.
    backward = name != "input_changed_before_the_addition"
    _assert_converts(REFUSED[name][0], dtype=torch.float64, backward=backward)


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.ELU, nn.PReLU, nn.ReLU6])
def test_other_activations_stay_and_need_no_reason(activation):
    def factory():
        return nn.Sequential(_conv(), nn.BatchNorm2d(C), activation())

    report = explain(convert(_made(factory)))
    assert report.converted == {"1": ""}
    assert report.unfused == {}
    _assert_converts(factory, dtype=torch.float64)


def test_subclass_of_relu_does_not_join():
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    def factory():
        return nn.Sequential(_conv(), nn.BatchNorm2d(C), Doubled())

    assert explain(_made(factory)).converted == {"1": ""}
    _assert_converts(factory, dtype=torch.float64)


# ---- networks of which a graph does not show everything ----------------------------------------

# Arguments.


def optional_argument(self, x, scale=2.0):
    return self.relu(self.bn1(self.conv1(x))) * scale


def optional_residual(self, x, skip=None):
    out = self.bn1(self.conv1(x))
    if skip is not None:
        out = out + skip
    return self.relu(out)


def any_arguments(self, *xs):
    return self.relu(self.bn1(self.conv1(xs[0])))


def functional_dropout(self, x):
    return F.dropout(self.relu(self.bn1(self.conv1(x))), 0.5, self.training)


# Additions.


def sum_of_two_layers(self, x):  # RepVGG
    return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


def sum_of_two_layers_in_place(self, x):
    out = self.bn1(self.conv1(x))
    out += self.bn2(self.conv2(x))
    return self.relu(out)


def sum_of_three_layers(self, x):
    return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)) + self.bn3(x))


def layer_and_residual_both_normalized(self, x):
    a = self.bn1(self.conv1(x))
    return self.relu(a + self.bn2(self.conv2(a)))


def layer_added_to_itself(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out + out)


def scaled_addition(self, x):
    return self.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=0.5))


def boolean_residual(self, x):
    return self.relu(self.bn1(self.conv1(x)) + (x > 0))


def number_added(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x.shape[1] / 2)


def residual_larger_than_the_output(self, x):
    return self.relu(self.bn1(self.conv1(x.mean((2, 3), keepdim=True))) + x)


# Memory that has two names.


def residual_changed_before_the_addition(self, x):
    identity = self.shortcut(x)
    out = self.bn1(self.conv1(x))
    identity.mul_(2)
    return self.relu(out + identity)


def residual_changed_after_the_addition(self, x):
    identity = self.shortcut(x)
    out = self.relu(self.bn1(self.conv1(x)) + identity)
    identity.mul_(2)
    return out + identity


def residual_changed_after_the_addition_alone(self, x):
    identity = self.shortcut(x)
    out = self.bn1(self.conv1(x)) + identity
    identity.mul_(2)
    return 3 * out + identity


def residual_changed_by_the_caller(self, x, skip):
    return self.bn1(self.conv1(x)) + skip


def residual_has_another_name(self, x):
    identity = self.shortcut(x)
    alias = identity
    identity *= 2
    return self.relu(self.bn1(self.conv1(x)) + alias)


def residual_is_a_view(self, x):
    identity = self.shortcut(x)
    view = identity.view(-1)
    view += 1
    return self.relu(self.bn1(self.conv1(x)) + identity)


def input_changed_for_the_caller(self, x):
    x *= 1.5
    return self.relu(self.bn1(self.conv1(x)) + x)


def output_has_another_name(self, x):
    out = self.bn1(self.conv1(x))
    alias = out
    out += x
    return self.relu(out) + alias


def output_changed_afterwards(self, x):
    out = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
    out += 1
    return out


def sum_changed_afterwards(self, x):
    out = F.leaky_relu(self.bn1(self.conv1(x)) + x, 0.2)
    out *= 2
    return out


def sum_alone_changed_afterwards(self, x):
    out = self.bn1(self.conv1(x)) + x
    out *= out.shape[0]
    return out


def output_seen_through_a_view(self, x):
    out = self.bn1(self.conv1(x))
    view = out.view(-1)
    out += x
    return self.relu(out), view * 1


def sum_beside_its_relu_in_place(self, x):
    out = self.bn1(self.conv1(x))
    out += x
    return out + F.relu(out, inplace=True)


def relu_in_place_without_a_result(self, x):
    out = self.bn1(self.conv1(x))
    out += x
    F.relu_(out)
    return out


def addition_into_the_residual(self, x):
    identity = self.shortcut(x)
    identity += self.bn1(self.conv1(x))
    return self.relu(identity)


# The layer's own tensors, between its call and the addition.


def scale_changed_before_the_addition(self, x):
    out = self.bn1(self.conv1(x))
    self.bn1.weight.data.mul_(1.1)
    return self.relu(out + x)


def statistics_read_before_the_addition(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out + x * self.bn1.running_mean.view(1, C, 1, 1))


# Attributes.


def attribute_assigned(self, x):
    self.pre = self.bn1(self.conv1(x))
    return self.relu(self.pre)


def attribute_assigned_before_a_relu(self, x):
    out = self.bn1(self.conv1(x))
    self.pre = out
    return self.relu(out)


def attribute_assigned_in_a_residual_block(self, x):
    self.last = x
    return self.relu(self.bn1(self.conv1(x)) + x)


def list_appended_to(self, x):
    out = self.bn1(self.conv1(x))
    self.taps.append(out)
    return self.relu(out)


def attribute_of_a_child_assigned(self, x):
    out = self.bn1(self.conv1(x))
    self.conv2.pre = out
    return self.relu(out)


def calls_counted(self, x):
    self.calls += 1
    return self.relu(self.bn1(self.conv1(x)))


def calls_counted_in_a_residual_block(self, x):
    self.calls += 1
    return self.relu(self.bn1(self.conv1(x)) + x)


# Tensors that are there while a forward is traced.


def calls_counted_in_a_buffer(self, x):
    self.calls += 1
    return self.relu(self.bn1(self.conv1(x)))


def calls_counted_in_a_buffer_of_a_residual_block(self, x):
    self.calls += 1
    return self.relu(self.bn1(self.conv1(x)) + x)


def running_average_in_a_buffer(self, x):
    with torch.no_grad():
        self.center.mul_(0.9).add_(0.1 * x.mean())
    return self.relu(self.bn1(self.conv1(x)) + x)


def buffer_used(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x * self.gate)


def buffer_in_an_expression(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x * self.gate.exp())


def _after_filling(net, x):
    net.gate.fill_(-1.5)
    return net(x)


def buffer_read_as_a_number(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x * float(self.gate))


def branch_on_a_buffer(self, x):
    out = self.bn1(self.conv1(x))
    if self.gate > 0:
        out = self.relu(out)
    return out


def tensor_made_in_forward(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x * torch.tensor(2.0, dtype=x.dtype))


def constant_tensor_made_in_forward(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x * torch.tensor(2.0))


def random_tensor_made_in_forward(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x * torch.rand(1))


def stochastic_depth(self, x):
    if self.training and torch.rand(1).item() < 0.5:
        return x
    return self.relu(self.bn1(self.conv1(x)) + x)


def stochastic_depth_by_random(self, x):
    if self.training and random.random() < 0.5:
        return x
    return self.relu(self.bn1(self.conv1(x)) + x)


# What a forward may ask of the world.


def branch_on_a_childs_mode(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out + x) if self.bn1.training else self.relu(out - x)


def branch_on_grad_mode(self, x):
    out = self.bn1(self.conv1(x))
    return self.relu(out + x) if torch.is_grad_enabled() else self.relu(out - x)


def shortcut_without_gradient(self, x):
    with torch.no_grad():
        identity = self.shortcut(x)
    return self.relu(self.bn1(self.conv1(x)) + identity)


def layer_without_gradient(self, x):
    with torch.no_grad():
        out = self.bn1(self.conv1(x))
    return self.relu(out) + x


def absent_activation(self, x, activate):
    out = self.bn1(self.conv1(x))
    if activate is not None:
        out = self.relu(out)
    return out


def absent_residual(self, x, skip):
    out = self.bn1(self.conv1(x))
    if skip is not None:
        out = out + skip
    return self.relu(out)


def absent_residual_of_a_shortcut(self, x, skip):
    out = self.bn1(self.conv1(x))
    if skip is not None:
        out = out + self.shortcut(skip)
    return self.relu(out)


def tensor_or_pair(self, x):
    skip = x
    if isinstance(x, tuple):
        x, skip = x
    return self.relu(self.bn1(self.conv1(x)) + skip)


def tensor_or_tuple(self, x):
    raw = isinstance(x, tuple)
    out = self.bn1(self.conv1(x[0] if raw else x))
    return out if raw else self.relu(out)


def _doubled(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        return 2 * forward(self, x)

    return wrapper


@torch.no_grad()
def _residual_without_gradient(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x)


class _OptionalInSequential(nn.Sequential):
    def forward(self, x, activate=None):
        x = self[1](self[0](x))
        return x if activate is None else self[2](x)


class _ListBeside(nn.Module):
    """Calls its modules by a list of its own, which nobody knows about."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = _conv(), nn.BatchNorm2d(C), nn.LeakyReLU(0.2)
        self.order = [self.conv, self.bn, self.act]

    def forward(self, x):
        for module in self.order:
            x = module(x)
        return x


class _Probe(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.bn1(self.block.conv1(x))


class _Probed(nn.Module):
    """A block under two parents, the second of which reaches into it."""

    def __init__(self):
        super().__init__()
        self.block = _block(relu_module)
        self.probe = _Probe(self.block)

    def forward(self, x):
        return self.block(x), self.probe(x)


class _AttributesOfItsOwn(Block):
    def __getattr__(self, name):
        found = super().__getattr__(name)
        return (lambda x: torch.sigmoid(found(x))) if name == "bn1" else found

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class _CallOfItsOwn(Block):
    def __call__(self, x):
        return self.bn1(self.conv1(x))

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class _OneBlockTwice(nn.Module):
    def __init__(self):
        super().__init__()
        block = BasicBlock()
        self.blocks = nn.Sequential(block, block)

    def forward(self, x):
        return self.blocks(x)


class _OneActivation(nn.Module):
    """One leaky ReLU for everybody, twice on the way of the same values."""

    def __init__(self):
        super().__init__()
        self.act = nn.LeakyReLU(0.2)
        self.a = nn.Sequential(_conv(), nn.BatchNorm2d(C), self.act)
        self.b = nn.Sequential(_conv(), nn.BatchNorm2d(C), self.act, _conv(), self.act)

    def forward(self, x):
        return self.act(self.b(self.a(x)))


class _Lists(nn.Module):
    """Blocks and layers in lists and dictionaries."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([BasicBlock(), _block(relu_module)])
        self.convs = nn.ModuleList([_conv(), _conv()])
        self.bns = nn.ModuleList([nn.BatchNorm2d(C), nn.BatchNorm2d(C)])
        self.acts = nn.ModuleDict({"leaky": nn.LeakyReLU(0.2)})

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = self.acts["leaky"](bn(conv(x)))
        return x


def _replaced_forward(name):
    def factory():
        net = Around(nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.LeakyReLU(0.2)))
        module = net.inner[name]
        original = type(module).forward
        module.forward = types.MethodType(lambda self, x: 2 * original(self, x), module)
        return net

    return factory


def _conv_with_a_hook():
    def forward(self, x):
        given = x * 1
        out = self.bn1(self.conv1(given))
        given.mul_(2)
        return self.relu(out + x)

    net = _block(forward)
    net.conv1.register_forward_hook(lambda module, args, out: args[0])
    return net


CAREFUL = {
    forward.__name__: _of(forward)
    for forward in [
        optional_argument,
        optional_residual,
        any_arguments,
        functional_dropout,
        sum_of_two_layers,
        sum_of_two_layers_in_place,
        sum_of_three_layers,
        layer_and_residual_both_normalized,
        layer_added_to_itself,
        scaled_addition,
        boolean_residual,
        number_added,
        residual_larger_than_the_output,
        residual_changed_before_the_addition,
        residual_changed_after_the_addition,
        residual_changed_after_the_addition_alone,
        residual_changed_by_the_caller,
        residual_has_another_name,
        residual_is_a_view,
        input_changed_for_the_caller,
        output_has_another_name,
        output_changed_afterwards,
        sum_changed_afterwards,
        sum_alone_changed_afterwards,
        output_seen_through_a_view,
        sum_beside_its_relu_in_place,
        relu_in_place_without_a_result,
        addition_into_the_residual,
        scale_changed_before_the_addition,
        statistics_read_before_the_addition,
        attribute_assigned,
        attribute_assigned_before_a_relu,
        attribute_assigned_in_a_residual_block,
        attribute_of_a_child_assigned,
        tensor_made_in_forward,
        constant_tensor_made_in_forward,
        random_tensor_made_in_forward,
        stochastic_depth,
        stochastic_depth_by_random,
        branch_on_a_childs_mode,
        branch_on_grad_mode,
        shortcut_without_gradient,
        layer_without_gradient,
        absent_activation,
        absent_residual,
        absent_residual_of_a_shortcut,
        tensor_or_pair,
        tensor_or_tuple,
    ]
}
CAREFUL |= {
    "optional_argument_given": _of(optional_argument),
    "optional_residual_given": _of(optional_residual),
    "list_appended_to": _of(list_appended_to, taps=[]),
    "calls_counted": _of(calls_counted, calls=0),
    "calls_counted_in_a_residual_block": _of(calls_counted_in_a_residual_block, calls=0),
    "calls_counted_in_a_buffer": _of(calls_counted_in_a_buffer, calls=torch.zeros(())),
    "calls_counted_in_a_buffer_of_a_residual_block": _of(
        calls_counted_in_a_buffer_of_a_residual_block, calls=torch.zeros(())
    ),
    "running_average_in_a_buffer": _of(running_average_in_a_buffer, center=torch.ones(())),
    "buffer_used": _of(buffer_used, gate=torch.tensor(0.5)),
    "buffer_in_an_expression": _of(buffer_in_an_expression, gate=torch.tensor(0.5)),
    "buffer_read_as_a_number": _of(buffer_read_as_a_number, gate=torch.tensor(0.5)),
    "branch_on_a_buffer": _of(branch_on_a_buffer, gate=torch.tensor(0.5)),
    "decorated": _of(_doubled(shortcut_added)),
    "decorated_without_gradient": lambda: Around(_block(_residual_without_gradient)),
    "optional_argument_of_a_sequential": lambda: _OptionalInSequential(
        _conv(), nn.BatchNorm2d(C), nn.ReLU()
    ),
    "list_beside_the_modules": _ListBeside,
    "block_that_another_module_reaches_into": _Probed,
    "attributes_of_its_own": _AttributesOfItsOwn,
    "call_of_its_own": _CallOfItsOwn,
    "one_block_twice": _OneBlockTwice,
    "one_activation_everywhere": _OneActivation,
    "lists_and_dictionaries": _Lists,
    "forward_of_the_layer_replaced": _replaced_forward(1),
    "forward_of_the_activation_replaced": _replaced_forward(2),
    "conv_hook_gives_its_input_back": _conv_with_a_hook,
}
WITHOUT_GRADIENT = ("branch_on_grad_mode", "conv_hook_gives_its_input_back")


def _and_change_the_residual(net, x):
    skip = 2 * x
    y = net(x, skip)
    skip.zero_()
    return y


def _and(read):
    return lambda net, x: (net(x), read(net))


# How a network is called, where not by its input alone; and what is looked at besides.
CALLS = {
    "optional_argument_given": lambda net, x: net(x, scale=-1.0),
    "residual_changed_by_the_caller": _and_change_the_residual,
    "optional_residual_given": lambda net, x: net(x, 2 * x),
    "attribute_assigned": _and(lambda net: net.pre * 1),
    "attribute_assigned_before_a_relu": _and(lambda net: net.pre * 1),
    "attribute_assigned_in_a_residual_block": _and(lambda net: net.last * 1),
    "list_appended_to": _and(lambda net: net.taps.pop() * 1),
    "attribute_of_a_child_assigned": _and(lambda net: net.conv2.pre * 1),
    "calls_counted": _and(lambda net: torch.tensor(float(net.calls))),
    "calls_counted_in_a_residual_block": _and(lambda net: torch.tensor(float(net.calls))),
    "buffer_read_as_a_number": _after_filling,
    "branch_on_a_buffer": _after_filling,
    "absent_activation": lambda net, x: net(x, None),
    "absent_residual": lambda net, x: net(x, None),
    "absent_residual_of_a_shortcut": lambda net, x: net(x, None),
    "tensor_or_pair": lambda net, x: net((x, 2 * x)),
    "tensor_or_tuple": lambda net, x: net((x,)),
}

careful_ = pytest.mark.parametrize("name", CAREFUL)


@careful_
def test_convert_changes_no_result_when_a_graph_does_not_show_all(name):
    backward = name not in WITHOUT_GRADIENT
    _assert_converts(CAREFUL[name], CALLS.get(name), dtype=torch.float64, backward=backward)


@torch.autocast("cpu", dtype=torch.bfloat16)
def _with_autocast(self, x):
    return self.relu(self.bn1(self.conv1(x)) + self.shortcut(x))


def _without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.relu(self.bn1(self.conv1(x)) + self.shortcut(x))


@pytest.mark.parametrize(
    ("forward", "outside", "dtype"),
    [(_with_autocast, False, torch.bfloat16), (_without_autocast, True, torch.float32)],
)
def test_forward_with_autocast_of_its_own_keeps_it(forward, outside, dtype):
    net = convert(_made(_of(forward)))
    with torch.autocast("cpu", enabled=outside):
        assert net(_batches(1)[0]).dtype == dtype


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("inner", [relu_module, shortcut_added])
def test_network_with_checkpointing_in_its_forward_computes_what_it_did(inner, reentrant):
    # torch's layer counts the second forward too: outputs and gradients in training are compared,
    # and the running statistics with those of a network without checkpointing.
    def forward(self, x):
        return checkpoint(types.MethodType(inner, self), x, use_reentrant=reentrant)

    theirs = _made(_of(forward), torch.float64)
    plain = _made(_of(inner), torch.float64)
    ours = convert(copy.deepcopy(theirs))
    mine, others = ({}, {})
    for net, seen in ((ours, mine), (theirs, others)):
        x = _batches(1, torch.float64)[0].requires_grad_()
        y = net(x)
        y.square().sum().backward()
        seen.update({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
        seen.update({"output": y.detach(), "gradient of the input": x.grad})
    _assert_same(mine, others, BOUNDS[torch.float64])
    plain(_batches(1, torch.float64)[0])
    _assert_same(ours.state_dict(), plain.state_dict(), BOUNDS[torch.float64])


def test_relu_shared_with_another_module_stays():
    act = nn.ReLU()
    net = nn.ModuleDict(
        {"a": nn.Sequential(_conv(), nn.BatchNorm2d(C), act), "b": nn.Sequential(_conv(), act)}
    )
    convert(net)
    assert net["b"][1] is act


EVERY = {
    **{name: factory for name, (factory, _) in FUSED.items()},
    **{name: entry[0] for name, entry in REFUSED.items()},
    **CAREFUL,
}


def _modules(net):
    return dict(net.named_modules(remove_duplicate=False))


def _keys(net):
    return {name: set(vars(module)) for name, module in _modules(net).items()}


def _insides(net):
    """What stands in the attributes of all modules, down to the items of lists and dictionaries."""
    kinds = (list, dict)
    return {
        (name, key): (type(value), list(value) if isinstance(value, kinds) else id(value))
        for name, module in _modules(net).items()
        for key, value in vars(module).items()
    }


@pytest.mark.parametrize("name", EVERY)
def test_explain_changes_nothing(name):
    net = _made(EVERY[name])
    state, insides = copy.deepcopy(net.state_dict()), _insides(net)
    torch_rng, python_rng = torch.get_rng_state(), random.getstate()
    explain(net)
    assert _insides(net) == insides
    _assert_same(net.state_dict(), state, 0.0)
    assert torch.equal(torch.get_rng_state(), torch_rng)
    assert random.getstate() == python_rng


@pytest.mark.parametrize("name", EVERY)
def test_convert_changes_neither_state_nor_generators(name):
    net = _made(EVERY[name])
    state = copy.deepcopy(net.state_dict())
    torch_rng, python_rng = torch.get_rng_state(), random.getstate()
    convert(net)
    _assert_same(net.state_dict(), state, 0.0)
    assert torch.equal(torch.get_rng_state(), torch_rng)
    assert random.getstate() == python_rng


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith(("attr", "list_a"))])
def test_convert_leaves_nothing_of_its_tracing_in_attributes(name):
    net = _made(EVERY[name])
    keys, before = _keys(net), {n: type(m) for n, m in _modules(net).items()}
    convert(net)
    for n, module in _modules(net).items():
        if type(module) is before[n]:
            assert set(vars(module)) - {"forward"} == keys[n]
        for value in vars(module).values():
            items = value if isinstance(value, list) else [value]
            assert not any(isinstance(item, torch.fx.Proxy) for item in items)


@pytest.mark.parametrize("name", EVERY)
def test_revert_restores_the_network_it_was(name):
    net = _made(EVERY[name])
    never = copy.deepcopy(net)
    types_before = {n: type(m) for n, m in _modules(net).items()}
    assert revert(convert(net)) is net
    assert {n: type(m) for n, m in _modules(net).items()} == types_before
    for n, module in _modules(never).items():
        now = vars(_modules(net)[n])
        assert {k: type(v) for k, v in now.items()} == {k: type(v) for k, v in vars(module).items()}
    call = CALLS.get(name)
    _assert_same(_history(net, call, backward=False), _history(never, call, backward=False), 0.0)


# ---- convert ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (nn.BatchNorm1d, BatchNorm1d),
        (nn.BatchNorm2d, BatchNorm2d),
        (nn.BatchNorm3d, BatchNorm3d),
    ],
)
def test_convert_turns_each_layer_into_its_counterpart(theirs, ours):
    assert type(convert(nn.Sequential(theirs(3)))[0]) is ours


def test_convert_returns_the_model():
    net = Net()
    assert convert(net) is net


def test_convert_takes_a_model_that_is_a_batch_norm():
    layer = nn.BatchNorm2d(C)
    assert convert(layer) is layer
    assert type(layer) is BatchNorm2d
    assert explain(layer).converted == {"": ""}


class _Special(nn.BatchNorm2d):
    pass


def _parametrized():
    layer = nn.BatchNorm2d(C)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


LEFT_ALONE = {
    "subclass": (lambda: _Special(C), "_Special is a subclass"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "lazy"),
    "parametrized": (_parametrized, "parametrized"),
    "scripted": (lambda: torch.jit.script(nn.BatchNorm2d(C)), "TorchScript"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_convert_leaves_other_layers_alone_and_explain_says_why(kind):
    factory, reason = LEFT_ALONE[kind]
    net = nn.Sequential(factory(), nn.ReLU(), nn.BatchNorm2d(C))
    layer, cls = net[0], type(net[0])
    convert(net)
    assert net[0] is layer
    assert type(layer) is cls
    report = explain(net)
    assert report.converted == {"2": ""}
    assert reason in report.skipped["0"]


def test_convert_leaves_instance_norm_alone_without_a_word():
    net = convert(nn.Sequential(nn.InstanceNorm2d(C)))
    assert type(net[0]) is nn.InstanceNorm2d
    report = explain(net)
    assert (report.converted, report.skipped) == ({}, {})


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_convert_takes_a_lazy_layer_after_its_first_forward():
    net = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    net(_batches(1)[0])
    assert type(convert(net)[0]) is BatchNorm2d


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_convert_keeps_every_layer_the_object_it_is(fuse):
    net = Net()
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    convert(net, fuse=fuse)
    assert all(net.get_submodule(n) is m for n, m in layers.items())


def test_convert_keeps_names():
    net = Net()
    names = [n for n, _ in net.named_modules()]
    assert [n for n, _ in convert(net).named_modules()] == names
    assert list(net.state_dict()) == list(Net().state_dict())


def test_convert_keeps_parameters_and_buffers_the_objects_they_are():
    net = Net()
    tensors = [*net.parameters(), *net.buffers()]
    convert(net)
    assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], tensors, strict=True))


def test_convert_keeps_hooks():
    net, calls = nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.ReLU()), []
    net[1].register_forward_pre_hook(lambda module, args: calls.append("before"))
    handle = net[1].register_forward_hook(lambda module, args, out: calls.append("after"))
    convert(net)(_batches(1)[0])
    assert calls == ["before", "after"]
    handle.remove()
    net(_batches(1)[0])
    assert calls == ["before", "after", "before"]


@pytest.mark.parametrize("function", [convert, explain])
def test_hook_of_a_block_can_still_be_removed(function):
    net, calls = BasicBlock(), []
    handle = net.register_forward_hook(lambda module, args, out: calls.append("after"))
    function(net)
    handle.remove()
    net(_batches(1)[0])
    assert calls == []


@pytest.mark.parametrize("function", [convert, explain])
def test_dictionary_shared_between_blocks_stays_shared(function):
    options = {"scale": 2}
    net = nn.Sequential(BasicBlock(), BasicBlock())
    net[0].options = net[1].options = options
    function(net)
    assert net[0].options is net[1].options is options


def test_convert_keeps_training_flags():
    net = Net()
    net.layer1.eval()
    flags = {n: m.training for n, m in net.named_modules()}
    assert {n: m.training for n, m in convert(net).named_modules()} == flags


def test_convert_keeps_requires_grad():
    net = Net()
    net.stem[1].weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    assert {n: p.requires_grad for n, p in convert(net).named_parameters()} == flags


def test_convert_keeps_a_shared_layer_shared():
    net = nn.ModuleDict({"a": nn.BatchNorm2d(C)})
    net["b"] = net["a"]
    convert(net)
    assert net["a"] is net["b"]
    assert explain(net).converted == {"a": ""}


def test_convert_keeps_the_type_of_parameters_and_widens_statistics():
    theirs = _made(lambda: nn.Sequential(nn.BatchNorm2d(C))).half()
    ours = convert(copy.deepcopy(theirs))
    assert (ours[0].weight.dtype, ours[0].running_var.dtype) == (torch.float16, torch.float32)
    assert torch.equal(ours[0].running_var, theirs[0].running_var.float())


def test_optimizer_made_before_goes_on_working():
    nets = [_made(Net), convert(_made(Net))]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]
    nets[0].load_state_dict(revert(nets[1]).state_dict())
    convert(nets[1])
    for batch in _batches(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(batch).square().sum().backward()
            optimizer.step()
    _assert_same(nets[1].state_dict(), nets[0].state_dict(), BOUNDS[torch.float32])


def test_convert_passes_options_on():
    net = convert(Net(), on_nonfinite="raise", on_single="population", group_size=2)
    layers = [m for m in net.modules() if isinstance(m, BatchNorm2d)]
    assert len(layers) == len(NET)
    assert {(m.on_nonfinite, m.on_single, m.group_size) for m in layers} == {
        ("raise", "population", 2)
    }


def test_converted_layer_names_itself_by_its_place_in_the_model():
    net = convert(Net(), on_nonfinite="raise")
    x = _batches(1)[0]
    x[0] = float("nan")
    with pytest.raises(batchnorm.torch.NonFiniteError, match=r"stem\.1"):
        net(x)


@pytest.mark.parametrize("function", [convert, revert, explain])
@pytest.mark.parametrize("model", [None, nn.BatchNorm2d, [nn.BatchNorm2d(3)], "model"], ids=repr)
def test_functions_refuse_what_is_no_module(function, model):
    with pytest.raises(ArgumentError, match=r"takes a torch\.nn\.Module, got"):
        function(model)


@pytest.mark.parametrize(
    ("option", "value"),
    [("on_nonfinite", "ignore"), ("on_single", "skip"), ("group_size", 0), ("group_size", 1.5)],
)
def test_convert_refuses_unknown_options_and_changes_nothing(option, value):
    net = Net()
    keys = _keys(net)
    with pytest.raises(ArgumentError, match=f"{option} must be .*got {value!r}"):
        convert(net, **{option: value})
    assert not any(isinstance(m, BatchNorm2d) for m in net.modules())
    assert _keys(net) == keys


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("from_ours", [True, False], ids=["ours to torch's", "torch's to ours"])
def test_state_dicts_are_interchangeable(from_ours, fuse):
    theirs, ours = _made(Net, seed=1).eval(), convert(_made(Net, seed=2), fuse=fuse).eval()
    source, target = (ours, theirs) if from_ours else (theirs, ours)
    target.load_state_dict(source.state_dict(), strict=True)
    x = _batches(1)[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


@pytest.mark.parametrize("first", [True, False], ids=["fused first", "unfused first"])
@pytest.mark.parametrize("second", [True, False], ids=["fused again", "unfused again"])
def test_convert_twice_is_harmless(first, second):
    theirs = _made(Net)
    ours = convert(convert(copy.deepcopy(theirs), fuse=first), fuse=second)
    _assert_same(_history(ours), _history(theirs), BOUNDS[torch.float32])


def test_convert_twice_gives_the_same_report():
    net = convert(Net())
    before = explain(net)
    assert explain(convert(net)) == before


def test_convert_fuses_what_an_earlier_one_did_not():
    net = convert(convert(Net(), fuse=False))
    assert explain(net).converted == NET


def test_convert_leaves_the_options_of_our_layers():
    net = nn.Sequential(BatchNorm2d(C, on_single="population"), nn.BatchNorm2d(C))
    convert(net, on_nonfinite="raise")
    assert (net[0].on_single, net[0].on_nonfinite) == ("population", "skip")
    assert (net[1].on_single, net[1].on_nonfinite) == ("raise", "raise")


def test_convert_leaves_a_layer_with_an_activation_of_its_own():
    net = convert(nn.Sequential(BatchNorm2d(C, activation="leaky_relu"), nn.LeakyReLU(0.2)))
    assert net[0].activation == "leaky_relu"
    assert type(net[1]) is nn.LeakyReLU


# ---- explain ------------------------------------------------------------------------------------


def test_explain_prints_a_line_a_layer():
    net = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), _Special(C), _block(output_used_twice))
    lines = str(explain(net)).splitlines()
    assert lines[0] == (
        "batch norms of batchnorm.torch: 4 (1 with what follows in the same pass); left alone: 1"
    )
    assert [line.split()[0] for line in lines[1:]] == ["0", "3.bn1", "3.bn2", "3.bn3", "2"]
    assert lines[1].endswith("with ReLU '1'")
    assert "alone: " in lines[2]
    assert "left alone: _Special" in lines[-1]


def test_explain_of_a_model_without_batch_norms_is_empty():
    report = explain(nn.Linear(2, 3))
    assert (report.converted, report.skipped, report.unfused) == ({}, {}, {})
    assert str(report) == (
        "batch norms of batchnorm.torch: 0 (0 with what follows in the same pass); left alone: 0"
    )


# ---- revert -------------------------------------------------------------------------------------


def test_reverted_network_goes_on_from_what_was_learnt():
    net = convert(_made(Net))
    _history(net)
    state = copy.deepcopy(net.state_dict())
    x = _batches(1)[0]
    y = net.eval()(x)
    revert(net)
    _assert_same(net.state_dict(), state, 0.0)
    torch.testing.assert_close(net(x), y, rtol=0, atol=BOUNDS[torch.float32])


def test_revert_gives_the_same_activations_back_in_the_mode_of_the_model():
    net = Net()
    act = net.stem[2]
    convert(net).eval()
    assert revert(net).stem[2] is act
    assert not act.training


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_revert_undoes_convert_after_copying(fuse):
    net = revert(copy.deepcopy(convert(_made(Net), fuse=fuse)))
    assert {n: type(m) for n, m in net.named_modules()} == {
        n: type(m) for n, m in Net().named_modules()
    }
    _assert_same(_history(net), _history(_made(Net)), 0.0)


def test_revert_of_a_part_leaves_the_rest_fused():
    net = convert(_made(Net))
    revert(net.layer1[0])
    assert type(net.layer1[0].bn2) is nn.BatchNorm2d
    assert type(net.layer1[1].bn2) is BatchNorm2d
    _assert_same(_history(net), _history(_made(Net)), BOUNDS[torch.float32])


def test_revert_refuses_a_block_whose_class_has_been_changed_and_reverts_nothing():
    net = convert(_made(_of(shortcut_added, scale=nn.Parameter(torch.ones(())))))
    parametrize.register_parametrization(net, "scale", nn.Identity())
    x = _batches(1)[0]
    y = net.eval()(x)
    with pytest.raises(ArgumentError, match="class has been changed since convert"):
        revert(net)
    assert torch.equal(net(x), y)


def test_revert_leaves_torchs_layers_as_they_are():
    net = _made(Net)
    keys = _keys(net)
    revert(net)
    assert _keys(net) == keys


def test_revert_turns_layers_made_by_hand_into_torchs():
    net = revert(nn.Sequential(BatchNorm1d(3), BatchNorm2d(3, group_size=2), BatchNorm3d(3)))
    assert [type(m) for m in net] == [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
    assert _keys(net)["1"] == set(vars(nn.BatchNorm2d(3)))


def test_revert_refuses_a_layer_made_with_an_activation_and_reverts_nothing():
    net = nn.Sequential(convert(Net()), BatchNorm2d(C, activation="relu"))
    keys = _keys(net)
    with pytest.raises(ArgumentError, match="'1' was made with activation='relu'"):
        revert(net)
    assert _keys(net) == keys
    assert type(net[0].stem[1]) is BatchNorm2d


def test_revert_puts_a_frozen_layer_into_evaluation_mode():
    net = freeze(convert(_made(Net))).train()
    x = _batches(1)[0]
    y = net(x)
    revert(net)
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(net(x), y, rtol=0, atol=BOUNDS[torch.float32])


# ---- fused models elsewhere ---------------------------------------------------------------------


ROOTS = {"net": Net, "block": BasicBlock, "sequential": FUSED["sequential"][0]}
roots = pytest.mark.parametrize("root", ROOTS)


def _copied(net):
    return copy.deepcopy(net)


def _pickled(net):
    return pickle.loads(pickle.dumps(net))


def _saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("used", [True, False], ids=["used before", "new"])
@pytest.mark.parametrize("way", [_copied, _pickled, _saved])
def test_copy_of_a_fused_model_computes_the_same(way, used):
    net = convert(_made(Net))
    if used:
        net(_batches(1)[0])
    other = way(net)
    assert explain(other) == explain(net)
    _assert_same(_history(other), _history(net), 0.0)


@pytest.mark.parametrize("way", [_copied, _pickled, _saved])
def test_copy_of_a_fused_model_stands_by_itself(way):
    net = convert(_made(Net)).eval()
    x = _batches(1)[0]
    other, before = way(net), net(x)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(net(x), before)
    assert not torch.equal(other(x), before)


@pytest.mark.parametrize("way", [_copied, _pickled, _saved])
@pytest.mark.parametrize("root", ["block", "sequential"])
def test_copy_of_a_fused_graph_module_computes_the_same(root, way):
    net = convert(torch.fx.symbolic_trace(_made(ROOTS[root])))
    _assert_same(_history(way(net)), _history(net), 0.0)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def _step(net, function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **grads, **net.state_dict()}


@modes
@roots
def test_fused_model_compiles_to_one_graph(compiled, root, training):
    theirs = _made(ROOTS[root]).train(training)
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    _assert_same(_step(ours, compiled(ours), x), _step(theirs, theirs, x), BOUNDS[torch.float32])


@roots
def test_fused_model_compiles_when_it_has_run_before(compiled, root):
    theirs = _made(ROOTS[root])
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    for net in (ours, theirs):
        net(x)
    _assert_same(_step(ours, compiled(ours), x), _step(theirs, theirs, x), BOUNDS[torch.float32])


def test_fused_block_runs_when_compiled_in_place(compiled):
    theirs = _made(BasicBlock)
    ours = convert(copy.deepcopy(theirs))
    ours.compile(backend="aot_eager")
    x = _batches(1)[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


@modes
@roots
def test_exported_fused_model_computes_what_the_original_did(root, training):
    theirs = _made(ROOTS[root]).train(training)
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    program = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(program(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


@modes
@roots
def test_traced_fused_model_computes_what_the_original_did(root, training):
    theirs = _made(ROOTS[root]).train(training)
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    traced = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(traced(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


@roots
def test_fused_model_takes_other_parameters_by_functional_call(root):
    theirs = _made(ROOTS[root]).eval()
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    other = {n: 2 * p.detach() for n, p in theirs.named_parameters()}
    a, b = (torch.func.functional_call(net, other, x) for net in (ours, theirs))
    bound = BOUNDS[torch.float32] * float(b.detach().abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_fused_model_trains_in_distributed_data_parallel(process_group):
    theirs = _made(Net)
    ours = convert(copy.deepcopy(theirs))
    wrapped = nn.parallel.DistributedDataParallel(ours)
    x = _batches(1)[0]
    _assert_same(_step(ours, wrapped, x), _step(theirs, theirs, x), BOUNDS[torch.float32])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("root", ["block", "sequential"])
def test_checkpointed_fused_block_equals_itself_without(root, reentrant):
    plain = convert(_made(ROOTS[root]))
    other = copy.deepcopy(plain)
    x = _batches(1)[0]
    _assert_same(
        _step(other, lambda x: checkpoint(other, x, use_reentrant=reentrant), x),
        _step(plain, plain, x),
        0.0,
    )


# ---- a fused block that is changed afterwards ---------------------------------------------------


def test_fused_block_refuses_to_run_when_a_child_is_taken_away():
    net = convert(_made(lambda: BasicBlock(_downsample())))
    net.downsample = None
    with pytest.raises(ArgumentError, match="has changed since convert"):
        net(_batches(1)[0])


def test_changed_block_runs_again_when_reverted_and_converted():
    net = convert(_made(lambda: BasicBlock(_downsample())))
    net.downsample = None
    theirs = copy.deepcopy(revert(net))
    _assert_same(_history(convert(net)), _history(theirs), BOUNDS[torch.float32])


def _looped(self, x):
    for block in self.blocks:
        x = block(x)
    return F.relu(self.bn1(x))


def _with_blocks():
    return _block(_looped, blocks=nn.ModuleList([_conv(), _conv()]))


def _one_relu_in_a_sequential():
    act = nn.ReLU()
    return Around(nn.Sequential(_conv(), nn.BatchNorm2d(C), act, _conv(), act))


def _append(net):
    net.get_submodule("blocks" if hasattr(net, "blocks") else "inner").append(nn.Sigmoid())


def _remove(net):
    del net.get_submodule("blocks" if hasattr(net, "blocks") else "inner")[-1]


def _flagged(self, x):
    out = self.bn1(self.conv1(x))
    if self.active:
        out = self.relu(out)
    return out


def _flagged_residual(self, x):
    out = self.bn1(self.conv1(x))
    if self.options["residual"]:
        out = out + x
    return self.relu(out)


def _called_by_attribute(self, x):
    return self.function(self.bn1(self.conv1(x)))


def _deactivate(net):
    net.active = False


def _without_residual(net):
    net.options["residual"] = False


def _gelu(net):
    net.function = F.gelu


@pytest.mark.parametrize(
    ("factory", "change"),
    [
        (_of(_flagged, active=True), _deactivate),
        (_of(_flagged_residual, options={"residual": True}), None),
        (_of(_called_by_attribute, function=F.relu), _gelu),
        (_with_blocks, _append),
        (_with_blocks, _remove),
        (_one_relu_in_a_sequential, _append),
        (_one_relu_in_a_sequential, _remove),
    ],
    ids=[
        "flag",
        "dictionary",
        "function",
        "list longer",
        "list shorter",
        "sequential longer",
        "sequential shorter",
    ],
)
def test_fused_block_does_not_go_on_as_before_when_changed(factory, change):
    theirs = _made(factory)
    ours = convert(copy.deepcopy(theirs))
    for net in (ours, theirs):
        (change or _without_residual)(net)
    x = _batches(1)[0]
    try:
        y = ours(x)
    except ArgumentError:
        return
    torch.testing.assert_close(y, theirs(x), rtol=0, atol=BOUNDS[torch.float32])


def _forward_hook(net, seen):
    net.register_forward_hook(lambda module, args, out: seen.append(out))


def _backward_hook(net, seen):
    net.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out))


def _label(net, seen):
    for name, module in net.named_modules():
        module.label = name
    seen.append("label")


def _stride(net, seen):
    net.stride = 2
    seen.append("stride")


@pytest.mark.parametrize("change", [_forward_hook, _backward_hook, _label, _stride])
def test_fused_block_goes_on_when_something_changes_that_its_forward_does_not_see(change):
    theirs = _made(BasicBlock)
    ours = convert(copy.deepcopy(theirs))
    seen = []
    change(ours, seen)
    _assert_same(_history(ours), _history(theirs), BOUNDS[torch.float32])
    assert seen


# ---- what else a class has ----------------------------------------------------------------------


class _Methodical(nn.Module):
    """Forward in a method of its own, as torchvision's networks have it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU()

    def _forward_impl(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return torch.flatten(x, 1)

    def forward(self, x):
        return self._forward_impl(x)


class _Embedding(_Methodical):
    def embed(self, x):
        return self.bn1(self.conv1(x))


class _Holder:
    def __init__(self, module):
        self.module = module


class _Reaching(nn.Module):
    """Holds a block in a plain object beside it."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU())
        self.holder = _Holder(self.block)

    def forward(self, x):
        return self.block(x) + self.holder.module[1](x[..., 1:-1, 1:-1])


class _Flagged(nn.Module):
    """A parent that decides about other things than what is inside the block."""

    def __init__(self):
        super().__init__()
        self.block, self.twice = _Methodical(), True

    def forward(self, x, scale=1.0):
        with torch.no_grad():
            x = x * scale
        y = self.block(x)
        return y * 2 if self.twice else y


def test_explain_says_that_a_relu_joined_in_a_method_that_forward_calls():
    assert explain(_Methodical()).converted == {"bn1": "ReLU 'relu'"}


def test_explain_names_a_method_that_uses_the_layer_by_itself():
    assert "'embed'" in explain(_Embedding()).unfused["bn1"]


def test_explain_refuses_a_block_that_an_object_beside_it_refers_to():
    assert "refers to it" in explain(_Reaching()).unfused["block.1"]


def test_explain_lets_join_what_a_parent_calls_whole():
    assert explain(_Flagged()).converted == {"block.bn1": "ReLU 'relu'"}


@pytest.mark.parametrize("kind", [_Methodical, _Embedding, _Reaching, _Flagged])
def test_convert_changes_no_result_of_a_class_with_more_than_a_forward(kind):
    torch.manual_seed(0)
    theirs, x = kind(), torch.randn(3, C, 6, 6)
    ours = convert(copy.deepcopy(theirs))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_revert_refuses_a_layer_without_what_has_joined_it():
    model = convert(nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU()))
    with pytest.raises(ArgumentError, match="whole model"):
        revert(model[1])
    assert type(model[1]) is BatchNorm2d
