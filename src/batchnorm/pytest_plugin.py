"""A pytest plugin: the fixture `assert_healthy`, which is a function to import as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["assert_healthy"]


def assert_healthy(
    model: Any,
    data: Any = None,
    optimizer: Any = None,
    *,
    select: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
) -> None:
    """Fail with what `batchnorm.torch.check` finds, if it finds anything.

    Parameters
    ----------
    model, data, optimizer, select, ignore
        As in `batchnorm.torch.check`.

    Raises
    ------
    AssertionError
        There are findings; the message is their text.
    """
    from batchnorm.torch import check

    __tracebackhide__ = True
    found = check(model, data, optimizer, select=select, ignore=ignore, progress=False)
    if found:
        raise AssertionError(f"batch norm is not healthy\n{found}")


try:
    import pytest
except ImportError:  # the function needs it not
    pass
else:

    @pytest.fixture(name="assert_healthy")
    def _assert_healthy() -> Callable[..., None]:
        """`batchnorm.pytest_plugin.assert_healthy`."""
        return assert_healthy
