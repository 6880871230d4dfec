"""What the zygote and PID 1 say of one child, on a socket of its own. Trusted code, but beside user code: only what is asked
for is taken from it (see ``launch.zygote.failure`` and ``exits.explain_exit``).
"""

from __future__ import annotations

import _socket as socket
import os
import select
import struct
import time

from pisupervisor.launch.zygote import has_ended, send_kill
from pisupervisor.link import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPIN = 0.02
_GRACE = 0.2  # seconds for a zygote to say how PID 1 ended; measured: 0.1 ms


class Reports:
    """``known`` is all that was said so far: ``exited`` [code, signal], ``cpu``, ``gone`` [how, status]."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.known: dict[str, Any] = {}

    def read(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next report and what may ride on it (the pidfd and the link); None at the end. Raises OSError, ValueError.

        CMSG_LEN, not CMSG_SPACE: there is room for two descriptors, and no third leaks.
        """
        data, ancillary, _flags, _address = self.sock.recvmsg(65536, socket.CMSG_LEN(8), socket.MSG_CMSG_CLOEXEC)
        rights = [content for _level, kind, content in ancillary if kind == socket.SCM_RIGHTS]
        fds = [fd for content in rights for (fd,) in struct.iter_unpack("i", content)]
        try:
            return (jsontext.load(data) if data else None), fds
        except ValueError:
            for fd in fds:
                os.close(fd)
            raise

    @property
    def is_gone(self) -> bool:
        return "gone" in self.known

    def drain(self, deadline: float, init_pidfd: int) -> None:
        """Read until the zygote says ``gone``, or is gone itself. A stopped one says nothing of a death that everybody else
        can see: it is not waited for.
        """
        while not self.is_gone:
            if init_pidfd >= 0 and has_ended(init_pidfd):
                deadline = min(deadline, time.monotonic() + _GRACE)
            if not self._await_one(deadline, init_pidfd) or not self._take(kill=False):
                return

    def abandon(self, deadline: float) -> None:
        """Of a launch that failed half-way: learn of PID 1 if there is one yet, kill it, wait for its end."""
        while not self.is_gone and time.monotonic() < deadline:
            if not self._await_one(deadline, -1) or not self._take(kill=True):
                return

    def _await_one(self, deadline: float, init_pidfd: int) -> bool:
        """Whether there is something new: a report, or that PID 1 is dead."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if init_pidfd >= 0 and not has_ended(init_pidfd):
            poll.register(init_pidfd, select.POLLIN)
        return bool(poll.poll(max(_SPIN, deadline - time.monotonic()) * 1000))

    def _take(self, *, kill: bool) -> bool:
        """Read one, if there is one; False when there will be no more."""
        self.sock.setblocking(False)
        try:
            message, fds = self.read()
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            return False
        if kill and fds and "launched" in (message or {}):
            send_kill(fds[0])
        for fd in fds:
            os.close(fd)
        self.known.update(message or {})
        return message is not None
