"""``batchnorm translate``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import make_console, many, note
from batchnorm.errors import ArgumentError, BatchNormError, printable


def translate(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Weights: .pt, .pth, .safetensors, .npz, .keras, .weights.h5, .msgpack, .onnx.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The .pt, .pth, .safetensors, .npz or .msgpack file to write. An existing one is "
            "replaced if it holds nothing but batch norms.",
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="torch, numpy, keras, flax, nnx, haiku, equinox, equinox-ema or onnx; by default "
            "what the names of its arrays say.",
            metavar="FRAMEWORK",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--to", help="Likewise; by default what the ending of OUT says.", metavar="FRAMEWORK"
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(
            help="Momentum of the layers as the framework of IN means it; .keras and .onnx files "
            "say it themselves."
        ),
    ] = None,
    eps: Annotated[float | None, typer.Option(help="ε of the layers; likewise.")] = None,
    rename: Annotated[
        list[str],
        typer.Option(help="Name of a layer in IN and in OUT; may be repeated.", metavar="OLD=NEW"),
    ] = [],  # noqa: B006  # typer needs a list
    channel_axis: Annotated[
        int | None,
        typer.Option(
            help="Axis of the channels in batches of the target; by default as IN says, or as is "
            "usual in the target."
        ),
    ] = None,
    ndim: Annotated[
        int | None, typer.Option(help="Number of axes of batches, which Haiku needs.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of training batches so far, for Haiku and Equinox, if IN does not say it."
        ),
    ] = None,
) -> None:
    """Carry the batch norms of a network from one framework to another.

    For example: batchnorm translate net.pt net.msgpack --momentum 0.1 --eps 1e-5
    """
    from batchnorm import passage
    from batchnorm.atomic import is_same
    from batchnorm.passage import files

    names: dict[str, str] = {}
    for pair in rename:
        before, equals, after = pair.partition("=")
        if not equals or not after.isprintable():
            raise ArgumentError(f"--rename must be OLD=NEW in printable text, got {pair!r}.")
        if before in names:
            raise ArgumentError(
                f"--rename must name a layer once, got {before}={names[before]} and {pair}."
            )
        names[before] = after
    new = target or files.target_of(out)
    files.check_out(out, new)
    if is_same(file, out):
        raise ArgumentError(f"OUT must be another file than IN, {file}, which it would replace.")
    arrays, settings = files.load(file, source)
    old = source or files.source_of(file, arrays)
    try:
        found = passage.translate(
            arrays, old, new, momentum=momentum, eps=eps, settings=settings, names=names,
            channel_axis=channel_axis, ndim=ndim, count=count,
        )  # fmt: skip
    except BatchNormError as error:
        raise type(error)(f"{file}: {error}") from error
    files.save(found.arrays, out, new)
    console = make_console(highlight=False, markup=False)
    titles = passage.FRAMEWORKS[old].title, passage.FRAMEWORKS[new].title
    layers = many(len(found.settings), "batch norm")
    console.print(f"translated {layers} from {titles[0]} to {titles[1]}", soft_wrap=True)
    for line in found.summary():
        console.print(printable(line), soft_wrap=True)
    for line in found.notes:
        note(line)
    console.print(f"wrote {out}", soft_wrap=True)
