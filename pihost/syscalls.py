"""Thin functions over the kernel, for what the standard library has no name for. The only place that uses ctypes: the C
module of it, because the package around that costs 1 ms, and a start from nothing pays it three times. No Structure: from
Python 3.14 on those import the package, and with it threading, whose hooks every fork then runs.

Every function raises OSError whose ``filename`` is the call's name. ``tests/fake_kernel.py`` has the same names and
records instead of acting.
"""

from __future__ import annotations

import _ctypes
import os
import struct

if False:  # typing costs 5 ms, and only a type checker reads this
    from typing import Any

# int and unsigned, long and unsigned, 64 bits, short, char pointer: by the letters of struct
_TYPES: list[Any] = [type(code, (_ctypes._SimpleCData,), {"_type_": code}) for code in "iIlLQHz"]
_Int, _UInt, _Long, _ULong, _UInt64, _UShort, _Bytes = _TYPES


class _Function(_ctypes.CFuncPtr):
    # The second keeps the GIL: nothing here blocks, and clone() must not run beside another thread.
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_PYTHONAPI | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


class _Libc:
    """Its functions, as attributes."""

    _handle = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]  # what is loaded already

    def __getattr__(self, name: str) -> _Function:
        function = _Function(_ctypes.dlsym(self._handle, name))
        setattr(self, name, function)
        return function


_libc = _Libc()
_MACHINE = os.uname().machine
_X86 = _MACHINE == "x86_64"

CLONE_NEWTIME, CLONE_PIDFD, CLONE_NEWNS, CLONE_NEWCGROUP = 0x80, 0x1000, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_INTO_CGROUP = 0x20000000, 0x40000000, 0x200000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
_MOUNT_ATTR = {MS_RDONLY: 1, MS_NOSUID: 2, MS_NODEV: 4, MS_NOEXEC: 8}

# Numbers from 424 on are the same on every architecture.
_SYS_PIVOT_ROOT = 155 if _X86 else 41
_SYS_CLONE = 56 if _X86 else 220
_SYS_SECCOMP = 317 if _X86 else 277
_SYS_IOPRIO_SET = 251 if _X86 else 30
_SYS_CLONE3, _SYS_CLOSE_RANGE = 435, 436
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _MOVE_BOTH_BY_FD, _LOG_NOTHING = 1, 0x44, 5  # the last: LOG_SAME_EXEC_OFF, LOG_SUBDOMAINS_OFF
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 4, 24, 28
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_SET_MEMORY_MERGE = 36, 38, 47, 67
LAST_FD = (1 << 32) - 1
_SECUREBITS_LOCKED = 0b1110_1111  # noroot, no_setuid_fixup, keep_caps off, no_ambient_raise: each set and locked


def _check(result: int, name: str) -> int:
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def _syscall(name: str, number: int, *arguments: object) -> int:
    return _check(_libc.syscall(_Long(number), *arguments), name)


_libc.prctl.argtypes = (_Int, _ULong, _ULong, _ULong, _ULong)


def _prctl(name: str, option: int, value: int = 0) -> int:
    return _check(_libc.prctl(option, value, 0, 0, 0), name)  # unused arguments must be zero for the newer options


def clone(flags: int, group: int = 0) -> tuple[int, int]:
    """Fork this single-threaded process into new namespaces: (pid, pidfd) in the parent, (0, -1) in the child.
    With CLONE_INTO_CGROUP, the child begins in the v2 group on whose directory ``group`` is open.

    Neither CPython nor glibc is told, as os.fork() would: with one thread there is no lock and no thread to set right,
    and what a module wants done after a fork is done after the payload's, which is an os.fork(). That spares each child
    75 copied pages (0.2 ms). The thread id that glibc caches is stale until then; only our launch code runs before.
    """
    pidfd = _Int(-1)
    if not flags & CLONE_INTO_CGROUP:  # filters refuse clone3, whose flags they cannot see
        word = _ULong(flags | CLONE_PIDFD | 17)
        pid = _libc.syscall(_Long(_SYS_CLONE), word, None, _ctypes.byref(pidfd), None, None)
        return _check(pid, "clone"), pidfd.value
    # struct clone_args: flags, pidfd, two tids, exit signal, stack, its size, tls, set_tid, its size, cgroup
    arguments = _CLONE_ARGS(flags | CLONE_PIDFD, _ctypes.addressof(pidfd), 0, 0, 17, 0, 0, 0, 0, 0, group)
    pid = _libc.syscall(_Long(_SYS_CLONE3), _ctypes.byref(arguments), _ctypes.sizeof(arguments))
    return _check(pid, "clone3"), pidfd.value


def close_range(first: int, last: int) -> None:
    """Close the fds from first to last. os.closerange of Python 3.9 tries every number: 37 s for all of them."""
    _syscall("close_range", _SYS_CLOSE_RANGE, _UInt(first), _UInt(last), _UInt(0))


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    encoded = [os.fsencode(text) or None for text in (source, target, kind)]
    _check(_libc.mount(*encoded, _ULong(flags), os.fsencode(data) or None), f"mount {target}")


def umount_detach(target: str) -> None:
    _check(_libc.umount2(os.fsencode(target), 2), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    _syscall("pivot_root", _SYS_PIVOT_ROOT, new.encode(), old.encode())


def open_tree(source: str) -> int:
    """An fd of a detached copy of what is mounted at ``source``, with everything below it (Linux 5.2)."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    return _syscall(f"open_tree {source}", _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _UInt(flags))


def set_mount_flags(tree: int, flags: int) -> None:
    """Add MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC to every mount of a tree (Linux 5.12)."""
    attributes = sum(bit for flag, bit in _MOUNT_ATTR.items() if flags & flag)
    args = _FOUR_WORDS(attributes, 0, 0, 0)
    _syscall("mount_setattr", _SYS_MOUNT_SETATTR, tree, b"", _AT_RECURSIVE | _AT_EMPTY_PATH, _ctypes.byref(args),
             _ULong(32))  # fmt: skip


def move_mount(tree: int, target: int) -> None:
    """Mount a tree on what the fd ``target`` is open on (Linux 5.2)."""
    _syscall("move_mount", _SYS_MOVE_MOUNT, tree, b"", target, b"", _UInt(_MOVE_BOTH_BY_FD))


def sethostname(name: str) -> None:
    _check(_libc.sethostname(name.encode(), len(name.encode())), "sethostname")
    _check(_libc.setdomainname(b"(none)", 6), "setdomainname")  # NIS's, of which a new namespace has a copy


def set_ids(uid: int, gid: int) -> None:
    """Real, effective and saved ids at once; the group first, while there is still the right to."""
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def set_death_signal(number: int) -> None:
    _prctl("prctl PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, number)


def set_dumpable(dumpable: bool) -> None:
    _prctl("prctl PR_SET_DUMPABLE", _PR_SET_DUMPABLE, int(dumpable))


def leave_realtime_io(pid: int) -> None:
    if _syscall("ioprio_get", _SYS_IOPRIO_SET + 1, 1, pid) >> 13 == 1:
        _syscall("ioprio_set", _SYS_IOPRIO_SET, 1, pid, 0)  # no class: as its nice value says


def leave_personality() -> None:
    """Random addresses, no executable data: for what is executed next, whatever the application does without (setarch)."""
    _check(_libc.personality(_ULong(0)), "personality")


def leave_memory_merging() -> None:
    """What MemoryKSM= of a unit hands down: who waits for a write can tell that somebody has an equal page."""
    _libc.prctl(_PR_SET_MEMORY_MERGE, 0, 0, 0, 0)  # EINVAL before Linux 6.4


def set_subreaper() -> None:
    _prctl("prctl PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def set_no_new_privs() -> None:
    _prctl("prctl PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Take every capability out of the bounding set. Needs CAP_SETPCAP: before the ids change hands for good."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            if capability and _ctypes.get_errno() == 22:  # EINVAL: past the kernel's last
                return
            _check(-1, "prctl PR_CAPBSET_DROP")


def lock_securebits() -> None:
    _prctl("prctl PR_SET_SECUREBITS", _PR_SET_SECUREBITS, _SECUREBITS_LOCKED)


# Made here, in the zygote: a new ctypes array type costs 30 us, which every child would pay.
_THREE_WORDS, _FOUR_WORDS, _CLONE_ARGS = _UInt64 * 3, _UInt64 * 4, _UInt64 * 11
_CAPABILITY_HEADER = (_UInt * 2)(0x20080522, 0)
_NO_CAPABILITIES = (_UInt * 6)()


def drop_capabilities() -> None:
    """Empty the ambient, effective, permitted and inheritable sets."""
    _prctl("prctl PR_CAP_AMBIENT", _PR_CAP_AMBIENT, 4)
    _check(_libc.capset(_ctypes.byref(_CAPABILITY_HEADER), _ctypes.byref(_NO_CAPABILITIES)), "capset")


def landlock_abi() -> int:
    """The Landlock version of this kernel, 0 where it is missing or switched off at boot."""
    version: int = _libc.syscall(_Long(_SYS_LANDLOCK_CREATE), None, _ULong(0), _UInt(1))
    return max(0, version)


def landlock_ruleset(abi: int, file_access: int, network_access: int, scopes: int) -> int:
    """A new ruleset's fd; what the ABI does not know is left out by the size handed over."""
    values = _THREE_WORDS(file_access, network_access, scopes)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    return _syscall("landlock_create_ruleset", _SYS_LANDLOCK_CREATE, _ctypes.byref(values), _ULong(size),
                    _UInt(0))  # fmt: skip


def landlock_allow(ruleset: int, path: str, access: int) -> None:
    """Allow ``access`` to everything at and below ``path``."""
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, parent)  # struct landlock_path_beneath_attr, which is packed
        _syscall(f"landlock_add_rule {path}", _SYS_LANDLOCK_ADD, ruleset, 1, rule, _UInt(0))
    finally:
        os.close(parent)


def landlock_restrict(ruleset: int, quiet: bool = False) -> None:
    _syscall("landlock_restrict_self", _SYS_LANDLOCK_RESTRICT, ruleset, _UInt(_LOG_NOTHING if quiet else 0))


def seccomp_program(code: bytes) -> tuple[bytes, Any]:
    """For load_seccomp, from 8 bytes an instruction: made in the zygote, for a child that holds ``code`` itself copies its
    page (9 us). What is no program gets a length that the kernel refuses.
    """
    count = len(code) // 8 if len(code) % 8 == 0 and len(code) <= 8 * 4096 else 0
    kept = (_UInt64 * count).from_buffer_copy(code)
    return struct.pack("HP", count, _ctypes.addressof(kept)), kept  # struct sock_fprog, and what it points to


def load_seccomp(program: tuple[bytes, Any], listen: bool = False) -> int:
    """Install a filter for this thread and all it will start; ``listen``: an fd by which others are asked where it says so."""
    flags = _UInt(8 if listen else 0)  # SECCOMP_FILTER_FLAG_NEW_LISTENER
    return _syscall("seccomp", _SYS_SECCOMP, _UInt(1), flags, program[0])


def flush_c_stdio() -> None:
    """Write out what C code left in stdio's buffers, so that a call's output is whole when the call ends."""
    _libc.fflush(None)
