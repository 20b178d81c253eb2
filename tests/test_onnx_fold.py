"""What `batchnorm.onnx.fold` makes of models of every kind, against onnx's reference evaluator."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError
from batchnorm.onnx import FoldError, fold
from batchnorm.onnx.fold import verify
from onnx_models import array, convolutions, model, norm, operators, reference, weights

BN = "BatchNormalization"
X = array(1, 4, 5, 5)


def check_equal(proto, folded, *shape, dtype=np.float64, tolerance=1e-10, **more):
    """Both models return the same on random input, and the folded one is valid."""
    onnx.checker.check_model(folded, full_check=True)
    feed = {"x": array(*shape, seed=7, dtype=dtype), **more}
    for one, other in zip(reference(proto, feed), reference(folded, feed), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# ---- after a layer ------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """A (transposed) convolution with a batch norm behind it, and the shape of its input."""
    rank = draw(st.integers(1, 3))
    groups, outside, inside = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, strides, dilations = (
        draw(st.lists(st.integers(1, most), min_size=rank, max_size=rank)) for most in (3, 2, 2)
    )
    pads = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    transposed = draw(st.booleans())
    attributes = {"group": groups, "strides": strides, "dilations": dilations}
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    modes = ["NOTSET", "VALID"] if transposed else ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]
    mode = draw(st.sampled_from(modes))
    if mode == "NOTSET":
        attributes["pads"] = pads
    else:
        attributes["auto_pad"] = mode
        if mode.startswith("SAME"):
            attributes["dilations"] = [1] * rank
    if transposed and draw(st.booleans()):
        attributes["output_padding"] = [
            min(two) - 1 for two in zip(strides, dilations, strict=True)
        ]
    inputs, outputs = groups * inside, groups * outside
    shape = (inputs, outside, *kernel) if transposed else (outputs, inside, *kernel)
    tensors = {"w": array(*shape, dtype=np.float64)}
    if draw(st.booleans()):
        tensors["c"] = array(outputs, seed=2, dtype=np.float64)
    op = "ConvTranspose" if transposed else "Conv"
    dims = ", ".join(f"D{axis}" for axis in range(rank + 2))
    proto = model(
        f"(T[{dims}] x) => (T[{dims.replace('D', 'E')}] y) {{ z = {op}(x, {', '.join(tensors)}) "
        "y = BatchNormalization<epsilon = 0.1>(z, s, b, m, v) }",
        dtype=np.float64,
        **tensors,
        **norm(outputs, dtype=np.float64),
    )
    proto.graph.node[0].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    return proto, (2, inputs, *[draw(st.integers(5, 6)) for _ in range(rank)])


@given(layers())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fold_keeps_what_convolutions_compute(case):
    proto, shape = case
    try:
        reference(proto, {"x": array(*shape, dtype=np.float64)})
    except Exception:
        assume(False)  # what the reference does not compute
    folded, report = fold(proto)
    assert operators(folded.graph) == [proto.graph.node[0].op_type]
    assert list(report.folded) == ["BatchNormalization_1 (output 'y')"]
    check_equal(proto, folded, *shape)


GEMMS = {
    "plain": ("Gemm(x, w)", (3, 4)),
    "transB": ("Gemm<transB=1>(x, w)", (4, 3)),
    "alpha": ("Gemm<alpha=0.5>(x, w)", (3, 4)),
    "beta": ("Gemm<alpha=-2.0, beta=3.0, transB=1>(x, w, c)", (4, 3)),
    "row": ("Gemm(x, w, row)", (3, 4)),
    "one": ("Gemm<beta=0.5>(x, w, one)", (3, 4)),
    "scalar": ("Gemm(x, w, scalar)", (3, 4)),
    "transA": ("Gemm<transA=1>(x, w, c)", (5, 4)),
    "matmul": ("MatMul(x, w)", (3, 4)),
}


@pytest.mark.parametrize("kind", GEMMS)
def test_fold_keeps_what_matrix_products_compute(kind):
    text, shape = GEMMS[kind]
    proto = model(
        f"(T[5, 3] x) => (T[M, 4] y) {{ z = {text} y = BatchNormalization(z, s, b, m, v) }}",
        dtype=np.float64,
        w=array(*shape, dtype=np.float64),
        c=array(4, dtype=np.float64),
        row=array(1, 4, dtype=np.float64),
        one=array(1, dtype=np.float64),
        scalar=array(dtype=np.float64),
        **norm(4, dtype=np.float64),
    )
    folded, report = fold(proto, {"x": array(5, 3, dtype=np.float64)})
    assert operators(folded.graph) == ["Gemm"]
    assert len(report.pairs) == 1
    assert report.share <= 1
    check_equal(proto, folded, 5, 3)


@pytest.mark.parametrize("added", ["Add(z, c)", "Add(c, z)", "Add(z, row)", "Add(z, scalar)"])
def test_fold_takes_in_what_is_added_to_a_matrix_product(added):
    proto = model(
        "(T[5, 3] x) => (T[M, 4] y) { z = MatMul(x, w) "
        f"a = {added} y = BatchNormalization(a, s, b, m, v) }}",
        dtype=np.float64,
        w=array(3, 4, dtype=np.float64),
        c=array(4, dtype=np.float64),
        row=array(1, 4, dtype=np.float64),
        scalar=array(dtype=np.float64),
        **norm(4, dtype=np.float64),
    )
    folded, report = fold(proto, {"x": array(5, 3, dtype=np.float64)})
    assert operators(folded.graph) == ["Gemm"]
    assert not report.pairs[0].new_bias
    check_equal(proto, folded, 5, 3)


ADDED = [(4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1), (1,), ()]


@pytest.mark.parametrize("shape", ADDED)
@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_fold_takes_in_what_is_added_to_a_convolution(shape, layer):
    body = f"z = {layer}<strides=[2, 2]>(x, w) a = Add(o, z) y = BatchNormalization(a, s, b, m, v)"
    proto = convolutions(body, more={"o": array(*shape)})
    folded, report = fold(proto, {"x": array(2, 4, 5, 5)})
    assert operators(folded.graph) == [layer]
    assert not report.pairs[0].new_bias
    assert report.share <= 1
    check_equal(proto, folded, 2, 4, 5, 5, dtype=np.float32, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 1, 1, 1), (1, 1, 4, 1, 1)])
def test_fold_refuses_what_is_added_to_a_convolution_on_other_axes(shape):
    body = "z = Conv<pads=[1, 1, 1, 1]>(x, w) a = Add(z, o) " + AFTER.replace("(z", "(a")
    proto = convolutions(body, more={"o": array(*shape)})
    folded, report = fold(proto)
    assert folded == proto
    assert "is not one value for each channel" in next(iter(report.refused.values()))


def test_fold_leaves_alone_what_follows_a_second_bias():
    proto = convolutions(
        "z = Conv(x, w, c) a = Add(z, o) " + AFTER.replace("(z", "(a"), more={"o": array(4, 1, 1)}
    )
    folded, report = fold(proto)
    assert folded == proto
    assert list(report.alone) == ["BatchNormalization_2 (output 'y')"]


def refusal(text, tensors, inputs=None, **options):
    """Why the only batch norm of a model was refused; the model is as it was."""
    proto = model(text, **tensors, **options)
    folded, report = fold(proto, inputs)
    assert folded == proto
    assert not report.pairs
    (why,) = report.refused.values()
    return why


REFUSED = {
    "matmul with 3 axes": (
        "(T[2, 4, 3] x) => (T[2, 4, 4] y) { z = MatMul(x, w) "
        "y = BatchNormalization(z, s, b, m, v) }",
        "has 3 axes",
    ),
    "matmul of unknown rank": (
        "(T x) => (T y) { z = MatMul(x, w) y = BatchNormalization(z, s, b, m, v) }",
        "unknown number of axes",
    ),
    "weight on the left": (
        "(T[3, 5] x) => (T[4, 5] y) { z = MatMul(l, x) y = BatchNormalization(z, p, p, p, p) }",
        "'x' is an input of its graph, not a constant",
    ),
    "bias of rows": (
        "(T[5, 3] x) => (T[5, 4] y) { z = Gemm(x, w, rows) y = BatchNormalization(z, s, b, m, v) }",
        "not one value for each channel",
    ),
    "transposed input": (
        "(T[3, 5] x) => (T[5, 4] y) { z = BatchNormalization(x, p, p, p, p) "
        "y = Gemm<transA=1>(z, w) }",
        "transposes its output",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_fold_refuses_matrix_products_of_other_axes(kind):
    text, why = REFUSED[kind]
    text = text.replace("(T x)", "(float x)").replace("(T y)", "(float y)")
    tensors = {
        "w": array(3, 4),
        "l": array(4, 3),
        "p": abs(array(5)),
        "rows": array(5, 4),
        **norm(4),
    }
    assert why in refusal(text, tensors)


AFTER = "y = BatchNormalization(z, s, b, m, v)"
FOLDED = {
    "chain": (
        "z1 = Conv(x, w) z2 = BatchNormalization(z1, s, b, m, v) "
        "y = BatchNormalization(z2, ts, tb, tm, tv)",
        ["Conv"],
    ),
    "identity between": (
        "z1 = Conv(x, w, c) i = Identity(z1) j = Identity(i) y = BatchNormalization(j, s, b, m, v)",
        ["Conv"],
    ),
    "dropout between": (
        "z1 = Conv(x, w) r = Constant<value = float {0.5}>() z = Dropout(z1, r) " + AFTER,
        ["Conv"],
    ),
    "sum of Python": (
        "a = Conv(x, w) p = BatchNormalization(a, s, b, m, v) o = Constant<value = float {0}>() "
        "h = CastLike(o, x) e = Add(h, p) f0 = Add(e, k0) d = Conv(x, k3) "
        "q = BatchNormalization(d, ts, tb, tm, tv) g = Add(f0, q) y = Relu(g)",
        ["Conv", "Relu"],
    ),
    "bias of an exporter": (
        "d = Shape<start = 0, end = 1>(w) e = Constant<value_ints = [1]>() f0 = Expand(d, e) "
        "g = Constant<value = float {3}>() h = CastLike(g, x) i = Expand(h, f0) z = Conv(x, w, i) "
        + AFTER,
        ["Conv"],
    ),
    "before": ("z = BatchNormalization(x, s, b, m, v) y = Conv(z, w)", ["Conv"]),
    "before, identity between": (
        "z = BatchNormalization(x, s, b, m, v) i = Identity(z) "
        'y = Conv<auto_pad = "VALID">(i, w, c)',
        ["Conv"],
    ),
    "before, 1 wide": (
        'z = BatchNormalization(x, s, b, m, v) y = Conv<auto_pad = "SAME_UPPER">(z, u)',
        ["Conv"],
    ),
    "before, no shift": (
        "z = BatchNormalization(x, s, zero, zero, v) y = Conv<pads=[1, 1, 1, 1]>(z, w)",
        ["Conv"],
    ),
    "both sides": (
        "z = BatchNormalization(x, s, b, m, v) q = Conv(z, w) "
        "y = BatchNormalization(q, ts, tb, tm, tv)",
        ["Conv"],
    ),
    "two before": (
        "p = BatchNormalization(x, s, b, m, v) z = BatchNormalization(p, ts, tb, tm, tv) "
        "y = Conv(z, w)",
        ["Conv"],
    ),
    "relu behind": (
        "z1 = Conv(x, w) z = BatchNormalization(z1, s, b, m, v) y = Relu(z)",
        ["Conv", "Relu"],
    ),
    "transposed": (
        "z = ConvTranspose<strides=[2, 2], output_padding=[1, 1]>(x, w) " + AFTER,
        ["ConvTranspose"],
    ),
    "transposed, before, no shift": (
        "z = BatchNormalization(x, s, zero, zero, v) y = ConvTranspose(z, w, c)",
        ["ConvTranspose"],
    ),
    "constant nodes": (
        "k = Constant<value = T[4] {1, 2, 3, 4}>() z = Conv(x, w, k) "
        "y = BatchNormalization(z, k, b, m, v)",
        ["Conv"],
    ),
    "cast and transposed weight": (
        "e = Cast<to = 11>(f) g = Transpose<perm = [1, 0, 2, 3]>(e) "
        "h = Identity(g) z = Conv(x, h) " + AFTER,
        ["Conv"],
    ),
    "RepVGG": (
        "a = Conv<pads=[1, 1, 1, 1]>(x, w) p = BatchNormalization(a, s, b, m, v) "
        "d = Conv(x, u) q = BatchNormalization(d, ts, tb, tm, tv) "
        "r = BatchNormalization(x, s, tb, m, tv) e = Add(q, p) g = Add(e, r) y = Relu(g)",
        ["Conv", "Relu"],
    ),
    "branches, norm behind": (
        "a = Conv<pads=[1, 1, 1, 1]>(x, w, c) d = Conv(x, u) z = Add(a, d) " + AFTER,
        ["Conv"],
    ),
    "branches, Sum, dilated": (
        "a = Conv<dilations=[2, 2], pads=[2, 2, 2, 2]>(x, w) d = Conv(x, u) "
        "p = BatchNormalization(a, s, b, m, v) z = Sum(p, d) "
        "y = BatchNormalization(z, ts, tb, tm, tv)",
        ["Conv"],
    ),
    "branches, strides": (
        "a = Conv<strides=[2, 2], pads=[1, 1, 1, 1]>(x, w) "
        "p = BatchNormalization(a, s, b, m, v) d = Conv<strides=[2, 2]>(x, u) "
        "q = BatchNormalization(d, ts, tb, tm, tv) y = Add(p, q)",
        ["Conv"],
    ),
    "branches, norm before": (
        "g = BatchNormalization(x, ts, tb, tm, tv) a = Conv(g, w) "
        "p = BatchNormalization(a, s, b, m, v) d = Conv(g, k3) y = Add(p, d)",
        ["Conv"],
    ),
}


def folded_case(name, dtype):
    more = {"k3": array(4, 4, 3, 3, seed=9, dtype=dtype), "f": array(4, 4, 3, 3, seed=9)}
    more["k0"] = np.zeros((), dtype)
    return convolutions(FOLDED[name][0], dtype, more=more)


@pytest.mark.parametrize("name", FOLDED)
def test_fold_leaves_no_batch_norm_and_the_same_function(name):
    proto = folded_case(name, np.float64)
    before = proto.SerializeToString(deterministic=True)
    folded, report = fold(proto)
    assert operators(folded.graph) == FOLDED[name][1]
    assert not report.refused
    assert not report.alone
    assert not report.verified
    assert proto.SerializeToString(deterministic=True) == before
    check_equal(proto, folded, 2, 4, 6, 5)


@pytest.mark.parametrize("name", [n for n in FOLDED if n != "cast and transposed weight"])
def test_fold_is_within_its_bounds_in_onnxruntime(name):
    proto = folded_case(name, np.float32)
    folded, report = fold(proto, [{"x": array(2, 4, 6, 5)}, {"x": 100 * array(1, 4, 9, 4)}])
    assert operators(folded.graph) == FOLDED[name][1]
    (pair,) = report.pairs
    assert 0 < pair.error < pair.bound
    assert pair.share <= 1
    assert report.verified
    assert 0 < report.error < 1e-2
    assert 0 < report.optimized_error < 1e-2
    assert 0 < report.relative_error < 1e-5


KEPT = {
    "used elsewhere": (
        "z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) y = Add(n, z)",
        "the output of 'Conv_0 (output 'z')' also goes to 'Add_2 (output 'y')' (Add)",
    ),
    "computed weight": ("k = Exp(w) z = Conv(x, k) " + AFTER, "'k' is computed, by 'Exp_0"),
    "padding before": (
        "z = BatchNormalization(x, s, b, m, v) y = Conv<pads=[0, 0, 1, 0]>(z, w)",
        "pads with zeros",
    ),
    "SAME before": (
        'z = BatchNormalization(x, s, b, m, v) y = Conv<auto_pad = "SAME_LOWER">(z, w)',
        "pads with zeros",
    ),
    "transposed before": (
        "z = BatchNormalization(x, s, b, m, v) y = ConvTranspose(z, w)",
        "is a transposed convolution",
    ),
    "before, used elsewhere": (
        "z = BatchNormalization(x, s, b, m, v) a = Conv(z, u) y = Add(z, a)",
        "also goes to 'Add_2",
    ),
    "quantized": (
        "q = QuantizeLinear(w, one, zp) k = DequantizeLinear(q, one, zp) z = Conv(x, k) " + AFTER,
        "'k' is quantized, by 'DequantizeLinear_1",
    ),
    "negative variance": ("z = Conv(x, w) y = BatchNormalization(z, s, b, m, b)", "in channel"),
    "NaN": ("z = Conv(x, w) y = BatchNormalization(z, s, b, nan, v)", "nan in channel 2"),
    "training dropout": (
        "a = Conv(x, w) r = Constant<value = float {0.5}>() t = Constant<value = "
        "bool {1}>() z = Dropout(a, r, t) " + AFTER,
        None,
    ),
}


def test_fold_folds_on_both_sides_of_a_product_and_what_is_added_to_it():
    proto = model(
        "(T[5, 3] x) => (T[M, 4] y) { h = BatchNormalization(x, p, p, p, q) z = MatMul(h, w) "
        "a = Add(z, c) y = BatchNormalization(a, s, b, m, v) }",
        dtype=np.float64,
        w=array(3, 4, dtype=np.float64),
        c=array(4, dtype=np.float64),
        p=array(3, dtype=np.float64),
        q=np.ones(3),
        **norm(4, dtype=np.float64),
    )
    folded, report = fold(proto, {"x": array(5, 3, dtype=np.float64)})
    assert operators(folded.graph) == ["Gemm"]
    assert not report.pairs[0].new_bias
    check_equal(proto, folded, 5, 3)


def test_fold_leaves_alone_what_follows_a_residual_sum():
    proto = model(
        "(T[5, 4] x) => (T[5, 4] y) { z = MatMul(x, w) a = Add(z, x) "
        "y = BatchNormalization(a, s, b, m, v) }",
        w=array(4, 4), **norm(4),
    )  # fmt: skip
    folded, report = fold(proto)
    assert folded == proto
    assert list(report.alone) == ["BatchNormalization_2 (output 'y')"]


@pytest.mark.parametrize("name", KEPT)
def test_fold_refuses_what_would_change_the_function(name):
    body, why = KEPT[name]
    more = {
        "one": np.ones((), np.float32),
        "zp": np.zeros((), np.int8),
        "nan": np.array([0, 1, np.nan, 2], np.float32),
    }
    proto = convolutions(body, more=more)
    folded, report = fold(proto)
    assert folded == proto
    assert not report.pairs
    if why is None:
        assert list(report.alone.values()) == [
            "its input comes from 'Dropout_3 (output 'z')' (Dropout), its output goes to what the "
            "model returns"
        ]
    else:
        assert why in " ".join(report.refused.values())


def test_fold_knows_the_long_name_of_onnxs_domain():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    for each in (*proto.graph.node, *proto.opset_import):
        each.domain = "ai.onnx"
    folded, report = fold(proto, {"x": array(1, 4, 5, 5)})
    (node,) = folded.graph.node
    assert (node.domain, len(report.pairs)) == ("ai.onnx", 1)


# ---- where a value goes -------------------------------------------------------------------------

IF = """i = If(k)<then_branch = t () => (T[A, B, D, E] e) { e = Relu(z) },
                else_branch = f () => (T[F, G, I, J] g) { g = Identity(n) }> y = Add(i, n)"""


def test_fold_sees_what_graphs_inside_of_nodes_use():
    proto = convolutions(
        f"z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) {IF}", inputs=", bool k"
    )
    folded, report = fold(proto)
    assert folded == proto
    (why,) = report.refused.values()
    assert "'Relu_0 (output 'e')' (Relu, inside another node)" in why


def test_fold_sees_outputs_of_the_model():
    proto = convolutions("z = Conv(x, w) " + AFTER, outputs=", T[N, A, B, D] z")
    folded, report = fold(proto)
    assert folded == proto
    assert list(report.refused.values()) == [
        "the output of 'Conv_0 (output 'z')' also goes to what the model returns"
    ]


def test_fold_does_not_take_values_out_of_inner_graphs():
    body = """z = Conv(x, w) y = If(k)<
        then_branch = t () => (T[A, B, D, E] e) { e = BatchNormalization(z, s, b, m, v) },
        else_branch = f () => (T[F, G, I, J] g) { g = Identity(x) }>"""
    proto = convolutions(body, inputs=", bool k")
    folded, report = fold(proto)
    assert folded == proto
    assert report.refused == {
        "BatchNormalization_0 (output 'e')": "'Conv_0 (output 'z')' is outside of the graph that "
        "it is in"
    }


def test_fold_does_not_take_batch_norms_into_inner_graphs():
    body = """z = BatchNormalization(x, s, b, m, v) y = If(k)<
        then_branch = t () => (T[A, B, D, E] e) { e = Conv(z, w) },
        else_branch = f () => (T[F, G, I, J] g) { g = Conv(x, w) }>"""
    proto = convolutions(body, inputs=", bool k")
    folded, report = fold(proto, [{"x": X, "k": np.array(True)}, {"x": X, "k": np.array(False)}])
    assert folded == proto
    assert "which comes after it, is inside another node" in next(iter(report.refused.values()))


def test_fold_gives_a_shared_weight_to_each_layer():
    body = "z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) y = Conv<pads=[2, 2, 2, 2]>(n, w)"
    proto = convolutions(body, np.float64)
    folded, _ = fold(proto)
    assert np.array_equal(weights(folded)["w"], weights(proto)["w"])
    assert set(weights(folded)) == {"w", "w_folded", "w_bias"}
    check_equal(proto, folded, 1, 4, 5, 5)


def test_fold_folds_two_layers_with_one_weight():
    body = """z = Conv<pads=[1, 1, 1, 1]>(x, w, c) n = BatchNormalization(z, s, b, m, v)
        q = Conv(n, w, c) y = BatchNormalization(q, ts, tb, tm, tv)"""
    proto = convolutions(body, np.float64)
    folded, _ = fold(proto)
    assert sorted(weights(folded)) == ["c", "c_folded", "w", "w_folded"]
    check_equal(proto, folded, 1, 4, 5, 5)


def test_fold_keeps_parameters_that_are_used_elsewhere():
    body = "z = Conv(x, w, b) n = BatchNormalization(z, s, b, m, v) t = Conv(n, u, v) y = Relu(t)"
    proto = convolutions(body, np.float64)
    folded, _ = fold(proto)
    assert set(weights(folded)) == {"w", "b", "u", "v"}
    assert np.array_equal(weights(folded)["v"], weights(proto)["v"])
    check_equal(proto, folded, 1, 4, 5, 5)


def test_fold_finds_names_that_are_free():
    body = """z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) w_folded = Conv(n, w)
        w_bias = Relu(w_folded) y = Relu(w_bias)"""
    proto = convolutions(body, np.float64)
    folded, _ = fold(proto)
    assert set(weights(folded)) == {"w", "w_folded_1", "w_bias_1"}
    check_equal(proto, folded, 1, 4, 6, 6)


# ---- initializers that are inputs, and of other kinds -------------------------------------------


def test_fold_takes_initializers_of_ir_version_3_for_constants():
    proto = convolutions("z = Conv(x, w) " + AFTER, opset=9, ir=3)
    folded, report = fold(proto, {"x": array(1, 4, 5, 5)})
    assert [value.name for value in folded.graph.input] == ["x", "w", "w_bias"]
    assert len(report.pairs) == 1
    onnx.checker.check_model(folded, full_check=True)


def test_fold_updates_the_shape_of_inputs_of_ir_version_3():
    proto = model(
        "(T[5, 3] x) => (T[5, 4] y) { z = Gemm(x, w, row) y = BatchNormalization(z, s, b, m, v) }",
        opset=9, ir=3, w=array(3, 4), row=array(1, 4), **norm(4),
    )  # fmt: skip
    folded, _ = fold(proto)
    shape = {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in folded.graph.input
    }
    assert shape == {"x": [5, 3], "w": [3, 4], "row": [4]}
    onnx.checker.check_model(folded, full_check=True)


@pytest.mark.parametrize("name", ["w", "c", "v"])
def test_fold_refuses_initializers_that_callers_may_replace(name):
    proto = convolutions("z = Conv(x, w, c) " + AFTER)
    values = weights(proto)[name]
    proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape))
    folded, report = fold(proto)
    assert folded == proto
    assert f"'{name}' is also an input of the model" in next(iter(report.refused.values()))


def test_fold_keeps_inputs_that_callers_may_replace():
    proto = convolutions("z = Conv(x, w, c) n = BatchNormalization(z, s, b, m, v) y = Add(n, q)",
                         more={"q": np.ones(1, np.float32)})  # fmt: skip
    proto.graph.input.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, [1]))
    folded, report = fold(proto, {"x": array(1, 4, 5, 5), "q": np.zeros(1, np.float32)})
    assert [value.name for value in folded.graph.input] == ["x", "q"]
    assert len(report.pairs) == 1


def test_fold_refuses_sparse_initializers():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    place = [t.name for t in proto.graph.initializer].index("v")
    values = proto.graph.initializer[place]
    indices = numpy_helper.from_array(np.arange(4), "")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    del proto.graph.initializer[place]
    folded, report = fold(proto)
    assert folded == proto
    assert list(report.refused.values()) == ["'v' is a sparse initializer"]


def test_fold_refuses_what_has_annotations():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    proto.graph.quantization_annotation.add(tensor_name="z").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="c"
    )
    folded, report = fold(proto)
    assert folded == proto
    assert list(report.refused.values()) == ["'z' has an annotation for its quantization"]


def test_fold_refuses_nodes_on_several_devices():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    proto.graph.node[0].device_configurations.add(configuration_id="a")
    folded, report = fold(proto)
    assert folded == proto
    assert "is distributed over devices" in next(iter(report.refused.values()))


def test_fold_raises_for_models_that_train():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    proto.training_info.add()
    with pytest.raises(ArgumentError, match="got one with training_info"):
        fold(proto)


def test_fold_raises_for_data_outside_of_the_model():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="a.data")
    with pytest.raises(ArgumentError, match="is in 'a.data', outside of it. Load it with"):
        fold(proto)


# ---- training mode, versions, types -------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "outputs", "attribute"),
    [(9, "y, a, d, e, f", ""), (13, "y, a, d, e, f", ""), (15, "y, a, d", "<training_mode = 1>"),
     (14, "y", "<training_mode = 1>")],
)  # fmt: skip
def test_fold_refuses_training_mode(opset, outputs, attribute):
    body = f"z = Conv(x, w) {outputs} = BatchNormalization{attribute}(z, s, b, m, v)"
    proto = convolutions(body, opset=opset)
    folded, report = fold(proto)
    assert folded == proto
    assert "training mode" in next(iter(report.refused.values()))


@pytest.mark.parametrize("opset", [9, 11, 13, 14, 15, 18, onnx.defs.onnx_opset_version()])
def test_fold_folds_models_of_every_opset(opset):
    body = "a = Conv(x, w) i = Identity(a) n = BatchNormalization(i, s, b, m, v) y = Relu(n)"
    ir = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    proto = convolutions(body, np.float64, opset=opset, ir=ir)
    folded, _ = fold(proto)
    assert operators(folded.graph) == ["Conv", "Relu"]
    assert folded.ir_version == ir
    assert folded.opset_import == proto.opset_import
    check_equal(proto, folded, 1, 4, 5, 5)


def test_fold_raises_for_opset_8():
    with pytest.raises(ArgumentError, match="opset 9 or later, got 8"):
        fold(convolutions("z = Conv(x, w) " + AFTER, opset=8, ir=3))


@pytest.mark.parametrize("inside", [False, True])
def test_fold_raises_for_an_opset_that_onnx_does_not_know(inside):
    proto = with_function("(h) => (r) { r = Relu(h) }")
    (proto.functions[0] if inside else proto).opset_import[0].version = 999
    with pytest.raises(ArgumentError, match="or earlier, .* got 999. Install a newer onnx"):
        fold(proto)


def test_fold_uses_the_default_epsilon_of_the_operator():
    tiny = {"v": np.full(4, 1e-5)}
    proto = convolutions("z = Conv(x, w) " + AFTER, np.float64, more=tiny)
    folded, _ = fold(proto)
    check_equal(proto, folded, 1, 4, 5, 5)


# Unit roundoff, and the largest error of numbers that are not normal ones.
TYPES = {
    "float16": (TensorProto.FLOAT16, 2.0**-11, 2.0**-25),
    "bfloat16": (TensorProto.BFLOAT16, 2.0**-8, 0.0),
    "float32": (TensorProto.FLOAT, 2.0**-24, 0.0),
    "float64": (TensorProto.DOUBLE, 2.0**-50, 0.0),
}


@pytest.mark.parametrize("dtype", TYPES)
def test_fold_rounds_once_to_the_type_of_the_model(dtype):
    number, unit, tiny = TYPES[dtype]
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(number))
    more = norm(4) if kind.itemsize < 4 else {}
    proto = convolutions("z = Conv(x, w, c) " + AFTER, kind, opset=22, ir=10, more=more)
    folded, report = fold(proto)
    onnx.checker.check_model(folded, full_check=True)
    old = {name: values.astype(float) for name, values in weights(proto).items()}
    scale = old["s"] / np.sqrt(old["v"] + np.float32(1e-5))
    exact = old["w"] * scale[:, None, None, None]
    got = weights(folded)
    assert got["w"].dtype == got["c"].dtype == kind
    assert report.dtype == dtype
    assert (abs(got["w"].astype(float) - exact) <= 1.0001 * unit * abs(exact) + tiny).all()


def test_fold_verifies_float16():
    body = "z = Conv(x, w, c) " + AFTER
    proto = convolutions(body, np.float16, more=norm(4, dtype=np.float32))
    _, report = fold(proto, {"x": array(2, 4, 6, 6).astype(np.float16)})
    (pair,) = report.pairs
    assert 1e-4 < pair.error < pair.bound < 1


def test_fold_names_what_overflows():
    proto = convolutions(
        "z = Conv(x, w) " + AFTER, np.float16, more={"v": np.full(4, 1e-12, np.float32)}
    )
    proto.graph.node[1].attribute.append(helper.make_attribute("epsilon", 0.0))
    folded, report = fold(proto)
    assert folded == proto
    (why,) = report.refused.values()
    assert "must fit into float16" in why


# ---- weights that nodes compute -----------------------------------------------------------------

COMPUTED = {
    "weight norm": "l = ReduceL2<axes = [1, 2, 3]>(w) n = Div(g, l) k = Mul(w, n)",
    "weight norm of Linear": "q = Mul(w, w) a = Constant<value_ints = [1, 2, 3]>() "
    "r = ReduceSum(q, a) l = Sqrt(r) n = Div(w, l) k = Mul(n, g)",
    "pruned": "k = Mul(w, mask)",
    "shapes": "i = Constant<value_ints = [4, 36]>() h = Reshape(w, i) o = Constant<value_ints = "
    "[0]>() e = Unsqueeze(h, o) f = Squeeze(e, o) d = Shape(w) t = Concat<axis = 0>(f, f) "
    "p = Constant<value_ints = [4]>() sl = Slice(t, o, p) k = Reshape(sl, d)",
    "standardized": "mu = ReduceMean<axes = [1, 2, 3]>(w) d = Sub(w, mu) k = Add(d, g)",
}
COMPUTING = {"g": array(4, 1, 1, 1, seed=3), "mask": (array(4, 4, 3, 3) > 0).astype(np.float32)}


@pytest.mark.parametrize("kind", COMPUTED)
def test_fold_folds_into_weights_that_nodes_compute(kind):
    proto = convolutions(f"{COMPUTED[kind]} z = Conv(x, k) {AFTER}", more=COMPUTING)
    folded, report = fold(proto, {"x": array(2, 4, 6, 5)})
    assert operators(folded.graph) == ["Conv"]
    assert len(weights(folded)) == 2  # and nothing is left of what computed it
    assert report.share <= 1
    check_equal(proto, folded, 2, 4, 6, 5, dtype=np.float32, tolerance=1e-4)


def test_fold_keeps_what_others_use_of_nodes_that_compute_a_weight():
    body = f"{COMPUTED['weight norm']} z = Conv(x, k) {AFTER} r = Relu(n)"
    proto = convolutions(body, more=COMPUTING, outputs=", T[O, I, P1, P2] r")
    folded, report = fold(proto)
    assert len(report.pairs) == 1
    assert operators(folded.graph) == ["ReduceL2", "Div", "Conv", "Relu"]
    assert {"w", "g"} < weights(folded).keys()
    check_equal(proto, folded, 2, 4, 6, 5, dtype=np.float32, tolerance=1e-4)


def test_fold_knows_the_axes_of_old_operators():
    body = f"h = Unsqueeze<axes = [2, 3]>(i) z = Conv(x, h) {AFTER}"
    proto = convolutions(body, np.float64, opset=11, more={"i": array(4, 4, dtype=np.float64)})
    folded, _ = fold(proto)
    assert operators(folded.graph) == ["Conv"]
    check_equal(proto, folded, 2, 4, 6, 5)


UNCOMPUTED = {
    "huge": (
        "i = Constant<value_ints = [1048576, 1048576]>() h = ConstantOfShape(i) "
        "a = Constant<value_ints = [0, 1]>() t = ReduceSum(h, a) k = Add(w, t)",
        "'h' cannot be computed (it may have too many values)",
    ),
    "product of all with all": (
        "i = Constant<value_ints = [-1, 1]>() j = Constant<value_ints = [1, -1]>() "
        "s1 = Constant<value_ints = [1048576]>() h = ConstantOfShape(s1) p = Reshape(h, i) "
        "q = Reshape(h, j) r = Mul(p, q) a = Constant<value_ints = [0, 1]>() "
        "t = ReduceSum(r, a) k = Add(w, t)",
        "'r' cannot be computed (it may have too many values)",
    ),
    "random": ("r = RandomNormalLike(w) k = Add(w, r)", "'r' is computed, by 'RandomNormalLike_0"),
    "of the input": ("r = Shape(x) k = Reshape(w, r)", "'x' is an input of its graph"),
    "of other shapes": ("k = Add(w, c3)", "'k' cannot be computed ([ShapeInferenceError]"),
}


@pytest.mark.parametrize("kind", UNCOMPUTED)
def test_fold_refuses_weights_that_it_does_not_compute(kind):
    nodes, why = UNCOMPUTED[kind]
    proto = convolutions(f"{nodes} z = Conv(x, k) {AFTER}", more={"c3": array(5)})
    folded, report = fold(proto)
    assert folded == proto
    assert why in next(iter(report.refused.values()))


def test_fold_refuses_weights_that_depend_on_an_argument_of_a_function():
    tensors = {"w": array(4, 4, 1, 1), **norm(4)}
    held = " ".join(f"{n} = Constant<value = {constant_text(t)}>()" for n, t in tensors.items())
    body = f"""f <p> (h) => (r) {{ {held} k = Transpose<perm: ints = @p>(w) z = Conv(h, k)
        r = BatchNormalization(z, s, b, m, v) }}"""
    proto = with_function(body.removeprefix("f "), "y = my.f<p = [1, 0, 2, 3]>(x)")
    folded, report = fold(proto)
    assert folded == proto
    assert "'k' is computed, by" in next(iter(report.refused.values()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fold_computes_weights_in_half_precision_with_all_digits(dtype):
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(getattr(TensorProto, dtype.upper())))
    ones = {name: np.ones(4, kind) for name in "sv"} | {name: np.zeros(4, kind) for name in "bm"}
    body = "a = Constant<value_ints = [2, 3]>() k = ReduceSum(f, a) z = Conv(x, k) "
    body += "y = BatchNormalization<epsilon = 0.0>(z, s, b, m, v)"
    more = {**ones, "f": np.full((4, 4, 32, 31), 1 / 8, kind)}
    folded, _ = fold(convolutions(body, kind, more=more))
    (weight,) = (v for v in weights(folded).values() if v.ndim == 4)
    assert weight.dtype == kind
    np.testing.assert_array_equal(weight.astype(float), 124)


# ---- inner graphs and functions -----------------------------------------------------------------

INNER = {
    "If": """y = If(k)<
        then_branch = t () => (T[A, B, D, E] e) {
            z = Conv(x, w) e = BatchNormalization(z, s, b, m, v) },
        else_branch = f () => (T[F, G, I, J] g) {
            q = Conv(x, u) g = BatchNormalization(q, ts, tb, tm, tv) }>""",
    "Loop": """n = Constant<value = int64 {3}>() y = Loop(n, k, x)<
        body = l (int64 i, bool c0, T[A, B, D, E] h) => (bool c1, T[F, G, I, J] e) {
            c1 = Identity(c0) z = Conv<pads=[1, 1, 1, 1]>(h, w)
            e = BatchNormalization(z, s, b, m, v) }>""",
    "Scan": """o = Constant<value_ints = [0]>() h = Unsqueeze(x, o)
        f = Scan<num_scan_inputs = 1, body = l (T[A, B, D, E] h0) => (T[F, G, I, J] e) {
            z = Conv(h0, w) e = BatchNormalization(z, s, b, m, v) }>(h) y = Squeeze(f, o)""",
    "If in Loop": """n = Constant<value = int64 {2}>() y = Loop(n, k, x)<
        body = l (int64 i, bool c0, T[A, B, D, E] h) => (bool c1, T[F, G, I, J] e) {
            c1 = Identity(c0)
            e = If(k)<then_branch = t () => (T[A1, B1, D1, E1] e1) {
                    z = Conv<pads=[1, 1, 1, 1]>(h, w) e1 = BatchNormalization(z, s, b, m, v) },
                else_branch = f () => (T[F1, G1, I1, J1] g1) { g1 = Relu(h) }> }>""",
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("inside", [False, True])
def test_fold_folds_inside_of_nodes(name, inside):
    """With weights from outside, and from the inner graph itself."""
    proto = convolutions(INNER[name], np.float32, inputs=", bool k")
    if inside:
        (graph,) = [
            a.g for n in proto.graph.node for a in n.attribute if a.name in ("body", "then_branch")
        ]
        held = {name for node in graph.node for name in node.input}
        for tensor in [t for t in proto.graph.initializer if t.name in held]:
            graph.initializer.append(tensor)
            proto.graph.initializer.remove(tensor)
    yes, x = np.array(True), array(1, 4, 5, 5)
    folded, report = fold(proto, [{"x": x, "k": yes}, {"x": x, "k": np.array(False)}])
    assert BN not in str(folded)
    assert all(0 < pair.error < pair.bound for pair in report.pairs)
    check_equal(proto, folded, 1, 4, 5, 5, dtype=np.float32, tolerance=1e-4, k=yes)


@pytest.mark.parametrize("opset", [9, 10])
def test_fold_compares_branches_that_old_opsets_want_of_one_shape(opset):
    proto = convolutions(INNER["If in Loop"], inputs=", bool k", opset=opset)
    folded, report = fold(proto, {"x": X, "k": np.array(True)})
    assert BN not in str(folded)
    assert 0 < report.pairs[0].error < report.pairs[0].bound


def test_fold_refuses_what_the_inputs_do_not_reach():
    proto = convolutions(INNER["If"], inputs=", bool k")
    _, report = fold(proto, {"x": array(1, 4, 5, 5), "k": np.array(True)})
    assert report.folded == {"BatchNormalization_1 (output 'e')": "Conv_0 (output 'z')"}
    (why,) = report.refused.values()
    assert why == "folded into 'Conv_0 (output 'q')', it could not be compared on the inputs"


def with_function(body, proto_body="y = my.f(x)", **options):
    return convolutions(
        proto_body, domains=', "my": 1',
        functions=f'<domain: "my", opset_import: ["": 17]> f {body}', **options,
    )  # fmt: skip


def constant_text(values):
    numbers = ", ".join(str(float(v)) for v in values.ravel())
    return f"float[{', '.join(map(str, values.shape))}] {{{numbers}}}"


def test_fold_folds_inside_of_functions():
    tensors = {"w": array(4, 4, 1, 1), **norm(4)}
    held = " ".join(f"{n} = Constant<value = {constant_text(t)}>()" for n, t in tensors.items())
    proto = with_function(
        f"(h) => (r) {{ {held} z = Conv(h, w) r = BatchNormalization(z, s, b, m, v) }}",
        "a = my.f(x) q = Relu(a) y = my.f(q)",
    )
    folded, report = fold(proto, {"x": array(2, 4, 5, 5)})
    assert operators(folded.functions[0]) == ["Constant", "Constant", "Conv"]
    assert report.folded == {"f/BatchNormalization_6 (output 'r')": "f/Conv_5 (output 'z')"}
    assert 0 < report.pairs[0].error < report.pairs[0].bound
    check_equal(proto, folded, 2, 4, 5, 5, dtype=np.float32, tolerance=1e-4)


def test_fold_compares_functions_that_are_called_in_loops():
    tensors = {"w": array(4, 4, 1, 1) / 4, **norm(4)}
    held = " ".join(f"{n} = Constant<value = {constant_text(t)}>()" for n, t in tensors.items())
    proto = with_function(
        f"(h) => (r) {{ {held} z = Conv(h, w) r = BatchNormalization(z, s, b, m, v) }}",
        """n = Constant<value = int64 {3}>() q = my.f(x) y = Loop(n, k, q)<
            body = l (int64 i, bool c0, T[A, B, D, E] h) => (bool c1, T[F, G, I, J] e) {
                c1 = Identity(c0) e = my.f(h) }>""",
        inputs=", bool k",
    )
    folded, report = fold(proto, {"x": array(2, 4, 5, 5), "k": np.array(True)})
    assert operators(folded.functions[0])[-1] == "Conv"
    assert 0 < report.pairs[0].error < report.pairs[0].bound


def test_fold_refuses_to_compare_rounds_of_other_shapes():
    body = """n = Constant<value = int64 {2}>() y = Loop(n, k, x)<
        body = l (int64 i, bool c0, T[A, B, D, E] h) => (bool c1, T[F, G, I, J] e) {
            c1 = Identity(c0) z = Conv(h, w) e = BatchNormalization(z, s, b, m, v) }>"""
    proto = convolutions(body, inputs=", bool k")
    assert len(fold(proto)[1].pairs) == 1
    folded, report = fold(proto, {"x": array(1, 4, 9, 9), "k": np.array(True)})
    assert folded == proto
    assert "it cannot be compared" in next(iter(report.refused.values()))


def test_fold_refuses_parameters_of_functions():
    proto = with_function(
        "(h, w, s, b, m, v) => (r) { z = Conv(h, w) r = BatchNormalization(z, s, b, m, v) }",
        "y = my.f(x, w, s, b, m, v)",
    )
    folded, report = fold(proto)
    assert folded == proto
    assert list(report.refused.values()) == ["'w' is a parameter of a function, not a constant"]


def test_fold_refuses_attributes_of_functions():
    proto = with_function(
        "<eps>(h, w, s, b, m, v) => (r) { z = Conv(h, w) "
        "r = BatchNormalization<epsilon: float = @eps>(z, s, b, m, v) }",
        "y = my.f<eps = 0.1>(x, w, s, b, m, v)",
    )
    assert fold(proto)[0] == proto


def test_fold_leaves_functions_with_the_names_of_operators():
    proto = convolutions(
        "z = Conv(x, w) " + AFTER,
        functions='<domain: "", opset_import: ["": 17]> Conv (h, w) => (r) { r = Relu(h) }',
    )
    folded, report = fold(proto)
    assert folded == proto
    assert not report.pairs


# ---- what stays ---------------------------------------------------------------------------------


def test_fold_keeps_all_that_it_does_not_fold():
    body = """z = Conv(x, w) n = BatchNormalization(z, s, b, m, v)
        g = com.microsoft.Gelu(n) h = other.Strange<a = 3>(g) y = Relu(h)"""
    proto = convolutions(body, domains=', "com.microsoft": 1, "other": 7')
    proto.producer_name, proto.doc_string = "someone", "a text"
    proto.metadata_props.add(key="a", value="b")
    proto.graph.doc_string = "of the graph"
    conv = proto.graph.node[0]
    conv.name, conv.doc_string = "first", "of the node"
    conv.metadata_props.add(key="c", value="d")
    for name in ("z", "n", "g"):
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, "A", "B"])
        proto.graph.value_info.append(info)
    folded, report = fold(proto)
    assert report.folded == {"BatchNormalization_1 (output 'n')": "first"}
    expected = onnx.ModelProto()
    expected.CopyFrom(proto)
    expected.graph.node[0].output[0] = "n"
    expected.graph.node[0].input.append("w_bias")
    del expected.graph.node[1], expected.graph.value_info[0]
    assert [i.name for i in folded.graph.value_info] == ["n", "g"]
    del folded.graph.initializer[:], expected.graph.initializer[:]
    assert folded == expected


def test_fold_leaves_branches_apart_that_do_not_fit_into_their_type():
    """Each fits, and their sum does not; nor does a batch norm behind it."""
    body = """a = Conv(x, u) p = BatchNormalization(a, one, b, zero, one) d = Conv(x, u)
        q = BatchNormalization(d, one, b, zero, one) e = Add(p, q)
        y = BatchNormalization(e, ts, tb, tm, tv)"""
    more = {"b": np.full(4, 4e4, np.float16), "one": np.ones(4, np.float16)}
    proto = convolutions(body, np.float16, more=more)
    folded, report = fold(proto)
    assert operators(folded.graph) == ["Conv", "Conv", "Add", BN]
    assert len(report.folded) == 2


def test_fold_leaves_branches_apart_whose_error_exceeds_the_bound(monkeypatch):
    from batchnorm.onnx.fold import layers

    bound = layers.Folding._bound
    monkeypatch.setattr(
        layers.Folding,
        "_bound",
        lambda self, *types: bound(self, *types) * (1 if len(self.parts) < 2 else 1e-9),
    )
    proto = folded_case("branches, norm behind", np.float32)
    folded, report = fold(proto, {"x": array(2, 4, 6, 5)})
    assert folded == proto
    assert not report.alone
    assert "times the bound" in next(iter(report.refused.values()))
    proto = folded_case("RepVGG", np.float32)
    folded, report = fold(proto, {"x": array(2, 4, 6, 5)})
    assert len(report.folded) == 2
    assert not report.alone
    assert "times the bound" in next(iter(report.refused.values()))


def test_fold_says_first_why_it_has_taken_a_batch_norm_back(monkeypatch):
    monkeypatch.setattr(verify.Folding, "problem", lambda self: "it is too far")
    body = """z = Conv(x, u) y = If(k)<
        then_branch = t () => (T[A, B, D, E] r) {
            n = BatchNormalization(z, s, b, m, v) r = Conv(n, u) },
        else_branch = f () => (T[F, G, I, J] o) { o = Identity(x) }>"""
    proto = convolutions(body, inputs=", bool k")
    _, report = fold(proto, {"x": X, "k": np.array(True)})
    (reason,) = report.refused.values()
    assert reason.startswith("folded into")
    assert reason.endswith("it is too far")


APART = {
    "even": ("Conv<pads=[1, 1, 0, 0]>(x, even)", "Conv<pads=[1, 1, 1, 1]>(x, w)"),
    "strides": ("Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(x, k3)", "Conv<pads=[1, 1, 1, 1]>(x, w)"),
    "dilations": (
        "Conv<pads=[1, 1, 1, 1], dilations=[2, 2]>(x, k3)",  # one value, for each of the other
        "Conv<pads=[1, 1, 1, 1]>(x, w)",
    ),
    "off the middle": ("Conv<pads=[0, 1, 2, 1]>(x, k3)", "Conv<pads=[1, 1, 1, 1]>(x, w)"),
    "padding by size": ('Conv<auto_pad = "SAME_UPPER">(x, k3)', "Conv<pads=[1, 1, 1, 1]>(x, w)"),
    "groups": ("Conv<group = 2>(x, half)", "Conv<pads=[1, 1, 1, 1]>(x, w)"),
    "other input": ("Conv(i, u)", "Conv<pads=[1, 1, 1, 1]>(x, w)"),
    "transposed": ("ConvTranspose(x, u)", "Conv<pads=[1, 1, 1, 1]>(x, w)"),
}


@pytest.mark.parametrize("kind", APART)
def test_fold_leaves_branches_apart_that_do_not_fit(kind):
    one, other = APART[kind]
    body = f"""i = Relu(x) a = {one} p = BatchNormalization(a, s, b, m, v)
        d = {other} q = BatchNormalization(d, ts, tb, tm, tv) e = Add(p, q) y = Add(e, i)"""
    more = {
        "even": array(4, 4, 2, 2, seed=3, dtype=np.float64),
        "k3": array(4, 4, 3, 3, seed=3, dtype=np.float64),
        "half": array(4, 2, 1, 1, seed=3, dtype=np.float64),
    }
    proto = convolutions(body, np.float64, more=more)
    folded, report = fold(proto)
    assert operators(folded.graph)[-2:] == ["Add", "Add"]
    assert [pair.merged for pair in report.pairs] == [[], []]
    size = {"strides": 1, "dilations": 3}.get(kind, 6)
    check_equal(proto, folded, 1, 4, size, size)


@pytest.mark.parametrize(
    "layer",
    ["Conv<pads=[0, 1, 2, 1]>(x, w)", "Conv<auto_pad = \"SAME_LOWER\">(x, w)",
     "Conv<pads=[1, 1, 0, 0]>(x, even)", "Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(x, w)"],
)  # fmt: skip
def test_fold_leaves_a_batch_norm_beside_a_convolution_that_moves_its_input(layer):
    body = f"a = {layer} p = BatchNormalization(a, s, b, m, v) "
    body += "q = BatchNormalization(x, ts, tb, tm, tv) y = Add(p, q)"
    more = {"even": array(4, 4, 2, 2, seed=3, dtype=np.float64)}
    proto = convolutions(body, np.float64, more=more)
    folded, report = fold(proto)
    assert sorted(operators(folded.graph)) == ["Add", BN, "Conv"]
    assert list(report.alone) == ["BatchNormalization_2 (output 'q')"]
    check_equal(proto, folded, 1, 4, *([1, 1] if "strides" in layer else [6, 6]))


def test_report_names_what_a_layer_has_taken_in():
    body = """a = Conv<pads=[1, 1, 1, 1]>(x, w) p = BatchNormalization(a, s, b, m, v)
        d = Conv(x, u, c) q = BatchNormalization(d, ts, tb, tm, tv) e = Add(p, q)
        y = BatchNormalization(e, s, b, m, v)"""
    proto = convolutions(f"f = BatchNormalization(h, s, zero, zero, v) {body}".replace("x,", "f,"))
    proto.graph.node.insert(0, helper.make_node(BN, ["x", "s", "zero", "zero", "v"], ["h"]))
    for node, name in zip(proto.graph.node, ["h", "f", "a", "p", "d", "q", "e", "y"], strict=True):
        node.name = name
    _, report = fold(proto, {"x": X})
    (pair,) = report.pairs
    assert (pair.layer, pair.before, pair.after) == ("a", ["h", "f"], ["p", "y"])
    assert (pair.beside, pair.merged, pair.new_bias) == (["q"], ["d"], True)
    assert pair.largest_weight > 0


def test_bound_counts_the_roundings_of_what_is_added_to_a_product():
    bounds = []
    for text in (
        "z = Gemm(x, w, c)",
        "q = MatMul(x, w) z = Add(q, c)",
        "z = Gemm<beta=2.0>(x, w, h)",
    ):
        proto = model(
            f"(T[5, 3] x) => (T[M, 4] y) {{ {text} y = BatchNormalization(z, s, b, m, v) }}",
            w=array(3, 4), c=array(4), h=array(4) / 2, **norm(4),
        )  # fmt: skip
        _, report = fold(proto, {"x": array(5, 3)})
        bounds.append(report.pairs[0].bound)
    assert bounds[0] < min(bounds[1:])


# ---- any network --------------------------------------------------------------------------------


@st.composite
def networks(draw):
    """Nodes that are connected at random, some of them inside of an If; and how many are norms."""
    values, lines = ["x"], []

    def grow(count, names, prefix):
        for number in range(count):
            kind = draw(st.sampled_from(sorted(NODES)))
            a, b = (draw(st.sampled_from(names[-5:])) for _ in range(2))
            norm = draw(st.sampled_from(["s, b, m, v", "ts, tb, tm, tv", "s, zero, zero, tv"]))
            name = f"{prefix}{number}"
            yield f"{name} = {NODES[kind].format(a=a, b=b, norm=norm)}"
            names.append(name)

    lines += grow(draw(st.integers(2, 12)), values, "a")
    if draw(st.booleans()):
        inner = [*values]
        body = " ".join(grow(draw(st.integers(1, 5)), inner, "i"))
        taken = f"then_branch = t () => (T[A, B, D, E] {inner[-1]}) {{ {body} }}"
        other = f"else_branch = f () => (T[F, G, I, J] o) {{ o = Relu({values[-1]}) }}"
        lines.append(f"j = If(k)<{taken}, {other}>")
        values.append("j")
        lines += grow(draw(st.integers(1, 3)), values, "c")
    shown = draw(st.sets(st.sampled_from(values[1:]), max_size=2)) - {values[-1]}
    lines.append(f"y = Relu({values[-1]})")
    outputs = "".join(f", T[N, C, H, W] {name}" for name in sorted(shown))
    return " ".join(lines), outputs


NODES = {
    "conv": "Conv<pads = [1, 1, 1, 1]>({a}, w, c)",
    "dilated": "Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>({a}, w)",
    "point": "Conv({a}, u)",
    "transposed": "ConvTranspose<pads = [1, 1, 1, 1]>({a}, w)",
    "norm": "BatchNormalization({a}, {norm})",
    "norm again": "BatchNormalization({a}, {norm})",
    "identity": "Identity({a})",
    "relu": "Relu({a})",
    "add": "Add({a}, {b})",
    "sum": "Sum({b}, {a})",
}


@given(networks(), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_fold_keeps_what_networks_of_any_shape_compute(network, taken):
    body, outputs = network
    proto = convolutions(body, np.float64, inputs=", bool k", outputs=outputs)
    folded, report = fold(proto)
    norms = [report.folded, report.refused, report.alone]
    assert sum(map(len, norms)) == str(proto).count('op_type: "BatchNormalization"')
    assert str(folded).count('op_type: "BatchNormalization"') == len(report.refused) + len(
        report.alone
    )
    check_equal(proto, folded, 1, 4, 4, 5, k=np.array(taken), tolerance=1e-9)


@given(networks())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_fold_verifies_networks_of_any_shape(network):
    body, outputs = network
    proto = convolutions(body, inputs=", bool k", outputs=outputs)
    feeds = [{"x": array(1, 4, 4, 5), "k": np.array(taken)} for taken in (True, False)]
    _, unverified = fold(proto)
    folded, report = fold(proto, feeds)
    onnx.checker.check_model(folded, full_check=True)
    assert (report.folded, report.refused) == (unverified.folded, unverified.refused)
    assert report.share <= 1
    assert report.relative_error < 1e-4


# ---- the report, and errors ---------------------------------------------------------------------


def test_report_says_that_nothing_was_verified():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    _, report = fold(proto)
    assert "not verified" in str(report)
    assert "bound" not in str(report)
    assert report.error is None
    assert json.loads(report.to_json())["pairs"][0]["error"] is None
    assert not report.verified


def test_report_says_what_was_verified():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    _, report = fold(proto, {"x": array(1, 4, 5, 5)})
    assert "if a runtime optimizes both" in str(report)
    found = json.loads(report.to_json())
    assert found["verified"] is True
    assert found["optimized_error"] == report.optimized_error


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_if_asked_for(bars, progress):
    net = convolutions("z = Conv(x, w) y = BatchNormalization(z, s, b, m, v)")
    fold(net, {"x": array(2, 4, 5, 5)}, progress=progress)
    steps = (
        "checking the model", "running the model", "folding", "comparing layers",
        "checking the folded model", "running the folded model",
    )  # fmt: skip
    assert bars == [[f"fold: {step}" for step in steps]] * progress


def test_fold_raises_when_strict_and_something_is_refused():
    proto = convolutions("z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) y = Add(n, z)")
    with pytest.raises(FoldError, match="was refused: the output of"):
        fold(proto, strict=True)


def test_fold_raises_when_strict_and_beyond_tol():
    proto = convolutions("z = Conv(x, w) " + AFTER)
    feed = {"x": array(1, 4, 5, 5)}
    fold(proto, feed, strict=True, tol=1e-3)
    with pytest.raises(FoldError, match="differs by") as raised:
        fold(proto, feed, strict=True, tol=1e-12)
    assert raised.value.report.pairs


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fold_leaves_what_is_not_finite_out_of_comparisons(value):
    proto, x = convolutions("z = Conv(x, w) " + AFTER), array(1, 4, 5, 5)
    x[0, 0, 0, 0] = value
    (pair,) = fold(proto, {"x": x})[1].pairs
    assert 0 < pair.error < pair.bound < 1
    _, report = fold(proto, {"x": np.full_like(x, value)})
    assert "it could not be compared on the inputs" in next(iter(report.refused.values()))
    assert math.isnan(report.error)
    assert math.isnan(report.optimized_error)


def test_fold_refuses_an_error_beyond_its_bound(monkeypatch):
    from batchnorm.onnx.fold import layers

    monkeypatch.setattr(layers.Folding, "_bound", lambda self, *types: np.full(4, 1e-12))
    proto = convolutions("z = Conv(x, w) " + AFTER)
    folded, report = fold(proto, {"x": array(1, 4, 5, 5)})
    assert folded == proto
    assert "times the bound" in next(iter(report.refused.values()))


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({"x": X, "z": X}, ArgumentError, r"names of the model's inputs \('x'\), got 'z'"),
        ({"x": X, "w": X}, ArgumentError, "got 'w'"),
        ({}, ArgumentError, "missing: x"),
        ([], ArgumentError, "got an empty list"),
        (X, ArgumentError, "got ndarray"),
        ([X], ArgumentError, "got ndarray"),
        ({"x": X.astype(float)}, DTypeError, "must be of type float32, got float64"),
        ({"x": X[:, :3]}, ShapeError, r"must have shape \(N, 4, H, W\), got \(1, 3, 5, 5\)"),
        ({"x": X[0]}, ShapeError, r"got \(4, 5, 5\)"),
        ({"x": X[..., :2]}, ArgumentError, "onnxruntime cannot run the model"),
    ],
)  # fmt: skip
def test_fold_names_what_is_wrong_with_inputs(inputs, kind, message):
    with pytest.raises(kind, match=message) as raised:
        fold(convolutions("z = Conv(x, w) " + AFTER), inputs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tol", [-1, math.nan, "1"])
def test_fold_raises_for_a_tol_that_is_none(tol):
    with pytest.raises(ArgumentError, match="tol must be a number"):
        fold(convolutions("z = Conv(x, w) " + AFTER), {"x": X}, tol=tol, strict=True)


def test_fold_raises_for_a_tol_without_strict():
    with pytest.raises(ArgumentError, match="tol must come with strict=True"):
        fold(convolutions("z = Conv(x, w) " + AFTER), {"x": X}, tol=1.0)


def test_fold_raises_for_a_tol_without_inputs():
    with pytest.raises(ArgumentError, match="tol must come with inputs"):
        fold(convolutions("z = Conv(x, w) " + AFTER), tol=1.0, strict=True)


def test_fold_says_that_onnxruntime_does_not_know_an_operator():
    proto = convolutions("z = Conv(x, w) n = BatchNormalization(z, s, b, m, v) y = o.Odd(n)",
                         domains=', "o": 1')  # fmt: skip
    with pytest.raises(BatchNormError, match="onnxruntime cannot load the model.*Without inputs"):
        fold(proto, {"x": X})


@pytest.mark.parametrize("given", [b"", "model.onnx", None])
def test_fold_takes_models_alone(given):
    with pytest.raises(ArgumentError, match="takes an onnx.ModelProto, got"):
        fold(given)


def test_fold_says_how_to_install_what_is_missing(monkeypatch):
    proto = convolutions("z = Conv(x, w) " + AFTER)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert len(fold(proto)[1].pairs) == 1
    with pytest.raises(BatchNormError, match=r"pip install onnxruntime adds it.*\[onnx\]"):
        fold(proto, {"x": X})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BatchNormError, match=r"pip install onnx adds it.*\[onnx\]"):
        fold(proto)


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", "wsm", ids=["weight", "scale", "mean"])
def test_fold_refuses_values_whose_names_an_inner_graph_defines_again(again):
    body = """z = Conv(x, w) y = BatchNormalization(z, s, b, m, v)
        q = If(k)<then_branch = t () => (T[A, B, D, E] r) { r = Relu(x) },
            else_branch = f () => (T[F, G, I, J] o) { o = Identity(x) }>"""
    proto = convolutions(body, inputs=", bool k", outputs=", T[N, C1, H1, W1] q")
    values = numpy_helper.from_array(X, again)
    proto.graph.node[2].attribute[0].g.initializer.append(values)
    folded, report = fold(proto)
    (reason,) = report.refused.values()
    assert reason == f"'{again}' is defined in a graph and again in one inside it"
    assert folded == proto


def test_fold_sees_no_link_between_names_of_two_branches():
    then, other = (
        f"""{name} () => (T[A, B, D, E] r{name}) {{
            z = Conv(x, w) r{name} = BatchNormalization(z, s, b, m, v) }}"""
        for name in "ab"
    )
    body = f"y = If(k)<then_branch = {then}, else_branch = {other}>"
    assert len(fold(convolutions(body, inputs=", bool k"))[1].folded) == 2


# ---- the whole model ----------------------------------------------------------------------------


@pytest.mark.parametrize(("changed", "count"), [(0.6, 0), (0.4, 1)])
def test_fold_takes_all_back_if_outputs_differ_by_more_than_rounding(monkeypatch, changed, count):
    outputs = verify.Runtime.outputs

    def others(self, proto, feeds, what):
        found = outputs(self, proto, feeds, what)
        factor = 1 - changed * (what == "the folded model")
        return tuple([[y * np.float32(factor) for y in call] for call in each] for each in found)

    monkeypatch.setattr(verify.Runtime, "outputs", others)
    proto = convolutions("z = Conv(x, w) y = BatchNormalization(z, s, b, m, v)")
    folded, report = fold(proto, {"x": X})
    assert len(report.folded) == count
    assert (folded == proto) == (not count)
    if not count:
        (reason,) = report.refused.values()
        assert "far more than by rounding" in reason
        assert (report.error, report.optimized_error) == (0, 0)
