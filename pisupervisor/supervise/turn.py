"""Whose turn it is: threads call, so many at once, or one of them replaces the child. Not re-entrant, and it says so instead
of waiting. The rules are in ``admission``.
"""

from __future__ import annotations

import threading
import time

from pisupervisor.errors import IsolationError
from pisupervisor.link.bells import Bell
from pisupervisor.link.callers import this_caller
from pisupervisor.supervise.admission import Admission, Ticket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pisupervisor.supervise.admission import Use

_WITHIN = (
    "this thread is in the middle of a call into that child, or of its launch: from there (a callback, a signal's handler) only "
    "terminate, abort and close can end it; the rest is for another thread"
)


class Turn:
    """A caller is known by its thread, unless it says another ``key``."""

    def __init__(self, slots: int = 1, lock: threading.RLock | None = None) -> None:
        self._lock = lock or threading.RLock()
        self.rules = Admission(slots)

    def is_mine(self) -> bool:
        return this_caller() in self.rules.users

    def check_not_mine(self) -> None:
        """Raises IsolationError for who has it already: what waits for the end of a call cannot be done within it."""
        if self.is_mine():
            raise IsolationError(_WITHIN)

    def is_my_captured(self) -> bool:
        """Whether nothing else that captures its output can begin until this caller goes."""
        return self.rules.users.get(this_caller()) == "captured"

    def has(self, key: int) -> bool:
        return key in self.rules.users

    def take(self, timeout: float | None = None, use: Use = "alone") -> bool:
        """False when it was not to be had within ``timeout`` seconds. Raises what ``check_not_mine`` raises."""
        key = this_caller()
        if self.enter(key, use):
            return True
        if timeout == 0:
            return False
        bell = Bell()
        ticket = self.queue(key, use, bell.ring)
        if ticket is None:
            return True
        until = None if timeout is None else time.monotonic() + timeout
        try:
            bell.wait(until)
            if self.has(key):
                return True
        except BaseException:
            self.give_up(ticket)
            raise
        return not self.give_up(ticket, unless_admitted=True)

    def rise(self, timeout: float) -> bool:
        """In a callback of a plain call: for a call within that, which captures its output, until ``sink``. False when that was
        not to be had in time.
        """
        bell = Bell()
        ticket = Ticket(this_caller(), "captured", bell.ring)
        with self._lock:
            if self.rules.rise(ticket.key):
                return True
            self.rules.rising.append(ticket)
        try:
            bell.wait(time.monotonic() + timeout)
        finally:
            with self._lock:
                has_risen = ticket not in self.rules.rising
                admitted = [] if has_risen else self.rules.give_up(ticket)
            wake(admitted)
        return has_risen

    def sink(self) -> None:
        """That call is over."""
        with self._lock:
            admitted = self.rules.sink(this_caller())
        wake(admitted)

    def enter(self, key: int, use: Use) -> bool:
        """Without waiting."""
        with self._lock:
            if key in self.rules.users:
                raise IsolationError(_WITHIN)
            return self.rules.enter(key, use)

    def queue(self, key: int, use: Use, wake: Callable[[], object]) -> Ticket | None:
        """A place in the queue; None: it was its turn at once. ``wake`` is called from whatever thread lets it in."""
        with self._lock:
            if self.rules.enter(key, use):
                return None
            ticket = Ticket(key, use, wake)
            self.rules.wait(ticket)
            return ticket

    def give_up(self, ticket: Ticket, *, unless_admitted: bool = False) -> bool:
        """Leave the queue, or the turn that it has led to; whether that has happened."""
        with self._lock:
            if unless_admitted and ticket.key in self.rules.users:
                return False
            admitted = self.rules.give_up(ticket)
        wake(admitted)
        return True

    def give(self, key: int | None = None) -> None:
        with self._lock:
            admitted = self.rules.leave(this_caller() if key is None else key)
        if admitted:
            wake(admitted)

    def __enter__(self) -> Turn:
        self.take()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.give()


def wake(admitted: list[Ticket]) -> None:
    for ticket in admitted:
        ticket.wake()
