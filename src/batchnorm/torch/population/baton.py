"""Forwards that run in threads of their own, one at a time. README.md explains the baton."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable


class Suspended(BaseException):
    """Ends a forward early: its batch is run again later, or has no layer left to measure.

    A BaseException, so that a forward that handles errors does not catch it.
    """


class PausableThread:
    """Runs a function in a thread of its own, one stretch at a time.

    The owner and the thread pass each other a baton, and only the one that holds it runs. The
    function runs in the context (`contextvars`) of the owner.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._to_thread = threading.Semaphore(0)
        self._to_owner = threading.Semaphore(0)
        self._error: BaseException | None = None
        self.stopping = False
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run, function), daemon=True
        )

    def _run(self, function: Callable[[], None]) -> None:
        self._to_thread.acquire()
        try:
            if not self.stopping:
                function()
        except Suspended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._to_owner.release()

    # ---- called by the owner

    def start(self) -> None:
        """Start the thread, which then waits for the baton.

        Raises
        ------
        RuntimeError
            The system allows no further thread.
        """
        self._thread.start()

    def resume(self) -> None:
        """Pass the baton to the thread until it pauses or ends; raise the error that ended it."""
        self._to_thread.release()
        self._to_owner.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def stop(self) -> None:
        """End the thread, wherever it is.

        It runs if the owner was interrupted while it waited for the baton.
        """
        self.stopping = True
        self._to_thread.release()
        if self._thread.is_alive():  # or an interrupt came before it had started
            self._thread.join()

    # ---- called by the function

    def pause(self) -> None:
        """Pass the baton back to the owner until it resumes this.

        Raises
        ------
        Suspended
            The owner stops it instead.
        """
        self._to_owner.release()
        self._to_thread.acquire()
        if self.stopping:
            raise Suspended
