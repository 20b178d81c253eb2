"""Models, weights and inputs that a command names."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, BatchNormError

__all__ = ["example_of", "load_batches", "load_model", "load_weights", "random_example"]


def load_model(target: str, weights: Path | None = None) -> nn.Module:
    """Import ``package.module:factory`` and call the factory; a Module is taken as it is.

    Raises
    ------
    ArgumentError
        It cannot be imported, or is no model, or the weights do not fit.
    """
    model = _made(target, "a model", nn.Module)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{target}: must return a torch.nn.Module, got {type(model).__name__}.")
    if weights is not None:
        try:
            model.load_state_dict(load_weights(weights))
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, BatchNormError):
                raise
            first = str(error).strip().splitlines()
            raise ArgumentError(
                f"{weights}: must hold the weights of {target}, but they do not fit: "
                f"{' '.join(first[:3])[:300]}. Name the file that was saved from this model."
            ) from error
    return model


def load_batches(target: str) -> Any:
    """Import ``package.module:factory``, and call it for batches if it is a function.

    Raises
    ------
    ArgumentError
        It cannot be imported, or gives nothing to iterate over.
    """
    found = _made(target, "batches", Tensor)
    if not hasattr(found, "__iter__") and not hasattr(found, "__getitem__"):
        raise ArgumentError(
            f"{target}: must return batches, such as a DataLoader, got {type(found).__name__}."
        )
    return found


def _made(target: str, what: str, kind: type) -> Any:
    place, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
        with contextlib.redirect_stdout(sys.stderr):  # what they print is no finding
            return found() if callable(found) and not isinstance(found, kind) else found
    except BatchNormError:
        raise
    except (Exception, SystemExit) as error:  # whatever the module or the factory does
        raise ArgumentError(
            f"{target}: must name a function without arguments that returns {what}, but "
            f"{type(error).__name__}: {error}. Run the command where 'import {place}' works."
        ) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file of torch or safetensors; no code in it is run.

    Raises
    ------
    ArgumentError
        It cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ArgumentError(
            f"{path}: reading it needs safetensors, which is not installed. Install it with: "
            "pip install safetensors"
        ) from error
    except Exception as error:  # torch raises all kinds for damaged files
        why = "there is no such file" if not path.exists() else _first_line(error)
        raise ArgumentError(
            f"{path}: must be a state dict saved by torch.save or safetensors, but {why}. Files "
            "that hold more than tensors are never unpickled: save model.state_dict()."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ArgumentError(
            f"{path}: must hold a state dict, got {type(found).__name__}. Save model.state_dict()."
        )
    return {str(name): t for name, t in found.items() if isinstance(t, Tensor)}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    if "Unsupported global" in str(error):
        return "it holds objects that are not tensors"
    return f"it cannot be read ({(text or [type(error).__name__])[0][:160]})"


# ---- inputs -------------------------------------------------------------------------------------


def example_of(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> Any:
    """Arguments of a model: `arr_0`, `arr_1` and so on in their order, or keywords by their names.

    Raises
    ------
    ArgumentError
        There are both, or none, or arrays that no tensor can hold.
    """
    positions = {name: re.fullmatch(r"arr_(\d+)", name) for name in arrays}
    ordered = sorted((int(m[1]), name) for name, m in positions.items() if m)
    if not arrays or (ordered and [k for k, _ in ordered] != list(range(len(arrays)))):
        raise ArgumentError(
            f"{path}: must hold arrays arr_0, arr_1 and so on, as numpy.savez names arguments "
            "without a name, or arrays with the names of keyword arguments, but not both, got "
            f"{', '.join(arrays) or 'none'}."
        )
    try:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    except TypeError as error:
        raise ArgumentError(f"{path}: must hold numbers, but {error}") from error
    return tuple(tensors[name] for _, name in ordered) if ordered else tensors


def random_example(shapes: Sequence[str], model: nn.Module) -> tuple[Tensor, ...]:
    """Standard normal values of a fixed seed, in the type of the model; shapes as in "8x3x32x32".

    Raises
    ------
    ArgumentError
        A shape is not such a text, or too large.
    """
    floats = [t for t in model.parameters() if t.is_floating_point()]
    dtype = floats[0].dtype if floats else torch.float32
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
            raise ArgumentError(
                f"--input must be a shape of positive numbers such as 8x3x224x224, got {shape!r}."
            )
        try:
            values = torch.randn([int(n) for n in shape.split("x")], generator=generator)
        except (RuntimeError, TypeError, MemoryError) as error:  # too large for it, or an int64
            raise ArgumentError(
                f"--input must be a shape that fits into memory, got {shape!r}."
            ) from error
        found.append(values.to(dtype))
    return tuple(found)
