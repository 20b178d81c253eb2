"""The state of a batch norm, and its way into and out of a framework's arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from batchnorm import native
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, ShapeError
from batchnorm.native import Array, Float64

from .frameworks import Framework, Path, check_depth, find

__all__ = ["BatchNormState", "Translation", "read", "translate", "write"]

#: JAX's counters are int32, and count one further.
MOST_BATCHES = 2**31 - 2
#: Of NumPy 1.
MOST_AXES = 32


@dataclass(frozen=True, eq=False)
class BatchNormState:
    """What a batch norm holds, in no framework's convention.

    Parameters
    ----------
    mean, var : (C,)
        The statistics that evaluation uses, as they are stored.
    momentum : float
        Weight of the **new** value in the running statistics, from 0 to 1.
    eps : float
        Added to the variance, inside the root.
    gamma, beta : (C,)
        Scale and shift; None if the layer has none.
    channel_axis : int
        Axis of the channels in the layer's batches; None if it was not chosen, or is not known.
    unbiased : bool
        Whether training averages the unbiased variances of batches.
    count : int
        Number of training batches so far; None if it is not known.

    Raises
    ------
    ShapeError, DTypeError
        An array is not (C,), or not real numbers of at most 64 bits.
    ArgumentError
        A statistic is not finite, a variance or `eps` is negative, both are zero, `momentum`
        is no number from 0 to 1, or `channel_axis` or `count` no integer that can be one.
    """

    mean: Array
    var: Array
    momentum: float
    eps: float
    gamma: Array | None = None
    beta: Array | None = None
    channel_axis: int | None = None
    unbiased: bool = False
    count: int | None = None

    def __post_init__(self) -> None:
        """Check all values."""
        shape = np.shape(self.mean)
        for name in ("mean", "var", "gamma", "beta"):
            if (values := getattr(self, name)) is None and name in ("gamma", "beta"):
                continue
            array = native.as_real(values, name)
            if array.ndim != 1 or array.shape != shape:
                raise ShapeError(
                    f"{name} must have shape (C,) like mean, which has {shape}, got {array.shape}. "
                    "Are all arrays of one layer?"
                )
            if array.dtype.kind == "b":
                raise DTypeError(f"{name} must be real numbers, got {array.dtype}.")
            if array.dtype.itemsize > 8:
                raise DTypeError(
                    f"{name} must be of a type that frameworks have, got {array.dtype}. "
                    f"Convert it, e.g. {name}.astype(numpy.float64)."
                )
            native_order = array.dtype.newbyteorder("=")
            object.__setattr__(self, name, array.astype(native_order, copy=False))
        object.__setattr__(self, "momentum", _check_momentum(self.momentum))
        object.__setattr__(self, "eps", native.check_eps(_as_decimal(self.eps, "eps")))
        for name in ("channel_axis", "count"):
            object.__setattr__(self, name, _check_choice(name, getattr(self, name)))
        native.check_statistics(self.mean.astype(np.float64), self.var.astype(np.float64), self.eps)


@dataclass(frozen=True, eq=False)
class Translation:
    """What `translate` returns.

    Parameters
    ----------
    arrays : dict
        As the target names them: nested for Flax and Haiku, flat for the others.
    settings : dict
        For each layer of the target the arguments by which it has to be built.
    left_out : list of str
        Names of the source's arrays that are of no batch norm.
    notes : list of str
        What differs from the source once training goes on, and what was added.
    """

    arrays: dict[Any, Any]
    settings: dict[str, dict[str, Any]]
    left_out: list[str]
    notes: list[str]

    def summary(self) -> list[str]:
        """How to build the layers, and which arrays were left out, in lines of text."""
        groups: dict[str, list[str]] = {}
        for name, chosen in self.settings.items():
            text = ", ".join(f"{key}={value!r}" for key, value in chosen.items())
            groups.setdefault(text, []).append(name or "the layer")
        lines = []
        for text, names in groups.items():
            lines.append(f"build {'them' if len(groups) == 1 else ', '.join(names)} with {text}")
        if number := len(self.left_out):
            arrays = f"{number} other array{'s' * (number != 1)}"
            lines.append(f"left out {arrays}: {_some(self.left_out, 20)}")
        return lines

    def __repr__(self) -> str:
        """The layers, the summary and the notes, but not the arrays."""
        lines = [f"Translation of batch norms: {_some(self.settings, 20)}", *self.summary()]
        return "\n".join([*lines, *(f"note: {text}" for text in self.notes)])


def translate(
    arrays: Mapping[Any, Any],
    source: str,
    target: str,
    *,
    momentum: float | None = None,
    eps: float | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    names: Mapping[str, str] | None = None,
    channel_axis: int | None = None,
    ndim: int | None = None,
    count: int | None = None,
) -> Translation:
    """Translate the batch norms of a network from one framework to another.

    Evaluation gives the same there: statistics, scale and shift are carried as they are stored.

    Parameters
    ----------
    arrays, source, momentum, eps, settings
        As for `read`: momentum is meant as the **source** means it.
    target, channel_axis, ndim, count
        As for `write`.
    names : mapping of str to str
        Names of layers in the source, and what they are called in the target; others keep theirs,
        with the target's separator. "" is a layer that is the whole model.

    Returns
    -------
    Translation

    Raises
    ------
    BatchNormError
        As `read` and `write`; or a name in `names` is of no layer, or two become one.
    """
    old, new = find(source), find(target)
    names = {} if names is None else names
    if not isinstance(names, Mapping):
        raise ArgumentError(f"names must be a dict of names of layers, got {names!r}.")
    states, left_out = read(arrays, source, momentum=momentum, eps=eps, settings=settings)
    if unknown := [name for name in names if name not in states]:
        raise ArgumentError(
            f"names must be of layers, got {unknown[0]!r}. The batch norms are {_some(states)}."
        )
    renamed: dict[str, BatchNormState] = {}
    origins: dict[str, str] = {}
    for name, state in states.items():
        parts = filter(None, name.split(old.separator))
        called = names.get(name, new.separator.join(parts))
        if called in renamed:
            raise ArgumentError(
                f"two layers would be called {called!r}: {origins[called]!r} and {name!r}. "
                "Rename one."
            )
        renamed[called], origins[called] = state, name
    written, built = write(renamed, target, channel_axis=channel_axis, ndim=ndim, count=count)
    return Translation(written, built, left_out, _notes(renamed, old, new, channel_axis))


def read(
    arrays: Mapping[Any, Any],
    source: str,
    *,
    momentum: float | None = None,
    eps: float | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, BatchNormState], list[str]]:
    """Find the batch norms among the arrays of a network.

    A layer is recognized by the names of its statistics and by their shapes, which are those of
    one axis.

    Parameters
    ----------
    arrays : mapping
        Arrays by name, flat or nested: a state dict of PyTorch, Keras's variables by their `path`,
        Flax's variables, Haiku's ``{"params": params, "state": state}``.
    source : str
        A name in `FRAMEWORKS`.
    momentum, eps : float
        As the layers were built, in the framework's own convention, since no arrays tell them.
    settings : mapping
        Layers with a momentum or eps of their own, by name: ``{"bn": {"momentum": 0.1}}``. They may
        have a channel_axis too.

    Returns
    -------
    states : dict of str to BatchNormState
        By the names of the layers.
    left_out : list of str
        Names of all other arrays.

    Raises
    ------
    ArgumentError
        There is no batch norm; two arrays have the same name; momentum or eps is not known, or
        known already; a layer holds what cannot be carried; or a value as in `BatchNormState`.
    ShapeError, DTypeError
        As in `BatchNormState`.
    """
    framework = find(source)
    given = {"momentum": momentum, "eps": eps}
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise ArgumentError(f"settings must be a dict by names of layers, got {settings!r}.")
    flat = _flatten(arrays, framework)
    layers = {framework.separator.join(layer): layer for layer in _layers(flat, framework)}
    if not layers:
        raise ArgumentError(
            f"arrays must hold batch norms of {framework.title}, that is arrays named "
            f"{framework.paths['mean']} and {framework.paths['var']}, but hold "
            f"{_some(map(framework.separator.join, flat))}. Are they of another framework, or "
            "folded already?"
        )
    for name, own in settings.items():
        known = isinstance(own, Mapping) and own.keys() <= {*given, "channel_axis"}
        if name not in layers or not known:
            raise ArgumentError(
                "settings must map names of layers to momentum, eps and channel_axis, got "
                f"{name!r}: {own}. The batch norms are {_some(layers)}."
            )
    states: dict[str, BatchNormState] = {}
    used: set[Path] = set()
    for name, layer in layers.items():
        places = {role: framework.place(role, layer) for role in framework.paths}
        with _naming(name):
            _refuse_variants(layer, flat, source)
            found = {r: _as_array(flat[place], r) for r, place in places.items() if place in flat}
            states[name] = _state(found, framework, {**given, **settings.get(name, {})})
        used.update(places.values())
    left_out = [framework.separator.join(path) for path in flat if path not in used]
    for option, value in given.items():
        if value is not None and all(option in settings.get(name, {}) for name in states):
            raise ArgumentError(f"{option} is known for each layer, but got {value}. Leave it out.")
    return states, left_out


def count_arrays(arrays: Mapping[Any, Any], source: str) -> int:
    """The number of arrays that are of batch norms, if they are named as `source` names them."""
    framework = find(source)
    flat = _flatten(arrays, framework)
    places = [framework.place(r, a) for a in _layers(flat, framework) for r in framework.paths]
    return sum(place in flat for place in places)


def _flatten(arrays: Mapping[Any, Any], framework: Framework) -> dict[Path, Any]:
    if not isinstance(arrays, Mapping):
        raise ArgumentError(
            f"arrays must be a dict of arrays by name, got {type(arrays).__name__}. Pass "
            "net.state_dict() of PyTorch, {v.path: v for v in model.variables} of Keras."
        )
    return framework.flatten(arrays)


def _layers(flat: Mapping[Path, Any], framework: Framework) -> list[Path]:
    """The layers whose arrays these are."""
    found = {path: framework.layer_of("mean", path) for path in flat}
    return [
        layer
        for path, layer in found.items()
        if layer is not None and framework.place("var", layer) in flat and _is_one_axis(flat[path])
    ]


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Name the layer in errors."""
    try:
        yield
    except BatchNormError as error:
        raise type(error)(f"{layer or 'the layer'}: {error}") from error


def _is_one_axis(values: Any) -> bool:
    """Whether there is one axis, or but one that is longer than 1, as in Haiku."""
    shape = np.shape(values)
    return len(shape) == 1 or (len(shape) > 1 and sum(length != 1 for length in shape) <= 1)


def _as_array(values: Any, role: str) -> Array:
    try:
        np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # tensors elsewhere, or with gradients
        raise DTypeError(
            f"{role} must be an array that NumPy reads, got {type(values).__name__} ({error})."
        ) from error
    return native.as_real(values, role)


def _refuse_variants(layer: Path, flat: Mapping[Path, Any], source: str) -> None:
    if source == "nnx" and layer[:1] == ("batch_stats",):
        raise ArgumentError("these are variables of Flax linen. Pass source='flax'.")
    if source == "keras" and (*layer, "renorm_mean") in flat:
        raise ArgumentError(
            "no other framework has batch renormalization. Leave out the arrays of this layer."
        )


def _state(
    values: dict[str, Array], framework: Framework, settings: Mapping[str, Any]
) -> BatchNormState:
    defaults = {"momentum": framework.default_momentum, "eps": framework.default_eps}
    if lacking := [name for name in defaults if settings[name] is None]:
        raise ArgumentError(
            f"{' and '.join(lacking)} must be given as the layer was built, since its arrays do "
            f"not tell. By default in {framework.title}: "
            + ", ".join(f"{name} {defaults[name] or '(none)'}" for name in lacking)
            + "."
        )
    momentum = _check_momentum(settings["momentum"])
    optional = {"gamma", "beta"} if framework.debiased else {"gamma", "beta", "count"}
    if missing := framework.paths.keys() - values.keys() - optional:
        names = ", ".join(sorted(framework.paths[role] for role in missing))
        raise ArgumentError(f"must have {names} as well. Save the whole state.")
    if "first" in values and values["first"].any():
        raise ArgumentError("has seen no batch yet, so it has no statistics. Train it first.")
    count = _as_count(values["count"]) if "count" in values else None
    if framework.debiased and count == 0 and not values["var"].all():
        raise ArgumentError("has seen no batch yet, so it has no statistics. Train it first.")
    axis = settings.get("channel_axis")
    if framework.axis == "data_format":  # arrays are (1, ..., C, ..., 1)
        shape = values["mean"].shape
        long = [k for k, length in enumerate(shape) if length != 1]
        axis = None if not long else -1 if long[0] == len(shape) - 1 else long[0]
        values = {k: v.reshape(-1) if _is_one_axis(v) else v for k, v in values.items()}
    elif framework.debiased and count:  # arrays are not yet divided
        for role in ("mean", "var"):
            share = _share(values[role], momentum, count)
            values[role] = _wide(values[role].astype(np.float64) / share, values[role])
    return BatchNormState(
        mean=values["mean"],
        var=values["var"],
        gamma=values.get("gamma"),
        beta=values.get("beta"),
        momentum=momentum if framework.momentum_of_new else _complement(momentum),
        eps=settings["eps"],
        channel_axis=axis,
        unbiased=framework.unbiased,
        count=count,
    )


def write(
    states: Mapping[str, BatchNormState],
    target: str,
    *,
    channel_axis: int | None = None,
    ndim: int | None = None,
    count: int | None = None,
) -> tuple[dict[Any, Any], dict[str, dict[str, Any]]]:
    """Write batch norms as the arrays and settings of a framework.

    Parameters
    ----------
    states : mapping of str to BatchNormState
        By the names of the layers in the target.
    target : str
        A name in `FRAMEWORKS`.
    channel_axis : int
        Axis of the channels in the target's batches, where its layers have a choice; by default
        that of each state, or if it has none, the default of the target.
    ndim : int
        Number of axes of the batches, on which the shapes of Haiku's arrays depend.
    count : int
        Number of training batches so far, for frameworks that count them; by default that of each
        state. Haiku and Equinox debias by it, so it decides how much the next batch weighs.

    Returns
    -------
    arrays : dict
        Copies, named and shaped as the framework does; nested for Flax and Haiku. Statistics that
        Haiku and Equinox debias are float32, or float64 if the state's are.
    settings : dict
        For each layer the arguments of its constructor.

    Raises
    ------
    ArgumentError
        Something that the target needs is neither given nor known; something is given that it
        does not have, or that cannot be; a layer's name leads through an array of another; or
        debiasing would make a statistic too small for its type.
    """
    framework = find(target)
    choices = {
        "channel_axis": (channel_axis, framework.axis is not None),
        "ndim": (ndim, framework.axis == "data_format"),
        "count": (count, "count" in framework.paths),
    }
    for option, (value, has) in choices.items():
        if value is not None and not has:
            raise ArgumentError(f"{framework.title} takes no {option}, got {value}. Leave it out.")
        _check_choice(option, value)
    arrays: dict[Path, Any] = {}
    settings = {}
    for name, state in states.items():
        if not isinstance(name, str):
            raise ArgumentError(f"names of layers must be strings, got {name!r}.")
        chosen = state.channel_axis if channel_axis is None else channel_axis
        axis = framework.channel_axis if chosen is None else chosen
        with _naming(name):
            values = _values(state, framework, state.count if count is None else count)
            if framework.axis == "data_format":
                shape = _shape(axis, ndim)
                values = {k: v.reshape(shape) if v.ndim else v for k, v in values.items()}
        layer = framework.split(name) if name else ()
        check_depth(layer)
        arrays |= {framework.place(role, layer): value for role, value in values.items()}
        settings[name] = _settings(state, framework, values.keys(), axis)
    return framework.unflatten(arrays), settings


def _values(state: BatchNormState, framework: Framework, count: int | None) -> dict[str, Array]:
    """The arrays of a layer by their roles."""
    gamma, beta = state.gamma, state.beta
    if _has_one_more(state, framework):
        gamma = np.ones_like(state.mean) if gamma is None else gamma
        beta = np.zeros_like(state.mean) if beta is None else beta
    arrays = {"gamma": gamma, "beta": beta, "mean": state.mean, "var": state.var}
    found = {role: np.array(array) for role, array in arrays.items() if array is not None}
    if "first" in framework.paths:
        found["first"] = np.array(False)
    if not framework.debiased:
        if "count" in framework.paths and count is not None:
            found["count"] = np.array(count, np.int64)
        return found
    if count is None or not 1 <= count <= MOST_BATCHES:
        raise ArgumentError(
            f"count must be the number of training batches so far, from 1 to {MOST_BATCHES}, got "
            f"{count}. {framework.title} divides its averages by 1 − momentum^count; a large count "
            "makes them plain ones, as in PyTorch, Keras and Flax."
        )
    # Errors that evaluation could not tell: of x − mean beside √(var + ε), and of var + ε.
    scale = found["var"].astype(np.float64) + state.eps
    for role, beside in (("mean", np.sqrt(scale)), ("var", scale)):
        values = found[role].astype(np.float64)
        share = _share(found[role], _complement(state.momentum), count)
        found[role] = _wide(values, found[role])
        hidden = _wide(values * share, found[role])
        error = abs(hidden.astype(np.float64) / share - values)
        wrong = error > 2 * np.finfo(hidden.dtype).eps * np.maximum(abs(values), beside)
        if wrong.any():
            raise ArgumentError(
                f"{role} must not be too small for {hidden.dtype} once it is multiplied by "
                f"{share}, which undoes debiasing, got {native.in_channel(values, wrong)}. "
                "Give a larger count, or statistics of float64."
            )
        found[f"hidden_{role}" if f"hidden_{role}" in framework.paths else role] = hidden
    for role in framework.paths.keys() & {"count", "count_var"}:
        found[role] = np.array(count, np.int32)
    return found


def _has_one_more(state: BatchNormState, framework: Framework) -> bool:
    """Whether the framework has scale or shift where the state has none."""
    has = (state.gamma is not None, state.beta is not None)
    together = framework.scale == framework.shift
    return together and not all(has) and (any(has) or framework.scale is None)


def _shape(axis: int, ndim: int | None) -> list[int]:
    """The shape of Haiku's arrays."""
    if ndim is None:
        raise ArgumentError(f"ndim must be the number of axes of a batch, such as 4, got {ndim}.")
    if axis not in (1, -1, ndim - 1):
        raise ArgumentError(
            f"channel_axis must be 1 or -1, which are Haiku's data formats, got {axis}."
        )
    shape = [1] * ndim
    shape[axis] = -1
    return shape


def _settings(
    state: BatchNormState, framework: Framework, roles: Iterable[str], axis: int
) -> dict[str, Any]:
    momentum = state.momentum if framework.momentum_of_new else _complement(state.momentum)
    found: dict[str, Any] = {framework.momentum: momentum, framework.eps: state.eps}
    for role, option in (("gamma", framework.scale), ("beta", framework.shift)):
        if option is not None:
            found[option] = role in roles
    if framework.axis == "data_format":
        found["data_format"] = "channels_first" if axis == 1 else "channels_last"
    elif framework.axis is not None:
        found[framework.axis] = axis
    return found


def _notes(
    states: Mapping[str, BatchNormState],
    old: Framework,
    new: Framework,
    channel_axis: int | None,
) -> list[str]:
    notes = []
    if old.unbiased != new.unbiased:
        kinds = ("unbiased", "biased") if new.unbiased else ("biased", "unbiased")
        notes.append(
            "variances are kept as stored, so evaluation is the same; training goes on with "
            f"{kinds[0]} variances of batches, those of {old.title} were {kinds[1]}"
        )
    if old.debiased != new.debiased:
        first, second = (old, new) if old.debiased else (new, old)
        notes.append(
            f"{first.title} debiases its averages, {second.title} does not: after few batches the "
            "next one weighs more there"
        )
    if "first" in new.paths and new is not old:
        notes.append(f"in training, {new.title} normalizes by the running statistics")
    axes = {state.channel_axis for state in states.values()}
    where = "the last axis" if new.channel_axis == -1 else f"axis {new.channel_axis}"
    if new.axis is None:
        if {old.channel_axis if axis is None else axis for axis in axes} != {new.channel_axis}:
            notes.append(f"batches of {new.title} have their channels on {where}")
    elif channel_axis is None and None in axes and old.channel_axis != new.channel_axis:
        notes.append(
            f"channels are on {where}, as is usual in {new.title}; channel_axis={old.channel_axis} "
            f"(--channel-axis {old.channel_axis}) if batches stay as in {old.title}"
        )
    if more := [name for name, state in states.items() if _has_one_more(state, new)]:
        notes.append(
            f"{new.title} has scale and shift together or not at all: in {_some(more)} the missing "
            "one was added as ones or zeros, which training would change"
        )
    if fast := [name for name, state in states.items() if state.momentum > 0.5]:
        notes.append(
            f"a new batch weighs {states[fast[0]].momentum} in {_some(fast)}: is the momentum one "
            f"of {old.title}?"
        )
    return notes


def _check_momentum(momentum: Any) -> float:
    if isinstance(momentum, (int, float, np.integer, np.floating)):
        value = _as_decimal(momentum, "momentum")
        if 0 <= value <= 1:
            return float(value)
    raise ArgumentError(
        f"momentum must be a number from 0 to 1, got {momentum!r}. For PyTorch's None, the plain "
        "average, give the one that training is to go on with."
    )


def _as_decimal(value: Any, name: str) -> Any:
    """A scalar of NumPy as the shortest decimal that its type rounds to it: 0.1 for float32's."""
    if isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name} must be a number, got {value}.")
    return float(str(value)) if isinstance(value, np.floating) else value


def _check_choice(name: str, value: Any) -> int | None:
    """An option of `write`, which must be an integer that it can be, or None."""
    least, most = {
        "channel_axis": (-MOST_AXES, MOST_AXES - 1),
        "ndim": (2, MOST_AXES),
        "count": (0, np.iinfo(np.int64).max),
    }[name]
    if value is None:
        return None
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if is_integer and least <= value <= most:
        return int(value)
    raise ArgumentError(f"{name} must be an integer from {least} to {most}, got {value!r}.")


def _complement(momentum: float) -> float:
    """1 − momentum in decimals: 0.1 for 0.9."""
    return float(1 - Decimal(repr(momentum)))


def _share(like: Array, old: float, count: int) -> Any:
    """1 − old^count, the share of batches in an average that began with zero, rounded as in JAX."""
    kind = np.result_type(like.dtype, np.float32).type
    share = 1 - np.power(kind(old), kind(count))
    if not share > 0:
        raise ArgumentError(
            f"momentum and count must leave batches a weight, got {old} of the old value after "
            f"{count}. Are they the layer's?"
        )
    return share


def _wide(values: Float64, like: Array) -> Array:
    """Averages as Equinox and Haiku store them: of float32, or float64 if they were that."""
    with np.errstate(over="ignore"):  # BatchNormState refuses infinities
        return values.astype(np.result_type(like.dtype, np.float32))


def _as_count(values: Array) -> int:
    if values.size != 1 or values.dtype.kind not in "iu":
        raise ShapeError(
            f"the count of batches must be one integer, got {values.dtype} of shape {values.shape}."
        )
    return int(values.reshape(-1)[0])


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(name or "the layer" for name in names[:most]) or "nothing") + more
