"""Values across the link, host side. What a child sends is data: counted, decoded, checked, never executed.

The chart of the format is in ``pihost.inside.encode``; ``tagged`` and ``arrays`` build what JSON has no words for.
Calls to the child are in ``arguments``, its exceptions in ``remote_errors``.
"""

from __future__ import annotations

import sys
from types import GenericAlias

from pisupervisor.errors import OptionsError, ProtocolError, SerializationError
from pisupervisor.link.arguments import child_importable, dump_call, dump_function
from pisupervisor.link.reader import DATA, Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["build", "child_importable", "decode", "dump_call", "dump_function", "load_pickled"]

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
        raise ProtocolError(f"a result that cannot be decoded: {type(error).__name__}: {str(error)[:200]}") from error


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
    except (
        ValueError,
        RecursionError,
        MemoryError,
        sys.modules["msgspec"].MsgspecError,
    ) as error:  # no signal's handler's
        raise ProtocolError(f"a result that cannot be decoded: {type(error).__name__}: {str(error)[:200]}") from error


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


def build(value: Any, returns: Any) -> Any:
    """``value`` as ``returns`` (a dataclass, TypedDict, NamedTuple, Enum, ``list[X]``, ``X | None`` ...), checked.

    Raises SerializationError that names the part which does not fit, or says that ``returns`` cannot be built.
    """
    from typing import Any

    import msgspec

    if returns is None or returns is Any:
        return value
    try:
        return _convert(value, returns)
    # An array, say, where a dict is wanted; a number too large for a complex one, a signalling NaN for an enum.
    except (msgspec.ValidationError, ValueError, AttributeError, ArithmeticError) as error:
        raise SerializationError(f"the result is not a {_named(returns)}: {error}", direction=_FROM_CHILD) from error
    except (TypeError, RecursionError) as error:
        message = f"returns={_named(returns)} cannot be built: {error}"
        raise SerializationError(message, direction=_FROM_CHILD) from error


def _convert(value: Any, returns: Any) -> Any:
    import msgspec

    try:
        return msgspec.convert(value, returns, builtin_types=_already_built(), dec_hook=_build_other)
    except msgspec.ValidationError:
        plain = _without_scalars(value)  # numpy.mean() of numbers will do for a float
        if plain is value:
            raise
        return msgspec.convert(plain, returns, builtin_types=_already_built(), dec_hook=_build_other)
    except TypeError:
        buildable = _with_members(returns)
        if buildable == returns:
            raise
        return _convert(value, buildable)


def _without_scalars(value: Any) -> Any:
    """``value`` with Python's numbers and text in the place of numpy's; itself where there are none."""
    generic = getattr(sys.modules.get("numpy"), "generic", None)
    if generic is None:
        return value
    if isinstance(value, generic):
        return value.item() if value.dtype.char in "?bhilqBHILQefdFDSU" else value
    if type(value) is dict:
        pairs = [(_without_scalars(key), _without_scalars(item)) for key, item in value.items()]
        changed = any(
            a is not b for pair, old in zip(pairs, value.items(), strict=True) for a, b in zip(pair, old, strict=True)
        )
        return dict(pairs) if changed else value
    if type(value) in (list, tuple, set, frozenset):
        parts = [_without_scalars(part) for part in value]
        return type(value)(parts) if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    return value


def check_returns(returns: Any) -> None:
    """Raises OptionsError for a type that ``build`` could make of nothing: better before the call than after it."""
    from typing import Any

    from msgspec import msgpack

    if returns is None or returns is Any:
        return
    try:
        try:
            msgpack.Decoder(returns)  # looks at the type alone; 0.3 us once it is known
        except TypeError:
            msgpack.Decoder(_with_members(returns))
    except Exception as error:  # TypeError, or what the annotations of a class raise
        raise OptionsError(f"returns={_named(returns)} cannot be built: {error}") from None


def _named(returns: Any) -> str:
    return returns.__qualname__ if isinstance(returns, type) and not hasattr(returns, "__origin__") else repr(returns)


class _AnyMember(type):
    def __instancecheck__(cls, value: object) -> bool:  # msgspec asks that of what was built
        from enum import Enum

        return isinstance(value, Enum)

    def __getitem__(cls, enum: type) -> GenericAlias:
        return GenericAlias(cls, (enum,))


class Member(metaclass=_AnyMember):
    """``Member[E]`` stands for an Enum E that msgspec cannot take: it knows enums of str and of int only."""


def _with_members(returns: Any) -> Any:
    """``returns`` with such a stand-in for each of these enums, as far as it is made of generic types and unions."""
    from collections.abc import Mapping
    from enum import Enum
    from functools import reduce
    from operator import or_
    from typing import Annotated, Literal, get_args, get_origin

    if isinstance(returns, type) and issubclass(returns, Enum):
        return returns if {type(member.value) for member in returns} in ({str}, {int}) else Member[returns]
    origin, parts = get_origin(returns), get_args(returns)
    if not parts or origin is Literal:
        return returns
    if origin is Annotated:
        return Annotated[_with_members(parts[0]), *parts[1:]]
    built = tuple(map(_with_members, parts))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        built = parts[0], *built[1:]  # of keys that are text msgspec 0.22 asks nobody: they would stay what they are
    return reduce(or_, built) if _is_union(origin) else origin[built]


def _is_union(origin: Any) -> bool:
    from types import UnionType
    from typing import Union

    return origin is Union or origin is UnionType


def _already_built() -> tuple[type, ...]:
    import datetime
    from decimal import Decimal
    from uuid import UUID

    times = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
    return (bytes, bytearray, Decimal, UUID, *times)


def _build_other(wanted: Any, value: Any) -> Any:
    """For the types msgspec does not know. The value is ours by now: built from checked data."""
    from pathlib import PurePath

    kind = getattr(wanted, "__origin__", wanted)
    if kind is Member:
        return _member(wanted.__args__[0], value)
    if isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if issubclass(kind, PurePath) and isinstance(value, str):
            return kind(value)
        if kind is complex and type(value) in (int, float):
            return complex(value)
        raise ValueError(f"expected {_named(wanted)}, got {type(value).__name__}")
    raise TypeError(f"{wanted!r} is not a type this library can build")


def _member(enum: Any, value: Any) -> Any:
    from pisupervisor.link.keys import check_comparable

    check_comparable([value, *(member.value for member in enum)])
    return enum(value)


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
