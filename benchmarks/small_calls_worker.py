"""The processes that `small_calls.py` measures: every call of one copy of batchnorm, and torch's.

Only public names of batchnorm are used here, so that older copies of it can be measured.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import batchnorm
import batchnorm.torch

TORCH, OURS = "torch", "batchnorm"
#: A layer of an autograd Function that computes nothing: what PyTorch itself asks of such a layer.
FLOOR = "empty Function"
LAYER_OPS = ("forward", "forward and backward", "evaluation", "evaluation, no_grad")
ARRAY_OPS = ("batch_norm", "batch_norm_backward", "batch_norm_inference")
OPS = LAYER_OPS + ARRAY_OPS
EPS = 1e-5

Run = Callable[[], Any]


class Calls:
    """The calls of one operation on arrays of one shape, by torch and by batchnorm."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.runs: dict[str, Run] = {}
        self.grad = True

    def where(self) -> str:
        """The file that batchnorm was imported from."""
        return str(batchnorm.__file__)

    def prepare(self, op: str, shape: tuple[int, int]) -> dict[str, float]:
        """Set up an operation, compare the answers, and return seconds by provider, roughly."""
        rng = np.random.default_rng(0)
        x, grad_y = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        gamma, var = (rng.uniform(0.5, 1.5, shape[1]).astype(np.float32) for _ in range(2))
        beta, mean = (rng.uniform(-1, 1, shape[1]).astype(np.float32) for _ in range(2))
        prepare = layer_calls if op in LAYER_OPS else array_calls
        self.runs = prepare(op, x, grad_y, gamma, beta, mean, var)
        self.grad = op in LAYER_OPS[:3]
        with torch.set_grad_enabled(self.grad):
            wanted, found = (arrays_of(self.runs[provider]()) for provider in (TORCH, OURS))
        for one, other in zip(wanted, found, strict=True):
            # To catch mistakes, not rounding.
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3)
        return {name: min(self.block(name, 10)[0] for _ in range(5)) for name in self.runs}

    def block(self, provider: str, calls: int) -> tuple[float, float]:
        """Seconds of a call, as the mean over a block of calls, after a few untimed ones."""
        run = self.runs[provider]
        gc.disable()
        try:
            with torch.set_grad_enabled(self.grad):
                for _ in range(calls // 4 + 1):
                    run()
                start = time.perf_counter_ns()
                for _ in range(calls):
                    run()
                elapsed = time.perf_counter_ns() - start
        finally:
            gc.enable()
        return elapsed * 1e-9 / calls, float("nan")


class EmptyFunction(torch.autograd.Function):
    """Takes, saves and makes the tensors that a batch norm does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class EmptyLayer(torch.nn.BatchNorm1d):
    """`EmptyFunction` as a layer; without gradients, an empty result alone."""

    def forward(self, x: Any) -> Any:
        if not torch.is_grad_enabled():
            return torch.empty_like(x)
        return EmptyFunction.apply(x, self.weight, self.bias)


def arrays_of(result: Any) -> list[Any]:
    """The arrays of a result, without what is saved for the backward pass."""
    values = result if isinstance(result, (tuple, list)) else [result]
    tensors = (value.detach().numpy() if torch.is_tensor(value) else value for value in values)
    return [value for value in tensors if isinstance(value, np.ndarray)]


def layer_calls(op: str, x: Any, grad_y: Any, *parameters: Any) -> dict[str, Run]:
    """The layers `BatchNorm1d` of both; all arrays of a hidden layer need gradients."""
    runs: dict[str, Run] = {}
    grad = torch.from_numpy(grad_y)
    for name, kind in (
        (TORCH, torch.nn.BatchNorm1d),
        (OURS, batchnorm.torch.BatchNorm1d),
        (FLOOR, EmptyLayer),
    ):
        layer = kind(x.shape[1], eps=EPS)
        state = map(torch.from_numpy, parameters)
        layer.load_state_dict(
            dict(zip(("weight", "bias", "running_mean", "running_var"), state, strict=True))
            | {"num_batches_tracked": torch.tensor(0)}
        )
        leaf = torch.from_numpy(x).requires_grad_()
        layer.train(op in LAYER_OPS[:2])

        def step(layer: Any = layer, leaf: Any = leaf) -> Any:
            leaf.grad = layer.weight.grad = layer.bias.grad = None
            layer(leaf).backward(grad)
            return leaf.grad, layer.weight.grad, layer.bias.grad

        runs[name] = step if op == "forward and backward" else partial(layer, leaf)
    return runs


def array_calls(
    op: str, x: Any, grad_y: Any, gamma: Any, beta: Any, mean: Any, var: Any
) -> dict[str, Run]:
    """The functions on NumPy arrays, and torch's on the same memory, without autograd."""
    t_x, t_grad, *t = map(torch.from_numpy, (x, grad_y, gamma, beta, mean, var))
    weight, bias, t_mean, t_var = t
    normalize = torch.nn.functional.batch_norm
    if op == "batch_norm":
        return {
            TORCH: lambda: normalize(t_x, None, None, weight, bias, True, 0.0, EPS),
            OURS: lambda: batchnorm.batch_norm(x, gamma, beta, eps=EPS),
        }
    if op == "batch_norm_inference":
        return {
            TORCH: lambda: normalize(t_x, t_mean, t_var, weight, bias, False, 0.0, EPS),
            OURS: lambda: batchnorm.batch_norm_inference(x, mean, var, gamma, beta, eps=EPS),
        }
    aten, wanted = torch.ops.aten, [True, True, True]
    _, b_mean, inv_std = aten.native_batch_norm(t_x, weight, bias, None, None, True, 0.0, EPS)
    backward = aten.native_batch_norm_backward
    _, saved = batchnorm.batch_norm(x, gamma, beta, eps=EPS)
    return {
        TORCH: lambda: backward(
            t_grad, t_x, weight, None, None, b_mean, inv_std, True, EPS, wanted
        ),
        OURS: lambda: batchnorm.batch_norm_backward(grad_y, saved),
    }
