"""A kernel that writes down what it is asked and does nothing: the names of ``pihost.syscalls``, and what of ``os`` the
launch uses. ``failing`` names the one call that is refused.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

NEW_FD = 77

_OS_CALLS = {
    "chroot": None, "close": None, "fchdir": None, "dup": NEW_FD, "dup2": None, "open": NEW_FD, "read": b"1",
    "setpriority": None, "setsid": None, "umask": 0, "write": 1, "setrlimit": None,
}  # fmt: skip


class Recorder:
    """``calls`` is what was asked, in order: name and arguments."""

    def __init__(self, failing: str = "", number: int = errno.EPERM) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing, self.number = failing, number

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def note(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name == self.failing:
            raise OSError(self.number, os.strerror(self.number), name)

    def clone(self, flags: int, group: int = 0) -> tuple[int, int]:
        self.note("clone", flags, group)
        return 4711, NEW_FD

    def close_range(self, first: int, last: int) -> None:
        self.note("close_range", first, last)

    def unshare(self, flags: int) -> None:
        self.note("unshare", flags)

    def setns(self, fd: int, kind: int) -> None:
        self.note("setns", fd, kind)

    def mount(self, source: str, target: str, kind: str, flags: int, data: str = "") -> None:
        self.note("mount", source, target, kind, flags, data)

    def umount_detach(self, target: str) -> None:
        self.note("umount_detach", target)

    def pivot_root(self, new: str, old: str) -> None:
        self.note("pivot_root", new, old)

    def open_tree(self, source: str) -> int:
        """A real fd, so that its kind can be asked for."""
        tree = os.open(source, os.O_PATH | os.O_CLOEXEC)
        self.note("open_tree", source)
        return tree

    def set_mount_flags(self, tree: int, flags: int) -> None:
        self.note("set_mount_flags", tree, flags)

    def move_mount(self, tree: int, target: int) -> None:
        self.note("move_mount", tree, os.readlink(f"/proc/self/fd/{target}"))

    def sethostname(self, name: str) -> None:
        self.note("sethostname", name)

    def set_ids(self, uid: int, gid: int) -> None:
        self.note("set_ids", uid, gid)

    def set_death_signal(self, number: int) -> None:
        self.note("set_death_signal", number)

    def set_dumpable(self, dumpable: bool) -> None:
        self.note("set_dumpable", dumpable)

    def leave_realtime_io(self, pid: int) -> None:
        self.note("leave_realtime_io", pid)

    def leave_personality(self) -> None:
        self.note("leave_personality")

    def leave_memory_merging(self) -> None:
        self.note("leave_memory_merging")

    def set_subreaper(self) -> None:
        self.note("set_subreaper")

    def set_no_new_privs(self) -> None:
        self.note("set_no_new_privs")

    def drop_bounding_set(self) -> None:
        self.note("drop_bounding_set")

    def lock_securebits(self) -> None:
        self.note("lock_securebits")

    def drop_capabilities(self) -> None:
        self.note("drop_capabilities")

    def landlock_abi(self) -> int:
        self.note("landlock_abi")
        return 6

    def landlock_ruleset(self, abi: int, file_access: int, network_access: int, scopes: int) -> int:
        self.note("landlock_ruleset", abi, file_access, network_access, scopes)
        return NEW_FD

    def landlock_allow(self, ruleset: int, path: str, access: int) -> None:
        self.note("landlock_allow", ruleset, path, access)

    def landlock_restrict(self, ruleset: int, quiet: bool = False) -> None:
        self.note("landlock_restrict", ruleset, quiet)

    def seccomp_program(self, code: bytes) -> tuple[bytes, Any]:
        return code, None

    def load_seccomp(self, program: tuple[bytes, Any], listen: bool = False) -> int:
        self.note("load_seccomp", program, listen)
        return 9 if listen else 0

    def flush_c_stdio(self) -> None:
        self.note("flush_c_stdio")


class FakeOs:
    """Stands in for ``os`` and ``resource`` in a module under test; constants are the real ones."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        if name in _OS_CALLS:
            return self._noting(name, _OS_CALLS[name])
        value = getattr(os, name)
        if callable(value):
            raise AssertionError(f"the launch calls os.{name}: tell tests/fake_kernel.py of it")
        return value

    def _noting(self, name: str, answer: Any) -> Callable[..., Any]:
        def note(*arguments: object) -> Any:
            self._recorder.note(name, *arguments)
            return answer

        return note
