"""Memory that the host and one child both see, so that big buffers are copied once and no pages are made anew.

Made and sealed here: a child cannot shrink it, which would be a SIGBUS in the host. Pages are paid for by whoever touches
them first; the child does, for arguments before the host writes (see ``pihost.inside.arenas``), for results by writing.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
from contextlib import contextmanager

from pihost import wire
from pisupervisor.errors import IsolationError, ProtocolError
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from pisupervisor.options import IsolationOptions

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CHUNK = 8 << 20  # bytes copied at once: other threads get their turn in between, and the cache is used as it is
_UNLIMITED = 1 << 62


def memory_file(size: int) -> int:
    """A descriptor of ``size`` bytes of memory whose size nobody can change. Raises IsolationError."""
    try:
        fd = os.memfd_create("pisupervisor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise IsolationError(f"no memory file of {size} bytes: {error.strerror} (remedy: raise ulimit -n)") from error
    return fd


class Arena:
    """One piece of such memory. Views of the map, and arrays built on them, are references to it that can be counted."""

    def __init__(self, size: int) -> None:
        self.number = int.from_bytes(os.urandom(7), "little")
        self.size = size
        self.fd = memory_file(size)
        self.area: Any = None

    def open(self, flags: int = 0) -> None:
        """Map it. Raises IsolationError."""
        try:
            self.area = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED | flags)
        except (OSError, ValueError) as error:
            raise IsolationError(f"no room for a map of {self.size} bytes: {error}") from error
        self._idle = self._references()

    def open_lent(self) -> None:
        """For arguments, when the child has made the pages: all at once, as one fault each takes longer than the copy."""
        self.open(mmap.MAP_POPULATE)
        self.area[0] = wire.LENT

    def _references(self) -> int:
        return sys.getrefcount(self.area)

    def is_idle(self) -> bool:
        """Whether nothing in this process refers to what lies in it."""
        return self._references() <= self._idle

    def is_free(self) -> bool:
        """Whether the child says so. One that lies spoils its own arguments and results, and nothing else."""
        return self.area is not None and self.area[0] == wire.FREE and self.is_idle()

    def close_fd(self) -> None:
        """The child has it, and here the map is enough."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def write(self, regions: list[Iterable[Any]], starts: list[int]) -> None:
        """Each region is buffers one after the other. Through the map, or where there is none through the descriptor."""
        for at, region in zip(starts, regions, strict=True):
            for buffer in region:
                source = memoryview(buffer).cast("B")
                for start in range(0, source.nbytes, _CHUNK):
                    self._write(at, source[start : start + _CHUNK])
                    at += min(_CHUNK, source.nbytes - start)

    def _write(self, at: int, piece: memoryview) -> None:
        if self.area is not None:
            self.area[at : at + piece.nbytes] = piece
            return
        while piece:
            written = os.pwrite(self.fd, piece, at)
            piece, at = piece[written:], at + written


class Choice(NamedTuple):
    """``reuse`` is the number of an arena that will do. Where it is None, one of ``size`` bytes is made, which is kept for
    later calls or not, and those in ``drop`` are forgotten.
    """

    reuse: int | None
    size: int = 0
    keep: bool = False
    drop: tuple[int, ...] = ()


def choose(arenas: Iterable[tuple[int, int, bool]], need: int, room: int) -> Choice:
    """Which arena takes ``need`` bytes, of those that are there: (number, size, whether it is free). Pure.

    All that are kept are at most ``room`` bytes together. A free one that is too small goes when a larger one comes.
    """
    known = list(arenas)
    fitting = [(size, number) for number, size, free in known if free and size >= need]
    if fitting:
        return Choice(min(fitting)[1])
    step = max(1 << 20, 1 << max(0, need.bit_length() - 4))  # at most an eighth is waste
    size = min(-(-need // step) * step, max(room, need))
    lent = sum(size for _, size, free in known if not free)
    if lent + size > room:
        return Choice(None, -(-need // mmap.PAGESIZE) * mmap.PAGESIZE)
    return Choice(None, size, True, tuple(number for number, _, free in known if free))


class Arenas:
    """Those of one child. ``room_in`` and ``room_out`` bound what is kept for arguments and for results, in bytes; ``lend``
    says whether results may be used where they lie.
    """

    def __init__(self, room_in: int, room_out: int, lend: bool) -> None:
        self.room_in, self.room_out, self.lend = room_in, room_out, lend
        self.shared: set[int] = set()  # numbers of shared arrays that the child has
        self._in: dict[int, Arena] = {}
        self._out: dict[int, Arena] = {}
        self._read: set[int] = set()  # of those, whose content was asked for since the child wrote it
        self._lock = threading.Lock()  # calls may run side by side

    def take(self, need: int) -> tuple[Arena, Choice]:
        """An arena for arguments, marked as lent. A new one is to be sent to the child first. Raises IsolationError."""
        with self._lock:
            choice = choose(_state(self._in), need, self.room_in)
            if choice.reuse is None:
                return _renew(self._in, choice), choice
            self._in[choice.reuse].area[0] = wire.LENT
            return self._in[choice.reuse], choice

    def refused(self, arena: Arena) -> None:
        """The child has no room for it, or no descriptor."""
        arena.close_fd()
        with self._lock:
            self._in.pop(arena.number, None)

    def room(self, need: int) -> tuple[bytes, Arena | None]:
        """The answer to a child that needs room for a result: an arena, whose descriptor goes with it, or none."""
        with self._lock:
            self._sweep()
            choice = choose(_state(self._out), need, self.room_out)
            if choice.reuse is not None:
                return _numbers(choice.reuse, self._out[choice.reuse].size), None
            try:
                arena = _renew(self._out, choice) if choice.keep else None
                if arena is not None:
                    arena.open()
            except IsolationError:
                arena = None
            if arena is None:
                return b"\0", None  # it comes over the socket then
            return _numbers(arena.number, arena.size, *choice.drop), arena

    @contextmanager
    def reading(self, body: bytes) -> Iterator[tuple[bytes, list[memoryview]]]:
        """See ``read``. Afterwards the arena is the child's again, if nothing refers to it any more."""
        text, buffers = self.read(body)
        try:
            yield text, buffers
        finally:
            buffers.clear()
            self.sweep()

    def read(self, body: bytes) -> tuple[bytes, list[memoryview]]:
        """(text, buffers) of an answer of kind MAPPED. The buffers are where the child can still write, so read-only views
        are to be copied before they are looked at; a writable one may be kept as it is. Raises ProtocolError.
        """
        try:
            number, text, lengths = wire.unpack_mapped(body)
        except wire.BadFrame as error:
            raise ProtocolError(f"the child sent {error}") from None
        with self._lock:
            arena = self._out.get(number)
            self._read.add(number)
        starts, end = wire.place(lengths)
        if arena is None or end > arena.size:
            raise ProtocolError(f"a result of {sum(lengths)} bytes in an arena that is not there or too small")
        whole = memoryview(arena.area) if self.lend else memoryview(arena.area).toreadonly()
        return text, [whole[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def sweep(self) -> None:
        """Give results' arenas back to the child, if nothing here refers to them any more."""
        with self._lock:
            self._sweep()

    def _sweep(self) -> None:
        for number in list(self._read):
            arena = self._out.get(number)
            if arena is None or arena.is_idle():
                self._read.discard(number)
            if arena is not None and arena.is_idle():
                arena.area[0] = wire.FREE


def _state(arenas: dict[int, Arena]) -> list[tuple[int, int, bool]]:
    return [(arena.number, arena.size, arena.is_free()) for arena in arenas.values()]


def _numbers(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def _renew(arenas: dict[int, Arena], choice: Choice) -> Arena:
    arena = Arena(choice.size)
    for number in choice.drop:
        del arenas[number]
    if choice.keep:
        arenas[arena.number] = arena
    return arena


def arenas_for(options: IsolationOptions) -> Arenas:
    """What is kept stays charged to the child: a quarter of its memory at most, for either direction."""
    limits = options.limits
    quarter = _UNLIMITED if limits.memory is None else int(limits.memory) // 4
    _starts, largest = wire.place([int(limits.result)] + [0] * wire.MAX_BUFFERS)
    return Arenas(quarter, min(quarter, largest + wire.MAX_BUFFERS * wire.ARENA_ALIGN), options.zero_copy)
