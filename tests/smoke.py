"""A short numeric check of an installed batchnorm, with NumPy alone: `python tests/smoke.py`.

With PyTorch installed it also checks that both load one libgomp.
"""

import importlib.util
import subprocess
import sys

import numpy as np

import batchnorm
from batchnorm import _core

SHARED_LIBGOMP = """
import sys
for name in sys.argv[1:]:
    __import__(name)
import torch
import numpy, batchnorm
batchnorm.batch_norm(numpy.ones((4096, 64), "float32"))  # both make use of it
torch.ones(4096, 64).sum(0)
with open("/proc/self/maps") as maps:
    print(*{line.split()[-1] for line in maps if "libgomp" in line}, sep="\\n")
"""


def check_values(instruction_set: str) -> None:
    """Forward and backward equal the paper's equations."""
    _core.use_instruction_set(instruction_set)
    rng = np.random.default_rng(0)
    for shape, axis in (((8, 5, 7, 7), 1), ((300, 19), 1), ((6, 11, 30), -1)):
        x, grad_y = rng.normal(3, 2, shape), rng.normal(size=shape)
        gamma, beta = rng.normal(size=(2, shape[axis]))
        column = [1] * len(shape)
        column[axis] = -1
        axes = tuple(a for a in range(len(shape)) if a != axis % len(shape))
        inv_std = 1 / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
        x_hat = (x - x.mean(axes, keepdims=True)) * inv_std
        centered = grad_y - grad_y.mean(axes, keepdims=True)
        centered = centered - x_hat * (grad_y * x_hat).mean(axes, keepdims=True)
        expected = (
            gamma.reshape(column) * x_hat + beta.reshape(column),
            gamma.reshape(column) * inv_std * centered,
            (grad_y * x_hat).sum(axes),
            grad_y.sum(axes),
        )
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5), (np.float16, 3e-2)):
            y, saved = batchnorm.batch_norm(x.astype(dtype), gamma, beta, channel_axis=axis)
            grads = batchnorm.batch_norm_backward(grad_y.astype(dtype), saved)
            for got, wanted in zip((y, *grads), expected, strict=True):
                error = np.linalg.norm(got.astype(float) - wanted) / np.linalg.norm(wanted)
                assert error <= tolerance, (instruction_set, dtype, shape, error)


def libgomps(*first: str) -> set[str]:
    """The libgomp files in the memory of a process that imports `first`, then both."""
    run = subprocess.run(
        [sys.executable, "-c", SHARED_LIBGOMP, *first], check=True, capture_output=True, text=True
    )
    return set(run.stdout.split())


if __name__ == "__main__":
    for name in _core.instruction_sets():
        check_values(name)
    if importlib.util.find_spec("torch") and sys.platform == "linux" and _core.has_openmp():
        for first in ("batchnorm", "torch"):
            found = libgomps(first)
            assert len(found) == 1, found
    print("batchnorm", batchnorm.__version__, "on Python", sys.version.split()[0], "works:",
          *_core.instruction_sets())  # fmt: skip
