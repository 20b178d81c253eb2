"""The benchmark of whole networks: the networks, what is found wrong, and its files."""

import csv
import gc
import importlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import batchnorm

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another wherever the machine is busy
    yield importlib.import_module("network_worker")
    torch.set_num_threads(threads)


@pytest.fixture
def networks(worker: Any) -> Any:
    return importlib.import_module("networks")


@pytest.fixture
def bench(worker: Any) -> Any:
    return importlib.import_module("network_step")


@pytest.fixture
def losses(worker: Any) -> Any:
    return importlib.import_module("network_losses")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the networks ---------------------------------------------------------------------------------

#: torchvision's name to parameters, convolutions and batch norms, and some names of the state dict.
VISION = {
    # https://pytorch.org/vision/stable/models/generated/torchvision.models.resnet18.html
    "resnet18": (
        *(11_689_512, 20, 20),
        *("bn1.num_batches_tracked", "layer1.1.bn2.running_var", "layer2.0.downsample.0.weight"),
        *("layer4.0.downsample.1.running_mean", "fc.bias"),
    ),
    # https://pytorch.org/vision/stable/models/generated/torchvision.models.mobilenet_v2.html
    "mobilenet_v2": (
        *(3_504_872, 52, 52),
        *("features.0.1.running_mean", "features.1.conv.0.0.weight", "features.1.conv.2.bias"),
        *("features.17.conv.2.weight", "features.17.conv.3.bias", "features.18.0.weight"),
        "classifier.1.bias",
    ),
    # https://pytorch.org/vision/stable/models/generated/torchvision.models.densenet121.html
    "densenet121": (
        *(7_978_856, 120, 121),
        *("features.conv0.weight", "features.denseblock3.denselayer24.norm2.running_var"),
        *("features.transition3.conv.weight", "features.norm5.bias", "classifier.weight"),
    ),
}


@pytest.mark.parametrize("name", VISION)
def test_network_has_torchvisions_parameters_and_names(networks: Any, name: str) -> None:
    parameters, convolutions, norms, *names = VISION[name]
    network = networks.NETWORKS[name]()
    assert sum(p.numel() for p in network.parameters()) == parameters
    # Batch norms have 5 tensors each, the linear layer 2.
    assert len(network.state_dict()) == convolutions + norms * 5 + 2
    assert set(names) <= set(network.state_dict())


@pytest.mark.parametrize("name", VISION)
def test_network_gives_a_score_for_every_class(networks: Any, name: str) -> None:
    with torch.no_grad():
        assert networks.NETWORKS[name]()(torch.zeros(2, 3, 40, 33)).shape == (2, 1000)


def test_benchmark_knows_every_network(bench: Any, networks: Any) -> None:
    assert list(bench.NETWORKS) == list(networks.NETWORKS)


# --- what is measured -----------------------------------------------------------------------------


def case_of(worker: Any, network: str, pass_: str, **changes: Any) -> Any:
    given = {"batch": 8, "image": None if network in worker.WIDTHS else 32} | changes
    return worker.Case(network=network, pass_=pass_, **given)


def test_data_is_the_same_in_both_formats(worker: Any) -> None:
    case = case_of(worker, "resnet18", "training")
    ((first, labels),) = worker.make_data(case, seed=3)
    ((last, same),) = worker.make_data(replace(case, format="channels_last"), seed=3)
    assert torch.equal(first, last)
    assert torch.equal(labels, same)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_model_for_inference_is_trained_and_the_same_for_all(worker: Any) -> None:
    case = case_of(worker, "critic", "inference")
    torchs, ours = (
        worker.make_model(provider, case, seed=0) for provider in (worker.EAGER, worker.CONVERTED)
    )
    assert not torchs.training
    assert torchs[1].num_batches_tracked == worker.EARLIER_STEPS
    assert all(map(torch.equal, torchs.state_dict().values(), ours.state_dict().values()))


def test_losses_in_opposite_order_are_the_same_but_for_rounding(losses: Any, worker: Any) -> None:
    case = case_of(worker, "resnet18", "training")
    forth, back = (
        losses.loss_curve("torch eager", case, seed=0, steps=2, reverse=reverse)
        for reverse in (False, True)
    )
    # Each is float32 of about 7, and its means over 8 examples and 8 values per channel round
    # differently: some hundred roundings of 6e-8 along the network.
    assert forth == pytest.approx(back, rel=1e-5)
    assert forth[0] != forth[1]


@pytest.mark.parametrize("provider", ["torch eager", "batchnorm convert"])
@pytest.mark.parametrize(
    ("network", "pass_", "without"),
    [
        ("resnet18", "training", {"cat"}),
        ("mobilenet_v2", "training", {"cat"}),
        (
            "densenet121",
            "inference",
            {"add", "optimizer", "convolution backward", "batch norm backward"},
        ),
        (
            "critic",
            "training",
            {"convolution forward", "convolution backward", "add", "cat", "pooling"},
        ),
    ],
)
def test_profile_finds_every_group_and_leaves_the_model_as_it_was(
    worker: Any, provider: str, network: str, pass_: str, without: set[str]
) -> None:
    runner = worker.Runner(provider, vars(case_of(worker, network, pass_)), seed=0, warmup=1)
    gc.unfreeze()
    ms = runner.profile(1)
    assert tuple(ms) == worker.GROUPS
    assert {group for group, taken in ms.items() if taken <= 0} == without
    assert not any("forward" in vars(module) for module in runner.model.modules())


@pytest.mark.parametrize(
    ("losses", "norms", "status"),
    [
        ([7.0, 6.0], [1.0, 2.0, 0.0], "ok"),
        ([7.0, 6.1], [1.0, 2.0, 0.0], "wrong"),
        ([7.0, 6.0], [1.0, 2.1, 0.0], "wrong"),
        ([math.nan, 6.0], [1.0, 2.0, 0.0], "wrong"),
        ([7.0, 6.0], [1.0, 2.0, 1e-5], "ok"),  # rounding of a gradient that is zero
    ],
)
def test_check_refuses_another_training_than_eagers(
    bench: Any, losses: list[float], norms: list[float], status: str
) -> None:
    row = bench.StepRow(provider="some", **vars(case_of(bench, "critic", "training")))
    eager = {"losses": [7.0, 6.0], "gradient_norms": [1.0, 2.0, 1e-9]}
    found = {"losses": losses, "gradient_norms": norms}
    assert bench.check(row, found, eager).status == status


@pytest.mark.parametrize(
    ("outputs", "status"),
    [([3.0, 4.004], "ok"), ([3.0, 4.006], "wrong"), ([math.nan, 4.0], "wrong")],
)
def test_check_refuses_other_outputs_than_eagers(
    bench: Any, outputs: list[float], status: str
) -> None:
    # The norm is 5, of which a thousandth is allowed.
    row = bench.StepRow(provider="some", **vars(case_of(bench, "critic", "inference")))
    assert bench.check(row, {"outputs": outputs}, {"outputs": [3.0, 4.0]}).status == status


def test_summary_counts_each_network_once(bench: Any) -> None:
    def row(network: str, ratio: float) -> Any:
        case = case_of(bench, network, "training")
        return bench.StepRow(provider=bench.CONVERTED, ratio=ratio, **vars(case))

    rows = [row("resnet18", 1.0), row("resnet18", 1.0), row("critic", 1 / 4)]
    (summary,) = bench.summarize([*rows, row("resnet18", math.nan)])
    assert summary.speedup == pytest.approx(2.0)
    assert (summary.worst, summary.worst_case) == (1.0, rows[0].label)


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
            network="resnet18",
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

class Runner:
    def __init__(self, provider, **arguments):
        if provider == "torch.compile":
            sys.exit("no compiler")
        self.provider = provider

    def warmed_up(self):
        return {"losses": [7.0], "gradient_norms": [1.0]}

    def run(self):
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
    case = case_of(bench, "critic", "training")
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


QUICK = ["--quick", "--image", "32", "--rounds", "2", "--warmup", "1", "--threads", "1"]


def test_quick_run_writes_well_formed_files(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "new"
    options = ["--networks", "resnet18,critic", "--passes", "training"]
    assert bench.main([*QUICK, *options, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"network_step.csv", "network_step.json"}
    rows = rows_of(out / "network_step.csv")
    assert [row["provider"] for row in rows] == ["torch eager", "batchnorm convert"] * 2
    assert [(row["network"], row["pass"], row["batch"], row["image"]) for row in rows[::2]] == [
        ("resnet18", "training", "8", "32"),
        ("critic", "training", "256", ""),
    ]
    assert all(float(row["ratio"]) == 1.0 for row in rows[::2])
    isa = batchnorm.show_config()["instruction_set"]
    for row in rows:
        assert (row["status"], row["rounds"], row["dtype"]) == ("ok", "2", "float32")
        assert (row["format"], row["threads"], row["isa"]) == ("contiguous", "1", isa)
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
        assert float(row["page_faults"]) >= 0
        assert float(row["loss_error"]) < 1e-5
        assert row["output_error"] == ""
    # 11.7 million float32 parameters, their gradients and their momentum.
    assert all(float(row["peak_bytes"]) > 3 * 4 * 11_689_512 for row in rows[:2])
    about = json.loads((out / "network_step.json").read_text())
    assert (about["threads"], about["rounds"]) == ([1], 2)
    assert "torch" in about["versions"]


@pytest.mark.skipif(
    "avx2" not in batchnorm.show_config()["instruction_sets"], reason="needs a machine with AVX2"
)
def test_run_kept_to_an_instruction_set_has_a_file_of_its_own(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "checked.py"
    script.write_text(
        "import batchnorm, torch\n"
        "from network_worker import *\n"
        "assert batchnorm.show_config()['instruction_set'] == 'avx2'\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'AVX2'\n"
    )
    monkeypatch.setattr(bench, "WORKER", script)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=os.pathsep)
    options = ["--networks", "critic", "--passes", "inference", "--isa", "avx2"]
    assert bench.main([*QUICK, *options, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "network_step_avx2.csv")
    assert {(row["pass"], row["isa"], row["status"]) for row in rows} == {
        ("inference", "avx2", "ok")
    }
    about = json.loads((tmp_path / "network_step_avx2.json").read_text())
    assert about["instruction_set"] == "avx2"


def test_losses_write_a_file_of_their_own(
    bench: Any, losses: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Their numbers are another test's.
    monkeypatch.setattr(losses, "loss_curve", lambda *case, steps, **how: [7.0] * steps)
    assert bench.main(["--quick", "--losses", "--out", str(tmp_path)]) == 0
    compared = rows_of(tmp_path / "network_losses.csv")
    assert len(compared) == 5
    assert {row["verdict"] for row in compared} == {""}  # one seed decides nothing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batches", "8,one"], "'one'"),
        (["--batches", "0"], "1 or more"),
        (["--image", "16"], "32 or more"),
        (
            ["--networks", "vgg"],
            "must be among resnet18, mobilenet_v2, densenet121, critic, policy",
        ),
        (["--passes", "forward"], "must be among training, inference"),
        (["--formats", "nhwc"], "must be among contiguous, channels_last"),
        (["--dtypes", "float16"], "must be among float32, bfloat16"),
        (["--providers", "torch"], "must be among torch eager, torch.compile, batchnorm convert"),
        (["--rounds", "0"], "1 or more"),
        (["--profile", "--losses"], "not allowed with"),
        (["--losses", "--isa", "avx2"], "Set BATCHNORM_ISA instead"),
        (["--losses", "--rounds", "3"], "leave it out"),
        (["--threads", "1,100000"], "threads must be between 1 and"),
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
