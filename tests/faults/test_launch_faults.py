"""What goes wrong at each step of a launch, and whom it kills: a typed error that names the step, and nothing is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lame
import pytest
from helpers import (
    descendants,
    nothing_left,
    open_fds,
    parent_of,
    state_of,
    wait_until,
    write,
    zygote_of,
)  # fmt: skip
from zoo import SOON, lives_on, within

from pisupervisor import (
    FeatureUnavailable,
    Filesystem,
    IsolationOptions,
    LaunchError,
    ProcessIsolator,
    Security,
    Template,
)
from pisupervisor.launch import attest, ids, interpreter, planning, templates, zygote as zygote_module
from pisupervisor.limits import cgroups
from pisupervisor.supervise.child import Child

pytestmark = pytest.mark.linux
Spoil = Callable[[str, str, Any], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """``spoil("child_plan", "hostname", "x" * 100)``: every plan of that kind gets this field."""

    def install(kind: str, field: str, value: Any) -> None:
        original = getattr(planning, kind)

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            plan = original(*args, **kwargs)
            setattr(plan, field, value(getattr(plan, field)) if callable(value) else value)
            return plan

        monkeypatch.setattr(planning, kind, spoiled)

    return install


def refused(step: str, **changes: Any) -> LaunchError:
    with nothing_left(), pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(start_timeout=10, **changes)
    assert caught.value.step == step
    assert f"step '{step}'" in str(caught.value)
    assert f"\n  remedy: {caught.value.remedy}" in str(caught.value)
    assert caught.value.remedy, "whatever went wrong, there is something to do"
    return caught.value


# --- every step of a launch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "step", "errno"),
    [
        ("uid_map", "nonsense", "id maps", 22),
        ("gid_map", "0 0 0", "id maps", 22),
        ("namespaces", 0x20200, "clone", 22),
        ("cgroups", 99, "plan", None),
        ("hostname", "x" * 100, "hostname", 22),
        ("mounts", lambda own: [*own, ["bind", "/nowhere", "/tmp/x", 0]], "mounts", 2),
        ("mounts", lambda own: [["tmpfs", "/nowhere", 1 << 20, 8, 1000, 1000], *own], "mounts", 2),
        ("uid", 4711, "ids", 22),
        ("rlimits", [[7, 1 << 40, 1 << 40]], "rlimits", None),
        ("nice", "not a number", "plan", None),
        ("landlock", [["/nowhere", 1]], "landlock", 2),
        ("landlock", [["/tmp", 1 << 60]], "landlock", 22),
        ("landlock_fs", 1 << 60, "landlock", 22),
    ],
)
def test_a_step_of_a_child(spoil: Spoil, field: str, value: Any, step: str, errno: int | None) -> None:
    spoil("child_plan", field, value)
    assert refused(step).errno == errno


@pytest.mark.parametrize(
    ("field", "value", "step", "errno"),
    [
        ("seccomp", b"\xff" * 8, "seccomp", 22),
        ("seccomp", b"odd", "seccomp", 22),
        ("interpreter", "/nowhere/python3", "interpreter", 2),
        ("interpreter", "/etc/passwd", "interpreter", 13),
        ("root", lambda root: [*root, ["bind", "/nowhere/at/all", "/x", 1]], "bind /nowhere/at/all at /x", 2),
        ("root", lambda root: [*root, ["file", "/etc/passwd", ""]], "file /etc/passwd", 17),
    ],
)
def test_a_step_of_a_template(spoil: Spoil, field: str, value: Any, step: str, errno: int | None) -> None:
    spoil("template_plan", field, value)
    error = refused(step)
    assert error.errno == errno
    if field == "interpreter":
        assert "/usr/bin/python3" in str(error.remedy)


def test_a_root_that_nobody_understands(spoil: Spoil) -> None:
    spoil("template_plan", "root", [["ramfs", "/x"]])
    refused("zygote")


def test_a_package_that_is_not_there(spoil: Spoil) -> None:
    spoil("template_plan", "package", "/nowhere")
    refused("zygote")


PRELOADS = {
    "raising": ("1 / 0", "ZeroDivisionError: division by zero"),
    "with_thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "thread"),
    "missing_part": ("import no_such_module_anywhere", "no_such_module_anywhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRELOADS)
def test_a_preload_that_cannot_be(tmp_path: Path, name: str) -> None:
    source, said = PRELOADS[name]
    write(tmp_path, f"{name}.py", source)
    error = refused("preload" if name == "with_thread" else f"preload {name}", import_paths=[tmp_path], preload=[name])
    assert said in str(error)
    assert ("import_paths" if name == "missing_part" else "on_start") in str(error.remedy)


@pytest.mark.parametrize("changes", [{"read_only": [("/etc", "/usr/nowhere")]}, {"overlay": ["/nowhere"]}], ids=str)
def test_a_place_in_what_is_read_only(changes: dict[str, Any]) -> None:
    error = refused("mounts" if "overlay" in changes else "bind /etc at /usr/nowhere", filesystem=Filesystem(**changes))
    assert error.errno == errno.EROFS
    assert "outside of that" in str(error.remedy)


def test_a_preload_that_is_not_there() -> None:
    assert "import_paths" in str(refused("preload nowhere_at_all", preload=["nowhere_at_all"]).remedy)


@pytest.mark.parametrize(
    "source", ["raise SystemExit(3)", "import os; os._exit(3)", "import os; os.kill(os.getpid(), 9)"]
)
def test_a_preload_that_ends_the_zygote(tmp_path: Path, source: str) -> None:
    write(tmp_path, "leaving.py", source)
    step = "preload leaving" if "SystemExit" in source else "zygote"
    assert "import it in on_start" in refused(step, import_paths=[tmp_path], preload=["leaving"]).remedy


@pytest.mark.parametrize(("names", "step"), [(["clone", "fork", "vfork"], "fork"), (["setsid"], "session")])
def test_a_profile_that_a_launch_cannot_live_with(tmp_path: Path, names: list[str], step: str) -> None:
    rules = [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    error = refused(step, security=Security(seccomp=path))
    assert error.errno == 1
    assert "the profile refuses what every launch needs" in error.remedy


def test_a_profile_that_kills_at_once(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    rules = [{"names": ["setsid"], "action": "SCMP_ACT_KILL_PROCESS"}]
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    error = refused("payload", security=Security(seccomp=path))
    assert "it was killed by SIGSYS" in str(error)
    assert "the profile refuses what every launch needs" in error.remedy


def test_a_wall_that_does_not_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host looks for itself: a child without a filter is not let in, whatever its launch says."""
    original = planning.child_plan
    monkeypatch.setattr(planning, "child_plan", lambda *args, **kwargs: _silently(original(*args, **kwargs), "seccomp"))
    assert "seccomp was planned but does not hold" in str(refused("attest"))


class _Hidden(list[str]):
    """Steps that are left out and that the host does not know of."""

    def __iter__(self) -> Iterator[str]:
        return iter(())


def _silently(plan: Any, step: str) -> Any:
    plan.without = _Hidden([step])
    plan.dump = partial(_dump_with, plan, step)
    return plan


def _dump_with(plan: Any, step: str) -> bytes:
    import marshal

    return marshal.dumps({**{name: getattr(plan, name) for name in plan.FIELDS}, "without": [step]}, 2)


# --- what the launch stands on -----------------------------------------------------------------------------------


@pytest.mark.root
def test_no_place_to_claim_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "IdBlock", partial(ids.IdBlock, "/nowhere/lock"))
    assert refused("ids").errno == 2


@pytest.mark.root
def test_a_group_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise LaunchError("refused", step="cgroup", errno=28, remedy="less of it")

    monkeypatch.setattr(cgroups, "create_group", refuse)
    assert refused("cgroup").errno == 28


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(zygote_module, "_spawn", refuse)
    error = refused("zygote")
    assert error.errno == 11
    assert "ulimit -u" in error.remedy


def test_an_interpreter_that_is_gone_when_it_is_to_start(tmp_path: Path) -> None:
    """It was there when it was asked what it is: by a wrapper, which answers for it."""
    asked = subprocess.run(
        [sys.executable, "-I", "-c", interpreter._QUESTION], capture_output=True, text=True, check=True
    )
    gone = tmp_path / "gone"
    answer = asked.stdout.replace(interpreter.host_python(), str(gone))
    wrapper = write(tmp_path, "python", f"#!/bin/sh\ncat <<'END'\n{answer}END\n")
    wrapper.chmod(0o755)
    error = refused("zygote", python=wrapper)
    assert (error.errno, f"{gone} -I -S -c pass" in error.remedy) == (errno.ENOENT, True)
    write(tmp_path, "gone", "#!/bin/sh\nexit 3\n").chmod(0o755)
    error = refused("zygote", python=wrapper)
    assert f"{gone} -I -S -c pass" in error.remedy, "and not some other interpreter"


ON_START: list[tuple[Callable[[], object], dict[str, Any], str]] = [
    (lambda: 1 / 0, {}, "what it raised"),
    (lambda: os._exit(3), {}, "on_start must return"),
    (lambda: time.sleep(60), {"start_timeout": 0.5}, "raise start_timeout"),
]


@pytest.mark.parametrize(("function", "changes", "remedy"), ON_START, ids=["raises", "leaves", "hangs"])
def test_an_on_start_that_cannot_be(function: Callable[[], object], changes: dict[str, Any], remedy: str) -> None:
    with nothing_left(), pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(on_start=function, **changes)
    assert caught.value.step == "on_start"
    assert remedy in caught.value.remedy


def test_options_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise AssertionError("something was started")

    monkeypatch.setattr(zygote_module, "_spawn", refuse)
    with nothing_left():
        with pytest.raises(ValueError, match="does not exist"):
            ProcessIsolator.create(python="/nowhere/python")
        with pytest.raises(ValueError, match="profile"):
            ProcessIsolator.create(security=Security(seccomp="/nowhere/profile.json"))
        with pytest.raises(ValueError):
            ProcessIsolator.create(IsolationOptions(), network="bridge")


# --- a child that speaks another version ---------------------------------------------------------------------------


def test_another_version_of_the_protocol_is_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(lame.make(tmp_path))
    with (package / "wire.py").open("a") as wire_source:
        wire_source.write("\nVERSION += 1\n")
    monkeypatch.setattr(templates, "PACKAGE", str(package))
    with nothing_left(), pytest.raises(LaunchError, match="version 2: not a frame of ours") as caught:
        ProcessIsolator.create(security=Security(hostname="another-version"))
    assert caught.value.step == "payload"


# --- a child that goes lame at a step ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lame_package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return lame.make(tmp_path_factory.mktemp("lame"))


@pytest.fixture
def at_step(lame_package: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], dict[str, Any]]:
    """Options for a child that goes lame: ``create(**at_step("exit", "mounts"))``."""
    monkeypatch.setattr(templates, "PACKAGE", lame_package)
    return lambda what, step: {"security": Security(hostname=f"{what} at {step}")}


@pytest.mark.parametrize("step", [*lame.STEPS, "the zygote's id maps"])
def test_a_step_that_fails(at_step: Any, step: str) -> None:
    """Each names itself, and what the kernel said."""
    assert refused(step.removeprefix("the zygote's "), **at_step("fail", step)).errno == 5


def test_a_step_that_somebody_else_forbids(at_step: Any) -> None:
    """What an engine or its profile refuses is told by its error number: see ``test_userns``."""
    assert "attach_disconnected" in str(refused("stdio", **at_step("fail", "stdio")).remedy)


@pytest.mark.parametrize("step", lame.STEPS[1::2])
def test_a_child_that_ends_at_a_step(at_step: Any, step: str) -> None:
    refused("payload", **at_step("exit", step))


@pytest.mark.parametrize("step", ["close fds", "ids", "mounts", "landlock", "seccomp", "session", "payload fds"])
def test_a_child_that_crashes_at_a_step(at_step: Any, step: str) -> None:
    refused("payload", **at_step("crash", step))


@pytest.mark.parametrize("step", ["join cgroup", "id maps", "mounts", "seccomp", "session"])
def test_a_child_that_hangs_at_a_step(at_step: Any, step: str) -> None:
    with nothing_left(), within(0.2 + 2 * SOON), pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(start_timeout=0.2, **at_step("hang", step))
    assert caught.value.step == "start_timeout"


@pytest.mark.parametrize("step", lame.STEPS[::4])
def test_a_child_that_is_slow_at_a_step(at_step: Any, step: str) -> None:
    """The control: lame children do start, and start well."""
    with nothing_left(), ProcessIsolator.create(**at_step("slow", step)) as isolator:
        assert lives_on(isolator)


@pytest.mark.parametrize("what", ["exit", "crash"])
@pytest.mark.parametrize("step", ["the zygote's id maps", "the zygote's report"])
def test_a_zygote_that_ends_in_a_launch(at_step: Any, step: str, what: str) -> None:
    """PID 1 is there already, waits for its ids, and says that they did not come."""
    refused("id maps", **at_step(what, step))


AT_A_STEP = [(step, "PID 1") for step in lame.STEPS[::3]] + [(step, "zygote") for step in lame.STEPS[lame.ARMED :: 3]]


@pytest.mark.parametrize(("step", "victim"), AT_A_STEP)
def test_killed_at_a_step(at_step: Any, step: str, victim: str) -> None:
    def kill() -> None:
        assert wait_until(lambda: any(map(hangs, descendants(os.getpid()))))
        zygote = max(child_of(os.getpid()))
        os.kill(zygote if victim == "zygote" else min(child_of(zygote)), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    refused("zygote" if victim == "zygote" else "payload", **at_step("hang", step))
    killer.join()


def hangs(pid: int) -> bool:
    """Whether it is in time.sleep: nothing else of a launch is."""
    try:
        return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False


def child_of(pid: int) -> list[int]:
    return [child for child in descendants(pid) if parent_of(child) == pid]


# --- between the halves of a launch ------------------------------------------------------------------------------


class Kills:
    """Kills the payload once, just before something is done that needs it."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, pid: int, *more: Any) -> Any:
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
        return self.original(pid, *more)


def test_killed_as_soon_as_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead before the host has its pidfd."""
    original, kills = os.pidfd_open, Kills(os.pidfd_open)
    asked_by = lambda: sys._getframe(2).f_code.co_name  # noqa: E731
    monkeypatch.setattr(os, "pidfd_open", lambda pid: (kills if asked_by() == "_read_ready" else original)(pid))
    refused("payload")


def test_killed_before_it_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead child has no walls; that is not to be taken for walls that do not stand."""
    monkeypatch.setattr(attest, "read", Kills(attest.read))
    error = refused("payload")
    assert "attack" not in str(error)


def test_dying_while_it_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has left its groups, and its pidfd does not say yet that it has ended: seen with profiles that no child survives."""

    def read(pid: int, _links: dict[str, str]) -> attest.Readings:
        threading.Timer(0.05, os.kill, (pid, signal.SIGKILL)).start()
        raise LaunchError("the child is not in its group", step="attest", remedy=attest.REMEDY)

    monkeypatch.setattr(attest, "read", read)
    assert "attack" not in str(refused("payload"))


@pytest.mark.parametrize("victim", ["zygote", "PID 1"])
def test_killed_between_request_and_complete(victim: str) -> None:
    with nothing_left(), ProcessIsolator.create() as other:
        template = other._keeper.template
        before = set(descendants(template.zygote.pid))
        child = Child(IsolationOptions(), template)
        child.request()
        assert wait_until(lambda: len(set(descendants(template.zygote.pid)) - before) == 2)
        init = min(set(descendants(template.zygote.pid)) - before)
        gone = [init] if victim == "PID 1" else [init, other.pid or 0]
        os.kill(init if victim == "PID 1" else template.zygote.pid, signal.SIGKILL)
        assert wait_until(lambda: all(state_of(pid) in ("", "Z") for pid in gone))
        with pytest.raises(LaunchError) as caught:
            child.complete(time.monotonic() + 10)
        assert caught.value.step == ("payload" if victim == "PID 1" else "zygote")
        assert lives_on(other)


def test_a_spare_child_that_is_killed_is_not_handed_out() -> None:
    with nothing_left(), Template() as template, template.create() as other:
        zygote = zygote_of(other)
        before = set(descendants(zygote))
        template.create().close()
        assert wait_until(lambda: len(set(descendants(zygote)) - before) == 2)
        for pid in sorted(set(descendants(zygote)) - before)[-1:]:
            os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: set(descendants(zygote)) <= before)
        with template.create() as isolator:
            assert lives_on(isolator)


@pytest.mark.parametrize("free", [0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24])
def test_no_descriptors_to_be_had(free: int) -> None:
    """In the host, wherever in a launch they run out."""
    with nothing_left(), ProcessIsolator.create() as other:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        kept: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_fds()) + 64, hard))
            with contextlib.suppress(OSError):
                while True:
                    kept.append(os.dup(0))
            for _ in range(free):
                os.close(kept.pop())
            with contextlib.suppress(LaunchError, FeatureUnavailable):
                ProcessIsolator.create(environment={"FREE": str(free)} if free % 4 else {}).close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in kept:
                os.close(fd)
        assert lives_on(other)


def test_a_launch_report_without_the_link_is_no_child() -> None:
    """There was no number left for it. What did come is used for the end of that child, and closed."""
    with nothing_left():
        process = subprocess.Popen(["sleep", "100"])
        birth = Child(IsolationOptions(), None)  # type: ignore[arg-type]
        with pytest.raises(LaunchError, match="ulimit -n") as caught:
            birth._refuse({"launched": process.pid}, [os.pidfd_open(process.pid)])
        assert caught.value.errno == errno.EMFILE
        assert process.wait(5) == -signal.SIGKILL
