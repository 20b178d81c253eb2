"""``batchnorm check``."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import DONE, FOUND_WRONG, make_console, split_names
from batchnorm.errors import BatchNormError


class Format(str, enum.Enum):
    """How `check` prints what it has found."""

    rich = "rich"
    text = "text"
    json = "json"
    sarif = "sarif"
    github = "github"


def check(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="package.module:factory of a model; a file of weights (.pt, .pth, "
            ".safetensors), .onnx, a recording (.parquet), or a program (.py), which is read "
            "and not run.",
            metavar="TARGET",
        ),
    ] = [],  # noqa: B006  # typer needs a list
    weights: Annotated[
        Path | None, typer.Option(help="State dict for the model that the factory makes.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="package.module:factory of batches as the model is trained on.",
            metavar="FACTORY",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(help="Codes to look for, or their beginnings.", metavar="BN1,BN203"),
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(help="Codes to leave out.", metavar="BN4,BN205")
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="How to print what is found.")
    ] = Format.rich,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what is safe; with --out, save the weights.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where --fix saves the state dict of the mended model.")
    ] = None,
    allow_none: Annotated[
        bool, typer.Option("--allow-none", help="A program without batch norms is no error.")
    ] = False,
    explain: Annotated[
        str | None, typer.Option(help="Say what a code means, and exit.", metavar="CODE")
    ] = None,
) -> int:
    """Look for what is wrong with the batch norms of a model; exit with 1 if anything is wrong.

    For example: batchnorm check mypackage.models:make_net --weights net.pt
    """
    from batchnorm import targets as looking

    console = make_console(highlight=False, markup=False)
    if explain is not None:
        console.print(looking.explain(explain))
        return DONE
    if not targets:
        raise BatchNormError(
            "check needs a target: package.module:factory, or a file of weights, ONNX, a "
            "recording or a program. 'batchnorm check --help' says more."
        )
    if (fix or weights or data) and (len(targets) > 1 or ":" not in targets[0]):
        raise BatchNormError(
            "--fix, --weights and --data go with one model, as package.module:factory; a file "
            f"is looked at as it is. Got {', '.join(targets)}."
        )
    if out is not None:
        from batchnorm.atomic import check_place

        if not fix:
            raise BatchNormError("--out saves what --fix has mended: pass --fix as well.")
        check_place(out, "a file of weights", "fixed.pt")
    found = looking.check(
        targets,
        weights=weights,
        data=data,
        select=split_names(select),
        ignore=split_names(ignore),
        fix=fix,
        out=out,
        allow_none=allow_none,
    )
    if form is Format.rich:
        console.print(str(found), soft_wrap=True)
    else:
        from batchnorm.diagnose.formats import render

        text = render(found, ", ".join(targets), form.value)
        if text:
            print(text)
    return FOUND_WRONG if any(finding.level == "warning" for finding in found) else DONE
