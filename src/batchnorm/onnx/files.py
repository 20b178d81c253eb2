"""ONNX files, and the data that lie outside of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, TensorProto, numpy_helper

from ..atomic import explain_write_errors, replacing
from ..errors import ArgumentError, one_line
from ..inputs import check_file
from ..native import Array

__all__ = [
    "Data",
    "check",
    "data_files",
    "data_path",
    "has_batch_norms",
    "inferred",
    "is_external",
    "is_large",
    "read_model",
    "take_out",
    "tensors",
    "write_model",
]

#: Protobuf messages are smaller than 2 GiB; a margin for the graph itself.
LIMIT = 2_000_000_000
#: Smaller tensors stay in the model, as those of shapes have to.
SMALL = 1024
#: Data begin at multiples of this, so that they can be mapped.
PAGE = 4096


def read_model(path: Path) -> ModelProto:
    """A model as it is in the file: data outside of it are not read.

    Raises
    ------
    ArgumentError
        It cannot be read, or is no model.
    """
    check_file(path)
    try:
        model: ModelProto = ModelProto.FromString(path.read_bytes())
    except Exception as error:  # protobuf's
        raise ArgumentError(
            f"{path}: must be an ONNX file, but it cannot be read ({one_line(error)}). Name "
            "another."
        ) from error
    for text in _texts(model):
        if isinstance(text, bytes):  # as protobuf returns what is no text
            raise ArgumentError(f"{path}: must have names in UTF-8, got {text!r}. Export it anew.")
    return model


def _texts(model: ModelProto) -> Iterator[str | bytes]:
    """All names in a model."""
    for tensor in tensors(model):
        yield tensor.name
        yield from (text for each in tensor.external_data for text in (each.key, each.value))
    for function in model.functions:
        yield from (function.domain, *function.input, *function.output)
    for graph in graphs_of(model):
        yield graph.name
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)
        if not isinstance(graph, FunctionProto):
            for value in (*graph.input, *graph.output, *graph.value_info):
                dims = value.type.tensor_type.shape.dim
                yield from (value.name, *(dim.dim_param for dim in dims))


class Data:
    """Reads the values of tensors.

    Parameters
    ----------
    folder
        Of data outside of the model; None if there must not be any.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, tensor: TensorProto) -> Array:
        """The values; those outside of the model are mapped, not loaded."""
        try:
            if tensor.data_location != TensorProto.EXTERNAL:
                return numpy_helper.to_array(tensor)
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values: Array = self.bytes_of(tensor).view(kind).reshape(tuple(tensor.dims))
            return values
        except ArgumentError:
            raise
        except Exception as error:
            raise ArgumentError(f"'{tensor.name}' cannot be read ({one_line(error)}).") from error

    def bytes_of(self, tensor: TensorProto) -> np.memmap[Any, Any]:
        """The data of a tensor outside of the model."""
        path, given = self.path_of(tensor), _where(tensor)
        try:
            size = path.stat().st_size
            offset = int(given.get("offset", 0))
            length = int(given.get("length", size - offset))
            if offset < 0 or length < 0 or offset + length > size:
                raise ArgumentError(
                    f"{path}: must hold {length} bytes of '{tensor.name}' from byte {offset} on, "
                    f"but the file has {size} bytes. Copy it anew."
                )
            if not length:
                return np.zeros(0, np.uint8)  # type: ignore[return-value]
            return np.memmap(path, np.uint8, "r", offset, (length,))
        except (OSError, ValueError) as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(f"{path}: cannot be read ({one_line(error)}).") from error

    def path_of(self, tensor: TensorProto) -> Path:
        """The file of a tensor's data, which must lie in the folder of the model."""
        location = _where(tensor).get("location", "")
        if self.folder is None:
            raise ArgumentError(
                f"model must hold its tensors, and '{tensor.name}' is in {location!r}, outside of "
                "it. Load it with onnx.load(path), or use fold_file."
            )
        path, folder = self.folder / location, os.path.realpath(self.folder)
        try:
            real = os.path.realpath(path)
            inside = not os.path.isabs(location) and os.path.commonpath([folder, real]) == folder
        except ValueError:  # no path at all, or one on another drive
            inside, real = False, ""
        if not inside:
            raise ArgumentError(
                f"the data of '{tensor.name}' must lie in the folder of the model, got "
                f"{location!r}."
            )
        if not os.path.isfile(real):
            raise ArgumentError(f"{path}: must hold the data of '{tensor.name}', but is no file.")
        return path


def graphs_of(message: Any) -> Iterator[Any]:
    """The graph and the functions of a model, and all graphs inside of their nodes."""
    if isinstance(message, ModelProto):
        for part in (message.graph, *message.functions):
            yield from graphs_of(part)
        return
    yield message
    for node in message.node:
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from graphs_of(graph)


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """All tensors of a model, also those in nodes."""
    for graph in graphs_of(model):
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _where(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def is_external(tensor: TensorProto) -> bool:
    """Whether the values of a tensor are in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def data_files(model: ModelProto, folder: Path) -> set[Path]:
    """Files in which a model has tensors.

    Raises
    ------
    ArgumentError
        One is not in the folder of the model.
    """
    data = Data(folder)
    return {data.path_of(tensor) for tensor in tensors(model) if is_external(tensor)}


def has_batch_norms(model: ModelProto) -> bool:
    """Whether a batch norm is anywhere in a model."""
    return any(n.op_type == "BatchNormalization" for g in graphs_of(model) for n in g.node)


def check(model: ModelProto, full: bool, what: str) -> None:
    """Raise unless a model is valid; `full` infers all shapes, too."""
    try:
        plain = _plain(model)
        if full:
            onnx.shape_inference.infer_shapes(plain, check_type=True, strict_mode=True)
        for tensor in tensors(plain):
            if is_external(tensor):  # which the checker would look for in the working directory
                tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
        onnx.checker.check_model(plain)
    except Exception as error:  # the checker's, inference's, and those of protobuf
        raise ArgumentError(f"{what} must be a valid ONNX model, but: {one_line(error)}") from error


def inferred(model: ModelProto) -> ModelProto | None:
    """A model with the shapes and types of its values; None if inference finds them wrong."""
    try:
        return onnx.shape_inference.infer_shapes(_plain(model), check_type=True, strict_mode=True)
    except Exception:  # of inference, and of protobuf for more than 2 GB
        return None


def _plain(model: ModelProto) -> ModelProto:
    """A model that onnx checks: with the short name of its domain, and no message too large.

    The model itself, if it is one and all data are in it.
    """
    large = is_large(model)
    aliased = any(node.domain == "ai.onnx" for graph in graphs_of(model) for node in graph.node)
    if not (large or aliased or any(map(is_external, tensors(model)))):
        return model
    plain = ModelProto()
    plain.CopyFrom(model)
    for graph in graphs_of(plain):
        for node in graph.node:
            if node.domain == "ai.onnx":
                node.domain = ""
    if large:
        take_out(tensors(plain))
    return plain


def is_large(model: ModelProto) -> bool:
    """Whether a model is too large for a protobuf message."""
    return sum(len(tensor.raw_data) for tensor in tensors(model)) > LIMIT


def take_out(every: Iterable[TensorProto]) -> None:
    """Let the values of tensors be elsewhere, unless they are few."""
    for tensor in every:
        if len(tensor.raw_data) > SMALL:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=tensor.name)


def data_path(out: Path) -> Path:
    """Where the data of a model go."""
    return out.with_name(f"{out.name}.data")


def write_model(model: ModelProto, out: Path, data: Data) -> None:
    """Write a model completely or not at all; beside it its data, if they were outside before.

    Raises
    ------
    ArgumentError
        It cannot be written.
    """
    every = list(tensors(model))
    outside = any(map(is_external, every)) or is_large(model)
    with explain_write_errors(out), ExitStack() as pending:
        target = pending.enter_context(replacing(out))
        if outside:
            beside = pending.enter_context(replacing(data_path(out)))
            _write_data(every, beside, data_path(out).name, data)
        target.write_bytes(model.SerializeToString())


def _write_data(every: list[TensorProto], path: Path, name: str, data: Data) -> None:
    """Write what is not small to a file, which will have a name of its own."""
    with path.open("wb") as file:
        for tensor in every:
            if is_external(tensor):
                content: Any = data.bytes_of(tensor)
            elif len(tensor.raw_data) > SMALL:
                content = tensor.raw_data
            else:
                continue
            file.write(b"\0" * (-file.tell() % PAGE))
            where = {"location": name, "offset": file.tell(), "length": len(content)}
            file.write(content)
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
