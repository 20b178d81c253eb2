"""batchnorm check and batchnorm report on the command line."""

import json
import pickle
import textwrap

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("pyarrow")

from torch import nn  # noqa: E402

from batchnorm import cli  # noqa: E402
from batchnorm.diagnose import RULES  # noqa: E402
from batchnorm.pytest_plugin import assert_healthy  # noqa: E402
from batchnorm.torch import watch  # noqa: E402

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8, momentum=0.99)
        self.drop = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.tail = nn.Sequential(
            nn.Linear(8, 8, bias=False),
            nn.BatchNorm1d(8),
            nn.BatchNorm1d(8),
        )

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.drop(x)
        x = F.relu(self.bn2(self.conv2(x)))
        return self.tail(x.mean((2, 3)))


def make():
    torch.manual_seed(0)
    return Net()


def good():
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))


def batches():
    return [torch.randn(16, 3, 12, 12) for _ in range(3)]


def broken():
    raise RuntimeError("no such thing")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "zoo_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _run(*arguments):
    return cli.main(["check", *arguments])


WANTED = [("BN110", 11), ("BN401", 11), ("BN402", 14), ("BN404", 18)]


def test_program_is_read_and_not_run(folder, capsys):
    (folder / "zoo_program.py").write_text(PROGRAM + "\nraise SystemExit('it was run')\n")
    assert _run("zoo_program.py", "--format", "json") == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [(f["code"], f["line"]) for f in found] == WANTED
    assert found[0]["layer"] == "Net.bn1"


@pytest.mark.parametrize(
    "body",
    [
        "nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))",
        "nn.Sequential(nn.Linear(4, 3, bias=flag), nn.BatchNorm1d(3))",
        "nn.Sequential(nn.Linear(4, 3, **options), nn.BatchNorm1d(3))",
        "nn.Sequential(nn.Linear(4, 3), *more, nn.BatchNorm1d(3))",
        "nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(3))",
        "nn.Sequential(nn.Dropout(p=0.0), nn.BatchNorm1d(3))",
        "nn.Sequential(nn.BatchNorm1d(3, momentum=m), nn.ReLU())",
    ],
)
def test_what_the_text_leaves_open_is_no_finding(folder, body, capsys):
    (folder / "open.py").write_text(f"from torch import nn\nnet = {body}\n")
    assert _run("open.py") == 0
    assert "no findings" in capsys.readouterr().out


def test_other_frameworks_have_other_defaults(folder, capsys):
    (folder / "keras_model.py").write_text(
        "import keras\nm = keras.Sequential([keras.layers.BatchNormalization(momentum=0.99)])\n"
    )
    assert _run("keras_model.py", "--allow-none") == 0


def test_programs_in_other_encodings_are_read(folder):
    program = "from torch import nn\nn = nn.Sequential(nn.BatchNorm1d(3)) # é\n"
    text = f"# -*- coding: latin-1 -*-\n{program}"
    (folder / "latin.py").write_bytes(text.encode("latin-1"))
    (folder / "bom.py").write_bytes(b"\xef\xbb\xbf" + text.split("\n", 1)[1].encode())
    assert _run("latin.py", "bom.py") == 0


def test_target_that_prints_or_exits(folder, capsys):
    (folder / "loud.py").write_text(
        "import sys\nfrom zoo_program import good\nprint('hello')\ndef ex(): sys.exit(0)\n"
    )
    assert _run("loud:good", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    assert _run("loud:ex") == 2
    assert "SystemExit" in capsys.readouterr().err


def test_branches_and_loops_are_unknown(folder, capsys):
    program = """
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            self.fc, self.other = nn.Linear(3, 3), 1
            self.norm = nn.BatchNorm1d(3)
        def forward(self, x, again=False):
            x = self.fc(x)
            if again:
                x = x * 2
            for _ in range(3):
                x = x + 1
            return self.norm(x)
    """
    (folder / "branch.py").write_text(textwrap.dedent(program))
    assert _run("branch.py") == 0


def test_model_and_its_data(folder, capsys):
    assert _run("zoo_program:make", "--data", "zoo_program:batches", "--format", "text") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == [c for c, _ in WANTED]
    assert lines[0].startswith("zoo_program:make: BN110 bn1: momentum 0.99")


def test_healthy_model_ends_with_0(folder, capsys):
    assert _run("zoo_program:good") == 0
    assert "no findings" in capsys.readouterr().out


def test_fix_saves_the_mended_weights(folder, capsys):
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    torch.save(net.state_dict(), "good.pt")
    (folder / "fixing.py").write_text(
        "import torch\nfrom zoo_program import good\n"
        "def data(): return [torch.randn(64, 4) for _ in range(4)]\n"
    )
    arguments = ["zoo_program:good", "--weights", "good.pt", "--data", "fixing:data"]
    assert _run(*arguments) == 1
    assert _run(*arguments, "--fix", "--out", "fixed.pt") == 0
    assert "fixed: recalibrate(model, data) (BN101" in capsys.readouterr().out
    fixed = torch.load("fixed.pt", weights_only=True)
    assert not torch.equal(fixed["1.running_var"], torch.ones(3))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_alone(folder, suffix, capsys):
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    net(torch.randn(64, 3))
    net[0].running_var[1] = -1.0
    if suffix == ".pt":
        torch.save({"state_dict": net.state_dict()}, "w.pt")
    else:
        pytest.importorskip("safetensors.torch").save_file(net.state_dict(), "w.safetensors")
    assert _run(f"w{suffix}", "--select", "BN104", "--format", "text") == 1
    assert "1 of 3 channels negative" in capsys.readouterr().out


def test_onnx_file(folder, capsys):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    ones = [1.0, 1.0]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], name="conv"),
        helper.make_node("Dropout", ["h"], ["d"], name="drop"),
        helper.make_node(
            "BatchNormalization", ["d", "s", "z", "m", "v"], ["y"], name="norm", training_mode=0
        ),
    ]
    given = {"w": ([2, 2, 1, 1], ones * 2), "b": ([2], ones), "s": ([2], ones)}
    given |= {"z": ([2], ones), "m": ([2], ones), "v": ([2], [1.0, float("nan")])}
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT, dims, values)
        for name, (dims, values) in given.items()
    ]
    shape = [1, 2, 4, 4]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        tensors,
    )
    onnx.save(helper.make_model(graph), "net.onnx")
    assert _run("net.onnx", "--format", "text") == 1
    out = capsys.readouterr().out
    assert "BN104 norm" in out
    assert "BN402 norm" in out
    assert "BN401" not in out


def _conv_and_norm(path, outputs, *bias):
    """An ONNX file whose batch norm could be folded, unless an output is "h"."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("CastLike", ["z", "x"], ["zeros"]),
        helper.make_node("Conv", ["x", "w", *bias], ["h"], name="conv"),
        helper.make_node("BatchNormalization", ["h", "s", "z", "m", "s"], ["y"], name="norm"),
    ]
    given = {"w": ([2, 2, 1, 1], [1.0] * 4), **{k: ([2], [1.0, 2.0]) for k in "szm"}}
    tensors = [helper.make_tensor(k, TensorProto.FLOAT, *v) for k, v in given.items()]
    shape = [1, 2, 4, 4]
    values = [helper.make_tensor_value_info(k, TensorProto.FLOAT, shape) for k in ["x", *outputs]]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors)), path
    )


LEVELS = {"text": "BN501 norm: only it", "json": '"level": "note"', "sarif": '"level": "note"'}


@pytest.mark.parametrize(("form", "shown"), [*LEVELS.items(), ("github", "::notice title=BN501")])
def test_batch_norm_of_a_file_that_could_be_folded_is_a_note(folder, capsys, form, shown):
    _conv_and_norm("net.onnx", ["y"])
    assert _run("net.onnx", "--format", form) == 0
    assert shown in capsys.readouterr().out


def test_bias_that_an_exporter_makes_of_constants_is_none(folder, capsys):
    _conv_and_norm("net.onnx", ["y"], "zeros")
    assert _run("net.onnx", "--format", "text", "--select", "BN501") == 0
    assert "BN501 norm" in capsys.readouterr().out


def test_batch_norm_of_a_file_whose_input_is_an_output_could_not_be_folded(folder, capsys):
    _conv_and_norm("net.onnx", ["y", "h"])
    assert _run("net.onnx") == 0
    assert "no findings" in capsys.readouterr().out


def test_recording_and_its_report(folder, capsys):
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, momentum=0.001))
    with watch(net, "run.parquet", every=10):
        for _ in range(120):
            net(torch.randn(32, 4) + 1).square().mean().backward()
    assert _run("run.parquet") == 1
    assert "BN105" in capsys.readouterr().out
    pytest.importorskip("vl_convert")
    assert cli.main(["report", "run.parquet", "--out", "page.html"]) == 0
    assert "wrote page.html" in capsys.readouterr().out
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "BN105" in page
    assert 'id="layer-1"' in page
    assert len(page) < 3_000_000
    assert cli.main(["report", "run.parquet", "run.parquet", "--terminal"]) == 0
    assert capsys.readouterr().out.count("mean off") >= 2


def test_github_annotations_and_sarif(folder, capsys):
    assert _run("zoo_program.py", "--format", "github") == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("::warning file=zoo_program.py,line=11,title=BN110 momentum")
    assert _run("zoo_program.py", "--format", "sarif") == 1
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert [r["ruleId"] for r in run["results"]] == [code for code, _ in WANTED]
    assert {r["id"] for r in run["tool"]["driver"]["rules"]} == {code for code, _ in WANTED}
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place["region"]["startLine"] == 11


def test_several_programs_and_those_without_batch_norm(folder, capsys):
    (folder / "other.py").write_text("x = 1\n")
    assert _run("other.py") == 2
    assert "no batch norm found in the text" in capsys.readouterr().err
    assert _run("other.py", "--allow-none") == 0
    assert _run("zoo_program.py", "other.py") == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_every_code_is_explained_and_has_a_page(rule, capsys):
    assert _run("--explain", rule.code) == 0
    text = capsys.readouterr().out
    assert rule.title in text
    page = (cli_docs() / f"{rule.code}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {rule.code}: ")
    assert rule.title.lower() in page.splitlines()[0].lower()


def cli_docs():
    from pathlib import Path

    return Path(__file__).resolve().parent.parent / "docs" / "findings"


def test_index_of_the_pages_is_that_of_the_rules():
    index = (cli_docs() / "index.md").read_text(encoding="utf-8")
    rows = [f"| [{r.code}]({r.code}.md) | {r.title} | {r.fix} |" for r in RULES]
    assert "\n".join(rows) in index


def test_every_page_is_of_a_code():
    pages = {path.stem for path in cli_docs().glob("BN*.md")}
    assert pages == {rule.code for rule in RULES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "check needs a target"),
        (["foo"], "must be package.module:factory, alone, or a file that ends in"),
        (["nothing_here:make"], "No module named 'nothing_here'"),
        (["nothing_here:make"], "Run the command where 'import nothing_here' works"),
        (["zoo_program:nope"], "'zoo_program' has no 'nope'. It has Net, make, good"),
        (["zoo_program:goo"], "has no 'goo'. Did you mean good?"),
        (["pack/zoo.py:good"], "without .py. Did you mean pack.zoo:good?"),
        (["torch.nn:Linear"], "needs arguments: in_features, out_features. Wrap it in a function"),
        (["model.pt2"], "give the model that was exported"),
        (["model.keras"], "Export it to ONNX first"),
        (["zoo_program:broken"], "RuntimeError: no such thing"),
        (["zoo_program:batches"], "must return a torch.nn.Module, got list"),
        (["zoo_program:make", "--data", "zoo_program:nope"], "'zoo_program' has no 'nope'"),
        (["zoo_program:good", "--data", "zoo_program:batches"], "cannot be run on"),
        (
            ["zoo_program:make", "--weights", "missing.pt"],
            "missing.pt: there is no such file. Name another.",
        ),
        (["zoo_program:make", "--weights", "other.pt"], "they do not fit"),
        (["zoo_program:make", "--weights", "whole.pt"], "objects that are not tensors"),
        (["whole.pt"], "Files that hold more than tensors are never unpickled"),
        (["damaged.pt"], "it cannot be read"),
        (["damaged.safetensors"], "it cannot be read"),
        (["missing.onnx"], "there is no such file"),
        (["a" * 300 + ".onnx"], "there is no such file"),
        (["a" * 300 + ".pt"], "there is no such file"),
        (["empty.pt"], "must hold batch norms"),
        (["damaged.onnx"], "must be an ONNX file, but it cannot be read"),
        (["damaged.parquet"], "it is damaged"),
        (["damaged.py"], "must be a readable Python file"),
        (["missing.py"], "No such file"),
        (["other.pt"], "must hold batch norms"),
        (["zoo_program:make", "--select", "BN9"], "got 'BN9'. The codes are"),
        (["zoo_program.py", "--fix"], "go with one model"),
        (["zoo_program:make", "--out", "x.pt"], "pass --fix as well"),
        (["zoo_program:make", "--fix", "--out", "/nowhere/x.pt"], "'/nowhere' is not one"),
        (["--explain", "BN999"], "got 'BN999'"),
        (["zoo_program:make", "--format", "xml"], "xml"),
    ],
)
def test_unusable_input_is_one_line(folder, arguments, message, capsys):
    if any("onnx" in argument for argument in arguments):
        pytest.importorskip("onnx")
    if any("safetensors" in argument for argument in arguments):
        pytest.importorskip("safetensors")
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    torch.save(nn.Sequential(nn.BatchNorm1d(2)), "whole.pt")
    torch.save(nn.BatchNorm1d(0).state_dict(), "empty.pt")
    for suffix in ("pt", "safetensors", "onnx", "parquet"):
        (folder / f"damaged.{suffix}").write_bytes(b"\x00\xff nonsense" * 9)
    (folder / "damaged.py").write_text("def (:\n")
    before = sorted(path.name for path in folder.iterdir())
    assert _run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    after = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    assert after == [name for name in before if name != "__pycache__"]


def test_weights_of_another_pickle_are_one_line(folder, capsys):
    (folder / "net.pt").write_bytes(pickle.dumps([1], protocol=4))
    assert _run("net.pt") == 2
    message = capsys.readouterr().err
    assert message.startswith("batchnorm: net.pt: must be a state dict")
    assert "Detected pickle protocol" not in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("form", ["rich", "text"])
def test_control_characters_of_names_are_escaped(folder, capsys, form):
    state = {"a\n\x1b[1m.running_mean": torch.zeros(2), "a\n\x1b[1m.running_var": torch.ones(2)}
    torch.save(state, "net.pt")
    _run("net.pt", "--format", form)
    assert "a\\n\\x1b[1m: its running mean is still 0" in capsys.readouterr().out


def test_batch_norms_inside_of_nodes_are_checked_but_their_wiring(folder, capsys):
    onnx = pytest.importorskip("onnx")
    text = """<ir_version: 8, opset_import: ["": 17]>
        net (bool k, float[N, 1] x) => (float[A, B] y)
        <float[1] one = {1}, float[1] bad = {-1}> {
            y = If(k)<then_branch = t () => (float[C, D] r) {
                [bn] r = BatchNormalization(x, one, one, one, bad) },
                else_branch = f () => (float[E, F] o) { o = Identity(x) }> }"""
    onnx.save(onnx.parser.parse_model(text), "net.onnx")
    assert _run("net.onnx") == 1
    out = capsys.readouterr().out
    assert "  bn: " in out
    assert "not checked: wiring of batch norms in functions and inside of nodes" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.parquet"], "there is no such file"),
        (["damaged.parquet"], "it is damaged"),
        (["run.parquet", "--out", "/nowhere/page.html"], "'/nowhere' is not one"),
        (["empty.parquet"], "at least one step, got one without"),
    ],
)
def test_unusable_recordings_are_one_line(folder, arguments, message, capsys):
    pytest.importorskip("vl_convert")
    net = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.warns(RuntimeWarning, match="watch saw no step"), watch(net, "empty.parquet"):
        pass
    with watch(net, "run.parquet"):
        net(torch.randn(8, 3))
    (folder / "damaged.parquet").write_bytes(b"PAR1nonsense")
    assert cli.main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_assert_healthy_fails_with_the_findings():
    healthy = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    assert_healthy(healthy, [torch.randn(32, 4)])
    sick = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(AssertionError, match="BN401 bias before a batch norm"):
        assert_healthy(sick)
    assert_healthy(sick, ignore=["BN401"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import not_installed_at_all", "No module named 'not_installed_at_all'"),
        ("raise ValueError('on import')", "ValueError: on import"),
        ("def make(): raise KeyError('key')", "must return a model, but raises KeyError: 'key'"),
    ],
)
def test_errors_of_programs_are_their_own(folder, capsys, body, message):
    name = f"program_{abs(hash(body))}"
    (folder / f"{name}.py").write_text(body + "\n")
    assert _run(f"{name}:make") == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Run the command where" not in err


def test_weights_that_do_not_fit_are_counted(folder, capsys):
    state = nn.ModuleDict({"fc": nn.Linear(9, 9), **{f"x{k}": nn.Linear(1, 1) for k in range(4)}})
    torch.save(state.state_dict(), "w.pt")
    (folder / "wide.py").write_text(
        "from torch import nn\ndef make(): return nn.ModuleDict({'fc': nn.Linear(2, 2), "
        "'bn': nn.BatchNorm1d(2)})\n"
    )
    assert _run("wide:make", "--weights", "w.pt") == 2
    err = capsys.readouterr().err
    assert "4 keys missing (bn.weight, bn.bias, bn.running_mean, …)" in err
    assert "8 too many (x0.weight, x0.bias, x1.weight, …)" in err
    assert "2 of another shape (fc.weight: (9, 9) for (2, 2), fc.bias: (9,) for (2,))" in err
    assert "folded" not in err


def test_weights_of_a_folded_model_are_recognized(folder, capsys):
    (folder / "narrow.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))\n"
    )
    torch.save(nn.Sequential(nn.Conv2d(3, 3, 1)).state_dict(), "w.pt")
    assert _run("narrow:make", "--weights", "w.pt") == 2
    err = capsys.readouterr().err
    assert "4 keys missing (1.weight, 1.bias, 1.running_mean, …), 1 too many (0.bias)" in err
    assert "they look like those of a folded model" in err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_model_in_a_wrapper_are_recognized(folder, capsys, prefix):
    (folder / "inner.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.BatchNorm2d(3))\n"
    )
    state = nn.Sequential(nn.BatchNorm2d(3)).state_dict()
    torch.save({f"{prefix}{name}": t for name, t in state.items()}, "w.pt")
    assert _run("inner:make", "--weights", "w.pt") == 2
    err = capsys.readouterr().err
    assert "4 keys missing" in err
    assert "4 too many" in err
    assert f"'{prefix}' comes from" in err
