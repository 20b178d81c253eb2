"""All paths through the forward of a model, as graphs.

`torch.fx` records one path: what Python did with placeholders in place of tensors. Here, each time
Python asks a placeholder for a truth value, both answers are followed, one after the other, so the
graphs of a module are all that its forward may do with the inputs that it was seen with.

A module whose forward asks such questions is followed on its own, and stands in its parents' graphs
as one call: then the number of paths is that of each module, not their product. A module that
cannot be followed (a loop over a tensor, a number made of one) is *opaque*: the modules inside of
it are followed on their own, and `reach` says what its code may call besides them.
"""

from __future__ import annotations

import builtins
import dis
import gc
import inspect
import itertools
import os
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..population.batches import tensors_in
from ..population.layers import unwrapped
from .calls import TENSOR, Call, Spec
from .layers import is_linear, is_norm
from .reach import catches

__all__ = ["METADATA", "Context", "Paths", "Used", "explore", "is_torchs", "only_path", "outline"]

#: Paths of one module that are followed.
MOST_PATHS = 256
#: By how much a number is raised that a forward changes, to see whether its path depends on it.
MANY_CALLS = 100_000
#: And by how many items a list becomes longer.
MANY_ITEMS = 1_000
#: Questions on one path.
MOST_DECISIONS = 24

_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_TORCH = os.path.dirname(os.path.abspath(inspect.getfile(torch)))
_PYTHON = os.path.dirname(os.path.abspath(os.__file__))

#: What one may ask of a tensor that does not tell its values.
METADATA = frozenset(
    {
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_mps", "is_meta",
        "is_sparse", "is_quantized", "requires_grad", "itemsize", "nbytes", "is_leaf", "size",
        "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point",
        "is_complex", "element_size", "__len__", "get_device",
    }
)  # fmt: skip


@dataclass
class Used:
    """ids of tensors of which values, or only things like their type, were asked for."""

    values: set[int] = field(default_factory=set)
    metadata: set[int] = field(default_factory=set)


@dataclass
class Paths:
    """What may happen in a model.

    Attributes
    ----------
    graphs : dict of str to list of Graph
        For each module that was followed on its own, by name ("" is the model): its paths. Targets
        of calls are names in the model.
    opaque : dict of str to str
        For each module that cannot be followed, the reason.
    used : Used
        Which tensors are used outside of the modules they belong to.
    """

    graphs: dict[str, list[fx.Graph]] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    used: Used = field(default_factory=Used)


def explore(model: nn.Module, calls: Call, closed: Iterable[str] = ()) -> Paths:
    """Follow a model.

    Parameters
    ----------
    model : Module
        Used up: forwards run on placeholders, and may keep them.
    calls
        A run of the model on examples: what its modules were called with.
    closed
        Names of modules that stand in graphs as calls, and are not followed.
    """
    context = Context(model, calls)
    for name in closed:
        context.apart.add(id(model.get_submodule(name)))
    found = Paths(used=context.used)
    queue = [model]
    seen: set[int] = set()
    while queue:
        root = queue.pop()
        if id(root) in seen:
            continue
        seen.add(id(root))
        context.apart.add(id(root))
        name = context.names[id(root)]
        while True:  # until no more modules have to be followed apart
            try:
                found.graphs[name] = _graphs(root, context)
            except _Apart as other:
                context.apart.add(id(other.module))
                queue.append(other.module)
                continue
            except _Opaque as error:
                found.opaque[name] = str(error)
                queue.extend(_callable_children(root))
            break
    for graph in itertools.chain(*found.graphs.values()):
        for node in graph.nodes:
            if node.op == "call_module" and (name := str(node.target)) in found.graphs:
                given = Spec(node.args, node.kwargs)
                if not any(_matches(given, spec) for spec in context.specs[name]):
                    found.opaque[name] = "it may be called in other ways than on the examples"
    return found


def _matches(given: Any, seen: Any) -> bool:
    """Whether a call in a graph may be one like that which was seen."""
    if isinstance(given, fx.Node):
        return True
    if isinstance(given, (tuple, list)):
        known = isinstance(seen, (tuple, list)) and len(given) == len(seen)
        return known and all(map(_matches, given, seen))
    if isinstance(given, dict):
        known = isinstance(seen, dict) and given.keys() == seen.keys()
        return known and all(_matches(given[key], seen[key]) for key in given)
    return type(given) is type(seen) and (not isinstance(given, bool) or given == seen)


def outline(graph: fx.Graph) -> list[Any]:
    """What is called with what, to compare graphs by."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    names: dict[str, str] = {}

    def target(node: fx.Node) -> str:
        name = str(node.target)
        if node.op == "get_attr" and name.startswith("_tensor_constant"):  # fx counts them
            name = names.setdefault(name, f"constant {len(names)}")
        return name

    def numbered(args: Any) -> str:
        # A node of another graph is what an earlier call has left in an attribute.
        return repr(fx.map_arg(args, lambda node: f"%{numbers.get(node, 'earlier')}"))

    return [
        (node.op, target(node), numbered(node.args), numbered(node.kwargs)) for node in graph.nodes
    ]


def only_path(module: nn.Module, context: Context, apart: set[int]) -> fx.Graph | None:
    """The path through a module, with the modules in `apart` as calls; None unless there is one."""
    before, context.apart = context.apart, apart
    try:
        graphs = _graphs(module, context)
    except (_Opaque, _Apart):
        return None
    finally:
        context.apart = before
    return graphs[0] if len(graphs) == 1 else None


class Context:
    """What is known of a model before a module of it is followed.

    Attributes
    ----------
    names : dict of int to str
        For the id of each module its first name.
    calls : Call
        The run on examples.
    specs : dict of str to list of Spec
        What each module was called with there.
    apart : set of int
        ids of modules that are followed on their own.
    """

    def __init__(self, model: nn.Module, calls: Call) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.calls, self.specs, self.used = calls, calls.specs(), Used()
        self.apart: set[int] = set()
        self._others = {call.name for call in calls if call.rank is None}

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether a call of this module stands in a graph as a call."""
        if unwrapped(module) is not module:  # data parallelism, or compiled
            return False
        known = is_linear(module) or is_norm(module) or isinstance(module, torch.jit.ScriptModule)
        return known or id(module) in self.apart or is_torchs(module)

    def returns_a_tensor(self, module: nn.Module) -> bool:
        """Whether this is a layer that is known to return a tensor."""
        known = id(module) not in self.apart and not isinstance(module, torch.jit.ScriptModule)
        return known and self.names[id(module)] not in self._others


def is_torchs(module: nn.Module) -> bool:
    """Whether this is one of torch's layers, which call nothing but their own parts."""
    return unwrapped(module) is module and fx.Tracer().is_leaf_module(module, "")


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _callable_children(module: nn.Module) -> Iterator[nn.Module]:
    """The nearest modules below that have a forward, and are no layers."""
    for child in module.children():
        inside = unwrapped(child)
        if is_linear(inside) or is_norm(inside) or isinstance(child, torch.jit.ScriptModule):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and not _has_forward(child):
            yield from _callable_children(child)
        elif not is_torchs(child):
            yield child


# ---- the paths of one module --------------------------------------------------------------------


class _Opaque(Exception):
    """Raised where a module cannot be followed, with the reason."""


class _Apart(BaseException):  # which `except Exception` in a model does not stop
    """Raised where a module has to be followed on its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Endless(BaseException):
    """Raised where a path has no end in sight."""


def _graphs(root: nn.Module, context: Context) -> list[fx.Graph]:
    """All paths of a module, with targets of calls by their names in the model."""
    name = context.names[id(root)]
    if name not in context.specs:
        raise _Opaque("it did not run on the example inputs")
    if not _has_forward(root) and "forward" not in root.__dict__:
        raise _Opaque("it has no forward")
    if catches(root):
        raise _Opaque("it catches exceptions, which may depend on values")

    def follow() -> list[fx.Graph]:
        found: list[fx.Graph] = []
        for spec, grad in itertools.product(context.specs[name], (False, True)):
            try:
                graphs = _paths(root, spec, context, grad)
            except _Opaque:
                if not grad:
                    raise
                continue  # in which it runs with gradients no more than here
            known = list(map(outline, found))
            found += [graph for graph in graphs if outline(graph) not in known]
        return found

    before = _attributes(root)
    found = follow()
    if changed := _changed(before, _attributes(root)):
        for module, attribute, value, same in changed:  # as a call much later finds them
            if module is not root and id(module) in context.apart:
                where = context.names[id(module)]
                raise _Opaque(f"it sets '{attribute}' of '{where}', whose path may depend on it")
            if type(value) in (int, float):
                setattr(module, attribute, value + MANY_CALLS)
            elif same and isinstance(value, (list, deque)) and value:
                value.extend([value[-1]] * MANY_ITEMS)
            elif same:
                raise _Opaque(f"its path may depend on '{attribute}', which calls change")
        if list(map(outline, found)) != list(map(outline, follow())):
            raise _Opaque(f"its path depends on '{changed[0][1]}', which earlier calls change")
    if len(found) > MOST_PATHS:
        raise _Opaque(f"it has more than {MOST_PATHS} paths")
    modules = dict(root.named_modules(remove_duplicate=False))
    by_name = {context.names[id(module)]: module for module in modules.values()}
    foreseen = []
    for graph in found:
        calls = [node for node in graph.nodes if node.op == "call_module"]
        for node in calls:
            node.target = context.names[id(modules[str(node.target)])]
        # Which calls no hook sees.
        scripted = torch.jit.ScriptModule
        foreseen.append([n.target for n in calls if not isinstance(by_name[n.target], scripted)])

    def happened(call: Call) -> Iterator[str]:
        for inner in call.inner:
            module = by_name.get(inner.name)
            if module is None or context.is_leaf(module):
                yield inner.name
            else:
                yield from happened(inner)

    if not all(list(happened(call)) in foreseen for call in context.calls.of(name)):
        raise _Opaque("on the examples it took a path that could not be foreseen")
    return found


def _paths(root: nn.Module, spec: Spec, context: Context, grad: bool) -> list[fx.Graph]:
    """Each path of a module that is called with `spec`, with gradients or without."""
    found: list[fx.Graph] = []
    decisions: list[bool] = []
    count = 0
    while count <= MOST_PATHS:
        count += 1
        graph = _follow(root, spec, decisions, context, grad)
        if graph is not None:
            found.append(graph)
        while decisions and not decisions[-1]:
            decisions.pop()
        if not decisions:
            if not found:
                raise _Opaque("no path through its forward ends without an exception")
            return found
        decisions[-1] = False
    raise _Opaque(f"it has more than {MOST_PATHS} paths")


def _follow(
    root: nn.Module, spec: Spec, decisions: list[bool], context: Context, grad: bool
) -> fx.Graph | None:
    """One path, with these decisions and True for further ones; None if the model raises there."""
    tracer = _Tracer(root, spec, decisions, context)
    before = _random_state()
    problem: Exception | None = None
    graph = None
    try:
        with torch.set_grad_enabled(grad), _Watch(tracer), _isinstance_follows():
            graph = tracer.trace(root)
    except _Endless as error:
        raise _Opaque(str(error)) from None
    except Exception as error:
        if tracer.taken and not tracer.limits and _is_of_model(error):
            return None
        problem = error
    if tracer.failed is not None:  # also if the model has caught it
        raise _Apart(tracer.failed)
    if problem is not None or tracer.limits:
        why = tracer.limits[0] if tracer.limits else _place(problem)
        raise _Opaque(f"its forward cannot be followed: {why}")
    if _random_state() != before:
        raise _Opaque("it draws random numbers, on which its path may depend")
    assert graph is not None
    for node in tracer.kept():
        graph.call_method("an attribute or list that keeps it", (node,))
    return graph


_OF_MODULE = frozenset(vars(nn.Module())) - {"training"}


def _attributes(root: nn.Module) -> dict[tuple[nn.Module, str], tuple[Any, Any]]:
    """What Python keeps in a module and those in it, and what that contains."""
    return {
        (module, name): (value, _contents(value))
        for module in root.modules()
        for name, value in vars(module).items()
        if name not in _OF_MODULE and not name.startswith("_tensor_constant")  # those are fx's
    }


def _contents(value: Any) -> Any:
    """The items of a container, the state of a generator, the attributes of an object."""
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return None
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, set, deque)):
        return [*value]
    found = getattr(value, "__dict__", None)
    return None if found is None else [*found, *found.values()]


def _equal(one: Any, other: Any) -> bool:
    """Whether contents are the same objects, or the same numbers and names."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return _equal([*one, *one.values()], [*other, *other.values()])
    return one is other or (isinstance(one, _PLAIN) and one == other)


_PLAIN = (bool, int, float, complex, str, bytes)


def _changed(
    before: dict[tuple[nn.Module, str], Any], after: dict[tuple[nn.Module, str], Any]
) -> list[tuple[nn.Module, str, Any, bool]]:
    """Attributes that are others now, what they are, and whether that is what they were."""
    found = []
    for key, (value, contents) in after.items():
        old, held = before.get(key, (_ANY, None))
        same = value is old
        if not _equal(contents, held) if same else not _equal(value, old):
            found.append((*key, value, same))
    return found


def _random_state() -> Any:
    kind, keys, place, *_ = np.random.get_state()  # noqa: NPY002 (it is what models may use)
    drawn = np.asarray(keys).tobytes(), torch.get_rng_state().numpy().tobytes()
    return random.getstate(), kind, place, drawn


def _is_of_model(error: Exception) -> bool:
    """Whether `raise` or `assert` in a method of a module raised it, and no limit of tracing."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or error.__context__ is not None:
        return False
    frame = traceback.tb_frame
    if frame.f_code.co_filename.startswith((_TORCH, _HERE)):
        return False
    return isinstance(frame.f_locals.get("self"), nn.Module) and any(
        instruction.offset == traceback.tb_lasti and instruction.opname == "RAISE_VARARGS"
        for instruction in dis.get_instructions(frame.f_code)
    )


def _place(error: BaseException | None) -> str:
    """The message in one line, and the last line of the model that led to it."""
    text = " ".join(str(error).split())[:100] or type(error).__name__
    last = None
    traceback = None if error is None else error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith((_TORCH, _HERE)):
            last = f"{os.path.basename(code.co_filename)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{text} ({last})" if last else text


_NUMBERS = {"item", "tolist", "numpy", "__int__", "__float__", "__index__", "__array__"}


class _Watch(TorchFunctionMode):
    """Sees what happens to tensors that are no placeholders."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__bool__":
            return self._tracer.decide()  # of a buffer, or of random numbers
        if name in _NUMBERS:
            self._tracer.limit("it makes a number of a tensor of the model")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        used = self._tracer.context.used
        into = used.metadata if name in METADATA else used.values
        into.update(id(t) for t in tensors_in([args, kwargs]))
        return func(*args, **kwargs)


class _Proxy(fx.Proxy):
    """A placeholder, which may be a tensor or something else: both are tried where it matters."""

    _is_param = False
    _is_tensor: bool | None = None
    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Not for a function in C, which would take it for a tensor and read its memory.
        frame = sys._getframe(1)
        asks = dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("LOAD_ATTR", "MATCH_CLASS")
        return Tensor if asks and _asked_by_a_model(frame) and self.is_tensor() else type(self)

    def is_tensor(self) -> bool:
        """Whether it is one on this path."""
        if self._is_tensor is None:
            self.__dict__["_is_tensor"] = self.tracer.decide()
        return bool(self._is_tensor)

    # Noted, since a model may catch the exception, and take a path that it takes in no run.
    def __len__(self) -> NoReturn:
        self.tracer.limit("it asks for the length of a tensor")

    def __int__(self) -> NoReturn:
        self.tracer.limit("it makes a number of a tensor or a size")

    def __index__(self) -> NoReturn:
        self.tracer.limit("it counts up to a tensor or a size")

    def __float__(self) -> NoReturn:
        self.tracer.limit("it makes a number of a tensor or a size")


@contextmanager
def _isinstance_follows() -> Iterator[None]:
    """Let `isinstance` answer for placeholders as for what they stand for."""
    usual = builtins.isinstance
    of_a_type = type(torch.FloatTensor)

    def asked(value: Any, kinds: Any, /) -> bool:
        if usual(value, kinds):
            return True
        if type(value) is not _Proxy or not _asked_by_a_model(sys._getframe(1)):
            return False
        if type(kinds) is of_a_type or (
            type(kinds) is tuple and any(type(kind) is of_a_type for kind in kinds)
        ):
            return value.tracer.decide()
        return issubclass(Tensor, kinds) and value.is_tensor()

    builtins.isinstance = asked
    try:
        yield
    finally:
        builtins.isinstance = usual


def _asked_by_a_model(frame: Any) -> bool:
    """Whether code of a model is the nearest on the stack, below the standard library's."""
    while frame is not None and _is_of_python(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return False
    path = frame.f_code.co_filename
    return not path.startswith((_TORCH, _HERE)) or frame.f_code.co_name == "is_tensor"


def _is_of_python(path: str) -> bool:
    return path.startswith("<frozen") or (path.startswith(_PYTHON) and "site-packages" not in path)


_ANY = object()  # any value of an argument


class _Tracer(fx.Tracer):
    """Follows one path.

    Attributes
    ----------
    decisions : list of bool
        Answers to the questions for truth values; those that are missing are added.
    taken : int
        How many have been asked.
    failed : Module or None
        The innermost module below the root that an exception left.
    limits : list of str
        What was asked of a placeholder that it has not got, in the root.
    """

    def __init__(
        self, root: nn.Module, spec: Spec, decisions: list[bool], context: Context
    ) -> None:
        super().__init__()
        self.spec, self.decisions, self.context = spec, decisions, context
        self.taken = 0
        self.failed: nn.Module | None = None
        self.limits: list[str] = []
        self._root = root
        self._stack: list[nn.Module] = []
        self._proxies: list[weakref.ref[fx.Proxy]] = []

    def decide(self) -> bool:
        """The answer to the next question."""
        self._only_in_root()
        if self.taken == len(self.decisions):
            if self.taken >= MOST_DECISIONS:
                raise _Endless(f"it asks for more than {MOST_DECISIONS} decisions on values")
            self.decisions.append(True)
        self.taken += 1
        return self.decisions[self.taken - 1]

    def limit(self, what: str) -> NoReturn:
        """Note that a placeholder was asked for something that it has not got, and raise."""
        self._only_in_root()
        frame = sys._getframe(2)
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self.limits.append(f"{what} ({place})")
        raise TypeError(what)

    def _only_in_root(self) -> None:
        if len(self._stack) > 1:
            inner = self._stack[-1]
            if inner is self._root:
                raise _Endless("it calls itself")
            raise _Apart(inner)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.decide()

    def iter(self, obj: fx.Proxy) -> NoReturn:
        self.limit("it loops over a tensor or a shape")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        found = _Proxy(node, self)
        self._proxies.append(weakref.ref(found))
        return found

    def kept(self) -> list[fx.Node]:
        """What something still refers to: an attribute, a list of the caller's, a global name."""
        if self._alive():
            gc.collect()  # what only refers to itself
        return self._alive()

    def _alive(self) -> list[fx.Node]:
        nodes = [proxy.node for ref in self._proxies if (proxy := ref()) is not None]
        return [node for node in nodes if node.op != "placeholder"]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self._root and self.context.is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inside = unwrapped(m)
        if inside is not m:
            return inside(*args, **kwargs)
        if id(m) not in self.context.names:
            raise NameError(f"it calls a {type(m).__name__} that is no module of the model")
        if not self.is_leaf_module(m, "") and m is not self._root and catches(m):
            raise _Apart(m)
        if self.is_leaf_module(m, ""):
            result = super().call_module(m, forward, args, kwargs)
            if isinstance(result, _Proxy) and self.context.returns_a_tensor(m):
                result.__dict__["_is_tensor"] = True
            return result
        self._stack.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and m is not self._root:
                self.failed = m
            raise
        finally:
            self._stack.pop()

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            self.context.used.values.add(id(a))
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val  # and no placeholder, so that `_Watch` sees what happens to parameters

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        root: Any = self.root

        def run() -> Any:
            self._stack.append(root)  # for questions that concern its arguments
            args, kwargs = self._arguments(root)
            self._stack.pop()
            self._given = args, kwargs  # lists among them, in which a forward may put something
            return root(*args, **kwargs)

        return run, []

    def _arguments(self, root: Any) -> tuple[list[Any], dict[str, Any]]:
        """Placeholders for tensors; all choices for what may be left out or be a constant."""
        args = [self._filled(f"argument{k}", value) for k, value in enumerate(self.spec.args)]
        kwargs = {name: self._filled(name, value) for name, value in self.spec.kwargs.items()}
        try:
            signature = inspect.signature(root.forward)
            bound = signature.bind(*args, **kwargs)
        except (TypeError, ValueError):
            return args, kwargs
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            choices = [bound.arguments[name]] if name in bound.arguments else []
            if parameter.default is not parameter.empty:
                choices += [v for v in [parameter.default] if not any(v is c for c in choices)]
            if not any(isinstance(v, (_Proxy, tuple, list, dict)) for v in choices):
                choices.append(_ANY)
            while len(choices) > 1 and not self.decide():
                choices.pop(0)
            bound.arguments[name] = self.placeholder(name) if choices[0] is _ANY else choices[0]
        return list(bound.args), bound.kwargs

    def _filled(self, name: str, value: Any) -> Any:
        if value is TENSOR:
            proxy = self.placeholder(name)
            proxy.__dict__["_is_tensor"] = True
            return proxy
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._filled(name, item) for item in value))
        if type(value) in (list, tuple):
            return type(value)(self._filled(name, item) for item in value)
        if type(value) is dict:
            return {key: self._filled(name, item) for key, item in value.items()}
        return value

    def placeholder(self, name: str) -> Any:
        """A new input of the graph."""
        return self.create_proxy("placeholder", name, (), {})
