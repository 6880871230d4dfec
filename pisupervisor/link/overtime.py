"""Deadlines of calls whose callbacks run. The thread that waits for such a call is in the application's function, which nobody
can end; so another one ends the child.
"""

from __future__ import annotations

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LINGER = 1.0  # seconds for which the thread stays when no callback runs: beginning one takes longer than a callback


class Overtime:
    """Of one child, which ``kill`` ends. Its thread begins with the first callback of a call that has a deadline."""

    def __init__(self, kill: Callable[[], object]) -> None:
        self._kill = kill
        self._changed = threading.Condition()  # re-entered: an isolator that is collected under it stops this
        self._deadlines: list[float] = []  # of the callbacks that run
        self._is_used = False  # since the thread last looked
        self._wakes = 0.0  # when it looks again
        self._thread: threading.Thread | None = None

    def begin(self, deadline: float) -> None:
        """A callback begins whose call has so much time."""
        with self._changed:
            self._deadlines.append(deadline)
            self._is_used = True
            if self._thread is not None:
                if deadline < self._wakes:
                    self._changed.notify()
                return
            thread = threading.Thread(target=self._run, name="pisupervisor-overtime", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # none to be had: whoever runs the callback sees to the deadline when that is over
            self._thread = thread

    def end(self, deadline: float) -> None:
        """It is over."""
        with self._changed:
            if deadline in self._deadlines:  # else that has passed
                self._deadlines.remove(deadline)

    def stop(self) -> None:
        """The child is dead."""
        with self._changed:
            self._deadlines.clear()
            self._is_used = False
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # --- in the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            self._kill()

    def _wait(self) -> bool:
        """Until a deadline has passed. False: no callback has run for a while."""
        with self._changed:
            while self._deadlines or self._is_used:
                now, first = time.monotonic(), min(self._deadlines, default=float("inf"))
                if first <= now:
                    self._deadlines.remove(first)
                    return True
                self._is_used = False
                self._wakes = min(first, now + _LINGER)
                self._changed.wait(self._wakes - now)
            self._thread = None
            return False
