"""The PyTorch face on a GPU, where it is made of torch's own operations."""

import copy
import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import nn  # noqa: E402
from torch.func import grad, jvp, vmap  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import zoo  # noqa: E402
from batchnorm.torch import (  # noqa: E402
    BatchNorm2d,
    NonFiniteError,
    SyncBatchNorm,
    accumulate,
    check,
    convert,
    freeze,
    recalibrate,
    revert,
    watch,
)
from batchnorm.torch.functional import batch_norm  # noqa: E402

modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])

# Sums of about 1e3 float32 values in another order: 1e3 · 2^-24, of values of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def randn():
    """randn(*shape): float32 on the GPU from one seed."""
    generator = torch.Generator().manual_seed(20150211)
    return lambda *shape: torch.randn(shape, generator=generator).cuda()


def _state(layer):
    return {name: t.detach().double().cpu() for name, t in layer.state_dict().items()}


def _pair(training, **keywords):
    ours = BatchNorm2d(5, device="cuda", **keywords)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.uniform_(-1, 1)
        ours.running_var.uniform_(0.5, 2)
    torchs = nn.BatchNorm2d(5, device="cuda")
    torchs.load_state_dict(ours.state_dict())
    return ours.train(training), torchs.train(training)


@modes
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_steps_equal_torchs(randn, training, layout, dtype):
    ours, torchs = _pair(training)
    for _ in range(3):
        x = (3 * randn(8, 5, 7, 9) + 2).to(dtype).contiguous(memory_format=layout)
        g = randn(8, 5, 7, 9).to(dtype)
        found = []
        for layer in (ours, torchs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(g)
            found.append((y, leaf.grad))
        assert found[0][0].stride() == found[1][0].stride()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)
    torch.testing.assert_close(_state(ours), _state(torchs), **CLOSE)


@modes
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_equals_the_one_on_a_cpu(randn, training, activation, masked):
    gpu, _ = _pair(training, activation=activation)
    cpu = copy.deepcopy(gpu).cpu()
    x, residual, g = (randn(8, 5, 7, 9) for _ in range(3))
    mask = (randn(8, 7, 9) > 0).float() if masked else None
    found = []
    for layer, device in ((gpu, "cuda"), (cpu, "cpu")):
        leaves = [t.to(device).requires_grad_() for t in (x.clone(), residual.clone())]
        y = layer(*leaves, None if mask is None else mask.to(device))
        y.backward(g.to(device))
        grads = [t.grad for t in (*leaves, *layer.parameters())]
        found.append([t.detach().cpu() for t in (y, *grads)] + [*_state(layer).values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@modes
@pytest.mark.parametrize("momentum", [0.1, None])
def test_propagating_layer_is_torchs_to_the_bit(randn, training, momentum):
    ours, torchs = _pair(training, on_nonfinite="propagate", activation="silu")
    ours.momentum = torchs.momentum = momentum
    x, g = randn(8, 5, 7, 9), randn(8, 5, 7, 9)
    found = []
    for layer, activate in ((ours, lambda y: y), (torchs, F.silu)):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            y = activate(layer(leaf))
        y.backward(g)
        found.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        found[-1] += layer.state_dict().values()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_groups_equal_those_on_a_cpu(randn):
    gpu, _ = _pair(True, group_size=3)
    cpu = copy.deepcopy(gpu).cpu()
    x = randn(8, 5, 4, 4)
    torch.testing.assert_close(gpu(x).cpu(), cpu(x.cpu()), **CLOSE)
    torch.testing.assert_close(_state(gpu), _state(cpu), **CLOSE)


@pytest.mark.parametrize("reproducible", [False, True])
def test_synchronized_layer_equals_plain(randn, reproducible, tmp_path):
    os.environ.setdefault("MASTER_ADDR", "localhost")
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        _, torchs = _pair(True)
        ours = SyncBatchNorm(5, device="cuda", reproducible=reproducible)
        ours.load_state_dict(torchs.state_dict())
        x, g = 2 * randn(8, 5, 7, 9) + 1, randn(8, 5, 7, 9)
        found = []
        for layer in (ours, torchs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(g)
            found.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        torch.testing.assert_close(_state(ours), _state(torchs), **CLOSE)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch calls
@modes
def test_transforms_equal_torchs(randn, training):
    x, t = randn(4, 5, 3, 3), randn(4, 5, 3, 3)
    mean, var = (None, None) if training else (randn(5), randn(5).abs() + 0.5)
    functions = [
        lambda x: batch_norm(x, mean, var, training=training),
        lambda x: F.batch_norm(x, mean, var, training=training),
    ]
    of_tangent = [jvp(f, (x,), (t,))[1] for f in functions]
    of_gradient = [grad(lambda x, f=f: f(x).sin().sum())(x) for f in functions]
    batched = [vmap(f)(torch.stack([x, t])) for f in functions]
    for a, b in (of_tangent, of_gradient, batched):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e21])
def test_batch_that_cannot_be_taken_up_is_left_out(randn, bad):
    layer, _ = _pair(True)
    before = _state(layer)
    x = randn(4, 5, 3, 3)
    x[0, 2, 0, 0] = bad
    layer(x)
    torch.testing.assert_close(_state(layer), before, rtol=0, atol=0)
    assert layer.nonfinite_batches == 1


def test_batch_that_cannot_be_taken_up_raises_when_asked(randn):
    layer, _ = _pair(True, on_nonfinite="raise")
    before = _state(layer)
    x = randn(4, 5, 3, 3)
    x[0, 2, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="channel 2"):
        layer(x)
    torch.testing.assert_close(_state(layer), before, rtol=0, atol=0)


# torch warns that the mode is a prototype.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_running_update_does_not_wait_for_the_gpu(randn):
    layer, _ = _pair(True)
    x = randn(8, 5, 7, 9)
    layer(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_accumulated_statistics_are_those_of_the_large_batch(randn):
    layer, _ = _pair(True)
    large = copy.deepcopy(layer)
    x = randn(12, 5, 4, 4)
    with accumulate(layer):
        for part in x.split(5):
            layer(part)
    large(x)
    torch.testing.assert_close(_state(layer), _state(large), **CLOSE)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_recalibrated_statistics_are_those_on_a_cpu(randn, method):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3),
                        nn.BatchNorm2d(5)).cuda()  # fmt: skip
    net = convert(net)
    cpu = copy.deepcopy(net).cpu()
    batches = [randn(n, 3, 9, 9) for n in (8, 3, 8)]
    recalibrate(net, batches, method=method)
    recalibrate(cpu, [b.cpu() for b in batches], method=method)
    torch.testing.assert_close(_state(net), _state(cpu), **CLOSE)


def test_frozen_layer_keeps_its_statistics(randn):
    layer, _ = _pair(True)
    freeze(layer)
    before = _state(layer)
    layer(randn(4, 5, 3, 3)).sum().backward()
    torch.testing.assert_close(_state(layer), before, rtol=0, atol=0)


def test_converted_network_trains_as_torchs(randn):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    ).cuda()
    net(randn(2, 3, 8, 8))
    ours, theirs = convert(copy.deepcopy(net)), net
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            x = torch.randn(16, 3, 8, 8, generator=generator).cuda()
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(_state(revert(ours)), _state(theirs), rtol=1e-3, atol=1e-3)


def test_compiled_layer_equals_eager(randn):
    layer, _ = _pair(True)
    eager = copy.deepcopy(layer)
    x = randn(8, 5, 7, 9)
    y = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(y, eager(x), **CLOSE)
    torch.testing.assert_close(_state(layer), _state(eager), **CLOSE)


# ---- check and watch ----------------------------------------------------------------------------


def _on_gpu(data):
    return [(x.cuda(), y.cuda()) for x, y in data]


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "batchnorm"])
def test_watch_records_what_the_layer_has_seen(randn, ours):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)).cuda()
    if ours:
        convert(net)
    x = randn(16, 3, 9, 9)
    inputs = net[0](x).detach().double()
    with watch(net, every=1, probe=x) as recording:
        for _ in range(2):
            net.zero_grad()
            net(x).square().mean().backward()
    assert recording.steps == [0, 1]
    for snapshot in recording.snapshots:
        assert snapshot.values == 16 * 49
        mean, var = inputs.mean((0, 2, 3)).cpu(), inputs.var((0, 2, 3), unbiased=False).cpu()
        torch.testing.assert_close(torch.tensor(snapshot.mean).double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(snapshot.var).double(), var, rtol=1e-4, atol=1e-6)
    expected = float(net[1].weight.grad.norm())
    assert recording.snapshots[-1].gradient_weight == pytest.approx(expected, rel=1e-4)
    assert recording.snapshots[-1].moved == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["cnn", "resnet", "mlp"])
def test_healthy_network_has_no_findings(name):
    torch.manual_seed(0)
    make, of = zoo.HEALTHY[name]
    model, data = make().cuda(), _on_gpu(zoo.loader(*of()))
    assert not check(model, data, progress=False)
    zoo.train(model, data, 80)
    assert not check(model, data, progress=False)
    assert not check(model.eval(), data, progress=False)


@pytest.mark.parametrize(
    "name",
    ["other_data_at_test_time", "dead_channels", "checkpointed", "biased_variance", "two_images"],
)
def test_sick_network_is_found_by_its_code(name):
    torch.manual_seed(0)
    case = zoo.SICK[name]()
    found = check(case.model.cuda(), _on_gpu(case.data), progress=False)
    assert case.code in {finding.code for finding in found}, str(found)
    assert {finding.code for finding in found} <= {case.code, *case.also}, str(found)
