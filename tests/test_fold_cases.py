"""What `fold` makes of the cases of `benchmarks/fold_cases.py`, and how those are judged."""

import csv
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("onnx")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the judge ends itself by an alarm")

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "fold_cases.csv"
OURS = "batchnorm.torch.fold"
#: Cases in which weights could be found, and ours refuses.
LEFT = {
    "RepBN, then Linear",
    "one batch norm behind two Conv2d",
    "batch norm called twice in a row",
    "loop over the width",
    "pruned Conv2d",
    "subclass of Conv2d, weight standardized",
    "subclass of BatchNorm2d, output doubled",
}
#: Cases whose weights are computed by nodes of the ONNX file.
COMPUTED = {
    "weight norm",
    "weight norm of torch.nn.utils",
    "pruned Conv2d",
    "subclass of Conv2d, weight standardized",
}


@pytest.fixture(scope="module")
def tools() -> Iterator[Any]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("fold_case_tools")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def judge(tools: Any) -> Any:
    return tools.Judge()


@pytest.fixture
def benchmark(tools: Any) -> Any:
    return importlib.import_module("fold_cases")


def committed() -> list[dict[str, str]]:
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def case_of(tools: Any, name: str) -> Any:
    return next(case for case in tools.models.cases() if case.name == name)


def wanted(case: Any) -> str:
    if case.name.startswith("state dict loaded"):
        return "n/a"
    return "refused" if case.stays or case.name in LEFT else "right"


def test_no_torch_model_is_folded_wrongly(tools: Any, judge: Any) -> None:
    cases = tools.models.cases()
    for case in cases:
        if "torchvision" in case.name or "timm" in case.name:
            pytest.importorskip(case.name.split()[-1])
        found = judge.judge(case.name, OURS)
        assert found["verdict"] == wanted(case), (case.name, found)
        assert found.get("share", 0) <= 1, case.name
        assert found.get("misrounded", 0) == 0, case.name
    assert len(cases) > 150


def test_no_onnx_model_is_folded_wrongly(tools: Any, judge: Any) -> None:
    pytest.importorskip("onnxruntime")
    cases = [case for case in tools.models.cases() if not case.no_onnx]
    for case in (*cases, *tools.graphs.cases()):
        if "timm" in case.name:
            pytest.importorskip("timm")
        found = judge.judge(case.name, "batchnorm.onnx.fold")
        assert found["verdict"] in ("right", "refused", "n/a"), (case.name, found)
        if isinstance(case, tools.graphs.GraphCase) and case.stays:
            assert found["verdict"] == "refused", case.name
        if case.name in COMPUTED:
            assert found["verdict"] == "right", (case.name, found)
        assert found.get("misrounded", 0) == 0, case.name


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("nothing", "refused"),
        ("raise", "crashed"),
        ("scale", "wrong"),
        ("shift", "wrong"),
        ("nan", "wrong"),
        ("shape", "crashed"),
    ],
)
def test_bad_results_are_told_from_good_ones(
    tools: Any, judge: Any, monkeypatch: pytest.MonkeyPatch, name: str, verdict: str
) -> None:
    def tool(model: Any, case: Any) -> Any:
        if name == "raise":
            raise KeyError("weight")
        if name != "nothing":
            model, *_ = tools.ours_torch(model, case)
            model.conv.weight.data[0] *= 1.001 if name == "scale" else 1
            model.conv.bias.data[0] += {"shift": 1e-3, "nan": float("nan")}.get(name, 0)
            if name == "shape":
                model.conv.weight.data = model.conv.weight.data[:, :-1]
        return model, "", {}

    monkeypatch.setitem(tools.TORCH_TOOLS, "torch.fx fuse", tool)
    assert judge.judge("Conv2d, bias, affine", "torch.fx fuse")["verdict"] == verdict


def test_inputs_that_no_example_shows_are_judged(tools: Any, judge: Any) -> None:
    found = judge.judge("the same, never in the example", "torch.nn.utils.fusion")
    assert found["verdict"] == "wrong"
    case = case_of(tools, "the same, never in the example")
    assert all(call[0].mean() < 1 for call in case.calls(examples=True))


def test_weights_rounded_twice_are_counted(judge: Any) -> None:
    found = judge.judge("Conv2d, no bias, affine, bfloat16", "torch.nn.utils.fusion")
    assert found["verdict"] == "right"
    assert 0 < found["misrounded"] < found["weights"] == 8 * 4 * 9


def test_exported_models_keep_their_batch_norms(tools: Any) -> None:
    case = case_of(tools, "residual block")
    assert tools.count_norms(tools.exported(case)) == 2


def test_tool_that_ends_its_process_has_crashed(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "fatal.py"
    worker.write_text(
        "import os, signal\n"
        "class Judge:\n"
        "    def judge(self, case, tool):\n"
        "        if case == 'fatal':\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return {'verdict': 'right'}\n"
    )
    monkeypatch.setattr(benchmark, "WORKER", worker)
    tools = benchmark.Tools()
    try:
        found = tools.ask("judge", case="fatal", tool="x")
        assert found["verdict"] == "crashed"
        assert str(-signal.SIGSEGV.value) in found["detail"]
        assert tools.ask("judge", case="other", tool="x") == {"verdict": "right"}
    finally:
        tools.close()


def test_committed_results_are_of_all_cases_and_tools(tools: Any, benchmark: Any) -> None:
    rows = committed()
    names = [case.name for case in benchmark.all_cases()]
    assert len(set(names)) == len(names) >= 60
    assert {(row["case"], row["provider"]) for row in rows} == {
        (name, tool) for name in names for tool in benchmark.TOOLS
    }
    assert len(rows) == len(names) * len(benchmark.TOOLS)


@pytest.mark.parametrize("tool", ["batchnorm.torch.fold", "batchnorm.onnx.fold"])
def test_committed_results_have_ours_right_or_refused(tool: str) -> None:
    verdicts = [row["verdict"] for row in committed() if row["provider"] == tool]
    assert set(verdicts) == {"right", "refused", "n/a"}
    assert verdicts.count("right") > 130
    assert all(row["detail"] for row in committed() if row["verdict"] in ("n/a", "crashed"))


def test_benchmark_writes_a_line_for_each_case_and_tool(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    answers: dict[str, Callable[..., Any]] = {
        "judge": lambda case, tool: {"verdict": "wrong", "norms": 1, "error": 2.0},
        "versions": dict,
    }
    monkeypatch.setattr(benchmark.Tools, "ask", lambda self, what, **kw: answers[what](**kw))
    monkeypatch.setattr(benchmark.command.importlib.util, "find_spec", lambda name: name)
    status = benchmark.main(["--quick", "--tools", OURS, "--out", str(tmp_path)])
    assert status == 1  # ours is wrong
    with (tmp_path / "fold_cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {OURS}
    assert len({row["line"] for row in rows}) == len(rows) > 60
    assert "Conv2d feeds two batch norms" in capsys.readouterr().out
