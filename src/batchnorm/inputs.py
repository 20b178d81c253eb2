"""Arrays in a file, as inputs of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import ArgumentError

__all__ = ["numbered", "read_inputs"]


def read_inputs(path: Path) -> dict[str, Any]:
    """Arrays by name from an .npz file; the one of an .npy file is arr_0.

    Raises
    ------
    ArgumentError
        It cannot be read, is no .npz or .npy file, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return {"arr_0": loaded}
            found = {name: loaded[name] for name in loaded.files}
            if not all(isinstance(array, np.ndarray) for array in found.values()):
                raise ValueError("it is another kind of zip file")
            return found
    except Exception as error:  # of zipfile, zlib, NumPy and the system
        why = "there is no such file" if not path.exists() else f"it cannot be read ({error})"
        raise ArgumentError(
            f"{path}: must be an .npz file, but {why}. numpy.savez(path, name=array) writes one."
        ) from error


def numbered(names: Iterable[str]) -> list[str]:
    """``arr_0``, ``arr_1`` and so on in their order, if these are all names; else none."""
    order = {int(m[1]): m[0] for name in names if (m := re.fullmatch(r"arr_(\d+)", name))}
    found = [order[place] for place in sorted(order)]
    return found if sorted(order) == list(range(len([*names]))) else []
