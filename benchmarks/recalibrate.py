"""What recalibration costs on a ResNet-18, and how far from the truth each way of it is.

python benchmarks/recalibrate.py --out benchmarks/results
python benchmarks/recalibrate.py --errors --out benchmarks/results   errors only, in a second

Writes recalibrate.csv, recalibrate_errors.csv, with altair recalibrate_errors.svg and
recalibrate_outputs.svg, and recalibrate.json (what it was measured on). Without --out, results are
only printed.

recalibrate.csv
    ResNet-18 of torch's layers, batches of 16 float32 images of 224², on one thread. Each way runs
    in a process of its own, several times, the ways by turns. ``seconds``: of the processor, which
    other programs change little, median over the rounds; ``ratio``: to those of a forward pass over
    the data in evaluation.
    ``extra_bytes``: the most memory resident during the run, less what was resident before it, when
    the model, the data and one forward were there. ``forwards``: begun, by the report.

recalibrate_errors.csv
    A network of eight Linear-BatchNorm-ReLU-Dropout in float64, on batches of 64, 64, 2, 64 and 9
    inputs at mean 20. ``error``: the larger of the error of the mean in true deviations and the
    relative error of the variance, largest over the channels of the layer, against statistics
    measured by brute force: all data at once, layer after layer, each through those before it.

recalibrate_outputs.svg
    What the last batch norm of that network makes of all data in evaluation, before γ and β.

Exit status: 0 done; 1 a worker failed; 2 the call was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batchnorm.atomic import write_all
from batchnorm.bench.environment import busy_seconds_of_others, describe

BATCHES, BATCH, IMAGE = 8, 16, 224
MIB = 1 << 20

FORWARD = "forward pass"
WAYS = {
    FORWARD: None,
    "update_bn": None,
    "precise": {"method": "precise"},
    "exact": {"method": "exact", "memory": math.inf},
    "exact, 256 MB": {"method": "exact", "memory": 256 * MIB},
    "exact, no memory": {"method": "exact", "memory": 0},
}

SIZES = (64, 64, 2, 64, 9)
WIDTH, DEPTH = 16, 8
RUNNING = "running averages"
ESTIMATORS = (RUNNING, "update_bn", "fvcore", "precise", "exact")


# ---- cost ---------------------------------------------------------------------------------------


def work(way: str, rounds: int, threads: int) -> None:
    """Run one way each time that a line comes in; print seconds, bytes and forwards."""
    import torch
    from resnet18 import ResNet18

    from batchnorm.torch import recalibrate

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ResNet18()
    data = [torch.randn(BATCH, 3, IMAGE, IMAGE) for _ in range(BATCHES)]
    with torch.no_grad():
        model.eval()(data[0])
    for _ in range(rounds):
        sys.stdin.readline()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
        start = time.process_time()
        forwards = BATCHES
        if way == FORWARD:
            with torch.no_grad():
                for x in data:
                    model.eval()(x)
        elif way == "update_bn":
            torch.optim.swa_utils.update_bn(data, model)
        else:
            report = recalibrate(model.train(), data, **(WAYS[way] or {}))
            forwards = report.forwards
            if report.notes or len(report.layers) != 20:
                raise RuntimeError(str(report))
        seconds = time.process_time() - start
        print(json.dumps([seconds, _resident("VmHWM") - before, forwards]), flush=True)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def measure_cost(rounds: int, threads: int) -> list[dict[str, Any]]:
    """The rows of recalibrate.csv."""
    workers = {
        way: subprocess.Popen(
            [sys.executable, __file__, "worker", way, str(rounds), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in WAYS
    }
    seen: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    try:
        for number in range(rounds):
            for way, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise SystemExit(f"recalibrate.py: the worker of {way!r} has failed")
                seen[way].append(json.loads(line))
                print(f"round {number + 1}: {way}: {seen[way][-1][0]:.2f} s", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    seconds = {way: statistics.median(row[0] for row in rows) for way, rows in seen.items()}
    return [
        {
            "way": way,
            "batches": BATCHES,
            "batch": BATCH,
            "image": IMAGE,
            "rounds": rounds,
            "seconds": f"{seconds[way]:.4g}",
            "ratio": f"{seconds[way] / seconds[FORWARD]:.4g}",
            "extra_bytes": int(max(extra for _, extra, _ in found)),
            "forwards": found[-1][2],
        }
        for way, found in seen.items()
    ]


# ---- errors -------------------------------------------------------------------------------------


def measure_errors() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of recalibrate_errors.csv, and values of the last layer by estimator."""
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

    def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]

    def statistics_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        found = []
        for m in norms(model):
            assert m.running_mean is not None
            assert m.running_var is not None
            found.append((m.running_mean, m.running_var))
        return found

    truth: list[tuple[Tensor, Tensor]] = []
    x, model = torch.cat(data), copy.deepcopy(start).eval()
    with torch.no_grad():
        for m in model:
            if isinstance(m, nn.BatchNorm1d):
                m.running_mean, m.running_var = x.mean(0), x.var(0)
                truth.append((m.running_mean, m.running_var))
            x = m(x)

    def running(model: nn.Module) -> Any:
        with torch.no_grad():
            for _ in range(20):
                for x in data:
                    model.train()(x)
        return statistics_of(model)

    def by_update_bn(model: nn.Module) -> Any:
        torch.optim.swa_utils.update_bn(data, model)
        return statistics_of(model)

    def by_fvcore(model: nn.Module) -> Any:
        """fvcore.nn.precise_bn, its estimator: moments by batch size, E[x²] − E[x]²."""
        means, squares = ([torch.zeros(WIDTH).double() for _ in truth] for _ in range(2))
        total = 0
        for m in norms(model):
            m.momentum = 1.0
        with torch.no_grad():
            for x in data:
                model.train()(x)
                total += len(x)
                for k, (mean, var) in enumerate(statistics_of(model)):
                    square = mean**2 + var * ((len(x) - 1) / len(x))
                    means[k] += (mean - means[k]) * (len(x) / total)
                    squares[k] += (square - squares[k]) * (len(x) / total)
        return [(m, s - m**2) for m, s in zip(means, squares, strict=True)]

    def ours(method: str) -> Callable[[nn.Module], Any]:
        def run(model: nn.Module) -> Any:
            recalibrate(model, data, method=method)
            return statistics_of(model)

        return run

    estimators = (running, by_update_bn, by_fvcore, ours("precise"), ours("exact"))
    rows, outputs = [], []
    for name, estimate in zip(ESTIMATORS, estimators, strict=True):
        torch.manual_seed(0)
        model = copy.deepcopy(start)
        found = [(mean.clone(), var.clone()) for mean, var in estimate(model)]
        for k, ((mean, var), (true_mean, true_var)) in enumerate(zip(found, truth, strict=True)):
            of_mean = float(((mean - true_mean).abs() / true_var.sqrt()).max())
            of_var = float(((var - true_var).abs() / true_var).max())
            rows.append({"estimator": name, "layer": k + 1, "error": f"{max(of_mean, of_var):.3g}"})
        for m, (mean, var) in zip(norms(model), found, strict=True):
            m.running_mean, m.running_var = mean, var
        last = max(k for k, m in enumerate(model) if isinstance(m, nn.BatchNorm1d))
        with torch.no_grad():
            normalized = model.eval()[: last + 1](torch.cat(data)).flatten().tolist()
        outputs += [{"estimator": name, "value": value} for value in normalized]
    return rows, outputs


def chart_of(rows: list[dict[str, Any]]) -> Any:
    """Error by layer, a line for each estimator."""
    import altair as alt

    values = [{**row, "error": float(row["error"])} for row in rows]
    encoded = alt.Chart(alt.InlineData(values)).encode(
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
    return (
        (encoded.mark_line() + encoded.mark_point(filled=True, size=40))
        .properties(
            width=460,
            height=280,
            title=alt.TitleParams(
                "Statistics for evaluation, beside brute force",
                subtitle="eight layers, dropout, batches of 64, 64, 2, 64 and 9, float64",
                anchor="start",
            ),
        )
        .configure(font="Helvetica, Arial, sans-serif", background="white", padding=16)
    )


def chart_of_outputs(values: list[dict[str, Any]]) -> Any:
    """A histogram for each estimator, one below the other, with mean and deviation."""
    import altair as alt

    step, far = 0.25, 5.0
    rows, labels = [], []
    for name in ESTIMATORS:
        found = [row["value"] for row in values if row["estimator"] == name]
        mean, std = statistics.fmean(found), statistics.pstdev(found)
        inside = [value for value in found if abs(value) < far]
        bins: dict[float, int] = {}
        for value in inside:
            left = math.floor(value / step) * step
            bins[left] = bins.get(left, 0) + 1
        label = f"{name}: mean {mean:.2f}, deviation {std:.2f}".replace("-", "−")
        labels.append(label)
        rows += [
            {"estimator": label, "from": left, "to": left + step, "share": n / len(found) / step}
            for left, n in sorted(bins.items())
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
                sort=labels,
                spacing=6,
                header=alt.Header(labelOrient="top", labelAnchor="start", labelFontSize=12),
            ),
        )
    )
    return (
        bars.properties(
            width=460,
            height=52,
            title=alt.TitleParams(
                "What the last layer normalizes to, in evaluation",
                subtitle="all data, all channels; right is mean 0, deviation 1",
                anchor="start",
            ),
        )
        .configure(font="Helvetica, Arial, sans-serif", background="white", padding=16)
        .configure_view(strokeWidth=0)
    )


# ---- the call -----------------------------------------------------------------------------------


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows under their names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def run(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    contents: dict[str, bytes] = {}
    errors, outputs = measure_errors()
    contents["recalibrate_errors.csv"] = as_csv(errors).encode()
    if options.out is not None:
        try:
            import vl_convert

            for name, chart in (
                ("recalibrate_errors.svg", chart_of(errors)),
                ("recalibrate_outputs.svg", chart_of_outputs(outputs)),
            ):
                contents[name] = vl_convert.vegalite_to_svg(chart.to_dict()).encode()
        except ImportError:
            print("recalibrate.py: no picture without batchnorm[report]", file=sys.stderr)
    if not options.errors:
        threads = 1
        others, start = busy_seconds_of_others(), time.perf_counter()
        cost = measure_cost(options.rounds, threads)
        elapsed = time.perf_counter() - start
        environment = describe(threads=threads)
        share = (busy_seconds_of_others() - others) / elapsed / environment["cpus"]
        environment["share_of_others"] = round(share, 3)
        contents["recalibrate.csv"] = as_csv(cost).encode()
        contents["recalibrate.json"] = (json.dumps(environment, indent=2) + "\n").encode()
    for name, content in contents.items():
        if name.endswith("csv"):
            print(content.decode())
    if options.out is not None:
        write_all({options.out / name: content for name, content in contents.items()})
        for name in contents:
            print(f"wrote {options.out / name}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or serve it as one of its workers."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["worker"]:
        work(given[1], int(given[2]), int(given[3]))
        return 0
    parser = argparse.ArgumentParser(description="Measure what recalibration costs, and errors.")
    parser.add_argument("--out", type=Path, help="directory for the results")
    parser.add_argument("--errors", action="store_true", help="leave the ResNet-18 out")
    parser.add_argument("--rounds", type=int, default=2)
    try:
        return run(parser.parse_args(given))
    except KeyboardInterrupt:
        print("recalibrate.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
