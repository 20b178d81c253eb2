"""``batchnorm demo``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import make_console


def demo(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo.html"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps, instead of the default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Train for a few steps only.")] = False,
) -> None:
    """Train a small network with and without batch norm, and show the difference."""
    import batchnorm.demo

    batchnorm.demo.run(out=out, seed=seed, steps=steps, quick=quick, console=make_console())
