"""Processes of one thread each that share a stream of tasks.

>>> from batchnorm import workers
>>> with workers.pool(2) as run:
...     sorted(run(abs, [-3, 1, -2]))
[(-3, 3), (-2, 2), (1, 1)]

Interrupted or left early, a pool kills its processes; if this process is killed, they end by
themselves. What they run must be importable: their ``__main__`` is not that of this process, whose
script would run once more, and may not even be a file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import connection, resource_tracker
from typing import Any, Protocol, TypeVar

from .errors import ArgumentError, BatchNormError

__all__ = ["Run", "WorkerDied", "pool", "report", "usable_cpus"]

Task = TypeVar("Task")
Result = TypeVar("Result")

#: For OpenMP and the libraries of linear algebra, which read them when they are loaded.
ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "BLIS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "NUMEXPR_NUM_THREADS",
    ),
    "1",
)


class WorkerDied(BatchNormError):
    """A process of a pool ended before its task did."""


class _RemoteTraceback(Exception):
    """The traceback of a task's exception, as text: its cause in this process."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class Run(Protocol):
    """What `pool` yields: ``for task, result in run(function, tasks)``."""

    def __call__(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        told: Callable[[Task, Any], None] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, as they finish."""
        ...


@contextlib.contextmanager
def pool(
    processes: int | None = None, *, initializer: Callable[[], object] | None = None
) -> Iterator[Run]:
    """Run tasks in processes that are started when there are tasks for them.

    Parameters
    ----------
    processes
        How many at the most; None for the processors that this process may use. With 0, tasks run
        one by one in this process, as they always do in daemonic processes, such as a worker of
        Dask or of a DataLoader, which may not have processes of their own.
    initializer
        Called in each process before its first task. If it raises, that task raises the same.

    Yields
    ------
    Run
        ``run(function, tasks)`` yields ``(task, function(task))`` in the order in which tasks
        finish. An element of `tasks` is taken only when a process is free for it. ``told(task,
        value)`` is called here for each ``report(value)`` there.

    Raises
    ------
    ArgumentError
        `processes` is not positive.
    WorkerDied
        A process was killed or exited.
    Exception
        What `function` raised, with the traceback from there as its cause.
    """
    most = usable_cpus() if processes is None else processes
    if most < 0:
        raise ArgumentError(f"processes must not be negative, got {processes}. 0 starts none.")
    if sys.platform == "win32":
        most = min(most, 60)  # Windows waits for no more at once
    if most == 0 or multiprocessing.current_process().daemon:
        yield partial(_run_here, initializer)
        return
    workers: list[_Worker] = []
    free: list[_Worker] = []

    def run(
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        told: Callable[[Task, Any], None] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        waiting, exhausted = iter(tasks), False
        busy: dict[Any, tuple[_Worker, Task]] = {}
        try:
            while True:
                while not exhausted and (free or len(workers) < most):
                    try:
                        task = next(waiting)
                    except StopIteration:
                        exhausted = True
                        break
                    if not free:
                        if os.name == "posix":
                            # It is a process, too, and starting it lets Ctrl-C through again.
                            resource_tracker.ensure_running()
                        with _no_interrupts():
                            workers.append(_Worker(initializer))
                            free.append(workers[-1])
                    worker = free.pop()
                    busy[worker.connection] = worker, task
                    worker.send((function, task))
                if not busy:
                    if exhausted:
                        return
                    raise ArgumentError("no process is free, nor will be. Use another pool.")
                for ready in connection.wait(list(busy)):
                    worker, task = busy[ready]
                    kind, value = worker.receive()
                    if kind == "told":
                        if told is not None:
                            told(task, value)
                        continue
                    del busy[ready]
                    free.append(worker)
                    if kind == "raised":
                        error, text = value
                        raise error from _RemoteTraceback(text)
                    yield task, value
        finally:
            with _no_interrupts():
                for worker, _ in busy.values():  # their answers would be taken for others
                    worker.kill()
                    workers.remove(worker)

    try:
        yield run
    finally:
        with _no_interrupts():
            for worker in workers:
                worker.kill()


def _run_here(
    initializer: Callable[[], object] | None,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    told: Callable[[Task, Any], None] | None = None,
) -> Iterator[tuple[Task, Result]]:
    global _tell
    if initializer is not None:
        initializer()
    for task in tasks:
        before, _tell = _tell, None if told is None else partial(told, task)
        try:
            result = function(task)
        finally:
            _tell = before
        yield task, result


def report(value: object) -> None:
    """Tell the process of the pool about the task that runs here, from its own thread."""
    if _tell is not None:
        _tell(value)


#: What `report` does.
_tell: Callable[[Any], None] | None = None


def usable_cpus() -> int:
    """How many processors this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """A process that runs one task at a time."""

    def __init__(self, initializer: Callable[[], object] | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, initializer), daemon=True)
        with _one_thread(), _no_main():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of what it sends

    def send(self, work: object) -> None:
        content = pickle.dumps(work)
        try:
            self.connection.send_bytes(content)
        except OSError:
            raise self._died() from None

    def receive(self) -> Any:
        try:
            content = self.connection.recv_bytes()
        except (EOFError, OSError):
            raise self._died() from None
        return pickle.loads(content)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _died(self) -> WorkerDied:
        self._process.join()
        status = self._process.exitcode or 0
        if status < 0:
            how = f"was killed by signal {-status}, perhaps for want of memory"
        else:
            how = f"ended with status {status}"
        return WorkerDied(f"a worker process {how}.")


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block; processes that are started in it never see it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that are started in the block use one thread each."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Keep processes that are started in the block from running the script of this one."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# --- in the processes -----------------------------------------------------------------------------


def _serve(theirs: Any, initializer: Callable[[], object] | None) -> None:
    global _tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tell, failure = (lambda value: theirs.send_bytes(pickle.dumps(("told", value)))), None
    try:
        if initializer is not None:
            initializer()
    except Exception as error:
        failure = error
    with contextlib.suppress(EOFError, OSError):  # until the parent has ended
        while True:
            content = theirs.recv_bytes()
            try:
                if failure is not None:
                    raise failure
                function, task = pickle.loads(content)
                answer = pickle.dumps(("done", function(task)))
            except Exception as error:
                answer = pickle.dumps(("raised", (_portable(error), traceback.format_exc())))
            theirs.send_bytes(answer)


def _end_with_parent() -> None:
    """Also if the parent was killed, and in the midst of a task."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
