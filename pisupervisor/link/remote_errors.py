"""Exceptions of user code, host side: a fixed table of classes made here; none is found by a name from a child."""

from __future__ import annotations

from errno import ENOSPC
from typing import Any

from pisupervisor.errors import ProtocolError, RemoteError, SerializationError

MAX_NAME = 1 << 10  # characters, here and below: a little more than the child allows itself in bytes
MAX_MESSAGE = 16 << 10
MAX_TRACEBACK = 96 << 10
MAX_CAUSES = 8

_HINT = "\n  hint: modules come into the child through import_paths=[...] or modules=[...] at create()"
_FULL = "\n  hint: /tmp, /dev/shm and each overlay hold Limits(scratch=...) bytes, and 4096 files"


class NotRebuilt(SerializationError, RemoteError):
    """Code of an argument (its constructor, its ``__setstate__``) raised in the child: a value that did not cross, and user
    code that failed.
    """

    def __init__(self, text: str, error: RemoteError) -> None:
        BaseException.__init__(self, text)
        self.direction = "to child"
        self.type_name, self.message, self.remote_traceback = error.args
        self.__cause__ = error.__cause__

    def __str__(self) -> str:
        return f"{self.args[0]}\n\n{self.remote_traceback}"


# Only what a caller may sensibly catch. Not here: SystemExit and KeyboardInterrupt (a child must not end the host),
# StopIteration and its kind (they change their meaning on the way through generators and futures), SyntaxError
# (printing one reads attributes that are not ours), groups and warnings.
_BUILTINS: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, BlockingIOError, BrokenPipeError, BufferError, ChildProcessError,
    ConnectionAbortedError, ConnectionError, ConnectionRefusedError, ConnectionResetError, EOFError, FileExistsError,
    FileNotFoundError, FloatingPointError, ImportError, IndexError, InterruptedError, IsADirectoryError, KeyError,
    LookupError, MemoryError, ModuleNotFoundError, NameError, NotADirectoryError, NotImplementedError, OSError,
    OverflowError, PermissionError, ProcessLookupError, RecursionError, ReferenceError, RuntimeError, SystemError,
    TimeoutError, TypeError, UnboundLocalError, UnicodeDecodeError, UnicodeEncodeError, UnicodeError, ValueError,
    ZeroDivisionError,
)  # fmt: skip

# A terminal obeys these: a child's text may not move the cursor of whoever reads the host's log.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {
    code: f"\\u{code:04x}"
    for code in (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))  # new lines, and other orders
}


class _AlsoBuiltin(RemoteError):
    """Mixed with one builtin exception, whose own __init__ is left out: it would read meaning into our arguments."""

    def __init__(self, type_name: str, message: str, remote_traceback: str = "") -> None:
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback
        BaseException.__init__(self, type_name, message, remote_traceback)

    def __reduce__(self) -> Any:
        kind = type(self).__name__.removeprefix("Remote")
        told = (self.type_name, self.message, self.remote_traceback, getattr(self, "errno", None), kind)
        return _again, told, self.__dict__


def _make_class(builtin: type[Exception]) -> type[RemoteError]:
    members = {
        "__module__": __name__,
        "__doc__": f"A {builtin.__name__} raised by user code in the child.",
    }
    return type(f"Remote{builtin.__name__}", (_AlsoBuiltin, builtin), members)


_CLASSES = {builtin.__name__: _make_class(builtin) for builtin in _BUILTINS}


def remote_error(payload: object) -> RemoteError:
    """The error to raise for what ``pihost.inside.raised`` described. ProtocolError for anything else."""
    fields = _checked(payload)
    name = _qualified(fields)
    kind = fields["type"] if fields["module"] == "builtins" else ""
    number = _number(fields, "errno")
    hint = _HINT if kind == "ModuleNotFoundError" else _FULL if (kind, number) == ("OSError", ENOSPC) else ""
    message, trace = _text(fields, "message", MAX_MESSAGE) + hint, _text(fields, "traceback", MAX_TRACEBACK)
    error = _again(name, message, trace, number, kind)
    error.__cause__ = _cause(fields.get("causes"))
    return error


def _again(type_name: str, message: str, remote_traceback: str, errno: int | None, kind: str) -> RemoteError:
    """One error, of the table's class where it has ``kind``. Unpickling and copying go through here too."""
    error = _CLASSES.get(kind, RemoteError)(type_name, message, remote_traceback)
    if errno is not None and isinstance(error, OSError):
        error.errno = errno
    return error


def _cause(payload: object) -> RemoteError | None:
    """The chain of what it was raised from, as plain RemoteErrors: the rendered text has their tracebacks already."""
    if not isinstance(payload, list) or len(payload) > MAX_CAUSES:
        raise ProtocolError("an exception whose causes are none")
    first: RemoteError | None = None
    for entry in reversed(payload):
        fields = _checked(entry)
        error = RemoteError(_qualified(fields), _text(fields, "message", MAX_MESSAGE))
        error.__cause__ = first
        first = error
    return first


def _checked(payload: object) -> dict[str, Any]:
    if not isinstance(payload, dict) or not {"module", "type", "message"} <= payload.keys():
        raise ProtocolError("an exception that is described wrongly")
    return payload


def _qualified(fields: dict[str, Any]) -> str:
    module, name = (_text(fields, part, MAX_NAME).replace("\n", "\\n") for part in ("module", "type"))
    return name if module in ("builtins", "__main__") else f"{module}.{name}"


def _text(fields: dict[str, Any], name: str, limit: int) -> str:
    text = fields.get(name)
    if type(text) is not str or len(text) > limit:
        raise ProtocolError(f"an exception whose {name} is no text of at most {limit} characters")
    return text.translate(CONTROLS)


def _number(fields: dict[str, Any], name: str) -> int | None:
    number = fields.get(name)
    if number is not None and (type(number) is not int or abs(number) >= 1 << 31):
        raise ProtocolError(f"an exception whose {name} is no number")
    return number
