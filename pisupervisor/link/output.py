"""What one call writes to stdout and stderr: two pipes, read while it runs, kept up to a bound."""

from __future__ import annotations

import os
import select
import time

from pisupervisor.errors import IsolationError

_READ = 1 << 16


class Output:
    """Two pipes for one call. What is over the bound is read and thrown away, so that the writer never hangs."""

    def __init__(self, limit: int) -> None:
        self.limit, self.truncated = limit, False
        self.kept = (bytearray(), bytearray())
        self.readers: tuple[int, ...] = ()
        self.writers: tuple[int, ...] = ()
        try:
            for _stream in ("stdout", "stderr"):
                reader, writer = os.pipe()
                self.readers, self.writers = (*self.readers, reader), (*self.writers, writer)
        except OSError as error:
            self.__exit__()
            raise IsolationError(
                f"no pipe for what the call writes: {error.strerror} (remedy: raise ulimit -n)"
            ) from None
        for reader in self.readers:
            os.set_blocking(reader, False)
        self.poll = select.poll()
        self.open = set(self.readers)

    def __enter__(self) -> Output:
        for reader in self.readers:
            self.poll.register(reader, select.POLLIN)
        return self

    def __exit__(self, *_error: object) -> None:
        self.close_writers()
        for reader in self.readers:
            os.close(reader)

    def close_writers(self) -> None:
        for writer in self.writers:
            os.close(writer)
        self.writers = ()

    def wait_for(self, fd: int, until: float | None) -> bool:
        """Read output until ``fd`` has something to say; False when ``until`` has passed before."""
        self.poll.register(fd, select.POLLIN)
        try:
            while True:
                left = None if until is None else max(0.0, (until - time.monotonic()) * 1000)
                ready = {fd for fd, _event in self.poll.poll(left)}
                for each in ready & self.open:
                    self.read(each)
                if fd in ready:
                    return True
                if not ready or (until is not None and time.monotonic() >= until):
                    return False  # a flood may keep the pipes ready for ever
        finally:
            self.poll.unregister(fd)

    def drain(self) -> None:
        """What was written before the answer is in the pipes by now: read until they are empty, a flood notwithstanding."""
        for fd in tuple(self.open):
            for _ in range(64):  # a pipe holds 64 KiB; who goes on writing after the answer is not waited for
                if not self.read(fd):
                    break

    def read(self, fd: int) -> bool:
        """Whether there was anything."""
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return False
        if not data:
            self.poll.unregister(fd)
            self.open.discard(fd)
            return False
        kept = self.kept[self.readers.index(fd)]
        room = self.limit - len(kept)
        kept += data[:room] if room > 0 else b""
        self.truncated |= len(data) > room
        return True

    def written(self) -> tuple[bytes, bytes, bool]:
        """Stdout, stderr, and whether there was more."""
        return bytes(self.kept[0]), bytes(self.kept[1]), self.truncated
