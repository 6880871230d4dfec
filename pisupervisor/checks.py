"""What an option may be, and what may be said with one call. A check returns what is kept of the value, where that is not the
value itself, and raises OptionsError for what it must not be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from pisupervisor.errors import OptionsError, ProfileError
from pisupervisor.limits.sizes import parse_size

TYPE_CHECKING = False  # typing costs 2 ms of a program's start; type checkers know this name
if TYPE_CHECKING:
    from typing import Any

LONGEST = 2e6  #: seconds, 23 days: the longest wait that poll(2) takes
#: places in the child's tree where nothing of the host's can be shown, and those that cannot be made writable
_LONGEST_VARIABLE = 1 << 17  # MAX_ARG_STRLEN: with its name, "=" and the 0 at the end
_OURS = frozenset(("/", "/proc", "/dev", "/tmp", "/usr", "/etc", "/sys", "/py", "/pis"))
_NO_OVERLAY = frozenset(("/", "/proc", "/dev", "/tmp", "/sys", "/py", "/pis"))


# --- numbers and words ------------------------------------------------------------------------------------------------


def size_or_none(value: int | str | None, name: str) -> int | None:
    return None if value is None else parse_size(value, name)


def number(value: float | None, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise OptionsError(f"{name}: {value!r} is not a number from {low:g} to {high:g}")
    return float(value)


def number_or_none(value: float | None, name: str, low: float, high: float) -> float | None:
    return None if value is None else number(value, name, low, high)


def count(value: int | None, name: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionsError(f"{name}: {value!r} is not a whole number from {low} to {high}")


def count_or_none(value: int | None, name: str, low: int, high: int) -> None:
    if value is not None:
        count(value, name, low, high)


def choice(value: object, name: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionsError(f"{name}: {value!r} is none of {', '.join(map(repr, allowed))}")


def sequence(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Sequence):
        raise OptionsError(f"{name}: expected a list, not {value!r}")
    return value


def strings(value: Any, name: str) -> tuple[str, ...]:
    items = tuple(sequence(value, name))
    if not all(isinstance(item, str) and item for item in items):
        raise OptionsError(f"{name}: expected non-empty strings, not {items!r}")
    return items


def environment(value: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise OptionsError(f"environment: expected a mapping, not {value!r}")
    for key, text in value.items():
        if not _is_variable(key, text):
            why = "cannot be an environment variable" if isinstance(text, str) else "is no text"
            raise OptionsError(f"environment: {key!r}={text!r} {why}"[:300])
        if len(os.fsencode(key + text)) + 2 > _LONGEST_VARIABLE:
            raise OptionsError(f"environment: {key[:100]!r} is longer than the kernel takes, {_LONGEST_VARIABLE} bytes")
    return dict(value)


def variable_names(value: Any, name: str) -> tuple[str, ...]:
    names = strings(value, name)
    for each in names:
        if not _is_variable(each, ""):
            raise OptionsError(f"{name}: {each!r} cannot be the name of an environment variable")
    return names


def _is_variable(name: Any, text: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(text, str)
        and bool(name)
        and "=" not in name
        and _is_encodable(name + text)
    )


def _is_encodable(text: str) -> bool:
    """Whether execve takes it."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeError:
        return False


def log_level(value: str | None) -> str:
    level = value or os.environ.get("PISUPERVISOR_LOG_LEVEL") or "WARNING"
    level = level.upper() if isinstance(level, str) else level
    choice(level, "log_level", ("DEBUG", "INFO", "WARNING", "ERROR"))
    return level


# --- paths ------------------------------------------------------------------------------------------------------------


def path(value: Any, name: str) -> str:
    """What a file can be called."""
    try:
        text = os.fspath(value)
        encoded = os.fsencode(text)
    except (TypeError, UnicodeError):
        raise OptionsError(f"{name}: expected a path, not {value!r}") from None
    if not isinstance(text, str) or not text or b"\0" in encoded:
        raise OptionsError(f"{name}: expected a path, not {value!r}")
    return text


def absolute(named: str) -> str:
    """A path from the top. Raises OptionsError where it is relative and the application's working directory is gone."""
    try:
        return os.path.abspath(named)
    except FileNotFoundError:
        raise OptionsError(f"{named!r} is relative to a working directory that is gone; give it from the top") from None


def existing(paths: Any, name: str) -> tuple[str, ...]:
    found = tuple(absolute(path(each, name)) for each in sequence(paths, name))
    for each in found:
        if not os.path.exists(each):
            raise OptionsError(f"{name}: {each} does not exist")
        if each != "/usr":  # which is there anyway
            _check_place(each, name)
    return found


def _check_place(target: str, name: str) -> None:
    """Raises OptionsError where something of the child's own is."""
    if not target.startswith("/") or target in _OURS or target.startswith(("/proc/", "/dev/", "//")):
        raise OptionsError(f"{name}: cannot show anything at {target!r} in the child")


def bind(entry: Any, name: str) -> tuple[str, str]:
    source, target = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
    try:
        source, target = path(source, name), target if target is None else os.path.normpath(path(target, name))
    except OptionsError:
        raise OptionsError(f"{name}: expected a path or (host path, path in the child), not {entry!r}") from None
    source = absolute(source)
    target = target or source
    if not os.path.exists(source):
        raise OptionsError(f"{name}: {source} does not exist on the host")
    _check_place(target, name)
    return source, target


def rootfs(folder: Any) -> str | None:
    if folder is None:
        return None
    root = os.path.realpath(absolute(path(folder, "rootfs")))
    if not os.path.isdir(root) or root == "/":
        raise OptionsError(f"rootfs: {root} is no folder with a root file system in it")
    return root


def overlay(paths: Any) -> tuple[str, ...]:
    found = tuple(path(place, "overlay") for place in sequence(paths, "overlay"))
    for place in found:
        normal = place.startswith("/") and os.path.normpath(place) == place
        if not normal or place.startswith("//") or "/" + place.split("/")[1] in _NO_OVERLAY or ":" in place:
            raise OptionsError(f"overlay: {place!r} is no folder in the child that can be written to")
        if any(other != place and place.startswith(other + "/") for other in found) or found.count(place) > 1:
            raise OptionsError(f"overlay: {place!r} is named twice, or lies below another one")
    return found


def cgroup(folder: Any) -> str | None:
    if folder is None:
        return None
    try:
        group = os.path.normpath(os.fspath(folder))
    except TypeError:
        raise OptionsError(f"cgroup: expected a path such as '/sys/fs/cgroup/mine', not {folder!r}") from None
    if not isinstance(group, str) or not os.path.isfile(f"{group}/cgroup.controllers"):
        raise OptionsError(f"cgroup: {folder} is no group of cgroup v2; make one, as root: mkdir /sys/fs/cgroup/mine")
    return group


# --- what the caller has made -----------------------------------------------------------------------------------------


def functions(events: object, on_start: object) -> None:
    if on_start is not None and not callable(on_start):
        raise OptionsError(f"on_start: expected a function without parameters, not {on_start!r}")
    if events is not None:
        from pisupervisor.events import IsolationEvents  # only for those who ask for events: it costs 2 ms

        if not isinstance(events, IsolationEvents):
            raise OptionsError(f"events: expected IsolationEvents(...), not {events!r}")


def types(value: Any, results: object) -> Any:
    """What may come back, and what turns it into bytes."""
    if value == () and results in ("data", "pickle"):
        return value
    from pisupervisor.codecs import check_results, check_types

    check_results(results)
    return check_types(value)


def loaders(value: Any) -> tuple[Any, ...]:
    found = tuple(sequence(value, "modules"))
    if found:
        from pisupervisor.modules import check_loader

        found = tuple(check_loader(loader) for loader in found)
    return found


def profile(value: Any) -> None:
    """Whether it can be one; what is in it is looked at when it is used."""
    # Whoever has one has imported it; another thread may be just about to.
    kind = getattr(sys.modules.get("pisupervisor.launch.seccomp"), "SeccompProfile", type(None))
    if not isinstance(value, (str, os.PathLike, type(None), kind)):
        raise ProfileError(f"seccomp: expected a name, a path or a SeccompProfile, not {value!r}"[:300])


# --- with one call ----------------------------------------------------------------------------------------------------


def check_timeout(value: float) -> float:
    """The ``timeout`` of one call in seconds. Raises OptionsError for what is no time."""
    number(value, "timeout", 0.0, LONGEST)
    return value


def merged(keywords: dict[str, Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of a call, with those that ``kwargs`` brings. Raises OptionsError for what is no mapping, and for
    a name that is in both.
    """
    if kwargs is None:
        return keywords
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise OptionsError(f"kwargs: expected a dict with names as keys, not {kwargs!r}"[:300])
    if twice := [name for name in kwargs if name in keywords]:
        raise OptionsError(f"kwargs: {twice[0]!r} is given as a keyword argument, too; give it once"[:300])
    return {**keywords, **kwargs}


def split_target(text: str) -> tuple[str, str]:
    """``"plugin.py:Tools.shrink"`` -> ("plugin.py", "Tools.shrink"). Raises OptionsError where one of them is missing."""
    path, _, target = text.rpartition(":")
    if not path or not target:
        raise OptionsError(f"{text!r} is no target; write it as 'plugin.py:function' or 'module:Class.method'"[:300])
    return path, target


def check_argv(argv: Sequence[str], name: str) -> list[str]:
    """What a script of that name finds as its arguments. Raises OptionsError for one text alone, which would be taken apart, for
    what is none, and for text that no process can be started with.
    """
    if isinstance(argv, str) or not isinstance(argv, Sequence) or not all(isinstance(each, str) for each in argv):
        raise OptionsError(f'argv: expected a list of texts such as ["--fast"], not {argv!r}'[:300])
    for each in argv:
        if not _is_encodable(each):
            raise OptionsError(
                f"argv: {each!r:.200} cannot be an argument: no process takes a NUL or half a surrogate pair"
            )
    return [str.__str__(each) for each in (name, *argv)]  # a StrEnum is none in the child


def check_stdin(stdin: object, idempotent: bool) -> object:
    """What a script reads, as it travels: bytes, or something open, which no other child can read again. Raises OptionsError."""
    if isinstance(stdin, str):
        try:
            return stdin.encode("utf-8", "surrogateescape")  # as the child's stdin decodes it
        except UnicodeEncodeError as error:
            raise OptionsError(f"stdin: {error}") from None
    if isinstance(stdin, (bytes, bytearray, memoryview)):
        return bytes(stdin)
    try:
        stdin.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # the last two: of a StringIO, or of a file that is closed
        why = f"stdin: expected text, bytes, or an open file, pipe or socket, not {stdin!r}"
        raise OptionsError(why[:300]) from None
    if idempotent:
        raise OptionsError(
            "stdin: what a child has read is gone for the next one; give text or bytes, or leave idempotent out"
        )
    return stdin
