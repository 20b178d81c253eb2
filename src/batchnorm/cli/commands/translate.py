"""``batchnorm translate``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import make_console, many, note
from batchnorm.errors import ArgumentError, BatchNormError

#: The maximum number of names that are printed.
SHOWN = 20


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
        typer.Argument(metavar="OUT", help="A new .pt, .pth, .safetensors, .npz or .msgpack file."),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="torch, numpy, keras, flax, nnx, haiku, equinox, equinox-ema or onnx; by default "
            "what the name of the file says.",
            metavar="FRAMEWORK",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", help="Likewise.", metavar="FRAMEWORK")
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
    from batchnorm.passage import files

    old = source or files.framework_of(file, "--from")
    new = target or files.framework_of(out, "--to")
    names = {}
    for pair in rename:
        before, equals, after = pair.partition("=")
        if not equals:
            raise ArgumentError(f"--rename must be OLD=NEW, got {pair!r}.")
        names[before] = after
    files.check_out(out, new)
    arrays, settings = files.load(file, old)
    try:
        found = passage.translate(
            arrays, old, new, momentum=momentum, eps=eps, settings=settings, names=names,
            channel_axis=channel_axis, ndim=ndim, count=count,
        )  # fmt: skip
    except BatchNormError as error:
        raise type(error)(f"{file}: {error}") from error
    files.save(found.arrays, out, new)
    console = make_console(highlight=False, markup=False)
    if found.left_out:
        shown = ", ".join(found.left_out[:SHOWN])
        more = len(found.left_out) - SHOWN
        others = many(len(found.left_out), "other array")
        console.print(
            f"left out {others}: {shown}" + (f" and {more} more" if more > 0 else ""),
            soft_wrap=True,
        )
    titles = passage.FRAMEWORKS[old].title, passage.FRAMEWORKS[new].title
    layers = many(len(found.settings), "batch norm")
    console.print(f"translated {layers} from {titles[0]} to {titles[1]}", soft_wrap=True)
    groups: dict[str, list[str]] = {}
    for name, chosen in found.settings.items():
        text = ", ".join(f"{key}={value!r}" for key, value in chosen.items())
        groups.setdefault(text, []).append(name or "the layer")
    for text, members in groups.items():
        which = "them" if len(groups) == 1 else ", ".join(members)
        console.print(f"build {which} with {text}", soft_wrap=True)
    for line in found.notes:
        note(line)
    console.print(f"wrote {out}", soft_wrap=True)
