"""``batchnorm study``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import make_console, note
from batchnorm.errors import BatchNormError


def study(
    names: Annotated[
        list[str],
        typer.Argument(help="Names of studies, or all; --list shows them.", metavar="NAME|all"),
    ] = [],  # noqa: B006  # typer needs a list
    listed: Annotated[bool, typer.Option("--list", help="List the studies and exit.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tour of some minutes; its verdicts mean little.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(help="Repetitions; 5 by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results, NAME.json each; studies or, for a quick tour, "
            "studies/quick, if left out. Seeds that are finished there are not repeated."
        ),
    ] = None,
) -> None:
    """Run the literature's claims about batch norm as experiments with verdicts.

    For example: batchnorm study learning-rate
    """
    import batchnorm.study as studies
    from batchnorm.progress import bar
    from batchnorm.study.tables import show

    console = make_console()
    if listed:
        for name in names or studies.names():
            console.print(f"[bold]{name:16}[/] {studies.find(name).question}", highlight=False)
        return
    if not names:
        raise BatchNormError(
            f"study needs a name: one of {', '.join(studies.names())}, or all of them by 'all'."
        )
    chosen = studies.choose(names)
    folder = out or (Path("studies") / "quick" if quick else Path("studies"))
    try:
        with bar() as progress:
            studies.run(
                chosen,
                folder,
                quick=quick,
                seeds=seeds,
                show=progress,
                finished=lambda study, results: show(study, results, console),
            )
    except KeyboardInterrupt:
        note(f"finished seeds are in {folder}; the same command runs the others")
        raise
    for study in chosen:
        path = studies.place(study, folder)
        console.print(f"results in {path}", highlight=False, markup=False, soft_wrap=True)
