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


class Linear:
    """y = x·Wᵀ + b, with W (out, in) and b (out,) or absent."""

    def __init__(self, weight: Array, bias: Array | None) -> None:
        self.weight = weight
        self.bias = bias
        self.grad_weight = np.zeros_like(weight)
        self.grad_bias = None if bias is None else np.zeros_like(bias)
        self._x = weight[:0]

    def forward(self, x: Array, *, save: bool) -> Array:
        """Return y (N, out) of x (N, in); `save` keeps x for `backward`."""
        if save:
            self._x = x
        y: Array = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, grad_y: Array, *, need_grad_x: bool = True) -> Array | None:
        """Set the parameters' gradients from grad_y (N, out), and return grad_x (N, in)."""
        self.grad_weight = grad_y.T @ self._x
        if self.bias is not None:
            self.grad_bias = grad_y.sum(axis=0)
        return grad_y @ self.weight if need_grad_x else None


class Sigmoid:
    """y = 1 / (1 + exp(-x)); dx = dy·y·(1 - y)."""

    def __init__(self) -> None:
        self._y = np.empty(0)

    def forward(self, x: Array, *, save: bool) -> Array:
        """Return y of x, of any shape; `save` keeps y for `backward`."""
        y = sigmoid(x)
        if save:
            self._y = y
        return y

    def backward(self, grad_y: Array) -> Array:
        """Return grad_x from grad_y, of the shape of x."""
        grad_x: Array = grad_y * self._y * (1 - self._y)
        return grad_x


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), through tanh because that never overflows."""
    y: Array = np.tanh(x * 0.5)
    y += 1
    y *= 0.5
    return y


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the loss per example of a softmax classifier, and its gradient by the logits.

    Parameters
    ----------
    logits : (N, K)
    labels : (N,)
        Integers below K.

    Returns
    -------
    loss : scalar
    grad_logits : (N, K)
        softmax(logits) - one_hot(labels), divided by N.
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


@dataclass
class Block:
    """One hidden layer: linear, then batch norm where the network has it, then the sigmoid.

    Batch norm stands before the nonlinearity (Ioffe & Szegedy, section 3.2). The linear layer
    then has no bias: subtracting the mean would cancel it, and beta takes its role.
    """

    linear: Linear
    norm: batchnorm.BatchNorm | None
    sigmoid: Sigmoid


class Network:
    """A fully connected sigmoid classifier.

    Parameters
    ----------
    sizes : sequence
        Width of the input, of each hidden layer, and of the output.
    batch_norm : bool
        Whether every hidden layer normalizes its pre-activations.
    rng : numpy.random.Generator
        Draws the Gaussian weights. With generators of one seed, a network with batch norm and
        one without begin at the same weights.
    weight_std : scalar
        Standard deviation of the initial weights.
    dtype
        Of weights and activations.
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
        def gaussian(fan_out: int, fan_in: int) -> Array:
            return (weight_std * rng.standard_normal((fan_out, fan_in))).astype(dtype)

        self.training = True
        self.blocks: list[Block] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            weight = gaussian(fan_out, fan_in)
            if batch_norm:
                norm = batchnorm.BatchNorm(fan_out, eps=EPS, dtype=dtype)
                self.blocks.append(Block(Linear(weight, None), norm, Sigmoid()))
            else:
                bias = np.zeros(fan_out, dtype)
                self.blocks.append(Block(Linear(weight, bias), None, Sigmoid()))
        weight = gaussian(sizes[-1], sizes[-2])
        self.output = Linear(weight, np.zeros(sizes[-1], dtype))

    def train(self) -> None:
        """Normalize by the statistics of each batch, and save what `backward` needs."""
        self.training = True
        for block in self.blocks:
            if block.norm is not None:
                block.norm.train()

    def eval(self) -> None:
        """Normalize by the running averages, or by what took their place."""
        self.training = False
        for block in self.blocks:
            if block.norm is not None:
                block.norm.eval()

    def __call__(self, x: Array) -> Array:
        """Return the logits (N, K) of x (N, D)."""
        for block in self.blocks:
            x = block.linear.forward(x, save=self.training)
            if block.norm is not None:
                x = block.norm(x)
            x = block.sigmoid.forward(x, save=self.training)
        return self.output.forward(x, save=self.training)

    def backward(self, grad_logits: Array, *, need_grad_x: bool = False) -> Array | None:
        """Fill the gradient of every parameter from grad_logits (N, K).

        Returns the gradient by the input (N, D) where `need_grad_x`: training has no use for
        it, and it costs as much as the first layer's forward.
        """
        grad = self.output.backward(grad_logits)
        for index in reversed(range(len(self.blocks))):
            block = self.blocks[index]
            assert grad is not None
            grad = block.sigmoid.backward(grad)
            if block.norm is not None:
                grad = block.norm.backward(grad)
            grad = block.linear.backward(grad, need_grad_x=need_grad_x or index > 0)
        return grad

    def parameters(self) -> Iterator[Parameter]:
        """Yield every trainable array beside its gradient of the latest `backward`."""
        for number, block in enumerate(self.blocks, start=1):
            yield from _linear_parameters(block.linear, number)
            if block.norm is not None:
                for name in ("gamma", "beta"):
                    value, grad = getattr(block.norm, name), getattr(block.norm, f"grad_{name}")
                    yield Parameter(f"{name}{number}", value, grad)
        yield from _linear_parameters(self.output, len(self.blocks) + 1)

    def descend(self, learning_rate: float) -> None:
        """Take one step of plain gradient descent, in place."""
        for parameter in self.parameters():
            parameter.value -= learning_rate * parameter.grad

    def pre_activations(self, x: Array) -> tuple[Array, Array]:
        """Return what enters the last hidden layer's batch norm, and what leaves it.

        Normalized as in training, by the statistics of the batch itself, and without a trace:
        no running average moves. Without batch norm the two are the same array.

        Parameters
        ----------
        x : (N, D)

        Returns
        -------
        before, after : (N, units)
            `after` is what the sigmoid sees.
        """
        before = after = x
        for index, block in enumerate(self.blocks):
            inputs = x if index == 0 else sigmoid(after)
            before = after = block.linear.forward(inputs, save=False)
            if block.norm is not None:
                after, _ = batchnorm.batch_norm(before, block.norm.gamma, block.norm.beta, eps=EPS)
        return before, after

    def with_population_statistics(self, batches: Iterable[Array]) -> Network:
        """Return a copy that normalizes by the exact statistics of all `batches` together.

        Layer by layer: each is measured through layers before it that already normalize by
        their population, as they will at test time. The moments of the batches are merged, so
        the result does not depend on how the data was cut (unlike an average of variances).

        Parameters
        ----------
        batches : iterable of (N_i, D)
            Read once; each is kept only until the first layer has seen it.
        """
        measured = copy.deepcopy(self)
        measured.eval()
        current = batches
        for block in measured.blocks:
            current = [block.linear.forward(x, save=False) for x in current]
            norm = block.norm
            if norm is not None:
                norm.set_population(
                    batchnorm.Moments.merge(batchnorm.Moments.of(x) for x in current)
                )
                current = [norm(x) for x in current]
            current = [sigmoid(x) for x in current]
        return measured

    def folded(self) -> Network:
        """Return an equal copy without batch norm: its affine maps are in the weights."""
        result = copy.deepcopy(self)
        result.eval()
        for block in result.blocks:
            if block.norm is not None:
                state = block.norm.state_dict()
                weight, bias = fold_linear(
                    block.linear.weight,
                    block.linear.bias,
                    state["running_mean"],
                    state["running_var"],
                    state["gamma"],
                    state["beta"],
                    EPS,
                )
                block.linear, block.norm = Linear(weight, bias), None
        return result


def _linear_parameters(linear: Linear, number: int) -> Iterator[Parameter]:
    yield Parameter(f"weight{number}", linear.weight, linear.grad_weight)
    if linear.bias is not None and linear.grad_bias is not None:
        yield Parameter(f"bias{number}", linear.bias, linear.grad_bias)
