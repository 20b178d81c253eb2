"""Inputs of an ONNX model that have no names: arrays in their order, and random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from ...errors import ArgumentError
from ...inputs import numbered

__all__ = ["in_order", "random_inputs"]


def _wanted(model: ModelProto) -> list[ValueInfoProto]:
    """Inputs without a value of their own."""
    initialized = {tensor.name for tensor in model.graph.initializer}
    initialized |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in initialized]


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
