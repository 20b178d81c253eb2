"""Progress bars, if there is a terminal."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator

__all__ = ["Show", "bar", "steps"]

#: Called with a description, the amount done, and the total amount, or None if unknown.
Show = Callable[[str, int, "int | None"], None]


@contextlib.contextmanager
def bar(*, in_bytes: bool = False, shown: bool = True, remaining: bool = True) -> Iterator[Show]:
    """Show a bar on stderr while the block runs, if `shown`; yields a `Show` that updates it.

    With `remaining`, it tells how long that will take. Nothing is shown without rich, which comes
    with the extras that need it.
    """
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        shown = False
    if not shown:
        yield lambda text, done, total: None
        return
    # Not the stderr of the moment, which may be redirected in the block; and a file may be called
    # :smile:.npy.
    console = Console(file=sys.stderr, emoji=False)
    columns: list[progress.ProgressColumn] = [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(max(5, min(40, console.width - 60))),
    ]
    if in_bytes:
        columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    else:
        columns += [progress.MofNCompleteColumn(), progress.TimeElapsedColumn()]
    if remaining:
        columns.append(progress.TimeRemainingColumn())
    with progress.Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        task = bars.add_task("opening" if in_bytes else "beginning", total=None)
        yield lambda text, done, total: bars.update(
            task, description=text, completed=done, total=total
        )


@contextlib.contextmanager
def steps(total: int, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a bar of `total` steps; yields a function to call with the name of each new step."""
    with bar(shown=shown, remaining=False) as show:  # steps take unlike times
        number = itertools.count()
        yield lambda text: show(text, min(next(number), total), total)
