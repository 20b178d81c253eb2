"""The graphs of a model: what makes each value, where it goes, and how they are changed.

The protobuf message is changed in place, so that whatever is not touched stays as it is. onnx_ir,
which has the same chains of uses, drops sparse initializers and does not read every type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ...native import Array

__all__ = ["Graphs", "Refused", "Scope", "Use", "attributes"]

DOMAINS = ("", "ai.onnx")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


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
    """

    def __init__(self, model: ModelProto, read: Callable[[TensorProto], Array]) -> None:
        self.model, self._read = model, read
        self.scopes: list[Scope] = []
        self._labels: dict[int, str] = {}
        self._taken: set[str] = set()
        self._names: set[str] = set()
        self._functions = {(f.domain, f.name) for f in model.functions}
        opset = _opset(model)
        self.main = self._enter(Scope(model.graph, ("",), opset))
        for f in model.functions:
            self._enter(Scope(f, ("function", f.domain, f.name, f.overload), _opset(f) or opset))

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
            outputs = [value.name for value in graph.output]
        for node in scope.nodes:
            scope.producers.update((name, node) for name in node.output if name)
        self._names |= {*scope.inputs, *scope.initializers, *scope.sparse, *scope.producers}
        for place, node in enumerate(scope.nodes):
            self._label(scope, place, node)
            for name in node.input:
                self._use(scope, name, node)
            for attribute in node.attribute:
                for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    key = (*scope.key, *node.output, attribute.name, inner.name)
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
            and node.domain in DOMAINS
            and (node.domain, node.op_type) not in self._functions
        )

    def passes(self, scope: Scope, node: NodeProto | None) -> bool:
        """Whether a node returns its first input as it is: Identity, or Dropout in evaluation."""
        if self.is_op(node, "Identity"):
            return True
        if (
            node is None
            or not self.is_op(node, "Dropout")
            or any(map(scope.uses.get, node.output[1:]))
        ):
            return False
        if len(node.input) < 3 or not node.input[2]:
            return True
        try:
            return not self.constant(scope, node.input[2]).any()
        except Refused:
            return False

    def going(self, use: Use, scope: Scope) -> str:
        """Where a value goes, for messages."""
        if use.node is None:
            return "what the model returns" if use.scope is self.main else "what its graph returns"
        inside = "" if use.scope is scope else ", inside another node"
        return f"'{self.label(use.node)}' ({use.node.op_type}{inside})"

    def constant(self, scope: Scope, name: str) -> Array:
        """The values of a constant.

        Raises
        ------
        Refused
            It is none.
        """
        home = scope.find(name)
        if home is None:
            raise Refused(f"'{name}' is not defined")
        if name in home.initializers:
            if name in home.inputs and self.model.ir_version >= 4:
                raise Refused(
                    f"'{name}' is also an input of the model, so that callers may replace it"
                )
            return self._read(home.initializers[name])
        if name in home.sparse:
            raise Refused(f"'{name}' is a sparse initializer")
        if name in home.inputs:
            kind = "a parameter of a function" if home.is_function else "an input of its graph"
            raise Refused(f"'{name}' is {kind}, not a constant")
        node = home.producers[name]
        given = attributes(node)
        if self.is_op(node, "Constant"):
            for key, value in given.items():
                if isinstance(value, TensorProto):
                    return self._read(value)
                if key in ("value_float", "value_floats"):
                    return np.asarray(value, np.float32)
        elif self.is_op(node, "Identity"):
            return self.constant(home, node.input[0])
        elif self.is_op(node, "Transpose"):
            return np.transpose(self.constant(home, node.input[0]), given.get("perm"))
        elif self.is_op(node, "Cast") and given.get("to") in _FLOATS:
            values = self.constant(home, node.input[0])
            return values.astype(helper.tensor_dtype_to_np_dtype(given["to"]))
        elif self.is_op(node, "DequantizeLinear", "QuantizeLinear"):
            raise Refused(f"'{name}' is quantized, by '{self.label(node)}'")
        raise Refused(f"'{name}' is computed, by '{self.label(node)}' ({node.op_type})")

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
        place = next(i for i, each in enumerate(scope.nodes) if each is node)
        if place in scope.removed:
            return
        scope.removed.add(place)
        for name in node.output:
            if scope.producers.pop(name, None) is not None:
                scope.gone.add(name)
        for name in node.input:
            self.drop_use(scope, name, node)

    def drop_use(self, scope: Scope, name: str, node: NodeProto) -> None:
        """Note that a node does not use a value any more; a constant without uses is removed."""
        home = scope.find(name) if name else None
        if home is None:
            return
        uses = home.uses[name]
        del uses[next(i for i, use in enumerate(uses) if use.node is node)]
        if uses:
            return
        made = home.producers.get(name)
        if name in home.initializers and (name not in home.inputs or self.model.ir_version < 4):
            del home.initializers[name]
            home.inputs.discard(name)
            home.gone.add(name)
        elif made is not None and self.is_op(made, "Constant", "Identity", "Cast", "Transpose"):
            self.remove(home, made)

    def set_input(self, scope: Scope, node: NodeProto, place: int, name: str) -> None:
        """Give a node another input."""
        node.input.extend([""] * (place + 1 - len(node.input)))
        old = node.input[place]
        node.input[place] = name
        self._use(scope, name, node)
        self.drop_use(scope, old, node)

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
        """Remove from the message what has been removed, and what it says of that."""
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


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node by name; those that a function's caller gives are left out."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}


def _opset(model: Any) -> int:
    return max((o.version for o in model.opset_import if o.domain in DOMAINS), default=0)


def _drop(items: Any, names: set[str]) -> None:
    for place in reversed(range(len(items))):
        if items[place].name in names:
            del items[place]
