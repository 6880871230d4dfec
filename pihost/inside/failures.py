"""The answer to a call that came to nothing: what user code raised, or why it did not run."""

from __future__ import annotations

import os

from pihost import wire
from pihost.inside import callbacks, encode, objects, raised, resolve
from pihost.jsontext import dump

_HIDDEN = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "<frozen importlib")


class Unloadable(Exception):
    """Arguments or a closure that cannot be rebuilt here, most often for a module this child may not import."""


def unloadable(error: Exception) -> Exception:
    """What to raise where loading them has raised."""
    return error if issubclass(type(error), objects.Released) else Unloadable(f"{type(error).__name__}: {error}")


_REFUSALS: tuple[tuple[type[BaseException], str], ...] = (
    (encode.NotData, "not_data"),
    (objects.Released, "released"),
    (callbacks.UnknownCallback, "unknown_callback"),
)


def answer_to(error: BaseException) -> tuple[int, list[bytes]]:
    """(kind, parts) of the reply. Also to SystemExit and KeyboardInterrupt: they end the call, not the child."""
    kind = type(error)  # not isinstance, which asks the error itself, and its __class__ is user code
    if issubclass(kind, resolve.NotFound):
        return _refused("not_found", error, stage=error.stage)  # type: ignore[attr-defined]
    if issubclass(kind, resolve.CompileFailed):
        return _refused("compile", error, file=error.file, line=error.line)  # type: ignore[attr-defined]
    if issubclass(kind, Unloadable):
        cause = error.__cause__
        said = {} if cause is None else {"raised": raised.describe_exception(cause, _HIDDEN)}
        return _refused("unloadable", error, **said)
    for refusal, word in _REFUSALS:
        if issubclass(kind, refusal):
            return _refused(word, error)
    return wire.RAISED, [dump(raised.describe_exception(error, _HIDDEN))]


def _refused(kind: str, error: BaseException, **more: object) -> tuple[int, list[bytes]]:
    return wire.REFUSED, [dump({"kind": kind, "message": str(error)[:8192], **more})]
