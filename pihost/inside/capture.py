"""Standard input, output and error of one call, at the level of file descriptors: also for C code and subprocesses.

The host makes a pipe for each call's output and reads it; here it is only put in place of fds 1 and 2. Bounds are the host's.
"""

from __future__ import annotations

import os
import sys

from pihost import syscalls

if False:  # typing costs 5 ms, and only a type checker reads this
    from typing import Any


class Capture:
    """``with Capture([out, err]):`` sends fds 1 and 2 to the given pipes, which it owns, and then to nowhere: where they
    went before comes from the host again (``redirect``), because a copy kept here would be an fd that user code sees.
    """

    def __init__(self, pipes: list[int]) -> None:
        self.pipes = pipes

    def __enter__(self) -> None:
        flush()
        if len(self.pipes) != 2:  # the kernel hands over as many as there is room for
            for pipe in self.pipes:
                os.close(pipe)
            raise OSError(24, "Too many open files: none left for what the call would write")
        for target, pipe in zip((1, 2), self.pipes):
            os.dup2(pipe, target)
            os.close(pipe)

    def __exit__(self, *_error: object) -> None:
        flush()
        null = _open_null()
        for fd in {1, 2} - {null}:
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        else:
            os.set_inheritable(null, True)


class StandardInput:
    """``with StandardInput(source):`` fd 0 and ``sys.stdin`` read that, bytes or something open, which it owns; and nothing
    afterwards, as before.
    """

    def __init__(self, source: Any) -> None:
        self._fd = _file_of(source) if isinstance(source, bytes) else _own(source)

    def __enter__(self) -> None:
        os.dup2(self._fd, 0)
        os.close(self._fd)
        self._before, usual = sys.stdin, sys.__stdin__
        # Another object for each: what one has read ahead is not the next one's.
        sys.stdin = open(
            0, encoding=getattr(usual, "encoding", "utf-8"), errors=getattr(usual, "errors", None), closefd=False
        )

    def __exit__(self, *_error: object) -> None:
        sys.stdin = self._before
        null = _open_null()
        if null:
            os.dup2(null, 0)
            os.close(null)
        else:
            os.set_inheritable(null, True)  # user code had closed it


def _file_of(data: bytes) -> int:
    """A file in our own memory, which our limits count."""
    fd = os.memfd_create("stdin")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _own(source: Any) -> int:
    """The descriptor of what has come with the call: a number is ours already."""
    if isinstance(source, int):
        return source
    with source:
        return os.dup(source.fileno())


def redirect(fds: list[int], wanted: int) -> None:
    """Stdout and stderr to the given two, or stderr alone to the given one, and those closed. Where fewer came than were sent
    (the kernel hands over as many as there is room for), nobody can tell which: all goes to nowhere then, as before.
    """
    for target, fd in zip((1, 2)[-wanted:], fds):
        if len(fds) == wanted:
            os.dup2(fd, target)
        os.close(fd)


def _open_null() -> int:
    try:
        return os.open("/dev/null", os.O_RDWR)
    except OSError:  # user code has used up all descriptors
        os.closerange(1, 3)
        return os.open("/dev/null", os.O_RDWR)


def flush() -> None:
    """Python's buffers and C's. User code may have put anything in sys.stdout's place."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except Exception:  # noqa: S112  a closed or foreign stream has nothing left for us
            continue
    syscalls.flush_c_stdio()
