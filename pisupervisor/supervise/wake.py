"""A bell between threads that poll can hear. Safe to ring when it is long gone."""

from __future__ import annotations

import os
import threading


class Wake:
    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entered when a forgotten isolator is collected under it, and rings
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        with self._lock:  # else the number might be somebody else's fd by now
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
