"""Reading back what really holds, by the host itself, before any user data is sent. The child's own word counts nothing."""

from __future__ import annotations

import os

from pihost.plan import ChildPlan
from pisupervisor.errors import LaunchError
from pisupervisor.launch.features import NAMESPACE_LINKS
from pisupervisor.limits import directories
from pisupervisor.options import IsolationOptions, Limits
from pisupervisor.records import NamedTuple
from pisupervisor.results import Applied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_LIMITS = frozenset(("memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "io", "io_weight", "devices"))
#: steps whose absence shows under another name
_STEPS_OF = {
    "capabilities": ("bounding set",), "seccomp": ("no_new_privs",), "mount": ("mount table", "mounts"),
}  # fmt: skip
_FIELDS = ("Uid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp")
REMEDY = "this is a defect or an attack: report it with the kernel's version"


class Readings(NamedTuple):
    """What /proc says of the payload: ``status`` by field, namespace links of the child and of this process, the mounts of
    its namespace that it can reach (none, once its root is a detached tree), whether its /proc is another than ours, the
    groups that it is in, and its rlimits.
    """

    status: dict[str, str]
    links: dict[str, str]
    host_links: dict[str, str]
    uid_map: str
    mounts: str
    own_proc: bool
    cgroup: str
    rlimits: str


def read(pid: int, host_links: dict[str, str]) -> Readings:
    """Raises LaunchError (step "attest") when the child is gone or hides."""
    try:
        lines = _text(f"/proc/{pid}/status").split("\n")
        uid_map, mounts, cgroup, rlimits = [
            _text(f"/proc/{pid}/{name}") for name in ("uid_map", "mountinfo", "cgroup", "limits")
        ]
        own_proc = os.stat(f"/proc/{pid}/root/proc").st_dev != os.stat("/proc").st_dev
        fields = dict(line.split(":\t", 1) for line in lines if line.startswith(_FIELDS))
        return Readings(fields, read_links(pid), host_links, uid_map, mounts, own_proc, cgroup, rlimits)
    except OSError as error:
        raise LaunchError(
            f"cannot read the child back: {error}", step="attest", errno=error.errno, remedy=REMEDY
        ) from error


def _text(path: str) -> str:
    return directories.read(path).decode("ascii", "replace")


def read_links(pid: int | str) -> dict[str, str]:
    """The namespaces of a process, by protection name."""
    found = {}
    for name, link in NAMESPACE_LINKS.items():
        try:
            found[name] = os.readlink(f"/proc/{pid}/ns/{link}")
        except FileNotFoundError:
            continue  # this kernel has no such namespace
    return found


def verify(plan: ChildPlan, options: IsolationOptions, readings: Readings, *, filtered: bool, groups: dict[str, Applied],
           missing: dict[str, str], instead: dict[str, str] | None = None, shift: int = 0,
           places: Mapping[str, str] | None = None) -> dict[str, Applied]:  # fmt: skip
    """``applied``: each protection as it was read back. Raises LaunchError where a planned one does not hold. Pure.

    ``filtered``: a seccomp program was given; ``groups``: what the cgroup files say; ``missing``: why a limit has none,
    ``instead``: what stands in for it; ``shift``: from a child's outer id as its zygote has it to the same as we have it;
    ``places``: where its group lies, by controller, "" on v2.
    """
    applied = {name: _namespace(name, options, readings) for name in NAMESPACE_LINKS}
    applied.update(_limits(options, groups, missing, instead or {}))
    applied["landlock"] = _landlock(plan, options)
    applied["seccomp"] = _seccomp(options, readings.status, filtered)
    applied["capabilities"] = _capabilities(readings.status)
    _check_ids(plan, readings, shift)
    _check_group(readings.cgroup, places or {})
    _check_rlimits(plan, readings.rlimits)
    for name, entry in applied.items():
        lacking = not entry.holds and entry.asked is not None and entry.asked is not False  # swap=0 is asked for
        if lacking and name not in options.degrade and not _left_out(name, plan):
            raise LaunchError(f"{name} was planned but does not hold ({entry.detail})", step="attest", remedy=REMEDY)
    return applied


def _left_out(name: str, plan: ChildPlan) -> bool:
    """Whether an ablation test asked for exactly this layer to be missing."""
    steps = {name, f"{name} namespace", *_STEPS_OF.get(name, ("limits",) if name in _LIMITS else ())}
    return bool(steps & set(plan.without))


def _namespace(name: str, options: IsolationOptions, readings: Readings) -> Applied:
    link = readings.links.get(name, "")
    own = bool(link) and link != readings.host_links.get(name)
    if name == "mount" and options.security.nesting:
        return Applied(
            asked=True, holds=own, how="namespace", detail="nesting: its mounts can be listed, by itself too"
        )
    if name == "mount" and readings.mounts:
        return Applied(asked=True, holds=False, how="", detail=f"its mounts can be listed: {readings.mounts[:80]}")
    if name == "mount" and not readings.own_proc:
        return Applied(asked=True, holds=False, how="", detail="its /proc is the host's: nothing of its own is mounted")
    asked: Any = options.network if name == "network" else True
    if name == "network" and options.network == "host":
        return Applied(asked=False, holds=own, how="the host's network, as asked", detail=link)
    if name == "user":
        link += f"; outside it is uid {readings.status.get('Uid', '?').split()[0]}"
    return Applied(asked=asked, holds=own, how="namespace" if own else "", detail=link or "the kernel has none")


def _limits(
    options: IsolationOptions, groups: dict[str, Applied], missing: dict[str, str], instead: dict[str, str]
) -> dict[str, Applied]:
    applied = {}
    for name, asked in limits_text(options.limits).items():
        entry = groups.get(name)
        if name == "devices" and (entry is None or not entry.holds):
            how = "user namespace: no device node can be made; nodev mounts and a /dev of five harmless ones"
            entry = Applied(asked=True, holds=True, how=how, detail=missing.get(name, ""))
        if name == "swap" and entry is None and name not in missing and asked is not None:
            entry = Applied(asked=asked, holds=True, how="the host has no swap")
        if name in missing:
            entry = Applied(asked=asked, holds=False, how=instead.get(name, ""), detail=missing[name])
        applied[name] = entry or Applied(asked=asked, holds=False, how="", detail="not asked for")
    return applied


def limits_text(limits: Limits) -> dict[str, Any]:
    """What was asked for, by protection name, for ``applied``."""
    return {
        "memory": limits.memory, "swap": limits.swap, "cpus": limits.cpus, "cpu_weight": limits.cpu_weight,
        "cpuset": limits.cpuset, "pids": limits.pids, "io": limits.io or None,
        "io_weight": limits.io_weight, "devices": True,
    }  # fmt: skip


def _landlock(plan: ChildPlan, options: IsolationOptions) -> Applied:
    # The kernel shows Landlock nowhere in /proc: the launch stops if restricting fails, and that is the proof there is.
    holds = plan.landlock_abi > 0 and "landlock" not in plan.without
    asked = options.security.landlock
    missing = "this kernel has none" if asked else "not asked for"
    detail = f"ABI {plan.landlock_abi}, {len(plan.landlock)} rules" if holds else missing
    if asked and options.security.nesting:
        asked = plan.landlock_abi > 0
        rest = "TCP and scopes as else" if asked else "and this kernel's Landlock has no others"
        detail = f"nesting: the rules for files are the inner isolator's; {rest}"
    return Applied(asked=asked, holds=holds, how="landlock" if holds else "", detail=detail)


def _seccomp(options: IsolationOptions, status: dict[str, str], filtered: bool) -> Applied:
    mode, no_new_privs = status.get("Seccomp", "").strip(), status.get("NoNewPrivs", "").strip()
    holds = filtered and mode == "2" and no_new_privs == "1"
    asked = options.security.seccomp and str(options.security.seccomp)
    nesting = "; nesting: clone, unshare, mount and their kind are let through" if options.security.nesting else ""
    detail = f"mode {mode}, no_new_privs {no_new_privs}, filters {status.get('Seccomp_filters', '?').strip()}{nesting}"
    return Applied(asked=asked, holds=holds, how="seccomp filter" if holds else "", detail=detail)


def _capabilities(status: dict[str, str]) -> Applied:
    sets = {name: status.get(name, "?").strip() for name in _CAPABILITY_SETS}
    holds = all(value.strip("0") == "" and value != "?" for value in sets.values())
    return Applied(asked=True, holds=holds, how="all five sets empty" if holds else "", detail=str(sets))


def _check_group(cgroup: str, places: Mapping[str, str]) -> None:
    """Limits in a group's files hold nobody who is not in it. Its name is its own, wherever we see it from."""
    groups: dict[str, str] = {}
    for line in filter(None, cgroup.split("\n")):
        _number, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    for controller, place in places.items():
        if os.path.basename(groups.get(controller, "")) != os.path.basename(place):
            found = groups.get(controller, "none")
            raise LaunchError(f"the child is not in its group {place}, but in {found}", step="attest", remedy=REMEDY)


def _check_rlimits(plan: ChildPlan, limits: str) -> None:
    """The lines are in the order of the resources' numbers, after one with titles; names take 26 columns, with blanks in them."""
    if _left_out("rlimits", plan):
        return
    lines = limits.split("\n")[1:]
    for number, *asked in plan.rlimits:
        words = lines[number][26:].split()[:2]
        if [-1 if word == "unlimited" else int(word) for word in words] != asked:
            message = f"a limit of the process does not hold: {' '.join(lines[number].split())!r}, planned {asked}"
            raise LaunchError(message, step="attest", remedy=REMEDY)


def _check_ids(plan: ChildPlan, readings: Readings, shift: int) -> None:
    if _left_out("user", plan) or "ids" in plan.without:
        return
    inner, outer, count = plan.uid_map.split()
    if readings.uid_map.split() != [inner, str(int(outer) + shift), count] and outer != "0":
        raise LaunchError(f"the id map is {readings.uid_map!r}", step="attest", remedy=REMEDY)
    outside = readings.status.get("Uid", "0").split()
    if "0" in outside:
        raise LaunchError(f"the child is root outside: {outside}", step="attest", remedy=REMEDY)
    groups = readings.status.get("Groups", "").split()
    if groups and plan.uid_map.split()[1] != "0":  # a child with its user's own id has the user's groups
        raise LaunchError(f"the child has groups: {groups}", step="attest", remedy=REMEDY)
