"""Who is measured: each provider turns a case's inputs into one call to be timed.

Whatever a call needs beyond what its user would pay for on every step (conversion of the inputs,
compilation, the forward pass of a backward) is done while preparing it. A framework is imported
only in the functions of its own provider.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.bench.cases import Arrays, Float32, Inputs, Op, aligned_empty, named, pick


class UnavailableError(Exception):
    """A provider cannot run here at all; the message says why and what would help."""


@dataclass(frozen=True)
class Call:
    """A prepared call: `run` does the work once.

    `answer` turns what `run` returned into NumPy arrays that lie as the case's do. Never timed.
    """

    run: Callable[[], Any]
    answer: Callable[[Any], Arrays]


@dataclass(frozen=True)
class Provider:
    """One way to compute batch normalization.

    Attributes
    ----------
    prepare
        Makes of a case's inputs the call that computes it.
    module, install
        What has to be importable, and the command that makes it so.
    set_threads
        Tells the framework how many threads to use, where it needs to be told.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    module: str = "numpy"
    install: str = ""
    set_threads: Callable[[int], None] | None = None

    def missing(self) -> str | None:
        """Why this provider cannot be used, in one line, or None if it can."""
        if importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.name} is skipped: {self.module} is not installed; {self.install} adds it"


def _call(op: Op, run: Callable[[], Any], as_array: Callable[[Any], Any] = lambda a: a) -> Call:
    """A call that returns y, or the three gradients; `as_array` makes a NumPy array of each."""

    def answer(result: Any) -> Arrays:
        return named(op, [as_array(a) for a in result] if op == "backward" else as_array(result))

    return Call(run, answer)


# --- batchnorm ------------------------------------------------------------------------------------


def _batchnorm(inputs: Inputs, out: Float32 | None) -> Call:
    import batchnorm

    op, x, gamma, beta = inputs.case.op, inputs.x, inputs.gamma, inputs.beta
    axis, eps = inputs.case.channel_axis, inputs.eps

    def forward() -> Any:
        return batchnorm.batch_norm(x, gamma, beta, eps=eps, channel_axis=axis, out=out)

    if op == "forward":
        return _call(op, forward, lambda result: result[0])
    if op == "inference":
        mean, var = inputs.mean, inputs.var
        return _call(
            op,
            lambda: batchnorm.batch_norm_inference(
                x, mean, var, gamma, beta, eps=eps, channel_axis=axis, out=out
            ),
        )
    _, saved = batchnorm.batch_norm(x, gamma, beta, eps=eps, channel_axis=axis)
    grad_y = inputs.grad_y
    return _call(op, lambda: batchnorm.batch_norm_backward(grad_y, saved, out=out))


def _batchnorm_fresh(inputs: Inputs) -> Call:
    return _batchnorm(inputs, None)


def _batchnorm_out(inputs: Inputs) -> Call:
    return _batchnorm(inputs, aligned_empty(inputs.x.shape))


# --- NumPy, as courses and textbooks write it -----------------------------------------------------


def _axes(inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a channel's values, and the shape in which vectors over channels broadcast."""
    channel, ndim = inputs.case.channel_axis % inputs.x.ndim, inputs.x.ndim
    axes = tuple(axis for axis in range(ndim) if axis != channel)
    return axes, tuple(-1 if axis == channel else 1 for axis in range(ndim))


def _numpy(inputs: Inputs) -> Call:
    op, x, grad_y, eps = inputs.case.op, inputs.x, inputs.grad_y, np.float32(inputs.eps)
    axes, along = _axes(inputs)
    gamma, beta = inputs.gamma.reshape(along), inputs.beta.reshape(along)

    def forward() -> tuple[Any, Any, Any]:
        mean = x.mean(axis=axes, keepdims=True)
        std = np.sqrt(x.var(axis=axes, keepdims=True) + eps)
        x_hat = (x - mean) / std
        return gamma * x_hat + beta, x_hat, std

    if op == "forward":
        return _call(op, forward, lambda result: result[0])
    if op == "inference":
        mean, var = inputs.mean.reshape(along), inputs.var.reshape(along)
        return _call(op, lambda: gamma * (x - mean) / np.sqrt(var + eps) + beta)
    _, x_hat, std = forward()
    count = np.float32(x.size // gamma.size)

    def backward() -> tuple[Any, Any, Any]:
        grad_beta = grad_y.sum(axis=axes, keepdims=True)
        grad_gamma = (grad_y * x_hat).sum(axis=axes, keepdims=True)
        grad_x = gamma / std * (grad_y - grad_beta / count - x_hat * grad_gamma / count)
        return grad_x, grad_gamma.reshape(-1), grad_beta.reshape(-1)

    return _call(op, backward)


# --- PyTorch --------------------------------------------------------------------------------------


def _torch_threads(threads: int) -> None:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)


def _torch_inputs(inputs: Inputs) -> dict[str, Any]:
    """The case's arrays as tensors on the same memory.

    A channels-last array becomes an (N, C, *S) tensor with the strides of PyTorch's
    ``channels_last``, which is what PyTorch's kernels dispatch on.
    """
    torch: Any = importlib.import_module("torch")

    def tensor(array: Float32) -> Any:
        return torch.from_numpy(array)

    def feature_map(array: Float32) -> Any:
        return tensor(array).movedim(inputs.case.channel_axis, 1)

    return {
        "x": feature_map(inputs.x),
        "grad_y": feature_map(inputs.grad_y),
        "weight": tensor(inputs.gamma),
        "bias": tensor(inputs.beta),
        "mean": tensor(inputs.mean),
        "var": tensor(inputs.var),
    }


def _torch_call(inputs: Inputs, run: Callable[[], Any]) -> Call:
    axis = inputs.case.channel_axis

    def as_array(tensor: Any) -> Any:
        tensor = tensor.detach()
        return (tensor.movedim(1, axis) if tensor.ndim > 1 else tensor).numpy()

    return _call(inputs.case.op, run, as_array)


def _torch(inputs: Inputs) -> Call:
    torch: Any = importlib.import_module("torch")
    functional, aten = torch.nn.functional, torch.ops.aten
    t, eps = _torch_inputs(inputs), inputs.eps
    x, weight, bias = t["x"], t["weight"], t["bias"]
    if inputs.case.op == "forward":
        return _torch_call(
            inputs, lambda: functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        )
    if inputs.case.op == "inference":
        mean, var = t["mean"], t["var"]
        return _torch_call(
            inputs, lambda: functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        )
    # The operator that autograd calls, without autograd's own cost: nothing but the arithmetic,
    # and so the most favourable way to time PyTorch.
    _, mean, inv_std = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    grad_y, wanted = t["grad_y"], [True, True, True]
    return _torch_call(
        inputs,
        lambda: aten.native_batch_norm_backward(
            grad_y, x, weight, None, None, mean, inv_std, True, eps, wanted
        ),
    )


def _torch_compile(inputs: Inputs) -> Call:
    torch: Any = importlib.import_module("torch")
    functorch_config: Any = importlib.import_module("torch._functorch.config")
    functional = torch.nn.functional
    t, eps, op = _torch_inputs(inputs), inputs.eps, inputs.case.op

    def batch_norm(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        return functional.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, eps)

    # Dynamo keeps compiled code by code object and gives up after a few shapes: start afresh.
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm, dynamic=False)
    x, weight, bias = t["x"], t["weight"], t["bias"]
    mean, var = (t["mean"], t["var"]) if op == "inference" else (None, None)
    try:
        if op != "backward":
            compiled(x, mean, var, weight, bias)
            return _torch_call(inputs, lambda: compiled(x, mean, var, weight, bias))
        leaves = tuple(tensor.detach().requires_grad_() for tensor in (x, weight, bias))
        # Without this the compiled backward writes into what the forward saved for it, and can
        # run only once.
        with functorch_config.patch(donated_buffer=False):
            y = compiled(leaves[0], None, None, *leaves[1:])
            torch.autograd.grad(y, leaves, t["grad_y"], retain_graph=True)
    except Exception as error:
        # The backend's failures (no C++ compiler, an unsupported platform) have no common class.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(
            f"torch.compile is skipped: it cannot generate code here ({reason}); "
            f"it needs a C++ compiler such as g++ on the PATH"
        ) from error
    return _torch_call(
        inputs, lambda: torch.autograd.grad(y, leaves, t["grad_y"], retain_graph=True)
    )


# --- JAX ------------------------------------------------------------------------------------------


def _jax(inputs: Inputs) -> Call:
    jax: Any = importlib.import_module("jax")
    jnp: Any = importlib.import_module("jax.numpy")
    op, eps = inputs.case.op, inputs.eps
    axes, along = _axes(inputs)
    cpu = jax.devices("cpu")[0]
    x, grad_y, gamma, beta, mean, var = (
        jax.device_put(array, cpu)
        for array in (
            inputs.x, inputs.grad_y, inputs.gamma, inputs.beta, inputs.mean, inputs.var
        )
    )  # fmt: skip

    def affine(x: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> Any:
        scale = gamma.reshape(along) * jax.lax.rsqrt(var.reshape(along) + eps)
        return (x - mean.reshape(along)) * scale + beta.reshape(along)

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        return affine(x, jnp.mean(x, axes), jnp.var(x, axes), gamma, beta)

    if op == "forward":
        compiled = jax.jit(forward)
        return _call(op, lambda: compiled(x, gamma, beta).block_until_ready(), np.asarray)
    if op == "inference":
        compiled = jax.jit(affine)
        return _call(
            op, lambda: compiled(x, mean, var, gamma, beta).block_until_ready(), np.asarray
        )
    # The pullback carries what the forward saved, so that only the backward is in the timed call.
    _, pullback = jax.jit(lambda *primals: jax.vjp(forward, *primals))(x, gamma, beta)
    pull = jax.jit(lambda pullback, grad_y: pullback(grad_y))
    return _call(op, lambda: jax.block_until_ready(pull(pullback, grad_y)), np.asarray)


PROVIDERS: tuple[Provider, ...] = (
    Provider("batchnorm", _batchnorm_fresh),
    Provider("batchnorm-out", _batchnorm_out),
    Provider("numpy", _numpy),
    Provider("torch", _torch, "torch", "pip install torch", _torch_threads),
    Provider("torch.compile", _torch_compile, "torch", "pip install torch", _torch_threads),
    Provider("jax", _jax, "jax", "pip install jax"),
)


# --- the plain copy that everything is measured against -------------------------------------------


def _copy(prepare: Callable[[Float32, Float32], Callable[[], Any]]) -> Callable[[Inputs], Call]:
    """Make of "destination and source to call" what a provider's `prepare` has to be."""

    def prepared(inputs: Inputs) -> Call:
        destination = aligned_empty(inputs.x.shape)
        return Call(prepare(destination, inputs.x), lambda _: {"x": destination})

    return prepared


def _copy_torch(destination: Float32, source: Float32) -> Callable[[], Any]:
    torch: Any = importlib.import_module("torch")
    target, tensor = torch.from_numpy(destination), torch.from_numpy(source)
    return lambda: target.copy_(tensor)


def _copy_batchnorm(destination: Float32, source: Float32) -> Callable[[], Any]:
    core: Any = importlib.import_module("batchnorm._core")
    return lambda: core.copy(destination, source)


def copies() -> tuple[Provider, ...]:
    """Every way to copy an array that is at hand; the fastest of them is the yardstick.

    One thread does not fill the memory's bandwidth, so NumPy's copy alone would flatter everyone.
    """
    candidates = [
        Provider("batchnorm._core.copy", _copy(_copy_batchnorm)),
        Provider("numpy.copyto", _copy(lambda to, source: lambda: np.copyto(to, source))),
        Provider("torch copy_", _copy(_copy_torch), "torch", set_threads=_torch_threads),
    ]
    return tuple(candidate for candidate in candidates if candidate.missing() is None)


def choose(names: Iterable[str] | None) -> tuple[Provider, ...]:
    """Providers by name, in the order of `PROVIDERS`; all of them for None."""
    wanted = pick("providers", names, [provider.name for provider in PROVIDERS])
    return tuple(provider for provider in PROVIDERS if provider.name in wanted)
