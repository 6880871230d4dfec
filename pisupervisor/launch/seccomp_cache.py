"""Compiled programs on disk. Whoever can write a program here decides what a filter lets through, so: folder and file
are ours, nobody else can write them, no symlink is followed, and any doubt means "compile again".
"""

from __future__ import annotations

import os
import stat

MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
_DIGEST = 32
_FOLDERS = ("pisupervisor", "seccomp")  # below the user's ~/.cache
_MAX_FILE = _DIGEST + 8 * MAX_INSTRUCTIONS


def sha256(data: bytes) -> bytes:
    """Digest by the interpreter's own code: importing hashlib costs 1.8 ms, nearly all of it OpenSSL."""
    for module in ("_sha2", "_sha256", "hashlib"):  # CPython 3.12 and later, 3.11, any
        try:
            digest: bytes = __import__(module).sha256(data).digest()
        except ImportError:
            continue
        return digest
    raise ImportError("no sha256 in this interpreter")


def load(key: str, cache_dir: str | None) -> bytes | None:
    """The program stored under ``key``, or None if there is none that can be trusted."""
    try:
        folder = _open_folder(cache_dir)
    except OSError:
        return None
    try:
        return _read_program(folder, f"{key}.bpf")
    except OSError:
        return None
    finally:
        os.close(folder)


def store(key: str, program: bytes, cache_dir: str | None) -> None:
    """Keep ``program`` under ``key``. A cache that cannot be written is no error."""
    try:
        folder = _open_folder(cache_dir, create=True)
    except OSError:
        return
    scratch = f".{key[:16]}.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        _write_program(folder, scratch, program)
        os.rename(scratch, f"{key}.bpf", src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        _discard(folder, scratch)
    finally:
        os.close(folder)


def can_be_reached_from(folder: str) -> bool:
    """Whether who writes to ``folder`` could put a program of their own into the cache, or another cache into its place."""
    cache, shown = (
        os.path.realpath(path).rstrip("/") + "/" for path in (_user_cache() + "/".join(("", *_FOLDERS)), folder)
    )
    return cache.startswith(shown) or shown.startswith(cache)


def _read_program(folder: int, name: str) -> bytes | None:
    """A digest guards against a file cut short or mixed up; the owner check guards against other users."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not _is_only_ours(status):
            return None
        data = os.read(fd, _MAX_FILE + 1)
    finally:
        os.close(fd)
    digest, program = data[:_DIGEST], data[_DIGEST:]
    if not program or len(program) % 8 or len(data) > _MAX_FILE or sha256(program) != digest:
        return None
    return program


def _write_program(folder: int, name: str, program: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        os.write(fd, sha256(program) + program)  # a short write fails the digest and is compiled again
    finally:
        os.close(fd)


def _discard(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        pass


def _open_folder(cache_dir: str | None, create: bool = False) -> int:
    """A descriptor of the cache folder. Raises OSError if it is missing or somebody else could have written to it.

    The base (``~/.cache``) need only be ours; our own folders below it must be closed to everybody else as well. Under
    sudo HOME is another user's: then there is no cache, and nothing of root's appears in that user's home.
    """
    base = cache_dir or _user_cache()
    steps = () if cache_dir else _FOLDERS
    fd = _enter(base, None, create)
    for step in steps:
        parent = fd
        try:
            _require(os.fstat(parent).st_uid == os.geteuid())
            fd = _enter(step, parent, create)
        finally:
            os.close(parent)
    try:
        _require(_is_only_ours(os.fstat(fd)))
    except OSError:
        os.close(fd)
        raise
    return fd


def _enter(path: str, parent: int | None, create: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    try:
        os.mkdir(path, 0o700, dir_fd=parent)
    except FileExistsError:
        pass  # another process was faster
    return os.open(path, flags, dir_fd=parent)


def _user_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return base if os.path.isabs(base) else os.path.expanduser("~/.cache")


def _is_only_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _require(condition: bool) -> None:
    if not condition:
        raise PermissionError("the cache folder is open to others")
