"""How far a distribution has moved."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.moments import Moments

__all__ = ["distances"]


def distances(before: NDArray[Any], after: NDArray[Any]) -> tuple[float, float]:
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
    moved = np.abs(np.sort(before, 0) - np.sort(after, 0)).mean(0, dtype=np.float64)
    spread = np.sqrt((Moments.of(before).var(ddof=1) + Moments.of(after).var(ddof=1)) / 2)
    alive = spread > 0
    if not alive.any():
        return 0.0, 0.0
    return float(moved[alive].mean()), float((moved[alive] / spread[alive]).mean())
