"""The benchmark of data sets: its exact answers are exact, and a run says what it found."""

import importlib
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
