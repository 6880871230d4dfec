"""What is in a stream of Arrow messages, told from their flatbuffers before anything is built of them.

pyarrow checks that a stream is well formed; that it is small it does not: a compressed buffer says itself how large it will
be, a column of nulls has any number of rows in no bytes, and a field's metadata can name an extension type, for which code of
the host's would be asked. So much of the format is read here as is needed to refuse that.
Format: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

import struct

from pisupervisor.errors import ProtocolError, SerializationError

MAX_MESSAGES = 3000  # a schema, a thousand batches, their dictionaries
SPARE_CELLS = 1_000_000  # for columns of nothing; all others have a bit for each cell at the least

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_CONTINUATION = 0xFFFFFFFF
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 1, 2, 3  # fields of Message
_DICTIONARY_DATA = 1  # field of DictionaryBatch
_NODES, _COMPRESSION = 1, 3  # fields of RecordBatch


def check_stream(data: bytes) -> None:
    """Raises ProtocolError for a stream that is not one schema and then batches, SerializationError for one that is not plain
    or out of proportion: an honest child may have such a table.
    """
    position, cells, messages, size = 0, 0, 0, -1
    try:
        while size:
            mark, size = struct.unpack_from("<II", data, position)
            if mark != _CONTINUATION:
                raise ProtocolError("an Arrow message without its mark")
            position += 8
            if not size:
                break
            kind, body, found = _read_message(data[position : position + size], first=messages == 0)
            cells += found
            position += size + body
            messages += 1
            if messages > MAX_MESSAGES or cells > 8 * len(data) + SPARE_CELLS:
                raise not_taken(f"Arrow data of {messages} messages and {cells} cells in {len(data)} bytes")
            if (kind == _SCHEMA) != (messages == 1):
                raise ProtocolError("an Arrow schema in the wrong place")
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ProtocolError(f"Arrow data that cannot be read: {error}") from None
    if position != len(data) or messages == 0:
        raise ProtocolError("Arrow data that does not end where it says")


def not_taken(what: str) -> SerializationError:
    """For what is refused unread, though it may be honest."""
    return SerializationError(f"the child returned {what}; return plain columns", direction="from child")


def _read_message(metadata: bytes, first: bool) -> tuple[int, int, int]:
    """(kind, length of its body, cells) of one message."""
    message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    kind, body = message.number(_HEADER_TYPE, "<B"), message.number(_BODY_LENGTH, "<q")
    if kind not in (_SCHEMA, _DICTIONARY, _BATCH) or not 0 <= body < 1 << 62:
        raise ProtocolError(f"an Arrow message of kind {kind} and {body} bytes")
    if first and b"ARROW:extension" in metadata:
        raise not_taken("an Arrow extension type, which code would have to be asked for")
    if kind == _SCHEMA:
        return kind, body, 0
    batch = message.table(_HEADER)
    if kind == _DICTIONARY:
        batch = batch.table(_DICTIONARY_DATA)
    if batch.place(_COMPRESSION):
        raise ProtocolError("Arrow data that is compressed")
    return kind, body, batch.cells()


class _Table:
    """A table of a flatbuffer: where its fields are is said by its vtable. Python's slices and unpack_from check all bounds."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.start = data, start
        self.vtable = start - struct.unpack_from("<i", data, start)[0]
        if self.vtable < 0:
            raise ValueError("a table whose fields lie before it")
        self.size = struct.unpack_from("<H", data, self.vtable)[0]

    def place(self, field: int) -> int:
        """Where the field is, 0 for one that is not there."""
        entry = 4 + 2 * field
        if entry + 2 > self.size:
            return 0
        offset: int = struct.unpack_from("<H", self.data, self.vtable + entry)[0]
        return self.start + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        place = self.place(field)
        return int(struct.unpack_from(form, self.data, place)[0]) if place else 0

    def table(self, field: int) -> _Table:
        return _Table(self.data, self.follow(field))

    def follow(self, field: int) -> int:
        place = self.place(field)
        if not place:
            raise ValueError(f"a table without its field {field}")
        return place + int(struct.unpack_from("<I", self.data, place)[0])

    def cells(self) -> int:
        """The lengths of all arrays of a batch, nested ones too: each node is a length and a number of nulls."""
        if not self.place(_NODES):
            return 0
        start = self.follow(_NODES)
        (count,) = struct.unpack_from("<I", self.data, start)
        lengths = struct.unpack_from(f"<{2 * count}q", self.data, start + 4)[::2]
        if any(length < 0 for length in lengths):
            raise ValueError("an array of negative length")
        return sum(lengths)
