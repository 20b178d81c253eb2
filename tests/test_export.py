"""Exporters, tracers and quantization see our layers as torch's."""

import copy
import io
import subprocess
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from batchnorm.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    convert,
    fold,
    freeze,
    revert,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning"),
]
C, EPS = 3, 1e-3


def _filled(layer):
    """A layer in evaluation whose numbers are all different."""
    generator = torch.Generator().manual_seed(20150211)
    draw = lambda: torch.rand(C, generator=generator) + 0.5  # noqa: E731
    with torch.no_grad():
        for name in ("running_mean", "running_var", "weight", "bias"):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).copy_(draw())
        if layer.weight is not None:
            layer.weight[0].neg_()
    return layer.eval()


def _x(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- ways: what a model becomes, as names of operations and as a function -----------------------


def _export(net, args, strict=False):
    program = torch.export.export(net, args, strict=strict)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return [str(node.target) for node in calls], program.module()


def _decompose(net, args):
    program = torch.export.export(net, args).run_decompositions()
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in calls if "getitem" not in str(node.target)]
    return names, program.module()


def _trace(net, args):
    traced = torch.jit.trace(net, args)
    others = ("prim::Constant", "prim::GetAttr")
    return [n.kind() for n in traced.inlined_graph.nodes() if n.kind() not in others], traced


def _onnx(net, args, dynamo):
    """An ONNX model as bytes."""
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(net, args, dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(net, args, file, dynamo=False)
    return file.getvalue()


def _nodes(content):
    import onnx

    return list(onnx.load_from_string(content).graph.node)


def _through_onnx(dynamo):
    def way(net, args):
        content = _onnx(net, args, dynamo)
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run(*args):
            feed = {name: x.numpy() for name, x in zip(names, args, strict=True)}
            return torch.from_numpy(session.run(None, feed)[0])

        return [n.op_type for n in _nodes(content) if n.op_type not in ("Constant", "Cast")], run

    return way


WAYS = {
    "export": _export,
    "strict export": lambda *a: _export(*a, strict=True),
    "decomposed": _decompose,
    "trace": _trace,
    "onnx": _through_onnx(True),
    "old onnx": _through_onnx(False),
}
#: The batch norm, and the activations, by the way and in the order of `ACTIVATIONS`.
ACTIVATIONS = ["relu", "leaky_relu", "relu6", "hardswish", "silu"]
ATEN = [f"aten.{name}.default" for name in ACTIVATIONS]
ONNX = [["Relu"], ["LeakyRelu"], ["Clip"], ["HardSwish"], ["Sigmoid", "Mul"]]
NORM = {
    "export": "aten.batch_norm.default",
    "strict export": "aten.batch_norm.default",
    "decomposed": "aten._native_batch_norm_legit_no_training.default",
    "trace": "aten::batch_norm",
    "onnx": "BatchNormalization",
    "old onnx": "BatchNormalization",
}
ways = pytest.mark.parametrize("way", WAYS)


def _close(got, expected, dtype=torch.float32):
    # x·a + b, where |b| ≤ |bias| + |mean|·a ≤ 3·|y|max: 8 roundings of that are allowed.
    got, expected = got.detach().double(), expected.detach().double()
    eps = 8 * torch.finfo(dtype).eps * max(float(expected.abs().max()), 1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=eps)


LAYERS = {
    "1d": (BatchNorm1d, (4, C)),
    "1d of sequences": (BatchNorm1d, (4, C, 5)),
    "2d": (BatchNorm2d, (4, C, 5, 4)),
    "3d": (BatchNorm3d, (4, C, 2, 3, 2)),
    "synchronized": (SyncBatchNorm, (4, C, 5, 4)),
    "not affine": (lambda *a, **k: BatchNorm2d(*a, affine=False, **k), (4, C, 5, 4)),
    "groups": (lambda *a, **k: BatchNorm2d(*a, group_size=2, **k), (4, C, 5, 4)),
}


@ways
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_in_evaluation_is_an_ordinary_batch_norm(kind, way):
    make, shape = LAYERS[kind]
    net, x = nn.Sequential(_filled(make(C, eps=EPS))).eval(), _x(*shape)
    operations, run = WAYS[way](net, (x,))
    assert operations == [NORM[way]]
    _close(run(x), net(x))


@ways
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_activation_is_an_operation_of_its_own(activation, way):
    net = nn.Sequential(_filled(BatchNorm2d(C, eps=EPS, activation=activation))).eval()
    x = 4 * _x(4, C, 5, 4)
    operations, run = WAYS[way](net, (x,))
    number = ACTIVATIONS.index(activation)
    assert operations[0] == NORM[way]
    if "onnx" in way:
        assert operations[1:] == ONNX[number]
    elif way == "trace":
        assert operations[1:] == [f"aten::{activation}"]
    elif way != "decomposed":  # which takes some activations apart
        assert operations[1:] == [ATEN[number]]
    _close(run(x), net(x))


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = _filled(BatchNorm2d(C, eps=EPS, activation="relu"))

    def forward(self, x, residual):
        return self.bn(x, residual)


class _Masked(_Residual):
    def forward(self, x, mask):
        return self.bn(x, mask=mask)


@ways
def test_residual_is_added_before_the_activation(way):
    net, args = _Residual().eval(), (_x(4, C, 5, 4), 2 * _x(4, C, 5, 4).flip(0))
    operations, run = WAYS[way](net, args)
    assert operations[0] == NORM[way]
    names = [name.lower().replace("aten.", "").replace("aten::", "") for name in operations[1:]]
    assert [name.split(".")[0] for name in names] == ["add", "relu"]
    _close(run(*args), net(*args))


@pytest.mark.parametrize("way", ["export", "trace"])
def test_mask_is_applied_to_an_ordinary_batch_norm(way):
    net, x = _Masked().eval(), _x(4, C, 5, 4)
    mask = _x(4, 5, 4).flip(0) > 0
    operations, run = WAYS[way](net, (x, mask))
    assert operations.count(NORM[way]) == 1
    other = ~mask
    _close(run(x, other), net(x, other))


@ways
def test_frozen_layer_in_training_is_an_ordinary_batch_norm(way):
    net = freeze(nn.Sequential(_filled(BatchNorm2d(C, eps=EPS))), affine=True).train()
    x = _x(4, C, 5, 4)
    if way == "trace":
        operations, run = _trace(net, (x,))
    elif "onnx" in way:
        net.eval()  # which the exporters demand
        operations, run = WAYS[way](net, (x,))
    else:
        operations, run = WAYS[way](net, (x,))
    assert operations == [NORM[way]]
    _close(run(x), net(x))


@pytest.mark.parametrize("way", ["export", "strict export", "trace", "onnx", "old onnx"])
@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_layer_of_other_types_is_one_batch_norm(layer, given, way):
    if torch.bfloat16 in (layer, given) and "onnx" in way:
        pytest.skip("onnxruntime has no bfloat16")
    net, x = (
        nn.Sequential(_filled(BatchNorm2d(C, eps=EPS))).eval().to(layer),
        _x(4, C, 5, 4, dtype=given),
    )
    operations, run = WAYS[way](net, (x,))
    assert operations.count(NORM[way]) == 1
    casts = {"aten.to.dtype", "aten._assert_tensor_metadata.default", "aten::to"}
    assert set(operations) <= {NORM[way], *casts}
    assert run(x).dtype == given
    # The runtime casts statistics to float32.
    narrow = torch.float32 if "onnx" in way and given == torch.float64 else given
    _close(run(x), net(x), narrow)


@pytest.mark.parametrize("way", ["export", "trace"])
def test_batches_of_other_sizes_run(way):
    net = nn.Sequential(_filled(BatchNorm2d(C, activation="relu"))).eval()
    x = _x(4, C, 5, 4)
    if way == "trace":
        run = torch.jit.trace(net, x)
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        run = torch.export.export(net, (x,), dynamic_shapes=shapes).module()
    other = _x(7, C, 5, 4)
    _close(run(other), net(other))


# ---- ONNX: what the node says -------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.25])
def test_onnx_node_has_settings_and_statistics_of_the_layer(dynamo, momentum):
    onnx = pytest.importorskip("onnx")
    layer = _filled(BatchNorm2d(C, eps=EPS, momentum=momentum))
    model = onnx.load_from_string(_onnx(nn.Sequential(layer).eval(), (_x(4, C, 5, 4),), dynamo))
    (node,) = (n for n in model.graph.node if n.op_type == "BatchNormalization")
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert settings["epsilon"] == pytest.approx(EPS)
    assert settings["momentum"] == pytest.approx(1 - momentum)  # of the old value
    assert settings.get("training_mode", 0) == 0
    assert len(node.output) == 1
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    vectors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    for name, vector in zip(node.input[1:], vectors, strict=True):
        assert torch.equal(torch.from_numpy(values[name].copy()), vector)


# ---- files --------------------------------------------------------------------------------------


def test_files_load_where_batchnorm_is_not_imported(tmp_path):
    net = nn.Sequential(_filled(BatchNorm2d(C, activation="relu"))).eval()
    x = _x(4, C, 5, 4)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    torch.jit.save(torch.jit.trace(net, x), tmp_path / "net.ts")
    torch.save({"x": x, "y": net(x).detach()}, tmp_path / "values.pt")
    program = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
values = torch.load("values.pt")
for run in (torch.export.load("net.pt2").module(), torch.jit.load("net.ts")):
    assert torch.allclose(run(values["x"]), values["y"], atol=1e-5)
assert not any(name.split(".")[0] == "batchnorm" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)


# ---- training -----------------------------------------------------------------------------------


def test_exported_training_is_torchs_operator_and_updates_alike():
    net, x = nn.Sequential(BatchNorm2d(C, activation="relu")), _x(4, C, 5, 4)
    operations, run = _export(copy.deepcopy(net), (x,))
    assert operations == ["aten.add_.Tensor", "aten.batch_norm.default", "aten.relu.default"]
    _close(run(x), net(x))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(run.state_dict()[name], value)


@pytest.mark.parametrize(
    "options", [{"group_size": 2}, {"on_nonfinite": "raise"}, {"momentum": None}], ids=str
)
def test_exported_training_keeps_options_that_torchs_operator_lacks(options):
    net, x = nn.Sequential(BatchNorm2d(C, **options)), _x(4, C, 5, 4)
    operations, run = _export(copy.deepcopy(net), (x,))
    assert "batchnorm.forward.default" in operations
    _close(run(x), net(x))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(run.state_dict()[name], value)


# ---- folded models ------------------------------------------------------------------------------


class _Net(nn.Module):
    """One batch norm that is folded, and one that stays."""

    def __init__(self, kind=nn.BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, bias=False)
        self.bn = _filled(kind(C, eps=EPS))
        self.last = _filled(kind(C, eps=EPS))

    def forward(self, x):
        return self.last(self.bn(self.conv(x)).relu())


@ways
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d], ids=["torch", "ours"])
def test_folded_model_is_exported(kind, way):
    torch.manual_seed(0)
    net, x = _Net(kind).eval(), _x(4, C, 7, 7)
    folded, report = fold(net, x)
    assert report.folded == {"bn": "conv"}
    operations, run = WAYS[way](folded, (x,))
    assert operations[-1] == NORM[way]
    assert operations.count(NORM[way]) == 1
    _close(run(x), net(x))


# ---- quantization -------------------------------------------------------------------------------


class _Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = nn.Identity(), nn.Identity()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.running_var, 0.5, 1.5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(self.quant(x))))
        x = self.bn2(self.conv2(x))
        return self.dequant(self.linear(x.mean((2, 3))))


GROUPS = [["conv1", "bn1", "relu"], ["conv2", "bn2"]]


def _train(prepared, training):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(2):
        y = prepared(torch.randn(4, 3, 8, 8))
        if training:
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def _in_eager_mode(net, training, groups=GROUPS):
    ao = pytest.importorskip("torch.ao.quantization", reason="torch without quantization")
    net.quant, net.dequant = ao.QuantStub(), ao.DeQuantStub()
    net.train(training)
    net.qconfig = (ao.get_default_qat_qconfig if training else ao.get_default_qconfig)("x86")
    (ao.fuse_modules_qat if training else ao.fuse_modules)(net, groups, inplace=True)
    (ao.prepare_qat if training else ao.prepare)(net, inplace=True)
    _train(net, training)
    return ao.convert(net.eval())


def _by_fx(net, training):
    ao = pytest.importorskip("torch.ao.quantization", reason="torch without quantization")
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    net.train(training)
    mapping = ao.get_default_qat_qconfig_mapping if training else ao.get_default_qconfig_mapping
    prepare = fx.prepare_qat_fx if training else fx.prepare_fx
    prepared = prepare(net, mapping("x86"), (_x(4, 3, 8, 8),))
    _train(prepared, training)
    return fx.convert_fx(prepared.eval())


def _classes(net):
    return [type(m).__name__ for m in net.modules()]


flows = pytest.mark.parametrize("flow", [_in_eager_mode, _by_fx])
training = pytest.mark.parametrize("training", [False, True], ids=["after", "while training"])


@flows
@training
def test_reverted_model_is_quantized_as_torchs(flow, training):
    usual = flow(_Quantized(), training)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batchnorm.torch")
        ours = flow(revert(convert(_Quantized())), training)
    assert _classes(ours) == _classes(usual)
    x = _x(4, 3, 8, 8)
    assert torch.equal(ours(x), usual(x))


def _program(net, training):
    """The module that PT2E takes."""
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    x = _x(4, 3, 8, 8)
    return torch.export.export(net.train(training), (x,), dynamic_shapes=shapes).module()


def _xnnpack(training):
    module = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer", reason="torchao")
    config = module.get_symmetric_quantization_config(is_qat=training)
    return module.XNNPACKQuantizer().set_global(config)


def _x86(training):
    name = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
    module = pytest.importorskip(name, reason="torchao")
    config = module.get_default_x86_inductor_quantization_config(is_qat=training)
    return module.X86InductorQuantizer().set_global(config)


pt2e = [
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def _with_marks(function):
    for mark in pt2e:
        function = mark(function)
    return function


def _pt2e(net, quantizer):
    """The operations of a network quantized after training, and the network."""
    name = "torchao.quantization.pt2e.quantize_pt2e"
    quantize = pytest.importorskip(name, reason="needs torchao")
    prepared = quantize.prepare_pt2e(_program(net, False), quantizer(False))
    _train(prepared, False)
    quantized = quantize.convert_pt2e(prepared)
    return [str(n.target) for n in quantized.graph.nodes if n.op == "call_function"], quantized


quantizers = pytest.mark.parametrize("quantizer", [_xnnpack, _x86])


@_with_marks
@quantizers
def test_exported_model_of_ours_is_quantized_as_torchs(quantizer):
    expected, usual = _pt2e(_Quantized(), quantizer)
    found, ours = _pt2e(convert(_Quantized()), quantizer)
    assert found == expected
    assert "batch_norm" not in " ".join(found)
    x = _x(4, 3, 8, 8)
    assert torch.equal(ours(x), usual(x))


@_with_marks
@quantizers
def test_exported_folded_model_is_quantized_as_torchs(quantizer):
    expected, _ = _pt2e(_Quantized(), quantizer)
    folded, _ = fold(convert(_Quantized()).eval(), _x(4, 3, 8, 8))
    assert _pt2e(folded, quantizer)[0] == expected


def _annotations(net, quantizer):
    """What a quantizer wants of each operation while training: inputs and output observed?"""
    program, quantizer = _program(net, True), quantizer(True)
    program = quantizer.transform_for_annotation(program)
    quantizer.annotate(program)
    found = []
    for node in program.graph.nodes:
        note = node.meta.get("quantization_annotation")
        if node.op == "call_function":
            inputs = [] if note is None else sorted(n.name for n in note.input_qspec_map)
            output = None if note is None else note.output_qspec is not None
            found.append((str(node.target), str(node.args), inputs, output))
    return found


@_with_marks
def test_quantizer_that_looks_at_operations_sees_torchs_while_training():
    # prepare_qat_pt2e fuses what is annotated, by the operations alone.
    expected = _annotations(_Quantized(), _xnnpack)
    assert [name for name, *_ in expected].count("aten.batch_norm.default") == 2
    assert _annotations(convert(_Quantized()), _xnnpack) == expected


@_with_marks
def test_quantizer_that_looks_at_classes_needs_revert_while_training():
    expected = _annotations(_Quantized(), _x86)
    assert _annotations(convert(_Quantized()), _x86) != expected  # else the docs are wrong
    assert _annotations(revert(convert(_Quantized())), _x86) == expected
