"""Records of the batch norms in an ONNX file."""

from __future__ import annotations

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

    try:
        graph = onnx.load(str(path)).graph
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
    network.operations, layers = _operations(graph, values)
    network.layers = [_layer(node, name, values) for node, name in layers]
    if not network.layers:
        raise ArgumentError(
            f"{path}: must hold BatchNormalization nodes, got none: they have been folded into the "
            "weights, or the model had none. There is nothing to check."
        )
    return network


def _operations(graph: Any, values: dict[str, Any]) -> tuple[list[Operation], list[Any]]:
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
        read = node.input[:1] if node.op_type == "CastLike" else node.input
        inputs = tuple(dict.fromkeys(made[i] for i in read if i in made))
        inside = any(a.HasField("g") for a in node.attribute)  # a graph, which reads more
        if node.input and not inputs and not inside:
            continue  # made of constants, as exporters write the zeros of a missing bias
        bias = kind in ("convolution", "linear") and len(node.input) > 2
        if kind == "batch norm":
            layers.append((node, name))
        for output in node.output:
            made[output] = len(found)
        found.append(Operation(kind, name, inputs, bias))
    found += [Operation("output", o.name, (made[o.name],)) for o in graph.output if o.name in made]
    return found, layers


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
