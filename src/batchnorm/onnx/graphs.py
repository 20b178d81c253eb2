"""The graphs of a model: what makes each value, where it goes, and how they are changed.

The protobuf message is changed in place, so that whatever is not touched stays as it is. onnx_ir,
which has the same chains of uses, drops sparse initializers and does not read every type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx.reference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..errors import one_line
from ..native import Array

__all__ = ["About", "Graphs", "Refused", "Scope", "Use", "attributes", "opset_of"]

#: The two names of ONNX's own operators.
_DOMAINS = ("", "ai.onnx")
#: What weights are made of constants with. They have one output, and the same one in each run.
_CONSTANT = (
    "Add", "Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand",
    "Gather", "Identity", "Mul", "Neg", "Pow", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Reshape", "Shape", "Slice", "Sqrt", "Squeeze", "Sub",
    "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
#: The longest chain of these that is looked at, and the most values that grow out of fewer.
_DEPTH, _LARGE = 32, 1 << 20


class About(NamedTuple):
    """What is known of a value: its type, and its number of axes."""

    type: int
    rank: int | None


class Refused(Exception):
    """Why a batch norm cannot be folded."""


class Use(NamedTuple):
    """A place that a value goes to: a node, or the output of a graph if it is None."""

    scope: Scope
    node: NodeProto | None


@dataclass(eq=False)
class Scope:
    """A graph, a graph inside a node, or a function.

    Attributes
    ----------
    graph
        GraphProto or FunctionProto.
    key
        Tells it from the other scopes, also in a copy of the model.
    parent, owner, attribute
        For a graph inside a node: the scope of the node, the node, and which attribute it is.
    """

    graph: Any
    key: tuple[str, ...]
    opset: int
    parent: Scope | None = None
    owner: NodeProto | None = None
    attribute: str = ""
    nodes: list[NodeProto] = field(default_factory=list)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    sparse: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)
    annotated: set[str] = field(default_factory=set)  # with scales of a quantization
    removed: set[int] = field(default_factory=set)  # nodes, by their place
    gone: set[str] = field(default_factory=set)  # names of values
    retyped: set[str] = field(default_factory=set)  # whose shape may be another
    constants: list[NodeProto] = field(default_factory=list)  # that a function gets

    @property
    def is_function(self) -> bool:
        """Whether it is a function of the model."""
        return not isinstance(self.graph, GraphProto)

    def find(self, name: str) -> Scope | None:
        """The scope that a name is of, this one or one around it."""
        scope: Scope | None = self
        while scope is not None and not (
            name in scope.producers
            or name in scope.initializers
            or name in scope.inputs
            or name in scope.sparse
        ):
            scope = scope.parent
        return scope

    def names(self) -> set[str]:
        """All values that it defines."""
        return {*self.producers, *self.initializers, *self.inputs, *self.sparse}

    def alive(self) -> Iterator[NodeProto]:
        """The nodes that have not been removed."""
        for place, node in enumerate(self.nodes):
            if place not in self.removed:
                yield node


class Graphs:
    """All scopes of a model.

    Parameters
    ----------
    model
        Is changed by the methods below.
    read
        Returns the values of a tensor.
    about
        Returns what is known of a value of a scope; None if nothing is.
    """

    def __init__(
        self,
        model: ModelProto,
        read: Callable[[TensorProto], Array],
        about: Callable[[Scope, str], About | None] = lambda scope, name: None,
    ) -> None:
        self.model, self._read, self.about = model, read, about
        self._constants: dict[int, Array] = {}
        self.scopes: list[Scope] = []
        self._labels: dict[int, str] = {}
        self._taken: set[str] = set()
        self._names: set[str] = set()
        self.twice: set[str] = set()  # in a graph and in one inside it: runtimes differ then
        self._functions = {(f.domain, f.name) for f in model.functions}
        opset = opset_of(model)
        self.main = self._enter(Scope(model.graph, ("",), opset))
        for f in model.functions:
            self._enter(Scope(f, ("function", f.domain, f.name, f.overload), opset_of(f) or opset))

    def _enter(self, scope: Scope) -> Scope:
        graph = scope.graph
        self.scopes.append(scope)
        scope.nodes = list(graph.node)
        if scope.is_function:
            scope.inputs, outputs = set(graph.input), list(graph.output)
        else:
            scope.inputs = {value.name for value in graph.input}
            scope.initializers = {tensor.name: tensor for tensor in graph.initializer}
            scope.sparse = {tensor.values.name for tensor in graph.sparse_initializer}
            scope.annotated = {each.tensor_name for each in graph.quantization_annotation}
            outputs = [value.name for value in graph.output]
        for node in scope.nodes:
            scope.producers.update((name, node) for name in node.output if name)
        self._names |= scope.names()
        outer = scope.parent
        while outer is not None:
            self.twice |= scope.names() & outer.names()
            outer = outer.parent
        for place, node in enumerate(scope.nodes):
            self._label(scope, place, node)
            for name in node.input:
                self._use(scope, name, node)
            for attribute in node.attribute:
                inner_graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
                for number, inner in enumerate(inner_graphs):
                    key = (*scope.key, *node.output, attribute.name, str(number))
                    self._enter(Scope(inner, key, scope.opset, scope, node, attribute.name))
        for name in outputs:
            self._use(scope, name, None)
        return scope

    def _label(self, scope: Scope, place: int, node: NodeProto) -> None:
        """Name a node for the report: no two have one name."""
        output = next(filter(None, node.output), "")
        label = node.name or f"{node.op_type}_{place} (output '{output}')"
        if scope.is_function:
            label = f"{scope.graph.name}/{label}"
        if label in self._taken:
            label = f"{label} (output '{output}')"
        while label in self._taken:
            label += "'"
        self._labels[id(node)] = label
        self._taken.add(label)

    def _use(self, scope: Scope, name: str, node: NodeProto | None) -> None:
        home = scope.find(name) if name else None
        if home is not None:
            home.uses.setdefault(name, []).append(Use(scope, node))

    # ---- questions ------------------------------------------------------------------------------

    def label(self, node: NodeProto) -> str:
        """The name of a node in the report."""
        return self._labels[id(node)]

    def is_op(self, node: NodeProto | None, *kinds: str) -> bool:
        """Whether it is one of ONNX's own operators."""
        return (
            node is not None
            and node.op_type in kinds
            and node.domain in _DOMAINS
            and (node.domain, node.op_type) not in self._functions
        )

    def passed(self, scope: Scope, node: NodeProto | None) -> str:
        """The input that a node returns as it is; "" if it does something.

        Identity does nothing, nor does Dropout in evaluation, nor adding 0 (where Python's `sum`
        begins).
        """
        if node is None or not self.twice.isdisjoint((*node.input, *node.output)):
            return ""
        first, *rest = map(str, node.input) if node.input else [""]
        if self.is_op(node, "Identity"):
            return first
        if self.is_op(node, "Dropout") and not any(map(scope.uses.get, node.output[1:])):
            training = rest[1] if len(rest) > 1 else ""
            return first if not training or self._is_zero(scope, training) else ""
        if self.is_op(node, "Add"):
            if self._is_zero(scope, rest[0]):
                return first
            return rest[0] if self._is_zero(scope, first) else ""
        return ""

    def _is_zero(self, scope: Scope, name: str) -> bool:
        """Whether a value is the constant 0, without axes."""
        try:
            values = self.constant(scope, name)
        except Refused:
            return False
        return values.shape == () and not values.any()

    def going(self, use: Use, scope: Scope) -> str:
        """Where a value goes, for messages."""
        if use.node is None:
            return "what the model returns" if use.scope is self.main else "what its graph returns"
        inside = "" if use.scope is scope else ", inside another node"
        return f"'{self.label(use.node)}' ({use.node.op_type}{inside})"

    def check_plain(self, scope: Scope, node: NodeProto) -> None:
        """Raise `Refused` if more is said of a node than what it computes, or less."""
        if any(attribute.ref_attr_name for attribute in node.attribute):
            raise Refused(f"an attribute of '{self.label(node)}' is an argument of the function")
        if node.device_configurations:
            raise Refused(f"'{self.label(node)}' is distributed over devices")
        for name in (*node.input, *node.output):
            self._check_once(name)
            if (home := scope.find(name)) is not None and name in home.annotated:
                raise Refused(f"'{name}' has an annotation for its quantization")

    def _check_once(self, name: str) -> None:
        if name in self.twice:
            raise Refused(f"'{name}' is defined in a graph and again in one inside it")

    def constant(self, scope: Scope, name: str, depth: int = 0) -> Array:
        """The values of a constant, or of what exporters make of constants.

        Raises
        ------
        Refused
            It is none.
        """
        self._check_once(name)
        home = scope.find(name)
        if home is None:
            raise Refused(f"'{name}' is not defined")
        if name in home.initializers:
            if name in home.inputs and self.model.ir_version >= 4:
                raise Refused(f"'{name}' is also an input of the model, and callers may replace it")
            return self._read(home.initializers[name])
        if name in home.sparse:
            raise Refused(f"'{name}' is a sparse initializer")
        if name in home.inputs:
            kind = "a parameter of a function" if home.is_function else "an input of its graph"
            raise Refused(f"'{name}' is {kind}, not a constant")
        node = home.producers[name]
        if id(node) not in self._constants:
            values = self._evaluate(home, node, depth) if depth < _DEPTH else None
            if values is None:
                quantized = self.is_op(node, "DequantizeLinear", "QuantizeLinear")
                how = "quantized" if quantized else "computed"
                raise Refused(f"'{name}' is {how}, by '{self.label(node)}' ({node.op_type})")
            self._constants[id(node)] = values
        return self._constants[id(node)]

    def _evaluate(self, scope: Scope, node: NodeProto, depth: int) -> Array | None:
        """What a node returns whose inputs are constants; None if it is of another kind."""
        if not self.is_op(node, *_CONSTANT) or any(a.ref_attr_name for a in node.attribute):
            return None
        if node.op_type == "Constant" and "value" in (given := attributes(node)):
            return self._read(given["value"])
        if node.op_type == "CastLike":  # whose second input need not be a constant
            about = self.about(scope, node.input[1]) or About(TensorProto.UNDEFINED, None)
            node = helper.make_node("Cast", node.input[:1], node.output, to=about.type)
        values = {name: self.constant(scope, name, depth + 1) for name in node.input if name}
        try:
            return _computed(node, values, scope.opset)
        except Exception as error:  # of any operator
            raise Refused(f"'{node.output[0]}' cannot be computed ({one_line(error)})") from error

    def norms(self) -> Iterator[tuple[Scope, NodeProto]]:
        """The batch norms of all scopes."""
        for scope in self.scopes:
            for node in scope.alive():
                if self.is_op(node, "BatchNormalization"):
                    yield scope, node

    def parameters(self, scope: Scope, norm: NodeProto) -> list[Array]:
        """Scale, shift, mean and variance of a batch norm.

        Raises
        ------
        Refused
            They are not all there and constants.
        """
        if len(norm.input) != 5:
            raise Refused(f"'{self.label(norm)}' has {len(norm.input)} inputs in place of 5")
        return [self.constant(scope, name) for name in norm.input[1:]]

    def calls(self, function: Scope) -> list[tuple[Scope, NodeProto]]:
        """The nodes that call a function, and their scopes."""
        f = function.graph
        return [
            (scope, node)
            for scope in self.scopes
            for node in scope.nodes
            if (node.domain, node.op_type) == (f.domain, f.name)
            and getattr(node, "overload", "") == getattr(f, "overload", "")
        ]

    # ---- changes --------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """A name that is not taken, like the one given."""
        found, number = name, 0
        while found in self._names:
            number += 1
            found = f"{name}_{number}"
        self._names.add(found)
        return found

    def remove(self, scope: Scope, node: NodeProto) -> None:
        """Remove a node, and the constants that nothing else uses."""
        pending = [(scope, node)]
        while pending:
            scope, node = pending.pop()
            place = next(i for i, each in enumerate(scope.nodes) if each is node)
            if place in scope.removed:
                continue
            scope.removed.add(place)
            for name in node.output:
                if scope.producers.pop(name, None) is not None:
                    scope.gone.add(name)
            for name in node.input:
                pending += self._drop_use(scope, name, node)

    def _drop_use(self, scope: Scope, name: str, node: NodeProto) -> list[tuple[Scope, NodeProto]]:
        """Note that a node does not use a value any more.

        An initializer without uses is removed; a node that makes constants is to be.
        """
        home = scope.find(name) if name else None
        if home is None:
            return []
        uses = home.uses[name]
        del uses[next(i for i, use in enumerate(uses) if use.node is node)]
        if uses:
            return []
        made = home.producers.get(name)
        if name in home.initializers and (name not in home.inputs or self.model.ir_version < 4):
            del home.initializers[name]
            home.inputs.discard(name)
            home.gone.add(name)
        elif made is not None and self.is_op(made, *_CONSTANT):
            return [(home, made)]
        return []

    def set_input(self, scope: Scope, node: NodeProto, place: int, name: str) -> None:
        """Give a node another input."""
        node.input.extend([""] * (place + 1 - len(node.input)))
        old = node.input[place]
        node.input[place] = name
        self._use(scope, name, node)
        for each in self._drop_use(scope, old, node):
            self.remove(*each)

    def set_output(self, scope: Scope, node: NodeProto, name: str) -> None:
        """Let a node make a value whose former maker has been removed."""
        old = node.output[0]
        del scope.producers[old]
        scope.gone.add(old)
        node.output[0] = name
        scope.producers[name] = node

    def put(self, scope: Scope, node: NodeProto, place: int, values: Array, name: str) -> None:
        """Give a node a constant, under the name of the one that it replaces if that is free.

        It becomes an initializer of the model, or a Constant of the function that the node is in.
        """
        old = node.input[place] if place < len(node.input) else ""
        outermost = scope
        while outermost.parent is not None:
            outermost = outermost.parent
        home = scope.find(old) if old else None
        if home is self.main and old in home.initializers and len(home.uses[old]) == 1:
            home.initializers[old].CopyFrom(numpy_helper.from_array(values, old))
            home.retyped.add(old)
            if old in home.inputs:
                self._set_type(next(v for v in home.graph.input if v.name == old), values)
            return
        fresh = self.unique(f"{old}_folded" if old else name)
        tensor = numpy_helper.from_array(values, fresh)
        if outermost.is_function:
            constant = helper.make_node("Constant", [], [fresh], value=tensor)
            outermost.constants.append(constant)
            outermost.producers[fresh] = constant
        else:
            outermost.graph.initializer.append(tensor)
            outermost.initializers[fresh] = outermost.graph.initializer[-1]
            if self.model.ir_version < 4:
                outermost.inputs.add(fresh)
                self._set_type(outermost.graph.input.add(name=fresh), values)
        self.set_input(scope, node, place, fresh)

    def _set_type(self, value: Any, values: Array) -> None:
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        value.type.CopyFrom(helper.make_tensor_type_proto(kind, values.shape))

    def finish(self) -> None:
        """Make the message what the methods above have made of it."""
        for scope in self.scopes:
            graph = scope.graph
            for place in sorted(scope.removed, reverse=True):
                del graph.node[place]
            for constant in reversed(scope.constants):
                graph.node.insert(0, constant)
            known = {*scope.producers, *scope.initializers, *scope.inputs}
            _drop(graph.value_info, scope.gone - known | scope.retyped)
            if not scope.is_function:
                _drop(graph.initializer, scope.gone - known)
                _drop(graph.input, scope.gone - known)


def _computed(node: NodeProto, given: dict[str, Array], opset: int) -> Array:
    """What a node returns; ValueError if that may be far more than it gets."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for name, v in given.items()
    ]
    whole = [numpy_helper.from_array(v, n) for n, v in given.items() if v.dtype == np.int64]
    outputs = [onnx.ValueInfoProto(name=node.output[0])]
    graph = helper.make_graph([node], "constant", inputs, outputs, whole)
    graph.node[0].domain = ""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    shown = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    kind = shown.graph.output[0].type.tensor_type
    size = math.prod(d.dim_value if d.HasField("dim_value") else 1 << 62 for d in kind.shape.dim)
    if not kind.HasField("shape") or size > max((_LARGE, *(v.size for v in given.values()))):
        raise ValueError("it may have too many values")
    wide = dict.fromkeys(("float16", "bfloat16"), np.float32)  # in which sums keep their digits
    feeds = {n: v.astype(wide.get(v.dtype.name, v.dtype), copy=False) for n, v in given.items()}
    (found,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(found).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type), copy=False)


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node by name; those that a function's caller gives are left out."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}


def opset_of(model: Any) -> int:
    """The version of the operators in a model or function, 0 if it names none."""
    return max((o.version for o in model.opset_import if o.domain in _DOMAINS), default=0)


def _drop(items: Any, names: set[str]) -> None:
    for place in reversed(range(len(items))):
        if items[place].name in names:
            del items[place]
