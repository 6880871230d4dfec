"""Seccomp profiles: what the packaged ones decide (by evaluator and on the kernel), what a bad one says, the cache."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import bpf
import pyseccomp
import pytest
from hypothesis import given, settings, strategies as st
from seccomp_reference import Reference

from pisupervisor.errors import FeatureUnavailable, ProfileError
from pisupervisor.launch import seccomp_cache, seccomp_compile, seccomp_tree
from pisupervisor.launch.seccomp import PACKAGED, SeccompProfile, compile_profile, packaged_path
from pisupervisor.launch.seccomp_rules import Condition, parse_profile

MACHINES = {"x86_64": bpf.X86_64, "aarch64": bpf.AARCH64}
ALLOW, KILL = bpf.ALLOW, bpf.KILL_PROCESS
EPERM, EINVAL, ENOSYS, EAFNOSUPPORT, ENOTSUP, EPROTONOSUPPORT = (bpf.errno_action(n) for n in (1, 22, 38, 97, 95, 93))
ENOTTY = bpf.errno_action(25)
HIGH = 1 << 32  # a bit that the kernel does not read of a 32-bit argument
O_CREAT, O_TMPFILE, F_SETLK, F_SETLEASE, F_OFD_SETLK = 0o100, 0o20200000, 6, 1024, 37

NATIVE = os.uname().machine
x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of x86-64 are compared")


def number(name: str, machine: str = "x86_64") -> int:
    """The number of a call, found without our own table: libseccomp, else what the kernel's table says."""
    newest = {"mseal": 462, "statmount": 457, "listns": 470, "setxattrat": 463, "fchmodat2": 452}
    if machine == "x86_64":
        newest |= {"uretprobe": 335, "uprobe": 336}
    nr = pyseccomp.resolve_syscall(MACHINES[machine], name)
    return nr if nr >= 0 else newest.get(name, seccomp_compile._NEWER.get(name, -1))


@pytest.fixture(scope="module")
def programs() -> dict[str, bytes]:
    return {name: SeccompProfile.from_file(packaged_path(name)).compile() for name in PACKAGED}


# What the packaged profiles decide ---------------------------------------------------------------------------------

CHILD_NEEDS = """
    read write readv sendmsg recvmsg recvfrom sendto poll ppoll close close_range dup dup2 dup3 pipe2 memfd_create
    fstat newfstatat openat mmap munmap mprotect brk madvise futex getrandom clock_gettime clone wait4 waitid
    pidfd_open kill tgkill exit exit_group rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_sigpending rt_sigqueueinfo rt_tgsigqueueinfo prctl getpid gettid setitimer set_robust_list rseq
    sched_getaffinity prlimit64 getrusage execve fcntl setsid
"""

REFUSED_EVERYWHERE = """
    ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd process_madvise unshare setns mount umount2 pivot_root
    open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr chroot bpf perf_event_open userfaultfd keyctl
    add_key request_key name_to_handle_at open_by_handle_at modify_ldt mq_open mq_unlink reboot kexec_load
    kexec_file_load init_module finit_module delete_module swapon swapoff acct clock_settime settimeofday syslog iopl
    ioperm quotactl quotactl_fd vhangup sethostname setdomainname fanotify_init sched_setattr migrate_pages move_pages
"""

# (call, arguments, default, strict, permissive); one action stands for all three
CASES: list[tuple[Any, ...]] = [
    ("clone", (0x01200011,), ALLOW),  # glibc's fork
    ("clone", (0x003D0F00,), ALLOW),  # glibc's pthread_create
    *[("clone", (flag | 17,), EPERM) for flag in (1 << 17, *(1 << bit for bit in range(25, 31)))],
    ("clone", (HIGH | 0x10000000,), EPERM),
    ("clone3", (), ENOSYS),
    ("openat2", (), ENOSYS),
    ("memfd_secret", (), ENOSYS),
    *[(name, (), ENOSYS) for name in ("io_uring_setup", "io_uring_enter", "io_uring_register")],
    ("statmount", (), ENOSYS, ENOSYS, ALLOW),
    ("mseal", (), ALLOW, ENOSYS, ALLOW),
    ("seccomp", (1, 1 << 3, 0), EPERM),  # NEW_LISTENER
    ("seccomp", (1, HIGH | 1 << 3 | 1, 0), EPERM),
    ("seccomp", (1, 1, 0), EPERM, EPERM, ALLOW),
    *[("prctl", (option, 2), EINVAL, EINVAL, ALLOW) for option in (22, HIGH | 22)],  # PR_SET_SECCOMP
    *[("socket", (family, 1, 0), ALLOW) for family in (1, 2, 10, HIGH | 1)],
    *[("socket", (family, kind | flags, protocol), ALLOW) for family in (2, 10) for flags in (0, 0x800, 0x80800, HIGH)
      for kind, protocol in ((1, 0), (1, 6), (2, 0), (2, 17), (2, 136), (2, HIGH | 17))],
    # The kernel would run modprobe for each of these.
    *[("socket", (family, kind, protocol), EAFNOSUPPORT, EAFNOSUPPORT, ALLOW) for family in (2, 10)
      for kind, protocol in ((1, 1), (1, 17), (1, 136), (2, 6), (2, 2), (4, 0), (5, 0), (5, 132), (6, 33), (1, 132), (2, 115))],
    *[("socket", (family, 2, protocol), EAFNOSUPPORT, EAFNOSUPPORT, ALLOW) for family in (2, 10) for protocol in (1, 58)],
    *[("socket", (family, 3, protocol), EAFNOSUPPORT, EAFNOSUPPORT, ALLOW) for family in (2, 10) for protocol in (0, 1, 255)],
    *[("socket", (1, kind, 0), ALLOW) for kind in (1, 2, 3, 5)],
    *[("socket", (family, kind, protocol), EPROTONOSUPPORT, EPROTONOSUPPORT, ALLOW)
      for family in (2, 10) for kind in (1, 2, 5, 6) for protocol in (256, 262, HIGH | 262)],
    ("mmap", (0, 4096, 3, 0x22), ALLOW),
    *[("mmap", (0, 1 << 21, 3, flags), EPERM) for flags in (0x40022, 0x54040022)],  # MAP_HUGETLB
    *[("memfd_create", (0, flags), ALLOW) for flags in (0, 1, 3, 8)],
    *[("memfd_create", (0, flags), EPERM) for flags in (4, 7, 0x54000004)],  # MFD_HUGETLB
    *[("madvise", (0, 4096, advice), ALLOW) for advice in (0, 4, 8, 13, 14)],
    *[("madvise", (0, 4096, advice), EINVAL) for advice in (12, 20, 21, HIGH | 12)],  # MADV_MERGEABLE, MADV_COLD, MADV_PAGEOUT
    *[(name, (), ENOSYS) for name in ("mbind", "get_mempolicy", "set_mempolicy", "set_mempolicy_home_node")],
    *[("socket", (family, 2, 0), EAFNOSUPPORT) for family in (0, *range(3, 10), *range(11, 50), HIGH | 16, 1 << 31)],
    ("socketpair", (1, 1, 0), ALLOW),
    ("socketpair", (30, 1, 0), EAFNOSUPPORT),  # AF_TIPC
    *[("ioctl", (0, HIGH * upper | cmd), EPERM) for cmd in (0x5412, 0x541C, 0x5423) for upper in (0, 1)],
    *[("ioctl", (0, cmd), ALLOW) for cmd in (0x5401, 0x5413, 0x5421, 0x541B, 0x5451, 0x8905, 0x8912, 0x80108906, 0x40049409)],
    *[("ioctl", (0, cmd), ENOTTY) for cmd in (0x8940, 0x8941, 0x8980, 0x8982, 0x8983, 0x89A0, 0x89A1, HIGH | 0x8940)],  # modprobe
    *[("ioctl", (0, cmd), ENOTTY) for cmd in (0x9408, 0x80089418)],  # BTRFS_IOC_SYNC, BTRFS_IOC_START_SYNC
    *[("ioctl", (0, cmd), ENOTTY, ENOTTY, ALLOW) for cmd in (0x80086601, 0xC020660B, 0xB701, 0xC0189436, 0x8946, 0x1260)],
    *[("personality", (value,), ALLOW, EPERM, ALLOW) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)],
    *[("personality", (value,), EPERM) for value in (0x40000, 0x400000, 0x40008, HIGH | 0x40000)],
    *[(name, (0, bits), EPERM) for name in ("chmod", "fchmod", "creat", "mkdir") for bits in (0o4755, 0o2755, 0o6000)],
    *[(name, (0, 0, bits), EPERM) for name in ("fchmodat", "fchmodat2", "mkdirat") for bits in (0o4755, 0o2755)],
    *[(name, (0, 0o1777), ALLOW) for name in ("chmod", "fchmod", "creat", "mkdir")],
    *[(name, (0, 0, 0o1777), ALLOW) for name in ("fchmodat", "fchmodat2", "mkdirat")],
    ("open", (0, O_CREAT, 0o4755), EPERM),
    ("openat", (0, 0, O_CREAT, 0o2755), EPERM),
    ("openat", (0, 0, O_TMPFILE, 0o4755), EPERM),
    ("openat", (0, 0, O_CREAT, 0o644), ALLOW),
    ("openat", (0, 0, 0, 0o7777), ALLOW),  # nothing is created, the mode is garbage
    ("mknodat", (0, 0, 0o010600), ALLOW),  # mkfifo
    ("mknodat", (0, 0, 0o140600), ALLOW),
    ("mknodat", (0, 0, 0o100644), ALLOW),
    *[("mknodat", (0, 0, mode), EPERM) for mode in (0o020600, 0o060600, 0o104755, 0o030000, 0o120777)],
    ("mknod", (0, 0o020600), EPERM),
    ("mknod", (0, 0o010600), ALLOW, EPERM, ALLOW),
    *[("fcntl", (3, command), ALLOW) for command in (0, 1, 2, 3, 4, 1030, 1032, 1033, 1034)],
    *[("fcntl", (fd, command), EPERM) for fd in (1, 2, 9) for command in (1031, HIGH | 1031)],  # F_SETPIPE_SZ
    *[("fcntl", (3, command), ALLOW, EPERM, ALLOW) for command in (5, F_SETLK, 7, 36, F_OFD_SETLK, 38, 1025, 1026)],
    *[("fcntl", (3, command), EPERM) for command in (F_SETLEASE, 1040, HIGH | F_SETLEASE)],
    ("fcntl", (3, HIGH | F_SETLK), ALLOW, EPERM, ALLOW),
    ("flock", (3, 2), ALLOW, EPERM, ALLOW),
    *[(name, (), EPERM, EPERM, ALLOW) for name in ("inotify_init", "inotify_init1", "inotify_add_watch")],
    *[(name, (), EPERM) for name in ("sync", "syncfs")],
    *[("setsockopt", (3, 1, option), EPERM) for option in (26, 51, HIGH | 26)],  # filters, as machine code
    *[("setsockopt", (3, 6, option), EPERM) for option in (31, HIGH | 31)],  # TCP_ULP
    *[("setsockopt", (3, 6, option), EPERM) for option in (14, 32, 38, HIGH | 38)],  # TCP_MD5SIG, TCP_MD5SIG_EXT, TCP_AO_ADD_KEY
    *[("setsockopt", (3, 17, option), EPERM) for option in (100, HIGH | 100)],  # UDP_ENCAP
    *[("setsockopt", (3, 0, option), ALLOW) for option in (14, 32, 38)],  # IP_MULTICAST_IF, IP_BLOCK_SOURCE
    *[("setsockopt", (3, level, option), ALLOW) for level, option in ((1, 18), (1, 2), (41, 26), (6, 26), (0, 51), (0, 29))],
    *[("setsockopt", (3, 1, option), EPERM) for option in (29, 35, 37, 63, 64, 65, HIGH | 29)],  # SO_TIMESTAMP
    *[("setsockopt", (3, 17, option), EPERM) for option in (104, HIGH | 104)],  # UDP_GRO
    *[("setsockopt", (3, level, option), EPERM) for level in (0, 41) for option in (64, 65, 96, 97, 128, 129)],  # netfilter
    *[("setsockopt", (3, 41, option), ALLOW) for option in (66, 67, 70, 72)],  # IPV6_RECVTCLASS, IPV6_TCLASS, ...
    *[("setsockopt", (3, 41, option), EPERM) for option in (20, 27, 42, 46, HIGH | 20)],  # IPV6_JOIN_GROUP ...
    *[("setsockopt", (3, 0, option), ALLOW) for option in (20, 27, 35, 42, 46)],
    *[("fadvise64", (3, 0, 0, advice), ALLOW) for advice in (0, 1, 2, 3, 5)],
    *[("fadvise64", (3, 0, 0, advice), EINVAL) for advice in (4, HIGH | 4)],  # POSIX_FADV_DONTNEED
    # PR_SCHED_CORE, PR_SET_MEMORY_MERGE, PR_SET_VMA
    *[("prctl", (option, 1), EINVAL) for option in (62, 67, 0x53564D41, HIGH | 62)],
    *[("prctl", (option, 1), ALLOW) for option in (1, 15, 38, 61, 63)],
    ("setpriority", (0, 0, -20), EPERM),
    ("setpriority", (0, 0, 0xFFFFFFEC), EPERM),  # -20 as a C int
    ("setpriority", (0, 0, 10), ALLOW, EPERM, ALLOW),
    *[("sched_setscheduler", (0, policy), EPERM) for policy in (1, 2, 6, 0x40000001)],
    *[("sched_setscheduler", (0, policy), ALLOW, EPERM, ALLOW) for policy in (0, 3, 5, 0x40000000)],
    ("ioprio_set", (1, 0, 1 << 13), EPERM),
    ("ioprio_set", (1, 0, 2 << 13 | 4), ALLOW, EPERM, ALLOW),
    *[(name, (0, 0, 0, size), ALLOW, ENOTSUP, ALLOW) for name in ("setxattr", "fsetxattr") for size in (0, 1024, 2047)],
    *[(name, (0, 0, 0, size), ENOTSUP) for name in ("setxattr", "lsetxattr", "fsetxattr") for size in (2048, 65536)],
    ("setxattrat", (), ENOSYS, ENOTSUP, ENOSYS),
]  # fmt: skip


@x86_64
@pytest.mark.parametrize(("place", "profile"), list(enumerate(PACKAGED)))
def test_packaged_profile_decides(programs: dict[str, bytes], place: int, profile: str) -> None:
    wrong = []
    for name, args, *actions in CASES:
        expected = actions[place] if len(actions) > 1 else actions[0]
        got = bpf.run(programs[profile], number(name), args)
        if got != expected:
            wrong.append(f"{name}{args}: {got:#x}, expected {expected:#x}")
    assert not wrong


@x86_64
@pytest.mark.parametrize("profile", PACKAGED)
@pytest.mark.parametrize(("kernel", "action"), [((6, 15), EPERM), ((6, 16), ALLOW)])
def test_a_socket_that_takes_long_to_close_is_nobodys_where_the_host_cannot_refuse_it(
    profile: str, kernel: tuple[int, int], action: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seccomp_compile, "_kernel", lambda: kernel)
    program = SeccompProfile.from_file(packaged_path(profile)).compile()
    assert bpf.run(program, number("setsockopt"), (3, 1, 13)) == action  # SO_LINGER
    assert bpf.run(program, number("setsockopt"), (3, 0, 13)) == ALLOW


@x86_64
@pytest.mark.parametrize("profile", PACKAGED)
def test_child_has_what_it_needs_and_not_what_is_dangerous(programs: dict[str, bytes], profile: str) -> None:
    denied = [name for name in CHILD_NEEDS.split() if bpf.run(programs[profile], number(name)) != ALLOW]
    open_ = [name for name in REFUSED_EVERYWHERE.split() if bpf.run(programs[profile], number(name)) != EPERM]
    assert (denied, open_) == ([], [])


@x86_64
@pytest.mark.parametrize("profile", PACKAGED)
def test_every_program_is_one_the_kernel_takes(programs: dict[str, bytes], profile: str) -> None:
    bpf.check(programs[profile])
    assert len(programs[profile]) // 8 <= 235  # every child loads it


ANY_PROFILE = {
    **{name: packaged_path(name) for name in PACKAGED},
    "allow everything": {"defaultAction": "SCMP_ACT_ALLOW"},
    "deny everything": {"defaultAction": "SCMP_ACT_ERRNO"},
    "allow clone3": {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["clone3", "seccomp"], "action": "SCMP_ACT_ALLOW"}],
    },
}


@x86_64
@pytest.mark.parametrize("profile", ANY_PROFILE)
def test_what_holds_whatever_a_profile_says(profile: str) -> None:
    source = ANY_PROFILE[profile]
    load = SeccompProfile.from_file if isinstance(source, str) else SeccompProfile.from_dict
    program = load(source).compile()  # type: ignore[operator]
    numbers = (0, 1, 39, 59, 435, 471, 472, 1023)
    for arch in (bpf.I386, bpf.AARCH64, 0):
        assert {bpf.run(program, nr, arch=arch) for nr in numbers} == {KILL}
    assert {bpf.run(program, 0x40000000 | nr) for nr in (*numbers, 0x3FFFFFFF)} == {KILL}
    assert {bpf.run(program, nr) for nr in (337, 400, 423, 472, 512, 547, 999, 0x3FFFFFFF)} == {ENOSYS}
    assert {bpf.run(program, -1), bpf.run(program, 1 << 31)} == {KILL}
    assert bpf.run(program, number("clone3"), (0, 88)) == ENOSYS
    assert bpf.run(program, number("seccomp"), (1, 1 << 3, 0)) == EPERM


# The compiler against the meaning of the rules ---------------------------------------------------------------------

COMPARE = {
    "EQ": lambda v, a, b: v == a, "NE": lambda v, a, b: v != a, "LT": lambda v, a, b: v < a,
    "LE": lambda v, a, b: v <= a, "GE": lambda v, a, b: v >= a, "GT": lambda v, a, b: v > a,
    "MASKED_EQ": lambda v, a, b: v & a == b,
}  # fmt: skip


def matches(rule: dict[str, Any], args: tuple[int, ...]) -> bool:
    return all(
        COMPARE[c["op"].removeprefix("SCMP_CMP_")](args[c["index"]], c["value"], c.get("valueTwo", 0))
        for c in rule.get("args", ())
    )


def meaning(rules: list[dict[str, Any]], default: int, args: tuple[int, ...]) -> int:
    """What the rules of one call say: conditional denials, allowances, other denials, default."""
    denials = [rule for rule in rules if rule["action"] != "SCMP_ACT_ALLOW"]
    for rule in denials:
        if rule.get("args") and matches(rule, args):
            return bpf.errno_action(rule["errnoRet"])
    if any(matches(rule, args) for rule in rules if rule not in denials):
        return ALLOW
    plain = [rule for rule in denials if not rule.get("args")]
    return bpf.errno_action(plain[0]["errnoRet"]) if plain else default


def interesting_arguments(rules: list[dict[str, Any]]) -> itertools.product[tuple[int, ...]]:
    """Every combination of values at and beside what the rules compare; and every single bit."""
    pools: list[set[int]] = [{0} for _ in range(6)]
    conditions = [condition for rule in rules for condition in rule.get("args") or ()]
    bits = range(64) if len({condition["index"] for condition in conditions}) < 3 else (0, 3, 8, 31, 32)
    for condition in conditions:
        for value in (condition["value"], condition.get("valueTwo", 0)):
            near = {value, value ^ 1, value | HIGH}
            if len(bits) == 64:
                near |= {max(value - 1, 0), value + 1, value | 1 << 63}
            pools[condition["index"]] |= near | {(1 << 64) - 1} | {1 << bit for bit in bits}
    return itertools.product(*(sorted(value & (1 << 64) - 1 for value in pool) for pool in pools))


def by_number(profile: dict[str, Any], machine: str = "x86_64") -> dict[int, list[dict[str, Any]]]:
    """The rules for each call; a name that this machine does not have stands at a negative number."""
    found: dict[int, list[dict[str, Any]]] = {}
    kernel = tuple(map(int, os.uname().release.split(".")[:2]))
    for entry in profile.get("syscalls", ()):
        if kernel >= tuple(map(int, entry.get("excludes", {}).get("minKernel", "999.0").split("."))):
            continue
        for name in entry["names"]:
            found.setdefault(number(name, machine), []).append(entry)
    return found


def has_call(nr: int, machine: str) -> bool:
    try:
        return bool(pyseccomp.resolve_syscall(MACHINES[machine], nr))
    except ValueError:
        return nr in seccomp_compile._NEWER.values() or (machine == "x86_64" and nr in (335, 336))


def differences(profile: dict[str, Any], program: bytes, machine: str = "x86_64") -> list[str]:
    """Where the program does not do what the rules say: every number, the interesting arguments."""
    default = ALLOW if profile["defaultAction"] == "SCMP_ACT_ALLOW" else EPERM
    rules_of = by_number(profile, machine)
    found = []
    for nr in range(1000):
        if nr in (number("seccomp", machine), number("clone3", machine)):
            continue  # never only by rule
        rules = rules_of.get(nr, [])
        for args in interesting_arguments(rules):
            expected = meaning(rules, default, args) if has_call(nr, machine) else ENOSYS
            got = bpf.run(program, nr, args, MACHINES[machine])
            if got != expected:
                found.append(f"{nr}{args}: {got:#x}, expected {expected:#x}")
    return found


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("profile", PACKAGED)
def test_program_means_what_the_rules_say_for_every_call(profile: str, machine: str) -> None:
    """Compiled for either machine wherever this runs."""
    source = Path(packaged_path(profile)).read_bytes()
    program = seccomp_compile.compile_rules(parse_profile(source), machine)
    bpf.check(program)
    assert differences(json.loads(source), program, machine) == []


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("profile", [*PACKAGED, "docker"])
def test_our_program_equals_libseccomps(profile: str, machine: str) -> None:
    """The same rules, compiled by libseccomp, decide every call of the machine alike, clone3 and seccomp too."""
    source = json.dumps(DOCKER_STYLE).encode() if profile == "docker" else Path(packaged_path(profile)).read_bytes()
    policy = parse_profile(source)
    ours, theirs = seccomp_compile.compile_rules(policy, machine), Reference(policy, machine)
    rules_of = by_number(json.loads(source), machine)
    rules_of[number("seccomp", machine)] = [{"args": [{"index": 1, "value": 8, "op": "SCMP_CMP_EQ"}]}]
    wrong = [
        (nr, args) for nr in range(472) if has_call(nr, machine) and theirs.knows(nr)
        for args in interesting_arguments(rules_of.get(nr, []))
        if bpf.run(ours, nr, args, MACHINES[machine]) != theirs.decide(nr, args)
    ]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize("profile", PACKAGED)
def test_aarch64_program_refuses_every_other_machine_and_unknown_numbers(profile: str) -> None:
    policy = parse_profile(Path(packaged_path(profile)).read_bytes())
    program = seccomp_compile.compile_rules(policy, "aarch64")
    assert {bpf.run(program, nr, arch=arch) for nr in (0, 1, 56, 220) for arch in (bpf.X86_64, 0x40000028, 0)} == {KILL}
    unknown = (244, 259, 300, 423, 472, 999, 0x40000000, 0xFFFFFFFF)
    assert {bpf.run(program, nr, arch=bpf.AARCH64) for nr in unknown} == {ENOSYS}
    denied = [
        name for name in CHILD_NEEDS.split() if number(name, "aarch64") >= 0
        and bpf.run(program, number(name, "aarch64"), arch=bpf.AARCH64) != ALLOW
    ]  # fmt: skip
    assert denied == []


@pytest.mark.parametrize("profile", PACKAGED)
def test_every_packaged_rule_gives_its_reason_and_compares_what_the_kernel_reads(profile: str) -> None:
    for entry in json.loads(Path(packaged_path(profile)).read_text())["syscalls"]:
        assert len(entry["comment"]) >= 5, entry
        for condition in entry.get("args", ()):
            assert condition["op"] == "SCMP_CMP_MASKED_EQ"
            assert 0 < condition["value"] <= 0xFFFFFFFF, entry  # or a set upper bit walks past


_MASKS = st.sampled_from((0x3, 0xF0, 0xFF, 0xFFFFFFFF, 1 << 33 | 1))
_CONDITION = st.builds(
    lambda argument, op, mask, wanted: Condition(argument, op, mask, wanted & mask),  # no others get through the parser
    st.integers(0, 1), st.sampled_from((4, 7)), _MASKS, st.sampled_from((0, 1, 2, 0x10, 0xF0, 1 << 33)),
)  # fmt: skip
_CASES = st.lists(st.tuples(st.lists(_CONDITION, min_size=1, max_size=2).map(tuple), st.sampled_from((EPERM, ALLOW))))


@given(st.lists(st.builds(seccomp_tree.Decision, _CASES.map(tuple), st.sampled_from((EPERM, ALLOW))), max_size=12))
@settings(max_examples=150, deadline=None)
def test_chains_that_share_loads_masks_and_ends(decisions: list[seccomp_tree.Decision]) -> None:
    """Whatever is left out because it is known already, or stands elsewhere: the first case that holds decides."""
    parts = seccomp_tree.ranges(dict(enumerate(decisions)), [(len(decisions), seccomp_tree.Decision((), ENOSYS))])
    code = seccomp_tree.assemble(bpf.X86_64, KILL, parts)
    program = b"".join(seccomp_tree.INSTRUCTION.pack(*each) for each in code)
    bpf.check(program)
    values = (0, 1, 2, 3, 0x10, 0x12, 0xF0, 0xFF, 0x1F0, 1 << 33, 1 << 33 | 1, (1 << 64) - 1)
    for nr, decision in enumerate(decisions):
        for args in itertools.product(values, values):
            wanted = next(
                (action for conditions, action in decision.cases if holds_all(conditions, args)), decision.final
            )
            assert bpf.run(program, nr, args) == wanted, (nr, args)
    assert bpf.run(program, len(decisions)) == ENOSYS


def holds_all(conditions: tuple[Condition, ...], args: tuple[int, ...]) -> bool:
    return all(
        args[each.argument] == each.value if each.op == 4 else args[each.argument] & each.value == each.value_two
        for each in conditions
    )


@pytest.mark.parametrize(("profile", "instructions"), [("default", 224), ("strict", 231), ("permissive", 213)])
def test_a_program_is_as_short_as_it_was_made(profile: str, instructions: int) -> None:
    """Each instruction costs every child 0.2 us at its launch. What cases have in common is asked once, and every load and mask
    shared that leads to the same: without that they were 15 more. 27 came with what O24 to O30 try, 49 with O31 to O35.
    """
    source = Path(packaged_path(profile)).read_bytes()
    assert len(seccomp_compile.compile_rules(parse_profile(source), "x86_64")) // 8 <= instructions


@x86_64
def test_program_with_far_jumps_means_what_its_rules_say() -> None:
    """More than a conditional jump reaches over, so that returns are repeated and long jumps written."""
    names = [pyseccomp.resolve_syscall(bpf.X86_64, nr).decode() for nr in range(0, 300, 2)]
    rules = [
        rule("ALLOW", name, args=((place % 6, "EQ", place), (place % 5, "MASKED_EQ", 0xFF, place % 256)))
        for place, name in enumerate(names) if name != "getpid"
    ]  # fmt: skip
    policy = parse_profile(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}).encode())
    ours, theirs = seccomp_compile.compile_rules(policy, "x86_64"), Reference(policy, "x86_64")
    bpf.check(ours)
    assert len(ours) // 8 > 600
    samples = [tuple(place if i in (place % 6, place % 5) else 0 for i in range(6)) for place in range(0, 150, 7)]
    for nr in range(336):
        for args in (*samples, (0,) * 6):
            assert bpf.run(ours, nr, args) == theirs.decide(nr, args), (nr, args)


def rule(
    action: str, *names: str, errno: int = 1, args: tuple[tuple[Any, ...], ...] = (), **more: Any
) -> dict[str, Any]:
    keys = ("index", "op", "value", "valueTwo")
    conditions = [dict(zip(keys, arg, strict=False)) for arg in args]
    for condition in conditions:
        condition["op"] = f"SCMP_CMP_{condition['op']}"
    return {"names": list(names), "action": f"SCMP_ACT_{action}", "errnoRet": errno, "args": conditions, **more}


@x86_64
@pytest.mark.parametrize("op", [op for op in COMPARE if op != "MASKED_EQ"])
@pytest.mark.parametrize("default", ["ALLOW", "ERRNO"])
def test_every_comparison_in_every_stage(default: str, op: str) -> None:
    profile = {
        "defaultAction": f"SCMP_ACT_{default}",
        "defaultErrnoRet": 1,
        "syscalls": [
            rule("ALLOW", "read", "write", "dup", args=((1, op, 5), (2, "MASKED_EQ", 0xF0, 0x30))),
            rule("ERRNO", "write", errno=7),
            rule("ERRNO", "dup", errno=9, args=((1, op, 1 << 40),)),
            rule("ALLOW", "ioctl"),
            rule("ERRNO", "ioctl", errno=11, args=((1, op, 1 << 33),)),
        ],
    }
    assert differences(profile, SeccompProfile.from_dict(profile).compile()) == []


@x86_64
def test_order_of_rules_does_not_matter() -> None:
    rules = [
        rule("ALLOW", "socket", args=((0, "EQ", 1),)),
        rule("ERRNO", "socket", errno=97),
        rule("ALLOW", "ioctl"),
        rule("ERRNO", "ioctl", args=((1, "EQ", 7),)),
        rule("ALLOW", "mkdir"),
        rule("ERRNO", "mkdir", errno=30),
    ]
    for order in (rules, rules[::-1]):
        program = SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": order}).compile()
        assert bpf.run(program, number("socket"), (1,)) == ALLOW
        assert bpf.run(program, number("socket"), (2,)) == EAFNOSUPPORT
        assert bpf.run(program, number("ioctl"), (0, 7)) == EPERM
        assert bpf.run(program, number("ioctl"), (0, 8)) == ALLOW
        assert bpf.run(program, number("mkdir")) == bpf.errno_action(30)  # a denial is never lost


@x86_64
def test_actions_of_a_profile() -> None:
    rules = [
        rule("KILL_PROCESS", "mount"), rule("KILL", "umount2"), rule("LOG", "sync"), rule("TRAP", "acct"),
        rule("TRACE", "chroot", errno=5), rule("ERRNO", "clone3", errno=13), rule("KILL_PROCESS", "seccomp"),
    ]  # fmt: skip
    program = SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_KILL_THREAD", "syscalls": rules}).compile()
    got = [bpf.run(program, number(name)) for name in ("mount", "umount2", "sync", "acct", "chroot", "clone3", "read")]
    assert got == [KILL, bpf.KILL_THREAD, bpf.LOG, 0x00030000, 0x7FF00005, bpf.errno_action(13), bpf.KILL_THREAD]
    assert bpf.run(program, number("seccomp"), (1, 1 << 3)) == KILL  # a harder denial than ours stays


# Profiles that Docker and Podman users have ------------------------------------------------------------------------

DOCKER_STYLE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
        {"architecture": "SCMP_ARCH_RISCV64", "subArchitectures": None},
    ],
    "syscalls": [
        {"names": ["read", "write", "recv", "_llseek", "stat64", "riscv_hwprobe", "mseal", "setxattrat"],
         "action": "SCMP_ACT_ALLOW"},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["acct"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["sync_file_range"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        {"names": ["bpf", "clone", "clone3", "setns"], "action": "SCMP_ACT_ALLOW",
         "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {
            "names": ["clone"], "action": "SCMP_ACT_ALLOW", "comment": "no namespaces",
            "args": [{"index": 0, "value": 0x7E020000, "op": "SCMP_CMP_MASKED_EQ"}],
            "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390", "s390x"]},
        },
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["getpid"], "action": "SCMP_ACT_ALLOW", "args": None, "includes": {},
         "excludes": {"arches": ["amd64"]}},
        {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errno": "EINVAL", "errnoRet": 1, "args": [
            {"index": 0, "value": 16, "valueTwo": 0, "op": "SCMP_CMP_EQ"},
            {"index": 2, "value": 9, "op": "SCMP_CMP_EQ"}]},
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 2, "value": 9, "op": "SCMP_CMP_NE"}]},
        {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
    ],
}  # fmt: skip


@x86_64
def test_docker_style_profile_loads_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "docker.json"
    file.write_text(json.dumps(DOCKER_STYLE, indent="\t"))
    program = SeccompProfile.from_file(file).compile()
    allowed = ("read", "write", "mseal", "setxattrat", "ptrace", "arch_prctl", "clone")
    assert [name for name in allowed if bpf.run(program, number(name)) != ALLOW] == []
    refused = ("acct", "sync_file_range", "bpf", "setns", "getpid", "openat")
    assert [name for name in refused if bpf.run(program, number(name)) != EPERM] == []
    assert bpf.run(program, number("clone3")) == ENOSYS
    assert bpf.run(program, number("clone"), (0x10000000,)) == EPERM
    assert bpf.run(program, number("socket"), (16, 3, 9)) == bpf.errno_action(22)
    assert bpf.run(program, number("socket"), (2, 1, 6)) == ALLOW
    assert bpf.run(program, number("personality"), (8,)) == ALLOW  # one argument twice: either may match
    assert bpf.run(program, number("personality"), (9,)) == EPERM


def test_architectures_and_flags_of_the_oci_spec_are_known() -> None:
    """A child loads its filter on x86-64 and aarch64 alone; the others are in everybody's profiles."""
    names = (
        "X86 X86_64 X32 ARM AARCH64 MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64 PPC64LE S390 S390X PARISC"
        " PARISC64 RISCV64 LOONGARCH64 M68K SH SHEB"
    )
    arches = "amd64 386 x86 x32 arm arm64 mips64le ppc64le s390 s390x riscv64 loong64"
    rule_ = rule("ERRNO", "acct") | {"includes": {"arches": arches.split()}, "excludes": {"arches": ["arm64"]}}
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [f"SCMP_ARCH_{name}" for name in names.split()],
        "flags": [f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV")],
        "syscalls": [rule_],
    }
    SeccompProfile.from_dict(profile).compile()


# Bad profiles ------------------------------------------------------------------------------------------------------

GOOD_RULE = '{"names": ["read"], "action": "SCMP_ACT_ALLOW"}'
BAD_PROFILES = {
    "not JSON": ('{\n"defaultAction": "SCMP_ACT_ALLOW",\n]', 3, "not JSON"),
    "no object": ("[]", 1, "must be an object, not a list"),
    "deep": ("[" * 100_000, None, "not JSON"),
    "not UTF-8": (b'{\n"comment": "\xff"}', 2, "UTF-8"),
    "no default": ('{\n"syscalls": []}', 1, "'defaultAction': None is no action"),
    "unknown default": ('{\n\n"defaultAction": "ALLOW"}', 3, "'ALLOW' is no action"),
    "unknown field": ('{"defaultAction": "SCMP_ACT_ALLOW",\n"sysCalls": []}', 2, "no field 'sysCalls'"),
    "bad errno": ('{"defaultAction": "SCMP_ACT_ERRNO",\n"defaultErrnoRet": 4096}', 2, "from 0 to 4095"),
    "bad arch": ('{"defaultAction": "SCMP_ACT_ALLOW",\n"architectures": [5]}', 2, "non-empty strings"),
    "unknown arch": ('{"defaultAction": "SCMP_ACT_ALLOW",\n"architectures": ["SCMP_ARCH_X68_64"]}', 2, "ARCH_X68_64' is not"),
    "unknown flag": ('{"defaultAction": "SCMP_ACT_ALLOW",\n"flags": ["SECCOMP_FILTER_FLAG_LOGS"]}', 2, "FLAG_LOGS' is not known"),
    "unknown sub-arch": (
        '{"defaultAction": "SCMP_ACT_ALLOW",\n"archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": [\n"X86"]}]}',
        3, "'subArchitectures': 'X86' is not known",
    ),
    "sub-architectures": (
        '{"defaultAction": "SCMP_ACT_ALLOW",\n"archMap": [{"architecture": "SCMP_ARCH_X86_64",\n"subArchitectures": 5}]}',
        3, "'subArchitectures' must be a list, not a number",
    ),
    "given twice": (f'{{"defaultAction": "SCMP_ACT_ALLOW",\n"syscalls": [{GOOD_RULE}],\n"syscalls": []}}', 2, "'syscalls' twice"),
    "no list": ('{"defaultAction": "SCMP_ACT_ALLOW",\n"syscalls": {}}', 2, "must be a list, not an object"),
    "no names": ("{}", 3, "'names'"),
    "empty names": ('{"names": [],\n"action": "SCMP_ACT_ALLOW"}', 3, "'names'"),
    "names is text": ('{"action": "SCMP_ACT_ALLOW",\n"names": "read"}', 4, "must be a list, not a string"),
    "unknown name": ('{"action": "SCMP_ACT_ALLOW",\n"names": ["read",\n"opennat"]}', 5, "system call 'opennat'"),
    "half a character": ('{"action": "SCMP_ACT_ALLOW", "optional": true,\n"names": ["\\ud800"]}', 4, "can be shown"),
    "unknown action": ('{"names": ["read"],\n"action": "SCMP_ACT_DENY"}', 4, "SCMP_ACT_DENY"),
    "unknown errno": ('{"names": ["read"], "action": "SCMP_ACT_ERRNO",\n"errno": "EWHAT"}', 4, "'EWHAT'"),
    "unknown key": ('{"names": ["read"],\n"aktion": "SCMP_ACT_ALLOW"}', 4, "no field 'aktion'"),
    "given twice in a rule": ('{"names": ["read"],\n"action": "SCMP_ACT_LOG",\n"action": "SCMP_ACT_ALLOW"}', 4, "'action' twice"),
    "optional": ('{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"optional": 1}', 4, "true or false"),
    "min kernel": ('{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"includes": {\n"minKernel": "new"}}', 5, "'new'"),
    "caps": ('{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"excludes": {"caps": "all"}}', 4, "must be a list"),
    "rule for an unknown arch": (
        '{"names": ["read"], "action": "SCMP_ACT_ERRNO",\n"includes": {\n"arches": ["amd46"]}}', 5, "'amd46' is not known",
    ),
    "seven args": ('{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"args": [1,1,1,1,1,1,1]}', 4, "at most six"),
}  # fmt: skip
BAD_ARGUMENTS = {
    "unknown op": ('"index": 0, "value": 1,\n"op": "EQ"', 5, "'EQ' is no comparison"),
    "index": ('"op": "SCMP_CMP_EQ", "value": 1,\n"index": 6', 5, "from 0 to 5"),
    "bool index": ('"op": "SCMP_CMP_EQ", "value": 1,\n"index": true', 5, "from 0 to 5"),
    "no value": ('"op": "SCMP_CMP_EQ", "index": 1', 3, "'value': None"),
    "negative": ('"op": "SCMP_CMP_EQ", "index": 1,\n"value": -1', 5, "-1 is not a whole number"),
    "66 bits": ('"op": "SCMP_CMP_EQ", "index": 1,\n"value": 36893488147419103232', 5, "is not a whole number"),
    "outside the mask": ('"op": "SCMP_CMP_MASKED_EQ", "index": 1, "value": 1,\n"valueTwo": 2', 5, "never match"),
    "field": ('"op": "SCMP_CMP_EQ", "index": 1, "value": 1,\n"mask": 2', 5, "no field 'mask'"),
}


def in_profile(rule_text: str) -> str:
    return f'{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [\n{GOOD_RULE},\n{rule_text}]}}'


@pytest.mark.parametrize("case", [*BAD_PROFILES, *BAD_ARGUMENTS])
def test_bad_profile_names_file_and_line(tmp_path: Path, case: str) -> None:
    if case in BAD_ARGUMENTS:
        arg, line, message = BAD_ARGUMENTS[case]
        text: str | bytes = in_profile(f'{{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"args": [{{{arg}}}]}}')
    else:
        text, line, message = BAD_PROFILES[case]  # type: ignore[assignment]
        whole = isinstance(text, bytes) or text[0] == "[" or "defaultAction" in text or case == "no default"
        text = text if whole else in_profile(str(text))
    file = tmp_path / "bad.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProfileError, match=message.replace("(", r"\(")) as caught:
        compile_profile(file, cache_dir=str(tmp_path / "cache"))
    assert caught.value.file == str(file)
    assert caught.value.line == line or line is None
    assert not (tmp_path / "cache").exists()


def test_name_in_an_earlier_rule_does_not_mislead_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    skipped = '{"names": ["nonesuch"],\n"optional": true, "action": "SCMP_ACT_ALLOW"}'
    wrong = '{"names": ["nonesuch"],\n"action": "SCMP_ACT_ALLOW"}'
    file.write_text(f'{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [\n{skipped},\n\n{wrong}]}}')
    with pytest.raises(ProfileError) as caught:
        SeccompProfile.from_file(file).compile()
    assert caught.value.line == 5


@pytest.mark.parametrize("more", ['"comment": "\\"syscalls\\"", ', '"comment": "syscalls", '])
def test_the_name_of_the_list_elsewhere_does_not_mislead_the_line(tmp_path: Path, more: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(
        f'{{{more}\n"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [\n{GOOD_RULE},\n{{"names": 5}}, "syscalls"]}}'
    )
    with pytest.raises(ProfileError, match="'names'") as caught:
        SeccompProfile.from_file(file)
    assert caught.value.line == 4


def test_unreadable_profiles(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b" " * ((1 << 20) + 1))
    for path in (tmp_path / "missing", tmp_path, tmp_path / "fifo", tmp_path / "large", "/dev/zero", "nul\0"):
        with pytest.raises(ProfileError, match="cannot read the profile") as caught:
            SeccompProfile.from_file(path)
        assert caught.value.file
    with pytest.raises(ProfileError, match="default, strict, permissive"):
        compile_profile("defualt")


def test_what_is_no_profile_at_all() -> None:
    for wrong in (5, None, b"default"):
        with pytest.raises(ProfileError, match="a name, a path or a SeccompProfile"):
            compile_profile(wrong)  # type: ignore[arg-type]
    for wrong in (5, None, b"default.json"):
        with pytest.raises(ProfileError, match="expected a path"):
            SeccompProfile.from_file(wrong)  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match="as bytes"):
        SeccompProfile('{"defaultAction": "SCMP_ACT_ALLOW"}', "text")  # type: ignore[arg-type]


def test_packaged_profiles_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pisupervisor.launch import seccomp

    for folder in ("seccomp_profiles", "pisupervisor/seccomp_profiles"):
        monkeypatch.setattr(seccomp, "__file__", str(tmp_path / "pisupervisor" / "launch" / "seccomp.py"))
        with pytest.raises(ProfileError, match="missing") if folder == "seccomp_profiles" else contextlib.nullcontext():
            packaged_path("default")
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "default.json").write_text("{}")
        assert packaged_path("default") == str(tmp_path / folder / "default.json")


def test_optional_unknown_name_is_skipped_and_a_contradiction_is_an_error() -> None:
    known = SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule("ALLOW", "read")]})
    optional = rule("ALLOW", "read", "nonesuch", optional=True)
    profile = SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [optional]})
    assert profile.compile() == known.compile()
    twice = [rule("ERRNO", "read", errno=number, args=((0, "EQ", 1),)) for number in (2, 3)]
    contradiction = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": twice}
    with pytest.raises(ProfileError, match="different action"):
        SeccompProfile.from_dict(contradiction).compile()


def test_too_large_a_program_is_an_error() -> None:
    many = [rule("ALLOW", "read", args=((0, "EQ", value),)) for value in range(5000)]
    with pytest.raises(ProfileError, match="too large"):
        SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": many}).compile()


def test_profile_from_a_dict_is_an_immutable_value() -> None:
    source = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("ERRNO", "read")]}
    profile = SeccompProfile.from_dict(source, name="mine")
    program = profile.compile()
    source["syscalls"] = []
    assert profile.compile() == program
    with pytest.raises(AttributeError):
        profile.name = "other"
    with pytest.raises(AttributeError):
        del profile.source
    assert {profile, copy.deepcopy(profile), pickle.loads(pickle.dumps(profile))} == {profile}
    for wrong in ({"defaultAction": {1, 2}}, {"defaultAction": b"x"}, {}):
        with pytest.raises(ProfileError) as caught:
            SeccompProfile.from_dict(wrong, name="mine")
        assert (caught.value.file, caught.value.line) == ("mine", None)


def test_missing_libseccomp_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(FeatureUnavailable, match="libseccomp2") as caught:
        SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ALLOW"}).compile()
    assert caught.value.feature == "seccomp"


# The cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder that holds one program."""
    folder = tmp_path / "cache"
    compile_profile("permissive", cache_dir=str(folder))
    return folder


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def poison(file: Path) -> bytes:
    """A well-formed cache file that allows everything."""
    program = bytes.fromhex("0600 00 00 0000ff7f")
    file.write_bytes(seccomp_cache.sha256(program) + program)
    return program


def test_cached_program_equals_a_fresh_one(cache: Path, programs: dict[str, bytes]) -> None:
    assert cache.stat().st_mode & 0o777 == 0o700
    assert only_file(cache).stat().st_mode & 0o777 == 0o600
    assert compile_profile("permissive", cache_dir=str(cache)) == programs["permissive"]
    planted = poison(only_file(cache))  # proves that the cache is read at all
    assert compile_profile("permissive", cache_dir=str(cache)) == planted


def test_damaged_cache_file_is_compiled_again(cache: Path, programs: dict[str, bytes]) -> None:
    whole = only_file(cache).read_bytes()
    for damaged in (b"", whole[:20], whole[:-8], whole[:-3], whole + bytes(8), whole[:32] + bytes(len(whole) - 32)):
        only_file(cache).write_bytes(damaged)
        assert compile_profile("permissive", cache_dir=str(cache)) == programs["permissive"]
        assert only_file(cache).read_bytes() == whole


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_that_others_can_write_is_not_used(cache: Path, programs: dict[str, bytes], mode: int) -> None:
    planted = poison(only_file(cache))
    cache.chmod(mode)
    assert compile_profile("permissive", cache_dir=str(cache)) == programs["permissive"] != planted
    assert len(list(cache.iterdir())) == 1  # and nothing was written there


def test_file_that_others_can_write_is_not_used(cache: Path, programs: dict[str, bytes]) -> None:
    poison(only_file(cache))
    only_file(cache).chmod(0o666)
    assert compile_profile("permissive", cache_dir=str(cache)) == programs["permissive"]
    assert only_file(cache).stat().st_mode & 0o777 == 0o600


def test_symlinks_are_not_followed(tmp_path: Path, cache: Path, programs: dict[str, bytes]) -> None:
    planted = only_file(cache).rename(tmp_path / "planted")
    poison(planted)
    (cache / f"{planted.name}").unlink(missing_ok=True)
    name = next(iter(compile_names(tmp_path)))
    (cache / name).symlink_to(planted)
    assert compile_profile("permissive", cache_dir=str(cache)) == programs["permissive"]
    link = tmp_path / "link"
    link.symlink_to(cache)
    poison(only_file(cache))
    assert compile_profile("permissive", cache_dir=str(link)) == programs["permissive"]


def compile_names(tmp_path: Path) -> list[str]:
    """What the cache file of "permissive" is called."""
    folder = tmp_path / "names"
    compile_profile("permissive", cache_dir=str(folder))
    return os.listdir(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_another_user_owns_is_not_used(cache: Path, programs: dict[str, bytes]) -> None:
    poison(only_file(cache))
    os.chown(only_file(cache), 1000, 1000)
    assert compile_profile("permissive", cache_dir=str(cache)) == programs["permissive"]
    poison(only_file(cache))
    os.chown(cache, 1000, 1000)
    assert compile_profile("permissive", cache_dir=str(cache)) == programs["permissive"]


def test_unwritable_cache_is_no_error(tmp_path: Path, programs: dict[str, bytes]) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "no" / "such", Path("/proc/nonesuch"), Path("/sys")):
        assert compile_profile("permissive", cache_dir=str(folder)) == programs["permissive"]


def test_user_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    compile_profile("permissive")
    assert only_file(tmp_path / "xdg" / "pisupervisor" / "seccomp").suffix == ".bpf"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    compile_profile("permissive")
    assert only_file(tmp_path / ".cache" / "pisupervisor" / "seccomp").suffix == ".bpf"


def test_key_follows_content_and_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pisupervisor.launch import seccomp

    plain, kernel = b'{"a": 1}', b'{"minKernel": "4.8"}'
    before = [seccomp._cache_key(source) for source in (plain, kernel)]
    host = os.uname()
    other = os.uname_result((host.sysname, host.nodename, "1.2.3", host.version, host.machine))
    monkeypatch.setattr(os, "uname", lambda: other)
    after = [seccomp._cache_key(source) for source in (plain, kernel)]
    assert before[0] == after[0] != seccomp._cache_key(plain + b" ")
    assert before[1] != after[1]


def test_cached_path_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """if 1:
        import sys
        from pisupervisor.launch.seccomp import compile_profile
        compile_profile("default", cache_dir=sys.argv[1])
        print(*sorted({"json", "pyseccomp", "ctypes", "dataclasses", "hashlib", "subprocess"} & set(sys.modules)))
    """
    cache = str(tmp_path / "cache")
    compile_profile("default", cache_dir=cache)
    done = subprocess.run([sys.executable, "-c", code, cache], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# On the kernel -----------------------------------------------------------------------------------------------------

LOAD = """if 1:
    import ctypes, errno, os, sys
    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    libc, code = ctypes.CDLL(None, use_errno=True), open(sys.argv[1], "rb").read()
    program = Program(len(code) // 8, ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program)) == 0, ctypes.get_errno()
    def call(nr, *args):
        ctypes.set_errno(0)
        libc.syscall(*map(ctypes.c_long, (nr, *args)))
        return errno.errorcode.get(ctypes.get_errno(), "OK")
"""

ORDINARY_WORK = """if 1:
    import asyncio, multiprocessing, socket, ssl, subprocess, tempfile, threading, shutil
    from multiprocessing import shared_memory
    done = []
    thread = threading.Thread(target=done.append, args=(1,)); thread.start(); thread.join()
    done.append(subprocess.run(["/bin/sh", "-c", "exit 2"]).returncode)
    async def shell():
        await asyncio.sleep(0)
        return await (await asyncio.create_subprocess_exec("/bin/sh", "-c", "exit 3")).wait()
    done.append(asyncio.run(shell()))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        done += pool.map(abs, [-4])
    block = shared_memory.SharedMemory(create=True, size=8); block.close(); block.unlink()
    ssl.create_default_context()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        done.append(5)
    folder = tempfile.mkdtemp(); os.mkfifo(folder + "/fifo")
    shutil.copy2(sys.argv[1], folder); shutil.rmtree(folder)
    try:
        import numpy
    except ImportError:
        numpy = None
    assert numpy is None or (numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum() == 8e6
    print(done)
"""

SQLITE = """if 1:
    import sqlite3, tempfile
    with tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(folder + "/base")
        try:
            database.executescript("create table t (x); insert into t values (1)")
        except sqlite3.OperationalError as error:
            print("refused")
        else:
            print(database.execute("select x from t").fetchall())
        database.close()
"""


@pytest.fixture(params=PACKAGED)
def confined(request: pytest.FixtureRequest, tmp_path: Path, programs: dict[str, bytes]) -> Any:
    """(name, run): run(code) runs Python source in a process that has loaded the profile."""
    file = tmp_path / "program.bpf"
    file.write_bytes(programs[request.param])

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LOAD + code.removeprefix("if 1:"), str(file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)

    return request.param, run


@pytest.mark.linux
@pytest.mark.arch
def test_ordinary_work_runs_under_every_profile(confined: Any) -> None:
    _, run = confined
    done = run(ORDINARY_WORK)
    assert (done.stdout, done.returncode) == ("[1, 2, 3, 4, 5]\n", 0), done.stderr


@pytest.mark.linux
def test_sqlite_needs_locks_which_strict_refuses(confined: Any) -> None:
    profile, run = confined
    assert run(SQLITE).stdout.strip() == ("refused" if profile == "strict" else "[(1,)]")


@pytest.mark.linux
@pytest.mark.root
@pytest.mark.arch
def test_kernel_and_evaluator_agree(confined: Any, programs: dict[str, bytes]) -> None:
    """Calls with harmless arguments, so that a wrong "allow" does no harm either. As root: only the filter refuses."""
    profile, run = confined
    calls = [
        ("unshare", (0x10000000,)), ("clone", (0x10000011, 0, 0, 0, 0)), ("clone3", (0, 0)), ("ptrace", (-1, 0, 0, 0)),
        ("keyctl", (-1, 0, 0)), ("bpf", (-1, 0, 0)), ("io_uring_setup", (0, 0)), ("mount", (0, 0, 0, 0, 0)),
        ("socket", (16, 3, 0)), ("socket", (40, 1, 0)), ("ioctl", (-1, 0x5412, 0)), ("ioctl", (-1, HIGH | 0x5412, 0)),
        ("personality", (0x40000,)), ("fchmod", (-1, 0o4755)), ("fcntl", (-1, 6, 0)), ("fcntl", (-1, 1031, 0)),
        ("flock", (-1, 2)),
        ("setpriority", (0, 0, -20)), ("openat2", (-1, 0, 0, 0)), ("statmount", (0, 0, 0, 0)),
    ]  # fmt: skip
    lines = "".join(f"    print(call({number(name, NATIVE)}, *{args}))\n" for name, args in calls)
    done = run("if 1:\n" + lines + "    print(call(999), call(600))\n")
    *got, unknown = done.stdout.splitlines()
    assert unknown == "ENOSYS ENOSYS", done.stderr
    names = {EPERM: "EPERM", ENOSYS: "ENOSYS", EAFNOSUPPORT: "EAFNOSUPPORT"}
    for (name, args), answer in zip(calls, got, strict=True):
        action = bpf.run(programs[profile], number(name, NATIVE), args, arch=MACHINES[NATIVE])
        assert answer == names[action] if action != ALLOW else answer not in ("EPERM", "EAFNOSUPPORT"), (name, args)


@x86_64
@pytest.mark.linux
def test_x32_call_kills(confined: Any) -> None:
    _, run = confined
    assert run("if 1:\n    call(0x40000000 | 39)\n").returncode == -31  # SIGSYS


I386_GETPID = bytes.fromhex("53 b814000000 cd80 5b c3")  # push rbx; mov eax, 20; int 0x80; pop rbx; ret
I386 = f"""if 1:
    import mmap
    page = mmap.mmap(-1, 4096, prot=7)
    page.write({I386_GETPID!r})
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


@x86_64
@pytest.mark.linux
def test_i386_call_kills(confined: Any, tmp_path: Path) -> None:
    control = "import ctypes, sys\n" + I386.replace("if 1:\n", "").replace("\n    ", "\n").removeprefix("    ")
    without = subprocess.run([sys.executable, "-c", control], capture_output=True, check=False)
    if without.returncode:
        pytest.skip(f"the kernel has no i386 calls (control ended with {without.returncode})")
    _, run = confined
    assert run(I386).returncode == -31  # SIGSYS
