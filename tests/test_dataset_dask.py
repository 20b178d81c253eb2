"""Dask: arrays cut in any way, and files on a real cluster, of which a worker is killed."""

import os
import signal
import socketserver
import subprocess
import sys
import threading

import numpy as np
import pytest

from batchnorm import Moments, cli, dataset
from batchnorm.dataset import cluster
from batchnorm.dataset.sources import FileOptions, blocks, open_file
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

ROUNDING = 1e-12


@pytest.fixture(scope="module")
def workers():
    """Three worker processes, each of which is started again if it dies."""
    before = dict(os.environ)  # the cluster has processes that it starts run one thread each
    with (
        # A task that has outlived two workers is given up.
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(
            n_workers=3,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            memory_limit=0,
        ) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        yield client
    os.environ.clear()
    os.environ.update(before)


def chunked(x, chunks):
    return da.from_array(x, chunks=chunks)


@pytest.fixture
def x(rng):
    return rng.normal(1e4, 1.0, (50, 6, 8)).astype(np.float32)


# ---- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(50, 6, 8), (7, 6, 8), (50, 4, 8), (7, 4, 3), (1, 1, 8)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_moments_of_a_dask_array_are_those_of_its_values(chunks, axis, x):
    found = Moments.of(chunked(x, chunks), channel_axis=axis)
    expected = Moments.of(x, channel_axis=axis)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=ROUNDING)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-9)


def test_moments_of_a_dask_array_pass_nan_on(x):
    x[3, 2, 1] = np.nan
    found = Moments.of(chunked(x, (7, 4, 3)))
    np.testing.assert_array_equal(np.isnan(found.mean), np.arange(6) == 2)


@pytest.mark.parametrize("chunks", [(50, 6, 8), (7, 4, 3)])
def test_moments_of_a_dask_array_ignore_masked_values(chunks, x, rng):
    mask = rng.random(x.shape) < 0.2
    mask[:, 0] = False
    x[mask] = np.nan
    array = da.ma.masked_array(chunked(x, chunks), chunked(mask, chunks))
    found, expected = Moments.of(array), Moments.of(np.ma.MaskedArray(x, mask))
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=ROUNDING)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-9)


def test_moments_of_a_dask_array_have_the_same_bits_on_any_scheduler(x, workers):
    array = chunked(x.astype(">f8"), (7, 4, 3))
    with dask.config.set(scheduler="synchronous"):
        found = Moments.of(array)
    with dask.config.set(scheduler="threads"):
        assert Moments.of(array) == found
    with dask.config.set(scheduler=workers.get):
        assert Moments.of(array) == found


@pytest.mark.parametrize("dtype", ["i4", "?", "f2", ">f8"])
def test_measure_takes_every_real_type(dtype, rng):
    x = rng.integers(0, 2, (40, 3)).astype(dtype)
    found = dataset.measure(chunked(x, (7, 2)))
    np.testing.assert_allclose(found.mean, x.astype(float).mean(0), rtol=ROUNDING)


def test_measure_skips_and_counts_what_is_missing(x, rng):
    x[rng.random(x.shape) < 0.2] = np.nan
    found = dataset.measure(chunked(x, (7, 4, 3)), missing="skip")
    expected = dataset.measure(x, missing="skip")
    np.testing.assert_array_equal(found.missing, expected.missing)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=ROUNDING)


def test_measure_refuses_missing_values(x):
    x[3, 5, 1] = np.nan
    with pytest.raises(ArgumentError, match=r"NaN in feature 5 at index \(3, 1, 1\) of a chunk"):
        dataset.measure(chunked(x, (7, 4, 3)))


def test_measure_has_the_same_bits_on_any_scheduler(x, workers):
    array = chunked(x, (7, 4, 3))
    found = dataset.measure(array)
    with dask.config.set(scheduler="synchronous"):
        assert dataset.measure(array) == found
    assert dataset.measure(array, client=workers) == found


def test_measure_takes_chunks_of_unknown_length(x):
    array = chunked(x, (7, 6, 8))
    found = dataset.measure(array[array[:, 0, 0] > 0])
    np.testing.assert_allclose(found.mean, Moments.of(x).mean, rtol=ROUNDING)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_normalize_of_a_dask_array_is_lazy_and_the_same_map(axis, x):
    found = dataset.measure(x, channel_axis=axis)
    y = dataset.normalize(chunked(x, (7, 4, 3)), found)
    assert isinstance(y, da.Array)
    assert (y.dtype, y.chunks) == (x.dtype, chunked(x, (7, 4, 3)).chunks)
    np.testing.assert_array_equal(y.compute(), dataset.normalize(x, found))


def test_dask_arrays_that_cannot_be_measured_are_refused(x):
    array = chunked(x, (7, 4, 3))
    with pytest.raises(BatchNormError, match="weights must be None for a Dask array"):
        Moments.of(array, weights=np.ones((50, 1)))
    with pytest.raises(DTypeError, match="Dask array of complex128"):
        Moments.of(array.astype(complex))
    with pytest.raises(ShapeError, match="at least 2 axes"):
        Moments.of(array[:, 0, 0])
    with pytest.raises(ShapeError, match="known number of features"):
        Moments.of(array[array[:, 0, 0] > 0], channel_axis=0)
    with pytest.raises(ShapeError, match="as many features as the statistics, 6, got 4"):
        dataset.normalize(array[:, :4], dataset.measure(x))

    class Bag:
        __dask_graph__ = None

    with pytest.raises(DTypeError, match=r"must be an array, got .*Bag"):
        Moments.of(Bag())


def test_arrays_and_files_are_measured_without_importing_dask(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    code = (
        "import sys, numpy as np; from batchnorm import Moments, dataset; "
        f"Moments.of(np.ones((2, 2))); found = dataset.measure({str(tmp_path / 'x.npy')!r}); "
        "dataset.normalize(np.ones((2, 2)), found); "
        "print(sorted({'dask', 'distributed', 'pyarrow', 'h5py', 'zarr', 'fsspec'} "
        "& sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_measure_takes_masked_chunks(x, rng):
    mask = rng.random(x.shape) < 0.2
    array = da.ma.masked_array(chunked(x, (7, 4, 3)), chunked(mask, (7, 4, 3)))
    found = dataset.measure(array, missing="skip")
    np.testing.assert_array_equal(found.missing, mask.sum((0, 2)))
    y = dataset.normalize(array, found).compute()
    np.testing.assert_array_equal(np.isnan(y), mask)
    with pytest.raises(ArgumentError, match="NaN in feature"):
        dataset.measure(array)


def test_measure_refuses_integers_that_float64_rounds():
    with pytest.raises(ArgumentError, match="x: integers must be below"):
        dataset.measure(da.from_array(np.full((4, 2), 2**53 + 1), chunks=2))


def test_measure_refuses_squares_that_overflow_between_chunks():
    array = da.from_array(np.repeat([[1e200], [-1e200]], 4, axis=0), chunks=4)
    with pytest.raises(ArgumentError, match="x: values are too large, the squares of feature 0"):
        dataset.measure(array)


def test_measure_refuses_a_delayed_value():
    with pytest.raises(DTypeError, match=r"x must be an array, got dask\.delayed"):
        dataset.measure(dask.delayed(1))


def test_measure_of_an_array_says_that_workers_died(workers):
    workers.wait_for_workers(1, timeout=120)  # one may fail to come back under load
    array = da.ones((4, 2), chunks=4).map_blocks(lambda block: os._exit(1), meta=np.ones((0, 0)))
    with pytest.raises(BatchNormError, match="x: gave up after several workers died"):
        dataset.measure(array, client=workers)


# ---- files on a cluster -------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch, rng):
    """Two files of some hundred blocks, and one of a single block."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    for k, rows in enumerate((40_000, 30_011, 5)):
        values = rng.normal(1e4, 1.0, (rows, 3))
        values[rows // 2, 1] = np.nan
        np.save(tmp_path / f"{k}.npy", values)
    np.savez_compressed(tmp_path / "3.npz", rng.normal(1e4, 1.0, (1000, 3)))
    return tmp_path


def test_measure_on_a_cluster_has_the_bits_it_has_without(files, workers):
    told = []
    found = dataset.measure(
        files, missing="skip", client=workers, progress=lambda *given: told.append(given)
    )
    assert found == dataset.measure(files, missing="skip")
    assert len(told) > 100


def test_measure_gives_the_same_when_a_worker_is_killed_meanwhile(files, workers):
    expected = dataset.measure(files, missing="skip")
    workers.wait_for_workers(1, timeout=120)  # one may fail to come back under load
    killed = []

    def kill(name, done, whole):
        if done > whole // 10 and not killed:
            busy = {worker: tasks for worker, tasks in workers.processing().items() if tasks}
            if not busy:  # between two tasks: the next call tries again
                return
            worker = sorted(busy)[0]
            process = workers.scheduler_info(n_workers=-1)["workers"][worker]
            (pid,) = workers.run(os.getpid, workers=[worker]).values()
            assert process["nanny"]
            os.kill(pid, signal.SIGKILL)
            killed.append((pid, len(busy[worker]), done, whole))

    found = dataset.measure(files, missing="skip", client=workers, progress=kill)
    assert killed
    assert killed[0][1] > 0
    assert killed[0][0] not in workers.run(os.getpid).values()
    assert found == expected


def test_measure_on_a_cluster_raises_what_a_worker_raises(files, workers):
    with pytest.raises(ArgumentError, match=r"0\.npy: values must not be missing"):
        dataset.measure(files / "0.npy", client=workers)


def test_measure_on_a_cluster_takes_paths_from_here(files, workers, monkeypatch):
    expected = dataset.measure(files, missing="skip")
    monkeypatch.chdir(files.parent)
    found = dataset.measure(files.name, missing="skip", client=workers)
    assert found.moments == expected.moments


def test_measure_on_a_cluster_passes_addresses_on(files, workers):
    address = f"file://{files}/2.npy"
    found = dataset.measure(address, missing="skip", client=workers)
    assert found.files == (address,)
    assert found.moments == dataset.measure(files / "2.npy", missing="skip").moments
    # Not in the memory of the workers.
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/cluster/x.npy", (files / "2.npy").read_bytes())
    with pytest.raises(ArgumentError, match=r"memory://cluster/x\.npy: .* Workers must reach it"):
        dataset.measure("memory://cluster/x.npy", missing="skip", client=workers)


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_measure_on_a_cluster_reads_chunks(suffix, tmp_path, workers, rng, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    x = rng.normal(1e4, 1.0, (900, 7))
    path = tmp_path / f"x{suffix}"
    if suffix == ".h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file.create_dataset("x", data=x, chunks=(30, 4), compression="gzip")
    else:
        pytest.importorskip("zarr").create_array(str(path), data=x, chunks=(30, 4))
    assert len(open_file(str(path), 1, FileOptions()).split(cluster.TASK_BLOCKS)) > 1
    assert dataset.measure(path, client=workers) == dataset.measure(path)


def test_measure_on_a_cluster_says_that_workers_must_reach_the_files(files, workers):
    source = open_file(files / "2.npy", 1, FileOptions())
    told = []
    with pytest.raises(
        ArgumentError, match=r"there is no such file.* Workers must reach it by the"
    ):
        cluster.measure_files(
            workers, {0: source.with_path("/none/2.npy")}, "skip", lambda *_: None, told.append
        )
    assert told == []


def test_measure_on_a_cluster_refuses_a_file_that_changed_meanwhile(files, workers):
    def change(name, done, whole):
        os.utime(files / "2.npy", ns=(0, 0))

    with pytest.raises(ArgumentError, match=r"2\.npy: changed while it was read"):
        dataset.measure(files / "2.npy", missing="skip", client=workers, progress=change)


def test_measure_on_a_cluster_goes_on_after_an_interruption(files, workers, tmp_path):
    out = tmp_path / "stats.npz"
    paths = [files / f"{k}.npy" for k in (2, 0)]

    def interrupt(name, done, whole):
        if (tmp_path / "stats.npz.partial").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.measure(paths, missing="skip", out=out, client=workers, progress=interrupt)
    notes = []
    found = dataset.measure(paths, missing="skip", out=out, client=workers, note=notes.append)
    assert len(notes) == 1
    assert found == dataset.measure(paths, missing="skip")


def test_measure_on_a_cluster_gives_up_when_workers_keep_dying(files, workers, monkeypatch):
    workers.wait_for_workers(1, timeout=120)  # one may fail to come back under load
    monkeypatch.setattr(cluster, "measure_blocks", lambda *_: os._exit(1))
    with pytest.raises(BatchNormError, match=r"2\.npy: gave up after several workers") as caught:
        dataset.measure(files / "2.npy", missing="skip", client=workers)
    assert "\n" not in str(caught.value)


def test_stats_runs_on_the_cluster_at_an_address(files, workers, capsys):
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    address = workers.scheduler_info()["address"]
    arguments = ["stats", str(files), "--missing", "skip", "--out", str(files / "s.json")]
    assert cli.main([*arguments, "--dask", address]) == cli.DONE
    assert capsys.readouterr().err == ""
    found = dataset.Statistics.load(files / "s.json")
    assert found == dataset.measure(files, missing="skip")


def test_connect_says_that_nobody_answers():
    connecting = cluster.connect("tcp://127.0.0.1:9", timeout=0.5)
    with (
        pytest.raises(ArgumentError, match="got 'tcp://127.0.0.1:9', where none answers"),
        connecting,
    ):
        pass


def test_connect_says_that_there_are_no_workers():
    with (
        distributed.LocalCluster(n_workers=0, protocol="tcp://", dashboard_address=":0") as empty,
        pytest.raises(ArgumentError, match="has none within"),
        cluster.connect(empty.scheduler_address, timeout=0.5),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("nonsense://", "unknown address scheme"),
        ("localhost", "missing port number"),
        ("tcp://localhost", "missing port number"),
        ("tcp://localhost:8786x", "invalid literal"),
        ("tcp://localhost:99999", "no such port"),
        ("tcp://:8786", "no host"),
        ("tcp://host.invalid:8786", "Name its host and port"),
        ("::1", "ipv6 needs brackets"),
        ("inproc://10.0.0.1/1/2", "host and port"),
        ("tls://127.0.0.1:9", "ssl_context"),
    ],
)
def test_connect_refuses_what_is_no_address(address, why):
    # At once, and without a client, whose deletion would wait for 20 s and print a traceback.
    with (
        pytest.raises(ArgumentError, match=f"must be the address of a scheduler.*{why}"),
        cluster.connect(address, timeout=60),
    ):
        pass


def test_connect_refuses_what_is_no_scheduler():
    class Answer(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_address[1]}"
        with (
            pytest.raises(ArgumentError, match="where none answers"),
            cluster.connect(address, timeout=2),
        ):
            pass
        server.shutdown()
