"""Inputs of an ONNX model: arrays by name or in their order, and random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from ...errors import ArgumentError, DTypeError, ShapeError
from ...inputs import numbered

__all__ = ["Feed", "check_inputs", "in_order", "random_inputs"]

#: Values of the inputs of a model, by name.
Feed = dict[str, Any]


def _wanted(model: ModelProto) -> list[ValueInfoProto]:
    """Inputs without a value of their own."""
    initialized = {tensor.name for tensor in model.graph.initializer}
    initialized |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in initialized]


def check_inputs(model: ModelProto, inputs: object) -> list[Feed]:
    """The inputs as a list, after a comparison with what the model wants.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        They are others.
    """
    feeds: list[Any] = inputs if isinstance(inputs, list) else [inputs]
    if not feeds or not all(isinstance(feed, Mapping) for feed in feeds):
        raise ArgumentError(
            "inputs must be a dict of arrays by name, or a list of such dicts that is not empty, "
            f"got {'an empty list' if not feeds else type(feeds[0]).__name__}."
        )
    return [_checked(feed, model) for feed in feeds]


def _checked(feed: Mapping[str, Any], model: ModelProto) -> Feed:
    names = [value.name for value in _wanted(model)]
    # Values of initializers may be given as well, but not up to version 3.
    taken = {value.name: value for value in model.graph.input}
    for name in feed:
        if name not in taken or (name not in names and model.ir_version < 4):
            raise ArgumentError(
                "inputs must have the names of the model's inputs "
                f"({', '.join(map(repr, names)) or 'none'}), got {name!r}."
            )
    missing = [name for name in names if name not in feed]
    if missing:
        raise ArgumentError(
            f"inputs must have all inputs of the model; missing: {', '.join(missing)}."
        )
    checked = {}
    for name, given in feed.items():
        kind = taken[name].type
        if not kind.HasField("tensor_type"):
            checked[name] = given  # a sequence, which onnxruntime checks
            continue
        values = np.asarray(given)
        try:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))
        except KeyError as error:
            raise ArgumentError(f"the input {name!r} is of type {error}, which is none.") from error
        if values.dtype != dtype and not (dtype.kind == "O" and values.dtype.kind in "UO"):
            raise DTypeError(
                f"inputs[{name!r}] must be of type {dtype}, got {values.dtype}. Convert it by "
                f"astype({str(dtype)!r})."
            )
        if kind.tensor_type.HasField("shape"):
            dims = kind.tensor_type.shape.dim
            sizes = [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in dims]
            fits = len(sizes) == values.ndim and all(
                isinstance(size, str) or size == n
                for size, n in zip(sizes, values.shape, strict=True)
            )
            if not fits:
                raise ShapeError(
                    f"inputs[{name!r}] must have shape ({', '.join(map(str, sizes))}), got "
                    f"{values.shape}."
                )
        checked[name] = values
    return checked


def in_order(arrays: Mapping[str, Any], model: ModelProto) -> dict[str, Any]:
    """`arr_0`, `arr_1` and so on by the names of the model's inputs, in their order.

    Unchanged if an input has one of these names, or there are others.
    """
    names = [value.name for value in _wanted(model)]
    places = numbered(arrays)
    if len(places) != len(names) or set(names) & set(arrays):
        return dict(arrays)
    return {name: arrays[place] for name, place in zip(names, places, strict=True)}


def random_inputs(shapes: Sequence[Sequence[int]], model: ModelProto) -> dict[str, Any]:
    """Standard normal values of a fixed seed, in the types of the model's inputs.

    Raises
    ------
    ArgumentError
        There is another number of inputs, one is not of real numbers, or a shape is too large.
    """
    wanted = _wanted(model)
    if len(shapes) != len(wanted):
        raise ArgumentError(
            f"--input must be given once for each input of the model, which are "
            f"{', '.join(value.name for value in wanted) or 'none'}; got {len(shapes)}."
        )
    rng = np.random.default_rng(0)
    found = {}
    for value, shape in zip(wanted, shapes, strict=True):
        kind = value.type.tensor_type.elem_type
        name = helper.tensor_dtype_to_string(kind).partition(".")[2] if kind else "no tensor"
        if name not in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16"):
            raise ArgumentError(
                f"--input makes real numbers, and the input {value.name!r} is of type "
                f"{name.lower()}. Pass --verify data.npz with its values."
            )
        try:
            numbers = rng.normal(size=shape)
        except (MemoryError, OverflowError, ValueError) as error:
            raise ArgumentError(
                f"--input must be a shape that fits into memory, got {'x'.join(map(str, shape))!r}."
            ) from error
        found[value.name] = numbers.astype(helper.tensor_dtype_to_np_dtype(kind))
    return found
