"""Several processes that form one process group, and do what a test tells them.

A test starts `Ranks` on a file of functions; every process loads that file, calls the functions by
name, each with its own arguments, and sends back what they return. This file is also the process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Ranks:
    """`size` processes of a gloo group that lasts until `close`."""

    def __init__(self, size: int, functions: Path, *, timeout: float = 60.0) -> None:
        self.size = size
        self._store = tempfile.TemporaryDirectory()
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    str(functions),
                    str(Path(self._store.name) / "store"),
                    str(size),
                    str(rank),
                    str(timeout),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(size)
        ]

    def start(self, function: str, arguments: list[dict[str, Any]]) -> None:
        """Have every process call a function; `arguments` are one dict a rank."""
        for process, given in zip(self.processes, arguments, strict=True):
            assert process.stdin is not None
            pickle.dump((function, given), process.stdin)
            process.stdin.flush()

    def result(self, rank: int) -> Any:
        """What one process returned; an exception as ("name of its class", "message")."""
        stream = self.processes[rank].stdout
        assert stream is not None
        return pickle.load(stream)

    def run(self, function: str, *arguments: dict[str, Any], **same: Any) -> list[Any]:
        """Call a function everywhere and wait for all of them."""
        self.start(function, [{**a, **same} for a in (arguments or ({},) * self.size)])
        return [self.result(rank) for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        self._store.cleanup()


def main(path: str, store: str, size: int, rank: int, timeout: float) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        world_size=size,
        rank=rank,
        timeout=timedelta(seconds=timeout),
    )
    spec = importlib.util.spec_from_file_location("functions", path)
    assert spec is not None
    assert spec.loader is not None
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    while True:
        try:
            name, given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(functions, name)(**given)
        except Exception as error:
            answer = (type(error).__name__, str(error))
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
