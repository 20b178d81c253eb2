"""A layer to measure."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import ShapeError
from ...moments import Moments
from .. import functional, native
from ..contract import Config as Form
from ..contract import NonFiniteError, values_per_example
from ..modules import Layer
from .report import LayerShift

#: Told of each tensor that a layer is about to normalize, with its mask; says what was seen in it
#: where the layer is to normalize by the batch.
Visit = Callable[["Target", Tensor, "Tensor | None"], "Input | None"]

# Moments of one layer are merged pairwise in blocks of so many batches.
_BLOCK = 256


Pair = tuple[Tensor, Tensor]


class Input:
    """What a layer was called with, and its moments."""

    __slots__ = ("moments", "values", "x")

    def __init__(self, x: Tensor, mask: Tensor | None) -> None:
        self.x = x
        self.moments = functional.measure(x, mask)
        if mask is None:
            self.values = x.shape[0] * values_per_example(x)
        else:
            self.values = int(torch.count_nonzero(functional.as_weights(mask, x)))


class Target:
    """A layer to measure: its own statistics, those it is lent, and those found."""

    def __init__(self, layer: _BatchNorm, name: str, index: int) -> None:
        self.layer, self.name, self.index = layer, name, index
        mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
        assert mean is not None
        assert var is not None
        self._mean, self._var, self.channels = mean, var, mean.numel()
        self._has_others = False  # statistics
        self.problem = ""  # why it could not be measured
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.parts: list[Moments] = []
        self.calls = 0
        self.seen_in: set[int] = set()  # batches, by their number
        self.settled = False
        self.found: Pair | None = None
        self.count = 0.0
        self.take_back()

    # ---- measuring

    def watch(self, visit: Visit, stack: ExitStack) -> None:
        """Tell `visit` of what the layer normalizes, and let it use what it is to, until the end.

        Ours hand input and mask to `_layer`. torch's begin with `_check_input_dim`, which shows the
        input as a subclass has changed it, and look for their statistics after that. A subclass
        whose forward does without the one it inherits is taken by its first argument.
        """
        if not _goes_on(self.layer):
            hook = partial(self._before_call, visit)
            handle = self.layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
            return
        name = "_normalize" if isinstance(self.layer, Layer) else "_check_input_dim"
        look = self._instead_of_layer if isinstance(self.layer, Layer) else self._after_check
        own, inner = self.layer.__dict__.get(name), getattr(self.layer, name)
        self.layer.__dict__[name] = partial(look, visit, inner)
        stack.callback(self._restore, name, own)

    def _restore(self, name: str, own: Any) -> None:
        self.layer.__dict__.pop(name, None)
        if own is not None:
            self.layer.__dict__[name] = own

    def _instead_of_layer(
        self,
        visit: Visit,
        inner: Callable[..., Any],
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: bool,
        form: Form,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> Any:
        seen = visit(self, x, mask)
        rest = form, residual, mask
        if seen is not None and seen.values > 1 and form.group_size:
            return inner(x, mean, var, weight, bias, True, *rest)
        pair = self._to_use(seen, wide=native.supports(x)) or (mean, var)
        return inner(x, *pair, weight, bias, False, *rest)

    def _after_check(self, visit: Visit, inner: Callable[[Tensor], None], x: Tensor) -> None:
        inner(x)
        self._lend(self._to_use(visit(self, x, None), wide=False))

    def _before_call(
        self,
        visit: Visit,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        x = next(iter(bound.arguments.values()), None)
        if isinstance(x, Tensor):
            self._lend(self._to_use(visit(self, x, None), wide=False))

    def measure(self, x: Tensor, mask: Tensor | None) -> Input | None:
        """The moments of an input; None where the layer will refuse it, and says best why.

        Raises
        ------
        NonFiniteError
            They are not finite.
        """
        if not (x.is_floating_point() and x.dim() >= 2 and x.shape[1] == self.channels):
            self.problem = f"its input, {tuple(x.shape)}, is not (N, {self.channels}, …)"
            return None
        seen = Input(x, mask)
        bad = np.flatnonzero(~(np.isfinite(seen.moments.mean) & np.isfinite(seen.moments.m2)))
        if len(bad):
            raise NonFiniteError(
                f"recalibrate: the input of the layer '{self.name}' has no finite mean and "
                f"variance in channel {bad[0]}. Look for NaN, infinity or an overflow before this "
                "layer, or in the data."
            )
        return seen

    def add(self, moments: Moments, batch: int = 0) -> None:
        """Take up one call's moments."""
        self.seen_in.add(batch)
        self.calls += bool(np.any(moments.count))
        self.parts.append(moments)
        if len(self.parts) == _BLOCK:
            self.parts = [Moments.merge(self.parts)]

    # ---- statistics

    def _to_use(self, seen: Input | None, wide: bool) -> Pair | None:
        """By what the layer is to normalize: the batch, what was found, or None for its own."""
        if seen is None or seen.values <= 1:
            return self.found
        # Ours take wider statistics than their input.
        dtype = torch.float64 if wide else None
        return self._in_buffers(seen.moments.mean, seen.moments.var(), dtype)

    def _lend(self, pair: Pair | None) -> None:
        """Put other statistics in the place of the layer's own, or take them back."""
        if pair is not None or self._has_others:
            buffers = self.layer._buffers
            buffers["running_mean"], buffers["running_var"] = pair or (self._mean, self._var)
            self._has_others = pair is not None

    def take_back(self) -> None:
        """Give the layer its own statistics again."""
        self._has_others = True
        self._lend(None)

    def settle(self, moments: Moments, calls: int) -> None:
        """Let the layer use the population statistics from here on; its own if there are none."""
        self.settled = True
        if not calls:
            if self.seen_in:
                self.problem = self.problem or "only empty inputs reached it"
            return
        var = moments.var(ddof=1)
        count = float(np.max(moments.count, initial=0.0))
        if not np.all(moments.count > 1):
            raise ShapeError(
                "recalibrate needs more than one value per channel to tell a variance, got "
                f"{count:g} in all for the layer '{self.name}'. Give it more data."
            )
        self.count, self.calls = count, calls
        self.found = self._in_buffers(moments.mean, var, None)

    def _in_buffers(
        self, mean: NDArray[np.float64], var: NDArray[np.float64], dtype: torch.dtype | None
    ) -> Pair:
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
        for own, new in zip(self.own(), (*self.found, self.calls), strict=False):
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
            ratio = np.nan_to_num(np.sqrt(old_var + self.layer.eps) / std, nan=math.inf)
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


def _goes_on(layer: nn.Module) -> bool:
    """Whether the forward of a layer calls the one it inherits, or begins as that one does."""
    if "forward" in layer.__dict__:  # something around the layer's own
        return True
    forward = inspect.unwrap(layer.forward)
    code = getattr(forward, "__code__", None)
    return code is None or not {"forward", "_check_input_dim"}.isdisjoint(code.co_names)
