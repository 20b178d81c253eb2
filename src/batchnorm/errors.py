"""The errors that this library raises for input that it cannot use."""

__all__ = ["ArgumentError", "BatchNormError", "DTypeError", "ShapeError"]


class BatchNormError(Exception):
    """Base class of all errors that this library raises."""


class ShapeError(BatchNormError, ValueError):
    """An array has the wrong rank or shape, or too few values."""


class DTypeError(BatchNormError, TypeError):
    """An array has a type that cannot be normalized."""


class ArgumentError(BatchNormError, ValueError):
    """An argument has a value that cannot be used."""
