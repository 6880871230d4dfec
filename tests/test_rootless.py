"""The same as an ordinary user: what is missing is said, with the way to get it; all the rest holds."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import features
import pytest
from conftest import OrdinaryUser
from helpers import DEGRADE

pytestmark = [pytest.mark.rootless, pytest.mark.bed]
INSIDE = Path(__file__).with_name("inside.py")
LACKING = ["memory", "swap", "cpus", "pids"]

PRELUDE = f"""
    import json, os, sys
    from pisupervisor import *
    DEGRADED = IsolationOptions(degrade={[*LACKING, *DEGRADE]!r})
    LIMITED = IsolationOptions(degrade={DEGRADE!r})
    def tell(**facts): print(json.dumps(facts, default=str))
"""


def run(user: OrdinaryUser, source: str, *arguments: str) -> dict[str, Any]:
    """What the script told; it runs with no privilege at all."""
    copy = user.home / "inside.py"
    copy.write_text(INSIDE.read_text())
    done = user.run_python(textwrap.dedent(PRELUDE) + textwrap.dedent(source), str(copy), *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_is_missing_is_named_with_its_remedy(ordinary_user: OrdinaryUser) -> None:
    source = """
        def held():
            children = [open(f"/proc/self/task/{name}/children").read() for name in os.listdir("/proc/self/task")]
            mounts = open("/proc/self/mountinfo").read()
            return [sorted(os.listdir("/proc/self/fd")), children, mounts, sorted(set(os.listdir(".")) - {".cache"})]
        before = held()
        try:
            ProcessIsolator.create(LIMITED)
        except FeatureUnavailable as error:
            told = dict(feature=error.feature, remedy=error.remedy, text=str(error), uid=os.getuid())
        tell(left=[one for one in zip(before, held()) if one[0] != one[1]], **told)
    """
    found = run(ordinary_user, source)
    assert (found["uid"], found["left"]) == (1000, [])
    assert found["feature"] in LACKING
    for name in ("memory", "cpus", "pids"):
        assert name in found["text"]
        assert repr(name) in found["remedy"]
    assert "degrade=" in found["remedy"]
    assert any(word in found["remedy"].lower() for word in ("deleg", "root", "a writable cgroup tree"))


def test_files_that_may_not_be_read(ordinary_user: OrdinaryUser) -> None:
    source = """
        for name, text in (("secret.py", "def f(): pass"), ("secret.json", "{}")):
            with open(name, "w") as file: file.write(text)
            os.chmod(name, 0)
        with ProcessIsolator.create(DEGRADED) as isolator:
            for what in (
                lambda: isolator.invoke_method("secret.py", "f"),
                lambda: ProcessIsolator.create(DEGRADED, security=Security(seccomp="secret.json")),
            ):
                try: what()
                except OptionsError as error: print(error)
        tell(here=os.getcwd())
    """
    copy = ordinary_user.run_python(textwrap.dedent(PRELUDE) + textwrap.dedent(source))
    assert copy.returncode == 0, copy.stderr
    code, profile, told = copy.stdout.splitlines()
    here = json.loads(told)["here"]
    assert code == f"{here}/secret.py: not readable by uid 1000; change its mode or its owner"
    assert profile.startswith(f"{here}/secret.json: cannot read the profile: Permission denied")


def test_nobody_waits_for_a_file_that_a_child_has_open(ordinary_user: OrdinaryUser) -> None:
    """A lease is for a file's owner, which a child with the user's own id is. The control is without a filter."""
    source = """
        def lease(path):
            import fcntl, os
            global kept
            kept = os.open(path, os.O_RDONLY)
            try:
                return fcntl.fcntl(kept, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except PermissionError:
                return "refused"
        def attempt(filter):
            folder = os.path.join(os.getcwd(), "leased-" + str(filter))
            path = os.path.join(folder, "file")
            os.makedirs(folder)
            open(path, "w").close()
            shown = Filesystem(read_only=[folder])
            wanted = dict(filesystem=shown, security=Security(seccomp=filter), degrade=[*DEGRADED.degrade, "seccomp"])
            with ProcessIsolator.create(**wanted) as isolator:
                got = isolator.invoke(lease, path)
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                except BlockingIOError:
                    return [got, "waits"]
                return [got, "opened"]
        tell(default=attempt("default"), permissive=attempt("permissive"), control=attempt(None))
    """
    free, held = ["refused", "opened"], [0, "waits"]
    assert run(ordinary_user, source) == {"default": free, "permissive": free, "control": held}


def test_everything_else_holds(ordinary_user: OrdinaryUser) -> None:
    source = """
        with ProcessIsolator.create(DEGRADED) as isolator:
            holds = {name: entry.holds for name, entry in isolator.applied.items()}
            why = {name: entry.detail for name, entry in isolator.applied.items() if not entry.holds}
            facts = isolator.invoke_method(sys.argv[1], "facts")
            status = dict(line.split(":\\t", 1) for line in open(f"/proc/{isolator.pid}/status").read().splitlines())
            mounts = isolator.run_source("open('/proc/self/mountinfo').read()").value
            mine = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
            its = {name: os.readlink(f"/proc/{isolator.pid}/ns/{name}") for name in mine}
        tell(holds=holds, why=why, facts=facts, status=status,
             mounts=mounts, shared=[name for name in mine if mine[name] == its[name]])
    """
    found = run(ordinary_user, source)
    lacking = {name for name, holds in found["holds"].items() if not holds} - set(DEGRADE)
    assert lacking | {"swap"} == {*LACKING, "cpu_weight", "cpuset", "io", "io_weight"}, (
        "a host without swap needs no limit of it"
    )
    assert all(found["why"][name] for name in lacking)
    assert found["shared"] == []
    assert found["mounts"] == "", "where it lies is not the child's business"
    facts, status = found["facts"], found["status"]
    assert (facts["ids"][0], facts["pid"], facts["session"], facts["hostname"]) == ([1000] * 3, 2, True, "pihost")
    assert sorted(facts["fds"]) == ["0", "1", "2", "3"]
    assert facts["interfaces"] == {"lo": False}
    assert "home" not in facts["root"]
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert set(status["Uid"].split()) == {"1000"}


def test_somebody_in_very_many_groups(ordinary_user: OrdinaryUser) -> None:
    """/proc/PID/status lists them all before what is read back there."""
    become = f"""
        import os, sys
        os.setgroups(range(10000, 11500))
        os.setgid({features.ORDINARY_USER})
        os.setuid({features.ORDINARY_USER})
        os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
    """
    source = """
        with ProcessIsolator.create(DEGRADED) as isolator:
            tell(groups=len(os.getgroups()), said=isolator.invoke(len, "abc"), seccomp=isolator.applied["seccomp"].holds)
    """
    command = [ordinary_user.python, "-c", textwrap.dedent(become), textwrap.dedent(PRELUDE) + textwrap.dedent(source)]
    done = subprocess.run(
        command, cwd=ordinary_user.home, env=ordinary_user.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"groups": 1500, "said": 3, "seccomp": True}


def test_calls_and_their_ends(ordinary_user: OrdinaryUser) -> None:
    source = """
        def name(work):
            try:
                return work()
            except Exception as error:
                return type(error).__name__
        with ProcessIsolator.create(DEGRADED) as isolator:
            i = isolator
            tell(
                call=i.invoke_method(sys.argv[1], "sleep", 0),
                closure=i.invoke(lambda: 6 * 7),
                output=i.execute(sys.argv[1] + ":talk").stdout.split()[0],
                timeout=name(lambda: i.invoke_method(sys.argv[1], "spin_with_family", timeout=0.3)),
                left=name(lambda: i.invoke_method(sys.argv[1], "leave", 3)),
                scratch=i.invoke_method(sys.argv[1], "can_write", "/tmp/x"),
                usage=i.resource_usage().peak_memory,
            )
    """
    found = run(ordinary_user, source)
    assert (found["call"], found["closure"], found["scratch"]) == (0, 42, "done")
    assert (found["timeout"], found["left"]) == ("CallTimeout", "ChildTerminated")
    assert found["output"]
    assert found["usage"] > 1 << 20


def test_rlimits_stand_in_for_groups(ordinary_user: OrdinaryUser, need: Callable[..., None]) -> None:
    """They hold less than groups do, and applied says so; the control is the same work in a roomier child."""
    need("nproc_apart")
    source = """
        def fork():
            import os, signal, time
            pids = []
            try:
                for _ in range(40):
                    pid = os.fork()
                    if not pid:
                        time.sleep(60)
                        os._exit(0)
                    pids.append(pid)
            except OSError:
                pass
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return len(pids)
        def eat():
            try:
                return len(bytearray(100 << 20))
            except MemoryError:
                return "MemoryError"
        def look(**limits):
            options = IsolationOptions(limits=Limits(**limits), degrade=DEGRADED.degrade)
            with ProcessIsolator.create(options) as i:
                why = {name: i.applied[name].detail for name in ("memory", "pids")}
                return [i.invoke(fork), i.invoke(eat), why]
        tell(tight=look(pids=12, memory="64M"), roomy=look(pids=64, memory="512M"))
    """
    found = run(ordinary_user, source)
    assert found["tight"][:2] == [10, "MemoryError"], "PID 1 and the payload are two of the twelve"
    assert found["roomy"][:2] == [40, 100 << 20]
    assert "instead, the child's user id may have as many" in found["tight"][2]["pids"]
    assert "instead, each process may have that much" in found["tight"][2]["memory"]


def test_nothing_is_left(ordinary_user: OrdinaryUser) -> None:
    source = """
        import time
        def seen(earlier=None):
            for _ in range(500):  # a joined thread is a task for a moment longer, and the kernel buries a process
                processes = [p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid() and mine(p)]
                if len(os.listdir("/proc/self/task")) == 1 and (earlier is None or set(processes) <= set(earlier)): break
                time.sleep(0.01)
            return [sorted(os.listdir("/proc/self/fd")), os.listdir("/proc/self/task"), processes]
        def mine(pid):
            try:
                return os.stat("/proc/" + pid).st_uid == os.getuid()
            except OSError:
                return False
        with ProcessIsolator.create(DEGRADED): pass
        before = seen()
        for _ in range(5):
            with ProcessIsolator.create(DEGRADED) as isolator:
                isolator.run_source("1")
        tell(before=before, after=seen(before[-1]))
    """
    found = run(ordinary_user, source)
    *after, processes = found["after"]
    *before, earlier = found["before"]
    assert after == before
    assert set(processes) <= set(earlier)


def test_two_children_are_kept_apart_though_they_are_one_user(ordinary_user: OrdinaryUser) -> None:
    source = """
        with ProcessIsolator.create(DEGRADED) as one, ProcessIsolator.create(DEGRADED) as two:
            spied = two.run_source(f'''
        try:
            import os; os.kill({one.pid}, 0); r = 'seen'
        except OSError as error:
            r = type(error).__name__
        r''').value
            tell(spied=spied, pids=[one.pid, two.pid])
    """
    assert run(ordinary_user, source)["spied"] == "ProcessLookupError"


def test_no_user_namespaces_is_said(ordinary_user: OrdinaryUser) -> None:
    """A host that forbids them altogether: here by a limit of the user's own, set in an outer namespace."""
    source = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x10000000) == 0
        with open("/proc/sys/user/max_user_namespaces", "w") as file: file.write("0")
        try:
            ProcessIsolator.create(DEGRADED, start_timeout=5)
        except LaunchError as error:
            tell(step=error.step, errno=error.errno, remedy=error.remedy)
    """
    found = run(ordinary_user, source)
    assert (found["step"], found["errno"]) == ("namespaces", 28)
    assert "max_user_namespaces" in found["remedy"]


def test_a_folder_that_only_root_can_read(ordinary_user: OrdinaryUser, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir(mode=0o700)
    source = """
        try:
            ProcessIsolator.create(DEGRADED, import_paths=[sys.argv[2]], start_timeout=5)
        except (OptionsError, LaunchError) as error:
            tell(kind=type(error).__name__, text=str(error))
    """
    found = run(ordinary_user, source, str(tmp_path / "secret"))
    assert str(tmp_path / "secret") in found["text"]
    assert os.path.basename(tmp_path) in found["text"]


def test_big_data_and_open_files(ordinary_user: OrdinaryUser, need: Callable[..., None]) -> None:
    """The child has the user's own id outside: what keeps a file that was opened for reading from being opened anew for
    writing is Landlock alone. A pipe it does not keep, as the README says.
    """
    need("landlock")
    source = """
        def reopen(file, flags):
            try:
                os.close(os.open(f"/proc/self/fd/{file.fileno()}", flags))
            except OSError as error:
                return type(error).__name__
            return "opened"

        with open("precious", "w") as file:
            file.write("precious")
        reader, writer = os.pipe()
        with ProcessIsolator.create(DEGRADED) as isolator, open("precious") as file, open(reader) as pipe:
            os.close(writer)
            tell(
                there=isolator.invoke(len, memoryview(bytes(1 << 20))),
                back=len(isolator.invoke(bytes, 1 << 20)),
                read=isolator.invoke(lambda file: file.read(), file),
                file=isolator.invoke(reopen, file, os.O_WRONLY),
                pipe=isolator.invoke(reopen, pipe, os.O_WRONLY),
            )
        """
    found = run(ordinary_user, source)
    assert found == {"there": 1 << 20, "back": 1 << 20, "read": "precious", "file": "PermissionError", "pipe": "opened"}


def test_what_an_owner_may_do_to_what_is_passed(ordinary_user: OrdinaryUser, need: Callable[..., None]) -> None:
    """SECURITY.md says so: a child with the user's own id owns what they pass. By Landlock it cannot open the file anew."""
    need("landlock")
    source = """
        def misuse(file, pipe):
            import os
            done = []
            tries = dict(
                mode=lambda: os.fchmod(file.fileno(), 0o666), times=lambda: os.utime(file.fileno(), (0, 0)),
                file=lambda: os.open(f"/proc/self/fd/{file.fileno()}", os.O_WRONLY),
                pipe=lambda: os.open(f"/proc/self/fd/{pipe.fileno()}", os.O_RDONLY | os.O_NONBLOCK),
            )
            for name, attempt in tries.items():
                try:
                    attempt()
                except OSError:
                    continue
                done.append(name)
            return done
        with open("passed", "w") as file:
            os.chmod("passed", 0o600)
        reader, writer = os.pipe()
        with ProcessIsolator.create(DEGRADED) as isolator, open("passed") as file, open(writer, "wb") as pipe:
            done = isolator.invoke(misuse, file, pipe)
        tell(done=done, mode=os.stat("passed").st_mode & 0o777)
    """
    assert run(ordinary_user, source) == {"done": ["mode", "times", "pipe"], "mode": 0o666}


def test_no_child_can_write_the_filters_of_later_ones(ordinary_user: OrdinaryUser) -> None:
    """The cache is trusted because nobody else can write there; a child of an ordinary user has that user's id outside.
    Firejail #7132 was of this kind.
    """
    source = """
        import pathlib
        home = pathlib.Path.home()
        os.environ["XDG_CACHE_HOME"] = str(home / "kept" / "cache")
        for name in ("kept/cache/pisupervisor/seccomp", "kept/other"):
            (home / name).mkdir(parents=True, mode=0o700, exist_ok=True)
        (home / "link").symlink_to("kept/cache")
        said = {}
        for name in ("", "kept", "kept/cache", "kept/cache/pisupervisor/seccomp", "link", "kept/other"):
            try:
                shown = Filesystem(writable=[(str(home / name), "/given")])
                with ProcessIsolator.create(DEGRADED, filesystem=shown) as isolator:
                    said[name] = isolator.run_source("open('/given/file', 'w').write('x')").value
            except OptionsError as error:
                said[name] = str(error)
        tell(**said)
    """
    said = run(ordinary_user, source)
    assert said.pop("kept/other") == 1
    assert len(said) == 5
    assert all("cache of compiled filters" in text and "XDG_CACHE_HOME" in text for text in said.values())
