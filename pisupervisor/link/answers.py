"""What comes of the calls under way: frames are given to the calls that they are about, by whoever reads, and what a child asks
in the middle of a call is answered.
"""

from __future__ import annotations

import select
import threading
import time
from abc import abstractmethod

from pihost import wire
from pisupervisor.errors import ProtocolError
from pisupervisor.link.bells import Bell, PollBell
from pisupervisor.link.callers import this_caller
from pisupervisor.link.channel import Channel, DeadlinePassed, LinkClosed, NeverSent
from pisupervisor.link.frames import QUESTIONS, Answer, Pending
from pisupervisor.link.leader import Leader

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from pisupervisor.link.arenas import Arenas
    from pisupervisor.link.calls import Payload
    from pisupervisor.link.output import Output
    from pisupervisor.link.overtime import Overtime

    Answerer = Callable[[int, bytes, Callable[[], Arenas]], bytes | Payload]

_HELD = 4  #: times the largest answer


class Answers(Channel):
    """The half of a ``Connection`` that waits. With ``shared`` one of the callers that wait reads for all."""

    def __init__(
        self, link: _socket.socket, largest: int, answer: Answerer | None, is_over: Callable[[], bool] | None,
        make_arenas: Callable[[], Arenas] | None, kill_late: Callable[[], object] | None, *, shared: bool,
    ) -> None:  # fmt: skip
        super().__init__(link, is_over)
        self.largest = largest + (1 << 16)  # the value itself is bounded by the encoder; this much is its packing
        self.calls: dict[int, Pending] = {}  # under way, by their ids
        self._answer = answer  # for what the child asks while it works on a call: kind and body in, body out
        self._in_callbacks: dict[int, list[int]] = {}  # by thread, the ids of their calls
        self._asking: list[Pending] = []  # those that ask something which others than who waits for them may see to
        self._waits: dict[
            int, list[Pending]
        ] = {}  # by caller, what it waits for, the innermost last, where several may wait
        self._held = 0  # bytes of answers that nobody has asked for yet
        self._leader = Leader() if shared else None
        self._kill_late = kill_late  # ends the child at the deadline of a call whose callback still runs
        self._overtime: Overtime | None = None
        self._lock = threading.Lock()  # of the leader, of the arenas, and of what is made once
        self._is_broken = False
        self._make_arenas = make_arenas
        self._arenas: Arenas | None = None

    # --- waiting ----------------------------------------------------------------------------------------------

    def wait(self, pending: Pending, deadline: float | None = None) -> Answer:
        """For the answer to a call that was begun. Raises what ``call`` raises."""
        pending.owned = True  # from now on: whatever a callback of it does to the map that it belongs to
        return self._wait(pending, deadline, None)

    def _wait(self, pending: Pending, deadline: float | None, captured: Output | None) -> Answer:
        if pending.text is not None:
            return Answer(wire.RESULT, wire.pack_text(pending.text))
        try:
            if self._leader is not None:
                self._wait_with_others(pending, deadline, captured)
            while pending.answer is None:
                if (asking := self._take_asking(pending)) is not None:
                    self._callback(asking, deadline)
                else:
                    self._read(deadline, captured)
            return pending.answer
        finally:
            if pending.answer is None:
                self._is_broken = True  # the child is to die for that; what it says meanwhile is nobody's
            self.calls.pop(pending.ident, None)
            if pending.size:
                self.let_go(pending)

    def _wait_with_others(self, pending: Pending, deadline: float | None, captured: Output | None) -> None:
        caller = pending.caller = this_caller()
        waits = self._waits.setdefault(caller, [])
        waits.append(pending)
        try:
            while pending.answer is None:
                if self._is_broken:
                    raise LinkClosed
                if (asking := self._take_asking(pending)) is not None:
                    self._leave(pending)  # the application's function may take its time
                    self._callback(asking, deadline)
                elif self._may_read(pending):
                    self._read(deadline, captured)
                else:
                    self._sleep(pending, deadline, captured)
        finally:
            waits.pop()
            if not waits:
                del self._waits[caller]
            self._leave(pending)

    def _take_asking(self, pending: Pending) -> Pending | None:
        """A call that asks something which is for who waits for ``pending`` to answer: that one, one that nobody waits for, or
        one for which the same caller waits further out, since ``pending`` may wait for it in the child. Several callers may
        find one, some of them from within the very callback.
        """
        if pending.asked is None and not self._asking:
            return None
        with self._lock:
            self._asking = [one for one in self._asking if one.asks]
            for one in (pending, *self._asking):
                if one.asks and (one is pending or not one.owned or one.caller == pending.caller or one.asks_for_room):
                    one.is_seen_to = True
                    return one
        return None

    def _begins_to_ask(self, pending: Pending) -> None:
        """Who waits for it may wait for another one at this moment."""
        with self._lock:
            self._asking.append(pending)
        for innermost in tuple(self._waits.get(pending.caller, ()))[-1:]:
            innermost.ring()

    def _may_read(self, pending: Pending) -> bool:
        with self._lock:
            return self._leader is not None and self._leader.may_read(pending)

    def _leave(self, pending: Pending) -> None:
        with self._lock:
            successor = self._leader.leave(pending) if self._leader is not None else None
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
        if self._overtime is not None:
            self._overtime.stop()

    # --- reading ----------------------------------------------------------------------------------------------

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

    def dispatch_what_is_there(self, *, read: bool = False) -> None:
        """What was read together with the last answer; ``read``: and what can be read without waiting."""
        if self._leader is not None:
            return  # whoever reads does that
        if read:
            said = self.receive_at_once()
            if said is None:
                return
            self._feed(said)
        while True:
            self._hold(self._frames.take_plain(self.calls))
            frame = self._frames.next()
            if frame is None:
                return
            self.dispatch(frame)

    def _make_room(self, deadline: float | None) -> None:
        """The child may be stuck in turn with answers to calls that others wait for: they are read meanwhile."""
        if self._leader is not None or not self.calls:
            super()._make_room(deadline)
        elif self._poll(select.POLLOUT | select.POLLIN, deadline) & select.POLLIN:
            self.dispatch_what_is_there(read=True)

    def dispatch(self, frame: tuple[int, int, bytes]) -> None:
        """Give a frame to the call that it is about."""
        kind, ident, body = frame
        pending = self.calls.get(ident)
        if pending is None and self._is_broken:
            raise LinkClosed
        if pending is None:
            others = ", ".join(map(str, [*self.calls][:3])) or "none"
            raise ProtocolError(f"an answer to call {ident}, where {others} is under way")
        if not pending.owned and not self._keep(pending, kind, body):
            return
        if pending.take(kind, body):
            if pending.answer is not None:
                self.calls.pop(ident, None)  # nothing more may come for it
            elif not pending.owned or self._leader is not None:
                self._begins_to_ask(pending)
            if pending.bell is not None:
                pending.bell.ring()

    def _keep(self, pending: Pending, kind: int, body: bytes) -> bool:
        """What comes for a call of a map lies here until its turn is there. False: nobody wants it."""
        if pending.is_abandoned and kind not in QUESTIONS and kind != wire.PIECE:  # which may be of a question
            self.calls.pop(pending.ident, None)
            self.let_go(pending)
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
        """Somebody has what has come for it, or nobody will ask for it."""
        self._held -= pending.size
        pending.size = 0

    # --- what the child asks ----------------------------------------------------------------------------------

    def in_callback(self, caller: int) -> int:
        """The id of the call whose callback that thread runs, 0 if it runs none."""
        chain = self._in_callbacks.get(caller)
        return chain[-1] if chain else 0

    def callbacks_of(self, caller: int) -> list[int]:
        """The ids of all calls whose callbacks that thread is in, the innermost last."""
        return self._in_callbacks.get(caller, [])

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
            said = self._answer_in_time(self._answer, asked, deadline)  # may call into the child in turn
            answer, fds = (said, ()) if isinstance(said, bytes) else self.attach(said, deadline, chain)
        finally:
            chain.pop()
            if not chain:
                del self._in_callbacks[caller]
        self._tell(pending, answer, fds, deadline)

    def _answer_in_time(self, answer: Answerer, asked: tuple[int, bytes], deadline: float | None) -> bytes | Payload:
        overtime = self._begin_overtime(deadline)
        try:
            said = answer(*asked, self.arenas)
        finally:
            if overtime is not None and deadline is not None:
                overtime.end(deadline)
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlinePassed
        return said

    @abstractmethod
    def attach(self, payload: Payload, deadline: float | None, chain: list[int]) -> tuple[bytes, tuple[int, ...]]:
        """(answer, descriptors) of the innermost callback of that chain, where it is more than bytes: for who can call the
        child for it.
        """

    def _begin_overtime(self, deadline: float | None) -> Overtime | None:
        if deadline is None or self._kill_late is None:
            return None
        with self._lock:
            if self._overtime is None:
                from pisupervisor.link.overtime import Overtime

                self._overtime = Overtime(self._kill_late)
        self._overtime.begin(deadline)
        return self._overtime

    def _give_room(self, pending: Pending, body: bytes, deadline: float | None) -> None:
        if len(body) != 8:
            raise ProtocolError("room asked for without a size")
        answer, arena = self.arenas().room(int.from_bytes(body, "little"))
        self._tell(pending, answer, () if arena is None else (arena.fd,), deadline, room=len(answer) > 1)

    def _tell(
        self, pending: Pending, answer: bytes, fds: tuple[int, ...], deadline: float | None, *, room: bool = False
    ) -> None:  # fmt: skip
        pending.has_its_answer(room=room)
        self.let_go(pending)  # what it asked
        try:
            self.send(wire.ANSWER, answer, fds, deadline, pending.ident)
        except NeverSent as error:
            raise LinkClosed from error  # the call itself has begun

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
