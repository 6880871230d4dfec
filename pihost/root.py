"""The private root of a template: built once, in a mount namespace of its own, inherited read-only by every child."""

from __future__ import annotations

import _signal
import os
import select

from pihost import mounts, syscalls
from pihost.jsontext import dump  # now: once the root is built, nothing of the host's can be imported any more
from pihost.plan import PlanError, TemplatePlan

# Any folder that exists serves: the new root is mounted over it in our own namespace, and then becomes "/".
_PLACES = ("/tmp", "/mnt", "/run", "/home", "/usr")


class StepFailed(Exception):
    """One step could not be done; ``step`` names it. The first cause wins: nothing is tried after it."""

    def __init__(self, step: str, error: BaseException) -> None:
        self.step = step
        self.errno = getattr(error, "errno", None) or 0
        where = getattr(error, "filename", None)
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self.detail = f"{where}: {text}" if where else text
        super().__init__(f"{step}: {self.detail}")

    def report(self) -> dict[str, object]:
        """As it travels to the host."""
        return {"failed": self.step, "errno": self.errno, "detail": self.detail}


def enter(control: int, host: int) -> None:
    """Read the template plan, build its root, and exec the interpreter that is inside it."""
    data = await_plan(control, host)
    if not data:
        return  # the host is gone, or thought better of it
    os.umask(0o022)  # the application's could deny us what we make
    step = "plan"
    try:
        plan = TemplatePlan.load(data)
        build(plan, control)
        step = "personality"
        with open("/proc/self/personality", "rb") as file:
            if int(file.read(), 16):  # not asked otherwise: a unit with LockPersonality= may not even do that
                syscalls.leave_personality()
        syscalls.leave_memory_merging()
        step = "interpreter"
        arguments = [plan.interpreter, "-I", "-S", f"{plan.package}/__main__.py", "zygote", str(control), str(host)]
        os.set_inheritable(control, True)
        os.set_inheritable(host, True)
        os.execve(plan.interpreter, arguments, plan.environment)  # noqa: S606
    except (StepFailed, PlanError, OSError) as error:
        failure = error if isinstance(error, StepFailed) else StepFailed(step, error)
        os.write(control, dump(failure.report()))
        os._exit(1)


def await_plan(control: int, host: int) -> bytes:
    """The plan; empty where the host ended instead: a fork of it may hold our socket open, and say nothing.

    The death signal wakes whoever was stopped, to see that end. It also comes when a mere thread of the host ends, which
    is why it is not SIGKILL. For each stage anew: entering a user namespace has cleared it.
    """
    syscalls.set_death_signal(_signal.SIGCONT)
    poll = select.poll()
    for fd in (control, host):
        poll.register(fd, select.POLLIN)
    return os.read(control, 1 << 20) if control in dict(poll.poll()) else b""


def enter_namespaces(own_ids: list[int], control: int = -1) -> None:
    """A mount namespace of our own; for an ordinary user inside a user namespace in which they are root."""
    if not own_ids:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        return
    uid, gid, *more = own_ids
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    if more:  # subordinate ids, too: only from outside can they be mapped, and the host has that done
        os.write(control, dump({"unshared": 1}))
        os.read(control, 1)
        return
    write_proc("self", "setgroups", "deny")
    write_proc("self", "uid_map", f"0 {uid} 1")
    write_proc("self", "gid_map", f"0 {gid} 1")


def write_proc(pid: object, name: str, text: str) -> None:
    """One write to /proc/PID/name: the kernel takes id maps only whole."""
    fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def build(plan: TemplatePlan, control: int = -1) -> None:
    """Build the root of ``plan`` and make it ours. Raises StepFailed naming the mount that failed."""
    step = "namespaces"
    try:
        enter_namespaces(plan.own_ids, control)
        step = "private mounts"
        syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
        entries = mounts.read(plan.root)
        for entry in entries:
            if isinstance(entry, mounts.Bind):
                step = entry.describe()
                entry.open()
        step = "root"
        base = next(place for place in _PLACES if os.path.isdir(place))
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
        syscalls.mount("tmpfs", base, "tmpfs", flags, "size=4m,nr_inodes=4096,mode=755")
        for entry in entries:
            step = entry.describe()
            entry.execute(base)
        step = "pivot"
        _make_root(base)
    except (OSError, ValueError, StopIteration) as error:
        raise StepFailed(step, error) from error


def _make_root(base: str) -> None:
    """pivot_root, not chroot: the old root is gone, not merely out of sight."""
    os.chdir(base)
    syscalls.pivot_root(".", ".")
    syscalls.umount_detach(".")
    os.chdir("/")
    if os.getcwd() != "/":
        raise OSError(2, "the new root is not where it should be", "getcwd")
    flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("", "/", "", flags)
