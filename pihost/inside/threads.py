"""Calls side by side: the main thread reads the link, and each call runs in a thread of its own, at most so many at once."""

from __future__ import annotations

import _pickle
import _thread
import os
from collections import deque

from pihost import wire
from pihost.inside import callbacks, raised
from pihost.jsontext import dump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pihost.inside.serve import Worker

    Frame = tuple[int, int, bytes]
    Job = tuple[Frame, list[int], list[int]]  # with descriptors, and objects released before it


class Inbox:
    """Where one thread waits for frames that are for it, and for work."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._lock.acquire()
        self._frames: deque[tuple[Frame, list[int]]] = deque()
        self.fds: list[int] = []

    def put(self, frame: Frame, fds: list[int]) -> None:
        self._frames.append((frame, fds))
        self.ring()

    def ring(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # it has been rung, and not been heard yet

    def wait(self) -> None:
        self._lock.acquire()

    def receive(self) -> Frame:
        """As ``Link.receive``."""
        while not self._frames:
            self.wait()
        frame, self.fds = self._frames.popleft()
        return frame

    def take_fds(self) -> list[int]:
        """As ``Link.take_fds``."""
        fds, self.fds = self.fds, []
        return fds

    def has_fds(self, fds: list[int]) -> None:
        """As ``Link.has_fds``."""
        self.fds = fds


class _Ordered(_pickle.Unpickler):
    """Imports a package before what is in it. Python waits for a package that another thread is in the middle of importing only
    where that is asked for itself; what is in it would find half of it (numpy did).
    """

    def find_class(self, module: str, name: str) -> Any:
        __import__(module.partition(".")[0])
        return super().find_class(module, name)


class _Source:
    """Bytes as a file, without a copy of them."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def read(self, size: int) -> bytes:
        part = bytes(self._data[self._at : self._at + size])
        self._at += len(part)
        return part

    def readinto(self, target: Any) -> int:
        size = min(len(target), len(self._data) - self._at)
        target[:size] = self._data[self._at : self._at + size]
        self._at += size
        return size

    def readline(self) -> bytes:
        raise EOFError("no pickle of the host's has lines")


def loads(data: bytes | memoryview, *, buffers: Any = None) -> Any:
    """As pickle's."""
    return _Ordered(_Source(data), buffers=buffers).load()


class Threads:
    """``worker`` is what each of them works with a copy of."""

    def __init__(self, worker: Worker, most: int) -> None:
        self._worker, self._most = worker, most
        self._lock = _thread.allocate_lock()
        self._jobs: deque[Job] = deque()
        self._idle: list[Inbox] = []
        self._count = 0
        self._waiting: dict[int, Inbox] = {}  # by the call that waits for the host

    def serve(self) -> int:
        """Until the host closes the link."""
        # Before Python 3.13 whichever thread imports it first is the main one to it, whose end is waited for at the end.
        import threading  # noqa: F401

        callbacks.loads = loads
        worker = self._worker
        while True:
            frame = worker.link.receive()
            if frame is None:
                return 0
            if frame[0] == wire.CALL:
                self._put(frame)
            elif frame[0] in (wire.ANSWER, wire.INNER):
                self._hand_over(frame)
            else:
                worker.serve_one(frame)

    def _put(self, frame: Frame) -> None:
        worker = self._worker
        job = (frame, worker.link.take_fds(), worker.released)
        worker.released = []
        with self._lock:
            self._jobs.append(job)
            if self._idle:
                self._idle.pop().ring()
                return
            if self._count >= self._most:
                return  # whoever is ready first takes it
            self._count += 1
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError as error:
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        """No thread is to be had: another one takes the call, or nobody."""
        with self._lock:
            self._count -= 1
            if self._count or not self._jobs:
                return
            (_kind, ident, _body), fds, released = self._jobs.pop()
        self._worker.released += released
        for fd in fds:
            os.close(fd)
        said = raised.describe_exception(RuntimeError(f"no thread for the call ({error}): see Limits.pids"), ())
        self._worker.link.send(wire.RAISED, ident, [dump(said)])

    def _hand_over(self, frame: Frame) -> None:
        """To the thread whose call waits for it. From the host, which is trusted to know that it does."""
        outer = frame[1] if frame[0] == wire.ANSWER else wire.OUTER.unpack_from(frame[2])[0]
        inbox = self._waiting.get(outer)
        if inbox is not None:
            inbox.put(frame, self._worker.link.take_fds())

    # --- in each thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        import threading

        threading.current_thread()._daemonic = False  # type: ignore[attr-defined]  # else what starts from here were daemons
        worker, inbox = self._worker.twin(), Inbox()
        worker.inbox = inbox
        worker.host = callbacks.Host(worker.link, worker.serve_one, worker.limits["result"], inbox)
        worker.host.waiting = self._waiting
        callbacks.of_threads[_thread.get_ident()] = worker.host
        try:
            while True:
                frame, inbox.fds, worker.released = self._next(inbox)
                worker.serve_one(frame)
        except OSError:
            pass  # the host is gone, and so are we in a moment

    def _next(self, inbox: Inbox) -> Job:
        while True:
            with self._lock:
                if self._jobs:
                    return self._jobs.popleft()
                if inbox not in self._idle:  # it may have been rung for what it has found without waiting
                    self._idle.append(inbox)
            inbox.wait()
