"""The command line: ``batchnorm`` and ``python -m batchnorm``.

Each subcommand is added to the application by a function below, and imports the modules that it
needs when it runs. To add a subcommand, write such a function and add it to `SUBCOMMANDS`.

Exit status: 0 for success; 1 if the command ran and found something wrong; 2 if the arguments or
the input cannot be used; 130 if interrupted.
"""

import csv
import enum
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from batchnorm.errors import BatchNormError

if TYPE_CHECKING:
    import typer
    from rich.console import Console

    from batchnorm.dataset import Statistics


class Format(str, enum.Enum):
    """How `check` prints what it has found."""

    rich = "rich"
    text = "text"
    json = "json"
    sarif = "sarif"
    github = "github"


class Missing(str, enum.Enum):
    """How `stats` handles NaN and null."""

    refuse = "refuse"
    skip = "skip"


DONE, FOUND_WRONG, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Arguments after the name of the program; None for those of this process.

    Returns
    -------
    int
        The exit status.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # what an encoding lacks becomes a question mark
            stream.reconfigure(errors="replace")
    try:
        import rich  # noqa: F401  # the subcommands need it
        import typer
    except ImportError as error:
        return _refuse(
            f"the command line needs {error.name}, which is not installed. "
            f"pip install 'batchnorm[cli]' adds it."
        )
    app = application()
    try:
        status = app(
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog_name="batchnorm",
            standalone_mode=False,
        )
        sys.stdout.flush()  # while an error can still be reported
    except BatchNormError as error:
        return _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # the reader of the pipe has exited
        return DONE
    except OSError as error:
        if error.filename is not None:
            raise
        _drop_output()
        return _refuse(
            f"standard output cannot be written ({error.strerror or error}). Send it elsewhere."
        )
    except Exception as error:
        # The module of click's exceptions depends on the version of typer, so look for a method.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "batchnorm")
        return _refuse(f"{explain().rstrip('.')}. '{command} --help' lists what it takes.")
    if status == INTERRUPTED:
        print("batchnorm: interrupted", file=sys.stderr)
    return status if isinstance(status, int) else DONE


def application() -> "typer.Typer":
    """Build the application with all its subcommands."""
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

    for add in SUBCOMMANDS:
        add(app)
    return app


def version_line() -> str:
    """Return the version, the instruction set in use, and the threads of OpenMP."""
    import batchnorm

    config = batchnorm.show_config()
    threads = config["threads"]
    openmp = f"OpenMP with {threads} thread{'s' * (threads != 1)}"
    return (
        f"batchnorm {batchnorm.__version__}, instruction set {config['instruction_set']}, "
        f"{openmp if config['openmp'] else 'no OpenMP'}"
    )


def _drop_output() -> None:
    """Discard further output, or Python would report the same error again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _console(**options: Any) -> "Console":
    """Make a console that prints text unchanged, and raises if the reader of a pipe has exited."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1

    return Piped(emoji=False, **options)


def _refuse(message: str) -> int:
    print(f"batchnorm: {' '.join(message.split())}", file=sys.stderr)
    return UNUSABLE


def _names(text: str | None) -> list[str] | None:
    """Split ``a,b,c``; names that contain commas are quoted."""
    if text is None:
        return None
    # Commas alone are a mistake, and are refused as a column without a name.
    parts = next(csv.reader([text], skipinitialspace=True), [])
    return [part.strip() for part in parts if part.strip()] or [""]


def _demo(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo.html"),
        seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
        steps: Annotated[
            int | None, typer.Option(help="Number of training steps, instead of the default.")
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="Train for a few steps only.")] = False,
    ) -> None:
        """Train a small network with and without batch norm, and show the difference."""
        import batchnorm.demo

        batchnorm.demo.run(out=out, seed=seed, steps=steps, quick=quick, console=_console())


def _bench(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def bench(
        quick: Annotated[
            bool, typer.Option("--quick", help="Two small shapes and few rounds.")
        ] = False,
        out: Annotated[
            Path | None,
            typer.Option(
                help="Directory for speed.csv, accuracy.csv, environment.json and the plot. "
                "Without it nothing is written."
            ),
        ] = None,
        ops: Annotated[
            str | None,
            typer.Option(help="Any of forward, inference, backward.", metavar="A,B"),
        ] = None,
        shapes: Annotated[
            str | None,
            typer.Option(help="N x C x spatial axes, as in 256x1024,8x64x7x7.", metavar="A,B"),
        ] = None,
        providers: Annotated[
            str | None,
            typer.Option(
                help="Any of batchnorm, batchnorm-out, numpy, torch, torch.compile, jax.",
                metavar="A,B",
            ),
        ] = None,
        accuracy: Annotated[
            bool, typer.Option(help="Compare outputs at large means with exact values.")
        ] = True,
        threads: Annotated[
            int | None, typer.Option(help="Threads for every provider; by default all processors.")
        ] = None,
        rounds: Annotated[
            int | None, typer.Option(min=1, help="Minimum number of samples per case.")
        ] = None,
        budget: Annotated[
            float | None, typer.Option(min=0, help="Minimum number of seconds per case.")
        ] = None,
        seed: Annotated[int, typer.Option(min=0, help="Random seed of the inputs.")] = 0,
    ) -> int:
        """Time forward, inference and backward beside NumPy, PyTorch, JAX and a plain copy."""
        from dataclasses import replace

        from batchnorm import bench as benchmark
        from batchnorm.progress import steps

        plan = benchmark.Plan(
            ops=benchmark.choose_ops(_names(ops)),
            providers=benchmark.choose(_names(providers)),
            threads=threads,
            seed=seed,
        )
        if quick:
            plan = replace(plan, shapes=benchmark.QUICK_SHAPES, min_rounds=5, budget_s=0.3)
        if shapes is not None:
            plan = replace(
                plan, shapes=tuple(benchmark.parse_shape(name) for name in _names(shapes) or ())
            )
        if not accuracy:
            plan = replace(plan, offsets=())
        if rounds is not None:
            plan = replace(plan, min_rounds=rounds)
        if budget is not None:
            plan = replace(plan, budget_s=budget)
        if out is not None:
            benchmark.prepare_directory(out)

        with steps(benchmark.steps(plan)) as started:
            results = benchmark.run(plan, started=started)
        console = _console()
        benchmark.show(results, console)
        if out is not None:
            for path in benchmark.write(results, out):
                console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
        return FOUND_WRONG if results.troubles else DONE


def _study(app: "typer.Typer") -> None:
    import typer

    @app.command()
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

        console = _console()
        if listed:
            for name in studies.names():
                console.print(f"[bold]{name:16}[/] {studies.find(name).question}", highlight=False)
            return
        if not names:
            raise BatchNormError(
                f"study needs a name: one of {', '.join(studies.names())}, or all of them by 'all'."
            )
        chosen = studies.choose(names)
        folder = out or (Path("studies") / "quick" if quick else Path("studies"))
        pipe = [console]

        def finished(study: Any, results: Any) -> None:
            try:
                for place in pipe:
                    show(study, results, place)
            except BrokenPipeError:  # its reader has enough; the studies go on
                pipe.clear()
                _drop_output()

        try:
            with bar() as progress:
                studies.run(
                    chosen,
                    folder,
                    quick=quick,
                    seeds=seeds,
                    show=progress,
                    finished=finished,
                )
        except KeyboardInterrupt:
            _note(f"finished seeds are in {folder}; the same command runs the others")
            raise
        for study in chosen:
            path = studies.place(study, folder)
            console.print(f"results in {path}", highlight=False, markup=False, soft_wrap=True)


def _check(app: "typer.Typer") -> None:
    import typer

    @app.command()
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
        """Look for what is wrong with the batch norms of a model; exit with 1 if there is anything.

        For example: batchnorm check mypackage.models:make_net --weights net.pt
        """
        from batchnorm import targets as looking

        console = _console(highlight=False, markup=False)
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
            select=_names(select),
            ignore=_names(ignore),
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
        return FOUND_WRONG if found else DONE


def _report(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def report(
        recording: Annotated[
            Path, typer.Argument(help="A recording of batchnorm.torch.watch, .parquet.")
        ],
        other: Annotated[
            Path | None, typer.Argument(help="Another, to be shown beside it.")
        ] = None,
        out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
        terminal: Annotated[
            bool, typer.Option("--terminal", help="Show a table here instead.")
        ] = False,
    ) -> None:
        """Show a recording: findings, and every layer over training, in one page.

        For example: batchnorm report run.parquet --out report.html
        """
        from batchnorm.diagnose.recording import Recording

        first = Recording.load(recording)
        second = None if other is None else Recording.load(other)
        console = _console(highlight=False, markup=False)
        if terminal:
            from batchnorm.report.terminal import show

            for shown in (first, second):
                if shown is not None:
                    show(shown, console)
            return
        first.report(out, second)
        console.print(f"wrote {out}", soft_wrap=True)


def _stats(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def stats(
        files: Annotated[
            list[str],
            typer.Argument(help=".npy, .npz, .csv or .parquet files, or folders of them."),
        ],
        out: Annotated[
            Path | None,
            typer.Option(
                help="Where to save the statistics, .npz or .json. If the run is interrupted, the "
                "same command resumes it."
            ),
        ] = None,
        channel_axis: Annotated[
            int, typer.Option(help="Axis of the features in arrays; -1 is the last.")
        ] = 1,
        missing: Annotated[
            Missing, typer.Option(help="How to handle NaN and null.")
        ] = Missing.refuse,
        columns: Annotated[
            str | None,
            typer.Option(
                help="Columns of tables; by default all. Quote names that contain commas, as in "
                "'\"a,b\",c'.",
                metavar="A,B",
            ),
        ] = None,
        header: Annotated[
            bool, typer.Option(help="Whether .csv files begin with a line of names.")
        ] = True,
        array: Annotated[
            str | None, typer.Option(help="Name of the array in .npz files.", metavar="NAME")
        ] = None,
        dask: Annotated[
            str | None,
            typer.Option(
                help="Run on the Dask cluster whose scheduler is at this address. Its workers must "
                "reach the files by the same paths.",
                metavar="ADDRESS",
            ),
        ] = None,
    ) -> None:
        """Compute count, mean and standard deviation of each feature, of data of any size.

        For example: batchnorm stats train/ --missing skip --out stats.npz
        """
        import contextlib
        import time

        from batchnorm import dataset
        from batchnorm.progress import bar

        with contextlib.ExitStack() as stack:
            client = None
            if dask is not None:
                from batchnorm.dataset.cluster import connect

                client = stack.enter_context(connect(dask))
            begin = time.perf_counter()
            progress = stack.enter_context(bar(in_bytes=True))
            found = dataset.measure(
                files,
                channel_axis=channel_axis,
                missing=missing.value,
                columns=_names(columns),
                header=header,
                array=array,
                out=out,
                client=client,
                progress=progress,
                note=_note,
            )
        seconds = time.perf_counter() - begin
        console = _console(highlight=False, markup=False)
        _show_statistics(found, console)
        console.print(f"{_many(len(found.files), 'file')} in {seconds:.1f} s", soft_wrap=True)
        if out is not None:
            console.print(f"wrote {out}", soft_wrap=True)


def _normalize(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def normalize(
        file: Annotated[
            str, typer.Argument(help="A .npy, .npz, .csv or .parquet file, or a folder of them.")
        ],
        stats: Annotated[Path, typer.Option(help="Statistics saved by 'batchnorm stats'.")],
        out: Annotated[Path, typer.Option(help="The file to write, or the folder for a folder.")],
        eps: Annotated[
            float,
            typer.Option(
                help="Added to the variance, inside the root; at 0, constant features are refused."
            ),
        ] = 1e-5,
        dtype: Annotated[
            str | None,
            typer.Option(help="float16, float32 or float64; by default that of the data."),
        ] = None,
        channel_axis: Annotated[
            int | None,
            typer.Option(help="Axis of the features; by default, as in the statistics."),
        ] = None,
        header: Annotated[
            bool, typer.Option(help="Whether .csv files begin with a line of names.")
        ] = True,
        array: Annotated[
            str | None, typer.Option(help="Name of the array in a .npz file.", metavar="NAME")
        ] = None,
    ) -> None:
        """Subtract the mean of each feature and divide by its standard deviation.

        For example: batchnorm normalize test.npy --stats stats.npz --out test_normalized.npy
        """
        from batchnorm import dataset
        from batchnorm.progress import bar

        statistics = dataset.Statistics.load(stats)
        with bar(in_bytes=True) as progress:
            dataset.normalize(
                file,
                statistics,
                out,
                eps=eps,
                dtype=dtype,
                channel_axis=channel_axis,
                header=header,
                array=array,
                progress=progress,
                note=_note,
            )
        print(f"wrote {out}")


def _note(text: str) -> None:
    print(f"batchnorm: {text}", file=sys.stderr)


def _show_statistics(found: "Statistics", console: "Console") -> None:
    """Print a table of the first `SHOWN` features."""
    import rich.box
    from rich.table import Table

    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("feature")
    for title in ("count", "missing", "mean", "std"):
        table.add_column(title, justify="right")
    rows = zip(found.count, found.missing, found.mean, found.std(), strict=True)
    for k, (count, missing, mean, std) in enumerate(rows):
        if k == SHOWN:
            break
        name = found.names[k] if found.names else str(k)
        table.add_row(name, f"{count:.0f}", str(missing), f"{mean:.8g}", f"{std:.8g}")
    console.print(table)
    if found.features > SHOWN:
        console.print(f"and {_many(found.features - SHOWN, 'feature')} more")


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


#: The maximum number of features that `stats` prints.
SHOWN = 20

SUBCOMMANDS = (_demo, _study, _bench, _check, _report, _stats, _normalize)
