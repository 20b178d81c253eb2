"""The benchmark of a ResNet-18's training step: the network, what is found wrong, and its files."""

import csv
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("networks")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another wherever the machine is busy
    yield importlib.import_module("resnet_worker")
    torch.set_num_threads(threads)


@pytest.fixture
def bench(worker: Any) -> Any:
    return importlib.import_module("resnet_step")


@pytest.fixture
def losses(worker: Any) -> Any:
    return importlib.import_module("resnet_losses")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the network ----------------------------------------------------------------------------------


def test_network_has_as_many_parameters_as_torchvisions(networks: Any) -> None:
    # https://pytorch.org/vision/stable/models/generated/torchvision.models.resnet18.html
    assert sum(p.numel() for p in networks.ResNet18().parameters()) == 11_689_512


def test_network_names_its_parts_as_torchvisions(networks: Any) -> None:
    names = list(networks.ResNet18().state_dict())
    # 20 convolutions, 20 batch norms of 5 tensors each, and the linear layer's two.
    assert len(names) == 20 + 20 * 5 + 2
    assert {
        "conv1.weight",
        "bn1.num_batches_tracked",
        "layer1.0.conv2.weight",
        "layer1.1.bn2.running_var",
        "layer2.0.downsample.0.weight",
        "layer4.0.downsample.1.running_mean",
        "fc.bias",
    } <= set(names)
    assert "layer1.0.downsample.0.weight" not in names


def test_network_gives_a_score_for_every_class(networks: Any) -> None:
    with torch.no_grad():
        assert networks.ResNet18()(torch.zeros(2, 3, 40, 33)).shape == (2, 1000)


# --- what is measured -----------------------------------------------------------------------------


def test_data_is_the_same_in_both_formats(worker: Any) -> None:
    ((first, labels),) = worker.make_data(worker.Case(2, 8), seed=3)
    ((last, same),) = worker.make_data(worker.Case(2, 8, channels_last=True), seed=3)
    assert torch.equal(first, last)
    assert torch.equal(labels, same)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_losses_in_opposite_order_are_the_same_but_for_rounding(losses: Any) -> None:
    forth, back = (
        losses.loss_curve("torch eager", losses.Case(8, 32), seed=0, steps=2, reverse=reverse)
        for reverse in (False, True)
    )
    # Each is float32 of about 7, and its means over 8 examples and 8 values per channel round
    # differently: some hundred roundings of 6e-8 along the network.
    assert forth == pytest.approx(back, rel=1e-5)
    assert forth[0] != forth[1]


@pytest.mark.parametrize("provider", ["torch eager", "batchnorm convert"])
def test_profile_finds_every_group_and_leaves_the_model_as_it_was(
    worker: Any, provider: str
) -> None:
    case = worker.Case(2, 32)
    model = worker.make_model(provider, channels_last=False, seed=0)
    step = worker.make_step(model, bfloat16=False, learning_rate=1e-4)
    ((images, labels),) = worker.make_data(case, seed=0)
    ms = worker.profile(model, lambda: step(images, labels), 1)
    assert tuple(ms) == worker.GROUPS
    assert {group for group, taken in ms.items() if taken <= 0} <= {"relu"}
    assert "forward" not in vars(model.bn1)


@pytest.mark.parametrize(
    ("losses", "norms", "status"),
    [
        ([7.0, 6.0], [1.0, 2.0], "ok"),
        ([7.0, 6.1], [1.0, 2.0], "wrong"),
        ([7.0, 6.0], [1.0, 2.1], "wrong"),
        ([math.nan, 6.0], [1.0, 2.0], "wrong"),
    ],
)
def test_check_refuses_another_answer_than_eagers(
    bench: Any, losses: list[float], norms: list[float], status: str
) -> None:
    row = bench.StepRow(batch=2, image=32, format="contiguous", dtype="float32", provider="some")
    eager = {"losses": [7.0, 6.0], "gradient_norms": [1.0, 2.0]}
    found = {"losses": losses, "gradient_norms": norms}
    assert bench.check(row, found, eager).status == status


@pytest.mark.parametrize(("difference", "verdict"), [(2e-3, "pass"), (2.1e-3, "fail")])
def test_losses_pass_up_to_twice_the_noise(losses: Any, difference: float, verdict: str) -> None:
    found = {
        losses.EAGER: 0.0,
        losses.REVERSED: 1e-3,
        losses.CHANNELS_LAST: 5e-4,
        losses.CONVERTED: difference,
    }
    rows = [
        losses.LossRow(
            run=run,
            seed=0,
            batch=2,
            image=32,
            steps=1,
            first_loss=7.0,
            last_loss=7.0,
            largest_difference=largest,
        )
        for run, largest in found.items()
    ]
    assert [row.verdict for row in losses.judge(rows)] == ["", "", "", verdict]


STUB = """
import sys

class Training:
    def __init__(self, provider, **arguments):
        if provider == "torch.compile":
            sys.exit("no compiler")
        self.provider = provider

    def warmed_up(self):
        return {"losses": [7.0], "gradient_norms": [1.0]}

    def step(self):
        if self.provider == "batchnorm convert":
            sys.exit("no memory left")
        return [0.5, 3.0]

    def memory(self):
        return {"peak_bytes": 8.0, "warmup_peak_bytes": 9.0}
"""


def test_process_that_dies_is_a_row_that_says_so_and_leaves_the_others_theirs(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(bench, "WORKER", script)
    case = bench.Case(2, 32)
    providers = (bench.EAGER, bench.COMPILED, bench.CONVERTED)
    plan = bench.Plan(cases=(case,), providers=providers, rounds=3)
    eager, compiled, ours = bench.measure_case(case, plan, lambda description: None)
    assert (eager.status, eager.rounds, eager.p50_ms, eager.page_faults) == ("ok", 3, 500.0, 3.0)
    assert (eager.peak_bytes, eager.ratio) == (8.0, 1.0)
    assert (compiled.status, compiled.rounds) == ("failed", 0)
    assert compiled.detail == "the process ended with status 1: no compiler"
    assert (ours.status, ours.rounds) == ("failed", 0)
    assert ours.detail == "in round 1: the process ended with status 1: no memory left"


# --- the command ----------------------------------------------------------------------------------


def test_quick_run_writes_well_formed_files(
    bench: Any, losses: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Their numbers are another test's.
    monkeypatch.setattr(losses, "loss_curve", lambda *case, steps, **how: [7.0] * steps)
    out = tmp_path / "new"
    options = "--quick --image 32 --batches 8 --rounds 2 --warmup 1 --loss-steps 3 --threads 1"
    providers = ["--providers", "torch eager,batchnorm convert"]
    assert bench.main([*options.split(), *providers, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "resnet_step.csv",
        "resnet_losses.csv",
        "resnet_step.json",
    }
    eager, ours = rows_of(out / "resnet_step.csv")
    assert (eager["provider"], ours["provider"]) == ("torch eager", "batchnorm convert")
    assert float(eager["ratio"]) == 1.0
    for row in (eager, ours):
        assert (row["status"], row["rounds"], row["dtype"]) == ("ok", "2", "float32")
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
        assert float(row["page_faults"]) >= 0
        # 11.7 million float32 parameters, their gradients and their momentum.
        assert float(row["peak_bytes"]) > 3 * 4 * 11_689_512
    compared = rows_of(out / "resnet_losses.csv")
    assert [row["verdict"] for row in compared] == ["", "", "", "pass", "pass"]
    about = json.loads((out / "resnet_step.json").read_text())
    assert (about["threads"], about["rounds"]) == (1, 2)
    assert "torch" in about["versions"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batches", "8,one"], "'one'"),
        (["--batches", "1"], "2 or more"),
        (["--image", "16"], "32 or more"),
        (["--formats", "nhwc"], "must be among contiguous, channels_last"),
        (["--dtypes", "float16"], "must be among float32, bfloat16"),
        (["--providers", "torch"], "must be among torch eager, torch.compile, batchnorm convert"),
        (["--rounds", "0"], "1 or more"),
        (["--threads", "100000"], "threads must be between 1 and"),
        (["--out", "/dev/null/results"], "Name another directory"),
        (["surplus"], "unrecognized arguments"),
    ],
)
def test_bad_input_exits_with_2(
    bench: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    try:
        status = bench.main(arguments)
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert said in capsys.readouterr().err
