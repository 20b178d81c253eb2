"""A folded model as a file: its state, a program of `torch.export`, or an ONNX file.

What is exported runs on the examples before it is written, beside the folded model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ...atomic import check_place, explain_write_errors, replacing
from ...errors import ArgumentError, BatchNormError, one_line
from ...extras import install, require
from ...folding import FoldReport
from ..population.batches import tensors_in
from .layers import short
from .verify import Examples, cast, compare_outputs, tolerance

__all__ = ["SUFFIXES", "FoldedFile", "check_out", "make_file"]

#: Of weights alone, and of whole models.
SUFFIXES = (".safetensors", ".pt", ".pth", ".pt2", ".onnx")
#: Protocol buffers end there; larger weights would need a second file.
LARGEST_ONNX = 2**31 - 2**20

Example = tuple[Any, ...] | dict[str, Any]


@dataclass
class FoldedFile:
    """What `make_file` has made.

    Attributes
    ----------
    write : callable
        Writes it to a path, completely or not at all.
    notes : list of str
        What to know about it.
    error : float or None
        Largest difference of what was exported from the folded model, on the example; None if it
        was not exported or not compared.
    missed : str
        Why what was exported was not compared; empty if it was.
    """

    write: Callable[[Path], None]
    notes: list[str] = field(default_factory=list)
    error: float | None = None
    missed: str = ""


def check_out(out: Path) -> None:
    """Raise if a folded model could not be written there, before the work for it begins.

    Raises
    ------
    ArgumentError
        Its name ends in none of `SUFFIXES`, or it cannot be written.
    BatchNormError
        A package is missing.
    """
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise ArgumentError(
            f"--out must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {str(out)!r}. "
            ".safetensors and .pt keep the state dict, .pt2 and .onnx the whole model."
        )
    check_place(out, "a folded model", "folded.pt2", "--out")
    if suffix == ".safetensors":
        require("A .safetensors file", "torch", "safetensors")
    if suffix == ".onnx":
        require("Exporting to ONNX", "onnx", "onnx", "onnxscript")


def make_file(
    folded: nn.Module,
    example: Example,
    out: Path,
    report: FoldReport,
    dtype: torch.dtype | None = None,
) -> FoldedFile:
    """Make what a file has to hold, by the end of its name; nothing is written yet.

    Parameters
    ----------
    folded : Module
    example : tuple or dict
        Arguments, or keyword arguments, which real tensors are cast to `dtype` of.
    out : Path
    report : FoldReport
        Of `folded`.
    dtype : torch.dtype

    Raises
    ------
    BatchNormError
        The model cannot be exported; or what was exported has other outputs.
    """
    suffix = out.suffix.lower()
    if suffix in (".pt2", ".onnx"):
        file = _exported(folded, example, suffix, dtype)
        if not (file.missed and suffix == ".onnx"):
            file.notes += _half(folded, suffix)
        return file
    state = folded.state_dict()
    notes = [
        "holds the state dict of the folded model: load it into what batchnorm.torch.fold returns "
        "for the same model with its trained weights"
    ]
    if any(pair.new_bias for pair in report.pairs):
        notes.append(
            "the original model has no place for new biases, and load_state_dict(strict=False) "
            "would drop them silently"
        )
    notes += _half(folded, suffix)
    if suffix == ".safetensors":
        return FoldedFile(_safetensors(state), notes)
    return FoldedFile(_writer(lambda file: torch.save(state, file)), notes)


def _half(folded: nn.Module, suffix: str) -> list[str]:
    """What to say of inputs if all weights are in half precision."""
    types = {t.dtype for t in folded.parameters() if t.is_floating_point()}
    if len(types) != 1 or not types <= {torch.float16, torch.bfloat16}:
        return []
    (kind,) = (short(each) for each in types)
    call = f"model(x.to(torch.{kind}))"
    if suffix == ".onnx":
        call = f"session.run(None, {{name: x.astype({kind!r})}})"
    return [f"takes {kind} inputs: {call}"]


def _writer(write: Callable[[BinaryIO], Any]) -> Callable[[Path], None]:
    def write_all(out: Path) -> None:
        with explain_write_errors(out), replacing(out) as beside, beside.open("wb") as file:
            try:
                write(file)
            except RuntimeError as error:  # torch's for a full disk
                raise OSError(str(error)) from error

    return write_all


def _safetensors(state: dict[str, Any]) -> Callable[[Path], None]:
    from safetensors.torch import save

    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ArgumentError(
            f"a .safetensors file holds tensors alone, but {others[0]!r} of the state dict is a "
            f"{type(state[others[0]]).__name__}. Write a .pt file."
        )
    # Copies, since such a file has no tensors that share memory.
    tensors = {name: value.contiguous().clone() for name, value in state.items()}
    return _writer(lambda file: file.write(save(tensors)))


# ---- whole models -------------------------------------------------------------------------------


def _exported(
    folded: nn.Module, example: Example, suffix: str, dtype: torch.dtype | None
) -> FoldedFile:
    given = example if dtype is None else cast(example, dtype)
    args, kwargs = (given, {}) if isinstance(given, tuple) else ((), given)
    program, notes = _program(folded, args, kwargs)
    examples = Examples(given)
    expected = examples.run(folded)
    if suffix == ".pt2":
        error = _compare(folded, expected, examples.run(program.module()), "the exported program")
        notes.append(f"run by torch.export, it differs by {error:.2g} from the folded model")
        return FoldedFile(_writer(lambda file: torch.export.save(program, file)), notes, error)
    model = _onnx(program)
    content = _renamed(model.model_proto)
    if content.ByteSize() > LARGEST_ONNX:
        raise BatchNormError(
            "the model is larger than the 2 GB that one ONNX file can hold. Write a .pt2 file."
        )
    found, missed = None, ""
    if importlib.util.find_spec("onnxruntime") is None:
        missed = f"onnxruntime is not installed. {install('onnx', 'onnxruntime')}"
    else:
        try:
            outputs = examples.run(model)
        except Exception as error:  # a type or an operation that it does not have
            missed = f"onnxruntime cannot run it ({_cause(error)})"
        else:
            found = _compare(folded, expected, outputs, "onnxruntime")
            notes.append(f"run by onnxruntime, it differs by {found:.2g} from the folded model")
    if missed:
        notes.append(f"not compared: {missed}")
    write = _writer(lambda file: file.write(content.SerializeToString()))
    return FoldedFile(write, notes, found, missed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what torch prints, logs and warns of; its errors say enough."""
    disabled = logging.root.manager.disable
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _program(
    folded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The exported program; its first axes are of any length where that is possible."""
    shapes: Any = tuple(map(_first_axis, args)) or {k: _first_axis(v) for k, v in kwargs.items()}
    for dynamic in (shapes, None):
        try:
            with _quiet(), torch.no_grad():
                program = torch.export.export(folded, args, kwargs, dynamic_shapes=dynamic)
            break
        except Exception as error:  # whatever a model does that export cannot follow
            if dynamic is None:
                raise BatchNormError(
                    f"torch.export cannot follow the folded model ({_cause(error)}). Write "
                    "its state dict, as .safetensors or .pt."
                ) from error
    inputs = [
        t for node in program.graph.nodes if node.op == "placeholder"
        for t in tensors_in(node.meta.get("val"))
    ]  # fmt: skip
    free = any(isinstance(n, torch.SymInt) for t in inputs for n in t.shape)
    note = (
        "takes inputs of the shapes of the example, with a first axis of any length"
        if free
        else "takes inputs of exactly the shapes of the example (a first axis longer than 1 may "
        "become free)"
    )
    return program, [note]


def _first_axis(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {0: torch.export.Dim.AUTO} if value.dim() else None
    if isinstance(value, (tuple, list)):
        return type(value)(map(_first_axis, value))
    return {k: _first_axis(v) for k, v in value.items()} if isinstance(value, dict) else None


def _onnx(program: Any) -> Any:
    try:
        with _quiet():
            # Not optimized: that would fold what was refused, without a bound.
            return torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    except Exception as error:
        raise BatchNormError(
            f"torch.onnx.export has no translation of the folded model ({_cause(error)}). "
            "Write a .pt2 file."
        ) from error


def _renamed(content: Any) -> Any:
    """An ONNX model whose sizes that are free have plain names, in place of torch's "s77"."""
    graph = content.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim]
    free = dict.fromkeys(dim.dim_param for dim in dims if re.fullmatch(r"s\d+", dim.dim_param))
    names = {old: f"batch_{k}" if k else "batch" for k, old in enumerate(free)}
    for dim in dims:
        if dim.dim_param in names:
            dim.dim_param = names[dim.dim_param]
        elif dim.dim_param:  # such as "2*s77"
            dim.dim_param = re.sub(r"s\d+", lambda m: names.get(m[0], m[0]), dim.dim_param)
    return content


def _compare(folded: nn.Module, expected: Any, got: Any, who: str) -> float:
    """Largest difference; raises if it is beyond what an order of operations can do."""
    error, relative = compare_outputs(expected, [list(tensors_in(got))])
    if error is None or relative is None:
        return 0.0
    if not relative <= tolerance(folded):
        raise BatchNormError(
            f"{who} has other outputs than the folded model: they differ by {error:.2g}, "
            f"{relative:.2g} of the largest. The file is not written."
        )
    return error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:  # torch.onnx wraps errors in advice
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(str(error).strip().partition(chr(10))[0], 200)}"
