"""convert, revert, explain: torch's layers into ours and back, in place.

A converted network computes what it computed before: outputs, gradients, running statistics. After
any exception a network is as it was.
"""

import copy
import functools
import io
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import batchnorm.torch  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    accumulate,
    convert,
    explain,
    freeze,
    revert,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's tracers and compilers run into torch's own deprecated functions
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

# ---- networks -----------------------------------------------------------------------------------


def _conv():
    return nn.Conv2d(C, C, 3, padding=1, bias=False)


class BasicBlock(nn.Module):
    """As in torchvision, line by line."""

    def __init__(self, downsample=None):
        super().__init__()
        self.conv1, self.bn1 = _conv(), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv(), nn.BatchNorm2d(C)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    """Activations as modules, in place and shared; a residual; a layer without an activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.LeakyReLU(0.2))
        downsample = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))
        self.layer1 = nn.Sequential(BasicBlock(), BasicBlock(downsample))
        self.last = nn.BatchNorm2d(C)
        self.fc = nn.Linear(C, 3)

    def forward(self, x):
        x = self.last(self.layer1(self.stem(x)))
        return self.fc(x.mean((2, 3)))


NET = (
    "stem.1",
    "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2", "layer1.1.downsample.1",
    "last",
)  # fmt: skip


def _made(factory=Net, dtype=torch.float32, seed=0):
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


def _history(net, *, dtype=torch.float32, autocast=False, backward=True):
    """What can be seen of three steps of training and one of evaluation, by name."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    seen = {}
    for step, batch in enumerate(_batches(4, dtype)):
        net.train(step < 3)
        leaf = batch.clone().requires_grad_()
        with torch.set_grad_enabled(backward), torch.autocast("cpu", enabled=autocast):
            y = net(leaf)
        seen[f"output of step {step}"] = y.detach()
        if not backward:
            continue
        optimizer.zero_grad()
        (y * torch.arange(y.numel()).sin().view(y.shape)).sum().backward()
        for name, t in (("input", leaf), *net.named_parameters()):
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


def _keys(net):
    return {name: set(vars(module)) for name, module in net.named_modules()}


def _everything(net):
    """Classes and attributes of all modules, and the objects that their buffers are."""
    return {
        name: (
            type(module),
            {k: id(v) for k, v in vars(module).items()},
            {k: id(v) for k, v in module._buffers.items()},
            [(id(p), p.requires_grad, p.grad is None) for p in module.parameters()],
        )
        for name, module in net.named_modules()
    }


# ---- convert ------------------------------------------------------------------------------------


@types_
def test_converted_network_computes_what_it_did(dtype):
    theirs = _made(dtype=dtype)
    ours = convert(copy.deepcopy(theirs))
    assert tuple(explain(ours).converted) == NET
    _assert_same(_history(ours, dtype=dtype), _history(theirs, dtype=dtype), BOUNDS[dtype])


def test_converted_network_computes_what_it_did_under_autocast():
    # Outputs of convolutions are rounded to bfloat16, whose relative step is 2⁻⁸; some values fall
    # on the other side of it, and the layers and the means behind them add that up to a few steps.
    theirs = _made()
    ours = convert(copy.deepcopy(theirs)).train(), theirs.train()
    x = _batches(1)[0]
    with torch.autocast("cpu"):
        a, b = (net(x) for net in ours)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0, atol=2**-4 * float(b.detach().abs().max()))


def test_convert_leaves_all_other_modules_alone():
    net = Net()
    before = {n: type(m) for n, m in net.named_modules() if n not in NET}
    modules = dict(net.named_modules())
    convert(net)
    assert {n: type(m) for n, m in net.named_modules() if n not in NET} == before
    assert dict(net.named_modules()) == modules


@pytest.mark.parametrize("taken", ["model[:2]", "model[1]"])
def test_part_of_a_converted_model_computes_what_the_part_did(taken):
    theirs = _made(lambda: nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.ReLU()))
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    a, b = (eval(taken, {"model": net})(x) for net in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=BOUNDS[torch.float32])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (nn.BatchNorm1d, BatchNorm1d),
        (nn.BatchNorm2d, BatchNorm2d),
        (nn.BatchNorm3d, BatchNorm3d),
        (nn.SyncBatchNorm, SyncBatchNorm),
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


def _with_another_forward():
    layer = nn.BatchNorm2d(C)
    layer.forward = torch.relu
    return layer


LEFT_ALONE = {
    "subclass": (lambda: _Special(C), "_Special is a subclass"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "lazy"),
    "parametrized": (_parametrized, "parametrized"),
    "scripted": (lambda: torch.jit.script(nn.BatchNorm2d(C)), "TorchScript"),
    "replaced forward": (_with_another_forward, "forward has been replaced"),
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


def test_convert_leaves_a_class_of_the_same_name_alone():
    class BatchNorm2d(nn.BatchNorm2d):
        pass

    BatchNorm2d.__module__, BatchNorm2d.__qualname__ = nn.BatchNorm2d.__module__, "BatchNorm2d"
    layer = BatchNorm2d(C)
    assert type(convert(layer)) is BatchNorm2d
    assert explain(layer).skipped


def test_convert_leaves_instance_norm_alone_silently():
    net = convert(nn.Sequential(nn.InstanceNorm2d(C)))
    assert type(net[0]) is nn.InstanceNorm2d
    report = explain(net)
    assert (report.converted, report.skipped) == ({}, {})


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_convert_takes_a_lazy_layer_after_its_first_forward():
    net = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    net(_batches(1)[0])
    assert type(convert(net)[0]) is BatchNorm2d


def test_convert_keeps_names():
    net = Net()
    names = [n for n, _ in net.named_modules()]
    assert [n for n, _ in convert(net).named_modules()] == names
    assert list(net.state_dict()) == list(Net().state_dict())


def test_convert_keeps_parameters_and_buffers_the_objects_they_are():
    net = Net()
    tensors = net.state_dict(keep_vars=True)
    converted = convert(net).state_dict(keep_vars=True)
    assert list(converted) == list(tensors)
    assert all(converted[name] is t for name, t in tensors.items())


def test_convert_adds_no_buffer():
    net = Net()
    buffers = [name for name, _ in net.named_buffers()]
    assert [name for name, _ in convert(net).named_buffers()] == buffers


@pytest.mark.parametrize("name", ["activation", "group_size", "_name"])
def test_convert_skips_a_layer_with_an_attribute_that_would_be_an_option(name):
    net = nn.Sequential(nn.BatchNorm1d(3))
    setattr(net[0], name, "relu")
    convert(net)
    assert type(net[0]) is nn.BatchNorm1d
    assert f"attribute '{name}'" in explain(net).skipped["0"]
    assert getattr(revert(net)[0], name) == "relu"


@pytest.mark.parametrize("options", [{"sync": 1}, {"sync": "yes"}, {"sync": None},
                                     {"sync": True, "reproducible": "x"}])  # fmt: skip
def test_convert_refuses_options_that_are_neither_true_nor_false(options):
    net = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match="must be True or False"):
        convert(net, **options)
    assert type(net[0]) is nn.BatchNorm1d


def test_convert_keeps_hooks():
    net, calls = nn.Sequential(_conv(), nn.BatchNorm2d(C), nn.ReLU()), []
    net[1].register_forward_pre_hook(lambda module, args: calls.append("before"))
    handle = net[1].register_forward_hook(lambda module, args, out: calls.append("after"))
    convert(net)(_batches(1)[0])
    assert calls == ["before", "after"]
    handle.remove()
    net(_batches(1)[0])
    assert calls == ["before", "after", "before"]


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
    nets = [_made(), convert(_made())]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]
    nets[0].load_state_dict(revert(nets[1]).state_dict())
    convert(nets[1])
    for batch in _batches(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(batch).square().sum().backward()
            optimizer.step()
    _assert_same(nets[1].state_dict(), nets[0].state_dict(), BOUNDS[torch.float32])


def test_converted_layer_names_itself_by_its_place_in_the_model():
    net = convert(Net(), on_nonfinite="raise")
    x = _batches(1)[0]
    x[0] = float("nan")
    with pytest.raises(batchnorm.torch.NonFiniteError, match=r"stem\.1"):
        net(x)


@pytest.mark.parametrize("from_ours", [True, False], ids=["ours to torch's", "torch's to ours"])
def test_state_dicts_are_interchangeable(from_ours):
    theirs, ours = _made(seed=1).eval(), convert(_made(seed=2)).eval()
    source, target = (ours, theirs) if from_ours else (theirs, ours)
    target.load_state_dict(source.state_dict(), strict=True)
    x = _batches(1)[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


# ---- options ------------------------------------------------------------------------------------


OPTIONS = {"on_nonfinite": "raise", "on_single": "population", "group_size": 2}


def _options(layer):
    return {name: getattr(layer, name) for name in OPTIONS}


def test_convert_passes_options_on():
    net = convert(Net(), **OPTIONS)
    assert all(_options(net.get_submodule(name)) == OPTIONS for name in NET)


@pytest.mark.parametrize("option", OPTIONS)
def test_second_convert_applies_the_options_that_are_given_and_leaves_the_others(option):
    net = convert(Net(), **{k: v for k, v in OPTIONS.items() if k != option})
    convert(net)
    convert(net, **{option: OPTIONS[option]})
    assert all(_options(net.get_submodule(name)) == OPTIONS for name in NET)


def test_second_convert_takes_group_size_back():
    net = convert(convert(Net(), **OPTIONS), group_size=None)
    assert _options(net.last) == {**OPTIONS, "group_size": None}


def test_convert_applies_options_to_layers_made_by_hand():
    net = nn.Sequential(BatchNorm2d(C, on_single="population", activation="relu"))
    convert(net, on_nonfinite="raise")
    assert _options(net[0]) == {**OPTIONS, "group_size": None}
    assert net[0].activation == "relu"


def test_convert_twice_changes_nothing():
    net = convert(Net(), **OPTIONS)
    before = _everything(net), explain(net)
    assert (_everything(convert(net)), explain(net)) == before


def test_convert_synchronizes_and_second_convert_undoes_it():
    net = convert(nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3)), group_size=4)
    before = _keys(net)
    convert(net, sync=True, reproducible=True)
    assert [type(m) for m in net] == [SyncBatchNorm, SyncBatchNorm]
    assert [(m.reproducible, m.group_size) for m in net] == [(True, 4)] * 2
    convert(net, reproducible=False)  # sync is as it was
    assert [(type(m), m.reproducible) for m in net] == [(SyncBatchNorm, False)] * 2
    convert(net, sync=False)
    assert [(type(m), m.group_size) for m in net] == [(BatchNorm1d, 4), (SyncBatchNorm, 4)]
    assert _keys(net)["0"] == before["0"]


def test_second_convert_changes_the_process_group():
    group = object()
    net = convert(nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3)), sync=True)
    convert(net, process_group=group)
    assert [m.process_group for m in net] == [group, group]
    convert(net, on_single="population")
    assert [m.process_group for m in net] == [group, group]


@pytest.mark.parametrize("option", [{"process_group": object()}, {"reproducible": True}], ids=str)
@pytest.mark.parametrize("sync", [{}, {"sync": False}], ids=["not given", "False"])
def test_options_of_synchronization_without_synchronized_layers_are_refused(option, sync):
    net = nn.Sequential(nn.BatchNorm1d(3))
    before = _everything(net)
    with pytest.raises(ArgumentError, match="pass sync=True"):
        convert(net, **option, **sync)
    assert _everything(net) == before


def test_options_of_synchronization_are_refused_when_it_is_undone():
    net = convert(nn.Sequential(nn.BatchNorm1d(3)), sync=True)
    with pytest.raises(ArgumentError, match="pass sync=True"):
        convert(net, sync=False, reproducible=True)
    assert type(net[0]) is SyncBatchNorm


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
    before = _everything(net)
    with pytest.raises(ArgumentError, match=f"{option} must be .*got {value!r}"):
        convert(net, **{option: value})
    assert _everything(net) == before


# ---- explain ------------------------------------------------------------------------------------


def test_explain_changes_nothing():
    net = _made()
    before = _everything(net)
    explain(net)
    assert _everything(net) == before


def test_explain_prints_a_line_a_layer():
    net = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), _Special(C), nn.SyncBatchNorm(C))
    assert str(explain(net)) == (
        "would convert 2 batch-norm layers, skip 1\n"
        "  0  BatchNorm2d\n"
        "  3  SyncBatchNorm; synchronized\n"
        "  2  skipped: _Special is a subclass, which may compute something else (see "
        "register_adapter)"
    )
    assert str(explain(convert(net))).startswith("converted 2 batch-norm layers, skipped 1\n  0  ")


def test_explain_tells_what_is_converted_from_what_is_not():
    net = nn.Sequential(BatchNorm2d(C, activation="relu"), nn.BatchNorm2d(C))
    report = explain(net)
    assert (report.converted, report.pending) == ({"0": "relu", "1": ""}, {"1"})
    assert str(report) == (
        "converted 1 batch-norm layer, would convert 1 more, skipped 0\n"
        "  0  BatchNorm2d with relu\n"
        "  1  BatchNorm2d"
    )


def test_explain_of_one_layer_is_in_the_singular():
    assert str(explain(convert(nn.Sequential(nn.BatchNorm2d(C))))) == (
        "converted 1 batch-norm layer, skipped 0\n  0  BatchNorm2d"
    )


def test_explain_of_a_model_without_batch_norms_is_empty():
    report = explain(nn.Linear(2, 3))
    assert (report.converted, report.skipped, report.synchronized) == ({}, {}, set())
    assert str(report) == "converted 0 batch-norm layers, skipped 0"


# ---- revert -------------------------------------------------------------------------------------


def test_revert_restores_the_network_it_was():
    net = _made()
    never = copy.deepcopy(net)
    classes, keys = {n: type(m) for n, m in net.named_modules()}, _keys(net)
    assert revert(convert(net, **OPTIONS)) is net
    assert {n: type(m) for n, m in net.named_modules()} == classes
    assert _keys(net) == keys
    assert repr(net) == repr(never)
    _assert_same(_history(net), _history(never), 0.0)


def test_reverted_network_goes_on_from_what_was_learnt():
    net = convert(_made())
    _history(net)
    state = copy.deepcopy(net.state_dict())
    x = _batches(1)[0]
    y = net.eval()(x)
    revert(net)
    _assert_same(net.state_dict(), state, 0.0)
    torch.testing.assert_close(net(x), y, rtol=0, atol=BOUNDS[torch.float32])


def test_revert_undoes_convert_after_copying():
    net = revert(copy.deepcopy(convert(_made())))
    assert {n: type(m) for n, m in net.named_modules()} == {
        n: type(m) for n, m in Net().named_modules()
    }
    _assert_same(_history(net), _history(_made()), 0.0)


def test_revert_of_a_part_leaves_the_rest():
    net = convert(_made())
    revert(net.layer1[0])
    assert type(net.layer1[0].bn2) is nn.BatchNorm2d
    assert type(net.layer1[1].bn2) is BatchNorm2d
    _assert_same(_history(net), _history(_made()), BOUNDS[torch.float32])


def test_revert_leaves_torchs_layers_as_they_are():
    net = _made()
    before = _everything(net)
    revert(net)
    assert _everything(net) == before


def test_revert_turns_layers_made_by_hand_into_torchs():
    net = revert(nn.Sequential(BatchNorm1d(3), BatchNorm2d(3, group_size=2), BatchNorm3d(3)))
    assert [type(m) for m in net] == [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
    assert _keys(net)["1"] == set(vars(nn.BatchNorm2d(3)))


def test_revert_refuses_a_layer_made_with_an_activation_and_reverts_nothing():
    net = nn.Sequential(convert(Net()), BatchNorm2d(C, activation="relu"))
    before = _everything(net)
    with pytest.raises(ArgumentError, match="'1' has activation='relu'"):
        revert(net)
    assert _everything(net) == before


def test_revert_refuses_a_parametrized_layer_and_reverts_nothing():
    net = convert(_made())
    parametrize.register_parametrization(net.last, "weight", nn.Identity())
    before = _everything(net)
    with pytest.raises(ArgumentError, match="'last' .*remove_parametrizations"):
        revert(net)
    assert _everything(net) == before


def test_revert_inside_accumulate_is_refused_and_reverts_nothing():
    net, usual = convert(_made()), convert(_made())
    x = _batches(1)[0]
    with accumulate(net.last):
        net(x)
        before = _everything(net)
        with pytest.raises(ArgumentError, match=r"'last' .*inside accumulate.*Leave the block"):
            revert(net)
        assert _everything(net) == before
    usual(x)
    _assert_same(net.state_dict(), usual.state_dict(), BOUNDS[torch.float32])
    assert type(revert(net).last) is nn.BatchNorm2d


def test_revert_puts_a_frozen_layer_into_evaluation_mode():
    net = freeze(convert(_made())).train()
    x = _batches(1)[0]
    y = net(x)
    revert(net)
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(net(x), y, rtol=0, atol=BOUNDS[torch.float32])


# ---- all or nothing -----------------------------------------------------------------------------


class _BrokenError(Exception):
    pass


def _breaks_at(attribute, count):
    """A `__setattr__` that raises when the attribute is set for the `count`-th time."""
    seen = []

    def set_attribute(self, name, value):
        if name == attribute:
            seen.append(self)
            if len(seen) == count:
                raise _BrokenError
        nn.Module.__setattr__(self, name, value)

    return set_attribute


@pytest.mark.parametrize("kind", [KeyboardInterrupt, _BrokenError])
@pytest.mark.parametrize("sync", [True, False])
def test_convert_that_raises_midway_has_changed_nothing(monkeypatch, kind, sync):
    net = _made().half()  # statistics are widened
    before = _everything(net)
    adopt, calls = BatchNorm2d.adopt, []

    def broken(self, name=""):
        adopt(self, name)
        calls.append(name)
        if len(calls) == 4:
            raise kind

    monkeypatch.setattr(batchnorm.torch.modules.Layer, "adopt", broken)
    with pytest.raises(kind):
        convert(net, sync=sync, **OPTIONS)
    assert len(calls) == 4
    assert _everything(net) == before


def test_convert_has_changed_nothing_when_setting_an_attribute_raises(monkeypatch):
    net = _made()
    before = _everything(net)
    monkeypatch.setattr(BatchNorm2d, "__setattr__", _breaks_at("_name", 3), raising=False)
    with pytest.raises(_BrokenError):
        convert(net)
    assert _everything(net) == before


def test_convert_that_raises_leaves_the_options_of_earlier_ones(monkeypatch):
    net = nn.Sequential(convert(_made(), **OPTIONS), nn.BatchNorm2d(C))
    before = _everything(net)
    monkeypatch.setattr(BatchNorm2d, "__setattr__", _breaks_at("_name", 1), raising=False)
    with pytest.raises(_BrokenError):
        convert(net, on_nonfinite="skip", on_single="raise", group_size=None, sync=True)
    assert _everything(net) == before


def test_revert_that_raises_midway_has_changed_nothing(monkeypatch):
    net = freeze(convert(_made(), **OPTIONS), affine=True)
    before = _everything(net)
    monkeypatch.setattr(BatchNorm2d, "__setattr__", _breaks_at("training", 4), raising=False)
    with pytest.raises(_BrokenError):
        revert(net)
    assert _everything(net) == before


def test_convert_takes_time_in_proportion_to_the_model(monkeypatch):
    # Counted, not timed: calls of named_modules, each of which visits all modules below.
    calls = []
    walk = nn.Module.named_modules

    def counted(self, *arguments, **keywords):
        calls.append(self)
        return walk(self, *arguments, **keywords)

    net = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()) for _ in range(50)))
    monkeypatch.setattr(nn.Module, "named_modules", counted)
    convert(net)
    of_containers = [m for m in calls if isinstance(m, nn.Sequential)]
    assert len(of_containers) <= 1 + 50  # the walk calls itself once for each block


# ---- converted models elsewhere -----------------------------------------------------------------


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
def test_copy_of_a_converted_model_computes_the_same(way, used):
    net = convert(_made(), on_single="population")
    if used:
        net(_batches(1)[0])
    other = way(net)
    assert explain(other) == explain(net)
    assert other.last.on_single == "population"
    _assert_same(_history(other), _history(net), 0.0)


@pytest.mark.parametrize("way", [_copied, _pickled, _saved])
def test_copy_of_a_converted_model_stands_by_itself(way):
    net = convert(_made()).eval()
    x = _batches(1)[0]
    other, before = way(net), net(x)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(net(x), before)
    assert not torch.equal(other(x), before)


@pytest.mark.parametrize("way", [_copied, _pickled, _saved])
def test_copy_of_a_converted_graph_module_computes_the_same(way):
    net = convert(torch.fx.symbolic_trace(_made()))
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
def test_converted_model_compiles_to_one_graph(compiled, training):
    theirs = _made().train(training)
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    _assert_same(_step(ours, compiled(ours), x), _step(theirs, theirs, x), BOUNDS[torch.float32])


@modes
def test_exported_model_computes_what_the_original_did(training):
    theirs = _made().train(training)
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    program = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(program(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


@modes
def test_symbolically_traced_model_computes_what_the_original_did(training):
    theirs = _made().train(training)
    ours = convert(copy.deepcopy(theirs))
    x = _batches(1)[0]
    traced = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(traced(x), theirs(x), rtol=0, atol=BOUNDS[torch.float32])


def test_converted_model_takes_other_parameters_by_functional_call():
    theirs = _made().eval()
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
def test_converted_model_trains_in_distributed_data_parallel(process_group):
    theirs = _made()
    ours = convert(copy.deepcopy(theirs))
    wrapped = nn.parallel.DistributedDataParallel(ours)
    x = _batches(1)[0]
    _assert_same(_step(ours, wrapped, x), _step(theirs, theirs, x), BOUNDS[torch.float32])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_model_equals_itself_without(reentrant):
    plain = convert(_made())
    other = copy.deepcopy(plain)
    x = _batches(1)[0]
    _assert_same(
        _step(other, lambda x: checkpoint(other, x, use_reentrant=reentrant), x),
        _step(plain, plain, x),
        0.0,
    )


def test_script_names_the_remedy_and_works_after_revert():
    net = convert(_made()).eval()
    with pytest.raises(
        ArgumentError, match=r"torch\.jit\.script cannot .*revert.*torch\.jit\.trac"
    ):
        torch.jit.script(net)
    assert type(net.last) is BatchNorm2d
    x = _batches(1)[0]
    y = net(x)
    scripted = torch.jit.script(revert(net))
    torch.testing.assert_close(scripted(x), y, rtol=0, atol=BOUNDS[torch.float32])


def _fake_quantizers(net):
    ao = pytest.importorskip("torch.ao.quantization", reason="torch without quantization")
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = ao.get_default_qat_qconfig_mapping("x86")
    prepared = fx.prepare_qat_fx(net, mapping, (_batches(1)[0],))
    return sum(isinstance(m, ao.FakeQuantizeBase) for m in prepared.modules())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
def test_quantization_warns_of_converted_layers_and_is_as_usual_after_revert():
    usual, net = _fake_quantizers(_made()), convert(_made())
    with pytest.warns(UserWarning, match=r"revert\(model\) before it prepares"):
        unfused = _fake_quantizers(copy.deepcopy(net))
    assert unfused > usual  # one behind each convolution, and one behind each batch norm
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batchnorm.torch")
        assert _fake_quantizers(revert(net)) == usual
