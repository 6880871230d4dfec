"""How each kind of value is written for the host: the other half of ``encode``, which draws the chart of the tags.

Methods are called on the base class on purpose (``int.__pos__(value)``): a subclass's own could say anything.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from itertools import chain

from pihost.inside.raised import class_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pihost.inside.encode import Walk

LOW, HIGH = -(1 << 63), (1 << 63) - 1
MAX_DECIMAL = 10_000  # characters
MAX_FIELDS = 1000  # of one record
TAG_ITEMS = 5  # what a tag adds at the most to the brackets, braces and commas that the host counts

_REAL, _IMAG = complex.__dict__["real"], complex.__dict__["imag"]
_HASHABLE = frozenset(
    ("frozenset", "bytes", "str", "int", "float", "complex", "datetime", "time", "date", "timedelta", "decimal",
     "uuid", "path", "purepath", "windowspath", "scalar"),
)  # fmt: skip


def shown(value: Any) -> str:
    return f"<class '{class_name(type(value))}'>"


def is_clean(text: str) -> bool:
    """No surrogates in it: JSON would carry a lone one as an error, a pair as another character."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_hashable(node: Any) -> bool:
    """Whether the host can hash what this written value is read back as."""
    if type(node) is dict:
        if node.get("$") == "scalar":
            return type(node["v"][0]) is str  # records are not
        return node.get("$") in _HASHABLE or (node.get("$") == "tuple" and all(map(is_hashable, node["v"])))
    return type(node) is not list


def find_writer(kind: type) -> Callable[[Walk, Any], Any] | None:
    """The writer for a kind met for the first time. Nothing is imported: what is not loaded has no instances."""
    for module, name, writer in _ELSEWHERE:
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type) and issubclass(kind, base):
            return writer
    if type(getattr(kind, "__dataclass_fields__", None)) is dict:
        return _write_dataclass
    for base, writer in WRITERS.items():
        if issubclass(kind, base):
            return writer
    return None


def _tag(walk: Walk, name: str, payload: Any) -> dict[str, Any]:
    return walk.tagged(name, payload)


def _write_same(walk: Walk, value: Any) -> Any:  # noqa: ARG001 - all writers are called alike
    return value


def _write_int(walk: Walk, value: int) -> Any:
    value = int.__pos__(value)
    if LOW <= value <= HIGH:
        return value
    return _tag(walk, "int", f"{value:x}")


def _write_float(walk: Walk, value: float) -> Any:
    value = float.__float__(value)
    return value if value - value == 0 else _tag(walk, "float", repr(value))


def _write_str(walk: Walk, value: str) -> Any:
    value = str.__str__(value)
    return value if is_clean(value) else _tag(walk, "str", walk.blob(value.encode("utf-8", "surrogatepass")))


def _write_list(walk: Walk, value: list[Any]) -> Any:
    return walk.each(list.__iter__(value))


def _write_tuple(walk: Walk, value: tuple[Any, ...]) -> Any:
    return _tag(walk, "tuple", walk.each(tuple.__iter__(value)))


def _write_set(walk: Walk, value: set[Any]) -> Any:
    return _tag(walk, "set", walk.keys(set.__iter__(value)))


def _write_frozenset(walk: Walk, value: frozenset[Any]) -> Any:
    return _tag(walk, "frozenset", walk.keys(frozenset.__iter__(value)))


def _write_dict(walk: Walk, value: dict[Any, Any]) -> Any:
    # An OrderedDict keeps its order beside the dict it is built on.
    pairs = list((OrderedDict if issubclass(type(value), OrderedDict) else dict).items(value))
    keys = [key for key, _ in pairs]
    if set(map(type, keys)) <= {str} and "$" not in keys and all(map(is_clean, keys)):
        return walk.members(pairs)
    converted = walk.keys(keys)
    values = walk.each(item for _, item in pairs)
    return _tag(walk, "dict", list(chain.from_iterable(zip(converted, values))))


def _write_bytes(walk: Walk, value: bytes) -> Any:
    return _tag(walk, "bytes", walk.blob(bytes.__getitem__(value, slice(None))))


def _write_bytearray(walk: Walk, value: bytearray) -> Any:
    return _tag(walk, "bytearray", walk.blob(bytearray.__getitem__(value, slice(None))))


def _write_memoryview(walk: Walk, value: memoryview) -> Any:
    if value.nbytes > walk.max_bytes:
        walk.grow(value.nbytes)  # refused before it is copied
    return _tag(walk, "bytes", walk.blob(value.tobytes()))


def _write_complex(walk: Walk, value: complex) -> Any:
    return _tag(walk, "complex", [repr(_REAL.__get__(value)), repr(_IMAG.__get__(value))])


WRITERS: dict[type, Callable[[Walk, Any], Any]] = {
    type(None): _write_same, bool: _write_same, int: _write_int, float: _write_float, str: _write_str,
    list: _write_list, dict: _write_dict, tuple: _write_tuple, set: _write_set, frozenset: _write_frozenset,
    bytes: _write_bytes, bytearray: _write_bytearray, memoryview: _write_memoryview, complex: _write_complex,
}  # fmt: skip


def _write_enum(walk: Walk, value: Any) -> Any:
    return walk.part(("value",), value._value_)


def _write_dataclass(walk: Walk, value: Any) -> Any:
    names = [str.__str__(field.name) for field in sys.modules["dataclasses"].fields(type(value))]
    return {name: walk.part((name,), getattr(value, name)) for name in names}


def _write_datetime(walk: Walk, value: Any) -> Any:
    return _tag(walk, "datetime", _moment(walk, value, sys.modules["datetime"].datetime))


def _write_time(walk: Walk, value: Any) -> Any:
    return _tag(walk, "time", _moment(walk, value, sys.modules["datetime"].time))


def _moment(walk: Walk, value: Any, base: Any) -> list[Any]:
    text = _iso_text(walk, value, base)
    tzinfo = base.tzinfo.__get__(value)
    zone = _zone_name(tzinfo)
    if tzinfo is not None and zone is None and base.utcoffset(value) is None:
        walk.refuse(f"a zone {shown(tzinfo)} without name and offset is not data; use zoneinfo or timezone")
    return [text, base.fold.__get__(value), zone]


def _write_date(walk: Walk, value: Any) -> Any:
    return _tag(walk, "date", _iso_text(walk, value, sys.modules["datetime"].date))


def _iso_text(walk: Walk, value: Any, base: Any) -> str:
    """A subclass may hold what its base has no room for: pandas' NaT and nanoseconds."""
    text: str = base.isoformat(value)
    if type(value) is not base and value.isoformat() != text:
        walk.refuse(f"{shown(value)} says more than a {base.__name__} can hold; convert it first")
    return text


def _zone_name(tzinfo: Any) -> str | None:
    """A zoneinfo name; None for what travels as its offset from UTC: timezone, and every other class."""
    zone_info = getattr(sys.modules.get("zoneinfo"), "ZoneInfo", None)
    if zone_info is None or type(tzinfo) is not zone_info or type(tzinfo.key) is not str:
        return None
    return str(tzinfo.key)


def _write_timedelta(walk: Walk, value: Any) -> Any:
    if type(value) is not sys.modules["datetime"].timedelta:  # pandas' has nanoseconds
        walk.refuse(f"{shown(value)} may say more than a timedelta can hold; convert it first")
    return _tag(walk, "timedelta", [value.days, value.seconds, value.microseconds])


def _write_decimal(walk: Walk, value: Any) -> Any:
    text = sys.modules["decimal"].Decimal.__str__(value)
    if len(text) > MAX_DECIMAL:
        walk.refuse(f"a Decimal of {len(text)} characters is too long; at most {MAX_DECIMAL}")
    return _tag(walk, "decimal", text)


def _write_uuid(walk: Walk, value: Any) -> Any:
    number = sys.modules["uuid"].UUID.int.__get__(value)
    if type(number) is not int or not 0 <= number < 1 << 128:
        walk.refuse("a UUID without a number")
    return _tag(walk, "uuid", f"{number:032x}")


def _write_path(walk: Walk, value: Any) -> Any:
    pathlib = sys.modules["pathlib"]
    text = pathlib.PurePath.__fspath__(value)
    if type(text) is not str:
        walk.refuse("a path without a text")
    windows = issubclass(type(value), pathlib.PureWindowsPath)
    name = "windowspath" if windows else "path" if issubclass(type(value), pathlib.Path) else "purepath"
    return _tag(walk, name, _write_str(walk, text))


def _write_array(walk: Walk, value: Any) -> Any:
    numpy = sys.modules["numpy"]
    if type(value) not in (numpy.ndarray, numpy.memmap):
        walk.refuse(f"{shown(value)} may say more than an array can hold; return numpy.asarray(...) of it")
    dtype = _dtype(walk, value.dtype)
    if value.nbytes > walk.max_bytes:
        walk.grow(value.nbytes)  # refused before it is copied
    walk.items += value.ndim
    flat = numpy.ascontiguousarray(value).reshape(-1)
    data = memoryview(flat.view("u1")) if value.nbytes else b""  # as u1: datetime64 exports no buffer
    return _tag(walk, "array", [dtype, list(value.shape), walk.blob(data)])


def _write_scalar(walk: Walk, value: Any) -> Any:
    generic = sys.modules["numpy"].generic
    dtype = generic.dtype.__get__(value)
    data = generic.tobytes(value)[: dtype.itemsize]  # numpy.str_("") has four bytes and says none
    return _tag(walk, "scalar", [_dtype(walk, dtype), walk.blob(data)])


def _dtype(walk: Walk, dtype: Any) -> Any:
    """Its text; of records the size of one, and of each field name, dtype, shape and where it begins."""
    if dtype.kind in "biufcMmSU" and not dtype.hasobject:
        return dtype.str
    if not dtype.names or not _is_plain(dtype):
        walk.refuse(f"numpy dtype {str(dtype)[:100]!r} is not data; use numbers, bool, datetime64, bytes or text")
    walk.items += 3
    walk.enter((str(dtype)[:100],))
    fields = []
    for name in dtype.names:
        field, offset = dtype.fields[name]
        walk.items += 6 + len(field.shape)  # as the host counts
        fields.append([_write_str(walk, name), _dtype(walk, field.base), list(field.shape), offset])
    walk.path.pop()
    return [dtype.itemsize, fields]


def _is_plain(dtype: Any) -> bool:
    """Of records: not too many fields, none with a title, and none that lies upon another."""
    fields, end = list(dtype.fields.values()), 0
    for field, offset, *_title in sorted(fields, key=lambda field: (field[1], field[0].itemsize)):
        if offset < end:
            return False
        end = offset + field.itemsize
    return len(fields) <= MAX_FIELDS and all(len(field) == 2 for field in fields)


def _write_by_arrow(walk: Walk, value: Any) -> Any:
    from pihost.inside import arrow

    return arrow.write(walk, value)


# In this order: a datetime is a date, a numpy.float64 a float, an IntEnum an int.
_ELSEWHERE: tuple[tuple[str, str, Callable[[Walk, Any], Any]], ...] = (
    ("enum", "Enum", _write_enum), ("numpy", "ndarray", _write_array), ("numpy", "generic", _write_scalar),
    ("datetime", "datetime", _write_datetime), ("datetime", "date", _write_date), ("datetime", "time", _write_time),
    ("datetime", "timedelta", _write_timedelta), ("decimal", "Decimal", _write_decimal),
    ("uuid", "UUID", _write_uuid), ("pathlib", "PurePath", _write_path), ("pandas", "DataFrame", _write_by_arrow),
    ("pandas", "Series", _write_by_arrow), ("pyarrow", "Table", _write_by_arrow), ("pyarrow", "RecordBatch", _write_by_arrow),
)  # fmt: skip
