"""Blocks of parallel branches that add up, which one convolution can compute.

A block like RepVGG's gives its input to several branches, each a linear layer or none, with batch
norms, and adds what they return. It is changed only if its forward is nothing but this, followed by
modules that are called one after another: it then becomes a `Sequential` of the branch with the
largest kernel, which computes the whole sum, and of these modules, under the names that they had.
Activations among them may also be functions, which become modules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..undo import set_class
from .calls import TENSOR, Call
from .groups import Branch, Group
from .layers import activation_of, geometry_of, has_hooks, is_linear, is_norm, is_transparent
from .outside import without_placeholders
from .paths import Paths, only_path
from .tracing import Context, is_torchs

__all__ = ["Sums", "become_sequential"]

#: Functions and methods of one tensor, which a Sequential holds as modules.
_ACTIVATIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.relu6: nn.ReLU6, F.hardswish: nn.Hardswish, F.silu: nn.SiLU,
}  # fmt: skip
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class Sums:
    """The blocks that one layer can compute, as groups that take the place of those given.

    Parameters
    ----------
    model, paths, calls
        As for `pairs.make_plan`.
    groups
        What is folded into each layer, by its name.
    reason
        Why a layer or batch norm must not change; "" if it may.
    reached
        Why code that cannot be followed may call a module; "" if it does not.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Paths,
        calls: Call,
        groups: dict[str, Group],
        reason: Callable[[str], str],
        reached: Callable[[nn.Module], str],
    ) -> None:
        self._modules = dict(model.named_modules())
        self._groups, self._reason, self._reached = groups, reason, reached
        self._used = paths.used.values | paths.used.metadata
        self._opaque = paths.opaque
        self._specs = calls.specs()
        self._context = Context(model, calls)
        self._stacks: dict[str, list[list[str]]] = {}
        self._opened: set[str] = set()  # modules that others call something inside of
        for root, graphs in paths.graphs.items():
            for graph in graphs:
                for node in graph.nodes:
                    if node.op == "call_module":
                        stack = _stack(node, root)
                        self._stacks.setdefault(str(node.target), []).append(stack)
                        self._opened.update(_skipped(stack))

    def __iter__(self) -> Iterator[Group]:
        """Over the groups."""
        with without_placeholders(self._modules[""], self._context.placeholders):
            for name in self._blocks():
                if (group := self._group(name)) is not None:
                    yield group

    def _blocks(self) -> Iterator[str]:
        """Modules of others that a linear layer lies in, at most three levels above."""
        found: dict[str, None] = {}
        for name, module in self._modules.items():
            if is_linear(module):
                parts = name.split(".")
                for k in range(1, min(4, len(parts) + 1)):
                    above = self._modules.get(".".join(parts[:-k]))
                    if above is not None and not is_torchs(above):
                        found[".".join(parts[:-k])] = None
        for name in found:
            module = self._modules[name]
            if not isinstance(module, nn.Sequential) and name in self._specs:
                yield name

    def _group(self, name: str) -> Group | None:
        """What one layer of this block can compute; None if it cannot be the whole block."""
        block = self._modules[name]
        if block._parameters or block._buffers or not self._is_closed(name, block):
            return None
        if any(spec.args != (TENSOR,) or spec.kwargs for spec in self._specs[name]):
            return None
        graph = self._outline(block)
        if graph is None:
            return None
        reader = _Reader(graph)
        chain, functions = list[str](), dict[str, nn.Module]()
        for node in reader.chain():
            part = str(node.target)
            if (function := _activation(node)) is not None:
                free = node.name
                while free in block._modules:
                    free += "_"
                part = f"{name}.{free}".strip(".")
                functions[part] = function
            chain.append(part)
        leaves = reader.leaves(self._returns_its_input)
        if leaves is None or len(leaves) < 2:
            return None
        called = [name for name in (*leaves, *chain) if name]
        if len(set(called)) < len(called):  # a Sequential holds each once, under one name
            return None
        branches = [self._branch(leaf, name) for leaf in leaves]
        if any(branch is None for branch in branches):
            return None
        sure = [branch for branch in branches if branch is not None]
        layers = [branch for branch in sure if branch.layer]
        if not layers:
            return None
        main = max(layers, key=lambda b: sum(geometry_of(self._modules[b.layer]).kernel))
        others = [branch for branch in sure if branch is not main]
        if not all(self._fits(other, main) for other in others):
            return None
        last: list[str] = []
        for part in chain:
            if part in functions or not is_norm(self._modules[part]) or self._reason(part):
                break
            if not self._only_called_from(part, name, part):
                break
            last.append(part)
            if activation_of(self._modules[part]) is not None:
                break
        return Group(
            main.layer,
            main.before,
            main.after,
            beside=others,
            last=last,
            block=name,
            call=main.call,
            chain=chain,
            functions=functions,
        )

    def _is_closed(self, name: str, block: nn.Module) -> bool:
        """Whether nothing else uses what is inside of a block, which may then lose parts."""
        inside = (*block.parameters(), *block.buffers())
        parts = name.split(".")
        return (
            name not in self._opened
            and not has_hooks(block)  # which may ask for what a Sequential has not got
            and not any(".".join(parts[:k]) in self._opaque for k in range(len(parts) + 1))
            and not any(id(t) in self._used for t in inside)
            and not any(self._reached(part) for part in block.modules() if part is not block)
        )

    def _outline(self, block: nn.Module) -> fx.Graph | None:
        """The only path through a block, its modules being calls; the same in training."""
        everything = set(map(id, self._modules.values()))
        graph = only_path(block, self._context, everything)
        block.training = True
        again = only_path(block, self._context, everything)
        block.training = False
        if graph is None or again is None:
            return None
        one, other = ([(n.op, n.target) for n in g.nodes] for g in (graph, again))
        return graph if one == other else None

    def _branch(self, call: str, parent: str) -> Branch | None:
        """What a module computes that is called for a branch: a layer with batch norms, or one."""
        parts = [] if not call else self._layers_of(call)
        if parts is None:
            return None
        at = [k for k, part in enumerate(parts) if is_linear(self._modules[part])]
        if len(at) > 1 or not all(self._only_called_from(p, parent, call) for p in parts):
            return None
        if any(activation_of(self._modules[p]) for p in parts if is_norm(self._modules[p])):
            return None
        if not at:
            return None if any(map(self._reason, parts)) else Branch(call, "", [], parts)
        layer, before, after = parts[at[0]], parts[: at[0]], parts[at[0] + 1 :]
        group = self._groups.get(layer, Group(layer))
        if self._reason(layer) or (group.before, group.after) != (before, after):
            return None
        return Branch(call, layer, before, after)

    def _layers_of(self, call: str) -> list[str] | None:
        """Layers and batch norms that a module calls, one after another, and nothing else."""
        module = self._modules[call]
        if is_linear(module) or is_norm(module):
            return [call]
        if is_transparent(module):
            return []
        graph = only_path(module, self._context, set())
        if graph is None:
            return None
        chain = _Reader(graph).whole_chain()
        if chain is None:
            return None
        known = [n for n in chain if not is_transparent(self._modules[n])]
        layers = [is_linear(self._modules[n]) or is_norm(self._modules[n]) for n in known]
        return known if all(layers) else None

    def _returns_its_input(self, call: str) -> bool:
        return self._layers_of(call) == []

    def _only_called_from(self, name: str, parent: str, call: str) -> bool:
        """Whether a layer is called in this module of this block alone."""
        for stack in self._stacks.get(name, [[]]):
            if parent not in stack[:-1] or stack[stack.index(parent) + 1] != call:
                return False
        return True

    def _fits(self, branch: Branch, main: Branch) -> bool:
        """Whether a branch is the layer of `main` with other weights."""
        large: Any = self._modules[main.layer]
        one = geometry_of(large)
        if not branch.layer:
            return one.is_centred() and one.inputs == one.outputs
        small: Any = self._modules[branch.layer]
        return (
            geometry_of(small).lies_within(one)
            and small.weight.dtype == large.weight.dtype
            and small.weight.device == large.weight.device
            and small.weight.requires_grad == large.weight.requires_grad
        )


def _stack(node: fx.Node, root: str) -> list[str]:
    """Names of the modules whose forwards run when this call is made, and its own."""
    found: Iterable[Any] = node.meta.get("nn_module_stack", {}).values()
    return [f"{root}.{name}".strip(".") for name, _ in found]


def _skipped(stack: list[str]) -> Iterator[str]:
    """Modules that something inside of is called, but that are not called themselves."""
    for k, name in enumerate(stack):
        parts = name.split(".") if name else []
        known = set(stack[:k])
        first = stack[0].split(".") if stack[0] else []
        for length in range(len(first) if k else len(parts), len(parts)):
            above = ".".join(parts[:length])
            if above not in known:
                yield above


class _Reader:
    """Reads a graph from its end."""

    def __init__(self, graph: fx.Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._input = inputs[0] if len(inputs) == 1 else None
        output = next(node for node in graph.nodes if node.op == "output")
        self._left = {node for node in graph.nodes if node.op not in ("placeholder", "output")}
        self._last = output.args[0]

    def _take(self, node: Any) -> bool:
        """Whether this is a node that was not looked at before."""
        if node not in self._left:
            return False
        self._left.discard(node)
        return True

    def chain(self) -> list[fx.Node]:
        """Modules and activations that are called one after another at the end."""
        found: list[fx.Node] = []
        while isinstance(self._last, fx.Node) and self._last in self._left:
            before = self._last.args[0] if _activation(self._last) else _called_on(self._last)
            if before in (None, self._input):
                break
            self._take(self._last)
            found.insert(0, self._last)
            self._last = before
        return found

    def whole_chain(self) -> list[str] | None:
        """Modules that are called one after another, if that is all."""
        found = self.chain()
        if self._last is not self._input:
            if _called_on(self._last) is not self._input or not self._take(self._last):
                return None
            found.insert(0, self._last)
        if self._left or self._input is None or any(map(_activation, found)):
            return None
        return [str(node.target) for node in found]

    def leaves(self, returns_its_input: Callable[[str], bool]) -> list[str] | None:
        """The modules called on the input whose results are added; "" is the input itself."""
        found = list(self._leaves(self._last, returns_its_input))
        if None in found or self._left or self._input is None:
            return None
        return [leaf for leaf in found if leaf is not None]

    def _leaves(self, node: Any, returns_its_input: Callable[[str], bool]) -> Iterator[str | None]:
        if node is self._input:
            yield ""
        elif isinstance(node, (int, float)) and node == 0:
            return
        elif not isinstance(node, fx.Node) or not self._take(node):
            yield None
        elif node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
            for part in node.args:
                yield from self._leaves(part, returns_its_input)
        elif (before := _called_on(node)) is self._input and before is not None:
            yield str(node.target)
        elif before is not None and returns_its_input(str(node.target)):
            yield from self._leaves(before, returns_its_input)
        else:
            yield None


def _called_on(node: Any) -> fx.Node | None:
    """The only argument of a call of a module."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    only = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return only if isinstance(only, fx.Node) else None


def _activation(node: Any) -> nn.Module | None:
    """The module that does what this call of a function does; None if there is none."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    kind = _ACTIVATIONS.get(node.target)
    if kind is None or len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    return kind(**node.kwargs)


# ---- the change ---------------------------------------------------------------------------------


def become_sequential(
    model: nn.Module, name: str, parts: list[str], new: dict[str, nn.Module]
) -> None:
    """Let a module call these modules below it one after another, under the names that they have.

    Those in `new` are not yet below it. It remains the same object.
    """
    block = model.get_submodule(name)
    inside = len(name) + 1 if name else 0
    found = nn.Sequential()
    for part in parts:
        place, path = found, part[inside:].split(".")
        for step in path[:-1]:
            if step not in place._modules:
                place.add_module(step, nn.Sequential())
            place = place._modules[step]  # type: ignore[assignment]
        place.add_module(path[-1], new[part] if part in new else model.get_submodule(part))
    found.training = block.training
    set_class(block, nn.Sequential)
    block.__dict__.clear()
    block.__dict__.update(found.__dict__)
