"""How a model is wired: its operations, by watching a forward or by tracing it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ...diagnose.kinds import kind_of
from ...diagnose.records import Operation
from ..population.batches import tensors_in
from ..population.layers import is_constant

__all__ = ["by_running", "by_tracing", "followed_by_relu", "is_batch_norm"]

_IGNORED = ("__get__", "__set__", "size", "dim", "numel", "stride", "is_contiguous", "__len__")


def is_batch_norm(module: nn.Module) -> bool:
    """Whether this is one of torch's batch norms, ours, or one with constant statistics."""
    return is_constant(module) or isinstance(module, nn.modules.batchnorm._BatchNorm)


def by_running(model: nn.Module, run: Callable[[], Any]) -> list[Operation]:
    """The operations of one forward, which `run` does."""
    recorder = _Recorder(model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):  # for the names of what has no weights
                push, pop = recorder.inside(name)
                stack.callback(module.register_forward_pre_hook(push).remove)
                stack.callback(module.register_forward_hook(pop).remove)
            if is_batch_norm(module):
                enter, leave = recorder.around(name, module)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        with recorder, torch.no_grad():
            recorder.end(run())
    return recorder.operations


class _Recorder(TorchFunctionMode):
    """Notes each function of torch that is called outside of a batch norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._made: dict[int, int] = {}  # id of a tensor → the operation that made it
        self._kept: list[Any] = []  # so that no id is used again
        self._inside = 0
        self._leaf = ""
        self._owners = {
            id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()
        }

    def _inputs(self, values: Any) -> tuple[int, ...]:
        found = [self._made[id(t)] for t in tensors_in(values) if id(t) in self._made]
        return tuple(dict.fromkeys(found))

    def _add(self, operation: Operation, result: Any) -> None:
        self.operations.append(operation)
        self._kept.append(result)
        for tensor in tensors_in(result):
            self._made[id(tensor)] = len(self.operations) - 1

    def end(self, result: Any) -> None:
        """Note what the model returns."""
        self.operations.append(Operation("output", "output", self._inputs(result)))

    def inside(self, name: str) -> tuple[Any, Any]:
        """Hooks that tell which module without children runs."""

        def push(_module: nn.Module, _args: Any) -> None:
            self._leaf = name

        def pop(_module: nn.Module, _args: Any, _result: Any) -> None:
            self._leaf = ""

        return push, pop

    def around(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        """Hooks that make one operation of a batch norm."""

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inside += 1
            stack.append(self._inputs([args, kwargs]))

        def leave(_module: nn.Module, _args: Any, result: Any) -> None:
            self._inside -= 1
            self._add(Operation("batch norm", name, stack.pop()), result)
            activation = _fused(module)
            if activation:
                here = len(self.operations) - 1
                self._add(Operation("activation", activation, (here,)), result)

        stack: list[tuple[int, ...]] = []
        return enter, leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._inside or name in _IGNORED or not any(True for _ in tensors_in(result)):
            return result
        kind = kind_of(name)
        inputs = self._inputs([args, kwargs])
        if not inputs and kind == "other":
            return result
        if kind == "dropout" and not _rate(args, kwargs):
            kind = "identity"
        owner, bias = self._owner([args, kwargs]), _bias(args, kwargs)
        on_last_axis = kind == "linear" and isinstance(result, Tensor) and result.dim() > 2
        bias = bias and not on_last_axis  # which is not the axis of the channels
        owner = owner or (self._leaf if kind != "activation" else "")
        self._add(Operation(kind, owner or name, inputs, bias, on_last_axis), result)
        return result

    def _owner(self, values: Any) -> str:
        for tensor in tensors_in(values):
            if id(tensor) in self._owners:
                return self._owners[id(tensor)]
        return ""


def _fused(module: nn.Module) -> str | None:
    activation = getattr(module, "activation", None)
    return activation if isinstance(activation, str) else None


def _rate(args: Any, kwargs: Any) -> float:
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return float(rate) if isinstance(rate, (int, float)) else 1.0


def _bias(args: Any, kwargs: Any) -> bool:
    """The third argument of linear layers and convolutions."""
    return kwargs.get("bias", args[2] if len(args) > 2 else None) is not None


# ---- without data -------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_batch_norm(module) or super().is_leaf_module(module, name)


def by_tracing(model: nn.Module) -> list[Operation]:
    """The operations of a forward without running it; those of each Sequential if that fails."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a model does in its forward
        return _sequences(model)
    modules, numbers = dict(model.named_modules()), dict[fx.Node, int]()
    found: list[Operation] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        inputs = tuple(dict.fromkeys(numbers[n] for n in node.all_input_nodes if n in numbers))
        if node.op == "call_module":
            _append_module(found, str(node.target), modules[str(node.target)], inputs)
        elif node.op == "placeholder":
            found.append(Operation("input", node.name))
        elif node.op == "output":
            found.append(Operation("output", node.name, inputs))
        else:
            name = node.target if isinstance(node.target, str) else node.target.__name__
            kind = kind_of(name)
            if kind == "dropout" and not _rate(node.args, node.kwargs):
                kind = "identity"
            bias = kind in ("linear", "convolution") and _bias(node.args, node.kwargs)
            found.append(Operation(kind, name, inputs, bias))
        numbers[node] = len(found) - 1
    return found


def _append_module(
    found: list[Operation], name: str, module: nn.Module, inputs: tuple[int, ...]
) -> None:
    kind, bias = kind_of(type(module).__name__), False
    if is_batch_norm(module):
        kind = "batch norm"
    elif isinstance(module, nn.Identity) or (kind == "dropout" and not getattr(module, "p", 1)):
        kind = "identity"
    elif kind in ("linear", "convolution"):
        bias = getattr(module, "bias", None) is not None
    elif inspect.getmodule(type(module)) is nn.modules.activation and kind == "other":
        kind = "activation"
    found.append(Operation(kind, name, inputs, bias))
    activation = _fused(module) if kind == "batch norm" else None
    if activation:
        found.append(Operation("activation", activation, (len(found) - 1,)))


def _sequences(model: nn.Module) -> list[Operation]:
    """The layers of each Sequential, one after another."""
    found: list[Operation] = []
    for name, module in model.named_modules():
        if type(module) is nn.Sequential:
            found.append(Operation("input", name))
            for child_name, child in module.named_children():
                path = f"{name}.{child_name}" if name else child_name
                _append_module(found, path, child, (len(found) - 1,))
    return found


def followed_by_relu(operations: Iterable[Operation]) -> set[str]:
    """Names of batch norms whose results only a ReLU reads."""
    listed = list(operations)
    readers: dict[int, list[str]] = {}
    for operation in listed:
        for source in operation.inputs:
            readers.setdefault(source, []).append(operation.name)
    return {
        operation.name
        for number, operation in enumerate(listed)
        if operation.kind == "batch norm"
        and readers.get(number)
        and all(name.rpartition(".")[2] in ("relu", "relu_", "relu6") for name in readers[number])
    }
