"""The benchmarks of calls, recalibration and synchronized layers run, and write files."""

import csv
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")

import batchnorm
from batchnorm import _core
from batchnorm.bench.cases import Case, make_inputs
from batchnorm.bench.providers import Call, Provider

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
BRIEF = ["--rounds", "2", "--processes", "2", "--block", "0"]


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("small_calls")
    monkeypatch.setattr(module, "SHAPES", ((6, 5),))
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_small_calls_are_timed_beside_torch(small_calls: Any, tmp_path: Path) -> None:
    assert small_calls.main([*BRIEF, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "small_calls.csv")
    providers: dict[str, list[str]] = {}
    for row in rows:
        providers.setdefault(row["op"], []).append(row["provider"])
    of_layers = ["torch", "batchnorm", "empty Function"]
    assert providers == {
        op: of_layers[: 2 if op.startswith("batch_norm") else 3] for op in small_calls.OPS
    }
    assert {(row["shape"], row["rounds"], row["status"]) for row in rows} == {("6x5", "4", "ok")}
    assert all(row["ratio"] == "1" for row in rows if row["provider"] == "torch")
    about = json.loads((tmp_path / "small_calls.json").read_text())
    assert (about["threads"], about["rounds"], about["processes"]) == (1, 4, 2)


def test_processors_are_timed_on_data_from_the_cache_and_from_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    processors = importlib.import_module("processors")
    monkeypatch.setattr(processors, "NEAR", 6 * 5 * 4)
    brief = ["--rounds", "1", "--threads", "1", "--isas", "baseline", "--ops", "backward"]
    _core.assume_last_level_cache(1 << 10)
    try:
        assert processors.main([*brief, "--shapes", "6x5,2x3", "--out", str(tmp_path)]) == 0
    finally:
        _core.assume_last_level_cache(-1)
    found = {
        (row["shape"], row["data"], row["status"])
        for row in rows_of(tmp_path / "processors.csv")
        if row["provider"] == "batchnorm"
    }
    assert found == {("6x5", "cache", "ok"), ("6x5", "memory", "ok"), ("2x3", "cache", "ok")}


def test_each_call_from_memory_takes_another_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    processors = importlib.import_module("processors")
    inputs = make_inputs(Case("forward", (6, 5)))
    addresses = Provider("x", lambda i: Call(lambda: i.x.ctypes.data, lambda _: {"x": i.x}))
    _core.assume_last_level_cache(1 << 10)
    try:
        call = processors.away(addresses).prepare(inputs)
    finally:
        _core.assume_last_level_cache(-1)
    copies = 2 + 4 * (1 << 10) // (2 * inputs.x.nbytes)
    seen = [call.run() for _ in range(copies)]
    assert len(set(seen)) == copies
    assert call.run() == seen[0]


def test_another_copy_is_timed_in_a_process_of_its_own(small_calls: Any, tmp_path: Path) -> None:
    root, checkout = Path(batchnorm.__file__).parent, tmp_path / "checkout"
    (checkout / "src").mkdir(parents=True)
    (checkout / "src" / "batchnorm").mkdir()
    for part in root.iterdir():
        if part.name != "bench":  # an older copy may have none
            (checkout / "src" / "batchnorm" / part.name).symlink_to(part)
    out = tmp_path / "out"
    assert small_calls.main([*BRIEF, "--before", str(checkout), "--out", str(out)]) == 0
    rows = rows_of(out / "small_calls_before.csv")
    assert {row["provider"] for row in rows} == {"before", "batchnorm"}
    assert all(row["ratio"] == "1" for row in rows if row["provider"] == "before")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--before", "/dev/null"], "holds neither src/batchnorm nor batchnorm"),
        (["--processes", "0"], "1 or more"),
        (["--out", "/dev/null/results"], "Name another directory"),
    ],
)
def test_bad_input_exits_with_2(
    small_calls: Any,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    said: str,
) -> None:
    try:
        status = small_calls.main(arguments)
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_wrong_answer_is_not_timed(
    small_calls: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(
        "from small_calls_worker import *\nbatchnorm.batch_norm = lambda x, *_, **__: (x, None)\n"
    )
    (tmp_path / "small_calls_worker.py").write_text(Path(small_calls.WORKER).read_text())
    small_calls.WORKER = script
    assert small_calls.main(BRIEF) == 1
    assert "AssertionError: Not equal to tolerance" in capsys.readouterr().err


def test_recalibration_errors_are_those_of_the_committed_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    recalibrate = importlib.import_module("recalibrate")
    monkeypatch.setattr(recalibrate, "can_plot", lambda: False)
    assert recalibrate.main(["--errors", "--out", str(tmp_path)]) == 0
    found, committed = (
        rows_of(folder / "recalibrate_errors.csv") for folder in (tmp_path, BENCHMARKS / "results")
    )
    for one, other in zip(found, committed, strict=True):
        assert (one["estimator"], one["layer"]) == (other["estimator"], other["layer"])
        # Rounding of three digits; and below 1e-12 all is rounding, of sums in another order.
        assert float(one["error"]) == pytest.approx(float(other["error"]), rel=0.01, abs=1e-12)


def test_synchronized_layers_are_timed_on_both_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    sync_step = importlib.import_module("sync_step")
    monkeypatch.setattr(sync_step, "SHAPES", ((6, 5),))
    assert sync_step.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "sync_step.csv")
    assert [row["provider"] for row in rows] == list(sync_step.LAYERS)
    assert {(row["shape"], row["rounds"]) for row in rows} == {("6x5", "2")}
