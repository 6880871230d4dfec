"""Memory that the host made, and that both sides see: arguments come in arenas of one kind, results go out in the other.

An array among the arguments is the arena's memory, not a copy. The arena is given back when nothing here refers to it
any more, be that after the call or after many: until then the host writes into others.
"""

from __future__ import annotations

import _thread
import os
import sys

from pihost import wire
from pihost.inside import callbacks, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from typing import Any

_CHUNK = 8 << 20  # bytes copied at once: other threads get their turn in between


def open_map(fd: int, size: int, *, paid: bool = False) -> mmap.mmap:
    """Memory of the host's, shared; the descriptor is closed (the map has a copy of its own). ``paid``: make all pages here,
    so that they are charged to this child's limit; the host insists on that.
    """
    import mmap  # a small C module, but most children never need it

    try:
        if paid:
            os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


class Arena:
    """One that arguments come in. Views of the map, and arrays built on them, are references to it that can be counted."""

    def __init__(self, fd: int, size: int, kept: bool) -> None:
        self.area, self.kept = open_map(fd, size, paid=True), kept  # no name but this one refers to the map
        self._idle = self._references()

    def _references(self) -> int:
        return sys.getrefcount(self.area)

    def is_idle(self) -> bool:
        return self._references() <= self._idle


class Arguments:
    """The arenas that arguments come in."""

    def __init__(self) -> None:
        self._arenas: dict[int, Arena] = {}  # those that are kept, and those of calls that have not loaded theirs
        self.lent: dict[int, Arena] = {}  # which something here refers to still
        self._lock = _thread.RLock()  # where calls run side by side: nothing is given back twice

    def add(self, fd: int, number: int, size: int, kept: bool, dropped: list[int]) -> bool:
        """Take one from the host, and let others go. False where that cannot be, for want of descriptors or room."""
        for other in dropped:
            self._arenas.pop(other, None)
        try:
            self._arenas[number] = Arena(fd, size, kept)
        except (OSError, ValueError, ImportError):
            return False
        return True

    def views(self, number: int, lengths: list[int]) -> list[memoryview]:
        """What the host has put into an arena. The views, and what is built on them, keep it from being given back."""
        arena = self._arenas[number]
        starts, _end = wire.place(lengths)
        whole = memoryview(arena.area)
        views = [whole[start : start + length] for start, length in zip(starts, lengths)]
        with self._lock:
            self._viewed(number, arena)
        return views

    def _viewed(self, number: int, arena: Arena) -> None:
        if arena.kept:
            self.lent[number] = arena
        else:
            self._arenas.pop(number, None)

    def give_back(self, unseen: list[int]) -> None:
        """Those that nothing refers to any more. After each call; ``unseen`` came for it, and were not looked at."""
        with self._lock:
            for number in unseen:
                if number in self._arenas:
                    self._viewed(number, self._arenas[number])
            for number, arena in list(self.lent.items()):
                if arena.is_idle():
                    del self.lent[number]
                    arena.area[0] = wire.FREE  # from here on the host may fill it again


class Results:
    """The arenas that results go out in. The host is asked for one when a result needs it, and may refuse."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = _thread.RLock()  # where calls run side by side, also while the host is asked

    def room(self, size: int) -> tuple[int, mmap.mmap] | None:
        """An arena of at least ``size`` bytes that the host does not read from, marked as lent."""
        with self._lock:
            return self._room(size)

    def _room(self, size: int) -> tuple[int, mmap.mmap] | None:
        fitting = [
            (len(area), number) for number, area in self._maps.items() if len(area) >= size and area[0] == wire.FREE
        ]
        number = min(fitting)[1] if fitting else self._ask(size)
        if number is None:
            return None
        area = self._maps[number]
        area[0] = wire.LENT
        return number, area

    def _ask(self, size: int) -> int | None:
        try:
            said, fds = callbacks.this_host().ask_for_room(size)
        except Exception:  # this is not the thread that speaks with the host
            return None
        if len(said) < 16:
            return None
        number, length, *dropped = (int.from_bytes(said[at : at + 8], "little") for at in range(0, len(said), 8))
        for other in dropped:
            self._maps.pop(other, None)
        if number in self._maps:
            return number  # given back meanwhile
        try:
            self._maps[number] = open_map(fds[0], length, paid=True)
        except (LookupError, OSError, ValueError, ImportError):  # no descriptor, no room for the map
            return None
        return number


def ship(text: bytes, buffers: list[Any]) -> tuple[int, list[Any]]:
    """(kind, parts) of the answer with this value: through an arena where that is worth it and the host has one."""
    lengths = [memoryview(buffer).nbytes for buffer in buffers]
    if sum(lengths) >= wire.BIG:
        starts, end = wire.place(lengths)
        found = results.room(end)
        if found is not None:
            number, area = found
            with memoryview(area) as target:
                for start, buffer in zip(starts, buffers):
                    _copy(target, start, memoryview(buffer).cast("B"))
            return wire.MAPPED, wire.pack_mapped(number, text, lengths)
    return wire.RESULT, wire.pack_value(text, buffers)


def ship_pickled(value: object, limit: int) -> tuple[int, list[Any]]:
    """The same for a host that trusts this child's pickles. Raises NotData for what has none, and more than ``limit`` bytes."""
    from pihost.inside import pickled

    buffers: list[memoryview] = []

    def stays(buffer: Any) -> bool:
        raw = buffer.raw()
        if raw.nbytes < wire.BIG or len(buffers) == wire.MAX_BUFFERS:
            return True
        buffers.append(raw)
        return False

    def another() -> Callable[[Any], bool]:
        buffers.clear()
        return stays

    text = pickled.dump(value, another)
    encode.check_size(len(text) + sum(buffer.nbytes for buffer in buffers), limit)
    kind, parts = ship(text, buffers)
    return wire.PICKLED if kind == wire.RESULT else kind, parts


def _copy(target: memoryview, start: int, source: memoryview) -> None:
    for at in range(0, source.nbytes, _CHUNK):
        piece = source[at : at + _CHUNK]
        target[start + at : start + at + piece.nbytes] = piece


arguments, results = Arguments(), Results()  # one child, one table of each
