"""The benchmark: ours beside NumPy, PyTorch and JAX, and beside a plain copy.

``cases`` says what is measured, ``providers`` who is, ``harness`` how, ``report`` what came out.
"""

from batchnorm.bench.cases import QUICK_SHAPES, Case, choose_ops, parse_shape
from batchnorm.bench.harness import Plan, Results, run, steps
from batchnorm.bench.providers import PROVIDERS, choose
from batchnorm.bench.report import claims, prepare_directory, show, write

__all__ = [
    "PROVIDERS",
    "QUICK_SHAPES",
    "Case",
    "Plan",
    "Results",
    "choose",
    "choose_ops",
    "claims",
    "parse_shape",
    "prepare_directory",
    "run",
    "show",
    "steps",
    "write",
]
