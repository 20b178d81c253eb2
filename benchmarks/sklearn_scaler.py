"""Time `batchnorm.sklearn.StandardScaler` beside scikit-learn's, and measure the errors of both.

python benchmarks/sklearn_scaler.py --out benchmarks/results
python benchmarks/sklearn_scaler.py --quick

The first writes sklearn_scaler.csv and sklearn_scaler.json (what it was measured on); the second
takes small data and few rounds, and shows that all works.

Data are normal with a deviation of 1 about `offset`, in float32 and float64: dense (N, 64) in C
order, the same with 1 % of the values missing or with a weight for each row, and sparse
(N, 2048) of which 0.5 % are stored, whose stored values are about `offset`. ``partial_fit`` takes
them in batches of 1000 rows. Both scalers run in this process, a sample each in every round, in an
order drawn anew; ``ratio`` is to scikit-learn's. Sparse data are transformed by scikit-learn's code
in both, so only ``fit`` and ``partial_fit`` are timed.

Errors are those of the data's exact statistics, computed in extended precision, the largest of all
features. ``mean_error``: in standard deviations; ``var_error``: relative to the variance;
``result_error``: of ``transform``, of y = (x - mean) / std relative to max(1, |y|), and of
``inverse_transform`` of y rounded to its type, in standard deviations. A scaler whose error exceeds
0.1 is not timed.

Exit status: 0 done; 1 an answer was wrong; 2 the call was unusable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import command
import numpy as np

from batchnorm.bench.rows import TimedRow, timed
from batchnorm.bench.timing import calls_per_sample, interleave, sample
from batchnorm.errors import ArgumentError
from batchnorm.progress import steps

THEIRS, OURS = "scikit-learn", "batchnorm"
DENSE, SPARSE = ("dense", "missing", "weighted"), ("CSR", "CSC", "CSR, weighted")
CASES = [
    *product(("dense",), ("fit", "partial_fit", "transform", "inverse_transform")),
    *product(("missing", "weighted"), ("fit",)),
    *product(("CSR", "CSC"), ("fit", "partial_fit")),
    ("CSR, weighted", "fit"),
]
DTYPES, OFFSETS = ("float32", "float64"), (0.0, 1e3, 1e6)
ROWS, QUICK_ROWS, BATCH_ROWS = 200_000, 3_000, 1_000
FEATURES, SPARSE_FEATURES, STORED = 64, 2048, 0.005
LIMIT = 0.1

Extended = np.longdouble


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One scaler in one case; a line of the CSV file."""

    op: str
    data: str
    dtype: str
    offset: float
    rows: int
    mean_error: float = math.nan
    var_error: float = math.nan
    result_error: float = math.nan


@dataclass(frozen=True)
class Data:
    """Data, the weights of their rows, and their exact statistics."""

    x: Any
    weights: Any
    mean: Any
    var: Any

    @property
    def std(self) -> Any:
        """Exact standard deviation of each feature."""
        return np.sqrt(self.var)


def make(kind: str, dtype: str, offset: float, rows: int, seed: int) -> Data:
    """Make data of one kind."""
    from scipy import sparse

    rng = np.random.default_rng(seed)
    weights = rng.uniform(size=rows) if "weighted" in kind else None
    if kind in DENSE:
        x = (rng.standard_normal((rows, FEATURES)) + offset).astype(dtype)
        if kind == "missing":
            x[rng.uniform(size=x.shape) < 0.01] = np.nan
        return Data(x, weights, *exact_statistics(list(x.T), weights))
    entries = int(STORED * rows * SPARSE_FEATURES)
    where = np.unique(rng.integers(0, rows * SPARSE_FEATURES, entries))
    values = (rng.standard_normal(where.size) + offset).astype(dtype)
    places = [part.astype(np.int32) for part in np.divmod(where, SPARSE_FEATURES)]
    x = sparse.csr_array((values, places), shape=(rows, SPARSE_FEATURES))
    columns = x.tocsc()
    dense = [columns[:, [k]].toarray()[:, 0] for k in range(0, SPARSE_FEATURES, 32)]
    return Data(columns if kind == "CSC" else x, weights, *exact_statistics(dense, weights))


def exact_statistics(columns: Sequence[Any], weights: Any) -> tuple[Any, Any]:
    """Mean and biased variance of each column, without NaN."""
    found = []
    for column in columns:
        present = ~np.isnan(column)
        x = column[present].astype(Extended)
        w = np.ones(len(x), Extended) if weights is None else weights[present].astype(Extended)
        mean = (w * x).sum() / w.sum()
        found.append((mean, (w * (x - mean) ** 2).sum() / w.sum()))
    mean, var = np.array(found).T
    return mean, var


# --- what is timed, and its errors ----------------------------------------------------------------


def scaler_of(provider: str, kind: str) -> Any:
    """A new scaler."""
    if provider == OURS:
        from batchnorm.sklearn import StandardScaler
    else:
        from sklearn.preprocessing import StandardScaler
    return StandardScaler(with_mean=kind in DENSE)


def prepare(provider: str, op: str, kind: str, data: Data) -> Callable[[], Any]:
    """What to call; returns the scaler, or the result."""
    if op == "fit":
        return lambda: scaler_of(provider, kind).fit(data.x, sample_weight=data.weights)
    if op == "partial_fit":
        starts = range(0, data.x.shape[0], BATCH_ROWS)
        batches = [data.x[k : k + BATCH_ROWS] for k in starts]

        def fit_batches() -> Any:
            scaler = scaler_of(provider, kind)
            for batch in batches:
                scaler.partial_fit(batch)
            return scaler

        return fit_batches
    scaler = scaler_of(provider, kind).fit(data.x)
    if op == "transform":
        return lambda: scaler.transform(data.x)
    y = standardized(data)
    return lambda: scaler.inverse_transform(y)


def standardized(data: Data) -> Any:
    """The exact result of `transform`, rounded to the type of x."""
    y = np.empty_like(data.x)
    for k, column in enumerate(data.x.T):
        y[:, k] = (column.astype(Extended) - data.mean[k]) / data.std[k]
    return y


def errors_of(op: str, data: Data, answer: Any) -> dict[str, float]:
    """The largest errors over all features whose exact statistics are known."""
    if op.endswith("fit"):
        step = len(answer.mean_) // len(data.mean)
        mean, var = answer.mean_[::step], answer.var_[::step]
        return {
            "mean_error": float(np.max(np.abs(mean - data.mean) / data.std)),
            "var_error": float(np.max(np.abs(var / data.var - 1))),
        }
    worst = 0.0
    y = standardized(data) if op == "inverse_transform" else None
    for k, column in enumerate(answer.T):
        if y is None:
            exact = (data.x[:, k].astype(Extended) - data.mean[k]) / data.std[k]
            error = np.abs(column - exact) / np.maximum(1, np.abs(exact))
        else:
            exact = y[:, k].astype(Extended) * data.std[k] + data.mean[k]
            error = np.abs(column - exact) / data.std[k]
        worst = max(worst, float(error.max()))
    return {"result_error": worst}


def measure_case(op: str, kind: str, data: Data, about: dict[str, Any], rounds: int) -> list[Row]:
    """Check and time both scalers."""
    rows, runs = {}, {}
    for provider in (THEIRS, OURS):
        run = prepare(provider, op, kind, data)
        row = Row(provider=provider, op=op, data=kind, **about)
        row = replace(row, **errors_of(op, data, run()))
        worst = np.nanmax([row.mean_error, row.var_error, row.result_error])
        if worst <= LIMIT:
            calls = calls_per_sample(run, min_sample_s=0.005)
            runs[provider] = partial(sample, run, repeats=calls)
        else:
            row = replace(row, status="wrong", detail=f"error {worst:.2g}, at most {LIMIT} allowed")
        rows[provider] = row
    samples = interleave(runs, min_rounds=rounds, seed=rounds)
    return [
        timed(row, samples[provider], samples.get(THEIRS)) if provider in samples else row
        for provider, row in rows.items()
    ]


# --- the call -------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, files: command.Files) -> list[str]:
    if np.finfo(Extended).eps > 1e-18:
        raise ArgumentError(
            "this machine's longdouble must be more precise than float64, and is not, so exact "
            "errors are not known. Run it on an x86-64 processor, not on Windows."
        )
    count = QUICK_ROWS if options.quick else ROWS
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    kinds = list(dict.fromkeys(kind for kind, _ in CASES))
    rows: list[Row] = []
    with steps(len(CASES) * len(DTYPES) * len(OFFSETS)) as started:
        for kind, dtype, offset in product(kinds, DTYPES, OFFSETS):
            data = make(kind, dtype, offset, count, options.seed)
            about = {"dtype": dtype, "offset": offset, "rows": count}
            for op in (op for other, op in CASES if other == kind):
                started(f"{kind} {dtype} at {offset:g}: {op}")
                rows += measure_case(op, kind, data, about, rounds)
    files["sklearn_scaler.csv"] = rows
    files["sklearn_scaler.json"] = {
        "seed": options.seed,
        "rounds": rounds,
        "batch_rows": BATCH_ROWS,
        "features": FEATURES,
        "sparse_features": SPARSE_FEATURES,
        "stored": STORED,
        "versions": {"scikit-learn": importlib.metadata.version("scikit-learn")},
    }
    columns = {
        "data": "{0.data}",
        "": "{0.op}",
        "type": "{0.dtype}",
        "offset": "{0.offset:g}",
        "scaler": "{0.provider}",
        "ms": "{0.p50_ms:.3g}",
        "ratio": "{0.ratio:.3f}",
        "mean error": "{0.mean_error:.1e}",
        "var error": "{0.var_error:.1e}",
        "result error": "{0.result_error:.1e}",
    }
    command.show(rows, columns)
    return [
        f"{row.provider}, {row.op} of {row.data} {row.dtype} at {row.offset:g}: {row.detail}"
        for row in rows
        if row.status != "ok"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.make_parser(__file__, __doc__, rounds=15)
    parser.add_argument("--quick", action="store_true", help="small data, two rounds at the most")
    return command.main(parser, measure, arguments, needs=("sklearn",))


if __name__ == "__main__":
    sys.exit(main())
