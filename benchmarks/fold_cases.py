"""Fold batch norms in many small cases with several tools, and judge what each of them makes.

python benchmarks/fold_cases.py --out benchmarks/results
python benchmarks/fold_cases.py --quick                     one case of each line of the table

Writes fold_cases.csv and fold_cases.json (versions, and the rule below). Each tool is called as its
documentation says, in a process of its own, since some are native: see `fold_case_tools.py`. The
models are in `fold_case_models.py`, and graphs that only ONNX has in `fold_case_graphs.py`.

A result is judged by the largest difference of its outputs from those of the original in float64,
on the examples that the tools may see, on others, and on inputs that take other paths. At most 8
times the difference of the original itself, computed in its own type, and 16 units of rounding of
the largest output are allowed. Verdicts are

right
    Batch norms were folded, and outputs are within this tolerance.
refused
    All batch norms are left in place, or the tool said clearly that it does not take this.
wrong
    Outputs differ by more, or are not finite.
crashed
    The tool or its result raised anything else, or the process ended or took too long.
n/a
    The tool is not for this case; ``detail`` says why.

``stays``: no batch norm can be folded by other values of the modules' parameters. ``norms`` and
``left`` count batch norms before and after; ``error`` is the difference, and ``own_error`` that of
the original; ``misrounded`` counts the folded weights, of ``weights``, that are not the nearest
numbers of their type to the exact ones; ``share`` is the largest error of a pair over its proven
bound, which only batchnorm states.

PyTorch models become ONNX files by torch.onnx.export with dynamo=False, TrainingMode.PRESERVE and
do_constant_folding=False, which keeps batch norms as they are. Results are run by onnxruntime
without optimizations, and types that it does not have on a CPU by onnx's reference.

Exit status: 0 done; 1 batchnorm was wrong or crashed; 2 the call was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command

from batchnorm.bench.rows import Row
from batchnorm.bench.worker import Worker, WorkerError
from batchnorm.progress import steps

TOOLS = (
    "batchnorm.torch.fold",
    "torch.nn.utils.fusion",
    "torch.fx fuse",
    "batchnorm.onnx.fold",
    "onnxruntime",
    "onnxoptimizer",
    "onnxoptimizer fuse_bn_into_conv",
    "onnxsim",
    "onnxslim",
)
OURS = tuple(tool for tool in TOOLS if tool.startswith("batchnorm"))
SIGNS = {"right": "✓", "refused": "–", "wrong": "✗", "crashed": "!", "n/a": "·"}
WORKER = Path(__file__).with_name("fold_case_tools.py")


@dataclass(frozen=True, kw_only=True)
class FoldRow(Row):
    """One tool on one case; a line of ``fold_cases.csv``."""

    kind: str
    line: str
    case: str
    stays: bool
    verdict: str = ""
    norms: int = 0
    left: float = math.nan
    error: float = math.nan
    tolerance: float = math.nan
    own_error: float = math.nan
    misrounded: float = math.nan
    weights: float = math.nan
    share: float = math.nan


class Tools:
    """A worker that is started again when a tool has ended it."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def ask(self, method: str, **arguments: Any) -> Any:
        """What the worker answers, or a crash if it has died."""
        if self._worker is None:
            self._worker = Worker(WORKER, "Judge", environment={"OMP_NUM_THREADS": "1"})
        try:
            return self._worker.ask(method, **arguments)
        except WorkerError as error:
            self.close()
            if "ended with status -" not in str(error):
                raise
            signal = str(error).split("status ")[1].split(":")[0]
            return {"verdict": "crashed", "detail": f"the process ended with status {signal}"}

    def close(self) -> None:
        """Let the worker end."""
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None


def all_cases() -> list[Any]:
    """The cases of PyTorch, then those of ONNX alone."""
    graphs, models = map(importlib.import_module, ("fold_case_graphs", "fold_case_models"))
    return [*models.cases(), *graphs.cases()]


def judged(case: Any, tool: str, tools: Tools) -> FoldRow:
    """A line of the file."""
    found = tools.ask("judge", case=case.name, tool=tool)
    status = {"wrong": "wrong", "crashed": "failed"}.get(found["verdict"], "ok")
    found["detail"] = " ".join(found.get("detail", "").split())[:160]
    return FoldRow(
        provider=tool,
        status=status,  # type: ignore[arg-type]
        kind=case.kind,
        line=case.line,
        case=case.name,
        stays=case.stays,
        **found,
    )


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    """Fill in `files`."""
    from rich.console import Console

    chosen = all_cases()
    if options.quick:
        seen: set[str] = set()
        chosen = [case for case in chosen if not (case.line in seen or seen.add(case.line))]
    console = Console(highlight=False, markup=False)
    width = max(len(case.name) for case in chosen)
    for number, tool in enumerate(options.tools):
        console.print(f"{'':{width}}  {'│ ' * number}{tool}", soft_wrap=True)
    rows: list[FoldRow] = []
    tools = Tools()
    try:
        with steps(len(chosen)) as started:
            for case in chosen:
                started(case.name)
                new = [judged(case, tool, tools) for tool in options.tools]
                rows += new
                signs = " ".join(SIGNS[row.verdict] for row in new)
                print(f"{case.name:{width}}  {signs}", flush=True)
        versions = tools.ask("versions")
    finally:
        tools.close()
    columns = {"tool": "{0.provider}"} | {
        sign + " " + verdict: f"{{0.counts[{verdict}]}}" for verdict, sign in SIGNS.items()
    }
    command.show([Summary(tool, rows) for tool in options.tools], columns)
    files["fold_cases.csv"] = rows
    files["fold_cases.json"] = {"versions": versions}
    return [
        f"{row.provider}, {row.case}: {row.verdict}: {row.detail or row.error}"
        for row in rows
        if row.provider in OURS and row.status != "ok"
    ]


class Summary:
    """How many cases of each verdict a tool has."""

    def __init__(self, tool: str, rows: Sequence[FoldRow]) -> None:
        self.provider = tool
        found = [row.verdict for row in rows if row.provider == tool]
        self.counts = {verdict: found.count(verdict) for verdict in SIGNS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the benchmark."""
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="directory for the results")
    parser.add_argument("--quick", action="store_true", help="one case of each line of the table")
    parser.add_argument(
        "--tools",
        type=command.among(TOOLS),
        default=TOOLS,
        help="joined by commas; all if left out",
    )
    return command.main(
        parser,
        measure,
        arguments,
        needs=("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxoptimizer", "onnxsim",
               "onnxslim"),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
