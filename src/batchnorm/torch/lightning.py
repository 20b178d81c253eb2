"""`watch` as a callback of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..extras import require
from .diagnose.watch import Watch

require("WatchCallback", "lightning", "lightning")

from lightning.pytorch import Callback  # noqa: E402

__all__ = ["WatchCallback"]


class WatchCallback(Callback):
    """Record what the batch norms of a LightningModule do while it trains.

    Parameters
    ----------
    path, every, probe, log, forward
        As in `batchnorm.torch.watch`; a step is a training batch. A module without a forward of its
        own needs `forward` for the probe, as in ``lambda module, batch: module.net(batch)``.

    Attributes
    ----------
    recording
        The `Recording`; None before the training begins.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        every: int = 20,
        probe: Any = None,
        *,
        log: Any = (),
        forward: Any = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "path": path, "every": every, "probe": probe, "log": log, "forward": forward,
        }  # fmt: skip
        self._watch: Watch | None = None
        self.recording: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        self._watch = Watch(pl_module, **self._options)
        self.recording = self._watch.recording

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Begin a step."""
        if self._watch is not None:
            self._watch.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """End a step."""
        if self._watch is not None:
            self._watch.end()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the recording."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what there is."""
        self._close()

    def _close(self) -> None:
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.close()
