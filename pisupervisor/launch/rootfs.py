"""A root file system of the caller's: which Python is in it, and what it is made of inside. Nothing in it is run here, and
no symbolic link in it leads out of it: all is found by reading, as the child will see it.
"""

from __future__ import annotations

import os
import re
import stat

from pihost import mounts
from pisupervisor.errors import OptionsError
from pisupervisor.launch.interpreter import OLDEST, Interpreter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PLACES = ("/usr/local/bin/python3", "/usr/bin/python3", "/bin/python3", "/opt/python/bin/python3")
#: what a child gets of ours, whatever the root file system has there
_OURS = frozenset(("proc", "sys", "dev", "tmp", "pis", "py"))
_NAME = re.compile(r"python(\d+)\.(\d+)", re.ASCII)
_LINKS = 40  # as many as the kernel follows
_PACKAGES = (
    "{prefix}/lib/python{0}.{1}/site-packages", "{prefix}/local/lib/python{0}.{1}/dist-packages",
    "{prefix}/lib/python{0}/dist-packages",
)  # fmt: skip


def find_python(root: str, python: str | None) -> Interpreter:
    """The Python 3 of a root file system: ``python`` is its path inside, None looks in the usual places. Raises OptionsError."""
    for path in (python,) if python else _PLACES:
        found = resolve(root, path)
        if found is not None and os.access(root + found, os.X_OK) and os.path.isfile(root + found):
            return _interpreter(root, found)
    looked = python or ", ".join(_PLACES)
    raise OptionsError(f"rootfs: no Python in {root} ({looked}); a child needs one inside: python='/path/inside'")


def _interpreter(root: str, executable: str) -> Interpreter:
    name = _NAME.fullmatch(os.path.basename(executable))
    if name is None:
        raise OptionsError(f"rootfs: {executable} in {root} does not lead to a file named pythonX.Y")
    version = int(name[1]), int(name[2])
    if version < OLDEST:
        raise OptionsError(f"rootfs: {executable} is older than Python {OLDEST[0]}.{OLDEST[1]}, which a child needs")
    prefix = os.path.dirname(os.path.dirname(executable))
    stdlib = resolve(root, f"{prefix}/lib/python{name[1]}.{name[2]}")
    if stdlib is None or not os.path.isfile(f"{root}{stdlib}/os.py"):
        raise OptionsError(f"rootfs: no standard library at {prefix}/lib/python{name[1]}.{name[2]} in {root}")
    places = (resolve(root, place.format(*version, prefix=prefix)) for place in _PACKAGES)
    return Interpreter(
        executable=executable, prefix=prefix, stdlib=stdlib, version=version, rootfs=root,
        site=tuple(place for place in places if place and os.path.isdir(root + place)),
    )  # fmt: skip


def resolve(root: str, path: str) -> str | None:
    """Where ``path`` leads inside of ``root``, as after chroot; None where nothing is, or links go round in a circle."""
    parts, found, links = [part for part in path.split("/") if part], "", 0
    while parts:
        part = parts.pop(0)
        if part in (".", ".."):
            found = os.path.dirname(found).rstrip("/") if part == ".." else found
            continue
        try:
            kind = os.lstat(f"{root}{found}/{part}").st_mode
        except OSError:
            return None
        if not stat.S_ISLNK(kind):
            found = f"{found}/{part}"
            continue
        links += 1
        target = os.readlink(f"{root}{found}/{part}")
        if links > _LINKS:
            return None
        parts = [step for step in target.split("/") if step] + parts
        found = "" if target.startswith("/") else found
    return found or "/"


def entries(root: str) -> list[list[Any]]:
    """What the root file system consists of, read-only: folders, files and links of its top, but those that are ours."""
    found: list[list[Any]] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        path = f"/{entry.name}"
        if entry.name in _OURS:
            continue
        if entry.is_symlink():
            found.append(["symlink", path, os.readlink(entry.path)])
        elif entry.is_dir():
            found.append(["layer", entry.path, path, mounts.READ_ONLY])
        elif entry.is_file():
            found.append(["bind", entry.path, path, mounts.READ_ONLY])
    return found


def check_places(root: str, places: list[str]) -> None:
    """Raises OptionsError for a place in a folder of the root file system that is not there: it cannot be made in it."""
    for place in places:
        top = place.split("/")[1]
        is_ours = top in _OURS or not os.path.lexists(f"{root}/{top}")
        if not is_ours and resolve(root, place) != place:
            raise OptionsError(
                f"filesystem: {place} is no place in {root} (it is missing, or a link leads elsewhere); make it there, or"
                " show it at a place of its own, such as ('/host/path', '/mine')"
            )
