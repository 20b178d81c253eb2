"""What recalibration costs on a ResNet-18, and how far from the truth each way of it is.

python benchmarks/recalibrate.py --out benchmarks/results
python benchmarks/recalibrate.py --errors --out benchmarks/results   errors only, in a second

Writes recalibrate.csv, recalibrate_errors.csv, with altair recalibrate_errors.svg and
recalibrate_outputs.svg, and recalibrate.json (what it was measured on).

recalibrate.csv
    ResNet-18 of torch's layers, batches of 16 float32 images of 224², on one thread. Each way runs
    in a process of its own, several times, the ways by turns. Times are of the processor, which
    other programs change little; ``ratio`` is to a forward pass over the data in evaluation.
    ``peak_bytes``: the most memory resident during the run, less what was resident before it, when
    the model, the data and one forward were there. ``forwards``: begun, by the report.

recalibrate_errors.csv
    A network of eight Linear-BatchNorm-ReLU-Dropout in float64, on batches of 64, 64, 2, 64 and 9
    inputs at mean 20. ``error``: the larger of the error of the mean in true deviations and the
    relative error of the variance, largest over the channels of the layer, against statistics
    measured by brute force: all data at once, layer after layer, each through those before it.

recalibrate_outputs.svg
    What the last batch norm of that network makes of all data in evaluation, before γ and β.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import command
import numpy as np

from batchnorm.bench import memory
from batchnorm.bench.chart import can_plot, render, themed
from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import Sample, interleave
from batchnorm.bench.worker import Worker
from batchnorm.progress import steps

BATCHES, BATCH, IMAGE = 8, 16, 224
MIB = 1 << 20

FORWARD, UPDATE_BN = "forward pass", "update_bn"
#: Name to the arguments of `recalibrate`, of those ways that are its.
WAYS: dict[str, dict[str, Any] | None] = {
    FORWARD: None,
    UPDATE_BN: None,
    "precise": {"method": "precise"},
    "exact": {"method": "exact", "memory": math.inf},
    "exact, 256 MB": {"method": "exact", "memory": 256 * MIB},
    "exact, no memory": {"method": "exact", "memory": 0},
}

SIZES = (64, 64, 2, 64, 9)
WIDTH, DEPTH = 16, 8
ESTIMATORS = ("running averages", UPDATE_BN, "fvcore", "precise", "exact")


@dataclass(frozen=True, kw_only=True)
class CostRow(TimedRow):
    """One way; a line of ``recalibrate.csv``."""

    batches: int = BATCHES
    batch: int = BATCH
    image: int = IMAGE
    forwards: int = 0


@dataclass(frozen=True)
class ErrorRow:
    """One estimator on one layer; a line of ``recalibrate_errors.csv``."""

    estimator: str
    layer: int
    error: float


# ---- cost ---------------------------------------------------------------------------------------


class Way:
    """A network and data, in a process of their own."""

    def __init__(self, way: str) -> None:
        import torch
        from networks import ResNet18

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.way, self.model = way, ResNet18()
        self.data = [torch.randn(BATCH, 3, IMAGE, IMAGE) for _ in range(BATCHES)]
        with torch.no_grad():
            self.model.eval()(self.data[0])

    def run(self) -> dict[str, Any]:
        """Seconds of the processor, bytes above those resident before, and forwards."""
        import torch

        from batchnorm.torch import recalibrate

        before = memory.resident()
        memory.reset_peak()
        start = time.process_time()
        forwards = BATCHES
        if self.way == FORWARD:
            with torch.no_grad():
                for x in self.data:
                    self.model.eval()(x)
        elif self.way == UPDATE_BN:
            torch.optim.swa_utils.update_bn(self.data, self.model)
        else:
            report = recalibrate(self.model.train(), self.data, **(WAYS[self.way] or {}))
            forwards = report.forwards
            if report.notes or len(report.layers) != 20:
                raise RuntimeError(str(report))
        seconds = time.process_time() - start
        return {"seconds": seconds, "bytes": memory.peak() - before, "forwards": forwards}


def measure_cost(rounds: int, seed: int) -> list[CostRow]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        workers = {way: stack.enter_context(Worker(__file__, "Way", way=way)) for way in WAYS}
        started = stack.enter_context(steps(rounds * len(WAYS)))

        def take(way: str) -> Sample:
            started(f"round {len(found[way]) + 1}: {way}")
            found[way].append(workers[way].ask("run"))
            return Sample(found[way][-1]["seconds"])

        samples = interleave(
            {way: partial(take, way) for way in WAYS}, min_rounds=rounds, seed=seed
        )
    return [
        replace(
            timed(CostRow(provider=way), samples[way], samples[FORWARD]),
            peak_bytes=max(one["bytes"] for one in found[way]),
            forwards=found[way][-1]["forwards"],
        )
        for way in WAYS
    ]


# ---- errors -------------------------------------------------------------------------------------


def measure_errors() -> tuple[list[ErrorRow], dict[str, list[float]]]:
    """Errors, and by estimator, the values that the last layer normalizes to."""
    import torch
    from torch import Tensor, nn

    from batchnorm.torch import recalibrate

    generator = torch.Generator().manual_seed(20150211)
    data = [
        2 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) + 20 + k
        for k, n in enumerate(SIZES)
    ]
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.3)]
    start = nn.Sequential(*layers, nn.Linear(WIDTH, 3)).double()

    def norms(model: nn.Module) -> list[Any]:
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]

    def statistics_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        return [(m.running_mean, m.running_var) for m in norms(model)]

    def by_fvcore(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """fvcore.nn.precise_bn, its estimator: moments by batch size, E[x²] − E[x]²."""
        means, squares = (torch.zeros(DEPTH, WIDTH).double() for _ in range(2))
        total = 0
        for m in norms(model):
            m.momentum = 1.0
        for x in data:
            model.train()(x)
            total += len(x)
            for k, (mean, var) in enumerate(statistics_of(model)):
                square = mean**2 + var * ((len(x) - 1) / len(x))
                means[k] += (mean - means[k]) * (len(x) / total)
                squares[k] += (square - squares[k]) * (len(x) / total)
        return list(zip(means, squares - means**2, strict=True))

    def estimate(name: str, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        if name == "fvcore":
            return by_fvcore(model)
        if name == "running averages":
            for x in data * 20:
                model.train()(x)
        elif name == UPDATE_BN:
            torch.optim.swa_utils.update_bn(data, model)
        else:
            recalibrate(model, data, method=name)
        return statistics_of(model)

    rows, outputs = [], {}
    with torch.no_grad():
        x, exact = torch.cat(data), copy.deepcopy(start).eval()
        for m in exact:
            if isinstance(m, nn.BatchNorm1d):
                m.running_mean, m.running_var = x.mean(0), x.var(0)
            x = m(x)
        for name in ESTIMATORS:
            torch.manual_seed(0)
            model = copy.deepcopy(start)
            found = [(mean.clone(), var.clone()) for mean, var in estimate(name, model)]
            pairs = zip(found, statistics_of(exact), norms(model), strict=True)
            for k, ((mean, var), (true_mean, true_var), m) in enumerate(pairs, start=1):
                of_mean = ((mean - true_mean).abs() / true_var.sqrt()).max()
                of_var = ((var - true_var).abs() / true_var).max()
                rows.append(ErrorRow(name, k, float(f"{max(of_mean, of_var):.3g}")))
                m.running_mean, m.running_var = mean, var
            to_last = model.eval()[: 4 * DEPTH - 2]  # without its ReLU and dropout
            outputs[name] = to_last(torch.cat(data)).flatten().tolist()
    return rows, outputs


def chart_of(rows: list[ErrorRow]) -> Any:
    """Error by layer, a line for each estimator."""
    import altair as alt

    encoded = alt.Chart(alt.InlineData([asdict(row) for row in rows])).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y(
            "error:Q",
            title="largest error of mean or variance",
            scale=alt.Scale(type="log", domain=[1e-16, 10]),
            axis=alt.Axis(format=".0e", values=[10.0**k for k in range(-16, 2, 3)]),
        ),
        color=alt.Color(
            "estimator:N", sort=list(ESTIMATORS), legend=alt.Legend(title=None, orient="right")
        ),
    )
    title = alt.TitleParams(
        "Statistics for evaluation, beside brute force",
        subtitle="eight layers, dropout, batches of 64, 64, 2, 64 and 9, float64",
        anchor="start",
    )
    points = encoded.mark_line() + encoded.mark_point(filled=True, size=40)
    return themed(points.properties(width=460, height=280, title=title))


def chart_of_outputs(values: dict[str, list[float]]) -> Any:
    """A histogram for each estimator, one below the other, with mean and deviation."""
    import altair as alt

    far, rows = 5.0, []
    edges = np.arange(-far, far + 0.25, 0.25)
    for name, found in values.items():
        label = f"{name}: mean {np.mean(found):.2f}, deviation {np.std(found):.2f}"
        shares = np.histogram(found, edges)[0] / len(found) / 0.25
        rows += [
            {"estimator": label.replace("-", "−"), "from": left, "to": left + 0.25, "share": share}
            for left, share in zip(edges[:-1].tolist(), shares.tolist(), strict=True)
            if share
        ]
    bars = (
        alt.Chart(alt.InlineData(rows))
        .mark_bar(color="#1b7f5c", stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X(
                "from:Q", bin="binned", title=None, scale=alt.Scale(domain=[-far, far], nice=False)
            ),
            x2="to:Q",
            y=alt.Y("share:Q", title=None, axis=None),
            row=alt.Row(
                "estimator:N",
                title=None,
                sort=list(dict.fromkeys(row["estimator"] for row in rows)),
                spacing=6,
                header=alt.Header(labelOrient="top", labelAnchor="start", labelFontSize=12),
            ),
        )
    )
    title = alt.TitleParams(
        "What the last layer normalizes to, in evaluation",
        subtitle="all data, all channels; right is mean 0, deviation 1",
        anchor="start",
    )
    sized = bars.properties(width=460, height=52, title=title)
    return themed(sized).configure_view(strokeWidth=0)


# ---- the call -----------------------------------------------------------------------------------


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    errors, outputs = measure_errors()
    files["recalibrate_errors.csv"] = errors
    if options.out is not None and can_plot():
        files["recalibrate_errors.svg"] = render(chart_of(errors), "svg")
        files["recalibrate_outputs.svg"] = render(chart_of_outputs(outputs), "svg")
    columns = {"estimator": "{0.estimator}", "layer": "{0.layer:d}", "error": "{0.error:.3g}"}
    command.show(errors, columns)
    if not options.errors:
        cost = measure_cost(options.rounds, options.seed)
        files["recalibrate.csv"] = cost
        files["recalibrate.json"] = {"threads": 1}
        columns = {"way": "{0.provider}", "ms": "{0.p50_ms:.0f}", "ratio": "{0.ratio:.3f}"}
        command.show(cost, columns | {"peak MB": "{0.peak_mb:.0f}", "forwards": "{0.forwards:d}"})
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.make_parser(__file__, __doc__, rounds=3)
    parser.add_argument("--errors", action="store_true", help="leave the ResNet-18 out")
    return command.main(parser, measure, arguments, needs=("torch",))


if __name__ == "__main__":
    sys.exit(main())
