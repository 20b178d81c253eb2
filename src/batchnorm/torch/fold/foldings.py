"""A group of layers that was folded: what was there, what came of it, and how near that is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ...folding import Affine, FoldedLayer, Linear
from ...folding.sums import Part, Sum
from ...native import Array
from ..adapters import FrozenLayer
from .groups import Branch, Group
from .layers import affine_of, linear_of, short, weight_of, zero_padded

__all__ = ["Folding", "wide"]


@dataclass(eq=False, kw_only=True)
class Folding(Sum):
    """A group that is folded into a layer of the folded model.

    Attributes
    ----------
    group : Group
    layer : Module
        Of the folded model.
    given : dtype
        Type of the layer's weights before.
    steps : str
        Type in which batch norms compute, as `_type_of_steps` tells it.
    """

    group: Group
    layer: Any
    given: torch.dtype
    steps: str

    @classmethod
    def of(cls, group: Group, model: nn.Module) -> Folding:
        """What is to be folded, from the modules of a model that is to take it."""
        layer: Any = model.get_submodule(group.layer)
        report = FoldedLayer(
            group.layer,
            group.before,
            [*group.after, *group.last],
            [norm for branch in group.beside for norm in (*branch.before, *branch.after)],
            [branch.layer for branch in group.beside if branch.layer],
            new_bias=layer.bias is None,
        )
        return cls(
            parts=[_part(branch, model, layer) for branch in group.branches],
            report=report,
            last=_composed(model, group.last),
            group=group,
            layer=layer,
            given=weight_of(layer).dtype,
            steps=_type_of_steps([model.get_submodule(norm) for norm in group.norms]),
        )

    def add(self, x: Tensor, expected: Tensor, got: Tensor) -> None:
        """Add a call to what was seen: the input, and both outputs."""
        if not expected.numel():
            return
        one, other, given = wide(expected), wide(got), wide(x).abs()
        difference, largest, overflows = (one - other).abs(), one.abs(), False
        # Sums are far cheaper than asking of each value whether it is finite.
        if not (difference.sum().isfinite() and largest.sum().isfinite()):
            known, got_known = one.isfinite(), other.isfinite()
            if not bool(known.any()):
                return
            overflows = bool((known & ~got_known).any())
            difference = torch.where(known & got_known, difference, 0.0)
            largest = torch.where(known, largest, 0.0)
        if not given.sum().isfinite():
            given = torch.where(given.isfinite(), given, 0.0)
        self.see(
            _over_others(difference),
            _over_others(given),
            float(largest.max()),
            overflows=overflows,
        )

    def problem(self) -> str:
        """Complete the report; why the layers must not be folded, or ""."""
        weights = (self.layer.weight, self.layer.bias)
        self.report.largest_weight = max(
            float(t.detach().abs().max()) for t in weights if t.numel()
        )
        dtype, given = self.layer.weight.dtype, self.given
        double = torch.float64 in (dtype, given) and torch.float32 not in (dtype, given)
        problem = self.compare(
            short(dtype),
            known=self.steps != _UNKNOWN,
            coarser="autocast, for example,",
            sums="float64" if double and dtype == given else "float32",
            steps=self.steps or ("float64" if double else "float32"),
            original=short(given),
        )
        return f"folded into '{self.group.layer}', {problem}" if problem else ""


def _over_others(values: Tensor) -> Array:
    """The largest of each channel."""
    largest: Array = values.amax([a for a in range(values.dim()) if a != 1]).cpu().numpy()
    return largest


def _part(branch: Branch, model: nn.Module, main: Any) -> Part:
    """What a branch computes."""
    if branch.layer:
        layer = model.get_submodule(branch.layer)
        with torch.no_grad():
            linear, padded = linear_of(layer), zero_padded(layer)
    else:
        whole = linear_of(main)
        linear = Linear.identity(whole.outputs, [1] * len(whole.kernel), whole.groups)
        padded = False
    return Part(linear, _composed(model, branch.before), _composed(model, branch.after), padded)


def _composed(model: nn.Module, norms: list[str]) -> Affine | None:
    affines = [affine_of(model.get_submodule(name)) for name in norms]
    return reduce(Affine.then, affines) if affines else None


_UNKNOWN = "unknown"


def _type_of_steps(norms: list[Any]) -> str:
    """The type in which batch norms compute, if it is a narrow one; "" if not.

    torch's compute in float32. Constant layers of torchvision and timm compute with tensors of the
    type of their buffers; if that is float16 and var + ε below its normal numbers, no bound is
    known.
    """
    found = [
        norm
        for norm in norms
        if not isinstance(norm, (nn.modules.batchnorm._BatchNorm, FrozenLayer))
        and norm.running_var.dtype.itemsize < 4
    ]
    if any(norm.running_var.dtype == torch.bfloat16 for norm in found):
        return "bfloat16"
    tiny = torch.finfo(torch.float16).tiny
    if any(norm.running_var.numel() and norm.running_var.min() + norm.eps < tiny for norm in found):
        return _UNKNOWN
    return "float16" if found else ""


def wide(t: Tensor) -> Tensor:
    """In float64, which some devices do not have."""
    t = t.detach()
    return (t.cpu() if t.device.type == "mps" else t).double()
