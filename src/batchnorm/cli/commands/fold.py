"""``batchnorm fold``."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import DONE, FOUND_WRONG, make_console, note
from batchnorm.errors import BatchNormError

#: The maximum number of folded layers that are shown.
MOST = 10


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
            help="Inputs to compare both models on, .npz: arrays arr_0, arr_1, ... for arguments "
            "in their order, or the names of keyword arguments or of inputs of the ONNX graph. "
            ".npy holds a single argument.",
            metavar="DATA.npz",
        ),
    ] = None,
    shapes: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="Instead, the shape of an input of random numbers from N(0, 1); repeat it for "
            "several. Of a model: with a first axis longer than 1, .pt2 and .onnx take batches of "
            "any size if possible.",
            metavar="8x3x224x224",
        ),
    ] = [],  # noqa: B006  # typer needs a list
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the folded model, to which weights are rounded once.",
            metavar="float16|bfloat16|float32",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Write nothing and exit with 1 if a batch norm next to a layer was refused, or "
            "what was exported could not be compared. An ONNX file is compared only on inputs.",
        ),
    ] = False,
    tol: Annotated[
        float | None,
        typer.Option(
            help="With --strict, the largest absolute difference allowed, of the outputs and of "
            "each folded layer."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write the report as JSON; - prints it instead of text."),
    ] = None,
) -> int:
    """Fold the batch norms of a trained model into its other layers, and show how near it is.

    For example: batchnorm fold model.onnx --out folded.onnx --verify data.npz
    """
    from batchnorm import __version__, targets
    from batchnorm.atomic import explain_write_errors, replacing
    from batchnorm.folding import FoldError

    if tol is not None and not strict:
        raise BatchNormError("--tol goes with --strict: pass both.")
    if tol is not None and not tol >= 0:
        raise BatchNormError(f"--tol must be a number that is not negative, got {tol:g}.")
    printed = str(json) == "-"
    failure: FoldError | None = None
    folded = None
    try:
        folded = targets.fold(
            target,
            out,
            weights=weights,
            verify=verify,
            shapes=shapes,
            dtype=dtype,
            strict=strict,
            tol=tol,
            json=None if printed else json,
        )
        report = folded.report
    except FoldError as error:
        report, failure = error.report, error
    console = make_console(highlight=False, markup=False)
    if not printed:
        for line in report.lines(console.width, MOST):
            console.print(line, soft_wrap=True)
    if json is not None:
        written = [] if folded is None else list(map(str, folded.written))
        error_of_file = None if folded is None else folded.error
        found = {
            "version": __version__,
            **report.to_dict(),
            "written": written,
            "written_error": error_of_file,
        }
        text = dumps(found, indent=1, ensure_ascii=False)
        if printed:
            print(text)
        else:
            with explain_write_errors(json), replacing(json) as beside:
                # Names of files need not be UTF-8: \\udcff is JSON's own notation of such bytes.
                beside.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    if folded is None:
        if isinstance(failure, targets.NotWrittenError):
            raise BatchNormError(str(failure))
        note(f"{str(failure).removesuffix('.')}; {out} is not written")
        return FOUND_WRONG
    for line in folded.notes:
        note(line)
    if not printed:
        console.print(f"wrote {' and '.join(map(str, folded.written))}", soft_wrap=True)
    return DONE
