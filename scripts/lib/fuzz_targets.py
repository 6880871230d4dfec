"""What is fuzzed: each target takes bytes, and lets out what it must never raise."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from typing import Any

import msgspec.json  # noqa: F401  the short way of a plain answer is taken only when it is there

from pihost import wire
from pihost.plan import ChildPlan, PlanError, TemplatePlan
from pisupervisor.callbacks import Callbacks
from pisupervisor.errors import IsolationError, ProfileError, ProtocolError, SerializationError
from pisupervisor.launch import seccomp_compile, zygote
from pisupervisor.launch.seccomp import SeccompProfile
from pisupervisor.launch.seccomp_rules import Flaw, parse_profile
from pisupervisor.link import jsontext
from pisupervisor.link.calls import unpack_answer
from pisupervisor.link.connection import Connection, LinkClosed, Request
from pisupervisor.link.frames import Pending
from pisupervisor.link.reader import DATA
from pisupervisor.link.returns import build
from pisupervisor.link.serializer import decode, decode_plain

LARGEST = 1 << 16
CALLS = 8


class Price(enum.Enum):
    NONE = ""
    BOTH = (1, 2)


@dataclasses.dataclass
class Offer:
    price: Price
    inner: Offer | None = None
    more: set[int] | None = None


TYPES: tuple[Any, ...] = (
    int,
    list[int],
    dict[str, list[float]],
    tuple[int, ...],
    bytes | None,
    Offer,
    dict[Price, Offer],
)


class HostileLink:
    """The child's end of the link: says what it was given, in pieces of so many bytes, and takes whatever it is told."""

    def __init__(self, stream: bytes, piece: int) -> None:
        self.stream, self.piece, self.at = stream, piece, 0

    def recv(self, size: int, _flags: int = 0) -> bytes:
        said = self.stream[self.at : self.at + min(size, self.piece)]
        self.at += len(said)
        return said

    def send(self, data: Any, _flags: int = 0) -> int:
        return len(data)

    def sendmsg(self, parts: Any, _rights: Any = (), _flags: int = 0) -> int:
        return sum(map(len, parts))

    def setsockopt(self, *_arguments: Any) -> None:
        pass


def _callbacks() -> Callbacks:
    callbacks = Callbacks(lambda value: repr(value).encode(), None)
    callbacks.register("f", lambda *_args, **_kwargs: None, False)
    callbacks.register("raw", lambda *_args: b"x", False)
    return callbacks


_CALLBACKS = _callbacks()


def frames(data: bytes) -> None:
    """All that the host makes of what a child says to eight calls: frames, state, answers, callbacks, values, errors."""
    if len(data) < 2:
        return
    link: Any = HostileLink(data[2:], 1 + data[0] * 64)
    connection = Connection(link, LARGEST, answer=_CALLBACKS.answer)
    ahead = _begin_ahead(connection) if data[1] & 2 else {}
    for ident in range(1, CALLS + 1):
        try:
            if ident in ahead:
                unpack_answer(connection.wait(ahead[ident]), DATA, None, connection.arenas)
                connection.dispatch_what_is_there()
            else:
                _one_call(connection, ident, short=bool(data[1] & 1))
        except (LinkClosed, ProtocolError):
            return  # the child is dead, or to be killed
        except IsolationError:
            continue  # the call's own outcome


def _begin_ahead(connection: Connection) -> dict[int, Pending]:
    """Three calls under way at once, as ``map`` has them."""
    calls = {ident: Pending(ident, connection.largest) for ident in (1, 2, 3)}
    for pending in calls.values():
        connection.begin(pending, Request(b"x"))
    return calls


def _one_call(connection: Connection, ident: int, *, short: bool) -> None:
    if short:
        text = connection.ask(ident, b"x", None)
        if text is not None:
            decode_plain(text, DATA)
            return
        answer = connection.wait(connection.calls[ident])
    else:
        answer = connection.call(b"x", ident=ident)
    unpack_answer(answer, DATA, None, connection.arenas)


def value(data: bytes) -> None:
    """A value with up to three buffers beside it, and what ``returns=`` makes of it."""
    if not data:
        return
    count, rest = data[0] % 4, data[1:]
    buffers = []
    for _ in range(count):
        size, rest = (rest[0] if rest else 0), rest[1:]
        buffers.append(rest[:size])
        rest = rest[size:]
    try:
        found = decode(rest, buffers, max_items=10_000)
        for kind in TYPES:
            with contextlib.suppress(SerializationError):
                build(found, kind)
    except (ProtocolError, SerializationError):
        pass


def profile(data: bytes) -> None:
    """A seccomp profile from its text to programs for both machines."""
    with contextlib.suppress(ProfileError):
        SeccompProfile(data, "fuzzed", "fuzzed.json")  # with the line of what is wrong
    try:
        policy = parse_profile(data)
        for machine in ("x86_64", "aarch64"):
            program = seccomp_compile.compile_rules(policy, machine)
            assert program
            assert len(program) % 8 == 0
    except Flaw:
        pass


def plan(data: bytes) -> None:
    """Both launch plans, with values of all kinds in all fields. (Not their bytes: marshal is for those who trust each
    other, and the zygote reads its host's plans only.)
    """
    cursor = _Cursor(data)
    for kind in (TemplatePlan, ChildPlan):
        fields = {
            name: cursor.value(0) if cursor.byte() % 8 == 0 else _fitting(spec) for name, spec in kind.FIELDS.items()
        }
        if cursor.byte() % 16 == 0:
            fields[str(cursor.value(0))] = 1
        try:
            made = kind(**fields)
        except PlanError:
            continue
        assert kind.load(made.dump()).dump() == made.dump()


def report(data: bytes) -> None:
    """What PID 1 and the zygote say on the status socket."""
    try:
        message = jsontext.load(data)
    except ValueError:
        return
    if "failed" in message:
        zygote.failure(message)


TARGETS = {"frames": frames, "value": value, "profile": profile, "plan": plan, "report": report}


def _fitting(spec: Any) -> Any:
    kind = spec[0] if isinstance(spec, tuple) else spec
    return kind()


class _Cursor:
    """Values out of bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def value(self, depth: int) -> Any:
        kind = self.byte() % (9 if depth < 4 else 7)
        if kind < 7:
            size = self.byte()
            text = self.data[self.at : self.at + size]
            self.at += len(text)
            simple = (None, True, size << self.byte(), -size / 3, text.decode("latin-1"), text, size)
            return simple[kind]
        items = [self.value(depth + 1) for _ in range(self.byte() % 5)]
        return items if kind == 7 else {str(place): item for place, item in enumerate(items)}


# Frames for seeds and mutations ------------------------------------------------------------------------------------


def frame(kind: int, ident: int, body: bytes) -> bytes:
    return wire.pack_header(kind, ident, len(body)) + body


def packed(text: bytes, *buffers: bytes) -> bytes:
    return b"".join(map(bytes, wire.pack_value(text, list(buffers))))
