"""Why there are no namespaces: each cause by itself (pure), then the ones that can be brought about, with their remedy."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OrdinaryUser

from pisupervisor.launch import userns
from pisupervisor.launch.userns import Situation, remedy, remedy_for, situation
from pisupervisor.launch.zygote import host_failure

CLONE = Path("/proc/sys/kernel/unprivileged_userns_clone")
OPEN = {"user.max_user_namespaces": "1000"}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Situation(1000, (), False, {"user.max_user_namespaces": "0"}), "sysctl -w user.max_user_namespaces="),
        (Situation(0, (), False, {"user.max_user_namespaces": "0"}), "sysctl -w user.max_user_namespaces="),
        (Situation(1000, (), False, {**OPEN, "kernel.unprivileged_userns_clone": "0"}), "userns_clone=1"),
        (
            Situation(1000, (), False, {**OPEN, "kernel.apparmor_restrict_unprivileged_userns": "1"}),
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (Situation(0, ("SYS_ADMIN", "SETUID"), False, OPEN), "--cap-add SYS_ADMIN --cap-add SETUID"),
        (Situation(0, ("SYS_ADMIN",), True, OPEN), "--security-opt seccomp=unconfined"),
        (Situation(1000, (), True, OPEN), "seccomp=unconfined"),
        (Situation(1000, (), False, OPEN), "user.max_*_namespaces"),
        (Situation(0, (), False, {**OPEN, "kernel.unprivileged_userns_clone": "0"}), "user.max_*_namespaces"),
    ],
)
def test_each_cause_has_its_remedy(found: Situation, words: str) -> None:
    assert words in remedy(found)


PLAIN = Situation(1000, (), False, OPEN)
FILTERED = PLAIN._replace(filtered=True)
UBUNTU = PLAIN._replace(switches={**OPEN, "kernel.apparmor_restrict_unprivileged_userns": "1"})
CONFINED = PLAIN._replace(profile="docker-default (enforce)")
MASKED = FILTERED._replace(masks=("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/sys"))


@pytest.mark.parametrize(
    ("step", "number", "found", "words"),
    [
        ("namespaces", errno.EPERM, FILTERED, "seccomp=unconfined"),
        ("hostname", errno.EPERM, FILTERED, "seccomp=unconfined"),  # Podman's profile, without CAP_SYS_ADMIN
        ("mount table", errno.EPERM, FILTERED, "seccomp=unconfined"),  # Podman's, without CAP_SYS_CHROOT
        ("bind /usr at /usr", errno.ENOSYS, FILTERED, "seccomp=unconfined"),  # what a profile does not know
        ("bind /usr at /usr", errno.ENOSYS, PLAIN, ""),
        ("hostname", errno.EPERM, PLAIN, ""),
        ("fork", errno.EPERM, FILTERED, ""),
        ("id maps", errno.EPERM, PLAIN._replace(uid=0, lacks=("SETUID",)), "--cap-add SETUID"),
        ("private mounts", errno.EACCES, CONFINED, "apparmor=unconfined"),
        ("private mounts", errno.EACCES, FILTERED, ""),
        ("private mounts", errno.EPERM, UBUNTU, "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
        ("id maps", errno.EACCES, UBUNTU, "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
        ("private mounts", errno.EPERM, UBUNTU._replace(uid=0), ""),
        ("namespaces", errno.EPERM, PLAIN, "a chroot"),
        ("clone", errno.EPERM, PLAIN._replace(uid=0), "a chroot"),
        ("namespaces", errno.ENOSPC, PLAIN, "user.max_*_namespaces"),
        ("namespaces", errno.EACCES, CONFINED, "userns"),  # no rule for it, on Linux 6.12
        ("namespaces", errno.EPERM, CONFINED, "userns and capability"),  # no rule for that
        ("mounts", errno.EPERM, MASKED, "'unmask=/proc/*'"),
        ("mounts", errno.EPERM, MASKED, "systempaths=unconfined"),
        ("mounts", errno.EPERM, MASKED, "(/proc/acpi, /proc/kcore, /proc/keys and more)"),
        ("mounts", errno.EPERM, FILTERED, "procMount: Unmasked"),
    ],
)
def test_each_step_has_its_remedy(step: str, number: int, found: Situation, words: str) -> None:
    told = remedy_for(step, number, "mount /proc: Operation not permitted", found)
    assert words in told
    assert bool(told) == bool(words)


@pytest.mark.parametrize("mode", ["enforce", "complain", "unconfined"])
def test_only_a_profile_that_confines_is_a_cause(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = userns._read
    profile = f"app ({mode})"
    monkeypatch.setattr(userns, "_read", lambda path: profile if path.endswith("apparmor/current") else read(path))
    assert situation().profile == (profile if mode == "enforce" else "")
    remedy = host_failure(OSError(errno.EACCES, "Permission denied", "/proc/self/ns/pid")).remedy or ""
    assert ("attach_disconnected" in remedy) == (mode == "enforce")


def test_the_situation_is_read_from_the_kernel() -> None:
    found = situation()
    assert int(found.switches["user.max_user_namespaces"]) >= 0
    assert set(found.switches) <= {
        "user.max_user_namespaces", "kernel.unprivileged_userns_clone", "kernel.apparmor_restrict_unprivileged_userns",
    }  # fmt: skip


TRY = """
    import json
    from pisupervisor import *
    try:
        with ProcessIsolator.create(degrade=("memory", "swap", "cpus", "pids", "landlock")) as isolator:
            print(json.dumps({"value": isolator.run_source("6 * 7").value}))
    except LaunchError as error:
        print(json.dumps({"step": error.step, "remedy": error.remedy}))
"""


def attempt(user: OrdinaryUser) -> dict[str, object]:
    done = user.run_python("\n".join(line[4:] for line in TRY.splitlines()))
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def forbidden() -> Iterator[None]:
    """Debian's switch, turned off. Only in a machine of our own."""
    before = CLONE.read_text()
    CLONE.write_text("0")
    yield
    CLONE.write_text(before)


@pytest.mark.rootless
@pytest.mark.bed
@pytest.mark.usefixtures("forbidden_here")
def test_debians_switch_is_recognised_and_its_remedy_helps(ordinary_user: OrdinaryUser, forbidden: None) -> None:
    found = attempt(ordinary_user)
    assert found["step"] == "namespaces"
    command = str(found["remedy"]).removeprefix("as root: ").partition(";")[0]
    assert command == "sysctl -w kernel.unprivileged_userns_clone=1"
    subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
    assert attempt(ordinary_user) == {"value": 42}


@pytest.fixture
def forbidden_here(need: object) -> None:
    need("own_machine")  # type: ignore[operator]


@pytest.mark.linux
@pytest.mark.bed
def test_an_outer_filter_is_recognised() -> None:
    """A filter that refuses namespaces, as a container engine's does, over the whole application."""
    source = f"""
import sys, pyseccomp
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pisupervisor import *
refuse = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
refuse.add_rule(pyseccomp.ERRNO(1), "unshare")
refuse.load()
try:
    ProcessIsolator.create(degrade=("memory", "swap", "cpus", "pids", "landlock"))
except LaunchError as error:
    print(error.step, error.remedy)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("namespaces ")
    assert "seccomp=unconfined" in done.stdout
