"""``map``: many calls under way on one link, sent by the dozen, answered in order; arguments are fetched as they are needed."""

from __future__ import annotations

import time
from collections import deque

from pihost import wire
from pisupervisor import checks
from pisupervisor.errors import CallError, IsolationError, ProtocolError
from pisupervisor.link.callers import this_caller
from pisupervisor.link.calls import Attached, Payload, body_of
from pisupervisor.link.connection import Connection, Request
from pisupervisor.link.frames import Answer, Pending, text_of
from pisupervisor.link.packing import check_function
from pisupervisor.link.serializer import decode_plain
from pisupervisor.link.sources import check_target
from pisupervisor.supervise.call import Call
from pisupervisor.supervise.exits import termination
from pisupervisor.supervise.ways import Message, Way, exchange

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pisupervisor.link.reader import Reader
    from pisupervisor.link.sources import Code
    from pisupervisor.supervise.session import Session

_BYTES = 1 << 17  # under way, one call excepted: what the socket takes without anybody waiting


def room(under_way: int, size: int, most: int) -> int:
    """How many calls are to be sent now, where so many, of ``size`` bytes together, are under way. Not one by one: half of
    what may be at once, so that a system call carries many. Pure.
    """
    if under_way and (size >= _BYTES or under_way > most // 2):
        return 0
    return most - under_way


def check_map(function: Any, timeout: float | None, returns: Any, in_flight: int) -> None:
    """What a map is told, as far as that can be seen before anything is read or packed. Raises OptionsError."""
    checks.count(in_flight, "in_flight", 1, 1 << 16)
    if timeout is not None:
        checks.check_timeout(timeout)
    if isinstance(function, str):
        check_target(checks.split_target(function)[1])
    else:
        check_function(function)
    if returns is not None:
        from pisupervisor.link.returns import check_returns

        check_returns(returns)


class Item:
    """One call. ``pending`` is None until it is sent, and again where it is to be sent anew."""

    __slots__ = ("payload", "pending", "size")

    def __init__(self, payload: bytes | Payload) -> None:
        self.payload = payload
        self.size = len(payload) if isinstance(payload, bytes) else 0
        self.pending: Pending | None = None


class Target:
    """What is called with each item: code of a file, or a function that is sent once to each child and kept there."""

    def __init__(self, code: Code | None, name: str, function: bytes | Payload | None = None) -> None:
        self.code, self._name, self._function = code, name, function
        self._number = 0
        self._what: tuple[Any, ...] = ()
        self.head = b""  # of each call: see ``pack_head``

    def settle(self, connection: Connection, deadline: float | None, reader: Reader, within: int) -> None:
        """In a child that has not seen it yet; ``within``: see ``Message``. Raises what that comes to."""
        from pisupervisor.link.calls import pack_code, pack_head, unpack_answer

        if self.code is not None and self.code.key not in connection.sent:
            connection.send(wire.CODE, pack_code(self.code), deadline=deadline)
            connection.sent.add(self.code.key)
        if self._function is not None:
            body = body_of("keep function", False, (self._function,))
            answer = exchange(connection, Message(body, deadline, None, connection.new_ident(), within))
            number = unpack_answer(answer, reader)
            if type(number) is not int:
                raise ProtocolError("an answer that is none to such a call")
            self._number = number
        self._what = ("kept", self._number) if self.code is None else ("method", self.code.key, self._name)
        self.head = pack_head(self._what[0], False, *self._what[1:])

    def attached(self, payload: Payload) -> Attached:
        """A call of it with such arguments."""
        return Attached(self._what[0], False, (*self._what[1:], payload), payload)

    def release(self, connection: Connection | None) -> None:
        if connection is not None and self._number:
            connection.released.append(self._number)


class Pipeline(Way):
    """An iterator over the results. Used by one thread at a time; others may call meanwhile, and the same one between two
    results: its calls come behind those that are under way.
    """

    def __init__(
        self, session: Session, target: Target, payloads: Iterator[bytes | Payload], limit: float | None, in_flight: int,
        idempotent: bool, finish: Callable[[Any], Any] | None, owner: object,
    ) -> None:  # fmt: skip
        """``owner``: who closes the session when nobody refers to it any more."""
        self._session, self._target, self._payloads, self._limit = session, target, payloads, limit
        self._most, self._half, self._idempotent, self._finish = in_flight, in_flight // 2, idempotent, finish
        self._owner = owner
        self._waiting: deque[Item] = deque()  # to be sent
        self._flight: deque[Item] = deque()  # sent, in order
        self._size = 0  # bytes of those
        self._since = time.monotonic()  # when the first of them came to be the first
        self._connection: Connection | None = None
        self._reader = session.keeper.reader
        self._is_plain = not self._reader.pickled and session.options.max_calls is None  # which counts each call
        self._error: BaseException | None = None  # of the application's own iterable: raised when it is its turn
        self._broken: ProtocolError | None = None
        self._is_over = self._is_asked = False

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        if self._is_asked:
            raise CallError("this map is being asked for a result already, by another thread or around this callback")
        self._is_asked = True
        try:
            if len(self._flight) <= self._half:
                self._fetch()
            if not self._flight and not self._waiting:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            answer = self._next_answer()
            value = answer if self._finish is None else self._finish(answer)
        except BaseException:
            self.close()
            raise
        finally:
            self._is_asked = False
        return value

    def has_next(self) -> bool:
        """Whether the next result is there, and nothing is to be sent or waited for first."""
        pending = self._flight[0].pending if self._flight else None
        return pending is not None and pending.is_answered and not self._is_over

    def _fetch(self) -> None:
        """Arguments for the calls that are to be sent now. Before anything of the isolator is held: it is foreign code."""
        count = room(len(self._flight), self._size, self._most) - len(self._waiting)
        if self._session.options.max_calls is not None:
            under_way = len(self._flight) + len(self._waiting)
            at_least = 0 if under_way else 1  # which the next child gets, if this one may answer no more
            count = min(count, max(self._session.calls_left() - under_way, at_least))
        size = self._size
        while count > 0 and self._error is None and (size < _BYTES or not self._waiting):
            try:
                item = Item(next(self._payloads))
            except StopIteration:
                return
            except BaseException as error:
                self._error = error
                return
            self._waiting.append(item)
            size += item.size
            count -= 1

    def _next_answer(self) -> Any:
        """The value of the first call under way."""
        head = self._flight[0] if self._flight else None
        pending, connection, text = None if head is None else head.pending, self._connection, None
        if pending is not None and self._is_plain and not self._waiting:
            text = pending.text if pending.answer is None else text_of(pending.answer)
        if text is None or head is None or pending is None or connection is None:
            return self._go_on()
        try:
            value = decode_plain(text, self._reader)
        except ProtocolError as error:
            self._broken = error
            return self._go_on()
        connection.let_go(pending)
        self._done(head)
        return value

    def _go_on(self) -> Any:
        """Send what is to be sent, and wait for the first answer: on the way of all calls, with what may happen on it."""
        since = self._since if self._flight else time.monotonic()
        deadline = None if self._limit is None else since + self._limit
        call = Call(b"", None, self._limit, deadline, False, None, None, None, False, self._idempotent)
        return self._session.run(call, self).value

    def _done(self, head: Item) -> None:
        self._flight.popleft()
        self._size -= head.size
        if self._limit is not None:
            self._since = time.monotonic()

    # --- what the way of a call asks for ----------------------------------------------------------------------

    def exchange(self, connection: Connection, message: Message) -> Answer:
        """The answer to the first of the calls."""
        deadline = message.deadline
        if self._broken is not None:
            raise self._broken
        if connection is not self._connection:
            self._move_to(connection, deadline, message.within)
        self._send(connection, deadline, message.within)
        head = self._flight[0]
        if head.pending is None:
            raise IsolationError("a call was lost: please report this")
        if message.within:
            self._check_not_own_callback(connection, head.pending)
        if deadline is not None and deadline < time.monotonic():
            connection.dispatch_what_is_there(read=True)  # who asks late finds what has come in time
        answer = connection.wait(head.pending, deadline)
        connection.dispatch_what_is_there()
        if not self._is_over:  # by a callback of that call
            self._done(head)
        return answer

    def _check_not_own_callback(self, connection: Connection, first: Pending) -> None:
        """Raises CallError where the first call comes after one that waits for this very callback."""
        if self._session.options.max_concurrency > 1 or first.is_answered:
            return
        own = {item.pending.ident for item in self._flight if item.pending is not None}
        if not own.isdisjoint(connection.callbacks_of(this_caller())):
            raise CallError("this result comes after the call whose callback asks for it: take it when that is over")

    def _move_to(self, connection: Connection, deadline: float | None, within: int) -> None:
        """Another child: what the last one has not answered is lost, or sent anew."""
        lost = [item for item in self._flight if item.pending is not None and not item.pending.is_answered]
        info = self._session.keeper.last_exit
        if lost and not self._idempotent and info is not None:
            self._connection = None
            raise termination(info, (b"", b"", False))
        self._target.settle(connection, deadline, self._reader, within)
        self._waiting.extendleft(reversed(self._flight))
        self._flight.clear()
        self._size, self._connection = 0, connection

    def _send(self, connection: Connection, deadline: float | None, within: int) -> None:
        """From a callback as calls within its own: the child does no others until that is answered."""
        frames: list[bytes] = []
        head, largest, new_ident = self._target.head, connection.largest, connection.new_ident
        while self._waiting:
            item = self._waiting.popleft()
            self._flight.append(item)
            self._size += item.size
            if item.pending is not None and item.pending.is_answered:
                continue  # the child that has died had answered this one
            item.pending = pending = Pending(new_ident(), largest, connection.new_bell(), owned=False)
            if isinstance(item.payload, bytes):
                frames += (connection.header(pending, len(head) + item.size, within), head, item.payload)
                continue
            self._flush(connection, frames, deadline)
            from pisupervisor.link import attachments

            packed, fds = attachments.send(self._target.attached(item.payload), connection, deadline, within)
            connection.begin(pending, Request(packed, fds, within), deadline)
        self._flush(connection, frames, deadline)

    @staticmethod
    def _flush(connection: Connection, frames: list[bytes], deadline: float | None) -> None:
        if frames:
            connection.send_frames(b"".join(frames), deadline)
            frames.clear()

    # --- the end ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """No more results. Calls that are under way are done all the same, and come to nothing. Idempotent."""
        if not self._is_over:
            self._is_over = True
            self._target.release(self._connection)
            for item in self._flight:
                if self._connection is not None and item.pending is not None:
                    item.pending.is_abandoned = True
                    self._connection.let_go(item.pending)
            self._waiting.clear()
            self._flight.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_is_over" in self.__dict__:
            self.close()
