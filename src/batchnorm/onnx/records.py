"""Records of the batch norms in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchnorm.diagnose.kinds import kind_of
from batchnorm.diagnose.records import Layer, Network, Operation, array
from batchnorm.errors import ArgumentError
from batchnorm.extras import require

__all__ = ["network_of_onnx"]


def network_of_onnx(path: Path) -> Network:
    """What an ONNX file shows of its batch norms; nothing of it is run.

    Raises
    ------
    ArgumentError
        It cannot be read, or has no batch norms.
    BatchNormError
        onnx is not installed.
    """
    require("An ONNX file", "onnx", "onnx")
    import onnx
    from onnx import numpy_helper

    from .files import inferred

    try:
        model = onnx.load(str(path))
        graph = model.graph
        values = {
            tensor.name: numpy_helper.to_array(tensor, base_dir=str(path.parent))
            for tensor in graph.initializer
        }
    except Exception as error:  # protobuf's, and those of external data
        why = "there is no such file" if not path.exists() else f"it cannot be read ({error})"
        raise ArgumentError(f"{path}: must be an ONNX file, but {why}. Name another.") from error
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    values[node.output[0]] = numpy_helper.to_array(attribute.t)
    network = Network(training=False, exported=True)
    network.operations, layers = _operations(graph, values, (inferred(model) or model).graph)
    network.layers = [_layer(node, name, values) for node, name in layers]
    if not network.layers:
        raise ArgumentError(
            f"{path}: must hold BatchNormalization nodes, got none: they have been folded into the "
            "weights, or the model had none. There is nothing to check."
        )
    return network


def _operations(
    graph: Any, values: dict[str, Any], shown: Any
) -> tuple[list[Operation], list[Any]]:
    """What the nodes of a graph are, and its batch norms; `shown` is it with inferred shapes."""
    kinds = {value.name: value.type.tensor_type for value in (*shown.value_info, *shown.output)}
    matrices = {name for name, kind in kinds.items() if len(kind.shape.dim) == 2}
    found: list[Operation] = []
    layers: list[Any] = []
    made: dict[str, int] = {}
    for given in graph.input:
        if given.name not in values:
            made[given.name] = len(found)
            found.append(Operation("input", given.name))
    for number, node in enumerate(graph.node):
        if node.op_type == "Constant":
            continue
        name = node.name or f"{node.op_type}_{number}"
        kind = kind_of(node.op_type)
        inputs = tuple(dict.fromkeys(made[i] for i in _read(node) if i in made))
        if node.input and not inputs:
            continue  # made of constants, as exporters write the zeros of a missing bias
        bias = kind in ("convolution", "linear") and len(node.input) > 2
        if kind == "batch norm":
            layers.append((node, name))
        for output in node.output:
            made[output] = len(found)
        on_last_axis = node.op_type == "MatMul" and node.output[0] not in matrices
        found.append(Operation(kind, name, inputs, bias, on_last_axis))
    found += [Operation("output", o.name, (made[o.name],)) for o in graph.output if o.name in made]
    return found, layers


def _read(node: Any) -> Iterator[str]:
    """The values that a node reads, also those that graphs inside of it take from around it."""
    from .files import graphs_of

    yield from node.input[:1] if node.op_type == "CastLike" else node.input
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graphs_of(graph):
                yield from (value.name for value in inner.output)
                for each in inner.node:
                    yield from each.input


def _layer(node: Any, name: str, values: dict[str, Any]) -> Layer:
    attributes = {a.name: a.f if a.type == 1 else a.i for a in node.attribute}
    weight, bias, mean, var = (array(values.get(i)) for i in node.input[1:5])
    known = mean is not None and var is not None
    return Layer(
        name=name,
        kind=node.op_type,
        channels=0 if mean is None else len(mean),
        eps=float(attributes.get("epsilon", 1e-5)),
        momentum=None,
        training=bool(attributes.get("training_mode", 0)),
        trainable=False,
        dtype=str(values[node.input[3]].dtype) if known else "",
        mean=mean,
        var=var,
        weight=weight,
        bias=bias,
    )
