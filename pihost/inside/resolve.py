"""From the code that the host sent and a dotted target to something that can be called."""

from __future__ import annotations

import sys

from pihost.inside.importer import CompileFailed, Importer, Unit

TYPE_CHECKING = False  # importing typing costs 4 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FunctionType
    from typing import Any

    from pihost.inside.importer import Payload

    #: what is called, and where it was found: a namespace, a name in it and what that was; the names from there on, and what
    #: the last one was
    Found = tuple[Callable[..., Any], dict[str, Any], str, Any, list[str], Any]

__all__ = ["CompileFailed", "Library", "NotFound"]

#: what a refused import is to say; in the host's words too, where it tells of an exception
IMPORT_HINT = "modules come into the child through import_paths=[...] or modules=[...] at create()"

_MISSING: Any = object()
_MODULE: Any = type(sys)
_FUNCTION: Any = type(lambda: None)
# What classes and modules are made of, past whatever a metaclass or a subclass has to say to that.
_MRO: Any = type.__dict__["__mro__"].__get__
_CLASS_DICT: Any = type.__dict__["__dict__"].__get__
_MODULE_DICT: Any = _MODULE.__dict__["__dict__"].__get__


class NotFound(LookupError):
    """A part of the way to the target is missing; ``stage`` is "module", "attribute" or "callable"."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage

    def __str__(self) -> str:
        return str(self.args[0])


class Library:
    """The user's code in this child. A module is loaded once, by its first call, and keeps its state."""

    def __init__(self) -> None:
        self._units: dict[str, Unit] = {}
        self._found: dict[tuple[str, str, bool], Found] = {}
        self._importer = Importer()

    def add(self, payload: Payload) -> None:
        """Take code as ``Code.payload()`` gives it on the host. Code with the same key is already there."""
        if payload[0] not in self._units:
            self._units[payload[0]] = Unit(payload)

    def close(self) -> None:
        """Take its modules out of the interpreter."""
        self._importer.remove()

    def unit(self, key: str) -> Unit:
        """The code that was added under ``key``. Raises NotFound."""
        if key not in self._units:
            raise NotFound("module", f"code {key!r} was never sent to this child")
        return self._units[key]

    def callable_for(self, key: str, target: str) -> Callable[..., Any]:
        """What ``target`` ("func", "Class.method", "sub.module.func") names in the code ``key``.

        An instance method (first parameter ``self``) gets a new instance of its class for each call, made without
        arguments; any other function of a class is called as it is. In an archive the first part names a top module or
        package; it may be left out where there is only one. Raises NotFound, CompileFailed, and what the user's module
        raises while it is loaded.
        """
        return self.find(key, target)[0]

    def function_for(self, key: str, target: str) -> Callable[..., Any]:
        """The same without an instance made for it: what a class has under that name takes the object as its first
        argument. Raises what ``callable_for`` raises.
        """
        return self.find(key, target, bound=False)[0]

    def find(self, key: str, target: str, *, bound: bool = True) -> Found:
        """Both, and by what to tell whether it is still so: user code may have put something else in its module's place."""
        found = self._found.get((key, target, bound))
        if found is None or not is_still(found):
            found = self._found[key, target, bound] = self._resolve(self.unit(key), target, bound=bound)
        return found

    def _resolve(self, unit: Unit, target: str, *, bound: bool) -> Found:
        parts = target.split(".")
        if not all(part.isidentifier() for part in parts):
            raise NotFound("attribute", f"target {target!r} is no dotted name such as 'function' or 'Class.method'")
        where = unit.origin or unit.name
        if unit.kind == "module":
            module = _import_named(unit.name)
        else:
            self._importer.register(unit)  # not before: what only runs as a script must find its name free
            module = _load(unit.names[_top_of(unit, parts) if unit.kind == "archive" else unit.name])
        function = _walk(module, parts, where, bound)
        first = vars(module).get(parts[0], _MISSING)
        return function, vars(module), parts[0], first, parts[1:], _raw(first, parts[1:])


def is_still(found: Found) -> bool:
    """Whether a target is what it was. Looks without running anything of the user's."""
    _, namespace, name, first, rest, raw = found
    return namespace.get(name) is first and (not rest or (raw is not _MISSING and _raw(first, rest) is raw))


def _raw(value: Any, names: list[str]) -> Any:
    """What classes and modules have under these names, one in the other, as it stands there; else _MISSING."""
    for name in names:
        kind = type(value)
        spaces = map(_CLASS_DICT, _MRO(value)) if issubclass(kind, type) else ()
        for space in (_MODULE_DICT(value),) if issubclass(kind, _MODULE) else spaces:
            if name in space:
                value = space[name]
                break
        else:
            return _MISSING
    return value


def _load(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


def _import_named(name: str) -> Any:
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        # Only this module or a package around it; what is missing inside of it is the user's affair.
        if not error.name or not (name + ".").startswith(error.name + "."):
            raise
        loaded = (module for module in sys.modules if "~" not in module)
        known = {*getattr(sys, "stdlib_module_names", ()), *loaded}
        message = f"the child has no module {name!r}{_close(name, known)}\n  hint: {IMPORT_HINT}"
        raise NotFound("module", message) from None


def _top_of(unit: Unit, parts: list[str]) -> str:
    """The top module of an archive that the target starts from; its name is taken off ``parts`` if it is there."""
    tops = unit.tops()
    if parts[0] in tops and len(parts) > 1:
        return parts.pop(0)
    packages = [top for top in tops if (unit.find(top) or "").endswith("/__init__.py")]
    for only in (packages, tops):
        if len(only) == 1:
            return only[0]
    message = f"{unit.origin}: no top module or package {parts[0]!r}; the archive has {_some(tops)}"
    raise NotFound("callable" if parts[0] in tops else "module", message)


def method_of(owner: Any, name: str) -> Callable[..., Any]:
    """A method of an object that is kept here, whatever its name begins with. Raises NotFound."""
    found = _attribute(owner, name)
    if found is _MISSING:
        raise NotFound("attribute", f"{_label(owner)} has no {name!r}{_close(name, _names(owner))}")
    if not callable(found):
        raise NotFound(
            "callable", f"{name!r} of {_label(owner)} is of type {type(found).__name__}, which cannot be called"
        )
    return found  # type: ignore[no-any-return]


def _walk(owner: Any, parts: list[str], where: str, bound: bool = True) -> Callable[..., Any]:
    """Attributes first. Where they lead nowhere: a submodule (``run.run`` of a package with a function ``run`` too)."""
    head, rest = parts[0], parts[1:]
    failure = None
    found = _attribute(owner, head)
    if found is not _MISSING:
        try:
            return _walk(found, rest, where, bound) if rest else _callable(owner, head, found, where, bound)
        except NotFound as error:
            failure = error
    module = _submodule(owner, head)
    if module is None or module is found:
        raise failure or NotFound("attribute", f"{where}: {_label(owner)} has no {head!r}{_close(head, _names(owner))}")
    return _walk(module, rest, where, bound) if rest else _callable(owner, head, module, where, bound)


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        return _MISSING


def _submodule(owner: Any, name: str) -> Any:
    if not isinstance(owner, _MODULE) or not hasattr(owner, "__path__"):
        return None
    full = f"{owner.__name__}.{name}"
    try:
        return _load(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None


def _callable(owner: Any, name: str, found: Any, where: str, bound: bool = True) -> Callable[..., Any]:
    if isinstance(found, _MODULE):
        raise NotFound("callable", f"{where}: {name!r} is a module; name something in it: {_some(_names(found))}")
    if not callable(found):
        raise NotFound("callable", f"{where}: {name!r} is of type {type(found).__name__}, which cannot be called")
    if bound and isinstance(owner, type) and _wants_instance(owner, name):
        _check_constructor(owner, name, where)
        return _on_new_instance(owner, name)
    return found  # type: ignore[no-any-return]


def _wants_instance(owner: type, name: str) -> bool:
    """True for a method that takes ``self``; False for static and class methods and for functions kept in a class."""
    raw = next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), None)
    function = _unwrapped(raw)
    if function is None or isinstance(raw, (staticmethod, classmethod)):
        return False
    code = function.__code__
    if code.co_argcount:
        return code.co_varnames[0].lstrip("_") in ("self", "this", "")
    return bool(code.co_flags & 0x04)  # CO_VARARGS: a decorator's wrapper


def _unwrapped(raw: Any) -> FunctionType | None:
    for _ in range(100):  # a loop of __wrapped__ must not hold us
        inner = getattr(raw, "__wrapped__", None)
        if inner is None:
            break
        raw = inner
    return raw if type(raw) is _FUNCTION else None


def _check_constructor(owner: Any, name: str, where: str) -> None:
    label = f"{where}: {name!r} is an instance method of {owner.__qualname__}"
    if getattr(owner, "__abstractmethods__", None):
        raise NotFound(
            "callable", f"{label}, which is abstract: {_some(sorted(owner.__abstractmethods__))} not defined"
        )
    function = _unwrapped(vars(owner).get("__init__", getattr(owner, "__init__", None)))
    needed = _required(function) if function else []
    if needed:
        advice = "make it a staticmethod, or call a function that makes the instance"
        raise NotFound("callable", f"{label}, which cannot be made without {_some(needed)}; {advice}")


def _required(function: FunctionType) -> list[str]:
    """Parameters without a default, ``self`` left out."""
    code = function.__code__
    positional = code.co_varnames[1 : code.co_argcount - len(function.__defaults__ or ())]
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    return [*positional, *(name for name in keywords if name not in (function.__kwdefaults__ or {}))]


def _on_new_instance(owner: type, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(owner(), name)(*args, **kwargs)

    return call


def _label(owner: Any) -> str:
    if isinstance(owner, _MODULE):
        return f"module {owner.__name__.partition('~')[0]!r}"
    return f"class {owner.__qualname__!r}" if isinstance(owner, type) else f"the {type(owner).__name__}"


def _names(owner: Any) -> list[str]:
    return [name for name in dir(owner) if isinstance(name, str) and not name.startswith("__")]


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "") if shown else "nothing"


def _close(name: str, known: Iterable[str]) -> str:
    import difflib

    names = list(known)
    close = difflib.get_close_matches(name, names)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; it has {_some(names)}" if 0 < len(names) <= 50 else ""
