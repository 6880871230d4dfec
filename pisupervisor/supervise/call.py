"""One call as data: what it needs, how far it has come, what it comes to; and what is decided about it without doing a thing."""

from __future__ import annotations

from pisupervisor.errors import CallTimeout, ProtocolError
from pisupervisor.link.calls import Attached
from pisupervisor.link.connection import Answer, Broken, Connection, LinkClosed, NeverSent
from pisupervisor.link.sources import Code
from pisupervisor.records import NamedTuple
from pisupervisor.results import ExitReason, Usage
from pisupervisor.supervise.child import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pisupervisor.link.calls import StreamTypes


class Call(NamedTuple):
    """What a call needs for each of its tries. ``limit`` is the time it was given, ``deadline`` when that is over;
    ``only_on`` the link of the child that has the object it is about; ``check`` what an honest child's value is like;
    ``streams`` whether it may be a generator.
    """

    body: bytes | Attached
    code: Code | None
    limit: float | None
    deadline: float | None
    capture: bool
    returns: Any
    only_on: Connection | None
    check: Callable[[Any], bool] | None
    streams: bool
    idempotent: bool

    @property
    def is_step(self) -> bool:
        """Whether this asks for an item of a stream: nothing else has both."""
        return self.only_on is not None and self.check is not None

    def close(self) -> None:
        """It will not be tried again: the copies of descriptors that were for the child are closed."""
        if not isinstance(self.body, bytes):
            for file in self.body.payload.files:
                file.close()


class Outcome(NamedTuple):
    """A call that was answered: its value, the answer's output, what the child had used before and after (where that was
    captured), and the link it went over.
    """

    value: Any
    answer: Answer
    before: Usage
    after: Usage
    connection: Connection


class Short(NamedTuple):
    """A plain call that has its turn, and the child and the link that it goes to."""

    call: Call
    caller: int
    ident: int
    child: Child
    connection: Connection


class Sent(NamedTuple):
    """What an event loop's thread gets: the call is sent, and its answer ``is_next``; or there is more to it. ``types``: what
    the items of a stream are built as.
    """

    short: Short
    is_next: bool
    error: BaseException | None = None
    types: StreamTypes | None = None


class WouldWait(Exception):
    """This call cannot be made by an event loop's own thread."""


def may_repeat(call: Call, gone: LinkClosed, reason: ExitReason, *, was_stopped: bool) -> bool:
    """Whether another child gets a call under which the last one has died. ``was_stopped``: somebody wanted the end of the
    child, or of this call; else it died of itself, or of what became of another call in it. Pure.
    """
    if was_stopped:
        return False
    return call.idempotent or (isinstance(gone, NeverSent) and reason is not ExitReason.KILLED)


def check_value(value: Any, check: Callable[[Any], bool]) -> None:
    """Raises ProtocolError for what no honest child answers to such a call."""
    if not check(value):
        raise ProtocolError("an answer that is none to such a call")


def no_stream(returns: Any) -> str:
    if returns is None:
        return "the call returned a generator; map takes values: return a list, or invoke the function itself"
    return f"the call returned a generator, not {returns}; ask for returns=Iterator[...]"


def timed_out(message: str, info: Any) -> CallTimeout:
    why = "" if info.reason is ExitReason.TIMEOUT else f" ({info.describe()})"
    error = CallTimeout(f"{message}; its child was killed{why}")
    error.exit_info = info
    return error


def forget_frames(error: Broken) -> None:
    """What the call sent (memory, descriptors) would live as long as the error that is raised in the place of this one."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
