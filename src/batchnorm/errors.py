"""The errors that this library raises for input that it cannot use."""

__all__ = ["ArgumentError", "BatchNormError", "DTypeError", "ShapeError", "one_line"]


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
