"""Threads that run submitted calls, in order. An isolator has as many as calls run side by side in its child, and one for those
that capture their output, made as they are needed from its first ``submit`` on, until its ``close``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pisupervisor.futures import IsolationFuture

if TYPE_CHECKING:
    from pisupervisor.supervise.session import Session

Calls = queue.SimpleQueue[Any]  # of (future, method, arguments, keywords), and None for the end
_CAPTURED = frozenset(("execute", "run_source", "run_script"))


class Worker:
    """``session`` is that of the isolator that makes the calls: it is told before each one, and ends what is cancelled.
    Without one, a call under way cannot be ended. ``calls``: a queue that several take from.
    """

    def __init__(
        self, name: str, session: Session | None = None, *, start: bool = True, calls: Calls | None = None
    ) -> None:
        self.session = session
        self._queue: Calls = queue.SimpleQueue() if calls is None else calls
        self._lock = threading.Lock()
        self._running: IsolationFuture | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        if start:
            self.start()

    def start(self) -> None:
        """Raises RuntimeError where there is no thread to be had."""
        self._thread.start()

    def add(self, method: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> IsolationFuture:
        """Queue one call; its future."""
        future = IsolationFuture(self.cancel)
        future.stops = self.session.keeper.stops if self.session is not None else 0
        self._queue.put((future, method, args, keywords))
        return future

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self.run_one(*item)
            del item  # a finished call must not be kept alive until the next one comes

    def run_one(self, future: IsolationFuture, method: Callable[..., Any], args: Any, keywords: Any) -> None:
        """Make one call, in the calling thread, unless it was taken back."""
        with self._lock:
            if future.cancelled():
                future.set_running_or_notify_cancel()  # whoever waits for it with others is told
                return
            if self.session is not None:
                self.session.want(threading.get_ident())
            self._running, future.started = future, True
        try:
            if self.session is not None:
                self.session.keeper.check_not_overtaken(future.stops)
            value, error = method(*args, **keywords), None
        except BaseException as raised:
            value, error = None, raised
        with self._lock:
            self._running = None
            wanted = future.set_running_or_notify_cancel()
        if wanted and error is not None:
            future.set_exception(error)
        elif wanted:
            future.set_result(value)
        del future, error  # the error's traceback holds this frame: no cycle

    def is_cancelled(self) -> bool:
        """Whether the call that is made now was taken back."""
        running = self._running
        return running is not None and running.cancelled()

    def cancel(self, future: IsolationFuture) -> None:
        """End that call, if it is the one that is made now."""
        with self._lock:
            if self._running is future and self.session is not None:
                self.session.cancel(self._thread.ident or 0)

    def end(self) -> None:
        """End the thread after the call it makes; calls that still wait are cancelled. Does not wait for it."""
        cancel_all(self._queue)
        self._queue.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread, unless it is the one that waits."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)


class Crew:
    """The lines of one isolator. Calls that capture their output run one at a time: where others run side by side, they have a
    line of their own, and stand in nobody's way.
    """

    def __init__(self, name: str, session: Session, most: int) -> None:
        turn = session.keeper.turn
        self._plain = self._captured = Line(name, session, most, turn.is_mine if most == 1 else None)
        if most > 1:
            self._captured = Line(f"{name}-captured", session, 1, turn.is_my_captured)

    def line_for(self, method: Callable[..., Any]) -> Line:
        """Where a call of that method of the isolator waits for its turn."""
        return self._captured if getattr(method, "__name__", "") in _CAPTURED else self._plain

    def end(self) -> None:
        """End the threads after the calls they make; calls that still wait are cancelled. Does not wait for it."""
        for line in {self._plain, self._captured}:
            line.end()

    def close(self) -> None:
        """``end``, and wait until they have ended."""
        self.end()
        for line in {self._plain, self._captured}:
            line.join()


class Line:
    """Up to ``most`` workers of one queue: a call that is submitted while all are busy makes another. ``session``: see
    ``Worker``; ``holds_up``: see ``IsolationFuture``.
    """

    def __init__(
        self, name: str, session: Session | None, most: int, holds_up: Callable[[], bool] | None = None
    ) -> None:
        self._name, self._session, self._most, self._holds_up = name, session, most, holds_up
        self._queue: Calls = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0  # calls that are not done
        self._workers: list[Worker] = []

    def add(self, method: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> IsolationFuture:
        """Queue one call; its future."""
        future = IsolationFuture(self._cancel, self._holds_up)
        future.stops = self._session.keeper.stops if self._session is not None else 0
        with self._lock:
            if len(self._workers) < min(self._most, self._open + 1):
                name = f"{self._name}-{len(self._workers) + 1}" if self._workers else self._name
                self._workers.append(Worker(name, self._session, calls=self._queue))
            self._open += 1
            self._queue.put((future, method, args, keywords))
        if self._most > 1:
            future.add_done_callback(self._done)
        return future

    def _done(self, _future: Any) -> None:
        with self._lock:
            self._open -= 1

    def _cancel(self, future: IsolationFuture) -> None:
        for worker in self._workers:
            worker.cancel(future)

    def end(self) -> None:
        cancel_all(self._queue)
        for _ in self._workers:
            self._queue.put(None)

    def join(self) -> None:
        for worker in self._workers:
            worker.join(5.0)


def cancel_all(calls: Calls) -> None:
    """Take back what waits in a queue."""
    while True:
        try:
            item = calls.get_nowait()
        except queue.Empty:
            return
        if item is not None and item[0].cancel():
            item[0].set_running_or_notify_cancel()
