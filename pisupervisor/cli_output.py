"""What ``pisupervisor run`` shows: as text for people, or as one JSON object. A child's text never drives a terminal."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from pisupervisor.cli import Outcome

#: C0 (but tab and newline), DEL, C1, and the marks that reorder text or begin a line: what a terminal obeys instead of showing.
_OBEYED = [*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x200E, 0x200F]
_OBEYED += [*range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _OBEYED}
_DEEPEST = 200  # levels; what a child may send is not deeper, and json refuses about 1000


def show_text(outcome: Outcome, *, is_script: bool) -> None:
    """The target's own output on ours, then the result on stdout, or the error on stderr."""
    emit(sys.stdout, outcome.stdout)
    emit(sys.stderr, outcome.stderr)
    if outcome.truncated:
        emit(sys.stderr, "pisupervisor: note: the output was longer than the limit; the rest is lost\n")
    if outcome.error is not None:
        emit(sys.stderr, f"pisupervisor: error: {_message(outcome).rstrip()}\n")
    elif outcome.value is not None and not is_script:
        emit(sys.stdout, f"{shown(outcome.value)}\n")
    if "import_paths=[...]" in f"{outcome.stderr}{outcome.error}":
        emit(sys.stderr, "pisupervisor: note: on this command line: --import-path DIR, or --python VENV\n")


def show_json(outcome: Outcome, *, is_script: bool) -> None:
    """One object on stdout, with the same keys whatever happened but ``value`` or ``error``."""
    told: dict[str, Any] = {"ok": outcome.error is None}
    if outcome.error is None:
        told["exit_code" if is_script else "value"] = plain(outcome.value)
    else:
        told["error"] = _error_fields(outcome)
    told |= {
        "reason": outcome.reason, "code": outcome.code, "stdout": outcome.stdout, "stderr": outcome.stderr,
        "truncated": outcome.truncated, "duration": outcome.duration,
        "usage": {"cpu_time": outcome.cpu_time, "peak_memory": outcome.peak_memory},
    }  # fmt: skip
    sys.stdout.write(json.dumps(told, allow_nan=False) + "\n")
    sys.stdout.flush()


def emit(stream: TextIO, text: str) -> None:
    """Write ``text``: escaped where a terminal would obey it, and what the stream's encoding lacks in any case."""
    if stream.isatty():
        text = escaped(text)
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def escaped(text: str) -> str:
    """``text`` with what a terminal obeys (all control characters but tab and newline) made visible: ``\\x1b``."""
    return text.translate(_ESCAPES)


def shown(value: Any, text: Callable[[Any], str] = str) -> str:
    """``str(value)``, or what ``text`` makes of it; integers of more digits than Python converts are hexadecimal."""
    try:
        return text(value)
    except (ValueError, RecursionError) as error:  # the limit of sys.set_int_max_str_digits, maybe deep inside
        return hex(value) if isinstance(value, int) else f"<{type(value).__name__} that cannot be shown: {error}>"


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON has it: lists for tuples, text for keys, ``repr`` for all that JSON lacks."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and abs(value) < 1 << 1024:
        return value
    if type(value) in (list, tuple) and depth < _DEEPEST:
        return [plain(item, depth + 1) for item in value]
    if type(value) is dict and depth < _DEEPEST:
        return {
            key if isinstance(key, str) else shown(key, repr): plain(item, depth + 1) for key, item in value.items()
        }
    return shown(value, repr)


def _error_fields(outcome: Outcome) -> dict[str, Any]:
    error = outcome.error
    known = ("type_name", "message", "remote_traceback", "remedy", "feature", "step", "errno", "file", "line")
    named = {name: found for name in known if isinstance(found := getattr(error, name, None), (str, int))}
    return {"type": _kind(error), **named, "message": named.get("message") or _message(outcome)}


def _kind(error: BaseException | None) -> str:
    """The name that users know: the classes that are a builtin exception too are all called RemoteError."""
    kinds = (kind for kind in type(error).__mro__ if kind.__module__ in ("pisupervisor.errors", "builtins"))
    return next(kinds).__name__


def _message(outcome: Outcome) -> str:
    """The error's text. The library's errors end with their remedy where there is one."""
    if isinstance(outcome.error, KeyboardInterrupt):
        return "interrupted; the child was ended"
    hint = (
        "\n          on this command line: --degrade NAME, for each such name"
        if outcome.reason == "unavailable"
        else ""
    )
    return f"{outcome.error}{hint}"
