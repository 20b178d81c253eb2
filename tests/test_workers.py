"""The pool of processes: results as they finish, errors, death, and nothing left behind."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import workers_functions as functions
from batchnorm import workers
from batchnorm.errors import ArgumentError, BatchNormError

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@pytest.fixture(scope="module")
def run():
    with workers.pool(2) as run:
        yield run


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        )
        return state.stdout.strip()[:1] not in ("", "Z")
    return False


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_pool_gives_each_task_its_result(processes):
    with workers.pool(processes) as run:
        assert dict(run(functions.square, range(10))) == {k: k * k for k in range(10)}


def test_results_come_as_they_finish(run):
    assert [task for task, _ in run(functions.sleep, [0.5, 0.0, 0.01])] == [0.0, 0.01, 0.5]


def test_processes_are_used_again_and_are_no_more_than_asked_for(run):
    first = {pid for _, pid in run(functions.where, range(20))}
    assert {pid for _, pid in run(functions.where, range(20))} <= first
    assert 1 <= len(first) <= 2
    assert os.getpid() not in first


def test_there_are_no_more_processes_than_tasks():
    with workers.pool(8) as run:
        list(run(functions.square, [1]))
        assert len(multiprocessing.active_children()) == 1 + 2  # and the pool of this module
    assert len(multiprocessing.active_children()) == 2


@pytest.mark.parametrize("processes", [0, 2])
def test_tasks_are_taken_when_there_is_a_process_for_them(processes):
    taken = []

    def tasks():
        for k in itertools.count():
            taken.append(k)
            yield k

    with workers.pool(processes) as run:
        for done, _ in enumerate(run(functions.square, tasks()), 1):
            assert len(taken) <= done + max(processes, 1)
            if done == 50:
                break


@pytest.mark.parametrize("processes", [0, 2])
def test_error_of_a_task_is_raised(processes):
    with workers.pool(processes) as run:
        with pytest.raises(ValueError, match="7 is bad"):
            list(run(functions.fail, [7]))
        assert list(run(functions.square, [3])) == [(3, 9)]  # and the pool goes on


def test_error_of_a_task_has_the_traceback_from_there_as_its_cause(run):
    with pytest.raises(ValueError, match="7 is bad") as caught:
        list(run(functions.fail, [7]))
    assert "in fail" in str(caught.value.__cause__)


def test_error_that_cannot_be_sent_is_told(run):
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        list(run(functions.fail, ["odd"]))


def test_result_that_cannot_be_sent_is_an_error(run):
    with pytest.raises(TypeError, match="pickle"):
        list(run(functions.unsendable, [0]))


def test_error_of_the_tasks_themselves_is_raised(run):
    def tasks():
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(run(functions.square, tasks()))
    assert list(run(functions.square, [3])) == [(3, 9)]


@pytest.mark.parametrize("processes", [0, 2])
def test_initializer_runs_before_the_first_task(processes):
    with workers.pool(processes, initializer=functions.begin) as run:
        assert [found for _, found in run(functions.begun, range(4))] == [True] * 4


@pytest.mark.parametrize("processes", [0, 2])
def test_error_of_the_initializer_is_raised(processes):
    with (
        workers.pool(processes, initializer=functions.cannot_begin) as run,
        pytest.raises(OSError, match="no such camera"),
    ):
        list(run(functions.square, range(3)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exit", "a worker process ended with status 3"),
        pytest.param("kill", "was killed by signal 9, perhaps for want of memory", marks=posix),
    ],
)
def test_death_of_a_process_is_one_error(run, how, said):
    with pytest.raises(workers.WorkerDied, match=said) as caught:
        list(run(functions.end, [how] * 5))
    assert isinstance(caught.value, BatchNormError)
    assert list(run(functions.square, [3])) == [(3, 9)]


def test_run_left_early_leaves_no_answer_to_the_next(run):
    for _ in run(functions.sleep, [0.0, 0.3, 0.3]):
        break
    assert sorted(run(functions.square, range(5))) == [(k, k * k) for k in range(5)]


def test_two_streams_of_tasks_share_the_processes(run):
    first, second = run(functions.square, range(5)), run(functions.sleep, [0.01] * 5)
    assert sorted(zip(first, second, strict=True)) == [((k, k * k), (0.01, 0.01)) for k in range(5)]


def test_tasks_for_which_no_process_will_be_free_are_refused():
    with workers.pool(1) as run, pytest.raises(ArgumentError, match="no process is free"):
        list(run(functions.count, [1], told=lambda task, value: list(run(functions.square, [2]))))


@pytest.mark.parametrize("processes", [0, 2])
def test_task_reports_while_it_runs(processes):
    told = []
    with workers.pool(processes) as run:
        tell = lambda task, value: told.append((task, value))  # noqa: E731
        list(run(functions.count, [3, 2], told=tell))
    assert sorted(told) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    workers.report("nobody listens")


def test_processes_have_one_thread_and_ignore_interrupts(run):
    before = dict(os.environ)
    assert list(run(functions.threads, [0])) == [(0, (1, True))]
    assert os.environ == before


def test_tasks_run_here_where_processes_are_not_allowed(monkeypatch):
    # As in the workers of Dask and of a DataLoader.
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with workers.pool(2) as run:
        assert list(run(functions.where, [0])) == [(0, os.getpid())]


def test_pool_refuses_a_negative_number_of_processes():
    with pytest.raises(ArgumentError, match="got -1"), workers.pool(-1):
        pass


def test_script_is_not_run_again():
    script = """
from batchnorm import workers
print("once")
with workers.pool(2) as run:
    print(list(run(abs, [-1])))
"""
    for arguments in (["-c", script], ["-"]):
        done = subprocess.run(
            [sys.executable, *arguments], input=script, capture_output=True, text=True, timeout=60
        )
        assert (done.stdout, done.stderr) == ("once\n[(-1, 1)]\n", "")


PARENT = f"""
import os, sys
sys.path[:0] = [{os.path.dirname(functions.__file__)!r}, sys.argv[1]]
import workers_functions as functions
from batchnorm import workers
def pool_of(initializer=None):
    with workers.pool(2, initializer=initializer) as run:
        list(run(functions.linger, [sys.argv[1]] * 2))
"""

# What a process imports before it can do anything about Ctrl-C.
SLOW = """
import os, workers_functions
if "SLOW" in os.environ:
    workers_functions.linger({folder!r})
def begin():
    pass
"""


def start(code, folder):
    return subprocess.Popen(
        [sys.executable, "-c", PARENT + code, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pids_in(folder, number):
    """The processes that linger, once there are so many."""
    wait_until(lambda: len(list(folder.glob("[0-9]*"))) == number)
    return [int(path.name) for path in folder.glob("[0-9]*")]


@posix
def test_processes_end_when_their_parent_is_killed(tmp_path):
    parent = start("pool_of()", tmp_path)
    pids = pids_in(tmp_path, 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(alive, pids)))
    assert parent.communicate()[1] == ""


@posix
@pytest.mark.parametrize(
    "code", ["pool_of()", "import slow; os.environ['SLOW'] = ''; pool_of(slow.begin)"]
)
def test_interrupt_ends_the_parent_alone_and_kills_the_processes(tmp_path, code):
    (tmp_path / "slow.py").write_text(SLOW.format(folder=str(tmp_path)))
    parent = start(code, tmp_path)
    pids = pids_in(tmp_path, 2)
    for pid in pids:  # a terminal sends it to all, and the parent may not be the first
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert all(map(alive, pids))
    os.kill(parent.pid, signal.SIGINT)
    errors = parent.communicate(timeout=30)[1]
    assert errors.count("Traceback") == 1  # of this script
    assert errors.rstrip().endswith("KeyboardInterrupt")
    wait_until(lambda: not any(map(alive, pids)))


def test_partial_functions_and_bound_arguments_travel(run):
    assert list(run(partial(pow, 2), [5])) == [(5, 32)]


def test_pool_imports_nothing_but_the_standard_library_and_numpy():
    code = (
        "import sys, batchnorm.workers; "
        "print({'torch', 'threadpoolctl', 'pyarrow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"
