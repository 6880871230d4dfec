"""What ``pisupervisor doctor`` says of the host itself: facts to read beside the verdicts, none of them a proof."""

from __future__ import annotations

import os
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pisupervisor.launch.features import Features
    from pisupervisor.limits.cgroups import CgroupHost

#: switches that decide whether an ordinary user gets namespaces; most kernels lack the second and third
_SWITCHES = (
    "user/max_user_namespaces", "kernel/unprivileged_userns_clone", "kernel/apparmor_restrict_unprivileged_userns",
)  # fmt: skip


def facts(features: Features) -> dict[str, str]:
    """Name to text, in the order in which they are shown. Never raises."""
    host = os.uname()
    return {
        "kernel": f"{features.kernel} {host.machine}",
        "too old for": _too_old_for(features.kernel),
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        "libseccomp": _libseccomp(host.machine),
        "user": "root" if features.root else f"uid {features.uid}",
        "user namespaces": _switches(),
        "subordinate ids": _subordinate_ids(features),
        "cgroups": _cgroups(features.cgroups),
        "delegation": _delegation(features.cgroups),
        "swap": "on" if features.cgroups.swap_on else "none",
        "landlock": f"ABI {features.landlock_abi}" if features.landlock_abi else "not there, or not switched on",
        "seccomp": _seccomp(),
        "security modules": _line("/sys/kernel/security/lsm") or "cannot be read",
        "rlimits": _rlimits(),
        "container": _container(),
        "init": "systemd" if os.path.isdir("/run/systemd/system") else f"{_line('/proc/1/comm') or 'unknown'}",
    }


def _too_old_for(release: str) -> str:
    from pisupervisor.launch import kernels

    found = kernels.too_old_for(release)
    return (
        "; ".join(f"{entry.what} (Linux {entry.version}): {entry.fallback}" for entry in found) or "nothing used here"
    )


def _line(path: str) -> str:
    """The first line of a file, "" where it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


def _libseccomp(machine: str) -> str:
    from pisupervisor.launch.seccomp import libseccomp_version

    name = libseccomp_version(machine)
    return name.rpartition(".so.")[2] if name else "no libseccomp.so.2 in the usual folders"


def _switches() -> str:
    found = [f"{name.replace('/', '.')}={value}" for name in _SWITCHES if (value := _line(f"/proc/sys/{name}"))]
    return " ".join(found) or "no switches found"


def _subordinate_ids(features: Features) -> str:
    """What children's ids are outside, and could be."""
    from pisupervisor.errors import FeatureUnavailable
    from pisupervisor.launch import subids

    if features.root:
        return "not needed: root's children have ids of their own"
    try:
        found = subids.find(features.uid)
    except FeatureUnavailable as error:
        return f"none, children have this user's id; {error.remedy}"
    return f"{found.size} from {found.uid}, for those who ask: Security(subordinate_ids=True)"


def _cgroups(host: CgroupHost) -> str:
    """The mode, and the controllers in which groups can be made, by directory."""
    usable: dict[str, list[str]] = {}
    for controller, place in host.places.items():
        if place.usable and place.directory:
            usable.setdefault(place.directory, []).append(controller)
    if not usable:
        return f"{host.mode}; no group can be made"
    return f"{host.mode}; groups go to " + ", ".join(
        f"{directory} ({' '.join(controllers)})" for directory, controllers in usable.items()
    )


def _delegation(host: CgroupHost) -> str:
    """By what right groups are made, or why there are none."""
    if host.how:
        return host.how
    if host.directories():
        return "none needed for root on v1" if host.uid == 0 else f"a folder that uid {host.uid} may write to"
    return next((place.why for place in host.places.values() if place.why), "none")


def _seccomp() -> str:
    """What the kernel offers, and whether this process is filtered already: an outer filter may refuse what we need."""
    actions = _line("/proc/sys/kernel/seccomp/actions_avail") or "not there"
    with open("/proc/self/status", errors="replace") as status:
        mode = next((line.split()[1] for line in status if line.startswith("Seccomp:")), "0")
    return f"{actions}; {'this process is filtered by somebody' if mode != '0' else 'this process is not filtered'}"


def _rlimits() -> str:
    """Hard limits of this process: what children are given never exceeds them."""
    wanted = (("open files", resource.RLIMIT_NOFILE), ("processes", resource.RLIMIT_NPROC))
    found = [(name, resource.getrlimit(number)[1]) for name, number in wanted]
    return ", ".join(f"{name} {'unlimited' if most == resource.RLIM_INFINITY else most}" for name, most in found)


def _container() -> str:
    """Best effort: a container does not have to say that it is one."""
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return f"{kind} (there is {path})"
    told = _line("/run/systemd/container")
    if told:
        return f"{told} (says /run/systemd/container)"
    group = _line("/proc/1/cgroup")
    kind = next((word for word in ("docker", "kubepods", "lxc", "libpod") if word in group), "")
    return f"{kind} (from the cgroup of process 1)" if kind else "no sign of one (best effort)"
