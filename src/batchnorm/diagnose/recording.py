"""What `watch` has seen of a training: snapshots of each layer, in one Parquet file.

A row is a layer at a step. Values by channel are lists, so any program that reads Parquet can look
at them; `pandas.read_parquet(path)` gives a table. docs/watch.md lists the columns.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.atomic import explain_write_errors, replacing
from batchnorm.errors import ArgumentError
from batchnorm.extras import require
from batchnorm.inputs import check_file
from batchnorm.moments import Moments

from .records import Batch, Layer, Network, array

__all__ = ["Recording", "Snapshot"]

SCHEMA = 1
#: Steps that are kept at least and at most, the latest of them in any case, and bytes for all.
FEWEST, MOST, LATEST, MEMORY = 24, 192, 64, 64 * 2**20

Values = NDArray[np.float32]
NAN = math.nan


def _no_floats() -> Values:
    return np.empty(0, np.float32)


def _no_ints() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass
class Snapshot:
    """A layer at a step.

    Attributes
    ----------
    step, layer, call
        Number of the training step, the layer's path, and which call of it in this step.
    values, examples
        Per channel, and examples, that the statistics rest on.
    mean, var : (C,)
        Of the batch; the variance is the biased one, which normalizes.
    running_mean, running_var, weight, bias : (C,)
        Before the step; empty where the layer has none.
    updates
        Of the running statistics before the step.
    training
        Whether the layer normalized by the batch.
    gradient, gradient_weight, gradient_bias
        Norms of the gradients of output, γ and β.
    channels, before, after : lists
        Some channels; for each of them the quantiles of the input before, and of the output after
        normalization, one after another.
    low_before, high_before, counts_before, low_after, high_after, counts_after
        Their histograms: ends and counts of `records.BINS` bars.
    moved, moved_relative
        How far the inputs on the probe batch have moved since the snapshot before: Wasserstein-1,
        raw and divided by the spread. NaN without a probe.
    """

    step: int
    layer: str
    call: int = 0
    values: float = 0.0
    examples: int = 0
    mean: Values = field(default_factory=_no_floats)
    var: Values = field(default_factory=_no_floats)
    running_mean: Values = field(default_factory=_no_floats)
    running_var: Values = field(default_factory=_no_floats)
    weight: Values = field(default_factory=_no_floats)
    bias: Values = field(default_factory=_no_floats)
    updates: int = -1
    training: bool = True
    gradient: float = NAN
    gradient_weight: float = NAN
    gradient_bias: float = NAN
    channels: NDArray[np.int64] = field(default_factory=_no_ints)
    before: Values = field(default_factory=_no_floats)
    after: Values = field(default_factory=_no_floats)
    low_before: Values = field(default_factory=_no_floats)
    high_before: Values = field(default_factory=_no_floats)
    counts_before: NDArray[np.int64] = field(default_factory=_no_ints)
    low_after: Values = field(default_factory=_no_floats)
    high_after: Values = field(default_factory=_no_floats)
    counts_after: NDArray[np.int64] = field(default_factory=_no_ints)
    moved: float = NAN
    moved_relative: float = NAN

    def metrics(self) -> dict[str, float]:
        """Numbers for the whole layer, by name."""
        found = {
            "mean": _median(np.abs(self.mean)),
            "std": _median(np.sqrt(self.var)),
            "gradient": self.gradient,
            "gradient_weight": self.gradient_weight,
            "moved": self.moved,
            "moved_relative": self.moved_relative,
        }
        if len(self.weight):
            found["weight"] = _median(np.abs(self.weight))
        shift, factor = self.gap()
        found |= {"running_shift": shift, "running_factor": factor}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def gap(self) -> tuple[float, float]:
        """Running statistics beside those of the batch, medians over the channels.

        The difference of the means in standard deviations, and the factor between the standard
        deviations.
        """
        if not len(self.running_mean):
            return NAN, NAN
        with np.errstate(all="ignore"):
            spread = np.sqrt(self.var) + 1e-12
            shift = np.abs(self.running_mean - self.mean) / spread
            ratio = np.abs(np.log(np.sqrt(np.maximum(self.running_var, 0)) / spread + 1e-12))
        return _median(shift), float(np.exp(_median(ratio)))


def _median(values: Any) -> float:
    return float(np.median(values)) if len(values) else NAN


class Recording:
    """Snapshots of the batch norms of one process during training.

    Attributes
    ----------
    snapshots
        In the order in which they were taken.
    about
        Of the model: its class, its layers with their options, and versions.
    rank, processes
        Number of this process, of how many.
    """

    def __init__(
        self,
        about: dict[str, Any] | None = None,
        *,
        rank: int = 0,
        processes: int = 1,
        snapshots: Sequence[Snapshot] = (),
    ) -> None:
        self.about, self.rank, self.processes = about or {"layers": {}}, rank, processes
        self.snapshots: list[Snapshot] = list(snapshots)
        #: Running statistics of each process, by layer, if their files lay beside the one loaded.
        self.ranks: list[dict[str, tuple[Any, Any]]] = []
        self.name = ""  # of the file
        self._stride = 1  # of the older steps, in recorded steps
        self._recorded = 0
        self._numbers: dict[int, int] = {}  # step → number among the recorded ones

    @property
    def layers(self) -> list[str]:
        """The names of the layers that were seen."""
        return list(dict.fromkeys(snapshot.layer for snapshot in self.snapshots))

    @property
    def steps(self) -> list[int]:
        """The steps of which there are snapshots."""
        return sorted({snapshot.step for snapshot in self.snapshots})

    def of(self, layer: str) -> list[Snapshot]:
        """The snapshots of a layer, its first call in each step."""
        return [s for s in self.snapshots if s.layer == layer and s.call == 0]

    def __repr__(self) -> str:
        """Layers and steps."""
        steps = self.steps
        span = f"{len(steps)} steps from {steps[0]} to {steps[-1]}" if steps else "no steps"
        count = len(self.layers)
        return f"Recording of {count} layer{'s' * (count != 1)}, {span}"

    # ---- growing, within bounds

    def add(self, snapshots: Sequence[Snapshot]) -> None:
        """Take the snapshots of one step, and drop older ones if there are too many.

        The latest 64 steps are kept. Of those before, every second goes whenever the others no
        longer fit, so that what is left of them is evenly spaced.
        """
        if not snapshots:
            return
        self.snapshots += snapshots
        self._numbers[snapshots[0].step] = self._recorded
        self._recorded += 1
        size = sum(_bytes(snapshot) for snapshot in snapshots)
        most = int(np.clip(MEMORY // max(size, 1), FEWEST, MOST))
        latest = min(LATEST, most // 2)
        self._thin(latest)
        while len(self._numbers) > most:
            self._stride *= 2
            self._thin(latest)

    def _thin(self, latest: int) -> None:
        """Drop what is not at a multiple of the stride, but for the latest steps."""
        gone = {
            step for step in list(self._numbers)[:-latest] if self._numbers[step] % self._stride
        }
        for step in gone:
            del self._numbers[step]
        if gone:
            self.snapshots = [s for s in self.snapshots if s.step not in gone]

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write a Parquet file, completely or not at all.

        Raises
        ------
        ArgumentError
            It cannot be written there.
        BatchNormError
            pyarrow is not installed.
        """
        require("A recording", "report", "pyarrow")
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet

        path = Path(path)
        columns = {
            f.name: _column([getattr(s, f.name) for s in self.snapshots], str(f.type))
            for f in fields(Snapshot)
        }
        about = {"schema": SCHEMA, "rank": self.rank, "processes": self.processes, **self.about}
        table = pa.table(columns).replace_schema_metadata({"batchnorm": json.dumps(about)})
        with explain_write_errors(path), replacing(path) as beside:
            parquet.write_table(table, beside, compression="zstd")

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read a file that `save` or `watch` has written.

        Raises
        ------
        ArgumentError
            It is no such file, or damaged.
        """
        require("A recording", "report", "pyarrow")
        import pyarrow as pa
        from pyarrow import parquet

        path = Path(path)
        check_file(path)
        try:
            table = parquet.read_table(path, memory_map=False)
            about = json.loads((table.schema.metadata or {})[b"batchnorm"])
            if about.pop("schema") != SCHEMA:
                raise ValueError("another version of the format")
            rank, processes = int(about.pop("rank")), int(about.pop("processes"))
            snapshots = _snapshots(table)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"{path}: must be a recording of batchnorm.torch.watch, but it is damaged, or was "
                f"not written by watch ({type(error).__name__})."
            ) from error
        loaded = cls(about, rank=rank, processes=processes, snapshots=snapshots)
        loaded.name = path.stem
        if rank == 0 and processes > 1:
            loaded.ranks = [
                loaded.statistics(),
                *(
                    cls.load(beside).statistics()
                    for number in range(1, processes)
                    if (beside := of_rank(path, number)).exists()
                ),
            ]
        return loaded

    def report(self, path: str | Path, other: Recording | None = None) -> None:
        """Write the report, one HTML page that needs nothing else.

        Parameters
        ----------
        path
            Of the page.
        other
            Another recording, to be shown beside this one.

        Raises
        ------
        ArgumentError
            The page cannot be written there, or there are no snapshots.
        BatchNormError
            An optional package is not installed.
        """
        from batchnorm.report import write

        write(Path(path), self, other)

    # ---- for the rules

    def network(self) -> Network:
        """What it shows of the network, at its last step."""
        layers = []
        for name in self.layers:
            seen = [s for s in self.snapshots if s.layer == name]
            layers.append(_layer(name, seen, self.about.get("layers", {}).get(name, {})))
        steps = self.steps
        covered = steps[-1] - steps[0] + 1 if len(steps) > 1 else 0
        return Network(
            layers=layers,
            training=True,
            processes=self.processes,
            ranks=self.ranks,
            steps=covered if covered >= 20 else 0,
        )

    def statistics(self) -> dict[str, tuple[Any, Any]]:
        """The last running mean and variance of each layer."""
        return {
            s.layer: (array(s.running_mean), array(s.running_var))
            for s in self.snapshots
            if len(s.running_mean)
        }


def _layer(name: str, seen: list[Snapshot], about: dict[str, Any]) -> Layer:
    last, first = seen[-1], seen[0]
    batches = [
        Batch(
            Moments(
                np.full(len(s.mean), s.values),
                s.mean.astype(np.float64),
                s.var.astype(np.float64) * s.values,
            ),
            s.examples,
            s.call,
        )
        for s in seen[-8:]
        if s.training and s.values and np.isfinite(s.mean).all() and np.isfinite(s.var).all()
    ]
    tracks = len(last.running_mean) > 0
    stood = tracks and last.updates == first.updates == 0
    return Layer(
        name=name,
        kind=about.get("kind", "BatchNorm"),
        channels=len(last.mean),
        eps=about.get("eps", 1e-5),
        momentum=about.get("momentum", 0.1),
        training=last.training,
        frozen=about.get("frozen", False),
        tracks=tracks,
        exact=about.get("exact", False),
        synchronized=about.get("synchronized", False),
        trainable=about.get("trainable"),
        dtype=about.get("dtype", "float32"),
        mean=array(last.running_mean) if tracks else None,
        var=array(last.running_var) if tracks else None,
        weight=array(last.weight) if len(last.weight) else None,
        bias=array(last.bias) if len(last.bias) else None,
        updates=0 if stood else (last.updates if last.updates >= 0 else None),
        batches=tuple(batches),
        examples=last.examples,
    )


def of_rank(path: Path, rank: int) -> Path:
    """The file of another process."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


# ---- columns ------------------------------------------------------------------------------------


def _bytes(snapshot: Snapshot) -> int:
    return sum(
        value.nbytes if isinstance(value, np.ndarray) else 8 for value in vars(snapshot).values()
    )


def _column(values: list[Any], kind: str) -> Any:
    import pyarrow as pa

    if not _is_list(kind):
        types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
        return pa.array(values, types.get(kind, pa.string()))
    dtype = np.float32 if kind == "Values" else np.int64
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])])
    joined = np.concatenate([*values, np.empty(0, dtype)]).astype(dtype)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(joined))


def _is_list(kind: str) -> bool:
    return kind == "Values" or kind.startswith("NDArray")


def _snapshots(table: Any) -> list[Snapshot]:
    columns = {}
    for f in fields(Snapshot):
        column, kind = table.column(f.name).combine_chunks(), str(f.type)
        if _is_list(kind):
            offsets = column.offsets.to_numpy()
            dtype = np.float32 if kind == "Values" else np.int64
            joined = column.values.to_numpy(zero_copy_only=False).astype(dtype)
            columns[f.name] = [joined[begin:end] for begin, end in itertools.pairwise(offsets)]
        else:
            columns[f.name] = column.to_pylist()
    names = list(columns)
    return [
        Snapshot(**dict(zip(names, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]
