"""What else a package that came as bytes is asked for: its data files by ``importlib.resources``, its modules by ``pkgutil``."""

from __future__ import annotations

import io

TYPE_CHECKING = False  # importing typing costs 4 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pihost.inside.importer import Unit


class Reader:
    """The resources of the package in ``folder`` of ``unit``."""

    def __init__(self, unit: Unit, folder: str) -> None:
        self._folder = Entry(unit, folder)

    def files(self) -> Entry:
        return self._folder

    # The rest is what Python 3.9 asks for.
    def open_resource(self, resource: str) -> io.BytesIO:
        return io.BytesIO(self._folder.joinpath(resource).read_bytes())

    def resource_path(self, resource: str) -> str:
        raise FileNotFoundError(2, "Only in memory", resource)  # importlib.resources then makes a temporary file

    def is_resource(self, resource: str) -> bool:
        return self._folder.joinpath(resource).is_file()

    def contents(self) -> Iterator[str]:
        return (entry.name for entry in self._folder.iterdir())


class Listing:
    """The modules in ``folder`` of ``unit``, as ``pkgutil.iter_modules`` and ``walk_packages`` list them."""

    def __init__(self, unit: Unit, folder: str) -> None:
        self._unit, self._folder = unit, folder

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        for entry in Entry(self._unit, self._folder).iterdir():
            is_package = entry.joinpath("__init__.py").is_file()
            name = entry.name if is_package else entry.name[:-3] if entry.name.endswith(".py") else ""
            if name.isidentifier() and name != "__init__":
                yield prefix + name, is_package

    def find_spec(self, _name: str, _target: object = None) -> None:
        return None  # that is the importer's business


class Entry:
    """A file or folder of a unit, with the methods of ``importlib.abc.Traversable``."""

    def __init__(self, unit: Unit, path: str) -> None:
        self._unit = unit
        self._path = path
        self.name = path.rpartition("/")[2]

    def __str__(self) -> str:
        return self._unit.host_path(self._path)

    def __truediv__(self, child: str) -> Entry:
        return self.joinpath(child)

    def joinpath(self, *children: str) -> Entry:
        parts = [part for child in children for part in str(child).split("/") if part not in ("", ".")]
        return Entry(self._unit, "/".join([self._path, *parts]))

    def is_file(self) -> bool:
        return self._path in self._unit.files

    def is_dir(self) -> bool:
        return self._path in self._unit.folders

    def iterdir(self) -> Iterator[Entry]:
        start = len(self._path) + 1
        below = [path for path in [*self._unit.files, *self._unit.folders] if path.startswith(self._path + "/")]
        return iter([self.joinpath(name) for name in sorted({path[start:].partition("/")[0] for path in below})])

    def read_bytes(self) -> bytes:
        if self._path not in self._unit.files:
            raise FileNotFoundError(2, "No such file in the code that was sent", str(self))
        return self._unit.files[self._path]

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        with io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding or "utf-8", errors=errors) as text:
            return text.read()

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = io.BytesIO(self.read_bytes())
        return stream if "b" in mode else io.TextIOWrapper(stream, *args, **kwargs)
