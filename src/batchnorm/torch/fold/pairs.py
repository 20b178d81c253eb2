"""Which batch norms may be folded into which linear layers, and why others may not.

Two layers are neighbours if, on all paths, every output of the first goes to the second and nowhere
else, and every input of the second comes from the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from .branches import Sums
from .calls import Call
from .groups import Group, Plan
from .layers import (
    activation_of,
    affine_of,
    has_hooks,
    is_linear,
    is_norm,
    is_transparent,
    reason_of_linear,
    reason_of_norm,
    zero_padded,
)
from .paths import Paths
from .reach import may_take_apart, references
from .tracing import METADATA, is_torchs

__all__ = ["make_plan", "of_layer"]


def make_plan(model: nn.Module, paths: Paths, calls: Call, copy: Callable[[], nn.Module]) -> Plan:
    """Find what may be folded.

    Parameters
    ----------
    model
        That `paths` were followed in.
    paths, calls
        All that may happen in it, and what happened on the examples.
    copy
        Makes a copy of the model as it was before.
    """
    modules = dict(model.named_modules())
    flow = _Flow(modules, paths)
    reasons = _Reasons(model, modules, paths, calls, copy)
    groups: dict[str, Group] = {}
    taken: set[str] = set()
    problems: dict[str, str] = {}  # why a neighbour was not taken

    def take(layer: str, norm: str, group: Group, *, before: bool) -> bool:
        problem = reasons.of(norm) or of_layer(layer, reasons.of(layer))
        if not problem and before:
            problem = _reason_before(layer, modules[layer], modules[norm])
            if not problem and not flow.is_at_once(norm):
                problem = (
                    f"between it and '{layer}' other operations run, which may change its input "
                    "in place"
                )
        if problem:
            problems.setdefault(norm, problem)
            return False
        taken.add(norm)
        (group.before.insert(0, norm) if before else group.after.append(norm))
        groups[layer] = group
        return True

    layers = [name for name, module in modules.items() if is_linear(module)]
    for layer in layers:
        group, last = Group(layer), layer
        while (norm := flow.next(last)) in flow.norms and take(layer, norm, group, before=False):
            if activation_of(modules[norm]) is not None:
                break
            last = norm
    for layer in layers:
        group, first = groups.get(layer, Group(layer)), layer
        while (norm := flow.previous(first)) in flow.norms and norm not in taken:
            if activation_of(modules[norm]) is not None or not take(
                layer, norm, group, before=True
            ):
                break
            first = norm

    def reason(name: str) -> str:
        return "it is folded elsewhere" if name in taken else reasons.of(name)

    for group in list(Sums(model, paths, calls, groups, reason, reasons.reached)):
        for branch in group.beside:
            groups.pop(branch.layer, None)
        groups[group.layer] = group
        taken.update(group.norms)

    plan = Plan([groups[layer] for layer in layers if layer in groups])
    for name, module in modules.items():
        if not is_norm(module) or name in taken:
            continue
        activated = activation_of(module) is not None
        problem = problems.get(name) or flow.problem(name, activated=activated)
        if name not in flow.called:
            reached = reasons.reached(module)
            into = plan.refused if reached else plan.alone
            into[name] = reached or "it is not called on any path of the forward"
        elif problem:
            plan.refused[name] = reasons.of(name) or problem
        else:
            plan.alone[name] = flow.surroundings(name)
    return plan


def of_layer(layer: str, reason: str) -> str:
    """Why a batch norm stays, if the layer is the reason."""
    return f"'{layer}' cannot take it: {reason}" if reason else ""


def _reason_before(name: str, layer: Any, norm: Any) -> str:
    """Why a batch norm cannot be folded into the layer after it."""
    if not affine_of(norm).shift.any():
        return ""
    if zero_padded(layer):
        return f"'{name}' comes after it and pads with zeros, which do not pass through it"
    if getattr(layer, "transposed", False):
        return f"'{name}' comes after it and is transposed: its outputs see a shift unequally"
    return ""


# ---- where outputs go ---------------------------------------------------------------------------


_MORE = "(more than one tensor)"


class _Flow:
    """Where the outputs of layers go, and where their inputs come from, on all paths."""

    def __init__(self, modules: dict[str, nn.Module], paths: Paths) -> None:
        self._modules = modules
        self.norms = {name for name, module in modules.items() if is_norm(module)}
        self._layers = [name for name, module in modules.items() if is_linear(module)]
        self._known = {*self.norms, *self._layers}
        self.called: set[str] = set()
        self._at_once: dict[str, bool] = {}
        # For each layer, for each call of it on a path: all users of its output; and the source.
        self._users: dict[str, list[tuple[str, ...]]] = {}
        self._sources: dict[str, list[str]] = {}
        for root, graphs in paths.graphs.items():
            for graph in graphs:
                for node in graph.nodes:
                    if node.op == "call_module" and self._is_layer(node):
                        self._look_at(node, root)

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in self._known

    def _look_at(self, node: fx.Node, root: str) -> None:
        name = str(node.target)
        self.called.add(name)
        self._users.setdefault(name, []).append(tuple(self._users_of(node, root)))
        self._sources.setdefault(name, []).append(self._source_of(node, root))
        after = node.next
        while self._is_transparent(after) or _asks_for_metadata(after):
            after = after.next
        self._at_once[name] = self._at_once.get(name, True) and self._is_layer(after)

    def _users_of(self, node: fx.Node, root: str) -> Iterator[str]:
        for user in node.users:
            if _asks_for_metadata(user):
                continue
            if self._is_transparent(user):
                yield from self._users_of(user, root)
            elif self._is_layer(user) and _input_of(user) is node:
                yield str(user.target)
            else:
                yield _described(user, root)

    def _source_of(self, node: fx.Node, root: str) -> str:
        source = _input_of(node)
        if source is None or (node.target in self.norms and len(node.args) + len(node.kwargs) > 1):
            return _MORE
        while self._is_transparent(source):
            below = _input_of(source)
            assert below is not None
            source = below
        return str(source.target) if self._is_layer(source) else _described(source, root)

    def _is_transparent(self, node: fx.Node) -> bool:
        return (
            node.op == "call_module"
            and is_transparent(self._modules[str(node.target)])
            and _input_of(node) is not None
        )

    def next(self, name: str) -> str:
        """The layer that alone gets the outputs of this one, and nothing else; "" if none does."""
        users = {user for each in self._users.get(name, ()) for user in each or ("",)}
        only = next(iter(users)) if len(users) == 1 else ""
        return only if set(self._sources.get(only, ())) == {name} else ""

    def is_at_once(self, name: str) -> bool:
        """Whether a layer is called right after this one, whenever this one is called."""
        return self._at_once.get(name, False)

    def previous(self, name: str) -> str:
        """The layer of which this one is the next; "" if there is none."""
        sources = set(self._sources.get(name, ()))
        only = next(iter(sources)) if len(sources) == 1 else ""
        return only if only in self._sources and self.next(only) == name else ""

    def problem(self, norm: str, *, activated: bool) -> str:
        """Why this batch norm and a linear layer are no neighbours; "" if they never meet."""
        if norm not in self.called:
            return ""
        sources = self._sources[norm]
        for layer in (name for name in self._layers if self._meets(name, norm)):
            if _MORE in sources:
                return f"besides the output of '{layer}' it is given another tensor"
            for users in self._users[layer]:
                others = [user for user in users if user != norm]
                if others and norm in users:
                    return f"the output of '{layer}' also goes to {_listed(others)}"
            for users in self._users[layer]:
                if norm not in users:
                    where = f"goes to {_listed(users)}" if users else "is not used"
                    return f"'{layer}' is also called without it: then its output {where}"
            others = [source for source in sources if source != layer]
            return f"it is also called on {_listed(others)}, not only on the output of '{layer}'"
        flat = [] if activated else [user for users in self._users[norm] for user in users]
        for layer in dict.fromkeys(user for user in flat if user in self._layers):
            others = [user for user in flat if user != layer]
            if others:
                return f"its output goes to '{layer}' and to {_listed(others)}"
            others = [source for source in self._sources[layer] if source != norm]
            if not others:
                return f"its output goes to '{layer}', but is not used in another call"
            return f"'{layer}', which comes after it, is also called on {_listed(others)}"
        return ""

    def _meets(self, layer: str, norm: str) -> bool:
        return any(norm in users for users in self._users.get(layer, ()))

    def surroundings(self, norm: str) -> str:
        """What a batch norm stands between."""
        users = [user for users in self._users[norm] for user in users]
        into = f", and goes to {_listed(users)}" if users else ""
        return f"its input is {_listed(self._sources[norm])}{into}"


def _input_of(node: fx.Node) -> fx.Node | None:
    """The tensor that a layer is called on."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def _asks_for_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in METADATA


def _described(node: fx.Node, root: str) -> str:
    where = f"'{root}'" if root else "the model"
    if node.op == "output":
        return f"(what {where} returns)"
    if node.op == "placeholder":
        return f"(an input of {where})"
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_function":
        return f"({getattr(node.target, '__name__', node.target)})"
    return f"({node.target})"


def _listed(names: Iterable[str]) -> str:
    """'a', 'b' and 2 more."""
    found = [n[1:-1] if n.startswith("(") else f"'{n}'" for n in dict.fromkeys(names)]
    if len(found) > 3:
        found[3:] = [f"{len(found) - 3} more"]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


# ---- why a layer is left alone whatever is next to it -------------------------------------------


class _Reasons:
    """Why a layer must not change, whatever is next to it; "" if it may."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        paths: Paths,
        calls: Call,
        copy: Callable[[], nn.Module],
    ) -> None:
        self._modules, self._paths = modules, paths
        self._names = {id(module): name for name, module in modules.items()}
        self._everywhere: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._everywhere.setdefault(id(module), []).append(name)
        self._owners: dict[int, list[nn.Module]] = {}
        for module in modules.values():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), []).append(module)
        self._ranks: dict[str, set[int | None]] = {}
        for call in calls:
            self._ranks.setdefault(call.name, set()).add(call.rank)
        self._targets = {
            str(node.target)
            for graphs in paths.graphs.values()
            for graph in graphs
            for node in graph.nodes
            if node.op == "call_module"
        }
        leaves = (m for m in modules.values() if is_torchs(m) or is_linear(m) or is_norm(m))
        unseen = bool(paths.opaque) or any(map(has_hooks, leaves))
        self._held = references(copy()) if unseen else {}
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The reason, or ""."""
        if name not in self._known:
            module = self._modules[name]
            layer = is_linear(module)
            self._known[name] = (
                (reason_of_linear(module) if layer else reason_of_norm(module))
                or self._shared(name, module)
                or self._used(name, module)
                or self.reached(module)
                or (self._axes(name, module) if layer else "")
            )
        return self._known[name]

    def _shared(self, name: str, module: nn.Module) -> str:
        own = list(module.modules())
        for path, parameter in module.named_parameters():
            for owner in self._owners.get(id(parameter), ()):
                if all(owner is not part for part in own):
                    of = path.rpartition(".")[2]
                    return f"its {of} is also a parameter of '{self._names[id(owner)]}'"
        return ""

    def _used(self, name: str, module: nn.Module) -> str:
        if any(target.startswith(f"{name}.parametrizations.") for target in self._targets):
            return "its parametrization is also called outside of it"
        own: dict[str, torch.Tensor] = dict(module.named_buffers())
        own.update(module.named_parameters())
        own.update((k, v) for k, v in vars(module).items() if isinstance(v, torch.Tensor))
        used = self._paths.used
        for path, t in own.items():
            if id(t) in used.values or (not is_linear(module) and id(t) in used.metadata):
                return f"its {path} is also used outside of it"
        return ""

    def reached(self, module: nn.Module) -> str:
        """Whether code that cannot be followed may call this layer."""
        for name in self._everywhere[id(module)]:
            parts = name.split(".") if name else []
            for k in range(len(parts) + 1):
                holder = self._held.get(self._names[id(self._owner(parts[:k]))])
                if holder is not None:
                    what = f"'{'.'.join(parts[:k])}'" if k else "the model"
                    return f"a {holder} refers to {what}, which code that is not followed may use"
            for k in range(len(parts)):
                above = ".".join(parts[:k])
                owner = self._owner(parts[:k])
                reason = self._paths.opaque.get(self._names[id(owner)])
                if reason is not None and may_take_apart(owner, parts[k:]):
                    where = f"'{above}'" if above else "the model"
                    return f"{where} may call it in ways that cannot be followed: {reason}"
                if is_torchs(owner) and not isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
                    return f"it is a part of '{above}', which may use its weights"
        return ""

    def _owner(self, parts: list[str]) -> nn.Module:
        module = self._modules[""]
        for part in parts:
            found = module._modules[part]
            assert found is not None
            module = found
        return module

    def _axes(self, name: str, layer: Any) -> str:
        ranks = self._ranks.get(name)
        if not ranks:
            return "it did not run on the example inputs"
        convolution = hasattr(layer, "kernel_size")
        expected = 2 + len(layer.kernel_size) if convolution else 2
        wrong = [rank for rank in ranks if rank != expected]
        if not wrong:
            return ""
        what = "channels on axis 0" if convolution else "features on the last axis"
        return (
            f"its output has {wrong[0]} axes, with {what}, and batch norm normalizes axis 1 "
            f"({expected} axes are needed)"
        )
