"""``concurrent.futures.Executor`` over confined children: what runs can be cancelled, and a dead child is one failed call."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from pisupervisor.errors import IsolatorClosed, OptionsError, RestartLimitReached
from pisupervisor.futures import CallCancelled, IsolationFuture
from pisupervisor.isolator import ProcessIsolator
from pisupervisor.options import IsolationOptions
from pisupervisor.template import Template
from pisupervisor.worker import Calls, Worker, cancel_all


class IsolationExecutor(Executor):
    """Up to ``max_workers`` children of one template, started as they are needed; functions are sent as by ``invoke``.

    Futures are IsolationFutures: ``cancel()`` of a running call kills it. A call whose child dies fails with
    ChildTerminated, and the next one gets another child: nothing breaks the executor.
    """

    def __init__(self, options: IsolationOptions | None = None, max_workers: int | None = None, **changes: Any) -> None:
        """``max_workers``: by default as many as there are CPUs. ``changes`` replace single options."""
        if max_workers is not None and (isinstance(max_workers, bool) or not isinstance(max_workers, int)):
            raise OptionsError(f"max_workers: expected a number, not {max_workers!r}")
        if max_workers is not None and max_workers <= 0:
            raise OptionsError("max_workers must be greater than 0")
        self._pool = _Pool(Template(options, **changes), max_workers or os.cpu_count() or 1)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> IsolationFuture:
        """Raises RuntimeError after ``shutdown``."""
        return self._pool.submit(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more calls. What waits is still done unless ``cancel_futures``; ``wait`` until it is, and all is given back."""
        self._pool.shutdown(wait, cancel_futures)

    def __del__(self) -> None:
        if "_pool" in self.__dict__:
            self._pool.shutdown(wait=False, cancel_futures=False)


class _Pool:
    """The lanes and what they share. Apart from the executor, so that a forgotten one can be collected."""

    def __init__(self, template: Template, most: int) -> None:
        self.template, self._most = template, most
        self.calls: Calls = queue.SimpleQueue()
        self.idle = threading.Semaphore(0)  # lanes that wait for a call
        self.closed = False
        self._lock = threading.RLock()  # re-entered when a forgotten executor is collected under it
        self._lanes: list[_Lane] = []
        self._owner = os.getpid()

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> IsolationFuture:
        if os.getpid() != self._owner:  # before the lock, which in a fork may be held for ever
            raise IsolatorClosed("this executor belongs to the process that created it, not to a fork of it")
        with self._lock:
            if self.closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future = IsolationFuture(self._cancel)
            self.calls.put((future, fn, args, kwargs))  # before there is a lane that finds nothing, and says it is idle
            if not self.idle.acquire(blocking=False) and len(self._lanes) < self._most:
                self._start_lane(future)
        return future

    def _start_lane(self, future: IsolationFuture) -> None:
        lane = _Lane(self, f"pisupervisor-executor-{len(self._lanes) + 1}")
        try:
            lane.start()
        except RuntimeError:
            future.cancel()  # it is in the queue: whoever comes to it passes it over
            raise
        self._lanes.append(lane)

    def _cancel(self, future: IsolationFuture) -> None:
        for lane in tuple(self._lanes):
            lane.cancel(future)

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        if os.getpid() != self._owner:
            return  # what belongs to the original is not ended by a fork
        with self._lock:
            first, self.closed = not self.closed, True
            if cancel_futures:
                cancel_all(self.calls)
            self.calls.put(None)  # each lane that takes it puts it back for the next
            lanes = tuple(self._lanes)
        if first and not lanes:
            self.template.close()
        for lane in lanes if wait else ():
            lane.join()

    def ended(self, lane: _Lane) -> None:
        """The last lane gives the template back. One that ended before its time makes room for another."""
        with self._lock:
            self._lanes.remove(lane)
            last = self.closed and not self._lanes
        if last:
            self.template.close()

    @property
    def open(self) -> int:
        """How many lanes there are."""
        return len(self._lanes)


class _Lane(Worker):
    """One thread with one isolator, made for its first call."""

    def __init__(self, pool: _Pool, name: str) -> None:
        self._pool = pool
        self._isolator: ProcessIsolator | None = None
        super().__init__(name, start=False)

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                future, fn, args, kwargs = item
                self.run_one(future, self._call, (fn, args, kwargs), {})
                del item, future, fn, args, kwargs
            self._pool.calls.put(None)
        finally:
            if self._isolator is not None:
                self._isolator.close()
            self._pool.ended(self)

    def _next(self) -> Any:
        try:
            return self._pool.calls.get_nowait()
        except queue.Empty:
            self._pool.idle.release()
            return self._pool.calls.get()

    def _call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._isolator is not None and self._isolator.state == "failed":
            self._isolator.close()  # too many crashes, of calls that others have made
            self._isolator = None
        if self._isolator is None:
            self._isolator = self._pool.template.create()
            self.session = self._isolator._session
            if self.is_cancelled():  # meanwhile, when there was no child to kill yet
                raise CallCancelled("the call was cancelled before it ran")
        try:
            return self._isolator.invoke(fn, *args, kwargs=kwargs)
        except RestartLimitReached:  # not this call's doing
            self._isolator.restart()
            return self._isolator.invoke(fn, *args, kwargs=kwargs)
