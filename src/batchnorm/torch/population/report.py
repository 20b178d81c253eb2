"""What `recalibrate` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Rows of a printed report.
_ROWS = 25


@dataclass(frozen=True, kw_only=True)
class LayerShift:
    """How far the statistics of one layer have moved.

    Standard deviations are √(variance + eps), by which the layer divides.

    Attributes
    ----------
    name : str
        Name of the layer in the model.
    kind : str
        Name of its class.
    calls : int
        Calls of the layer that were measured.
    count : float
        Values per channel; under a mask, the sum of their weights.
    shift : float
        Distance of the new mean from the old one in new standard deviations, the largest over the
        channels; infinite if the old statistics were not finite.
    channel : int
        The channel of the largest shift.
    rms_shift : float
        Root mean square of the shifts of all channels.
    std_ratio : float
        Old over new standard deviation, in the channel where this is farthest from one.
    """

    name: str
    kind: str
    calls: int
    count: float
    shift: float
    channel: int
    rms_shift: float
    std_ratio: float


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """The result of `recalibrate`; `print` shows a table.

    Attributes
    ----------
    method : str
    examples, batches : int
        Number seen by all processes together. Examples are counted along the first axis of the
        first tensor of a batch.
    forwards : int
        Forwards started, in all processes: a batch that runs again up to some layer counts again.
    seconds : float
    layers : tuple of LayerShift
        In the order of their shifts, the largest first.
    skipped : dict
        The reason, by the name of each skipped layer.
    notes : tuple of str
        Anything unusual.
    """

    method: str
    examples: int
    batches: int
    forwards: int
    seconds: float
    layers: tuple[LayerShift, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, as JSON takes them."""
        return {**asdict(self), "layers": [asdict(s) for s in self.layers], "notes": [*self.notes]}

    def __str__(self) -> str:
        lines = [
            f"recalibrated {len(self.layers)} batch-norm layer{'s'[: len(self.layers) != 1]} "
            f"({self.method}): {self.examples:,} examples, {self.batches:,} batches, "
            f"{self.forwards:,} forwards, {self.seconds:.1f} s"
        ]
        if self.layers:
            rows = [("layer", "class", "values", "shift", "channel", "rms shift", "std old/new")]
            rows += [
                (
                    s.name, s.kind, f"{s.count:,.10g}", f"{s.shift:.3g}", f"{s.channel}",
                    f"{s.rms_shift:.3g}", f"{s.std_ratio:.3g}",
                )
                for s in self.layers[:_ROWS]
            ]  # fmt: skip
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = [
                    cell.ljust(width) if i < 2 else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
                ]
                lines.append("  " + "  ".join(cells).rstrip())
            if len(self.layers) > _ROWS:
                lines.append(f"  … and {len(self.layers) - _ROWS} that moved less")
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
