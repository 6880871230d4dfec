"""What systemd is asked: whether it has delegated a unit's group, and for a scope of our own where it has not.

Only a process of ours goes into such a scope, the zygote; the host application stays where it is. That serves, because
whoever writes limits needs no more than the right to the files, and the zygote is what children are born from.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache

from pisupervisor.limits import directories

#: of the system's systemd: 251 and newer; older, and for root's eyes only
_MARKS = ("user.delegate", "trusted.delegate")
_PATIENCE = 5.0  # seconds; it answers in 10 ms
_NAME, _PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_INSTALL = "pip install 'pisupervisor[systemd]'"


class NoScope(Exception):
    """systemd gives none. The text says why; ``remedy`` what helps."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(why)
        self.remedy = remedy


def runs() -> bool:
    """Whether systemd manages this machine (or container), as sd_booted(3) finds out."""
    return os.path.isdir("/run/systemd/system")


def has_delegated(path: str) -> bool:
    """Whether the unit whose group is ``path`` has ``Delegate=yes``, and this user the rights to it: by the mark on the
    directory, else by asking. A user's systemd leaves no mark (seen on 252).
    """
    return os.access(path, os.W_OK, effective_ids=True) and (_is_marked(path) or _says_delegated(path))


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


# --- a scope of our own -------------------------------------------------------------------------------------------


def start_scope(pid: int) -> str:
    """Have the user's systemd (root: the system's) put ``pid`` into a new delegated scope; the scope's name.

    systemd removes the scope with its last process. Raises NoScope.
    """
    try:
        import dbus_fast  # noqa: F401  here, so that its absence is told from what goes wrong with it
    except ImportError:
        raise NoScope("dbus-fast, with which systemd could be asked for one, is not installed", _INSTALL) from None
    import asyncio
    import threading

    name, failure = f"pisupervisor-{pid}-{directories.start_time(pid)}.scope", []

    def ask() -> None:
        try:
            asyncio.run(asyncio.wait_for(_start_scope(name, pid), _PATIENCE))
        except Exception as error:
            failure.append(error)

    asking = threading.Thread(target=ask)  # the caller may be inside an event loop of its own
    asking.start()
    asking.join()
    if failure:
        raise NoScope(f"systemd did not give one: {failure[0] or type(failure[0]).__name__}") from failure[0]
    return name


async def _start_scope(name: str, pid: int) -> None:
    from dbus_fast import BusType, Message, MessageType, Variant
    from dbus_fast.aio import MessageBus

    properties = [
        ["Description", Variant("s", "Children of pisupervisor")],
        ["Delegate", Variant("b", True)],
        ["PIDs", Variant("au", [pid])],
        ["CollectMode", Variant("s", "inactive-or-failed")],
    ]
    request = Message(
        destination=_NAME, path=_PATH, interface=f"{_NAME}.Manager", member="StartTransientUnit",
        signature="ssa(sv)a(sa(sv))", body=[name, "fail", properties, []],
    )  # fmt: skip
    bus = MessageBus(bus_address=_bus_address(), bus_type=BusType.SYSTEM if os.geteuid() == 0 else BusType.SESSION)
    await bus.connect()
    try:
        reply = await bus.call(request)
        if reply is None or reply.message_type is MessageType.ERROR:
            raise OSError(0, " ".join(map(str, reply.body)) if reply else "no answer")
        await _await_member(name, pid)
    finally:
        bus.disconnect()


def _bus_address() -> str | None:
    """None: where dbus-fast looks by itself."""
    if os.geteuid() == 0 or "DBUS_SESSION_BUS_ADDRESS" in os.environ:
        return None
    return f"unix:path={_runtime_folder()['XDG_RUNTIME_DIR']}/bus"


async def _await_member(name: str, pid: int) -> None:
    """The answer comes before the deed."""
    import asyncio

    deadline = time.monotonic() + _PATIENCE
    while name.encode() not in directories.read(f"/proc/{pid}/cgroup"):
        if time.monotonic() > deadline:
            raise OSError(0, "it did not move the process")
        await asyncio.sleep(0.002)
