"""What ``batchnorm check`` and ``fold`` are given: a model by name, or a file of some kind."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from batchnorm.diagnose import RULES, Findings, examine
from batchnorm.diagnose.findings import page_of
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.extras import require
from batchnorm.folding import FoldError, FoldReport

__all__ = ["check", "explain", "fold"]

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
        f".parquet, {', '.join(WEIGHTS)}. Give the name of one of these."
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
) -> tuple[FoldReport, list[str]]:
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
        A .npz file of inputs.
    shapes
        Of random inputs, as in "1x3x224x224".
    dtype
        Of the folded model: float16, bfloat16 or float32.
    strict, tol
        As `batchnorm.torch.fold`; nothing is written then.

    Returns
    -------
    report
    notes
        What to know of the file.

    Raises
    ------
    FoldError
        With `strict`.
    BatchNormError
        Arguments do not go together, or something cannot be read, run or written.
    """
    if target.lower().endswith(".onnx"):
        model_only = {"--weights": weights, "--input": shapes, "--dtype": dtype}
        for option, value in model_only.items():
            if value:
                raise ArgumentError(
                    f"{option} goes with package.module:factory; {target} has weights and types "
                    "of its own, and takes inputs by --verify."
                )
        if out.suffix.lower() != ".onnx":
            raise ArgumentError(f"out must end in .onnx as {target} does, got {str(out)!r}.")
        if tol is not None and verify is None:
            raise ArgumentError("--tol is about outputs: pass --verify data.npz to compare them.")
        from batchnorm.onnx import fold_file, read_inputs

        inputs = None if verify is None else read_inputs(verify)
        return fold_file(Path(target), out, inputs, strict=strict, tol=tol), []
    if ":" not in target or os.path.exists(target):
        hint = (
            f" Weights alone do not say how layers are connected: pass --weights {target}."
            if target.lower().endswith(WEIGHTS)
            else ""
        )
        raise ArgumentError(
            f"{target}: must be package.module:factory of a model, or a file that ends in "
            f".onnx.{hint}"
        )
    if (verify is None) == (not shapes):
        raise ArgumentError(
            f"{target} must be run on example inputs: pass either --verify data.npz or --input "
            f"with a shape such as 8x3x224x224, got {'neither' if verify is None else 'both'}."
        )
    require("A model", "torch", "torch")
    return _fold_model(target, out, weights, verify, shapes, dtype, strict, tol)


def _fold_model(
    target: str,
    out: Path,
    weights: Path | None,
    verify: Path | None,
    shapes: Sequence[str],
    dtype: str | None,
    strict: bool,
    tol: float | None,
) -> tuple[FoldReport, list[str]]:
    import torch

    from batchnorm import torch as face
    from batchnorm.torch.fold.files import check_out, make_file
    from batchnorm.torch.targets import example_of, load_model, random_example

    check_out(out)
    for option, given in (("--weights", weights), ("--verify", verify)):
        if given is not None and given.exists() and out.exists() and given.samefile(out):
            raise ArgumentError(f"--out would replace what {option} reads, {given}. Name another.")
    wanted = None if dtype is None else getattr(torch, dtype)
    model = load_model(target, weights).eval()
    if verify is None:
        example = random_example(shapes, model)
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
                f"{type(error).__name__}: {error}."
            ) from error
        if strict:
            report.check(tol)
        file = make_file(folded, example, out, report, wanted)
    if strict and tol is not None and file.error is not None and file.error > tol:
        raise FoldError(
            f"what was exported differs by {file.error:.3g} from the folded model, more than "
            f"{tol:.3g}",
            report,
        )
    file.write(out)
    return report, file.notes
