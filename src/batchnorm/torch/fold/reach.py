"""What the code of a module that cannot be followed may call inside of its modules, by its text.

Modules inside of an opaque module are followed on their own, as if they were called as a whole.
That is so if its code holds them only to call them: ``self.block(x)``, or ``block(x)`` in a loop
over ``self.blocks``. Where it could take one apart (``self.block[0](x)``, ``self.block.conv(x)``, a
loop over all modules), `may_take_apart` says so.
"""

from __future__ import annotations

import ast
import gc
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from functools import cache, cached_property, partial
from typing import Any, cast

from torch import nn

from .tracing import is_of_models

__all__ = ["functions_of", "may_take_apart", "references"]

# By these, code gets at modules whose names it does not mention.
_REFLECTION = {
    "modules", "children", "named_modules", "named_children", "_modules", "get_submodule",
    "__dict__", "__getattr__", "__getattribute__", "apply", "vars", "eval", "exec", "state_dict",
    "parameters", "named_parameters", "buffers", "named_buffers", "locals", "globals",
}  # fmt: skip
_UNREADABLE = partial(print)  # in place of a function whose decorator may do anything
_HARMLESS = {"isinstance", "len", "hasattr", "type", "checkpoint"}
_LOOPS = {"enumerate", "reversed", "zip", "list", "tuple", "items", "values"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def may_take_apart(owner: nn.Module, path: list[str]) -> bool:
    """Whether `owner` may itself call the module at `path` below it, by what its code says."""
    if len(path) == 1:
        return True  # its own layer
    code = None if "forward" in owner.__dict__ else _code_of(cast(Any, type(owner)))
    if code is None or code.reflects:
        return True
    inside_items = len(path) > 2 and isinstance(owner._modules[path[0]], _CONTAINERS)
    return not code.only_calls(path[0], items=inside_items)


class _Code:
    """The functions that a forward may run, as trees."""

    def __init__(self, functions: list[ast.Module]) -> None:
        self._functions = functions
        self._parents = {
            child: node
            for function in functions
            for node in ast.walk(function)
            for child in ast.iter_child_nodes(node)
        }
        self._selves = {
            function.args.args[0].arg
            for tree in functions
            for function in tree.body
            if isinstance(function, ast.FunctionDef)
            and function.args.args
            and "staticmethod" not in map(ast.unparse, function.decorator_list)
        }
        self.reflects = any(self._reflects(n) for f in functions for n in ast.walk(f))

    def _reflects(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Global):
            return True
        if isinstance(node, ast.Attribute):
            return node.attr in _REFLECTION
        if not isinstance(node, ast.Name):
            return False
        parent = self._parents.get(node)
        if node.id == "getattr":  # which is given `self`, and a name that may be computed
            return not (isinstance(parent, ast.Call) and self._is_called(parent))
        if node.id in self._selves and not isinstance(parent, ast.Attribute):  # given away
            return not self._is_harmless(parent) and _name(parent) not in ("getattr", "super")
        return node.id in _REFLECTION

    def _is_called(self, node: ast.AST) -> bool:
        parent = self._parents.get(node)
        return isinstance(parent, ast.Call) and (
            parent.func is node or (self._is_harmless(parent) and node in parent.args)
        )

    def _is_harmless(self, node: ast.AST | None) -> bool:
        """Whether this calls a function that does no more than call what it is given."""
        of = getattr(getattr(node, "func", None), "value", None)
        own = isinstance(of, ast.Name) and of.id in self._selves  # a method of that name
        return _name(node) in _HARMLESS and not own

    def only_calls(self, attribute: str, *, items: bool) -> bool:
        """Whether what this attribute holds is only called; or also its items, if `items`."""
        return all(
            self._is_called(node)
            or isinstance(self._parents.get(node), ast.Compare)
            or (items and self._calls_items(node, function))
            for function in self._functions
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and node.attr == attribute
        )

    def _calls_items(self, node: ast.AST, function: ast.AST) -> bool:
        """Whether this is a loop over a container whose items are called, or a call of one."""
        parent = self._parents.get(node)
        if isinstance(parent, ast.Subscript) and not isinstance(parent.slice, ast.Slice):
            return parent.value is node and self._is_called(parent)
        while not isinstance(parent, (ast.For, ast.comprehension)):
            name = parent.attr if isinstance(parent, ast.Attribute) else _name(parent)
            if not isinstance(parent, ast.Subscript) and name not in _LOOPS:
                return False
            parent = self._parents.get(parent) if parent is not None else None
        targets = {n.id for n in ast.walk(parent.target) if isinstance(n, ast.Name)}
        return all(
            self._is_called(use) or self._is_number(use)
            for use in ast.walk(function)
            if isinstance(use, ast.Name) and use.id in targets and isinstance(use.ctx, ast.Load)
        )

    def _is_number(self, use: ast.Name) -> bool:
        """Whether this is used as a number, as the index of a loop is, and no module."""
        parent = self._parents.get(use)
        if isinstance(parent, ast.Subscript):
            return parent.slice is use
        return isinstance(parent, (ast.Compare, ast.BinOp, ast.FormattedValue))


def _name(node: ast.AST | None) -> str:
    """The name of the function that is called."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def references(model: nn.Module) -> dict[str, str]:
    """What refers to modules besides the modules that they lie in: its type, by a module's name.

    Nothing but the caller may know the model.
    """
    modules = list(model.modules())
    names = {id(module): name for name, module in model.named_modules()}
    parents = {id(modules), *(id(module._modules) for module in modules)}
    return {
        names[id(held)]: type(holder).__name__
        for holder in gc.get_referrers(*modules)
        if id(holder) not in parents
        for held in gc.get_referents(holder)
        if id(held) in names
    }


@cache
def _code_of(kind: Any) -> _Code | None:
    """The text of all methods that a forward of this class may run; None if there is none."""
    if any(_is_defined(kind, name) for name in ("__call__", "__getattr__", "__getattribute__")):
        return None
    functions = functions_of(kind)
    if not all(inspect.isfunction(f) and f.__code__.co_argcount for f in functions):
        return None  # or a decorator that hands all arguments on
    try:
        texts = [textwrap.dedent(inspect.getsource(function)) for function in functions]
        return _Code(list(map(ast.parse, texts)))
    except (OSError, TypeError, SyntaxError):
        return None


@cache
def functions_of(kind: Any) -> list[Any]:
    """The methods that a forward of this class may run, and what is in place of some."""
    found: dict[Any, None] = {}
    names, queue = set[str](), ["forward"]
    while queue:
        name = queue.pop()
        if name not in names:
            names.add(name)
            for function in _definitions(kind, name):
                found[function] = None
                if inspect.isfunction(function):
                    queue += itertools.chain(*(code.co_names for code in _codes(function)))
    return list(found)


def _codes(function: Any) -> list[Any]:
    """The code of a function, and of those inside of it."""
    found = [function.__code__]
    for code in found:
        found += [const for const in code.co_consts if inspect.iscode(const)]
    return found


def _definitions(kind: type, name: str) -> Iterator[Any]:
    """The functions of this name in a class and its bases, but not those of `nn.Module`."""
    for base in kind.__mro__:
        if base is nn.Module:
            return
        found = base.__dict__.get(name)
        if isinstance(found, property):
            found = found.fget
        elif isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
        elif isinstance(found, cached_property):
            found = found.func
        while inspect.isfunction(found) and hasattr(found, "__wrapped__"):
            own = is_of_models(found.__code__.co_filename)  # not torch's, such as `no_grad`
            found = _UNREADABLE if own else found.__wrapped__
        if (callable(found) and not isinstance(found, type)) or hasattr(type(found), "__get__"):
            yield found


def _is_defined(kind: type, name: str) -> bool:
    """Whether a class or a base of it defines a name that `nn.Module` has."""
    return getattr(kind, name, None) is not getattr(nn.Module, name, None)
