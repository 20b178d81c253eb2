"""Runs of the original and of the folded model by onnxruntime, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ...errors import ArgumentError, one_line
from ...extras import import_extra
from ...folding.sums import largest_difference
from ...native import Array, is_supported
from ..files import is_external, is_large, take_out
from ..graphs import Graphs, Refused, Scope
from .examples import Feed
from .layers import Folding

__all__ = ["Runtime", "compare_layers", "compare_outputs"]


class Runtime:
    """onnxruntime, on the CPU.

    Parameters
    ----------
    folder
        Of data outside of the models.
    """

    def __init__(self, folder: Path | None) -> None:
        self._ort = import_extra("onnxruntime", "onnx", "Comparisons of ONNX models")
        self._folder = folder

    def session(
        self, model: ModelProto, what: str, optimized: bool = False, threads: int = 0
    ) -> Any:
        """Prepare a model; `what` it is, for messages.

        Raises
        ------
        ArgumentError
            onnxruntime does not run it.
        """
        level = self._ort.GraphOptimizationLevel
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads  # 0: as many as there are cores
        options.log_severity_level = 4  # errors are raised as well
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        )
        if self._folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self._folder)
            )
        values: list[Any] = []
        if is_large(model):
            model, values = self._with_values_beside(model, options)
        try:
            session = self._ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            session.values = values  # which it does not copy
            return session
        except Exception as error:  # onnxruntime's have no base class of their own
            raise ArgumentError(f"onnxruntime cannot load {what}: {one_line(error)}") from error

    def _with_values_beside(self, model: ModelProto, options: Any) -> tuple[ModelProto, list[Any]]:
        """A copy that is not too large, and the values that are among the options instead."""
        small = ModelProto()
        small.CopyFrom(model)
        take_out(small.graph.initializer)
        pairs = zip(model.graph.initializer, small.graph.initializer, strict=True)
        taken = [tensor for tensor, left in pairs if is_external(left) != is_external(tensor)]
        values = [numpy_helper.to_array(tensor) for tensor in taken]
        beside = [self._ort.OrtValue.ortvalue_from_numpy(each) for each in values]
        options.add_external_initializers([tensor.name for tensor in taken], beside)
        return small, [*values, *beside]

    def outputs(self, model: ModelProto, feeds: list[Feed], what: str) -> tuple[list[Any], ...]:
        """What a model returns for each of the inputs: as it is, and optimized."""
        try:
            sessions = [self.session(model, what, optimized) for optimized in (False, True)]
        except ArgumentError as error:
            remedy = "Without inputs, nothing is run, and it can still be folded."
            raise ArgumentError(f"{error} {remedy}") from error
        try:
            plain, optimized = ([s.run(None, feed) for feed in feeds] for s in sessions)
        except Exception as error:
            raise ArgumentError(f"onnxruntime cannot run {what}: {one_line(error)}") from error
        return plain, optimized


# ---- each layer ---------------------------------------------------------------------------------


def compare_layers(
    original: Graphs, folded: Graphs, foldings: list[Folding], feeds: list[Feed], runtime: Runtime
) -> dict[int, str]:
    """Run the original model, and each folded layer on the inputs of what it replaces.

    Parameters
    ----------
    original
        Of a copy of the model, which gets more outputs.

    Returns
    -------
    dict
        Why foldings could not be compared, by their place.
    """
    scopes = {scope.key: scope for scope in original.scopes}
    seen: list[list[tuple[list[str], int]]] = []
    sessions = []
    problems = {}
    for place, folding in enumerate(foldings):
        names = [folding.node.input[0], folding.node.output[0]]
        try:
            seen.append(_expose(original, scopes[folding.scope.key], names, folding.dtype))
            # Each session has threads of its own, which wait in a loop.
            sessions.append(runtime.session(_alone(folded, folding), "it", threads=1))
        except (Refused, ArgumentError) as reason:
            problems[place] = str(reason)
    if problems:
        return problems
    names = [name for each in seen for pair, _ in each for name in pair]
    session = None
    for feed in feeds if names else ():
        try:
            session = session or runtime.session(original.model, "it with more outputs")
            values = dict(zip(names, session.run(names, feed), strict=True))
        except Exception as error:  # rounds of a loop, say, whose values differ in shape
            inside = [place for place, f in enumerate(foldings) if f.scope.owner is not None]
            unseen = f"it cannot be compared ({one_line(error)})"
            return dict.fromkeys(inside or range(len(foldings)), unseen)
        for place, folding in enumerate(foldings):
            for (x, y), depth in seen[place]:
                for step in np.ndindex(values[x].shape[:depth]):
                    given, expected = values[x][step], values[y][step]
                    if not given.size or not expected.size:
                        continue
                    try:
                        folding.add(given, expected, *sessions[place].run(None, {"x": given}))
                    except Exception as error:  # onnxruntime's, or shapes that differ
                        problems[place] = f"it cannot be compared ({one_line(error)})"
    return problems


def _expose(
    graphs: Graphs, scope: Scope, names: list[str], dtype: Any
) -> list[tuple[list[str], int]]:
    """Make values outputs of the model.

    Returns
    -------
    list
        Names of outputs, for each call of the function that the values are in, and how many axes
        of the outputs count the rounds of loops around it.
    """
    return _lift(graphs, scope, [_copy(graphs, scope.graph, name) for name in names], dtype)


def _copy(graphs: Graphs, graph: Any, name: str) -> str:
    """Copy a value, and hide its shape: up to opset 10, the branches of an If must agree in it."""
    shape, copy = graphs.unique(name), graphs.unique(name)
    graph.node.append(helper.make_node("Shape", [name], [shape]))
    graph.node.append(helper.make_node("Reshape", [name, shape], [copy]))
    return copy


def _lift(
    graphs: Graphs, scope: Scope, names: list[str], dtype: Any
) -> list[tuple[list[str], int]]:
    before = len(scope.graph.output)
    if scope.is_function:
        scope.graph.output.extend(names)
        found = []
        for caller, node in graphs.calls(scope):
            found += _lift(graphs, caller, _more_outputs(graphs, node, before, names), dtype)
        return found
    for name in names:
        scope.graph.output.add(name=name)
    owner, outer = scope.owner, scope.parent
    if owner is None or outer is None:
        return [(names, 0)]
    rounds = 0
    if graphs.is_op(owner, "If"):
        (other,) = (a.g for a in owner.attribute if a.name != scope.attribute)
        for name in names:
            empty, value = graphs.unique(name), numpy_helper.from_array(np.zeros(0, dtype))
            other.node.append(helper.make_node("Constant", [], [empty], value=value))
            other.output.add(name=_copy(graphs, other, empty))
    elif graphs.is_op(owner, "Loop", "Scan"):
        rounds = 1
        before -= owner.op_type == "Loop"  # whose body also returns the condition
    else:
        raise Refused(f"inside '{graphs.label(owner)}' ({owner.op_type}), it cannot be compared")
    lifted = _lift(graphs, outer, _more_outputs(graphs, owner, before, names), dtype)
    return [(each, depth + rounds) for each, depth in lifted]


def _more_outputs(graphs: Graphs, node: NodeProto, before: int, names: list[str]) -> list[str]:
    """Give a node outputs behind the `before` that it may have."""
    more = [graphs.unique(name) for name in names]
    node.output.extend([""] * (before - len(node.output)) + more)
    return more


def _alone(graphs: Graphs, folding: Folding) -> ModelProto:
    """A model that consists of a folded layer."""
    node = NodeProto()
    node.CopyFrom(folding.node)
    weights = [
        numpy_helper.from_array(np.asarray(graphs.constant(folding.scope, name)), f"weight_{place}")
        for place, name in enumerate(node.input[1:])
    ]
    del node.input[:], node.output[:]
    node.input.extend(["x", *(weight.name for weight in weights)])
    node.output.append("y")
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(folding.dtype))
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", kind, None)],
        [onnx.ValueInfoProto(name="y")],
        weights,
    )
    opset = [helper.make_opsetid("", folding.scope.opset)]
    ir_version = max(graphs.model.ir_version, 4)
    return helper.make_model(graph, opset_imports=opset, ir_version=ir_version)


# ---- the whole model ----------------------------------------------------------------------------


def compare_outputs(one: Sequence[Any], other: Sequence[Any]) -> tuple[float | None, float | None]:
    """Largest difference of the real arrays in two lists of outputs, and that over the largest."""
    a, b = ([v for v in _arrays(outputs) if is_supported(v.dtype)] for outputs in (one, other))
    return largest_difference(a, b)


def _arrays(value: Any) -> Iterable[Array]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _arrays(item)
