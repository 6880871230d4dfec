"""``pisupervisor learn``: run a program, note what it used and was refused, write a profile that lets just that pass."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from pisupervisor.errors import OptionsError

if TYPE_CHECKING:
    from pisupervisor.launch.seccomp import SeccompProfile
    from pisupervisor.results import SystemCall


def write_profile(parsed: argparse.Namespace, calls: tuple[SystemCall, ...]) -> None:
    """The profile for what was seen, to ``parsed.output`` or stdout; a summary to stderr. Raises OptionsError."""
    from pisupervisor.launch.seccomp import load_profile
    from pisupervisor.launch.seccomp_watch import learnt

    used = frozenset(call.name for call in calls if call.action == "allowed")
    refused = sorted({call.name for call in calls if call.action != "allowed"})
    base = load_profile(parsed.profile)
    profile = learnt(base, used, _comment(parsed.code, base, refused))
    text = json.dumps(profile, indent=2) + "\n"
    if parsed.output is None:
        sys.stdout.write(text)
    else:
        try:
            with open(parsed.output, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OptionsError(f"cannot write the profile: {error}") from None
    where = parsed.output or "stdout"
    sys.stderr.write(f"pisupervisor: {len(used)} system calls used, {len(refused)} refused; profile: {where}\n")
    for name in refused:
        sys.stderr.write(f"  refused: {name}\n")


def show_refused(calls: tuple[SystemCall, ...]) -> None:
    """The log of a traced run, on stderr."""
    for call in calls:
        times = f" ({call.count} times)" if call.count > 1 else ""
        sys.stderr.write(f"pisupervisor: {call}, {os.strerror(call.errno)}{times}\n")


def _comment(code: str, base: SeccompProfile, refused: list[str]) -> str:
    name = base.name.removesuffix(".json")
    still = f" Refused then, and now: {', '.join(refused)}." if refused else ""
    return (
        f"Learnt from one run of {os.path.basename(code)} on Linux {os.uname().release}, {os.uname().machine}: the part of"
        f" {name} that it used. Another run, machine or libc may need more.{still}"
    )
