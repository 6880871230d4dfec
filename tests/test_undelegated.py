"""Where this process may make no groups: what is said, and that all the rest holds once somebody agrees to that."""

from __future__ import annotations

import os
from pathlib import Path

import lacking
import pytest
from helpers import DEGRADE

from pisupervisor import FeatureUnavailable, IsolationOptions, LaunchError, ProcessIsolator
from pisupervisor.limits import cgroups, systemd
from pisupervisor.limits.detect import detect
from pisupervisor.options import Limits

pytestmark = [pytest.mark.undelegated, pytest.mark.bed]
WITHOUT = (*DEGRADE, *lacking.LIMITS)


def may_mount() -> bool:
    """Whether this is an ordinary user, who gets rights in a user namespace, or a root that was left CAP_SYS_ADMIN."""
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return os.geteuid() != 0 or bool(int(status["CapEff"], 16) >> 21 & 1)


def test_creation_fails_with_the_command_that_helps() -> None:
    with lacking.only(*DEGRADE), pytest.raises(FeatureUnavailable) as caught:
        ProcessIsolator.create(IsolationOptions(degrade=DEGRADE))
    text = str(caught.value)
    assert caught.value.feature == "memory"
    assert all(name in text for name in ("memory", "cpus", "pids"))
    if detect().mode != "v2":
        assert f"chown -R {os.geteuid()}" in text
    elif systemd.runs():
        assert "systemd-run --user --scope -p Delegate=yes -- COMMAND" in text
    elif os.geteuid() == 0:
        assert "podman run --security-opt unmask=/sys/fs/cgroup" in text
    elif os.statvfs("/sys/fs/cgroup").f_flag & os.ST_RDONLY:
        assert "mount -o remount,bind,rw /sys/fs/cgroup" in text
    else:
        assert "as root: chown 1000 /sys/fs/cgroup" in text


def test_nothing_was_made_by_asking() -> None:
    host = detect()
    assert host.directories() == []
    assert {entry.feature for entry in cgroups.missing(host, cgroups.wanted_limits(Limits()))} >= {"memory", "pids"}
    assert "pisupervisor" not in Path("/proc/self/cgroup").read_text()


@pytest.mark.skipif(not may_mount(), reason="mounts: root without CAP_SYS_ADMIN")
def test_the_walls_stand_without_limits_and_applied_says_what_does_not_hold() -> None:
    with ProcessIsolator.create(IsolationOptions(degrade=WITHOUT)) as isolator:
        assert isolator.run_source("6 * 7").value == 42
        assert isolator.invoke(lambda: os.getpid()) == 2
        lacking = {name: entry for name, entry in isolator.applied.items() if not entry.holds}
    assert set(lacking) - set(DEGRADE) - {"swap"} == {
        "memory",
        "cpus",
        "pids",
        "cpu_weight",
        "cpuset",
        "io",
        "io_weight",
    }
    for name in ("memory", "cpus", "pids"):
        assert "group" in lacking[name].detail


@pytest.mark.skipif(may_mount(), reason="no_mounts: they are possible here")
def test_a_root_without_rights_is_told_so() -> None:
    """Without a limit for memory: for one that is watched it lacks CAP_SYS_PTRACE too, and is told whichever is met first."""
    with pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(IsolationOptions(limits=Limits(memory=None, swap=None), degrade=WITHOUT))
    assert caught.value.step == "namespaces"
    assert "lacks CAP_SYS_ADMIN" in str(caught.value.remedy)
