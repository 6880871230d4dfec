"""Why this process gets no namespaces, after it was tried: the switch, the filter or the missing right, and the way out."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pisupervisor.records import NamedTuple

_SYS_ADMIN = 21
#: in the order in which they decide; each stops an ordinary user by itself
_SWITCHES = {
    "user.max_user_namespaces": "0", "kernel.unprivileged_userns_clone": "0",
    "kernel.apparmor_restrict_unprivileged_userns": "1",
}  # fmt: skip


class Situation(NamedTuple):
    """Who asked, and what is set: ``switches`` by sysctl's name, ``filtered`` by somebody's seccomp program, ``nested``: in
    a child of a pisupervisor.
    """

    uid: int
    may_mount: bool
    filtered: bool
    switches: Mapping[str, str]
    nested: bool = False


def situation() -> Situation:
    """As it is now."""
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    switches = {name: text for name in _SWITCHES if (text := _read(f"/proc/sys/{name.replace('.', '/')}"))}
    may_mount = bool(int(status.get("CapEff", "0"), 16) >> _SYS_ADMIN & 1)
    nested = os.path.isdir("/pis/pihost")  # planning.OURS: where each of our children finds our code
    return Situation(os.geteuid(), may_mount, status.get("Seccomp", "0") != "0", switches, nested)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""  # this kernel has no such switch


def remedy(found: Situation) -> str:
    """What helps, as exact as it can be said. Pure."""
    if found.nested:
        return "this is the child of another isolator: create that one with security=Security(nesting=True)"
    off = next((name for name, stop in _SWITCHES.items() if found.switches.get(name) == stop), "")
    if off == "user.max_user_namespaces":
        return "as root: sysctl -w user.max_user_namespaces=65536 (it is 0: nobody may make any)"
    if found.uid == 0 and not found.may_mount:
        return (
            "this root lacks CAP_SYS_ADMIN, as a container's does: docker run --cap-add SYS_ADMIN --security-opt"
            " seccomp=unconfined --security-opt apparmor=unconfined; or run the application as an ordinary user in it"
        )
    if found.uid != 0 and off == "kernel.unprivileged_userns_clone":
        return "as root: sysctl -w kernel.unprivileged_userns_clone=1; or run as root"
    if found.uid != 0 and off == "kernel.apparmor_restrict_unprivileged_userns":
        return (
            "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give the interpreter an AppArmor profile"
            " with the line: userns,"
        )
    if found.filtered:
        return (
            "this process is filtered by somebody's seccomp program, which may refuse namespaces: docker run --security-opt"
            " seccomp=unconfined, Kubernetes: seccompProfile type Unconfined"
        )
    return "raise user.max_user_namespaces and the other user.max_*_namespaces, which count what this user has already"
