"""A child's bytes become frames, and frames answers. Pure: no I/O and no clock; the child is believed nothing."""

from __future__ import annotations

import struct

from pihost import wire
from pisupervisor.errors import ProtocolError
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Ringing(Protocol):
        def ring(self) -> None: ...


_HEADER = wire.HEADER.size
_PLAIN = struct.Struct("<IQIII")  # a header, whose first fields are one number here, and the counts of a value
_RESULT_WORD = wire.MAGIC | wire.VERSION << 16 | wire.RESULT << 24
_PLAIN_SIZE = _PLAIN.size
_COUNTS = struct.Struct("<II")
READ = 1 << 16
QUESTIONS = frozenset((wire.CALLBACK, wire.CALLBACK_RAW, wire.CALLBACK_MAPPED, wire.RAW_MAPPED, wire.ROOM))


class Answer(NamedTuple):
    """A reply: its kind (see ``wire``), its body, and what the call wrote meanwhile, where that was asked for."""

    kind: int
    body: bytes
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


def plain_text(data: bytes, ident: int) -> bytes | None:
    """The value's text, where ``data`` is the whole answer to that call in one frame, without buffers: the commonest of all."""
    size = len(data)
    if not _PLAIN_SIZE <= size <= wire.MAX_FRAME:
        return None
    word, answered, length, text, buffers = _PLAIN.unpack_from(data)
    if word == _RESULT_WORD and answered == ident and text == size - _PLAIN_SIZE and length == text + 8 and not buffers:
        return data[_PLAIN_SIZE:]
    return None


def text_of(answer: Answer) -> bytes | None:
    """The same of an answer that was taken apart already."""
    body = answer.body
    if (
        answer.kind != wire.RESULT
        or len(body) < _COUNTS.size
        or _COUNTS.unpack_from(body) != (len(body) - _COUNTS.size, 0)
    ):
        return None
    return body[_COUNTS.size :]


class Frames:
    """``feed`` it with what was read, take whole frames out with ``next``."""

    def __init__(self) -> None:
        self._data: bytes | bytearray = b""  # from ``_at`` on not yet taken
        self._at = 0
        self.missing = 0  # bytes to the end of the next frame, or of its header, after ``next`` has given None

    def feed(self, data: bytes) -> None:
        if self._at == len(self._data):
            self._data, self._at = data, 0
            return
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data[self._at :])
        else:
            del self._data[: self._at]  # who always has the next frame begun would have all of them kept
        self._at = 0
        self._data += data

    def next(self) -> tuple[int, int, bytes] | None:
        """(kind, id, body) of the next frame, None where there is none whole. Raises ProtocolError."""
        data, at = self._data, self._at
        need = at + _HEADER
        if len(data) >= need:
            kind, ident, length = self._header(data, at)
            need += length
            if len(data) >= need:
                self._at = need
                return kind, ident, bytes(data[at + _HEADER : need])
        self.missing = need - len(data)
        return None

    def take_plain(self, calls: dict[int, Pending]) -> int:
        """Plain answers of calls that nobody waits for at this moment, as long as they are there whole, in few steps each; how
        many bytes they were. What else there is, or comes too large, is left for ``next``.
        """
        data, at, size = self._data, self._at, 0
        while len(data) - at >= _PLAIN_SIZE:
            word, ident, length, text, buffers = _PLAIN.unpack_from(data, at)
            end = at + _HEADER + length
            if word != _RESULT_WORD or buffers or text + _COUNTS.size != length or length > READ or end > len(data):
                break
            pending = calls.get(ident)
            if pending is None or pending.owned or pending.is_abandoned or pending.asked or pending._whole:
                break
            del calls[ident]
            pending.text, at = bytes(data[at + _PLAIN_SIZE : end]), end
            pending.size += length  # it may have asked something before
            size += length
        self._at = at
        return size

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and is not whole yet (after ``next`` has given None)."""
        return self._at < len(self._data)

    @staticmethod
    def _header(data: bytes | bytearray, at: int) -> tuple[int, int, int]:
        try:
            header = wire.unpack_header(data, at)
        except wire.BadFrame as error:
            raise ProtocolError(f"the child sent {error}") from None
        if header[0] not in wire.FROM_CHILD:
            raise ProtocolError(f"a frame of kind {header[0]}, which no child may send")
        return header


class Pending:
    """A call under way and what has come of it: pieces, a callback that waits for its answer, the answer.

    ``owned``: a thread waits for it. ``bell`` is rung when there is something new, where others than the caller may
    read it. ``largest`` bounds the answer in bytes, however many pieces it comes in.
    """

    answer: Answer | None = None
    text: bytes | None = None  # in the place of the answer, where that is plain data in one frame: see ``take_plain``
    size = 0  # bytes that have come for it, where nobody waits for it
    is_abandoned = False
    asked: tuple[int, bytes] | None = None  # kind and body of a callback, until it is answered
    is_seen_to = False  # by somebody, who will answer it
    caller = 0  # who waits for it, where several may wait
    _whole: bytearray | None = None
    _pieces = 0
    _roomed = False

    def __init__(self, ident: int, largest: int, bell: Ringing | None = None, *, owned: bool = True) -> None:
        self.ident, self._largest, self.bell, self.owned = ident, largest, bell, owned
        self.of_map = not owned

    @property
    def is_answered(self) -> bool:
        return self.answer is not None or self.text is not None

    @property
    def asks(self) -> bool:
        """Whether it asks something that nobody has seen to."""
        return self.asked is not None and not self.is_seen_to

    @property
    def asks_for_room(self) -> bool:
        return self.asked is not None and self.asked[0] == wire.ROOM

    def has_its_answer(self, *, room: bool = False) -> None:
        """What it asked is answered. Once it was given ``room``, it may ask for that anew after its next question only."""
        if not room:
            self._roomed = False
        self.asked, self.is_seen_to = None, False

    def ring(self) -> None:
        if self.bell is not None:
            self.bell.ring()

    def take(self, kind: int, body: bytes) -> bool:
        """One frame; whether the caller has something to do now. Raises ProtocolError."""
        if self.asked is not None:
            raise ProtocolError(f"something about call {self.ident}, whose callback is not answered yet")
        if kind in QUESTIONS:
            if kind == wire.ROOM and self._roomed:
                raise ProtocolError("room asked for twice")
            self._roomed |= kind == wire.ROOM
            self.asked, self._whole, self._pieces = (kind, self._with_pieces(body)), None, 0
            return True
        if kind == wire.READY:
            raise ProtocolError("ready said twice")
        if kind != wire.PIECE:
            self.answer = Answer(kind, self._with_pieces(body))
            return True
        self._add(body)
        return False

    def _with_pieces(self, body: bytes) -> bytes:
        self._check(body)
        return body if self._whole is None else bytes(self._whole + body)

    def _check(self, body: bytes) -> None:
        if len(body) + len(self._whole or b"") > self._largest:
            raise ProtocolError(f"an answer of more than {self._largest} bytes")

    def _add(self, body: bytes) -> None:
        self._check(body)
        if self._whole is None:
            self._whole = bytearray()
        self._whole += body
        self._pieces += 1
        most = self._largest // wire.PIECE_SIZE + wire.MAX_BUFFERS + 8  # an honest child begins one for each part
        if self._pieces > most:
            raise ProtocolError(f"an answer in more than {most} pieces")
