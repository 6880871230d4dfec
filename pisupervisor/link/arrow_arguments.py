"""pandas and pyarrow objects among the arguments, in Arrow's stream format: a child with other versions of both can read it, and
of a slice no more travels than is in it. What Arrow would not give back exactly goes as a pickle.
"""

from __future__ import annotations

from _pickle import PickleBuffer  # not pickle: that imports re
from typing import Any

from pihost.inside import arrow as child  # by name: the child has the other end


def reduce(obj: Any) -> Any:
    """How such an object is pickled; NotImplemented for all others, and where a pickle says more."""
    kind = type(obj)
    try:
        import pyarrow

        if kind is pyarrow.Table or kind is pyarrow.RecordBatch:
            return _stream(child.read_table if kind is pyarrow.Table else child.read_batch, obj)
        pandas = __import__("pandas")
        if kind is pandas.DataFrame:
            return _frame(child.read_frame, obj)
        if kind is pandas.Series:
            return _frame(child.read_series, obj.to_frame())
    except Exception:  # no pyarrow here, or what that raises of columns it cannot hold
        return NotImplemented
    return NotImplemented


def _frame(read: Any, frame: Any) -> Any:
    import pyarrow

    if frame.attrs or not frame.flags.allows_duplicate_labels or not _is_columns(frame):
        return NotImplemented
    table = pyarrow.Table.from_pandas(frame)
    return _stream(read, table) if _comes_back(frame, table.slice(0, 0).to_pandas()) else NotImplemented


def _is_columns(frame: Any) -> bool:
    """Not where an object could be anything, nor with an index that knows more than its values."""
    levels = _levels(frame.index)
    objects = [each for each in (*frame.dtypes, *(level.dtype for level in levels)) if str(each) == "object"]
    return not objects and all(getattr(level, "freq", None) is None for level in levels)


def _comes_back(frame: Any, empty: Any) -> bool:
    """Whether that is what the child will have, but for the rows."""
    if type(empty.columns) is not type(frame.columns) or not empty.columns.identical(frame.columns):
        return False
    return list(empty.dtypes) == list(frame.dtypes) and _kind(empty.index) == _kind(frame.index)


def _kind(index: Any) -> Any:
    return type(index), list(index.names), [level.dtype for level in _levels(index)]


def _levels(index: Any) -> list[Any]:
    return [index.get_level_values(number) for number in range(index.nlevels)]


def _stream(read: Any, table: Any) -> Any:
    import pyarrow

    if "extension<" in str(table.schema):  # a child that does not know the type would see what it is stored as
        return NotImplemented
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write(table)
    return read, (PickleBuffer(sink.getvalue()),)
