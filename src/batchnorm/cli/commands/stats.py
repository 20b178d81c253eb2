"""``batchnorm stats``."""

import enum
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.options import KINDS, Array, Decimal, Header, Nulls, Only, Separator
from batchnorm.cli.output import make_console, many, note, split_names

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.dataset import Statistics


#: The maximum number of features that are printed.
SHOWN = 20


class Missing(str, enum.Enum):
    """How `stats` handles NaN and null, and images that are broken."""

    refuse = "refuse"
    skip = "skip"


def stats(
    files: Annotated[
        list[str],
        typer.Argument(
            help=f"Files of {KINDS} or images (PNG, JPEG, WebP, TIFF, .tar), folders of one kind, "
            "or addresses such as s3://bucket/folder."
        ),
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
    scale: Annotated[
        float, typer.Option(help="Divide all values by this, as by 255 for images.")
    ] = 1.0,
    extremes: Annotated[
        bool,
        typer.Option("--extremes", help="Find least and greatest values, and outliers, too."),
    ] = False,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns of tables; by default all. Quote names that contain commas, as in "
            "'\"a,b\",c'.",
            metavar="A,B",
        ),
    ] = None,
    numeric: Annotated[
        bool, typer.Option("--numeric", help="Leave columns out that are not numbers.")
    ] = False,
    header: Header = True,
    separator: Separator = None,
    decimal: Decimal = ".",
    nulls: Nulls = None,
    array: Array = None,
    only: Only = None,
    broken: Annotated[
        Missing, typer.Option(help="What to do about images that cannot be decoded.")
    ] = Missing.refuse,
    equal_images: Annotated[
        bool, typer.Option("--equal-images", help="Let images count alike, whatever their size.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(help="Processes that decode images; by default, all processors.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Draw the features on a page; finds extremes and outliers, too."),
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

    if html is not None:
        from batchnorm import report

        report.check(html)
    said: list[str] = []

    def remember(text: str) -> None:
        said.append(text)
        note(text)

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
            scale=scale,
            extremes=extremes or html is not None,
            columns=split_names(columns),
            numeric=numeric,
            header=header,
            separator=separator,
            decimal=decimal,
            nulls=split_names(nulls),
            array=array,
            only=only,
            broken=broken.value,
            equal_images=equal_images,
            processes=processes,
            out=out,
            client=client,
            progress=progress,
            note=remember,
        )
    seconds = time.perf_counter() - begin
    console = make_console(highlight=False, markup=False)
    _show(found, console)
    if found.images is None:
        what = many(len(found.files), "file")
    else:
        _show_images(found.images.rows(), console)
        what = many(found.images.count, "image")
    console.print(f"{what} in {seconds:.1f} s", soft_wrap=True)
    if found.like_images and (found.var() > 0).all():
        console.print(found.normalize_line(), soft_wrap=True)
    for hint in dataset.hints(found):
        note(str(hint))
    if html is not None:
        found.report(html, notes=said)
    for written in (out, html):
        if written is not None:
            console.print(f"wrote {written}", soft_wrap=True)


def _show_images(rows: Sequence[tuple[str, str]], console: "Console") -> None:
    """Print what stands out among images."""
    import rich.box
    from rich.table import Table

    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for title, text in rows:
        table.add_row(title, text)
    console.print(table)


def _show(found: "Statistics", console: "Console") -> None:
    """Print a table of the first `SHOWN` features."""
    import rich.box
    from rich.table import Table

    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("feature")
    columns = {"count": found.count, "missing": found.missing}
    columns |= {"mean": found.mean, "std": found.std()}
    if found.extremes is not None:
        columns["min"], columns["max"] = found.extremes
    for title in columns:
        table.add_column(title, justify="right")
    for k in range(min(SHOWN, found.features)):
        name = found.names[k] if found.names else str(k)
        whole, real = itertools.islice(columns.values(), 2), list(columns.values())[2:]
        table.add_row(name, *(f"{v[k]:.0f}" for v in whole), *(f"{v[k]:.8g}" for v in real))
    console.print(table)
    if found.features > SHOWN:
        console.print(f"and {many(found.features - SHOWN, 'feature')} more")
