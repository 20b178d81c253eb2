"""batchnorm fold on the command line."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")

import batchnorm  # noqa: E402
from batchnorm import cli  # noqa: E402
from batchnorm.torch import fold  # noqa: E402

PROGRAM = """
import sys
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        print("forward")
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        if scale is not None:
            y = y * scale
        return self.bn2(y), y


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def _trained(kind):
    torch.manual_seed(0)
    net = kind()
    for _ in range(2):
        net(torch.randn(8, 3, 9, 9))
    return net


def make():
    return _trained(Net)


def plain():
    return _trained(Plain)


def untrained():
    return Plain()


def loops():
    class Loops(Plain):
        def forward(self, x):
            while x.abs().max() > 1e9 or self.training:
                x = x / 2
            return super().forward(x)

    return Loops()


def fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            raise KeyError("no such thing")

    return Fails()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "fold_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _run(*arguments):
    return cli.main(["fold", *map(str, arguments)])


def _written(folder):
    return {path.name for path in folder.iterdir()} - {"fold_program.py", "__pycache__"}


X = ("--input", "2x3x9x9")


def _x(*shape):
    return torch.randn(shape or (2, 3, 9, 9), generator=torch.Generator().manual_seed(0))


def _model(name="plain"):
    import fold_program

    return getattr(fold_program, name)().eval()


# ---- what is shown ------------------------------------------------------------------------------


def test_report_is_the_summary_and_what_is_behind_it(folder, capsys):
    assert _run("fold_program:make", "--out", "net.pt", *X) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "folded 1 of 2 batch norms; 1 refused; 0 have no layer next to them"
    _, report = fold(_model("make"), _x())
    assert lines[:-1] == report.lines(80, 10)
    assert lines[-1] == "wrote net.pt"
    assert "forward" not in shown.out


@pytest.mark.parametrize("place", ["-", "report.json"])
def test_report_as_json(folder, capsys, place):
    assert _run("fold_program:make", "--out", "net.pt2", *X, "--json", place) == 0
    out = capsys.readouterr().out
    found = json.loads(out if place == "-" else (folder / place).read_text())
    _, report = fold(_model("make"), _x())
    more = {"version": batchnorm.__version__, "written": ["net.pt2"], "written_error": 0.0}
    assert found == {**report.to_dict(), **more}
    assert ("wrote net.pt2" in out) == (place != "-")


# ---- state dicts --------------------------------------------------------------------------------


def _load(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".PT"])
def test_state_dict_is_that_of_the_folded_model(folder, capsys, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    out = folder / f"net{suffix}"
    assert _run("fold_program:plain", "--out", out, *X) == 0
    shown = capsys.readouterr()
    assert "1 layer got a bias (0)" in shown.out
    assert "the original model has no place for new biases" in shown.err
    state = _load(out)
    folded, _ = fold(_model(), _x())
    assert state.keys() == folded.state_dict().keys() == {"0.weight", "0.bias"}
    for name, value in folded.state_dict().items():
        assert torch.equal(state[name], value)


def test_of_many_layers_with_a_bias_some_are_named(folder, capsys):
    (folder / "deep.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    pairs = ((nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)) for _ in range(23))\n"
        "    return nn.Sequential(*(layer for pair in pairs for layer in pair))\n"
    )
    assert _run("deep:make", "--out", "net.pt", *X) == 0
    assert "23 layers got a bias (0, 2, 4, …)\n" in capsys.readouterr().out


def test_weights_are_loaded_into_what_the_factory_makes(folder):
    torch.save({"state_dict": _model().state_dict()}, "trained.pt")
    arguments = ("--weights", "trained.pt", "--out", "net.pt")
    assert _run("fold_program:untrained", *arguments, *X) == 0
    assert torch.equal(_load(folder / "net.pt")["0.weight"], fold(_model(), _x())[0][0].weight)


def test_weights_are_rounded_once_to_the_type(folder):
    assert _run("fold_program:plain", "--out", "net.pt", *X, "--dtype", "bfloat16") == 0
    expected, _ = fold(_model(), _x(), dtype=torch.bfloat16)
    for name, value in _load(folder / "net.pt").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected.state_dict()[name])


# ---- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "free"), [(2, True), (1, False)])
def test_program_runs_on_batches_of_other_sizes(folder, capsys, size, free):
    assert _run("fold_program:plain", "--out", "net.pt2", "--input", f"{size}x3x9x9") == 0
    err = capsys.readouterr().err
    assert ("a first axis of any length" in err) == free
    assert "run by torch.export, it differs by 0 from the folded model" in err
    x = _x(5 if free else 1, 3, 9, 9)
    program = torch.export.load(folder / "net.pt2").module()
    torch.testing.assert_close(program(x), _model()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_onnx_file_computes_what_the_folded_model_does(folder, capsys, dtype):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    more = () if dtype is None else ("--dtype", dtype)
    assert _run("fold_program:plain", "--out", "net.onnx", *X, *more) == 0
    err = capsys.readouterr().err
    if dtype == "bfloat16":
        assert "not compared: onnxruntime cannot run it" in err
        assert "session.run" not in err
        return
    assert "run by onnxruntime, it differs by" in err
    half = "takes float16 inputs: session.run(None, {name: x.astype('float16')})"
    assert (half in err) == (dtype == "float16")
    session = runtime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    x = _x(5, 3, 9, 9).to(getattr(torch, dtype or "float32"))
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, 9, 9]
    (y,) = session.run(None, {given.name: x.numpy()})
    expected = _model()(x.float()).detach()
    # Half precision: products of numbers rounded to 2⁻¹¹, 27 of which are added.
    tolerance = 1e-5 if dtype is None else 5e-3
    torch.testing.assert_close(torch.from_numpy(y).float(), expected, rtol=0, atol=tolerance)


def test_batch_norms_that_stay_are_exported_as_ordinary_ones(folder):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    (folder / "ours.py").write_text(
        "from batchnorm.torch import BatchNorm2d\n"
        "def make(): return BatchNorm2d(3, activation='relu')\n"
    )
    assert _run("ours:make", "--out", "net.onnx", *X) == 0
    nodes = [node.op_type for node in onnx.load("net.onnx").graph.node]
    assert nodes == ["BatchNormalization", "Relu"]


def test_batch_norms_that_were_refused_are_not_folded_by_the_exporter(folder):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    (folder / "hooked.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))\n"
        "    net[0].register_forward_hook(lambda *arguments: None)\n"
        "    return net\n"
    )
    assert _run("hooked:make", "--out", "net.onnx", *X) == 0
    nodes = [node.op_type for node in onnx.load("net.onnx").graph.node]
    assert nodes == ["Conv", "BatchNormalization"]


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_inputs_are_read_from_a_file(folder, capsys, named):
    x, scale = _x().numpy(), np.float32([2.0])
    if named:
        np.savez("data.npz", scale=scale, x=x)
    else:
        np.savez("data.npz", x, scale)
    arguments = ("--out", "net.pt2", "--verify", "data.npz", "--json", "-")
    assert _run("fold_program:make", *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    _, report = fold(_model("make"), {"x": _x(), "scale": torch.tensor([2.0])})
    assert report.to_dict().items() <= found.items()
    torch.export.load("net.pt2")  # also of keyword arguments


def test_several_shapes_are_several_arguments(folder):
    assert _run("fold_program:make", "--out", "net.pt", *X, "--input", "1x4x1x1") == 0
    with pytest.raises(RuntimeError):
        _model("make")(_x(), _x(1, 5, 1, 1))  # it is the second argument


# ---- ONNX files ---------------------------------------------------------------------------------


@pytest.fixture
def onnx_file(folder):
    """A network in which norm can be folded and kept cannot."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("BatchNormalization", ["a", "s", "z", "m", "s"], ["b"], name="norm"),
        helper.make_node("Conv", ["b", "v"], ["c"], name="again"),
        helper.make_node("BatchNormalization", ["c", "s", "z", "m", "s"], ["y"], name="kept"),
    ]
    given = {"w": [2, 2, 1, 1], "v": [2, 2, 1, 1], **{name: [2] for name in "szm"}}
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT, dims, np.arange(1.0, 1 + np.prod(dims)))
        for name, dims in given.items()
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in "xyc"
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def test_onnx_file_is_folded_and_compared(onnx_file, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    np.savez("data.npz", x=np.ones((1, 2, 4, 4), np.float32))
    assert _run("net.onnx", "--out", "folded.onnx", "--verify", "data.npz") == 0
    out = capsys.readouterr().out
    assert "  kept  refused: " in out
    error, bound, *names = out.splitlines()[-2].split()
    assert float(error) <= float(bound)
    assert names == ["norm", "into", "conv"]
    nodes = [node.op_type for node in onnx.load("folded.onnx").graph.node]
    assert nodes == ["Conv", "Conv", "BatchNormalization"]


@pytest.mark.parametrize("option", ["data.npz", "--input"])
def test_inputs_of_another_shape_are_named(onnx_file, capsys, option):
    np.savez("data.npz", x=np.ones((1, 2, 4, 5), np.float32))
    given = ("--input", "1x2x4x5") if option == "--input" else ("--verify", option)
    _is_refused(
        capsys,
        _run("net.onnx", "--out", "o.onnx", *given),
        f"{option}: inputs['x'] must have shape",
    )


def test_control_characters_of_names_are_escaped(onnx_file, capsys):
    onnx = pytest.importorskip("onnx")
    model = onnx.load("net.onnx")
    for node in model.graph.node:
        node.name += "\n\x1b[1m"
    onnx.save(model, "net.onnx")
    assert _run("net.onnx", "--out", "folded.onnx", "--strict") == 1
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "norm\\n\\x1b[1m into conv\\n\\x1b[1m\n" in shown.out
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("given", ["arr_0", ".npy", "random"])
def test_inputs_of_an_onnx_file_need_no_names(onnx_file, capsys, given):
    pytest.importorskip("onnxruntime")
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
    np.savez("data.npz", x)
    np.save("data.npy", x)
    inputs = {
        "arr_0": ["--verify", "data.npz"],
        ".npy": ["--verify", "data.npy"],
        "random": ["--input", "1x2x4x4"],
    }
    assert _run("net.onnx", "--out", "folded.onnx", *inputs[given], "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"]
    assert found["written"] == ["folded.onnx"]
    named = _fold_onnx_file(onnx_file, {"x": x})
    assert found["error"] == named.error


def _fold_onnx_file(path, inputs):
    from batchnorm.onnx import fold_file

    return fold_file(path, path.with_name("other.onnx"), inputs)


def test_arrays_are_inputs_in_the_order_of_the_graph():
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    from batchnorm.onnx.fold.examples import in_order

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "bacw"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    model = helper.make_model(helper.make_graph([], "g", values, [], [weight]))
    assert in_order({"arr_2": 2, "arr_0": 0, "arr_1": 1}, model) == {"b": 0, "a": 1, "c": 2}
    for given in ({"arr_0": 0}, {"b": 0, "arr_0": 1, "arr_1": 2}, {"arr_1": 0, "arr_2": 1}):
        assert in_order(given, model) == given


@pytest.mark.parametrize(
    ("kind", "shapes", "words"),
    [
        ("INT64", ["1x2x4x4"], ["'x' is of type int64", "--verify"]),
        ("FLOAT", ["1x2x4x4"] * 2, ["once for each input of the model, which are x; got 2"]),
        ("FLOAT", ["9999999999x999999999"], ["fits into memory"]),
    ],
)
def test_random_inputs_of_an_onnx_file_say_what_they_cannot_be(
    onnx_file, capsys, kind, shapes, words
):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    model.graph.input[0].type.tensor_type.elem_type = getattr(onnx.TensorProto, kind)
    onnx.save(model, onnx_file)
    more = [part for shape in shapes for part in ("--input", shape)]
    _is_refused(capsys, _run("net.onnx", "--out", "folded.onnx", *more), *words)


def test_model_without_batch_norms_says_so(folder, capsys):
    (folder / "linear.py").write_text("from torch import nn\ndef make(): return nn.Linear(9, 9)")
    _is_refused(capsys, _run("linear:make", "--out", "net.pt", *X), "no batch norms")
    assert not _written(folder) - {"linear.py"}


def test_onnx_file_whose_outputs_overflow_is_not_written(onnx_file, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    from batchnorm.onnx.fold import folding

    monkeypatch.setattr(folding, "compare_outputs", lambda one, other: (np.inf, np.inf))
    assert _run("net.onnx", "--out", "folded.onnx", "--input", "1x2x4x4") == 1
    assert "not finite in float32 where" in capsys.readouterr().err
    assert _written(onnx_file.parent) == {"net.onnx"}


def test_onnx_file_without_batch_norms_says_why(onnx_file, capsys):
    assert _run("net.onnx", "--out", "folded.onnx") == 0
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    del model.graph.node[3], model.graph.node[1], model.graph.output[0]
    model.graph.node[1].input[0] = "a"
    onnx.save(model, "plain.onnx")
    words = ["no batch norms", "optimize=False"]
    _is_refused(capsys, _run("plain.onnx", "--out", "other.onnx"), *words)
    assert _written(onnx_file.parent) == {"net.onnx", "folded.onnx", "plain.onnx"}


def test_data_of_an_onnx_file_are_named_as_written(onnx_file, capsys):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
        )
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(model, "outside.onnx", **options)
    assert _run("outside.onnx", "--out", "folded.onnx", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == ["folded.onnx", "folded.onnx.data"]
    before = (onnx_file.parent / "weights.bin").read_bytes()
    for more in (
        ("--out", "other.onnx", "--json", "weights.bin"),
        ("--out", "other.onnx", "--json", "outside.onnx"),
        ("--out", "outside.onnx"),
    ):
        _is_refused(capsys, _run("outside.onnx", *more), "would replace what TARGET reads")
    arguments = ("--out", "other.onnx", "--json", "other.onnx.data")
    _is_refused(capsys, _run("outside.onnx", *arguments), "--out and --json must be two files")
    assert (onnx_file.parent / "weights.bin").read_bytes() == before


def test_inputs_of_an_onnx_file_are_not_replaced(onnx_file, capsys):
    np.savez("data.npz", np.ones((1, 2, 4, 4), np.float32))
    (onnx_file.parent / "link").symlink_to(onnx_file.parent)
    arguments = ("--out", "o.onnx", "--verify", "data.npz", "--json", "link/data.npz")
    _is_refused(capsys, _run("net.onnx", *arguments), "--json would replace what --verify reads")


def test_onnx_file_is_folded_without_inputs(onnx_file, capsys):
    assert _run("net.onnx", "--out", "folded.onnx") == 0
    assert "not verified: there were no inputs" in capsys.readouterr().out


# ---- failures -----------------------------------------------------------------------------------


def _is_refused(capsys, status, *words):
    err = capsys.readouterr().err.strip()
    assert status == 2
    assert err.splitlines()[-1].startswith("batchnorm: ")
    for word in words:
        assert word in err.splitlines()[-1]


MODEL, ONNX = "fold_program:plain", "net.onnx"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((MODEL, *X), ["--out"]),
        ((MODEL, "--out", "net.bin", *X), [".safetensors, .pt, .pth, .pt2 or .onnx", "net.bin"]),
        ((MODEL, "--out", "no/net.pt", *X), ["--out must", "existing directory"]),
        ((MODEL, "--out", "net.pt"), ["--verify data.npz or --input", "neither"]),
        ((MODEL, "--out", "net.pt", *X, "--verify", "data.npz"), ["both"]),
        ((MODEL, "--out", "net.pt", "--input", "3,9,9"), ["positive numbers", "'3,9,9'"]),
        ((MODEL, "--out", "net.pt", "--input", "0x3"), ["positive numbers"]),
        ((MODEL, "--out", "net.pt", "--input", "9999999999x999999999"), ["fits into memory"]),
        ((MODEL, "--out", "net.pt", "--input", "9" * 30), ["fits into memory"]),
        ((MODEL, "--out", "net.pt", "--input", "2x4x9x9"), ["cannot be run on 2x4x9x9"]),
        (("fold_program:fails", "--out", "net.pt", *X), ["KeyError: 'no such thing'"]),
        ((MODEL, "--out", "net.pt", *X, "--tol", "1"), ["--tol goes with --strict"]),
        (
            (MODEL, "--out", "net.pt", *X, "--tol", "-1", "--strict"),
            ["batchnorm: --tol must be a number that is not negative, got -1"],
        ),
        (
            (MODEL, "--out", "net.pt", *X, "--dtype", "int8"),
            ["batchnorm: --dtype must be float16, bfloat16 or float32, got 'int8'"],
        ),
        ((MODEL, "--out", "net.pt", *X, "--json", "net.pt"), ["two files"]),
        ((MODEL, "--out", "net.pt", *X, "--json", "no/r.json"), ["--json must", "existing"]),
        ((MODEL, "--out", "net.pt", *X, "--weights", "no.pt"), ["there is no such file"]),
        ((MODEL, "--out", "net.pt", "--verify", "no.npz"), ["there is no such file"]),
        (("fold_program:no", "--out", "net.pt", *X), ["must name a function"]),
        (("net.pt", "--out", "other.pt", *X), ["package.module:factory", "--weights net.pt"]),
        (("net.pt2", "--out", "other.pt", *X), ["give the model that was exported"]),
        (("nothing", "--out", "other.pt"), ["package.module:factory", ".onnx"]),
        ((ONNX, "--out", "net.pt"), ["--out must end in .onnx"]),
        ((ONNX, "--out", "o.onnx", "--weights", "w.pt"), ["--weights goes with"]),
        ((ONNX, *X, "--verify", "data.npz", "--out", "o.onnx"), ["both"]),
        ((ONNX, "--input", "1,2", "--out", "o.onnx"), ["there is no such file"]),
        ((ONNX, "--out", "o.onnx", "--dtype", "float16"), ["--dtype goes with"]),
        ((ONNX, "--out", "o.onnx", "--strict", "--tol", "1"), ["--verify"]),
        ((ONNX, "--out", "o.onnx"), ["there is no such file"]),
        ((MODEL, "--out", "net.pt", "--input", "9" * 5000), ["fits into memory"]),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_written(folder, capsys, arguments, words):
    if arguments[-1] == "o.onnx":
        pytest.importorskip("onnx")
    _is_refused(capsys, _run(*arguments), *words)
    assert not _written(folder)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": [1.0], "x": [1.0]}, ["arr_0, arr_1", "not both"]),
        ({"arr_1": [1.0]}, ["arr_0, arr_1"]),
        ({}, ["got none"]),
        ({"x": ["text"]}, ["must hold numbers"]),
    ],
)
def test_wrong_inputs_are_one_line(folder, capsys, arrays, words):
    np.savez("data.npz", **{name: np.array(values) for name, values in arrays.items()})
    _is_refused(capsys, _run(MODEL, "--out", "net.pt", "--verify", "data.npz"), *words)
    assert _written(folder) == {"data.npz"}


def test_file_of_weights_is_no_file_of_inputs(folder, capsys):
    torch.save({"x": torch.ones(1, 3, 9, 9)}, "data.pt")
    words = "data.pt: must be an .npz file", "another kind of zip file"
    _is_refused(capsys, _run(MODEL, "--out", "net.pt2", "--verify", "data.pt"), *words)


def test_inputs_without_a_finite_output_are_told_from_overflow(folder, capsys):
    np.savez("data.npz", np.full((2, 3, 9, 9), np.nan, np.float32))
    assert _run("fold_program:plain", "--out", "net.pt2", "--verify", "data.npz") == 1
    err = capsys.readouterr().err
    assert "no output of the original is finite on these inputs" in err
    assert _written(folder) == {"data.npz"}


def test_report_has_names_of_files_that_are_no_text(folder):
    name = os.fsdecode(b"\xff.pt")
    assert _run(MODEL, "--out", name, *X, "--json", "report.json") == 0
    assert json.loads((folder / "report.json").read_text("utf-8"))["written"] == [name]


@pytest.mark.parametrize("option", ["--weights", "--verify"])
def test_what_is_read_is_not_replaced(folder, capsys, option):
    torch.save(_model().state_dict(), "net.pt")
    more = X if option == "--weights" else ()
    before = (folder / "net.pt").read_bytes()
    status = _run(MODEL, "--out", folder / "net.pt", option, "net.pt", *more)
    _is_refused(capsys, status, f"would replace what {option} reads")
    assert (folder / "net.pt").read_bytes() == before


@pytest.mark.parametrize("json_too", [False, True])
def test_model_that_cannot_be_exported_names_what_can_be_written(folder, capfd, json_too):
    more = ("--json", "-") if json_too else ()
    status = _run("fold_program:loops", "--out", "net.pt2", *X, *more)
    shown = capfd.readouterr()
    assert status == 2
    # Models may print on stderr; torch does not.
    (line,) = [line for line in shown.err.splitlines() if line != "forward"]
    assert "torch.export cannot follow" in line
    assert ".safetensors or .pt" in line
    if json_too:
        assert json.loads(shown.out)["written"] == []
    else:
        assert shown.out.startswith("folded ")
    assert not _written(folder)


def test_factory_of_an_exported_program_is_refused(folder, capsys):
    (folder / "exported.py").write_text(
        "import torch\n"
        "from fold_program import plain\n"
        "def make(): return torch.export.export(plain(), (torch.ones(2, 3, 9, 9),)).module()\n"
    )
    _is_refused(capsys, _run("exported:make", "--out", "net.pt", *X), "Fold first, then export")


def test_program_of_the_model_is_not_replaced(folder, capsys):
    (folder / "precious.py").write_text("from fold_program import plain")
    status = _run("precious:plain", "--out", "net.pt", *X, "--json", "precious.py")
    _is_refused(capsys, status, "--json would replace what TARGET reads")
    assert (folder / "precious.py").read_text() == "from fold_program import plain"


def test_model_without_a_translation_is_one_line(folder, capfd):
    pytest.importorskip("onnxscript")
    (folder / "untranslated.py").write_text(
        "import torch\n"
        "from fold_program import Plain\n"
        "class Qr(Plain):\n"
        "    def forward(self, x): return torch.linalg.qr(super().forward(x))[1]\n"
        "def make(): return Qr()\n"
    )
    assert _run("untranslated:make", "--out", "net.onnx", "--input", "1x3x9x9") == 2
    shown = capfd.readouterr()
    assert shown.out.startswith("folded 1 of 1")
    assert len(shown.err.splitlines()) == 1
    assert "linalg_qr" in shown.err
    assert "Write a .pt2 file" in shown.err


@pytest.mark.parametrize(
    ("made", "size", "status"),
    [("plain", 1, 0), ("depends", 2, 2)],  # of which torch logs a line, and prints a graph
)
def test_torch_says_nothing_of_an_export(folder, made, size, status):
    (folder / "quiet.py").write_text(
        "from fold_program import Plain, plain\n"
        "class Depends(Plain):\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return y + 1 if y.sum().int().item() > 3 else y\n"
        "def depends(): return Depends()\n"
    )
    arguments = [f"quiet:{made}", "--out", "net.pt2", "--input", f"{size}x3x9x9"]
    # Of its own, since torch logs to the stderr that it began with.
    run = subprocess.run(
        [sys.executable, "-m", "batchnorm", "fold", *arguments], capture_output=True, text=True
    )
    assert run.returncode == status
    assert run.stdout.startswith("folded 1 of 1")
    assert all(line.startswith("batchnorm: ") for line in run.stderr.splitlines())


# ---- what is known of the model -----------------------------------------------------------------


@pytest.mark.parametrize("made", ["plain", "untrained"])
def test_weights_that_were_not_given_are_noted(folder, capsys, made):
    assert _run(f"fold_program:{made}", "--out", "net.pt", *X) == 0
    err = capsys.readouterr().err
    assert f"no --weights: those that fold_program:{made} gave were folded" in err
    assert ("every num_batches_tracked is 0" in err) == (made == "untrained")


def test_weights_that_were_given_are_not_noted(folder, capsys):
    torch.save(_model().state_dict(), "trained.pt")
    arguments = ("--weights", "trained.pt", "--out", "net.pt")
    assert _run("fold_program:untrained", *arguments, *X) == 0
    err = capsys.readouterr().err
    assert "no --weights" not in err
    assert "num_batches_tracked" not in err


@pytest.mark.parametrize("name", ["fp16", "half", "bf16"])
def test_types_have_short_names(folder, capsys, name):
    assert _run(MODEL, "--out", "net.pt", *X, "--dtype", name) == 0
    kind = {"bf16": "bfloat16"}.get(name, "float16")
    assert _load(folder / "net.pt")["0.weight"].dtype == getattr(torch, kind)
    assert f"takes {kind} inputs: model(x.to(torch.{kind}))" in capsys.readouterr().err


def test_inputs_of_another_type_say_how_to_convert_them(folder, capsys):
    np.savez("data.npz", np.ones((2, 3, 9, 9)))
    status = _run(MODEL, "--out", "net.pt", "--verify", "data.npz")
    _is_refused(capsys, status, "arr_0 is of type float64", "astype('float32')")


@pytest.mark.parametrize("strict", [(), ("--strict",)])
def test_outputs_that_overflow_are_not_written(folder, capsys, strict):
    (folder / "large.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def make():\n"
        "    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)\n"
        "    layers[2].weight.data.fill_(4e4)\n"
        "    return nn.Sequential(*layers)\n"
    )
    arguments = ("large:make", "--out", "net.pt", *X, *strict)
    assert _run(*arguments, "--dtype", "float16") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "outputs are not finite in float16" in line
    assert "choose bfloat16 or float32; net.pt is not written" in line
    assert not _written(folder) - {"large.py"}
    assert _run(*arguments, "--dtype", "bfloat16") == 0


@pytest.mark.parametrize("out", ["net.pt2", "net.onnx"])
def test_export_with_other_outputs_is_not_written(folder, capsys, monkeypatch, out):
    if out == "net.onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    export = torch.export.export

    def wrong(model, *arguments, **keywords):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].bias.add_(0.1)
        return export(other, *arguments, **keywords)

    monkeypatch.setattr(torch.export, "export", wrong)
    _is_refused(capsys, _run(MODEL, "--out", out, *X), "has other outputs than the folded model")
    assert not _written(folder)


# ---- strict -------------------------------------------------------------------------------------


def test_strict_shows_the_report_and_writes_nothing(folder, capsys):
    arguments = ("--out", "net.pt", *X, "--strict", "--json", "report.json")
    assert _run("fold_program:make", *arguments) == 1
    shown = capsys.readouterr()
    assert "bn2" in shown.out
    assert "wrote" not in shown.out
    assert "as strict demands: 'bn2' was refused" in shown.err
    assert "net.pt is not written" in shown.err
    assert _written(folder) == {"report.json"}
    assert json.loads((folder / "report.json").read_text())["refused"].keys() == {"bn2"}


@pytest.mark.parametrize(("tol", "status"), [("1e-3", 0), ("1e-12", 1)])
def test_strict_compares_with_the_tolerance(folder, capsys, tol, status):
    assert _run(MODEL, "--out", "net.pt", *X, "--strict", "--tol", tol) == status
    assert _written(folder) == ({"net.pt"} if status == 0 else set())


@pytest.mark.parametrize("why", ["bfloat16", "not installed"])
def test_strict_demands_that_the_file_is_compared(folder, capsys, monkeypatch, why):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    more = ("--dtype", "bfloat16") if why == "bfloat16" else ()
    if not more:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if "runtime" in name else find_spec(name)
        )
    assert _run(MODEL, "--out", "net.onnx", *X, *more) == 0
    (folder / "net.onnx").unlink()
    capsys.readouterr()
    assert _run(MODEL, "--out", "net.onnx", *X, *more, "--strict") == 1
    err = capsys.readouterr().err
    assert "was not compared, as strict demands: onnxruntime" in err
    assert "net.onnx is not written" in err
    assert not _written(folder)


def test_strict_compares_what_was_exported(folder, capsys, monkeypatch):
    from batchnorm.torch.fold import files

    make_file = files.make_file

    def far(*arguments):
        file = make_file(*arguments)
        file.error = 0.5
        return file

    monkeypatch.setattr(files, "make_file", far)
    assert _run(MODEL, "--out", "net.pt2", *X, "--strict", "--tol", "0.1") == 1
    assert "what was exported differs by 0.5" in capsys.readouterr().err
    assert not _written(folder)


def test_strict_on_an_onnx_file(onnx_file, capsys):
    assert _run("net.onnx", "--out", "folded.onnx", "--strict") == 1
    assert "as strict demands: 'kept' was refused" in capsys.readouterr().err
    assert _written(onnx_file.parent) == {"net.onnx"}


# ---- files that are whole or not there ----------------------------------------------------------


@pytest.mark.parametrize("out", ["net.pt", "net.pt2"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_existing_file_survives_a_failure(folder, capsys, monkeypatch, out, error):
    (folder / out).write_text("as before")
    place = torch if out == "net.pt" else torch.export

    def save(_value, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(place, "save", save)
    assert _run(MODEL, "--out", out, *X) == (130 if error is KeyboardInterrupt else 2)
    assert (folder / out).read_text() == "as before"
    assert _written(folder) == {out}


def test_full_disk_as_torch_reports_it_is_one_line(folder, capsys, monkeypatch):
    def save(_value, _file):
        raise RuntimeError("PytorchStreamWriter failed writing file data/1")

    monkeypatch.setattr(torch, "save", save)
    _is_refused(capsys, _run(MODEL, "--out", "net.pt", *X), "net.pt: cannot be written")
    assert not _written(folder)


def test_nothing_warns(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _run(MODEL, "--out", "net.pt2", *X) == 0
