"""Values across the link, host side. What a child sends is data: counted, decoded, checked, never executed.

The chart of the format is in ``pihost.inside.encode``; ``tagged`` and ``arrays`` build what JSON has no words for.
Calls to the child are in ``arguments``, its exceptions in ``remote_errors``.
"""

from __future__ import annotations

import sys

from pisupervisor.errors import ProtocolError, SerializationError
from pisupervisor.link.arguments import child_importable, dump_call, dump_function
from pisupervisor.link.reader import DATA, Reader, text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["child_importable", "decode", "dump_call", "dump_function", "load_pickled"]

MAX_ITEMS = 2_000_000
MAX_NESTING = 210  # the child's 100 levels; a tagged one takes two

_ZERO = ord("0")
_WORDS = {b"null": None, b"true": True, b"false": False}
_FROM_CHILD = "from child"
_CHUNK = 1 << 18  # bounds the pieces that a text of nothing but quotes falls into


def decode(
    text: bytes, buffers: Sequence[bytes | memoryview], *, max_items: int = MAX_ITEMS, reader: Reader = DATA
) -> Any:
    """The value that a child encoded. Raises ProtocolError for everything that is not a value, and nothing else but
    SerializationError where an honest value cannot be built on this host (no numpy, an unknown time zone, a decoder of the
    application's that raises).
    """
    try:
        if not buffers and (text in _WORDS or _is_small_int(text)):
            return _WORDS[text] if text in _WORDS else int(text)
        return _decode(text, buffers, max_items, reader)
    except (ProtocolError, SerializationError):
        raise
    except Exception as error:  # RecursionError, MemoryError, msgspec's own ...: whatever hostile bytes can provoke
        raise ProtocolError(
            f"a result that cannot be decoded: {type(error).__name__}: {text_of(error, 200)}"
        ) from error


def decode_plain(text: bytes, reader: Reader) -> Any:
    """The same for a text that came without buffers, in fewer steps where it is short."""
    if text.isdigit() and len(text) < 19 and (text[0] != _ZERO or len(text) == 1):
        return int(text)
    # Somebody has needed it, and waited for it; without its name another thread is in the middle of that.
    from_json = getattr(sys.modules.get("msgspec.json"), "decode", None)
    if from_json is None or len(text) > MAX_NESTING or b'"$":' in text:
        return decode(text, (), reader=reader)
    try:
        return from_json(text)
    # Not what a signal's handler raises.
    except (ValueError, RecursionError, MemoryError, sys.modules["msgspec"].MsgspecError) as error:
        why = f"a result that cannot be decoded: {type(error).__name__}: {text_of(error, 200)}"
        raise ProtocolError(why) from error


def _is_small_int(text: bytes) -> bool:
    return len(text) < 19 and text.isdigit() and (text[0] != _ZERO or len(text) == 1)


def _decode(text: bytes, buffers: Sequence[bytes | memoryview], max_items: int, reader: Reader) -> Any:
    import msgspec.json  # 8 ms: not paid by a first call that answers None, a bool or an int

    openings = text.count(b"[") + text.count(b"{")
    if openings + text.count(b",") > max_items:
        _count_exactly(text, max_items)
    value = msgspec.json.decode(text)
    if b'"$":' in text or buffers:
        from pisupervisor.link.tagged import Rebuilder

        rebuilder = Rebuilder(buffers, MAX_NESTING, reader)
        value = rebuilder.value(value, 0)
        rebuilder.finish()
    elif openings > MAX_NESTING:
        _check_depth(value)
    return value


def _count_exactly(text: bytes, max_items: int) -> None:
    """The same count, without what stands inside strings (a CSV file as one string is one item)."""
    bare = text.replace(rb"\\", b"").replace(rb"\"", b"")
    items, inside = 0, 0
    for start in range(0, len(bare), _CHUNK):
        parts = bare[start : start + _CHUNK].split(b'"')
        outside = b"".join(parts[inside::2])
        items += outside.count(b"[") + outside.count(b"{") + outside.count(b",")
        inside ^= (len(parts) - 1) & 1
    if items > max_items:
        raise ProtocolError(f"a result of more than {max_items} items")


def _check_depth(value: object) -> None:
    """Level by level, so that every loop runs in C: the caller's own recursion must not end in our data."""
    from itertools import chain

    level = [value]
    for _ in range(MAX_NESTING):
        lists = [part for part in level if type(part) is list]
        dicts = [part for part in level if type(part) is dict]
        if not lists and not dicts:
            return
        level = list(chain(chain.from_iterable(lists), chain.from_iterable(map(dict.values, dicts))))
    raise ProtocolError(f"a result nested deeper than {MAX_NESTING} levels")


def load_pickled(data: bytes, buffers: Sequence[memoryview] = ()) -> Any:
    """DANGER: unpickles a child's bytes, which runs whatever code the child put into them, in the host.

    Only for isolators created with ``results="pickle"``, where the caller has said that the child is trusted. Nothing
    else may call this. ``buffers`` are copied where they are read-only. Raises SerializationError for what does not load.
    """
    import pickle

    try:
        own = [bytearray(buffer) if buffer.readonly else buffer for buffer in buffers]
        return pickle.loads(data, buffers=own)  # noqa: S301 - the caller asked for it by name
    except Exception as error:
        raise SerializationError(
            f"the pickled result does not load here: {type(error).__name__}: {error}\n"
            "  the host must be able to import what the child returns; or return plain data",
            direction=_FROM_CHILD,
        ) from error
