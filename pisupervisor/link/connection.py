"""Talking to one child: whole frames out, whole frames in, by the calling thread itself. The child is believed nothing."""

from __future__ import annotations

import _socket  # not socket: with its enum members it costs 4 ms of a start
import os
import select
import struct
import threading
import time

from pihost import wire
from pisupervisor.errors import ProtocolError
from pisupervisor.link.bells import Bell, PollBell
from pisupervisor.link.callers import this_caller
from pisupervisor.link.frames import QUESTIONS, READ, Answer, Frames, Pending, plain_text
from pisupervisor.link.output import Output
from pisupervisor.link.readers import Readers
from pisupervisor.records import NamedTuple

_LOOK_AROUND = 1.0  # seconds without a word
_LONG = _LOOK_AROUND / 2
_FRAME_TIME = 10.0  # seconds that a child may take from the first byte of a frame to its last
_FINE = 0.005  # seconds that a deadline may be overrun by for the sake of a system call
_CALL = struct.Struct("<IQI")  # a header, whose first fields are one number here
_CALL_WORD = wire.MAGIC | wire.VERSION << 16 | wire.CALL << 24
_IDENTS = struct.Struct("<32Q")
_AT_ONCE = _socket.MSG_DONTWAIT
_SEND = _AT_ONCE | _socket.MSG_NOSIGNAL  # an application may have SIGPIPE as it was born: a dead child is not its end
_HELD = 4  #: times the largest answer

__all__ = ["Answer", "Broken", "Connection", "DeadlinePassed", "LinkClosed", "NeverSent"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pisupervisor.link.arenas import Arenas

    Answerer = Callable[[int, bytes, Callable[[], Arenas]], bytes]


class Broken(Exception):
    """``written``: what a captured call wrote until then: stdout, stderr, and whether there was more."""

    written: tuple[bytes, bytes, bool] = (b"", b"", False)


class LinkClosed(Broken):
    """The other end is gone. Who owns the child knows why."""


class NeverSent(LinkClosed):
    """It was gone before it had anything of the call."""


class DeadlinePassed(Broken):
    """The call's time is up."""


class Request(NamedTuple):
    """A call as it is sent. ``within`` is the id of the one whose callback makes it, or 0."""

    body: bytes
    fds: tuple[int, ...] = ()
    within: int = 0


class Connection:
    """The calls into one child. ``largest`` bounds one answer, in bytes; ``stdio`` is where the child's stdout and stderr
    (or stderr alone) go outside of captured calls. ``shared``: several threads may call at once; one of those that wait
    reads for all.
    """

    def __init__(
        self, link: _socket.socket, largest: int, stdio: tuple[int, ...] = (), answer: Answerer | None = None,
        is_over: Callable[[], bool] | None = None, make_arenas: Callable[[], Arenas] | None = None, *, shared: bool = False,
    ) -> None:  # fmt: skip
        self.link = link
        self.largest = largest + (1 << 16)  # the value itself is bounded by the encoder; this much is its packing
        self.calls: dict[int, Pending] = {}  # under way, by their ids
        self.sent: set[str] = set()  # keys of the code that the child has
        self.released: list[int] = []  # objects that nobody holds any more
        self._is_over = is_over or _never
        self._answer = answer  # for what the child asks while it works on a call: kind and body in, body out
        self._stdio, self._displaced = stdio, False
        self._in_callbacks: dict[int, list[int]] = {}  # by thread, the ids of their calls
        self._unowned: list[Pending] = []  # that ask something, and whose caller is not there: whoever reads sees to it
        self._outputs: list[Output] = []  # of the calls under way that are captured, the innermost last
        self._frames = Frames()
        self._began = 0.0  # when the frame began that is not whole yet
        self._held = 0  # bytes of answers that nobody has asked for yet
        self._idents: list[int] = []
        self._sending = threading.RLock()
        self._readers = Readers() if shared else None
        self._lock = threading.Lock()  # of the readers
        self._is_broken = False
        self._make_arenas = make_arenas
        self._arenas: Arenas | None = None
        # A fork of the application made while the link was made holds the other end: then it never closes, and whoever
        # waits must look around now and then. By the kernel's timer, because poll before each recv would cost 1 us.
        self._slice = 0.0
        self._set_slice(_LOOK_AROUND)

    def arenas(self) -> Arenas:
        """The memory that both sides see, made when it is first needed."""
        with self._lock:
            if self._arenas is None:
                from pisupervisor.link.arenas import Arenas

                self._arenas = self._make_arenas() if self._make_arenas is not None else Arenas(0, 0, False)
            return self._arenas

    def forget_arenas(self) -> None:
        """The child is gone. Handles may keep this connection, and results that were lent keep their own memory."""
        self._arenas = None

    def forget_memory(self, number: int) -> None:
        """A shared array is gone; the child is told with the next call."""
        self.released.append(number)
        arenas = self._arenas
        if arenas is not None:
            arenas.shared.discard(number)

    # --- calls ------------------------------------------------------------------------------------------------

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
            if deadline is not None or self._slice < _LONG:
                self._set_slice(min(_LOOK_AROUND, max(_FINE, (deadline or float("inf")) - time.monotonic())))
            said = self.link.recv(READ)
        except BlockingIOError:
            return None
        except OSError as error:
            raise LinkClosed from error
        return plain_text(said, ident) or self.understand(ident, said)

    def put(self, ident: int, body: bytes, deadline: float | None) -> bool:
        """Send a call for ``ask``; whether its answer is the next that comes. In any case ``wait`` may be asked for it."""
        if self._displaced or self.released or self.calls:
            self.tidy(deadline)
            self.begin(Pending(ident, self.largest), Request(body), deadline)
            return False
        data = _CALL.pack(_CALL_WORD, ident, len(body)) + body
        try:
            sent = self.link.send(data, _SEND)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise NeverSent from error
        if sent == len(data):
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

    def receive_at_once(self) -> bytes | None:
        """What is there now, None for nothing, b"" at the end."""
        try:
            return self.link.recv(READ, _AT_ONCE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise LinkClosed from error

    def pending(self, ident: int) -> Pending:
        """The call with that id, also where nothing of its answer has come yet."""
        return self.calls.get(ident) or self.calls.setdefault(ident, Pending(ident, self.largest, self.new_bell()))

    def new_bell(self) -> Bell | None:
        return None if self._readers is None else Bell()

    def header(self, pending: Pending, size: int) -> bytes:
        """What a call begins with that is sent with ``send_frames``, before a body of that size; its answer may come from then
        on.
        """
        self.calls[pending.ident] = pending
        return _CALL.pack(_CALL_WORD, pending.ident, size)

    def send_frames(self, data: bytes, deadline: float | None) -> None:
        if self._displaced or self.released:
            self.tidy(deadline)
        with self._sending:
            sent = self._send_some(data, NeverSent)
            self._push(memoryview(data)[sent:], deadline)

    def begin(self, pending: Pending, request: Request, deadline: float | None = None) -> None:
        """Send a call, do not wait."""
        self.calls[pending.ident] = pending  # before it is sent: another thread may read its answer
        body, fds, within = request
        if within:
            self.send(wire.INNER, wire.OUTER.pack(within) + body, fds, deadline, pending.ident)
        else:
            self.send(wire.CALL, body, fds, deadline, pending.ident)

    def _call_captured(self, request: Request, deadline: float | None, output: int, ident: int) -> Answer:
        bell = PollBell() if self._readers is not None else None
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
            self._outputs.pop()
            self._displaced = True
        captured.drain()
        if request.within or self._readers is not None:  # somebody goes on at once
            self._restore_stdio(deadline)
        stdout, stderr, truncated = captured.written()
        return answer._replace(stdout=stdout, stderr=stderr, truncated=truncated)

    def tidy(self, deadline: float | None = None) -> None:
        """What the child is to know before anything else runs: objects that nobody holds any more, and where its output goes
        after a captured call, whose pipes were put in the place of stdout and stderr.
        """
        self._release(deadline)
        self._restore_stdio(deadline)

    def _restore_stdio(self, deadline: float | None) -> None:
        stdio = self._outputs[-1].writers if self._outputs else self._stdio
        if self._displaced and stdio:
            self._displaced = False
            self.send(wire.STDIO, bytes((len(stdio),)), stdio, deadline)

    def _release(self, deadline: float | None) -> None:
        numbers = self.released[:]
        if numbers:
            del self.released[: len(numbers)]  # others may have added some since
            self.send(wire.RELEASE, struct.pack(f"<{len(numbers)}Q", *numbers), deadline=deadline)

    def in_callback(self, caller: int) -> int:
        """The id of the call whose callback that thread runs, 0 if it runs none."""
        chain = self._in_callbacks.get(caller)
        return chain[-1] if chain else 0

    def new_ident(self) -> int:
        """Random: an answer given before its call cannot guess it. Drawn by the dozen, a system call each is half a
        microsecond.
        """
        while True:
            try:
                return self._idents.pop()
            except IndexError:
                self._idents += _IDENTS.unpack(os.urandom(_IDENTS.size))

    # --- out --------------------------------------------------------------------------------------------------

    def send(
        self, kind: int, body: bytes, fds: tuple[int, ...] = (), deadline: float | None = None, ident: int = 0
    ) -> None:
        """Send one frame. Descriptors ride on it, which the child always reads with room for them."""
        header = wire.pack_header(kind | wire.RIDING if fds else kind, ident, len(body))
        with self._sending:
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
                sent = self.link.sendmsg([header, body], rights, _SEND)
                break
            except BlockingIOError:
                self._make_room(deadline)
            except OSError as error:
                raise NeverSent from error
        self._push(memoryview(header)[sent:], deadline)
        self._push(memoryview(body)[max(0, sent - len(header)) :], deadline)

    def _send_some(self, data: bytes | memoryview, gone: type[LinkClosed] = LinkClosed) -> int:
        try:
            return self.link.send(data, _SEND)
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
        """Wait until the child takes more. It may be stuck in turn with answers to calls that others wait for."""
        poll = select.poll()
        reads = self._readers is None and bool(self.calls)
        poll.register(self.link, select.POLLOUT | (select.POLLIN if reads else 0))
        until = min(deadline or float("inf"), time.monotonic() + _LOOK_AROUND)
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        if not ready:
            self._look_around(None, deadline)
        elif reads and ready[0][1] & select.POLLIN:
            try:
                self._feed(self.link.recv(READ, _AT_ONCE))
            except OSError as error:
                raise LinkClosed from error
            while (frame := self._frames.next()) is not None:
                self.dispatch(frame)

    # --- in ---------------------------------------------------------------------------------------------------

    def wait(self, pending: Pending, deadline: float | None = None) -> Answer:
        """For the answer to a call that was begun. Raises what ``call`` raises."""
        return self._wait(pending, deadline, None)

    def dispatch_what_is_there(self, *, read: bool = False) -> None:
        """What was read together with the last answer; ``read``: and what can be read without waiting."""
        if self._readers is not None:
            return  # whoever reads does that
        if read:
            try:
                self._feed(self.link.recv(READ, _AT_ONCE))
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed from error
        while True:
            self._hold(self._frames.take_plain(self.calls))
            frame = self._frames.next()
            if frame is None:
                return
            self.dispatch(frame)

    def _wait(self, pending: Pending, deadline: float | None, captured: Output | None) -> Answer:
        if pending.text is not None:
            return Answer(wire.RESULT, wire.pack_text(pending.text))
        try:
            if self._readers is not None:
                self._wait_with_others(pending, deadline, captured)
            while pending.answer is None:
                if pending.asked is not None:
                    self._callback(pending, deadline)
                elif (other := self._take_unowned()) is not None:
                    self._callback(other, deadline)
                else:
                    self._read(deadline, captured)
            return pending.answer
        finally:
            self.calls.pop(pending.ident, None)
            if pending.size:
                self.let_go(pending)

    def _wait_with_others(self, pending: Pending, deadline: float | None, captured: Output | None) -> None:
        try:
            while pending.answer is None:
                if self._is_broken:
                    raise LinkClosed
                asking = pending if pending.asked is not None else self._take_unowned()
                if asking is not None:
                    self._leave(pending)  # the application's function may take its time
                    self._callback(asking, deadline)
                elif self._may_read(pending):
                    self._read(deadline, captured)
                else:
                    self._sleep(pending, deadline, captured)
        finally:
            self._leave(pending)

    def _take_unowned(self) -> Pending | None:
        """A call that asks something and has nobody who waits for it, unless somebody does so by now."""
        while self._unowned:
            with self._lock:
                pending = self._unowned.pop() if self._unowned else None
            if pending is not None and pending.asked is not None:
                return pending
        return None

    def _may_read(self, pending: Pending) -> bool:
        with self._lock:
            return self._readers is not None and self._readers.may_read(pending)

    def _leave(self, pending: Pending) -> None:
        with self._lock:
            successor = self._readers.leave(pending) if self._readers is not None else None
        if isinstance(successor, Pending):
            successor.ring()

    def _sleep(self, pending: Pending, deadline: float | None, captured: Output | None) -> None:
        """Until whoever reads has something for this caller, or reads no more."""
        bell = pending.bell
        if captured is not None and isinstance(bell, PollBell):
            captured.wait_for(bell.fileno(), deadline)
            bell.clear()
        elif isinstance(bell, Bell):
            bell.wait(deadline)
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlinePassed

    def give_up(self) -> None:
        """The child is dead: nobody waits any more, whatever became of the one who read."""
        self._is_broken = True
        for pending in tuple(self.calls.values()):
            pending.ring()

    def _callback(self, pending: Pending, deadline: float | None) -> None:
        asked = pending.asked
        if asked is not None and asked[0] == wire.ROOM:
            self._give_room(pending, asked[1], deadline)
            return
        if self._answer is None or asked is None:
            raise ProtocolError("a callback where there are none")
        caller = this_caller()
        chain = self._in_callbacks.setdefault(caller, [])
        chain.append(pending.ident)
        try:
            answer = self._answer(*asked, self.arenas)  # may call into the child in turn
        finally:
            chain.pop()
            if not chain:
                del self._in_callbacks[caller]
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlinePassed
        self._tell(pending, answer, (), deadline)

    def _give_room(self, pending: Pending, body: bytes, deadline: float | None) -> None:
        if len(body) != 8:
            raise ProtocolError("room asked for without a size")
        answer, arena = self.arenas().room(int.from_bytes(body, "little"))
        self._tell(pending, answer, () if arena is None else (arena.fd,), deadline, room=len(answer) > 1)

    def _tell(
        self, pending: Pending, answer: bytes, fds: tuple[int, ...], deadline: float | None, *, room: bool = False
    ) -> None:  # fmt: skip
        pending.has_its_answer(room=room)
        try:
            self.send(wire.ANSWER, answer, fds, deadline, pending.ident)
        except NeverSent as error:
            raise LinkClosed from error  # the call itself has begun

    def dispatch(self, frame: tuple[int, int, bytes]) -> None:
        """Give a frame to the call that it is about."""
        kind, ident, body = frame
        pending = self.calls.get(ident)
        if pending is None:
            others = ", ".join(map(str, [*self.calls][:3])) or "none"
            raise ProtocolError(f"an answer to call {ident}, where {others} is under way")
        if not pending.owned and not self._keep(pending, kind, body):
            return
        if pending.take(kind, body):
            if pending.answer is not None:
                self.calls.pop(ident, None)  # nothing more may come for it
            elif not pending.owned:
                self._unowned.append(pending)
            if pending.bell is not None:
                pending.bell.ring()

    def _keep(self, pending: Pending, kind: int, body: bytes) -> bool:
        """What comes for a call of a map lies here until its turn is there. False: nobody wants it."""
        if pending.is_abandoned and kind not in QUESTIONS:
            if kind != wire.PIECE:
                self.calls.pop(pending.ident, None)
            return False
        pending.size += len(body)
        self._hold(len(body))
        return True

    def _hold(self, size: int) -> None:
        """So many bytes more, and not too many."""
        self._held += size
        if self._held > _HELD * self.largest:
            raise ProtocolError(f"more than {_HELD * self.largest} bytes of answers that nobody has asked for yet")

    def let_go(self, pending: Pending) -> None:
        """Somebody has the answer, or nobody will ask for it."""
        self._held -= pending.size
        pending.size = 0

    def _read(self, deadline: float | None, captured: Output | None) -> None:
        """Wait for a frame and dispatch it."""
        try:
            frame = self._frames.next()
            while frame is None:
                self._feed(self._receive(deadline, captured))
                frame = self._frames.next()
            self._began = 0.0
            self.dispatch(frame)
        except ProtocolError:
            self._is_broken = True  # nobody reads on behind that
            raise

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
                if until is None and captured is None and self._slice >= _LONG:
                    return self.link.recv(size)  # plain recv: the kernel drops any fds
                return self._receive_until(size, until, captured)
            except BlockingIOError:
                self._look_around(until, deadline)
            except OSError as error:
                raise LinkClosed from error

    def _receive_until(self, size: int, until: float | None, captured: Output | None) -> bytes:
        now = time.monotonic()
        left = _LOOK_AROUND if until is None else min(_LOOK_AROUND, until - now)
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
        if self._slice - _FINE <= seconds <= 2 * self._slice:
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
