"""Kinds of operations by their names, whatever the framework."""

from __future__ import annotations

__all__ = ["kind_of"]

_WORDS = {
    "batch norm": ("batchnorm", "batch_norm", "batchnormalization"),
    "dropout": ("dropout",),
    "convolution": (
        "conv1d", "conv2d", "conv3d", "conv_transpose", "convtranspose", "convolution",
    ),
    "linear": ("linear", "addmm", "matmul", "bilinear", "__matmul__", "gemm"),
    "pool": ("pool", "interpolate", "upsample", "pad", "resize"),
    "add": ("add", "add_", "__add__", "__radd__", "__iadd__", "iadd", "sub", "__sub__"),
    "concat": ("cat", "concat", "stack"),
    "identity": (
        "contiguous", "to", "float", "half", "bfloat16", "clone", "identity", "requires_grad_",
        "cast",
    ),
    "reshape": (
        "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "unflatten",
    ),
    "activation": (
        "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "leakyrelu", "prelu", "rrelu",
        "elu", "elu_", "selu", "celu", "gelu", "silu", "hardswish", "hardtanh", "hardsigmoid",
        "sigmoid", "tanh", "mish", "softplus", "softsign", "logsigmoid", "threshold", "clamp",
        "clamp_min", "clip",
    ),
}  # fmt: skip
#: Of a kind if the name contains one of its words; of the others, if it is one.
_CONTAINED = ("batch norm", "dropout", "convolution", "pool")


def kind_of(name: str) -> str:
    """The kind of an operation, as in `Operation.kind`, by the name of its function or class."""
    small = name.lower()
    if small == "conv":  # of ONNX
        return "convolution"
    for kind, words in _WORDS.items():
        if small in words or (kind in _CONTAINED and any(word in small for word in words)):
            return kind
    return "other"
