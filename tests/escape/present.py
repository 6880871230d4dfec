"""Whether this machine has the thing that a check tries to reach. Absent is not blocked: such a check is skipped."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Iterable

import box
from hostile import numbers

_libc = ctypes.CDLL(None, use_errno=True)


def absent(check: str) -> str:
    """Why the check could prove nothing here; empty where it can."""
    probe = _PROBES.get(check)
    return probe() if probe is not None else ""


def _system_call(name: str, *arguments: int) -> Callable[[], str]:
    def probe() -> str:
        ctypes.set_errno(0)
        result = _libc.syscall(ctypes.c_long(numbers(name)[name]), *map(ctypes.c_long, arguments))
        lacking = result < 0 and ctypes.get_errno() == errno.ENOSYS
        return f"the kernel has no system call {name}" if lacking else ""

    return probe


def _one_of(paths: Iterable[str]) -> Callable[[], str]:
    wanted = list(paths)
    return lambda: "" if any(map(os.path.exists, wanted)) else f"the host has none of {', '.join(wanted)}"


def _queue() -> str:
    fd = _libc.mq_open(f"/{box.PROBE}".encode(), os.O_RDONLY)
    if fd < 0:
        return "the host could make no POSIX queue"
    os.close(fd)
    return ""


def _families() -> str:
    for family in (socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET):
        try:
            kind = socket.SOCK_STREAM if family == socket.AF_VSOCK else socket.SOCK_RAW
            socket.socket(family, kind).close()
        except OSError:
            continue
        return ""
    return "the kernel has none of the families"


def _crypto() -> str:
    try:
        socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET, 0).close()
    except OSError:
        return "the kernel has no AF_ALG"
    return ""


def _handles() -> str:
    handle, mount = (ctypes.c_uint8 * 136)(128), ctypes.c_int()
    got = _libc.name_to_handle_at(-100, b"/proc/self/ns/net", handle, ctypes.byref(mount), 0x200)
    return "namespaces have no handles here (Linux 6.18 has them)" if got < 0 else ""


def _urgent() -> str:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            ours.send(b"x", socket.MSG_OOB)
        except OSError:
            return "the kernel has no urgent data on UNIX sockets"
    return ""


def _x32() -> str:
    ctypes.set_errno(0)
    return (
        "the kernel has no x32 calls (tests/escape/test_box.py tries whose answer it is)"
        if _libc.syscall(ctypes.c_long(0x40000027)) < 0
        else ""
    )


def _core_scheduling() -> str:
    cookie = ctypes.c_uint64()
    here = _libc.prctl(62, 0, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.byref(cookie)) == 0
    return "" if here else "the kernel has no core scheduling, or the machine one thread a core"


def _huge() -> str:
    try:
        os.close(os.memfd_create("huge", 4))
    except OSError:
        return "the kernel has no huge pages with descriptors"
    return ""


def _multipath() -> str:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()
    except OSError:
        return "the kernel has no multipath TCP"
    return ""


def _setuid_su() -> str:
    try:
        return "" if os.stat("/usr/bin/su").st_mode & 0o4000 else "/usr/bin/su is not setuid"
    except OSError:
        return "there is no /usr/bin/su"


_PROC = [
    "kcore",
    "kallsyms",
    "keys",
    "key-users",
    "timer_list",
    "sched_debug",
    "interrupts",
    "iomem",
    "diskstats",
    "modules",
    "config.gz",
    "cmdline",
]
_DEV = [
    "vda",
    "mem",
    "kmem",
    "port",
    "kmsg",
    "fuse",
    "net/tun",
    "kvm",
    "vsock",
    "loop-control",
    "ptmx",
    "tty",
    "console",
    "rtc",
    "hwrng",
    "userfaultfd",
]
_PROBES: dict[str, Callable[[], str]] = {
    "O11": _crypto,
    "O12": _handles,
    "O13": _system_call("listmount", 0, 0, 0, 0),
    "O16": _system_call("fanotify_init", -1, 0),
    "O17": _urgent,
    "O22": _core_scheduling,
    "O24": _huge,
    "O25": _multipath,
    "O27": _system_call("get_mempolicy", 0, 0, 0, 0, 0),
    "O28": _one_of(["/sys/kernel/mm/ksm/run"]),
    "N08": _one_of([f"/run/{box.PROBE}.sock"]),
    "N10": _queue,
    "N11": _one_of([f"/dev/shm/{box.PROBE}"]),
    "F07": _system_call("fsopen", 0, 0),
    "K10": _system_call("pidfd_getfd", -1, -1, 0),
    "K11": _system_call("userfaultfd", -1),
    "K12": _system_call("io_uring_setup", 0, 0),
    "K13": _system_call("keyctl", 0, -4, 0),
    "K21": _families,
    "K15": _x32,
    "K28": _setuid_su,
    "N15": _system_call("clone3", 0, 0),
    "P01": _one_of(["/proc/sys/kernel/core_pattern"]),
    "P02": _one_of(["/proc/sysrq-trigger"]),
    "P03": _one_of(f"/proc/{name}" for name in _PROC),
    "P04": _one_of(["/sys/kernel", "/sys/class/net", "/sys/fs/cgroup"]),
    "P06": _one_of(f"/dev/{name}" for name in _DEV),
    "P09": _one_of(["/sys/kernel/uevent_helper", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/panic"]),
}
