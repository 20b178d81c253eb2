"""``batchnorm normalize``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.options import KINDS, Array, Decimal, Header, Nulls, Only, Separator
from batchnorm.cli.output import note, split_names


def normalize(
    file: Annotated[str, typer.Argument(help=f"A file or a folder of {KINDS}, or its address.")],
    stats: Annotated[Path, typer.Option(help="Statistics saved by 'batchnorm stats'.")],
    out: Annotated[Path, typer.Option(help="The file to write, or the folder for a folder.")],
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Return from normalized to original values.")
    ] = False,
    eps: Annotated[
        float,
        typer.Option(
            help="Added to the variance, inside the root; at 0, constant features are refused."
        ),
    ] = 1e-5,
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, float32 or float64; by default that of the data."),
    ] = None,
    channel_axis: Annotated[
        int | None,
        typer.Option(help="Axis of the features; by default, as in the statistics."),
    ] = None,
    header: Header = True,
    separator: Separator = None,
    decimal: Decimal = ".",
    nulls: Nulls = None,
    array: Array = None,
    only: Only = None,
) -> None:
    """Subtract the mean of each feature and divide by its standard deviation.

    For example: batchnorm normalize test.npy --stats stats.npz --out test_normalized.npy
    """
    from batchnorm import dataset
    from batchnorm.progress import bar

    statistics = dataset.Statistics.load(stats)
    with bar(in_bytes=True) as progress:
        dataset.normalize(
            file,
            statistics,
            out,
            inverse=inverse,
            eps=eps,
            dtype=dtype,
            channel_axis=channel_axis,
            header=header,
            separator=separator,
            decimal=decimal,
            nulls=split_names(nulls),
            array=array,
            only=only,
            progress=progress,
            note=note,
        )
    print(f"wrote {out}")
