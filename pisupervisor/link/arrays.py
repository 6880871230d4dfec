"""numpy arrays and scalars from a child's bytes: plain dtypes only, sizes proved before anything is allocated."""

from __future__ import annotations

import math
import re
from typing import Any

from pisupervisor.errors import ProtocolError, SerializationError

MAX_DIMENSIONS = 64
MAX_FIELDS = 1000  # of one record
MAX_WORK = 500_000  # of what records one answer may cost: some 2 us each
_BUILT, _CHECKED = 10, 2  # that a field costs
_PLAIN_KINDS = "iufcmM"  # of these any bytes are a value
_DTYPE = re.compile(r"[<>|]([biufcSU]\d{1,9}|[mM]8(\[([1-9]\d{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)", re.ASCII)


class RecordTypes:
    """The types of records in one answer, each built once, and what they cost in all: a child describes 100,000 fields for
    nothing, and numpy takes 20 us for each.
    """

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._left = MAX_WORK

    def dtype(self, told: list[Any]) -> Any:
        key = repr(told)
        if key not in self._known:
            self._known[key] = _records(told, self)
        return self._known[key]

    def spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise ProtocolError("records of too many fields in one answer")


def build_array(told: Any, shape: list[Any], data: bytes | memoryview, records: RecordTypes) -> Any:
    """A writable numpy array, with memory of its own unless ``zero_copy`` was asked for. ProtocolError where type, shape
    and bytes do not fit exactly.
    """
    dtype = _dtype(told, records)
    _check_shape(shape)
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(f"an array of {len(data)} bytes that says {told} {shape}"[:200])
    if isinstance(data, memoryview) and not data.readonly and dtype.kind in _PLAIN_KINDS:
        return _in_place(dtype, shape, data)
    return _filled(dtype, shape, data, records)


def _in_place(dtype: Any, shape: list[int], data: memoryview) -> Any:
    """Memory that the child can still write to is handed over writable where the caller has asked for just that."""
    import numpy

    return numpy.frombuffer(data, dtype).reshape(shape)


def build_scalar(told: Any, data: bytes | memoryview, records: RecordTypes) -> Any:
    """A numpy scalar, such as ``numpy.float64(0.5)``."""
    dtype = _dtype(told, records)
    if dtype.itemsize != len(data):
        raise ProtocolError(f"a scalar of {len(data)} bytes that says {told}"[:200])
    return dtype.type() if not data else _filled(dtype, [], data, records)[()]  # numpy.str_("") has no bytes


def _filled(dtype: Any, shape: list[int], data: bytes | memoryview, records: RecordTypes) -> Any:
    import numpy

    array = numpy.empty(tuple(shape), dtype)
    if data:
        raw = array.reshape(-1).view(numpy.uint8)
        raw[:] = numpy.frombuffer(data, numpy.uint8)
        _check_content(array, records)
    return array


def _check_content(array: Any, records: RecordTypes) -> None:
    """A bool of 2 and a character above Unicode are states that numpy itself never makes."""
    dtype = array.dtype
    if dtype.names is not None:
        records.spend(_CHECKED * len(dtype.names))
        for name in dtype.names:
            _check_content(array[name], records)
    if dtype.kind not in "bU" or not array.nbytes:
        return
    import numpy

    flat = numpy.ascontiguousarray(array).reshape(-1)  # a copy where it is a field
    if dtype.kind == "b" and flat.view("u1").max() > 1:
        raise ProtocolError("a bool that is neither 0 nor 1")
    if dtype.kind == "U" and flat.view(f"{dtype.str[0]}u4").max() > 0x10FFFF:
        raise ProtocolError("a character that Unicode does not have")


def _check_shape(shape: Any) -> None:
    good = type(shape) is list and len(shape) <= MAX_DIMENSIONS
    if not good or not all(type(length) is int and 0 <= length < 1 << 62 for length in shape):
        raise ProtocolError("an array of an impossible shape")


def _records(told: list[Any], records: RecordTypes) -> Any:
    """The dtype of records: its fields lie in it one after another, with room between them perhaps."""
    size, fields = told if len(told) == 2 else (None, None)
    if type(size) is not int or type(fields) is not list or not 0 < len(fields) <= MAX_FIELDS:
        raise ProtocolError("records that are none")
    records.spend(_BUILT * len(fields))
    names, formats, offsets, places = [], [], [], []
    for field in fields:
        if type(field) is not list or len(field) != 4 or type(field[0]) is not str or type(field[3]) is not int:
            raise ProtocolError("a field that is none")
        name, told_of, shape, offset = field
        _check_shape(shape)
        dtype = _dtype(told_of, records)
        places.append((offset, offset + dtype.itemsize * math.prod(shape)))
        names.append(name)
        formats.append((dtype, tuple(shape)) if shape else dtype)
        offsets.append(offset)
    _check_places(names, sorted(places), size)
    import numpy

    return numpy.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


def _check_places(names: list[str], places: list[tuple[int, int]], size: int) -> None:
    before = 0
    for start, end in places:
        if start < before:
            raise ProtocolError("fields that lie upon each other")
        before = end
    if not before <= size < 1 << 31 or len(set(names)) != len(names):
        raise ProtocolError("records that are smaller than their fields, or too large, or two fields of one name")


def _dtype(told: Any, records: RecordTypes) -> Any:
    if type(told) is list:
        return records.dtype(told)
    text = told
    if type(text) is not str or not _DTYPE.fullmatch(text):
        raise ProtocolError(f"dtype {str(text)[:40]!r} is not data")
    try:
        import numpy
    except ImportError as error:
        message = "the result holds a numpy array, and the host has no numpy: pip install numpy, or return .tolist()"
        raise SerializationError(message, direction="from child") from error
    dtype = numpy.dtype(text)
    if dtype.str != text or dtype.hasobject:
        raise ProtocolError(f"dtype {text[:40]!r} is not written as numpy writes it")
    return dtype
