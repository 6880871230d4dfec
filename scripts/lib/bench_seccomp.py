"""loading the seccomp programs beside libseccomp's own, and what they cost a system call"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import struct
import time
from typing import Any

import pyseccomp

from pihost import syscalls
from pisupervisor.launch.seccomp import PACKAGED, SeccompProfile, compile_profile, packaged_path

CALLS, ROWS = 6_000, 3
BARE, FLOOR, LOOKING, OURS, THEIRS = "no filter", "allows all", "allows all, looks", "ours", "libseccomp's"
LOAD_TARGET, CALL_TARGET = 60.0, 15.0  # us, ns
Sample = tuple[float, float, float]  # us to load; ns of a call that is always allowed; ns of one decided by an argument


def names_of_strict() -> list[str]:
    """The names that ``strict`` allows, without their conditions: an allow-list that both can compile."""
    with open(packaged_path("strict"), encoding="utf-8") as file:
        rules = json.load(file)["syscalls"]
    names = {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    return sorted(name for name in names if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) >= 0)


def libseccomps(names: list[str]) -> bytes:
    """libseccomp's own binary tree over the names."""
    program = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    for name in names:
        program.add_rule(pyseccomp.ALLOW, name)
    with open(os.memfd_create("bench", os.MFD_CLOEXEC), "rb") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def ours(names: list[str]) -> bytes:
    rule = {"names": names, "action": "SCMP_ACT_ALLOW"}
    return SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}).compile()


def programs() -> dict[str, bytes]:
    names = names_of_strict()
    allow, look = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000), struct.pack("=HBBI", 0x20, 0, 0, 16)
    found = {BARE: b"", FLOOR: allow, LOOKING: look + allow}  # what looks at an argument is run for every call
    found |= {name: compile_profile(name) for name in PACKAGED}
    return found | {f"{OURS}, {len(names)} names": ours(names), f"{THEIRS}, {len(names)} names": libseccomps(names)}


def in_child(code: bytes) -> Sample:
    """A filter stays for life, so each sample has a process of its own. As in a launch, the program is made before."""
    program = syscalls.seccomp_program(code) if code else None
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, struct.pack("3d", *sample(program)))
        os._exit(0)
    os.close(writer)
    data = os.read(reader, 64)
    os.close(reader)
    os.waitpid(pid, 0)
    load, allowed, decided = struct.unpack("3d", data)
    return load, allowed, decided


def sample(program: tuple[bytes, Any] | None) -> Sample:
    syscalls.set_no_new_privs()
    load = 0.0
    if program:
        with contextlib.suppress(OSError):  # one that the kernel refuses: the code's own pages are copied by then
            syscalls.load_seccomp(syscalls.seccomp_program(bytes(8)))
        start = time.perf_counter_ns()
        syscalls.load_seccomp(program)
        load = (time.perf_counter_ns() - start) / 1000
    with open("/dev/null", "rb") as file:  # close-on-exec: F_GETFD (1) then says 1
        return load, each("getppid", 0, 0), each("fcntl", file.fileno(), 1)


def each(name: str, *arguments: int) -> float:
    """Nanoseconds of one call of a function of two arguments that gives no 0: the median of some rows.

    lfind() of the C library calls it, so that nothing else is measured: it asks for each element of a table whether it is
    the one, and all elements of a table of empty ones lie at one address, the second argument.
    """
    libc, pointer = ctypes.CDLL(None), ctypes.c_void_p
    libc.lfind.argtypes, libc.lfind.restype = [pointer, pointer, pointer, ctypes.c_size_t, pointer], pointer
    function = ctypes.cast(getattr(libc, name), pointer)
    rows = []
    for _ in range(ROWS):
        count = ctypes.c_size_t(CALLS)
        start = time.perf_counter_ns()
        found = libc.lfind(*arguments, ctypes.byref(count), 0, function)
        rows.append((time.perf_counter_ns() - start) / CALLS)
        if found is not None:
            raise SystemExit(f"{name} failed")
    return statistics.median(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench seccomp", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    candidates = programs()
    taken: dict[str, list[Sample]] = {name: [] for name in candidates}
    for _ in range(arguments.rounds):  # in turn, so that all see the same weather
        for name, program in candidates.items():
            taken[name].append(in_child(program))
    figures = {
        name: {
            "instructions": len(candidates[name]) // 8,
            "load_us": statistics.median(sample[0] for sample in samples),
            "best_load_us": min(sample[0] for sample in samples),
            "getppid_ns": statistics.median(sample[1] for sample in samples),
            "fcntl_ns": statistics.median(sample[2] for sample in samples),
        }
        for name, samples in taken.items()
    }
    print(json.dumps(figures) if arguments.json else table(figures))


def table(figures: dict[str, dict[str, float]]) -> str:
    """Beyond: what our program adds to a filter that lets all pass, which for fcntl is one that looks at arguments too."""
    lines = [
        f"medians, pinned to one core; targets: load under {LOAD_TARGET:.0f} us, a call under {CALL_TARGET:.0f} ns more",
        f"{'':26} instructions  load us (best)   getppid ns  beyond {FLOOR!r}   fcntl ns  beyond {LOOKING!r}",
    ]
    for name, each_of in figures.items():
        allowed, decided = each_of["getppid_ns"], each_of["fcntl_ns"]
        lines.append(
            f"{name:26} {each_of['instructions']:12}  {each_of['load_us']:7.1f} ({each_of['best_load_us']:4.1f})"
            f"  {allowed:11.1f}  {allowed - figures[FLOOR]['getppid_ns']:19.1f}"
            f"  {decided:9.1f}  {decided - figures[LOOKING]['fcntl_ns']:26.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
