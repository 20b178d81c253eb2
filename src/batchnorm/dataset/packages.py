"""Packages that only some data sets need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import BatchNormError


def need(module: str, extra: str, what: str) -> Any:
    """Import a package of an extra.

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
            f"{what} need {package}, which is not installed. "
            f"pip install 'batchnorm[{extra}]' adds it."
        ) from error
