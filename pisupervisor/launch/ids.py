"""Outer ids: every child of a root host gets one of its own, from a range that nobody else uses, claimed under a lock."""

from __future__ import annotations

import fcntl
import os
import struct
import threading

from pisupervisor.errors import LaunchError

FIRST = 0x7000_0000  # above what systemd hands to containers (up to 0x6FFF_FFFF), below 2**31
BLOCK = 1 << 16
BLOCKS = 4096
LOCK_FILE = "/run/pisupervisor.ids"
_OFD_SETLK = 37  # F_OFD_SETLK: released by the kernel when the process dies, however it dies


class IdBlock:
    """A block of ids (65536, of root's) that belongs to this process for as long as the object is open."""

    def __init__(
        self, lock_file: str = LOCK_FILE, *, first: int = FIRST, size: int = BLOCK, count: int | None = None
    ) -> None:
        self._size, self._count = size, BLOCKS if count is None else count
        self._lock = threading.Lock()
        self._used: set[int] = set()
        self._next = 0
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(lock_file, flags, 0o600)
        except OSError as error:
            raise LaunchError(
                f"cannot open {lock_file}: {error.strerror}", step="ids", errno=error.errno,
                remedy="mount a writable /run, where outer ids are claimed",
            ) from error  # fmt: skip
        self.base = first + size * self._claim()

    def _claim(self) -> int:
        for number in range(self._count):
            try:
                lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
                fcntl.fcntl(self._fd, _OFD_SETLK, lock)
            except BlockingIOError:
                continue
            return number
        os.close(self._fd)
        raise LaunchError(
            f"all {self._count} blocks of outer ids are taken", step="ids", remedy="close other supervisors"
        )

    def take(self) -> int:
        """An id that no living child has. Raises LaunchError when all 65536 are in use."""
        with self._lock:
            for _ in range(self._size):
                candidate = self.base + self._next
                self._next = (self._next + 1) % self._size
                if candidate not in self._used:
                    self._used.add(candidate)
                    return candidate
        raise LaunchError(
            f"all {self._size} outer ids of this process are in use", step="ids", remedy="close isolators"
        )

    def give_back(self, number: int) -> None:
        with self._lock:
            self._used.discard(number)

    def close(self) -> None:
        os.close(self._fd)
