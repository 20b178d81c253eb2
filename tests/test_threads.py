"""The same bits for any number of threads; forks and concurrent callers."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest

import batchnorm
from batchnorm import Moments, _core

needs_openmp = pytest.mark.skipif(not _core.has_openmp(), reason="built without OpenMP")

CASES = {
    "nchw": ((64, 64, 20, 20), 1),
    "nhwc": ((64, 20, 20, 64), -1),
    "features": ((5000, 64), 1),
    "long": ((3, 200_000), 0),
    "few": ((3, 200_000), 1),
}


def _everything(shape, axis, dtype, weighted):
    """Bytes of moments, y and all gradients, in evaluation too."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, shape).astype(dtype)
    g = x[::-1]
    c = shape[axis]
    gamma, beta = rng.normal(size=(2, c))
    w = None
    if weighted:
        rest = [n for a, n in enumerate(shape) if a != axis % len(shape)]
        w = np.arange(np.prod(rest)).reshape(rest) % 3
    m = Moments.of(x, channel_axis=axis, weights=w)
    y, saved = batchnorm.batch_norm(x, gamma, beta, channel_axis=axis, weights=w)
    grads = batchnorm.batch_norm_backward(g, saved)
    z = batchnorm.batch_norm_inference(x, m.mean, m.var(), gamma, beta, channel_axis=axis)
    return [a.tobytes() for a in (m.mean, m.m2, y, *grads, z)]


@needs_openmp
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "weighted"),
    [("float32", False), ("float32", True), ("float64", False), ("f2", False)],
)
def test_threads_do_not_change_a_bit(case, dtype, weighted):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    shape, axis = CASES[case]
    results = []
    for limit in (1, 2, 3):
        with threadpoolctl.threadpool_limits(limits=limit):
            assert _core.threads() == limit
            results.append(_everything(shape, axis, dtype, weighted))
    assert results[0] == results[1] == results[2]


@needs_openmp
def test_threads_do_not_change_a_bit_on_any_instruction_set(instruction_set):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    results = []
    for limit in (1, 2):
        with threadpoolctl.threadpool_limits(limits=limit):
            results.append(_everything((16, 32, 20, 20), 1, "float32", False))
    assert results[0] == results[1]


@needs_openmp
def test_threads_follow_threadpoolctl():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(limits=2):
        assert batchnorm.show_config()["threads"] == 2
    with threadpoolctl.threadpool_limits(limits=1):
        assert batchnorm.show_config()["threads"] == 1


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_openmp
@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_follow_omp_num_threads(threads):
    code = "import batchnorm; print(batchnorm.show_config()['threads'])"
    assert _python(code, OMP_NUM_THREADS=threads).stdout.strip() == threads


def test_threads_of_python_calling_at_once_get_the_same(rng):
    x, g = rng.normal(size=(2, 16, 24, 30, 30)).astype(np.float32)

    def work():
        y, saved = batchnorm.batch_norm(x, np.ones(24), np.zeros(24))
        grads = batchnorm.batch_norm_backward(g, saved)
        return [a.tobytes() for a in (y, *grads)]

    expected, results = work(), []
    workers = [
        threading.Thread(target=lambda: results.extend(work() for _ in range(5))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20
    assert all(r == expected for r in results)


def _in_child(x, expected, queue):
    queue.put(batchnorm.normalize(x).tobytes() == expected)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this platform"
)
def test_threads_survive_a_fork_after_use(rng):
    x = rng.normal(size=(32, 32, 20, 20)).astype(np.float32)
    expected = batchnorm.normalize(x).tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(x, expected, queue))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork itself
        warnings.simplefilter("ignore", RuntimeWarning)  # and so does JAX where another test had it
        child.start()
    try:
        assert queue.get(timeout=30)
        child.join(30)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.kill()
    assert batchnorm.normalize(x).tobytes() == expected


# ---- instruction sets by environment ------------------------------------------------------------


@pytest.mark.parametrize("name", _core.instruction_sets())
def test_environment_chooses_the_instruction_set(name):
    code = "import batchnorm; print(batchnorm.show_config()['instruction_set'])"
    assert _python(code, BATCHNORM_ISA=name).stdout.strip() == name


def test_environment_names_the_variable_when_its_value_is_unknown():
    done = _python("import batchnorm", BATCHNORM_ISA="mmx")
    assert done.returncode != 0
    assert "BATCHNORM_ISA must be one of" in done.stderr
    assert "'mmx'" in done.stderr
    assert "baseline" in done.stderr


def test_environment_is_ignored_when_empty():
    done = _python("import batchnorm", BATCHNORM_ISA="")
    assert done.returncode == 0, done.stderr


def test_show_config_names_version_and_machine():
    config = batchnorm.show_config()
    assert config["version"] == batchnorm.__version__
    assert config["instruction_set"] in config["instruction_sets"]
    assert config["threads"] >= 1
    assert config["last_level_cache"] > 0


def test_threads_may_call_at_once(rng):
    x = rng.normal(size=(16, 16, 40, 40)).astype(np.float32)
    expected = batchnorm.normalize(x)
    wrong = []

    def work(sign):
        for _ in range(30):
            y = batchnorm.normalize(sign * x)
            if not np.array_equal(y, sign * expected):
                wrong.append(sign)

    workers = [threading.Thread(target=work, args=(s,)) for s in (1, -1, 1, -1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
