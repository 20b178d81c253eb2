"""Files measured on a Dask cluster, by workers that read them themselves."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import ArgumentError, BatchNormError
from .addresses import UnreadableFile, is_remote
from .block_moments import How, finish, measure_blocks
from .extras import first_line, import_extra
from .parts import PairwiseMerge, Part
from .sources import FileSource

#: Blocks of a file that are one task.
TASK_BLOCKS = 16


@contextlib.contextmanager
def explain_cluster_errors(label: str) -> Iterator[None]:
    """Turn errors of workers and the scheduler into one line."""
    distributed = import_extra("distributed", "dask", "Dask clusters")
    try:
        yield
    except UnreadableFile as error:
        raise ArgumentError(f"{error} Workers must reach it by the same path.") from error
    except distributed.KilledWorker as error:
        raise BatchNormError(
            f"{label}: gave up after several workers died on the same task ({first_line(error)}). "
            "See the workers' logs; they may lack memory."
        ) from error
    except distributed.CancelledError as error:
        raise BatchNormError(
            f"{label}: the scheduler cancelled its task, or is gone. It must keep running. With "
            "out, --out, a run is resumed when it is repeated."
        ) from error
    except OSError as error:
        raise BatchNormError(
            f"{label}: the cluster could not measure it ({type(error).__name__}: {error}). "
            "Workers must reach the files by the same paths, and the scheduler must keep running."
        ) from error


@contextlib.contextmanager
def connect(address: str, timeout: float = 10.0) -> Iterator[Any]:
    """Connect to the scheduler at `address`, and yield a client once it has a worker.

    Nothing is logged in the block: what goes wrong is raised, and Dask logs it several times.

    Raises
    ------
    ArgumentError
        It is no address of a scheduler, none answers, or no worker is ready, within `timeout`
        seconds.
    """
    import asyncio

    distributed = import_extra("distributed", "dask", "Dask clusters")
    # Without __del__, which waits 20 s and prints a traceback if the scheduler never answered.
    client_type: Any = type("Client", (distributed.Client,), {"__del__": lambda self: None})
    wrong = f"dask must be the address of a scheduler, such as tcp://host:8786, got {address!r}"
    try:
        host, port = distributed.comm.get_address_host_port(address)
        if not host:
            raise ValueError("no host")
        if not 0 < port < 65536:
            raise ValueError("no such port")
        socket.getaddrinfo(host, port)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{wrong} ({first_line(error)}). Name its host and port.") from error
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable()
        try:
            client = client_type(address, timeout=timeout, set_as_default=False)
        except Exception as error:  # whatever something else that listens there leads to
            raise ArgumentError(
                f"{wrong}, where none answers within {timeout:g} s ({first_line(error)}). "
                "Start one with `dask scheduler`."
            ) from error
        stack.callback(_close, client, timeout)
        try:
            client.wait_for_workers(1, timeout=timeout)
        # In Python 3.10, asyncio's is another class than TimeoutError.
        except (OSError, asyncio.TimeoutError) as error:
            raise ArgumentError(
                f"dask must be the address of a scheduler with workers, got {address!r}, which "
                f"has none within {timeout:g} s. Start some with `dask worker {address}`."
            ) from error
        yield client


def _close(client: Any, timeout: float) -> None:
    with contextlib.suppress(Exception):  # if the scheduler is gone
        client.close(timeout)


def measure_files(
    client: Any,
    files: Mapping[int, FileSource],
    how: How,
    advance: Callable[[str, int], None],
    finished: Callable[[int, Part], None],
) -> None:
    """Measure files in tasks of bounded size on the workers.

    If a worker dies, another repeats its tasks. The order of merging does not depend on which
    worker measured a part, nor on when.

    Raises
    ------
    BatchNormError
        As without a cluster; or too many workers died on one task, or the cluster is gone.
    """
    distributed = import_extra("distributed", "dask", "Dask clusters")
    merges: dict[int, PairwiseMerge] = {}
    tasks: dict[Any, int] = {}
    pending: dict[int, int] = {}
    for k, file in files.items():
        # Workers are started in folders of their own.
        path = file.path if is_remote(file.path) else os.path.abspath(file.path)
        pieces = file.with_path(path).split(TASK_BLOCKS)
        merges[k], pending[k] = PairwiseMerge(), len(pieces)
        for piece in pieces:
            tasks[client.submit(measure_blocks, piece, how, pure=False)] = k
    shares = {k: files[k].nbytes // pending[k] for k in files}
    try:
        for task in distributed.as_completed(list(tasks), loop=client.loop):
            k = tasks[task]
            with explain_cluster_errors(files[k].label):
                merges[k].update(task.result())
            task.release()
            pending[k] -= 1
            advance(files[k].label, shares[k])
            if not pending[k]:
                finished(k, finish(merges.pop(k), files[k]))
    finally:
        with contextlib.suppress(Exception):  # if the scheduler is gone
            client.cancel(list(tasks))
