"""``batchnorm stats``."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.output import make_console, many, note, split_names

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.dataset import Statistics


#: The maximum number of features that are printed.
SHOWN = 20


class Missing(str, enum.Enum):
    """How `stats` handles NaN and null."""

    refuse = "refuse"
    skip = "skip"


def stats(
    files: Annotated[
        list[str],
        typer.Argument(help=".npy, .npz, .csv or .parquet files, or folders of them."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to save the statistics, .npz or .json. If the run is interrupted, the "
            "same command resumes it."
        ),
    ] = None,
    channel_axis: Annotated[
        int, typer.Option(help="Axis of the features in arrays; -1 is the last.")
    ] = 1,
    missing: Annotated[Missing, typer.Option(help="How to handle NaN and null.")] = Missing.refuse,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns of tables; by default all. Quote names that contain commas, as in "
            "'\"a,b\",c'.",
            metavar="A,B",
        ),
    ] = None,
    header: Annotated[
        bool, typer.Option(help="Whether .csv files begin with a line of names.")
    ] = True,
    array: Annotated[
        str | None, typer.Option(help="Name of the array in .npz files.", metavar="NAME")
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Run on the Dask cluster whose scheduler is at this address. Its workers must "
            "reach the files by the same paths.",
            metavar="ADDRESS",
        ),
    ] = None,
) -> None:
    """Compute count, mean and standard deviation of each feature, of data of any size.

    For example: batchnorm stats train/ --missing skip --out stats.npz
    """
    import contextlib
    import time

    from batchnorm import dataset
    from batchnorm.progress import bar

    with contextlib.ExitStack() as stack:
        client = None
        if dask is not None:
            from batchnorm.dataset.cluster import connect

            client = stack.enter_context(connect(dask))
        begin = time.perf_counter()
        progress = stack.enter_context(bar(in_bytes=True))
        found = dataset.measure(
            files,
            channel_axis=channel_axis,
            missing=missing.value,
            columns=split_names(columns),
            header=header,
            array=array,
            out=out,
            client=client,
            progress=progress,
            note=note,
        )
    seconds = time.perf_counter() - begin
    console = make_console(highlight=False, markup=False)
    _show(found, console)
    console.print(f"{many(len(found.files), 'file')} in {seconds:.1f} s", soft_wrap=True)
    if out is not None:
        console.print(f"wrote {out}", soft_wrap=True)


def _show(found: "Statistics", console: "Console") -> None:
    """Print a table of the first `SHOWN` features."""
    import rich.box
    from rich.table import Table

    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("feature")
    for title in ("count", "missing", "mean", "std"):
        table.add_column(title, justify="right")
    rows = zip(found.count, found.missing, found.mean, found.std(), strict=True)
    for k, (count, missing, mean, std) in enumerate(rows):
        if k == SHOWN:
            break
        name = found.names[k] if found.names else str(k)
        table.add_row(name, f"{count:.0f}", str(missing), f"{mean:.8g}", f"{std:.8g}")
    console.print(table)
    if found.features > SHOWN:
        console.print(f"and {many(found.features - SHOWN, 'feature')} more")
