"""What ``batchnorm check`` and ``fold`` are given: a model by name, or a file of some kind."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.atomic import check_place, is_same
from batchnorm.diagnose import RULES, Findings, examine
from batchnorm.diagnose.findings import page_of
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.extras import require
from batchnorm.folding import FoldError, FoldReport

__all__ = ["Folded", "NotWrittenError", "check", "explain", "fold"]

#: What to do with files of other kinds.
INSTEAD = {
    ".pt2": " A program has no modules any more: give the model that was exported.",
    ".keras": " Export it to ONNX first, by model.export('model.onnx', format='onnx').",
}
#: Types of a folded model, by all of their names.
TYPES = {
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float32": "float32", "fp32": "float32", "float": "float32",
}  # fmt: skip
WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def check(
    targets: Sequence[str],
    *,
    weights: Path | None = None,
    data: str | None = None,
    select: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    fix: bool = False,
    out: Path | None = None,
    allow_none: bool = False,
) -> Findings:
    """Findings of whatever `targets` name; the options from `weights` to `out` are for one model.

    Raises
    ------
    BatchNormError
        One is of no known kind, cannot be read, or needs a package that is not installed.
    """
    if len(targets) == 1 and ":" in targets[0] and not os.path.exists(targets[0]):
        require("A model", "torch", "torch")
        return _check_model(targets[0], weights, data, select, ignore, fix, out)
    allow_none = allow_none or len(targets) > 1
    found = [_check_file(target, select, ignore, allow_none) for target in targets]
    skipped = dict.fromkeys(text for findings in found for text in findings.skipped)
    return Findings(itertools.chain(*found), skipped=list(skipped))


def _check_file(
    target: str, select: Iterable[str] | None, ignore: Iterable[str] | None, allow_none: bool
) -> Findings:
    path = Path(target)
    suffix = path.suffix.lower()
    if suffix == ".py":
        from batchnorm.diagnose.source import check_source

        found = check_source(path, select, ignore, allow_none=allow_none)
        return Findings(found, skipped=["problems that show only when the model runs"])
    if suffix == ".parquet":
        from batchnorm.diagnose.recording import Recording

        return Findings(examine(Recording.load(path).network(), select, ignore))
    if suffix == ".onnx":
        from batchnorm.onnx import network_of_onnx

        return Findings(examine(network_of_onnx(path), select, ignore))
    if suffix in WEIGHTS:
        require("A file of weights", "torch", "torch")
        from batchnorm.torch.diagnose.weights import network_of_weights

        found = examine(network_of_weights(path), select, ignore)
        return Findings(found, skipped=["wiring, ε, momentum, and problems that show only on data"])
    raise ArgumentError(
        f"{target}: must be package.module:factory, alone, or a file that ends in .py, .onnx, "
        f".parquet, {', '.join(WEIGHTS)}."
        f"{INSTEAD.get(suffix) or ' Give the name of one of these.'}"
    )


def _check_model(
    target: str,
    weights: Path | None,
    data: str | None,
    select: Iterable[str] | None,
    ignore: Iterable[str] | None,
    fix: bool,
    out: Path | None,
) -> Findings:
    import torch

    from batchnorm import torch as face
    from batchnorm.atomic import explain_write_errors, replacing
    from batchnorm.torch.targets import load_batches, load_model

    model = load_model(target, weights)
    batches: Any = None if data is None else load_batches(data)
    if weights is not None:
        model.eval()  # it is finished
    try:
        found = face.check(model, batches, select=select, ignore=ignore, fix=fix)
    except BatchNormError:
        raise
    except Exception as error:  # whatever the model does on the data
        raise BatchNormError(
            f"{target}: the model cannot be run on {data or 'nothing'}: {type(error).__name__}: "
            f"{error}."
        ) from error
    if out is not None:
        with explain_write_errors(out), replacing(out) as beside:
            torch.save(model.state_dict(), beside)
    return found


def explain(code: str) -> str:
    """What a code means.

    Raises
    ------
    ArgumentError
        There is no such code.
    """
    for rule in RULES:
        if rule.code == code.upper():
            text = (rule.look.__doc__ or "").strip()
            return (
                f"{rule.code} {rule.title}\n\n{text}\n\nWhat to do: {rule.fix}.\n"
                f"Page: {page_of(rule.code)}"
            )
    raise ArgumentError(
        f"--explain takes the code of a finding, got {code!r}. The codes are "
        f"{', '.join(rule.code for rule in RULES)}."
    )


# ---- fold ---------------------------------------------------------------------------------------


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


class NotWrittenError(BatchNormError):
    """A model was folded, but the result cannot be written.

    Attributes
    ----------
    report : FoldReport
    """

    def __init__(self, message: str, report: FoldReport) -> None:
        super().__init__(message)
        self.report = report


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
    dtype = None if dtype is None else TYPES[dtype]
    reads = {"--weights": weights, "--verify": verify}
    if target.lower().endswith(".onnx"):
        return _fold_onnx(Path(target), out, reads, shapes, dtype, strict, tol, json)
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
    _check_example(target, verify, shapes)
    if verify is None and not shapes:
        raise ArgumentError(
            f"{target} must be run on example inputs: pass either --verify data.npz or --input "
            "with a shape such as 8x3x224x224, got neither."
        )
    require("A model", "torch", "torch")
    return _fold_model(target, out, reads, shapes, dtype, strict, tol, json)


def _check_example(target: str, verify: Path | None, shapes: Sequence[str]) -> None:
    if verify is not None and shapes:
        raise ArgumentError(
            f"{target} is run on one example: pass either --verify data.npz or --input with a "
            "shape such as 8x3x224x224, got both."
        )


def _sizes(shape: str) -> list[int]:
    """The numbers of a shape such as "8x3x32x32"."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ArgumentError(
            f"--input must be a shape of positive numbers such as 8x3x224x224, got {shape!r}."
        )
    return [int(n) for n in shape.split("x")]


def _check_apart(written: dict[str, Sequence[Path]], reads: dict[str, Sequence[Path]]) -> None:
    """Raise if a file that an option writes is one that is read, or another that is written."""
    options = list(written)
    for place, option in enumerate(options):
        for path in written[option]:
            for other, sources in reads.items():
                for source in sources:
                    if is_same(path, source):
                        raise ArgumentError(
                            f"{option} would replace what {other} reads, {source}. Name another "
                            "file."
                        )
            for other in options[place + 1 :]:
                for second in written[other]:
                    if is_same(path, second):
                        raise ArgumentError(
                            f"{option} and {other} must be two files, got {path} for both."
                        )


def _given(options: Mapping[str, Path | None]) -> dict[str, Sequence[Path]]:
    return {option: [path] for option, path in options.items() if path is not None}


def _fold_onnx(
    path: Path,
    out: Path,
    reads: Mapping[str, Path | None],
    shapes: Sequence[str],
    dtype: str | None,
    strict: bool,
    tol: float | None,
    json: Path | None,
) -> Folded:
    for option, value in {"--weights": reads["--weights"], "--dtype": dtype}.items():
        if value:
            raise ArgumentError(
                f"{option} goes with package.module:factory; {path} has weights and types of its "
                "own."
            )
    verify = reads["--verify"]
    _check_example(str(path), verify, shapes)
    if out.suffix.lower() != ".onnx":
        raise ArgumentError(f"--out must end in .onnx as {path} does, got {str(out)!r}.")
    if tol is not None and verify is None and not shapes:
        raise ArgumentError(
            "--tol is about outputs: pass --verify data.npz or --input to compare them."
        )
    check_place(out, "an ONNX file", "folded.onnx", "--out")
    from batchnorm.onnx import fold_file, read_inputs

    require("Folding an ONNX model", "onnx", "onnx")
    from batchnorm.onnx.files import data_files, data_path, has_batch_norms, read_model
    from batchnorm.onnx.fold.examples import in_order, random_inputs

    model = read_model(path)
    _check_apart(
        {"--out": [out, data_path(out)], **_given({"--json": json})},
        {"TARGET": [path, *data_files(model, path.parent)], **_given(reads)},
    )
    if not has_batch_norms(model):
        raise ArgumentError(
            f"{path}: has no batch norms. PyTorch's exporter folds them itself; export with "
            "optimize=False to let this command do it and check it."
        )
    inputs: Any = None
    if verify is not None:
        inputs = in_order(read_inputs(verify), model)
    elif shapes:
        inputs = random_inputs([_sizes(shape) for shape in shapes], model)
    try:
        report = fold_file(path, out, inputs, strict=strict, tol=tol)
    except FoldError as error:
        raise _of_options(error) from error
    return Folded(report, [], [out, *sorted(data_files(read_model(out), out.parent))])


def _of_options(error: FoldError) -> FoldError:
    """An error that names the option, not the argument of Python."""
    return FoldError(str(error).replace("strict=True", "--strict"), error.report)


def _fold_model(
    target: str,
    out: Path,
    reads: Mapping[str, Path | None],
    shapes: Sequence[str],
    dtype: str | None,
    strict: bool,
    tol: float | None,
    json: Path | None,
) -> Folded:
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

    check_out(out)
    sizes = [_sizes(shape) for shape in shapes]
    weights, verify = reads["--weights"], reads["--verify"]
    written = _given({"--out": out, "--json": json})
    _check_apart(written, _given(reads))
    wanted = None if dtype is None else getattr(torch, dtype)
    model = load_model(target, weights)
    try:
        model.eval()
    except NotImplementedError as error:  # of a program of torch.export
        raise ArgumentError(
            f"{target}: must return a model before its export, but {error}. Fold first, then "
            "export."
        ) from error
    source = getattr(sys.modules.get(target.partition(":")[0]), "__file__", None)
    _check_apart(written, _given({"TARGET": None if source is None else Path(source)}))
    if verify is None:
        example = random_example(sizes, model)
    else:
        from batchnorm.onnx import read_inputs

        example = example_of(read_inputs(verify), verify)
    with contextlib.redirect_stdout(sys.stderr):  # what models print is no report
        try:
            folded, report = face.fold(model, example, dtype=wanted)
        except BatchNormError:
            raise
        except Exception as error:  # whatever the model does on the example
            raise BatchNormError(
                f"{target}: the model cannot be run on {verify or ', '.join(shapes)}: "
                f"{type(error).__name__}: {error}.{other_types(example, model)}"
            ) from error
        if not (report.pairs or report.refused or report.alone):
            raise ArgumentError(f"{target}: has no batch norms that it calls: nothing to fold.")
        report.check_finite(dtype)
        if strict:
            try:
                report.check(tol)
            except FoldError as error:
                raise _of_options(error) from error
        try:
            file = make_file(folded, example, out, report, wanted)
        except BatchNormError as error:
            raise NotWrittenError(str(error), report) from error
    if strict and file.missed:
        raise FoldError(
            f"what was exported was not compared, as --strict demands: {file.missed}", report
        )
    if strict and tol is not None and file.error is not None and file.error > tol:
        raise FoldError(
            f"what was exported differs by {file.error:.3g} from the folded model, more than "
            f"{tol:.3g}",
            report,
        )
    try:
        file.write(out)
    except BatchNormError as error:
        raise NotWrittenError(str(error), report) from error
    notes = [] if weights else [f"no --weights: those that {target} gave were folded"]
    if is_untrained(model):
        notes.append("warning: every num_batches_tracked is 0: the model looks untrained")
    return Folded(report, notes + [f"{out}: {line}" for line in file.notes], [out], file.error)
