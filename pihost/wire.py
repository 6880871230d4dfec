"""Frames to bytes and back, no I/O. The same file on both sides.

    host                                      child
      | <------------------------- READY  id 0, walls are up, before any user code
      | CODE    id n, a module's source ---->|   (no answer; kept by its key)
      | STDIO   id n, stdout and stderr ---->|   (no answer; where they go outside of such a call; the body says how many)
      | RELEASE id n, numbers of objects --->|   (no answer; they are kept no longer)
      | CALL    id n, what to run ---------->|   (with it the pipes for its stdout and stderr, if it is captured)
      | INNER   id n, id m, what to run ---->|   (a call that the callback of call m makes)
      | <-- CALLBACK, CALLBACK_RAW, CALLBACK_MAPPED, RAW_MAPPED  id m, a name and arguments: for a function of the host
      | ANSWER  id m ----------------------->|   before it, other calls may be made and answered in turn
      | <------------------------- ROOM    id n, bytes needed: for a big answer that has no arena to lie in
      | ANSWER  id n, number and size ------>|   an arena's descriptor rides on it; or a single byte: there is none
      | EXIT    id n ----------------------->|   (no answer but the end: exit handlers run, the exit code is 0)
      | <------------------------- PIECE  id n, a part of an answer, or of a question, that is larger than one frame
      | <------------------------- one of RESULT, MAPPED, PICKLED, STREAM, RAISED, REFUSED  id n, the (last part of the) answer

Descriptors ride on STDIO, CALL, INNER and ANSWER, where their kind says so (RIDING); on nothing that a child sends.
A frame is a 16-byte header (magic, version, kind, id, length; little endian) and ``length`` bytes, 1 at the least.
Host to child the body is a pickle: the host is trusted. Child to host it is never one, unless the caller asked for
``results="pickle"``: PICKLED is a packed value (see ``pack_value``) with a pickle in the place of the text, RESULT is a
packed value, MAPPED either whose buffers lie in an arena (see ``place``; CALLBACK_MAPPED is a CALLBACK and RAW_MAPPED a
CALLBACK_RAW likewise), STREAM the number of a generator, RAISED and REFUSED are JSON.
"""

from __future__ import annotations

import struct

if False:  # only a type checker reads this
    from typing import Any

MAGIC = 0x5149
VERSION = 1
HEADER = struct.Struct("<HBBQI")
MAX_FRAME = 4 << 20  #: largest body a child may send in one frame; the host's own frames are not bounded by it
PIECE_SIZE = 1 << 20
STDERR_TAIL = 4096  #: bytes of the end of stderr that PID 1 keeps where nobody reads it
MAX_BUFFERS = 1000  #: binary buffers beside the text of one value

CODE, CALL, INNER, EXIT, STDIO, RELEASE, ANSWER = 1, 2, 3, 4, 5, 6, 7
RIDING = 32  #: added to the kind of a frame with which descriptors come
READY, RESULT, PICKLED, RAISED, REFUSED, PIECE, CALLBACK, CALLBACK_RAW, STREAM = 64, 65, 66, 67, 68, 69, 70, 71, 72
MAPPED, ROOM, CALLBACK_MAPPED, RAW_MAPPED = 73, 74, 75, 76
FROM_CHILD = frozenset(range(READY, RAW_MAPPED + 1))

# An arena is memory that both sides see, made and sealed by the host. Its first byte says who has it: FREE means the
# side that writes, LENT the side that reads. What is in it begins after ARENA_HEADER, in order, aligned to ARENA_ALIGN.
ARENA_HEADER, ARENA_ALIGN = 4096, 64
FREE, LENT = 0, 1
BIG = 1 << 17  #: bytes; what is smaller goes over the socket
MAX_DESCRIPTORS = 64  #: with one call
VALUE, RAW, FAILED, UNKNOWN, ATTACHED = b"\0", b"\1", b"\2", b"\3", b"\4"  #: what the answer to a callback begins with

_COUNTS = struct.Struct("<II")
_NUMBER = OUTER = struct.Struct("<Q")  #: OUTER is what the body of INNER begins with
HEAD = struct.Struct("<I")  #: what a call begins with: the length of its head's pickle; that of its arguments follows


class BadFrame(ValueError):
    """Bytes that are no frame, or a frame that may not come from this side."""


def pack_header(kind: int, ident: int, length: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, ident, length)


def unpack_header(data: bytes | bytearray, offset: int = 0, limit: int = MAX_FRAME) -> tuple[int, int, int]:
    """(kind, id, length) of the header at ``offset``. Raises BadFrame before anyone allocates ``length`` bytes."""
    magic, version, kind, ident, length = HEADER.unpack_from(data, offset)
    if magic != MAGIC or version != VERSION:
        raise BadFrame(f"magic {magic:#x} version {version}: not a frame of ours")
    if not 0 < length <= limit:
        raise BadFrame(f"a frame of {length} bytes (1 to {limit} are allowed)")
    return kind, ident, length


def pack_value(text: bytes, buffers: list[Any]) -> list[Any]:
    """The parts of an encoded value: counts, buffer lengths, JSON text, buffers. To be joined or sent as they are."""
    head = _COUNTS.pack(len(text), len(buffers))
    if not buffers:
        return [head, text]
    lengths = struct.pack(f"<{len(buffers)}Q", *(memoryview(buffer).nbytes for buffer in buffers))
    return [head, lengths, text, *buffers]


def pack_text(text: bytes) -> bytes:
    """The same of a value without buffers."""
    return _COUNTS.pack(len(text), 0) + text


def unpack_value(body: bytes) -> tuple[bytes, list[memoryview]]:
    """(text, buffers) of a packed value. Raises BadFrame where the lengths do not add up to the body exactly."""
    if len(body) < _COUNTS.size:
        raise BadFrame("a value without its counts")
    text_length, count = _COUNTS.unpack_from(body)
    if count > MAX_BUFFERS:
        raise BadFrame(f"a value of {count} buffers ({MAX_BUFFERS} are allowed)")
    start = _COUNTS.size + 8 * count
    if start + text_length > len(body):
        raise BadFrame("a value shorter than it says")
    lengths = struct.unpack_from(f"<{count}Q", body, _COUNTS.size)
    if start + text_length + sum(lengths) != len(body):
        raise BadFrame("a value whose parts do not fill it")
    text = bytes(body[start : start + text_length])
    position = start + text_length
    view = memoryview(body)
    buffers = []
    for length in lengths:
        buffers.append(view[position : position + length])
        position += length
    return text, buffers


def place(lengths: list[int]) -> tuple[list[int], int]:
    """(where each region begins, where the last one ends) in an arena. Both sides count: nobody sends an offset."""
    position, starts = ARENA_HEADER, []
    for length in lengths:
        starts.append(position)
        position += -(-length // ARENA_ALIGN) * ARENA_ALIGN
    return starts, position


def pack_mapped(number: int, text: bytes, lengths: list[int]) -> list[bytes]:
    """The parts of a value whose buffers lie in the arena ``number``."""
    counts = _COUNTS.pack(len(text), len(lengths))
    return [_NUMBER.pack(number), counts, struct.pack(f"<{len(lengths)}Q", *lengths), text]


def unpack_mapped(body: bytes) -> tuple[int, bytes, list[int]]:
    """(arena, text, lengths of the buffers in it). Raises BadFrame where the body is not exactly that."""
    start = _NUMBER.size + _COUNTS.size
    if len(body) < start:
        raise BadFrame("a mapped value without its counts")
    text_length, count = _COUNTS.unpack_from(body, _NUMBER.size)
    if count > MAX_BUFFERS or start + 8 * count + text_length != len(body):
        raise BadFrame("a mapped value whose parts do not fill it")
    lengths = struct.unpack_from(f"<{count}Q", body, start)
    return _NUMBER.unpack_from(body)[0], body[start + 8 * count :], list(lengths)
