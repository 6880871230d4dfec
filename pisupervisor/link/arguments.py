"""Calls to the child: arguments by pickle, and by cloudpickle where code has to travel with them.

Host to child only, so pickle is safe here: the child trusts the host. What the child can import travels by reference,
the rest of the application's own code by value. Nothing of cloudpickle's global registry stays changed.
"""

from __future__ import annotations

import _pickle as pickle  # the C part alone: pickle imports re, 4 ms in all
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import _CacheInfo, _lru_cache_wrapper, cache, cached_property
from threading import RLock
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType

from pisupervisor.errors import ObjectReleased, SerializationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    NewSheet = Callable[[], Any]  # makes what one pickle is written to: see ``InBand``

PROTOCOL = 5  # Python 3.8 and later load it
Importable = Callable[[str], bool]

_OURS = frozenset(("pihost", "cloudpickle"))
_CODE = (FunctionType, BuiltinFunctionType, type, ModuleType, _lru_cache_wrapper)
_registry_lock, _lock_owner = RLock(), os.getpid()  # cloudpickle's registry belongs to the process


def child_importable(import_paths: Iterable[str | os.PathLike[str]], stdlib: Iterable[str] | None = None) -> Importable:
    """Whether a module name can be imported in a child that has these folders, zips or wheels on its path.

    The paths are listed once, when the first name outside the standard library is asked for.
    """
    builtin = _standard_library() if stdlib is None else _OURS | frozenset(stdlib)
    paths = [os.fspath(path) for path in import_paths]

    @cache
    def found() -> frozenset[str]:
        return frozenset(name.partition(".")[0] for path in paths for name in _top_names(path))

    def importable(module: str) -> bool:
        top = module.partition(".")[0]
        return top in builtin or (bool(paths) and top in found())

    return importable


@cache
def _standard_library() -> frozenset[str]:
    return _OURS | sys.stdlib_module_names


def _holds_modules(folder: str, depth: int = 3) -> bool:
    """Whether a folder is a package, or a namespace around some: one with nothing but data (as an editable install leaves
    behind) can be imported, and is empty.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return False
    if any(entry.name.endswith((".py", ".so", ".pyc")) for entry in entries):
        return True
    return depth > 1 and any(entry.is_dir() and _holds_modules(entry.path, depth - 1) for entry in entries)


def _top_names(path: str) -> Iterator[str]:
    """Names directly below a folder or in an archive: ``numpy``, ``six.py``, ``_speed.cpython-311-x86_64.so``."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            yield from (entry.name for entry in entries if not entry.is_dir() or _holds_modules(entry.path))
    elif os.path.isfile(path):
        import zipfile

        try:
            with zipfile.ZipFile(path) as archive:
                yield from (name.partition("/")[0] for name in archive.namelist())
        except (OSError, zipfile.BadZipFile):
            return  # the child will say that it cannot import from it


_stdlib_only = child_importable(())


def dump_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    importable: Importable | None = None,
    python_minor_matches: bool = True,
) -> tuple[bytes, bool]:
    """``(args, kwargs)`` as a pickle, and whether the child needs cloudpickle to load it.

    ``importable`` says which modules the child has (default: the standard library). Raises SerializationError, with
    direction "to child", for what cannot travel.
    """
    written, by_value = write_call(InBand, args, kwargs, importable or _stdlib_only, python_minor_matches)
    return written.payload(), by_value


def write_call(
    new: NewSheet, args: tuple[Any, ...], kwargs: dict[str, Any], importable: Importable, python_minor_matches: bool
) -> tuple[Any, bool]:
    """The same written to a sheet that ``new`` makes; ``Attachments`` take what is better not in the pickle."""
    try:
        return _dump_plain((args, kwargs), importable, new), False
    except (ObjectReleased, SerializationError):
        raise
    except Exception as error:  # our signal, or what pickle and the values' own __reduce__ raise
        if not python_minor_matches:
            raise _refusal(_dump_plain, importable, new, _labelled(args, kwargs), error) from error
    return _dump_by_value((args, kwargs), importable, new, lambda: _labelled(args, kwargs)), True


def dump_function(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], importable: Importable
) -> bytes:
    """``(fn, args, kwargs)`` for a child that has cloudpickle and this minor version of Python.

    Functions, classes and modules that the child cannot import travel by value. Raises SerializationError as above.
    """
    data: bytes = write_function(InBand, fn, args, kwargs, importable).payload()
    return data


def write_function(
    new: NewSheet, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], importable: Importable
) -> Any:
    """The same written to a sheet that ``new`` makes."""

    def labelled() -> list[tuple[str, Any]]:
        return [*_labelled_function(fn), *_labelled(args, kwargs)]

    return _dump_by_value((fn, args, kwargs), importable, new, labelled)


class InBand:
    """What a pickler writes to, where all has to be in the pickle."""

    buffer = None  # pickle's buffer_callback

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.write = self.parts.append

    def reduce(self, _obj: Any) -> Any:
        return NotImplemented

    def payload(self) -> bytes:
        return b"".join(self.parts)


class _NeedsCode(Exception):
    """Code that the child cannot import: plain pickle would only name it."""

    def __str__(self) -> str:
        return "its code is not in the child, and could travel only to the same minor version of Python"


class _PlainPickler(pickle.Pickler):
    """The C pickler; ``reducer_override`` is asked only for what is not a builtin value, so plain data stays fast."""

    def __init__(self, sheet: Any, importable: Importable) -> None:
        super().__init__(sheet, PROTOCOL, buffer_callback=sheet.buffer)
        self.sheet, self.importable = sheet, importable

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _CODE):
            return self.sheet.reduce(obj)
        if not self.importable(_module_of(obj)):
            raise _NeedsCode
        return NotImplemented


def _dump_plain(value: Any, importable: Importable, new: NewSheet) -> Any:
    sheet = new()
    _PlainPickler(sheet, importable).dump(value)
    return sheet


def _module_of(obj: Any) -> str:
    name = getattr(obj, "__name__" if isinstance(obj, ModuleType) else "__module__", None)
    return name if isinstance(name, str) else "builtins"


@cache
def _value_pickler() -> Any:
    """The class, made when first needed: cloudpickle takes 15 ms to import."""
    from weakref import WeakKeyDictionary

    import cloudpickle

    class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self, sheet: Any, importable: Importable, registered: list[ModuleType]) -> None:
            super().__init__(sheet, PROTOCOL, buffer_callback=sheet.buffer)
            self.sheet, self.importable, self.registered = sheet, importable, registered

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, _CODE):
                self.claim(_module_of(obj))
                if isinstance(obj, _lru_cache_wrapper) and not self.importable(_module_of(obj)):
                    return _reduce_cached(obj)
            elif isinstance(obj, CodeType):
                return _reduce_code(obj)
            elif type(obj).__module__ == "msgspec._core" and type(obj).__name__.endswith(("Info", "Lookup")):
                return type(None), ()  # what ``returns=`` made msgspec keep on the class; each side makes its own
            elif isinstance(obj, cached_property):
                return _reduce_property(obj)
            elif type(obj) is WeakKeyDictionary and all(isinstance(key, type) for key in obj):
                return WeakKeyDictionary, (dict(obj),)  # what a functools.singledispatch function has found so far
            else:
                reduced = self.sheet.reduce(obj)
                if reduced is not NotImplemented:
                    return reduced
            return super().reducer_override(obj)

        def claim(self, name: str) -> None:
            module = sys.modules.get(name)
            if module is None or name == "__main__" or self.importable(name) or module in self.registered:
                return
            if _is_compiled(name.partition(".")[0]):
                raise _Missing(name.partition(".")[0])
            if name not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                self.registered.append(module)

    return ValuePickler


def _reduce_code(code: CodeType) -> Any:
    """Whole, for the same minor version reads it: cloudpickle (from 3.1.3 on) leaves out the name of the file, which the
    user's tracebacks are to show.
    """
    import marshal

    try:
        return marshal.loads, (marshal.dumps(code),)
    except ValueError:  # constants that somebody has put into it
        return NotImplemented


def _reduce_cached(cached: Any) -> Any:
    """A function behind ``functools.cache``, its cache empty: pickle and cloudpickle would only name it."""
    return _lru_cache_wrapper, (cached.__wrapped__, *cached.cache_parameters().values(), _CacheInfo), vars(cached)


def _reduce_property(cached: Any) -> Any:
    """Without the lock that it has before Python 3.12, which no pickle can carry."""
    state = {name: value for name, value in vars(cached).items() if name != "lock"}
    return type(cached), (cached.func,), state


class _Missing(Exception):
    """A package with compiled parts, which no pickle can carry."""

    def __str__(self) -> str:
        name = self.args[0]
        package, _, file = str(getattr(sys.modules.get(name), "__file__", "")).rpartition("/")
        folder = repr(os.path.dirname(package)) if file == "__init__.py" else "..."
        return f"the package {name!r} has compiled parts, so it must be in the child: import_paths=[{folder}]"


def _is_compiled(top: str) -> bool:
    from importlib.machinery import EXTENSION_SUFFIXES

    own = [module for name, module in list(sys.modules.items()) if name == top or name.startswith(top + ".")]
    return any(str(getattr(module, "__file__", None)).endswith(tuple(EXTENSION_SUFFIXES)) for module in own)


def _dump_by_value(
    value: Any, importable: Importable, new: NewSheet, labelled: Callable[[], list[tuple[str, Any]]]
) -> Any:
    try:
        return _dump_registered(value, importable, new)
    except (ObjectReleased, SerializationError):
        raise
    except Exception as error:  # pickle raises whatever the values' own __reduce__ raises
        raise _refusal(_dump_registered, importable, new, labelled(), error) from error


def _dump_registered(value: Any, importable: Importable, new: NewSheet) -> Any:
    import cloudpickle

    registered: list[ModuleType] = []
    sheet = new()
    with _own_registry_lock():
        try:
            _value_pickler()(sheet, importable, registered).dump(value)
        finally:
            for module in registered:
                cloudpickle.unregister_pickle_by_value(module)
    return sheet


def _own_registry_lock() -> Any:
    """A fork of the application gets another: who held this one may be a thread that it has not."""
    global _registry_lock, _lock_owner
    if _lock_owner != os.getpid():
        _registry_lock, _lock_owner = RLock(), os.getpid()
    return _registry_lock


def _labelled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        *((f"argument {number}", value) for number, value in enumerate(args, 1)),
        *((f"argument {name!r}", value) for name, value in kwargs.items()),
    ]


def _labelled_function(fn: Any) -> list[tuple[str, Any]]:
    """What a function drags along comes before itself: the variable is the better answer."""
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    if not isinstance(fn, FunctionType):
        return [(f"the callable {name}", fn)]
    captured = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    free = [(key, content) for key, cell in captured.items() for content in _content(cell)]
    used = [(key, fn.__globals__[key]) for key in fn.__code__.co_names if key in fn.__globals__]
    return [
        *((f"{key!r}, used by the function {name}", value) for key, value in free + used),
        (f"the function {name}", fn),
    ]


def _content(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not yet assigned
        return []


def _refusal(
    dump: Callable[[Any, Importable, NewSheet], Any], importable: Importable, new: NewSheet,
    labelled: list[tuple[str, Any]], error: Exception,
) -> SerializationError:  # fmt: skip
    """The error that names the first part which does not travel on its own."""
    what, why = "the call as a whole", str(error)
    for label, value in labelled:
        try:
            dump(value, importable, new)
        except Exception as own:  # its text alone is kept: the error's traceback holds this frame
            what, why = f"{label} (<{type(value).__module__}.{type(value).__qualname__}>)", str(own)
            break
    return SerializationError(
        f"{what} cannot be sent to the child: {why[:500]}\n"
        "  send plain data, or make the thing inside the child (in the function itself, or with create_object)",
        direction="to child",
    )
