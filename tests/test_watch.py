"""watch: what it records, what it leaves alone, and the file."""

import copy
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyarrow")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import zoo  # noqa: E402
from batchnorm.diagnose import Recording, Snapshot  # noqa: E402
from batchnorm.diagnose.recording import FEWEST, LATEST, MOST  # noqa: E402
from batchnorm.errors import ArgumentError  # noqa: E402
from batchnorm.torch import BatchNorm1d, check, convert, watch  # noqa: E402


def _net(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4, bias=False), norm(4), nn.ReLU(), nn.Linear(4, 2))


def _steps(net, count, optimizer=None, x=None):
    for k in range(count):
        batch = torch.randn(16, 5, generator=torch.Generator().manual_seed(k)) if x is None else x
        loss = net(batch).square().mean()
        net.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()


class _Subclass(nn.BatchNorm1d):
    pass


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d, _Subclass])
def test_snapshot_holds_what_the_layer_has_seen(norm):
    net = _net(norm)
    x = torch.randn(16, 5)
    inputs = net[0](x).detach().double()
    with watch(net) as recording:
        _steps(net, 1, x=x)
    y = nn.functional.batch_norm(inputs.float(), None, None, training=True)
    (found,) = recording.snapshots
    assert (found.step, found.layer, found.values, found.examples) == (0, "1", 16, 16)
    np.testing.assert_allclose(found.mean, inputs.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.var, inputs.var(0, unbiased=False), rtol=1e-5)
    np.testing.assert_array_equal(found.running_mean, np.zeros(4))  # before the step
    np.testing.assert_array_equal(found.running_var, np.ones(4))
    np.testing.assert_array_equal(found.weight, net[1].weight.detach())
    assert found.updates == 0
    assert found.gradient_weight == pytest.approx(float(net[1].weight.grad.norm()), rel=1e-5)
    assert found.gradient_bias == pytest.approx(float(net[1].bias.grad.norm()), rel=1e-5)
    lows, highs = found.before.reshape(4, -1)[:, 0], found.before.reshape(4, -1)[:, -1]
    np.testing.assert_allclose(lows, inputs.amin(0)[found.channels], rtol=1e-5)
    np.testing.assert_allclose(highs, inputs.amax(0)[found.channels], rtol=1e-5)
    np.testing.assert_allclose(found.high_after, y.amax(0)[found.channels], rtol=1e-4)
    assert found.counts_before.sum() == found.counts_after.sum() == 4 * 16


def test_gradient_of_the_output_is_that_of_autograd():
    net = _net()
    x = torch.randn(16, 5)
    with watch(net) as recording:
        hidden = {}
        net[1].register_forward_hook(lambda m, a, y: (y.retain_grad(), hidden.update(y=y))[0])
        net(x).square().mean().backward()
    expected = float(hidden["y"].grad.norm())
    assert recording.snapshots[0].gradient == pytest.approx(expected, rel=1e-5)


def test_images_of_any_layout_and_type():
    net = nn.Sequential(nn.BatchNorm2d(3)).to(torch.bfloat16)
    x = torch.randn(8, 3, 6, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    with watch(net) as recording:
        net(x)
    (found,) = recording.snapshots
    assert found.values == 240
    np.testing.assert_allclose(found.mean, x.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_every_so_many_steps_are_recorded():
    with watch(net := _net(), every=3) as recording:
        _steps(net, 8)
    assert recording.steps == [0, 3, 6]
    assert repr(recording) == "Recording of 1 layer, 3 steps from 0 to 6"


def test_evaluation_and_recomputed_forwards_are_no_steps():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _net()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    model = Checkpointed()
    with watch(model, every=1) as recording:
        _steps(model, 2)
        model.eval()
        _steps(model, 3)
        model.train()
        _steps(model, 1)
    assert recording.steps == [0, 1, 2]
    assert len(recording.snapshots) == 3


def test_watching_changes_nothing():
    def trained(watched):
        net = convert(_net())
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        torch.manual_seed(3)
        if watched:
            with watch(net, every=1, probe=torch.ones(4, 5)):
                _steps(net, 5, optimizer)
        else:
            torch.ones(4, 5)
            _steps(net, 5, optimizer)
        return net, torch.rand(1)

    (one, after_one), (other, after_other) = trained(True), trained(False)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(after_one, after_other)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())
    assert not any(p._backward_hooks for p in one.parameters())


def test_no_hook_stays_when_the_block_or_a_forward_raises(tmp_path):
    net = _net()
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="stop"),
        watch(net, tmp_path / "run.parquet", every=1) as recording,
    ):
        _steps(net, 2)
        with pytest.raises(RuntimeError):
            net(torch.randn(16, 3))
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert Recording.load(tmp_path / "run.parquet").steps == recording.steps == [0, 1]


def test_layer_that_is_called_twice_has_a_snapshot_for_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(x) + self.norm(40 * x + 90)

    model = Twice()
    with watch(model) as recording:
        _steps(model, 1)
    assert [s.call for s in recording.snapshots] == [0, 1]
    assert [f.code for f in check(model, recording=recording)] == ["BN405"]


def test_probe_measures_how_far_inputs_have_moved():
    net = _net()
    probe = torch.randn(64, 5)
    with watch(net, every=1, probe=probe) as recording:
        net(torch.randn(16, 5))
        before = net[0](probe).detach().numpy()
        with torch.no_grad():
            net[0].weight.add_(0.5)
        after = net[0](probe).detach().numpy()
        net(torch.randn(16, 5))
    first, second = recording.snapshots
    assert np.isnan(first.moved)
    moved = np.abs(np.sort(before, 0) - np.sort(after, 0)).mean()
    assert second.moved == pytest.approx(moved, rel=1e-4)
    assert second.moved_relative > 0


def test_compiled_model_is_recorded():
    net = torch.compile(_net(), backend="eager")
    with watch(net, every=2) as recording:
        _steps(net, 4)
    assert recording.steps == [0, 2]
    assert all(np.isfinite(s.gradient) for s in recording.snapshots)


def test_callback_gets_numbers_and_step():
    seen = []

    class Writer:
        def add_scalar(self, name, value, step):
            seen.append((name, step))

    logged = []
    with watch(
        net := _net(), every=2, log=[Writer(), lambda metrics, step: logged.append((step, metrics))]
    ):
        _steps(net, 3)
    assert [step for step, _ in logged] == [0, 2]
    assert {"batchnorm/1/std", "batchnorm/1/running_shift"} <= logged[0][1].keys()
    assert all(isinstance(v, float) for v in logged[0][1].values())
    assert ("batchnorm/1/std", 2) in seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("net",), "takes a torch.nn.Module, got str"),
        ((nn.Linear(2, 2),), "a model with batch norms, got one without"),
        ((nn.BatchNorm1d(2), None, 0), "every must be a positive number of steps, got 0"),
        ((nn.BatchNorm1d(2), None, True), "got True"),
        ((nn.BatchNorm1d(2), "/nowhere/run.parquet"), "'/nowhere' is not one"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message), watch(*arguments):
        pass


def test_masked_values_do_not_count():
    layer = BatchNorm1d(4)
    mask = torch.arange(10) < 3
    x = torch.where(mask, torch.randn(8, 4, 10), 100.0)
    with watch(layer) as recording:
        layer(x, mask=mask)
    (found,) = recording.snapshots
    assert found.values == 24
    np.testing.assert_allclose(found.mean, x[:, :, :3].mean((0, 2)), rtol=1e-4, atol=1e-6)


def test_forwards_without_gradients_are_no_steps():
    with watch(net := _net(), every=1) as recording:
        _steps(net, 2)
        with torch.no_grad():
            net(torch.randn(16, 5))
    assert recording.steps == [0, 1]


def test_model_that_is_never_called_is_named():
    net = _net()
    said = "watch saw no step: no forward of this Sequential"
    with pytest.warns(RuntimeWarning, match=said), watch(nn.Sequential(net)):
        _steps(net, 2)


def test_model_compiled_in_place_is_refused():
    net = _net()
    net.compile(backend="eager")
    with pytest.raises(ArgumentError, match="not compiled in place"), watch(net):
        pass


def test_copies_made_while_watching_are_free():
    with watch(net := _net(), every=1) as recording:
        _steps(net, 1)
        copied = copy.deepcopy(net)
        pickled = pickle.loads(pickle.dumps(net))
        _steps(copied, 3)
        _steps(pickled, 3)
        _steps(net, 1)
    assert recording.steps == [0, 1]


def test_log_that_raises_ends_no_training():
    def log(metrics, step):
        raise OSError("no network")

    with (
        pytest.warns(RuntimeWarning, match="no longer logs to .*: OSError: no network"),
        watch(net := _net(), every=1, log=log) as recording,
    ):
        _steps(net, 4)
    assert len(recording.steps) == 4


def test_file_that_cannot_be_written_meanwhile_ends_no_training(tmp_path, monkeypatch):
    path = tmp_path / "run.parquet"
    save, fails = Recording.save, [True]

    def full(self, place):
        if fails[0]:
            raise ArgumentError("no space left")
        save(self, place)

    monkeypatch.setattr(Recording, "save", full)
    with (  # noqa: PT031
        pytest.warns(RuntimeWarning, match="no space left"),
        watch(net := _net(), path, every=1) as recording,
    ):
        _steps(net, 4)
        fails[0] = False
    assert Recording.load(path).steps == recording.steps == [0, 1, 2, 3]


def test_layers_in_evaluation_mode_are_recorded_as_such():
    net = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4))
    net(torch.randn(64, 5))
    net[0].requires_grad_(False)
    with watch(net, every=1) as recording:
        for _k in range(40):
            net.train()
            net[0].eval()
            net(torch.randn(64, 5)).square().mean().backward()
    assert not [s for s in recording.snapshots if s.training and s.layer == "0"]
    assert not check(net, recording=recording, select=["BN407", "BN301", "BN202"])


# ---- bounds -------------------------------------------------------------------------------------


def _snapshots(step, channels=4):
    values = np.full(channels, step, np.float32)
    return [Snapshot(step, "a", mean=values, var=values), Snapshot(step, "b", mean=values)]


def test_long_recordings_keep_the_latest_steps_and_thin_the_older_evenly():
    recording = Recording()
    for step in range(0, 100_000, 20):
        recording.add(_snapshots(step))
    steps = recording.steps
    assert len(steps) <= MOST
    assert len(recording.snapshots) == 2 * len(steps)
    assert steps[0] == 0
    assert steps[-LATEST:] == list(range(100_000 - 20 * LATEST, 100_000, 20))
    spacing = np.diff(steps[: -LATEST - 1])
    assert len(set(spacing.tolist())) == 1


def test_large_models_keep_fewer_steps():
    recording = Recording()
    for step in range(200):
        recording.add(_snapshots(step, channels=400_000))
    size = sum(s.mean.nbytes + s.var.nbytes for s in recording.snapshots)
    assert FEWEST - 1 <= len(recording.steps) <= FEWEST
    assert size < 130 * 2**20


# ---- files --------------------------------------------------------------------------------------


def test_file_round_trips_and_is_a_table_that_others_read(tmp_path):
    path = tmp_path / "run.parquet"
    with watch(net := _net(), path, every=1) as recording:
        _steps(net, 3)
    loaded = Recording.load(path)
    assert loaded.about == recording.about
    for one, other in zip(recording.snapshots, loaded.snapshots, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(path)
    assert list(table["step"]) == [0, 1, 2]
    np.testing.assert_array_equal(table["mean"][2], recording.snapshots[2].mean)


def test_file_can_be_read_while_the_block_runs(tmp_path):
    path = tmp_path / "run.parquet"
    with watch(net := _net(), path, every=1):
        _steps(net, 3)
        assert Recording.load(path).steps


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet", b"PAR1" + bytes(64) + b"PAR1"])
def test_damaged_file_is_refused_in_a_line(tmp_path, content):
    path = tmp_path / "run.parquet"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match="it is damaged, or was not written by watch"):
        Recording.load(path)


def test_other_parquet_files_are_refused(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ArgumentError, match="was not written by watch"):
        Recording.load(tmp_path / "other.parquet")
    with pytest.raises(ArgumentError, match="there is no such file"):
        Recording.load(tmp_path / "missing.parquet")


_FOREVER = """
import sys, torch
from torch import nn
from batchnorm.torch import watch
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
with watch(net, sys.argv[1], every=1):
    while True:
        net(torch.randn(16, 5)).sum().backward()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no signals")
@pytest.mark.parametrize("wait", [0.05, 0.31, 0.77])
def test_file_of_a_killed_process_is_whole(tmp_path, wait):
    path = tmp_path / "run.parquet"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(_FOREVER), str(path)])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Recording.load(path).steps[0] == 0


# ---- processes ----------------------------------------------------------------------------------


def _rank(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(_net(), broadcast_buffers=False)
    with watch(net, f"{folder}/run.parquet", every=1):
        for k in range(30):
            torch.manual_seed(10 * k + rank)
            net(torch.randn(8, 5) * (1 + 4 * rank) + 3 * rank).square().mean().backward()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no distributed")
def test_each_process_records_and_the_report_compares_them(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(r, port, str(tmp_path))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first = Recording.load(tmp_path / "run.parquet")
    second = Recording.load(tmp_path / "run.rank1.parquet")
    assert (first.rank, second.rank, first.processes) == (0, 1, 2)
    assert len(first.ranks) == 2
    codes = {finding.code for finding in check(_net(), recording=first)}
    assert {"BN108", "BN409"} <= codes


# ---- what the recording shows -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda layer: setattr(layer, "momentum", 0.001), "BN105"),
        (lambda layer: setattr(layer, "momentum", 0.99), "BN110"),
        (lambda layer: layer.weight.data.mul_(-1), "BN205"),
        (lambda layer: layer.eval(), "BN101"),
    ],
)
def test_sick_training_is_found_in_its_recording(change, code):
    data = zoo.loader(*zoo.rows())
    net = zoo.mlp()
    change(net[1])
    with watch(net, every=1) as recording:
        done = 0
        while done < 120:
            for x, y in data:
                F.cross_entropy(net(x), y).backward()
                done += 1
    found = {(f.code, f.layer) for f in check(net, recording=recording)}
    assert (code, "1") in found


def test_healthy_training_has_no_findings():
    data = zoo.loader(*zoo.rows())
    net = zoo.mlp()
    with watch(net, every=5) as recording:
        zoo.train(net, data)
    assert not check(net, recording=recording)


def test_metadata_says_what_was_watched(tmp_path):
    from pyarrow import parquet

    path = tmp_path / "run.parquet"
    with watch(net := _net(BatchNorm1d), path):
        _steps(net, 1)
    about = json.loads(parquet.read_schema(path).metadata[b"batchnorm"])
    assert about["schema"] == 1
    assert about["layers"]["1"]["kind"] == "BatchNorm1d"
    assert about["versions"]["torch"]


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_the_same_where_the_core_cannot_read(monkeypatch, masked):
    layer, mask = BatchNorm1d(4), torch.arange(10) < (3 if masked else 10)
    x = torch.randn(8, 4, 10) + 5
    found = []
    for direct in (True, False):  # as on another device
        module = sys.modules["batchnorm.torch.diagnose.watch"]  # the package has the function
        monkeypatch.setattr(module, "is_direct", lambda x, d=direct: d)
        with watch(layer) as recording:
            layer(x, mask=mask if masked else None)
        found += recording.snapshots
    one, other = found
    assert one.values == other.values
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)
    np.testing.assert_allclose(one.var, other.var, rtol=1e-4)
