"""``batchnorm merge``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.output import make_console, many, note
from batchnorm.errors import BatchNormError

if TYPE_CHECKING:
    from batchnorm.dataset import Statistics


def merge(
    files: Annotated[
        list[Path],
        typer.Argument(help="Statistics saved by 'batchnorm stats', .npz or .json."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Where to save the statistics of all, .npz or .json. It may be one of the files "
            "given, to which the others are then added."
        ),
    ],
) -> None:
    """Merge statistics of parts of a data set into those of the whole.

    For example: batchnorm merge monday.npz tuesday.npz --out week.npz
    """
    from batchnorm import dataset
    from batchnorm.atomic import check_place
    from batchnorm.dataset.addresses import file_key
    from batchnorm.dataset.statistics import check_replaceable, check_suffix

    check_suffix(out)
    check_place(out, "a .npz or .json file", "stats.npz")
    check_replaceable(out)
    seen = set()
    for path in files:
        if (key := file_key(path)) in seen:
            raise BatchNormError(
                f"{path}: is named twice, and its values would count twice. Name it once."
            )
        seen.add(key)
    parts = {path: dataset.Statistics.load(path) for path in files}
    _note_common_files(parts)
    try:
        found = dataset.merge(parts.values())
    except BatchNormError:
        _refuse_first_that_differs(parts)
        raise
    found.save(out)
    console = make_console(highlight=False, markup=False)
    console.print(
        f"merged {many(len(parts), 'file')}: {many(found.features, 'feature')}, "
        f"{found.count.sum():.0f} values, {found.missing.sum()} missing",
        soft_wrap=True,
    )
    console.print(f"wrote {out}", soft_wrap=True)


def _note_common_files(parts: "dict[Path, Statistics]") -> None:
    """Say which data may count twice; the same name may be another file on another machine."""
    where: dict[str, Path] = {}
    for path, part in parts.items():
        for name in part.files:
            if (other := where.setdefault(name, path)) != path:
                note(
                    f"{other} and {path} are both of {name}; if that is the same file, its values "
                    "count twice"
                )
                return


def _refuse_first_that_differs(parts: "dict[Path, Statistics]") -> None:
    from batchnorm import dataset

    (first, one), *others = parts.items()
    for path, other in others:
        try:
            dataset.merge([one, other])
        except BatchNormError as error:
            raise BatchNormError(f"{first} and {path}: {error}") from error
