"""``pihost.call_host`` and ``pihost.call_host_raw``: from code in the child to a function that the host has registered.

The host answers, or asks something itself first: until the answer is there, calls that arrive are served here, so that
host and child may call each other in turn. Only the thread that runs the call may ask.
"""

from __future__ import annotations

import _pickle
import _thread
import os

from pihost import wire
from pihost.inside import encode
from pihost.jsontext import dump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pihost.inside.link import Link
    from pihost.inside.threads import Inbox

    Frame = tuple[int, int, bytes]

_NO_ANSWER = "the host lets this child end, and answers no more"
_NOT_THIS_THREAD = "the host can be called only by the thread that runs the call, and in no fork of it"


class HostError(Exception):
    """The host's function failed. What it says is the host's choice: by default no more than that."""


class UnknownCallback(LookupError):
    """The host has registered no function of that name."""


class Host:
    """The way back to the host while a call runs."""

    def __init__(
        self, link: Link, serve_one: Callable[[Frame], None], limit: int, inbox: Link | Inbox | None = None
    ) -> None:  # fmt: skip
        self._link, self._serve_one, self._limit = link, serve_one, limit
        self._inbox = inbox or link  # whoever reads the link hands over what is for this thread
        self._owner = (os.getpid(), _thread.get_ident())
        self.waiting: dict[int, Any] = {}  # by the call that waits: where its answer is to be left
        self._roomed = -1  # the call that was given room, until its next question is answered: it gets no more
        self.call_id = 0  # of the call that is worked on: an answer is to that, and none between two calls
        self._is_leaving = False  # told to end while something waited: nobody answers any more
        self._later: list[tuple[Frame, list[int]]] = []  # for a call within which this one was made: it waits, too

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_owner()
        _check_name(name)
        try:
            text, buffers = encode.encode([name, list(args), kwargs], self._limit)
        except encode.TooLarge:
            raise self._too_large() from None
        except encode.NotData as error:
            where = str(error).replace("result[1]", "args", 1).replace("result[2]", "kwargs", 1)
            raise TypeError(f"arguments of call_host({name!r}): {where}") from None
        return self._ship(text, buffers, wire.CALLBACK, wire.CALLBACK_MAPPED)

    def call_raw(self, name: str, parts: tuple[bytes, ...]) -> bytes:
        self._check_owner()
        _check_name(name)
        name.encode()  # as the host will read it
        if len(parts) > wire.MAX_BUFFERS:
            raise ValueError(f"call_host_raw: {len(parts)} parts are more than {wire.MAX_BUFFERS}; join some")
        text, views = dump(name), [memoryview(part).cast("B") for part in parts]
        if len(text) + sum(view.nbytes for view in views) > self._limit:
            raise self._too_large()
        answer: bytes = self._ship(text, views, wire.CALLBACK_RAW, wire.RAW_MAPPED)
        return answer

    def _too_large(self) -> ValueError:
        why = f"arguments for the host of more than {self._limit} bytes (Limits.result)"
        return ValueError(f"{why}; send them in parts, or raise Limits(result=...)")

    def _ship(self, text: bytes, buffers: list[Any], plain: int, mapped: int) -> Any:
        from pihost.inside import arenas  # which speaks with the host through this module

        if arenas.arguments.lent:
            arenas.arguments.give_back([])  # what the last answer brought may lie where the next one is to
        kind, parts = arenas.ship(text, buffers)
        return self._ask(plain if kind == wire.RESULT else mapped, parts)

    def ask_for_room(self, size: int) -> tuple[bytes, list[int]]:
        """What the host says, and the descriptors that ride on it."""
        if self._roomed == self.call_id:
            return b"", []  # there was room that could not be mapped; asking again would be a flood
        said = self._ask(wire.ROOM, [size.to_bytes(8, "little")])
        if len(said) > 1:
            self._roomed = self.call_id
        return said, self._inbox.take_fds()

    def _check_owner(self) -> None:
        if self._owner != (os.getpid(), _thread.get_ident()):
            raise RuntimeError(_NOT_THIS_THREAD)

    def _ask(self, kind: int, parts: list[Any]) -> Any:
        self._check_owner()
        if self._is_leaving:
            raise HostError(_NO_ANSWER)
        own = self.call_id
        self.waiting[own] = self._inbox
        self._link.send(kind, own, parts)
        while True:
            frame = self._next(own)
            if frame[0] == wire.ANSWER:
                self.waiting.pop(own, None)
                self._roomed = -1
                return frame[2] if kind == wire.ROOM else _understand(frame[2], self._inbox.take_fds())
            if frame[0] == wire.CALL or frame[0] == wire.EXIT:
                self._link.postpone(frame)
                if frame[0] == wire.EXIT:
                    self._is_leaving = True
                    raise HostError(_NO_ANSWER)
                continue
            self._serve_one(frame)
            self.call_id = own

    def _next(self, own: int) -> Frame:
        """Not what is for another call that waits in this thread: several calls may be made at once within that one."""
        for index, (frame, fds) in enumerate(self._later):
            if _about(frame) == own:
                del self._later[index]
                self._inbox.has_fds(fds)
                return frame
        while True:
            received = self._inbox.receive()
            if received is None:
                os._exit(0)  # the host is gone, and so are we in a moment
            if _about(received) in (own, None):
                return received
            self._later.append((received, self._inbox.take_fds()))


def _about(frame: Frame) -> int | None:
    """The call that waits for it."""
    if frame[0] == wire.ANSWER:
        return frame[1]
    outer: int | None = wire.OUTER.unpack_from(frame[2])[0] if frame[0] == wire.INNER else None
    return outer


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"call_host: the name of a function of the host is text, not {type(name).__name__}")


def _understand(body: bytes, fds: list[int]) -> Any:
    """The value is the one argument of a call that has no function."""
    kind, content = body[:1], body[1:]
    if kind == wire.RAW:
        return content
    if kind == wire.VALUE:
        return loads(content)[0][0]
    if kind == wire.ATTACHED:
        from pihost.inside import attached

        parts = _pickle.loads(content)
        with attached.Call((parts,), fds):
            return attached.load(*parts)[0][0]
    text = content.decode()
    raise UnknownCallback(text) if kind == wire.UNKNOWN else HostError(text)


loads: Callable[..., Any] = _pickle.loads  # of what the host sends; where calls run side by side, that of ``threads``
host: Host | None = None  # set by the call loop
of_threads: dict[int, Host] = {}  # by thread, where calls run side by side


def call_host(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call the function that the host has registered as ``name``; arguments travel as data, like results."""
    return this_host().call(name, args, kwargs)


def call_host_raw(name: str, /, *parts: bytes) -> bytes:
    """The same with bytes as they are, without any encoding: bytes in, bytes out."""
    return this_host().call_raw(name, parts)


def this_host() -> Host:
    """Of the call that this thread runs. Raises RuntimeError."""
    found = of_threads.get(_thread.get_ident(), host)
    if found is None:
        raise RuntimeError("this process has no host to call" if not of_threads else _NOT_THIS_THREAD)
    return found
