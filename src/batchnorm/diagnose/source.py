"""Records of the models in the text of a Python program, which is read and not run.

Looked at: `nn.Sequential(...)` with its layers, and classes whose `__init__` makes layers that
their `forward` calls. What the text leaves open (a bias given by a variable, a branch, a loop) is
taken for unknown, and unknown is no finding.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchnorm.errors import ArgumentError

from .findings import Finding
from .kinds import kind_of
from .records import Layer, Network, Operation
from .rules import examine

__all__ = ["check_source", "networks"]

#: Position of the bias among the arguments of a layer.
_BIAS = {"linear": 2, "convolution": 7}


def check_source(
    path: Path, select: Any = None, ignore: Any = None, *, allow_none: bool = False
) -> list[Finding]:
    """What the text of a program shows, with file and line.

    Raises
    ------
    ArgumentError
        It cannot be read, is no Python, or holds no batch norm and `allow_none` is not set.
    """
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "strerror", None) or getattr(error, "msg", None) or error
        raise ArgumentError(
            f"{path}: must be a readable Python file, but: {why}. Name another file."
        ) from error
    found: list[Finding] = []
    any_layer = False
    for network, lines in networks(tree):
        any_layer = True
        for finding in examine(network, select, ignore):
            line = lines.get(finding.layer, 1)
            found.append(replace(finding, where=(str(path), line)))
    if not any_layer and not allow_none:
        raise ArgumentError(
            f"{path}: no batch norm found in the text of this program. If its layers are made in a "
            "loop or elsewhere, check the model itself: package.module:factory. --allow-none makes "
            "this no error."
        )
    unique = {(f.code, f.where, f.layer): f for f in found}
    return sorted(unique.values(), key=lambda f: (f.where or ("", 0), f.code))


def networks(tree: ast.Module) -> Iterator[tuple[Network, dict[str, int]]]:
    """Each model in a program, and the lines of its layers."""
    if not _imports_torch(tree):
        return  # batch norm of another framework, with other defaults
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            reader = _Class(node)
            inside |= {n for n in ast.walk(node) if _is_sequential(n)} if reader.forward else set()
            if reader.forward and reader.network.layers:
                yield reader.network, reader.lines
    for node in ast.walk(tree):
        if _is_sequential(node) and node not in inside:
            alone = _Reader("Sequential")
            alone.sequence(node, "", None)  # type: ignore[arg-type]
            if alone.network.layers:
                yield alone.network, alone.lines
                inside |= {n for n in ast.walk(node) if _is_sequential(n)}


def _imports_torch(tree: ast.Module) -> bool:
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return any(name.split(".")[0] in ("torch", "batchnorm") for name in names)


def _is_sequential(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _callee(node) == "Sequential"


def _callee(node: ast.AST) -> str:
    """The last part of the name of what is called."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _constant(node: ast.expr | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


class _Reader:
    """Collects operations and layers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.operations: list[Operation] = []
        self.lines: dict[str, int] = {}
        self.network = Network(operations=self.operations)

    def add(self, kind: str, name: str, inputs: tuple[int, ...], bias: bool = False) -> int:
        """Append an operation."""
        self.operations.append(Operation(kind, name, inputs, bias))
        return len(self.operations) - 1

    def module(self, call: ast.Call, name: str, source: int | None) -> int:
        """The operation of a layer that `call` makes, on the result of `source`."""
        inputs = () if source is None else (source,)
        if _is_sequential(call):
            return self.sequence(call, name, source)
        kind = kind_of(_callee(call))
        keywords = {k.arg: k.value for k in call.keywords}
        if kind == "batch norm":
            self._layer(call, name, keywords)
        bias = False
        if kind in _BIAS:
            given = keywords.get("bias")
            if given is None and len(call.args) > _BIAS[kind]:
                given = call.args[_BIAS[kind]]
            unpacked = None in keywords or any(isinstance(a, ast.Starred) for a in call.args)
            bias = not unpacked and (given is None or _constant(given) is True)
            bias = bias and _callee(call).lower().startswith(("conv", "linear"))
        rate = call.args[0] if call.args else keywords.get("p")
        if kind == "dropout" and rate is not None and _constant(rate) == 0:
            kind = "identity"
        return self.add(kind, name, inputs, bias)

    def _layer(self, call: ast.Call, name: str, keywords: dict[str | None, ast.expr]) -> None:
        def given(position: int, key: str, default: Any) -> Any:
            node = call.args[position] if len(call.args) > position else keywords.get(key)
            return default if node is None else _constant(node)

        momentum, eps = given(2, "momentum", 0.1), given(1, "eps", 1e-5)
        number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool)
        self.network.layers.append(
            Layer(
                name=name,
                kind=_callee(call),
                momentum=float(momentum) if number else None,
                eps=float(eps) if isinstance(eps, (int, float)) else 1e-5,
            )
        )
        self.lines[name] = call.lineno

    def sequence(self, call: ast.Call, name: str, source: int | None) -> int:
        """The layers of a Sequential, one after another."""
        last = self.add("input", name, ()) if source is None else source
        for number, node in enumerate(call.args):
            path = f"{name}.{number}" if name else f"{number}"
            if isinstance(node, ast.Call):
                last = self.module(node, path, last)
            else:  # a list, a variable
                last = self.add("other", path, (last,))
        return last


class _Class(_Reader):
    """The operations of a class's forward."""

    def __init__(self, node: ast.ClassDef) -> None:
        super().__init__(node.name)
        functions = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}
        self.forward = functions.get("forward")
        self._made: dict[str, ast.Call] = {}
        twice: set[str] = set()  # in two branches, perhaps
        for statement in ast.walk(functions.get("__init__", ast.Module([], []))):
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
                for target in statement.targets:
                    if _of_self(target):
                        assert isinstance(target, ast.Attribute)
                        twice.update({target.attr} & self._made.keys())
                        self._made[target.attr] = statement.value
        for attribute in twice:
            del self._made[attribute]
        self._values: dict[str, int] = {}
        self._seen: set[str] = set()
        if self.forward is not None:
            for argument in self.forward.args.args[1:]:
                self._values[argument.arg] = self.add("input", argument.arg, ())
            for line in self.forward.body:
                self._statement(line)
        for attribute, call in self._made.items():  # those that forward does not call as such
            if kind_of(_callee(call)) == "batch norm" and attribute not in self._seen:
                keywords = {k.arg: k.value for k in call.keywords}
                self._layer(call, f"{self.name}.{attribute}", keywords)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            value = self._value(node.value)
            target = node.targets[0]
            if isinstance(target, ast.Name):
                self._values[target.id] = value
            else:
                self._forget(node)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            old = self._values.get(node.target.id)
            inputs = tuple(x for x in (old, self._value(node.value)) if x is not None)
            self._values[node.target.id] = self.add("add", "+=", inputs)
        elif isinstance(node, (ast.Return, ast.Expr)) and node.value is not None:
            self._value(node.value)
        elif not isinstance(node, (ast.Pass, ast.Assert)):
            self._forget(node)  # a branch, a loop

    def _forget(self, node: ast.stmt) -> None:
        """What a statement assigns is unknown, and what it reads is read."""
        read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & self._values.keys()
        unknown = self.add("other", "", tuple(self._values[name] for name in sorted(read)))
        for child in ast.walk(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                self._values[child.id] = unknown

    def _value(self, node: ast.expr) -> int:
        """The operation that makes a value."""
        if isinstance(node, ast.Name) and node.id in self._values:
            return self._values[node.id]
        if isinstance(node, ast.Call):
            return self._call(node)
        inputs = tuple(
            self._value(child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.expr)
        )
        added = isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))
        return self.add("add" if added else "other", "", tuple(dict.fromkeys(inputs)))

    def _call(self, node: ast.Call) -> int:
        name, function = _callee(node), node.func
        if _of_self(function) and name in self._made and node.args:
            source = self._value(node.args[0])
            self._seen.add(name)
            return self.module(self._made[name], f"{self.name}.{name}", source)
        arguments = [*node.args, *(k.value for k in node.keywords)]
        if isinstance(function, ast.Attribute):
            owner = function.value  # of a method, or a module
            if not isinstance(owner, ast.Name) or owner.id in self._values:
                arguments.insert(0, owner)
        inputs = tuple(
            self._value(a) for a in arguments if not isinstance(a, (ast.Constant, ast.Starred))
        )
        kind = kind_of(name)
        if kind == "batch norm" or _of_self(function):
            kind = "other"
        return self.add(kind, name, tuple(dict.fromkeys(inputs)))


def _of_self(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
