"""pandas and pyarrow objects as data: their columns in Arrow's stream format, what is around them as plain data.

=============  ====================================================================
table batch    [blob]
frame          [labels, names of the labels' levels, rows, dtypes, blob]
series         [name, rows, dtypes, blob]
=============  ====================================================================

``rows`` is [start, stop, step, name] of a RangeIndex, or the names of the first columns, which are the index. ``dtypes``
has a word for each column that pandas holds in one of its own ways. The metadata that pandas leaves in a schema is not used:
the host would have to believe it.
"""

from __future__ import annotations

import sys

from pihost.inside import taught

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pihost.inside.encode import Walk

ITEMS, TABLE = 100, 5  # a column costs the host as much time as a hundred values, a table as much as five columns
_CHUNKS = 1000  # batches of one table; more are put together
_NULLABLE = frozenset((
    "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float32", "Float64", "boolean", "string",
))  # fmt: skip


def write(walk: Walk, value: Any) -> Any:
    if not taught.arrow:
        walk.refuse(
            f"{type(value)} is not data unless the host asks for types=['arrow']; to_dict(), to_pylist() and to_numpy() are"
        )
    pandas = sys.modules.get("pandas")
    if pandas is None or not isinstance(value, (pandas.DataFrame, pandas.Series)):
        return write_table(walk, value)
    return write_frame(walk, value) if isinstance(value, pandas.DataFrame) else write_series(walk, value)


def write_table(walk: Walk, value: Any) -> Any:
    arrow = sys.modules["pyarrow"]
    if type(value) is arrow.RecordBatch:
        return walk.tagged("batch", [walk.blob(_stream(walk, value))])
    if type(value) is not arrow.Table:
        _refuse_subclass(walk, value)
    return walk.tagged("table", [walk.blob(_stream(walk, value))])


def write_frame(walk: Walk, value: Any) -> Any:
    pandas = sys.modules["pandas"]
    if type(value) is not pandas.DataFrame:
        _refuse_subclass(walk, value)
    rows, columns = _rows(walk, value.index)
    columns += [(str(label), value.iloc[:, at]) for at, label in enumerate(value.columns)]
    labels, levels = walk.each(value.columns.tolist()), walk.each(list(value.columns.names))
    dtypes, blob = _columns(walk, columns)
    return walk.tagged("frame", [labels, levels, rows, dtypes, blob])


def write_series(walk: Walk, value: Any) -> Any:
    pandas = sys.modules["pandas"]
    if type(value) is not pandas.Series:
        _refuse_subclass(walk, value)
    rows, columns = _rows(walk, value.index)
    dtypes, blob = _columns(walk, [*columns, (str(value.name), value)])
    return walk.tagged("series", [walk.part(("name",), value.name), rows, dtypes, blob])


def _rows(walk: Walk, index: Any) -> tuple[list[Any], list[tuple[str, Any]]]:
    """How the index is told, and the columns that it takes for that."""
    pandas = sys.modules["pandas"]
    if type(index) is pandas.RangeIndex:
        return [index.start, index.stop, index.step, walk.part(("index",), index.name)], []
    levels = [index.get_level_values(level) for level in range(index.nlevels)]
    columns = [(f"index level {number}", pandas.Series(level)) for number, level in enumerate(levels)]
    return [walk.each(list(index.names))], columns


def _columns(walk: Walk, columns: list[tuple[str, Any]]) -> tuple[list[str], Any]:
    try:
        pyarrow = __import__("pyarrow")  # the user's own, as pandas is
    except ImportError:
        walk.refuse(
            "a pandas object travels by pyarrow, which this child cannot import: import_paths=[...] or python=venv with"
            " both, or return to_dict() or to_numpy() of it"
        )
    arrays: list[Any] = []
    for name, column in columns:
        try:
            array = pyarrow.array(column, from_pandas=True)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            walk.refuse(f"the column {name[:100]!r} is not data: {str(error)[:200]}")
        if isinstance(array.type, pyarrow.BaseExtensionType):
            walk.refuse(f"the column {name[:100]!r} of {str(column.dtype)[:100]} is not data; convert it first")
        if pyarrow.types.is_nested(array.type):
            walk.refuse(f"the column {name[:100]!r} holds {str(array.type)[:100]}: return a pyarrow.Table of it")
        arrays.append(array)
    names = [str(number) for number in range(len(arrays))]
    chunked = any(isinstance(array, pyarrow.ChunkedArray) for array in arrays)
    made = pyarrow.table(arrays, names) if chunked else pyarrow.RecordBatch.from_arrays(arrays, names)
    return [_word(column.dtype) for _name, column in columns], walk.blob(_stream(walk, made))


def _word(dtype: Any) -> str:
    """How pandas holds a column, where that is not what Arrow's type says; the host knows these words, and no others."""
    name = str(dtype)
    return name if name in _NULLABLE else "arrow" if name.endswith("[pyarrow]") else ""


def _stream(walk: Walk, table: Any) -> Any:
    pyarrow = sys.modules["pyarrow"]
    if table.nbytes > walk.max_bytes:
        walk.grow(table.nbytes)  # refused before it is copied
    if type(table) is pyarrow.Table and any(column.num_chunks > _CHUNKS for column in table.columns):
        table = table.combine_chunks()
    walk.items += ITEMS * (TABLE + table.num_columns)
    sink = pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(compression=None, allow_64bit=True)
    with pyarrow.ipc.new_stream(sink, table.schema, options=options) as stream:
        stream.write(table)  # a batch is written without rows too, with its categories
    return memoryview(sink.getvalue())


def _refuse_subclass(walk: Walk, value: Any) -> None:
    walk.refuse(f"{type(value)} may say more than what it is derived from; return that")


# --- what arguments name: see ``pisupervisor.link.arrow_arguments``. From the host, whose metadata are believed ------------


def read_table(data: Any) -> Any:
    """A pyarrow.Table, whose memory ``data`` is."""
    pyarrow = __import__("pyarrow")
    with pyarrow.ipc.open_stream(pyarrow.py_buffer(data)) as stream:
        return stream.read_all()


def read_batch(data: Any) -> Any:
    """A pyarrow.RecordBatch."""
    pyarrow = __import__("pyarrow")
    with pyarrow.ipc.open_stream(pyarrow.py_buffer(data)) as stream:
        return stream.read_next_batch()


def read_frame(data: Any) -> Any:
    """A pandas.DataFrame."""
    return read_table(data).to_pandas()


def read_series(data: Any) -> Any:
    """A pandas.Series: a frame's only column."""
    return read_frame(data).iloc[:, 0]
