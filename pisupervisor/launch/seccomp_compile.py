"""From checked rules to one BPF program: libseccomp compiles each stage, and the stages are joined here.

    guard        ours: foreign architecture, x32 range, numbers newer than we know
    refuse       denials with conditions, and denials of what is also allowed   -> else go on
    ranges       ours: allowances without conditions                            -> else go on
    allow        all other allowances                                           -> else go on
    otherwise    all other denials                                              -> else go on
    default      one instruction

libseccomp alone keeps only the unconditional one of two rules for a call, whichever it is; hence the stages. A stage is
compiled with a default action that none of its rules has; each RET of it becomes a jump behind the stage. The ranges are
a binary tree over where they begin and end: libseccomp's has a leaf for each call, and what is longer loads slower (every
child loads it: 565 instructions 0.22 ms, 320 instructions 0.17 ms).
"""

from __future__ import annotations

import os
import re
import struct
import sys
from errno import EMFILE, ENFILE
from typing import TYPE_CHECKING, Any, NamedTuple

from pisupervisor.errors import FeatureUnavailable
from pisupervisor.launch.seccomp_cache import MAX_INSTRUCTIONS
from pisupervisor.launch.seccomp_rules import (
    ALLOW,
    ERRNO,
    KILL_PROCESS,
    KILL_THREAD,
    LOG,
    Condition,
    Flaw,
    Policy,
    Rule,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    Instruction = tuple[int, int, int, int]

# struct sock_filter and the four instructions we write ourselves
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _JUMP, _JUMP_EQ, _JUMP_GT, _JUMP_GE, _RETURN = 0x20, 0x05, 0x15, 0x25, 0x35, 0x06
_SHORT_JUMP = 250  # instructions that a conditional jump reaches over
_NR, _ARCH = 0, 4  # offsets in struct seccomp_data
_EPERM, _ENOSYS = 1, 38
_MASKED_EQ = 7
_CLONE3 = 435  # everywhere
_NEW_LISTENER = 1 << 3  # SECCOMP_FILTER_FLAG_NEW_LISTENER


class Arch(NamedTuple):
    """One machine: its AUDIT_ARCH number, the name that OCI profiles use, and where the x32 range starts."""

    audit: int
    name: str
    foreign_from: int | None
    own: dict[str, int]


_ARCHES = {
    "x86_64": Arch(0xC000003E, "amd64", 0x40000000, {"uretprobe": 335, "uprobe": 336}),
    "aarch64": Arch(0xC00000B7, "arm64", None, {}),
}

#: Calls that an installed libseccomp may not know yet; the same numbers on every architecture since 424.
_NEWER = {
    "quotactl_fd": 443, "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
    "memfd_secret": 447, "process_mrelease": 448, "futex_waitv": 449, "set_mempolicy_home_node": 450,
    "cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455,
    "futex_requeue": 456, "statmount": 457, "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460,
    "lsm_list_modules": 461, "mseal": 462, "setxattrat": 463, "getxattrat": 464, "listxattrat": 465,
    "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469, "listns": 470,
    "rseq_slice_yield": 471,
}  # fmt: skip
_HIGHEST = max(_NEWER.values())

#: Names of other architectures that libseccomp may not know either; Docker's and Podman's profiles list such.
_ELSEWHERE = frozenset((
    "riscv_hwprobe", "riscv_flush_icache", "uretprobe", "uprobe", "arm_fadvise64_64", "arm_sync_file_range",
    "sync_file_range2", "breakpoint", "cacheflush", "set_tls", "get_tls", "usr26", "usr32", "swapcontext",
    "s390_guarded_storage", "s390_pci_mmio_read", "s390_pci_mmio_write", "s390_runtime_instr", "s390_sthyi",
    "spu_create", "spu_run", "subpage_prot", "switch_endian", "rtas", "pciconfig_iobase", "pciconfig_read",
    "pciconfig_write", "multiplexer", "sysmips", "atomic_barrier", "atomic_cmpxchg_32", "memory_ordering",
    "kern_features", "utrap_install", "or1k_atomic", "arc_gettls", "arc_settls", "arc_usr_cmpxchg",
))  # fmt: skip


class Entry(NamedTuple):
    """A rule for one system call of this machine. ``rule`` is its number in the profile, None for ours."""

    nr: int
    action: int
    conditions: tuple[Condition, ...]
    rule: int | None

    @property
    def allows(self) -> bool:
        return self.action in (ALLOW, LOG)


def compile_rules(policy: Policy) -> bytes:
    """The program as raw ``struct sock_filter`` bytes. Raises Flaw for a name nobody knows, FeatureUnavailable."""
    arch = _native_arch()
    library = _import_library(arch)
    program = _guard(arch)
    for passing, entries in _stages(_resolve(policy, arch, library), policy.default):
        if passing == KILL_THREAD:
            ranges, entries = _ranges(entries)
            program += ranges
        if entries:
            program += _join(_compile_stage(entries, passing, library), passing)
    program.append((_RETURN, 0, 0, policy.default))
    if len(program) > MAX_INSTRUCTIONS:
        raise Flaw(f"the profile is too large: {len(program)} instructions, the kernel takes {MAX_INSTRUCTIONS}")
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _native_arch() -> Arch:
    machine = os.uname().machine
    if machine not in _ARCHES or sys.maxsize < 1 << 32:
        raise FeatureUnavailable(
            f"no seccomp filter for this interpreter on {machine}",
            feature="seccomp",
            remedy="use a 64-bit Python on x86_64 or aarch64, or put 'seccomp' in degrade",
        )
    return _ARCHES[machine]


def _import_library(arch: Arch) -> ModuleType:
    """pyseccomp, imported only here: its import starts ldconfig twice."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        remedy = "install libseccomp (apt install libseccomp2) and pyseccomp (pip install pyseccomp)"
        if getattr(error, "errno", None) in (EMFILE, ENFILE):
            remedy = "raise ulimit -n, or close isolators"
        message = f"cannot compile seccomp profiles: {error}"
        raise FeatureUnavailable(message, feature="seccomp", remedy=remedy) from error
    if pyseccomp.system_arch() != arch.audit:
        message = f"libseccomp is built for architecture {pyseccomp.system_arch():#x}, not {arch.audit:#x}"
        raise FeatureUnavailable(message, feature="seccomp", remedy="install the native libseccomp")
    library: ModuleType = pyseccomp
    return library


def _resolve(policy: Policy, arch: Arch, library: ModuleType) -> list[Entry]:
    """What counts on this host, and what always holds."""
    seccomp = library.resolve_syscall(library.Arch.NATIVE, "seccomp")
    entries: list[Entry] = []
    for rule in policy.rules:
        if rule.applies(arch.name, _kernel()):
            entries += [Entry(nr, rule.action, rule.conditions, rule.number) for nr in _numbers(rule, arch, library)]
    entries = [entry for entry in entries if not (entry.nr == _CLONE3 and entry.allows)]
    if _may_pass(seccomp, entries, policy.default):
        listener = Condition(1, _MASKED_EQ, _NEW_LISTENER, _NEW_LISTENER)
        entries.append(Entry(seccomp, ERRNO | _EPERM, (listener,), None))
    if not any(entry.nr == _CLONE3 and not entry.conditions for entry in entries):
        entries.append(Entry(_CLONE3, ERRNO | _ENOSYS, (), None))
    return entries


def _may_pass(nr: int, entries: list[Entry], default: int) -> bool:
    """Whether there are arguments with which the call gets through."""
    mine = [entry for entry in entries if entry.nr == nr]
    return any(entry.allows for entry in mine) or (default in (ALLOW, LOG) and all(entry.conditions for entry in mine))


def _numbers(rule: Rule, arch: Arch, library: ModuleType) -> Iterator[int]:
    for name in rule.names:
        nr = _number(name, arch, library)
        if nr is not None:
            yield nr
        elif name not in _ELSEWHERE and not rule.optional and not _exists_elsewhere(name, library):
            raise Flaw(f'unknown system call {name!r}; a rule with "optional": true skips it', name, rule.number)


def _number(name: str, arch: Arch, library: ModuleType) -> int | None:
    """The number of a call on this machine, None if it has none. libseccomp: -1 unknown, below that another machine."""
    nr: int = library.resolve_syscall(library.Arch.NATIVE, name)
    return nr if nr >= 0 else _NEWER.get(name, arch.own.get(name))


def _exists_elsewhere(name: str, library: ModuleType) -> bool:
    return bool(library.resolve_syscall(library.Arch.NATIVE, name) < -1)


def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _stages(entries: list[Entry], default: int) -> Iterator[tuple[int, list[Entry]]]:
    """(action that means "go on", entries) of each stage that has any."""
    always_allowed = {entry.nr for entry in entries if entry.allows and not entry.conditions}
    refuse, allow, otherwise = [], [], []
    for entry in entries:
        if entry.allows:
            allow.append(entry)
        elif entry.conditions or entry.nr in always_allowed:
            refuse.append(entry)
        elif entry.action != default:
            otherwise.append(entry)
    if default == ALLOW:  # then an allowance matters only in front of a denial
        denied = {entry.nr for entry in otherwise}
        allow = [entry for entry in allow if entry.nr in denied or entry.action != default]
    for passing, stage in ((ALLOW, refuse), (KILL_THREAD, allow), (ALLOW, otherwise)):
        if stage:
            yield passing, stage


def _ranges(entries: list[Entry]) -> tuple[list[Instruction], list[Entry]]:
    """A program that allows what ``entries`` allow whatever the arguments, and the other entries."""
    numbers = {entry.nr for entry in entries if not entry.conditions} - {
        entry.nr for entry in entries if entry.action != ALLOW
    }
    borders = sorted(
        {border for nr in numbers for border in (nr, nr + 1) if (border in numbers) != (border - 1 in numbers)}
    )
    if not 1 < len(borders) < _SHORT_JUMP:
        return [], entries
    tree = _tree(borders, 0, len(borders), 0)
    return [(_LOAD, 0, 0, _NR), *tree, (_RETURN, 0, 0, ALLOW)], [entry for entry in entries if entry.nr not in numbers]


def _tree(borders: list[int], first: int, last: int, place: int) -> list[Instruction]:
    """Where a number lies among ``borders[first:last]``: in a range after an odd one of them. ``place``: of its first
    instruction. Behind the whole tree stand "allow" and the next stage.
    """
    middle = (first + last) // 2

    def jump(low: int, high: int, target: int) -> int:
        return target if low < high else len(borders) + (0 if low % 2 else 1)

    left = _tree(borders, first, middle, place + 1) if first < middle else []
    right = _tree(borders, middle + 1, last, place + 1 + len(left)) if middle + 1 < last else []
    below = jump(first, middle, place + 1)
    above = jump(middle + 1, last, place + 1 + len(left))
    return [(_JUMP_GE, above - place - 1, below - place - 1, borders[middle]), *left, *right]


def _compile_stage(entries: list[Entry], passing: int, library: ModuleType) -> bytes:
    """libseccomp's program for ``entries`` with ``passing`` for everything else."""
    stage = library.SyscallFilter(passing)
    stage.set_attr(library.Attr.ACT_BADARCH, KILL_PROCESS)
    try:
        stage.set_attr(library.Attr.CTL_OPTIMIZE, 2)
    except OSError:
        pass  # before libseccomp 2.5 there is no binary tree; a linear program is as right
    for entry in entries:
        for conditions in _alternatives(entry.conditions):
            _add_rule(stage, entry, [library.Arg(*condition) for condition in conditions])
    with open(os.memfd_create("pisupervisor-bpf", os.MFD_CLOEXEC), "rb") as file:
        stage.export_bpf(file)
        file.seek(0)
        return file.read()


def _alternatives(conditions: tuple[Condition, ...]) -> list[tuple[Condition, ...]]:
    """Conditions on one argument that is named twice are alternatives, as runc reads them; others must all hold."""
    arguments = [condition.argument for condition in conditions]
    return [conditions] if len(set(arguments)) == len(arguments) else [(condition,) for condition in conditions]


def _add_rule(stage: Any, entry: Entry, arguments: list[Any]) -> None:
    try:
        stage.add_rule_exactly(entry.action, entry.nr, *arguments)
    except FileExistsError:
        if entry.rule is None:
            return  # the profile itself denies this, in its own way
        raise Flaw("another rule gives the same call and arguments a different action", "names", entry.rule) from None
    except OSError as error:
        raise Flaw(f"libseccomp refuses the rule: {error.strerror}", "names", entry.rule) from None


def _join(stage: bytes, passing: int) -> list[tuple[int, int, int, int]]:
    """The stage with every "go on" turned into a jump behind its end. Jumps are relative: the rest stays as it is."""
    program = list(_INSTRUCTION.iter_unpack(stage))
    for place, (code, _, _, value) in enumerate(program):
        if code == _RETURN and value == passing:
            program[place] = (_JUMP, 0, 0, len(program) - place - 1)
    return program


def _guard(arch: Arch) -> list[tuple[int, int, int, int]]:
    """What holds before any rule is looked at. The i386 table is not added: a deny-list would leak all its calls."""
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQ, 1, 0, arch.audit),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NR),
    ]
    if arch.foreign_from is not None:
        program += [(_JUMP_GE, 0, 1, arch.foreign_from), (_RETURN, 0, 0, KILL_PROCESS)]
    return program + [(_JUMP_GT, 0, 1, _HIGHEST), (_RETURN, 0, 0, ERRNO | _ENOSYS)]
