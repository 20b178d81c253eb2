"""What the benchmark scripts share: their options, what they print and what they write.

Exit status: 0 done; 1 something failed or was wrong; 2 the call was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchnorm.bench.environment import describe, disturbance, noting_others, resolve_threads
from batchnorm.bench.report import cells, make_table
from batchnorm.bench.rows import prepare_directory, write
from batchnorm.bench.worker import WorkerError
from batchnorm.errors import ArgumentError, BatchNormError

#: What a benchmark found: file name to rows, a picture, or what its JSON file adds to the machine.
Files = dict[str, Any]


def at_least(least: int) -> Callable[[str], int]:
    """A reader of an integer."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be an integer of {least} or more, got {text!r}")
        return number

    return read


def among(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of names joined by commas."""

    def read(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"must be among {', '.join(known)}, joined by commas, got {name!r}"
                )
        return tuple(name for name in known if name in names)

    return read


def make_parser(
    file: str, description: str, *, rounds: int | None, of_rounds: str = ""
) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have; `of_rounds` is the help of --rounds."""
    parser = argparse.ArgumentParser(prog=Path(file).name, description=description.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="directory for the results; only printed if left out")
    add("--rounds", type=at_least(1), default=rounds, help=of_rounds or f"{rounds} if left out")
    add("--seed", type=at_least(0), default=0, help="of everything random")
    return parser


def show(rows: Sequence[Any], columns: Mapping[str, str], *, title: str | None = None) -> None:
    """Print rows as a table: heading to a format of the row, blank where a number is not known."""
    from rich.console import Console

    table = make_table(title, columns)
    for row in rows:
        table.add_row(*cells(row, columns.values()))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A file or a pipe has no width, for which rich assumes 80. No table is as wide as this.
        console.width = 200
    console.print(table)


def main(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Files], list[str]],
    arguments: Sequence[str] | None,
    *,
    needs: Sequence[str] = (),
) -> int:
    """Carry out a benchmark.

    Parameters
    ----------
    measure
        Given the options and `Files` to fill in; returns a line for each thing that is wrong. To
        a ``.json`` file, a description of the machine is added.
    needs
        Modules that must be installed.
    """
    options = parser.parse_args(arguments)
    files: Files = {}
    try:
        for module in ("rich", *needs):
            if importlib.util.find_spec(module) is None:
                raise ArgumentError(
                    f"this benchmark needs {module}, which is not installed. "
                    f"pip install {'scikit-learn' if module == 'sklearn' else module} adds it."
                )
        environment = describe(threads=resolve_threads(getattr(options, "threads", None)))
        if options.out is not None:
            prepare_directory(options.out)
        with noting_others(environment):
            troubles = measure(options, files)
        for line in (*troubles, disturbance(environment)):
            if line is not None:
                print(line)
        if options.out is not None:
            for name, content in files.items():
                if isinstance(content, dict):
                    content["versions"] = environment["versions"] | content.pop("versions", {})
                    files[name] = environment | content
            for path in write({options.out / name: content for name, content in files.items()}):
                print(f"wrote {path}")
    except (BatchNormError, WorkerError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 1 if troubles else 0
