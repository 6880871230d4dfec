"""Subordinate ids: what /etc/subuid and /etc/subgid give an ordinary user, mapped by newuidmap and newgidmap (setuid root)."""

from __future__ import annotations

import os

from pisupervisor.errors import FeatureUnavailable, LaunchError
from pisupervisor.launch.ids import IdBlock
from pisupervisor.limits import directories
from pisupervisor.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 256  #: ids of one template: so many children at once
SIZE = 65536  #: ids that a user is usually given
_FIRST = 100_000  # login.defs: SUB_UID_MIN
_TOOLS = ("newuidmap", "newgidmap")
_FOLDERS = ("/usr/bin", "/bin", "/usr/local/bin")


class Range(NamedTuple):
    """``size`` ids that begin with ``uid`` and with ``gid``."""

    uid: int
    gid: int
    size: int


def parse(text: str, names: tuple[str, ...]) -> tuple[int, int]:
    """(first, count) of the largest range of one of ``names``: lines ``user-or-number:first:count``; (0, 0): none. Pure."""
    found = [(first, count) for name, first, count in _entries(text) if name in names]
    return max([(0, 0), *found], key=lambda one: one[1])


def free(text: str) -> int:
    """Where ``SIZE`` ids begin that nobody has: with shared ones, one user's processes are another's to kill. Pure."""
    first = _FIRST
    for begin, end in sorted((begin, begin + count) for _name, begin, count in _entries(text)):
        if first + SIZE <= begin:
            break
        first = max(first, end)
    return first


def _entries(text: str) -> Iterator[tuple[str, int, int]]:
    for line in text.splitlines():
        name, _, rest = line.strip().partition(":")
        first, _, count = rest.partition(":")
        if first.isdecimal() and count.isdecimal():
            yield name, int(first), int(count)


def find(uid: int, folder: str = "/etc") -> Range:
    """The user's own. Raises FeatureUnavailable with what to install or to write."""
    names = (str(uid), _name_of(uid))
    texts = [_read(f"{folder}/{file}") for file in ("subuid", "subgid")]
    (first_uid, uids), (first_gid, gids) = (parse(text, names) for text in texts)
    count = min(uids, gids)
    if count < BLOCK:
        first = free("\n".join(texts))
        ids = f"{first}-{first + SIZE - 1}"
        remedy = f"as root: usermod --add-subuids {ids} --add-subgids {ids} {names[1] or uid}"
        why = f"/etc/subuid and /etc/subgid give uid {uid} {count} ids, and {BLOCK} are needed"
        raise FeatureUnavailable(f"no subordinate ids: {why}", feature="user", remedy=remedy)
    for tool in _TOOLS:
        if not _path_of(tool):
            why = f"no subordinate ids: {tool} is not installed"
            raise FeatureUnavailable(why, feature="user", remedy="as root: apt install uidmap (or shadow-utils)")
    return Range(first_uid, first_gid, count)


def claim(uid: int, found: Range) -> IdBlock:
    """Ids for the children of one template, as its zygote numbers them: 0 is the user, 1 the first of ``found``."""
    folder = f"/run/user/{uid}"
    place = f"{folder}/pisupervisor.ids" if os.access(folder, os.W_OK) else f"/tmp/pisupervisor-{uid}.ids"
    return IdBlock(place, first=1, size=BLOCK, count=found.size // BLOCK)


def write_maps(pid: int, uid: int, gid: int, found: Range) -> None:
    """For the user namespace that ``pid``, a zygote, has just made. Raises LaunchError."""
    import subprocess

    for tool, own, first in ((_TOOLS[0], uid, found.uid), (_TOOLS[1], gid, found.gid)):
        command = [_path_of(tool), *map(str, (pid, 0, own, 1, 1, first, found.size))]
        remedy = f"see that {tool} is setuid root, and not on a mount with nosuid; or leave subordinate_ids out"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LaunchError(f"{tool}: {error}", step="namespaces", remedy=remedy) from error
        if done.returncode:
            raise LaunchError(f"{tool}: {done.stderr.strip()}", step="namespaces", remedy=remedy)


def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _path_of(tool: str) -> str:
    return next((path for folder in _FOLDERS if os.access(path := f"{folder}/{tool}", os.X_OK)), "")


def _read(path: str) -> str:
    try:
        return directories.text(path)
    except OSError:
        return ""
