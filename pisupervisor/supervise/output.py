"""What a child writes outside of captured calls: two pipes read line by line, or only the end of stderr.

With a handler for lines the host reads both pipes, and a child that writes faster than the handlers work waits.
Without one nobody here reads: PID 1 of the sandbox keeps the last bytes of stderr in a file of ours, so that they are
there however the child ends, and no thread of the application is needed for it.
"""

from __future__ import annotations

import os
import threading

from pihost.wire import STDERR_TAIL
from pisupervisor.records import NamedTuple

_READ = 1 << 12  # bytes: so many empty lines at most come at once
_LARGEST_PIPE = 1 << 20  # what a child may make of it (fs.pipe-max-size)
_LAST_LINES = 1000
_LONGEST = 1 << 16  # bytes of one line; a longer one comes in pieces


class Line(NamedTuple):
    """``stream`` is "stdout" or "stderr"; ``text`` has no line end."""

    stream: str
    text: str


class Lines:
    """The lines of one stream. Pure."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self._begun = b""

    def feed(self, data: bytes) -> list[Line]:
        """The lines that ``data`` completes."""
        *whole, self._begun = (self._begun + data).split(b"\n")
        if len(self._begun) >= _LONGEST:
            whole.append(self._begun)
            self._begun = b""
        return [line for text in whole for line in self._pieces(text)]

    def finish(self) -> list[Line]:
        """What was begun, and will not go on."""
        begun, self._begun = self._begun, b""
        return self._pieces(begun) if begun else []

    def _pieces(self, text: bytes) -> list[Line]:
        starts = range(0, max(1, len(text)), _LONGEST)
        return [Line(self.stream, text[start : start + _LONGEST].decode("utf-8", "replace")) for start in starts]


def _last(data: bytes, most: int) -> bytes:
    """The last so many lines of it, after one that says how many are missing."""
    missing = data.count(b"\n") - most
    if missing <= 0:
        return data
    return b"[%d lines left out]\n" % missing + b"\n".join(data.rsplit(b"\n", most + 1)[1:])


class StderrTail:
    """The last bytes of stderr, kept by PID 1."""

    def __init__(self) -> None:
        self._file = os.memfd_create("pisupervisor-stderr")
        try:
            os.ftruncate(self._file, STDERR_TAIL)  # PID 1 maps it: a write would count against the limit for file sizes
            self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(self._file)
            raise
        os.set_blocking(self._reader, False)  # the payload may open the pipe too, and read what PID 1 was told of

    def fds(self) -> list[int]:
        """For the child: what ``ChildPlan.output`` counts."""
        return [self._file, self._reader, self._writer]

    def stdio(self) -> tuple[int, ...]:
        """For the child again, after a captured call: where stderr goes (or stdout and stderr)."""
        return (self._writer,)

    def launched(self) -> None:
        """The child has its copies by now. Ours of the reading end would keep alive what nobody reads any more."""
        reader, self._reader = self._reader, -1
        if reader >= 0:
            os.close(reader)

    def tail(self) -> str:
        # Written by PID 1, whom the payload cannot reach. What is read is bounded, and never mapped.
        return os.pread(self._file, STDERR_TAIL, 0).lstrip(b"\0").decode("utf-8", "replace")

    def close(self) -> None:
        self.launched()
        os.close(self._writer)
        os.close(self._file)


class OutputPipes:
    """Both streams, read by whoever calls ``read``; several threads may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tail = b""
        self._lines: dict[int, Lines] = {}  # reading end -> its stream
        self._writers: tuple[int, ...] = ()
        try:
            for stream in ("stdout", "stderr"):
                reader, writer = os.pipe2(os.O_CLOEXEC)  # blocking for the child, which waits while nobody reads
                os.set_blocking(reader, False)
                self._lines[reader], self._writers = Lines(stream), (*self._writers, writer)
        except OSError:
            self.close()
            raise

    def fds(self) -> list[int]:
        return list(self._writers)

    def stdio(self) -> tuple[int, ...]:
        return self._writers

    def launched(self) -> None:
        """Ours are kept for ``stdio``; that the child is dead is learnt from its pidfd."""

    def readers(self) -> list[int]:
        """To wait for."""
        return list(self._lines)

    def read(self, size: int = _READ, most: int | None = None) -> list[Line]:
        """What is there now, at most ``size`` bytes of each stream, the last ``most`` lines of them. Never waits."""
        with self._lock:
            return [line for fd in list(self._lines) for line in self._read(fd, size, most)]

    def _read(self, fd: int, size: int, most: int | None) -> list[Line]:
        lines = self._lines[fd]
        try:
            data = os.read(fd, size)
        except BlockingIOError:
            return []
        if lines.stream == "stderr":
            self._tail = (self._tail + data)[-STDERR_TAIL:]
        return lines.feed(data if most is None else _last(data, most))

    def finish(self) -> list[Line]:
        """What is left of a child that is dead: of each stream the last 1000 lines, whatever it has filled its pipes with."""
        left = self.read(_LARGEST_PIPE, _LAST_LINES)
        return left + [line for lines in self._lines.values() for line in lines.finish()]

    def tail(self) -> str:
        return self._tail.decode("utf-8", "replace")

    def close(self) -> None:
        with self._lock:
            fds, self._writers = (*self._lines, *self._writers), ()
            self._lines.clear()
            for fd in fds:
                os.close(fd)
