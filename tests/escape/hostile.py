"""What hostile code needs to speak for itself on the link, and how a test runs it with a bound on its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pisupervisor import IsolationError, Limits, ProcessIsolator
from pisupervisor.launch.seccomp_compile import import_library, native_arch, number_of


def numbers(*names: str) -> dict[str, int]:
    """System calls of this machine; -1 is none, which the kernel answers with ENOSYS."""
    arch, library = native_arch(), import_library()
    found = {name: number_of(name, arch, library) for name in names}
    return {name: -1 if number is None else number for name, number in found.items()}


SYSTEM_CALLS = (
    "bpf", "cachestat", "creat", "fanotify_init", "fchmodat2", "fsopen", "io_setup", "io_uring_setup", "kexec_load", "keyctl",
    "listmount", "lookup_dcookie", "lsm_get_self_attr", "memfd_secret", "migrate_pages", "modify_ldt", "move_mount",
    "move_pages", "mq_open", "name_to_handle_at", "open_by_handle_at", "open_tree", "open_tree_attr", "openat2",
    "perf_event_open", "pidfd_getfd", "pivot_root", "process_madvise", "process_vm_readv", "ptrace", "sched_setattr",
    "seccomp", "setns", "statmount", "unshare", "userfaultfd",
)  # fmt: skip

PRELUDE = (
    f"NUMBERS = {numbers(*SYSTEM_CALLS)}\n"
    + """
import ctypes, fcntl, os, signal, socket, struct, sys, threading, time
HEADER = struct.Struct("<HBBQI")
READY, RESULT, PICKLED, RAISED, REFUSED, PIECE = 64, 65, 66, 67, 68, 69
def frame(kind, ident, body): return HEADER.pack(0x5149, 1, kind, ident, len(body)) + body
def send(data):
    view, sent = memoryview(data), 0
    while sent < len(view): sent += os.write(3, view[sent:sent + 65536])
def ident():
    f = sys._getframe()
    while f:
        if f.f_code.co_name == "serve_one" and "ident" in f.f_locals: return f.f_locals["ident"]
        f = f.f_back
def value(text, *buffers):
    return struct.pack(f"<II{len(buffers)}Q", len(text), len(buffers), *map(len, buffers)) + text + b"".join(buffers)
def forge(kind, body):
    for start in range(0, len(body), 1 << 20):
        part = body[start:start + (1 << 20)]
        send(frame(kind if start + (1 << 20) >= len(body) else PIECE, ident(), part))
    time.sleep(1000)
libc = ctypes.CDLL(None, use_errno=True)
def system_call(name, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(NUMBERS[name]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    return result if result >= 0 else -ctypes.get_errno()
"""
)


def attack(isolator: ProcessIsolator, code: str, timeout: float = 10.0) -> Any:
    """The value of hostile code, or the error of ours that it ended in. Anything else comes out as it is."""
    try:
        return isolator.run_source(PRELUDE + code, timeout=timeout).value
    except IsolationError as error:
        return error


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Fails when what it holds takes longer: a child's misbehaviour must cost the host a known time at most."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < seconds, f"the host was held for {took:.1f} s, {seconds} s are allowed"


def limits(**changes: Any) -> Limits:
    settings: dict[str, Any] = {"memory": "256M", "cpus": 1.0, "pids": 64}
    return Limits(**(settings | changes))
