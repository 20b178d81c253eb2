"""Optional packages: asked for before work begins, or imported where they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from batchnorm.errors import BatchNormError

__all__ = ["import_extra", "install", "require"]

#: Packages that are not called as what is imported.
PACKAGES = {
    "PIL": "pillow",
    "dask": "'dask[array]'",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
}


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
            f"{install(extra, *missing)}"
        )


def install(extra: str, *modules: str) -> str:
    """How to install modules, by the names of their packages; the extra that lists them all."""
    names = (PACKAGES.get(module, module) for module in modules)
    them = "it" if len(modules) == 1 else "them"
    return f"pip install {' '.join(names)} adds {them}; so does the extra [{extra}]."


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
        lacking = package if error.name is None else error.name.split(".")[0]
        needed = package if lacking == package else f"{package} and its requirement {lacking}"
        raise BatchNormError(
            f"{purpose} need {needed}, which is not installed. {install(extra, lacking)}"
        ) from error
