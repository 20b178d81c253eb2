"""The method "precise": one pass, in which all layers normalize by the batch."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from ...errors import ShapeError
from .measurement import Measurement
from .target import LayerInput, Target


class Precise:
    """One pass over the data, in which all layers normalize by the batch, as in training."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement

    def enter(self, stack: ExitStack) -> None:
        """Nothing to prepare."""

    def measure(self) -> None:
        """Finish all layers."""
        measurement = self.measurement
        measurement.processes.together(self._run_all)
        measurement.check_data()
        for target in measurement.targets:
            measurement.finish(target)

    def _run_all(self) -> None:
        source = self.measurement.source
        for number, batch in enumerate(source.batches(), 1):
            self.measurement.run_model(batch)
            self.measurement.show("batch", number, source.length)

    def on_input(self, target: Target, x: Tensor, mask: Tensor | None) -> LayerInput | None:
        """Measure the input, and let the layer normalize by it."""
        seen = target.measure(x, mask)
        if seen is None:
            return None
        target.add(seen.moments)
        if seen.values == 1 and getattr(target.layer, "on_single", "raise") != "population":
            raise ShapeError(
                "recalibrate with method='precise' needs batches of more than one value per "
                f"channel, got input {tuple(x.shape)} at the layer '{target.name}'. Use larger "
                "batches or leave the last one out; or use method='exact', or layers with "
                "on_single='population', which take a batch of one."
            )
        return seen
