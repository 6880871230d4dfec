"""PID 1 of a sandbox: reaps, holds the lifeline, dies with the host. Its end is the end of everything in its namespace."""

from __future__ import annotations

import _signal
import os
import select

from pihost.confine import Fds
from pihost.jsontext import dump
from pihost.wire import STDERR_TAIL

_OUT_OF_THE_WAY = 0.02  # seconds; a first call is over in less


def fork() -> int:
    """The payload's pid; 0 in the payload. Its end wakes PID 1 from then on."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGCHLD})
    payload = os.fork()
    if payload == 0:
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGCHLD})
    return payload


def run(fds: Fds, payload: int, *, lifeline: bool = True) -> None:
    """Never returns. Same walls as the payload, which cannot touch it: not dumpable, and immune to its signals."""
    os.close(fds.link)
    try:
        # Asleep while the payload starts, unless it ends: what follows copies 60 pages (0.15 ms), on its CPU perhaps.
        _signal.sigtimedwait({_signal.SIGCHLD}, _OUT_OF_THE_WAY)
    except OSError:
        pass  # the filter refuses that
    wake = _wake_on_children()
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    if lifeline:
        poll.register(fds.host, select.POLLIN)
    file, stderr = fds.stderr() or (-1, -1)
    if stderr >= 0:
        poll.register(stderr, select.POLLIN)
    tail = b""
    while True:
        # Reap before the first wait: the payload may have died before the handler was there.
        ended = _reap(payload)
        ready_fds = [fd for fd, _events in poll.poll(None if ended is None else 0)]
        if fds.host in ready_fds:  # the lifeline: a pidfd, because a fork of the host would hold a pipe open
            os._exit(0)
        if stderr in ready_fds:  # also what a payload that has ended wrote last
            tail = _keep(file, tail, stderr)
        if ended is not None:
            os.write(fds.status, dump(ended))
            os._exit(0)
        if wake in ready_fds:
            os.read(wake, 4096)


def _keep(file: int, tail: bytes, stderr: int) -> bytes:
    """The end of stderr, in a file of the host's: it can be read there however this process ends. Mapped, because a
    write would be held to RLIMIT_FSIZE.
    """
    try:
        import mmap  # only where something is written: most children never do

        tail = (tail + os.read(stderr, 1 << 20))[-STDERR_TAIL:]
        with mmap.mmap(file, STDERR_TAIL) as kept:
            kept[:] = tail.rjust(STDERR_TAIL, b"\0")
    except (OSError, ImportError, MemoryError):
        pass  # the payload was quicker (the pipe does not block), or there is no memory left to keep it in
    return tail


def _wake_on_children() -> int:
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    _signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGCHLD, _nothing)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGCHLD})
    return wake


def _nothing(_number: int, _frame: object) -> None:
    """A handler must exist for the wake-up byte to be written."""


def _reap(payload: int) -> dict[str, object] | None:
    """Reap every zombie; what is to be reported once the payload is among them."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return {"exited": [None, None], "cpu": 0.0}
        if pid == 0:
            return None
        if pid == payload:
            code = os.waitstatus_to_exitcode(status)
            how = [code, None] if code >= 0 else [None, -code]
            return {"exited": how, "cpu": usage.ru_utime + usage.ru_stime}
