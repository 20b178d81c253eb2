"""ONNX files, and the data that lie outside of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from ..atomic import explain_write_errors, replacing
from ..errors import ArgumentError
from ..native import Array

__all__ = ["Data", "check", "data_path", "one_line", "read_model", "tensors", "write_model"]

#: Protobuf messages are smaller than 2 GiB; a margin for the graph itself.
LIMIT = 2_000_000_000
#: Smaller tensors stay in the model, as those of shapes have to.
SMALL = 1024


def read_model(path: Path) -> ModelProto:
    """A model as it is in the file: data outside of it are not read.

    Raises
    ------
    ArgumentError
        It cannot be read, or is no model.
    """
    try:
        model: ModelProto = ModelProto.FromString(path.read_bytes())
    except Exception as error:  # protobuf's
        why = (
            "there is no such file"
            if not path.exists()
            else f"it cannot be read ({one_line(error)})"
        )
        raise ArgumentError(f"{path}: must be an ONNX file, but {why}. Name another.") from error
    return model


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
        path = self.folder / location
        folder, real = os.path.realpath(self.folder), os.path.realpath(path)
        if os.path.isabs(location) or os.path.commonpath([folder, real]) != folder:
            raise ArgumentError(
                f"the data of '{tensor.name}' must lie in the folder of the model, got "
                f"{location!r}."
            )
        if not os.path.isfile(real):
            raise ArgumentError(f"{path}: must hold the data of '{tensor.name}', but is no file.")
        return path


def tensors(message: Any) -> Iterator[TensorProto]:
    """All tensors of a model, also those in nodes and in graphs inside of nodes."""
    if isinstance(message, ModelProto):
        for graph in (message.graph, *message.functions):
            yield from tensors(graph)
        return
    yield from getattr(message, "initializer", ())
    for sparse in getattr(message, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in message.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            for graph in attribute.graphs:
                yield from tensors(graph)


def _where(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def check(model: ModelProto | str, full: bool, what: str) -> None:
    """Raise unless the message, or the file of that name, is a valid model."""
    try:
        onnx.checker.check_model(model, full_check=full)
    except Exception as error:  # the checker's, inference's, and those of protobuf
        raise ArgumentError(f"{what} must be a valid ONNX model, but: {one_line(error)}") from error


def data_path(out: Path) -> Path:
    """Where the data of a model go."""
    return out.with_name(f"{out.name}.data")


def write_model(model: ModelProto, out: Path, data: Data, full: bool) -> None:
    """Write a model completely or not at all; beside it its data, if they were outside before.

    Raises
    ------
    ArgumentError
        It cannot be written, or would not be valid.
    """
    every = list(tensors(model))
    outside = any(map(is_external, every))
    outside |= sum(len(t.raw_data) for t in every) > LIMIT
    with explain_write_errors(out), ExitStack() as pending:
        target = pending.enter_context(replacing(out))
        if outside:
            beside = pending.enter_context(replacing(data_path(out)))
            moved = _write_data(every, beside, data)
            target.write_bytes(model.SerializeToString())
            check(str(target), full, "the folded model")
            for tensor in moved:
                _set_where(tensor, location=data_path(out).name)
        else:
            check(model, full, "the folded model")
        target.write_bytes(model.SerializeToString())


def _write_data(every: list[TensorProto], path: Path, data: Data) -> list[TensorProto]:
    moved = []
    with path.open("wb") as file:
        for tensor in every:
            if is_external(tensor):
                content: Any = data.bytes_of(tensor)
            elif len(tensor.raw_data) > SMALL:
                content = tensor.raw_data
            else:
                continue
            file.write(b"\0" * (-file.tell() % 4096 if len(content) > 4096 else -file.tell() % 64))
            where = {"location": path.name, "offset": str(file.tell()), "length": str(len(content))}
            file.write(content)
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            tensor.data_location = TensorProto.EXTERNAL
            _set_where(tensor, **where)
            moved.append(tensor)
    return moved


def _set_where(tensor: TensorProto, **values: str) -> None:
    for key, value in values.items():
        entry = next((e for e in tensor.external_data if e.key == key), None)
        (entry or tensor.external_data.add(key=key)).value = value


def one_line(error: BaseException | str, length: int = 300) -> str:
    """A message without its line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 1] + "…"
