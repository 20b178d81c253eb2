"""BatchNorm: a layer with parameters and running statistics, for NumPy arrays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core, functional, native
from .errors import ArgumentError, BatchNormError, DTypeError, ShapeError
from .functional import Saved
from .moments import Moments
from .native import Array

__all__ = ["BatchNorm"]


class BatchNorm:
    """Batch normalization with learned scale and shift and running statistics.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance, inside the root.
    momentum : float or None
        Weight of the **new** value in the running statistics, as in PyTorch; None averages all
        batches equally.
    affine : bool
        Whether there are `gamma` and `beta`.
    track_running_stats : bool
        Whether there are running statistics; without them, evaluation uses those of the batch.
    channel_axis : int
        The axis of the channels; -1 for channels-last arrays.
    dtype : float16, bfloat16, float32 or float64
        Of `gamma`, `beta` and their gradients. The input may have any supported type.

    Attributes
    ----------
    gamma, beta : (C,) or None
        Scale and shift, in `dtype`; initially ones and zeros.
    grad_gamma, grad_beta : (C,) or None
        Gradients from the last `backward`.
    running_mean, running_var : (C,) or None
        In float64, because at a large offset a narrower mean would make evaluation less accurate
        than training. The variance is unbiased, as in PyTorch.
    num_batches_tracked : int
        Number of training batches since construction or `set_population`.
    nonfinite_batches : int
        Number of training batches that were skipped because they were not finite.
    training : bool
        True: a call normalizes by the batch and updates the running statistics. False: it
        normalizes by the running statistics.

    Notes
    -----
    A call that raises changes nothing. A training batch updates the running statistics with its
    mean and its unbiased variance, ``moments.var(ddof=1)``, unless the variance has no degrees of
    freedom. An empty batch counts in `num_batches_tracked`, as in PyTorch; a batch with all weights
    zero does not. A channel whose values are all masked keeps its running statistics. If the mean
    or variance of a batch is not finite, the batch is skipped and counted in `nonfinite_batches`,
    with a RuntimeWarning the first time.

    Examples
    --------
    >>> import numpy as np
    >>> layer = BatchNorm(2)
    >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> layer.running_mean, layer.running_var  # 0.9 · (0, 1) + 0.1 · (batch mean, variance)
    (array([0.2, 2. ]), array([ 1.1, 20.9]))
    >>> layer.eval()(np.zeros((1, 2))).shape
    (1, 2)

    References
    ----------
    Ioffe & Szegedy (2015), Algorithms 1 and 2.
    """

    gamma: Array | None
    beta: Array | None
    grad_gamma: Array | None
    grad_beta: Array | None
    running_mean: NDArray[np.float64] | None
    running_var: NDArray[np.float64] | None
    num_batches_tracked: int
    nonfinite_batches: int

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        channel_axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if isinstance(num_features, bool) or not isinstance(num_features, (int, np.integer)):
            raise ArgumentError(f"num_features must be an integer, got {num_features!r}.")
        if num_features < 0:
            raise ArgumentError(f"num_features must not be negative, got {num_features}.")
        if momentum is not None and not (
            isinstance(momentum, (int, float, np.number)) and 0 <= momentum <= 1
        ):
            raise ArgumentError(
                f"momentum must be None or from 0 to 1, got {momentum!r}. It is the weight of the "
                "new value; Keras's and Flax's is that of the old one."
            )
        try:
            self.dtype = np.dtype(dtype)
        except TypeError:
            raise DTypeError(f"dtype must be a floating type of NumPy, got {dtype!r}.") from None
        if not native.is_supported(self.dtype):
            raise DTypeError(f"dtype must be a floating type up to float64, got {self.dtype}.")
        self.num_features = int(num_features)
        self.eps = native.check_eps(eps)
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.channel_axis = channel_axis
        self.training = True
        self.gamma = np.ones(num_features, self.dtype) if affine else None
        self.beta = np.zeros(num_features, self.dtype) if affine else None
        self.grad_gamma = self.grad_beta = None
        self.running_mean = np.zeros(num_features) if track_running_stats else None
        self.running_var = np.ones(num_features) if track_running_stats else None
        self.num_batches_tracked = 0
        self.nonfinite_batches = 0
        self._saved: Saved | None = None

    def __call__(self, x: ArrayLike, *, weights: ArrayLike | None = None) -> Array:
        """Normalize `x`; in training also update the running statistics.

        Parameters
        ----------
        x : (N, C, *S)
            The masked values of a masked array have weight zero.
        weights : broadcasts to (N, *S)
            As in `batch_norm`; only in training.

        Returns
        -------
        (N, C, *S)
            In the dtype of `x`, and with its mask.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            As `batch_norm` and `batch_norm_inference`; the layer remains unchanged.
        """
        axis = self.channel_axis
        if not (
            type(x) is np.ndarray
            and isinstance(axis, int)
            and -x.ndim <= axis < x.ndim
            and x.shape[axis] == self.num_features
        ):
            x = self._checked(x)
        if self.training or self.running_mean is None or self.running_var is None:
            y, saved = functional.batch_norm(
                x, self.gamma, self.beta, eps=self.eps, channel_axis=axis, weights=weights
            )
            if self.training:
                self._track(saved)
        elif weights is not None:
            raise ArgumentError(
                "weights must be None in evaluation, which does not use the statistics of the "
                "batch. Call train() first, or leave them out."
            )
        else:
            mean, var = self.running_mean, self.running_var
            y, saved = functional.inference(x, mean, var, self.gamma, self.beta, self.eps, axis)
        self._saved = saved
        return y

    def inverse(self, y: ArrayLike) -> Array:
        """Return the x for which the layer in evaluation returns `y`; changes nothing.

        Parameters
        ----------
        y : (N, C, *S)

        Returns
        -------
        (N, C, *S)
            (y − beta)·√(running_var + eps)/gamma + running_mean, in the dtype of `y`.

        Raises
        ------
        BatchNormError
            The layer is in training mode, or has no running statistics.
        ShapeError, DTypeError, ArgumentError
            As `batch_norm_inverse`.
        """
        if self.training or self.running_mean is None or self.running_var is None:
            remedy = (
                "call eval() first"
                if self.running_mean is not None
                else "build it with track_running_stats=True"
            )
            raise BatchNormError(
                "inverse needs a layer in evaluation mode with running statistics: y of a batch "
                f"that was normalized by its own ones does not tell them; {remedy}. With the "
                "statistics of the batch at hand, use batch_norm_inverse."
            )
        return functional.batch_norm_inverse(
            self._checked(y, "y"), self.running_mean, self.running_var, self.gamma, self.beta,
            eps=self.eps, channel_axis=self.channel_axis,
        )  # fmt: skip

    def _checked(self, x: ArrayLike, name: str = "x") -> Array:
        values = native.as_array(x, name)
        axis = native.channel_axis_of(values, self.channel_axis, name)
        if values.shape[axis] != self.num_features:
            raise ShapeError(
                f"{name} must have num_features = {self.num_features} channels on axis "
                f"{self.channel_axis}, got shape {values.shape}. Set channel_axis=-1 for "
                "channels-last arrays."
            )
        masked: Any = x
        return masked if native.is_masked(x) else values

    def _track(self, saved: Saved) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        tracked = self.num_batches_tracked + 1
        momentum = 1 / tracked if self.momentum is None else self.momentum
        # Copies: who asked for the arrays before may keep them.
        mean, var = self.running_mean.copy(), self.running_var.copy()
        bad = _core.update_running(saved.statistics, mean, var, 0, momentum, False, True)
        if bad >= 0:
            self.nonfinite_batches += 1
            if self.nonfinite_batches == 1:
                batch = saved.moments
                warnings.warn(
                    f"the batch's statistics are not finite (channel {bad}: mean "
                    f"{batch.mean[bad]}, variance {batch.var()[bad]}); the running statistics "
                    "skip this batch. Further ones are counted in nonfinite_batches without a "
                    "warning.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return
        self.running_mean, self.running_var = mean, var
        if saved.weights is None or saved.statistics[0, 0].any():
            self.num_batches_tracked = tracked

    def backward(self, grad_y: ArrayLike) -> Array:
        """Gradient with respect to the input of the last call; sets `grad_gamma`, `grad_beta`.

        Parameters
        ----------
        grad_y : (N, C, *S)
            ∂L/∂y of the last call's output.

        Returns
        -------
        (N, C, *S)
            ∂L/∂x. If the call used the statistics of the batch, it includes their gradient.

        Raises
        ------
        BatchNormError
            There was no call.
        ShapeError, DTypeError
            `grad_y` does not fit that call's input.
        """
        if self._saved is None:
            raise BatchNormError("backward needs a forward pass first: call the layer on x.")
        grad_x, self.grad_gamma, self.grad_beta = functional.batch_norm_backward(
            grad_y, self._saved
        )
        return grad_x

    def train(self, mode: bool = True) -> BatchNorm:
        """Set training mode, or evaluation mode with ``mode=False``; return the layer."""
        if not isinstance(mode, (bool, np.bool_)):
            raise ArgumentError(f"mode must be True or False, got {mode!r}; or call eval().")
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Set evaluation mode; return the layer."""
        return self.train(False)

    def set_population(self, moments: Moments) -> None:
        """Replace the running averages by the statistics of a whole data set.

        Parameters
        ----------
        moments : Moments
            Moments of the layer's input over the data set, e.g. merged over its batches. The
            unbiased variance is stored.

        Raises
        ------
        ShapeError
            `moments` does not have `num_features` channels.
        ArgumentError
            `moments` is no Moments or of fewer than two values per channel, its statistics are not
            finite, a variance is zero and so is `eps`, or the layer was created with
            ``track_running_stats=False``.
        """
        if not isinstance(moments, Moments):
            raise ArgumentError(
                f"moments must be Moments, got {type(moments).__name__}. Measure the data by "
                f"Moments.of(x, channel_axis={self.channel_axis})."
            )
        if self.running_mean is None:
            raise ArgumentError(
                "set_population needs a layer with running statistics; build it with "
                "track_running_stats=True."
            )
        if moments.mean.shape != (self.num_features,):
            raise ShapeError(
                f"moments must have num_features = {self.num_features} channels, got mean of "
                f"shape {moments.mean.shape}."
            )
        if self.num_features and not np.all(moments.count > 1):
            raise ArgumentError(
                "moments must be of more than one value per channel, got count "
                f"{np.min(moments.count)}."
            )
        var = moments.var(ddof=1)
        native.check_statistics(moments.mean, var, self.eps, "moments.mean", "moments.var()")
        self.running_mean, self.running_var = moments.mean.copy(), var
        self.num_batches_tracked = 0

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and statistics, by name, ready for `numpy.savez`."""
        state: dict[str, Array] = {}
        for name in self._state_names():
            state[name] = np.array(getattr(self, name))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load parameters and statistics, all or none.

        Parameters
        ----------
        state : mapping
            From `state_dict`, or a `numpy.load` of it saved with `numpy.savez`.

        Raises
        ------
        ArgumentError
            A name is missing or unknown, or running_var is negative or not finite.
        ShapeError, DTypeError
            A value has the wrong shape or type.
        """
        names = self._state_names()
        if not hasattr(state, "keys"):
            raise ArgumentError(
                f"state must be a mapping of names to arrays, got {type(state).__name__}. Pass "
                "what state_dict returned, or numpy.load of it."
            )
        given = list(state.keys())
        missing = [n for n in names if n not in given]
        unknown = [n for n in given if n not in names]
        if missing or unknown:
            raise ArgumentError(
                f"state must have exactly the entries {names}; missing {missing}, "
                f"unknown {unknown}. Are affine and track_running_stats those of the saved layer?"
            )
        loaded: dict[str, Any] = {}
        for name in names:
            value: Any = np.asanyarray(state[name])
            if name == "num_batches_tracked":
                if value.shape != () or value.dtype.kind not in "iu" or value < 0:
                    raise ArgumentError(
                        f"num_batches_tracked must be one integer ≥ 0, got {value!r}."
                    )
                loaded[name] = int(value)
                continue
            if value.dtype == "V2" and native.is_bfloat16(self.dtype):
                value = value.view(self.dtype)  # .npz stores only the bits of bfloat16
            checked = native.per_channel(value, self.num_features, name, self.channel_axis)
            assert checked is not None
            own = self.dtype if name in ("gamma", "beta") else np.dtype(np.float64)
            loaded[name] = checked.astype(own)
        if "running_var" in loaded:
            native.check_finite(loaded["running_mean"], "running_mean")
            native.check_variance(loaded["running_var"], "running_var")
        for name, value in loaded.items():
            setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """All but the last batch, which is of no use to a copy and may be large."""
        return {**self.__dict__, "_saved": None}

    def _state_names(self) -> list[str]:
        names = ["gamma", "beta"] if self.affine else []
        if self.track_running_stats:
            names += ["running_mean", "running_var", "num_batches_tracked"]
        return names

    def __repr__(self) -> str:
        """The constructor's arguments."""
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, "
            f"channel_axis={self.channel_axis}, dtype={self.dtype.name})"
        )
