"""Progress of long work: a bar on the terminal, and nothing where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["Show", "bar"]

#: Told what is being done, how much is done, and how much there is, or None.
Show = Callable[[str, int, "int | None"], None]


@contextlib.contextmanager
def bar(*, in_bytes: bool = False) -> Iterator[Show]:
    """Show a bar on stderr while the block runs; what is given moves it on.

    Without rich, which the extras that do long work bring along, nothing is shown.
    """
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        yield lambda text, done, total: None
        return
    console = Console(stderr=True, emoji=False)  # a file may be called :smile:.npy
    columns: list[progress.ProgressColumn] = [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
    ]
    if in_bytes:
        columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    else:
        columns += [progress.MofNCompleteColumn(), progress.TimeElapsedColumn()]
    with progress.Progress(
        *columns,
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as shown:
        task = shown.add_task("opening" if in_bytes else "beginning", total=None)
        yield lambda text, done, total: shown.update(
            task, description=text, completed=done, total=total
        )
