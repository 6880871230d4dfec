"""pandas and pyarrow objects from a child's bytes: plain columns only, validated in full, nothing believed that a schema says
beside its types. What they look like is in ``pihost.inside.arrow``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pisupervisor.errors import ProtocolError, SerializationError
from pisupervisor.link.arrow_messages import check_stream, not_taken
from pisupervisor.link.keys import check_comparable
from pisupervisor.link.reader import text_of

#: values of columns that pandas makes Python objects of; as many as a result has items otherwise
MAX_OBJECTS = 2_000_000
#: of one result: pandas and pyarrow see whether they are all different by tables without a secret, so a child may choose such
#: as take the square of their number (20,000 took 1.5 s)
MAX_CATEGORIES = 1 << 15
_MAX_FIELDS = 10_000
_MAX_NESTING = 20
_ZONE = re.compile(r"[A-Za-z0-9_+\-]{1,32}(/[A-Za-z0-9_+\-]{1,32}){0,3}|[+-]\d\d:\d\d", re.ASCII)
_NULLABLE = {
    "Int8": "Int8Dtype", "Int16": "Int16Dtype", "Int32": "Int32Dtype", "Int64": "Int64Dtype", "UInt8": "UInt8Dtype",
    "UInt16": "UInt16Dtype", "UInt32": "UInt32Dtype", "UInt64": "UInt64Dtype", "Float32": "Float32Dtype",
    "Float64": "Float64Dtype", "boolean": "BooleanDtype", "string": "StringDtype",
}  # fmt: skip


class Budget:
    """Of one result: pandas takes 80 us for a column, 300 us for a frame, however little is in it."""

    def __init__(self, left: int = 20_000) -> None:
        self._left, self._categories = left, MAX_CATEGORIES

    def take(self, columns: int) -> None:
        """Raises SerializationError. An honest child counts alike, see ``pihost.inside.arrow``."""
        self._left -= 5 + columns
        if self._left < 0:
            raise not_taken("a result of too many tables and columns")

    def take_categories(self, column: Any) -> None:
        """Raises SerializationError. What all pieces of a column have in common counts once."""
        before: Any = None
        for chunk in column.chunks:
            if before is None or not chunk.dictionary.equals(before):
                self._categories -= len(chunk.dictionary)
            before = chunk.dictionary
        if self._categories < 0:
            raise not_taken(f"frames of more than {MAX_CATEGORIES} categories")


def build_table(data: bytes | memoryview, budget: Budget | None = None) -> Any:
    """A ``pyarrow.Table``. Raises ProtocolError for what no honest child sends, SerializationError without pyarrow and for
    what may be honest and is not taken.
    """
    pyarrow = _needed("pyarrow")
    own = bytes(data)  # a copy: what is checked is what is read
    check_stream(own)
    try:
        with pyarrow.ipc.open_stream(pyarrow.py_buffer(own)) as stream:
            (budget or Budget()).take(len(stream.schema))
            _check_schema(pyarrow, stream.schema)
            table = stream.read_all()
        table.validate(full=True)
    except (ProtocolError, SerializationError):
        raise
    except Exception as error:  # pyarrow's own, OSError, KeyError, MemoryError ...: whatever hostile bytes can provoke
        raise ProtocolError(f"Arrow data that is not valid: {text_of(error, 200)}") from None
    return _without_pandas_word(table)


def build_batch(data: bytes | memoryview, budget: Budget | None = None) -> Any:
    """A ``pyarrow.RecordBatch``."""
    table = build_table(data, budget)
    batches = table.to_batches()
    if len(batches) > 1:
        raise ProtocolError("a record batch that is more than one")
    return batches[0] if batches else _needed("pyarrow").RecordBatch.from_pylist([], schema=table.schema)


def build_frame(
    labels: list[Any], levels: list[Any], rows: list[Any], dtypes: list[Any], data: bytes | memoryview,
    budget: Budget | None = None,
) -> Any:  # fmt: skip
    """A ``pandas.DataFrame``."""
    budget = budget or Budget()
    pandas, table = _needed("pandas"), build_table(data, budget)
    columns = _columns(pandas, table, dtypes, budget)
    index, rest = _index(pandas, rows, columns, table.num_rows)
    if len(labels) != len(rest) or not levels:
        raise ProtocolError("a frame whose labels are not as many as its columns")
    try:
        frame = pandas.DataFrame(dict(enumerate(rest)), index=range(len(index)))
        frame.index = index
        frame.columns = _labels(pandas, labels, levels)
    except Exception as error:
        raise _not_here("DataFrame", error) from error
    return frame


def _labels(pandas: Any, labels: list[Any], levels: list[Any]) -> Any:
    hash(tuple(labels))  # raises for what can be none
    check_comparable(labels)
    if len(levels) > 1:
        return pandas.MultiIndex.from_tuples(labels, names=levels)
    if all(type(label) is int and label == place for place, label in enumerate(labels)):
        return pandas.RangeIndex(len(labels), name=levels[0])
    return pandas.Index(labels, name=levels[0], tupleize_cols=False)


def build_series(
    name: Any, rows: list[Any], dtypes: list[Any], data: bytes | memoryview, budget: Budget | None = None
) -> Any:
    """A ``pandas.Series``."""
    budget = budget or Budget()
    pandas, table = _needed("pandas"), build_table(data, budget)
    index, rest = _index(pandas, rows, _columns(pandas, table, dtypes, budget), table.num_rows)
    if len(rest) != 1:
        raise ProtocolError("a series that is not one column")
    try:
        return pandas.Series(rest[0].array, index=index, name=name)
    except Exception as error:
        raise _not_here("Series", error) from error


def _columns(pandas: Any, table: Any, dtypes: list[Any], budget: Budget) -> list[Any]:
    """The columns as pandas holds them, each by its type alone."""
    if len(dtypes) != table.num_columns:
        raise ProtocolError("a frame whose dtypes are not as many as its columns")
    for column in table.columns:
        if _needed("pyarrow").types.is_dictionary(column.type):
            budget.take_categories(column)
    objects = sum(_objects(pandas, column, word) for column, word in zip(table.columns, dtypes, strict=True))
    if objects > MAX_OBJECTS:
        raise SerializationError(
            f"a frame of {objects} values that pandas makes Python objects of, {MAX_OBJECTS} are allowed; return a"
            " pyarrow.Table, or less", direction="from child",
        )  # fmt: skip
    return [_column(pandas, column, word) for column, word in zip(table.columns, dtypes, strict=True)]


def _column(pandas: Any, column: Any, word: Any) -> Any:
    if word not in ("", "arrow", *_NULLABLE):
        raise ProtocolError(f"a column of the dtype {str(word)[:40]!r}")
    try:
        if word == "":
            return column.to_pandas(use_threads=False)
        dtype = pandas.ArrowDtype(column.type) if word == "arrow" else getattr(pandas, _NULLABLE[word])()
        return pandas.Series(dtype.__from_arrow__(column))
    except Exception as error:
        raise _not_here("column", error) from error


def _objects(pandas: Any, column: Any, word: Any) -> int:
    """How many Python objects pandas makes of a column."""
    types, kind = _needed("pyarrow").types, column.type
    if types.is_nested(kind) and not types.is_dictionary(kind):
        raise ProtocolError("a column of a frame that is nested")
    if types.is_dictionary(kind):
        return sum(len(chunk.dictionary) for chunk in column.chunks)
    if word == "arrow":
        return 0
    text = types.is_string(kind) or types.is_large_string(kind)
    plain = types.is_integer(kind) or types.is_floating(kind) or types.is_timestamp(kind) or types.is_duration(kind)
    if plain or (text and int(pandas.__version__.partition(".")[0]) >= 3):
        return 0
    return len(column) if not types.is_boolean(kind) or column.null_count else 0


def _index(pandas: Any, rows: list[Any], columns: list[Any], length: int) -> tuple[Any, list[Any]]:
    """The index, and the columns that are not part of it."""
    if len(rows) == 4 and all(type(part) is int and abs(part) < 1 << 62 for part in rows[:3]) and rows[2]:
        count = len(range(*rows[:3]))
        if count != length if columns else count > MAX_OBJECTS:
            raise ProtocolError("a frame whose index is not as long as its columns")
        return _made(lambda: pandas.RangeIndex(*rows[:3], name=rows[3])), columns
    if len(rows) != 1 or type(rows[0]) is not list or not 0 < len(rows[0]) <= len(columns):
        raise ProtocolError("a frame without an index")
    (names,) = rows
    if len(names) > 1:
        return _made(lambda: _levels(pandas, columns[: len(names)], names)), columns[len(names) :]
    return _made(lambda: pandas.Index(columns[0].array, tupleize_cols=False).rename(names[0])), columns[1:]


def _levels(pandas: Any, columns: list[Any], names: list[Any]) -> Any:
    """What ``MultiIndex.from_arrays`` makes, which finds equal values by a table without a secret: 40,000 numbers that a child
    had chosen for that took 8 s.
    """
    levels, codes = zip(*(_level(pandas, column) for column in columns), strict=True)
    return pandas.MultiIndex(levels=levels, codes=codes, names=names, verify_integrity=False)


def _level(pandas: Any, column: Any) -> tuple[Any, Any]:
    """The different values in their order, and the number of each row's, -1 where it has none."""
    import numpy

    if isinstance(column.dtype, pandas.CategoricalDtype):
        alone = pandas.MultiIndex.from_arrays([column])
        return alone.levels[0], alone.codes[0]
    values = pandas.Index(column.array, tupleize_cols=False)
    known = numpy.flatnonzero(~numpy.asarray(values.isna(), bool))
    order = known[numpy.asarray(values[known].argsort())]
    ordered = values[order]
    begins = numpy.ones(len(ordered), bool)
    begins[1:] = numpy.asarray(ordered[1:] != ordered[:-1], bool)
    codes = numpy.full(len(values), -1, numpy.intp)
    codes[order] = begins.cumsum() - 1
    return ordered[begins], codes


def _made(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        raise _not_here("index", error) from error


def _check_schema(pyarrow: Any, schema: Any) -> None:
    """Only types whose every value takes room, or a parent's: no views, which all may point at one text; no run-end encoding,
    no unions, no extensions.
    """
    level = [field.type for field in schema]
    for _ in range(_MAX_NESTING):
        if len(level) > _MAX_FIELDS:
            raise not_taken(f"Arrow data of more than {_MAX_FIELDS} columns")
        for kind in level:
            _check_type(pyarrow.types, kind)
        level = [inner for kind in level for inner in _inner(pyarrow.types, kind)]
        if not level:
            return
    raise not_taken("Arrow data nested too deep")


def _check_type(types: Any, kind: Any) -> None:
    if types.is_timestamp(kind) and kind.tz is not None and not _ZONE.fullmatch(kind.tz):
        raise not_taken(f"a time zone that is none: {kind.tz[:60]!r}")
    if not any(getattr(types, f"is_{name}")(kind) for name in _ALLOWED):
        raise not_taken(f"Arrow data of the type {text_of(kind, 100)}")


_ALLOWED = (
    "null", "boolean", "integer", "floating", "decimal", "date", "time", "timestamp", "duration", "interval", "string",
    "large_string", "binary", "large_binary", "fixed_size_binary", "list", "large_list", "fixed_size_list", "struct", "map",
    "dictionary",
)  # fmt: skip


def _inner(types: Any, kind: Any) -> list[Any]:
    if types.is_dictionary(kind):
        return [kind.index_type, kind.value_type]
    return [kind.field(number).type for number in range(kind.num_fields)] if types.is_nested(kind) else []


def _without_pandas_word(table: Any) -> Any:
    """Its metadata as it came, but not what ``to_pandas`` would believe: that builds dtypes and evaluates labels by name."""
    metadata = table.schema.metadata
    if not metadata or b"pandas" not in metadata:
        return table
    return table.replace_schema_metadata({key: value for key, value in metadata.items() if key != b"pandas"})


def _needed(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise SerializationError(
            f"the child returned what {name} is needed for, which this host does not have: pip install"
            " 'pisupervisor[arrow]', or have it return plain data", direction="from child",
        ) from None  # fmt: skip


def _not_here(what: str, error: Exception) -> SerializationError:
    message = f"a {what} that pandas cannot make here: {type(error).__name__}: {text_of(error, 300)}"
    return SerializationError(message, direction="from child")
