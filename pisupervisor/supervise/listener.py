"""The host's end of a seccomp listener: one thread for each watched child, which says what was called, and answers.

A child waits in the kernel while nobody answers; it can neither answer itself nor take the question back. What is noted
is bounded: so many different calls, and a count for each.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
from collections.abc import Callable

from pisupervisor.launch import seccomp_watch
from pisupervisor.launch.seccomp_rules import ERRNO
from pisupervisor.launch.seccomp_tree import Decision
from pisupervisor.launch.seccomp_watch import Answers
from pisupervisor.link.bells import PollBell
from pisupervisor.records import replace
from pisupervisor.results import SystemCall

# struct seccomp_notif {id, pid, flags, {nr, arch, instruction_pointer, args[6]}}, struct seccomp_notif_resp
_ASKED, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_MOST = 64  # sets of arguments that are noted of one call
_AGAIN = 0.001
_JOIN = 2.0  # seconds; the thread answers in microseconds


class Log:
    """Every different call that was handed over by one isolator's children. Safe from any thread.

    Nobody can hide a call behind many others: of each name and answer the first 64 sets of arguments are noted, and what
    comes after that counts for the first of them.
    """

    def __init__(self, tell: Callable[[SystemCall], object]) -> None:
        self._lock = threading.Lock()
        self._tell = tell
        self._seen: dict[tuple[str, str], dict[tuple[int, ...], SystemCall]] = {}

    def add(self, call: SystemCall) -> None:
        with self._lock:
            alike = self._seen.setdefault((call.name, call.action), {})
            key = call.arguments
            if key not in alike and len(alike) >= _MOST:
                key = next(iter(alike))
            known = alike.get(key)
            alike[key] = call if known is None else replace(known, count=known.count + 1)
        if known is None:
            self._tell(call)

    def calls(self) -> tuple[SystemCall, ...]:
        with self._lock:
            return tuple(call for alike in self._seen.values() for call in alike.values())


class Listener:
    """Answers for one child until ``close`` or its end. Owns ``fd``. ``kill(message)`` ends the child, and says False
    while somebody else is about to.
    """

    def __init__(self, fd: int, answers: Answers, log: Log, kill: Callable[[str], bool]) -> None:
        self.killed_for: str | None = None  # the call
        self._fd, self._answers, self._log, self._kill = fd, answers, log, kill
        self._closing = threading.Event()
        self._wake = PollBell()
        self._thread = threading.Thread(target=self._run, name="pisupervisor-seccomp", daemon=True)
        self._wake.start(self._thread)

    def close(self) -> None:
        """The child has ended, or shall: whatever it still asks is answered with ENOSYS by the kernel."""
        self._closing.set()
        self._wake.ring()
        self._thread.join(_JOIN)
        self._wake.close()
        os.close(self._fd)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closing.is_set():  # after that the descriptors may be somebody else's
            ready = dict(poll.poll())
            if self._wake.fileno() in ready or not ready.get(self._fd, 0) & select.POLLIN:
                return  # closing, or nobody lives behind that filter any more
            try:
                self._serve()
            except OSError:
                continue  # who asked was killed since
            except Exception as error:  # nobody would answer any more: better no child than one that waits for ever
                self._end(f"its system calls can no longer be answered: {type(error).__name__}: {error}")
                return

    def _serve(self) -> None:
        question = bytearray(_ASKED.size)
        _ioctl(self._fd, _RECEIVE, question)
        ident, process, _flags, number, _arch, _where, *arguments = _ASKED.unpack(question)
        known = self._answers.decisions.get(number, Decision((), ERRNO | 38))
        answer = seccomp_watch.answer(known, tuple(arguments), self._answers.watch)
        call = SystemCall(
            name=self._answers.name(number), number=number, arguments=tuple(arguments), action=answer.action,
            errno=answer.error, pid=process,
        )  # fmt: skip
        self._log.add(call)
        if answer.kill:
            self.killed_for = call.name
            self._end(f"the seccomp profile kills for it: {call}")
        else:
            reply = _ANSWER.pack(ident, 0, -answer.error, 0 if answer.error else _CONTINUE)
            _ioctl(self._fd, _SEND, bytearray(reply))

    def _end(self, why: str) -> None:
        while not self._kill(why) and not self._closing.wait(_AGAIN):
            pass


def _ioctl(fd: int, request: int, data: bytearray) -> None:
    """Again where a signal of the application's came in between: Python does not see to that, and a call whose answer was
    not sent would wait for ever. Raises OSError.
    """
    while True:
        try:
            fcntl.ioctl(fd, request, data, True)
            return
        except InterruptedError:
            continue
