"""What comes with a call beside its pickle: descriptors, big buffers, and memory that is shared for good."""

from __future__ import annotations

import _thread
import os

from pihost.inside import arenas, callbacks

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable
    from typing import Any

#: of the call that this thread works on: ``fds``, None where one was taken; ``bare``, those that are ints now; ``unseen``,
#: arenas that were not looked at
_call = _thread._local()
_shared: dict[int, mmap.mmap] = {}  # by the host's number, for as long as the host has the array


def has_parts(call: tuple[Any, ...]) -> bool:
    """Whether anything came with the call, or should have, or is still out from calls before it."""
    return tuple in map(type, call) or call[0] == "arena" or bool(arenas.arguments.lent)


class Call:
    """``with Call(call, fds):`` what came with a call belongs to it while it runs. What nobody took is closed after it.

    Each element of ``call`` is plain, or a tuple as ``load`` takes it.
    """

    def __init__(self, call: tuple[Any, ...], fds: list[int]) -> None:
        self._fds: list[int | None] = list(fds)
        self._parts = [part for part in call if type(part) is tuple]
        for part in self._parts:
            _take_shared(self._fds, part[3])

    def __enter__(self) -> None:
        self._outer = getattr(_call, "fds", []), getattr(_call, "unseen", [])
        _call.fds, _call.unseen = self._fds, [part[1] for part in self._parts]

    def __exit__(self, *_error: object) -> None:
        unseen = _call.unseen
        _call.fds, _call.unseen = self._outer
        for fd in self._fds:
            if fd is not None:
                os.close(fd)
        if unseen or arenas.arguments.lent:
            arenas.arguments.give_back(unseen)


def _take_shared(fds: list[int | None], shared: list[tuple[int, int, int]]) -> None:
    """Memory that comes for the first time. What cannot be mapped is missed when it is used."""
    for index, number, size in shared:
        fd = fds[index] if index < len(fds) else None
        if fd is not None and number not in _shared:
            fds[index] = None
            try:
                _shared[number] = arenas.open_map(fd, size)
            except (OSError, ValueError, ImportError):
                continue


def take(index: int) -> int:
    """A descriptor that came with the call; it belongs to the caller from now on."""
    fds = getattr(_call, "fds", [])
    if index >= len(fds):  # the kernel hands over as many as there is room for
        raise OSError(24, "Too many open files in the child: not all that came with the call could be taken")
    fd, fds[index] = fds[index], None
    if fd is None:
        raise ValueError("a descriptor that was taken before")
    return fd  # type: ignore[no-any-return]


def load(data: bytes | None, arena: int | None, regions: list[Any], _taken: list[tuple[int, int, int]]) -> Any:
    """Unpickle arguments. ``regions``: lengths of what lies in the arena, or where there is none the bytes themselves; the
    first is the pickle where ``data`` is None. ``_taken``: see ``_take_shared``.
    """
    if arena in _call.unseen:
        _call.unseen.remove(arena)
    views: list[Any] = [*map(bytearray, regions)] if arena is None else arenas.arguments.views(arena, regions)
    bare: list[int] = []
    _call.bare = bare
    try:
        loads = callbacks.loads
        return loads(views[0], buffers=views[1:]) if data is None else loads(data, buffers=views)
    except BaseException:
        for fd in bare:
            os.close(fd)
        raise


def forget(numbers: Iterable[int]) -> None:
    """The host has no such arrays any more. Their memory goes with the last of what refers to it here."""
    if _shared:
        for number in numbers:
            _shared.pop(number, None)


# --- what pickles name -----------------------------------------------------------------------------------------------


def memory(buffer: Any, form: str, shape: tuple[int, ...]) -> memoryview:
    """A memoryview among the arguments."""
    view = memoryview(buffer)
    return view if form == "B" and len(shape) == 1 else view.cast(form, shape)  # type: ignore[call-overload]


def shared(number: int) -> mmap.mmap:
    """The memory of a shared array."""
    if number not in _shared:
        raise OSError(24, "Too many open files in the child, or no room for the map: a shared array cannot be seen")
    return _shared[number]


def descriptor(index: int) -> int:
    """A bare one: the number is the caller's to close, once the arguments are whole."""
    fd = take(index)
    _call.bare.append(fd)
    return fd


def file(index: int, mode: str, buffering: int, text: tuple[str, str] | None) -> Any:
    """An open file or a pipe, as it was in the host. ``text``: encoding and errors."""
    if text is not None:  # open() would close the descriptor for a bad name, and it might be somebody else's by now
        import codecs

        codecs.lookup(text[0])
        codecs.lookup_error(text[1] or "strict")
    return open(take(index), mode, buffering, *(text or ()))


def socket(index: int, timeout: float | None) -> Any:
    """A socket, as it was in the host."""
    import socket

    taken = socket.socket(fileno=take(index))
    taken.settimeout(timeout)
    return taken
