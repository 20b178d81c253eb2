"""``batchnorm report``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import make_console
from batchnorm.errors import BatchNormError


def report(
    recording: Annotated[
        Path, typer.Argument(help="A recording of batchnorm.torch.watch, .parquet.")
    ],
    other: Annotated[Path | None, typer.Argument(help="Another, to be shown beside it.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write; by default report.html.")
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Show a table here instead.")
    ] = False,
) -> None:
    """Show a recording: findings, and every layer over training, in one page.

    For example: batchnorm report run.parquet --out report.html
    """
    from batchnorm.diagnose.recording import Recording

    if terminal and out is not None:
        raise BatchNormError("--terminal writes no page: leave out either --out or --terminal.")
    page = out or Path("report.html")
    if not terminal:
        from batchnorm.report import check

        check(page)
    first = Recording.load(recording)
    second = None if other is None else Recording.load(other)
    console = make_console(highlight=False, markup=False)
    if terminal:
        from batchnorm.report.terminal import show

        for shown in (first, second):
            if shown is not None:
                show(shown, console)
        return
    first.report(page, second)
    console.print(f"wrote {page}", soft_wrap=True)
