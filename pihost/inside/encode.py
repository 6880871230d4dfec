"""Values become data, next to hostile code: ASCII JSON text, and binary buffers that travel beside it.

What JSON has is written as JSON. All else is an object of exactly two members, ``{"$": tag, "v": payload}``:

=============================  =====================================================================
tuple set frozenset            list of the elements
dict                           key, value, key, value ...: other keys than str, or a key "$"
bytes bytearray str            blob (str: utf-8 with surrogatepass, for lone surrogates)
int                            hexadecimal text: what leaves signed 64 bit
float complex                  "nan" "inf" "-inf"; [real, imaginary] as text
datetime time                  [ISO text, fold, zone name or null]; a name outdoes the offset in the text
date timedelta                 ISO text; [days, seconds, microseconds]
decimal uuid                   text; 32 hexadecimal digits
path purepath windowspath      str
array scalar                   [dtype, shape, blob]; [dtype, blob]; a dtype is dtype.str or, of records,
                               [size, [[name, dtype, shape, offset], ...]]
table batch frame series       of pyarrow and pandas: see ``arrow``
own                            [name, data]: an object of a type in the host's ``types=``, see ``taught``
serialized                     blob: a whole result, where the host has plugged in a serializer of its own
=============================  =====================================================================

A blob is the index of a buffer, or base64 text where a buffer would cost more than it saves. Enums travel as their
value, dataclasses as the dict of their fields, subclasses of builtins as what they are built on. ``type(v)`` decides,
never ``__class__`` or an overridden method. The host reads all this back in ``pisupervisor.link.tagged``.
"""

from __future__ import annotations

from binascii import b2a_base64
from itertools import chain

from pihost import wire
from pihost.inside import taught
from pihost.inside.writers import HIGH, LOW, TAG_ITEMS, WRITERS, find_writer, is_clean, is_hashable, shown
from pihost.jsontext import dump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

MAX_DEPTH = 100
MAX_ITEMS = 2_000_000  # values, and containers once more: never less than the host counts in the text
MAX_BUFFERS = wire.MAX_BUFFERS  # what comes after travels as base64: each costs a header and a system call's share
INLINE = 512  # bytes; a buffer costs more than this many in bookkeeping

_WAY_OUT = (
    "return plain data (numbers, text, lists, dicts, arrays), keep the object in the child with create_object, "
    'or, if you trust this child, ask for results="pickle"'
)
_TOO_MANY = f"the result has more than {MAX_ITEMS} items; return less, or a numpy array"


class NotData(Exception):
    """A value that cannot travel as data. The message names the part and the way out."""


class TooLarge(NotData):
    """One that takes more bytes than it may."""


def encode(value: Any, max_bytes: int) -> tuple[bytes, list[Any]]:
    """``value`` as JSON text and the buffers (bytes-like) beside it, together at most ``max_bytes``; else NotData.

    What user code raises while its value is read (a property of a dataclass, a tzinfo) comes out as it is.
    """
    quick = PLAIN.get(type(value))
    text = quick(value) if quick is not None else None
    if text is None:
        return Walk(max_bytes).run(value)
    check_size(len(text), max_bytes)
    return text, []


def check_size(size: int, limit: int) -> None:
    """Raises NotData for a value that takes more."""
    if size > limit:
        raise TooLarge(
            f"the result takes {size} bytes, more than Limits.result ({limit}); return less, or raise Limits(result=...)"
        )


def _quick_int(value: int) -> bytes | None:
    return b"%d" % value if LOW <= value <= HIGH else None


def _quick_float(value: float) -> bytes | None:
    return repr(value).encode("ascii") if value - value == 0 else None


def _quick_str(value: str) -> bytes | None:
    return dump(value) if is_clean(value) else None


def _quick_container(value: Any) -> bytes | None:
    """JSON at C speed where JSON says it all, else None. The C encoder alone would turn tuples into lists, keys into
    text, and a pair of surrogates into another character.
    """
    if not _is_plain(value):
        return None
    try:
        text = dump(value)
    except ValueError:  # nan or inf
        return None
    return None if b'"$":' in text or b"\\ud" in text else text


PLAIN: dict[type, Callable[[Any], bytes | None]] = {
    type(None): lambda _: b"null",
    bool: lambda value: b"true" if value else b"false",
    int: _quick_int, float: _quick_float, str: _quick_str, list: _quick_container, dict: _quick_container,
}  # fmt: skip
_PLAIN = frozenset(PLAIN)


def _is_plain(value: Any) -> bool:
    """Whether only JSON's own types are in ``value``. Goes level by level, so that every loop runs in C."""
    level, seen = [value], 1
    for _ in range(MAX_DEPTH + 1):
        kinds = set(map(type, level))
        if not kinds <= _PLAIN or not _fits(level, kinds):
            return False
        if list not in kinds and dict not in kinds:
            return True
        lists = [part for part in level if type(part) is list]
        dicts = [part for part in level if type(part) is dict]
        seen += len(lists) + len(dicts) + sum(map(len, lists)) + sum(map(len, dicts))
        if seen > MAX_ITEMS or not set(map(type, chain.from_iterable(dicts))) <= {str}:
            return False
        level = list(chain(chain.from_iterable(lists), chain.from_iterable(map(dict.values, dicts))))
    return False


def _fits(level: list[Any], kinds: set[type]) -> bool:
    if int not in kinds:
        return True
    numbers = level if len(kinds) == 1 else [part for part in level if type(part) is int]
    return bool(min(numbers) >= LOW and max(numbers) <= HIGH)


class Walk:
    """One value on its way out: knows where it is (``path``), how much it has seen, and the buffers so far."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.buffers: list[Any] = []
        self.size = 0
        self.items = 0
        self.path: list[Any] = []  # int: index, str: key, (name,): attribute, (): a key or an element
        self.writers = dict(WRITERS)

    def run(self, value: Any) -> tuple[bytes, list[Any]]:
        text = dump(self.convert(value))
        if self.items > MAX_ITEMS:
            raise NotData(_TOO_MANY)
        self.grow(len(text))
        return text, self.buffers

    def convert(self, value: Any) -> Any:
        """``value`` in JSON's own types."""
        self.items += 1
        if self.items > MAX_ITEMS:
            raise NotData(_TOO_MANY)
        kind = type(value)
        writer = self.writers.get(kind)
        if writer is None:
            writer = self.writers[kind] = taught.find_writer(kind) or find_writer(kind) or Walk.refuse_kind
        return writer(self, value)

    def each(self, values: Iterable[Any]) -> list[Any]:
        self.enter(0)
        path, out = self.path, []
        for index, value in enumerate(values):
            path[-1] = index
            out.append(self.convert(value))
        path.pop()
        return out

    def members(self, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        self.enter(())
        path, out = self.path, {}
        for key, value in pairs:
            path[-1] = key
            out[key] = self.convert(value)
        path.pop()
        return out

    def part(self, step: Any, value: Any) -> Any:
        self.enter(step)
        out = self.convert(value)
        self.path.pop()
        return out

    def tagged(self, name: str, payload: Any) -> dict[str, Any]:
        self.items += TAG_ITEMS
        return {"$": name, "v": payload}

    def keys(self, values: Iterable[Any]) -> list[Any]:
        """Keys or elements of a set. The host must be able to hash them, and to tell them apart."""
        self.enter(())
        out, seen = [], set()
        for value in values:
            node = self.convert(value)
            if not is_hashable(node):
                self.refuse(f"{shown(value)} cannot be a key or an element once it is data")
            seen.add(repr(node))
            out.append(node)
        if len(seen) != len(out):
            self.refuse("two keys or elements become the same data")
        self.path.pop()
        return out

    def blob(self, data: Any) -> int | str:
        size = len(data)
        if size < INLINE or len(self.buffers) >= MAX_BUFFERS:
            return b2a_base64(data, newline=False).decode("ascii")
        self.grow(size)
        self.buffers.append(data)
        return len(self.buffers) - 1

    def enter(self, step: Any) -> None:
        if len(self.path) >= MAX_DEPTH:
            self.refuse(f"nested deeper than {MAX_DEPTH} levels, or it contains itself")
        self.items += 1
        self.path.append(step)

    def grow(self, size: int) -> None:
        self.size += size
        check_size(self.size, self.max_bytes)

    def refuse_kind(self, value: Any) -> NoReturn:
        self.refuse(f"{shown(value)} is not data; {_WAY_OUT}")

    def refuse(self, why: str) -> NoReturn:
        where = "result" + "".join(map(_segment, self.path))
        raise NotData(f"{where if len(where) < 300 else where[:200] + '...' + where[-80:]}: {why}")


def _segment(step: Any) -> str:
    if type(step) is tuple:
        return f".{step[0]}" if step else "{key}"
    return f"[{step!r}]" if type(step) is int or len(step) < 60 else f"[{step[:50]!r}...]"
