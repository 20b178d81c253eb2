"""A module's forward read from its source, as a graph: nothing of the module is run.

Tracing sees one run of a forward; what it saw may have been decided by a flag, a random number, the
mode, or be hidden by a decorator, and running it may change something. Here a forward is taken by
its text, and only where that is plain enough to say what every run of it does: assignments of
calls of its children, of some functions of torch's, and of sums; and questions whether a child is
None. Whatever else there is, it is refused.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn import functional as F

__all__ = ["Reading", "UnreadableError", "check_reach", "functions_of", "read"]

# Functions and methods that do nothing but compute; what they change in place ends in "_".
_NAMES = """
    flatten cat concat stack add sub mul div matmul bmm relu sigmoid tanh softmax log_softmax
    dropout dropout1d dropout2d dropout3d alpha_dropout max_pool1d max_pool2d max_pool3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate pad silu gelu mish
    hardswish hardsigmoid hardtanh leaky_relu elu selu celu relu6 softplus mean sum normalize
    pixel_shuffle squeeze unsqueeze transpose permute reshape relu_ leaky_relu_
""".split()  # noqa: SIM905
_FUNCTIONS = {
    id(function): function
    for name in _NAMES
    for function in (getattr(torch, name, None), getattr(F, name, None))
    if function is not None
}
_METHODS = """
    flatten add sub mul div relu sigmoid tanh softmax mean sum view reshape squeeze unsqueeze
    transpose permute contiguous size dim float half to relu_ add_ mul_ sub_ div_
""".split()  # noqa: SIM905
_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.MatMult: operator.matmul,
}  # fmt: skip
_IN_PLACE: dict[type[ast.AST], Any] = {
    ast.Add: operator.iadd, ast.Sub: operator.isub, ast.Mult: operator.imul,
    ast.Div: operator.itruediv,
}  # fmt: skip


class UnreadableError(Exception):
    """Why a forward cannot be read."""


class Reading:
    """What a forward does.

    Attributes
    ----------
    graph : torch.fx.Graph
        One node for each thing it computes; children are called by name.
    decided : dict of str to bool or int
        The children that it depends on: whether each was None, or of how many it consisted.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.decided: dict[str, bool | int] = {}


_NOTHING = object()


class _Child(str):
    """A child module by its dotted name, where a name of the forward stands for it."""


def read(module: nn.Module) -> Reading:
    """The graph of a module's forward.

    Raises
    ------
    UnreadableError
        With the reason in words.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnreadableError("is compiled to TorchScript")
    if "forward" in module.__dict__:
        raise UnreadableError("has been replaced")
    for name in ("__call__", "__getattr__", "__getattribute__", "__setattr__"):
        if inspect.getattr_static(type(module), name) is not inspect.getattr_static(
            nn.Module, name
        ) and not type(module).__module__.startswith("torch.nn."):
            raise UnreadableError(f"is not all: the class has a {name} of its own")
    forward = inspect.getattr_static(type(module), "forward", None)
    if forward is nn.Sequential.forward:
        return _sequence(module)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return Reading()  # without a forward; whoever uses it is further up
    if not inspect.isfunction(forward) or hasattr(forward, "__wrapped__"):
        raise UnreadableError("is not a plain function")
    return _Reader(module, forward).reading


def _sequence(module: nn.Module) -> Reading:
    reading = Reading()
    value: Any = reading.graph.placeholder("input")
    for name in module._modules:
        value = reading.graph.call_module(name, (value,))
    reading.graph.output(value)
    return reading


class _Reader:
    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.module, self.globals = module, forward.__globals__
        self.reading = Reading()
        self.graph = self.reading.graph
        self.names: dict[str, Any] = {}
        self.depth = 0  # of methods inside methods
        function = _definition(forward)
        self.me = self.arguments(function)
        result = self.block(function.body)
        if result is _NOTHING:
            raise UnreadableError("does not return anything")
        self.graph.output(result)

    def refuse(self, node: ast.AST) -> NoReturn:
        text = ast.unparse(node).splitlines()[0]
        raise UnreadableError(f"has `{text[:60]}`, which can mean anything")

    def arguments(self, function: ast.FunctionDef) -> str:
        a = function.args
        if a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or not a.args:
            raise UnreadableError("takes more than plain arguments")
        me, *others = [arg.arg for arg in a.args]
        none: tuple[Any, ...] = (inspect.Signature.empty,)
        defaults = none * (len(others) - len(a.defaults)) + tuple(
            d.value if isinstance(d, ast.Constant) else self.refuse(d) for d in a.defaults
        )
        for name, default in zip(others, defaults, strict=True):
            self.names[name] = self.graph.placeholder(name, default_value=default)
        return me

    # ---- statements -----------------------------------------------------------------------------

    def block(self, statements: list[ast.stmt]) -> Any:
        """Read statements; what they return, or _NOTHING."""
        for i, s in enumerate(statements):
            if isinstance(s, ast.Return) and s.value is not None:
                return self.value(s.value)
            if isinstance(s, ast.If):
                result = self.block(s.body if self.holds(s.test) else s.orelse)
                if result is not _NOTHING:
                    return result
            elif isinstance(s, ast.Assign) and len(s.targets) == 1:
                self.assign(s.targets[0], s.value)
            elif isinstance(s, ast.AnnAssign) and s.value is not None:
                self.assign(s.target, s.value)
            elif isinstance(s, ast.AugAssign) and type(s.op) in _IN_PLACE:
                self.augment(s)
            elif isinstance(s, ast.For):
                self.loop(s)
            elif not (
                isinstance(s, ast.Pass)
                or (i == 0 and isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ):
                self.refuse(s)
        return _NOTHING

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Name) or target.id == self.me:
            self.refuse(target)
        self.names[target.id] = self.value(value)

    def augment(self, s: ast.AugAssign) -> None:
        if not isinstance(s.target, ast.Name):
            self.refuse(s)
        before = self.names.get(s.target.id)
        if not isinstance(before, fx.Node):
            self.refuse(s)
        function = _IN_PLACE[type(s.op)]
        self.names[s.target.id] = self.graph.call_function(function, (before, self.value(s.value)))

    def loop(self, s: ast.For) -> None:
        path = self.child(s.iter)
        container = None if path is None else self.module.get_submodule(path)
        if (
            s.orelse
            or not isinstance(s.target, ast.Name)
            or type(container) not in (nn.ModuleList, nn.Sequential)
            or any(isinstance(n, (ast.Return, ast.Break, ast.Continue)) for n in ast.walk(s))
        ):
            self.refuse(s)
        assert container is not None
        assert path is not None
        self.reading.decided[path] = len(container._modules)
        for name in container._modules:
            self.names[s.target.id] = _Child(f"{path}.{name}")
            self.block(s.body)

    def holds(self, test: ast.expr) -> bool:
        """Whether a child is None or not None, which is all that may be asked."""
        if (
            isinstance(test, ast.Compare)
            and len(test.ops) == 1
            and isinstance(test.ops[0], (ast.Is, ast.IsNot))
            and isinstance(test.comparators[0], ast.Constant)
            and test.comparators[0].value is None
            and isinstance(test.left, ast.Attribute)
            and isinstance(test.left.value, ast.Name)
            and test.left.value.id == self.me
        ):
            name = test.left.attr
            if name in self.module._modules:
                none = self.module._modules[name] is None
            elif name in self.module.__dict__ and self.module.__dict__[name] is None:
                none = True
            else:
                self.refuse(test)
            self.reading.decided[name] = none
            return none is isinstance(test.ops[0], ast.Is)
        self.refuse(test)

    # ---- expressions ----------------------------------------------------------------------------

    def value(self, e: ast.expr) -> Any:
        if isinstance(e, ast.Constant):
            return e.value
        if isinstance(e, ast.Name) and e.id != self.me and e.id in self.names:
            known = self.names[e.id]
            return self.refuse(e) if isinstance(known, _Child) else known
        if isinstance(e, ast.Tuple):
            return tuple(self.value(x) for x in e.elts)
        if isinstance(e, ast.List):
            return [self.value(x) for x in e.elts]
        if isinstance(e, ast.Dict) and all(isinstance(k, ast.Constant) for k in e.keys):
            keys = [k.value for k in e.keys if isinstance(k, ast.Constant)]
            return dict(zip(keys, map(self.value, e.values), strict=True))
        if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
            operand = self.value(e.operand)
            if isinstance(operand, (int, float)):
                return -operand
            return self.graph.call_function(operator.neg, (operand,))
        if isinstance(e, ast.BinOp) and type(e.op) in _OPERATORS:
            operands = (self.value(e.left), self.value(e.right))
            return self.graph.call_function(_OPERATORS[type(e.op)], operands)
        if isinstance(e, ast.Attribute) and e.attr == "shape":
            return self.graph.call_function(getattr, (self.value(e.value), "shape"))
        if (
            isinstance(e, ast.Subscript)
            and isinstance(e.slice, ast.Constant)
            and isinstance(e.slice.value, int)
        ):
            return self.graph.call_function(operator.getitem, (self.value(e.value), e.slice.value))
        if isinstance(e, ast.Call):
            return self.call(e)
        return self.refuse(e)

    def call(self, e: ast.Call) -> Any:
        path = self.child(e.func)
        if path is not None:
            return self.graph.call_module(path, *self.passed(e))
        method = self.method(e.func)
        if method is not None:
            return self.inlined(method, e)
        function = self.function(e.func)
        if function is not None:
            return self.graph.call_function(function, *self.passed(e))
        if isinstance(e.func, ast.Attribute) and e.func.attr in _METHODS:
            receiver = self.value(e.func.value)
            if isinstance(receiver, fx.Node):
                args, kwargs = self.passed(e)
                return self.graph.call_method(e.func.attr, (receiver, *args), kwargs)
        return self.refuse(e)

    def method(self, e: ast.expr) -> Any:
        """The plain method of the module's own class that an expression stands for."""
        if not (isinstance(e, ast.Attribute) and isinstance(e.value, ast.Name)):
            return None
        if e.value.id != self.me or e.attr in self.module.__dict__ or hasattr(nn.Module, e.attr):
            return None
        found = inspect.getattr_static(type(self.module), e.attr, None)
        return found if inspect.isfunction(found) and not hasattr(found, "__wrapped__") else None

    def inlined(self, method: Any, e: ast.Call) -> Any:
        """What a method returns, read in the place of its call."""
        definition = _definition(method)
        a = definition.args
        args, kwargs = self.passed(e)
        names = [arg.arg for arg in a.args]
        plain = not (a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults or kwargs)
        if not plain or len(names) != len(args) + 1 or self.depth > 4:
            self.refuse(e)
        before = (self.me, self.names, self.globals)
        self.me, self.names = names[0], dict(zip(names[1:], args, strict=True))
        self.globals = method.__globals__
        self.depth += 1
        result = self.block(definition.body)
        self.depth -= 1
        self.me, self.names, self.globals = before
        return self.refuse(e) if result is _NOTHING else result

    def passed(self, e: ast.Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(self.value(a) for a in e.args)  # a starred one is refused
        kwargs = {}
        for k in e.keywords:
            if k.arg is None or k.arg == "out":
                self.refuse(e)
            kwargs[k.arg] = self.value(k.value)
        return args, kwargs

    def child(self, e: ast.expr) -> str | None:
        """The dotted name of the child that an expression stands for."""
        path: str | None = None
        if isinstance(e, ast.Name):
            known = self.names.get(e.id)
            return str(known) if isinstance(known, _Child) else None
        if isinstance(e, ast.Attribute):
            inside = isinstance(e.value, ast.Name) and e.value.id == self.me
            above = "" if inside else self.child(e.value)
            path = None if above is None else f"{above}.{e.attr}".lstrip(".")
        elif isinstance(e, ast.Subscript) and isinstance(e.slice, ast.Constant):
            above = self.child(e.value)
            if above is not None and isinstance(e.slice.value, int) and e.slice.value >= 0:
                path = f"{above}.{e.slice.value}"
        if path is None:
            return None
        module: nn.Module | None = self.module
        for part in path.split("."):
            # What the class defines, or hides, under a name is not the child of that name.
            if module is None or part not in module._modules or hasattr(type(module), part):
                return None
            module = module._modules[part]
        return path if module is not None else None

    def function(self, e: ast.expr) -> Any:
        """The function of torch's that an expression stands for."""
        names: list[str] = []
        while isinstance(e, ast.Attribute):
            names.insert(0, e.attr)
            e = e.value
        if not isinstance(e, ast.Name) or e.id in self.names or e.id == self.me:
            return None
        found = self.globals.get(e.id)
        for name in names:
            if not inspect.ismodule(found):
                return None
            found = getattr(found, name, None)
        return found if id(found) in _FUNCTIONS else None


def _definition(forward: Any) -> ast.FunctionDef:
    """The text of a function, if it is what runs."""
    ours = forward.__code__
    try:
        lines, _ = inspect.findsource(forward)
        tree, codes = _compiled("".join(lines))
    except (OSError, TypeError, SyntaxError):
        raise UnreadableError("has no source at hand") from None
    functions = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and n.lineno == ours.co_firstlineno
    ]
    code = codes.get((ours.co_name, ours.co_firstlineno))
    if len(functions) != 1 or functions[0].decorator_list or functions[0].name != ours.co_name:
        raise UnreadableError("is decorated, or not a plain function")
    if code is None or any(getattr(code, part) != getattr(ours, part) for part in _PARTS):
        raise UnreadableError("is not what its source says")
    return functions[0]


_PARTS = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars")


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> tuple[ast.Module, dict[tuple[str, int], CodeType]]:
    """A file's tree, and its functions' code by name and line."""
    tree = ast.parse(source)
    codes: dict[tuple[str, int], CodeType] = {}
    rest = [compile(source, "<source>", "exec", dont_inherit=True)]
    while rest:
        code = rest.pop()
        codes[code.co_name, code.co_firstlineno] = code
        rest += [c for c in code.co_consts if inspect.iscode(c)]
    return tree, codes


# ---- what a module may reach --------------------------------------------------------------------

# By these a module gets at all that is inside it.
_OPENS = frozenset(
    {
        "modules", "children", "named_modules", "named_children", "get_submodule", "apply",
        "_modules", "__dict__", "_apply",
    }
)  # fmt: skip


def check_reach(module: nn.Module, child: str) -> None:
    """Refuse a module that might use what is inside one of its children by itself.

    Whatever else its methods do, they may call the child, ask whether it is None, or go through it
    and call what is in it, if it is a list of modules; and they may not give themselves away.

    Raises
    ------
    UnreadableError
        With the reason in words.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn.modules.container"):
        return  # calls its children whole, or leaves them to whoever is further up
    container = type(module._modules.get(child)) in (nn.ModuleList, nn.Sequential)
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for name, value in base.__dict__.items():
            for function in functions_of(value):
                if name != "__init__":
                    _check_method(function, name, child, container)


def functions_of(value: Any) -> list[Any]:
    """The functions of what a class has under a name."""
    if isinstance(value, property):
        return [f for f in (value.fget, value.fset, value.fdel) if f is not None]
    value = getattr(value, "__func__", value)  # of class and static methods
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return [value] if inspect.isfunction(value) else []


def _check_method(function: Any, name: str, child: str, container: bool) -> None:
    try:
        lines, start = inspect.findsource(function)
        tree, _ = _compiled("".join(lines))
    except (OSError, TypeError, SyntaxError):
        raise UnreadableError(f"has no source at hand for {name}") from None
    found = [
        n
        for n in ast.walk(tree)
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
        and n.name == function.__name__
        and min([n.lineno, *(d.lineno for d in n.decorator_list)]) == start + 1
    ]
    if len(found) != 1:
        raise UnreadableError(f"has no source at hand for {name}")
    if not found[0].args.args:
        return  # a static method sees no module
    me = found[0].args.args[0].arg
    above = {id(c): n for n in ast.walk(found[0]) for c in ast.iter_child_nodes(n)}
    for node in ast.walk(found[0]):
        if not (isinstance(node, ast.Name) and node.id == me):
            continue
        use = above[id(node)]
        if not isinstance(use, ast.Attribute) or use.attr in _OPENS:
            raise UnreadableError(f"might use anything inside it ({name})")
        if use.attr == child and not _is_whole(use, above, container, found[0]):
            raise UnreadableError(f"might use parts of '{child}' by itself ({name})")


def _is_whole(
    use: ast.Attribute, above: dict[int, ast.AST], container: bool, function: ast.AST
) -> bool:
    """Whether a child is called, compared, or gone through and its items called."""
    parent = above[id(use)]
    if isinstance(parent, ast.Call):
        return parent.func is use
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    if isinstance(parent, ast.For) and parent.iter is use and container:
        if not isinstance(parent.target, ast.Name):
            return False
        item = parent.target.id
        return all(
            isinstance(above[id(n)], ast.Call) and above[id(n)].func is n  # type: ignore[attr-defined]
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and n.id == item and isinstance(n.ctx, ast.Load)
        )
    return False
