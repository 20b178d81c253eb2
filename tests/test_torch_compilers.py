"""What compilers, exporters and tracers make of the layers, and what can be differentiated then."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import grad, jacfwd, jacrev, jvp, vmap  # noqa: E402

from batchnorm.torch import BatchNorm1d, BatchNorm2d, SyncBatchNorm, convert  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

# Values and derivatives of order one, in float64 by two orders of summation.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def forget_compiled():
    torch._dynamo.reset()


@pytest.fixture
def randn():
    """randn(*shape): float64 from one seed."""
    generator = torch.Generator().manual_seed(20150211)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def _layer(training, kind=BatchNorm1d):
    layer = kind(3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return layer.train(training)


def _torchs(training):
    """torch's layer; in training without the counter that its transforms refuse to change."""
    return (
        _untracked(_layer(training, nn.BatchNorm1d)) if training else _layer(False, nn.BatchNorm1d)
    )


def _untracked(layer):
    layer.track_running_stats = False
    layer.running_mean = layer.running_var = None
    return layer


# ---- ways in which torch sees the layer as its operators ----------------------------------------


def _exported(layer, x):
    if layer.training:
        layer.on_nonfinite = "raise"  # otherwise torch's operators are exported
    return torch.export.export(nn.Sequential(layer), (x,)).module()


def _traced(layer, x):
    return torch.jit.trace(layer, x, check_trace=False)


WAYS = {"exported": _exported, "traced": _traced}


@modes
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_jvp_equals_torchs(randn, training, backend):
    x, t = randn(5, 3), randn(5, 3)
    layer = _layer(training)
    f = torch.compile(lambda x, t: jvp(layer, (x,), (t,))[1], backend=backend)
    expected = jvp(_torchs(training), (x,), (t,))[1]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(f(x, t), expected, **CLOSE)


@modes
def test_compiled_forward_jacobian_equals_torchs(randn, training):
    x = randn(4, 3)
    f = torch.compile(jacfwd(_layer(training)), backend="eager")
    torch.testing.assert_close(f(x), jacrev(_torchs(training))(x), **CLOSE)


@modes
@pytest.mark.parametrize("way", WAYS)
def test_jvp_of_a_recorded_layer_equals_torchs(randn, training, way):
    x, t = randn(5, 3), randn(5, 3)
    recorded = WAYS[way](_layer(training), x)
    expected = jvp(_torchs(training), (x,), (t,))[1]
    torch.testing.assert_close(jvp(recorded, (x,), (t,))[1], expected, **CLOSE)


@modes
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_gradients_per_example_equal_torchs(randn, training, backend):
    x = randn(6, 4, 3)

    def per_example(layer):
        return vmap(grad(lambda x: layer(x).sin().sum()))

    # Under vmap no running statistics can be updated that are not batched.
    ours = _untracked(_layer(True)) if training else _layer(False)
    theirs = _torchs(training)
    f = torch.compile(per_example(ours), backend=backend)
    torch.testing.assert_close(f(x), per_example(theirs)(x), **CLOSE)


@modes
@pytest.mark.parametrize("way", WAYS)
def test_gradient_of_a_recorded_layer_equals_torchs(randn, training, way):
    x = randn(5, 3)
    recorded = WAYS[way](_layer(training), x)
    theirs = _torchs(training)
    expected = grad(lambda x: theirs(x).sin().sum())(x)
    found = grad(lambda x: recorded(x).sin().sum())(x)
    torch.testing.assert_close(found, expected, **CLOSE)


@modes
def test_compiled_vmap_equals_torchs(randn, training):
    x = randn(6, 4, 3)
    ours = _untracked(_layer(True)) if training else _layer(False)
    theirs = _torchs(training)
    f = torch.compile(vmap(ours), backend="aot_eager")
    torch.testing.assert_close(f(x), vmap(theirs)(x), **CLOSE)


# ---- compilers ----------------------------------------------------------------------------------


def _compilations(blocks, x):
    """How often a compiler starts when blocks are compiled and run one by one."""
    count = 0

    def backend(graph, example):
        nonlocal count
        count += 1
        return graph.forward

    for block in blocks:
        torch.compile(block, backend=backend, dynamic=False)(x)
    return count


@pytest.mark.parametrize("kind", [BatchNorm2d, SyncBatchNorm])
def test_identical_blocks_are_compiled_once(kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = kind(3)

        def forward(self, x):
            return self.bn(x)

    net = nn.Sequential(*(Block() for _ in range(12)))
    convert(net, on_nonfinite="skip")  # gives names
    x = torch.randn(4, 3, 5, 5)
    assert _compilations(net, x) == 1


def test_converted_blocks_are_compiled_once():
    net = convert(nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(3)) for _ in range(12))))
    assert _compilations(net, torch.randn(4, 3, 5, 5)) == 1


# ---- exporters ----------------------------------------------------------------------------------


def _state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_exported_training_layer_decomposes(randn):
    x, eager = randn(5, 3), _layer(True)
    program = torch.export.export(nn.Sequential(_layer(True)), (x,)).run_decompositions()
    module = program.module()
    torch.testing.assert_close(module(x), eager(x), **CLOSE)
    state = {name.removeprefix("0."): t for name, t in module.state_dict().items()}
    for name, t in eager.state_dict().items():
        torch.testing.assert_close(state[name], t)


@modes
def test_make_fx_traces_with_fake_tensors(randn, training):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, layer, eager = randn(5, 3), _layer(training), _layer(training)

    def f(x):
        return layer(x)

    graph = make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    layer.load_state_dict(eager.state_dict())  # traced with the layer's own tensors
    torch.testing.assert_close(graph(x), eager(x), **CLOSE)


def test_aot_module_runs_a_training_step(randn):
    from functorch.compile import aot_module, nop

    x, eager = randn(5, 3), _layer(True)
    ours = aot_module(_layer(True), nop)
    ours(x).sin().sum().backward()
    eager(x).sin().sum().backward()
    grads = [p.grad for p in ours.parameters()]
    torch.testing.assert_close(grads, [p.grad for p in eager.parameters()], **CLOSE)


def test_meta_layer_becomes_real_after_a_dry_run():
    layer = BatchNorm1d(3, device="meta")
    layer(torch.empty(5, 3, device="meta"))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer(torch.randn(5, 3))
    assert (int(layer.num_batches_tracked), layer.nonfinite_batches) == (1, 0)


def test_a_mode_that_changes_new_tensors_is_refused():
    from torch.overrides import TorchFunctionMode

    class Halves(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result.half() if isinstance(result, torch.Tensor) else result

    layer, x = BatchNorm2d(3), torch.randn(4, 3, 50, 50)
    with Halves(), torch.no_grad(), pytest.raises(ValueError, match="y: not the shape and type"):
        layer(x)


@pytest.mark.parametrize("how", ["set_default_device", "context"])
def test_default_device_does_not_move_a_layers_output(how):
    layer, x = BatchNorm2d(8), torch.randn(4, 8, 192, 192)  # above 4 MiB Python makes the output
    expected = copy.deepcopy(layer)(x)
    if how == "context":
        with torch.device("meta"):
            y = layer(x)
    else:
        torch.set_default_device("meta")
        try:
            y = layer(x)
        finally:
            torch.set_default_device(None)
    assert torch.equal(y, expected)
