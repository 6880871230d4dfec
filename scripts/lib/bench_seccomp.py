"""loading the seccomp programs beside libseccomp's own, and what they cost a system call"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

import pyseccomp

from pihost import syscalls
from pisupervisor.launch.seccomp import PACKAGED, SeccompProfile, compile_profile, packaged_path

CALLS = 20_000
BARE, FLOOR, OURS, THEIRS = "no filter", "one instruction", "ours", "libseccomp's"
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
    found = {BARE: b"", FLOOR: struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)}
    found |= {name: compile_profile(name) for name in PACKAGED}
    return found | {f"{OURS}, {len(names)} names": ours(names), f"{THEIRS}, {len(names)} names": libseccomps(names)}


def in_child(program: bytes) -> Sample:
    """A filter stays for life, so each sample has a process of its own."""
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


def sample(program: bytes) -> Sample:
    syscalls.set_no_new_privs()
    load = 0.0
    if program:
        with contextlib.suppress(OSError):  # one that the kernel refuses: the code's own pages are copied by then
            syscalls.load_seccomp(bytes(8))
        start = time.perf_counter_ns()
        syscalls.load_seccomp(program)
        load = (time.perf_counter_ns() - start) / 1000
    return load, each(os.getppid), each(lambda: fcntl.fcntl(0, fcntl.F_GETFD))


def each(call: Callable[[], Any]) -> float:
    """Nanoseconds of one call: the best of three rows, which nobody has interrupted."""
    rows = []
    for _ in range(3):
        start = time.perf_counter_ns()
        for _ in range(CALLS // 3):
            call()
        rows.append((time.perf_counter_ns() - start) / (CALLS // 3))
    return min(rows)


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
    bare = [min(sample[kind] for sample in taken[BARE]) for kind in (1, 2)]
    figures = {
        name: {
            "instructions": len(candidates[name]) // 8,
            "load_us": statistics.median(sample[0] for sample in samples),
            "best_load_us": min(sample[0] for sample in samples),
            "allowed_ns": min(sample[1] for sample in samples) - bare[0],
            "decided_ns": min(sample[2] for sample in samples) - bare[1],
        }
        for name, samples in taken.items() if name != BARE
    }  # fmt: skip
    print(json.dumps(figures) if arguments.json else table(figures))


def table(figures: dict[str, dict[str, float]]) -> str:
    lines = [
        f"pinned to one core; targets: load under {LOAD_TARGET:.0f} us, a call under {CALL_TARGET:.0f} ns",
        f"{'':26} instructions  load us (best)   ns for getppid  ns for fcntl, by its argument",
    ]
    for name, each_of in figures.items():
        lines.append(
            f"{name:26} {each_of['instructions']:12}  {each_of['load_us']:7.1f} ({each_of['best_load_us']:4.1f})"
            f"  {each_of['allowed_ns']:15.1f}  {each_of['decided_ns']:10.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
