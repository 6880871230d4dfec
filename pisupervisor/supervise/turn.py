"""Whose turn it is: one thread at a time calls, or replaces the child. Not re-entrant, and it says so instead of waiting."""

from __future__ import annotations

import threading

from pisupervisor.errors import IsolationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class Turn:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner: int | None = None  # the thread that has it

    def is_mine(self) -> bool:
        return self.owner == threading.get_ident()

    def take(self, timeout: float | None = None) -> bool:
        """False when it was not to be had within ``timeout`` seconds. Raises IsolationError for who has it already: a
        callback cannot end or replace the child that waits for its answer, except by terminate, abort or close.
        """
        if self.is_mine():
            raise IsolationError(
                "this thread is in the middle of a call into that child: that cannot be done from a callback"
            )
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self.owner = threading.get_ident()
        return True

    def give(self) -> None:
        self.owner = None
        self._lock.release()

    def __enter__(self) -> Turn:
        self.take()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.give()
