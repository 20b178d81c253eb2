"""``batchnorm normalize``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import note


def normalize(
    file: Annotated[
        str, typer.Argument(help="A .npy, .npz, .csv or .parquet file, or a folder of them.")
    ],
    stats: Annotated[Path, typer.Option(help="Statistics saved by 'batchnorm stats'.")],
    out: Annotated[Path, typer.Option(help="The file to write, or the folder for a folder.")],
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
    header: Annotated[
        bool, typer.Option(help="Whether .csv files begin with a line of names.")
    ] = True,
    array: Annotated[
        str | None, typer.Option(help="Name of the array in a .npz file.", metavar="NAME")
    ] = None,
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
            eps=eps,
            dtype=dtype,
            channel_axis=channel_axis,
            header=header,
            array=array,
            progress=progress,
            note=note,
        )
    print(f"wrote {out}")
