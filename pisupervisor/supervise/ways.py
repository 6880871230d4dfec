"""The ways in which a call goes over a child's link: all at once, or in the middle of it already."""

from __future__ import annotations

from pihost import wire
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.link.calls import Attached
    from pisupervisor.link.connection import Answer, Connection


class Message(NamedTuple):
    """A call as it goes over a link: what it says, until when, how many bytes of output are kept, its id, and the id of the
    call whose callback makes it, or 0.
    """

    body: bytes | Attached
    deadline: float | None
    output: int | None
    ident: int
    within: int


class Way:
    """Sent, and its answer waited for."""

    def new_ident(self, connection: Connection) -> int:
        """Of the call that is exchanged next."""
        return connection.new_ident()

    def exchange(self, connection: Connection, sent: Message) -> Answer:
        """See ``Connection.call``."""
        return exchange(connection, sent)


class Begun(Way):
    """Of a call that is under way already, under that id, or has failed already."""

    def __init__(self, ident: int, error: BaseException | None) -> None:
        self._ident, self._error = ident, error

    def new_ident(self, connection: Connection) -> int:
        return self._ident or super().new_ident(connection)

    def exchange(self, connection: Connection, sent: Message) -> Answer:
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
