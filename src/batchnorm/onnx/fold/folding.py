"""From a model to a folded one and its report, or to an error that leaves nothing behind."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from ...atomic import check_place
from ...errors import ArgumentError, BatchNormError
from ...folding import FoldReport
from ..files import Data, check, data_path, is_external, one_line, read_model, tensors, write_model
from .graphs import Graphs, Scope
from .layers import Folding
from .pairs import Pairs, Rank
from .verify import Runtime, check_inputs, compare_layers, compare_outputs

__all__ = ["fold", "fold_file"]


def fold_file(path: Path, out: Path, inputs: Any, *, strict: bool, tol: float | None) -> FoldReport:
    """See `batchnorm.onnx.fold_file`."""
    check_place(out, "an ONNX file", "folded.onnx")
    model = read_model(path)
    data = Data(path.parent)
    sources = {data.path_of(tensor) for tensor in tensors(model) if is_external(tensor)}
    for target in (out, data_path(out)):
        for source in (path, *sources):
            if os.path.exists(target) and os.path.samefile(target, source):
                raise ArgumentError(
                    f"out must be another file than the model and its data, got {str(out)!r}, "
                    f"which would replace {str(source)!r}. Name another."
                )
    try:
        check(str(path), False, "it")
        folded, report, full = fold(model, inputs, path.parent, strict=strict, tol=tol)
    except ArgumentError as error:
        raise type(error)(f"{path}: {error}") from error
    write_model(folded, out, data, full)
    return report


def fold(
    model: object, inputs: Any, folder: Path | None, *, strict: bool, tol: float | None
) -> tuple[ModelProto, FoldReport, bool]:
    """Fold a model whose data outside of it are in `folder`.

    Returns
    -------
    folded, report
    full : bool
        Whether the model passes the full check of the checker.
    """
    if not isinstance(model, ModelProto):
        raise ArgumentError(
            f"fold takes an onnx.ModelProto, got {type(model).__name__}. onnx.load(path) returns "
            "one."
        )
    if tol is not None and not (isinstance(tol, (int, float)) and tol >= 0):
        raise ArgumentError(f"tol must be a number that is not negative, or None, got {tol!r}.")
    if tol is not None and inputs is None:
        raise ArgumentError("tol must come with inputs: without them, nothing is compared.")
    data = Data(folder)
    full = _check(model, data)
    feeds = None if inputs is None else check_inputs(model, inputs)
    runtime = None if feeds is None else Runtime(folder)
    report, folded = _folded(model, data, feeds, runtime)
    if folder is None:
        check(folded, full, "the folded model")
    if feeds is not None and runtime is not None:
        _compare(report, model, folded, feeds, runtime)
    if strict:
        report.check(tol)
    return folded, report, full


def _check(model: ModelProto, data: Data) -> bool:
    """Raise unless the model can be read; whether it passes the full check, too."""
    for tensor in tensors(model):
        if is_external(tensor):
            data.bytes_of(tensor)
    if model.training_info:
        raise ArgumentError(
            "model must be one for inference, got one with training_info. Export it anew."
        )
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if versions and max(versions) < 9:
        raise ArgumentError(
            f"model must be of opset 9 or later, got {max(versions)}. "
            "onnx.version_converter.convert_version(model, 13) converts it."
        )
    if data.folder is None:
        check(model, False, "model")
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception:  # of inference, and of protobuf for more than 2 GB
        return False
    return True


def _folded(
    model: ModelProto, data: Data, feeds: list[Any] | None, runtime: Runtime | None
) -> tuple[FoldReport, ModelProto]:
    rank = _ranks(model)
    excluded: dict[str, str] = {}
    apart: set[tuple[Any, str]] = set()
    while True:
        graphs = _graphs(model, data)
        pairs = Pairs(graphs, rank, excluded, apart)
        problems: list[tuple[Folding, str]] = []
        for folding in pairs.foldings:
            try:
                folding.write(graphs)
            except BatchNormError as error:
                problems.append((folding, one_line(error)))
        if not problems and feeds is not None and runtime is not None and pairs.foldings:
            missed = compare_layers(_graphs(model, data), graphs, pairs.foldings, feeds, runtime)
            whys = [
                (f, missed.get(place) or ("" if missed else f.compare()))
                for place, f in enumerate(pairs.foldings)
            ]
            problems = [(folding, why) for folding, why in whys if why]
        if not problems:
            break
        for folding, why in problems:
            if len(folding.parts) > 1:
                apart.add((folding.scope.key, folding.node.output[0]))
            else:
                where = f"folded into '{folding.report.layer}', {why}"
                excluded.update(dict.fromkeys(folding.report.norms, where))
    graphs.finish()
    reports = [folding.report for folding in pairs.foldings]
    if feeds is None:
        for each in reports:
            each.error = each.relative_error = each.bound = each.share = math.nan
    dtypes = ", ".join(sorted({str(folding.dtype) for folding in pairs.foldings}))
    report = FoldReport(reports, pairs.refused, pairs.alone, dtypes, verified=feeds is not None)
    return report, graphs.model


def _graphs(model: ModelProto, data: Data) -> Graphs:
    copy = ModelProto()
    copy.CopyFrom(model)
    return Graphs(copy, data.read)


def _ranks(model: ModelProto) -> Rank:
    """Numbers of axes, from what the model says and from inference when it is first needed."""
    known: dict[tuple[tuple[str, ...], str], int] = {}
    inferred: list[bool] = []

    def note(scope: Scope) -> None:
        if not scope.is_function:
            graph = scope.graph
            for value in (*graph.value_info, *graph.output, *graph.input):
                if value.type.tensor_type.HasField("shape"):
                    known[scope.key, value.name] = len(value.type.tensor_type.shape.dim)

    def rank(scope: Scope, name: str) -> int | None:
        if not inferred:
            inferred.append(True)
            try:
                model_with = onnx.shape_inference.infer_shapes(model)
            except Exception:  # of inference, and of protobuf for more than 2 GB
                model_with = model
            for each in Graphs(model_with, Data(None).read).scopes:
                note(each)
        return known.get((scope.key, name))

    return rank


def _compare(
    report: FoldReport, model: ModelProto, folded: ModelProto, feeds: list[Any], runtime: Runtime
) -> None:
    """Run both models as wholes."""
    for optimized in (False, True):
        one, other = (
            runtime.outputs(each, feeds, what, optimized)
            for each, what in ((model, "the model"), (folded, "the folded model"))
        )
        error, relative = compare_outputs(one, other)
        if optimized:
            report.optimized_error = error
        else:
            report.error, report.relative_error = error, relative
