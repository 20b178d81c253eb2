"""A group of layers that was folded: what was there, what came of it, and how near that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...folding import Affine, FoldedLayer, Linear
from ..adapters import FrozenLayer
from .groups import Branch, Group
from .layers import affine_of, linear_of, short, zero_padded

__all__ = ["Folding", "wide"]


@dataclass(eq=False)
class Folding:
    """A group that is folded.

    Attributes
    ----------
    group : Group
    layer : Module
        The layer of the folded model.
    error, output, input
        Of each channel, the largest seen.
    overflows : bool
        Whether its output was not finite where the original's was.
    calls : int
        How many were compared.
    share : float
        Largest error of a channel over its bound.
    """

    group: Group
    layer: Any
    error: Any = 0.0
    output: float = 0.0
    input: Any = 0.0
    overflows: bool = False
    calls: int = 0
    share: float = 0.0

    def read(self, model: nn.Module) -> None:
        """Take what is to be folded from the modules of a model."""
        group = self.group
        self._branches = [_Part.of(branch, model, self.layer) for branch in group.branches]
        self._last = _composed(model, group.last)
        self._given = self.layer.weight.dtype
        self._new_bias = self.layer.bias is None
        stages = [model.get_submodule(norm) for norm in group.norms]
        self._steps = _type_of_steps(stages)

    def folded(self) -> Linear:
        """The layer that computes all of them, in float64."""
        total: Linear = reduce(Linear.__add__, (part.folded() for part in self._branches))
        return total if self._last is None else total.then(self._last)

    def add(self, x: Tensor, expected: Tensor, got: Tensor) -> None:
        """Add a call to what was seen: the input, and both outputs."""
        one, other = wide(expected), wide(got)
        known = one.isfinite()
        self.overflows |= bool((known & ~other.isfinite()).any())
        difference = torch.where(known & other.isfinite(), (one - other).abs(), 0.0)
        others = [axis for axis in range(one.dim()) if axis != 1]
        self.error = np.maximum(self.error, difference.amax(others).cpu().numpy())
        self.output = max(self.output, float(torch.where(known, one.abs(), 0.0).max()))
        largest = wide(x).abs().amax([axis for axis in range(x.dim()) if axis != 1])
        self.input = np.fmax(self.input, largest.cpu().numpy())
        self.calls += 1

    def problem(self) -> str:
        """Why the layers must not be folded, by what was seen; "" if they may."""
        problem = ""
        if not self.calls:
            problem = "it could not be compared"
        elif self.overflows:
            problem = "its output overflows"
        elif self.share > 1:
            problem = (
                f"its error is {self.share:.3g} times the bound: the model may compute in coarser "
                "arithmetic than its types, by autocast for example"
            )
        return f"folded into '{self.group.layer}', {problem}" if problem else ""

    def record(self) -> FoldedLayer:
        """As a line of the report."""
        bound = self._bound()
        error = np.broadcast_to(self.error, bound.shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.share = float(np.where(error > 0, error / bound, 0.0).max(initial=0.0))
        largest = float(error.max(initial=0.0))
        weights = (self.layer.weight, self.layer.bias)
        group = self.group
        return FoldedLayer(
            group.layer,
            group.before,
            [*group.after, *group.last],
            [norm for branch in group.beside for norm in (*branch.before, *branch.after)],
            [branch.layer for branch in group.beside if branch.layer],
            self._new_bias,
            max(float(t.detach().abs().max()) for t in weights if t.numel()),
            largest,
            largest / self.output if self.output else 0.0,
            float(bound.max(initial=0.0)),
            self.share,
        )

    def _bound(self) -> Any:
        """Of the error of each channel, on inputs no larger than those that were seen."""
        dtype, given = self.layer.weight.dtype, self._given
        double = torch.float64 in (dtype, given) and torch.float32 not in (dtype, given)
        main = self._branches[0].linear
        if self._steps == _UNKNOWN:
            return np.full(main.outputs, math.inf)
        products = math.prod(main.weight.shape[1:])
        total: Any = 0.0
        for part in self._branches:
            after = part.after
            if self._last is not None:
                after = self._last if after is None else after.then(self._last)
            total = total + part.linear.difference(
                after,
                self.input,
                short(dtype),
                before=part.before,
                sums="float64" if double and dtype == given else "float32",
                steps=self._steps or ("float64" if double else "float32"),
                original=short(given),
                additions=len(self._branches) - 1,
                products=None if main.transposed else products,
            )
        return total


@dataclass(eq=False)
class _Part:
    """What a branch computes."""

    linear: Linear
    before: Affine | None
    after: Affine | None
    padded: bool

    @classmethod
    def of(cls, branch: Branch, model: nn.Module, main: Any) -> _Part:
        if branch.layer:
            layer = model.get_submodule(branch.layer)
            with torch.no_grad():
                linear, padded = linear_of(layer), zero_padded(layer)
        else:
            whole = linear_of(main)
            linear = Linear.identity(whole.outputs, [1] * len(whole.kernel), whole.groups)
            padded = False
        before, after = _composed(model, branch.before), _composed(model, branch.after)
        return cls(linear, before, after, padded)

    def folded(self) -> Linear:
        linear = self.linear
        if self.before is not None:
            linear = linear.after(self.before, padded=self.padded)
        return linear if self.after is None else linear.then(self.after)


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
