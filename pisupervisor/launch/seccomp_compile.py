"""From checked rules to one BPF program: who decides what about each call of this machine; the shape is in seccomp_tree.

For each call, the first that holds: a denial with conditions, or any denial of what is also allowed without conditions;
an allowance; another denial; ``defaultAction``. Of several that hold at once the harshest counts, as the kernel does it
for several filters. libseccomp gives the numbers of the names; its own programs are what tests compare ours with.
"""

from __future__ import annotations

import os
import re
import sys
from errno import EMFILE, ENFILE
from typing import TYPE_CHECKING, NamedTuple

from pisupervisor.errors import FeatureUnavailable
from pisupervisor.launch.seccomp_cache import MAX_INSTRUCTIONS
from pisupervisor.launch.seccomp_rules import ALLOW, ERRNO, KILL_PROCESS, LOG, Condition, Flaw, Policy, Rule
from pisupervisor.launch.seccomp_tree import INSTRUCTION, Decision, assemble, ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

_EPERM, _ENOSYS = 1, 38
_MASKED_EQ = 7
_CLONE3 = 435  # everywhere
_NEW_LISTENER = 1 << 3  # SECCOMP_FILTER_FLAG_NEW_LISTENER


class Arch(NamedTuple):
    """One machine: its AUDIT_ARCH number (libseccomp's too), the name that OCI profiles use, where the x32 range starts."""

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


def compile_rules(policy: Policy, machine: str | None = None, watch: str | None = None) -> bytes:
    """The program for ``machine`` ("x86_64", "aarch64"; None: this one) as raw ``struct sock_filter`` bytes; ``watch``:
    see ``seccomp_watch``. Raises Flaw for a name nobody knows and for rules that contradict each other, FeatureUnavailable.
    """
    arch = native_arch() if machine is None else _ARCHES[machine]
    decisions = decide(policy, arch, import_library())
    if watch or policy.notifies:
        from pisupervisor.launch.seccomp_watch import handed_over, unwatched

        decisions = handed_over(decisions, watch or "kills", unwatched(arch, import_library()))
    unknown = Decision((), ERRNO | _ENOSYS)
    beyond = [(_HIGHEST + 1, unknown)]
    if arch.foreign_from is not None:  # the i386 table is not added: a deny-list would leak all its calls
        beyond.append((arch.foreign_from, Decision((), KILL_PROCESS)))
    cases = sum(len(decision.cases) for decision in set(decisions.values()))
    program = assemble(arch.audit, KILL_PROCESS, ranges(decisions, beyond)) if cases <= MAX_INSTRUCTIONS else []
    if not 0 < len(program) <= MAX_INSTRUCTIONS:
        size = f"{len(program)} instructions" if program else f"{cases} comparisons"
        raise Flaw(f"the profile is too large: {size}, the kernel takes {MAX_INSTRUCTIONS} instructions")
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in program)


def decide(policy: Policy, arch: Arch, library: ModuleType) -> dict[int, Decision]:
    """What happens to each number up to the highest that we know; those without a call answer ENOSYS."""
    entries: dict[int, list[Entry]] = {}
    for entry in _resolve(policy, arch, library):
        entries.setdefault(entry.nr, []).append(entry)
    nobody = Decision((), ERRNO | _ENOSYS)
    usual = Decision((), policy.default)
    newer = {*_NEWER.values(), *arch.own.values()}
    return {
        nr: _decision(entries[nr], policy.default) if nr in entries
        else usual if nr in newer or has_call(nr, arch, library) else nobody
        for nr in range(_HIGHEST + 1)
    }  # fmt: skip


def names_of(arch: Arch, library: ModuleType) -> dict[int, str]:
    """What the calls of a machine are called."""
    names = {nr: name for name, nr in (*_NEWER.items(), *arch.own.items())}
    for nr in range(_HIGHEST + 1):
        if has_call(nr, arch, library):
            names[nr] = library.resolve_syscall(arch.audit, nr).decode()
    return names


def has_call(nr: int, arch: Arch, library: ModuleType) -> bool:
    """Whether this machine has a call of that number."""
    try:
        return bool(library.resolve_syscall(arch.audit, nr))
    except ValueError:
        return False


def _decision(entries: list[Entry], default: int) -> Decision:
    """The rules for one call in the order in which they count."""
    allowances = _in_order(entry for entry in entries if entry.allows)
    denials = _in_order(entry for entry in entries if not entry.allows)
    refused = [entry for entry in denials if entry.conditions]
    flat = [entry for entry in denials if not entry.conditions] or [e for e in allowances if not e.conditions]
    final = flat[0].action if flat else default
    if flat and not flat[0].allows and any(not entry.conditions for entry in allowances):
        allowances = []  # a denial is never lost beside an allowance of the same call
    cases = [
        (conditions, entry.action) for entry in (*refused, *allowances) if entry.conditions
        for conditions in _alternatives(entry.conditions)
    ]  # fmt: skip
    while cases and cases[-1][1] == final:
        cases.pop()
    return Decision(tuple(cases), final)


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The harshest first, as the kernel orders actions: by their value as a signed number. Raises Flaw where the same
    conditions lead to two actions; our own rule gives way then.
    """
    found: dict[tuple[Condition, ...], Entry] = {}
    for entry in entries:
        other = found.setdefault(entry.conditions, entry)
        if other.action != entry.action and entry.rule is not None:
            raise Flaw("another rule gives the same call and arguments a different action", "names", entry.rule)
    return sorted(found.values(), key=lambda entry: entry.action - (1 << 32) * (entry.action >> 31))


def native_arch() -> Arch:
    """This machine. Raises FeatureUnavailable where there is no filter for it."""
    machine = os.uname().machine
    if machine not in _ARCHES or sys.maxsize < 1 << 32:
        raise FeatureUnavailable(
            f"no seccomp filter for this interpreter on {machine}",
            feature="seccomp",
            remedy="use a 64-bit Python on x86_64 or aarch64, or put 'seccomp' in degrade",
        )
    return _ARCHES[machine]


def import_library() -> ModuleType:
    """pyseccomp, imported only here: its import starts ldconfig twice."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        remedy = "install libseccomp (apt install libseccomp2) and pyseccomp (pip install pyseccomp)"
        if getattr(error, "errno", None) in (EMFILE, ENFILE):
            remedy = "raise ulimit -n, or close isolators"
        message = f"cannot compile seccomp profiles: {error}"
        raise FeatureUnavailable(message, feature="seccomp", remedy=remedy) from error
    library: ModuleType = pyseccomp
    return library


def _resolve(policy: Policy, arch: Arch, library: ModuleType) -> list[Entry]:
    """What counts on this host, and what always holds."""
    seccomp = library.resolve_syscall(arch.audit, "seccomp")
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
        nr = number_of(name, arch, library)
        if nr is not None:
            yield nr
        elif name not in _ELSEWHERE and not rule.optional and not _exists_elsewhere(name, arch, library):
            raise Flaw(f'unknown system call {name!r}; a rule with "optional": true skips it', name, rule.number)


def number_of(name: str, arch: Arch, library: ModuleType) -> int | None:
    """The number of a call on this machine, None if it has none. libseccomp: -1 unknown, below that another machine."""
    nr: int = library.resolve_syscall(arch.audit, name)
    return nr if nr >= 0 else _NEWER.get(name, arch.own.get(name))


def _exists_elsewhere(name: str, arch: Arch, library: ModuleType) -> bool:
    return bool(library.resolve_syscall(arch.audit, name) < -1)


def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _alternatives(conditions: tuple[Condition, ...]) -> list[tuple[Condition, ...]]:
    """Conditions on one argument that is named twice are alternatives, as runc reads them; others must all hold."""
    arguments = [condition.argument for condition in conditions]
    return [conditions] if len(set(arguments)) == len(arguments) else [(condition,) for condition in conditions]
