"""One worker process: it makes an object, calls the methods it is asked for, and answers in JSON.

Time, page faults and memory are then those of a process that holds one thing to measure and nothing
else, while several such processes still take turns.

The child runs this file by its path and needs only the standard library, so that it can measure
another copy of the package.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A worker failed; the message says why, in one line."""


class Worker:
    """A process that holds an object of class `name`, made from `arguments`.

    Parameters
    ----------
    file
        The Python file that defines the class. Its folder comes first on the child's path.
    environment
        Variables to add to those of this process.
    arguments
        Keyword arguments of the class; they and all answers travel as JSON.
    """

    def __init__(
        self,
        file: str | Path,
        name: str,
        *,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(file), name, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def send(self, method: str, **arguments: Any) -> None:
        """Ask for a call of `method`, without waiting for its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says why it has died
            print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)

    def receive(self) -> Any:
        """Wait for the next answer.

        Raises
        ------
        WorkerError
            The class or the method raised, or the process died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it said nothing"]
            raise WorkerError(f"the process ended with status {status}: {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call `method` in the process, and return what it returned."""
        self.send(method, **arguments)
        return self.receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """Let the process end, which it does when there is nothing more to read."""
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate(timeout=10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._errors.close()


def one_line(error: BaseException) -> str:
    """Type and message of an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def serve(file: str, name: str, arguments: str) -> int:
    """Make the object, and answer each line of standard input until there are no more."""
    # Whatever else is printed must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    sys.path[0] = str(Path(file).resolve().parent)  # in place of the folder of this file
    try:
        served = getattr(importlib.import_module(Path(file).stem), name)(**json.loads(arguments))
        for line in sys.stdin:
            method, keywords = json.loads(line)
            answer(result=getattr(served, method)(**keywords))
    except Exception as error:
        answer(error=one_line(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(serve(*sys.argv[1:]))
