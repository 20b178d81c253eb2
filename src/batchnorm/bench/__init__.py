"""The benchmark: batchnorm beside NumPy, PyTorch and JAX, and beside a plain copy.

`batchnorm bench`:

    cases      what is measured
    providers  who is
    harness    how: checked, then timed
    report     what came out
    chart      the same as a picture

What the scripts in ``benchmarks/`` share with it:

    timing       interleaved rounds and ratios within them
    rows         the columns of every result file, and the writing of files
    worker       a process to measure in
    memory       page faults and peak memory
    environment  the machine, threads, and what other programs took
"""

from batchnorm.bench.cases import QUICK_SHAPES, Case, choose_ops, parse_shape
from batchnorm.bench.harness import Plan, Results, check_memory, run, steps
from batchnorm.bench.providers import PROVIDERS, choose
from batchnorm.bench.report import claims, show, write
from batchnorm.bench.rows import prepare_directory

__all__ = [
    "PROVIDERS",
    "QUICK_SHAPES",
    "Case",
    "Plan",
    "Results",
    "check_memory",
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
