"""Records of the batch norms in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.diagnose.kinds import kind_of
from batchnorm.diagnose.records import Layer, Network, Operation, array
from batchnorm.errors import ArgumentError, one_line
from batchnorm.extras import require

if TYPE_CHECKING:
    from .graphs import Graphs, Scope

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
    from .files import Data, inferred, read_model
    from .graphs import Graphs

    model = read_model(path)
    network = Network(training=False, exported=True)
    try:
        graphs = Graphs(model, Data(path.parent).read)
        network.operations = _operations(graphs, (inferred(model) or model).graph)
        network.layers = [_layer(graphs, scope, node) for scope, node in graphs.norms()]
    except ArgumentError as error:  # of data outside of the file, for example
        raise ArgumentError(f"{path}: {error}") from error
    except Exception as error:  # whatever a damaged graph leads to
        raise ArgumentError(
            f"{path}: must be a valid ONNX model, but reading its graph fails ({one_line(error)})."
        ) from error
    if not network.layers:
        raise ArgumentError(
            f"{path}: must hold BatchNormalization nodes, got none: they have been folded into the "
            "weights, or the model had none. There is nothing to check."
        )
    return network


def _operations(graphs: Graphs, shown: Any) -> list[Operation]:
    """What the nodes of the main graph are; `shown` is it with inferred shapes."""
    scope, graph = graphs.main, graphs.main.graph
    kinds = {value.name: value.type.tensor_type for value in (*shown.value_info, *shown.output)}
    matrices = {name for name, kind in kinds.items() if len(kind.shape.dim) == 2}
    found: list[Operation] = []
    made: dict[str, int] = {}
    for given in graph.input:
        if given.name not in scope.initializers:
            made[given.name] = len(found)
            found.append(Operation("input", given.name))
    for node in graph.node:
        if node.op_type == "Constant":
            continue
        name = graphs.label(node)
        kind = kind_of(node.op_type)
        inputs = tuple(dict.fromkeys(made[i] for i in _read(node) if i in made))
        if node.input and not inputs:
            continue  # made of constants, as exporters write the zeros of a missing bias
        bias = kind in ("convolution", "linear") and len(node.input) > 2
        for output in node.output:
            made[output] = len(found)
        on_last_axis = node.op_type == "MatMul" and node.output[0] not in matrices
        found.append(Operation(kind, name, inputs, bias, on_last_axis))
    found += [Operation("output", o.name, (made[o.name],)) for o in graph.output if o.name in made]
    return found


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


def _layer(graphs: Graphs, scope: Scope, node: Any) -> Layer:
    from .graphs import Refused, attributes

    given, dtype = attributes(node), ""
    weight = bias = mean = var = None
    try:
        found = graphs.parameters(scope, node)
    except Refused:
        pass
    else:
        shapes = [values.shape for values in found]
        if len({*shapes}) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
            raise ArgumentError(
                f"'{graphs.label(node)}' must have scale, shift, mean and variance of one shape "
                f"(C,), got {', '.join(map(str, shapes))}. Export it anew."
            )
        weight, bias, mean, var = map(array, found)
        dtype = str(found[2].dtype)
    return Layer(
        name=graphs.label(node),
        kind=node.op_type,
        channels=0 if mean is None else len(mean),
        eps=float(given.get("epsilon", 1e-5)),
        momentum=None,
        training=bool(given.get("training_mode", 0)),
        trainable=False,
        dtype=dtype,
        mean=mean,
        var=var,
        weight=weight,
        bias=bias,
    )
