"""Options and features to plans: pure, no I/O beyond looking at which paths exist. Policy lives here as data."""

from __future__ import annotations

import os
import stat

from pihost import mounts, syscalls
from pihost.plan import ChildPlan, TemplatePlan
from pisupervisor.errors import FeatureUnavailable, OptionsError
from pisupervisor.launch import seccomp_cache
from pisupervisor.launch.features import Features
from pisupervisor.launch.interpreter import Interpreter
from pisupervisor.limits.cgroups import CgroupHost, Missing, missing, wanted_limits
from pisupervisor.options import IsolationOptions, Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OURS = "/pis"  # pihost, and what it brings, inside
SCRATCH = ("/tmp", "/dev/shm")
SCRATCH_INODES = 4096
FROZEN = 0  # flags of a layer that must be one, and no bind
#: namespaces entered by clone3 at once; cgroup and time are entered later (see pihost.confine), the network's is made
#: ahead by the zygote
CLONE_FLAGS = {
    "user": syscalls.CLONE_NEWUSER, "mount": syscalls.CLONE_NEWNS, "pid": syscalls.CLONE_NEWPID,
    "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS,
}  # fmt: skip
#: the protection's name -> the kernel's word in /proc/PID/ns
NAMESPACE_LINKS = {
    "user": "user", "mount": "mnt", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts",
    "cgroup": "cgroup", "time": "time",
}  # fmt: skip

# Landlock access rights, by the version that brought them.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_BLOCK, REFER, TRUNCATE, IOCTL_DEV = 1 << 6, 1 << 11, 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_READ = EXECUTE | READ_FILE | READ_DIR
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
_LOADER_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
#: libraries that start threads when imported would make the zygote unfit to fork
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_OVERLAYS_SINCE = (5, 11)  # in a user namespace
_LOG_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}


def required(options: IsolationOptions, features: Features) -> None:
    """Raise FeatureUnavailable for the first kernel protection that was asked for and cannot hold (limits: see cgroups)."""
    for name, link in NAMESPACE_LINKS.items():
        wanted = name not in options.degrade and not (name == "network" and options.network == "host")
        if wanted and link not in features.namespaces:
            raise FeatureUnavailable(
                f"this kernel ({features.kernel}) has no {name} namespaces", feature=name,
                remedy=f"run a kernel with them (time: 5.6), or say degrade=({name!r},)",
            )  # fmt: skip
    if options.filesystem.overlay and _release(features.kernel) < _OVERLAYS_SINCE:
        raise FeatureUnavailable(
            f"this kernel ({features.kernel}) lets no child mount an overlay of its own", feature="overlay",
            remedy="run Linux 5.11 or newer, or leave Filesystem(overlay=...) out",
        )  # fmt: skip
    if options.security.landlock and not features.landlock_abi and "landlock" not in options.degrade:
        raise FeatureUnavailable(
            f"this kernel ({features.kernel}) has no Landlock, or it is not switched on", feature="landlock",
            remedy="boot with lsm=landlock,... on Linux 5.13 or newer, or say degrade=('landlock',)",
        )  # fmt: skip


def _release(kernel: str) -> tuple[int, ...]:
    """The first two numbers of a kernel's release."""
    numbers = kernel.partition("-")[0].split(".")[:2]
    return tuple(int(number) if number.isdigit() else 0 for number in numbers)


def lacking_limits(options: IsolationOptions, host: CgroupHost) -> dict[str, str]:
    """Why limits have no group to hold them, by name. Raises FeatureUnavailable unless all of those are in ``degrade``."""
    lacking = missing(host, wanted_limits(options.limits))
    refused = [entry for entry in lacking if entry.feature not in options.degrade]
    if refused:
        reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in _by_cause(refused).items())
        names = tuple(dict.fromkeys(entry.feature for entry in refused))
        fixes = "\n          ".join(dict.fromkeys(entry.fix for entry in refused))
        raise FeatureUnavailable(
            f"limits that cannot be enforced here: {reasons}", feature=refused[0].feature,
            remedy=f"{fixes}\n          or accept all of that: IsolationOptions(degrade={names!r})",
        )  # fmt: skip
    return {entry.feature: entry.why for entry in lacking}


def _by_cause(refused: list[Missing]) -> dict[str, list[str]]:
    causes: dict[str, list[str]] = {}
    for entry in refused:
        causes.setdefault(entry.why, []).append(entry.feature)
    return causes


def template_plan(
    options: IsolationOptions, features: Features, interpreter: Interpreter, *, package: str, cloudpickle: str | None,
    program: bytes, host_environment: dict[str, str], listen: bool = False, subordinate: bool = False,
) -> TemplatePlan:  # fmt: skip
    """What the zygote for these options is. ``package`` is pihost's folder, ``cloudpickle`` that package's, or None."""
    root = [*_base(options, interpreter), ["layer", package, f"{OURS}/pihost", mounts.READ_ONLY]]
    if cloudpickle:
        root.append(["layer", cloudpickle, f"{OURS}/cloudpickle", mounts.READ_ONLY])
    root += _devices() + (_etc(options) if interpreter.rootfs is None else [])
    root += [["folder", f"{OURS}/over/{number}"] for number in range(len(options.filesystem.overlay))]
    root += [["folder", "/tmp"], ["folder", "/dev/shm"], ["folder", "/proc"], ["bind", "/proc", "/proc", 0]]
    for source, place, final, flags in binds(options, interpreter):
        # Also where it belongs: what is preloaded is imported here, before a child's own scratch covers it.
        kind = "layer" if flags == FROZEN else "bind"
        root += [[kind, source, where, flags] for where in dict.fromkeys((place, final))]
    return TemplatePlan(
        root=root,
        own_ids=[] if features.root else [features.uid, features.gid, *([1] if subordinate else [])],
        interpreter=interpreter.inside(interpreter.executable),
        package=f"{OURS}/pihost",
        sys_path=[
            interpreter.inside(interpreter.stdlib),
            interpreter.inside(interpreter.stdlib) + "/lib-dynload",
            OURS,
        ],
        import_paths=import_paths(options, interpreter),
        preload=list(options.preload),
        environment=_environment(options, interpreter, host_environment),
        seccomp=program,
        listen=listen,
        network=options.network,
        log_level=_LOG_LEVELS[options.log_level or "WARNING"],
    )


def child_plan(
    options: IsolationOptions, features: Features, *, interpreter: Interpreter, outer_id: int | None,
    rlimits: list[tuple[int, int, int]], cgroups: int, clone_flags: int = 0, output: int = 1,
    without: tuple[str, ...] = (),
) -> ChildPlan:  # fmt: skip
    """What one child is. ``outer_id`` is its own id outside when the host is root, None for the user's single one;
    ``clone_flags`` are those of its group.
    """
    user, outer = options.security.user, 0 if outer_id is None else outer_id
    abi = features.landlock_abi if options.security.landlock else 0
    nesting = options.security.nesting
    net, scopes = (3 if abi >= 4 and options.network == "none" else 0), (3 if abi >= 6 else 0)
    if nesting and not net and not scopes:
        abi = 0  # nothing is left for it to hold
    flags = clone_flags
    for name, flag in CLONE_FLAGS.items():
        skip = NAMESPACE_LINKS[name] not in features.namespaces
        flags |= 0 if skip or f"{name} namespace" in without else flag
    absent = {f"{name} namespace" for name, link in NAMESPACE_LINKS.items() if link not in features.namespaces}
    return ChildPlan(
        namespaces=flags, uid_map=f"{user} {outer} 1", gid_map=f"{user} {outer} 1", uid=user, gid=user,
        hostname=options.security.hostname,
        mounts=_own_mounts(options, interpreter),
        rlimits=[list(entry) for entry in rlimits], nice=options.limits.nice or 0,
        landlock=[] if nesting else _landlock_rules(options, abi), landlock_abi=abi,
        landlock_fs=0 if nesting else file_rights(abi), landlock_net=net, landlock_scopes=scopes,
        output=output, cgroups=cgroups,
        limits={
            "result": int(options.limits.result), "pickle": int(options.results == "pickle"),
            "modules": int(bool(options.modules)), "concurrency": options.max_concurrency,
        },
        debug=options.debug, without=sorted({*without, *absent, *(("mount table",) if nesting else ())}),
    )  # fmt: skip


def file_rights(abi: int) -> int:
    """Every file access that Landlock of this version can handle."""
    return max((rights for since, rights in _FILE_RIGHTS.items() if since <= abi), default=0)


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
    wanted += [(source, target, FROZEN) for source, target in options.filesystem.shown("frozen")]
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


def _own_mounts(options: IsolationOptions, interpreter: Interpreter) -> list[list[Any]]:
    limits, user = options.limits, options.security.user
    own: list[list[Any]] = [["tmpfs", place, int(limits.scratch), SCRATCH_INODES, user, user] for place in SCRATCH]
    own += [
        ["overlay", place, f"{OURS}/over/{number}", int(limits.scratch), SCRATCH_INODES, user, user]
        for number, place in enumerate(options.filesystem.overlay)
    ]
    own.append(["proc", "/proc", "subset=pid,hidepid=invisible"])
    own += [
        ["bind", aside, final, 0] for _source, aside, final, _flags in binds(options, interpreter) if aside != final
    ]
    return own


def _landlock_rules(options: IsolationOptions, abi: int) -> list[list[Any]]:
    """Read and execute everywhere (the root holds only what was given), write where scratch or a writable bind is."""
    if not abi:
        return []
    full = file_rights(abi) & ~(MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
    rules: list[list[Any]] = [["/", _READ], ["/dev", READ_FILE | WRITE_FILE | (TRUNCATE if abi >= 3 else 0)]]
    rules += [[place, full] for place in (*SCRATCH, *options.filesystem.overlay)]
    for source, target in options.filesystem.shown("writable"):
        rights = full if os.path.isdir(source) else full & (EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE)
        rules.append([target, rights])
    return rules


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


def _environment(options: IsolationOptions, interpreter: Interpreter, host: dict[str, str]) -> dict[str, str]:
    variables = dict(_ENVIRONMENT)
    if options.preload:
        variables.update(_ONE_THREAD)
    library_path = interpreter.library_path()
    if library_path:
        variables["LD_LIBRARY_PATH"] = library_path
    variables.update((name, host[name]) for name in options.inherit_environment if name in host)
    variables.update(options.environment)
    return variables


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def limits_text(limits: Limits) -> dict[str, Any]:
    """What was asked for, by protection name, for ``applied``."""
    return {
        "memory": limits.memory, "swap": limits.swap, "cpus": limits.cpus, "cpu_weight": limits.cpu_weight,
        "cpuset": limits.cpuset, "pids": limits.pids, "io": limits.io or None,
        "io_weight": limits.io_weight, "devices": True,
    }  # fmt: skip
