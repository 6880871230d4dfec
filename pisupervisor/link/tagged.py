"""Rebuilds what JSON has no words for, from hostile data: every tag checks the exact shape of its payload.

The chart of the tags is in ``pihost.inside.encode``. Any exception in here ends as a ProtocolError in ``serializer``.
"""

from __future__ import annotations

import datetime
import re
import sys
from binascii import a2b_base64
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID

from pisupervisor.errors import ProtocolError, SerializationError
from pisupervisor.link.keys import Keys
from pisupervisor.link.reader import DATA, Reader

MAX_DECIMAL = 10_000  # characters

_HEX = re.compile(r"-?[0-9a-f]+", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_FLOAT = re.compile(r"-?(\d+(\.\d+)?(e[+-]?\d+)?|inf)|nan", re.ASCII)
_DECIMAL = re.compile(r"-?(\d+(\.\d*)?(E[+-]?\d{1,19})?|\.\d+|Infinity|s?NaN\d*)", re.ASCII | re.IGNORECASE)
_ZONE = re.compile(r"[A-Za-z0-9_+\-]{1,32}(/[A-Za-z0-9_+\-]{1,32}){0,3}", re.ASCII)
_CONTAINERS = (list, dict)


class Rebuilder:
    """One decoded value on its way in, with the buffers that came beside it: each is used exactly once."""

    def __init__(self, buffers: Sequence[bytes | memoryview], max_nesting: int, reader: Reader = DATA) -> None:
        self.buffers: list[bytes | memoryview | None] = list(buffers)
        self.max_nesting = max_nesting
        self.reader = reader
        self.keys = Keys()
        self._arrow_budget: Any = None
        self._records: Any = None

    def value(self, node: Any, depth: int) -> Any:
        """``node`` with all tagged objects built; lists and dicts are changed in place."""
        if depth > self.max_nesting:
            raise ProtocolError(f"a result nested deeper than {self.max_nesting} levels")
        if type(node) is list:
            for index, item in enumerate(node):
                if type(item) in _CONTAINERS:
                    node[index] = self.value(item, depth + 1)
        elif type(node) is dict:
            if "$" in node:
                return self.tagged(node, depth)
            for key, item in node.items():
                if type(item) in _CONTAINERS:
                    node[key] = self.value(item, depth + 1)
        return node

    def tagged(self, node: dict[str, Any], depth: int) -> Any:
        tag = node["$"]
        build = _BUILDERS.get(tag) if type(tag) is str else None
        if build is None or len(node) != 2 or "v" not in node:
            raise ProtocolError(f"a tagged value that is none: {str(tag)[:40]!r} with {len(node)} members")
        return build(self, self.value(node["v"], depth + 1))

    def blob(self, where: Any) -> bytes | memoryview:
        if type(where) is str:
            return a2b_base64(where, strict_mode=True) if where else b""
        if type(where) is not int or not 0 <= where < len(self.buffers):
            raise ProtocolError("a buffer that does not exist")
        data, self.buffers[where] = self.buffers[where], None
        if data is None:
            raise ProtocolError("a buffer that is used twice")
        return data

    def arrow_budget(self) -> Any:
        if not self.reader.arrow:
            raise ProtocolError("a table or frame, where 'arrow' is not among types=")
        if self._arrow_budget is None:
            from pisupervisor.link.arrow import Budget

            self._arrow_budget = Budget()
        return self._arrow_budget

    def records(self) -> Any:
        if self._records is None:
            from pisupervisor.link.arrays import RecordTypes

            self._records = RecordTypes()
        return self._records

    def finish(self) -> None:
        if any(data is not None for data in self.buffers):
            raise ProtocolError("a buffer that nothing refers to")


def fields(payload: Any, *kinds: type) -> list[Any]:
    """``payload`` as a list of exactly these types; ``object`` stands for any."""
    if type(payload) is not list or len(payload) != len(kinds):
        raise ProtocolError(f"expected a list of {len(kinds)} parts")
    for part, kind in zip(payload, kinds, strict=True):
        if kind is not object and type(part) is not kind:
            raise ProtocolError(f"expected {kind.__name__}, got {type(part).__name__}")
    return payload


def _exactly(payload: Any, kind: type) -> Any:
    return fields([payload], kind)[0]


_ANY_LENGTH = sys.maxsize


def _matching(payload: Any, pattern: re.Pattern[str], limit: int) -> str:
    text: str = _exactly(payload, str)
    if len(text) > limit or not pattern.fullmatch(text):
        raise ProtocolError(f"{text[:60]!r} is not what its tag says")
    return text


def _set(rebuilder: Rebuilder, payload: Any) -> set[Any]:
    return rebuilder.keys.set_of(_exactly(payload, list))


def _dict(rebuilder: Rebuilder, payload: Any) -> dict[Any, Any]:
    keys, values = _exactly(payload, list)[::2], payload[1::2]
    if len(keys) != len(values):
        raise ProtocolError("a key without a value")
    return rebuilder.keys.dict_of(keys, values)


def _float(_: Rebuilder, payload: Any) -> float:
    return float(_matching(payload, _FLOAT, 40))


def _complex(_: Rebuilder, payload: Any) -> complex:
    real, imaginary = (float(_matching(part, _FLOAT, 40)) for part in fields(payload, str, str))
    return complex(real, imaginary)


def _moment(kind: Any, payload: Any) -> Any:
    text, fold, zone = fields(payload, str, int, object)
    if fold not in (0, 1):
        raise ProtocolError("a fold that is neither 0 nor 1")
    built = _from_iso(kind, text)
    return built.replace(fold=fold) if zone is None else built.replace(fold=fold, tzinfo=_zone(zone))


def _from_iso(kind: Any, payload: Any) -> Any:
    text = _exactly(payload, str)
    built = kind.fromisoformat(text) if len(text) < 64 else None
    if built is None or built.isoformat() != text:
        raise ProtocolError(f"{text[:60]!r} is not what its tag says")
    return built


def _zone(payload: Any) -> datetime.tzinfo:
    from zoneinfo import ZoneInfo

    name = _matching(payload, _ZONE, 64)
    try:
        return ZoneInfo(name)
    except Exception as error:  # not found, a folder, no zone file: the host's data base decides
        message = f"the time zone {name!r} is not known on the host; install tzdata, or return UTC"
        raise SerializationError(message, direction="from child") from error


def _timedelta(_: Rebuilder, payload: Any) -> datetime.timedelta:
    days, seconds, microseconds = fields(payload, int, int, int)
    if not (0 <= seconds < 86_400 and 0 <= microseconds < 1_000_000):
        raise ProtocolError("a timedelta out of its ranges")
    return datetime.timedelta(days, seconds, microseconds)


def _array(rebuilder: Rebuilder, payload: Any) -> Any:
    from pisupervisor.link.arrays import build_array

    dtype, shape, where = fields(payload, object, list, object)
    return build_array(dtype, shape, rebuilder.blob(where), rebuilder.records())


def _scalar(rebuilder: Rebuilder, payload: Any) -> Any:
    from pisupervisor.link.arrays import build_scalar

    dtype, where = fields(payload, object, object)
    return build_scalar(dtype, rebuilder.blob(where), rebuilder.records())


def _table(rebuilder: Rebuilder, payload: Any) -> Any:
    from pisupervisor.link.arrow import build_table

    return build_table(rebuilder.blob(*fields(payload, object)), rebuilder.arrow_budget())


def _batch(rebuilder: Rebuilder, payload: Any) -> Any:
    from pisupervisor.link.arrow import build_batch

    return build_batch(rebuilder.blob(*fields(payload, object)), rebuilder.arrow_budget())


def _frame(rebuilder: Rebuilder, payload: Any) -> Any:
    from pisupervisor.link.arrow import build_frame

    labels, levels, rows, dtypes, where = fields(payload, list, list, list, list, object)
    return build_frame(labels, levels, rows, dtypes, rebuilder.blob(where), rebuilder.arrow_budget())


def _series(rebuilder: Rebuilder, payload: Any) -> Any:
    from pisupervisor.link.arrow import build_series

    name, rows, dtypes, where = fields(payload, object, list, list, object)
    return build_series(name, rows, dtypes, rebuilder.blob(where), rebuilder.arrow_budget())


def _own(rebuilder: Rebuilder, payload: Any) -> Any:
    name, data = fields(payload, str, object)
    if name not in rebuilder.reader.decoders:
        raise ProtocolError(f"an object of the type {name[:100]!r}, which is not among types=")
    return rebuilder.reader.own(name, data)


def _serialized(rebuilder: Rebuilder, payload: Any) -> Any:
    if rebuilder.reader.loads is None:
        raise ProtocolError("a value for a serializer, where none is plugged in")
    return rebuilder.reader.load(bytes(rebuilder.blob(payload)))


_BUILDERS: dict[str, Callable[[Rebuilder, Any], Any]] = {
    "tuple": lambda _, payload: tuple(_exactly(payload, list)),
    "set": _set,
    "frozenset": lambda rebuilder, payload: frozenset(_set(rebuilder, payload)),
    "dict": _dict,
    "bytes": lambda rebuilder, payload: bytes(rebuilder.blob(payload)),
    "bytearray": lambda rebuilder, payload: bytearray(rebuilder.blob(payload)),
    "str": lambda rebuilder, payload: bytes(rebuilder.blob(payload)).decode("utf-8", "surrogatepass"),
    "int": lambda _, payload: int(_matching(payload, _HEX, _ANY_LENGTH), 16),  # linear; Limits.result bounds the text
    "float": _float, "complex": _complex,
    "date": lambda _, payload: _from_iso(datetime.date, payload),
    "datetime": lambda _, payload: _moment(datetime.datetime, payload),
    "time": lambda _, payload: _moment(datetime.time, payload),
    "timedelta": _timedelta,
    "decimal": lambda _, payload: Decimal(_matching(payload, _DECIMAL, MAX_DECIMAL)),
    "uuid": lambda _, payload: UUID(hex=_matching(payload, _UUID, 32)),
    "path": lambda _, payload: Path(_exactly(payload, str)),
    "purepath": lambda _, payload: PurePosixPath(_exactly(payload, str)),
    "windowspath": lambda _, payload: PureWindowsPath(_exactly(payload, str)),
    "array": _array, "scalar": _scalar,
    "table": _table, "batch": _batch, "frame": _frame, "series": _series,
    "own": _own, "serialized": _serialized,
}  # fmt: skip
