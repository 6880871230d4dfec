"""Talking to one child: whole frames out, whole frames in, by the calling thread itself. The child is believed nothing."""

from __future__ import annotations

import _socket  # not socket: with its enum members it costs 4 ms of a start
import os
import select
import struct
import time

from pihost import wire
from pisupervisor.errors import IsolationError, ProtocolError
from pisupervisor.records import NamedTuple

_READ = 1 << 16
_LOOK_AROUND = 1.0  # seconds without a word
_FRAME_TIME = 10.0  # seconds that a child may take from the first byte of a frame to its last


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pisupervisor.link.arenas import Arenas

    Answerer = Callable[[int, bytes], bytes]


class LinkClosed(Exception):
    """The other end is gone. Who owns the child knows why."""


class DeadlinePassed(Exception):
    """The call's time is up."""


class Answer(NamedTuple):
    """A reply: its kind (see ``wire``), its body, and what the call wrote meanwhile, where that was asked for."""

    kind: int
    body: bytes
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


class Connection:
    """One call at a time, and within it those that its callbacks make. ``largest`` bounds one answer, in bytes, however
    many pieces it comes in; ``stdio`` is where the child's stdout and stderr (or stderr alone) go outside of captured
    calls.
    """

    def __init__(
        self, link: _socket.socket, largest: int, stdio: tuple[int, ...] = (), answer: Answerer | None = None,
        is_over: Callable[[], bool] | None = None, make_arenas: Callable[[], Arenas] | None = None,
    ) -> None:  # fmt: skip
        self.link = link
        self._is_over = is_over or _never
        # A fork of the application made while the link was made holds the other end: then it never closes, and whoever
        # waits must look around now and then. By the kernel's timer, because poll before each recv would cost 1 us.
        link.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, struct.pack("ll", int(_LOOK_AROUND), 0))
        self._answer = answer  # for what the child asks while it works on a call: kind and body in, body out
        self._depth = 0
        self._outputs: list[_Output] = []  # of the calls under way that are captured, the innermost last
        self.released: list[int] = []  # objects that nobody holds any more
        self.largest = largest + (1 << 16)  # the value itself is bounded by the encoder; this much is its packing
        self._stdio, self._displaced = stdio, False
        self._pending = bytearray()
        self.sent: set[str] = set()  # keys of the code that the child has
        self._make_arenas = make_arenas
        self._arenas: Arenas | None = None
        self.written = (b"", b"", False)  # by the last call whose output was asked for: stdout, stderr, truncated

    def arenas(self) -> Arenas:
        """The memory that both sides see, made when it is first needed."""
        if self._arenas is None:
            from pisupervisor.link.arenas import Arenas

            self._arenas = self._make_arenas() if self._make_arenas is not None else Arenas(0, 0, False)
        return self._arenas

    def forget_arenas(self) -> None:
        """The child is gone. Handles may keep this connection, and results that were lent keep their own memory."""
        self._arenas = None

    def send(
        self, kind: int, body: bytes, fds: tuple[int, ...] = (), deadline: float | None = None, ident: int = 0
    ) -> int:
        """Send one frame; its id. Descriptors ride on the body, which the child always reads with room for them."""
        if kind == wire.CALL:
            ident = int.from_bytes(os.urandom(8), "little")  # an answer given before its call cannot guess it
        header = wire.pack_header(kind, ident, len(body))
        try:
            self._set_timeout(deadline)
            if fds:
                self.link.sendall(header)
                rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
                sent = self.link.sendmsg([body], [rights])
                if sent < len(body):
                    self.link.sendall(memoryview(body)[sent:])
            else:
                self.link.sendall(header + body if len(body) < _READ else header)
                if len(body) >= _READ:
                    self.link.sendall(body)
        except TimeoutError:
            raise DeadlinePassed from None
        except OSError as error:
            raise LinkClosed from error
        return ident

    def call(
        self, body: bytes, deadline: float | None = None, output: int | None = None, fds: tuple[int, ...] = ()
    ) -> Answer:
        """Send a call and wait for its answer. ``output``: bytes to keep of each of stdout and stderr, None for neither.
        ``fds`` ride on it.

        Raises LinkClosed, DeadlinePassed (the child is then in an unknown state: kill it) or ProtocolError (likewise).
        """
        nested, self._depth = self._depth > 0, self._depth + 1
        try:
            return self._call(body, deadline, output, nested, fds)
        finally:
            self._depth -= 1

    def _call(
        self, body: bytes, deadline: float | None, output: int | None, nested: bool, fds: tuple[int, ...]
    ) -> Answer:
        self._release(deadline)
        if output is None:
            self.restore_stdio(deadline)
            return self._receive(self.send(wire.CALL, body, fds, deadline), deadline)
        with _Output(output) as captured:
            self._outputs.append(captured)
            self.send(wire.OUTPUT, b"\0", captured.writers, deadline)
            try:
                answer = self._receive(self.send(wire.CALL, body, fds, deadline), deadline)
            finally:
                captured.drain()
                self.written = (captured.text(0), captured.text(1), captured.truncated)
                self._outputs.pop()
                self._displaced = True
            self.restore_stdio(deadline, at_once=nested)
            return answer._replace(stdout=captured.text(0), stderr=captured.text(1), truncated=captured.truncated)

    def restore_stdio(self, deadline: float | None = None, *, at_once: bool = True) -> None:
        """After a captured call, and before anything else runs: its pipes were put in the place of stdout and stderr.

        Around it there may be another call, whose callback made this one: that goes on at once.
        """
        stdio = self._outputs[-1].writers if self._outputs else self._stdio
        if self._displaced and stdio and at_once:
            self._displaced = False
            self.send(wire.STDIO, bytes((len(stdio),)), stdio, deadline)

    def _release(self, deadline: float | None) -> None:
        if self.released:
            numbers, self.released = self.released, []
            self.send(wire.RELEASE, struct.pack(f"<{len(numbers)}Q", *numbers), deadline=deadline)

    def _receive(self, ident: int, deadline: float | None) -> Answer:
        whole, pieces, asked = bytearray(), 0, False
        most = self.largest // wire.PIECE_SIZE + wire.MAX_BUFFERS + 8  # an honest child begins a piece for each part
        while True:
            kind, answered, body = self._frame(deadline, self._outputs[-1] if self._outputs else None)
            if kind in (wire.CALLBACK, wire.CALLBACK_RAW) and answered == ident:
                self._callback(kind, answered, body, deadline)
                continue
            if kind == wire.ROOM and answered == ident and not asked:
                asked = True
                self._give_room(answered, body, deadline)
                continue
            if answered != ident:
                raise ProtocolError(f"an answer to call {answered}, where {ident} is the one under way")
            if kind in (wire.READY, wire.ROOM):
                raise ProtocolError("ready said twice" if kind == wire.READY else "room asked for twice")
            if len(whole) + len(body) > self.largest:
                raise ProtocolError(f"an answer of more than {self.largest} bytes")
            if kind != wire.PIECE:
                return Answer(kind, bytes(whole + body) if whole else body)
            whole += body
            pieces += 1
            if pieces > most:
                raise ProtocolError(f"an answer in more than {most} pieces")

    def _callback(self, kind: int, ident: int, body: bytes, deadline: float | None) -> None:
        if self._answer is None:
            raise ProtocolError("a callback where there are none")
        answer = self._answer(kind, body)  # may call into the child in turn
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlinePassed
        self.send(wire.ANSWER, answer, deadline=deadline, ident=ident)

    def _give_room(self, ident: int, body: bytes, deadline: float | None) -> None:
        if len(body) != 8:
            raise ProtocolError("room asked for without a size")
        answer, arena = self.arenas().room(int.from_bytes(body, "little"))
        try:
            self.send(wire.ANSWER, answer, () if arena is None else (arena.fd,), deadline, ident)
        finally:
            if arena is not None:
                arena.close_fd()

    def _frame(self, deadline: float | None, captured: _Output | None) -> tuple[int, int, bytes]:
        """The next whole frame. The time for one runs from its first byte, so that a slow writer cannot hold a caller."""
        pending, need = self._pending, wire.HEADER.size
        frame_deadline: float | None = deadline
        started = bool(pending)
        header: tuple[int, int, int] | None = None
        while len(pending) < need or header is None:
            if len(pending) >= need and header is None:
                header = self._header(pending)
                need += header[2]
                continue
            if started and frame_deadline is deadline:
                frame_deadline = min(deadline or float("inf"), time.monotonic() + _FRAME_TIME)
            self._read_more(need - len(pending), frame_deadline, deadline, captured)
            started = True
        body = bytes(memoryview(pending)[wire.HEADER.size : need])
        del pending[:need]
        return header[0], header[1], body

    def _header(self, pending: bytearray) -> tuple[int, int, int]:
        try:
            header = wire.unpack_header(pending)
        except wire.BadFrame as error:
            raise ProtocolError(f"the child sent {error}") from None
        if header[0] not in wire.FROM_CHILD:
            raise ProtocolError(f"a frame of kind {header[0]}, which no child may send")
        return header

    def _read_more(self, missing: int, until: float | None, deadline: float | None, captured: _Output | None) -> None:
        size = max(_READ, min(missing, wire.MAX_FRAME))
        while True:
            sliced = None
            if until is not None or captured is not None:
                sliced = min(until or float("inf"), time.monotonic() + _LOOK_AROUND)
            try:
                if captured is not None:
                    captured.wait_for(self.link, sliced)
                self._set_timeout(sliced)
                data = self.link.recv(size)  # plain recv: the kernel drops any fds
            except (TimeoutError, BlockingIOError):
                self._look_around(until, deadline)
                continue
            except OSError as error:
                raise LinkClosed from error
            if not data:
                raise LinkClosed
            self._pending += data
            return

    def _look_around(self, until: float | None, deadline: float | None) -> None:
        """Nothing came for a while. Raises where that means something."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise DeadlinePassed
        if until is not None and now >= until:
            raise ProtocolError(f"a frame that was not whole after {_FRAME_TIME:g} s")
        if self._is_over():
            raise LinkClosed

    def _set_timeout(self, until: float | None) -> None:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        if self.link.gettimeout() != left:
            self.link.settimeout(left)


def _never() -> bool:
    return False


class _Output:
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
        self._open = set(self.readers)
        self._link = -1

    def __enter__(self) -> _Output:
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

    def wait_for(self, link: _socket.socket, until: float | None) -> None:
        """Read output until the link has something to say or ``until`` has passed."""
        if self._link < 0:
            self._link = link.fileno()
            if self._link < 0:
                raise LinkClosed
            self.poll.register(self._link, select.POLLIN)
        while True:
            if link.fileno() != self._link:
                raise LinkClosed  # by another thread; the number may be somebody else's by now
            left = None if until is None else max(0.0, (until - time.monotonic()) * 1000)
            ready = {fd for fd, _event in self.poll.poll(left)}
            for fd in ready & self._open:
                self._read(fd)
            late = until is not None and time.monotonic() >= until  # a flood may keep the pipes ready for ever
            if not ready or self._link in ready or late:
                return

    def drain(self) -> None:
        """What was written before the answer is in the pipes by now: read until they are empty, a flood notwithstanding."""
        for fd in tuple(self._open):
            for _ in range(64):  # a pipe holds 64 KiB; who goes on writing after the answer is not waited for
                if not self._read(fd):
                    break

    def _read(self, fd: int) -> bool:
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return False
        if not data:
            self.poll.unregister(fd)
            self._open.discard(fd)
            return False
        kept = self.kept[self.readers.index(fd)]
        room = self.limit - len(kept)
        kept += data[:room] if room > 0 else b""
        self.truncated |= len(data) > room
        return True

    def text(self, which: int) -> bytes:
        return bytes(self.kept[which])
