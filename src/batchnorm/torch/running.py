"""Running statistics: how a batch updates them, with either back end.

The rule is implemented in the core (`csrc/layer.cpp`, used by the NumPy layer too), and with
torch's operations in `portable.update_running`. The averages are updated with the mean and the
unbiased variance m2 / dof, unless these are not finite in the type of the buffers. docs/numerics.md
states the rule in full. This module adds the policies for batches that are not finite.
"""

from __future__ import annotations

import math
import threading
import warnings

import numpy as np
import torch
from torch import Tensor

from . import native, portable
from .contract import COUNT, M2, MEAN, NonFiniteError

_merging = threading.Lock()


def update_native(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    nonfinite: Tensor | None,
    statistics: native.Statistics,
    momentum: float | None,
    on_nonfinite: str,
    count_empty: bool,
    name: str,
) -> None:
    """Update the running statistics with one batch, in place.

    Parameters
    ----------
    nonfinite : () int64
        Counts batches that are skipped because they are not finite.
    on_nonfinite : "skip", "raise" or "propagate"
    name : str
        Of the layer, for messages.
    running_mean, running_var, tracked, statistics, momentum, count_empty
        As in `native.update_running`.
    """
    propagate = on_nonfinite == "propagate"
    bad = native.update_running(
        running_mean, running_var, tracked, statistics, momentum, propagate, count_empty
    )
    if bad >= 0 and not propagate:
        report(statistics, bad, on_nonfinite, nonfinite, name)


def update_portable(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    nonfinite: Tensor | None,
    statistics: Tensor | portable.Measured,
    momentum: float | None,
    on_nonfinite: str,
    count_empty: bool,
    name: str,
) -> None:
    """`update_native` on any device. It waits for the device only if it may have to raise."""
    if running_mean.is_meta:
        return
    if on_nonfinite == "raise":
        finite = portable.finite_channels(statistics, running_mean, running_var)
        if not bool(finite.all()):
            bad = int(torch.nonzero(~finite)[0])
            report(as_tensor(statistics).cpu().numpy(), bad, on_nonfinite, None, name)
    propagate = on_nonfinite != "skip"  # "raise" has raised by now
    buffers = (running_mean, running_var, tracked, nonfinite)
    portable.update_running(*buffers, statistics, momentum, propagate, count_empty)


def as_tensor(statistics: native.Statistics | Tensor | portable.Measured) -> Tensor:
    """Statistics as torch knows them, (groups, 5, C) float64."""
    if isinstance(statistics, portable.Measured):
        return statistics.statistics()
    if isinstance(statistics, np.ndarray):
        return torch.from_numpy(statistics)
    return statistics.double()


def merge_into(
    total: Tensor,
    statistics: native.Statistics,
    nonfinite: Tensor | None,
    on_nonfinite: str,
    name: str,
) -> None:
    """Merge a batch's statistics into `total`, (1, 5, C), in place; see `update_native`."""
    batch = native.merge(statistics)
    bad = np.flatnonzero(~np.isfinite(batch[0]).all(0))
    if len(bad) and on_nonfinite != "propagate":
        report(batch, int(bad[0]), on_nonfinite, nonfinite, name)
        return
    with _merging, torch.no_grad():  # several threads may run forwards at the same time
        both = native.merge(np.concatenate([total.detach().cpu().numpy(), batch]))
        total.copy_(torch.from_numpy(both))


def report(
    statistics: native.Statistics,
    channel: int,
    on_nonfinite: str,
    nonfinite: Tensor | None,
    name: str,
) -> None:
    """Raise an error; or count the batch, and warn the first time."""
    count, mean, m2 = native.merge(statistics)[0, [COUNT, MEAN, M2], channel]
    var = m2 / max(count, 1)
    finite = math.isfinite(mean) and math.isfinite(var)
    problem = "too large for the running statistics" if finite else "not finite"
    what = (
        f"{name}: the batch's statistics are {problem} (channel {channel}: mean {mean:.6g}, "
        f"variance {var:.6g})"
    )
    if on_nonfinite == "raise":
        raise NonFiniteError(
            f"{what}. Look for an overflow or a division by zero before this layer; "
            "on_nonfinite='skip' does not update the running statistics with such batches."
        )
    if nonfinite is not None:
        nonfinite.add_(1)
        if int(nonfinite) > 1:
            return
    warnings.warn(
        f"{what}; the running statistics skip this batch. Further ones are counted in "
        "nonfinite_batches without a warning.",
        RuntimeWarning,
        stacklevel=2,
    )
