"""What is measured: shapes, layouts, operations, their inputs, and the exact answer to each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import ArgumentError

Op: TypeAlias = Literal["forward", "inference", "backward"]
Float32: TypeAlias = NDArray[np.float32]
Arrays: TypeAlias = dict[str, NDArray[Any]]

OPS: tuple[Op, ...] = get_args(Op)

#: From a batch that fits in the second-level cache to one that fits in no cache; the 4-D shapes
#: are feature maps from the first, the middle and the last stage of an image network.
SHAPES: tuple[tuple[int, ...], ...] = (
    (256, 1024),
    (8192, 1024),
    (64, 64, 56, 56),
    (32, 256, 14, 14),
    (64, 2048, 7, 7),
)
QUICK_SHAPES: tuple[tuple[int, ...], ...] = ((256, 1024), (32, 256, 14, 14))

ACCURACY_SHAPE: tuple[int, ...] = (32, 64, 28, 28)
OFFSETS: tuple[float, ...] = (0.0, 1e2, 1e4, 1e6)

EPS = 1e-5

_SPATIAL_LETTERS = {0: "", 1: "L", 2: "HW", 3: "DHW"}

#: How many arrays of the size of x an operation must read and write at the very least, when each
#: of them is too large for any cache: x in, y out; and x, grad_y in, grad_x out. Vectors over the
#: channels are left out. A plain copy moves 2.
ARRAYS_MOVED: dict[Op, int] = {"forward": 2, "inference": 2, "backward": 3}


@dataclass(frozen=True)
class Case:
    """One operation on one array: (N, C, *S), or in memory (N, *S, C) with `channels_last`."""

    op: Op
    shape: tuple[int, ...]
    channels_last: bool = False

    @property
    def layout(self) -> str:
        """Order of the axes in memory, such as ``NC``, ``NCHW`` or ``NHWC``."""
        spatial = _SPATIAL_LETTERS[len(self.shape) - 2]
        return f"N{spatial}C" if self.channels_last else f"NC{spatial}"

    @property
    def shape_label(self) -> str:
        """(N, C, *S) as text, such as ``64x64x56x56``."""
        return "x".join(map(str, self.shape))

    @property
    def label(self) -> str:
        """Shape and layout as text."""
        return f"{self.shape_label} {self.layout}"

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in the array as it lies in memory."""
        return -1 if self.channels_last else 1

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape of the array as it lies in memory."""
        n, channels, *spatial = self.shape
        return (n, *spatial, channels) if self.channels_last else self.shape

    @property
    def nbytes(self) -> int:
        """Bytes of x in float32."""
        return math.prod(self.shape) * 4

    @property
    def floor_copies(self) -> float:
        """Plain copies of x, 2 arrays each, that move as many bytes as the operation has to."""
        return ARRAYS_MOVED[self.op] / 2

    @property
    def floor_bytes(self) -> int:
        """Bytes the operation has to move between memory and the processor at the very least."""
        return ARRAYS_MOVED[self.op] * self.nbytes


@dataclass(frozen=True)
class Inputs:
    """What every provider is given: the same arrays, in the same memory.

    `x` and `grad_y` have the case's shape in memory, the others are (C,); all are C-contiguous
    float32. `mean` and `var` are the population's, for inference.
    """

    case: Case
    x: Float32
    grad_y: Float32
    gamma: Float32
    beta: Float32
    mean: Float32
    var: Float32
    eps: float = EPS


def aligned_empty(shape: Sequence[int]) -> Float32:
    """Allocate a C-contiguous float32 array on a 64-byte boundary.

    NumPy promises 16 bytes, while PyTorch and JAX allocate on 64: on NumPy's boundary they would
    be timed at vector loads that straddle cache lines, which their users do not see.
    """
    nbytes = math.prod(shape) * 4
    buffer = np.empty(nbytes + 64, dtype=np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(np.float32).reshape(tuple(shape))


def make_inputs(case: Case, *, seed: int = 0, offset: float = 0.0) -> Inputs:
    """Draw the inputs of a case: x and grad_y from N(`offset`, 1) and N(0, 1).

    The values depend on the shape and the seed alone, so both layouts hold the same numbers.
    """
    rng = np.random.default_rng([seed, *case.shape])
    channels = case.shape[1]

    def normal(mean: float) -> Float32:
        values = rng.standard_normal(case.shape, dtype=np.float32)
        array = aligned_empty(case.array_shape)
        # Added in float64: in float32 the sum of two roundings would not be N(mean, 1) rounded.
        np.add(
            np.moveaxis(values, 1, case.channel_axis),
            np.float64(mean),
            out=array,
            casting="same_kind",
        )
        return array

    def uniform(low: float, high: float) -> Float32:
        return rng.uniform(low, high, channels).astype(np.float32)

    return Inputs(
        case=case,
        x=normal(offset),
        grad_y=normal(0.0),
        gamma=uniform(0.5, 1.5),
        beta=uniform(-1.0, 1.0),
        mean=(offset + rng.uniform(-0.5, 0.5, channels)).astype(np.float32),
        var=uniform(0.5, 1.5),
    )


def exact(inputs: Inputs) -> Arrays:
    """Compute a case's answer in float64 by the paper's equations (`batchnorm.reference`).

    Returns ``y`` for forward and inference; ``grad_x``, ``grad_gamma``, ``grad_beta`` for backward.
    """
    from batchnorm import reference

    case, affine = inputs.case, (inputs.gamma, inputs.beta)
    how = (inputs.eps, case.channel_axis)
    if case.op == "inference":
        y = reference.batch_norm_inference(inputs.x, inputs.mean, inputs.var, *affine, *how)
        return {"y": y}
    y, cache = reference.batch_norm(inputs.x, *affine, *how)
    if case.op == "forward":
        return {"y": y}
    return named("backward", reference.batch_norm_backward(inputs.grad_y, cache))


def named(op: Op, result: Any) -> Arrays:
    """Give the arrays of a result their names."""
    if op == "backward":
        return dict(zip(("grad_x", "grad_gamma", "grad_beta"), result, strict=True))
    return {"y": result}


def largest_error(answer: Arrays, expected: Arrays) -> float:
    """Largest ``|y - y_exact|``; of gradients, largest ``norm(g - g_exact) / norm(g_exact)``.

    NaN if anything is NaN, and infinity if an array is missing or has another shape.
    """
    errors = []
    for name, wanted in expected.items():
        got = answer.get(name)
        if got is None or got.shape != wanted.shape:
            return math.inf
        difference = np.abs(got.astype(np.float64) - wanted)
        if name == "y":
            errors.append(float(difference.max(initial=0.0)))
        else:
            errors.append(float(np.linalg.norm(difference) / np.linalg.norm(wanted)))
    # max() would lose a NaN that does not come first.
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def layouts_of(shape: Sequence[int]) -> tuple[bool, ...]:
    """Values of `Case.channels_last` that tell arrays of this shape apart."""
    return (False, True) if len(shape) > 2 else (False,)


def make_cases(shapes: Iterable[tuple[int, ...]], ops: Iterable[Op]) -> list[Case]:
    """Every operation on every shape in every layout, one operation after another."""
    shapes = tuple(shapes)
    return [
        Case(op, shape, channels_last)
        for op in ops
        for shape in shapes
        for channels_last in layouts_of(shape)
    ]


def pick(what: str, names: Iterable[str] | None, known: Sequence[str]) -> list[str]:
    """Those of `known` that are in `names`, in the order of `known`; all of them for None."""
    wanted = list(known if names is None else names)
    for name in wanted:
        if name not in known:
            raise ArgumentError(
                f"{what} must be among {', '.join(known)}, got {name!r}. "
                f"Correct the name or leave the choice out to measure all of them."
            )
    return [name for name in known if name in wanted]


def choose_ops(names: Iterable[str] | None) -> tuple[Op, ...]:
    """Operations by name, in the order of `OPS`; all of them for None."""
    return tuple(op for op in OPS if op in pick("ops", names, OPS))


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape such as ``64x64x56x56``."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) - 2 not in _SPATIAL_LETTERS or min(shape) < 1:
        raise ArgumentError(
            f"a shape must be 2 to 5 positive integers joined by x, N x C x spatial axes, "
            f"got {text!r}. Write it as in 256x1024 or 64x64x56x56."
        )
    if math.prod(shape) == shape[1]:
        raise ArgumentError(
            f"a shape must have at least 2 values per channel, got {text!r}, which has 1. "
            f"Give it a larger batch, as in 2x{shape[1]}."
        )
    return shape
