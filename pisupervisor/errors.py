"""Every error this library raises, in one tree. Each says whose fault it is and what to do.

IsolationError
├── OptionsError(ValueError)             the caller's mistake; nothing was started
│   └── ProfileError                     a seccomp profile: file, line, what
├── FeatureUnavailable                   this kernel or host cannot give a required protection
├── LaunchError                          a step of the launch failed
├── ChildTerminated                      the child died while the call ran
│   ├── MemoryLimitExceeded  CpuLimitExceeded  PidsLimitExceeded  OutputLimitExceeded
│   └── SyscallViolation
├── CallError
│   ├── RemoteError                      user code raised
│   ├── CompileError                     the source does not compile
│   ├── TargetNotFound(LookupError)
│   ├── UnknownCallback  ObjectReleased
│   ├── CallTimeout(TimeoutError)
│   └── CallCancelled(concurrent.futures.CancelledError)   in futures.py: its base imports logging
├── SerializationError                   a value that is not data, or a result that is too large
├── ProtocolError                        the child broke the protocol; it is killed
├── RestartLimitReached
└── IsolatorClosed
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing costs 2 ms of a program's start; type checkers know this name
if TYPE_CHECKING:
    from typing import Any, Self

    from pisupervisor.results import ExitInfo


class IsolationError(Exception):
    """Base of everything this library raises on purpose.

    Where a call's output is captured, ``stdout`` and ``stderr`` are what it wrote before it failed; ``truncated``: it
    wrote more than the limit.
    """

    stdout: str = ""
    stderr: str = ""
    truncated: bool = False

    def with_output(self, stdout: bytes, stderr: bytes, truncated: bool) -> Self:
        """This error, telling what the call wrote."""
        self.stdout, self.stderr = stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")
        self.truncated = truncated
        return self

    def __reduce__(self) -> Any:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[IsolationError], args: tuple[Any, ...], state: dict[str, Any]) -> IsolationError:
    """A copied or unpickled error, made without its __init__, which may want more than ``args``: one that cannot be made
    again would break the pool of processes whose worker raises it.
    """
    error: IsolationError = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class OptionsError(IsolationError, ValueError):
    """The caller's mistake: an option or an argument that cannot work. Nothing was started."""


class WrongKeyword(OptionsError, TypeError):
    """An option that does not exist, or one that is missing: a TypeError too, as for any function."""


class ProfileError(OptionsError):
    """A seccomp profile that cannot be used: ``file``, ``line`` (1-based, None if unknown) and what is wrong."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        self.file = file
        self.line = line
        where = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        super().__init__(where + message)


class FeatureUnavailable(IsolationError):
    """This kernel or host cannot give a protection that was asked for. ``feature`` names it, ``remedy`` says what to do."""

    def __init__(self, message: str, *, feature: str, remedy: str) -> None:
        self.feature = feature
        self.remedy = remedy
        super().__init__(f"{message}\n  remedy: {remedy}")


class LaunchError(IsolationError):
    """A step of the launch failed: ``step`` names it, ``errno`` is the kernel's word (None if there was none), ``remedy`` says
    what to do.
    """

    def __init__(self, message: str, *, step: str, errno: int | None = None, remedy: str) -> None:
        self.step = step
        self.errno = errno
        self.remedy = remedy
        super().__init__(f"launch failed at step '{step}': {message}\n  remedy: {remedy}")


class ChildTerminated(IsolationError):
    """The child died while the call ran. ``exit_info`` says how and why."""

    def __init__(self, message: str, exit_info: ExitInfo) -> None:
        self.exit_info = exit_info
        super().__init__(message)


class MemoryLimitExceeded(ChildTerminated):
    """The child was killed at its memory limit."""


class CpuLimitExceeded(ChildTerminated):
    """The child used up its CPU time."""


class PidsLimitExceeded(ChildTerminated):
    """The child reached its process limit and died of it."""


class OutputLimitExceeded(ChildTerminated):
    """The child died after its output limit was reached."""


class SyscallViolation(ChildTerminated):
    """The seccomp filter killed the child. ``syscall`` is known only where a listener watched."""

    def __init__(self, message: str, exit_info: ExitInfo, syscall: int | str | None = None) -> None:
        self.syscall = syscall
        super().__init__(message, exit_info)


class CallError(IsolationError):
    """A call failed while the child lives on (or was killed for this call's sake)."""


class RemoteError(CallError):
    """User code raised in the child. Text only: nothing the child sent was executed or rebuilt by name.

    ``type_name`` is the qualified name of the class in the child, ``message`` its text and
    ``remote_traceback`` the rendered traceback with the user's files and lines (capped at 64 KiB).
    For common builtin exceptions the raised object is also an instance of that builtin.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str = "") -> None:
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback
        super().__init__(type_name, message, remote_traceback)

    def __str__(self) -> str:
        text = f"{self.type_name}: {self.message}" if self.message else self.type_name
        return f"{text}\n\n{self.remote_traceback}" if self.remote_traceback else text


class CompileError(CallError):
    """The source does not compile: ``file``, ``line`` and the compiler's message."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        self.file = file
        self.line = line
        super().__init__(message)


class TargetNotFound(CallError, LookupError):
    """The module, or a part of the dotted target, does not exist in the child."""


class UnknownCallback(CallError, LookupError):
    """Code in the child called a function that the host has not registered, and did not handle that."""


class ObjectReleased(CallError):
    """The object is no more: it was released, or its child has ended."""


class CallTimeout(CallError, TimeoutError):
    """The deadline passed. The work is dead, not abandoned: the whole child was killed, and ``exit_info`` says what the
    kernel's counters know of it. None: the call was not begun.
    """

    exit_info: ExitInfo | None = None


class SerializationError(IsolationError):
    """A value that cannot cross: ``direction`` is "to child" or "from child"; the message names the part and the way out."""

    def __init__(self, message: str, *, direction: str) -> None:
        self.direction = direction
        super().__init__(message)


class ProtocolError(IsolationError):
    """The child broke the protocol. It has been killed."""


class RestartLimitReached(IsolationError):
    """The child crashed too often within the window of its RestartPolicy; the isolator has given up."""


class IsolatorClosed(IsolationError):
    """The isolator was closed (or belongs to another process: it does not survive a fork of the application)."""


def __getattr__(name: str) -> Any:
    if name != "CallCancelled":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pisupervisor.futures import CallCancelled

    return CallCancelled
