"""Columns of pyarrow as features: one for a column of numbers, several for lists of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from ...errors import ArgumentError
from ...native import Array, Float64
from ..extras import import_extra
from .values import EXACT

#: How many units in the last place of float64 the values of a column of decimals must span, if they
#: have more digits than float64: the standard deviation then has about nine digits.
SPAN = 1e9


def arrow(module: str = "pyarrow") -> Any:
    """Import pyarrow, or a module of it."""
    return import_extra(module, "data", "Tables")


@dataclass(frozen=True)
class Column:
    """A column whose values are features.

    Attributes
    ----------
    name
        Its name.
    width
        Length of its lists, each entry of which is a feature; None for a column of numbers.
    """

    name: str
    width: int | None = None

    @property
    def features(self) -> int:
        """Number of features."""
        return 1 if self.width is None else self.width

    @property
    def names(self) -> Iterator[str]:
        """Names of the features: that of the column, or name[0], name[1], …"""
        if self.width is None:
            return iter([self.name])
        return (f"{self.name}[{k}]" for k in range(self.width))


def element(name: str) -> str | None:
    """The column of which ``name[k]`` is an entry, or None."""
    found = re.fullmatch(r"(.+)\[\d+\]", name, re.DOTALL)
    return None if found is None else found[1]


def is_number(kind: Any) -> bool:
    """Whether a pyarrow type is one of numbers; null is one of missing values."""
    types = arrow().types
    checks = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_decimal,
        types.is_null,
    )
    return any(check(kind) for check in checks)


def is_list(kind: Any) -> bool:
    """Whether a pyarrow type is one of lists of one length."""
    return bool(arrow().types.is_fixed_size_list(kind))


def numbers_of(array: Any) -> Any:
    """Return the numbers of a column, those of its lists one after another without null lists."""
    return array.flatten() if is_list(array.type) else array


def to_float64(array: Any, column: Column) -> Float64:
    """Copy a column to a (features, rows) array of float64, NaN for null."""
    numbers = _to_float64(numbers_of(array))
    values: Float64 = numbers.reshape(-1, column.features).T
    if column.width is None or not array.null_count:
        return values
    rows, values = values, np.full((column.width, len(array)), np.nan)
    values[:, array.is_valid().to_numpy(zero_copy_only=False)] = rows
    return values


def _to_float64(numbers: Any) -> Float64:
    pa = arrow()
    if pa.types.is_float16(numbers.type):  # whose cast is new in pyarrow
        half: Float64 = numbers.to_numpy(zero_copy_only=False).astype(np.float64)
        return half
    if pa.types.is_decimal(numbers.type):
        numbers = numbers.cast(pa.string())  # whose cast rounds once; that of decimals, more often
    values: Float64 = numbers.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def empty_batch(schema: Any) -> Any:
    """Return a batch without rows."""
    pa = arrow()
    return pa.record_batch([pa.nulls(0, kind) for kind in schema.types], schema=schema)


def from_float64(values: Array, before: Any, kind: Any) -> Any:
    """Make a column of pyarrow type `kind`, null where the column `before` is.

    Parameters
    ----------
    values
        (features, rows), of the floating type of `kind`.
    """
    pa = arrow()
    null = before.is_null().to_numpy(zero_copy_only=False)
    if not is_list(kind):
        return pa.array(values[0], kind, mask=null)
    entries = np.ones((len(before), kind.list_size), bool)
    inside = numbers_of(before).is_null().to_numpy(zero_copy_only=False)
    entries[~null] = inside.reshape(-1, kind.list_size)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(values.T.reshape(-1), kind.value_type, mask=entries.reshape(-1)),
        type=kind,
        mask=pa.array(null) if null.any() else None,
    )


class Precision:
    """What makes sure that float64 holds the numbers of a table to more than their spread.

    Integers and decimals of 2**53 or more in magnitude are refused. Decimals with more digits than
    float64 are refused if they are so close together that the digits lost matter.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._ranges: dict[str, tuple[Decimal, Decimal, Any]] = {}

    def check(self, array: Any, name: str) -> None:
        """Raise if a batch of a column has numbers that are too large."""
        pa = arrow()
        numbers = numbers_of(array)
        kind = numbers.type
        is_decimal = pa.types.is_decimal(kind) and kind.precision - min(kind.scale, 0) > 15
        if not (is_decimal or pa.types.is_int64(kind) or pa.types.is_uint64(kind)):
            return
        if is_decimal and kind.bit_width < 128:
            numbers = numbers.cast(pa.decimal128(kind.precision, kind.scale))
        bounds = arrow("pyarrow.compute").min_max(numbers)
        if not bounds["min"].is_valid:
            return
        least, most = Decimal(bounds["min"].as_py()), Decimal(bounds["max"].as_py())
        if max(-least, most) >= EXACT:
            what = "decimals" if is_decimal else "integers"
            refuse_digits(f"{self._label}: column {name!r}", what, max(least, most, key=abs))
        if is_decimal:
            before = self._ranges.get(name, (least, most, kind))
            self._ranges[name] = (min(before[0], least), max(before[1], most), kind)

    def finish(self) -> None:
        """Raise if the decimals of a column, now that all are known, are too close together."""
        for name, (least, most, kind) in self._ranges.items():
            largest = max(-least, most)
            digits_fit = largest.scaleb(kind.scale) < EXACT
            if digits_fit or least == most or float(most - least) > SPAN * math.ulp(float(largest)):
                continue
            raise ArgumentError(
                f"{self._label}: column {name!r}: {kind} values must differ by more than float64 "
                f"rounds them, got {least:f} to {most:f}. Subtract a constant first."
            )


def refuse_digits(label: str, what: str, number: Decimal | str) -> None:
    """Raise for a number with more digits than float64."""
    shown = number if isinstance(number, str) else f"{number:f}"
    raise ArgumentError(
        f"{label}: {what} must be below 2**53 in magnitude, so that float64 holds them exactly, "
        f"got {shown}. Subtract a constant first."
    )


#: Decides whether a column of this type can be features.
IsNumber = Callable[[Any], bool]


def width_of(kind: Any, is_number: IsNumber) -> int | None:
    """Return the number of features of a column of this type; None if it cannot be any."""
    if is_number(kind):
        return 1
    if is_list(kind) and is_number(kind.value_type):
        return int(kind.list_size) or None
    return None


def match_elements(names: Sequence[str], lists: dict[str, int]) -> list[str]:
    """Replace the names of all entries of a list, in their order, by that of its column."""
    found: list[str] = []
    k = 0
    while k < len(names):
        column = element(names[k])
        if column in lists and names[k] not in lists:
            expected = list(Column(column, lists[column]).names)
            if list(names[k : k + len(expected)]) == expected:
                found.append(column)
                k += len(expected)
                continue
        found.append(names[k])
        k += 1
    return found
