"""Optional packages that a command needs, asked for before its work begins."""

from __future__ import annotations

import importlib.util

from batchnorm.errors import BatchNormError

__all__ = ["require"]


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
