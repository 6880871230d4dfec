"""The one thread that runs submitted calls, in order. It exists from an isolator's first ``submit`` to its ``close``."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from pisupervisor.futures import IsolationFuture


class Worker:
    """``want(thread)`` is told before each call that this thread makes, ``cancel(thread)`` ends the call that it makes."""

    def __init__(self, name: str, want: Callable[[int], None], cancel: Callable[[int], None]) -> None:
        self._want, self._cancel_call = want, cancel
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: IsolationFuture | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, method: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> IsolationFuture:
        """Queue one call; its future."""
        future = IsolationFuture(self._cancel)
        self._queue.put((future, method, args, keywords))
        return future

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._run_one(*item)
            del item  # a finished call must not be kept alive until the next one comes

    def _run_one(self, future: IsolationFuture, method: Callable[..., Any], args: Any, keywords: Any) -> None:
        with self._lock:
            if future.cancelled():
                return
            self._want(threading.get_ident())
            self._running, future.started = future, True
        try:
            value, error = method(*args, **keywords), None
        except BaseException as raised:
            value, error = None, raised
        with self._lock:
            self._running = None
            if not future.set_running_or_notify_cancel():
                return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def _cancel(self, future: IsolationFuture) -> None:
        with self._lock:
            if self._running is future:
                self._cancel_call(self._thread.ident or 0)

    def close(self) -> None:
        """End the thread; calls that still wait are cancelled."""
        waiting = []
        while not self._queue.empty():
            waiting.append(self._queue.get())
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        for item in waiting:
            if item is not None:
                item[0].cancel()
