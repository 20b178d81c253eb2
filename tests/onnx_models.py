"""Small ONNX models with batch norms, for several tests."""

import re

import numpy as np
import onnx
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv_transpose

ONNX_TYPES = {"float32": "float", "float64": "double", "float16": "float16"}


def model(text, opset=17, ir=8, functions="", domains="", dtype=np.float32, **tensors):
    """A model from ONNX's text, `T` standing for its type, and those tensors that it names."""
    kind = ONNX_TYPES.get(np.dtype(dtype).name, np.dtype(dtype).name)
    head = f'<ir_version: {ir}, opset_import: ["": {opset}{domains}]>'
    parsed = parser.parse_model(f"{head} net {text.replace('T[', kind + '[')} {functions}")
    for name in tensors.keys() & set(re.findall(r"\w+", text)):
        values = tensors[name]
        parsed.graph.initializer.append(numpy_helper.from_array(values, name))
        if ir < 4:
            number = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            info = onnx.helper.make_tensor_value_info(name, number, values.shape)
            parsed.graph.input.append(info)
    return parsed


def convolutions(body, dtype=np.float32, inputs="", outputs="", more=None, **options):
    """A model on images of 4 channels.

    It may name weights w and u of 4 → 4 channels, 3 and 1 wide, a bias c, a vector `zero`, and two
    batch norms (s, b, m, v) and (ts, tb, tm, tv).
    """
    tensors = {
        "w": array(4, 4, 3, 3, dtype=dtype),
        "u": array(4, 4, 1, 1, seed=5, dtype=dtype),
        "c": array(4, seed=6, dtype=dtype),
        "zero": np.zeros(4, dtype),
        **norm(4, dtype=dtype),
        **norm(4, 8, dtype=dtype, prefix="t"),
        **(more or {}),
    }
    text = f"(T[N, 4, H, W] x{inputs}) => (T[N, C, P, Q] y{outputs}) {{ {body} }}"
    return model(text, dtype=dtype, **options, **tensors)


def norm(channels, seed=0, dtype=np.float32, prefix=""):
    """Scale, shift, mean and variance of a batch norm, as tensors s, b, m and v."""
    rng = np.random.default_rng(seed)
    values = {
        "s": rng.normal(size=channels),
        "b": rng.normal(size=channels),
        "m": rng.normal(size=channels),
        "v": rng.uniform(0.2, 3, size=channels),
    }
    return {prefix + name: each.astype(dtype) for name, each in values.items()}


def array(*shape, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


class ConvTranspose(op_conv_transpose.ConvTranspose):
    """That of onnx gives each group the bias of the first (onnx 1.23)."""

    op_domain = ""

    def _run(self, x, w, b=None, group=None, **attributes):
        groups = group or 1
        parts = zip(
            np.split(x, groups, 1),
            np.split(w, groups),
            [None] * groups if b is None else np.split(b, groups),
            strict=True,
        )
        run = super()._run
        each = [run(*part, group=1, **attributes)[0] for part in parts]
        return (np.concatenate(each, axis=1),)


class BatchNormalization(OpRun):
    """At test time; that of onnx takes batch norms of opset 9 to 13 for ones in training."""

    op_domain = ""

    def _run(self, x, *parameters, epsilon=None, **_):
        s, b, m, v = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in parameters)
        return (((x - m) / np.sqrt(v + epsilon) * s + b).astype(x.dtype),)


def reference(proto, feed):
    """What onnx's own evaluator returns."""
    return ReferenceEvaluator(proto, new_ops=[ConvTranspose, BatchNormalization]).run(None, feed)


def operators(graph):
    return [node.op_type for node in graph.node]


def weights(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
