"""``batchnorm fold``."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.output import DONE, FOUND_WRONG, make_console, note
from batchnorm.errors import BatchNormError

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.folding import FoldReport


class DType(str, enum.Enum):
    """Types of a folded model."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def fold(
    target: Annotated[
        str,
        typer.Argument(
            help="An ONNX file, or package.module:factory of a model of PyTorch, which is put "
            "into evaluation mode.",
            metavar="TARGET",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The file to write. Of an ONNX file: .onnx. Of a model: .safetensors or .pt for "
            "the state dict, which only the folded model can load; .pt2 for a program of "
            "torch.export and .onnx for an ONNX file, which are the whole model.",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="State dict for the model that the factory makes: .safetensors, .pt or .pth."
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Inputs to compare both models on, .npz. Of a model: arrays arr_0, arr_1, ... "
            "for arguments in their order, or the names of keyword arguments.",
            metavar="DATA.npz",
        ),
    ] = None,
    shapes: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="Instead, the shape of a random input of a model; repeat it for several. With a "
            "first axis longer than 1, .pt2 and .onnx take batches of any size if possible.",
            metavar="8x3x224x224",
        ),
    ] = [],  # noqa: B006  # typer needs a list
    dtype: Annotated[
        DType | None,
        typer.Option(help="Type of the folded model, to which weights are rounded once."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Write nothing and exit with 1 if a batch norm next to a linear layer was refused "
            "or outputs are not finite.",
        ),
    ] = False,
    tol: Annotated[
        float | None,
        typer.Option(help="With --strict, the largest difference allowed.", min=0),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write the report as JSON; - prints it instead of the table."),
    ] = None,
) -> int:
    """Fold the batch norms of a trained model into its other layers, and show how near it is.

    For example: batchnorm fold model.onnx --out folded.onnx --verify data.npz
    """
    from batchnorm import targets
    from batchnorm.atomic import check_place, explain_write_errors, replacing
    from batchnorm.folding import FoldError

    if tol is not None and not strict:
        raise BatchNormError("--tol goes with --strict: pass both.")
    printed = str(json) == "-"
    if json is not None and not printed:
        check_place(json, "a JSON file", "report.json")
        if json.absolute() == out.absolute():
            raise BatchNormError(f"--json and --out must be two files, got {json} for both.")
    failure = None
    try:
        report, notes = targets.fold(
            target,
            out,
            weights=weights,
            verify=verify,
            shapes=shapes,
            dtype=None if dtype is None else dtype.value,
            strict=strict,
            tol=tol,
        )
    except FoldError as error:
        report, notes, failure = error.report, [], error
    console = make_console(highlight=False, markup=False)
    if printed:
        print(report.to_json())
    else:
        show(report, console)
    if json is not None and not printed:
        with explain_write_errors(json), replacing(json) as beside:
            beside.write_text(report.to_json() + "\n", encoding="utf-8")
    if failure is not None:
        note(f"{failure}; {out} is not written")
        return FOUND_WRONG
    for line in notes:
        note(f"{out}: {line}")
    if not printed:
        console.print(f"wrote {out}", soft_wrap=True)
    return DONE


def show(report: "FoldReport", console: "Console") -> None:
    """Print a table with a line for each batch norm, and the summary."""
    from rich.table import Table

    rows = report.rows()
    if rows:
        table = Table(box=None, pad_edge=False)
        for title in ("batch norm", "into", "error", "bound", ""):
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in report.summary():
        console.print(line, soft_wrap=True)
