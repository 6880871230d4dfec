"""Real children: that they come, with the options that were given, and that nothing of them stays."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import descendants, init_of, nothing_left, own_groups, parent_of, state_of, wait_until, write, zygote_of

from pisupervisor import (
    IsolationOptions,
    LaunchError,
    Limits,
    OptionsError,
    ProcessIsolator,
    RemoteError,
    Security,
    SerializationError,
)
from pisupervisor.launch.interpreter import host_python
from pisupervisor.options import PROTECTIONS

pytestmark = [pytest.mark.linux, pytest.mark.matrix]
INSIDE = Path(__file__).with_name("inside.py")


def test_create_call_close() -> None:
    """parity: 1"""
    with nothing_left():
        with ProcessIsolator.create() as isolator:
            assert isolator.state == "ready"
            assert state_of(isolator.pid or 0) in ("S", "R")
            assert parent_of(init_of(isolator)) == zygote_of(isolator)
            assert isolator.run_source("6 * 7").value == 42
        assert (isolator.state, isolator.pid) == ("stopped", None)


def test_ids_rise() -> None:
    """parity: 4"""
    with ProcessIsolator.create() as first, ProcessIsolator.create() as second:
        assert second.id > first.id
        assert second.pid != first.pid


@pytest.mark.root
def test_every_protection_that_was_asked_for_holds(need: Callable[..., None]) -> None:
    need("landlock")
    with ProcessIsolator.create(limits=Limits(cpuset="0", cpu_weight=50)) as isolator:
        assert set(isolator.applied) == set(PROTECTIONS)
        lacking = [name for name, entry in isolator.applied.items() if not entry.holds]
        assert lacking == ["io", "io_weight"], "what was not asked for"
        assert isolator.applied["memory"].asked == 512 << 20


def test_close_is_idempotent_and_leaving_is_closing() -> None:
    isolator = ProcessIsolator.create()
    pid = isolator.pid
    isolator.close()
    isolator.close()
    assert not os.path.exists(f"/proc/{pid}")


def test_an_isolator_that_nobody_closed() -> None:
    with nothing_left():
        ProcessIsolator.create().run_source("1")


@pytest.mark.alone
@pytest.mark.unhurried
def test_the_start_timeout() -> None:
    """parity: 1, 2"""
    with nothing_left(), ProcessIsolator.create() as other:  # a Template would have a child ready
        zygote, groups = zygote_of(other), len(own_groups())
        os.kill(zygote, signal.SIGSTOP)
        started = time.monotonic()
        try:
            with pytest.raises(LaunchError) as caught:
                ProcessIsolator.create(start_timeout=0.5)
            took = time.monotonic() - started
            assert len(own_groups()) == groups
        finally:
            os.kill(zygote, signal.SIGCONT)
        assert caught.value.step == "start_timeout"
        assert "0.5 s" in str(caught.value)
        assert 0.4 < took < 1.0
        with ProcessIsolator.create() as isolator:
            assert isolator.run_source("1").value == 1
            assert wait_until(lambda: len(descendants(zygote)) == 6), "these two, and a spare child"
            time.sleep(0.1)
            assert len(descendants(zygote)) == 6, "what was asked for in vain did not come late"


@pytest.mark.alone
def test_a_preload_that_takes_too_long(tmp_path: Path) -> None:
    """parity: 2"""
    write(tmp_path, "slow_module.py", "import time\ntime.sleep(60)\n")
    with nothing_left():
        started = time.monotonic()
        with pytest.raises(LaunchError) as caught:
            ProcessIsolator.create(import_paths=[tmp_path], preload=["slow_module"], start_timeout=0.5)
        assert caught.value.step == "start_timeout"
        assert time.monotonic() - started < 5.0  # not 60


def test_a_preloaded_module_is_there(tmp_path: Path) -> None:
    write(tmp_path, "warm_module.py", "import os\nloaded_by = os.getpid()\n")
    with ProcessIsolator.create(import_paths=[tmp_path], preload=["warm_module"]) as isolator:
        assert isolator.run_source("import sys; 'warm_module' in sys.modules").value is True
        assert isolator.run_source("import warm_module, os; warm_module.loaded_by != os.getpid()").value is True


# --- which python ------------------------------------------------------------------------------------------------


def interpreters() -> list[str]:
    """Every Python from 3.9 on that this machine has, in the places where people have them."""
    names = [f"python3.{minor}" for minor in range(9, 16)]
    found = [path for name in ["python3", *names] if (path := shutil.which(name, path="/usr/bin:/usr/local/bin"))]
    for minor in range(9, 16):
        found += map(str, sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))[-1:])
    return sorted({os.path.realpath(path) for path in found})


@pytest.mark.parametrize("python", [None, *interpreters()], ids=lambda path: os.path.basename(path or "own"))
def test_each_interpreter_of_this_machine_launches(python: str | None, tmp_path: Path) -> None:
    """parity: 16"""
    with ProcessIsolator.create(python=python) as isolator:
        found = isolator.run_source("import sys, ctypes, json, ssl, sqlite3; sys.version_info[:2]").value
        assert isolator.invoke_method(INSIDE, "facts")["pid"] == 2
        assert isolator.invoke_method(str(write(tmp_path, "m.py", "def f(x): return x")), "f", {"a": [1]}) == {"a": [1]}
        if python in (None, host_python()):
            assert found == sys.version_info[:2]
        if found == sys.version_info[:2]:
            assert isolator.invoke(lambda x: x + 1, 41) == 42
        else:
            with pytest.raises(SerializationError, match="use invoke_method with a file"):
                isolator.invoke(lambda x: x + 1, 41)


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    with nothing_left():
        with pytest.raises(OptionsError, match="does not exist"):
            ProcessIsolator.create(python=tmp_path / "python")
        broken = write(tmp_path, "python", "#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        with pytest.raises(LaunchError, match="no working Python"):
            ProcessIsolator.create(python=broken)


def test_own_version_of_a_package(tmp_path: Path) -> None:
    """parity: 40"""
    write(tmp_path / "host", "shared_package/__init__.py", "version = 1")
    write(tmp_path / "child", "shared_package/__init__.py", "version = 2")
    sys.path.insert(0, str(tmp_path / "host"))
    try:
        import shared_package  # type: ignore[import-not-found]

        with ProcessIsolator.create(import_paths=[tmp_path / "child"]) as isolator:
            assert isolator.run_source("import shared_package; shared_package.version").value == 2
        assert shared_package.version == 1
    finally:
        sys.path.remove(str(tmp_path / "host"))
        sys.modules.pop("shared_package", None)


def test_the_hosts_packages_are_not_the_childs() -> None:
    with ProcessIsolator.create() as isolator, pytest.raises(ImportError):
        isolator.run_source("import pisupervisor")


# --- environment, debug, log -------------------------------------------------------------------------------------


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """parity: 55"""
    monkeypatch.setenv("HOST_SECRET", "hunter2")
    monkeypatch.setenv("SHARED", "yes")
    longest = "x" * ((1 << 17) - len("LONG=") - 1)
    options = IsolationOptions(inherit_environment=["SHARED"], environment={"GIVEN": "too", "LONG": longest})
    with ProcessIsolator.create() as bare, ProcessIsolator.create(options) as given:
        assert set(bare.invoke_method(INSIDE, "facts")["environment"]) == {"PATH", "HOME", "TMPDIR", "LANG"}
        found = given.invoke_method(INSIDE, "facts")["environment"]
        assert given.invoke(lambda: os.environ["LONG"]) == longest
        assert (found["SHARED"], found["GIVEN"], "HOST_SECRET" in found) == ("yes", "too", False)
        for where in ("/proc/self/environ", "/proc/1/environ"):
            assert (
                "hunter2" not in given.run_source(f"try: s = open({where!r}).read()\nexcept OSError: s = ''\ns").value
            )


def test_debug_stops_before_user_code(capfd: pytest.CaptureFixture[str]) -> None:
    """parity: 17"""
    with ProcessIsolator.create(debug=True) as isolator:
        pid = isolator.pid or 0
        assert wait_until(lambda: state_of(pid) == "T")
        assert f"kill -CONT {pid}" in capfd.readouterr().err
        future = isolator.submit(os.getpid)
        time.sleep(0.1)
        assert (state_of(pid), future.done()) == ("T", False)
        os.kill(pid, signal.SIGCONT)
        assert future.result(5) == 2


def test_steps_are_logged_at_debug_only(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """parity: 18"""
    monkeypatch.delenv("PISUPERVISOR_LOG_LEVEL", raising=False)
    with ProcessIsolator.create():
        pass
    assert capfd.readouterr().err == ""
    with ProcessIsolator.create(log_level="DEBUG"):
        pass
    said = capfd.readouterr().err
    assert "pihost" in said
    for step in ("join cgroup", "ids", "mounts", "hostname", "stdio"):  # from there on fd 2 is the child's, not ours
        assert f"DEBUG step {step}" in said
    monkeypatch.setenv("PISUPERVISOR_LOG_LEVEL", "DEBUG")
    with ProcessIsolator.create():
        pass
    assert "DEBUG step mounts" in capfd.readouterr().err


def test_no_file_is_made_for_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launch needs, goes with its processes: there is no folder to be left behind."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    with ProcessIsolator.create(environment={"A": "zygote of its own"}) as isolator:
        assert isolator.execute(print, "x" * (2 << 20)).truncated
        assert isolator.invoke(len, bytes(1 << 20)) == 1 << 20
        assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    with pytest.raises(LaunchError):
        ProcessIsolator.create(preload=["no_such_module_anywhere"])
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_what_the_child_says_goes_nowhere_unasked(capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessIsolator.create(log_level="DEBUG") as isolator:
        capfd.readouterr()
        isolator.invoke_method(INSIDE, "talk")
    assert "printed" not in "".join(capfd.readouterr())


# --- scratch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_a_full_scratch_is_an_error_that_says_how_to_get_more(folder: str) -> None:
    with nothing_left(), ProcessIsolator.create(limits=Limits(scratch="1M")) as isolator:
        with pytest.raises(OSError) as caught:
            isolator.invoke_method(INSIDE, "write_all", f"{folder}/big", 2 << 20)
        error = caught.value
        assert isinstance(error, RemoteError)
        assert (error.errno, f'"{INSIDE}", line' in error.remote_traceback) == (errno.ENOSPC, True)
        assert "No space left on device\n  hint: " in error.message
        assert "Limits(scratch=...)" in error.message
        assert isolator.invoke_method(INSIDE, "write_all", f"{folder}/big", 1 << 19) == 1 << 19, "there is room again"


# --- frozen, user ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [1, 1000, 65533])
def test_the_user_inside(user: int) -> None:
    options = IsolationOptions(security=Security(user=user, hostname="elsewhere"))
    with ProcessIsolator.create(options) as isolator:
        facts = isolator.invoke_method(INSIDE, "facts")
        # an ordinary user cannot leave groups, and maps none but the own one
        groups = [] if os.geteuid() == 0 else [user if own == os.getegid() else 65534 for own in os.getgroups()]
        assert facts["ids"] == ((user,) * 3, (user,) * 3, groups)
        assert facts["hostname"] == "elsewhere"
        assert f"user:x:{user}:" in isolator.invoke_method(INSIDE, "text", "/etc/passwd")
        assert isolator.invoke_method(INSIDE, "can_write", "/tmp/mine") == "done"


def test_nice() -> None:
    with ProcessIsolator.create(limits=Limits(nice=7)) as isolator:
        assert isolator.invoke_method(INSIDE, "facts")["nice"] == 7
