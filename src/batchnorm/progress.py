"""Progress of long work: a bar on the terminal, and nothing where there is no terminal."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

__all__ = ["Show", "bar", "steps"]

#: Told what is being done, how much is done, and how much there is, or None.
Show = Callable[[str, int, "int | None"], None]


@contextlib.contextmanager
def bar(*, in_bytes: bool = False) -> Iterator[Show]:
    """Show a bar on stderr while the block runs; call the `Show` that it gives to move it.

    Without rich, which the extras that do long work install, nothing is shown.
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


@contextlib.contextmanager
def steps(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of `total` steps; call what it gives with the name of each step that begins."""
    with bar() as show:
        number = itertools.count()
        yield lambda text: show(text, next(number), total)
