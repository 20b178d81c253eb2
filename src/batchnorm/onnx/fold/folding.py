"""From a model to a folded one and its report, or to an error that leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from ...atomic import check_place, is_same
from ...errors import ArgumentError, BatchNormError, DTypeError, ShapeError, one_line
from ...folding import FoldReport
from ...folding.report import check_tol
from ...progress import steps
from ..files import (
    Data,
    check,
    data_files,
    data_path,
    inferred,
    is_external,
    read_model,
    tensors,
    write_model,
)
from ..graphs import About, Graphs, Scope, opset_of
from .examples import check_inputs
from .layers import Folding
from .pairs import Pairs
from .verify import Runtime, compare_layers, compare_outputs

__all__ = ["fold", "fold_file"]

#: Of which `fold` tells, if there are inputs and nothing has to be taken back.
_STEPS = 6


def fold_file(
    path: Path, out: Path, inputs: Any, *, strict: bool, tol: float | None, progress: bool
) -> FoldReport:
    """See `batchnorm.onnx.fold_file`."""
    check_place(out, "an ONNX file", "folded.onnx")
    model = read_model(path)
    data = Data(path.parent)
    for target in (out, data_path(out)):
        for source in (path, *data_files(model, path.parent)):
            if is_same(target, source):
                raise ArgumentError(
                    f"out must be another file than the model and its data, got {str(out)!r}, "
                    f"which would replace {str(source)!r}. Name another."
                )
    try:
        folded, report = fold(model, inputs, path.parent, strict=strict, tol=tol, progress=progress)
    except (ArgumentError, DTypeError, ShapeError) as error:
        raise type(error)(f"{path}: {error}") from error
    report.check_finite()
    write_model(folded, out, data)
    return report


def fold(
    model: object,
    inputs: Any,
    folder: Path | None,
    *,
    strict: bool,
    tol: float | None,
    progress: bool,
) -> tuple[ModelProto, FoldReport]:
    """Fold a model whose data outside of it are in `folder`."""
    if not isinstance(model, ModelProto):
        raise ArgumentError(
            f"fold takes an onnx.ModelProto, got {type(model).__name__}. onnx.load(path) returns "
            "one."
        )
    check_tol(tol, strict=strict)
    if tol is not None and inputs is None:
        raise ArgumentError("tol must come with inputs: without them, nothing is compared.")
    data = Data(folder)
    with steps(_STEPS if inputs is not None else 3, shown=progress) as step:
        step("fold: checking the model")
        _check(model, data)
        feeds = None if inputs is None else check_inputs(model, inputs)
        runtime = None if feeds is None else Runtime(folder)
        if runtime is not None:
            step("fold: running the model")
            before = runtime.outputs(model, feeds or [], "the model")
        with np.errstate(all="ignore"):  # what is not finite is found later
            report, folded = _folded(model, data, feeds, runtime, step)
        step("fold: checking the folded model")
        check(folded, inferred(model) is not None, "the folded model")
        if runtime is not None:
            step("fold: running the folded model")
            after = runtime.outputs(folded, feeds or [], "the folded model")
    if runtime is not None:
        (report.error, report.relative_error), (report.optimized_error, _) = (
            compare_outputs(one, other) for one, other in zip(before, after, strict=True)
        )
        if report.pairs and (why := _too_far(report, before)):
            refused = {**report.refused, **dict.fromkeys(report.folded, why)}
            report = FoldReport([], refused, report.alone, "", 0.0, 0.0, 0.0)
            folded = _copy(model)
    if strict:
        report.check(tol)
    return folded, report


def _check(model: ModelProto, data: Data) -> None:
    """Raise unless the model can be read, is valid, and can be folded."""
    for tensor in tensors(model):
        if is_external(tensor):
            data.bytes_of(tensor)
    if model.training_info:
        raise ArgumentError(
            "model must be one for inference, got one with training_info. Export it anew."
        )
    if 0 < (opset := opset_of(model)) < 9:
        raise ArgumentError(
            f"model must be of opset 9 or later, got {opset}. "
            "onnx.version_converter.convert_version(model, 13) converts it."
        )
    newest, latest = onnx.defs.onnx_opset_version(), max(map(opset_of, (model, *model.functions)))
    if latest > newest:
        raise ArgumentError(
            f"model must be of opset {newest} or earlier, the newest that onnx {onnx.__version__} "
            f"knows, got {latest}. Install a newer onnx."
        )
    check(model, False, "model")


def _folded(
    model: ModelProto,
    data: Data,
    feeds: list[Any] | None,
    runtime: Runtime | None,
    step: Callable[[str], None],
) -> tuple[FoldReport, ModelProto]:
    about = _known(model)
    excluded: dict[str, str] = {}
    apart: set[tuple[Any, str]] = set()
    whys_apart: dict[str, str] = {}
    while True:
        step("fold: folding")
        graphs = Graphs(_copy(model), data.read, about)
        pairs = Pairs(graphs, excluded, apart)
        problems: list[tuple[Folding, str]] = []
        for folding in pairs.foldings:
            try:
                folding.write(graphs)
            except BatchNormError as error:
                problems.append((folding, one_line(error)))
        if not problems and feeds is not None and runtime is not None and pairs.foldings:
            step("fold: comparing layers")
            missed = compare_layers(
                Graphs(_copy(model), data.read), graphs, pairs.foldings, feeds, runtime
            )
            whys = [
                (f, missed.get(place) or ("" if missed else f.problem()))
                for place, f in enumerate(pairs.foldings)
            ]
            problems = [(folding, why) for folding, why in whys if why]
        if not problems:
            break
        for folding, why in problems:
            where = f"folded into '{folding.report.layer}', {why}"
            reasons = dict.fromkeys(folding.report.norms, where)
            if folding.sums:
                apart.update((folding.scope.key, name) for name in folding.sums)
                whys_apart.update(reasons)
            else:
                excluded.update(reasons)
    graphs.finish()
    reports = [folding.report for folding in pairs.foldings]
    if feeds is None:
        for each in reports:
            each.error = each.relative_error = each.bound = each.share = math.nan
    dtypes = ", ".join(sorted({str(folding.dtype) for folding in pairs.foldings}))
    kept = {norm: why for norm, why in whys_apart.items() if pairs.alone.pop(norm, "")}
    refused = {**pairs.refused, **kept}
    report = FoldReport(reports, refused, pairs.alone, dtypes, verified=feeds is not None)
    return report, graphs.model


def _too_far(report: FoldReport, before: tuple[list[Any], ...]) -> str:
    """Why outputs differ by far more than by rounding, though each layer is within its bound.

    Some networks magnify rounding by thousands. Half of the largest output is beyond that, unless
    optimizations change the original's as well, as where a rounded value chooses a branch.
    """
    if not 0.5 < (report.relative_error or 0.0) < math.inf or report.error is None:
        return ""
    own = compare_outputs(*before)[0] or 0.0
    if report.error <= 64 * own:
        return ""
    return (
        f"folded, outputs of the model would differ by {report.error:.3g}, far more than by "
        f"rounding ({own:.3g}): something uses its layers in a way that cannot be seen"
    )


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _known(model: ModelProto) -> Callable[[Scope, str], About | None]:
    """Types and numbers of axes of values, which are inferred when the first is asked for."""

    @cache
    def known() -> dict[tuple[tuple[str, ...], str], About]:
        found = {}
        for scope in Graphs(inferred(model) or ModelProto(), Data(None).read).scopes:
            if scope.is_function:
                continue
            graph = scope.graph
            for value in (*graph.input, *graph.value_info, *graph.output):
                kind = value.type.tensor_type
                rank = len(kind.shape.dim) if kind.HasField("shape") else None
                found[scope.key, value.name] = About(kind.elem_type, rank)
        return found

    return lambda scope, name: known().get((scope.key, name))
