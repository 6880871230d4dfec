"""What a child sees as its file system: the entries of its private root, the host's and ours, and what the caller has it shown.
No I/O beyond looking at which paths exist.
"""

from __future__ import annotations

import os
import stat

from pihost import mounts
from pisupervisor.errors import OptionsError
from pisupervisor.launch import seccomp_cache
from pisupervisor.launch.features import Features
from pisupervisor.launch.interpreter import Interpreter
from pisupervisor.options import IsolationOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OURS = "/pis"  # pihost, and what it brings, inside
SCRATCH = ("/tmp", "/dev/shm")
_SCRATCH_INODES = 4096
_FROZEN = 0  # flags of a layer that must be one, and no bind
_LOADER_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ETC_BINDS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
_ETC_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl", "/etc/nsswitch.conf")
#: nobody, nogroup: what the host's files belong to, as seen through a map of one id
_USERS = (
    "root:x:0:0:root:/:/usr/sbin/nologin\nuser:x:{user}:{user}:user:/tmp:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
)
_GROUPS = "root:x:0:\nuser:x:{user}:\nnogroup:x:65534:\n"
_PROTOCOLS = (("ip", 0), ("icmp", 1), ("tcp", 6), ("udp", 17), ("ipv6", 41), ("ipv6-icmp", 58))
_SERVICES = (
    "echo 7/tcp", "echo 7/udp", "daytime 13/tcp", "daytime 13/udp", "ftp 21/tcp", "ssh 22/tcp", "telnet 23/tcp",
    "smtp 25/tcp", "domain 53/tcp", "domain 53/udp", "http 80/tcp", "pop3 110/tcp", "ntp 123/udp", "imap2 143/tcp",
    "https 443/tcp", "https 443/udp", "submission 587/tcp", "imaps 993/tcp", "pop3s 995/tcp",
)  # fmt: skip


def template_root(
    options: IsolationOptions, interpreter: Interpreter, package: str, cloudpickle: str | None
) -> list[list[Any]]:
    """What the zygote builds, once for all of its children. ``package`` is pihost's folder, ``cloudpickle`` that package's."""
    root = [*_base(options, interpreter), ["layer", package, f"{OURS}/pihost", mounts.READ_ONLY]]
    if cloudpickle:
        root.append(["layer", cloudpickle, f"{OURS}/cloudpickle", mounts.READ_ONLY])
    root += _devices() + (_etc(options) if interpreter.rootfs is None else [])
    root += [["folder", f"{OURS}/over/{number}"] for number in range(len(options.filesystem.overlay))]
    root += [["folder", "/tmp"], ["folder", "/dev/shm"], ["folder", "/proc"], ["bind", "/proc", "/proc", 0]]
    for source, place, final, flags in binds(options, interpreter):
        # Also where it belongs: what is preloaded is imported here, before a child's own scratch covers it.
        kind = "layer" if flags == _FROZEN else "bind"
        root += [[kind, source, where, flags] for where in dict.fromkeys((place, final))]
    return root


def child_mounts(options: IsolationOptions, interpreter: Interpreter) -> list[list[Any]]:
    """What each child mounts over that for itself."""
    limits, user = options.limits, options.security.user
    own: list[list[Any]] = [["tmpfs", place, int(limits.scratch), _SCRATCH_INODES, user, user] for place in SCRATCH]
    own += [
        ["overlay", place, f"{OURS}/over/{number}", int(limits.scratch), _SCRATCH_INODES, user, user]
        for number, place in enumerate(options.filesystem.overlay)
    ]
    own.append(["proc", "/proc", "subset=pid,hidepid=invisible"])
    own += [
        ["bind", aside, final, 0] for _source, aside, final, _flags in binds(options, interpreter) if aside != final
    ]
    return own


def import_paths(options: IsolationOptions, interpreter: Interpreter) -> list[str]:
    """Folders and archives to import from, beside the standard library: shown inside where they lie outside."""
    return [os.fspath(path) for path in (*options.import_paths, *interpreter.packages, *interpreter.site)]


def binds(options: IsolationOptions, interpreter: Interpreter) -> list[tuple[str, str, str, int]]:
    """(source, place in the template, final place, flags) of the user's binds.

    What belongs below a scratch folder is put aside first: the child's own tmpfs would cover it. Parents come before
    what is bound inside them, whatever list they stand in: a writable folder must not cover a read-only part of it.
    Raises OptionsError for two binds at one place.
    """
    shown = [path for path in import_paths(options, interpreter) if path not in interpreter.site]
    wanted = [(path, path, mounts.READ_ONLY) for path in shown]
    wanted += [(source, target, mounts.READ_ONLY) for source, target in options.filesystem.shown("read_only")]
    wanted += [(source, target, _FROZEN) for source, target in options.filesystem.shown("frozen")]
    wanted += [(source, target, mounts.WRITABLE) for source, target in options.filesystem.shown("writable")]
    wanted = sorted(dict.fromkeys(wanted), key=lambda bind: bind[1].count("/"))
    found: list[tuple[str, str, str, int]] = []
    for number, (source, target, flags) in enumerate(wanted):
        if any(target == other for _source, _aside, other, _flags in found):
            raise OptionsError(f"filesystem: two things are to be shown at {target}")
        if flags == mounts.READ_ONLY and source == target and target.startswith("/usr/") and interpreter.rootfs is None:
            continue  # /usr is there as a whole
        aside = f"{OURS}/aside/{number}" if _below(target, SCRATCH) else target
        found.append((source, aside, target, flags))
    return found


def check_writable(options: IsolationOptions, features: Features, *, others: bool = False) -> None:
    """Raises OptionsError for a writable bind that the child's id could not write: better now than as EACCES inside. And
    for one by which it could write the filters of those that come after it.
    """
    for source, _target in options.filesystem.shown("writable"):
        found = os.stat(source)
        if (features.root or others) and not found.st_mode & stat.S_IWOTH:
            raise OptionsError(
                f"writable: {source} is not writable for others, and a child's id outside is its own; chmod o+w {source}"
                " (a folder that only root and the children can reach is enough), or run the application as its owner"
            )
        if not features.root and not others and not os.access(source, os.W_OK):
            raise OptionsError(f"writable: {source} is not writable for uid {features.uid}")
        if not features.root and seccomp_cache.can_be_reached_from(source):
            raise OptionsError(
                f"writable: {source} shows the child the cache of compiled filters, where it could put one of its own; show a"
                " folder beside it, or set XDG_CACHE_HOME to another one"
            )


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


# --- the entries --------------------------------------------------------------------------------------------------------


def _base(options: IsolationOptions, interpreter: Interpreter) -> list[list[Any]]:
    """The system and the interpreter: the host's, or a root file system of the caller's with both."""
    if interpreter.rootfs is None:
        return [*_system(), *_interpreter(interpreter)]
    from pisupervisor.launch import rootfs

    places = [
        target for kind in ("read_only", "frozen", "writable") for _source, target in options.filesystem.shown(kind)
    ]
    rootfs.check_places(interpreter.rootfs, [*places, *import_paths(options, interpreter)])
    return rootfs.entries(interpreter.rootfs)


def _system() -> list[list[Any]]:
    """The system's programs and libraries, and the links by which they find each other."""
    entries: list[list[Any]] = [["bind", "/usr", "/usr", mounts.READ_ONLY]]
    for path in _LOADER_LINKS:
        if os.path.islink(path):
            entries.append(["symlink", path, os.readlink(path)])
        elif os.path.isdir(path):
            entries.append(["bind", path, path, mounts.READ_ONLY])
    return entries


def _interpreter(interpreter: Interpreter) -> list[list[Any]]:
    if not interpreter.relocated:
        return []
    return [["layer", interpreter.prefix, interpreter.inside(interpreter.prefix), mounts.READ_ONLY]]


def _devices() -> list[list[Any]]:
    entries: list[list[Any]] = [["bind", f"/dev/{name}", f"/dev/{name}", mounts.DEVICE] for name in _DEVICES]
    entries.append(["symlink", "/dev/fd", "/proc/self/fd"])
    entries += [
        ["symlink", f"/dev/{name}", f"/proc/self/fd/{fd}"] for fd, name in enumerate(("stdin", "stdout", "stderr"))
    ]
    return entries


def _etc(options: IsolationOptions) -> list[list[Any]]:
    """A synthetic /etc: no users, no secrets of the host."""
    user, name = options.security.user, options.security.hostname
    entries: list[list[Any]] = [
        ["file", "/etc/passwd", _USERS.format(user=user)],
        ["file", "/etc/group", _GROUPS.format(user=user)],
        ["file", "/etc/hostname", f"{name}\n"],
        ["file", "/etc/protocols", "".join(f"{word} {number} {word.upper()}\n" for word, number in _PROTOCOLS)],
        ["file", "/etc/services", "".join(f"{word}\n" for word in _SERVICES)],
    ]
    shared = _ETC_BINDS + (_ETC_NETWORK if options.network == "host" else ())
    entries += [["bind", path, path, mounts.READ_ONLY] for path in shared if os.path.exists(path)]
    if options.network != "host":
        entries.append(["file", "/etc/hosts", f"127.0.0.1 localhost {name}\n::1 localhost\n"])
        entries.append(["file", "/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"])
    return entries
