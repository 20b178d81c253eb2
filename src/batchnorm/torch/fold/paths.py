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

import dis
import inspect
import itertools
import os
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..population.layers import unwrapped
from .calls import Call, Spec
from .layers import is_linear, is_norm
from .outside import collecting_what_is_new, kept_outside, without_placeholders
from .reach import functions_of
from .tracing import (
    Apart,
    Context,
    Endless,
    Tracer,
    Used,
    Watch,
    is_of_models,
    is_torchs,
    isinstance_follows,
    set_in,
)

__all__ = ["Paths", "explore", "only_path", "outline"]

#: Paths of one module that are followed.
MOST_PATHS = 256
#: By how many items a list grows that calls make longer, to see whether a path depends on that.
MANY_ITEMS = 1_000
#: How deep containers are looked into for what calls change.
DEPTH = 4
#: The longest of which what the items contain is looked into.
LONGEST = 10_000


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
    with (
        kept_outside(model),
        without_placeholders(model, context.placeholders),
        collecting_what_is_new(),
    ):
        return _explore(model, context, closed)


def _explore(model: nn.Module, context: Context, closed: Iterable[str]) -> Paths:
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
        context.deciding.add(id(root))
        name = context.names[id(root)]
        while True:  # until no more modules have to be followed apart
            try:
                found.graphs[name] = _graphs(root, context)
            except Apart as other:
                context.apart.add(id(other.module))
                context.deciding.add(id(other.module))
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
    except (_Opaque, Apart):
        return None
    finally:
        context.apart = before
    return graphs[0] if len(graphs) == 1 else None


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


def _graphs(root: nn.Module, context: Context) -> list[fx.Graph]:
    """All paths of a module, with targets of calls by their names in the model."""
    name = context.names[id(root)]
    if name not in context.specs:
        raise _Opaque("it did not run on the example inputs")
    if not _has_forward(root) and "forward" not in root.__dict__:
        raise _Opaque("it has no forward")

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

    before = _state(root)
    found = follow()
    if changed := [*_changed(before, _state(root))]:
        for holder, attribute, old, value, longer in changed:
            if isinstance(holder, nn.Module) and holder is not root and id(holder) in context.apart:
                where = context.names[id(holder)]
                raise _Opaque(f"it sets '{attribute}' of '{where}', whose path may depend on it")
            if value is not old:
                if type(value) in _COUNTED:  # which later calls find as another
                    context.unknown.append((holder, attribute, value))
            elif longer and value:
                value.extend([value[-1]] * MANY_ITEMS)
            else:
                raise _Opaque(f"its path may depend on '{attribute}', which calls change")
        try:
            found = follow() if context.unknown else found
            if list(map(outline, found)) != list(map(outline, follow())):
                raise _Opaque(f"its path depends on '{changed[0][1]}', which earlier calls change")
        finally:
            context.unknown.clear()
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
    for _ in range(MOST_PATHS + 1):
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
    tracer = Tracer(root, spec, decisions, context)
    before = _random_state()
    problem: Exception | None = None
    graph = None
    try:
        with torch.set_grad_enabled(grad), Watch(tracer), isinstance_follows():
            graph = tracer.trace(root)
    except Endless as error:
        raise _Opaque(str(error)) from None
    except Exception as error:
        if tracer.taken and not tracer.limits and _is_of_model(error):
            return None
        problem = error
    finally:
        tracer.is_over = True
        for holder, name, value in context.unknown:
            set_in(holder, name, value)
    if tracer.failed is not None:  # also if the model has caught it
        raise Apart(tracer.failed)
    if problem is not None or tracer.limits:
        why = tracer.limits[0] if tracer.limits else _place(problem)
        raise _Opaque(why)
    if _random_state() != before:
        raise _Opaque("it draws random numbers, on which its path may depend")
    assert graph is not None
    for node in tracer.kept():
        graph.call_method("an attribute or list that keeps it", (node,))
    return graph


_OF_MODULE = frozenset(vars(nn.Module())) - {"training"}
_COUNTED = (int, float, complex, str, bytes, tuple)
#: By holder and name: the holder, the name, the value, and what that contains.
State = dict[tuple[int, str], tuple[Any, str, Any, Any]]


def _state(root: nn.Module) -> State:
    """What Python keeps where a forward of this module may find it in a later call."""
    found: State = {}

    def add(holder: Any, name: str, value: Any) -> None:
        found[id(holder), name] = holder, name, value, _contents(value)

    modules = [*root.modules()]
    for module in modules:
        for name, value in vars(module).items():
            if name not in _OF_MODULE and not name.startswith("_tensor_constant"):  # fx's
                add(module, name, value)
    kinds = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)

    def add_class(kind: type) -> None:
        path = getattr(sys.modules.get(str(kind.__module__)), "__file__", None)
        if path is not None and is_of_models(path):
            for name, value in [*vars(kind).items()]:
                if not (name.startswith("__") or callable(value) or hasattr(value, "__get__")):
                    add(kind, name, value)

    for kind in kinds:
        add_class(kind)
    for function in functions_of(cast(Any, type(root))):
        if not inspect.isfunction(function):
            continue
        for name in ("__defaults__", "__kwdefaults__", "__dict__"):
            add(function, name, getattr(function, name))
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, type):
                add_class(value)
            elif inspect.isfunction(value):
                add(value, "__dict__", value.__dict__)
            elif not (value is None or callable(value) or isinstance(value, ModuleType)):
                add(function.__globals__, name, value)
    return found


def _contents(value: Any, depth: int = DEPTH) -> Any:
    """What a value contains that may change: items, attributes, the state of a generator."""
    if isinstance(value, (Tensor, nn.Module, type, ModuleType, fx.Proxy, *_PLAIN)) or not depth:
        return None
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, itertools.count):
        return repr(value)
    if isinstance(value, dict):
        items = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        items = [*value]
    elif hasattr(value, "__next__"):
        return object()  # no state that could be compared
    elif inspect.isroutine(value):
        return None
    else:
        slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
        names = itertools.chain.from_iterable((s,) if isinstance(s, str) else s for s in slots)
        held = [*getattr(value, "__dict__", {}).items()]
        held += [(name, getattr(value, name, None)) for name in names]
        items = [part for pair in held for part in pair]
    if len(items) > LONGEST:
        return items
    return [(item, _contents(item, depth - 1)) for item in items]


def _equal(one: Any, other: Any) -> bool:
    """Whether contents are the same objects, or the same numbers and names."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return _equal([*one, *one.values()], [*other, *other.values()])
    return isinstance(one, _PLAIN) and one == other


_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes)


def _changed(before: State, after: State) -> Iterator[tuple[Any, str, Any, Any, bool]]:
    """Holder, name, old value and new one of what has changed, and whether it is a longer list."""
    for key, (holder, name, value, contents) in after.items():
        _, _, old, held = before.get(key, (holder, name, _MISSING, None))
        if value is not old:
            if not _equal(value, old):
                yield holder, name, old, value, False
        elif not _equal(contents, held):
            longer = isinstance(value, (list, deque)) and _equal(held, contents[: len(held)])
            yield holder, name, old, value, longer


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
    if not is_of_models(frame.f_code.co_filename):
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
        if is_of_models(code.co_filename):
            last = f"{os.path.basename(code.co_filename)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{text} ({last})" if last else text
