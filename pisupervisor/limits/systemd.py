"""What systemd is asked: whether it has delegated a unit's group."""

from __future__ import annotations

import os
from functools import lru_cache

_MARKS = (
    "user.delegate",
    "trusted.delegate",
)  # of the system's systemd: 251 and newer; older, and for root's eyes only
_PATIENCE = 5.0  # seconds; it answers in 10 ms


def runs() -> bool:
    """Whether systemd manages this machine (or container), as sd_booted(3) finds out."""
    return os.path.isdir("/run/systemd/system")


def has_delegated(path: str) -> bool:
    """Whether the unit whose group is ``path`` has ``Delegate=yes``: by the mark on the directory, else by asking.

    A user's systemd leaves no mark (seen on 252).
    """
    return _is_marked(path) or _says_delegated(path)


def _is_marked(path: str) -> bool:
    for mark in _MARKS:
        try:
            if os.getxattr(path, mark) == b"1":
                return True
        except OSError:
            continue
    return False


@lru_cache(maxsize=8)  # a unit's delegation is for life, and a question costs 10 ms
def _says_delegated(path: str) -> bool:
    import subprocess

    manager = manager_of(path)
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", **_runtime_folder()}
    command = ["systemctl", manager, "show", "--property=Delegate", "--value", "--", os.path.basename(path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == b"yes"


def manager_of(path: str) -> str:
    """``"--user"`` for what lies below a user@UID.service, else ``"--system"``."""
    return "--user" if "/user@" in os.path.dirname(path) else "--system"


def _runtime_folder() -> dict[str, str]:
    """Where the user's systemd listens; services often run without being told."""
    return {"XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"}


def start_delegated(uid: int) -> str:
    """How to start the application so that it has a group of its own."""
    user = "" if uid == 0 else "--user "
    return (
        f"start the application with: systemd-run {user}--scope -p Delegate=yes -- COMMAND,"
        " or put Delegate=yes into the [Service] part of its unit"
    )
