"""What keeps an ordinary user from sandboxes, brought about one by one: the typed error, the doctor's line, and that all is
well once it is undone.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import features
import pytest
from conftest import OrdinaryUser
from helpers import DEGRADE

pytestmark = pytest.mark.rootless

ATTEMPT = f"""
import json, sys
from pisupervisor import *
from pisupervisor import doctor
def attempt():
    try:
        with ProcessIsolator.create(degrade={("memory", "swap", "cpus", "pids", *DEGRADE)!r}) as isolator:
            return {{"value": isolator.run_source("6 * 7").value}}
    except (LaunchError, FeatureUnavailable) as error:
        return {{"kind": type(error).__name__, "step": getattr(error, "step", ""), "remedy": error.remedy}}
def examine():
    report = doctor.examine()
    found = {{finding.name: finding for finding in report.findings}}
    return [report.works, found["user"].verdict, found["user"].cause, found["user"].remedy]
"""
BOTH = "print(json.dumps([attempt(), examine()]))"
ONE = "print(json.dumps(attempt()))"
USER = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def same_remedy(found: list[Any], step: str, words: str) -> None:
    """The error and the doctor name the same step, and give the same way out."""
    error, (works, verdict, cause, remedy) = found
    assert (error["kind"], error["step"]) == ("LaunchError", step), error
    assert words in error["remedy"]
    assert (works, verdict, remedy) == (False, "missing", error["remedy"])
    assert f"step '{step}'" in cause


def test_no_more_user_namespaces(ordinary_user: OrdinaryUser) -> None:
    """The switch of a namespace of the user's own, in which they are themselves; turned back, children start."""
    source = """
        import ctypes, os
        uid = os.getuid()
        assert ctypes.CDLL(None).unshare(0x10000000) == 0
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{uid} {uid} 1")):
            with open(f"/proc/self/{name}", "w") as file: file.write(text)
        def allow(count):
            with open("/proc/sys/user/max_user_namespaces", "w") as file: file.write(count)
        allow("0")
        refused = [attempt(), examine()]
        allow("100")
        print(json.dumps([refused, attempt()]))
    """
    refused, allowed = last_line(ordinary_user.run_python(ATTEMPT + textwrap.dedent(source), timeout=200))
    same_remedy(refused, "namespaces", "sysctl -w user.max_user_namespaces=")
    assert allowed == {"value": 42}


def run(words: list[str], user: OrdinaryUser) -> subprocess.CompletedProcess[str]:
    """As root, where the words do not say otherwise."""
    return subprocess.run(
        words, cwd=user.home, env=user.environment, capture_output=True, text=True, timeout=200, check=False
    )


def in_mounts(user: OrdinaryUser, before: str, source: str) -> subprocess.CompletedProcess[str]:
    """``source`` as that user, in a mount namespace in which root has done ``before``."""
    words = [*USER, user.python, "-c", source]
    return run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{before} && exec {shlex.join(words)}"], user
    )


FRESH_PROC = """
import subprocess, sys
mount = "mount -t proc -o subset=pid proc /proc"
sys.exit(subprocess.call(["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "sh", "-c", mount]))
"""


@pytest.mark.matrix
def test_a_masked_proc(ordinary_user: OrdinaryUser) -> None:
    """As container engines do: something is mounted over a part of /proc, and most kernels then refuse a fresh one."""
    if (
        tried := subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    ).returncode:
        pytest.skip(f"mounts: {tried.stderr.strip()}")
    mask = "mount --bind /dev/null /proc/version"
    found = last_line(in_mounts(ordinary_user, mask, ATTEMPT + BOTH))
    if in_mounts(ordinary_user, mask, FRESH_PROC).returncode == 0:  # Linux 7.3: of one that shows processes alone
        assert (found[0], found[1][1]) == ({"value": 42}, "holds")
        return
    same_remedy(found, "mounts", "systempaths=unconfined")
    undone = in_mounts(ordinary_user, f"{mask} && umount /proc/version", ATTEMPT + ONE)
    assert last_line(undone) == {"value": 42}


FILTER = """
import pyseccomp
refuse = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
refuse.add_rule(pyseccomp.ERRNO(1), NAME, *MATCHING)
refuse.load()
"""


@pytest.mark.parametrize(
    ("name", "mask", "step"),
    [("unshare", 0, "namespaces"), ("clone", 0x10000000, "clone"), ("mount", 0, "private mounts")],
)
def test_an_outer_filter(ordinary_user: OrdinaryUser, name: str, mask: int, step: str) -> None:
    """A container engine's seccomp profile: which call it refuses decides how far a launch comes. Undone: none loaded."""
    matching = f"[pyseccomp.Arg(0, pyseccomp.MASKED_EQ, {mask}, {mask})]" if mask else "[]"
    head = FILTER.replace("NAME", repr(name)).replace("MATCHING", matching)
    found = last_line(ordinary_user.run_python(head + ATTEMPT + BOTH, timeout=200))
    same_remedy(found, step, "seccomp=unconfined")
    assert last_line(ordinary_user.run_python(ATTEMPT + ONE, timeout=200)) == {"value": 42}


@pytest.mark.parametrize(
    ("name", "step"),
    [("pidfd_open", "launch"), ("clone3", "zygote"), ("close_range", "zygote"), ("capset", "capabilities"),
     ("seccomp", "seccomp"), ("landlock_create_ruleset", "")],
)  # fmt: skip
def test_an_outer_filter_that_is_older_than_a_call(ordinary_user: OrdinaryUser, name: str, step: str) -> None:
    """Engines' profiles know no call that is newer than they are: whichever it is, the filter is named."""
    head = FILTER.replace("NAME", repr(name)).replace("MATCHING", "[]")
    found = last_line(ordinary_user.run_python(head + ATTEMPT + ONE, timeout=200))
    assert found["step"] == step, found
    assert "seccomp=unconfined" in found["remedy"]


BIND = 'mkdir "$0" && mount --rbind / "$0" && cd "$0" &&'


@pytest.mark.parametrize(("words", "step"), [(USER, "namespaces"), ([], "clone")])
def test_a_chroot(ordinary_user: OrdinaryUser, tmp_path: Path, words: list[str], step: str) -> None:
    """From which the kernel makes no user namespace; undone: the same folder, entered as the error says."""

    def tried(enter: str, source: str) -> Any:
        shell = ["unshare", "--mount", "sh", "-c", f'{BIND} exec {enter} "$@"', str(tmp_path / "root")]
        return last_line(run([*shell, *words, ordinary_user.python, "-c", ATTEMPT + source], ordinary_user))

    same_remedy(tried("chroot .", BOTH), step, "a chroot")
    (tmp_path / "root").rmdir()
    assert tried("sh -c 'pivot_root . mnt && umount -l /mnt && exec \"$@\"' sh", ONE) == {"value": 42}


@pytest.mark.parametrize("words", [USER, []])
def test_a_proc_of_others(ordinary_user: OrdinaryUser, words: list[str]) -> None:
    """A pid namespace with the /proc of the one before: a child's number there is that of somebody else."""
    python = [*words, ordinary_user.python, "-c"]
    found = last_line(run(["unshare", "--pid", "--fork", *python, ATTEMPT + BOTH], ordinary_user))
    same_remedy(found, "launch", "mount -t proc proc /proc")
    mounted = ["unshare", "--pid", "--fork", "--mount", "sh", "-c", 'mount -t proc proc /proc && exec "$@"', "sh"]
    assert last_line(run([*mounted, *python, ATTEMPT + ONE], ordinary_user)) == {"value": 42}


def test_root_in_a_container_without_rights(ordinary_user: OrdinaryUser) -> None:
    """Root with a container's capabilities and no CAP_SYS_ADMIN; undone: the same with it."""
    features.need("limits")

    def tried(*kept: str) -> Any:
        bounding = ",".join(("-all", *kept))
        words = ["setpriv", "--bounding-set", bounding, "--inh-caps", "-all", ordinary_user.python, "-c"]
        done = subprocess.run(
            [*words, ATTEMPT + ONE], cwd=ordinary_user.home, capture_output=True, text=True,
            timeout=200, check=False,
        )  # fmt: skip
        return last_line(done)

    least = ("+chown", "+dac_override", "+fowner", "+kill", "+setgid", "+setuid", "+setpcap", "+sys_chroot")
    refused = tried(*least)
    assert (refused["kind"], refused["step"]) == ("LaunchError", "namespaces")
    assert "--cap-add SYS_ADMIN" in refused["remedy"]
    assert tried(*least, "+sys_admin", "+net_admin", "+sys_ptrace") == {"value": 42}
