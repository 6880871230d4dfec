"""What a profile compiles to by libseccomp's own hand: the reference that our programs are compared with.

libseccomp keeps only one of two rules for a call where one has no conditions, so what it shall decide is told in stages,
each a program of its own; evaluated one after another until one has an answer.
"""

from __future__ import annotations

import os
from typing import Any

import bpf
import pyseccomp

from pisupervisor.launch import seccomp_compile as compiler
from pisupervisor.launch.seccomp_rules import ALLOW, KILL_THREAD, Policy

ARCHES = {"x86_64": bpf.X86_64, "aarch64": bpf.AARCH64}


class Reference:
    """``decide(nr, args)`` is the action for a call that the machine has."""

    def __init__(self, policy: Policy, machine: str) -> None:
        self.arch, self.default = ARCHES[machine], policy.default
        entries = compiler._resolve(policy, compiler._ARCHES[machine], pyseccomp)
        always = {entry.nr for entry in entries if entry.allows and not entry.conditions}
        refuse = [entry for entry in entries if not entry.allows and (entry.conditions or entry.nr in always)]
        allow = [entry for entry in entries if entry.allows]
        otherwise = [e for e in entries if not e.allows and e not in refuse and e.action != policy.default]
        stages = ((ALLOW, refuse), (KILL_THREAD, allow), (ALLOW, otherwise))
        self.stages = [(passing, self._compile(stage, passing)) for passing, stage in stages if stage]

    def _compile(self, entries: list[Any], passing: int) -> bytes:
        stage = pyseccomp.SyscallFilter(passing)
        stage.set_attr(pyseccomp.Attr.ACT_BADARCH, bpf.KILL_PROCESS)
        if self.arch != pyseccomp.system_arch():
            stage.add_arch(self.arch)
            stage.remove_arch(pyseccomp.system_arch())
        for entry in entries:
            for conditions in compiler._alternatives(entry.conditions):
                if not self.knows(entry.nr):
                    continue
                try:
                    nr = self._as_native(entry.nr)
                    stage.add_rule_exactly(entry.action, nr, *(pyseccomp.Arg(*c) for c in conditions))
                except FileExistsError:
                    assert entry.rule is None  # the profile itself denies this, in its own way
        return exported(stage)

    def knows(self, nr: int) -> bool:
        """Whether this libseccomp can be asked: for another machine it must know the call's name."""
        try:
            return self.arch == pyseccomp.system_arch() or bool(pyseccomp.resolve_syscall(self.arch, nr))
        except ValueError:
            return False

    def _as_native(self, nr: int) -> int:
        """libseccomp takes this machine's numbers, also for a filter of another."""
        if self.arch == pyseccomp.system_arch():
            return nr
        name = pyseccomp.resolve_syscall(self.arch, nr).decode()
        return int(pyseccomp.resolve_syscall(pyseccomp.system_arch(), name))

    def decide(self, nr: int, args: tuple[int, ...]) -> int:
        for passing, program in self.stages:
            action = bpf.run(program, nr, args, self.arch)
            if action != passing:
                return action
        return self.default


def exported(stage: Any) -> bytes:
    """The program that libseccomp makes of a filter."""
    with open(os.memfd_create("reference", os.MFD_CLOEXEC), "rb") as file:
        stage.export_bpf(file)
        file.seek(0)
        return file.read()
