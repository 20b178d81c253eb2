"""What the library raises for input it cannot use."""

__all__ = ["ArgumentError", "BatchNormError", "DTypeError", "ShapeError"]


class BatchNormError(Exception):
    """Base of every error that this library raises on purpose."""


class ShapeError(BatchNormError, ValueError):
    """An array has the wrong rank or shape, or too few values."""


class DTypeError(BatchNormError, TypeError):
    """An array has a type that cannot be normalized."""


class ArgumentError(BatchNormError, ValueError):
    """An argument has a value that cannot be used."""
