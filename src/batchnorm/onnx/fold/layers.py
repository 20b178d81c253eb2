"""Nodes as layers that compose, and as nodes again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import NodeProto

from ... import native
from ...errors import BatchNormError
from ...folding import Affine, FoldedLayer, Linear
from ...folding.sums import Part, Sum
from ...native import Array, Float64
from ..graphs import Graphs, Refused, Scope, attributes

__all__ = ["LINEAR", "Folding", "affine_of", "biased", "geometry", "layer_of"]

_EPSILON = float(np.float32(1e-5))
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(eq=False, kw_only=True)
class Folding(Sum):
    """A node that takes batch norms in, and the branches that are added to it.

    Attributes
    ----------
    sums
        The values that were sums of parts.
    """

    scope: Scope
    node: NodeProto
    dtype: Any
    sums: list[str] = field(default_factory=list)

    def then(self, norm: Affine) -> None:
        """Take in a batch norm that comes after it."""
        if len(self.parts) == 1:
            part = self.parts[0]
            part.after = norm if part.after is None else part.after.then(norm)
        else:
            self.last = norm if self.last is None else self.last.then(norm)

    def after(self, norm: Affine) -> None:
        """Take in a batch norm that comes before it."""
        for part in self.parts:
            part.before = norm if part.before is None else norm.then(part.before)

    def write(self, graphs: Graphs) -> None:
        """Change the node.

        Raises
        ------
        BatchNormError
            Its weights do not fit into their type.
        """
        total = self.folded().rounded(self.dtype)
        assert total.bias is not None
        largest = (abs(v.astype(np.float64)).max(initial=0) for v in (total.weight, total.bias))
        self.report.largest_weight = float(max(largest))
        node, weight = self.node, total.weight
        if graphs.is_op(node, "Gemm", "MatMul"):
            if not attributes(node).get("transB"):
                weight = weight.T
            _drop_attributes(node, "alpha", "beta")
            node.op_type = "Gemm"
        old = node.input[1]
        graphs.put(self.scope, node, 1, np.ascontiguousarray(weight), f"{old}_folded")
        graphs.put(self.scope, node, 2, total.bias, f"{old}_bias")

    def add(self, x: Array, expected: Array, got: Array) -> None:
        """Add a call to what was seen: the input, and both outputs."""
        one, other = expected.astype(np.float64), got.astype(np.float64)
        if one.shape != other.shape:
            raise ValueError(f"it returns shape {other.shape} in place of {one.shape}")
        known, given = np.isfinite(one), abs(x.astype(np.float64))
        if not known.any():
            return
        with np.errstate(invalid="ignore"):
            difference = np.where(known & np.isfinite(other), abs(one - other), 0.0)
        channels = 0 if attributes(self.node).get("transA") and x.ndim == 2 else 1
        self.see(
            _over_others(difference, 1),
            _over_others(np.where(np.isfinite(given), given, 0.0), channels),
            float(np.where(known, abs(one), 0.0).max()),
            overflows=bool((known & ~np.isfinite(other)).any()),
        )

    def problem(self) -> str:
        """Complete the report; why the node must not be folded, or ""."""
        sums = "float64" if self.dtype == np.float64 else "float32"
        return self.compare(self.dtype, coarser="onnxruntime", sums=sums)


def _over_others(values: Float64, channels: int) -> Float64:
    """The largest of each channel."""
    largest: Float64 = values.max(tuple(axis for axis in range(values.ndim) if axis != channels))
    return largest


def layer_of(graphs: Graphs, scope: Scope, node: NodeProto) -> Folding:
    """A node as a layer.

    Raises
    ------
    Refused
        Its weights are no constants, or it is not a layer of channels on axis 1.
    """
    name = f"'{graphs.label(node)}'"
    given = attributes(node)
    graphs.check_plain(scope, node)
    if graphs.is_op(node, "MatMul"):
        about = graphs.about(scope, node.output[0])
        if about is None or about.rank != 2:
            rank = "an unknown number of" if about is None or about.rank is None else about.rank
            raise Refused(f"the output of {name} has {rank} axes, and its features are on the last")
    weight = graphs.constant(scope, node.input[1])
    given_bias = len(node.input) > 2 and node.input[2]
    bias = graphs.constant(scope, node.input[2]) if given_bias else None
    if not native.is_supported(weight.dtype):
        raise Refused(f"the weight of {name} is of type {weight.dtype}")
    new_bias, steps = bias is None, 0
    try:
        if graphs.is_op(node, "Conv", "ConvTranspose"):
            transposed = node.op_type == "ConvTranspose"
            linear = Linear(weight, bias, given.get("group", 1), transposed)
            if weight.ndim < 3:
                raise Refused(f"the weight of {name} has {weight.ndim} axes")
        else:
            if weight.ndim != 2:
                raise Refused(f"the weight of {name} has {weight.ndim} axes")
            alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
            steps = (alpha != 1) + (beta != 1)
            rows = weight if given.get("transB") else weight.T
            linear = Linear(rows if alpha == 1 else rows.astype(np.float64) * alpha)
            if bias is not None:
                linear = biased(linear, bias if beta == 1 else bias.astype(np.float64) * beta, name)
    except BatchNormError as error:
        raise Refused(f"{name}: {error}") from error
    padded = linear.kernel != () and _padded(given, linear.kernel)
    report = FoldedLayer(graphs.label(node), new_bias=new_bias)
    return Folding(
        [Part(linear, padded=padded, steps=steps)],
        report,
        scope=scope,
        node=node,
        dtype=weight.dtype,
    )


def biased(linear: Linear, values: Array, name: str) -> Linear:
    """A layer with what is added to its output.

    Raises
    ------
    Refused
        That is not one value for each output; `name` adds it.
    """
    rank = 2 + len(linear.kernel)
    first, channels, *others = (1,) * max(rank - values.ndim, 0) + values.shape
    if {first, *others} - {1} or channels not in (1, linear.outputs) or values.ndim > rank:
        raise Refused(f"what {name} adds is not one value for each channel")
    return replace(linear, bias=np.broadcast_to(values.reshape(-1), (linear.outputs,)))


def affine_of(graphs: Graphs, scope: Scope, node: NodeProto) -> Affine:
    """What a batch norm computes.

    Raises
    ------
    Refused
        It is in training mode, or its parameters are no finite constants.
    """
    graphs.check_plain(scope, node)
    given = attributes(node)
    if given.get("training_mode"):
        raise Refused("it is in training mode (training_mode=1), and depends on the batch")
    if any(node.output[1:]):
        raise Refused("it is in training mode (more than one output), and depends on the batch")
    if scope.opset < 9:
        raise Refused(
            f"it is of opset {scope.opset}; onnx.version_converter makes it one of 9 or later"
        )
    gamma, beta, mean, var = graphs.parameters(scope, node)
    try:
        return Affine.of(mean, var, gamma, beta, eps=given.get("epsilon", _EPSILON))
    except BatchNormError as error:
        raise Refused(str(error)) from error


def geometry(node: NodeProto, kernel: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """(kernel, stride, dilation, padding at the begin and the end) of each axis.

    None if padding depends on the size of the input, or an attribute has another length.
    """
    given, rank = attributes(node), len(kernel)
    mode = given.get("auto_pad", b"NOTSET")
    if mode not in (b"NOTSET", b"VALID"):
        return None
    pads = given.get("pads", [0] * 2 * rank) if mode == b"NOTSET" else [0] * 2 * rank
    strides, dilations = (given.get(name, [1] * rank) for name in ("strides", "dilations"))
    axes = [kernel, strides, dilations, pads[:rank], pads[rank:]]
    return None if {len(axis) for axis in axes} != {rank} else list(zip(*axes, strict=True))


def _padded(given: dict[str, Any], kernel: Iterable[int]) -> bool:
    """Whether a convolution pads with zeros."""
    mode = given.get("auto_pad", b"NOTSET")
    if mode == b"NOTSET":
        return any(given.get("pads", ()))
    return bool(mode != b"VALID" and any(k > 1 for k in kernel))


def _drop_attributes(node: NodeProto, *names: str) -> None:
    for place in reversed(range(len(node.attribute))):
        if node.attribute[place].name in names:
            del node.attribute[place]
