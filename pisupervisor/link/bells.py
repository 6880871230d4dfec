"""How a waiting thread is told that there is something for it. What is rung before anybody waits is heard all the same."""

from __future__ import annotations

import os
import threading
import time


class Bell:
    """For a thread that waits for nothing else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # rung already

    def wait(self, until: float | None) -> None:
        """Until it is rung, or ``until`` has passed."""
        self._lock.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic()))


class PollBell:
    """For a thread that polls something else meanwhile. Safe to ring when it is long gone."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entered when a forgotten isolator is collected under it, and rings
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        with self._lock:  # else the number might be somebody else's by now
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def start(self, thread: threading.Thread) -> None:
        """That thread, which is woken by this bell. Where there is none to be had, the bell is closed."""
        try:
            thread.start()
        except BaseException:
            self.close()
            raise
