"""``returns=`` as msgspec is to be asked for it: what it cannot build, or would not check, gets a stand-in, a type that it does
not know, about which it asks ``returns``. Here types are looked at, never a value.
"""

from __future__ import annotations

from functools import lru_cache, partial
from types import GenericAlias

from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class _StandIn(type):
    def __instancecheck__(cls, _value: object) -> bool:
        return True  # msgspec asks that of what ``returns`` has built, and checked

    def __getitem__(cls, parts: Any) -> GenericAlias:
        return GenericAlias(cls, parts)


class Member(metaclass=_StandIn):
    """``Member[E]``: an Enum that msgspec does not take, which knows enums of str and of int only."""


class Table(metaclass=_StandIn):
    """``Table[K, V]``: a dict with keys of a type that msgspec does not know: of keys that are text it asks nobody (0.22)."""


class Made(metaclass=_StandIn):
    """``Made[C]``: a class with a field that msgspec does not take. It builds a ``Twin``, of which the object is made."""


class Twin(NamedTuple):
    """``kind``: a class of the same fields, some of them stand-ins; ``make`` makes the wanted object of one of that."""

    kind: Any
    make: Callable[[Any], Any]


def named(returns: Any) -> str:
    return returns.__qualname__ if isinstance(returns, type) and not hasattr(returns, "__origin__") else repr(returns)


def buildable(returns: Any) -> tuple[Any, bool]:
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
    wanted = _with_stand_ins(returns, ())
    return wanted, _has_sets(wanted)


def _has_sets(wanted: Any) -> bool:
    """Raises TypeError for what msgspec does not take."""
    from msgspec import inspect, msgpack

    msgpack.Decoder(wanted)  # looks at the type alone
    known = inspect.type_info(wanted)
    unasked = _unasked_keys(known, set())
    if unasked is not None:
        raise TypeError(f"within a class, keys of a dict cannot be {named(unasked)}: declare text or numbers")
    return any(word in repr(known).lower() for word in ("set", "stand_ins"))  # of whose parts it knows nothing


def _with_stand_ins(returns: Any, within: tuple[Any, ...]) -> Any:
    """``within``: classes whose fields are looked at."""
    from collections.abc import Mapping
    from enum import Enum
    from typing import Annotated, Literal, get_args, get_origin

    if isinstance(returns, type) and issubclass(returns, Enum):
        return returns if {type(member.value) for member in returns} in ({str}, {int}) else Member[returns]
    origin, parts = get_origin(returns), get_args(returns)
    if origin is Literal:
        return returns
    if origin is Annotated:
        return Annotated[_with_stand_ins(parts[0], within), *parts[1:]]
    if _twin_maker(origin or returns) is not None:
        return _class(returns, within)
    built = tuple(_with_stand_ins(part, within) for part in parts)
    if isinstance(origin, type) and issubclass(origin, Mapping) and built and _is_unknown(built[0]):
        return Table[built]
    if built != parts:
        returns = _united(returns, parts, built) if _is_union(origin) else origin[built if len(built) > 1 else built[0]]
    if hasattr(origin or returns, "__struct_fields__") or hasattr(origin or returns, "__attrs_attrs__"):
        _check_fields(returns, within)
    return returns


def _is_union(origin: Any) -> bool:
    from types import UnionType
    from typing import Union

    return origin is Union or origin is UnionType


def _united(returns: Any, parts: tuple[Any, ...], built: tuple[Any, ...]) -> Any:
    from functools import reduce
    from operator import or_
    from typing import get_origin

    odd = [part for part, new in zip(parts, built, strict=True) if get_origin(new) in (Member, Table, Made)]
    if odd and len(set(built) - {type(None)}) > 1:
        raise TypeError(f"in {named(returns)} there can be nothing but None beside {named(odd[0])}")
    return reduce(or_, built)


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


# --- classes of fields ---------------------------------------------------------------------------------------------------


def _class(kind: Any, within: tuple[Any, ...]) -> Any:
    """As it is, where msgspec takes it whole. Raises TypeError."""
    if kind in within:
        return Made[kind]
    try:
        _has_sets(kind)
    except TypeError as error:
        if not _make_twin(kind, within)[1]:
            raise TypeError(f"{named(kind)}: {error}") from None  # not for the sake of a field
        return Made[kind]
    return kind


@lru_cache(maxsize=256)
def twin_of(kind: Any) -> Twin:
    """Of a class that ``Made`` stands for."""
    return _make_twin(kind, ())[0]


def _make_twin(kind: Any, within: tuple[Any, ...]) -> tuple[Twin, bool]:
    """And whether it differs. Raises TypeError that names the field which nobody can build."""
    from typing import get_origin

    origin = get_origin(kind) or kind
    hints, fields = _hints(kind), {}
    for name, hint in hints.items():
        try:
            fields[name] = _with_stand_ins(hint, (*within, kind))
            _has_sets(_unmarked(fields[name]))
        except TypeError as error:
            raise TypeError(f"field {name!r} of {named(kind)}: {error}") from None
    maker: Any = _twin_maker(origin)
    return maker(origin, fields), fields != hints


def _check_fields(kind: Any, within: tuple[Any, ...]) -> None:
    """Of a class that is built by msgspec or not at all. Raises TypeError that names the field for which it is not."""
    if kind in within:
        return
    try:
        _has_sets(kind)
    except TypeError as error:
        for name, hint in _hints(kind).items():
            if _with_stand_ins(hint, (*within, kind)) != hint:
                why = "only a dataclass, a TypedDict or a NamedTuple can have such a field"
                raise TypeError(f"field {name!r} of {named(kind)}: {error}; {why}") from None
        raise


def _hints(kind: Any) -> dict[str, Any]:
    """Types of its fields, by their names. Raises TypeError, and what annotations raise."""
    from typing import ClassVar, TypeVar, get_args, get_origin, get_type_hints

    origin = get_origin(kind) or kind
    own, hints = getattr(origin, "__parameters__", ()), {}
    given = dict(zip(own, get_args(kind), strict=False))
    for name, hint in get_type_hints(origin, include_extras=True).items():
        if hint is ClassVar or get_origin(hint) is ClassVar:
            continue
        free: Any = (hint,) if isinstance(hint, TypeVar) else getattr(hint, "__parameters__", ())
        if any(variable not in own for variable in free):
            raise TypeError(f"field {name!r} of {named(kind)}: {free[0]!r} is a variable of a base")
        if given and free:
            hint = given[hint] if isinstance(hint, TypeVar) else hint[tuple(map(given.__getitem__, free))]
        hints[name] = hint
    return hints


def _unmarked(hint: Any) -> Any:
    from typing import NotRequired, Required, get_args, get_origin

    return get_args(hint)[0] if get_origin(hint) in (Required, NotRequired) else hint


def _twin_maker(kind: Any) -> Callable[[Any, dict[str, Any]], Twin] | None:
    if not isinstance(kind, type):
        return None
    if hasattr(kind, "__dataclass_fields__"):
        return _twin_of_dataclass
    if issubclass(kind, tuple) and hasattr(kind, "_field_defaults"):
        return _twin_of_named_tuple
    return _twin_of_typed_dict if issubclass(kind, dict) and hasattr(kind, "__total__") else None


def _twin_of_dataclass(kind: Any, fields: dict[str, Any]) -> Twin:
    import dataclasses

    members = [
        (each.name, fields[each.name], dataclasses.field(default=each.default, default_factory=each.default_factory))
        for each in dataclasses.fields(kind)
    ]
    return Twin(dataclasses.make_dataclass(kind.__name__, members, kw_only=True), partial(_as_dataclass, kind))


def _as_dataclass(kind: Any, twin: Any) -> Any:
    """As msgspec does it: without ``__init__``, which may want other arguments."""
    built = kind.__new__(kind)
    for name in twin.__dataclass_fields__:
        object.__setattr__(built, name, getattr(twin, name))
    if hasattr(kind, "__post_init__"):
        built.__post_init__()
    return built


def _twin_of_named_tuple(kind: Any, fields: dict[str, Any]) -> Twin:
    import collections

    named_tuple: Any = collections.namedtuple
    twin = named_tuple(kind.__name__, kind._fields, defaults=kind._field_defaults.values())
    twin.__annotations__ = fields
    return Twin(twin, kind._make)


def _twin_of_typed_dict(kind: Any, fields: dict[str, Any]) -> Twin:
    from typing import NotRequired, Required, TypedDict

    typed_dict: Any = TypedDict
    marked = {}
    for name, field in fields.items():
        mark: Any = Required if name in kind.__required_keys__ else NotRequired
        marked[name] = field if _unmarked(field) is not field else mark[field]
    return Twin(typed_dict(kind.__name__, marked), dict)
