"""Which batch norms may be folded into which layers, and the graph without them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping

from onnx import NodeProto

from ...folding import Affine, Linear
from ...folding.sums import Part
from ...native import Array
from ..graphs import Graphs, Refused, Scope
from .layers import LINEAR, Folding, affine_of, biased, geometry, layer_of

__all__ = ["Pairs"]

_MOST = 64  # nodes of a sum: more are no parallel branches


class Pairs:
    """Takes batch norms out of graphs, until none is left that may be folded.

    Parameters
    ----------
    excluded
        Batch norms that stay, and why.
    apart
        Outputs of sums whose branches stay apart.

    Attributes
    ----------
    refused, alone : dict of str to str
    """

    def __init__(
        self,
        graphs: Graphs,
        excluded: Mapping[str, str],
        apart: Collection[tuple[tuple[str, ...], str]],
    ) -> None:
        self._graphs, self._excluded, self._apart = graphs, excluded, apart
        self._layers: dict[int, Folding] = {}
        self.refused: dict[str, str] = {}
        self.alone: dict[str, str] = {}
        changed = True
        while changed:
            changed = sum(self._fold(s, n) for s, n in [*graphs.norms()]) > 0
            for scope in graphs.scopes:
                for node in reversed([*scope.alive()]):
                    changed |= self._merge(scope, node)
        for scope, norm in graphs.norms():
            self._explain(scope, norm)

    @property
    def foldings(self) -> list[Folding]:
        """The layers that have changed, whose weights are still to be written."""
        return [f for f in self._layers.values() if f.report.norms or len(f.parts) > 1]

    # ---- one batch norm -------------------------------------------------------------------------

    def _fold(self, scope: Scope, norm: NodeProto) -> bool:
        for way in (self._into_former, self._into_next):
            try:
                if way(scope, norm):
                    return True
            except Refused:
                pass
        return False

    def _explain(self, scope: Scope, norm: NodeProto) -> None:
        label = self._graphs.label(norm)
        if label in self._excluded:
            self.refused[label] = self._excluded[label]
            return
        try:
            near = self._into_former(scope, norm) or self._into_next(scope, norm)
            assert not near
        except Refused as reason:
            self.refused[label] = str(reason)
            return
        source = scope.producers.get(norm.input[0])
        made = (
            f"'{self._graphs.label(source)}' ({source.op_type})"
            if source is not None
            else "outside"
        )
        uses = scope.uses.get(norm.output[0], [])
        to = ", ".join(dict.fromkeys(self._graphs.going(use, scope) for use in uses)) or "nowhere"
        self.alone[label] = f"its input comes from {made}, its output goes to {to}"

    def _affine(self, scope: Scope, norm: NodeProto, channels: int) -> Affine:
        label = self._graphs.label(norm)
        if label in self._excluded:
            raise Refused(self._excluded[label])
        affine = affine_of(self._graphs, scope, norm)
        if affine.scale.size != channels:
            raise Refused(
                f"it has {affine.scale.size} channels, and the layer next to it {channels}"
            )
        return affine

    def _layer(self, scope: Scope, node: NodeProto) -> Folding:
        """The layer that a node is, with what has been folded into it already."""
        return self._layers.get(id(node)) or layer_of(self._graphs, scope, node)

    def _check_sole(self, scope: Scope, name: str, user: NodeProto, label: str) -> None:
        """Raise `Refused` if a value, which '`label`' returns, does not go to one node alone."""
        uses = [*scope.uses.get(name, ())]
        del uses[next(i for i, use in enumerate(uses) if use.node is user)]
        if uses:
            others = dict.fromkeys(self._graphs.going(use, scope) for use in uses)
            raise Refused(f"the output of '{label}' also goes to {', '.join(others)}")

    def _into_former(self, scope: Scope, norm: NodeProto) -> bool:
        """Fold a batch norm into the layer before it; False if there is none."""
        graphs, between, value = self._graphs, [norm], norm.input[0]
        home = scope.find(value)
        if home is None:
            return False
        node = home.producers.get(value)
        while node is not None and home is scope and (passed := graphs.passed(scope, node)):
            between.append(node)
            node = scope.producers.get(passed)
        bias = None
        if node is not None and home is scope and graphs.is_op(node, "Add"):
            layer_node, bias = self._biased(scope, node)
            if layer_node is not None:
                between.append(node)
                node = layer_node
        if node is None or not graphs.is_op(node, *LINEAR):
            return False
        label = graphs.label(node)
        if home is not scope:
            raise Refused(f"'{label}' is outside of the graph that it is in")
        layer = self._layer(scope, node)
        part = layer.parts[0]
        linear = part.linear if bias is None else biased(part.linear, bias, f"'{label}'")
        affine = self._affine(scope, norm, layer.parts[0].linear.outputs)
        for user, maker in itertools.pairwise([*between, node]):
            self._check_sole(scope, maker.output[0], user, label)
        if bias is not None:
            part.linear, part.steps, layer.report.new_bias = linear, part.steps + 1, False
        layer.then(affine)
        layer.report.after.append(graphs.label(norm))
        self._layers[id(node)] = layer
        self._replace(scope, node, between, norm.output[0])
        return True

    def _biased(self, scope: Scope, node: NodeProto) -> tuple[NodeProto | None, Array | None]:
        """The layer to which an Add gives a bias, and that; None, None if it does not."""
        for inner, other in (tuple(node.input), tuple(node.input)[::-1]):
            made = scope.producers.get(inner)
            layer = self._layers.get(id(made))
            if made is None or any(made.input[2:]) or not self._graphs.is_op(made, *LINEAR):
                continue
            if layer is None or not (layer.report.after or layer.sums):
                try:
                    return made, self._graphs.constant(scope, other)
                except Refused:
                    pass
        return None, None

    def _into_next(self, scope: Scope, norm: NodeProto) -> bool:
        """Fold a batch norm into the layer after it; False if there is none."""
        graphs, between, value = self._graphs, [norm], norm.output[0]
        while len(uses := scope.uses.get(value, [])) == 1:
            inner, user = uses[0]
            if user is None or inner is not scope or graphs.passed(scope, user) != value:
                break
            between.append(user)
            value = user.output[0]
        found = [
            (inner, user)
            for inner, user in uses
            if user is not None and graphs.is_op(user, *LINEAR) and user.input[0] == value
        ]
        if not found:
            return False
        inner, node = found[0]
        label = graphs.label(node)
        if inner is not scope:
            raise Refused(f"'{label}', which comes after it, is inside another node")
        self._check_sole(scope, value, node, graphs.label(norm))
        layer = self._layer(scope, node)
        if any(a.name == "transA" and a.i for a in node.attribute):
            raise Refused(f"'{label}' comes after it and transposes its output")
        affine = self._affine(scope, norm, layer.parts[0].linear.inputs)
        if affine.shift.any():
            if any(part.padded for part in layer.parts):
                raise Refused(f"'{label}' comes after it and pads with zeros")
            if any(part.linear.transposed for part in layer.parts):
                raise Refused(f"'{label}' comes after it and is a transposed convolution")
        layer.after(affine)
        layer.report.before.insert(0, graphs.label(norm))
        self._layers[id(node)] = layer
        graphs.set_input(scope, node, 0, norm.input[0])
        for each in reversed(between):
            graphs.remove(scope, each)
        return True

    def _replace(self, scope: Scope, node: NodeProto, gone: list[NodeProto], output: str) -> None:
        """Let a node make what the last of other nodes made, which are removed."""
        for each in gone:
            self._graphs.remove(scope, each)
        self._graphs.set_output(scope, node, output)

    # ---- parallel branches ----------------------------------------------------------------------

    def _merge(self, scope: Scope, node: NodeProto) -> bool:
        """Make one convolution of the branches that a node adds up, if a batch norm gains by it."""
        graphs = self._graphs
        if not graphs.is_op(node, "Add", "Sum") or (scope.key, node.output[0]) in self._apart:
            return False
        gone, branches = [node], list[NodeProto]()
        for name in node.input:
            if not self._collect(scope, name, gone, branches):
                return False
        try:
            layers = [self._layer(scope, b) for b in branches if graphs.is_op(b, "Conv")]
            if not layers or len({b.input[0] for b in branches}) != 1 or len(branches) < 2:
                return False
            base = max(layers, key=lambda layer: math.prod(layer.parts[0].linear.kernel))
            norms = [b for b in branches if graphs.is_op(b, "BatchNormalization")]
            others = [layer for layer in layers if layer is not base]
            if not all(_fit(base, other) for other in others) or (norms and not _keeps_size(base)):
                return False
            main = base.parts[0].linear
            affines = [self._affine(scope, norm, main.outputs) for norm in norms]
            if not norms and not any(layer.report.norms for layer in layers):
                uses = scope.uses.get(node.output[0], [])
                if len(uses) != 1 or uses[0].scope is not scope:
                    return False
                user = uses[0].node
                if user is None or not graphs.is_op(user, "BatchNormalization"):
                    return False
                self._affine(scope, user, main.outputs)
        except Refused:
            return False
        one = Linear.identity(main.inputs, [1] * len(main.kernel), main.groups)
        base.parts += [part for other in others for part in other.parts]
        base.parts += [Part(one, after=affine) for affine in affines]
        for other in others:
            base.report.beside += [*other.report.norms]
            base.report.merged += [other.report.layer, *other.report.merged]
            self._layers.pop(id(other.node), None)
        base.report.beside += [graphs.label(norm) for norm in norms]
        base.sums.append(node.output[0])
        self._layers[id(base.node)] = base
        self._replace(scope, base.node, [*gone, *(o.node for o in others), *norms], node.output[0])
        return True

    def _collect(
        self, scope: Scope, name: str, gone: list[NodeProto], branches: list[NodeProto]
    ) -> bool:
        """Find the convolutions and batch norms whose sum a value is; False if there is more."""
        uses, node = scope.uses.get(name, []), scope.producers.get(name)
        if len(uses) != 1 or uses[0].scope is not scope or node is None:
            return False
        if len(gone) + len(branches) > _MOST or name in self._graphs.twice:
            return False
        if self._graphs.is_op(node, "Conv", "BatchNormalization"):
            branches.append(node)
            return True
        if passed := self._graphs.passed(scope, node):
            gone.append(node)
            return self._collect(scope, passed, gone, branches)
        if self._graphs.is_op(node, "Add", "Sum"):
            gone.append(node)
            return all(self._collect(scope, each, gone, branches) for each in node.input)
        return False


def _fit(base: Folding, other: Folding) -> bool:
    """Whether the kernel of a convolution can be laid in the middle of that of another."""
    one, two = base.parts[0].linear, other.parts[0].linear
    kinds = [(x.outputs, x.inputs, x.groups, len(x.kernel)) for x in (one, two)]
    if kinds[0] != kinds[1]:
        return False
    large, small = geometry(base.node, one.kernel), geometry(other.node, two.kernel)
    if base.last or other.last or base.dtype != other.dtype or large is None or small is None:
        return False
    for (k, stride, dilation, *pads), (k2, stride2, dilation2, *pads2) in zip(
        large, small, strict=True
    ):
        middle = (k - k2) // 2 * dilation
        if (
            k < k2
            or (k - k2) % 2
            or stride != stride2
            or (k2 > 1 and dilation != dilation2)
            or [pad - pad2 for pad, pad2 in zip(pads, pads2, strict=True)] != [middle, middle]
        ):
            return False
    return True


def _keeps_size(base: Folding) -> bool:
    """Whether a convolution's output has the shape of its input, each value in its place."""
    linear = base.parts[0].linear
    axes = geometry(base.node, linear.kernel)
    return (
        base.last is None
        and axes is not None
        and linear.inputs == linear.outputs
        and all(
            k % 2 and stride == 1 and begin == end == k // 2 * dilation
            for k, stride, dilation, begin, end in axes
        )
    )
