"""What of a call's arguments does not travel in their pickle: big buffers, open files, arrays that both sides see."""

from __future__ import annotations

from _pickle import PickleBuffer, dumps  # not pickle: that imports re

from pihost import wire
from pisupervisor.errors import CallError, IsolationError, SerializationError
from pisupervisor.link.calls import pack_call, unpack_answer
from pisupervisor.link.reader import DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pisupervisor.link.arenas import Arena, Arenas
    from pisupervisor.link.calls import Attached, Payload
    from pisupervisor.link.connection import Answer, Connection
    from pisupervisor.link.descriptors import Passed
    from pisupervisor.shared import SharedMemory


_DEEP = 16  # callbacks of one thread, one in the other
_NOT_CALLED = -1
_ARROW = frozenset(("pandas", "pyarrow"))  # where classes of what can go in Arrow's format are
_SHARED = frozenset(("numpy", "pisupervisor.shared"))  # where classes of shared arrays are


class Attachments:
    """Collects them while one pickle is written. ``parts`` are that pickle's pieces; large bytes in it are not copied."""

    files: list[Passed] | None = None  # made when there are any: most calls have nothing but their pickle
    shared: dict[int, SharedMemory] | None = None
    buffers: list[memoryview] | None = None

    def __init__(self, isolator: int, networked: bool, arrow: bool = False) -> None:
        """``arrow``: pandas and pyarrow objects go in Arrow's stream format, where they come back from it as they were."""
        self.isolator, self.networked, self.arrow = isolator, networked, arrow
        self.parts: list[bytes] = []
        self.write = self.parts.append  # what a pickler asks of a file

    def buffer(self, buffer: PickleBuffer) -> bool:
        """pickle's ``buffer_callback``: whether it stays in the pickle."""
        raw = buffer.raw()
        if raw.nbytes < wire.BIG:
            return True
        self.buffers = self.buffers or []
        self.buffers.append(raw)
        return False

    def reduce(self, obj: Any) -> Any:
        """How ``obj`` is pickled, NotImplemented for all that is nothing special."""
        kind = type(obj)
        if kind is memoryview:
            return _reduce_memoryview(obj)
        if self.arrow and kind.__module__.partition(".")[0] in _ARROW:
            from pisupervisor.link import arrow_arguments

            return arrow_arguments.reduce(obj)
        if kind.__module__ in _SHARED:
            from pisupervisor import shared

            self.shared = {} if self.shared is None else self.shared
            return shared.reduce(obj, self.shared, self.isolator)
        if getattr(kind, "fileno", None) is not None or kind.__module__ == "tempfile":
            from pisupervisor.link import descriptors

            self.files = [] if self.files is None else self.files
            return descriptors.reduce(obj, self.files, self.networked)
        return NotImplemented

    def payload(self) -> bytes | Payload:
        """What was written, as bytes where that is all there is to it."""
        parts = self.parts
        size = sum(memoryview(part).nbytes for part in parts) if len(parts) > 1 else len(parts[0])
        if size < wire.BIG and not (self.buffers or self.files or self.shared):
            return parts[0] if len(parts) == 1 else b"".join(parts)
        from pisupervisor.link.calls import Payload

        shared = tuple((self.shared or {}).values())
        return Payload(tuple(parts), size, tuple(self.buffers or ()), tuple(self.files or ()), shared)


def _reduce_memoryview(view: memoryview) -> Any:
    from pihost.inside.attached import memory  # by name: the child has the other end

    if not view.c_contiguous or len(view.format) != 1:
        why = "a memoryview that is not one piece of memory, or of a format with a byte order"
        raise SerializationError(f"{why}, cannot be sent; send bytes(...) of it", direction="to child")
    if view.nbytes == 0:
        return memory, (b"", "B", (0,))  # what is empty cannot be cast
    return memory, (PickleBuffer(view.cast("B")), view.format, view.shape)


def send(
    call: Attached, connection: Connection, deadline: float | None, within: int = 0
) -> tuple[bytes, tuple[int, ...]]:
    """(body, descriptors) of a call whose arguments have attachments, with all that is big where the child finds it."""
    payload = call.payload
    packed, fds = _packed(payload, connection, deadline, within)
    arguments = [packed if part is payload else part for part in call.arguments]
    return pack_call(call.verb, call.capture, *arguments), fds


def answer(
    payload: Payload, connection: Connection, deadline: float | None, chain: list[int]
) -> tuple[bytes, tuple[int, ...]]:
    """The same of what the innermost callback of that chain returns. Shared arrays come with it each time: whether the child
    could take them it does not say. Nor is it asked to take an arena for ever, in the middle of which it may call back again.
    """
    within = chain[-1] if len(chain) <= _DEEP else _NOT_CALLED
    packed, fds = _packed(payload, connection, deadline, within, insist=False)
    return wire.ATTACHED + dumps(packed, 5), fds


def _packed(
    payload: Payload, connection: Connection, deadline: float | None, within: int, *, insist: bool = True
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """(what the child's ``attached.load`` takes, descriptors). ``insist``: no memory for an arena is an error."""
    arenas = connection.arenas()
    fds, shared = _descriptors(payload, arenas)  # before an arena is taken: this may refuse
    regions: list[Any] = [[buffer] for buffer in payload.buffers]
    lengths = [buffer.nbytes for buffer in payload.buffers]
    data = None
    if payload.size >= wire.BIG:
        regions, lengths = [payload.pickle, *regions], [payload.size, *lengths]
    else:
        data = b"".join(payload.pickle)
    arena = _fill(arenas, connection, regions, lengths, deadline, within, insist) if regions and within >= 0 else None
    where: list[Any] = [b"".join(region) for region in regions] if arena is None else lengths
    return (data, None if arena is None else arena.number, where, shared), tuple(fds)


def _says_yes(answer: Answer) -> bool:
    try:
        return unpack_answer(answer, DATA) is True
    except (CallError, SerializationError):  # no memory for a reply, or a lie
        return False


def _descriptors(payload: Payload, arenas: Arenas) -> tuple[list[int], list[tuple[int, int, int]]]:
    """(those that go with the call, what the child has to know of shared arrays that it has not seen: place, number, size)"""
    fds = [file.fd for file in payload.files]
    shared = []
    for memory in payload.shared:
        if memory.number not in arenas.shared:
            shared.append((len(fds), memory.number, memory.length))
            fds.append(memory.fd)
    check_count(len(fds))
    return fds, shared


def check_count(descriptors: int) -> None:
    if descriptors > wire.MAX_DESCRIPTORS:
        message = f"{descriptors} descriptors with one call ({wire.MAX_DESCRIPTORS} are allowed)"
        raise SerializationError(message, direction="to child")


def _fill(
    arenas: Arenas,
    connection: Connection,
    regions: list[Any],
    lengths: list[int],
    deadline: float | None,
    within: int,
    insist: bool,
) -> Arena | None:
    """The arena that they are in now, None where the child cannot take one: they are part of the call then."""
    starts, end = wire.place(lengths)
    try:
        arena, choice = arenas.take(end)
    except IsolationError:
        if insist:
            raise
        return None
    if choice.reuse is None:
        body = pack_call("arena", False, arena.number, arena.size, choice.keep, [*choice.drop])
        if not _says_yes(connection.call(body, deadline, fds=(arena.fd,), within=within)):
            arenas.refused(arena)
            return None
        arenas.accepted(arena)
    arena.write(regions, starts)
    return arena
