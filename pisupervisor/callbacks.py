"""Functions of the application that code in the child may call: by the exact name they were registered under, and no other
way. Nothing is looked up on an object because a child says so.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from pihost import wire
from pisupervisor.errors import IsolationError, OptionsError, ProtocolError, SerializationError
from pisupervisor.link.reader import DATA, Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pisupervisor.link.arenas import Arenas
    from pisupervisor.link.calls import Payload
    from pisupervisor.modules import Modules

    Dump = Callable[[Any], bytes | Payload]

_MAPPED = (wire.CALLBACK_MAPPED, wire.RAW_MAPPED)  # what it is about lies in an arena
_BYTES = (wire.CALLBACK_RAW, wire.RAW_MAPPED)  # bytes in, bytes out
IMPORT = "\0import"  # see pihost.inside.asking
_LOGS = 10.0  # tracebacks of failed callbacks in a second
_LOGGED = 16 << 10  # characters of one
_LEFT_PAUSED = (
    "it left the child paused, and there is no other thread that could resume it: call resume() before it returns (the child has "
    "been resumed)"
)
_COROUTINE = 0x80  # inspect.CO_COROUTINE; importing inspect costs 6 ms


def is_coroutine_function(function: Any) -> bool:
    """Whether what it returns is to be awaited: also of partials, methods and objects with an ``async def __call__``."""
    while isinstance(function, partial):
        function = function.func
    for each in (function, type(function).__call__):
        code = getattr(each, "__code__", None)
        if code is not None:
            return bool(code.co_flags & _COROUTINE)
    return False


class Callbacks:
    """One isolator's functions. They run in the thread whose call the child is working on; ``rate`` is calls in a second,
    ``size`` bytes of what they are called with in a second.
    """

    def __init__(
        self, dump: Dump, rate: float | None, modules: Modules | None = None, reader: Reader = DATA,
        size: int | None = None, ends_pause: Callable[[], bool] = bool,
    ) -> None:  # fmt: skip
        self._modules, self._reader = modules, reader
        self._functions: dict[str, tuple[Callable[..., Any], bool]] = {}
        self._lock = threading.Lock()
        self._dump, self._rate, self._size, self._ends_pause = dump, rate, size, ends_pause
        self._calls, self._logs = _Bucket(rate), _Bucket(_LOGS)
        self._bytes = _Bucket(size, wire.MAX_FRAME)  # the largest request may always be made, if seldom

    def register(self, name: str, function: Callable[..., Any], expose_errors: bool) -> None:
        if not isinstance(name, str) or not name or "\0" in name:
            raise OptionsError(f"a callback needs a name, not {name!r}")
        if not callable(function):
            raise OptionsError(f"callback {name!r}: expected a function, not {function!r}")
        if is_coroutine_function(function):
            raise OptionsError(f"callback {name!r}: a coroutine function needs an event loop: use AsyncProcessIsolator")
        with self._lock:
            self._functions = {**self._functions, name: (function, expose_errors)}

    def unregister(self, name: str) -> None:
        """Raises OptionsError where there is none of that name."""
        with self._lock:
            if name not in self._functions:
                raise OptionsError(f"there is no callback {name!r}")
            self._functions = {known: entry for known, entry in self._functions.items() if known != name}

    def answer(self, kind: int, body: bytes, arenas: Callable[[], Arenas] | None = None) -> bytes | Payload:
        """The body of the answer to one request of the child; a Payload is a value that is more than its pickle. Raises
        ProtocolError for what no honest child sends.
        """
        try:
            asked = self._asked(kind, body, arenas)
        except wire.BadFrame as error:
            raise _unreadable(error) from None
        except SerializationError as error:  # no numpy here, a decoder of the application's that raised ...
            self._log("reading what a callback was called with", error)
            return wire.FAILED + b"the host cannot read these arguments"
        if isinstance(asked, str):
            return wire.FAILED + asked.encode()
        name, args, kwargs = asked
        if name == IMPORT and self._modules is not None and kind in _BYTES:
            return self._source(args)
        entry = self._functions.get(name)
        if entry is None:
            return wire.UNKNOWN + f"the host has registered no function {name[:200]!r}".encode("utf-8", "replace")
        function, expose_errors = entry
        try:
            value = function(*args, **kwargs)
            if self._ends_pause():
                raise IsolationError(_LEFT_PAUSED)
            return self._told_bytes(value) if kind in _BYTES else self._told_value(value)
        except Exception as error:
            self._ends_pause()
            self._log(f"the callback {name!r}", error)
            return wire.FAILED + _told(name, error, expose_errors).encode("utf-8", "replace")

    def _asked(
        self, kind: int, body: bytes, arenas: Callable[[], Arenas] | None
    ) -> str | tuple[str, list[Any], dict[str, Any]]:
        """The request, or why it is refused: that is seen before anything is decoded, which is what costs."""
        if kind not in _MAPPED or arenas is None:
            return self._refusal(kind, body) or _request(kind, *wire.unpack_value(body), self._reader)
        with arenas().reading(body) as (text, buffers):  # so much is there: for a lie all later calls would pay
            return self._refusal(kind, body) or _request(kind, text, buffers, self._reader)

    def _told_value(self, value: Any) -> bytes | Payload:
        payload = self._dump(value)
        return wire.VALUE + payload if type(payload) is bytes else payload

    def _told_bytes(self, value: Any) -> bytes | Payload:
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"a function called by call_host_raw must return bytes, not {type(value).__name__}")
        raw = bytes(value)
        return wire.RAW + raw if len(raw) < wire.BIG else self._told_value(raw)

    def _refusal(self, kind: int, body: bytes) -> str | None:
        """Why a request is not even read. Raises ProtocolError."""
        if not self._calls.may_pass():
            return f"more than {self._rate:g} calls of the host in a second"
        if not self._bytes.may_pass(_size(kind, body)):
            return f"more than {self._size} bytes for the host in a second"
        return None

    def _source(self, args: list[Any]) -> bytes:
        """Of a module that the child wants to import."""
        if len(args) != 1 or self._modules is None:
            raise ProtocolError("an import of other than one module")
        try:
            found = self._modules.answer(args[0])
        except Exception as error:
            self._log("a module loader", error)
            return wire.FAILED + b"the host's loader failed"
        if found is None:
            return wire.UNKNOWN + b"no loader has it"
        self._bytes.spend(len(found))  # which the host read for it, and may have unpacked
        return wire.RAW + found

    def _log(self, what: str, error: Exception) -> None:
        """Whole, but not for ever: a child may fail a callback ten thousand times a second, and choose what it says."""
        if self._logs.may_pass():
            import logging
            import traceback

            from pisupervisor.link.remote_errors import CONTROLS

            text = "".join(traceback.format_exception(error))[-_LOGGED:].translate(CONTROLS)
            logging.getLogger("pisupervisor").error("%s raised; the child is told that it failed\n%s", what, text)


class _Bucket:
    """So many a second, and a second's worth at once (or ``most``, if that is more); None: any number. What is more than
    that passes when nothing was used for long enough, and is paid for afterwards.
    """

    def __init__(self, rate: float | None, most: float = 1.0) -> None:
        self._rate, self._most = rate, max(most, rate or 0.0)
        self._lock = threading.Lock()
        self._tokens, self._filled = self._most, time.monotonic()

    def may_pass(self, count: int = 1) -> bool:
        if self._rate is None:
            return True
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self._most, self._tokens + (now - self._filled) * self._rate)
            self._filled = now
            if self._tokens < min(count, self._most):
                return False
            self._tokens -= count
            return True

    def spend(self, count: int) -> None:
        """What is known only afterwards: whoever comes next waits for it."""
        with self._lock:
            self._tokens -= count if self._rate is not None else 0


def _size(kind: int, body: bytes) -> int:
    """What it costs to read a request, as it says itself. Raises ProtocolError."""
    try:
        return len(body) + (sum(wire.unpack_mapped(body)[2]) if kind in _MAPPED else 0)
    except wire.BadFrame as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> ProtocolError:
    return ProtocolError(f"a callback that cannot be read: {error}")


def _request(
    kind: int, text: bytes, buffers: list[memoryview], reader: Reader
) -> tuple[str, list[Any], dict[str, Any]]:
    from pisupervisor.link.serializer import decode

    try:
        if kind in _BYTES:
            name, args, kwargs = decode(text, []), [bytes(part) for part in buffers], {}
        else:
            name, args, kwargs = decode(text, buffers, reader=reader)
    except (TypeError, ValueError) as error:
        raise _unreadable(error) from None
    if not (isinstance(name, str) and isinstance(args, list) and isinstance(kwargs, dict)):
        raise ProtocolError("a callback that is not a name, a list and a mapping")
    if not all(isinstance(key, str) for key in kwargs):
        raise ProtocolError("a callback whose keywords are no text")
    return name, args, kwargs


def _told(name: str, error: Exception, expose_errors: bool) -> str:
    """What the child learns. By default not even the class of the error: its text may hold what is not the child's."""
    if not expose_errors:
        return f"the host's function {name!r} failed"
    return f"the host's function {name!r} failed: {type(error).__name__}: {error}"[:8192]
