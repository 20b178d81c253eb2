"""One path through the forward of a module: `torch.fx`, which answers what code asks of tensors.

A placeholder stands for each tensor. Where Python asks it for a truth value, or whether it is a
tensor at all, the tracer takes the next of its decisions; what else it cannot know is a limit.
"""

from __future__ import annotations

import builtins
import dis
import gc
import inspect
import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..population.batches import tensors_in
from ..population.layers import unwrapped
from .calls import TENSOR, Call, Spec, of_dict
from .layers import is_linear, is_norm
from .unseen import TYPE, seen

__all__ = [
    "METADATA",
    "Apart",
    "Context",
    "Endless",
    "Tracer",
    "Used",
    "Watch",
    "is_of_models",
    "is_torchs",
    "isinstance_follows",
    "set_in",
]

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


def set_in(holder: Any, name: str, value: Any) -> None:
    """Set an attribute of a module or class, or a global name."""
    if isinstance(holder, type):
        setattr(holder, name, value)
    else:
        (holder if isinstance(holder, dict) else vars(holder))[name] = value


@dataclass
class Used:
    """ids of tensors of which values, or only things like their type, were asked for."""

    values: set[int] = field(default_factory=set)
    metadata: set[int] = field(default_factory=set)


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
    deciding : set of int
        ids of those that may return something else on another path.
    apart : set of int
        ids of modules that are followed on their own.
    """

    def __init__(self, model: nn.Module, calls: Call) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.calls, self.specs, self.used = calls, calls.specs(), Used()
        self.apart: set[int] = set()
        self.deciding: set[int] = set()
        self._others = {call.name for call in calls if call.rank is None}
        self._before = {id(m): _settings(m) for m in model.modules() if is_linear(m) or is_norm(m)}
        #: Attributes that calls change, which may be anything: holder, name, and present value.
        self.unknown: list[tuple[Any, str, Any]] = []
        self.placeholders: weakref.WeakSet[fx.Proxy] = weakref.WeakSet()

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether a call of this module stands in a graph as a call."""
        if unwrapped(module) is not module:  # data parallelism, or compiled
            return False
        known = is_linear(module) or is_norm(module) or isinstance(module, torch.jit.ScriptModule)
        return known or id(module) in self.apart or is_torchs(module)

    def is_as_before(self, module: nn.Module) -> bool:
        """Whether nothing that a layer computes with has changed since the beginning."""
        return self._before.get(id(module), None) in (None, _settings(module))

    def returns_a_tensor(self, module: nn.Module) -> bool:
        """Whether this is a layer that is known to return a tensor."""
        known = id(module) not in self.deciding and not isinstance(module, torch.jit.ScriptModule)
        return known and self.names[id(module)] not in self._others


_HELD = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def _settings(module: nn.Module) -> Any:
    """What decides what a layer computes: which tensors, hooks and numbers it has."""
    held = vars(module)
    parts = [held[kind] for kind in _HELD]
    plain = {k: v for k, v in held.items() if isinstance(v, (bool, int, float, str, tuple))}
    return [{k: id(v) for k, v in part.items()} for part in parts], plain, type(module)


def is_torchs(module: nn.Module) -> bool:
    """Whether this is one of torch's layers, which call nothing but their own parts."""
    return unwrapped(module) is module and fx.Tracer().is_leaf_module(module, "")


class Apart(BaseException):  # which `except Exception` in a model does not stop
    """Raised where a module has to be followed on its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Endless(BaseException):
    """Raised where a path has no end in sight."""


_NUMBERS = {"item", "tolist", "numpy", "__int__", "__float__", "__index__", "__array__"}


class Watch(TorchFunctionMode):
    """Sees what happens to tensors that are no placeholders."""

    def __init__(self, tracer: Tracer) -> None:
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
    _is_something = False  # not None, for that is another path
    _is_new = False  # a tensor that nothing else is
    _kinds: dict[Any, bool] | None = None
    tracer: Tracer

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

    def is_kind(self, kinds: Any) -> bool:
        """Whether it is of one of these types on this path."""
        if issubclass(Tensor, kinds) and self.is_tensor():
            return True
        if self._is_tensor or kinds is Tensor:
            return False
        known = self.__dict__.setdefault("_kinds", {})
        if kinds not in known:
            known[kinds] = self.tracer.decide()
        return bool(known[kinds])

    def may_be_none(self) -> bool:
        """Whether it may be None where it stands for a value that nothing was asked of."""
        if self._is_tensor or self._is_something:
            return False
        node = self.node
        if node.target is operator.getitem:
            return any(a.op != "call_function" for a in node.all_input_nodes)
        return node.op in ("placeholder", "call_module")

    def may_be(self, other: Any) -> bool:
        """Whether it may be an object that is not None."""
        given = self.node.op in ("placeholder", "call_module") and not self._is_new
        if issubclass(type(other), _Proxy):
            return given and self is not other and other.may_be(None)
        return given and (other is None or not self._is_tensor)

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("_is_tensor") and not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return _Attribute(self, name)

    def __hash__(self) -> int:
        if _asked_by_a_model(sys._getframe(1)):
            self.tracer.limit("it looks up a tensor, a size or an argument in a set or dict")
        return id(self)

    # Noted, since a model may catch the exception, and take a path that it takes in no run.
    def __len__(self) -> NoReturn:
        self.tracer.limit("it asks for the length of a tensor")

    def __int__(self) -> NoReturn:
        self.tracer.limit("it makes a number of a tensor or a size")

    def __index__(self) -> NoReturn:
        self.tracer.limit("it counts up to a tensor or a size")

    def __float__(self) -> NoReturn:
        self.tracer.limit("it makes a number of a tensor or a size")


class _Attribute(fx.proxy.Attribute, _Proxy):
    """An attribute of a placeholder, or a method that is not called yet."""

    def is_tensor(self) -> bool:
        return self.attr not in METADATA and bool(super().is_tensor())

    def may_be_none(self) -> bool:
        return self.attr not in METADATA

    def may_be(self, other: Any) -> bool:
        return True


@contextmanager
def isinstance_follows() -> Iterator[None]:
    """Let `isinstance` answer for placeholders as for what they stand for."""
    usual = builtins.isinstance
    of_a_type = type(torch.FloatTensor)

    def asked(value: Any, kinds: Any, /) -> bool:
        if usual(value, kinds):
            return True
        if not issubclass(type(value), _Proxy) or not _asked_by_a_model(sys._getframe(1)):
            return False
        if type(kinds) is of_a_type or (
            type(kinds) is tuple and any(type(kind) is of_a_type for kind in kinds)
        ):
            return bool(value.tracer.decide())
        return bool(value.is_kind(kinds))

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
    return is_of_models(frame.f_code.co_filename) or frame.f_code.co_name == "is_tensor"


def is_of_models(path: str) -> bool:
    """Whether a file is neither of PyTorch nor of this library."""
    return not path.startswith((_TORCH, _HERE))


def _is_code_of_models(path: str) -> bool:
    # pytest has the asserts of tests call functions of its own.
    of_pytest = f"{os.sep}_pytest{os.sep}" in path or f"{os.sep}pluggy{os.sep}" in path
    return is_of_models(path) and not _is_of_python(path) and not of_pytest


def _is_of_python(path: str) -> bool:
    return path.startswith("<frozen") or (path.startswith(_PYTHON) and "site-packages" not in path)


def _line(frame: Any) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


_ANY = object()  # any value of an argument


class Tracer(fx.Tracer):
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
        self.is_over = False
        self.failed: nn.Module | None = None
        self.limits: list[str] = []
        self._root = root
        self._stack: list[nn.Module] = []
        self._proxies: list[weakref.ref[fx.Proxy]] = []
        self._thread = threading.get_ident()

    def decide(self) -> bool:
        """The answer to the next question."""
        if self.is_over:
            raise Endless("it asks for the value of a tensor of an earlier call")
        self._only_in_root()
        if self.taken == len(self.decisions):
            if self.taken >= MOST_DECISIONS:
                raise Endless(f"it asks for more than {MOST_DECISIONS} decisions on values")
            self.decisions.append(True)
        self.taken += 1
        return self.decisions[self.taken - 1]

    def limit(self, what: str) -> NoReturn:
        """Note that a placeholder was asked for something that it has not got, and raise."""
        self._only_in_root()
        self.limits.append(f"{what} ({_line(sys._getframe(2))})")
        raise TypeError(what)

    def note(self, what: str, frame: Any) -> None:
        """Note what makes it impossible to follow the innermost module, and go on."""
        what = f"{what} ({_line(frame)})"
        if len(self._stack) > 1 and self._stack[-1] is not self._root:
            self.failed = self.failed or self._stack[-1]
        else:
            self.limits.append(what)

    def note_identity(self, one: Any, other: Any, frame: Any) -> None:
        """Note that a path depends on whether two values are the same object, if it may."""
        if one is TYPE:
            self.note("it asks for the type of a tensor or an argument", frame)
            return
        if not issubclass(type(one), _Proxy):
            one, other = other, one
        if not issubclass(type(one), _Proxy):
            return
        if one.may_be_none() if other is None else one.may_be(other):
            self.note("it asks whether two values are the same object", frame)

    def _only_in_root(self) -> None:
        if len(self._stack) > 1:
            inner = self._stack[-1]
            if inner is self._root:
                raise Endless("it calls itself")
            raise Apart(inner)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide."""
        return self.decide()

    def iter(self, obj: fx.Proxy) -> NoReturn:
        """Refuse to loop."""
        self.limit("it loops over a tensor or a shape")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A placeholder, which is noted."""
        found = _Proxy(node, self)
        self._proxies.append(weakref.ref(found))
        self.context.placeholders.add(found)
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
        """Whether a call stays a call in the graph."""
        return m is not self._root and self.context.is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a module, or note its call."""
        if threading.get_ident() != self._thread:  # another model, while torch.fx has patched all
            return forward(*args, **kwargs)
        inside = unwrapped(m)
        if inside is not m:
            return inside(*args, **kwargs)
        if id(m) not in self.context.names:
            raise NameError(f"it calls a {type(m).__name__} that is no module of the model")
        if self.is_leaf_module(m, ""):
            if not self.context.is_as_before(m):
                what = f"it changes '{self.context.names[id(m)]}' before it calls it"
                self.note(what, sys._getframe(1))
            result = super().call_module(m, forward, args, kwargs)
            if isinstance(result, _Proxy) and self.context.returns_a_tensor(m):
                result.__dict__["_is_tensor"] = True
                a_layer = is_linear(m) or is_norm(m) or id(m) in self.context.apart
                result.__dict__["_is_new"] = a_layer
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
        """A value in a graph; tensors of the model are noted as used."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            self.context.used.values.add(id(a))
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """The attribute itself."""
        return attr_val  # and no placeholder, so that `Watch` sees what happens to parameters

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """A function without arguments, which makes them when it is called."""
        root: Any = self.root

        def run() -> Any:
            self._stack.append(root)  # for questions that concern its arguments
            args, kwargs = self._arguments(root)
            self._stack.pop()
            self._given = args, kwargs  # lists among them, in which a forward may put something
            for holder, name, _ in self.context.unknown:
                set_in(holder, name, self.placeholder(name))
            called = partial(root, *args, **kwargs)
            return seen(called, _is_code_of_models, self.note, self.note_identity)

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
            # What was given as a tensor or a structure is that in all calls.
            given = bound.arguments.get(name)
            if choices and not isinstance(given, (_Proxy, tuple, list, dict)):
                choices.append(_ANY)
            knows_none = any(v is None for v in choices)
            while len(choices) > 1 and not self.decide():
                choices.pop(0)
            if choices and choices[0] is _ANY:
                choices[0] = self.placeholder(name)
                choices[0].__dict__["_is_something"] = knows_none
            if choices:
                bound.arguments[name] = choices[0]
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
        if isinstance(value, dict):
            return of_dict(value, partial(self._filled, name))
        return value

    def placeholder(self, name: str) -> Any:
        """A new input of the graph."""
        return self.create_proxy("placeholder", name, (), {})
