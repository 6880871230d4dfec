"""Pure cgroup v2: where this process may make groups, by whose leave, and making it so.

Nobody may make groups wherever the file rights happen to allow it: systemd owns the tree, and takes controllers away
again from a group that it did not delegate. So a group is ours when systemd says so (``Delegate=yes``), or when no
systemd runs here (a container, a machine without it).

A group with processes cannot hand controllers down ("no internal processes"). In a group that is ours, everything in it
therefore moves into a leaf, once: ``<group>/pisupervisor-host``; children go to ``<group>/pisupervisor/<name>``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EACCES, EBUSY, EPERM, EROFS, ESRCH

from pisupervisor.limits import directories, systemd
from pisupervisor.limits.detect import CgroupHost, Place, find_unified
from pisupervisor.records import NamedTuple

#: in the order in which they are turned on: those of memory and io refuse a group with processes (EBUSY), the others make
#: it a threaded one, in which memory can then never be had (EOPNOTSUPP; seen on 6.1)
CONTROLLERS = ("memory", "io", "pids", "cpu", "cpuset")
LEAF = "pisupervisor-host"
_FILES = {
    "pids": "pids.max", "memory": "memory.max", "cpu": "cpu.max", "cpuset": "cpuset.cpus", "io": "io.max",
}  # fmt: skip
_ROUNDS = 100  # processes may fork while they are moved
_UNIT_SUFFIXES = (".service", ".scope")


class Claim(NamedTuple):
    """A group that is ours, or ``why`` there is none. ``how``: by what right; ``top``: where handing down begins;
    ``remedy``: what helps where the rights are missing; ``scope``: the one that systemd gave for it.
    """

    base: str
    top: str = ""
    how: str = ""
    why: str = ""
    remedy: str = ""
    scope: str = ""


def detect(
    cgroup: str, mountinfo: str, name: str, swap_on: bool, *, member: int | None = None, given: str | None = None
) -> CgroupHost:
    """The CgroupHost of a v2 machine. Moves this process into the leaf, if its own group is ours and it is not there
    yet; makes and removes one group called ``name``. ``member`` and ``given``: see ``limits.detect``.
    """
    own = find_unified(cgroup, mountinfo)
    uid = os.geteuid()
    if own is None:
        nothing = Place(None, None, "the cgroup v2 hierarchy is mounted nowhere that this process sees", _MOUNT)
        return CgroupHost("v2", dict.fromkeys(CONTROLLERS, nothing), memsw=False, swap_on=swap_on, uid=uid)
    if given is not None:
        claim = claim_given(given, own, uid)
    else:
        claim = find_claim(own, mount_of(own), systemd.has_delegated, systemd_runs=systemd.runs(), uid=uid)
    if claim.why and given is None and member is not None and systemd.runs():
        claim = claim_scope(claim, member, mountinfo)
    if claim.why:
        places = dict.fromkeys(CONTROLLERS, Place(claim.base, None, claim.why, claim.remedy))
        return CgroupHost("v2", places, memsw=False, swap_on=swap_on, uid=uid)
    places, memsw = try_claim(claim, name, member)
    return CgroupHost("v2", places, memsw=memsw, swap_on=swap_on, uid=uid, how=claim.how, scope=claim.scope)


_MOUNT = "as root: mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup"


# --- deciding -----------------------------------------------------------------------------------------------------


def find_claim(own: str, mount: str, is_delegated: Callable[[str], bool], *, systemd_runs: bool, uid: int) -> Claim:
    """By what right this process may make groups beside or below its ``own`` one. Pure but for ``is_delegated``."""
    base = os.path.dirname(own) if os.path.basename(own) == LEAF else own
    if not systemd_runs:
        remedy = f"as root: chown {uid} {base} {base}/cgroup.procs {base}/cgroup.subtree_control"
        return Claim(base, top=mount, how="the own group (no systemd here)", remedy=remedy)
    unit, remedy = unit_of(base, mount), systemd.start_delegated(uid)
    if unit and is_delegated(unit):
        return Claim(base, top=unit, how=f"delegated by systemd to {os.path.basename(unit)}", remedy=remedy)
    whose = f"systemd has not delegated {unit} to it" if unit else f"{own} is no part of a unit of systemd"
    return Claim(base, why=f"this process has no group of its own: {whose}", remedy=remedy)


def unit_of(path: str, mount: str) -> str:
    """The directory of the systemd unit that ``path`` is, or lies in; empty where there is none.

    The nearest one: user@1000.service is delegated as a whole, but to the user's systemd, which then owns what is below.
    """
    while path.startswith(mount + "/"):
        if path.endswith(_UNIT_SUFFIXES):
            return path
        path = os.path.dirname(path)
    return ""


def mount_of(path: str) -> str:
    """The mount point above ``path``."""
    while not os.path.ismount(path) and path != "/":
        path = os.path.dirname(path)
    return path


def claim_given(given: str, own: str, uid: int) -> Claim:
    """The group that the caller named. Where this process lives outside of it, the process that children are born from is
    put there (``scope``).
    """
    chown = f"as root: chown {uid} {given} {given}/cgroup.procs {given}/cgroup.subtree_control"
    remedy = f"{chown}; and start the application in it: a user may not move processes into it from outside"
    inside = own == given or own == f"{given}/{LEAF}"
    if not inside and _is_occupied(given):
        return Claim(given, why=f"processes of somebody else live in {given}", remedy="name a group without processes")
    top = given if systemd.runs() else mount_of(given)
    return Claim(given, top=top, how=f"{given}, as asked", remedy=remedy, scope="" if inside else given)


def claim_scope(refused: Claim, member: int, mountinfo: str) -> Claim:
    """A scope of systemd's for the process ``member``, which is of ours; the old claim with one more reason without."""
    try:
        scope = systemd.start_scope(member)
    except systemd.NoScope as error:
        remedy = f"{refused.remedy}; or {error.remedy}" if error.remedy else refused.remedy
        return refused._replace(why=f"{refused.why}, and {error}", remedy=remedy)
    path = find_unified(directories.text(f"/proc/{member}/cgroup"), mountinfo)
    whose = "the system's" if os.geteuid() == 0 else "the user's"
    return Claim(str(path), top=str(path), how=f"{scope}, asked of {whose} systemd", remedy=refused.remedy, scope=scope)


# --- making it so -------------------------------------------------------------------------------------------------


def try_claim(claim: Claim, name: str, member: int | None = None) -> tuple[dict[str, Place], bool]:
    """Hand controllers down to the children-to-be of ``claim.base``, make a group there, look, remove it.

    Returns a Place for each controller, and whether memory groups can limit swap. ``member`` is put into the leaf where
    the claim is a scope.
    """
    try:
        if claim.scope and member is not None:
            put_into_leaf(claim.base, member)
        hand_down(claim.top, claim.base)
        path = make_group(claim.base, name)
    except OSError as error:
        why = f"cannot make a group in {claim.base}: {error.strerror}"
        place = Place(claim.base, error.errno, why, _refused(claim, error, os.geteuid()))
        return dict.fromkeys(CONTROLLERS, place), False
    try:
        files = frozenset(os.listdir(path))
    finally:
        directories.remove(path)
    return {controller: _place(controller, claim.base, files) for controller in CONTROLLERS}, "memory.swap.max" in files


def _refused(claim: Claim, error: OSError, uid: int) -> str:
    """A group that is mounted read-only refuses some writes as somebody else's first: asking for rights would not help there."""
    if error.errno in (EACCES, EPERM) and _is_read_only(claim.base):
        error = OSError(EROFS, os.strerror(EROFS))
    remedy = refusal_remedy(error)
    needs_rights = error.errno == EROFS and uid != 0 and claim.remedy.startswith("as root: chown")
    return f"{remedy}; then {claim.remedy}" if needs_rights else remedy or claim.remedy


def _is_read_only(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _place(controller: str, base: str, files: frozenset[str]) -> Place:
    if _FILES[controller] in files:
        return Place(base)
    return Place(
        base, None, f"the {controller} controller is not handed down to {base}", _hand_down_remedy(controller, base)
    )


def _hand_down_remedy(controller: str, base: str) -> str:
    folder, delegate = "/etc/systemd/system/user@.service.d", "Delegate=cpu cpuset io memory pids"
    whose = "user@" + base.partition("/user@")[2].partition("/")[0]
    if whose != "user@":
        remedy = (
            f"as root: mkdir -p {folder} && printf '[Service]\\n{delegate}\\n' > {folder}/delegate.conf"
            f" && systemctl daemon-reload && systemctl restart {whose}"
        )
    elif base.endswith(_UNIT_SUFFIXES):
        remedy = f"put {delegate} into the unit {os.path.basename(base)}, systemctl daemon-reload, and start it anew"
    else:
        remedy = f"have the container's engine, or whoever made {base}, enable {controller} in the groups above it"
    return f"{remedy}; see /sys/fs/cgroup/cgroup.controllers for what the kernel has (nothing that is on cgroup v1)"


def refusal_remedy(error: OSError) -> str:
    """What helps against a refused write to the tree, where the error alone tells."""
    if error.errno == EROFS:
        return (
            "give the container a writable cgroup tree of its own: podman run --security-opt unmask=/sys/fs/cgroup,"
            " docker run --security-opt writable-cgroups=true (28 and newer; older: --privileged --cgroupns=private); or, as"
            " root with CAP_SYS_ADMIN in it: mount -o remount,bind,rw /sys/fs/cgroup"
        )
    if error.errno == EBUSY:
        return "start the application in a group of its own: processes that it cannot see or move live in this one"
    return ""


def hand_down(top: str, base: str) -> None:
    """Turn controllers on for what lies below ``base``, beginning at ``top``. Raises OSError.

    Above ``base`` only what is possible: its processes, and its rights, are not ours.
    """
    for path in _levels(top, base)[:-1]:
        try:
            if not _is_occupied(path):
                enable(path)
        except OSError:
            continue
    for _ in range(_ROUNDS):
        if _is_occupied(base):
            move_into_leaf(base)
        try:
            enable(base)
            return
        except OSError as error:
            if error.errno != EBUSY:
                raise
    raise OSError(EBUSY, "processes appear faster than they can be moved", base)


def _is_occupied(path: str) -> bool:
    """Whether processes keep it from handing controllers down. The root of the whole tree may have some: it is the only
    group without ``cgroup.type``.
    """
    return os.path.exists(f"{path}/cgroup.type") and bool(directories.read(f"{path}/cgroup.procs"))


def _levels(top: str, base: str) -> list[str]:
    """``("/a", "/a/b/c")`` -> ["/a", "/a/b", "/a/b/c"]."""
    names = base[len(top) :].strip("/").split("/") if base != top else []
    return [top, *("/".join([top, *names[: number + 1]]) for number in range(len(names)))]


def enable(path: str) -> None:
    """Hand down every controller that ``path`` has and we know. Raises OSError, EBUSY where processes are in the way."""
    have = directories.read(f"{path}/cgroup.controllers").decode().split()
    given = directories.read(f"{path}/cgroup.subtree_control").decode().split()
    for controller in CONTROLLERS:  # one by one: a refused one must not take the others with it
        if controller in have and controller not in given:
            _enable(path, controller)


def _enable(path: str, controller: str) -> None:
    try:
        directories.write(f"{path}/cgroup.subtree_control", b"+" + controller.encode())
    except OSError as error:
        if error.errno in (EACCES, EPERM, EROFS, EBUSY):
            raise
        # This controller cannot be had here (cpu: while there are realtime processes); that no file appears tells so.


def move_into_leaf(base: str) -> None:
    """Move every process of ``base`` to the leaf, ourselves among them. Raises OSError."""
    for pid in directories.read(f"{base}/cgroup.procs").split():
        if pid == b"0":
            raise OSError(EBUSY, "a process from outside of this namespace is in it", base)
        put_into_leaf(base, int(pid))


def put_into_leaf(base: str, pid: int) -> None:
    """Move one process to the leaf of ``base``, which is made where it is missing. Raises OSError."""
    leaf = f"{base}/{LEAF}"
    try:
        os.mkdir(leaf)
    except FileExistsError:
        pass
    try:
        directories.write(f"{leaf}/cgroup.procs", b"%d" % pid)
    except OSError as error:
        if error.errno != ESRCH:  # it has ended
            raise


def make_group(base: str, name: str) -> str:
    """Make the group ``name`` with the files of every controller that ``base`` hands down; its path. Raises OSError."""
    path = directories.make(base, name)
    try:
        enable(os.path.dirname(path))  # only now is the parent sure to stay
    except OSError:
        directories.remove(path)
        raise
    return path
