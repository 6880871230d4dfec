"""One socket to a child: frames out, bytes in, each by its deadline, in the calling thread."""

from __future__ import annotations

import _socket  # not socket: with its enum members it costs 4 ms of a start
import errno
import select
import struct
import threading
import time

from pihost import wire
from pisupervisor.errors import ProtocolError
from pisupervisor.link.frames import READ, Frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pisupervisor.link.output import Output

LOOK_AROUND = 1.0  # seconds without a word
LONG = LOOK_AROUND / 2  # a slice from here on does for a call without a deadline
FINE = 0.005  # seconds that a deadline may be overrun by for the sake of a system call
_FRAME_TIME = 10.0  # seconds that a child may take from the first byte of a frame to its last
_AT_ONCE = _socket.MSG_DONTWAIT
SEND = _AT_ONCE | _socket.MSG_NOSIGNAL  # an application may have SIGPIPE as it was born: a dead child is not its end


class Broken(Exception):
    """``written``: what a captured call wrote until then: stdout, stderr, and whether there was more."""

    written: tuple[bytes, bytes, bool] = (b"", b"", False)


class LinkClosed(Broken):
    """The other end is gone. Who owns the child knows why."""


class NeverSent(LinkClosed):
    """It was gone before it had the call."""


class DeadlinePassed(Broken):
    """The call's time is up."""


class Channel:
    """What a ``Connection`` stands on: it knows of frames and deadlines, not of calls."""

    def __init__(self, link: _socket.socket, is_over: Callable[[], bool] | None) -> None:
        self.link = link
        self._is_over = is_over or _never
        self._frames = Frames()
        self._began = 0.0  # when the frame began that is not whole yet
        self._sending = threading.RLock()
        self._has_just_called = False  # nothing was sent since the one call under way, which is a small one
        # A fork of the application made while the link was made holds the other end: then it never closes, and whoever
        # waits must look around now and then. By the kernel's timer, because poll before each recv would cost 1 us.
        self._slice = 0.0
        self._set_slice(LOOK_AROUND)

    # --- out --------------------------------------------------------------------------------------------------

    def send(
        self, kind: int, body: bytes, fds: tuple[int, ...] = (), deadline: float | None = None, ident: int = 0
    ) -> None:
        """Send one frame. Descriptors ride on it, which the child always reads with room for them."""
        header = wire.pack_header(kind | wire.RIDING if fds else kind, ident, len(body))
        with self._sending:
            self._has_just_called = False
            if fds or len(body) >= READ:
                self._send_large(header, body, fds, deadline)
                return
            data = header + body
            sent = self._send_some(data, NeverSent)
            if sent < len(data):
                self._push(memoryview(data)[sent:], deadline)

    def _send_large(self, header: bytes, body: bytes, fds: tuple[int, ...], deadline: float | None) -> None:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        while True:
            try:
                sent = self.link.sendmsg([header, body], rights, SEND)
                break
            except BlockingIOError:
                self._make_room(deadline)
            except OSError as error:
                raise NeverSent from error
        self._push(memoryview(header)[sent:], deadline)
        self._push(memoryview(body)[max(0, sent - len(header)) :], deadline)

    def _send_some(self, data: bytes | memoryview, gone: type[LinkClosed] = LinkClosed) -> int:
        try:
            return self.link.send(data, SEND)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise gone from error

    def _push(self, data: memoryview, deadline: float | None) -> None:
        """The rest, as fast as the child takes it."""
        while data:
            sent = self._send_some(data)
            data = data[sent:]
            if not sent:
                self._make_room(deadline)

    def _make_room(self, deadline: float | None) -> None:
        """Wait until the child takes more."""
        self._poll(select.POLLOUT, deadline)

    def _poll(self, events: int, deadline: float | None) -> int:
        """Which of those can be done now; 0 for none in a while."""
        poll = select.poll()
        poll.register(self.link, events)
        until = min(deadline or float("inf"), time.monotonic() + LOOK_AROUND)
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        if ready:
            return ready[0][1]
        self._look_around(None, deadline)
        return 0

    # --- in ---------------------------------------------------------------------------------------------------

    def receive_at_once(self) -> bytes | None:
        """What is there now, None for nothing, b"" at the end."""
        try:
            return self.link.recv(READ, _AT_ONCE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> LinkClosed:
        """ECONNRESET: the child's end was closed with something unread in it, so with the last byte that was sent. A large
        call would not be called unread: reading it may be what the child died of, and would again.
        """
        return NeverSent() if self._has_just_called and error.errno == errno.ECONNRESET else LinkClosed()

    def _feed(self, data: bytes) -> None:
        if not data:
            raise LinkClosed
        self._frames.feed(data)

    def _receive(self, deadline: float | None, captured: Output | None) -> bytes:
        """What comes next. The time for one frame runs from its first byte, so that a slow writer cannot hold a caller."""
        until, size = deadline, READ
        if self._frames.partial:
            now = time.monotonic()
            self._began = self._began or now
            until = min(deadline or float("inf"), self._began + _FRAME_TIME)
            size = max(READ, min(self._frames.missing, wire.MAX_FRAME))
        while True:
            try:
                if until is None and captured is None and self._slice >= LONG:
                    return self.link.recv(size)  # plain recv: the kernel drops any fds
                return self._receive_until(size, until, captured)
            except BlockingIOError:
                self._look_around(until, deadline)
            except OSError as error:
                raise self._lost(error) from error

    def _receive_until(self, size: int, until: float | None, captured: Output | None) -> bytes:
        now = time.monotonic()
        left = LOOK_AROUND if until is None else min(LOOK_AROUND, until - now)
        if left <= 0:
            raise BlockingIOError
        if captured is None:
            self._set_slice(left)
            return self.link.recv(size)
        fd = self.link.fileno()
        if fd < 0:
            raise LinkClosed
        if not captured.wait_for(fd, now + left):
            raise BlockingIOError
        return self.link.recv(size, _AT_ONCE)

    def _set_slice(self, seconds: float) -> None:
        """How long the kernel waits in one recv. Set anew where that matters: the deadlines of calls are much alike."""
        if self._slice - FINE <= seconds <= 2 * self._slice:
            return
        self._slice = max(0.001, seconds)  # 0 would be for ever
        value = struct.pack("ll", int(self._slice), int(self._slice % 1 * 1e6))
        self.link.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, value)

    def _look_around(self, until: float | None, deadline: float | None) -> None:
        """Nothing came for a while. Raises where that means something."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise DeadlinePassed
        if until is not None and now >= until:
            raise ProtocolError(f"a frame that was not whole after {_FRAME_TIME:g} s")
        if self._is_over():
            raise LinkClosed


def _never() -> bool:
    return False
