"""What ``batchnorm fold`` is given, and what it writes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.atomic import check_place, is_same
from batchnorm.errors import ArgumentError, BatchNormError, one_line
from batchnorm.extras import require
from batchnorm.folding import FoldError, FoldReport
from batchnorm.inputs import read_inputs
from batchnorm.progress import steps

from .kinds import INSTEAD, WEIGHTS

__all__ = ["Folded", "NotWrittenError", "fold"]

#: Types of a folded model, by all of their names.
TYPES = {
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float32": "float32", "fp32": "float32", "float": "float32",
}  # fmt: skip


@dataclass
class Folded:
    """What `fold` has done.

    Attributes
    ----------
    report : FoldReport
    notes : list of str
        What to know of the model and of the file.
    written : list of Path
        The file, and that of its data if it has one.
    error : float or None
        Largest difference of what the file holds from the folded model, on the example; None if it
        was not exported or not compared.
    """

    report: FoldReport
    notes: list[str]
    written: list[Path]
    error: float | None = None


class NotWrittenError(FoldError):
    """A model was folded, but the result cannot be exported or written."""


def fold(
    target: str,
    out: Path,
    *,
    weights: Path | None = None,
    verify: Path | None = None,
    shapes: Sequence[str] = (),
    dtype: str | None = None,
    strict: bool = False,
    tol: float | None = None,
    json: Path | None = None,
) -> Folded:
    """Fold an ONNX file, or a model by name, and write the result.

    Parameters
    ----------
    target
        ``model.onnx`` or ``package.module:factory``.
    out
        Where to write it; by the end of its name a state dict, a program, or ONNX.
    weights
        State dict for the model that the factory makes.
    verify
        A .npz or .npy file of inputs.
    shapes
        Of random inputs, as in "1x3x224x224".
    dtype
        Of the folded model: float16, bfloat16 or float32.
    strict, tol
        As `batchnorm.torch.fold`; nothing is written then. What is written must be compared, too.
    json
        Where the report is to be written, which must not replace any other file of these.

    Raises
    ------
    FoldError
        With `strict`; or outputs are no longer finite.
    NotWrittenError
        What was folded cannot be exported or written.
    BatchNormError
        Arguments do not go together, or something cannot be read, run or written.
    """
    if json is not None:
        check_place(json, "a JSON file", "report.json", "--json")
    if dtype is not None and dtype not in TYPES:
        raise ArgumentError(f"--dtype must be float16, bfloat16 or float32, got {dtype!r}.")
    if verify is not None and shapes:
        raise ArgumentError(
            f"{target} is run on one example: pass either --verify data.npz or --input with a "
            "shape such as 8x3x224x224, got both."
        )
    request = _Request(
        target=target,
        out=out,
        weights=weights,
        verify=verify,
        shapes=shapes,
        dtype=None if dtype is None else TYPES[dtype],
        strict=strict,
        tol=tol,
        json=json,
    )
    if target.lower().endswith(".onnx"):
        return _fold_onnx(request)
    if ":" not in target or os.path.exists(target):
        hint = (
            f" Weights alone do not say how layers are connected: pass --weights {target}."
            if target.lower().endswith(WEIGHTS)
            else INSTEAD.get(Path(target).suffix.lower(), "")
        )
        raise ArgumentError(
            f"{target}: must be package.module:factory of a model, or a file that ends in "
            f".onnx.{hint}"
        )
    if verify is None and not shapes:
        raise ArgumentError(
            f"{target} must be run on example inputs: pass either --verify data.npz or --input "
            "with a shape such as 8x3x224x224, got neither."
        )
    require("A model", "torch", "torch")
    return _fold_model(request)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of `fold`, read."""

    target: str
    out: Path
    weights: Path | None
    verify: Path | None
    shapes: Sequence[str]
    dtype: str | None
    strict: bool
    tol: float | None
    json: Path | None

    def sizes(self) -> list[list[int]]:
        """The numbers of shapes such as "8x3x32x32"."""
        for shape in self.shapes:
            if not re.fullmatch(r"[1-9]\d{0,18}(x[1-9]\d{0,18})*", shape):
                raise ArgumentError(
                    "--input must be a shape of positive numbers that fits into memory, such as "
                    f"8x3x224x224, got {one_line(shape, 40)!r}."
                )
        return [[int(n) for n in shape.split("x")] for shape in self.shapes]

    def check_apart(self, sources: Sequence[Path], *data: Path) -> None:
        """Raise if a file that is written is one that is read, or another that is written.

        Parameters
        ----------
        sources
            What the target is read from.
        *data
            What is written besides `out` and `json`.
        """
        written = [("--out", self.out), *(("--out", each) for each in data), ("--json", self.json)]
        reads = [*(("TARGET", each) for each in sources), ("--weights", self.weights)]
        for option, path in written:
            for other, source in (*reads, ("--verify", self.verify)):
                if path is not None and source is not None and is_same(path, source):
                    raise ArgumentError(
                        f"{option} would replace what {other} reads, {source}. Name another file."
                    )
        if self.json is not None and any(is_same(self.json, each) for each in (self.out, *data)):
            raise ArgumentError(f"--out and --json must be two files, got {self.json} for both.")


def _fold_onnx(request: _Request) -> Folded:
    path, out = Path(request.target), request.out
    for option, value in {"--weights": request.weights, "--dtype": request.dtype}.items():
        if value:
            raise ArgumentError(
                f"{option} goes with package.module:factory; {path} has weights and types of its "
                "own."
            )
    if out.suffix.lower() != ".onnx":
        raise ArgumentError(f"--out must end in .onnx as {path} does, got {str(out)!r}.")
    if request.tol is not None and request.verify is None and not request.shapes:
        raise ArgumentError(
            "--tol is about outputs: pass --verify data.npz or --input to compare them."
        )
    check_place(out, "an ONNX file", "folded.onnx", "--out")
    require("Folding an ONNX model", "onnx", "onnx")
    from batchnorm.onnx import fold_file
    from batchnorm.onnx.files import data_files, data_path, has_batch_norms, read_model
    from batchnorm.onnx.fold.examples import check_inputs, in_order, random_inputs

    model = read_model(path)
    request.check_apart([path, *data_files(model, path.parent)], data_path(out))
    if not has_batch_norms(model):
        raise ArgumentError(
            f"{path}: has no batch norms. PyTorch's exporter folds them itself; export with "
            "dynamo=True and optimize=False, or with training=torch.onnx.TrainingMode.PRESERVE, to "
            "let this command do it and check it."
        )
    inputs: Any = None
    if request.verify is not None:
        inputs = in_order(read_inputs(request.verify), model)
    elif request.shapes:
        inputs = random_inputs(request.sizes(), model)
    if inputs is not None:
        try:
            check_inputs(model, inputs)
        except BatchNormError as error:  # of fold_file, it would name the model
            raise type(error)(f"{request.verify or '--input'}: {error}") from error
    report = fold_file(path, out, inputs, strict=request.strict, tol=request.tol)
    return Folded(report, [], [out, *sorted(data_files(read_model(out), out.parent))])


def _fold_model(request: _Request) -> Folded:
    import torch

    from batchnorm import torch as face
    from batchnorm.torch.fold.files import check_out, make_file
    from batchnorm.torch.targets import (
        example_of,
        is_untrained,
        load_model,
        other_types,
        random_example,
    )

    target, out, verify = request.target, request.out, request.verify
    check_out(out)
    sizes = request.sizes()
    request.check_apart([])
    wanted = None if request.dtype is None else getattr(torch, request.dtype)
    model = load_model(target, request.weights)
    try:
        model.eval()
    except NotImplementedError as error:  # of a program of torch.export
        raise ArgumentError(
            f"{target}: must return a model before its export, but {error}. Fold first, then "
            "export."
        ) from error
    source = getattr(sys.modules.get(target.partition(":")[0]), "__file__", None)
    request.check_apart([] if source is None else [Path(source)])
    if verify is None:
        example = random_example(sizes, model)
    else:
        example = example_of(read_inputs(verify), verify)
    with contextlib.redirect_stdout(sys.stderr):  # what models print is no report
        try:
            folded, report = face.fold(model, example, dtype=wanted)
        except BatchNormError:
            raise
        except Exception as error:  # whatever the model does on the example
            raise BatchNormError(
                f"{target}: the model cannot be run on {verify or ', '.join(request.shapes)}: "
                f"{type(error).__name__}: {error}.{other_types(example, model)}"
            ) from error
        if not (report.pairs or report.refused or report.alone):
            raise ArgumentError(f"{target}: has no batch norms that it calls: nothing to fold.")
        report.check_finite(request.dtype)
        if request.strict:
            report.check(request.tol)
        try:
            with steps(1) as step:
                step(f"making {out.name}")
                file = make_file(folded, example, out, report, wanted)
        except BatchNormError as error:
            raise NotWrittenError(str(error), report) from error
    if request.strict and file.missed:
        raise FoldError(
            f"what was exported was not compared, as strict demands: {file.missed}", report
        )
    tol = request.tol
    if tol is not None and file.error is not None and file.error > tol:
        raise FoldError(
            f"what was exported differs by {file.error:.3g} from the folded model, more than "
            f"{tol:.3g}",
            report,
        )
    try:
        file.write(out)
    except BatchNormError as error:
        raise NotWrittenError(str(error), report) from error
    notes = [] if request.weights else [f"no --weights: those that {target} gave were folded"]
    if is_untrained(model):
        notes.append("warning: every num_batches_tracked is 0: the model looks untrained")
    return Folded(report, notes + [f"{out}: {line}" for line in file.notes], [out], file.error)
