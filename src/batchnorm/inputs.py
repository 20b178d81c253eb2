"""Files that are read, and arrays in a file as inputs of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import ArgumentError, one_line

__all__ = ["check_file", "numbered", "read_inputs"]


def check_file(path: Path) -> None:
    """Raise if a file cannot be read at all: reading a pipe would wait for its other end.

    Raises
    ------
    ArgumentError
        There is none, or it is not a regular file.
    """
    if not os.path.isfile(path):  # Path.is_file raises if a name is too long
        found = "this is not a regular file" if os.path.exists(path) else "there is no such file"
        raise ArgumentError(f"{path}: {found}. Name another.")


def read_inputs(path: Path) -> dict[str, Any]:
    """Arrays by name from an .npz file; the one of an .npy file is arr_0.

    Raises
    ------
    ArgumentError
        It cannot be read, is no .npz or .npy file, or holds Python objects.
    """
    check_file(path)
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
        raise ArgumentError(
            f"{path}: must be an .npz file, but it cannot be read ({one_line(error)}). "
            "numpy.savez(path, name=array) writes one."
        ) from error


def numbered(names: Iterable[str]) -> list[str]:
    """``arr_0``, ``arr_1`` and so on in their order, if these are all names; else none."""
    order = {int(m[1]): m[0] for name in names if (m := re.fullmatch(r"arr_(\d+)", name))}
    found = [order[place] for place in sorted(order)]
    return found if sorted(order) == list(range(len([*names]))) else []
