"""``batchnorm report``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import make_console


def report(
    recording: Annotated[
        Path, typer.Argument(help="A recording of batchnorm.torch.watch, .parquet.")
    ],
    other: Annotated[Path | None, typer.Argument(help="Another, to be shown beside it.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Show a table here instead.")
    ] = False,
) -> None:
    """Show a recording: findings, and every layer over training, in one page.

    For example: batchnorm report run.parquet --out report.html
    """
    from batchnorm.diagnose.recording import Recording

    first = Recording.load(recording)
    second = None if other is None else Recording.load(other)
    console = make_console(highlight=False, markup=False)
    if terminal:
        from batchnorm.report.terminal import show

        for shown in (first, second):
            if shown is not None:
                show(shown, console)
        return
    first.report(out, second)
    console.print(f"wrote {out}", soft_wrap=True)
