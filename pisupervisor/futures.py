"""Futures whose running work can be killed. Apart from errors.py because concurrent.futures imports logging (10 ms)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from pisupervisor.errors import CallError


class CallCancelled(CallError, CancelledError):
    """The call was cancelled, and its work killed."""


class IsolationFuture(Future[Any]):
    """A ``concurrent.futures.Future``: ``cancel()`` of a running call kills the child that runs it and returns True.

    For the base class it stays pending while it runs, because that class refuses to cancel what is running.
    """

    def __init__(self, kill: Callable[[IsolationFuture], None], holds_up: Callable[[], bool] | None = None) -> None:
        """``holds_up``: whether the call waits for its turn until the calling thread has given up its own."""
        super().__init__()
        self._kill, self._holds_up = kill, holds_up
        self.started = False
        self.stops = 0  # how often its isolator had been stopped when it was submitted

    def running(self) -> bool:
        """Whether the call is under way in the child."""
        return super().running() or (self.started and not self.done())

    def cancel(self) -> bool:
        """Take the call back: unsent if it waits, killed if it runs. False when it is already done."""
        taken_back = super().cancel()  # first: from here on nobody starts it, and what runs is found below
        if taken_back:
            self._kill(self)
        return taken_back

    def take_back(self) -> bool:
        """``cancel`` where the call still waits. False: it runs, or it is done."""
        return not self.started and super().cancel()

    def result(self, timeout: float | None = None) -> Any:
        """The call's result; raises CallCancelled when it was cancelled, else what the call raised. CallError in a callback
        of the very call for whose end this one waits.
        """
        try:
            self._check_wait(timeout)
            return super().result(timeout)
        except CancelledError as error:
            if isinstance(error, CallCancelled):
                raise
            raise CallCancelled("the call was cancelled, and its work killed") from None
        finally:
            del self  # the error's traceback holds this frame, and the future the error: no cycle

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The same of what the call raised; None where it did not."""
        self._check_wait(timeout)
        return super().exception(timeout)

    def _check_wait(self, timeout: float | None) -> None:
        if timeout is None and self._holds_up is not None and not self.done() and self._holds_up():
            raise CallError("this call waits for the one whose callback this is: invoke() calls at once from here")
