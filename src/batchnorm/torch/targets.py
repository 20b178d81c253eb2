"""Models, weights and inputs that a command names."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, BatchNormError, one_line
from ..extras import install
from ..inputs import check_file, numbered

__all__ = [
    "example_of",
    "is_untrained",
    "load_batches",
    "load_model",
    "load_weights",
    "other_types",
    "random_example",
]


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
        state = load_weights(weights)
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, BatchNormError):
                raise
            why = _misfit(model, state) or one_line(error)
            raise ArgumentError(
                f"{weights}: must hold the weights of {target}, but they do not fit: {why}. Name "
                "the file that was saved from this model."
            ) from error
    return model


def _misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """How names and shapes of weights differ from a model's."""
    # torch does without these in files that say nothing of their version.
    counter = "num_batches_tracked"
    wanted = {
        k: t for k, t in model.state_dict().items()
        if isinstance(t, Tensor) and not k.endswith(counter)
    }  # fmt: skip
    missing = [k for k in wanted if k not in state]
    extra = [k for k in state if k not in wanted and not k.endswith(counter)]
    others = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    parts = []
    if missing:
        keys = "key" if len(missing) == 1 else "keys"
        parts.append(f"{len(missing)} {keys} missing ({_some(missing)})")
    if extra:
        parts.append(f"{len(extra)} too many ({_some(extra)})")
    if others:
        shapes = [f"{k}: {tuple(state[k].shape)} for {tuple(wanted[k].shape)}" for k in others]
        parts.append(f"{len(others)} of another shape ({_some(shapes)})")
    biases = [k for k in extra if k.endswith("bias") and f"{k[:-4]}weight" in wanted]
    if biases and biases == extra and any(k.endswith("running_mean") for k in missing):
        parts.append("they look like those of a folded model, which batchnorm.torch.fold makes")
    for prefix, wrapper in {"module.": "DataParallel", "_orig_mod.": "torch.compile"}.items():
        if extra and {k.removeprefix(prefix) for k in extra} <= wanted.keys():
            parts.append(f"{prefix!r} comes from {wrapper}: save the model inside of it")
    return ", ".join(parts)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def is_untrained(model: nn.Module) -> bool:
    """Whether there are batch norms that count batches, and none has seen one."""
    counts = [t for k, t in model.state_dict().items() if k.endswith("num_batches_tracked")]
    return bool(counts) and not any(int(count) for count in counts)


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
    if place.endswith(".py"):
        module = ".".join(Path(place).with_suffix("").parts)
        raise ArgumentError(
            f"{target}: must be package.module:factory, without .py. Did you mean {module}:{name}?"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    must = f"{target}: must name a function without arguments that returns {what}, but"
    with contextlib.redirect_stdout(sys.stderr):  # what they print is no finding
        try:
            found: Any = importlib.import_module(place)
        except BatchNormError:
            raise
        except (Exception, SystemExit) as error:  # whatever the module does
            why = f"{must} {type(error).__name__}: {error}."
            lacking = error.name if isinstance(error, ModuleNotFoundError) else None
            if lacking is not None and f"{place}.".startswith(f"{lacking}."):
                why += f" Run the command where 'import {place}' works."
            raise ArgumentError(why) from error
        for part in name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError as error:
                raise ArgumentError(f"{must} {_which(found, part, place)}") from error
            except Exception as error:  # of what a module imports when it is asked for
                raise ArgumentError(f"{must} {type(error).__name__}: {error}.") from error
        if isinstance(found, kind) or not callable(found):
            return found
        _check_arguments(found, must)
        try:
            return found()
        except BatchNormError:
            raise
        except (Exception, SystemExit) as error:  # whatever the factory does
            raise ArgumentError(
                f"{target}: must return {what}, but raises {type(error).__name__}: {error}."
            ) from error


def _which(found: Any, name: str, place: str) -> str:
    """What there is in a module instead of `name`."""
    mine = getattr(found, "__name__", place)
    near = difflib.get_close_matches(name, [k for k in dir(found) if not k.startswith("__")])
    made = [
        k for k, value in getattr(found, "__dict__", {}).items()
        if not k.startswith("_") and callable(value) and getattr(value, "__module__", "") == mine
    ]  # fmt: skip
    if near:
        return f"{mine!r} has no {name!r}. Did you mean {' or '.join(near)}?"
    return f"{mine!r} has no {name!r}. It has {_some(made, 8) or 'no functions'}."


def _check_arguments(factory: Any, must: str) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of a built-in function
        return
    try:
        signature.bind()
    except TypeError as error:
        wanted = [
            p.name for p in signature.parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]  # fmt: skip
        raise ArgumentError(
            f"{must} it needs arguments: {', '.join(wanted)}. Wrap it in a function without "
            "arguments."
        ) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file of torch or safetensors; no code in it is run.

    Raises
    ------
    ArgumentError
        It cannot be read, or holds something else.
    """
    check_file(path)
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that it then refuses, or reads rightly
            found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ArgumentError(
            f"{path}: reading it needs safetensors, which is not installed. "
            f"{install('torch', 'safetensors')}"
        ) from error
    except Exception as error:  # torch raises all kinds for damaged files
        if "Unsupported global" in str(error):
            why = "it holds objects that are not tensors"
        else:
            why = f"it cannot be read ({one_line(error, 160)})"
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


# ---- inputs -------------------------------------------------------------------------------------


def example_of(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> Any:
    """Arguments of a model: `arr_0`, `arr_1` and so on in their order, or keywords by their names.

    Raises
    ------
    ArgumentError
        There are both, or none, or arrays that no tensor can hold.
    """
    ordered = numbered(arrays)
    if not arrays or (not ordered and any(re.fullmatch(r"arr_\d+", name) for name in arrays)):
        raise ArgumentError(
            f"{path}: must hold arrays arr_0, arr_1 and so on, as numpy.savez names arguments "
            "without a name, or arrays with the names of keyword arguments, but not both, got "
            f"{', '.join(arrays) or 'none'}."
        )
    try:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    except TypeError as error:
        raise ArgumentError(f"{path}: must hold numbers, but {error}") from error
    return tuple(tensors[name] for name in ordered) if ordered else tensors


def random_example(shapes: Sequence[Sequence[int]], model: nn.Module) -> tuple[Tensor, ...]:
    """Standard normal values of a fixed seed, in the type of the model.

    Raises
    ------
    ArgumentError
        A shape is too large.
    """
    dtype = _dtype_of(model)
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        try:
            values = torch.randn(list(shape), generator=generator)
        except (RuntimeError, TypeError, MemoryError) as error:  # too large for it, or an int64
            raise ArgumentError(
                f"--input must be a shape that fits into memory, got {'x'.join(map(str, shape))!r}."
            ) from error
        found.append(values.to(dtype))
    return tuple(found)


def other_types(example: Any, model: nn.Module) -> str:
    """Which arrays should have the type of the model and have another, and what to do; or "".

    Parameters
    ----------
    example
        As `example_of` makes it.
    """
    dtype = _dtype_of(model)
    named = example if isinstance(example, dict) else {f"arr_{k}": t for k, t in enumerate(example)}
    for name, t in named.items():
        if t.dtype != dtype and (t.is_floating_point() or t.dtype == torch.uint8):  # images
            got, kind = (str(each).removeprefix("torch.") for each in (t.dtype, dtype))
            return (
                f" {name} is of type {got}, and the model {kind}: convert it by astype({kind!r})."
            )
    return ""


def _dtype_of(model: nn.Module) -> torch.dtype:
    floats = (t.dtype for t in model.parameters() if t.is_floating_point())
    return next(floats, torch.float32)
