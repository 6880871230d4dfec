"""User code on the host's side: files, package folders, zips and wheels are read here and travel as bytes.

The child never sees the files. A module name ("json") travels as a name and is imported in the child.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator

from pisupervisor.checks import absolute
from pisupervisor.errors import OptionsError

MAX_BYTES = 64 << 20  #: of one file, or of all files of a package or archive, uncompressed
MAX_ENTRIES = 10_000  #: files and folders of one package, entries of one archive

Files = tuple[tuple[str, bytes], ...]
Payload = tuple[str, str, str, str, Files]
Stamps = tuple[tuple[str, tuple[int, ...]], ...]

_ARCHIVES = (".zip", ".whl", ".pyz")
_BINARIES = (".so", ".pyd", ".pyc")
_SKIPPED = frozenset(("__pycache__", ".git"))
_CACHED_PATHS = 256
_CACHED_BYTES = 256 << 20
# A file that is written again within one tick of the kernel's clock (10 ms at HZ=100) keeps its time stamp.
_SETTLED_AFTER = 50_000_000


class Code:
    """User code, ready to travel. Immutable; ``key`` is its identity: the same path with the same content.

    ``kind`` is "file", "package", "archive" or "module"; ``name`` the top module's name (of a module: the whole dotted
    name; of an archive: its file's stem); ``origin`` the absolute path on the host, shown in tracebacks.
    """

    __slots__ = ("files", "key", "kind", "name", "origin")
    files: Files
    key: str
    kind: str
    name: str
    origin: str

    def __init__(self, kind: str, name: str, origin: str, files: Files) -> None:
        key = f"{kind}:{_digest(files)}:{origin}" if files else f"{kind}:{name}"
        for slot, value in zip(sorted(self.__slots__), (files, key, kind, name, origin), strict=True):
            object.__setattr__(self, slot, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Code is immutable: {name}")

    def __repr__(self) -> str:
        return f"Code({self.key!r}, {len(self.files)} files)"

    def payload(self) -> Payload:
        """Plain data for ``Library.add`` in the child: key, kind, name, origin, ((relative path, bytes), ...)."""
        return self.key, self.kind, self.name, self.origin, self.files


class CodeReader:
    """Reads user code and remembers it: while the files stand unchanged, ``read`` costs one stat for each of them.

    May be used by several threads.
    """

    def __init__(self) -> None:
        self._cache: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def read(self, path: str | os.PathLike[str]) -> Code:
        """The code at ``path``: a ``.py`` file, a package folder, a ``.zip`` or ``.whl``; or a dotted module name.

        A string without separator or suffix is a module name, unless a folder with Python files has that name.
        Raises OptionsError for what is missing, unreadable, too large, or no code.
        """
        known = self._cache.get(path) if type(path) is str else None  # as it is: absolute and normal already
        if known is not None and known.holds():
            return known.code
        text = _text(path)
        if not (isinstance(path, os.PathLike) or _looks_like_path(text)):
            return _module(text)
        where = absolute(text)
        known = self._cache.get(where)
        if known is not None and known.holds():
            return known.code
        with self._lock:
            return self._read_again(where)

    def _read_again(self, where: str) -> Code:
        known = self._cache.get(where)
        if known is not None and known.holds():  # another thread was faster
            return known.code
        started = time.time_ns()
        try:
            code, stamps = _read_path(where)
        except OSError as error:
            raise OptionsError(_why_unreadable(where, error)) from error
        if known is not None and known.code.key == code.key:
            code = known.code
        self._cache.pop(where, None)
        self._cache[where] = _Known(code, stamps, started)
        self._forget_oldest()
        return code

    def _forget_oldest(self) -> None:
        while len(self._cache) > 1 and (
            len(self._cache) > _CACHED_PATHS or sum(known.size for known in self._cache.values()) > _CACHED_BYTES
        ):
            del self._cache[next(iter(self._cache))]


def check_target(target: str) -> str:
    """``target`` itself when it is a dotted name such as "Tools.shrink". Raises OptionsError otherwise."""
    if isinstance(target, str) and target.isidentifier():
        return target
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise OptionsError(
            f"target: {target!r} is no dotted name; write 'function', 'Class.method' or 'module.function'"
        )
    return target


class _Known:
    """Code and the time stamps it was read under."""

    __slots__ = ("code", "settled", "size", "stamps")

    def __init__(self, code: Code, stamps: Stamps, started: int) -> None:
        self.code = code
        self.stamps = stamps
        self.size = sum(len(data) for _name, data in code.files)
        # Stamps as young as the reading prove nothing: the file is read and compared again until they are older.
        self.settled = max(stamp[0] for _path, stamp in stamps) + _SETTLED_AFTER < started

    def holds(self) -> bool:
        try:
            for path, stamp in self.stamps:
                if _stamp(os.stat(path)) != stamp:
                    return False
            return self.settled
        except OSError:
            return False


class _Budget:
    """Counts what one package or archive brings, and refuses what is too much."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.entries = MAX_ENTRIES
        self.bytes = MAX_BYTES

    def take(self, entries: int, size: int) -> None:
        self.entries -= entries
        self.bytes -= size
        if self.entries < 0:
            raise OptionsError(f"{self.where}: more than {MAX_ENTRIES} files and folders; {_INSTEAD}")
        if self.bytes < 0:
            raise OptionsError(f"{self.where}: more than {MAX_BYTES >> 20} MiB of files; {_INSTEAD}")


_INSTEAD = "show it to the child instead: IsolationOptions(import_paths=[...]), then call it by its module name"


def _text(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise OptionsError(f"code: expected a path or a module name, not {path!r}")
    if not text or "\0" in text:
        raise OptionsError(f"code: {text!r} is neither a path nor a module name")
    return str.__str__(text)  # a StrEnum is none in the child


def _looks_like_path(text: str) -> bool:
    return os.sep in text or text.endswith((".py", *_ARCHIVES, *_BINARIES)) or _is_python_folder(text)


def _is_python_folder(text: str) -> bool:
    try:
        return os.path.isdir(text) and any(name.endswith(".py") for name in os.listdir(text))
    except OSError:
        return False


def _module(name: str) -> Code:
    if not all(part.isidentifier() for part in name.split(".")) or ("." in name and os.path.isfile(name)):
        raise OptionsError(
            f"code: {name!r} is neither a .py file, a package folder, a .zip or .whl, nor a dotted module name"
        )
    return Code("module", name, "", ())


def _read_path(where: str) -> tuple[Code, Stamps]:
    base = os.path.basename(where)
    if base.endswith(_BINARIES):
        raise OptionsError(f"{where}: compiled code cannot be sent; {_INSTEAD}")
    if stat.S_ISDIR(os.stat(where).st_mode):
        return _read_package(where, base)
    data, stamp = _read_file(where, _Budget(where))
    # A dot would make a submodule of the name.
    name = base.rpartition(".")[0].replace(".", "_") or base
    if base.endswith(_ARCHIVES):
        return Code("archive", name, where, _unzip(where, data)), ((where, stamp),)
    return Code("file", name, where, ((f"{name}.py", data),)), ((where, stamp),)


def _read_package(where: str, base: str) -> tuple[Code, Stamps]:
    name = base.replace(".", "_")
    files: list[tuple[str, bytes]] = []
    stamps: list[tuple[str, tuple[int, ...]]] = []
    budget = _Budget(where)
    for path, relative in _walk(where, name, budget):
        if stat.S_ISDIR((status := os.stat(path)).st_mode):
            stamps.append((path, _stamp(status)))
        elif stat.S_ISREG(status.st_mode):
            data, stamp = _read_file(path, budget)
            files.append((relative, data))
            stamps.append((path, stamp))
    if not any(relative.endswith(".py") for relative, _data in files):
        raise OptionsError(f"{where}: this folder has no Python files")
    return Code("package", name, where, tuple(sorted(files))), tuple(stamps)


def _walk(where: str, name: str, budget: _Budget) -> Iterator[tuple[str, str]]:
    """(path, path relative to the package's parent) of each folder, before it is read, and of all that is no folder."""
    top = os.path.realpath(where)
    folders = [(where, name)]
    while folders:
        folder, relative = folders.pop()
        yield folder, relative
        with os.scandir(folder) as entries:
            for entry in entries:
                budget.take(1, 0)
                if entry.name in _SKIPPED or entry.name.endswith(".pyc"):
                    continue
                if entry.is_symlink() and not _link_is_useful(entry.path, top):
                    continue
                below = (entry.path, f"{relative}/{entry.name}")
                if entry.is_dir():
                    folders.append(below)
                else:
                    yield below


def _link_is_useful(link: str, top: str) -> bool:
    """False for a dangling link and for one to a folder above itself. Raises OptionsError if it leaves the package."""
    aim = os.path.realpath(link)
    if not _is_below(aim, top):
        raise OptionsError(
            f"{link}: this link leads out of the package, to {aim}; put the file itself into the package"
        )
    return os.path.exists(aim) and not _is_below(os.path.realpath(os.path.dirname(link)), aim)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _read_file(path: str, budget: _Budget) -> tuple[bytes, tuple[int, ...]]:
    # stat before open: opening a device can do things. O_NONBLOCK: a FIFO put there in between must not hang.
    _check_regular(path, os.stat(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        _check_regular(path, status)
        budget.take(0, status.st_size)
        data = file.read(status.st_size + 1)
    if len(data) != status.st_size:
        raise OptionsError(f"{path}: its size changed while it was read; write to another name and rename it")
    return data, _stamp(status)


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OptionsError(f"{path}: neither a regular file nor a folder, so no code can be read from it")


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Changes with the content. The change time comes first: nobody can set it back."""
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev


def _why_unreadable(where: str, error: OSError) -> str:
    path = error.filename if isinstance(error.filename, str) else where
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        file, colon, target = path.rpartition(":")
        if colon and os.path.exists(file):
            return f"{path}: no such file or folder; the target is an argument of its own: {file!r}, {target!r}"
        return f"{path}: no such file or folder (relative paths start from the host's working directory)"
    if isinstance(error, PermissionError):
        return f"{path}: not readable by uid {os.geteuid()}; change its mode or its owner"
    return f"{path}: cannot be read: {error.strerror or error}"


def _digest(files: Iterable[tuple[str, bytes]]) -> str:
    try:
        from _blake2 import blake2b  # hashlib would load OpenSSL: 2 ms at the first call
    except ImportError:
        from hashlib import blake2b
    digest = blake2b(digest_size=16)
    for name, data in files:
        digest.update(f"{len(data)} {name}\0".encode("utf-8", "surrogatepass"))
        digest.update(data)
    return digest.hexdigest()


def _unzip(where: str, data: bytes) -> Files:
    from pisupervisor.link.archives import read_archive

    budget = _Budget(where)
    return read_archive(where, data, budget.take, MAX_ENTRIES)
