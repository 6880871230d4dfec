"""Why this process gets no namespaces or mounts, after it was tried: the switch, the filter or the missing right, and the way
out. In containers it is the engine that refuses; `scripts/container-test` follows what is said here in real ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from errno import EACCES, ENOSYS, EPERM

from pisupervisor.limits import directories
from pisupervisor.records import NamedTuple

#: what root needs for a launch, and is left without by a container
_ROOTS = {"SYS_ADMIN": 21, "SETUID": 7, "SETGID": 6}
SYS_PTRACE = 19
_UBUNTUS = "kernel.apparmor_restrict_unprivileged_userns"
#: in the order in which they decide; each stops an ordinary user by itself
_SWITCHES = {"user.max_user_namespaces": "0", "kernel.unprivileged_userns_clone": "0", _UBUNTUS: "1"}
#: steps that fail where an outer filter or profile lets namespaces be made, and refuses what they are for
_REFUSABLE = (
    "clone", "private mounts", "root", "pivot", "bind", "tmpfs", "mounts", "mount table", "layer", "hostname", "id maps",
    "namespaces",
)  # fmt: skip
FILTER = (
    "this process is filtered by somebody's seccomp program, which may refuse what a launch takes: docker or podman run"
    " --security-opt seccomp=unconfined, Kubernetes: seccompProfile type Unconfined; or, narrower, the profile"
    " examples/deploy/seccomp.json"
)
CHROOT = (
    "the kernel makes no user namespaces for a process in a chroot (if this is one): have the application enter its root by"
    " pivot_root instead, as bwrap --bind ROOT / --dev /dev --proc /proc, systemd's RootDirectory= or a container engine do"
)


class Situation(NamedTuple):
    """Who asked, and what is set: ``lacks`` of the capabilities that root needs, ``switches`` by sysctl's name, ``filtered``
    by somebody's seccomp program, ``profile`` of AppArmor's that confines this process, ``nested``: in a child of a
    pisupervisor, ``masks``: what is mounted below /proc.
    """

    uid: int
    lacks: tuple[str, ...]
    filtered: bool
    switches: Mapping[str, str]
    nested: bool = False
    profile: str = ""
    masks: tuple[str, ...] = ()


def situation() -> Situation:
    """As it is now."""
    status = dict(line.split(":\t", 1) for line in _read("/proc/self/status").split("\n") if ":\t" in line)
    switches = {name: text for name in _SWITCHES if (text := _read(f"/proc/sys/{name.replace('.', '/')}"))}
    lacks = tuple(name for name, number in _ROOTS.items() if not has_capability(number))
    profile = _read("/proc/self/attr/apparmor/current")
    confines = not profile.endswith(("unconfined", "(unconfined)", "(complain)"))
    return Situation(
        os.geteuid(), lacks if os.geteuid() == 0 else (), status.get("Seccomp", "0") != "0", switches,
        directories.is_childs(),
        profile if confines else "", _over_proc(_read("/proc/self/mountinfo")),
    )  # fmt: skip


def has_capability(number: int) -> bool:
    """Whether this process has it in effect."""
    effective = next(line for line in _read("/proc/self/status").split("\n") if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def _read(path: str) -> str:
    try:
        return directories.text(path).strip()
    except OSError:
        return ""  # this kernel has no such switch


def _over_proc(mountinfo: str) -> tuple[str, ...]:
    points = (line.split(" ")[4] for line in mountinfo.split("\n") if line)
    return tuple(
        point for point in points if point.startswith("/proc/") and not point.startswith("/proc/sys/fs/binfmt")
    )


def remedy_for(step: str, number: object, detail: str, found: Situation) -> str:
    """What helps against a failed step of the launch; empty where nothing here tells. Pure."""
    if step == "mounts" and "/proc" in detail:
        return unmask(found.masks)
    if step == "namespaces" and not (found.profile and number == EACCES):  # which only a security module says there
        return remedy(found, number)
    if not step.startswith(_REFUSABLE):
        return ""
    if found.profile and number == EACCES:
        return _apparmor(found.profile)
    if number in (EPERM, ENOSYS) and (found.filtered or found.lacks):
        return remedy(found)
    if number in (EPERM, EACCES) and found.uid != 0 and _off(found) == _UBUNTUS:
        return remedy(found)  # it may let the namespace be made, and then no capability be used in it
    return CHROOT if step == "clone" and number == EPERM else ""


def unmask(masks: tuple[str, ...]) -> str:
    """The kernel mounts no fresh /proc where something hides a part of the one that is there."""
    what = f"{', '.join(masks[:3])}{' and more' if len(masks) > 3 else ''}" if masks else "something"
    return (
        f"an outer container must not mask /proc ({what}): podman run --security-opt 'unmask=/proc/*', docker run"
        " --security-opt systempaths=unconfined, Kubernetes: procMount: Unmasked, with hostUsers: false"
    )


def _apparmor(profile: str) -> str:
    return (
        f"the AppArmor profile {profile} confines this process: docker or podman run --security-opt apparmor=unconfined,"
        " Kubernetes: appArmorProfile type Unconfined; or one that allows mount, umount, pivot_root, userns and capability"
    )


def _off(found: Situation) -> str:
    """The first switch that stops an ordinary user."""
    return next((name for name, stop in _SWITCHES.items() if found.switches.get(name) == stop), "")


def remedy(found: Situation, number: object = None) -> str:
    """What helps, as exact as it can be said. Pure."""
    if found.nested:
        return "this is the child of another isolator: create that one with security=Security(nesting=True)"
    off = _off(found)
    if off == "user.max_user_namespaces":
        return "as root: sysctl -w user.max_user_namespaces=65536 (it is 0: nobody may make any)"
    if found.lacks:
        return _as_a_user(found)
    if found.uid != 0 and off == "kernel.unprivileged_userns_clone":
        return "as root: sysctl -w kernel.unprivileged_userns_clone=1; or run as root"
    if found.uid != 0 and off == _UBUNTUS:
        return (
            "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give the interpreter an AppArmor profile"
            " with the line: userns,"
        )
    if found.filtered:
        return FILTER
    if found.profile:
        return _apparmor(found.profile)
    if number == EPERM:  # what counts too many says ENOSPC
        return CHROOT
    return "raise user.max_user_namespaces and the other user.max_*_namespaces, which count what this user has already"


def _as_a_user(found: Situation) -> str:
    names = " and ".join(f"CAP_{name}" for name in found.lacks)
    adding = " ".join(f"--cap-add {name}" for name in found.lacks)
    also = f"; and either way, {FILTER}" if found.filtered else ""
    return (
        f"this root lacks {names}, as a container's does: run the application as an ordinary user in it (docker or podman run"
        f" --user 1000), or leave it these: docker or podman run {adding}{also}"
    )
