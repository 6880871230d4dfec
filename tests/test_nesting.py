"""A pisupervisor inside a child of a pisupervisor: with nesting=True its own walls stand; without, the error says so."""

from __future__ import annotations

import json
import sysconfig
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import OrdinaryUser

from pisupervisor import IsolationOptions, Limits, OptionsError, ProcessIsolator, Security
from pisupervisor.launch.seccomp import NESTING, SeccompProfile, for_nesting, load_profile
from pisupervisor.launch.userns import Situation, remedy
from pisupervisor.results import Applied

TOP = Path(__file__).parent.parent
SITE = sysconfig.get_path("purelib")
pytestmark = pytest.mark.linux

INNER = """
    from pisupervisor import *
    DEGRADE = ("memory", "swap", "cpus", "pids", *MORE)
    def attempt(**changes):
        try:
            with ProcessIsolator.create(degrade=DEGRADE, **changes) as isolator:
                got = [isolator.run_source(WORK).value, isolator.invoke(lambda: 6 * 7)]
                applied = {name: [entry.holds, entry.how] for name, entry in isolator.applied.items()}
                return {"got": got, "applied": applied, "pid": isolator.pid}
        except LaunchError as error:
            return {"step": error.step, "remedy": error.remedy}
"""
WORK = """
import os
def tried(work):
    try:
        work()
    except OSError as error:
        return type(error).__name__
    return "done"
[os.getpid(), tried(lambda: open("/secret")), tried(lambda: open("/usr/new", "w")), tried(lambda: open("/tmp/x", "w"))]
"""


def inside(source: str, tmp_path: Path, **security: Any) -> tuple[Any, Mapping[str, Applied]]:
    """The value of ``source`` in a child that has pisupervisor to import, and what held there."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    more = tuple(name for name in ("landlock", "time") if name in _lacking())
    options = IsolationOptions(
        limits=Limits(memory=None, swap=None, pids=128), security=Security(**security), import_paths=[str(TOP), SITE],
        filesystem=_shown(secret), degrade=(*more, "memory", "swap", "cpus", "pids"),
    )  # fmt: skip
    text = f"MORE, WORK = {more!r}, {WORK!r}\n" + textwrap.dedent(INNER) + source
    with ProcessIsolator.create(options) as isolator:
        return isolator.run_source(text, timeout=100).value, isolator.applied


def _shown(secret: Path) -> Any:
    from pisupervisor import Filesystem

    return Filesystem(read_only=[(str(secret), "/secret")])


def _lacking() -> tuple[str, ...]:
    from helpers import DEGRADE

    return tuple(DEGRADE)


@pytest.mark.bed
def test_the_inner_walls_stand(tmp_path: Path) -> None:
    """What the outer child sees, the inner one does not; and the outer one is a child as any other."""
    told, applied = inside('[attempt(), open("/secret").read()]', tmp_path, nesting=True)
    inner, seen = told
    assert "step" not in inner, inner
    assert inner["got"] == [[2, "FileNotFoundError", "OSError", "done"], 42] or inner["got"] == [
        [2, "FileNotFoundError", "PermissionError", "done"], 42,
    ]  # fmt: skip
    assert seen == "secret"
    walls = {"user", "mount", "pid", "network", "ipc", "uts", "cgroup", "seccomp", "capabilities"}
    assert {name for name in walls if inner["applied"][name][0]} == walls
    assert not inner["applied"]["memory"][0]
    assert "watched: " in inner["applied"]["memory"][1]
    assert {name for name in walls if applied[name].holds} == walls
    assert "nesting: its mounts can be listed" in applied["mount"].detail
    assert "nesting: the rules for files are the inner isolator's" in applied["landlock"].detail
    assert "nesting: clone, unshare, mount" in applied["seccomp"].detail


@pytest.mark.matrix
def test_without_it_the_error_says_what_to_do(tmp_path: Path) -> None:
    told, applied = inside("attempt()", tmp_path)
    assert told["step"] == "namespaces"
    assert "security=Security(nesting=True)" in told["remedy"]
    assert "nesting" not in applied["seccomp"].detail


def test_who_asks_for_limits_inside_is_told_whose_hold(tmp_path: Path) -> None:
    """And not to mount, as root, what no child can. The doctor may not listen there, and does what it can without."""
    source = """
        def refused():
            try:
                ProcessIsolator.create(degrade=MORE)
            except FeatureUnavailable as error:
                return error.remedy
        from pisupervisor import doctor
        found = {one.name: one.verdict for one in doctor.examine().findings}
        [refused(), found["seccomp"], found["mount"], found["memory"]]
    """
    (remedy, *verdicts), _applied = inside(textwrap.dedent(source), tmp_path, nesting=True)
    assert "that one's limits hold" in remedy
    assert "mount" not in remedy
    assert verdicts == ["unproved", "holds", "missing"], "the outer filter stops the control, too"


def test_the_walls_of_the_outer_child_hold_with_nesting(tmp_path: Path) -> None:
    """Root in a namespace of its own can mount there, and reaches nothing that was not its own before."""
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
ids = os.getuid(), os.getgid()
first = libc.unshare(0x10000000 | 0x00020000)
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
def mounted(kind, flags=0, place=b"/tmp"):
    return 0 if libc.mount(b"x", place, kind, flags, None) == 0 else ctypes.get_errno()
remount = 0 if libc.mount(b"x", b"/usr", None, 0x1020, None) == 0 else ctypes.get_errno()
[first, os.getuid(), mounted(b"tmpfs"), mounted(b"ext4"), remount, sorted(os.listdir("/proc"))[:1], os.path.exists("/home")]
"""
    told, _applied = inside(textwrap.dedent(source), tmp_path, nesting=True)
    first, uid, tmpfs, ext4, remount, _processes, home = told
    assert (first, uid, tmpfs) == (0, 0, 0), "it is root of a namespace of its own"
    assert ext4, "no block device is mounted"
    assert remount, "what is read-only stays so: the mount is locked"
    assert not home


def test_the_filter_of_a_profile_lets_nesting_through_and_nothing_else() -> None:
    for name in ("default", "strict", "permissive"):
        plain, nested = load_profile(name), for_nesting(load_profile(name))
        before, after = (set(rules(profile)) for profile in (plain, nested))
        assert after - before == {("SCMP_ACT_ALLOW", name, "null") for name in NESTING} - before
        assert {name for _action, name, _args in before - after} <= set(NESTING)
        assert nested.compile() != plain.compile()


@pytest.mark.parametrize("names", [[], None])
def test_rules_in_the_old_form_are_kept(names: list[str] | None) -> None:
    """A denial that was lost would let pass what the profile refuses."""
    denial = {"name": "acct", "names": names, "action": "SCMP_ACT_ERRNO"}
    nested = for_nesting(SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denial]}))
    assert ("SCMP_ACT_ERRNO", "acct", "null") in rules(nested)


@pytest.mark.parametrize("more", [{}, {"syscalls": None}, {"syscalls": []}])
def test_a_profile_without_rules(more: dict[str, Any]) -> None:
    nested = for_nesting(SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_ALLOW", **more}))
    assert [name for _action, name, _args in rules(nested)] == list(NESTING)
    assert nested.compile()


def rules(profile: SeccompProfile) -> list[tuple[str, str, str]]:
    listed = json.loads(profile.source)["syscalls"]
    return [(rule["action"], name, json.dumps(rule.get("args"))) for rule in listed for name in rule["names"]]


@pytest.mark.rootless
def test_a_watched_memory_limit_is_refused(ordinary_user: OrdinaryUser) -> None:
    """The control has no memory limit, or no nesting."""
    source = f"""
        import json
        from pisupervisor import *
        DEGRADED = {("memory", "swap", "cpus", "pids", *_lacking())!r}
        def attempt(memory, nesting):
            limits, security = Limits(memory=memory, swap=None), Security(nesting=nesting)
            try:
                with ProcessIsolator.create(degrade=DEGRADED, limits=limits, security=security) as isolator:
                    return isolator.invoke(lambda: 42)
            except FeatureUnavailable as error:
                return [error.feature, error.remedy]
        print(json.dumps([attempt("64M", True), attempt(None, True), attempt("64M", False)]))
    """
    done = ordinary_user.run_python(textwrap.dedent(source))
    assert done.returncode == 0, done.stderr
    refused, unlimited, plain = json.loads(done.stdout)
    assert refused[0] == "memory"
    assert "Limits(memory=None)" in refused[1]
    assert (unlimited, plain) == (42, 42)


def test_it_is_a_switch() -> None:
    with pytest.raises(OptionsError, match="nesting: expected True or False"):
        Security(nesting=1)  # type: ignore[arg-type]


def test_whose_child_asked_is_the_first_thing_said() -> None:
    assert "nesting=True" in remedy(Situation(1000, (), True, {"user.max_user_namespaces": "0"}, nested=True))
