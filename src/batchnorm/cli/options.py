"""Options that several commands on data have in common."""

from typing import Annotated

import typer

__all__ = ["KINDS", "Array", "Decimal", "Header", "Nulls", "Only", "Separator"]

#: What the commands on data read.
KINDS = "arrays (.npy, .npz, HDF5, zarr), tables (CSV, Parquet, Arrow)"

Header = Annotated[bool, typer.Option(help="Whether .csv files begin with a line of names.")]
Separator = Annotated[
    str | None,
    typer.Option(
        help="What stands between values in .csv files; by default a comma, in .tsv files a tab.",
        metavar="TEXT",
    ),
]
Decimal = Annotated[
    str, typer.Option(help="Decimal point of .csv files, such as a comma.", metavar="TEXT")
]
Nulls = Annotated[
    str | None,
    typer.Option(
        help="What stands for missing values in .csv files, beside nothing, NA, NaN and null.",
        metavar="A,B",
    ),
]
Array = Annotated[
    str | None,
    typer.Option(
        help="Name of the array in .npz, HDF5 and zarr files; ending of the files in a .tar.",
        metavar="NAME",
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        help="Take only files with such names from folders, as in '*.png'.", metavar="PATTERN"
    ),
]
