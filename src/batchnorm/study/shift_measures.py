"""How far a distribution has moved."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import Moments

__all__ = ["distances"]


def distances(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Wasserstein-1 distance of each unit's values, mean over the units.

    Parameters
    ----------
    before, after : (N, C)
        The values of C units on the same N examples at two moments.

    Returns
    -------
    raw, relative
        In the units of the values, and divided by the standard deviation before and after (the root
        of their mean variance). Units that are constant at both moments count in neither.
    """
    moved = (before.sort(0).values - after.sort(0).values).abs().mean(0).double()
    variances = [Moments.of(values.numpy()).var(ddof=1) for values in (before, after)]
    spread = torch.from_numpy(sum(variances) / 2).sqrt()
    alive = spread > 0
    if not bool(alive.any()):
        return 0.0, 0.0
    return float(moved[alive].mean()), float(torch.mean(moved[alive] / spread[alive]))
