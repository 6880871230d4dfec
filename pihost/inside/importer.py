"""Modules from bytes: an import finder over the files that the host sent. The child never sees the host's files.

A module's ``__file__`` and the files in its tracebacks are the host's paths; their text and the data files of a
package come through the loader (``linecache``, ``inspect``, ``pkgutil.get_data``, ``importlib.resources``).
"""

from __future__ import annotations

import builtins
import sys

# What the interpreter has loaded already; importlib.machinery offers the same after importing warnings.
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import PathFinder, SourceLoader, spec_from_file_location
from _thread import allocate_lock

TYPE_CHECKING = False  # importing typing costs 4 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import CodeType, ModuleType
    from typing import Any

    from pihost.inside.resources import Listing, Reader

    Payload = tuple[str, str, str, str, Iterable[tuple[str, bytes]]]


class CompileFailed(SyntaxError):
    """User code that does not compile: ``message`` (with the source line), ``file`` and ``line`` (None if unknown)."""

    def __init__(self, message: str, file: str, line: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.file = self.filename = file
        self.line = self.lineno = line

    def __str__(self) -> str:
        return self.message


class Unit:
    """What one payload brings: files by their path, and the names their modules are known by in this process."""

    def __init__(self, payload: Payload) -> None:
        self.key, self.kind, self.name, self.origin, files = payload
        self.files = dict(files)
        self.folders = {path[:end] for path in self.files for end in _slashes(path)}
        self.names: dict[str, str] = {}  #: top module as the user's imports write it -> its name in sys.modules
        self.builtins: dict[str, Any] | None = None  #: for units whose imports must be led to other names
        # The host's path of a file is base + path[cut:]: the origin itself, below it, or below its folder.
        self.base = self.origin + "/" if self.kind == "archive" else self.origin
        self.cut = {"file": len(self.name) + 3, "package": len(self.name)}.get(self.kind, 0)

    def tops(self) -> list[str]:
        """The modules and packages that can be imported without naming another one first."""
        if self.kind != "archive":
            return [self.name]
        modules = {path[:-3].partition("/")[0] for path in self.files if path.endswith(".py")}
        return sorted(name for name in modules if name.isidentifier())

    def find(self, module: str) -> str | None:
        """The file that makes ``module``; ``folder/`` for a package without ``__init__.py``; None if there is none."""
        base = module.replace(".", "/")
        for path in (base + "/__init__.py", base + ".py"):
            if path in self.files:
                return path
        return base + "/" if base in self.folders else None

    def host_path(self, path: str) -> str:
        return self.base + path[self.cut :]

    def read(self, host_path: str) -> bytes:
        """The bytes of the file that has this path on the host. Raises FileNotFoundError."""
        if not host_path.startswith(self.base):
            raise FileNotFoundError(2, "No such file in the code that was sent", host_path)
        lead = {"file": self.name + ".py", "package": self.name}.get(self.kind, "")
        path = lead + host_path[len(self.base) :]
        if path in self.files:
            return self.files[path]
        raise FileNotFoundError(2, "No such file in the code that was sent", host_path)


class Importer:
    """A finder for ``sys.meta_path``: the modules of the units registered with it."""

    def __init__(self) -> None:
        self.units: dict[str, tuple[Unit, str]] = {}  #: name in sys.modules -> unit, name in the unit
        self._lock = allocate_lock()

    def register(self, unit: Unit) -> None:
        """Give each top module its name, once: its own where that is free, else a private one such as ``plugin~2``."""
        with self._lock:
            if not unit.names:
                self._register(unit)

    def _register(self, unit: Unit) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
            sys.path_hooks.insert(0, self.list_folder)
        for top in unit.tops():
            unit.names[top] = name = _free_name(top)
            self.units[name] = (unit, top)
        # A file named json.py that imports json means the other one, a package or archive means its own.
        aliases = {top: name for top, name in unit.names.items() if top != name and unit.kind != "file"}
        if unit.kind == "package" and unit.name + "/__init__.py" not in unit.files:
            # Written to be run from inside the folder: its modules import each other without naming it.
            aliases.update(_siblings(unit))
        if aliases:
            unit.builtins = dict(vars(builtins), __import__=_leading_import(aliases))

    def remove(self) -> None:
        """Take this importer and all its modules out of the interpreter."""
        sys.meta_path.remove(self)
        sys.path_hooks.remove(self.list_folder)
        for name in list(sys.modules):
            if name.partition(".")[0] in self.units:
                del sys.modules[name]

    def find_spec(self, name: str, path: Sequence[str] | None = None, _target: object = None) -> ModuleSpec | None:
        top, dot, rest = name.partition(".")
        if top not in self.units:
            return None
        unit, real = self.units[top]
        file = unit.find(real + dot + rest)
        if file is None:
            return _find_extension(unit, real + dot + rest, name, path)
        return make_spec(unit, name, file)

    def list_folder(self, path: str) -> Listing:
        """For ``sys.path_hooks``: the modules in one of the packages. Raises ImportError for what is none."""
        for unit, _top in [*self.units.values()]:
            for folder in unit.folders:
                if path == unit.host_path(folder):
                    from pihost.inside.resources import Listing

                    return Listing(unit, folder)
        raise ImportError("no folder of the code that was sent", path=path)


class Loader(SourceLoader):
    """Loads one module of a unit. ``exec_module`` is the interpreter's own, so our frames are in no traceback."""

    def __init__(self, unit: Unit, file: str) -> None:
        self.unit = unit
        self.file = file

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if self.unit.builtins is None:
            return None
        module = type(sys)(spec.name)
        module.__dict__["__builtins__"] = self.unit.builtins
        return module

    def is_package(self, fullname: str) -> bool:  # noqa: ARG002
        return self.file.endswith(("/", "/__init__.py"))

    def get_filename(self, fullname: str = "") -> str:  # noqa: ARG002
        return self.unit.host_path(self.file)

    def get_data(self, path: str) -> bytes:
        # A package without __init__.py is an empty module.
        return b"" if self.file.endswith("/") and path == self.get_filename() else self.unit.read(path)

    def source_to_code(self, data: Any, path: Any = "<string>", *_more: Any, **_options: Any) -> CodeType:
        return compile_source(data, path)

    def get_resource_reader(self, fullname: str) -> Reader | None:
        if not self.is_package(fullname):
            return None
        from pihost.inside.resources import Reader

        return Reader(self.unit, self.file.rpartition("/")[0])


def make_spec(unit: Unit, name: str, file: str) -> ModuleSpec | None:
    """The import spec of the module ``name`` that ``file`` of ``unit`` makes."""
    loader: Any = Loader(unit, file)
    path = unit.host_path(file)
    folder = [path.rpartition("/")[0]] if loader.is_package(name) else None
    if file.endswith("/"):
        spec = ModuleSpec(name, loader, is_package=True)
        spec.submodule_search_locations = folder
        return spec
    return spec_from_file_location(name, path, loader=loader, submodule_search_locations=folder)


def compile_source(source: str | bytes, file: str) -> CodeType:
    """Compile a module's source; bytes may have a byte order mark and an encoding cookie. Raises CompileFailed."""
    try:
        return compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise compile_failed(error, source, file) from error


def compile_failed(error: Exception, source: str | bytes, file: str) -> CompileFailed:
    """What the compiler said, as one error that shows file, line and source text."""
    line = getattr(error, "lineno", None)
    text = getattr(error, "text", None) or _line_of(source, line)
    if isinstance(error, SyntaxError):
        error.text = text
    message = getattr(error, "msg", None) or str(error) or type(error).__name__
    where = f"{file}, line {line}" if line else file
    return CompileFailed(f"{where}: {message}" + (f"\n    {text.strip()}" if text else ""), file, line)


def _line_of(source: str | bytes, line: int | None) -> str | None:
    # Only the parser gives the text; for later errors the compiler would look into the file, which is not here.
    lines = source.splitlines()
    if not line or line > len(lines):
        return None
    text = lines[line - 1]
    return text if isinstance(text, str) else text.decode("utf-8", "replace")


def _slashes(path: str) -> list[int]:
    return [index for index, char in enumerate(path) if char == "/"]


def _free_name(top: str) -> str:
    """``top`` if nothing has that name and the standard library does not want it, else ``top~2`` or higher."""
    name, number = top, 1
    while name in sys.modules or _is_registered(name) or _is_stdlib(name):
        number += 1
        name = f"{top}~{number}"
    return name


def _is_registered(name: str) -> bool:
    return any(isinstance(finder, Importer) and name in finder.units for finder in sys.meta_path)


def _is_stdlib(name: str) -> bool:
    names = getattr(sys, "stdlib_module_names", None)
    if names is not None:
        return name in names
    import os  # Python 3.9 has no such list

    folder = os.path.dirname(os.__file__)
    return name in sys.builtin_module_names or bool(PathFinder.find_spec(name, [folder, folder + "/lib-dynload"]))


def _siblings(unit: Unit) -> dict[str, str]:
    folder = unit.name + "/"
    below = {path[len(folder) :] for path in unit.files if path.startswith(folder) and path.endswith(".py")}
    return {name: f"{unit.names[unit.name]}.{name}" for name in (path[:-3].partition("/")[0] for path in below)}


def _leading_import(aliases: dict[str, str]) -> Callable[..., Any]:
    """An ``__import__`` that leads absolute imports of a unit's own modules to the names they have here."""

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: A002
        top, dot, rest = name.partition(".")
        if level or top not in aliases:
            return builtins.__import__(name, globals, locals, fromlist, level)
        module = builtins.__import__(aliases[top] + dot + rest, globals, locals, fromlist, 0)
        return module if fromlist else sys.modules[aliases[top]]

    return import_


def _find_extension(unit: Unit, module: str, name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """A C extension cannot be made from bytes: it must lie where the child sees it. Raises ImportError that says so."""
    base = module.replace(".", "/") + "."
    if not any(file.startswith(base) and file.endswith(".so") for file in unit.files):
        return None
    spec = PathFinder.find_spec(name, path)
    if spec is None:
        message = (
            f"{module} is a C extension of {unit.origin}; give its folder with import_paths and call it by its name"
        )
        raise ImportError(message, name=name, path=unit.origin)
    return spec
