"""Optional packages, imported when a data set needs them."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import BatchNormError


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Raises
    ------
    BatchNormError
        It is not installed; the message says what needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            package = f"{package} and its requirement {error.name}"
        raise BatchNormError(
            f"{purpose} need {package}, which is not installed. "
            f"pip install 'batchnorm[{extra}]' adds it."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of a package's error message, or its type if it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
