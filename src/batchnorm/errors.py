"""The errors that this library raises for input that it cannot use."""

import re

__all__ = ["ArgumentError", "BatchNormError", "DTypeError", "ShapeError", "one_line", "printable"]


class BatchNormError(Exception):
    """Base class of all errors that this library raises."""


class ShapeError(BatchNormError, ValueError):
    """An array has the wrong rank or shape, or too few values."""


class DTypeError(BatchNormError, TypeError):
    """An array has a type that cannot be normalized."""


class ArgumentError(BatchNormError, ValueError):
    """An argument has a value that cannot be used."""


def one_line(error: BaseException | str, most: int = 300) -> str:
    """What an error of other software says, without line breaks and no longer than `most`."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str, keep: str = "") -> str:
    """Text with escapes in place of control characters, which names in files may hold.

    Those in `keep` stay.
    """

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return re.sub(r"[\x00-\x1f\x7f-\x9f]", escape, text)
