"""Which calls a filter hands over to the host, and what the host answers. Pure.

    watch     handed over                                    answer
    kills     what the profile kills for, and its rules      the child is killed, by the host, which now knows the call;
              marked SCMP_ACT_NOTIFY                         a marked call gets the rule's errno
    trace     the same, and whatever else is refused         the errno of the profile, EPERM where it would have killed
    learn     every call but the few of UNWATCHED            the same; what the profile allows goes on

Only under ``learn`` is a call let go on (SECCOMP_USER_NOTIF_FLAG_CONTINUE), and it is no decision about safety even
there: between the answer and the call another thread may change whatever a pointer leads to (seccomp_unotify(2)). So
what is allowed follows from number and registers alone, which the kernel has copied, just as in the filter itself.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from pisupervisor.launch.seccomp_rules import ALLOW, ERRNO, KILL_PROCESS, KILL_THREAD, LOG, NOTIFY, TRAP
from pisupervisor.launch.seccomp_tree import Decision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType
    from typing import Any

    from pisupervisor.launch.seccomp import SeccompProfile
    from pisupervisor.launch.seccomp_compile import Arch
    from pisupervisor.launch.seccomp_rules import Condition

WATCHES = ("kills", "trace", "learn")
_KILLS = (KILL_PROCESS, KILL_THREAD, TRAP)

#: What a child does between the moment that its filter holds and the one in which the host listens, and at any moment
#: after that. Handed over, the first such call would wait for ever; every child needs them, so there is nothing to learn.
UNWATCHED = (
    "brk", "clock_gettime", "close", "exit", "exit_group", "futex", "madvise", "mmap", "mprotect", "mremap", "munmap",
    "restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sendmsg",
)  # fmt: skip

#: What PID 1 does in every child, but later than a quick call ends: 20 ms after its start, and when the payload has ended.
OF_PID_1 = (
    "fcntl", "fstat", "newfstatat", "pipe2", "poll", "ppoll", "read", "rt_sigtimedwait", "wait4", "write",
)  # fmt: skip

#: For an import, which a run does not show of what the zygote has imported before the fork, while nobody waited.
OF_IMPORTS = ("epoll_create1", "fstat", "getdents64", "ioctl", "lseek", "newfstatat", "openat", "read", "stat")

_NE, _LT, _LE, _EQ, _GE, _GT, _MASKED_EQ = range(1, 8)


class Answer(NamedTuple):
    """``error``: what the call returns instead; 0: it goes on. ``kill``: there is no answer, the child ends."""

    error: int = 0
    kill: bool = False

    @property
    def action(self) -> str:
        return "killed" if self.kill else "refused" if self.error else "allowed"


def learnt(base: SeccompProfile, used: frozenset[str], comment: str) -> dict[str, Any]:
    """The part of the profile ``base`` that a program needs which has used these calls: what it allows of them and under
    which conditions, what it refuses of them, and how it answers those who only try whether a call is there. Whatever
    was not used answers EPERM, but for the few that every child needs.
    """
    import json

    source = json.loads(base.source)
    needed = used.union(UNWATCHED, OF_PID_1, OF_IMPORTS)
    rules = [rule for entry in source.get("syscalls") or () if (rule := _needed_part(entry, needed))]
    named = {name for rule in rules for name in rule["names"] if not rule.get("args")}
    if source["defaultAction"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG"):
        rest = sorted(needed - named)
        rules.append({"comment": "Used, and allowed by default before.", "action": "SCMP_ACT_ALLOW", "names": rest})
    return {
        "comment": comment, "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.EPERM,
        "architectures": source.get("architectures") or [], "syscalls": rules,
    }  # fmt: skip


def _needed_part(entry: dict[str, Any], needed: frozenset[str]) -> dict[str, Any] | None:
    names = entry.get("names") or [entry["name"]]
    probes = entry["action"] == "SCMP_ACT_ERRNO" and entry.get("errnoRet", errno.EPERM) != errno.EPERM
    kept = list(names) if probes and not entry.get("args") else sorted(needed.intersection(names))
    return {**{key: value for key, value in entry.items() if key != "name"}, "names": kept} if kept else None


class Answers(NamedTuple):
    """What a profile says of each call, by number, and what the calls are called."""

    watch: str
    decisions: Mapping[int, Decision]
    names: Mapping[int, str]

    def name(self, number: int) -> str:
        return self.names.get(number, f"syscall {number}")


def answers_of(profile: SeccompProfile, watch: str | None) -> Answers:
    """Of a profile that has compiled."""
    from pisupervisor.launch import seccomp_compile
    from pisupervisor.launch.seccomp_rules import parse_profile

    library, arch = seccomp_compile.import_library(), seccomp_compile.native_arch()
    decisions = seccomp_compile.decide(parse_profile(profile.source), arch, library)
    return Answers(watch or "kills", decisions, seccomp_compile.names_of(arch, library))


def unwatched(arch: Arch, library: ModuleType) -> frozenset[int]:
    from pisupervisor.launch.seccomp_compile import number_of

    return frozenset(nr for name in UNWATCHED if (nr := number_of(name, arch, library)) is not None)


def handed_over(decisions: Mapping[int, Decision], watch: str, spared: frozenset[int]) -> dict[int, Decision]:
    """The decisions of the program that a child gets."""
    everything = Decision((), NOTIFY)
    return {
        number: everything if watch == "learn" and number not in spared else _with_notify(decision, watch)
        for number, decision in decisions.items()
    }


def _with_notify(decision: Decision, watch: str) -> Decision:
    cases = tuple((conditions, _as_notify(action, watch)) for conditions, action in decision.cases)
    return Decision(cases, _as_notify(decision.final, watch))


def _as_notify(action: int, watch: str) -> int:
    kind = action & ~0xFFFF
    refused = watch != "kills" and kind == ERRNO
    return NOTIFY if action in _KILLS or kind == NOTIFY or refused else action


def answer(decision: Decision, arguments: tuple[int, ...], watch: str) -> Answer:
    """What the profile, as ``decision`` has it, says of a call that was handed over."""
    action = evaluate(decision, arguments)
    kind = action & ~0xFFFF
    if action in (ALLOW, LOG):
        return Answer() if watch == "learn" else Answer(errno.EPERM)  # else it is never handed over
    if action in _KILLS:
        return Answer(kill=True) if watch == "kills" else Answer(errno.EPERM)
    if kind in (ERRNO, NOTIFY):
        return Answer(action & 0xFFFF or errno.EPERM)
    return Answer(errno.ENOSYS)  # TRACE: there is no tracer


def evaluate(decision: Decision, arguments: tuple[int, ...]) -> int:
    """The action for a call: what the program that was made of ``decision`` returns."""
    for conditions, action in decision.cases:
        if all(_holds(condition, arguments[condition.argument]) for condition in conditions):
            return action
    return decision.final


def _holds(condition: Condition, value: int) -> bool:
    first, second = condition.value, condition.value_two
    return {
        _NE: value != first, _LT: value < first, _LE: value <= first, _EQ: value == first, _GE: value >= first,
        _GT: value > first, _MASKED_EQ: value & first == second,
    }[condition.op]  # fmt: skip
