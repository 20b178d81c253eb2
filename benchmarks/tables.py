"""Put the benchmarks' numbers into README.md and docs, or check that they are there.

python benchmarks/tables.py          write the tables
python benchmarks/tables.py --check  exit 1 if a page holds another one

A table stands between two markers, of which the first names it: see `TABLES`. Each is made from the
files of that name in benchmarks/results, and left out while there are none.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# --- reading and writing --------------------------------------------------------------------------


def read(name: str) -> list[Any]:
    """The rows of a CSV file: a number where there is one, NaN where there is nothing."""

    def value(text: str) -> Any:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text or math.nan

    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [SimpleNamespace(**{key: value(text) for key, text in row.items()}) for row in rows]


def read_about(name: str) -> Any:
    """What was measured on."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(
    caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], *, words: int = 1
) -> str:
    """A caption and a table, whose first `words` columns hold words and the others numbers."""
    columns = list(head)
    lines = [caption, ""] if caption else []
    lines.append(f"| {' | '.join(columns)} |".replace("|  |", "| |"))
    lines.append("|" + ":--|" * words + "--:|" * (len(columns) - words))
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def by(rows: Iterable[Any], *names: str, of: str = "provider") -> dict[Any, dict[str, Any]]:
    """The rows of each case, that is with the same values in `names`, by their provider."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in names), {})[getattr(row, of)] = row
    return found


def plain(value: float) -> str:
    """1e6 and 3e-7 rather than 1e+06 and 3e-07."""
    if value == 0 or 1 <= value < 1000:
        return f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


# --- one function for each table ------------------------------------------------------------------

NAMES = {
    "batchnorm": "batchnorm",
    "batchnorm-out": "batchnorm, `out=` given",
    "torch": "PyTorch",
    "torch.compile": "PyTorch, `torch.compile`",
    "jax": "JAX, `jit`",
    "numpy": "NumPy, textbook",
}
OPS = ("forward", "inference", "backward")


def speed() -> str:
    """Speed and accuracy of all providers: `batchnorm bench --out benchmarks/results`."""
    timed, accuracy, about = read("speed"), read("accuracy"), read_about("environment")
    offsets = sorted({row.offset for row in accuracy})

    def speedup(provider: str, op: str) -> str:
        rows = [row for row in timed if (row.provider, row.op) == (provider, op)]
        found = [1 / row.ratio for row in rows if row.ratio > 0]
        if provider == "torch" or not found:
            return "1" if found else "–"
        return f"{statistics.geometric_mean(found):.2f} ({min(found):.2f})"

    def error(provider: str, offset: float) -> str:
        """The worse of the layouts to one digit; NaN where any is."""
        rows = [row for row in accuracy if (row.provider, row.offset) == (provider, offset)]
        found = [row.max_error for row in rows if row.status == "ok"]
        if any(map(math.isnan, found)):
            return "NaN"
        return plain(float(f"{max(found):.0e}")) if found else "–"

    measured = {row.provider for row in (*timed, *accuracy)}
    cases = {(row.shape, row.layout) for row in timed}
    against = ", ".join(
        f"{name} {about['versions'][package]}"
        for package, name in (("numpy", "NumPy"), ("torch", "PyTorch"), ("jax", "JAX"))
        if package in about["versions"]
    )
    threads = about["threads"]
    return markdown(
        f"Speed: times as fast as PyTorch eager, geometric mean over {len(cases)} cases (float32, "
        "channel-first and channel-last), in parentheses the worst of them. Error: largest "
        f"|y − y_exact| of the forward pass on float32 N(mean, 1). {about['cpu']}, "
        f"{threads} thread{'s' * (threads != 1)}; {against}.",
        ["", *OPS, *(f"error, mean {plain(offset)}" for offset in offsets)],
        [
            [name, *(speedup(key, op) for op in OPS), *(error(key, offset) for offset in offsets)]
            for key, name in NAMES.items()
            if key in measured
        ],
    )


def network_step() -> str:
    """Whole networks: `benchmarks/network_step.py`, and with ``--isa avx2`` where it was run."""
    about, rows = read_about("network_step"), read("network_step")
    if (RESULTS / "network_step_avx2.csv").exists():
        rows += read("network_step_avx2")
    rows = [row for row in rows if row.dtype == "float32"]
    found: dict[tuple[str, str, str], dict[Any, list[float]]] = {}
    for row in rows:
        if row.provider != "torch eager" and row.ratio > 0:
            # One image is another use of a network than several; a critic has rows of numbers.
            single = getattr(row, "pass") == "inference" and row.batch == 1
            pass_ = getattr(row, "pass") + (", one image" if single else "")
            name = f"{row.network}, {row.batch} {'rows' if math.isnan(row.image) else 'images'}"
            group = found.setdefault((pass_, row.provider, row.network if single else name), {})
            group.setdefault((row.isa, row.threads), []).append(1 / row.ratio)
    settings = list(dict.fromkeys((row.isa, row.threads) for row in rows))
    mean = statistics.geometric_mean

    def cell(speedups: list[float] | None) -> str:
        return f"{mean(speedups):.2f} ({min(speedups):.2f})" if speedups else "–"

    lines = []
    for pass_, provider in dict.fromkeys(key[:2] for key in found):
        groups = {key[2]: group for key, group in found.items() if key[:2] == (pass_, provider)}
        for name, group in groups.items():
            lines.append([pass_, provider, name, *(cell(group.get(one)) for one in settings)])
        means = [
            [mean(group[one]) for group in groups.values() if one in group] for one in settings
        ]
        lines.append([pass_, provider, "all", *(f"{mean(m):.2f}" if m else "–" for m in means)])
    return markdown(
        "Times as fast as PyTorch eager, geometric mean over the two memory formats, in "
        "parentheses the worse of them; float32, images of 224×224. In the columns of AVX2 all "
        f"providers are kept to it. Median of {about['rounds']} interleaved rounds. "
        f"{about['cpu']}, PyTorch {about['versions']['torch']}.",
        [
            *("", "provider", "network"),
            *(f"{isa}, {threads} thread{'s' * (threads != 1)}" for isa, threads in settings),
        ],
        lines,
        words=3,
    )


def network_profile() -> str:
    """Where the time goes: `benchmarks/network_step.py --profile`."""
    norms = ("batch norm forward", "batch norm backward", "relu", "add", "cat")
    products = ("convolution forward", "convolution backward", "linear")
    rows, about = read("network_profile"), read_about("network_profile")
    cases = by(rows, "network", "batch", "pass", "format", "provider", of="group")
    lines = []
    for (network, batch, pass_, form, provider), groups in cases.items():
        run = groups.pop("run")
        if not groups:  # torch.compile
            continue
        sums = [sum(groups[g].ms for g in some if g in groups) for some in (products, norms)]
        rest = sum(row.ms for row in groups.values()) - sum(sums)
        numbers = (*sums, rest, run.ms)
        lines.append(
            [
                f"{network}, {pass_} of {batch}, {form}",
                provider,
                *(f"{n:.3g}" if n < 1000 else f"{n:.0f}" for n in numbers),
                f"{run.page_faults:.0f}",
            ]
        )
    head = (
        "|provider|convolutions, linear|batch norm, ReLU, additions, cat|the rest|by the clock"
        "|page faults"
    )
    return markdown(
        "Milliseconds of a training step or an inference under torch.profiler, in a process of its "
        "own, and by the clock without it; the profiler slows small operators, and two processes "
        f"differ by 10 % and more. {about['cpu']}, {about['instruction_set']}, {rows[0].threads} "
        "threads.",
        head.split("|"),
        lines,
        words=2,
    )


def sync_step() -> str:
    """What shared statistics cost: `benchmarks/sync_step.py`."""
    rows, about = read("sync_step"), read_about("sync_step")
    first, *others = dict.fromkeys(row.provider for row in rows)
    return markdown(
        f"Forward and backward pass, float32, {about['processes']} processes with gloo on one "
        f"machine, one thread each, median of {about['rounds']} rounds. {about['cpu']}.",
        ["input of each process", first, *others],
        [
            [
                shape.replace("x", "×"),
                f"{found[first].p50_ms:.1f} ms",
                *(f"{found[name].ratio:.1f} times" for name in others),
            ]
            for (shape,), found in by(rows, "shape").items()
        ],
    )


WAYS = {
    "forward pass": "a forward pass in evaluation",
    "running averages": "running averages, 20 passes at momentum 0.1",
    "update_bn": "`torch.optim.swa_utils.update_bn`",
    "fvcore": "fvcore's `update_bn_stats`",
    "precise": '`recalibrate`, "precise"',
    "exact": '`recalibrate`, "exact"',
    "exact, 256 MB": '`recalibrate`, "exact", 256 MiB',
    "exact, no memory": '`recalibrate`, "exact", no memory',
}


def recalibrate() -> str:
    """What recalibration costs: `benchmarks/recalibrate.py`."""
    rows, about = read("recalibrate"), read_about("recalibrate")
    first = rows[0]
    return markdown(
        f"ResNet-18, {first.batches} batches of {first.batch} images of {first.image}², processor "
        f"time, median of {first.rounds} rounds. {about['cpu']}, one thread; "
        f"PyTorch {about['versions']['torch']}.",
        ["", "time, in forward passes", "extra memory", "forwards begun"],
        [
            [
                WAYS[row.provider],
                f"{row.ratio:.2f}",
                f"{row.peak_bytes / 2**20:,.0f} MiB",
                f"{row.forwards}",
            ]
            for row in rows
        ],
    )


def recalibrate_errors() -> str:
    """How far from brute force the statistics are: `benchmarks/recalibrate.py --errors`."""
    shown = (1, 2, 4, 8)
    errors = by(read("recalibrate_errors"), "estimator", of="layer")

    def cell(error: float) -> str:
        return f"{error:.2f}" if error >= 0.1 else plain(error)

    return markdown(
        "",
        ["", *(f"layer {k}" for k in shown)],
        [[WAYS[name], *(cell(of[k].error) for k in shown)] for (name,), of in errors.items()],
    )


def dataset_stats() -> str:
    """A file larger than memory: `benchmarks/dataset_stats.py`."""
    rows, about = read("dataset_stats"), read_about("dataset_stats")
    first = rows[0]

    def cells(row: Any) -> Iterable[str]:
        yield f"`{row.provider}`"
        yield f"{row.p50_ms / 1e3:.1f} s, {row.ratio:.2f} × cat"
        yield f"{row.gb_per_s:.2f} GB/s"
        known = not math.isnan(row.peak_bytes)
        yield f"{row.peak_bytes / 1e6:,.0f} MB" if known else ""
        yield from (plain(row.mean_error), plain(row.var_error)) if known else ("", "")

    return markdown(
        f"float32 ({first.rows:,}, {first.features}), {first.bytes / 1e9:.0f} GB, at mean 10,000 "
        f"and deviation 1; median of {first.rounds} interleaved rounds, file not in the system's "
        f"cache. {about['cpu']}, {about['threads']} threads; scikit-learn "
        f"{about['versions']['scikit-learn']}.",
        ["", "time", "throughput", "most memory", "error of mean", "error of variance"],
        map(cells, rows),
    )


def images() -> str:
    """A folder of images: `benchmarks/images.py`."""
    rows, about = read("images"), read_about("images")
    first = rows[0]

    def cells(row: Any) -> Iterable[str]:
        yield row.provider
        yield f"{row.p50_ms / 1e3:.0f} s, {row.ratio:.2f} × batchnorm"
        yield f"{row.peak_bytes / 1e6:,.0f} MB"
        yield from (plain(row.mean_error), plain(row.std_error))

    return markdown(
        f"{first.images:,} images of 64 to 400 pixels a side, {first.pixels / 1e6:,.0f} million "
        "pixels, in PNG and JPEG of several modes. Memory is that of all processes together, "
        "errors are in standard deviations, to sums of whole numbers over the images as Pillow "
        f"decodes them. {about['cpu']}, {about['cpus']} processors; Pillow "
        f"{about['versions']['pillow']}, torchvision {about['versions']['torchvision']}.",
        ["", "time", "most memory", "error of mean", "error of std"],
        map(cells, rows),
    )


def sklearn_scaler() -> str:
    """`StandardScaler` beside scikit-learn's: `benchmarks/sklearn_scaler.py`."""
    rows, about = read("sklearn_scaler"), read_about("sklearn_scaler")
    cases = by(rows, "data", "op", "dtype", "offset")
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    means = sorted({row.offset for row in rows})

    def speedup(*case: str) -> str:
        ratios = [found["batchnorm"].ratio for key, found in cases.items() if key[:3] == case]
        return f"{1 / statistics.geometric_mean(ratios):.1f} ({1 / max(ratios):.1f})"

    def error(row: Any) -> str:
        found = (row.mean_error, row.var_error, row.result_error)
        return plain(float(f"{max(one for one in found if not math.isnan(one)):.0e}"))

    def errors(*case: str) -> str:
        found = cases[(*case, means[-1])]
        return f"{error(found['scikit-learn'])}, {error(found['batchnorm'])}"

    return markdown(
        "Speed: times as fast as scikit-learn, geometric mean over means of "
        f"{', '.join(f'{mean:,.0f}' for mean in means)} standard deviations, in parentheses the "
        f"worst of them. Error at a mean of {means[-1]:,.0f}, scikit-learn's, then ours: the "
        "largest of any mean, in standard deviations, of any variance, relative to it, or of any "
        f"result. {rows[0].rows:,} rows of {about['features']} features; sparse: "
        f"{about['sparse_features']:,}, of which {100 * about['stored']:g} % are stored; "
        f"`partial_fit` in batches of {about['batch_rows']:,} rows. Median of {about['rounds']} "
        f"interleaved rounds. {about['cpu']}, {about['threads']} threads, of which scikit-learn "
        f"uses one; scikit-learn {about['versions']['scikit-learn']}.",
        [
            *("data", "method"),
            *(f"speed, {dtype}" for dtype in dtypes),
            *(f"error, {dtype}" for dtype in dtypes),
        ],
        [
            [
                data,
                f"`{op}`",
                *(speedup(data, op, dtype) for dtype in dtypes),
                *(errors(data, op, dtype) for dtype in dtypes),
            ]
            for data, op in dict.fromkeys(key[:2] for key in cases)
        ],
        words=2,
    )


def processors() -> str:
    """Calls on arrays by instruction set and threads: `benchmarks/processors.py`."""
    about = read_about("processors")
    found = {
        (line["isa"], line["threads"], line["data"], line["op"]): line for line in about["summary"]
    }

    def cell(isa: str, threads: int, data: str, op: str) -> str:
        line = found[isa, threads, data, op]
        return f"{line['mean']:.2f} ({line['worst']:.2f})"

    return markdown(
        "Times as fast as PyTorch eager, geometric mean over the cases of the table in the README, "
        "in parentheses the worst of these and three smaller ones, from 32×64 on. Data are in the "
        "cache where calls repeat on the same arrays, and in memory where each call takes others, "
        "as the layers of a network do. Only batchnorm is kept to AVX2. Median of "
        f"{about['rounds']} interleaved rounds or more. {about['cpu']}, PyTorch "
        f"{about['versions']['torch']}.",
        ["", "data in", *OPS],
        [
            [
                f"{isa}, {threads} thread{'s' * (threads != 1)}",
                data,
                *(cell(isa, threads, data, op) for op in OPS),
            ]
            for isa, threads, data in dict.fromkeys(key[:3] for key in found)
        ],
        words=2,
    )


def small_calls() -> str:
    """What small calls cost: `benchmarks/small_calls.py`."""
    rows, about = read("small_calls"), read_about("small_calls")
    cases = by((row for row in rows if row.provider != "torch"), "op", "provider", of="shape")
    return markdown(
        "Microseconds of a call on a small float32 array, and in parentheses how many times as "
        "fast as torch's it is: of the layers `BatchNorm1d`, of an autograd.Function that computes "
        "nothing, and of the NumPy functions. Median of "
        f"{about['rounds']} interleaved rounds. {about['cpu']}, one thread; PyTorch "
        f"{about['versions']['torch']}.",
        ["", *(row.shape.replace("x", "×") for row in next(iter(cases.values())).values())],
        [
            [
                op if provider == "batchnorm" else f"{op}, {provider}",
                *(f"{1e3 * row.p50_ms:.1f} ({1 / row.ratio:.2f})" for row in found.values()),
            ]
            for (op, provider), found in cases.items()
        ],
    )


def gpu_step() -> str:
    """What the layers cost on a GPU: `benchmarks/gpu_step.py`."""
    rows, about = read("gpu_step"), read_about("gpu_step")
    kept = [row for row in rows if row.what != "forward"]
    cases = by(kept, "case", "memory_format")
    providers = list(next(iter(cases.values())))
    return markdown(
        "Milliseconds of a forward and backward pass of a layer, and of a training step of a "
        "network, in float32, and in parentheses how many times as fast as torch's. Median of "
        f"{about['rounds']} interleaved rounds. {about['gpu']}; "
        f"PyTorch {about['versions']['torch']}.",
        ["", "memory format", *(name.replace("'", '"') for name in providers)],
        [
            [
                case.replace("x", "×") if case[0].isdigit() else case,
                form,
                *(f"{row.p50_ms:.3g} ({1 / row.ratio:.2f})" for row in found.values()),
            ]
            for (case, form), found in cases.items()
        ],
        words=2,
    )


def watch_cost() -> str:
    """What watching costs: `benchmarks/watch_cost.py`."""
    lines = []
    machines = []
    for device in ("cpu", "cuda"):
        about = read_about(f"watch_cost_{device}")
        machine = about.get("gpu") or f"{about['cpu']}, {about['torch_threads']} threads"
        machines.append(f"{machine}: PyTorch {about['versions']['torch']}")
        for (case,), found in by(read(f"watch_cost_{device}"), "case").items():
            plain = found["not watched"]
            lines.append(
                [
                    f"{case.replace('x', '×')}",
                    machine,
                    f"{plain.p50_ms / 20:.3g}",
                    *(
                        f"{100 * (row.ratio - 1):+.1f} % "
                        f"({100 * (row.ratio_low - 1):+.1f} to {100 * (row.ratio_high - 1):+.1f})"
                        for provider, row in found.items()
                        if provider != "not watched"
                    ),
                ]
            )
    return markdown(
        "Time that watching adds to 20 training steps, in parentheses its 95 % interval. "
        f"{'; '.join(machines)}.",
        ["", "on", "ms per step", "none recorded", "every 20th recorded"],
        lines,
        words=2,
    )


#: Tools that fold, as a column of the table is called.
FOLDERS = {
    "batchnorm.torch.fold": "batchnorm, PyTorch",
    "torch.nn.utils.fusion": "torch.nn.utils. fusion",
    "torch.fx fuse": "torch.fx",
    "batchnorm.onnx.fold": "batchnorm, ONNX",
    "onnxruntime": "onnxruntime",
    "onnxoptimizer": "onnx-optimizer",
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
}
SIGNS = {"right": "✓", "refused": "–", "wrong": "✗", "crashed": "!"}


def fold_cases() -> str:
    """What tools that fold make of many cases: `benchmarks/fold_cases.py`."""
    rows, about = read("fold_cases"), read_about("fold_cases")
    versions = ", ".join(
        f"{name} {about['versions'][name].split('+')[0]}"
        for name in ("torch", "onnxruntime", "onnxoptimizer", "onnxsim", "onnxslim", "onnx")
    )
    heads = {verdict: verdict for verdict in SIGNS} | {"n/a": "not for this"}

    def misrounded(found: list[Any], dtype: str) -> str:
        known = [row for row in found if row.weights > 0 and type_of(row) == dtype]
        if not known:
            return ""
        share = sum(row.misrounded for row in known) / sum(row.weights for row in known)
        return f"{100 * share:.0f} %"

    def type_of(row: Any) -> str:
        return next((t for t in ("bfloat16", "float16") if t in row.case), "float32")

    summary = markdown(
        f"{len({row.case for row in rows})} cases: how many of each verdict, and the share of "
        f"folded weights that are not the nearest number of their type to the exact one. "
        f"{versions}.",
        [
            "",
            *heads.values(),
            "refused, could be folded",
            *(f"not nearest, {t}" for t in ("float32", "bfloat16", "float16")),
        ],
        [
            [
                name,
                *(str(sum(row.verdict == verdict for row in found)) for verdict in heads),
                str(sum(row.verdict == "refused" and row.stays == "False" for row in found)),
                *(misrounded(found, t) for t in ("float32", "bfloat16", "float16")),
            ]
            for key, name in FOLDERS.items()
            if (found := [row for row in rows if row.provider == key])
        ],
    )

    def cell(found: list[Any]) -> str:
        counts = {v: sum(row.verdict == v for row in found) for v in SIGNS}
        present = {v: count for v, count in counts.items() if count}
        parts = []
        for verdict, count in present.items():
            sign = SIGNS[verdict] + (f" {count}" if len(present) > 1 else "")
            if verdict == "wrong":
                worst = max(row.error for row in found if row.verdict == "wrong")
                sign += f" {worst:.1f}" if math.isfinite(worst) else " ∞"
            parts.append(sign)
        return ", ".join(parts)

    def table(kinds: Iterable[str], tools: Iterable[str]) -> str:
        lines = []
        for kind in kinds:
            lines.append([f"**{kind}**", *("" for _ in tools)])
            of_kind = [row for row in rows if row.kind == kind]
            for line in dict.fromkeys(row.line for row in of_kind):
                found = [row for row in of_kind if row.line == line]
                if all(row.verdict == "n/a" for row in found):
                    continue
                cases = len({row.case for row in found})
                lines.append(
                    [
                        line + " †" * (found[0].stays == "True") + f" ({cases})" * (cases > 1),
                        *(cell([row for row in found if row.provider == key]) for key in tools),
                    ]
                )
        text = markdown("", ["", *(FOLDERS[key] for key in tools)], lines)
        return f'<div class="verdicts" markdown>\n\n{text.replace("--:", ":-:")}\n\n</div>'

    judged = [row for row in rows if row.verdict != "n/a" and row.error >= 0]
    shares = [(row.verdict == "wrong", row.error / row.tolerance) for row in judged]
    right, wrong = (
        pick(share for is_wrong, share in shares if is_wrong == of)
        for pick, of in ((max, False), (min, True))
    )
    line = (
        f"No result is near the tolerance: what is right differs by at most {right:.1f} of it, and "
        f"what is wrong by at least {10 ** math.floor(math.log10(wrong)):,} times as much."
    )
    of_case = by(rows, "case").values()
    alone = "onnxoptimizer fuse_bn_into_conv"
    if all(found[alone].verdict == found["onnxoptimizer"].verdict for found in of_case):
        line += " onnx-optimizer's default passes do what its `fuse_bn_into_conv` does alone."
    *kinds, graphs = dict.fromkeys(row.kind for row in rows)
    on_files = [key for key in FOLDERS if "torch" not in key]
    return "\n\n".join(
        [
            summary,
            line,
            "### Models of PyTorch",
            table(kinds, FOLDERS),
            "### Graphs that only ONNX has",
            table([graphs], on_files),
        ]
    )


def fold_models() -> str:
    """Models of other libraries, folded: `benchmarks/fold_models.py`."""
    rows, about = read("fold_models"), read_about("fold_models")
    rows = [row for row in rows if row.provider == "folded"]
    by_model: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        by_model.setdefault((row.library, row.model), {})[row.by] = row

    def counts(row: Any) -> str:
        if row is None:
            return ""
        failed = row.status == "failed"
        return "not run ¹" if failed else f"{row.folded} / {row.refused} / {row.left}"

    def ratios(by: str, *, folded: bool = True) -> list[float]:
        """Of models of which something was folded, or of the others."""
        of = [row for row in rows if row.by == by and bool(row.folded) == folded]
        return [row.ratio for row in of if row.ratio > 0]

    def ratio(row: Any) -> str:
        return f"{row.ratio:.2f}" if row is not None and row.folded and row.ratio > 0 else ""

    default = "onnxruntime, default export"
    runtimes = ("PyTorch", "onnxruntime", "onnxruntime, not optimizing", default)
    lines = []
    for (library, model), found in by_model.items():
        torch, onnx, plainly, exported = map(found.get, runtimes)
        assert torch is not None
        lines.append(
            [
                f"{library} {model}",
                counts(torch),
                plain(torch.relative_error) if torch.status != "failed" else "",
                f"{torch.share:.3f}" if torch.status != "failed" else "",
                ratio(torch),
                counts(onnx),
                ratio(onnx),
                ratio(plainly),
                counts(exported),
                ratio(exported),
            ]
        )
    same = ratios(default, folded=False)
    means = [f"**{statistics.geometric_mean(ratios(by)):.2f}**" for by in runtimes]
    lines.append(["**geometric mean**", "", "", "", means[0], "", *means[1:3], "", means[3]])
    versions = ", ".join(
        f"{name} {about['versions'][name].split('+')[0]}"
        for name in ("torch", "torchvision", "timm", "onnx", "onnxruntime")
    )
    caption = (
        f"{len(by_model)} models: batch norms folded / refused / alone, how far outputs differ, "
        "over the largest output, the largest error of a layer over its bound, and the time of an "
        "inference over that of the model as it is, of 2 images; then batch norms and times of an "
        "ONNX file exported with `optimize=False`, and of one exported by default. "
        f"{about['cpu']}, {about['torch_threads']} threads; {versions}."
    )
    noise = (
        "Times are those of models of which something was folded. Where nothing was, both files "
        "are the same, and their times have ratios from "
        f"{min(same):.2f} to {max(same):.2f}: the noise."
    )
    table = markdown(
        caption,
        ["", "PyTorch", "error", "of bound", "time", "ONNX", "time, onnxruntime",
         "time, not optimizing", "default export", "time, onnxruntime"],
        lines,
    )  # fmt: skip
    return f"{table}\n\n{noise}"


#: Name of a table to the page that holds it and what makes it.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "speed": ("README.md", speed),
    "processors": ("docs/numpy.md", processors),
    "network_step": ("docs/torch.md", network_step),
    "network_profile": ("docs/torch.md", network_profile),
    "small_calls": ("docs/torch.md", small_calls),
    "gpu_step": ("docs/torch.md", gpu_step),
    "watch_cost_cpu": ("docs/watch.md", watch_cost),
    "sync_step": ("docs/howto/distributed.md", sync_step),
    "recalibrate": ("docs/statistics.md", recalibrate),
    "recalibrate_errors": ("docs/statistics.md", recalibrate_errors),
    "dataset_stats": ("docs/howto/large-data.md", dataset_stats),
    "images": ("docs/howto/images.md", images),
    "fold_cases": ("docs/folding-tools.md", fold_cases),
    "fold_models": ("docs/folding-models.md", fold_models),
    "sklearn_scaler": ("docs/howto/scikit-learn.md", sklearn_scaler),
}
END = "<!-- /benchmark -->"


def insert(page: str, name: str, table: str) -> str:
    """`page` with `table` between the markers of this name."""
    begin = f"<!-- benchmark: {name}, made by benchmarks/tables.py -->"
    before, found, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise SystemExit(f"the page of table {name!r} must hold the lines {begin} and {END}")
    return f"{before}{begin}\n{table}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the tables, or compare them with --check."""
    parser = argparse.ArgumentParser(prog="tables.py", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a page holds another one")
    options = parser.parse_args(arguments)
    wrong = []
    for name, (page, make) in TABLES.items():
        if not (RESULTS / f"{name}.csv").exists():
            continue
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        wanted = insert(text, name, make())
        if wanted == text:
            continue
        if options.check:
            wrong.append(f"{page} does not hold the table {name!r} of benchmarks/results")
        else:
            path.write_text(wanted, encoding="utf-8")
    for line in wrong:
        print(f"{line}; run python benchmarks/tables.py", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
