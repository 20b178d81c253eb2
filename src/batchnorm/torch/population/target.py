"""A layer to measure: its input, and the statistics by which it normalizes meanwhile.

This is the only file of `population` that knows how layers work inside: `functional`, `native` and
the methods of `Layer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...errors import ShapeError
from ...moments import Moments
from .. import functional, native
from ..contract import Config, NonFiniteError, values_per_example
from ..modules import Layer
from .report import LayerShift

#: Called with each tensor that a layer is about to normalize, and its mask. Returns the input if
#: the layer shall normalize by the statistics of this batch; None if not.
OnInput = Callable[["Target", Tensor, "Tensor | None"], "LayerInput | None"]

#: Mean and variance.
Pair = tuple[Tensor, Tensor]

# Moments of one layer are merged pairwise in blocks of so many batches.
_BLOCK = 256


class LayerInput:
    """What a layer normalizes in one call, and its moments.

    Attributes
    ----------
    values : int
        Number of values per channel that are not masked.
    """

    __slots__ = ("moments", "values", "x")

    def __init__(self, x: Tensor, mask: Tensor | None) -> None:
        self.x = x
        self.moments = functional.measure(x, mask)
        if mask is None:
            self.values = x.shape[0] * values_per_example(x)
        else:
            self.values = int(torch.count_nonzero(functional.as_weights(mask, x)))


class Target:
    """A layer to measure.

    Attributes
    ----------
    parts : list of Moments
        Measured so far, merged in part.
    calls : int
        Calls of the layer that were measured, without those of empty input.
    batches : set of int
        Numbers of the batches that reached the layer.
    finished : bool
        The layer has been measured, over all batches and processes.
    found : pair of tensors, or None
        Mean and variance, in the type of the layer's buffers, once it is finished; None if nothing
        reached it.
    count : float
        Values per channel behind `found`.
    problem : str
        Why the layer could not be measured.
    """

    def __init__(self, layer: nn.Module, name: str, index: int) -> None:
        self.layer, self.name, self.index = layer, name, index
        mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
        assert mean is not None
        assert var is not None
        self._mean, self._var, self.channels = mean, var, mean.numel()
        self.problem = ""
        self.start_over()

    def start_over(self) -> None:
        """Forget all that was measured."""
        self.parts: list[Moments] = []
        self.calls = 0
        self.batches: set[int] = set()
        self.finished = False
        self.found: Pair | None = None
        self.count = 0.0

    # ---- interception

    def intercept(self, on_input: OnInput, stack: ExitStack) -> None:
        """Call `on_input` before the layer normalizes, and replace its statistics; `stack` undoes.

        Our layers pass input, mask and statistics to `_normalize`. All others are torch's own and
        subclasses of them, which normalize by `torch.nn.functional.batch_norm`, whatever their
        forward does before and after it.
        """
        if isinstance(self.layer, Layer):
            name, replacement = "_normalize", self._instead_of_normalize
        else:
            name, replacement = "forward", self._instead_of_forward
        own, inner = self.layer.__dict__.get(name), getattr(self.layer, name)
        self.layer.__dict__[name] = partial(replacement, on_input, inner)
        stack.callback(self._restore, name, own)

    def _restore(self, name: str, own: Any) -> None:
        self.layer.__dict__.pop(name, None)
        if own is not None:
            self.layer.__dict__[name] = own

    def _instead_of_normalize(
        self,
        on_input: OnInput,
        inner: Callable[..., Any],
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: bool,
        config: Config,
        residual: Tensor | None,
        mask: Tensor | None,
        momentum: float | None,
    ) -> Any:
        seen = on_input(self, x, mask)
        rest = config, residual, mask, momentum
        if seen is not None and seen.values > 1 and config.group_size:
            return inner(x, mean, var, weight, bias, True, *rest)
        pair = self.statistics_for(seen, wide=native.supports(x)) or (mean, var)
        return inner(x, *pair, weight, bias, False, *rest)

    def _instead_of_forward(
        self, on_input: OnInput, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with _BatchNormCalls(self, on_input) as calls:
            y = inner(*args, **kwargs)
        if not calls.seen:
            self.problem = (
                "its forward does not call torch.nn.functional.batch_norm with its running "
                "statistics"
            )
        return y

    # ---- measuring

    def measure(self, x: Tensor, mask: Tensor | None) -> LayerInput | None:
        """The moments of an input; None if the layer will refuse it, with the better message.

        Raises
        ------
        NonFiniteError
            They are not finite.
        """
        if not (x.is_floating_point() and x.dim() >= 2 and x.shape[1] == self.channels):
            self.problem = f"its input, {tuple(x.shape)}, is not (N, {self.channels}, …)"
            return None
        seen = LayerInput(x, mask)
        bad = np.flatnonzero(~(np.isfinite(seen.moments.mean) & np.isfinite(seen.moments.m2)))
        if len(bad):
            raise NonFiniteError(
                f"recalibrate: the input of the layer '{self.name}' has no finite mean and "
                f"variance in channel {bad[0]}. Look for NaN, infinity or an overflow before this "
                "layer, or in the data."
            )
        return seen

    def add(self, moments: Moments, batch: int = 0) -> None:
        """Add the moments of one call."""
        self.batches.add(batch)
        self.calls += bool(np.any(moments.count))
        self.parts.append(moments)
        if len(self.parts) == _BLOCK:
            self.parts = [Moments.merge(self.parts)]

    def finish(self, moments: Moments, calls: int) -> None:
        """Normalize by these population statistics from now on; by the layer's own if none."""
        self.finished, self.parts = True, []
        if not calls:
            if self.batches:
                self.problem = self.problem or "only empty inputs reached it"
            return
        var = moments.var(ddof=1)
        count = float(np.max(moments.count, initial=0.0))
        if not np.all(moments.dof > 0):
            raise ShapeError(
                "recalibrate needs more than one value per channel to compute a variance, got "
                f"{count:g} in all for the layer '{self.name}'. Give it more data."
            )
        self.count, self.calls = count, calls
        self.found = self._as_buffers(moments.mean, var, None)

    # ---- statistics

    def statistics_for(self, seen: LayerInput | None, wide: bool) -> Pair | None:
        """Statistics to normalize by: of the batch, those found, or None for the layer's own.

        `wide`: the layer takes float64 statistics beside any input.
        """
        if seen is None or seen.values <= 1:
            return self.found
        dtype = torch.float64 if wide else None
        return self._as_buffers(seen.moments.mean, seen.moments.var(), dtype)

    def _as_buffers(
        self, mean: NDArray[np.float64], var: NDArray[np.float64], dtype: torch.dtype | None
    ) -> Pair:
        """Statistics on the device of the layer's buffers, in `dtype` or in the buffers' own."""
        tensors = []
        for what, values, own in (("mean", mean, self._mean), ("var", var, self._var)):
            t = torch.from_numpy(values.copy()).to(dtype or own.dtype).to(own.device)
            if not bool(torch.isfinite(t).all()):
                raise NonFiniteError(
                    f"recalibrate: running_{what} of the layer '{self.name}' is {own.dtype}, which "
                    f"cannot hold {np.max(np.abs(values)):.3g}. Keep the running statistics in "
                    "float32, as the layers of batchnorm.torch do."
                )
            tensors.append(t)
        return tensors[0], tensors[1]

    # ---- the end

    def own_buffers(self) -> list[Tensor]:
        """The buffers of the layer that `write` changes."""
        tracked = self.layer._buffers.get("num_batches_tracked")
        return [self._mean, self._var, *([] if tracked is None else [tracked])]

    def write(self) -> None:
        """Write what was found into the layer's buffers."""
        assert self.found is not None
        for own, new in zip(self.own_buffers(), (*self.found, self.calls), strict=False):
            own.copy_(torch.as_tensor(new))

    def shift(self) -> LayerShift:
        """How far the statistics found are from the layer's own."""
        assert self.found is not None
        old_mean, old_var, mean, var = (
            t.detach().cpu().double().numpy() for t in (self._mean, self._var, *self.found)
        )
        eps: Any = self.layer.eps
        with np.errstate(all="ignore"):
            std = np.sqrt(var + eps)
            shift = np.nan_to_num(np.abs(mean - old_mean) / std, nan=math.inf, posinf=math.inf)
            ratio = np.nan_to_num(np.sqrt(old_var + eps) / std, nan=math.inf)
            farthest = np.abs(np.log(ratio))
        return LayerShift(
            name=self.name,
            kind=type(self.layer).__name__,
            calls=self.calls,
            count=self.count,
            shift=float(shift.max()),
            channel=int(shift.argmax()),
            rms_shift=float(np.sqrt(np.mean(shift**2))),
            std_ratio=float(ratio[farthest.argmax()]),
        )


class _BatchNormCalls(TorchFunctionMode):
    """Intercepts the calls of `torch.nn.functional.batch_norm` with a layer's running statistics.

    The layer is told from others inside it, and from other uses of the function, by these.

    Attributes
    ----------
    seen : bool
        There was such a call.
    """

    def __init__(self, target: Target, on_input: OnInput) -> None:
        super().__init__()
        self._target, self._on_input, self.seen = target, on_input, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = self._batch_norm if func is F.batch_norm else func
        return call(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        target, pair = self._target, (running_mean, running_var)
        # functional_call replaces the buffers of the layer, so this compares with those of now.
        own = target.layer._buffers.get("running_mean")
        if running_mean is not None and running_mean is own:
            self.seen = True
            pair = target.statistics_for(self._on_input(target, input, None), wide=False) or pair
            if training:  # by the batch even in evaluation: there is nothing to update now
                pair = None, None
        return F.batch_norm(input, *pair, weight, bias, training, momentum, eps)
