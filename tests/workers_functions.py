"""What the tests of workers run in processes, which import it from here."""

import os
import pathlib
import signal
import sys
import threading
import time

from batchnorm import workers


def square(x):
    return x * x


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def where(_):
    return os.getpid()


def linger(folder):
    """Leave a file with the number of this process, and never end."""
    (pathlib.Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def begin():
    """As an initializer: what it leaves is for `begun`."""
    sys.modules[__name__].ready = True


def begun(_):
    return getattr(sys.modules[__name__], "ready", False)


def cannot_begin():
    raise OSError("no such camera")


class Odd(Exception):
    """Cannot be unpickled."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def fail(x):
    if x == "odd":
        raise Odd(1, 2)
    raise ValueError(f"{x} is bad")


def unsendable(_):
    return threading.Lock()


def end(how):
    if how == "exit":
        sys.exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def count(n):
    for k in range(n):
        workers.report(k)
    return n


def threads(_):
    import batchnorm

    return batchnorm.show_config()["threads"], signal.getsignal(signal.SIGINT) == signal.SIG_IGN
