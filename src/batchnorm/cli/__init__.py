"""The command line: ``batchnorm`` and ``python -m batchnorm``.

Each module of `batchnorm.cli.commands` is a command; they are found by listing.

Exit status: 0 for success; 1 if the command ran and found something wrong; 2 if the arguments or
the input cannot be used; 130 if interrupted.
"""

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from batchnorm.cli import commands
from batchnorm.cli.output import (
    DONE,
    FOUND_WRONG,
    INTERRUPTED,
    UNUSABLE,
    drop_broken_output,
    drop_output,
    is_output_error,
    many,
    note,
)
from batchnorm.errors import BatchNormError

if TYPE_CHECKING:
    import typer

__all__ = ["DONE", "FOUND_WRONG", "INTERRUPTED", "UNUSABLE", "application", "main", "version_line"]


def main(
    arguments: Sequence[str] | None = None, *, interrupted: Callable[[], bool] = lambda: False
) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Arguments after the name of the program; None for those of this process.
    interrupted
        Whether Ctrl-C was pressed; an error is taken for its consequence then, for libraries may
        turn KeyboardInterrupt into others.

    Returns
    -------
    int
        The exit status.
    """
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except BaseException as error:
        status = _explain(error, interrupted())
        if status is None:
            raise
        return status


def _run(arguments: list[str]) -> int:
    """Run a command; its errors are raised as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # what an encoding lacks becomes a question mark
            stream.reconfigure(errors="replace")
    try:
        import rich  # noqa: F401  # the commands need it
        import typer
    except ImportError as error:
        from batchnorm.extras import install

        raise BatchNormError(
            f"the command line needs {error.name}, which is not installed. "
            f"{install('cli', str(error.name))}"
        ) from error
    # Not by calling the application, which turns some errors into exit statuses of its own.
    command = typer.main.get_command(application())
    try:
        with command.make_context("batchnorm", arguments) as context:
            status = command.invoke(context)
    except typer.Exit as end:
        status = end.exit_code
    sys.stdout.flush()  # while an error can still be reported
    return DONE if status is None else int(status)


def _explain(error: BaseException, interrupted: bool) -> int | None:
    """Print one line for an error and return the status; None for errors not to be expected."""
    if interrupted or isinstance(error, KeyboardInterrupt):
        drop_broken_output()
        note("interrupted")
        return INTERRUPTED
    if isinstance(error, BatchNormError):
        drop_broken_output()
        return _refuse(str(error))
    if isinstance(error, MemoryError):
        drop_broken_output()
        return _refuse(f"there is not enough memory ({str(error) or 'nothing more is known'}).")
    # The module of click's exceptions depends on the version of typer, so look for a method.
    explain = getattr(error, "format_message", None)
    if explain is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "batchnorm")
        return _refuse(f"{explain().rstrip('.')}. '{command} --help' lists what it takes.")
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # rich exits with 1
    if is_output_error(error):
        drop_output()
        if isinstance(error, BrokenPipeError):  # its reader has enough
            return DONE
        return _refuse(f"standard output cannot be written ({error.strerror}). Send it elsewhere.")
    return None


def application() -> "typer.Typer":
    """Build the application with all commands.

    A command is a module of `batchnorm.cli.commands` with a function of the same name.
    """
    import typer

    app = typer.Typer(
        help="Batch normalization that is exact, fast and visible.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def batchnorm(
        context: typer.Context,
        version: Annotated[
            bool,
            typer.Option("--version", help="Print version, instruction set and threads, and exit."),
        ] = False,
    ) -> None:
        if version:
            print(version_line())
            raise typer.Exit(DONE)
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit(UNUSABLE)

    for found in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{found.name}")
        app.command(found.name)(getattr(module, found.name))
    return app


def version_line() -> str:
    """Return the version, the instruction set in use, and the threads of OpenMP."""
    import batchnorm

    config = batchnorm.show_config()
    openmp = f"OpenMP with {many(config['threads'], 'thread')}"
    return (
        f"batchnorm {batchnorm.__version__}, instruction set {config['instruction_set']}, "
        f"{openmp if config['openmp'] else 'no OpenMP'}"
    )


def _refuse(message: str) -> int:
    note(message)
    return UNUSABLE
