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
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..population.batches import tensors_in
from ..population.layers import unwrapped
from .calls import TENSOR, Call, Spec
from .layers import is_linear, is_norm

__all__ = ["METADATA", "Paths", "explore", "is_torchs"]

#: Paths of one module that are followed.
MOST_PATHS = 256
#: Questions on one path.
MOST_DECISIONS = 24

_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PYTHON = os.path.dirname(os.path.abspath(os.__file__))
_TORCH = os.path.dirname(os.path.abspath(inspect.getfile(torch)))

# What one may ask of a tensor that does not tell its values.
METADATA = frozenset(
    {
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_mps", "is_meta",
        "is_sparse", "is_quantized", "requires_grad", "itemsize", "nbytes", "is_leaf", "size",
        "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point",
        "is_complex", "element_size", "__len__", "get_device",
    }
)  # fmt: skip


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
    used: Used = field(default_factory=lambda: Used())


@dataclass
class Used:
    """ids of tensors of which values, or only things like their type, were asked for."""

    values: set[int] = field(default_factory=set)
    metadata: set[int] = field(default_factory=set)


def explore(model: nn.Module, calls: Call) -> Paths:
    """Follow a model.

    Parameters
    ----------
    model : Module
        Used up: forwards run on placeholders, and may keep them.
    calls
        A run of the model on examples: what its modules were called with.
    """
    names = _names(model)
    specs = calls.specs()
    found = Paths()
    apart: set[int] = set()  # ids of modules that are followed on their own
    queue = [model]
    seen: set[int] = set()
    while queue:
        root = queue.pop()
        if id(root) in seen:
            continue
        seen.add(id(root))
        name = names[id(root)]
        apart.add(id(root))
        problem = ""
        graphs: list[fx.Graph] = []
        inside: set[int] = set()
        while True:  # until no more modules have to be followed apart
            try:
                inside = set(apart)
                graphs = list(_paths(root, specs.get(name, []), apart, found.used))
                problem = _mismatch(root, graphs, calls.of(name), inside, names)
            except _Apart as other:
                apart.add(id(other.module))
                queue.append(other.module)
                continue
            except _Opaque as error:
                problem = str(error)
            break
        if problem:
            found.opaque[name] = problem
            queue.extend(_callable_children(root))
        else:
            for graph in graphs:
                _rename(graph, root, names)
            found.graphs[name] = graphs
    return found


def _names(model: nn.Module) -> dict[int, str]:
    """For the id of each module its first name."""
    return {id(module): name for name, module in model.named_modules()}


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


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def is_torchs(module: nn.Module) -> bool:
    """Whether this is one of torch's layers, which call nothing but their own parts."""
    return unwrapped(module) is module and fx.Tracer().is_leaf_module(module, "")


def _rename(graph: fx.Graph, root: nn.Module, names: dict[int, str]) -> None:
    """Let targets be names in the model."""
    for node in graph.nodes:
        if node.op == "call_module":
            node.target = names[id(root.get_submodule(str(node.target)))]


def _mismatch(
    root: nn.Module,
    graphs: list[fx.Graph],
    calls: list[Call],
    apart: set[int],
    names: dict[int, str],
) -> str:
    """Why the paths cannot be all: what happened on the examples is none of them."""
    modules = dict(root.named_modules(remove_duplicate=False))
    by_name = {names[id(m)]: m for m in modules.values()}
    tracer = _Tracer(Spec((), {}), [], apart, Used())

    def happened(call: Call) -> Iterator[str]:
        for inner in call.inner:
            module = by_name.get(inner.name)
            if module is None or tracer.is_leaf_module(module, inner.name):
                yield inner.name
            else:
                yield from happened(inner)

    foreseen = [
        [
            names[id(modules[str(node.target)])]
            for node in graph.nodes
            if node.op == "call_module"
            and not isinstance(modules[str(node.target)], torch.jit.ScriptModule)
        ]
        for graph in graphs
    ]
    if all(list(happened(call)) in foreseen for call in calls):
        return ""
    return "on the examples it took a path that could not be foreseen"


# ---- the paths of one module --------------------------------------------------------------------


class _Opaque(Exception):
    """Raised where a module cannot be followed, with the reason."""


class _Apart(BaseException):  # which `except Exception` in a model does not stop
    """Raised where a module has to be followed on its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Endless(BaseException):
    """A path has too many questions."""


def _paths(root: nn.Module, specs: list[Spec], apart: set[int], used: Used) -> Iterator[fx.Graph]:
    """Each path for each way in which the module is called."""
    if not specs:
        raise _Opaque("it did not run on the example inputs")
    if not _has_forward(root):
        raise _Opaque("it has no forward")
    count = 0
    for spec in specs:
        decisions: list[bool] = []
        ended = 0
        while True:
            count += 1
            if count > MOST_PATHS:
                raise _Opaque(f"it has more than {MOST_PATHS} paths")
            graph = _follow(root, spec, decisions, apart, used)
            if graph is not None:
                ended += 1
                yield graph
            while decisions and not decisions[-1]:
                decisions.pop()
            if not decisions:
                break
            decisions[-1] = False
        if not ended:
            raise _Opaque("no path through its forward ends without an exception")


def _follow(
    root: nn.Module, spec: Spec, decisions: list[bool], apart: set[int], used: Used
) -> fx.Graph | None:
    """One path, with these decisions and True for further ones; None if the model raises there."""
    tracer = _Tracer(spec, decisions, apart - {id(root)}, used)
    before = _random_state()
    problem: BaseException | None = None
    graph = None
    try:
        with torch.no_grad(), _Watch(tracer):
            graph = tracer.trace(root)
    except _Apart:
        raise
    except _Endless:
        raise _Opaque(f"it asks for more than {MOST_DECISIONS} decisions on values") from None
    except Exception as error:
        if tracer.taken and _is_of_model(error):
            return None
        problem = error
    if tracer.failed is not None and tracer.failed is not root:  # also if the model caught it
        raise _Apart(tracer.failed)
    if problem is not None:
        raise _Opaque(f"its forward cannot be followed: {_place(problem)}")
    if _random_state() != before:
        raise _Opaque("it draws random numbers, on which its path may depend")
    return graph


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


def _place(error: BaseException) -> str:
    """The message in one line, and the last line of the model that led to it."""
    text = " ".join(str(error).split())[:100] or type(error).__name__
    last = None
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith((_TORCH, _HERE)):
            last = f"{os.path.basename(code.co_filename)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{text} ({last})" if last else text


class _Watch(TorchFunctionMode):
    """Sees what happens to tensors that are no placeholders."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__bool__" and type(args[0]) is not _Proxy:
            return self._tracer.decide()  # of a buffer, or of random numbers
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        used = self._tracer.used
        into = used.metadata if name in METADATA else used.values
        into.update(id(t) for t in tensors_in([args, kwargs]))
        return func(*args, **kwargs)


class _Proxy(fx.Proxy):
    """A placeholder, which may be a tensor or something else: both are tried where it matters."""

    _is_param = False
    _is_tensor: bool | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # which isinstance asks for
        if not _asked_by_a_model(sys._getframe(1)):
            return type(self)
        if self._is_tensor is None:
            tracer: Any = self.tracer
            self.__dict__["_is_tensor"] = tracer.decide()
        return Tensor if self._is_tensor else type(self)


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
    failed : Module or None
        The innermost module that an exception left.
    """

    def __init__(self, spec: Spec, decisions: list[bool], apart: set[int], used: Used) -> None:
        super().__init__()
        self.spec, self.decisions, self.apart, self.used = spec, decisions, apart, used
        self.taken = 0
        self.failed: nn.Module | None = None
        self._stack: list[nn.Module] = []

    def decide(self) -> bool:
        """The answer to the next question."""
        if self._stack:
            raise _Apart(self._stack[-1])
        if self.taken == len(self.decisions):
            if self.taken >= MOST_DECISIONS:
                raise _Endless
            self.decisions.append(True)
        self.taken += 1
        return self.decisions[self.taken - 1]

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.decide()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if unwrapped(m) is not m:
            return False
        if id(m) in self.apart or is_linear(m) or is_norm(m):
            return True
        if isinstance(m, torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inside = unwrapped(m)
        if inside is not m:  # data parallelism, or compiled
            return inside(*args, **kwargs)
        leaf = self.is_leaf_module(m, "")
        if not leaf:
            self._stack.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except BaseException:
            if self.failed is None:
                self.failed = self._stack[-1] if self._stack else None
            raise
        finally:
            if not leaf:
                self._stack.pop()

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            self.used.values.add(id(a))
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val  # and no placeholder, so that `_Watch` sees what happens to parameters

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        root: Any = self.root

        def run() -> Any:
            args, kwargs = self._arguments(root)
            return root.forward(*args, **kwargs)

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
