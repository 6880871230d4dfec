"""Calls into one child: sent by the calling thread itself, which then reads the answer. The child is believed nothing.

Below it lie ``answers``, which is about waiting for them, and ``channel``, which is about bytes and deadlines.
"""

from __future__ import annotations

import os
import struct
import threading
import time

from pihost import wire
from pisupervisor.errors import IsolationError
from pisupervisor.link.answers import Answers
from pisupervisor.link.bells import Bell, PollBell
from pisupervisor.link.channel import FINE, LONG, LOOK_AROUND, SEND, Broken, DeadlinePassed, LinkClosed, NeverSent
from pisupervisor.link.frames import READ, Answer, Pending, plain_text
from pisupervisor.link.output import Output
from pisupervisor.records import NamedTuple

_CALL = struct.Struct("<IQI")  # a header, whose first fields are one number here
_CALL_WORD, _INNER_WORD = (wire.MAGIC | wire.VERSION << 16 | kind << 24 for kind in (wire.CALL, wire.INNER))
_IDENTS = struct.Struct("<32Q")

__all__ = ["Answer", "Broken", "Connection", "DeadlinePassed", "LinkClosed", "NeverSent"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from pisupervisor.link.answers import Answerer
    from pisupervisor.link.arenas import Arenas
    from pisupervisor.link.calls import Payload


class Request(NamedTuple):
    """A call as it is sent. ``within`` is the id of the one whose callback makes it, or 0."""

    body: bytes
    fds: tuple[int, ...] = ()
    within: int = 0


class Connection(Answers):
    """The calls into one child. ``largest`` bounds one answer, in bytes; ``stdio`` is where the child's stdout and stderr
    (or stderr alone) go outside of captured calls. ``shared``: several threads may call at once; one of those that wait
    reads for all.
    """

    def __init__(
        self, link: _socket.socket, largest: int, stdio: tuple[int, ...] = (), answer: Answerer | None = None,
        is_over: Callable[[], bool] | None = None, make_arenas: Callable[[], Arenas] | None = None,
        kill_late: Callable[[], object] | None = None, *, shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(link, largest, answer, is_over, make_arenas, kill_late, shared=shared)
        self.sent: set[str] = set()  # keys of the code that the child has
        self.released: list[int] = []  # objects that nobody holds any more
        self.streams: set[int] = set()  # generators that somebody holds, and which are not over
        self._stdio, self._displaced = stdio, False
        self._tidying = threading.RLock()
        self._outputs: list[Output] = []  # of the calls under way that are captured, the innermost last
        self._idents: list[int] = []

    def call(
        self, body: bytes, deadline: float | None = None, output: int | None = None, fds: tuple[int, ...] = (),
        ident: int = 0, within: int = 0,
    ) -> Answer:  # fmt: skip
        """Send a call and wait for its answer. ``output``: bytes to keep of each of stdout and stderr, None for neither;
        ``fds`` ride on it; ``ident``: from ``new_ident``; ``within``: the id of the call whose callback makes this one.

        Raises LinkClosed, DeadlinePassed (the child is then in an unknown state: kill it) or ProtocolError (likewise).
        """
        if output is not None:
            return self._call_captured(Request(body, fds, within), deadline, output, ident)
        if self._displaced or self.released:
            self.tidy(deadline)
        pending = Pending(ident or self.new_ident(), self.largest, self.new_bell())
        self.begin(pending, Request(body, fds, within), deadline)
        return self._wait(pending, deadline, None)

    def ask(self, ident: int, body: bytes, deadline: float | None) -> bytes | None:
        """``call`` for the commonest case, in as few steps as can be: the text of the answer, where that is plain data in one
        frame. None: it is not, or not there yet; ``wait`` for it.
        """
        if not self.put(ident, body, deadline):
            return None
        try:
            if deadline is not None or self._slice < LONG:
                self._set_slice(min(LOOK_AROUND, max(FINE, (deadline or float("inf")) - time.monotonic())))
            said = self.link.recv(READ)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(error) from error
        return plain_text(said, ident) or self.understand(ident, said)

    def put(self, ident: int, body: bytes, deadline: float | None) -> bool:
        """Send a call for ``ask``; whether its answer is the next that comes. In any case ``wait`` may be asked for it."""
        if self._displaced or self.released or self.calls:
            self.tidy(deadline)
            self.begin(Pending(ident, self.largest), Request(body), deadline)
            return False
        data = _CALL.pack(_CALL_WORD, ident, len(body)) + body
        try:
            sent = self.link.send(data, SEND)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise NeverSent from error
        if sent == len(data):
            self._has_just_called = sent < READ
            return True
        self.calls[ident] = Pending(ident, self.largest)
        self._push(memoryview(data)[sent:], deadline)
        return False

    def understand(self, ident: int, said: bytes) -> bytes | None:
        """What ``ask`` returns, where that was read."""
        text = plain_text(said, ident)
        if text is None:
            self.calls[ident] = Pending(ident, self.largest)
            self._feed(said)
        return text

    def begin(self, pending: Pending, request: Request, deadline: float | None = None) -> None:
        """Send a call, do not wait."""
        self.calls[pending.ident] = pending  # before it is sent: another thread may read its answer
        body, fds, within = request
        if within:
            self.send(wire.INNER, wire.OUTER.pack(within) + body, fds, deadline, pending.ident)
        else:
            self.send(wire.CALL, body, fds, deadline, pending.ident)
            # With several threads another one may have sent something since.
            self._has_just_called = self._leader is None and len(self.calls) == 1 and len(body) < READ

    # --- many at once: see ``Pipeline`` ------------------------------------------------------------------------

    def header(self, pending: Pending, size: int, within: int = 0) -> bytes:
        """What a call begins with that is sent with ``send_frames``, before a body of that size; its answer may come from then
        on.
        """
        self.calls[pending.ident] = pending
        if within:
            return _CALL.pack(_INNER_WORD, pending.ident, wire.OUTER.size + size) + wire.OUTER.pack(within)
        return _CALL.pack(_CALL_WORD, pending.ident, size)

    def send_frames(self, data: bytes, deadline: float | None) -> None:
        if self._displaced or self.released:
            self.tidy(deadline)
        with self._sending:
            self._has_just_called = False
            sent = self._send_some(data, NeverSent)
            self._push(memoryview(data)[sent:], deadline)

    # --- a call whose output is captured ----------------------------------------------------------------------

    def _call_captured(self, request: Request, deadline: float | None, output: int, ident: int) -> Answer:
        try:
            bell = PollBell() if self._leader is not None else None
        except OSError as error:
            raise IsolationError(f"the call cannot be waited for: {error.strerror} (remedy: raise ulimit -n)") from None
        pending = Pending(ident or self.new_ident(), self.largest, bell)
        try:
            with Output(output) as captured:
                return self._capture(pending, request, deadline, captured)
        finally:
            self.calls.pop(pending.ident, None)
            if bell is not None:
                bell.close()

    def _capture(self, pending: Pending, request: Request, deadline: float | None, captured: Output) -> Answer:
        self._release(deadline)
        self._outputs.append(captured)
        try:
            self.begin(pending, request._replace(fds=captured.writers + request.fds), deadline)
            answer = self._wait(pending, deadline, captured)
        except (LinkClosed, DeadlinePassed) as error:
            captured.drain()
            error.written = captured.written()
            raise
        finally:
            with self._tidying:
                self._outputs.remove(captured)
            self._displaced = True
        captured.drain()
        if request.within or self._leader is not None:  # somebody goes on at once
            self._restore_stdio(deadline)
        stdout, stderr, truncated = captured.written()
        return answer._replace(stdout=stdout, stderr=stderr, truncated=truncated)

    def attach(self, payload: Payload, deadline: float | None, chain: list[int]) -> tuple[bytes, tuple[int, ...]]:
        from pisupervisor.link import attachments

        return attachments.answer(payload, self, deadline, chain)

    # --- before a call ----------------------------------------------------------------------------------------

    def tidy(self, deadline: float | None = None) -> None:
        """What the child is to know before anything else runs: objects that nobody holds any more, and where its output goes
        after a captured call, whose pipes were put in the place of stdout and stderr.
        """
        self._release(deadline)
        self._restore_stdio(deadline)

    def _restore_stdio(self, deadline: float | None) -> None:
        if not self._displaced:
            return
        with self._tidying:  # what is sent is open until it has been
            stdio = self._outputs[-1].writers if self._outputs else self._stdio
            if stdio:
                self._displaced = False
                self.send(wire.STDIO, bytes((len(stdio),)), stdio, deadline)

    def _release(self, deadline: float | None) -> None:
        with self._tidying:
            numbers = self.released[:]
            del self.released[: len(numbers)]  # others may have added some since
        if numbers:
            self.send(wire.RELEASE, struct.pack(f"<{len(numbers)}Q", *numbers), deadline=deadline)

    def has_a_map(self) -> bool:
        """Whether calls of one are under way, whose callbacks may run in any thread that waits."""
        return any(pending.of_map for pending in [*self.calls.values()])

    def is_wanted(self) -> bool:
        """Whether somebody may still ask for what comes of a call, or for the next item of a stream."""
        return bool(self.streams) or any(not pending.is_abandoned for pending in [*self.calls.values()])

    def forget_memory(self, number: int) -> None:
        """A shared array is gone; the child is told with the next call."""
        self.released.append(number)
        arenas = self._arenas
        if arenas is not None:
            arenas.shared.discard(number)

    def pending(self, ident: int) -> Pending:
        """The call with that id, also where nothing of its answer has come yet."""
        return self.calls.get(ident) or self.calls.setdefault(ident, Pending(ident, self.largest, self.new_bell()))

    def new_bell(self) -> Bell | None:
        return None if self._leader is None else Bell()

    def new_ident(self) -> int:
        """Random: an answer given before its call cannot guess it. Drawn by the dozen, a system call each is half a
        microsecond.
        """
        while True:
            try:
                return self._idents.pop()
            except IndexError:
                self._idents += _IDENTS.unpack(os.urandom(_IDENTS.size))
