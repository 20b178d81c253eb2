"""The program ``batchnorm``: what has to be in place before the package is imported.

That imports NumPy, which takes a tenth of a second, and raises if the environment asks for what the
machine lacks. So this module lies outside the package.
"""

import contextlib
import os
import signal
import sys
from types import FrameType

UNUSABLE, INTERRUPTED = 2, 130  # as in batchnorm.cli.output


def main() -> int:
    """Run `batchnorm.cli.main`, and say in one line why the package cannot be imported.

    Returns
    -------
    int
        The exit status.
    """
    _open_streams()
    interrupt = _Interrupt()
    try:
        from batchnorm.cli import main as run

        interrupt.raise_from_now_on()
        return run(interrupted=lambda: interrupt.pressed)
    except BaseException as error:
        if interrupt.pressed or isinstance(error, KeyboardInterrupt):
            _note("interrupted")
            return INTERRUPTED
        if type(error).__module__ != "batchnorm.errors":
            raise
        _note(str(error))
        return UNUSABLE
    finally:
        interrupt.end_process_from_now_on()


class _Interrupt:
    """What Ctrl-C does: it waits for the end of the import, which raises anything if it is broken.

    `pressed` remembers it, for libraries may turn KeyboardInterrupt into another error.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._raises = False
        # Else it is to be ignored, as by nohup, or the caller has a handler.
        self._mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._mine:
            signal.signal(signal.SIGINT, self._press)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._raises:
            raise KeyboardInterrupt

    def raise_from_now_on(self) -> None:
        self._raises = True
        if self.pressed:
            raise KeyboardInterrupt

    def end_process_from_now_on(self) -> None:
        """End the process without a traceback, which Python would print in its last steps."""
        if self._mine:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_streams() -> None:
    """Open closed standard streams, or the next file to be opened would be one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)


def _note(text: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"batchnorm: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
