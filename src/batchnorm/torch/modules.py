"""BatchNorm1d, 2d and 3d: subclasses of torch's layers with additional options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ArgumentError
from . import functional, native, portable, running
from .contract import PLAIN_CONFIGS, Config, config_of, values_per_example
from .internals import can_change_attributes, is_compiling, is_direct, is_exporting, is_recomputing

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_ON_NONFINITE = ("skip", "raise", "propagate")
_ON_SINGLE = ("raise", "population")

NOT_SCRIPTABLE = (
    "torch.jit.script cannot compile {}, a layer of batchnorm.torch. Call "
    "batchnorm.torch.revert(model) first, or use torch.jit.trace or torch.export instead."
)
_NOT_QUANTIZABLE = (
    "torch.ao.quantization fuses and folds torch's batch-norm layers only. Call "
    "batchnorm.torch.revert(model) before it prepares the model."
)


class Layer(nn.Module):
    """What our layers add to torch's; a base class that comes before torch's class.

    The defaults of all attributes are on the class, so that changing the class of an instance is
    enough to convert it.
    """

    activation: str | None = None
    negative_slope: float = 0.01
    on_nonfinite: str = "skip"
    on_single: str = "raise"
    group_size: int | None = None
    stats_frozen: bool = False
    affine_frozen: bool = False

    # Of torch's class
    num_features: int
    eps: float
    momentum: float | None
    track_running_stats: bool
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _check_input_dim: Callable[[Tensor], None]

    _to_unfreeze: tuple[str, ...] = ()  # names of parameters that `unfreeze` lets train again
    _name: str = ""
    _nonfinite: Tensor | None = None  # counts skipped batches
    # The merged statistics of `accumulate`, and the running mean that they will update.
    _accumulated: tuple[Tensor, Tensor | None] | None = None

    EXTRAS: ClassVar[tuple[str, ...]] = (
        "activation", "negative_slope", "on_nonfinite", "on_single", "group_size", "stats_frozen",
        "affine_frozen", "_to_unfreeze", "_name", "_nonfinite", "_accumulated",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        on_nonfinite: str = "skip",
        on_single: str = "raise",
        group_size: int | None = None,
        **of_torch: Any,  # bias=, if the installed torch has it
    ) -> None:
        check_options(eps, group_size, activation, negative_slope, on_nonfinite, on_single)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            **of_torch,
        )
        self.activation = activation
        self.negative_slope = negative_slope
        self.on_nonfinite = on_nonfinite
        self.on_single = on_single
        self.group_size = group_size
        self.adopt()

    def adopt(self, name: str = "") -> None:
        """Complete an instance that was made by the constructor of torch's class."""
        if name:
            self._name = name
        if self.running_mean is not None and not self.running_mean.is_meta:
            self._nonfinite = self._counter(self.running_mean)
        self._widen({})

    def release(self) -> None:
        """Remove the attributes that torch's layer does not have, before the class changes back."""
        for name in {*type(self).EXTRAS} & self.__dict__.keys():
            del self.__dict__[name]

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize, add `residual`, apply the activation.

        Parameters
        ----------
        input : (N, C, *S)
        residual : broadcasts with (N, C, *S)
            Added before the activation.
        mask : broadcasts to (N, *S)
            Weight of each value in the statistics, as in `functional.batch_norm`. The output is
            zero where the mask is, in evaluation too.

        Returns
        -------
        (N, C, *S)
            In the type and memory format of `input`; if the residual has another type or shape, in
            those of the sum.

        Raises
        ------
        ValueError, RuntimeError
            As torch's layer, and as `functional.batch_norm`.
        NonFiniteError
            With ``on_nonfinite="raise"``. A call that raises changes nothing.
        """
        if isinstance(input, Proxy):  # a leaf module for torch.fx, like torch's layers
            tracer: Any = input.tracer
            if type(tracer).__name__ == "QuantizationTracer":
                warnings.warn(_NOT_QUANTIZABLE, stacklevel=2)
            extra = {k: v for k, v in (("residual", residual), ("mask", mask)) if v is not None}
            proxy: Tensor = tracer.create_proxy(
                "call_module", tracer.path_of_module(self), (input,), extra
            )
            return proxy
        self._check_input_dim(input)
        p: Any = self._parameters
        b = self._buffers
        try:  # past the slow `nn.Module.__getattr__`
            weight, bias, mean, var = p["weight"], p["bias"], b["running_mean"], b["running_var"]
        except KeyError:  # one is computed from other parameters, as by weight norm
            weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if self.affine_frozen and not functional.is_recorded():  # where it would be an operation
            weight = None if weight is None else weight.detach()
            bias = None if bias is None else bias.detach()
        known = mean is not None or var is not None
        if not known:
            batch = True
        elif not self.training or self.stats_frozen:
            batch = False
        else:
            batch = self.on_single == "raise" or not self._is_single(input, mask)
        if batch and not self.track_running_stats:  # as in torch: training does not use them
            mean = var = None
        if self.activation is None and self.group_size is None:
            config = PLAIN_CONFIGS.get(self.eps) or Config(self.eps)
        else:
            config = config_of(self.eps, self.group_size, self.activation, self.negative_slope)
        if (
            (not input.is_cpu or is_exporting())
            and mask is None
            and self._is_torchs(input, residual, batch)
        ):
            functional.check(input, mean, var, weight, bias, batch, config)
            y: Tensor = _BatchNorm.forward(self, input)  # type: ignore[arg-type]
            return portable.finish(y, residual, None, config)
        y, statistics = self._normalize(
            input, mean, var, weight, bias, batch, config, residual, mask, self.momentum
        )
        if batch and self.training and not is_recomputing():
            self._track(mean, var, statistics, mask)
        return y

    def _is_torchs(self, input: Tensor, residual: Tensor | None, batch: bool) -> bool:
        """Whether torch's layer runs instead of ours.

        On a device that the core does not read, it does so if it would do the same, with fewer
        kernels: only to skip batches, statistics are computed apart. An exported program of
        training has torch's operator, because tools that take programs know no other, unless an
        option asks for something else than torch's layer does; it does not skip batches.
        """
        if is_exporting():
            vectors = (self.weight, self.bias, self.running_mean, self.running_var)
            return (
                batch
                and self.training
                and self.on_nonfinite != "raise"
                and self.group_size is None
                and self.momentum is not None
                and self._accumulated is None
                and all(t is None or t.dtype == input.dtype for t in vectors)
            )
        return residual is None and (
            self.on_nonfinite == "propagate"
            and self.on_single == "raise"
            and self.group_size is None
            and self._accumulated is None
            and not self.stats_frozen
            and not self.affine_frozen
            and is_direct(input)
            and not is_recomputing()
        )

    #: Normalizes; returns y and the statistics that update the running ones.
    _normalize: Callable[..., tuple[Tensor, Any]] = staticmethod(functional.normalize)

    def _is_single(self, x: Tensor, mask: Tensor | None) -> bool:
        if mask is None:
            return x.dim() >= 2 and x.shape[0] * values_per_example(x) == 1
        weights = functional.as_weights(mask, x)
        return int(torch.count_nonzero(weights)) == 1

    def _label(self) -> str:
        """The name of the layer in messages: its path in the model, if known.

        Compiled code uses the class instead. A path would make it specific to one layer, and the
        compiler would compile it again for each.
        """
        if not is_compiling() and self._name:
            return self._name
        return f"{type(self).__name__}({self.num_features})"

    def _track(
        self, mean: Tensor | None, var: Tensor | None, statistics: Any, mask: Tensor | None
    ) -> None:
        tracked, momentum = self._buffers["num_batches_tracked"], self.momentum
        if mean is None or var is None:
            if mean is var and tracked is not None and self.track_running_stats:
                with torch.no_grad():
                    tracked.add_(1)  # as in torch
            return
        if momentum is None and tracked is None:
            momentum = 0.0  # as in torch
        nonfinite = self._nonfinite
        # Statistics are an array only in direct calls, for which the core can read the buffers.
        if (
            type(statistics) is np.ndarray
            and self._accumulated is None
            and (tracked is None or type(tracked) is Tensor)
        ):
            propagate = self.on_nonfinite == "propagate"
            bad = native.update_running(
                mean, var, tracked, statistics, momentum, propagate, mask is None
            )
            if bad >= 0 and not propagate:
                counter = self._counter(mean)
                running.report(statistics, bad, self.on_nonfinite, counter, self._label())
            return
        if nonfinite is None or nonfinite.is_meta or not isinstance(statistics, np.ndarray):
            nonfinite = self._counter(mean)
        # Not if functional_call has replaced the buffers: then these are updated.
        if self._accumulated is not None and self._accumulated[1] is mean:
            total = self._accumulated[0]
            functional.merge_into(total, statistics, nonfinite, self.on_nonfinite, self._label())
            return
        functional.update_running(
            mean,
            var,
            tracked,
            nonfinite,
            statistics,
            momentum,
            self.on_nonfinite,
            mask,
            self._label(),
        )

    def take_accumulated(self) -> None:
        """Update the running statistics with what `accumulate` has merged, as one batch."""
        accumulated, self._accumulated = self._accumulated, None
        mean, var = self.running_mean, self.running_var
        if accumulated is None or mean is None or var is None:
            return
        total = accumulated[0]
        if not bool((total[0, 0] > 0).any()):
            return
        self._track(mean, var, total.to(mean.device), None)

    def _counter(self, mean: Tensor) -> Tensor | None:
        """What counts skipped batches, on the device of the running mean.

        No buffer, so that nothing that torch does to buffers (broadcasts, averages, meta tensors)
        happens to it. Exporters and tracers cannot change other tensors: they do without.
        """
        if not can_change_attributes(mean) or mean.is_meta:
            return None
        count = self._nonfinite
        if count is None or count.is_meta:
            self._nonfinite = count = torch.zeros((), dtype=torch.int64, device=mean.device)
        elif count.device != mean.device:
            self._nonfinite = count = count.to(mean.device)
        return count

    @property
    def nonfinite_batches(self) -> int:
        """Number of batches skipped because of ``on_nonfinite="skip"``."""
        return 0 if self._nonfinite is None else int(self._nonfinite)

    def reset_running_stats(self) -> None:
        """Reset the running statistics as torch does, but not if they are frozen."""
        if self.stats_frozen:
            return
        super().reset_running_stats()  # type: ignore[misc]
        if self._nonfinite is not None:
            self._nonfinite = torch.zeros_like(self._nonfinite)

    def __getstate__(self) -> Any:
        """Leave out the state of an `accumulate` block, which does not concern copies."""
        inherited = getattr(super(), "__getstate__", None)  # Python 3.11 and later, or a subclass
        state = self.__dict__ if inherited is None else inherited()
        if not isinstance(state, dict):  # a subclass with slots
            return state
        return {name: value for name, value in state.items() if name != "_accumulated"}

    def __prepare_scriptable__(self) -> nn.Module:
        raise ArgumentError(NOT_SCRIPTABLE.format(type(self).__name__))

    # ---- moving and loading: running statistics stay float32 or wider ---------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in ("running_mean", "running_var")}
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen(before)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen({})

    def _widen(self, before: dict[str, Tensor | None]) -> None:
        """Make the running statistics float32 or wider, from their values in `before` if given."""
        for name in ("running_mean", "running_var"):
            now = self._buffers.get(name)
            if now is None or not now.is_floating_point() or now.itemsize >= 4:
                continue
            old = before.get(name)
            if old is None or old.itemsize < 4 or old.device.type == "meta":
                self._buffers[name] = now.float()
            else:
                self._buffers[name] = old.to(now.device)
        if self._accumulated is not None:  # the buffer is another object now
            self._accumulated = self._accumulated[0], self._buffers["running_mean"]

    def extra_repr(self) -> str:
        """torch's, and the options that differ from their defaults."""
        parts = [super().extra_repr()]
        for name in ("activation", "negative_slope", "on_nonfinite", "on_single", "group_size"):
            # Of the instance: a class may compute an option from something that its repr shows.
            value = self.__dict__.get(name, getattr(Layer, name))
            if value != getattr(Layer, name) and (
                name != "negative_slope" or self.activation == "leaky_relu"
            ):
                parts.append(f"{name}={value}")
        frozen = [n for n in ("stats", "affine") if getattr(self, f"{n}_frozen")]
        if frozen:
            parts.append(f"frozen={'+'.join(frozen)}")
        return ", ".join(parts)


def check_options(
    eps: float,
    group_size: int | None,
    activation: str | None,
    negative_slope: float,
    on_nonfinite: str,
    on_single: str,
) -> None:
    """Raise if an option has a value that no layer accepts."""
    config_of(eps, group_size, activation, negative_slope)
    for name, value, known in (
        ("on_nonfinite", on_nonfinite, _ON_NONFINITE),
        ("on_single", on_single, _ON_SINGLE),
    ):
        if value not in known:
            raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


_DOC = """torch's {name} with a faster, more accurate core and additional options.

    This is a subclass of `torch.nn.{name}`, with the same state dict and the same arguments up to
    `bias`; additional arguments are keywords. A call that raises changes nothing. If activation
    checkpointing repeats a forward, the running statistics are updated once. They stay float32 or
    wider after ``.half()`` and ``.bfloat16()``.

    Parameters
    ----------
    num_features : int
        C, of input {shape}.
    eps, momentum, affine, track_running_stats, device, dtype, bias
        As in `torch.nn.{name}`.
    activation : None, "relu", "leaky_relu", "relu6", "hardswish" or "silu"
        Applied in the same pass, after the residual if there is one.
    negative_slope : float
        Of "leaky_relu".
    on_nonfinite : "skip", "raise" or "propagate"
        What to do if the statistics of a training batch are not finite, or too large for the type
        of the running statistics. "skip": do not update the running statistics, count the batch in
        `nonfinite_batches`, and warn once. "raise": raise `NonFiniteError`, which names layer and
        channel. "propagate": update them nevertheless, as torch does.
    on_single : "raise" or "population"
        What to do if a channel has only one value in training. "raise": raise torch's ValueError.
        "population": normalize by the running statistics, and do not update them.
    group_size : int
        Number of examples that share their statistics (ghost batches); None for all.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import {name}
    >>> layer = {name}(3, activation="relu")
    >>> y = layer(torch.randn({example}))
    """


class BatchNorm1d(Layer, nn.BatchNorm1d):  # type: ignore[misc]  # noqa: D101
    __doc__ = _DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)", example="8, 3")


class BatchNorm2d(Layer, nn.BatchNorm2d):  # type: ignore[misc]  # noqa: D101
    __doc__ = _DOC.format(name="BatchNorm2d", shape="(N, C, H, W)", example="8, 3, 4, 4")


class BatchNorm3d(Layer, nn.BatchNorm3d):  # type: ignore[misc]  # noqa: D101
    __doc__ = _DOC.format(name="BatchNorm3d", shape="(N, C, D, H, W)", example="8, 3, 2, 4, 4")
