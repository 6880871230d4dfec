"""What a child may import beside the standard library and ``import_paths``: its source comes from loaders of the host, asked in
order; the first that knows a name gives it. Nothing that no loader knows can be imported.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pisupervisor.checks import absolute
from pisupervisor.errors import OptionsError

MAX_SOURCE = 16 << 20  #: bytes of one module
_KEPT = 4 << 20  # bytes of a zip's modules

Find = Callable[[str], "Source | None"]


class Source(NamedTuple):
    """``origin`` is where tracebacks say it stands."""

    text: bytes
    origin: str
    is_package: bool


class Modules:
    """``loaders``: folders and zips, looked into by name, or functions from a dotted name to source text, bytes or None."""

    def __init__(self, loaders: Sequence[object]) -> None:
        self._finders = [_finder(loader) for loader in loaders]

    def find(self, name: str) -> Source | None:
        """The source of a module; None where no loader has it. Raises what a loader raises."""
        if not name or len(name) > 1000 or not all(part.isidentifier() for part in name.split(".")):
            return None  # what is no module's name could be a path
        for find in self._finders:
            found = find(name)
            if found is not None:
                if len(found.text) > MAX_SOURCE:
                    raise OptionsError(f"modules: {name} has {len(found.text)} bytes, {MAX_SOURCE} are allowed")
                return found
        return None

    def has(self, name: str) -> bool:
        """Whether any loader knows the module. One that raises is asked again, and heard, when the child imports it."""
        try:
            return self.find(name) is not None
        except Exception:
            return False

    def answer(self, name: bytes) -> bytes | None:
        """For the child."""
        found = self.find(name.decode("utf-8", "replace"))
        if found is None:
            return None
        return b"\0".join(
            (b"p" if found.is_package else b"m", found.origin.encode("utf-8", "surrogateescape"), found.text)
        )


def check_loader(loader: object) -> object:
    """A loader as it is kept in the options: paths absolute. Raises OptionsError for what is none."""
    if callable(loader):
        return loader
    try:
        named = os.fsdecode(os.fsencode(loader))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise OptionsError(f"modules: expected folders, zips or functions, not {loader!r}") from None
    path = absolute(named)
    if "\0" in path or not (os.path.isdir(path) or zipfile.is_zipfile(path)):
        raise OptionsError(f"modules: {path} is neither a folder nor a zip")
    return path


def _finder(loader: object) -> Find:
    if callable(loader):
        return lambda name: _from_function(loader, name)
    path = str(loader)
    return (lambda name: _from_folder(path, name)) if os.path.isdir(path) else _Archive(path).find


def _places(name: str) -> tuple[tuple[str, bool], ...]:
    base = name.replace(".", "/")
    return (f"{base}/__init__.py", True), (f"{base}.py", False)


def _from_folder(folder: str, name: str) -> Source | None:
    for place, is_package in _places(name):
        path = os.path.join(folder, place)
        if os.path.isfile(path):
            return Source(_read_below(folder, path), path, is_package)
    return None


def _read_below(folder: str, path: str) -> bytes:
    """Of a file that may have been put there by somebody who may not read what the host may. Raises OptionsError for what
    leads out of the folder, by whatever link on the way, or has become no file.
    """
    # O_NONBLOCK: a FIFO put there since must not hang.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        real = os.readlink(f"/proc/self/fd/{file.fileno()}")  # of what is open: nobody can change that any more
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OptionsError(f"modules: {path} is not a regular file")
        if not real.startswith(os.path.realpath(folder).rstrip("/") + "/"):
            raise OptionsError(f"modules: {path} leads out of its folder, to {real}; put the file itself there")
        return file.read(MAX_SOURCE + 1)


class _Archive:
    """A zip. Its list of names is read once, and again when the file has changed, and so are sources that are not large: reading
    them takes the host milliseconds, and a child may ask ten thousand times a second.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._known: tuple[object, frozenset[str], dict[str, Source]] = (None, frozenset(), {})

    def find(self, name: str) -> Source | None:
        _stamp, names, kept = self._current()
        place, is_package = next((each for each in _places(name) if each[0] in names), ("", False))
        if not place or place in kept:
            return kept.get(place)
        with zipfile.ZipFile(self._path) as opened, opened.open(place) as file:
            found = Source(file.read(MAX_SOURCE + 1), f"{self._path}/{place}", is_package)
        sizes = [len(source.text) for source in [*kept.values()]]  # copied first: another thread may add one
        if len(found.text) + sum(sizes) <= _KEPT:
            kept[place] = found
        return found

    def _current(self) -> tuple[object, frozenset[str], dict[str, Source]]:
        status = os.stat(self._path)
        stamp = status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino
        if self._known[0] != stamp:
            with zipfile.ZipFile(self._path) as opened:
                self._known = stamp, frozenset(opened.namelist()), {}
        return self._known


def _from_function(loader: Callable[[str], object], name: str) -> Source | None:
    """Such a module may have others below it: they are asked for like any other."""
    found = loader(name)
    if found is None:
        return None
    if not isinstance(found, (str, bytes)):
        raise TypeError(f"a loader must return source text, bytes or None, not {type(found).__name__}")
    return Source(found.encode() if isinstance(found, str) else found, f"<{name}>", True)
