"""How each framework names and means what a batch norm holds: one table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batchnorm.errors import ArgumentError

__all__ = ["FRAMEWORKS", "Framework", "Path", "check_depth", "find"]

#: The names on the way to an array in a tree.
Path = tuple[str, ...]
#: Indices as JAX and Flax write them; "01" and "²" are names.
INDEX = re.compile("0|[1-9][0-9]{0,17}")
#: Far below Python's limit of recursion, far above real networks.
DEEPEST = 100


@dataclass(frozen=True)
class Framework:
    """The conventions of a framework's batch-norm layer.

    Parameters
    ----------
    title : str
        What its users call it.
    separator : str
        Stands between the parts of a flat name.
    arrays : str
        Role and path of each array of a layer; ``*`` stands for the name of the layer.
    scale, shift : str
        The constructor's arguments that switch them off: the same if both go together, None if
        neither can go.
    momentum, eps, axis : str
        The constructor calls them so; None for an axis that cannot be chosen.
    momentum_of_new : bool
        Momentum is the weight of the new value in the running statistics, not of the old one.
    unbiased : bool
        Running variances average unbiased variances of batches.
    default_momentum, default_eps : float or None
        Of the layer's constructor; None if it has none.
    debiased : bool
        Averages begin with zero and are divided by 1 − momentum^count, as in Adam.
    nested : bool
        Arrays come as dicts of dicts.
    channel_axis : int
        The axis of the channels in batches by default, or always if `axis` is None.
    """

    title: str
    separator: str
    arrays: str
    scale: str | None = None
    shift: str | None = None
    momentum: str = "momentum"
    eps: str = "eps"
    axis: str | None = None
    momentum_of_new: bool = False
    unbiased: bool = False
    default_momentum: float | None = 0.99
    default_eps: float = 1e-5
    debiased: bool = False
    nested: bool = False
    channel_axis: int = -1

    @property
    def paths(self) -> dict[str, str]:
        """The path of each array by its role."""
        return dict(pair.split("=") for pair in self.arrays.split())

    def place(self, role: str, layer: Path) -> Path:
        """The path to an array of a layer."""
        before, after = self._around(role)
        return (*before, *layer, *after)

    def layer_of(self, role: str, path: Path) -> Path | None:
        """The layer whose array `path` leads to, if it is one of this role."""
        before, after = self._around(role)
        end = len(path) - len(after)
        fits = end >= len(before) and path[: len(before)] == before and path[end:] == after
        return path[len(before) : end] if fits else None

    def _around(self, role: str) -> tuple[Path, Path]:
        before, after = self.paths[role].split("*")
        return tuple(filter(None, before.split("/"))), tuple(filter(None, after.split("/")))

    def flatten(self, tree: Mapping[Any, Any]) -> dict[Path, Any]:
        """Paths and arrays of a tree; mappings, tuples and flat names may be mixed.

        Raises
        ------
        ArgumentError
            Two arrays have the same path, or one has too many parts.
        """
        found: dict[Path, Any] = {}
        origins: dict[Path, str] = {}
        for origin, path, value in self._leaves(tree):
            if path in found:
                raise ArgumentError(
                    f"arrays{origins[path]} and arrays{origin} must have different names, got "
                    f"{self.separator.join(path)!r} for both. Leave one out, or rename it."
                )
            found[path], origins[path] = value, origin
        return found

    def _leaves(
        self, tree: Mapping[Any, Any], origin: str = "", above: Path = ()
    ) -> Iterator[tuple[str, Path, Any]]:
        for key, value in tree.items():
            place = f"{origin}[{key!r}]", (*above, *self.split(str(key)))
            check_depth(place[1])
            if isinstance(value, (tuple, list)):
                value = dict(enumerate(value))
            if isinstance(value, Mapping):
                yield from self._leaves(value, *place)
            else:
                yield *place, value

    def split(self, name: str) -> Path:
        """The parts of a name."""
        return tuple(name.split(self.separator))

    def unflatten(self, arrays: Mapping[Path, Any]) -> dict[Any, Any]:
        """The tree that the framework's own functions take.

        Raises
        ------
        ArgumentError
            The path to one array leads through another.
        """
        if not self.nested:
            return {self.separator.join(path): array for path, array in arrays.items()}
        tree: dict[Any, Any] = {}
        for path, array in arrays.items():
            keys: list[Any] = list(path)
            if self is FRAMEWORKS["haiku"]:  # names of modules hold slashes
                keys = [path[0], "/".join(path[1:-1]), path[-1]]
            elif through := [path[:k] for k in range(1, len(path)) if path[:k] in arrays]:
                raise ArgumentError(
                    f"{'/'.join(path)} must not be inside of {'/'.join(through[0])}, which is an "
                    "array. Rename one of the layers."
                )
            if self is FRAMEWORKS["nnx"]:  # indices of lists are numbers
                keys = [int(part) if INDEX.fullmatch(part) else part for part in path]
            below = tree
            for key in keys[:-1]:
                below = below.setdefault(key, {})
            below[keys[-1]] = array
        return tree


def check_depth(path: Path) -> None:
    """Raise ArgumentError if a path is deeper than trees are, which are walked recursively."""
    if len(path) > DEEPEST:
        raise ArgumentError(
            f"names of arrays must have at most {DEEPEST} parts, got {'/'.join(path[:4])}/… Is a "
            "dict inside of itself?"
        )


def find(name: str) -> Framework:
    """The framework of a name.

    Raises
    ------
    ArgumentError
        There is none.
    """
    if not isinstance(name, str) or name not in FRAMEWORKS:
        known = ", ".join(f"{name} ({row.title})" for name, row in FRAMEWORKS.items())
        raise ArgumentError(f"a framework must be one of {known}, got {name!r}.")
    return FRAMEWORKS[name]


_TORCH = "mean=*/running_mean var=*/running_var count=*/num_batches_tracked"
_OURS: dict[str, Any] = {"momentum_of_new": True, "unbiased": True, "default_momentum": 0.1}

# fmt: off
#: By the names that `translate` takes. The tests compare each with the framework itself.
FRAMEWORKS: dict[str, Framework] = {
    "torch": Framework(
        "PyTorch", ".", f"gamma=*/weight beta=*/bias {_TORCH}", "affine", "affine",
        channel_axis=1, **_OURS,
    ),
    "numpy": Framework(
        "batchnorm.BatchNorm", ".", f"gamma=*/gamma beta=*/beta {_TORCH}", "affine", "affine",
        axis="channel_axis", channel_axis=1, **_OURS,
    ),
    "keras": Framework(
        "Keras 3", "/",
        "gamma=*/gamma beta=*/beta mean=*/moving_mean var=*/moving_variance",
        "scale", "center", eps="epsilon", axis="axis", default_eps=1e-3,
    ),
    "flax": Framework(
        "Flax linen", "/",
        "gamma=params/*/scale beta=params/*/bias mean=batch_stats/*/mean var=batch_stats/*/var",
        "use_scale", "use_bias", eps="epsilon", axis="axis", nested=True,
    ),
    "nnx": Framework(
        "Flax NNX", "/", "gamma=*/scale beta=*/bias mean=*/mean var=*/var",
        "use_scale", "use_bias", eps="epsilon", axis="axis", nested=True,
    ),
    "haiku": Framework(
        "Haiku", "/",
        "gamma=params/*/scale beta=params/*/offset "
        "mean=state/*/~/mean_ema/average var=state/*/~/var_ema/average "
        "hidden_mean=state/*/~/mean_ema/hidden hidden_var=state/*/~/var_ema/hidden "
        "count=state/*/~/mean_ema/counter count_var=state/*/~/var_ema/counter",
        "create_scale", "create_offset", momentum="decay_rate", axis="data_format",
        default_momentum=None, debiased=True, nested=True,
    ),
    "equinox": Framework(
        'Equinox, mode="batch"', ".",
        "gamma=*/weight beta=*/bias mean=*/batch_state_index/0 var=*/batch_state_index/1 "
        "count=*/batch_counter",
        "channelwise_affine", "channelwise_affine", debiased=True, channel_axis=1,
    ),
    "equinox-ema": Framework(
        'Equinox, mode="ema"', ".",
        "gamma=*/weight beta=*/bias mean=*/ema_state_index/0 var=*/ema_state_index/1 "
        "first=*/ema_first_time_index",
        "channelwise_affine", "channelwise_affine", channel_axis=1,
    ),
    "onnx": Framework(
        "ONNX", "/", "gamma=*/scale beta=*/B mean=*/input_mean var=*/input_var",
        eps="epsilon", default_momentum=0.9, channel_axis=1,
    ),
}
# fmt: on
