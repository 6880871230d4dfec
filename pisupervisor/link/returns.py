"""``returns=``: a result is checked against the type that the caller has declared, and built as it.

msgspec does that, from data that is checked and ours by now. About types that it does not know it asks ``_build_other``; for
those that it would refuse, or not check, there are ``stand_ins``.
"""

from __future__ import annotations

import sys

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
    from pisupervisor.link.stand_ins import buildable, named

    if returns is None or returns is Any:
        return value
    try:
        wanted, has_sets = buildable(returns)
        if has_sets and type(value) in (list, tuple, dict):
            Keys().try_lists(value)
        return _convert_freely(value, wanted)
    # An array, say, where a dict is wanted; a number too large for a complex one, a signalling NaN for an enum.
    except (msgspec.ValidationError, ValueError, AttributeError, ArithmeticError) as error:
        message = f"the result is not a {named(returns)}: {_with_one_path(text_of(error))}"
        raise SerializationError(message, direction=_FROM_CHILD) from None  # its text is the child's in part
    except (TypeError, RecursionError) as error:
        message = f"returns={named(returns)} cannot be built: {text_of(error)}"
        raise SerializationError(message, direction=_FROM_CHILD) from None


def _convert_freely(value: Any, returns: Any) -> Any:
    """Of a whole result: who tried anew for each part of one would double its work with each level of it."""
    import msgspec

    try:
        return _convert(value, returns)
    except msgspec.ValidationError:
        plain = _without_scalars(value)  # numpy.mean() of numbers will do for a float
        if plain is value:
            raise
        return _convert(plain, returns)


def _convert(value: Any, returns: Any) -> Any:
    import msgspec

    return msgspec.convert(value, returns, builtin_types=_already_built(), dec_hook=_build_other)


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


def _with_one_path(text: str) -> str:
    """What msgspec says of a part of a part, as of a part."""
    what, *paths = text.split(" - at `$")
    return f"{what} - at `${''.join(path.rstrip('`') for path in reversed(paths))}`" if paths else text


def check_returns(returns: Any) -> None:
    """Raises OptionsError for a type that ``build`` could make of nothing: better before the call than after it."""
    from typing import Any

    from pisupervisor.link.stand_ins import buildable, named

    if returns is None or returns is Any:
        return
    try:
        buildable(returns)
    except Exception as error:  # TypeError, or what the annotations of a class raise
        raise OptionsError(f"returns={named(returns)} cannot be built: {error}") from None


def _already_built() -> tuple[type, ...]:
    import datetime
    from decimal import Decimal
    from uuid import UUID

    times = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
    return (bytes, bytearray, Decimal, UUID, *times)


def _build_other(wanted: Any, value: Any) -> Any:
    """For the types msgspec does not know. The value is ours by now: built from checked data."""
    from pathlib import PurePath

    from pisupervisor.link.stand_ins import Made, Member, Table, named

    kind = getattr(wanted, "__origin__", wanted)
    if kind is Member:
        return _member(wanted.__args__[0], value)
    if kind is Table:
        return _table(wanted.__args__, value)
    if kind is Made:
        return _made(wanted.__args__[0], value)
    if isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if issubclass(kind, PurePath) and isinstance(value, str):
            return kind(value)
        if kind is complex and type(value) in (int, float):
            return complex(value)
        raise ValueError(f"expected {named(wanted)}, got {type(value).__name__}")
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


def _made(kind: Any, value: Any) -> Any:
    import msgspec

    from pisupervisor.link.stand_ins import twin_of

    if type(value) is getattr(kind, "__origin__", kind):
        return value  # which the application has built itself: it comes as a pickle, or by a codec
    twin = twin_of(kind)
    try:
        fields = _convert(value, twin.kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None  # to which msgspec adds where that is
    return twin.make(fields)
