"""What this machine offers to tests, found out by trying, without the code under test wherever that can be.

A test asks with ``need("cgroups")`` or by its markers (see MARKERS) and is skipped with a reason that begins with the
feature's name. ``PISUPERVISOR_REQUIRE=userns,cgroups,...`` makes such a skip a failure, and so the feature's absence.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest

from pisupervisor.limits.detect import CgroupHost

ORDINARY_USER = 1000

#: What the markers of pyproject.toml promise to the test that wears them.
MARKERS = {
    "linux": ("userns", "limits", "seccomp"),
    "root": ("root", "cgroups"),
    "rootless": ("rootless",),
    "v2": ("v2",),
    "undelegated": ("undelegated",),
    "scope": ("scope",),
}


def _root() -> str:
    return "" if os.geteuid() == 0 else "this is not root"


def _userns() -> str:
    return _try_unshare(None)


def _rootless() -> str:
    return _root() or _try_unshare(ORDINARY_USER)


def _seccomp() -> str:
    return "" if "\nSeccomp:" in Path("/proc/self/status").read_text() else "the kernel has no seccomp"


def _landlock() -> str:
    from pihost import syscalls

    try:
        return "" if syscalls.landlock_abi() > 0 else "the kernel has no Landlock"
    except OSError as error:
        return f"the kernel has no Landlock: {error}"


def _landlock_net() -> str:
    return _landlock_abi(4)


def _landlock_scopes() -> str:
    return _landlock_abi(6)


def _landlock_abi(version: int) -> str:
    from pihost import syscalls

    abi = syscalls.landlock_abi()
    return "" if abi >= version else f"this kernel's Landlock is version {abi}"


def _cgroups() -> str:
    trouble = [f"{name}: {reason}" for name in ("memory", "cpu", "pids") if (reason := _try_cgroup(name))]
    return "; ".join(trouble)


def _v2(*controllers: str) -> str:
    """What every delegation gives, or others."""
    from pisupervisor.limits.detect import detect

    host = detect()
    if host.mode != "v2":
        return f"cgroups are {host.mode} here"
    return "; ".join(
        f"{name}: {host.places[name].why}" for name in controllers or ("memory", "cpu", "pids") if host.places[name].why
    )


def _v2_io() -> str:
    return _v2("io")


def _v2_cpuset() -> str:
    return _v2("cpuset")


def _own_machine() -> str:
    """A machine that is there for the tests alone: its switches may be turned."""
    return "" if "vmjob.mode=" in Path("/proc/cmdline").read_text() else "this machine is not the tests' own"


def _nproc_apart() -> str:
    from pisupervisor.limits.rlimits import at_least

    kernel = os.uname().release
    return "" if at_least(kernel, 5, 14) else f"Linux {kernel} counts RLIMIT_NPROC over all user namespaces"


def _memory_peak() -> str:
    from pisupervisor.limits.rlimits import at_least

    kernel = os.uname().release
    return "" if not _v1() or at_least(kernel, 5, 19) else f"Linux {kernel} does not tell the peak of a v2 group"


def _cgroup_kill() -> str:
    from pisupervisor.limits.rlimits import at_least

    kernel = os.uname().release
    return "" if at_least(kernel, 5, 14) else f"Linux {kernel} has no cgroup.kill"


def _v1() -> str:
    from pisupervisor.limits.detect import detect

    mode = detect().mode
    return "" if mode in ("v1", "hybrid") else f"cgroups are {mode} here"


def _limits() -> str:
    """What the default options ask for can be had."""
    from pisupervisor.limits.cgroups import missing, wanted_limits
    from pisupervisor.options import Limits

    return "; ".join(f"{entry.feature}: {entry.why}" for entry in missing(_as_children_see(), wanted_limits(Limits())))


def _children() -> str:
    """Some can be had, if need be without limits: an ordinary user gets the rights for it in a user namespace."""
    return "" if os.geteuid() != 0 or _has_capability(21) else "root without CAP_SYS_ADMIN"


def _has_capability(number: int) -> bool:
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return bool(int(status["CapEff"], 16) >> number & 1)


def _sys_resource() -> str:
    return "" if _has_capability(24) else "without CAP_SYS_RESOURCE"


@cache
def _as_children_see() -> CgroupHost:
    """What a template finds out: systemd may give its zygote a scope."""
    from pisupervisor.limits.detect import detect

    with subprocess.Popen(["sleep", "600"]) as member:
        try:
            return detect(member.pid)
        finally:
            member.kill()


def _scope() -> str:
    host = _as_children_see()
    return "" if host.scope else f"groups here: {host.how or 'none'}"


def _undelegated() -> str:
    return "" if _limits() else "this process has groups of its own"


_OVERLAY = ("--mount", "mount", "-t", "overlay", "-o", "ro,lowerdir=/usr/bin:/usr/lib", "x", "/usr/lib")


def _overlay() -> str:
    """As those who make templates mount it: root as itself, others in a user namespace (Linux 5.11)."""
    if os.geteuid():
        return _user_overlay()
    done = subprocess.run(["unshare", *_OVERLAY], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def _user_overlay() -> str:
    return _try_unshare(None, *_OVERLAY)


def _loop_bfq() -> str:
    """A block device of the tests' own, scheduled by bfq."""
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(1 << 20)
        done = subprocess.run(["losetup", "--find", "--show", image.name], capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip() or "no loop device"
        scheduler = Path("/sys/block", os.path.basename(done.stdout.strip()), "queue/scheduler")
        known = "bfq" in scheduler.read_text()
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)
    return "" if known else "this kernel has no bfq"


def arm32_program(folder: Path) -> Path:
    """A program of 32-bit ARM's: getpid(), then exit(0)."""
    code = struct.pack("<5I", 0xE3A07014, 0xEF000000, 0xE3A07001, 0xE3A00000, 0xEF000000)
    ident = b"\x7fELF\1\1\1".ljust(16, b"\0")
    head = ident + struct.pack("<HHIIIIIHHHHHH", 2, 40, 1, 0x10054, 52, 0, 0x05000000, 52, 32, 1, 0, 0, 0)
    size = len(head) + 32 + len(code)
    program = folder / "arm32"
    program.write_bytes(head + struct.pack("<8I", 1, 0, 0x10000, 0x10000, size, size, 5, 0x1000) + code)
    program.chmod(0o755)
    return program


def _arm32() -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run([arm32_program(Path(folder))], check=True)
        except OSError as error:
            return f"this machine runs no 32-bit ARM: {error.strerror}"
    return ""


def _newuidmap() -> str:
    return "" if shutil.which("newuidmap") else "newuidmap is not installed (Debian: uidmap)"


def _passrights() -> str:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            ours.setsockopt(socket.SOL_SOCKET, 83, 0)
        except OSError:
            return "sockets that take no descriptors came with Linux 6.16"
    return ""


def _testsuite() -> str:
    """CPython's own tests, which Debian has in a package of their own."""
    try:
        found = importlib.util.find_spec("test.test_concurrent_futures")
    except ModuleNotFoundError:
        found = None
    return "" if found else "this interpreter came without its test package (Debian: libpython3.x-testsuite)"


def _try_unshare(user: int | None, *command: str) -> str:
    command = ("unshare", "--user", "--map-root-user", *(command or ("true",)))
    groups = None if user is None else ()
    done = subprocess.run(
        command, user=user, group=user, extra_groups=groups, cwd="/", capture_output=True, text=True, check=False
    )
    return done.stderr.strip() if done.returncode else ""


def _try_cgroup(controller: str) -> str:
    """Makes and removes a group below our own: the controller must be there, and ours to use."""
    folder = own_cgroup(controller)
    if folder is None:
        return "no such controller here"
    probe = folder / f"pisupervisor-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return str(error)
    return ""


def own_cgroup(controller: str) -> Path | None:
    """The folder of this process's group in that controller's hierarchy: v1, or v2 where it is not mounted as v1."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    v1 = {name: path for _, names, path in lines for name in names.split(",") if name}
    for mount, kind, options, shown in _cgroup_mounts():
        if kind == "cgroup" and controller in v1 and controller in options.split(","):
            return mount / os.path.relpath(v1[controller], shown)
        if kind == "cgroup2" and controller not in v1:
            group = mount / os.path.relpath(next(path for _, names, path in lines if not names), shown)
            if controller in (group / "cgroup.controllers").read_text().split():
                return group
    return None


def _cgroup_mounts() -> Iterable[tuple[Path, str, str, str]]:
    """(mount point, type, options, the part of the hierarchy that is shown there) of every cgroup mount."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        kind, _, options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            yield Path(before.split()[4]), kind, options, before.split()[3]


PROBES: dict[str, Callable[[], str]] = {
    "root": _root,
    "rootless": _rootless,
    "sys_resource": _sys_resource,
    "userns": _userns,
    "cgroups": _cgroups,
    "own_machine": _own_machine,
    "nproc_apart": _nproc_apart,
    "v1": _v1,
    "cgroup_kill": _cgroup_kill,
    "memory_peak": _memory_peak,
    "v2": _v2,
    "v2_io": _v2_io,
    "v2_cpuset": _v2_cpuset,
    "limits": _limits,
    "children": _children,
    "undelegated": _undelegated,
    "scope": _scope,
    "seccomp": _seccomp,
    "landlock": _landlock,
    "landlock_net": _landlock_net,
    "landlock_scopes": _landlock_scopes,
    "overlay": _overlay,
    "user_overlay": _user_overlay,
    "arm32": _arm32,
    "passrights": _passrights,
    "testsuite": _testsuite,
    "loop_bfq": _loop_bfq,
    "newuidmap": _newuidmap,
}


@cache
def missing(feature: str) -> str:
    """Why this machine lacks the feature; empty where it has it. KeyError for a feature nobody knows."""
    return PROBES[feature]()


def need(*features: str) -> None:
    """Skips the running test, or the module that is imported, unless all of these are there."""
    for feature in features:
        if reason := missing(feature):
            pytest.skip(f"{feature}: {reason}", allow_module_level=True)


def required() -> list[str]:
    """The features that PISUPERVISOR_REQUIRE names. UsageError for one that nobody knows."""
    names = [name for name in os.environ.get("PISUPERVISOR_REQUIRE", "").split(",") if name]
    if unknown := set(names) - set(PROBES):
        raise pytest.UsageError(f"PISUPERVISOR_REQUIRE: {', '.join(sorted(unknown))} is none of {', '.join(PROBES)}")
    return names


def refused(reason: str) -> str:
    """The required feature for want of which a test was skipped with this reason; empty if it is no such skip."""
    feature = reason.removeprefix("Skipped: ").split(":")[0].strip()
    return feature if feature in required() else ""
