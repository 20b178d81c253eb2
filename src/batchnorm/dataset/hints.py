"""`hints`: what statistics say about mistakes in data, or in how they were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..native import Float64

if TYPE_CHECKING:
    from .statistics import Statistics

#: Features that a hint names; it counts the others.
NAMED = 5
#: Longest name of a feature that is written in full.
NAME_LENGTH = 40

#: Most channels of images and features of sequences that are told from other axes.
FEW = 4
#: Least height and width of images, and length of sequences, that are told from other axes.
IMAGE_SIDE, SEQUENCE_LENGTH = 8, 16
#: Greatest ratio of an image's sides.
ASPECT = 4

#: Rounding error of normalized values, in standard deviations, from which a spread counts as lost.
LOST = 0.01
#: Unit roundoff of float32 and float64.
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53
FLOAT32_MAX = float(np.finfo(np.float32).max)

#: ε of `normalize`, and the standard deviation of its result below which ε is too large.
EPS, SHRUNK = 1e-5, 0.9

#: An extreme value is an outlier if it lies `FAR` · n^(1/3) standard deviations of the other n − 1
#: values from their mean. Among n values of a Student distribution with 3 degrees of freedom, whose
#: tail is 1.1·|t|⁻³ on each side and whose standard deviation is √3, the probability of one is
#: n · 2.2 / (√3 · FAR · n^(1/3))³ = 0.42 / FAR³, or 0.04 %, for every n; it is less for normal,
#: exponential and log-normal values (σ = 1).
FAR = 10.0
#: With fewer values, the standard deviation of the others is too uncertain to tell.
ENOUGH = 100
#: If fewer of the others differ from the opposite extreme, the feature is sparse: its few values
#: besides, say, 0 are not outliers.
SPARSE = 100

#: Numbers that stand for missing values: nines, ends of integer types, and fill values of NetCDF
#: and of climate models. 999 is left out, as it is a common price and count.
CODES = np.array(
    [
        *(1.0 - 10.0**k for k in range(3, 10)),
        *(10.0**k - 1.0 for k in range(4, 10)),
        *(sign * 10.0**k for sign in (-1, 1) for k in (9, 10, 20, 30, 36)),
        *(sign * value for sign in (-1, 1) for value in (9.969209968386869e36, FLOAT32_MAX)),
        *(-(2.0**15), -(2.0**31), 2.0**31 - 1, 2.0**32 - 1, -(2.0**63), 2.0**63),
    ]
)
#: A code lies so many times as far from the mean as the opposite extreme does.
ASIDE = 3.0


@dataclass(frozen=True)
class Hint:
    """What may be wrong, and what to do about it; ``str(hint)`` is both.

    Parameters
    ----------
    kind : str
        One of axis, empty, missing, constant, float64, float32, code, outlier, scale and eps.
    what : str
        What may be wrong, in a sentence or two.
    remedy : str
        What to do if it is.
    features : tuple of int
        The features concerned; empty if it is all of them.
    """

    kind: str
    what: str
    remedy: str
    features: tuple[int, ...] = ()

    def __str__(self) -> str:
        """What may be wrong, and what to do about it."""
        return f"{self.what} {self.remedy}"


def hints(found: Statistics, *, shape: Sequence[int] | None = None) -> list[Hint]:
    """Look for mistakes in the data, or in how they were measured, that statistics give away.

    Parameters
    ----------
    found : Statistics
        Of C features. Outliers, codes for missing values and bytes of images are recognized if the
        extremes were measured.
    shape : (N, C, *S)
        Shape of the array that was measured, to see whether `channel_axis` may be wrong.

    Returns
    -------
    list of Hint
        A wrong axis, features without values, mostly missing, constant, or whose spread is lost to
        rounding, codes for missing values, outliers, images that were not divided by 255, and
        features whose variance is small beside ε. Usually empty for data in which nothing is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import dataset
    >>> x = np.array([[1.0, 7.0], [2.0, 7.0], [4.0, 7.0]])
    >>> for hint in dataset.hints(dataset.measure(x)):
    ...     print(hint)
    1 of 2 features is constant: feature 1. Normalization makes it 0; leave it out.
    """
    axis = None if shape is None else axis_hint(shape, found.channel_axis)
    rules = (_empty, _missing, _constant, _lost, _codes_and_outliers, _scale, _eps)
    several = [hint for rule in rules for hint in rule(found)]
    return several if axis is None else [axis, *several]


def axis_hint(shape: Sequence[int], channel_axis: int, label: str = "The array") -> Hint | None:
    """Tell from the shape of an array whether its features probably lie on another axis.

    An array (N, H, W, c) looks like channels-last images if c ≤ 4, H and W are alike, and they are
    more alike than W and c, which would be the sides of an image if axis 1 were the channels. An
    array (N, L, c) looks like sequences if c ≤ 4 and L is much larger. The reverse, images
    (N, c, H, W) measured along their last axis, is seen in the same way. Tables never have another
    axis.
    """
    axes, axis = len(shape), channel_axis % max(len(shape), 1)
    if axes < 3 or axis not in (1, axes - 1):
        return None
    # The features are probably on axis `other`; `sides` would be those of an image.
    other = axes - 1 if axis == 1 else 1
    few, many = shape[other], shape[axis]
    if few > FEW or few == 0:
        return None
    if axes == 3:
        if other == 1 or many < SEQUENCE_LENGTH:
            return None
    else:
        sides = (shape[-3], shape[-2]) if other == axes - 1 else (shape[-2], shape[-1])
        rest = (shape[-2], shape[-1]) if other == axes - 1 else (shape[1], shape[-2])
        if min(*sides, many) < IMAGE_SIDE or _aspect(sides) > ASPECT:
            return None
        if _aspect(sides) >= _aspect(rest):
            return None
    given = "-1" if other == axes - 1 else "1"
    place, its = ("its last axis", "axis 1") if given == "-1" else ("axis 1", "its last axis")
    return Hint(
        "axis",
        f"{label} has shape {tuple(shape)}, and {its} gives {many:,} features.",
        f"If {place}, of length {few}, holds the channels or features, measure with "
        f"channel_axis={given}, --channel-axis {given}.",
    )


def _aspect(sides: Sequence[int]) -> float:
    return max(sides) / max(min(sides), 1)


# ---- rules --------------------------------------------------------------------------------------


def _empty(found: Statistics) -> Iterator[Hint]:
    none = np.flatnonzero(found.count == 0)
    if none.size:
        yield _hint(
            found, none, "empty", "has no value", "have no values",
            "Normalization leaves {it} missing; leave {it} out.",
        )  # fmt: skip


def _missing(found: Statistics) -> Iterator[Hint]:
    some = np.flatnonzero((found.missing > found.count) & (found.count > 0))
    if some.size:
        shares = found.missing[some] / (found.missing[some] + found.count[some])
        yield _hint(
            found, some, "missing", "lacks more than half of its values",
            "lack more than half of their values",
            "Mean and variance are those of the rest; leave {it} out, or fill {it} first.",
            [f"{share:.0%}" for share in shares[:NAMED]],
        )  # fmt: skip


def _constant(found: Statistics) -> Iterator[Hint]:
    some = np.flatnonzero((found.moments.m2 == 0) & (found.count > 1))
    if some.size:
        yield _hint(
            found, some, "constant", "is constant", "are constant",
            "Normalization makes {it} 0; leave {it} out.",
        )  # fmt: skip


def _roundings(found: Statistics) -> Float64:
    """Return |mean| / std of each feature; 0 without a spread.

    A relative rounding error u of values becomes u · |mean| / std of a standard deviation.
    """
    std = np.sqrt(found.moments.m2 / np.maximum(found.count, 1))
    ratio: Float64 = np.divide(np.abs(found.mean), std, out=np.zeros_like(std), where=std > 0)
    return ratio


def _lost(found: Statistics) -> Iterator[Hint]:
    ratio = _roundings(found)
    nearly = ratio * FLOAT64 > LOST
    some = np.flatnonzero(nearly)
    if some.size:
        yield _hint(
            found, some, "float64", "is constant but for rounding errors",
            "are constant but for rounding errors",
            "Normalization magnifies these errors; leave {it} out.",
        )  # fmt: skip
    some = np.flatnonzero((ratio * FLOAT32 > LOST) & ~nearly)
    if some.size:
        error = ratio[some].max() * FLOAT32
        size = f"up to {error:.0%} of" if error < 1 else "more than"
        yield _hint(
            found, some, "float32", "varies too little for float32",
            "vary too little for float32",
            f"Rounding to float32 costs {size} a standard deviation. Subtract a constant, or "
            "normalize, before values become float32.",
        )  # fmt: skip


def _codes_and_outliers(found: Statistics) -> Iterator[Hint]:
    if found.extremes is None:
        return
    low, high = found.extremes
    pairs = ((low, high), (high, low))
    low_is_code, high_is_code = (_looks_like_code(found, *pair) for pair in pairs)
    low_is_far, high_is_far = (_lies_far(found, *pair) for pair in pairs)
    is_code = low_is_code | high_is_code
    some = np.flatnonzero(is_code)
    if some.size:
        value = np.where(low_is_code, low, high) * found.scale
        yield _hint(
            found, some, "code", "has an extreme value that often stands for a missing one",
            "have extreme values that often stand for missing ones",
            "If {it} does, replace it by NaN or, in .csv files, name it in nulls; then pass "
            "missing='skip', --missing skip.",
            [f"{v:.8g}" for v in value[some[:NAMED]]],
        )  # fmt: skip
    some = np.flatnonzero((low_is_far | high_is_far) & ~is_code)
    if some.size:
        value = np.where(low_is_far, low, high) * found.scale
        yield _hint(
            found, some, "outlier", "has an extreme value far from the others",
            "have extreme values far from the others",
            "Mean and variance depend on it; look for errors, or clip or transform such values.",
            [f"{v:.8g}" for v in value[some[:NAMED]]],
        )  # fmt: skip


def _looks_like_code(found: Statistics, extreme: Float64, opposite: Float64) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):  # float32, as the values may have been
        known = np.isin((extreme * found.scale).astype(np.float32), CODES.astype(np.float32))
    away = np.abs(extreme - found.mean) >= ASIDE * np.abs(opposite - found.mean)
    code: NDArray[np.bool_] = known & away & (extreme != opposite)
    return code


def _lies_far(found: Statistics, extreme: Float64, opposite: Float64) -> NDArray[np.bool_]:
    """Whether one value is an outlier beside the n − 1 others; see `FAR` and `SPARSE`."""
    n, mean, m2 = found.count, found.mean, found.moments.m2
    enough = (n >= ENOUGH) & (m2 > 0)
    with np.errstate(all="ignore"):
        # Mean and m2 of the others: a merge, Chan et al. (1983), solved for one part.
        others = (n * mean - extreme) / (n - 1)
        rest = m2 - (extreme - mean) ** 2 * n / (n - 1)
        resolution = 1e-12 * m2  # what is smaller is a rounding error of the difference
        std = np.sqrt(np.maximum(rest, resolution) / (n - 1))
        far = np.abs(extreme - others) > FAR * np.cbrt(n) * std
        # How many of the others differ from the opposite extreme, as (Σd)²/Σd² of distances d.
        shift = np.abs(others - opposite)
        shift[shift <= 2.0**-49 * np.maximum(np.abs(extreme), np.abs(opposite))] = 0
        var = np.where(rest > resolution, rest, 0) / (n - 1)
        differing = np.where(shift > 0, (n - 1) * shift**2 / (var + shift**2), 0)
        sparse = differing < np.minimum(SPARSE, n / 10)
    outlier: NDArray[np.bool_] = enough & far & ~sparse
    return outlier


def _scale(found: Statistics) -> Iterator[Hint]:
    if found.extremes is None or found.names is not None or found.scale != 1:
        return
    low, high = found.extremes[:, found.count > 0]
    most = high.max(initial=0)
    if most in (255, 65535) and low.min() >= 0 and 2 * np.count_nonzero(high == most) >= high.size:
        yield Hint(
            "scale",
            f"Values reach from {low.min():g} to {most:g}, as those of images do.",
            f"If they are divided by {most:g} before a network normalizes them, as by "
            f"torchvision's ToTensor, measure with scale={most:g}, --scale {most:g}.",
        )


def _eps(found: Statistics) -> Iterator[Hint]:
    var = found.moments.m2 / np.maximum(found.count, 1)
    std, ratio = np.sqrt(var), _roundings(found)
    # Rare values, such as a few ones among zeros, have a small variance, too, and ε is right there.
    dense = ratio > 0.1
    if found.extremes is not None:
        dense = found.extremes[1] - found.extremes[0] < 30 * std
    small = (var > 0) & (var < EPS * SHRUNK**2 / (1 - SHRUNK**2))
    some = np.flatnonzero(small & dense & (ratio * FLOAT32 <= LOST))
    if some.size:
        least = np.sqrt(var[some].min() / (var[some].min() + EPS))
        yield _hint(
            found, some, "eps", "has a small variance beside ε = 1e-5, the default of normalize",
            "have small variances beside ε = 1e-5, the default of normalize",
            f"The standard deviation becomes {least:.2g} instead of 1. Pass a smaller one, such as "
            "eps=1e-12, --eps 1e-12.",
        )  # fmt: skip


# ---- words --------------------------------------------------------------------------------------


def _hint(
    found: Statistics,
    some: NDArray[np.int64],
    kind: str,
    one: str,
    several: str,
    remedy: str,
    details: Sequence[str] | None = None,
) -> Hint:
    """Make a hint on `some` features, naming the first ones with their details."""
    named = [_name(found, int(k)) for k in some[:NAMED]]
    if details is not None:
        named = [f"{name} ({detail})" for name, detail in zip(named, details, strict=True)]
    more = some.size - len(named)
    if more:
        named.append(f"{more:,} more")
    listed = " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
    if found.names is None:
        listed = f"feature{'s' * (some.size > 1)} {listed}"
    many = f"{some.size:,} of {found.features:,} feature{'s' * (found.features > 1)}"
    return Hint(
        kind,
        f"{many} {one if some.size == 1 else several}: {listed}.",
        remedy.format(it="it" if some.size == 1 else "them"),
        tuple(some.tolist()),
    )


def _name(found: Statistics, k: int) -> str:
    if found.names is None:
        return str(k)
    name: Any = found.names[k]
    half = NAME_LENGTH // 2
    return repr(name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}")
