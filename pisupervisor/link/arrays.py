"""numpy arrays and scalars from a child's bytes: plain dtypes only, sizes proved before anything is allocated."""

from __future__ import annotations

import math
import re
from typing import Any

from pisupervisor.errors import ProtocolError, SerializationError

MAX_DIMENSIONS = 64
_PLAIN_KINDS = "iufcmM"  # of these any bytes are a value
_DTYPE = re.compile(r"[<>|]([biufcSU]\d{1,9}|[mM]8(\[(\d{1,9})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)", re.ASCII)


def build_array(dtype_text: str, shape: list[Any], data: bytes | memoryview) -> Any:
    """A writable numpy array, with memory of its own unless ``zero_copy`` was asked for. ProtocolError where type, shape
    and bytes do not fit exactly.
    """
    dtype = _dtype(dtype_text)
    if len(shape) > MAX_DIMENSIONS or not all(type(length) is int and 0 <= length < 1 << 62 for length in shape):
        raise ProtocolError("an array of an impossible shape")
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(f"an array of {len(data)} bytes that says {dtype_text} {shape}"[:200])
    if isinstance(data, memoryview) and not data.readonly and dtype.kind in _PLAIN_KINDS:
        return _in_place(dtype, shape, data)
    return _filled(dtype, shape, data)


def _in_place(dtype: Any, shape: list[int], data: memoryview) -> Any:
    """Memory that the child can still write to is handed over writable where the caller has asked for just that."""
    import numpy

    return numpy.frombuffer(data, dtype).reshape(shape)


def build_scalar(dtype_text: str, data: bytes | memoryview) -> Any:
    """A numpy scalar, such as ``numpy.float64(0.5)``."""
    dtype = _dtype(dtype_text)
    if dtype.itemsize != len(data):
        raise ProtocolError(f"a scalar of {len(data)} bytes that says {dtype_text}")
    return dtype.type() if not data else _filled(dtype, [], data)[()]  # numpy.str_("") has no bytes


def _filled(dtype: Any, shape: list[int], data: bytes | memoryview) -> Any:
    import numpy

    array = numpy.empty(tuple(shape), dtype)
    if data:
        raw = array.reshape(-1).view(numpy.uint8)
        raw[:] = numpy.frombuffer(data, numpy.uint8)
        _check_content(array, raw)
    return array


def _check_content(array: Any, raw: Any) -> None:
    """A bool of 2 and a character above Unicode are states that numpy itself never makes."""
    kind, order = array.dtype.kind, array.dtype.str[0]
    if kind == "b" and raw.max() > 1:
        raise ProtocolError("a bool that is neither 0 nor 1")
    if kind == "U" and array.reshape(-1).view(f"{order}u4").max() > 0x10FFFF:
        raise ProtocolError("a character that Unicode does not have")


def _dtype(text: str) -> Any:
    if not _DTYPE.fullmatch(text):
        raise ProtocolError(f"dtype {text[:40]!r} is not data")
    try:
        import numpy
    except ImportError as error:
        message = "the result holds a numpy array, and the host has no numpy: pip install numpy, or return .tolist()"
        raise SerializationError(message, direction="from child") from error
    dtype = numpy.dtype(text)
    if dtype.str != text or dtype.hasobject:
        raise ProtocolError(f"dtype {text[:40]!r} is not written as numpy writes it")
    return dtype
