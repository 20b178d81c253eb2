"""The benchmark of data sets: its exact answers are exact, and a run says what it found."""

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("typer")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("dataset_stats")
    monkeypatch.setattr(module, "BLOCK_ROWS", 100)
    return module


def test_make_knows_mean_and_variance_of_what_it_writes(benchmark, tmp_path):
    mean, var = benchmark.make(tmp_path / "x.npy", 30, seed=1)
    x = np.load(tmp_path / "x.npy").astype(np.longdouble)
    assert x.shape == (3000, benchmark.FEATURES)
    # 3000 values near 1e4 in extended precision: sums are right to 3000 · 2⁻⁶⁴.
    np.testing.assert_allclose(x.mean(0).astype(float), [float(m) for m in mean], rtol=1e-15)
    np.testing.assert_allclose(x.var(0).astype(float), [float(v) for v in var], rtol=1e-12)


def test_run_prints_and_writes_what_it_measured(benchmark, tmp_path, capsys):
    pytest.importorskip("sklearn")
    size = f"{100 * benchmark.FEATURES * 4 * 3}B"
    assert benchmark.main(["--size", size, "--rounds", "1", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "dataset_stats.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == list(benchmark.PROVIDERS)
    assert (tmp_path / "dataset_stats.json").exists()
    assert "batchnorm stats" in capsys.readouterr().out


def test_a_broken_promise_has_status_1(benchmark, monkeypatch, capsys):
    row = benchmark.Row(provider=benchmark.OURS, cache="cold", bytes=1, rows=1, peak_bytes=6e8)
    monkeypatch.setattr(benchmark, "measure_file", lambda *_: [row])
    assert benchmark.main([]) == 1
    assert "peak_bytes is 6e+08, where at most 5e+08 is promised" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["20", "GB", "1e999GB"])
def test_unusable_calls_are_refused(size, benchmark):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--size", size])
    assert caught.value.code == 2


def test_sizes_beyond_the_disk_are_refused(benchmark, capsys):
    assert benchmark.main(["--size", "90000TB"]) == 2
    assert "--size must fit on the disk" in capsys.readouterr().err


@pytest.fixture
def images(monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("images")
    monkeypatch.setattr(module, "SIDES", (8, 20))
    monkeypatch.setattr(module, "PROVIDERS", dict(itertools.islice(module.PROVIDERS.items(), 4)))
    return module


def test_images_are_made_with_their_exact_answer(images, tmp_path):
    mean, std, pixels = images.make(tmp_path, 40, seed=1)
    arrays = images._arrays(tmp_path)
    x = np.concatenate([a.reshape(-1, 3) for a in arrays]).astype(np.longdouble)
    assert len(x) == pixels
    # Values are k/255 in float32, off by 2⁻²⁵ at the most.
    np.testing.assert_allclose(x.mean(0).astype(float), [float(m) for m in mean], rtol=1e-7)
    np.testing.assert_allclose(x.std(0).astype(float), std, rtol=1e-6)
    assert {path.suffix for path in tmp_path.iterdir()} == {".jpg", ".png"}


def test_image_run_prints_and_writes_what_it_measured(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images.importlib.metadata, "version", lambda name: "1")
    options = images.argparse.Namespace(quick=False, images=12, rounds=1, seed=0, directory=None)
    files = {}
    assert images.measure(options, files) == []
    ours, alone, float32, average = files["images.csv"]
    assert (ours.provider, alone.provider) == (images.OURS, images.OURS_ALONE)
    assert max(ours.mean_error, ours.std_error) <= images.LIMIT < float32.mean_error
    assert average.std_error > 0.01
    assert "batchnorm, 1 process" in capsys.readouterr().out
