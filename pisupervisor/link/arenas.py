"""Memory that the host and one child both see, so that big buffers are copied once and no pages are made anew.

Made and sealed here: a child cannot shrink it, which would be a SIGBUS in the host. Pages are paid for by whoever makes
them: the child, all of them, before the host touches one. That is checked (see ``Arena.settle``); a child that could leave
them to the host, and keep its map for ever, would be free of its own memory limit.
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

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1: no more writable maps, and no holes
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_CHUNK = 8 << 20  # bytes copied at once: other threads get their turn in between, and the cache is used as it is
_UNLIMITED = 1 << 62
MOST = 16  #: arenas kept for one child, in either direction: each takes a descriptor on either side


def memory_file(size: int, seals: int) -> int:
    """A descriptor of ``size`` bytes of memory, sealed at least against a change of size. Raises IsolationError."""
    try:
        fd = os.memfd_create("pisupervisor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
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
        self.settled = False
        self.fd = memory_file(size, SIZE_SEALS)
        try:
            self.area = mmap.mmap(self.fd, size)
        except (OSError, ValueError) as error:
            raise IsolationError(f"no room for a map of {size} bytes: {error}") from error
        self._idle = self._references()

    def settle(self) -> None:
        """When the child has mapped it, and before this process touches a page: see that the child has made all of them, and
        that none can be taken away, for whoever makes them anew would pay for them. Raises ProtocolError.
        """
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except OSError as error:
            raise ProtocolError("an arena that the child has sealed itself") from error
        made = os.fstat(self.fd).st_blocks * 512
        if made < self.size:
            raise ProtocolError(f"an arena of which the child has made {made} bytes, not {self.size}")
        self.close_fd()

    def populate(self) -> None:
        """Map all pages at once, as one fault each takes longer than the copy."""
        try:
            self.area.madvise(_MADV_POPULATE_WRITE)
        except OSError:
            return  # Linux 5.13 does without

    def _references(self) -> int:
        return sys.getrefcount(self.area)

    def is_idle(self) -> bool:
        """Whether nothing in this process refers to what lies in it."""
        return self._references() <= self._idle

    def is_free(self) -> bool:
        """Whether the child says so. One that lies spoils its own arguments and results, and nothing else."""
        return self.settled and self.area[0] == wire.FREE and self.is_idle()

    def close_fd(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if "fd" in self.__dict__:
            self.close_fd()

    def write(self, regions: list[Iterable[Any]], starts: list[int]) -> None:
        """Each region is buffers one after the other."""
        with memoryview(self.area) as target:
            for at, region in zip(starts, regions, strict=True):
                for buffer in region:
                    source = memoryview(buffer).cast("B")
                    for start in range(0, source.nbytes, _CHUNK):
                        piece = source[start : start + _CHUNK]
                        target[at : at + piece.nbytes] = piece
                        at += piece.nbytes


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

    All that are kept are ``MOST`` and ``room`` bytes together, at most. A free one that is too small goes when a larger one
    comes.
    """
    known = list(arenas)
    fitting = [(size, number) for number, size, free in known if free and size >= need]
    if fitting:
        return Choice(min(fitting)[1])
    step = max(1 << 20, 1 << max(0, need.bit_length() - 4))  # at most an eighth is waste
    size = min(-(-need // step) * step, max(room, need))
    lent = [size for _, size, free in known if not free]
    if sum(lent) + size > room or len(lent) >= MOST:
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

    def accepted(self, arena: Arena) -> None:
        """The child has it. Raises ProtocolError where it has not done its part."""
        arena.settle()
        arena.populate()
        arena.area[0] = wire.LENT
        arena.settled = True  # not before: another thread might take it for a free one

    def refused(self, arena: Arena) -> None:
        """The child has no room for it, or no descriptor."""
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
            starts, end = wire.place(lengths)
            arena = self._out.get(number)
            if arena is None or end > arena.size:
                raise ProtocolError(f"a result of {sum(lengths)} bytes in an arena that is not there or too small")
            if not arena.settled:
                arena.settle()
                arena.settled = True
            whole = memoryview(arena.area) if self.lend else memoryview(arena.area).toreadonly()
            self._read.add(number)  # not before there is a view: another thread may sweep
        return text, [whole[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def sweep(self) -> None:
        """Give results' arenas back to the child, if nothing here refers to them any more."""
        with self._lock:
            self._sweep()

    def _sweep(self) -> None:
        for number in list(self._read):
            arena = self._out.get(number)
            if arena is None:
                self._read.discard(number)
            elif arena.is_idle():
                self._read.discard(number)  # from here on it is the child's, who may have filled it again in a moment
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
