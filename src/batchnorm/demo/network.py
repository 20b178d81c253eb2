"""A sigmoid network with and without batch norm, forward and backward written by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

import batchnorm
from batchnorm.folding import fold_linear

Array = npt.NDArray[Any]

EPS = 1e-5


@dataclass
class Parameter:
    """A trainable array beside the gradient of the loss by it, both of one shape."""

    name: str
    value: Array
    grad: Array


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), through tanh because that never overflows."""
    y: Array = np.tanh(x * 0.5)
    y += 1
    y *= 0.5
    return y


def sigmoid_gradient(grad_y: Array, y: Array) -> Array:
    """Return dx = dy·y·(1 - y)."""
    grad_x: Array = grad_y * y * (1 - y)
    return grad_x


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the loss per example of a softmax classifier, and its gradient by the logits.

    The gradient, (N, K) as the logits, is softmax(logits) - one_hot(labels), divided by N.
    """
    count = len(labels)
    rows = np.arange(count)
    shifted = logits - logits.max(axis=1, keepdims=True)
    grad = np.exp(shifted)
    total = grad.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - shifted[rows, labels]).sum() / count)
    grad /= total
    grad[rows, labels] -= 1
    grad /= count
    return loss, grad


class Layer:
    """A linear map, and in a hidden layer batch norm where the network has it, and the sigmoid.

    Batch norm stands before the nonlinearity (Ioffe & Szegedy, section 3.2). The linear map then
    has no bias: subtracting the mean would cancel it, and beta takes its role.
    """

    def __init__(
        self, weight: Array, bias: Array | None, norm: batchnorm.BatchNorm | None, *, hidden: bool
    ) -> None:
        self.weight, self.bias, self.norm, self.hidden = weight, bias, norm, hidden
        self.grad_weight = np.zeros_like(weight)
        self.grad_bias = None if bias is None else np.zeros_like(bias)
        self._x = self._y = weight[:0]

    def linear(self, x: Array) -> Array:
        """Return x·Wᵀ + b of x (N, in)."""
        y: Array = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y

    def forward(self, x: Array, *, save: bool) -> Array:
        """Return y (N, out) of x (N, in); `save` keeps what `backward` needs."""
        y = self.linear(x)
        if self.norm is not None:
            y = self.norm(y)
        if self.hidden:
            y = sigmoid(y)
        if save:
            self._x, self._y = x, y
        return y

    def backward(self, grad: Array, *, need_grad_x: bool = True) -> Array | None:
        """Set the parameters' gradients from grad_y (N, out), and return grad_x (N, in)."""
        if self.hidden:
            grad = sigmoid_gradient(grad, self._y)
        if self.norm is not None:
            grad = self.norm.backward(grad)
        self.grad_weight = grad.T @ self._x
        if self.bias is not None:
            self.grad_bias = grad.sum(axis=0)
        return grad @ self.weight if need_grad_x else None

    def parameters(self, number: int) -> Iterator[Parameter]:
        """Yield every trainable array beside its gradient of the latest `backward`."""
        yield Parameter(f"weight{number}", self.weight, self.grad_weight)
        if self.bias is not None and self.grad_bias is not None:
            yield Parameter(f"bias{number}", self.bias, self.grad_bias)
        if self.norm is not None:
            for name in ("gamma", "beta"):
                value, grad = getattr(self.norm, name), getattr(self.norm, f"grad_{name}")
                yield Parameter(f"{name}{number}", value, grad)


class Network:
    """A fully connected sigmoid classifier.

    Parameters
    ----------
    sizes
        Width of the input, of each hidden layer, and of the output.
    rng
        Draws the Gaussian weights. With generators of one seed, a network with batch norm and
        one without begin at the same weights.
    weight_std
        Standard deviation of the initial weights.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        batch_norm: bool,
        rng: np.random.Generator,
        weight_std: float = 0.1,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.training = True
        self.layers: list[Layer] = []
        for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=2):
            weight = (weight_std * rng.standard_normal((fan_out, fan_in))).astype(dtype)
            hidden = number < len(sizes)
            has_norm = hidden and batch_norm
            norm = batchnorm.BatchNorm(fan_out, eps=EPS, dtype=dtype) if has_norm else None
            bias = None if has_norm else np.zeros(fan_out, dtype)
            self.layers.append(Layer(weight, bias, norm, hidden=hidden))

    @property
    def norms(self) -> list[batchnorm.BatchNorm]:
        """The batch-norm layers."""
        return [layer.norm for layer in self.layers if layer.norm is not None]

    def train(self) -> None:
        """Normalize by the statistics of each batch, and save what `backward` needs."""
        self.training = True
        for norm in self.norms:
            norm.train()

    def eval(self) -> None:
        """Normalize by the running averages, or by what took their place."""
        self.training = False
        for norm in self.norms:
            norm.eval()

    def __call__(self, x: Array) -> Array:
        """Return the logits (N, K) of x (N, D)."""
        for layer in self.layers:
            x = layer.forward(x, save=self.training)
        return x

    def backward(self, grad_logits: Array, *, need_grad_x: bool = False) -> Array | None:
        """Fill the gradient of every parameter from grad_logits (N, K).

        Returns the gradient by the input (N, D) where `need_grad_x`: training has no use for
        it, and it costs as much as the first layer's forward.
        """
        grad: Array | None = grad_logits
        for layer in reversed(self.layers):
            assert grad is not None
            grad = layer.backward(grad, need_grad_x=need_grad_x or layer is not self.layers[0])
        return grad

    def parameters(self) -> Iterator[Parameter]:
        """Yield every trainable array beside its gradient of the latest `backward`."""
        for number, layer in enumerate(self.layers, start=1):
            yield from layer.parameters(number)

    def descend(self, learning_rate: float) -> None:
        """Take one step of plain gradient descent, in place."""
        for parameter in self.parameters():
            parameter.value -= learning_rate * parameter.grad

    def pre_activations(self, x: Array) -> tuple[Array, Array]:
        """Return what enters the last hidden layer's batch norm, and what its sigmoid sees.

        Normalized as in training, by the statistics of the batch itself, and without a trace:
        no running average moves. Without batch norm the two are the same array.
        """
        before = after = x
        for layer in self.layers[:-1]:
            before = after = layer.linear(x)
            if layer.norm is not None:
                after, _ = batchnorm.batch_norm(before, layer.norm.gamma, layer.norm.beta, eps=EPS)
            if layer is not self.layers[-2]:
                x = sigmoid(after)
        return before, after

    def with_population_statistics(self, batches: Iterable[Array]) -> Network:
        """Return a copy that normalizes by the exact statistics of all `batches` together.

        Layer by layer: each is measured through layers before it that already normalize by
        their population, as they will at test time. The moments of the batches are merged, so
        the result does not depend on how the data was cut (unlike an average of variances).
        Each batch is kept only until the first layer has seen it.
        """
        measured = copy.deepcopy(self)
        measured.eval()
        current = batches
        for layer in measured.layers[:-1]:
            current = [layer.linear(x) for x in current]
            if layer.norm is not None:
                moments = (batchnorm.Moments.of(x) for x in current)
                layer.norm.set_population(batchnorm.Moments.merge(moments))
                current = [layer.norm(x) for x in current]
            current = [sigmoid(x) for x in current]
        return measured

    def folded(self) -> Network:
        """Return an equal copy without batch norm: its affine maps are in the weights."""
        result = copy.deepcopy(self)
        result.eval()
        for layer in result.layers:
            if layer.norm is not None:
                state = layer.norm.state_dict()
                layer.weight, layer.bias = fold_linear(
                    layer.weight,
                    layer.bias,
                    state["running_mean"],
                    state["running_var"],
                    state["gamma"],
                    state["beta"],
                    EPS,
                )
                layer.norm = None
        return result
