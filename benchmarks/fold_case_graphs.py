"""The ONNX graphs of `fold_cases.py` that no PyTorch model gives: what files may hold."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KIND = "ONNX graphs"
OPSET = 17
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

Arrays = dict[str, Any]
Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class GraphCase:
    """A graph, and what it is folded and judged with.

    Attributes
    ----------
    build
        Makes the model from random numbers.
    other
        Makes, from what is given to the tools, what the result is also judged by.
    stays
        Whether no batch norm can be folded by other values of the nodes' weights.
    """

    name: str
    build: Callable[[Rng], onnx.ModelProto]
    shape: tuple[int, ...] = (2, 4, 8, 8)
    more: Mapping[str, Any] = field(default_factory=dict)
    other: Callable[[Arrays, Rng], Arrays] | None = None
    stays: bool = False
    dtype: str = "float32"
    std: float = 1.0
    kind: str = KIND

    @property
    def line(self) -> str:
        """The line of the table that it belongs to."""
        return self.name

    def model(self) -> onnx.ModelProto:
        """The model, the same each time."""
        model = self.build(np.random.default_rng(zlib.crc32(self.name.encode())))
        onnx.checker.check_model(model, full_check=True)
        return model

    def feeds(self, *, examples: bool = False) -> list[Arrays]:
        """Inputs that judge the model, or those that tools may see."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()) + 1)
        made = [
            {"x": (self.std * rng.normal(size=self.shape)).astype(self.dtype), **self.more}
            for _ in range(2)
        ]
        if examples:
            return made[:1]
        return made if self.other is None else [*made, self.other(dict(made[0]), rng)]


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float64 with the same values, for onnx's reference."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)

    def of_tensor(tensor: TensorProto) -> None:
        if tensor.data_type in FLOATS:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    def of_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    of_tensor(attribute.t)
                if attribute.HasField("g"):
                    of_graph(attribute.g)
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in FLOATS:
                    attribute.i = TensorProto.DOUBLE

    def of_graph(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            of_tensor(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in FLOATS:
                value.type.tensor_type.elem_type = TensorProto.DOUBLE
        of_nodes(graph.node)

    of_graph(copy.graph)
    for version in copy.opset_import:
        if not version.domain and version.version < 15:
            version.version = 15  # below, onnx's reference takes batch norms for training ones
    for function in copy.functions:
        of_nodes(function.node)
    return copy


# --- how they are made ------------------------------------------------------------------------

node = helper.make_node


def value(name: str, shape: Sequence[int | str], dtype: Any = np.float32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )


def tensors(arrays: Mapping[str, Any]) -> list[TensorProto]:
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def weights(
    rng: Rng,
    *shape: int,
    norm: str = "",
    features: int | None = None,
    dtype: Any = np.float32,
) -> Arrays:
    """A weight ``w``, a bias ``b`` and the four vectors of a batch norm."""
    shape = shape or (8, 4, 3, 3)
    count = features or shape[0]
    made = {
        "w": rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])),
        "b": rng.normal(size=count),
        **norms(rng, count, norm),
    }
    return {name: array.astype(dtype) for name, array in made.items()}


def norms(rng: Rng, count: int, name: str = "") -> Arrays:
    made = {
        "scale": rng.uniform(0.5, 1.5, count) * rng.choice([-1, 1], count),
        "shift": rng.normal(size=count),
        "mean": rng.normal(size=count),
        "var": rng.uniform(0.3, 3, count),
    }
    return {key + name: array.astype(np.float32) for key, array in made.items()}


def normalize(x: str, y: str = "y", name: str = "", **attributes: Any) -> onnx.NodeProto:
    inputs = [x, *(key + name for key in ("scale", "shift", "mean", "var"))]
    return node("BatchNormalization", inputs, [y], name=f"bn_{y}", **attributes)


def convolve(
    y: str = "z", inputs: Sequence[str] = ("x", "w", "b"), **attributes: Any
) -> onnx.NodeProto:
    return node("Conv", inputs, [y], name=f"conv_{y}", **{"pads": [1, 1, 1, 1], **attributes})


def model(
    nodes: Sequence[onnx.NodeProto],
    arrays: Mapping[str, Any],
    *,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    shape: Sequence[int] = (2, 4, 8, 8),
    out: Sequence[int] = (2, 8, 8, 8),
    dtype: Any = np.float32,
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = OPSET,
    ir: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "case",
        [value("x", shape, dtype), *inputs],
        [value("y", out, dtype), *outputs],
        tensors(arrays),
    )
    imports = [helper.make_opsetid("", opset)]
    if functions:
        imports.append(helper.make_opsetid("case", 1))
    return helper.make_model(graph, opset_imports=imports, ir_version=ir, functions=functions)


# --- graphs -----------------------------------------------------------------------------------


def default_epsilon(rng: Rng) -> onnx.ModelProto:
    return model([convolve(), normalize("z")], weights(rng))


def large_epsilon_no_bias(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    del arrays["b"]
    return model([convolve(inputs=("x", "w", "")), normalize("z", epsilon=0.1)], arrays)


def identity_between(rng: Rng) -> onnx.ModelProto:
    return model([convolve(), node("Identity", ["z"], ["i"]), normalize("i")], weights(rng))


def bias_added(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    arrays["b"] = arrays["b"].reshape(1, 8, 1, 1)
    nodes = [convolve(inputs=("x", "w")), node("Add", ["z", "b"], ["a"]), normalize("a")]
    return model(nodes, arrays)


def same_padding(rng: Rng) -> onnx.ModelProto:
    conv = node("Conv", ["x", "w", "b"], ["z"], auto_pad="SAME_UPPER", strides=[2, 2])
    return model([conv, normalize("z")], weights(rng), out=(2, 8, 4, 4))


def constant_weight(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    constant = node("Constant", [], ["w"], value=numpy_helper.from_array(arrays.pop("w")))
    return model([constant, convolve(), normalize("z")], arrays)


def quantized_weight(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    arrays["q"] = np.clip(np.round(arrays.pop("w") * 100), -127, 127).astype(np.int8)
    arrays |= {"step": np.float32(0.01), "zero": np.int8(0)}
    dequantize = node("DequantizeLinear", ["q", "step", "zero"], ["w"])
    return model([dequantize, convolve(), normalize("z")], arrays, opset=19)


def overridable(name: str) -> Callable[[Rng], onnx.ModelProto]:
    def build(rng: Rng) -> onnx.ModelProto:
        arrays = weights(rng)
        inputs = [value(name, arrays[name].shape)]
        return model([convolve(), normalize("z")], arrays, inputs=inputs)

    return build


def overriding(name: str, *shape: int) -> Callable[[Arrays, Rng], Arrays]:
    return lambda feed, rng: {**feed, name: rng.uniform(0.5, 1.5, shape).astype(np.float32)}


def weight_given(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    return model([convolve(), normalize("z")], arrays, inputs=[value("w", arrays.pop("w").shape)])


def old_file(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    inputs = [value(name, array.shape) for name, array in arrays.items()]
    return model([convolve(), normalize("z")], arrays, inputs=inputs, opset=9, ir=3)


def training(rng: Rng) -> onnx.ModelProto:
    norm = normalize("z", training_mode=1)
    norm.output.extend(["new_mean", "new_var"])
    return model([convolve(), norm], weights(rng))


def also_output(rng: Rng) -> onnx.ModelProto:
    return model([convolve(), normalize("z")], weights(rng), outputs=[value("z", (2, 8, 8, 8))])


def two_norms(rng: Rng) -> onnx.ModelProto:
    nodes = [
        convolve(),
        normalize("z", "y0", "0"),
        normalize("z", "y1", "1"),
        node("Mul", ["y0", "y1"], ["y"]),
    ]
    return model(nodes, weights(rng, norm="0") | norms(rng, 8, "1"))


def shared_weight(rng: Rng) -> onnx.ModelProto:
    nodes = [
        convolve(),
        normalize("z", "n"),
        convolve("c", ("x", "w")),
        node("Mul", ["n", "c"], ["y"]),
    ]
    return model(nodes, weights(rng))


def shared_norm_values(rng: Rng) -> onnx.ModelProto:
    nodes = [
        convolve(),
        normalize("z", "n"),
        convolve("c", ("n", "w2")),
        normalize("c"),
    ]
    arrays = weights(rng)
    arrays["w2"] = rng.normal(size=(8, 8, 3, 3)).astype(np.float32) / 8
    return model(nodes, arrays)


def read_weight(rng: Rng) -> onnx.ModelProto:
    nodes = [
        convolve(),
        normalize("z", "n"),
        node("ReduceMean", ["w"], ["m"], axes=[1, 2, 3], keepdims=1),
        node("Reshape", ["m", "row"], ["r"]),
        node("Mul", ["n", "r"], ["y"]),
    ]
    return model(nodes, weights(rng) | {"row": np.array([1, 8, 1, 1])})


def captured(rng: Rng) -> onnx.ModelProto:
    kept = helper.make_graph(
        [node("Identity", ["z"], ["kept"])], "kept", [], [value("kept", (2, 8, 8, 8))]
    )
    normal = helper.make_graph(
        [node("Identity", ["n"], ["normal"])], "normal", [], [value("normal", (2, 8, 8, 8))]
    )
    choice = node("If", ["raw"], ["y"], then_branch=kept, else_branch=normal)
    return model(
        [convolve(), normalize("z", "n"), choice],
        weights(rng),
        inputs=[value("raw", (), np.bool_)],
    )


def captured_beside(rng: Rng) -> onnx.ModelProto:
    """The batch norm is the only reader outside of subgraphs."""
    kept = helper.make_graph(
        [node("Relu", ["z"], ["kept"])], "kept", [], [value("kept", (2, 8, 8, 8))]
    )
    other = helper.make_graph(
        [node("Relu", ["x2"], ["other"])], "other", [], [value("other", (2, 8, 8, 8))]
    )
    choice = node("If", ["raw"], ["c"], then_branch=kept, else_branch=other)
    nodes = [
        node("Concat", ["x", "x"], ["x2"], axis=1),
        convolve(),
        choice,
        normalize("z", "n"),
        node("Add", ["n", "c"], ["y"]),
    ]
    return model(nodes, weights(rng), inputs=[value("raw", (), np.bool_)])


def inside_branch(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    paired = helper.make_graph(
        [convolve(), normalize("z", "n")],
        "paired",
        [],
        [value("n", (2, 8, 8, 8))],
        tensors(arrays),
    )
    alone = helper.make_graph([convolve("c", ("x", "v"))], "alone", [], [value("c", (2, 8, 8, 8))])
    choice = node("If", ["raw"], ["y"], then_branch=alone, else_branch=paired)
    other = {"v": rng.normal(size=(8, 4, 3, 3)).astype(np.float32)}
    return model([choice], other, inputs=[value("raw", (), np.bool_)])


def norm_inside_branch(rng: Rng) -> onnx.ModelProto:
    """The batch norm that alone reads the convolution outside runs on some inputs only."""
    normal = helper.make_graph([normalize("z", "n")], "normal", [], [value("n", (2, 8, 8, 8))])
    other = helper.make_graph([node("Relu", ["z"], ["r"])], "other", [], [value("r", (2, 8, 8, 8))])
    choice = node("If", ["raw"], ["y"], then_branch=other, else_branch=normal)
    return model([convolve(), choice], weights(rng), inputs=[value("raw", (), np.bool_)])


def in_loop(rng: Rng) -> onnx.ModelProto:
    """A pair in the body of a Loop, whose weights are outside."""
    arrays = weights(rng, 4, 4, 3, 3)
    body = helper.make_graph(
        [
            node("Identity", ["go"], ["going"]),
            convolve("z", ("carried", "w", "b")),
            normalize("z", "n"),
            node("Tanh", ["n"], ["next"]),
        ],
        "body",
        [value("i", (), np.int64), value("go", (), np.bool_), value("carried", (2, 4, 8, 8))],
        [value("going", (), np.bool_), value("next", (2, 4, 8, 8))],
    )
    loop = node("Loop", ["times", "yes", "x"], ["y"], body=body)
    more = {"times": np.array(3), "yes": np.array(True)}
    return model([loop], arrays | more, out=(2, 4, 8, 8))


def names_taken(rng: Rng) -> onnx.ModelProto:
    """Names that a tool may give to what it adds are those of other values."""
    arrays = weights(rng)
    del arrays["b"]
    arrays["w_bias"] = arrays["w"] * 2
    nodes = [
        convolve("z", ("x", "w")),
        normalize("z", "y_bias"),
        convolve("z_bias", ("x", "w_bias")),
        node("Mul", ["y_bias", "z_bias"], ["y"]),
    ]
    return model(nodes, arrays)


def weight_of_two_pairs(rng: Rng) -> onnx.ModelProto:
    nodes = [
        convolve("a", ("x", "w", "b")),
        normalize("a", "n0", "0"),
        convolve("c", ("x", "w", "b")),
        normalize("c", "n1", "1"),
        node("Mul", ["n0", "n1"], ["y"]),
    ]
    return model(nodes, weights(rng, norm="0") | norms(rng, 8, "1"))


def cast_between(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    for name in ("w", "b"):
        arrays[name] = arrays[name].astype(np.float16)
    nodes = [
        convolve(),
        node("Cast", ["z"], ["c"], to=TensorProto.FLOAT),
        normalize("c", "n"),
        node("Cast", ["n"], ["y"], to=TensorProto.FLOAT16),
    ]
    return model(nodes, arrays, dtype=np.float16)


def before_same_padding(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng) | norms(rng, 4)
    conv = node("Conv", ["n", "w", "b"], ["y"], auto_pad="SAME_LOWER")
    return model([normalize("x", "n"), conv], arrays)


def weight_on_the_left(rng: Rng) -> onnx.ModelProto:
    """A MatMul with as many rows as columns, whose features are its rows."""
    arrays = weights(rng, 5, 5)
    del arrays["b"]
    nodes = [node("MatMul", ["w", "x"], ["z"]), normalize("z")]
    return model(nodes, arrays, shape=(5, 5), out=(5, 5))


def transposed_input(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng, 6, 5, features=5)
    nodes = [node("Gemm", ["x", "w", "b"], ["z"], transA=1), normalize("z")]
    return model(nodes, arrays, shape=(6, 7), out=(7, 5))


def before_transposed_gemm(rng: Rng) -> onnx.ModelProto:
    """The batch norm normalizes what the Gemm sums over in no output."""
    arrays = weights(rng, 6, 5, features=5) | norms(rng, 6)
    nodes = [normalize("x", "n"), node("Gemm", ["n", "w", "b"], ["y"], transA=1)]
    return model(nodes, arrays, shape=(6, 6), out=(6, 5))


#: Inputs of `block`.
INPUTS = ["x", "w", "b", "scale", "shift", "mean", "var"]


def block() -> onnx.FunctionProto:
    nodes = [convolve(), normalize("z")]
    return helper.make_function(
        "case", "Block", INPUTS, ["y"], nodes, [helper.make_opsetid("", OPSET)]
    )


def in_function(rng: Rng) -> onnx.ModelProto:
    return model([node("Block", INPUTS, ["y"], domain="case")], weights(rng), functions=[block()])


def function_called_twice(rng: Rng) -> onnx.ModelProto:
    """Each call has other values."""
    arrays = weights(rng)
    arrays |= {f"{name}2": array for name, array in weights(rng).items()}
    nodes = [
        node("Block", INPUTS, ["one"], domain="case"),
        node("Block", ["x", *(f"{name}2" for name in INPUTS[1:])], ["two"], domain="case"),
        node("Mul", ["one", "two"], ["y"]),
    ]
    return model(nodes, arrays, functions=[block()])


def pad_between(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng) | norms(rng, 4)
    arrays |= {"by": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    nodes = [
        normalize("x", "n"),
        node("Pad", ["n", "by"], ["p"]),
        convolve("y", ("p", "w", "b"), pads=[0, 0, 0, 0]),
    ]
    return model(nodes, arrays)


def gemm(
    *, c: tuple[int, ...] | None = (5,), **attributes: Any
) -> Callable[[Rng], onnx.ModelProto]:
    def build(rng: Rng) -> onnx.ModelProto:
        arrays = weights(rng, 5, 6, features=5)
        if not attributes.get("transB"):
            arrays["w"] = np.ascontiguousarray(arrays["w"].T)
        arrays["b"] = rng.normal(size=c or (5,)).astype(np.float32)
        inputs = ["x", "w", *(["b"] if c is not None else [])]
        if c is None:
            del arrays["b"]
        nodes = [node("Gemm", inputs, ["z"], **attributes), normalize("z")]
        return model(nodes, arrays, shape=(7, 6), out=(7, 5))

    return build


def matmul(*, bias: bool) -> Callable[[Rng], onnx.ModelProto]:
    def build(rng: Rng) -> onnx.ModelProto:
        arrays = weights(rng, 6, 5, features=5)
        nodes = [node("MatMul", ["x", "w"], ["z"])]
        if bias:
            nodes += [node("Add", ["z", "b"], ["a"]), normalize("a")]
        else:
            del arrays["b"]
            nodes += [normalize("z")]
        return model(nodes, arrays, shape=(7, 6), out=(7, 5))

    return build


def matmul_on_rows(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng, 6, 5, features=5)
    nodes = [
        node("MatMul", ["x", "w"], ["z"]),
        node("Add", ["z", "b"], ["a"]),
        normalize("a"),
    ]
    return model(nodes, arrays, shape=(2, 5, 6), out=(2, 5, 5))


def half(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng, dtype=np.float16)
    arrays["b"][:] = 0
    for name in ("scale", "shift", "mean"):
        arrays[name] = arrays[name].astype(np.float16)
    arrays["mean"][:] = 0
    arrays["var"] = np.full(8, 1e-7, np.float16)
    arrays["scale"] *= np.float16(100)
    nodes = [convolve(), normalize("z", epsilon=1e-9)]
    return model(nodes, arrays, dtype=np.float16)


def mixed(rng: Rng) -> onnx.ModelProto:
    arrays = weights(rng)
    for name in ("w", "b"):
        arrays[name] = arrays[name].astype(np.float16)
    return model([convolve(), normalize("z")], arrays, dtype=np.float16)


def cases() -> Iterator[GraphCase]:
    """All of them."""

    def of(name: str, build: Callable[[Rng], onnx.ModelProto], **more: Any) -> GraphCase:
        return GraphCase(name=name, build=build, **more)

    raw = {"raw": np.array(False)}

    def asked(feed: Arrays, rng: Rng) -> Arrays:
        return {**feed, "raw": np.array(True)}

    rows: dict[str, Any] = {"shape": (7, 6)}
    yield of("ε left out", default_epsilon)
    yield of("ε = 0.1, empty name for the bias", large_epsilon_no_bias)
    yield of("Identity in between", identity_between)
    yield of("bias as an Add of its own", bias_added)
    yield of("auto_pad=SAME_UPPER", same_padding)
    yield of("weight from a Constant node", constant_weight)
    yield of("weight from DequantizeLinear", quantized_weight)
    yield of("opset 9, initializers listed as inputs", old_file)
    yield of(
        "weight is an overridable input",
        overridable("w"),
        other=overriding("w", 8, 4, 3, 3),
        stays=True,
    )
    yield of("bias is an overridable input", overridable("b"), other=overriding("b", 8), stays=True)
    yield of(
        "scale is an overridable input",
        overridable("scale"),
        other=overriding("scale", 8),
        stays=True,
    )
    given = np.random.default_rng(0).normal(size=(8, 4, 3, 3)).astype(np.float32)
    yield of(
        "weight is an input",
        weight_given,
        more={"w": given},
        other=overriding("w", 8, 4, 3, 3),
        stays=True,
    )
    yield of("training_mode=1", training, stays=True)
    yield of("output of Conv is an output", also_output, stays=True)
    yield of("Conv feeds two batch norms", two_norms, stays=True)
    yield of("weight shared with another Conv", shared_weight)
    yield of("weight read by another node", read_weight)
    yield of("two batch norms share their values", shared_norm_values)
    yield of("output of Conv captured by If", captured, more=raw, other=asked, stays=True)
    yield of(
        "captured by If before the batch norm", captured_beside, more=raw, other=asked, stays=True
    )
    yield of("pair inside of If", inside_branch, more=raw, other=asked)
    yield of(
        "batch norm inside of If, Conv outside",
        norm_inside_branch,
        more=raw,
        other=asked,
        stays=True,
    )
    yield of("pair inside of Loop", in_loop)
    yield of("names that a tool may give are taken", names_taken)
    yield of("weight shared by two pairs", weight_of_two_pairs)
    yield of("Cast in between", cast_between, dtype="float16")
    yield of("BatchNormalization, Conv with auto_pad=SAME_LOWER", before_same_padding, stays=True)
    yield of("pair in a function", in_function)
    yield of("pair in a function called twice", function_called_twice)
    yield of("BatchNormalization, Pad, Conv", pad_between, stays=True)
    yield of("Gemm, alpha 0.5, beta 2", gemm(alpha=0.5, beta=2.0, transB=1), **rows)
    yield of("Gemm without C, transB=0", gemm(c=None), **rows)
    yield of("Gemm, C of one number", gemm(c=(1,), transB=1), **rows)
    yield of("Gemm, C of shape (M, 1)", gemm(c=(7, 1), transB=1), **rows)
    yield of("Gemm, transA=1", transposed_input, shape=(6, 7))
    yield of(
        "BatchNormalization, Gemm with transA=1", before_transposed_gemm, shape=(6, 6), stays=True
    )
    yield of("MatMul, weight on the left", weight_on_the_left, shape=(5, 5), stays=True)
    yield of("MatMul, Add", matmul(bias=True), **rows)
    yield of("MatMul", matmul(bias=False), **rows)
    yield of("MatMul, Add on (N, L, F), L = F", matmul_on_rows, shape=(2, 5, 6), stays=True)
    yield of("float16, weight overflows", half, dtype="float16", std=1e-3, stays=True)
    yield of("float16 Conv, float32 batch norm", mixed, dtype="float16")
