"""torch's layers into ours and back, in place; and the activations that may join them.

A layer is converted by a change of class: it stays the same object, so that whoever refers to it
(parents, optimizers, hooks, lists) goes on doing so. An activation joins the layer before it only
where the graph of the module that calls both shows that nobody else sees what is between them.
Where a residual is added as well, that module's forward is written anew from its graph.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from . import modules
from .modules import Layer

__all__ = ["Report", "convert", "explain", "revert"]

_OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}
_TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in _OURS.items()}

# What makes its output anew, so that nobody else holds the memory of it.
_FRESH = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

M = TypeVar("M", bound=nn.Module)


@dataclass
class Report:
    """What became of the batch norms of a model, one entry a layer.

    Attributes
    ----------
    converted : dict of str to str
        Name of a layer to what joined it ("" if nothing did).
    skipped : dict of str to str
        Name of a layer left alone to the reason.
    unfused : dict of str to str
        Name of a layer followed by an activation that could not join it to the reason.
    """

    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line a layer, and a summary first."""
        joined = sum(1 for what in self.converted.values() if what)
        lines = [
            f"{len(self.converted)} batch norms of batchnorm.torch ({joined} with what follows in "
            f"the same pass), {len(self.skipped)} left alone"
        ]
        names = [*self.converted, *self.skipped]
        width = max((len(n) for n in names), default=0)
        for name in names:
            if name in self.skipped:
                what = f"left alone: {self.skipped[name]}"
            elif self.converted[name]:
                what = f"with {self.converted[name]}"
            else:
                why = self.unfused.get(name)
                what = f"alone: {why}" if why else "alone"
            lines.append(f"  {name:<{width}}  {what}")
        return "\n".join(lines)


def convert(
    model: M,
    *,
    fuse: bool = True,
    on_nonfinite: str = "skip",
    on_single: str = "raise",
    group_size: int | None = None,
) -> M:
    """Turn every batch norm of torch's in `model` into ours, in place.

    Layers stay the objects they are, under their names, with their parameters, buffers, hooks and
    flags, shared ones included; state dicts stay interchangeable with torch's in both directions.
    Only exact instances of `torch.nn.BatchNorm1d`, `2d` and `3d` are converted; subclasses, which
    may do something else, are left alone. `explain` says what was done, and what was not and why.

    Parameters
    ----------
    model : Module
        Changed in place; may itself be a batch norm. Convert before `torch.compile` and before
        wrapping in `DistributedDataParallel`.
    fuse : bool
        Whether a ReLU or leaky ReLU (and a residual addition before it) joins the batch norm it
        follows, where the graph shows that nobody else sees what is between them. Revert before
        taking a fused model apart: a layer does there what its ReLU did.
    on_nonfinite, on_single, group_size
        Of the converted layers, as in `BatchNorm2d`.

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    ArgumentError
        `model` is no Module, or an option is unknown; nothing has been converted then.

    Examples
    --------
    >>> from torch import nn
    >>> from batchnorm.torch import convert, explain
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> net = convert(net)
    >>> print(explain(net))
    1 batch norms of batchnorm.torch (1 with what follows in the same pass), 0 left alone
      1  with ReLU '2'
    """
    _check_model(model, "convert")
    modules.check_options(1e-5, group_size, None, 0.01, on_nonfinite, on_single)
    layers, _ = _layers(model)
    fusions = _fusions(model)[0] if fuse else []
    for name, module in layers.items():
        if type(module) in _OURS:
            _adopt(module, name, on_nonfinite, on_single, group_size)
    _fuse(model, fusions)
    return model


def revert(model: M) -> M:
    """Turn every batch norm of ours in `model` into torch's, in place: what `convert` does, undone.

    What torch's layers cannot do is lost: a layer frozen by `freeze` is put into evaluation mode,
    and options like `group_size` go.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    ArgumentError
        A layer was made with an activation of its own, for which torch's layer has no place;
        nothing has been reverted then.
    """
    _check_model(model, "revert")
    for name, module in model.named_modules():
        if type(module) in _TORCHS and module.activation is not None and not module._joined:
            raise ArgumentError(
                f"'{name}' was made with activation={module.activation!r}, which torch's layer "
                "does not have. Put a module for it into the model and set its activation to "
                "None first."
            )
    for module in list(model.modules()):
        for child_name, child in module._modules.items():
            if isinstance(child, Joined):
                child.original.training = child.training
                module._modules[child_name] = child.original
        if isinstance(module.__dict__.get("forward"), _Rewritten):
            del module.__dict__["forward"]
        if type(module) in _TORCHS:
            _release(module)
    return model


def explain(model: nn.Module) -> Report:
    """What `convert` did to `model`, or would do, layer by layer.

    Returns
    -------
    Report
        Prints as text.

    Raises
    ------
    ArgumentError
        `model` is no Module.
    """
    _check_model(model, "explain")
    layers, report = _layers(model)
    fusions, unfused = _fusions(model)
    planned = {f.layer: f.what for f in fusions}
    for name, module in layers.items():
        report.converted[name] = getattr(module, "_joined", "") or planned.get(name, "")
        if name in unfused and not report.converted[name]:
            report.unfused[name] = unfused[name]
    return report


class Joined(nn.Identity):
    """Stands where an activation stood that has joined the batch norm before it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "original", original)  # not a child: it has no part in the model
        self.training = original.training

    original: nn.Module

    def extra_repr(self) -> str:
        """What stood here."""
        return repr(self.original)


def _check_model(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name} takes a torch.nn.Module, got {type(model).__name__}.")


# ---- layers -------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], Report]:
    """Layers that are or can be ours by name, and a report with the others."""
    layers, report = {}, Report()
    for name, module in model.named_modules():
        if type(module) in _OURS or type(module) in _TORCHS:
            layers[name] = module
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            report.skipped[name] = _reason(module)
        elif isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in getattr(
            module, "original_name", ""
        ):
            report.skipped[name] = "it is compiled to TorchScript"
    return layers, report


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: convert after the first forward"
    if isinstance(module, nn.SyncBatchNorm):
        return "it synchronizes its statistics across processes"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    return f"{type(module).__name__} is a subclass of torch's layer and may do something else"


def _adopt(
    module: nn.Module, name: str, on_nonfinite: str, on_single: str, group_size: int | None
) -> None:
    module.__class__ = _OURS[type(module)]
    assert isinstance(module, Layer)
    module.on_nonfinite = on_nonfinite
    module.on_single = on_single
    module.group_size = group_size
    module.adopt(name)


def _release(module: nn.Module) -> None:
    assert isinstance(module, Layer)
    if module.stats_frozen:
        module.training = False
    module.__class__ = _TORCHS[type(module)]  # type: ignore[assignment]
    for name in list(module.__dict__):
        if name in Layer.EXTRAS:
            del module.__dict__[name]


# ---- what can join ------------------------------------------------------------------------------


@dataclass
class _Fusion:
    """One activation, with or without a residual, that joins one layer."""

    layer: str  # name in the model
    owner: str  # of the module whose forward calls both
    activation: str | None
    slope: float
    relu: str | None  # name of the activation's module in the owner, None for a function
    what: str  # in words
    graph: fx.Graph | None  # of the owner, where its forward must be written anew
    call: fx.Node | None  # nodes of that graph
    add: fx.Node | None
    act: fx.Node | None


def _activation_of(node: fx.Node, owner: nn.Module) -> tuple[str, float] | None:
    """Name and slope of the activation that a node applies to one tensor."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        if type(module) is nn.ReLU:
            return "relu", 0.01
        if type(module) is nn.LeakyReLU:
            return "leaky_relu", float(module.negative_slope)
        return None
    one = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
    if node.op == "call_function":
        if node.target in (F.relu, F.relu_, torch.relu, torch.relu_) and one:
            return "relu", 0.01
        if node.target is F.leaky_relu:
            slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
            if isinstance(slope, (int, float)):
                return "leaky_relu", float(slope)
    if node.op == "call_method" and node.target in ("relu", "relu_") and one:
        return "relu", 0.01
    return None


def _residual_of(node: fx.Node, call: fx.Node) -> fx.Node | None:
    """What `node` adds to the result of `call`; None if it does not just add one tensor."""
    functions = (operator.add, operator.iadd, torch.add)
    methods = ("add", "add_", "__add__", "__iadd__")
    adds = (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )
    if not adds or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if first is call and isinstance(second, fx.Node) and second is not call:
        return second
    if second is call and isinstance(first, fx.Node) and not _in_place(node):
        return first
    return None


def _in_place(node: fx.Node) -> bool:
    return node.target is operator.iadd or node.target in ("add_", "__iadd__")


def _fusions(model: nn.Module) -> tuple[list[_Fusion], dict[str, str]]:
    """What can join, and for layers that an activation follows all the same the reason why not."""
    found: list[_Fusion] = []
    refused: dict[str, str] = {}
    names = {id(m): n for n, m in model.named_modules()}
    parents = Counter(id(c) for m in model.modules() for c in m._modules.values() if c is not None)
    graphs = _Graphs(model)
    for owner_name, owner in model.named_modules():
        layers = {n: c for n, c in owner.named_children() if type(c) in _OURS or type(c) in _TORCHS}
        if not layers:
            continue
        if isinstance(owner.__dict__.get("forward"), _Rewritten):
            continue  # has been done
        graph = graphs.of(owner_name)
        calls = _calls(graph)
        per_owner: list[_Fusion] = []
        for child_name, layer in layers.items():
            name = names[id(layer)]
            if getattr(layer, "activation", None) is not None:
                continue
            if isinstance(graph, str):
                refused[name] = graph
                continue
            try:
                fusion = _match(graph, calls, owner, child_name, layer)
                if fusion is None:
                    continue
                if parents[id(layer)] > 1:
                    raise _RefusedError("the layer is shared between modules")
                graphs.check_above(owner_name)
            except _RefusedError as why:
                refused[name] = str(why)
                continue
            fusion.layer, fusion.owner = name, owner_name
            per_owner.append(fusion)
        if isinstance(graph, fx.Graph):
            _settle(graph, calls, owner, per_owner, parents)
            if any(f.graph is not None for f in per_owner):
                try:
                    _names_used(graph)
                except _RefusedError as why:
                    refused.update((f.layer, str(why)) for f in per_owner)
                    continue
        found += per_owner
    return found, refused


class _RefusedError(Exception):
    """Why something cannot join."""


def _calls(graph: fx.Graph | str) -> dict[str, list[fx.Node]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes if isinstance(graph, fx.Graph) else ():
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _match(
    graph: fx.Graph, calls: dict[str, list[fx.Node]], owner: nn.Module, name: str, layer: nn.Module
) -> _Fusion | None:
    """What follows one layer in its owner's graph; None if that is nothing that could join."""
    nodes = calls.get(name, [])
    if not nodes:
        return None
    if len(nodes) > 1:
        if all(_follower(n, owner) for n in nodes):
            raise _RefusedError("the layer is called more than once")
        return None
    call = nodes[0]
    if len(call.args) != 1 or call.kwargs:
        return None
    if len(call.users) != 1:
        if any(_activation_of(u, owner) for u in call.users):
            raise _RefusedError("its output is used by more than the activation")
        return None
    user = next(iter(call.users))
    add = None
    residual = _residual_of(user, call)
    if residual is not None:
        add = user
        act = next(iter(add.users)) if len(add.users) == 1 else None
        if act is not None and _activation_of(act, owner) is None:
            act = None
        _check_movable(call, owner)
    elif _activation_of(user, owner) is not None:
        act = user
    else:
        return None
    _check_hooks(layer, "the layer")
    activation, slope, relu, what = None, 0.01, None, "the residual addition"
    if act is not None:
        kind = _activation_of(act, owner)
        assert kind is not None
        activation, slope = kind
        label = "ReLU" if activation == "relu" else "leaky ReLU"
        if act.op == "call_module":
            relu = str(act.target)
            _check_hooks(owner.get_submodule(relu), f"'{relu}'")
            label += f" '{relu}'"
        what = f"{what} and {label}" if add is not None else label
    return _Fusion("", "", activation, slope, relu, what, None, call, add, act)


def _follower(node: fx.Node, owner: nn.Module) -> bool:
    return any(_activation_of(u, owner) for u in node.users)


def _check_movable(call: fx.Node, owner: nn.Module) -> None:
    """Refuse where calling the layer later, at the addition, might give it another input."""
    source = call.args[0]
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        raise _RefusedError("the input is used by others, who might change it before the addition")
    fresh = source.op == "call_module" and type(owner.get_submodule(str(source.target))) in _FRESH
    if not fresh:
        raise _RefusedError(
            "the input is not the output of a convolution or linear layer, and might change "
            "before the addition"
        )


def _check_hooks(module: nn.Module, label: str) -> None:
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise _RefusedError(f"{label} has hooks, which would see something else")


def _settle(
    graph: fx.Graph,
    calls: dict[str, list[fx.Node]],
    owner: nn.Module,
    fusions: list[_Fusion],
    parents: Counter[int],
) -> None:
    """Decide whether an activation's module may step aside, or the forward is written anew."""
    taken = Counter(f.relu for f in fusions if f.relu is not None)
    aside = {
        relu
        for relu, times in taken.items()
        if times == len(calls[relu])
        and parents[id(owner.get_submodule(relu))] == 1
        and relu in owner._modules
    }
    rewrite = any(f.add is not None or (f.act is not None and f.relu not in aside) for f in fusions)
    for fusion in fusions:
        if rewrite:
            fusion.graph = graph
        if fusion.relu not in aside:
            fusion.relu = None


# ---- graphs -------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Sees one module's forward; what it calls stays closed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Graphs:
    """The graph of every module's own forward, or in words why there is none."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._found: dict[tuple[str, bool], fx.Graph | str] = {}

    def of(self, name: str) -> fx.Graph | str:
        """The graph that holds in training and in evaluation."""
        training, evaluation = self._in_mode(name, True), self._in_mode(name, False)
        for graph in (training, evaluation):
            if isinstance(graph, str):
                return graph
        assert isinstance(training, fx.Graph)
        if str(training) != str(evaluation):
            return f"{self._label(name)} does something else in training than in evaluation"
        return training

    def check_above(self, name: str) -> None:
        """Refuse unless no module further up reaches past the module of this name."""
        while name:
            inside = name
            name = name.rpartition(".")[0]
            for training in (True, False):
                graph = self._in_mode(name, training)
                if isinstance(graph, str):
                    raise _RefusedError(f"{graph}, and might use the layer by itself")
                below = inside[len(name) + 1 if name else 0 :] + "."
                if any(
                    n.op in ("call_module", "get_attr") and str(n.target).startswith(below)
                    for n in graph.nodes
                ):
                    raise _RefusedError(f"{self._label(name)} uses parts of '{inside}' by itself")

    def _label(self, name: str) -> str:
        kind = type(self._modules[name]).__name__
        return f"forward of {kind} '{name}'" if name else f"forward of {kind}"

    def _in_mode(self, name: str, training: bool) -> fx.Graph | str:
        key = (name, training)
        if key not in self._found:
            self._found[key] = self._trace(name, training)
        return self._found[key]

    def _trace(self, name: str, training: bool) -> fx.Graph | str:
        module = self._modules[name]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return fx.Graph()  # without a forward; whoever uses it is further up
        if isinstance(module, torch.jit.ScriptModule):
            return f"{self._label(name)} is compiled to TorchScript"
        forward = inspect.getattr_static(type(module), "forward", None)
        if "forward" in module.__dict__ and not isinstance(module.forward, _Rewritten):
            return f"{self._label(name)} has been replaced"
        if not inspect.isfunction(forward):
            return f"{self._label(name)} is not a plain function"
        if not isinstance(module, nn.Sequential):
            parameters = list(inspect.signature(forward).parameters.values())[1:]
            if any(
                p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                for p in parameters
            ):
                return f"{self._label(name)} has optional arguments"
        with _untouched(module):
            module.training = training
            module.__dict__.pop("forward", None)
            try:
                graph: fx.Graph = _Tracer().trace(module)
            except Exception as error:
                first = str(error).strip().splitlines()
                return (
                    f"{self._label(name)} cannot be traced ({type(error).__name__}: "
                    f"{first[0][:80] if first else ''})"
                )
        return graph


class _untouched:
    """Whatever a traced forward assigns to its module is taken back."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = {
            k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()
        }

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._module.__dict__.clear()
        self._module.__dict__.update(self._before)


# ---- carrying it out ----------------------------------------------------------------------------


def _fuse(model: nn.Module, fusions: list[_Fusion]) -> None:
    rewritten: dict[str, fx.Graph] = {}
    for fusion in fusions:
        layer, owner = model.get_submodule(fusion.layer), model.get_submodule(fusion.owner)
        assert isinstance(layer, Layer)
        layer.activation, layer.negative_slope = fusion.activation, fusion.slope
        layer._joined = fusion.what
        if fusion.relu is not None and not isinstance(owner._modules[fusion.relu], Joined):
            stood = owner._modules[fusion.relu]
            assert stood is not None
            owner._modules[fusion.relu] = Joined(stood)
        if fusion.graph is not None:
            _rewrite(fusion)
            rewritten[fusion.owner] = fusion.graph
    for name, graph in rewritten.items():
        owner = model.get_submodule(name)
        graph.lint()
        object.__setattr__(owner, "forward", _Rewritten(owner, name, graph))


def _rewrite(fusion: _Fusion) -> None:
    graph, call, add, act = fusion.graph, fusion.call, fusion.add, fusion.act
    assert graph is not None
    assert call is not None
    result = call
    if add is not None:
        residual = _residual_of(add, call)
        with graph.inserting_before(add):
            result = graph.call_module(str(call.target), call.args, {"residual": residual})
            if _in_place(add):  # which does not widen the result
                result = graph.call_method("type_as", (result, call.args[0]))
        add.replace_all_uses_with(result)
        graph.erase_node(add)
        graph.erase_node(call)
    if act is not None and fusion.relu is None:
        act.replace_all_uses_with(result)
        graph.erase_node(act)


class _Rewritten:
    """A module's forward, written anew from its graph; holds while the module is as it was."""

    def __init__(self, owner: nn.Module, name: str, graph: fx.Graph) -> None:
        self.owner, self.name = owner, name
        self.seen = _plain_attributes(owner)
        self.source = graph.python_code("self").src
        self.constants, self.addresses = _names_used(graph)
        self._function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _plain_attributes(self.owner) != self.seen:
            raise ArgumentError(
                f"{type(self.owner).__name__} '{self.name}' has changed since convert wrote its "
                "forward anew. Call revert(model), then convert(model) again."
            )
        function = self._function
        if function is None:
            function = self._function = self._compiled()
        return function(self.owner, *args, **kwargs)

    def _compiled(self) -> Callable[..., Any]:
        space = {name: _at(*address) for name, address in self.addresses.items()}
        space.update(self.constants)
        exec(compile(self.source, f"<forward of {self.name}>", "exec"), space)
        function: Callable[..., Any] = space["forward"]
        return function

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}


def _names_used(graph: fx.Graph) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The constants, and where the functions are imported from, that a graph's code mentions."""
    code = graph.python_code("self")
    used = {n: v for n, v in code.globals.items() if re.search(rf"\b{n}\b", code.src)}
    constants = {n: v for n, v in used.items() if isinstance(v, (int, float, str, type(None)))}
    return constants, {n: _address(v) for n, v in used.items() if n not in constants}


def _address(value: Any) -> tuple[str, str]:
    """Where a function or module is imported from, so that it can be pickled with a model."""
    if inspect.ismodule(value):
        return value.__name__, ""
    for module in (getattr(value, "__module__", None), "torch", "torch.nn.functional"):
        for name in (getattr(value, "__qualname__", None), getattr(value, "__name__", None)):
            try:
                if module and name and _at(module, name) is value:
                    return module, name
            except (ImportError, AttributeError):
                continue
    raise _RefusedError(f"its forward uses {value!r}, which cannot be imported by name")


def _at(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    return operator.attrgetter(name)(found) if name else found


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a forward may have been decided by when it was traced."""
    plain: dict[str, Any] = {
        k: v
        for k, v in module.__dict__.items()
        if isinstance(v, (int, float, str, tuple, type(None))) and k != "training"
    }
    for name, child in module._modules.items():
        plain[name] = child is None
    return plain
