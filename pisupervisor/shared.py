"""Arrays that the host and the children of one isolator both see."""

from __future__ import annotations

import fcntl
import mmap
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

from pisupervisor.errors import OptionsError
from pisupervisor.link.arenas import SIZE_SEALS, memory_file

_MAX_DIMENSIONS = 32  # what every numpy takes
_KINDS = "biufcmM"  # numbers, and times: what a stranger's bytes cannot make more of


class SharedMemory(mmap.mmap):
    """The memory of one shared array. It lives as long as anything refers to it; the descriptor is for new children."""

    number: int
    length: int
    isolator: int  # whose children see it
    fd = -1
    forget: Callable[[int], None]

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.forget(self.number)


def shared_array(isolator: int, shape: int | Sequence[int], dtype: Any, forget: Callable[[int], None]) -> Any:
    """A numpy array of zeros. ``forget`` is told its number when nothing refers to its memory any more."""
    numpy = _numpy()
    kind = _dtype(numpy, dtype)
    lengths = _lengths(shape)
    size = max(1, _size(lengths, kind.itemsize))
    fd = memory_file(size, SIZE_SEALS | fcntl.F_SEAL_SEAL)
    try:
        memory = SharedMemory(fd, size)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise OptionsError(f"shared_array: no room for {size} bytes: {error}") from error
    memory.number, memory.length = int.from_bytes(os.urandom(7), "little"), size
    memory.isolator, memory.forget, memory.fd = isolator, forget, fd
    return numpy.ndarray(lengths, kind, memory)


def reduce(obj: Any, used: dict[int, SharedMemory], isolator: int) -> Any:
    """How a numpy array among the arguments is pickled, if it is one of these, or a part of one; else NotImplemented."""
    if isinstance(obj, SharedMemory):
        from pihost.inside.attached import shared  # by name: the child has the other end

        used[obj.number] = obj
        return shared, (obj.number,)
    numpy = _numpy()
    memory = _memory_of(obj) if type(obj) is numpy.ndarray else None
    if memory is None or memory.isolator != isolator:
        return NotImplemented
    offset = _address(obj) - _address(numpy.frombuffer(memory, "u1"))
    made = numpy.ndarray, (obj.shape, obj.dtype, memory, offset, obj.strides)
    return made if obj.flags.writeable else (*made, False, None, None, numpy.ndarray.setflags)


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _memory_of(array: Any) -> SharedMemory | None:
    base = array.base
    while base is not None and not isinstance(base, SharedMemory):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise OptionsError("shared_array: the host has no numpy: pip install numpy") from error
    return numpy


def _dtype(numpy: Any, dtype: Any) -> Any:
    try:
        kind = numpy.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise OptionsError(f"shared_array: {dtype!r} is no dtype") from error
    if kind.kind not in _KINDS or kind.itemsize == 0:
        raise OptionsError(f"shared_array: dtype {str(kind)!r} cannot be shared; numbers, bool and times can")
    return kind


def _lengths(shape: Any) -> tuple[int, ...]:
    try:
        lengths = tuple(map(operator.index, shape if isinstance(shape, Sequence) else (shape,)))
    except TypeError:
        lengths = (-1,)
    if min(lengths, default=0) < 0 or len(lengths) > _MAX_DIMENSIONS:
        raise OptionsError(f"shared_array: {shape!r} is no shape")
    return lengths


def _size(lengths: tuple[int, ...], itemsize: int) -> int:
    size = itemsize
    for length in lengths:
        size *= length
    if size >= 1 << 48:
        raise OptionsError(f"shared_array: {size} bytes are too much")
    return size
