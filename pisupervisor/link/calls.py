"""Calls and answers as data: what is sent for each way to call, and what an answer means. Pure."""

from __future__ import annotations

import _pickle as pickle  # the C part alone: pickle imports re, 4 ms in all
from functools import partial

from pihost import wire
from pisupervisor.errors import (
    CallError,
    CompileError,
    ObjectReleased,
    ProtocolError,
    SerializationError,
    TargetNotFound,
    UnknownCallback,
)
from pisupervisor.link.connection import Answer
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pisupervisor.link.arenas import Arenas
    from pisupervisor.link.descriptors import Passed
    from pisupervisor.link.reader import Reader
    from pisupervisor.link.sources import Code
    from pisupervisor.shared import SharedMemory

_MAX_REPORT = 1 << 20  # bytes; an honest one has at most 72 KiB of text, escaped to six times that
_IMPORT_HINT = "what the child may import is what was given: name the folder in import_paths=[...] or modules=[...]"


def pack_head(verb: str, capture: bool, *what: Any) -> bytes:
    """What a call begins with, the same for all calls of that. A pickle: it is read by the child, where code of the host's
    choice runs anyway.
    """
    exact = [str.__str__(part) if isinstance(part, str) else part for part in what]  # a StrEnum is none in the child
    head = pickle.dumps((verb, capture, *exact), 5)
    return wire.HEAD.pack(len(head)) + head


def pack_call(verb: str, capture: bool, *arguments: Any) -> bytes:
    """The body of a CALL frame: a head, and where the last of ``arguments`` are pickled ones, these as they are."""
    if arguments and type(arguments[-1]) is bytes:
        return pack_head(verb, capture, *arguments[:-1]) + arguments[-1]
    return pack_head(verb, capture, *arguments)


def pack_code(code: Code) -> bytes:
    """The body of a CODE frame. A pickle likewise."""
    return pickle.dumps(code.payload(), 5)


class Payload(NamedTuple):
    """Pickled arguments with attachments: the pickle in pieces, its size in bytes, and what does not travel in it."""

    pickle: tuple[bytes, ...]
    size: int
    buffers: tuple[memoryview, ...]
    files: tuple[Passed, ...]
    shared: tuple[SharedMemory, ...]


class Attached(NamedTuple):
    """A call with such arguments. Its body depends on the child that gets it, so it is made for each try."""

    verb: str
    capture: bool
    arguments: tuple[Any, ...]
    payload: Payload


def body_of(verb: str, capture: bool, arguments: tuple[Any, ...]) -> bytes | Attached:
    for part in arguments:
        if type(part) is Payload:
            return Attached(verb, capture, arguments, part)
    return pack_call(verb, capture, *arguments)


def unpack_answer(
    answer: Answer, reader: Reader, returns: Any = None, arenas: Callable[[], Arenas] | None = None
) -> Any:
    """The value of an answer, or its error raised: what user code raised, what was not found, what is not data.

    Raises ProtocolError for what no honest child sends.
    """
    packed = wire.PICKLED if reader.pickled else wire.RESULT
    if answer.kind == packed or (answer.kind == wire.MAPPED and arenas is not None):
        from pisupervisor.link.returns import build

        value = _value(answer, reader, arenas)
        return value if returns is None else build(value, returns)
    if answer.kind == wire.STREAM:
        if len(answer.body) != 8:
            raise ProtocolError("a stream without a number")
        return int.from_bytes(answer.body, "little")
    if answer.kind == wire.RAISED:
        from pisupervisor.link.remote_errors import remote_error

        raise remote_error(_mapping(answer.body))
    if answer.kind == wire.REFUSED:
        raise refusal(_mapping(answer.body))
    raise ProtocolError(f"an answer of kind {answer.kind} was not asked for")


def _value(answer: Answer, reader: Reader, arenas: Callable[[], Arenas] | None) -> Any:
    from pisupervisor.link.serializer import decode, load_pickled

    load = load_pickled if reader.pickled else partial(decode, reader=reader)
    if answer.kind == wire.MAPPED and arenas is not None:
        with arenas().reading(answer.body) as (text, buffers):
            return load(text, buffers)
    try:
        return load(*wire.unpack_value(answer.body))
    except wire.BadFrame as error:
        raise ProtocolError(f"the child sent {error}") from None


class StreamTypes(NamedTuple):
    """What the items of a generator are built as, and what it returns at its end; None: as they come."""

    item: Any = None
    value: Any = None


_ITERATORS = frozenset((
    "Iterator", "Iterable", "Generator", "AsyncIterator", "AsyncIterable", "AsyncGenerator",
))  # fmt: skip


def split_returns(returns: Any) -> tuple[bool, Any, StreamTypes]:
    """(whether a generator may come back, what a value is built as, what a generator's items and end are built as).

    ``returns=Iterator[X]`` asks for a generator of X (a list of X will do), ``Generator[X, S, R]`` for one that returns R at
    its end; ``Any`` for either, any other type for a value that is no generator. Raises OptionsError for a type that nothing can
    be built as.
    """
    if returns is None:
        return True, None, StreamTypes()
    from typing import Any

    from pisupervisor.link.returns import check_returns

    if returns is Any:
        return True, None, StreamTypes()
    origin: Any = getattr(returns, "__origin__", returns)
    if getattr(origin, "__module__", "") != "collections.abc" or origin.__name__ not in _ITERATORS:
        check_returns(returns)
        return False, returns, StreamTypes()
    item, *more = getattr(returns, "__args__", ()) or (Any,)  # Iterator alone: of anything
    types = StreamTypes(item, more[1] if len(more) > 1 else None)
    check_returns(types.item)
    check_returns(types.value)
    listed: Any = list
    return True, listed[item], types


def is_number(value: Any) -> bool:
    """Whether that can be the number of an object."""
    return type(value) is int and 0 <= value < 1 << 64


def is_exit_code(value: Any) -> bool:
    """Of a script; -2: SIGINT, of which a process dies after a KeyboardInterrupt that it does not catch."""
    return type(value) is int and (0 <= value <= 255 or value == -2)


def plain(text: str) -> str:
    """Text of a child with its control characters spelt out: it must not drive a terminal."""
    from pisupervisor.link.remote_errors import CONTROLS

    return text.translate(CONTROLS)


def refusal(payload: dict[str, Any]) -> Exception:
    """The error for a call that was refused before or after user code ran. Only text and a line number are taken."""
    kind, message = payload.get("kind"), plain(str(payload.get("message"))[:8192])
    if kind == "not_found":
        return TargetNotFound(message)
    if kind == "compile":
        file, line = payload.get("file"), payload.get("line")
        return CompileError(
            message,
            file=plain(file[:4096]) if isinstance(file, str) else None,
            line=line if isinstance(line, int) else None,
        )
    if kind == "not_data":
        return SerializationError(message, direction="from child")
    if kind == "unloadable":
        if "ModuleNotFoundError" in message or "ImportError" in message:
            message = f"the child could not rebuild the arguments: {message}; {_IMPORT_HINT}"
            return SerializationError(message, direction="to child")
        return _not_rebuilt(message, payload.get("raised"))
    if kind == "released":
        return ObjectReleased(message)
    if kind == "unknown_callback":
        return UnknownCallback(message)
    return ProtocolError(f"a refusal of kind {str(kind)[:100]!r}")


def _not_rebuilt(message: str, raised: Any) -> SerializationError:
    text = f"the child could not rebuild the arguments: {message}"
    if raised is None:
        return SerializationError(text, direction="to child")
    from pisupervisor.link.remote_errors import NotRebuilt, remote_error

    return NotRebuilt(text, remote_error(raised))


def _mapping(body: bytes) -> dict[str, Any]:
    from typing import Any

    from msgspec import DecodeError, json

    if len(body) > _MAX_REPORT:
        raise ProtocolError(f"an error report of {len(body)} bytes ({_MAX_REPORT} are allowed)")
    try:
        return json.decode(body, type=dict[str, Any])
    except (DecodeError, ValueError, RecursionError):
        raise ProtocolError("an error report that cannot be read") from None


__all__ = ["CallError", "pack_call", "refusal", "unpack_answer"]
