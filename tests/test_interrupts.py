"""Ctrl-C at any moment: one line, status 130, no traceback, nothing left behind."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from batchnorm.dataset.sources.prefetching import prefetch

# `press` is Ctrl-C; `on_import(name, act)` calls `act` just before a module is imported.
BEGIN = """
import atexit, functools, importlib.abc, signal, sys
from _batchnorm_program import main

press = functools.partial(signal.raise_signal, signal.SIGINT)

class OnImport(importlib.abc.MetaPathFinder):
    def __init__(self, name, act):
        self.name, self.act = name, act
    def find_spec(self, fullname, path, target=None):
        if fullname == self.name:
            sys.meta_path.remove(self)
            self.act()

def on_import(name, act):
    sys.meta_path.insert(0, OnImport(name, act))
"""
INTERRUPTED = (130, "batchnorm: interrupted\n")


def program(code, *arguments):
    """Exit status and stderr of the program after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}{code}\nsys.exit(main())", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["numpy", "batchnorm._core", "batchnorm.cli.commands.study"])
def test_interrupted_import_is_one_line(module):
    assert program(f"on_import({module!r}, press)", "--help") == INTERRUPTED


def test_interrupt_waits_for_the_import_of_numpy():
    # An import that it breaks may raise anything, also from C.
    code = "on_import('numpy', lambda: (press(), print('goes on', file=sys.stderr)))"
    status, errors = program(code, "--help")
    assert (status, errors) == (130, "goes on\n" + INTERRUPTED[1])


def test_interrupt_that_a_library_turned_into_another_error_is_one():
    code = """
def act():
    try:
        press()
    except KeyboardInterrupt:
        raise AttributeError("partially initialized module") from None
on_import("rich", act)"""
    assert program(code, "--help") == INTERRUPTED


def test_interrupt_at_exit_ends_the_process_without_a_traceback():
    status, errors = program("atexit.register(press)", "--version")
    assert status != 0
    assert errors == ""


def test_interrupt_that_is_to_be_ignored_is_ignored():
    # As by nohup, and for background jobs of scripts.
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN); on_import('numpy', press)"
    assert program(code, "--version") == (0, "")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_prefetch_interrupted_while_a_read_begins_closes_its_items(monkeypatch, at):
    submit, calls, reading = ThreadPoolExecutor.submit, [], threading.Event()

    def interrupted(self, *given):
        calls.append(submit(self, *given))
        if len(calls) == at:
            reading.wait(10)
            self._threads.clear()  # Ctrl-C came while submit waited for its thread to start
            raise KeyboardInterrupt
        return calls[-1]

    closed = []

    def items():
        try:
            for k in range(5):
                if k == at - 1:
                    reading.set()
                    time.sleep(0.05)
                yield k
        finally:
            closed.append(True)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(prefetch(items()))
    assert closed == [True]
