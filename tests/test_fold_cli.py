"""batchnorm fold on the command line."""

import copy
import json
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")

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


def test_report_is_a_table_and_a_summary(folder, capsys):
    assert _run("fold_program:make", "--out", "net.pt", *X) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split() == ["batch", "norm", "into", "error", "bound"]
    assert lines[1].split()[:2] == ["bn1", "conv1"]
    assert float(lines[1].split()[2]) < float(lines[1].split()[3]) < 1e-3
    assert lines[2].split()[:2] == ["bn2", "refused:"]
    assert "folded 1 batch norm, refused 1, left 0" in shown.out
    assert lines[-1] == "wrote net.pt"
    assert "forward" not in shown.out


@pytest.mark.parametrize("place", ["-", "report.json"])
def test_report_as_json(folder, capsys, place):
    assert _run("fold_program:make", "--out", "net.pt", *X, "--json", place) == 0
    out = capsys.readouterr().out
    found = json.loads(out if place == "-" else (folder / place).read_text())
    _, report = fold(_model("make"), _x())
    assert found == json.loads(report.to_json())
    assert ("wrote net.pt" in out) == (place != "-")


def test_text_of_a_report_has_what_the_table_has(folder):
    _, report = fold(_model("make"), _x())
    rows = report.rows()
    assert [row[:2] for row in rows] == [("bn1", "conv1"), ("bn2", "")]
    for row in rows:
        assert all(cell in str(report) for cell in row)
    assert all(line in str(report) for line in report.summary())


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
    assert "0 got a bias; the original model has no place for it" in capsys.readouterr().err
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
    assert "36, 38 and 3 more got a bias" in capsys.readouterr().err


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
        return
    assert "run by onnxruntime, it differs by" in err
    session = runtime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    x = _x(5, 3, 9, 9).to(getattr(torch, dtype or "float32"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
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
    assert found == json.loads(report.to_json())
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
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1][:2] == ["norm", "conv"]
    assert float(rows[1][2]) <= float(rows[1][3])
    assert rows[2][:2] == ["kept", "refused:"]
    nodes = [node.op_type for node in onnx.load("folded.onnx").graph.node]
    assert nodes == ["Conv", "Conv", "BatchNormalization"]


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
        ((MODEL, "--out", "no/net.pt", *X), ["existing directory"]),
        ((MODEL, "--out", "net.pt"), ["--verify data.npz or --input", "neither"]),
        ((MODEL, "--out", "net.pt", *X, "--verify", "data.npz"), ["both"]),
        ((MODEL, "--out", "net.pt", "--input", "3,9,9"), ["positive numbers", "'3,9,9'"]),
        ((MODEL, "--out", "net.pt", "--input", "0x3"), ["positive numbers"]),
        ((MODEL, "--out", "net.pt", "--input", "9999999999x999999999"), ["fits into memory"]),
        ((MODEL, "--out", "net.pt", "--input", "9" * 30), ["fits into memory"]),
        ((MODEL, "--out", "net.pt", "--input", "2x4x9x9"), ["cannot be run on 2x4x9x9"]),
        (("fold_program:fails", "--out", "net.pt", *X), ["KeyError: 'no such thing'"]),
        ((MODEL, "--out", "net.pt", *X, "--tol", "1"), ["--tol goes with --strict"]),
        ((MODEL, "--out", "net.pt", *X, "--tol", "-1", "--strict"), ["--tol"]),
        ((MODEL, "--out", "net.pt", *X, "--dtype", "int8"), ["--dtype", "int8"]),
        ((MODEL, "--out", "net.pt", *X, "--json", "net.pt"), ["two files"]),
        ((MODEL, "--out", "net.pt", *X, "--json", "no/r.json"), ["existing directory"]),
        ((MODEL, "--out", "net.pt", *X, "--weights", "no.pt"), ["there is no such file"]),
        ((MODEL, "--out", "net.pt", "--verify", "no.npz"), ["there is no such file"]),
        (("fold_program:no", "--out", "net.pt", *X), ["must name a function"]),
        (("net.pt", "--out", "other.pt", *X), ["package.module:factory", "--weights net.pt"]),
        (("nothing", "--out", "other.pt"), ["package.module:factory", ".onnx"]),
        ((ONNX, "--out", "net.pt"), ["must end in .onnx"]),
        ((ONNX, "--out", "o.onnx", "--weights", "w.pt"), ["--weights goes with", "--verify"]),
        ((ONNX, "--out", "o.onnx", *X), ["--input goes with"]),
        ((ONNX, "--out", "o.onnx", "--dtype", "float16"), ["--dtype goes with"]),
        ((ONNX, "--out", "o.onnx", "--strict", "--tol", "1"), ["--verify"]),
        ((ONNX, "--out", "o.onnx"), ["there is no such file"]),
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


@pytest.mark.parametrize("option", ["--weights", "--verify"])
def test_what_is_read_is_not_replaced(folder, capsys, option):
    torch.save(_model().state_dict(), "net.pt")
    more = X if option == "--weights" else ()
    before = (folder / "net.pt").read_bytes()
    status = _run(MODEL, "--out", folder / "net.pt", option, "net.pt", *more)
    _is_refused(capsys, status, f"would replace what {option} reads")
    assert (folder / "net.pt").read_bytes() == before


def test_model_that_cannot_be_exported_names_what_can_be_written(folder, capsys):
    status = _run("fold_program:loops", "--out", "net.pt2", *X)
    _is_refused(capsys, status, "torch.export cannot follow", ".safetensors or .pt")
    assert not _written(folder)


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
    assert "'bn2' was refused" in shown.err
    assert "net.pt is not written" in shown.err
    assert _written(folder) == {"report.json"}
    assert json.loads((folder / "report.json").read_text())["refused"].keys() == {"bn2"}


@pytest.mark.parametrize(("tol", "status"), [("1e-3", 0), ("1e-12", 1)])
def test_strict_compares_with_the_tolerance(folder, capsys, tol, status):
    assert _run(MODEL, "--out", "net.pt", *X, "--strict", "--tol", tol) == status
    assert _written(folder) == ({"net.pt"} if status == 0 else set())


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
    assert "'kept' was refused" in capsys.readouterr().err
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
