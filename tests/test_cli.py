"""The command line: exit statuses, one line for bad input, and nothing imported before its time."""

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import batchnorm
from batchnorm import cli
from batchnorm.cli import commands
from batchnorm.errors import ShapeError

BRIEF_BENCH = (
    "bench",
    "--shapes=6x5x4x3",
    "--ops=forward",
    "--providers=batchnorm,numpy",
    "--no-accuracy",
    "--rounds=1",
    "--budget=0",
)


def python(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["polish"], "'polish'"),
        (["--polish"], "--polish"),
        (["bench", "--polish"], "'batchnorm bench --help'"),
        (["bench", "extra"], "extra"),
        (["bench", "--seed", "one"], "'--seed'"),
        (["bench", "--rounds", "0"], "'--rounds'"),
        (["bench", "--ops", "forward,sideways"], "got 'sideways'"),
        (["bench", "--ops", ","], "got ''"),
        (["bench", "--shapes", "7"], "got '7'"),
        (["bench", "--providers", "tensorflow"], "got 'tensorflow'"),
        (["bench", "--threads", "0"], "got 0"),
        (["bench", "--shapes", "256x1024,1000000x1000000"], "got 1000000x1000000"),
    ],
    ids=" ".join,
)
def test_bad_call_is_one_line_on_stderr_and_status_2(
    arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == cli.UNUSABLE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("batchnorm: ")
    assert errors.count("\n") == 1
    assert said in errors


def test_bench_refuses_a_file_for_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "results"
    occupied.write_text("mine")
    assert cli.main([*BRIEF_BENCH, "--out", str(occupied)]) == cli.UNUSABLE
    assert str(occupied) in capsys.readouterr().err
    assert occupied.read_text() == "mine"


def test_version_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == cli.DONE
    config = batchnorm.show_config()
    output = capsys.readouterr().out
    assert output.startswith(f"batchnorm {batchnorm.__version__}, ")
    assert f"instruction set {config['instruction_set']}" in output
    assert ("no OpenMP" in output) is (not config["openmp"])


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["bench", "--help"], ["demo", "--help"]])
def test_help_is_on_stdout(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == cli.DONE
    output, errors = capsys.readouterr()
    assert "Usage: batchnorm" in output
    assert errors == ""


def test_no_subcommand_shows_help_and_is_unusable(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.UNUSABLE
    output = capsys.readouterr().out
    assert "bench" in output
    assert "demo" in output


def test_every_module_of_commands_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {path.stem for path in Path(commands.__path__[0]).glob("*.py")} - {"__init__"}
    cli.main(["--help"])
    shown = capsys.readouterr().out.split()
    assert modules >= {"bench", "check", "demo", "normalize", "report", "stats", "study"}
    assert modules <= set(shown)


def test_bench_prints_and_writes_nothing_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(BRIEF_BENCH) == cli.DONE
    output = capsys.readouterr().out
    assert "6x5x4x3 NHWC" in output
    assert "geometric mean" in output
    assert list(tmp_path.iterdir()) == []


def test_bench_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchnorm.bench import chart

    monkeypatch.setattr(chart, "can_plot", lambda: False)  # seen in test_bench
    out = tmp_path / "results"
    assert cli.main([*BRIEF_BENCH, "--out", str(out), "--threads", "1"]) == cli.DONE
    assert sorted(path.name for path in out.iterdir()) == ["environment.json", "speed.csv"]
    with (out / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["batchnorm", "numpy", "copy"] * 2


def test_bench_that_finds_a_wrong_answer_has_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchnorm.bench import harness

    monkeypatch.setattr(harness, "largest_error", lambda answer, expected: 1.0)
    assert cli.main(BRIEF_BENCH) == cli.FOUND_WRONG
    assert "wrong, off by 1" in capsys.readouterr().out


def test_interrupt_ends_with_status_130_and_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchnorm.bench import harness

    def interrupt(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "interleave", interrupt)
    assert cli.main([*BRIEF_BENCH, "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "batchnorm: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "report run.parquet"])
def test_page_does_not_replace_another_kind_of_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "run.parquet"
    kept.write_text("mine")
    assert cli.main([*command.split(), "--out", str(kept)]) == cli.UNUSABLE
    assert "out must be a page that ends in .html" in capsys.readouterr().err
    assert kept.read_text() == "mine"


def test_report_refuses_a_page_where_it_writes_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "run.parquet", "--terminal", "--out", "x.html"]) == cli.UNUSABLE
    assert "--terminal writes no page" in capsys.readouterr().err


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = pytest.importorskip("batchnorm.demo")
    given: dict[str, Any] = {}
    monkeypatch.setattr(demo, "run", lambda **options: given.update(options))
    page = tmp_path / "page.html"
    assert cli.main(["demo", "--out", str(page), "--seed", "3", "--steps", "50"]) == cli.DONE
    del given["console"]
    assert given == {"out": page, "seed": 3, "steps": 50, "quick": False}


def test_library_error_is_one_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = pytest.importorskip("batchnorm.demo")

    def refuse(**options: Any) -> None:
        raise ShapeError("gamma must have shape (3,),\n  got (2,).")

    monkeypatch.setattr(demo, "run", refuse)
    assert cli.main(["demo"]) == cli.UNUSABLE
    assert capsys.readouterr().err == "batchnorm: gamma must have shape (3,), got (2,).\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_named_with_its_remedy(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None in sys.modules is Python's own mark for a module that is not to be found.
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["--version"]) == cli.UNUSABLE
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert missing in errors
    assert "the extra [cli]" in errors


def test_module_runs_as_the_command_does() -> None:
    done = python("-m", "batchnorm", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == cli.version_line() + "\n"


def test_module_exits_with_the_status() -> None:
    done = python("-m", "batchnorm", "polish")
    assert done.returncode == cli.UNUSABLE
    assert "Traceback" not in done.stderr


def test_program_says_in_one_line_why_the_package_cannot_be_imported() -> None:
    done = python("-m", "_batchnorm_program", "--version", BATCHNORM_ISA="abacus")
    assert (done.returncode, done.stdout) == (cli.UNUSABLE, "")
    assert done.stderr.startswith("batchnorm: BATCHNORM_ISA must be one of the instruction sets")
    assert done.stderr.count("\n") == 1


def test_program_imports_the_package_only_once_it_is_guarded() -> None:
    done = python(
        "-c",
        "import _batchnorm_program, sys; print({'batchnorm', 'numpy'} & sys.modules.keys())",
    )
    assert done.stdout == "set()\n"


# ---- streams ------------------------------------------------------------------------------------


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    """Run bash, where `batchnorm` is the command."""
    if os.name == "nt":
        pytest.skip("Windows has no such shell")
    return subprocess.run(
        ["bash", "-c", f'batchnorm() {{ {sys.executable} -m batchnorm "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "bench --help", "check --explain BN101"]
)
def test_reader_that_has_enough_is_no_error(arguments: str) -> None:
    # `:` reads nothing, and has exited before the output comes.
    done = shell(f"{{ sleep 0.2; batchnorm {arguments}; }} | :; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (cli.DONE, "")


def test_what_is_done_beside_printing_goes_on_without_a_reader(tmp_path: Path) -> None:
    bench = " ".join(BRIEF_BENCH)
    done = shell(f"batchnorm {bench} --out {tmp_path} | :; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (cli.DONE, "")
    assert (tmp_path / "speed.csv").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("arguments", ["--help", "--version", "check --explain BN101"])
def test_full_disk_is_one_line(arguments: str) -> None:
    done = shell(f"batchnorm {arguments} > /dev/full")
    assert done.returncode == cli.UNUSABLE
    assert done.stderr.startswith("batchnorm: standard output cannot be written (No space left")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams_are_no_error(streams: str) -> None:
    done = shell(f"batchnorm --version {streams}")
    assert (done.returncode, done.stderr) == (cli.DONE, "")
    assert shell(f"batchnorm polish {streams}").returncode == cli.UNUSABLE


def test_closed_output_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    # Or what a library prints would end up in the data.
    done = shell(
        f"{sys.executable} -c 'import sys, _batchnorm_program as p; p._open_streams(); "
        f'file = open("{tmp_path}/data", "w"); sys.exit(file.fileno())' + "' >&-"
    )
    assert done.returncode > 2


# ---- what is imported ----------------------------------------------------------------------------


def test_importing_the_command_line_imports_neither_typer_nor_a_framework() -> None:
    done = python(
        "-c",
        "import batchnorm.cli, batchnorm.bench, sys; "
        "print(sorted({'typer', 'rich', 'torch', 'jax', 'altair'} & sys.modules.keys()))",
    )
    assert done.stdout == "[]\n"
