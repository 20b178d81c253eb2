"""batchnorm stats and batchnorm normalize: exit statuses, one line for bad input, whole files."""

import contextlib
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from batchnorm import cli, dataset
from batchnorm.cli.commands import stats
from batchnorm.cli.output import split_names
from batchnorm.dataset import Statistics, block_moments, journal
from batchnorm.dataset.sources import arrays, blocks
from batchnorm.errors import BatchNormError

# Files are read in blocks of 256 bytes; `at` is called with the name of each before it is summed.
BEGIN = """
import os, signal, sys
from batchnorm import cli
from batchnorm.dataset import block_moments, journal
from batchnorm.dataset.sources import arrays, blocks
blocks.BLOCK_BYTES, arrays.BLOCK_ROWS = 256, 1
measure_block, seen = block_moments.measure_block, []
def stopping(*given, label, **more):
    seen.append(label)
    if seen.count(label) > 3 and label.endswith("b.npy"):
        os.kill(os.getpid(), signal.{signal})
    return measure_block(*given, label=label, **more)
block_moments.measure_block = stopping
sys.exit(cli.main(["stats", "data", "--out", "s.npz"]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """The working directory, with a folder of two arrays, a table and statistics."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "data" / f"{name}.npy", rng.normal(1e4, 1.0, (200, 3)))
    gaps = np.ones((9, 3))
    gaps[4, 1] = np.nan
    np.save(tmp_path / "gaps.npy", gaps)
    np.savez(tmp_path / "two.npz", x=gaps, y=gaps)
    (tmp_path / "text.npy").write_text("text")
    dataset.measure("data/a.npy", out="stats.npz")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_stats_prints_a_line_for_each_feature_and_saves(folder, capsys):
    assert cli.main(["stats", "data", "--out", "s.json"]) == cli.DONE
    output, errors = capsys.readouterr()
    assert errors == ""
    lines = output.splitlines()
    assert sum(line.split()[1:3] == ["400", "0"] for line in lines) == 3
    assert "wrote s.json" in lines
    assert Statistics.load("s.json") == dataset.measure("data")


def test_stats_writes_nothing_without_out(folder):
    before = names(folder)
    assert cli.main(["stats", "data/a.npy"]) == cli.DONE
    assert names(folder) == before


def test_stats_shows_the_first_of_many_features(folder, capsys):
    np.save("wide.npy", np.ones((2, 50)))
    assert cli.main(["stats", "wide.npy"]) == cli.DONE
    assert "and 30 features more" in capsys.readouterr().out


def test_stats_passes_its_options_on(folder, capsys):
    assert cli.main(["stats", "two.npz", "--array", "x", "--missing", "skip"]) == cli.DONE
    assert ["1", "8", "1"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert cli.main(["stats", "gaps.npy", "--missing", "skip", "--channel-axis", "0"]) == cli.DONE
    assert ["4", "2", "1"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]


def test_stats_takes_columns_and_tables_without_names(folder, capsys):
    pytest.importorskip("pyarrow")
    (folder / "t.csv").write_text("1,x,3\n3,y,5\n")
    assert cli.main(["stats", "t.csv", "--no-header", "--columns", "f0, f2"]) == cli.DONE
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["f0", "2", "0", "2", "1"] in rows
    assert ["f2", "2", "0", "4", "1"] in rows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stats"], "Missing argument"),
        (["stats", "none.npy"], "none.npy: there is no such file"),
        (["stats", "text.npy"], "text.npy: must be an array in NumPy's format"),
        (["stats", "gaps.npy"], "gaps.npy: values must not be missing, got NaN in feature 1"),
        (["stats", "gaps.npy", "--missing", "drop"], "'drop' is not one of 'refuse', 'skip'"),
        (["stats", "gaps.npy", "--channel-axis", "2"], "gaps.npy: has no axis 2"),
        (["stats", "two.npz"], "--array NAME"),
        (["stats", "two.npz", "--array", "z"], "two.npz: has no array 'z'. It holds: x, y."),
        (["stats", "data", "gaps.npy", "data"], "named twice"),
        (["stats", "data", "--out", "s.txt"], "'s.npz'"),
        (["stats", "data", "--out", "none/s.npz"], "Create the directory first"),
        (["stats", "data", "--columns", ","], "columns is for tables"),
        (["stats", ""], "got an empty name"),
        (["normalize", "data/a.npy", "--out", "y.npy"], "Missing option '--stats'"),
        (["normalize", "data/a.npy", "--stats", "stats.npz"], "Missing option '--out'"),
        (["normalize", "data/a.npy", "--stats", "no.npz", "--out", "y.npy"], "cannot be read"),
        (["normalize", "data/a.npy", "--stats", "two.npz", "--out", "y.npy"], "hold statistics"),
        (
            ["normalize", "data/a.npy", "--stats", "stats.npz", "--out", "data/a.npy"],
            "must not be one of the input files",
        ),
        (["normalize", "text.npy", "--stats", "stats.npz", "--out", "y.npy"], "NumPy's format"),
        (
            ["normalize", "data/a.npy", "--stats", "stats.npz", "--out", "y.npy", "--dtype", "i4"],
            "dtype must be",
        ),
        (
            ["normalize", "data/a.npy", "--stats", "stats.npz", "--out", "y.npy", "--eps=-1"],
            "eps must be",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_status_2(arguments, said, folder, capsys):
    before = names(folder)
    assert cli.main(arguments) == cli.UNUSABLE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("batchnorm: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert names(folder) == before


def test_normalize_writes_what_the_function_gives(folder, capsys):
    arguments = ["data/b.npy", "--stats", "stats.npz", "--out", "y.npy", "--eps", "0.1"]
    assert cli.main(["normalize", *arguments, "--dtype", "float32"]) == cli.DONE
    assert capsys.readouterr() == ("wrote y.npy\n", "")
    found = Statistics.load("stats.npz")
    expected = dataset.normalize(np.load("data/b.npy"), found, eps=0.1, dtype=np.float32)
    np.testing.assert_array_equal(np.load("y.npy"), expected)


def test_normalize_keeps_the_statistics_it_is_given(folder, capsys):
    np.savez("x.npz", x=np.eye(3))
    before = Statistics.load("stats.npz")
    arguments = ["normalize", "x.npz", "--stats", "stats.npz", "--out", "stats.npz"]
    assert cli.main(arguments) == cli.UNUSABLE
    assert "must not be saved statistics" in capsys.readouterr().err
    assert Statistics.load("stats.npz") == before


def test_stats_says_which_statistics_it_skipped(folder, capsys):
    assert cli.main(["stats", "data", "--out", "data/s.npz"]) == cli.DONE
    assert cli.main(["stats", "data", "--out", "data/s.npz"]) == cli.DONE
    skipped = "batchnorm: skipped data/s.npz: it holds saved statistics, not data\n"
    assert capsys.readouterr().err == skipped


def test_stats_prints_names_as_they_are(folder, capsys):
    pytest.importorskip("pyarrow")
    (folder / "t.csv").write_text('":smile:,[b]x",b\n1,2\n')
    assert cli.main(["stats", "t.csv", "--columns", '":smile:,[b]x"']) == cli.DONE
    assert ":smile:,[b]x  " in capsys.readouterr().out


def run(arguments, **options):
    return subprocess.run(
        f"{sys.executable} -m batchnorm {arguments}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_stats_ends_quietly_when_its_reader_has_gone(folder):
    done = run("stats data | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (cli.DONE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_stats_says_that_its_output_cannot_be_written(folder):
    for command in ("stats data", "--version"):
        done = run(f"{command} > /dev/full")
        assert done.returncode == cli.UNUSABLE
        said = "batchnorm: standard output cannot be written (No space left on device). "
        assert done.stderr.startswith(said)
        assert done.stderr.count("\n") == 1


def test_normalize_takes_a_folder(folder):
    assert cli.main(["normalize", "data", "--stats", "stats.npz", "--out", "out"]) == cli.DONE
    assert names(folder / "out") == ["a.npy", "b.npy"]


def run_until(name, folder):
    return subprocess.run(
        [sys.executable, "-c", BEGIN.replace("{signal}", name)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def kept(path):
    with contextlib.closing(sqlite3.connect(path)) as file:
        return file.execute("SELECT found FROM measured").fetchall()


def test_stats_interrupted_has_status_130_and_goes_on_when_run_again(folder, capsys):
    done = run_until("SIGINT", folder)
    assert (done.returncode, done.stderr) == (cli.INTERRUPTED, "batchnorm: interrupted\n")
    assert "s.npz" not in names(folder)
    assert len(kept(folder / "s.npz.partial")) == 1
    # The same blocks, or it would be another computation.
    again = subprocess.run(
        [sys.executable, "-c", BEGIN.replace("> 3", "> 1e9").replace("{signal}", "SIGINT")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert again.returncode == cli.DONE
    assert again.stderr.startswith("batchnorm: resuming: 1 of 2 files were measured by an ")
    assert "s.npz.partial" not in names(folder)


def test_stats_killed_goes_on_and_has_the_same_bits(folder, monkeypatch):
    done = run_until("SIGKILL", folder)
    assert done.returncode == -signal.SIGKILL
    ((found,),) = kept(folder / "s.npz.partial")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    monkeypatch.setattr(arrays, "BLOCK_ROWS", 1)
    expected = dataset.measure("data/a.npy")
    assert journal.from_bytes(found, expected.features).moments == expected.moments
    notes = []
    found = dataset.measure("data", out="s.npz", note=notes.append)
    assert len(notes) == 1
    assert found == dataset.measure("data")
    assert Statistics.load("s.npz") == found


@pytest.mark.parametrize("command", ["stats", "normalize"])
def test_help_is_on_stdout(command, capsys):
    assert cli.main([command, "--help"]) == cli.DONE
    assert f"Usage: batchnorm {command}" in capsys.readouterr().out


def test_dask_needs_its_package(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.main(["stats", "data", "--dask", "tcp://localhost:1"]) == cli.UNUSABLE
    assert "pip install distributed adds it; so does the extra [dask]." in capsys.readouterr().err


def test_stats_offers_what_measure_takes():
    assert tuple(choice.value for choice in stats.Missing) == block_moments.POLICIES


def test_stats_draws_pages_into_html_files_alone(folder, capsys):
    before = (folder / "data" / "a.npy").read_bytes()
    arguments = ["stats", "data", "--html", "data/a.npy"]
    assert cli.main(arguments) == cli.UNUSABLE
    assert "must be a page that ends in .html" in capsys.readouterr().err
    assert (folder / "data" / "a.npy").read_bytes() == before


def test_stats_keeps_a_file_with_the_name_of_its_journal(folder, capsys):
    (folder / "kept.npz.partial").write_text("precious")
    assert cli.main(["stats", "data", "--out", "kept.npz"]) == cli.UNUSABLE
    assert "that is another file" in capsys.readouterr().err
    assert (folder / "kept.npz.partial").read_text() == "precious"


@pytest.mark.parametrize("out", [".", "", "/"])
def test_outputs_without_a_name_are_one_line(out, folder, capsys):
    for arguments in (
        ["stats", "data", "--out", out],
        ["normalize", "data/a.npy", "--stats", "stats.npz", "--out", out],
        ["merge", "stats.npz", "--out", out],
        ["merge", out, "--out", "m.npz"],
    ):
        assert cli.main(arguments) == cli.UNUSABLE
        assert capsys.readouterr().err.count("\n") == 1


def test_names_of_columns_keep_their_spaces():
    assert split_names('" a ",b, c') == [" a ", "b", "c"]
    with pytest.raises(BatchNormError, match="names must be separated by commas"):
        split_names('"b,c')
