"""What the documentation shows runs as shown: code blocks, docstrings, examples, links, numbers."""

import doctest
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "slides"),
]
EXPERIMENTS = "src/batchnorm/study/experiments"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = [
    "batchnorm",
    "batchnorm.moments",
    "batchnorm.functional",
    "batchnorm.layer",
    "batchnorm.folding",
    "batchnorm.passage",
    "batchnorm.workers",
    "batchnorm.dataset",
    "batchnorm.dataset.hints",
    "batchnorm.dataset.measuring",
    "batchnorm.dataset.statistics",
    "batchnorm.sklearn",
    "batchnorm.onnx.fold",
]
TORCH_MODULES = [
    "batchnorm.torch",
    *(
        f"batchnorm.torch.{name}"
        for name in (
            "functional",
            "modules",
            "adapters",
            "convert",
            "freeze",
            "accumulate",
            "parameters",
            "fold",
            "diagnose.check",
            "diagnose.watch",
        )
    ),
]
TABLES = ROOT / "benchmarks" / "tables.py"
RESULTS = ROOT / "benchmarks" / "results"
# What the site makes itself: a page for each study, and these.
MADE = {
    *(f"{path.stem.replace('_', '-')}.md" for path in (ROOT / EXPERIMENTS).glob("[!_]*.py")),
    *("verdicts.md", "tutorial.ipynb", "slides.html", "slides.pdf"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(text: str) -> tuple[str, list[str]]:
    """The fenced Python of a page with all else blanked out, so that line numbers are the page's;
    and the blocks one by one."""
    kept: list[str] = []
    blocks: list[str] = []
    language = None
    for line in text.splitlines():
        fence = re.fullmatch(r"\s*```(\w*)\s*", line)
        if fence:
            language = fence[1] if language is None else None
            if language == "python":
                blocks.append("")
        if fence or language != "python":
            kept.append("")
        else:
            kept.append(line)
            blocks[-1] += line + "\n"
    return "\n".join(kept) + "\n", blocks


def run_doctest(test: doctest.DocTest) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_code_gives_the_output_shown(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where pages may write
    source, _ = python_blocks(page.read_text(encoding="utf-8"))
    for package in ("torch", "sklearn", "PIL", "onnx"):
        used = rf"^>>> (import {package}|from {package}[. ]|from batchnorm\.{package} )"
        if re.search(used, source, re.MULTILINE):
            pytest.importorskip(package)
    run_doctest(doctest.DocTestParser().get_doctest(source, {}, name_of(page), str(page), 0))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_has_no_python_that_is_not_run(page):
    _, blocks = python_blocks(page.read_text(encoding="utf-8"))
    for block in blocks:
        assert block.lstrip().startswith(">>>"), block


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_commands_have_the_options_shown(page):
    shown = re.findall(
        r"^batchnorm (.*?)(?:\s+#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    if not shown:
        return
    typer = pytest.importorskip("typer")
    from batchnorm import cli

    commands = typer.main.get_command(cli.application()).commands
    for line in shown:
        name, *arguments = shlex.split(line, comments=True)
        if name.startswith("-"):
            continue
        with commands[name].make_context(name, arguments):  # parses, and runs nothing
            pass


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target and Path(target).name not in MADE:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("module", [*MODULES, *TORCH_MODULES])
def test_docstring_examples_give_the_output_shown(module):
    if module in TORCH_MODULES:
        pytest.importorskip("torch")
    for package in ("sklearn", "onnx"):
        if module.startswith(f"batchnorm.{package}"):
            pytest.importorskip(package)
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    tests = [test for test in tests if test.examples]
    assert tests, f"{module} has no examples"
    for test in tests:
        run_doctest(test)


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs(example, tmp_path):
    if "import torch" in example.read_text(encoding="utf-8"):
        pytest.importorskip("torch")
    finished = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout


def test_there_are_pages_and_examples_to_test():
    assert len(PAGES) >= 6
    assert len(EXAMPLES) >= 2


@pytest.mark.skipif(not RESULTS.exists(), reason="no benchmark results in this checkout")
def test_tables_are_made_from_the_committed_results():
    finished = subprocess.run(
        [sys.executable, str(TABLES), "--check"], capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
