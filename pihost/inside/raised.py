"""Exceptions become data, next to hostile code: capped text and small numbers, nothing to be rebuilt by name."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

MAX_NAME = 200  # characters
MAX_MESSAGE = 8 << 10  # bytes of UTF-8, as all that follow
MAX_TRACEBACK = 64 << 10
MAX_FRAMES = 200  # the innermost ones
MAX_CAUSES = 8
MAX_CHAIN = 32  # exceptions in one rendered traceback

_CUT = " [cut]"
_NO_SITE = ". Site initialization is disabled"
_CAUSE, _CONTEXT = BaseException.__dict__["__cause__"], BaseException.__dict__["__context__"]
_TRACEBACK, _ERRNO = BaseException.__dict__["__traceback__"], OSError.__dict__["errno"]
_FILENAME, _LINENO = SyntaxError.__dict__["filename"], SyntaxError.__dict__["lineno"]
_MODULE, _QUALNAME = type.__dict__["__module__"], type.__dict__["__qualname__"]


def describe_exception(exc: BaseException, hide: tuple[str, ...]) -> dict[str, Any]:
    """``exc`` as plain JSON-able data, whatever it does when it is looked at (but for looping for ever).

    module, type, message   of its class, and its own; ``message`` at most 8 KiB
    traceback               rendered text, at most 64 KiB, with causes, contexts, notes and groups; frames in files
                            that start with a prefix in ``hide`` are left out
    errno                   int or None; only of an OSError
    file, line              str and int or None; only of a SyntaxError
    causes                  up to 8 times {module, type, message}: what it was raised ``from``, and so on
    """
    said = _said(exc)
    is_os, is_syntax = issubclass(type(exc), OSError), issubclass(type(exc), SyntaxError)
    file = _FILENAME.__get__(exc) if is_syntax else None
    return {
        **said,
        "traceback": clean(_rendered(exc, hide, said), MAX_TRACEBACK),
        "errno": _small(_ERRNO.__get__(exc)) if is_os else None,
        "file": clean(file, 4096) if type(file) is str else None,
        "line": _small(_LINENO.__get__(exc)) if is_syntax else None,
        "causes": [_said(cause) for cause in _causes(exc)],
    }


def class_name(kind: type) -> str:
    """``module.qualname`` of a class (no module for builtins), as the interpreter knows it."""
    module, name = _names(kind)
    return name if module == "builtins" else f"{module}.{name}"


def clean(text: str, cap: int) -> str:
    """``text`` as plain str without surrogates, in at most ``cap`` bytes of UTF-8."""
    text = str.__str__(text)
    data = text[: cap + 1].encode("utf-8", "backslashreplace")
    if len(data) <= cap:
        return data.decode("utf-8")
    return data[: cap - len(_CUT)].decode("utf-8", "ignore") + _CUT


def _names(kind: type) -> tuple[str, str]:
    """A metaclass cannot lie to these descriptors, or raise; the attributes themselves may still be anything."""
    try:
        parts = _MODULE.__get__(kind), _QUALNAME.__get__(kind)
    except AttributeError:  # type.__dict__["__module__"] looks into the class, which may have lost it
        parts = None, _QUALNAME.__get__(kind)
    module, name = (clean(part, MAX_NAME) if issubclass(type(part), str) else "?" for part in parts)
    return module, name


def _said(exc: BaseException) -> dict[str, Any]:
    module, name = _names(type(exc))
    return {"module": module, "type": name, "message": _message(exc)}


def _message(exc: BaseException) -> str:
    try:
        return clean(str(exc), MAX_MESSAGE)
    except BaseException as error:  # SystemExit too: what __str__ raises is the user's doing
        return f"[str() of it raised {class_name(type(error))}]"


def _causes(exc: BaseException) -> Iterator[BaseException]:
    seen = {id(exc)}
    cause = _CAUSE.__get__(exc)
    while cause is not None and id(cause) not in seen and len(seen) <= MAX_CAUSES:
        yield cause
        seen.add(id(cause))
        cause = _CAUSE.__get__(cause)


def _small(number: Any) -> int | None:
    return number if type(number) is int and -(1 << 31) <= number < 1 << 31 else None


def _rendered(exc: BaseException, hide: tuple[str, ...], said: dict[str, Any]) -> str:
    try:
        if _chain_length(exc) > MAX_CHAIN:
            return _plainly(exc, hide, said)
        import traceback

        whole = traceback.TracebackException(type(exc), exc, _TRACEBACK.__get__(exc), limit=-MAX_FRAMES)
        _trim(whole, hide)
        return "".join(whole.format())
    except BaseException:  # whatever its attributes did
        return _plainly(exc, hide, said)


def _chain_length(exc: BaseException) -> int:
    todo: list[Any] = [exc]
    seen: set[int] = set()
    while todo and len(seen) <= MAX_CHAIN:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            todo += [_CAUSE.__get__(one), _CONTEXT.__get__(one)]
    return len(seen)


def _trim(whole: Any, hide: tuple[str, ...]) -> None:
    """Leave out our own frames, and cut messages that would be written out once more in full."""
    todo, seen = [whole], set()
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if not frame.filename.startswith(hide)]
        text = getattr(one, "_str", None) or ""  # private, but the same from Python 3.9 to 3.15
        if _NO_SITE in text or len(text) > MAX_MESSAGE:
            one._str = clean(without_site(text), MAX_MESSAGE)
        todo += [one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())]


def without_site(text: str) -> str:
    """Without what traceback advises where a module is missing, from 3.15 on: a child has another way to get one."""
    return "\n".join(line.partition(_NO_SITE)[0] for line in text.split("\n")) if _NO_SITE in text else text


def _plainly(exc: BaseException, hide: tuple[str, ...], said: dict[str, Any]) -> str:
    """The innermost frames by hand, for exceptions that the traceback module cannot bear."""
    lines: list[str] = []
    step = _TRACEBACK.__get__(exc)
    while step is not None:
        code = step.tb_frame.f_code
        if not code.co_filename.startswith(hide):
            lines.append(f'  File "{code.co_filename}", line {step.tb_lineno}, in {code.co_name}\n')
            del lines[:-MAX_FRAMES]
        step = step.tb_next
    name = said["type"] if said["module"] in ("builtins", "__main__") else f"{said['module']}.{said['type']}"
    return "Traceback (most recent call last):\n" + "".join(lines) + f"{name}: {said['message']}\n"
