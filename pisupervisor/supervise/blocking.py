"""How a thread does what may take time on the way of a call: on the spot."""

from __future__ import annotations

from pihost import wire
from pisupervisor.link.callers import this_caller
from pisupervisor.records import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from pisupervisor.link.calls import Attached
    from pisupervisor.link.connection import Answer, Connection
    from pisupervisor.supervise.admission import Use
    from pisupervisor.supervise.turn import Turn


class Message(NamedTuple):
    """A call as it goes over a link: what it says, until when, how many bytes of output are kept, its id, and the id of the
    call whose callback makes it, or 0.
    """

    body: bytes | Attached
    deadline: float | None
    output: int | None
    ident: int
    within: int


class Io(Protocol):
    """What a call must wait for."""

    def caller(self) -> int:
        """Who calls: the same for what its callbacks call in turn."""

    def new_ident(self, connection: Connection) -> int:
        """Of the call that is exchanged next."""

    async def take_turn(self, turn: Turn, caller: int, use: Use, left: float | None) -> bool:
        """False when that took longer than ``left`` seconds."""

    async def do(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        """The result of a function that may take a while."""

    async def exchange(self, connection: Connection, sent: Message) -> Answer:
        """See ``Connection.call``."""


class Blocking(Io):
    """Nothing is awaited: see ``run_through``."""

    def caller(self) -> int:
        return this_caller()

    def new_ident(self, connection: Connection) -> int:
        return connection.new_ident()

    async def take_turn(self, turn: Turn, _caller: int, use: Use, left: float | None) -> bool:
        return turn.take(left, use)

    async def do(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        return function(*args, **keywords)

    async def exchange(self, connection: Connection, sent: Message) -> Answer:
        return exchange(connection, sent)


class Begun(Blocking):
    """Of a call that is under way already, under that id, or has failed already."""

    def __init__(self, ident: int, error: BaseException | None) -> None:
        self._ident, self._error = ident, error

    def new_ident(self, connection: Connection) -> int:
        return self._ident or super().new_ident(connection)

    async def exchange(self, connection: Connection, sent: Message) -> Answer:
        self._ident, first = 0, self._ident
        error, self._error = self._error, None
        if error is not None:
            connection.calls.pop(sent.ident, None)
            raise error
        if first:
            return connection.wait(connection.pending(sent.ident), sent.deadline)
        return exchange(connection, sent)


def exchange(connection: Connection, sent: Message) -> Answer:
    """One call, whatever goes with it."""
    body, deadline, output, ident, within = sent
    if isinstance(body, bytes):
        return connection.call(body, deadline, output, (), ident, within)
    from pisupervisor.link import attachments

    packed, fds = attachments.send(body, connection, deadline, within)
    answer = connection.call(packed, deadline, output, fds, ident, within)
    if answer.kind != wire.REFUSED:
        connection.arenas().shared.update(memory.number for memory in body.payload.shared)
    return answer


def run_through(steps: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        steps.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a call has waited that must not: please report this")
