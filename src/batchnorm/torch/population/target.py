"""A layer to measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import ShapeError
from ...moments import Moments
from .. import functional, kernels
from ..kernels import NonFiniteError
from ..modules import Layer
from .report import LayerShift

#: Told of each call of a layer, with its arguments.
Visit = Callable[["Target", tuple[Any, ...], dict[str, Any]], None]

# Moments of one layer are merged pairwise in blocks of so many batches.
_BLOCK = 256


class Input:
    """What a layer was called with, and its moments."""

    __slots__ = ("moments", "values", "x")

    def __init__(self, x: Tensor, mask: Tensor | None) -> None:
        self.x = x
        self.moments = functional.measure(x, mask)
        if mask is None:
            self.values = x.shape[0] * kernels.values_per_example(x)
        else:
            self.values = int(torch.count_nonzero(functional.as_weights(mask, x)))


class _Reached(BaseException):  # not to be caught on the way
    """A layer's forward has come to the tensor that it normalizes."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Target:
    """A layer to measure: its own statistics, those it is lent, and those found."""

    def __init__(self, layer: _BatchNorm, name: str, index: int) -> None:
        self.layer, self.name, self.index = layer, name, index
        mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
        assert mean is not None
        assert var is not None
        self._mean, self._var, self.channels = mean, var, mean.numel()
        self.parts: list[Moments] = []
        self.batches = 0
        self.seen_in: set[int] = set()  # batches, by their number
        self.found: tuple[Tensor, Tensor] | None = None
        self.count = 0.0
        # Whether what the layer is called with is what it normalizes; None: to be found out.
        forward = type(layer).forward
        self._direct = True if forward in _FORWARDS else None

    def forget(self) -> None:
        """Begin anew."""
        self.parts, self.batches, self.seen_in, self.found = [], 0, set(), None
        self.take_back()

    # ---- measuring

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Input | None:
        """The moments of an input; None where the layer will refuse it, and says best why."""
        x = self._normalized(args, kwargs)
        if not (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and x.dim() >= 2
            and x.shape[1] == self.channels
        ):
            return None
        mask = None
        if isinstance(self.layer, Layer):
            mask = args[2] if len(args) > 2 else kwargs.get("mask")
        seen = Input(x, mask)
        bad = np.flatnonzero(~(np.isfinite(seen.moments.mean) & np.isfinite(seen.moments.m2)))
        if len(bad):
            raise NonFiniteError(
                f"recalibrate: the input of the layer '{self.name}' has no finite mean and "
                f"variance in channel {bad[0]}. Look for NaN, infinity or an overflow before this "
                "layer, or in the data."
            )
        return seen

    def _normalized(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tensor that the layer will normalize.

        A subclass may change its input before it passes it on to the forward it inherits. That one
        begins with `_check_input_dim`, in torch as here, which shows the tensor.
        """
        if not self._direct:

            def check(x: Any) -> None:
                raise _Reached(x)

            self.layer.__dict__["_check_input_dim"] = check
            try:
                self.layer.forward(*args, **kwargs)
                self._direct = True
            except _Reached as reached:
                self._direct = False
                return reached.x
            finally:
                del self.layer.__dict__["_check_input_dim"]
        return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)

    def add(self, moments: Moments, batch: int = 0) -> None:
        """Take up one call's moments."""
        self.seen_in.add(batch)
        self.batches += bool(np.any(moments.count))
        self.parts.append(moments)
        if len(self.parts) == _BLOCK:
            self.parts = [Moments.merge(self.parts)]

    # ---- statistics

    def lend_batch(self, seen: Input) -> None:
        """Let the layer normalize this input by its own statistics, where it has a variance."""
        if seen.values <= 1:
            self.take_back()
            return
        # Ours take wider statistics than their input.
        wide = getattr(type(self.layer), "forward", None) is Layer.forward and kernels.fits(seen.x)
        mean, var = seen.moments.mean, seen.moments.var()
        self._lend(*self._in_buffers(mean, var, torch.float64 if wide else None))

    def _lend(self, mean: Tensor, var: Tensor) -> None:
        self.layer._buffers["running_mean"], self.layer._buffers["running_var"] = mean, var

    def take_back(self) -> None:
        """Give the layer its own statistics again."""
        self._lend(self._mean, self._var)

    def settle(self, moments: Moments, batches: int) -> None:
        """Let the layer use the population statistics from here on."""
        var = moments.var(ddof=1)
        count = float(np.max(moments.count, initial=0.0))
        if not np.all(moments.count > 1):
            raise ShapeError(
                "recalibrate needs more than one value per channel to tell a variance, got "
                f"{count:g} in all for the layer '{self.name}'. Give it more data."
            )
        self.count, self.batches = count, batches
        self.found = self._in_buffers(moments.mean, var, None)
        self._lend(*self.found)

    def _in_buffers(
        self, mean: NDArray[np.float64], var: NDArray[np.float64], dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Statistics as the layer's buffers hold them, or in `dtype`."""
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

    def own(self) -> list[Tensor]:
        """The layer's own buffers that `write` changes."""
        tracked = self.layer._buffers.get("num_batches_tracked")
        return [self._mean, self._var, *([] if tracked is None else [tracked])]

    def write(self) -> None:
        """Make what was found the layer's own."""
        assert self.found is not None
        for own, new in zip(self.own(), (*self.found, self.batches), strict=False):
            own.copy_(torch.as_tensor(new))

    def shift(self) -> LayerShift:
        """How far the statistics found are from the layer's own."""
        assert self.found is not None
        old_mean, old_var, mean, var = (
            t.detach().cpu().double().numpy() for t in (self._mean, self._var, *self.found)
        )
        with np.errstate(all="ignore"):
            std = np.sqrt(var + self.layer.eps)
            shift = np.nan_to_num(np.abs(mean - old_mean) / std, nan=math.inf, posinf=math.inf)
            ratio = np.sqrt(old_var + self.layer.eps) / std
            farthest = np.nan_to_num(np.abs(np.log(ratio)), nan=math.inf, posinf=math.inf)
        some = len(shift) > 0
        return LayerShift(
            name=self.name,
            kind=type(self.layer).__name__,
            batches=self.batches,
            count=self.count,
            shift=float(shift.max()) if some else 0.0,
            channel=int(shift.argmax()) if some else 0,
            rms_shift=float(np.sqrt(np.mean(shift**2))) if some else 0.0,
            std_ratio=float(ratio[farthest.argmax()]) if some else 1.0,
        )


# Forwards that normalize what they are called with.
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, Layer.forward)
