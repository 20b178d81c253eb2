"""Linear layers and batch norms: what they are, what they compute, and how they change."""

from __future__ import annotations

import inspect
import itertools
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from ...errors import ArgumentError
from ...folding import Affine, Linear, round_to_odd
from ..adapters import is_built_in
from ..diagnose.wiring import is_batch_norm
from ..population.batches import is_dense
from ..undo import set_class

__all__ = [
    "absorb",
    "activation_of",
    "affine_of",
    "geometry_of",
    "has_hooks",
    "is_linear",
    "is_norm",
    "is_transparent",
    "linear_of",
    "materialize",
    "reason_of_linear",
    "reason_of_norm",
    "release",
    "weight_of",
    "zero_padded",
]

_EXACT = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

# What a subclass may define that does not change what it computes.
_HARMLESS = {
    "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate_func__",
    "__firstlineno__", "__static_attributes__", "__repr__", "extra_repr", "reset_parameters",
}  # fmt: skip

# Subclasses that pad their input and are otherwise as their base class.
_PADDING = {"timm.layers.conv2d_same.Conv2dSame"}

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# What our layers, and timm's, do after normalizing.
_ACTIVATIONS = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU,
}  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer or a convolution, or a subclass of them."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def is_norm(module: nn.Module) -> bool:
    """Whether this is a batch norm, also an unknown one."""
    return is_batch_norm(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after this module."""
    return any(getattr(module, kind) for kind in _HOOKS)


def is_transparent(module: nn.Module) -> bool:
    """Whether this returns its input as it is: an Identity, or dropout in evaluation."""
    if has_hooks(module) or "forward" in module.__dict__:
        return False
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    return type(module) is nn.Identity or (
        dropout and type(module).__module__ == nn.Dropout.__module__
    )


def _kind(module: nn.Module) -> type:
    """The class, without parametrizations."""
    if parametrize.is_parametrized(module):
        kind: type = parametrize.type_before_parametrizations(module)
        return kind
    return type(module)


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# ---- why a layer cannot be folded ---------------------------------------------------------------


def reason_of_linear(module: Any) -> str:
    """Why nothing may be folded into this layer; "" if something may."""
    kind = _kind(module)
    if not _computes_as_its_base(kind) and _named(kind) not in _PADDING:
        return _unknown(kind)
    reason = _reason_of_module(module, (WeightNorm, SpectralNorm))
    if reason:
        return reason
    for name in ("weight", "bias"):
        t = getattr(module, name)
        if t is not None and not (is_dense(t) and t.is_floating_point()):
            return f"its {name} is no dense tensor of real numbers ({_describe(t)})"
    return ""


def reason_of_norm(module: Any) -> str:
    """Why this batch norm cannot be folded; "" if it can."""
    kind = _kind(module)
    if not is_built_in(kind):
        return _unknown(kind)
    reason = _reason_of_module(module, ())
    if reason:
        return reason
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        return "it has no running statistics, and normalizes by those of the batch"
    constant = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    if module.training and not constant and not getattr(module, "stats_frozen", False):
        return "it is in training mode, and normalizes by the statistics of the batch"
    for name in ("running_mean", "running_var", "weight", "bias"):
        t = getattr(module, name)
        if t is not None and not (is_dense(t) and t.is_floating_point()):
            return f"its {name} is no dense tensor of real numbers ({_describe(t)})"
    try:
        affine_of(module)
    except ArgumentError as error:
        return str(error)
    return ""


def _computes_as_its_base(kind: type) -> bool:
    """Whether a class is one of torch's, or a subclass that only creates it in another way."""
    for base in kind.__mro__:
        if base in _EXACT:
            return True
        if vars(base).keys() & (_names_of(kind.__mro__) - _HARMLESS):
            return False
    return False


@cache
def _names_of(bases: tuple[type, ...]) -> frozenset[str]:
    """Names that torch's classes among `bases` define, or say that their instances have."""
    own = [base for base in bases if base.__module__.startswith((nn.__name__, "builtins"))]
    hints = (inspect.get_annotations(base) for base in own)
    return frozenset(itertools.chain(("weight", "bias"), *map(vars, own), *hints))


def _unknown(kind: type) -> str:
    base = kind.__bases__[0]
    what = f"a subclass of {base.__name__}" if base is not nn.Module else "an unknown class"
    return f"{kind.__name__} is {what}, which may compute something else"


def _describe(t: Tensor) -> str:
    return f"{type(t).__name__} of {short(t.dtype)}"


def short(dtype: torch.dtype) -> str:
    """The name of a type without "torch."."""
    return str(dtype).removeprefix("torch.")


def _reason_of_module(module: nn.Module, known: tuple[type, ...]) -> str:
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    for kind in _HOOKS:
        for hook in getattr(module, kind).values():
            if not isinstance(hook, known):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                return f"it has a hook ({name}), which may see or change what it computes"
    return ""


# ---- what layers compute ------------------------------------------------------------------------


def _float64(t: Tensor) -> Any:
    return t.detach().to("cpu", torch.float64).numpy()


def weight_of(module: Any) -> Tensor:
    """The weight that the next forward uses, which hooks may set then."""
    weight: Tensor = module.weight
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            weight = hook.compute_weight(module)
        elif isinstance(hook, SpectralNorm):
            weight = hook.compute_weight(module, do_power_iteration=False)
    return weight


def linear_of(module: Any) -> Linear:
    """What a linear layer computes."""
    return Linear(
        _float64(weight_of(module)),
        None if module.bias is None else _float64(module.bias),
        getattr(module, "groups", 1),
        bool(getattr(module, "transposed", False)),
    )


def affine_of(module: Any) -> Affine:
    """What a batch norm computes in evaluation, without its activation."""
    return Affine.of(
        _float64(module.running_mean),
        _float64(module.running_var),
        None if module.weight is None else _float64(module.weight),
        None if module.bias is None else _float64(module.bias),
        eps=module.eps,
    )


def zero_padded(module: Any) -> bool:
    """Whether a layer pads its input with zeros."""
    if _named(_kind(module)) in _PADDING:
        return True
    padding = getattr(module, "padding", 0)
    some = padding == "same" if isinstance(padding, str) else any(np.atleast_1d(padding))
    return bool(some) and getattr(module, "padding_mode", "zeros") == "zeros"


def activation_of(module: Any) -> nn.Module | None:
    """What follows in the same layer, as a module; None if nothing does."""
    if "act" in module._modules:  # timm's
        after = nn.Sequential()
        for name in ("drop", "act"):
            part = module._modules.get(name)
            if part is not None and type(part) is not nn.Identity:
                after.add_module(name, part)
        return after if len(after) else None
    activation = getattr(module, "activation", None)
    if activation == "leaky_relu":
        return nn.LeakyReLU(module.negative_slope)
    return None if activation is None else _ACTIVATIONS[activation]()


# ---- how layers change --------------------------------------------------------------------------


def materialize(module: Any) -> None:
    """Let the weights be parameters that were computed from others in each forward."""
    if parametrize.is_parametrized(module):
        # Not by `remove_parametrizations`, which changes the class that copies have in common.
        parts = module.parametrizations
        found = {
            name: nn.Parameter(
                getattr(module, name).detach().clone(),
                requires_grad=any(p.requires_grad for p in parts[name].parameters()),
            )
            for name in parts
        }
        set_class(module, _kind(module))
        del module.parametrizations
        for name, parameter in found.items():
            module.register_parameter(name, parameter)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    module._parameters["bias"] = module._parameters.pop("bias")  # in the usual order


def narrowed(values: Any, dtype: torch.dtype, name: str) -> Tensor:
    """float64 in another type, rounded once.

    Raises
    ------
    ArgumentError
        Something overflows it, or is not finite already.
    """
    if not np.isfinite(values).all():
        raise ArgumentError(f"its {name} is not finite")
    if dtype.itemsize < 4:  # torch rounds to float32 first, to the nearest
        t = torch.from_numpy(round_to_odd(values)).to(dtype)
    else:
        t = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    if not bool(t.isfinite().all()):
        raise ArgumentError(
            f"its {name} would be up to {abs(values).max():.3g}, which {short(dtype)} does not hold"
        )
    return t


def absorb(module: Any, folded: Linear, dtype: torch.dtype) -> None:
    """Give a layer the weights of `folded`, in the memory format that it has.

    Raises
    ------
    ArgumentError
        They do not fit into `dtype`; the layer is as it was.
    """
    assert folded.bias is not None
    weight = narrowed(folded.weight, dtype, "weight")
    bias = narrowed(folded.bias, dtype, "bias").to(module.weight.device)
    materialize(module)
    module.weight.data.copy_(weight)
    if module.bias is None:
        module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)
    else:
        module.bias.data.copy_(bias)


def release(module: nn.Module) -> None:
    """Let a batch norm be the activation that it contains, or an `Identity`.

    It remains the same object, so all that refer to it see the change.
    """
    after, training = activation_of(module) or nn.Identity(), module.training
    set_class(module, type(after))
    module.__dict__.clear()
    module.__dict__.update(after.__dict__)
    module.training = training


# ---- geometry -----------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """Where a layer takes its input from; a linear layer is a convolution of no axes."""

    kind: type
    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[float, ...]
    mode: str

    def is_centred(self) -> bool:
        """Whether the middle of the kernel lies on the value at the place of the output."""
        middle = tuple(d * (k - 1) / 2 for k, d in zip(self.kernel, self.dilation, strict=True))
        odd = all(k % 2 for k in self.kernel)
        return self._is_plain() and odd and set(self.stride) <= {1} and self.padding == middle

    def lies_within(self, other: Geometry) -> bool:
        """Whether this is the other layer with a kernel that is smaller, or as large."""
        same = (self.kind, self.inputs, self.outputs, self.groups, self.stride)
        if same != (other.kind, other.inputs, other.outputs, other.groups, other.stride):
            return False
        if not self._is_plain() or (any(self.padding) and self.mode != other.mode):
            return False
        axes = zip(
            self.kernel, other.kernel, self.dilation, other.dilation, self.padding, other.padding,
            strict=True,
        )  # fmt: skip
        return all(
            large >= small
            and (large - small) % 2 == 0
            and (small == 1 or gap == wide)
            and pads - pad == wide * (large - small) / 2
            for small, large, gap, wide, pad, pads in axes
        )

    def _is_plain(self) -> bool:
        return self.kind in _EXACT[:4]  # not transposed, and no padding of its own


def geometry_of(module: Any) -> Geometry:
    """The geometry of a linear layer or convolution."""
    kind = _kind(module)
    if not isinstance(module, nn.modules.conv._ConvNd):
        none: tuple[int, ...] = ()
        return Geometry(
            kind, module.in_features, module.out_features, 1, none, none, none, none, "zeros"
        )
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    half = [d * (k - 1) / 2 for k, d in zip(kernel, dilation, strict=True)]
    given = {"same": half, "valid": [0.0] * len(half)}
    padding = given[module.padding] if isinstance(module.padding, str) else module.padding
    return Geometry(
        kind, module.in_channels, module.out_channels, module.groups, kernel,
        tuple(module.stride), dilation, tuple(map(float, padding)), module.padding_mode,
    )  # fmt: skip
