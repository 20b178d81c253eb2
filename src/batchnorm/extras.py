"""Optional packages: asked for before work begins, or imported where they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from batchnorm.errors import BatchNormError

__all__ = ["import_extra", "require"]


def require(what: str, extra: str, *modules: str) -> None:
    """Raise if a module is not installed.

    Parameters
    ----------
    what, extra
        What needs the modules, as in "The demo", and the extra that installs them.
    modules
        By the name they are imported by.

    Raises
    ------
    BatchNormError
        The message says what needs which, and how to install them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise BatchNormError(
            f"{what} needs {', '.join(modules)}; not installed: {', '.join(missing)}. "
            f"Install them with: pip install 'batchnorm[{extra}]'"
        )


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Parameters
    ----------
    module
        Such as "dask.array".
    extra, purpose
        The extra that installs it, and what it is for, in the plural as in "Dask arrays".

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
