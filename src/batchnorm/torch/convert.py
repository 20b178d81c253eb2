"""torch's layers into ours and back, in place; and the activations that may join them.

A layer is converted by a change of class: it stays the same object, so that whoever refers to it
(parents, optimizers, hooks, lists) goes on doing so. An activation joins the layer before it only
where the source of the module that calls both (`read`) shows that nobody else sees what is between
them. Where a residual is added as well, that module gets a forward written anew, by a subclass of
its own class.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from . import modules
from .modules import Layer
from .read import Reading, UnreadableError, check_reach, functions_of, read
from .sync import SyncBatchNorm

__all__ = ["Report", "convert", "explain", "revert"]

_OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
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
    synchronized : set of str
        Names of the layers that share their batch with other processes.
    """

    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    synchronized: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        """One line a layer, and a summary first."""
        joined = sum(1 for what in self.converted.values() if what)
        lines = [
            f"batch norms of batchnorm.torch: {len(self.converted)} ({joined} with what follows in "
            f"the same pass); left alone: {len(self.skipped)}"
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
            if name in self.synchronized:
                what += "; synchronized"
            lines.append(f"  {name:<{width}}  {what}")
        return "\n".join(lines)


def convert(
    model: M,
    *,
    fuse: bool = True,
    on_nonfinite: str = "skip",
    on_single: str = "raise",
    group_size: int | None = None,
    sync: bool = False,
    process_group: Any = None,
    reproducible: bool = False,
) -> M:
    """Turn every batch norm of torch's in `model` into ours, in place.

    Layers stay the objects they are, under their names, with their parameters, buffers, hooks and
    flags, shared ones included; state dicts stay interchangeable with torch's in both directions.
    Only exact instances of `torch.nn.BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm` are converted;
    subclasses, which may do something else, are left alone. `explain` says what was done, and what
    was not and why.

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
    sync : bool
        Make every layer a `SyncBatchNorm`, which shares its batch with other processes; layers that
        are ours already become one, too, and keep their options.
    process_group, reproducible
        Of the layers that `sync` makes, as in `SyncBatchNorm`; torch's own SyncBatchNorm keeps its
        process group.

    Returns
    -------
    Module
        `model`.

    Raises
    ------
    ArgumentError
        `model` is no Module, or an option is unknown or needs ``sync=True``; nothing has been
        converted then.

    Examples
    --------
    >>> from torch import nn
    >>> from batchnorm.torch import convert, explain
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> net = convert(net)
    >>> print(explain(net))
    batch norms of batchnorm.torch: 1 (1 with what follows in the same pass); left alone: 0
      1  with ReLU '2'
    """
    _check_model(model, "convert")
    modules.check_options(1e-5, group_size, None, 0.01, on_nonfinite, on_single)
    if not sync and (process_group is not None or reproducible):
        raise ArgumentError(
            "process_group and reproducible are for layers that share their batch: "
            "pass sync=True with them."
        )
    layers, _ = _layers(model)
    fusions = _fusions(model)[0] if fuse else []
    for name, module in layers.items():
        if type(module) in _OURS:
            _adopt(module, name, on_nonfinite, on_single, group_size)
            if isinstance(module, SyncBatchNorm):
                module.reproducible = reproducible
        if sync and not isinstance(module, SyncBatchNorm):
            _synchronize(module, process_group, reproducible)
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
    if getattr(model, "_joined", ""):
        raise ArgumentError(
            f"revert takes a whole model, got a layer that its {model._joined} has joined. Revert "
            "the module that contains both."
        )
    for name, module in model.named_modules():
        if hasattr(module, "_rewritten") and "_rewritten" not in type(module).__dict__:
            raise ArgumentError(
                f"'{name}' cannot be reverted, because its class has been changed since convert "
                f"(to {type(module).__name__}). Undo that first, for instance by "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
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
        if "_rewritten" in type(module).__dict__:
            module.__class__ = type(module).__base__  # type: ignore[assignment]
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
        if isinstance(module, nn.SyncBatchNorm):
            report.synchronized.add(name)
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
        if "forward" in module.__dict__ and isinstance(module, nn.modules.batchnorm._BatchNorm):
            report.skipped[name] = "its forward has been replaced"
        elif type(module) in _OURS or type(module) in _TORCHS:
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


def _synchronize(module: nn.Module, process_group: Any, reproducible: bool) -> None:
    alone = type(module)
    module.__class__ = SyncBatchNorm
    assert isinstance(module, SyncBatchNorm)
    module._alone = alone
    module.process_group = process_group
    module.reproducible = reproducible


def _release(module: nn.Module) -> None:
    assert isinstance(module, Layer)
    if module.stats_frozen:
        module.training = False
    kind: type[nn.Module] = type(module)
    if isinstance(module, SyncBatchNorm) and module._alone is not None:
        kind = module._alone
        del module.process_group
    module.__class__ = _TORCHS[kind]  # type: ignore[assignment]
    for name in list(module.__dict__):
        if name in SyncBatchNorm.EXTRAS:
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
    call: fx.Node
    add: fx.Node | None
    act: fx.Node | None
    reading: Reading | None = None  # of the owner, where its forward must be written anew


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
    if len(node.args) == 2 and isinstance(node.args[1], bool) and not node.kwargs:
        one = node.target is F.relu
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
    if first is second:
        return None
    if first is call and isinstance(second, fx.Node) and second is not call:
        return second
    if second is call and isinstance(first, fx.Node) and not _in_place(node):
        return first
    return None


def _in_place(node: fx.Node) -> bool:
    return node.target is operator.iadd or node.target in ("add_", "__iadd__")


def _fusions(model: nn.Module) -> tuple[list[_Fusion], dict[str, str]]:
    """What can join, and for layers that something follows all the same why it cannot."""
    found: list[_Fusion] = []
    refused: dict[str, str] = {}
    names = {id(m): n for n, m in model.named_modules()}
    parents = Counter(id(c) for m in model.modules() for c in m._modules.values() if c is not None)
    hidden = {id(m) for m in _hidden_references(model)}
    readings = _Readings(model)
    for owner_name, owner in model.named_modules():
        layers = {
            n: c
            for n, c in owner.named_children()
            if (type(c) in _OURS or type(c) in _TORCHS)
            and getattr(c, "activation", None) is None
            and "forward" not in c.__dict__
        }
        if not layers or "_rewritten" in type(owner).__dict__:
            continue
        reading = readings.of(owner_name)
        if isinstance(reading, str):
            refused.update((names[id(layer)], reading) for layer in layers.values())
            continue
        fusions: list[_Fusion] = []
        for child_name, layer in layers.items():
            name = names[id(layer)]
            try:
                fusion = _match(reading.graph, owner, child_name, layer)
                if fusion is None:
                    continue
                if parents[id(layer)] > 1:
                    raise _RefusedError("the layer is shared between modules")
                if id(layer) in hidden or id(owner) in hidden:
                    raise _RefusedError("something else in the model refers to it directly")
                if any(f.add is not None and f.add is fusion.add for f in fusions):
                    raise _RefusedError("the other summand has joined the addition")
                _check_other_methods(owner, {child_name, fusion.relu or child_name})
                readings.check_above(owner)
            except _RefusedError as why:
                refused[name] = str(why)
                continue
            fusion.layer, fusion.owner = name, owner_name
            fusions.append(fusion)
        try:
            _settle(reading, owner, fusions, parents, hidden)
        except _RefusedError as why:
            refused.update((f.layer, str(why)) for f in fusions)
            continue
        found += fusions
    return found, refused


def _hidden_references(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that others hold without being their parents, and might call."""

    def inside(value: Any, depth: int = 0) -> Iterator[nn.Module]:
        if isinstance(value, nn.Module):
            yield from value.modules()
        elif depth > 4 or isinstance(value, (torch.Tensor, type, str, bytes)):
            return
        elif isinstance(value, (list, tuple, set, frozenset)):
            for v in value:
                yield from inside(v, depth + 1)
        elif isinstance(value, dict):
            for v in value.values():
                yield from inside(v, depth + 1)
        elif hasattr(value, "__self__"):  # a method
            yield from inside(value.__self__, depth + 1)
        elif not inspect.ismodule(value) and hasattr(value, "__dict__"):
            yield from inside(vars(value), depth + 1)

    for module in model.modules():
        for name, value in module.__dict__.items():
            if name != "_modules":
                yield from inside(value)


class _RefusedError(Exception):
    """Why something cannot join."""


def _calls(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_module" and n.target == name]


def _match(graph: fx.Graph, owner: nn.Module, name: str, layer: nn.Module) -> _Fusion | None:
    """What follows one layer in its owner's graph; None if that is nothing that could join."""
    nodes = _calls(graph, name)
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
        kind = None if act is None else _activation_of(act, owner)
        if kind is None or kind[0] != "relu":
            act = None  # a leaky ReLU remembers what it was given, not what it gave
        _check_movable(call, add, owner)
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
    return _Fusion("", "", activation, slope, relu, what, call, add, act)


def _follower(node: fx.Node, owner: nn.Module) -> bool:
    return any(_activation_of(u, owner) for u in node.users)


def _check_movable(call: fx.Node, add: fx.Node, owner: nn.Module) -> None:
    """Refuse where calling the layer later, at the addition, might give it another input."""
    source = call.args[0]
    fresh = isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1
    if fresh:
        assert isinstance(source, fx.Node)
        module = owner.get_submodule(str(source.target))
        fresh = type(module) in _FRESH and not _is_touched(module)
    if not fresh:
        raise _RefusedError(
            "its input is not the output of a convolution or linear layer made for it alone, and "
            "might change before the addition"
        )
    between = call.next
    while between is not add:
        if between.op == "call_module":
            for module in owner.get_submodule(str(between.target)).modules():
                known = type(module).__module__.startswith("torch.nn.") or isinstance(module, Layer)
                if not known or _is_touched(module):
                    raise _RefusedError(
                        f"'{between.target}', called before the addition, is not torch's alone"
                    )
        between = between.next


def _check_other_methods(owner: nn.Module, names: set[str]) -> None:
    """Refuse where a method beside those that forward is made of mentions one of the children."""
    for base in type(owner).__mro__:
        if base is nn.Module:
            return
        for method, value in base.__dict__.items():
            mentions = {n for f in functions_of(value) for n in f.__code__.co_names} & names
            if mentions and method not in ("__init__", "forward"):
                forward = getattr(type(owner), "forward", None)
                called = forward is not None and method in forward.__code__.co_names
                if not called:
                    raise _RefusedError(f"method '{method}' might use it, too")


def _is_touched(module: nn.Module) -> bool:
    """Whether an instance does something else than its class."""
    return "forward" in module.__dict__ or any(getattr(module, hooks, None) for hooks in _HOOKS)


def _check_hooks(module: nn.Module, label: str) -> None:
    if _is_touched(module):
        raise _RefusedError(f"{label} has hooks or another forward, which would see something else")


def _settle(
    reading: Reading,
    owner: nn.Module,
    fusions: list[_Fusion],
    parents: Counter[int],
    hidden: set[int],
) -> None:
    """Decide whether an activation's module may step aside, or the forward is written anew."""
    graph = reading.graph
    taken = Counter(f.relu for f in fusions if f.relu is not None)
    aside = {
        relu
        for relu, times in taken.items()
        if times == len(_calls(graph, relu))
        and parents[id(owner.get_submodule(relu))] == 1
        and id(owner.get_submodule(relu)) not in hidden
        and relu in owner._modules
    }
    rewrite = any(f.add is not None or (f.act is not None and f.relu not in aside) for f in fusions)
    if rewrite and type(owner).forward is nn.Sequential.forward:
        # Which may be sliced and grow: what its forward does is up to it.
        raise _RefusedError("the activation's module stands elsewhere as well")
    # What was decided by a child's being there holds as long as the forward checks it.
    rewrite = rewrite or bool(fusions and reading.decided)
    if rewrite:
        for method in ("__reduce__", "__reduce_ex__", "__getstate__"):
            if inspect.getattr_static(type(owner), method, None) is not inspect.getattr_static(
                nn.Module, method, None
            ):
                raise _RefusedError(f"{type(owner).__name__} has a way of its own to be copied")
        _names_used(graph)
    for fusion in fusions:
        if rewrite:
            fusion.reading = reading
        if fusion.relu not in aside:
            fusion.relu = None


class _Readings:
    """What every module's own forward does, or in words why that cannot be said."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._found: dict[str, Reading | str] = {}

    def of(self, name: str) -> Reading | str:
        """The reading of the module of this name."""
        if name not in self._found:
            try:
                self._found[name] = read(self._modules[name])
            except UnreadableError as why:
                self._found[name] = f"{self._label(name)} {why}"
        return self._found[name]

    def check_above(self, owner: nn.Module) -> None:
        """Refuse unless no module further up, on any way, reaches past this one."""
        for name in [n for n, m in self._modules.items() if m is owner]:
            above = name
            while above:
                above, _, child = above.rpartition(".")
                module = self._modules[above]
                if isinstance(module, torch.jit.ScriptModule):
                    raise _RefusedError(f"{self._label(above)} is compiled to TorchScript")
                try:
                    check_reach(module, child)
                except UnreadableError as why:
                    raise _RefusedError(f"{type(module).__name__} {above!r} {why}") from None

    def _label(self, name: str) -> str:
        kind = type(self._modules[name]).__name__
        return f"forward of {kind} '{name}'" if name else f"forward of {kind}"


# ---- carrying it out ----------------------------------------------------------------------------


def _fuse(model: nn.Module, fusions: list[_Fusion]) -> None:
    rewritten: dict[str, Reading] = {}
    joined: dict[str, list[str]] = {}
    for fusion in fusions:
        layer, owner = model.get_submodule(fusion.layer), model.get_submodule(fusion.owner)
        assert isinstance(layer, Layer)
        layer.activation, layer.negative_slope = fusion.activation, fusion.slope
        layer._joined = fusion.what
        if fusion.relu is not None and not isinstance(owner._modules[fusion.relu], Joined):
            stood = owner._modules[fusion.relu]
            assert stood is not None
            owner._modules[fusion.relu] = Joined(stood)
        if fusion.reading is not None:
            _rewrite(fusion, fusion.reading.graph)
            rewritten[fusion.owner] = fusion.reading
            joined.setdefault(fusion.owner, []).append(str(fusion.call.target))
    for name, reading in rewritten.items():
        owner = model.get_submodule(name)
        owner.__class__ = _subclass(type(owner), _Rewritten.of(reading, joined[name]))


def _rewrite(fusion: _Fusion, graph: fx.Graph) -> None:
    call, add, act = fusion.call, fusion.add, fusion.act
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


class _Rewritten(NamedTuple):
    """A forward written anew, as it is pickled with its module."""

    source: str
    constants: tuple[tuple[str, Any], ...]
    addresses: tuple[tuple[str, str, str], ...]
    decided: tuple[tuple[str, bool | int], ...]  # as in `Reading`
    joined: tuple[str, ...]  # layers that something has joined

    @classmethod
    def of(cls, reading: Reading, joined: list[str]) -> _Rewritten:
        constants, addresses = _names_used(reading.graph)
        source = reading.graph.python_code("self").src
        checked = re.sub(r"(?m)^(def forward\(.*:)$", r"\1\n    _batchnorm_check(self)", source)
        return cls(
            checked,
            tuple(constants.items()),
            tuple((name, *address) for name, address in addresses.items()),
            tuple(reading.decided.items()),
            tuple(joined),
        )


_SUBCLASSES: dict[tuple[type[nn.Module], _Rewritten], type[nn.Module]] = {}


def _subclass(base: type[nn.Module], rewritten: _Rewritten) -> type[nn.Module]:
    """One class for all modules of a class that are rewritten alike."""
    key = (base, rewritten)
    if key not in _SUBCLASSES:
        _SUBCLASSES[key] = _made_subclass(base, rewritten)
    return _SUBCLASSES[key]


def _made_subclass(base: type[nn.Module], rewritten: _Rewritten) -> type[nn.Module]:
    space: dict[str, Any] = {name: _at(*address) for name, *address in rewritten.addresses}
    space.update(rewritten.constants)
    space["_batchnorm_check"] = _check_unchanged
    exec(compile(rewritten.source, f"<forward of {base.__name__}>", "exec"), space)
    return type(
        base.__name__,
        (base,),
        {
            "forward": space["forward"],
            "_rewritten": rewritten,
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        },
    )


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Copy and pickle by the class that can be imported."""
    made: Any = type(module)
    return _restore, (made.__base__, made._rewritten), _state(module)


def _state(module: Any) -> Any:
    return module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__.copy()


def _restore(base: type[nn.Module], rewritten: _Rewritten) -> nn.Module:
    made = _subclass(base, _Rewritten(*rewritten))
    return made.__new__(made)


def _check_unchanged(module: Any) -> None:
    rewritten = module._rewritten
    for name, known in rewritten.decided:
        child = _child(module, name)
        if isinstance(known, bool):
            now: bool | int = child is None
        else:
            now = 0 if child is None else len(child._modules)
        if now != known:
            _refuse_changed(module, name)
    for name in rewritten.joined:
        child = _child(module, name)
        if child is None or not getattr(child, "_joined", ""):
            _refuse_changed(module, name)


def _child(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _refuse_changed(module: Any, name: str) -> None:
    raise ArgumentError(
        f"'{name}' of {type(module).__name__} has changed since convert wrote its forward anew. "
        "Call revert(model), then convert(model) again."
    )


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
