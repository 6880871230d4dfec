"""``returns=``: a result is checked against the type that the caller has declared, and built as it.

msgspec does that, from data that is checked and ours by now. What it cannot build, or would not check, gets a stand-in: a type
that it does not know, about which it asks ``_build_other``.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import GenericAlias

from pisupervisor.errors import OptionsError, SerializationError
from pisupervisor.link.reader import text_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FROM_CHILD = "from child"


def build(value: Any, returns: Any) -> Any:
    """``value`` as ``returns`` (a dataclass, TypedDict, NamedTuple, Enum, ``list[X]``, ``X | None`` ...), checked.

    Raises SerializationError that names the part which does not fit, or says that ``returns`` cannot be built.
    """
    from typing import Any

    import msgspec

    from pisupervisor.link.keys import Keys

    if returns is None or returns is Any:
        return value
    try:
        wanted, has_sets = _buildable(returns)
        if has_sets and type(value) in (list, tuple, dict):
            Keys().try_lists(value)
        return _convert(value, wanted)
    # An array, say, where a dict is wanted; a number too large for a complex one, a signalling NaN for an enum.
    except (msgspec.ValidationError, ValueError, AttributeError, ArithmeticError) as error:
        message = f"the result is not a {_named(returns)}: {text_of(error)}"
        raise SerializationError(message, direction=_FROM_CHILD) from None  # its text is the child's in part
    except (TypeError, RecursionError) as error:
        message = f"returns={_named(returns)} cannot be built: {text_of(error)}"
        raise SerializationError(message, direction=_FROM_CHILD) from None


def _convert(value: Any, returns: Any) -> Any:
    import msgspec

    try:
        return msgspec.convert(value, returns, builtin_types=_already_built(), dec_hook=_build_other)
    except msgspec.ValidationError:
        plain = _without_scalars(value)  # numpy.mean() of numbers will do for a float
        if plain is value:
            raise
        return msgspec.convert(plain, returns, builtin_types=_already_built(), dec_hook=_build_other)


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

    if returns is None or returns is Any:
        return
    try:
        _buildable(returns)
    except Exception as error:  # TypeError, or what the annotations of a class raise
        raise OptionsError(f"returns={_named(returns)} cannot be built: {error}") from None


def _named(returns: Any) -> str:
    return returns.__qualname__ if isinstance(returns, type) and not hasattr(returns, "__origin__") else repr(returns)


class _StandIn(type):
    def __instancecheck__(cls, _value: object) -> bool:
        return True  # msgspec asks that of what ``_build_other`` has built, and checked

    def __getitem__(cls, parts: Any) -> GenericAlias:
        return GenericAlias(cls, parts)


class Member(metaclass=_StandIn):
    """``Member[E]``: an Enum that msgspec does not take, which knows enums of str and of int only."""


class Table(metaclass=_StandIn):
    """``Table[K, V]``: a dict with keys of a type that msgspec does not know: of keys that are text it asks nobody (0.22)."""


def _buildable(returns: Any) -> tuple[Any, bool]:
    """What msgspec is to build in the place of ``returns``, and whether it may have to make sets of lists. Raises TypeError, and
    what the annotations of a class raise.
    """
    try:
        hash(returns)
    except TypeError:  # by what it is annotated with
        return _looked_at.__wrapped__(returns)
    return _looked_at(returns)


@lru_cache(maxsize=256)
def _looked_at(returns: Any) -> tuple[Any, bool]:
    from msgspec import inspect, msgpack

    wanted = _with_stand_ins(returns)
    msgpack.Decoder(wanted)  # looks at the type alone
    known = inspect.type_info(wanted)
    unasked = _unasked_keys(known, set())
    if unasked is not None:
        raise TypeError(f"within a class, keys of a dict cannot be {_named(unasked)}: declare text or numbers")
    return wanted, "set" in repr(known).lower()


def _with_stand_ins(returns: Any) -> Any:
    """As far as it is made of generic types and unions."""
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
        return Annotated[_with_stand_ins(parts[0]), *parts[1:]]
    built = tuple(map(_with_stand_ins, parts))
    if isinstance(origin, type) and issubclass(origin, Mapping) and _is_unknown(built[0]):
        return Table[built]
    if built == parts:
        return returns
    return reduce(or_, built) if _is_union(origin) else origin[built]


def _is_unknown(kind: Any) -> bool:
    from msgspec import inspect

    return isinstance(inspect.type_info(kind), inspect.CustomType)


def _unasked_keys(kind: Any, seen: set[int]) -> Any:
    """The first type of keys, anywhere in what msgspec knows of a type, about which it would ask nobody."""
    from msgspec import inspect

    if id(kind) in seen:
        return None
    seen.add(id(kind))
    if isinstance(kind, inspect.DictType) and isinstance(kind.key_type, inspect.CustomType):
        return kind.key_type.cls
    parts = kind if isinstance(kind, tuple) else [getattr(kind, name) for name in kind.__struct_fields__]
    inner = (part for part in parts if isinstance(part, (inspect.Type, inspect.Field, tuple)))
    return next((found for part in inner if (found := _unasked_keys(part, seen)) is not None), None)


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
    if kind is Table:
        return _table(wanted.__args__, value)
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


def _table(parts: Any, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected dict, got {type(value).__name__}")
    key_type, value_type = parts
    return {_convert(key, key_type): _convert(item, value_type) for key, item in value.items()}
