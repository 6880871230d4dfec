"""Outer ids: every child of a root host gets one of its own, from a range that nobody else uses, claimed under a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading

from pisupervisor.errors import LaunchError

FIRST = 0x7000_0000  # above what systemd hands to containers (up to 0x6FFF_FFFF), below 2**31
BLOCK = 1 << 16
BLOCKS = 4096
LOCK_FILE = "/run/pisupervisor.ids"
_LEAST = 16  # ids that a user namespace must have for its root to give some of them away
_MOST_OF_MANY = 0xFF00  # of 65536: the last ones have meanings (65534 is nobody)
_OFD_SETLK = 37  # F_OFD_SETLK: released by the kernel when the process dies, however it dies


def blocks_here(uid_map: str, gid_map: str) -> tuple[int, int, int]:
    """The first id, and size and number of the blocks, by the two maps of the user namespace that this root is root of. Pure.

    A container's may have few: then the upper half of what it has. Raises LaunchError where that is next to nothing.
    """
    ranges = [_merged(uid_map), _merged(gid_map)]
    if all(any(low <= FIRST and high >= FIRST + BLOCK * BLOCKS for low, high in own) for own in ranges):
        return FIRST, BLOCK, BLOCKS
    end = min(next((high for low, high in own if low == 0), 0) for own in ranges)
    if end < _LEAST:
        raise LaunchError(
            f"this root is that of a user namespace with {end} ids, and every child needs one of its own", step="ids",
            remedy="run the application as an ordinary user (docker or podman run --user 1000), or give the namespace more ids",
        )  # fmt: skip
    end = min(end, _MOST_OF_MANY) if end <= 1 << 17 else end
    room = end - end // 2
    size = max(1, min(BLOCK, room // 32))
    return end // 2, size, min(BLOCKS, room // size)


def claim() -> IdBlock:
    """A block for the children of this process, which is root. Raises LaunchError."""
    maps = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            maps.append(file.read())
    first, size, count = blocks_here(*maps)
    return IdBlock(first=first, size=size, count=count)


def _merged(text: str) -> list[tuple[int, int]]:
    """``"0 1000 1\\n1 100000 65536"`` -> [(0, 65537)]: inside, from and up to."""
    found: list[tuple[int, int]] = []
    for first, count in sorted((int(line.split()[0]), int(line.split()[2])) for line in text.splitlines()):
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], first + count
        else:
            found.append((first, first + count))
    return found


class IdBlock:
    """A block of ids (65536, of the machine's root) that belongs to this process for as long as the object is open."""

    def __init__(
        self, lock_file: str = LOCK_FILE, *, first: int = FIRST, size: int = BLOCK, count: int | None = None
    ) -> None:
        self._size, self._count = size, BLOCKS if count is None else count
        self._lock = threading.RLock()  # re-entered when a forgotten isolator is collected under it
        self._used: set[int] = set()
        # Another process may have had this block: what its children left in a shared folder shall not belong to ours.
        self._next = int.from_bytes(os.urandom(4), "little") % size
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(lock_file, flags, 0o600)
        except OSError as error:
            remedy = f"outer ids are claimed in {os.path.dirname(lock_file)}, which must be writable"
            remedy += f" (in a container: docker or podman run --tmpfs {os.path.dirname(lock_file)})"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = "raise ulimit -n, or close isolators"
            text = f"cannot open {lock_file}: {error.strerror}"
            raise LaunchError(text, step="ids", errno=error.errno, remedy=remedy) from error
        try:
            self.base = first + size * self._claim()
        except OSError as error:
            os.close(self._fd)
            text, remedy = f"cannot lock {lock_file}: {error.strerror}", "mount a tmpfs there, which has such locks"
            raise LaunchError(text, step="ids", errno=error.errno, remedy=remedy) from error
        except LaunchError:
            os.close(self._fd)
            raise

    def _claim(self) -> int:
        for number in range(self._count):
            try:
                lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
                fcntl.fcntl(self._fd, _OFD_SETLK, lock)
            except BlockingIOError:
                continue
            return number
        raise LaunchError(
            f"all {self._count} blocks of outer ids are taken", step="ids", remedy="close other supervisors"
        )

    def take(self) -> int:
        """An id that no living child has. Raises LaunchError when all of the block are in use."""
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
