"""``batchnorm bench``."""

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.output import DONE, FOUND_WRONG, make_console, split_names


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
        ops=benchmark.choose_ops(split_names(ops)),
        providers=benchmark.choose(split_names(providers)),
        threads=threads,
        seed=seed,
    )
    if quick:
        plan = replace(plan, shapes=benchmark.QUICK_SHAPES, min_rounds=5, budget_s=0.3)
    if shapes is not None:
        plan = replace(
            plan, shapes=tuple(benchmark.parse_shape(name) for name in split_names(shapes) or ())
        )
    if not accuracy:
        plan = replace(plan, offsets=())
    if rounds is not None:
        plan = replace(plan, min_rounds=rounds)
    if budget is not None:
        plan = replace(plan, budget_s=budget)
    benchmark.check_memory(plan)
    if out is not None:
        benchmark.prepare_directory(out)

    with steps(benchmark.steps(plan)) as started:
        results = benchmark.run(plan, started=started)
    written = [] if out is None else benchmark.write(results, out)
    console = make_console()
    benchmark.show(results, console)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return FOUND_WRONG if results.troubles else DONE
