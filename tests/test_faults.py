"""What goes wrong: at every step of a launch, in a call, and in the host. Each is a typed error, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    descendants,
    in_fork,
    in_thread,
    leftovers,
    nothing_left,
    own_groups,
    resident,
    start_without,
    state_of,
    wait_until,
    write,
    zygote_of,
)  # fmt: skip

from pihost import wire
from pisupervisor import (
    ChildTerminated,
    ExitReason,
    IsolationOptions,
    IsolatorClosed,
    LaunchError,
    ProcessIsolator,
    ProtocolError,
    RestartPolicy,
    Security,
    Template,
)
from pisupervisor.launch import ids, planning, zygote as zygote_module
from pisupervisor.limits import cgroups

pytestmark = pytest.mark.linux
INSIDE = Path(__file__).with_name("inside.py")
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
    return caught.value


# --- every step of a launch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "step", "errno"),
    [
        ("uid_map", "nonsense", "id maps", 22),
        ("gid_map", "0 0 0", "id maps", 22),
        ("namespaces", 1 << 62, "clone", 22),
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
    "raising": ("1 / 0", "division by zero"),
    "with_thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "thread"),
    "missing_part": ("import no_such_module_anywhere", "no_such_module_anywhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRELOADS)
def test_a_preload_that_cannot_be(tmp_path: Path, name: str) -> None:
    source, said = PRELOADS[name]
    write(tmp_path, f"{name}.py", source)
    error = refused("preload" if name == "with_thread" else f"preload {name}", import_paths=[tmp_path], preload=[name])
    assert said in str(error)
    assert error.remedy


def test_a_preload_that_is_not_there() -> None:
    assert "import_paths" in str(refused("preload nowhere_at_all", preload=["nowhere_at_all"]).remedy)


@pytest.mark.parametrize(
    "source", ["raise SystemExit(3)", "import os; os._exit(3)", "import os; os.kill(os.getpid(), 9)"]
)
def test_a_preload_that_ends_the_zygote(tmp_path: Path, source: str) -> None:
    write(tmp_path, "leaving.py", source)
    step = "preload leaving" if "SystemExit" in source else "zygote"
    refused(step, import_paths=[tmp_path], preload=["leaving"])


@pytest.mark.parametrize(("names", "step"), [(["clone", "fork", "vfork"], "fork"), (["setsid"], "session")])
def test_a_profile_that_a_launch_cannot_live_with(tmp_path: Path, names: list[str], step: str) -> None:
    rules = [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    assert refused(step, security=Security(seccomp=path)).errno == 1


def test_a_profile_that_kills_at_once(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    rules = [{"names": ["setsid"], "action": "SCMP_ACT_KILL_PROCESS"}]
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    refused("payload", security=Security(seccomp=path))


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
        raise LaunchError("refused", step="cgroup", errno=28)

    monkeypatch.setattr(cgroups, "create_group", refuse)
    assert refused("cgroup").errno == 28


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(zygote_module, "_spawn", refuse)
    assert refused("zygote").errno == 11


# --- the zygote --------------------------------------------------------------------------------------------------


def test_a_zygote_killed_between_two_children() -> None:
    with nothing_left(), Template() as template:
        with template.create() as isolator:
            old = zygote_of(isolator)
        os.kill(old, signal.SIGKILL)
        assert wait_until(lambda: state_of(old) in ("", "Z"))
        with template.create() as isolator:
            assert zygote_of(isolator) != old
            assert isolator.run_source("1").value == 1


def test_a_zygote_killed_in_a_launch() -> None:
    with nothing_left(), Template() as template:
        assert template._template is not None
        zygote = template._template.zygote.pid
        os.kill(zygote, signal.SIGSTOP)
        timer = threading.Timer(0.2, os.kill, (zygote, signal.SIGKILL))
        timer.start()
        with pytest.raises(LaunchError) as caught:
            template.create()
        timer.join()
        assert caught.value.step == "zygote"
        with template.create() as isolator:
            assert isolator.run_source("1").value == 1


def test_a_zygote_killed_in_a_call() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid, future = isolator.pid, isolator.submit(time.sleep, 1000)
        assert wait_until(lambda: isolator.state == "busy")
        os.kill(zygote_of(isolator), signal.SIGKILL)
        error = future.exception(5)
        assert isinstance(error, ChildTerminated)
        assert error.exit_info.reason is ExitReason.ZYGOTE_GONE
        assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
        assert isolator.run_source("1").value == 1


def test_all_children_end_with_their_zygote() -> None:
    with nothing_left(), ProcessIsolator.create() as one, ProcessIsolator.create() as two:
        pids = [one.pid, two.pid]
        os.kill(zygote_of(one), signal.SIGKILL)
        assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 2)
        assert [one.run_source("1").value, two.run_source("2").value] == [1, 2]


def test_without_the_death_signal_they_would_not() -> None:
    with nothing_left(), closing(start_without("death signal")) as isolator:
        os.kill(zygote_of(isolator), signal.SIGKILL)
        assert not wait_until(lambda: state_of(isolator.pid or 0) in ("", "Z"), 0.3)


# --- the child in a call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"garbage that is no frame at all",
        wire.pack_header(wire.RESULT, 1 << 60, 1) + b"x",
        wire.HEADER.pack(wire.MAGIC, wire.VERSION, wire.RESULT, 2, 0xFFFFFFFF),
        wire.pack_header(wire.CALL, 2, 1) + b"x",
        wire.pack_header(wire.READY, 0, 1) + b"1",
        wire.pack_header(wire.PICKLED, 1, 4) + b"\x80\x05N.",
        wire.pack_header(wire.RESULT, 1, 4) + b"none",
        wire.pack_header(wire.RAISED, 1, 4) + b"none",
        wire.pack_header(wire.REFUSED, 1, 2) + b"{}",
    ],
)
def test_a_child_that_breaks_the_protocol(data: bytes) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid = isolator.pid
        with pytest.raises(ProtocolError):
            isolator.invoke(_write_and_wait, data)
        assert not os.path.exists(f"/proc/{pid}")
        assert isolator.wait_for_exit(0).reason is ExitReason.PROTOCOL
        assert isolator.run_source("1").value == 1


def _write_and_wait(data: bytes) -> None:
    import os
    import time

    os.write(3, data)
    time.sleep(1000)


def test_a_child_that_closes_its_link() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        with pytest.raises(ChildTerminated) as caught:
            isolator.invoke_method(INSIDE, "close_link")
        assert caught.value.exit_info.reason is ExitReason.PROTOCOL
        assert isolator.run_source("1").value == 1


def test_a_child_that_leaves_with_a_family() -> None:
    """What it started does not outlive it, however far it ran."""
    source = "import os\nfor _ in range(3):\n  if os.fork() == 0:\n    os.setsid()\n    while True: pass\nos._exit(3)"
    with nothing_left(), ProcessIsolator.create() as isolator:
        zygote = zygote_of(isolator)
        with pytest.raises(ChildTerminated) as caught:
            isolator.run_source(source)
        assert (caught.value.exit_info.exit_code, caught.value.exit_info.reason) == (3, ExitReason.EXITED)
        assert descendants(zygote) == []


def test_a_payload_that_uses_up_its_descriptors() -> None:
    source = "import os\nkept = []\ntry:\n  while True: kept.append(os.dup(0))\nexcept OSError: pass\nlen(kept)"
    with nothing_left(), ProcessIsolator.create() as isolator:
        assert isolator.run_source(source, timeout=5).value > 200
        with pytest.raises(OSError, match="none left for what the call would write"):
            isolator.run_source("1", timeout=5)
        assert isolator.invoke(len, "abc", timeout=5) == 3
        isolator.terminate()
        assert isolator.run_source("1", timeout=5).value == 1


# --- the host ----------------------------------------------------------------------------------------------------


def test_two_hundred_children_leave_nothing() -> None:
    with Template() as template:
        for _ in range(20):
            template.create().close()
        before, memory = leftovers(), resident()
        for number in range(200):
            with template.create() as isolator:
                if number % 10 == 0:
                    assert isolator.run_source("1").value == 1
        after = leftovers()
        assert resident() - memory < 5 << 20
        assert (after.threads, after.mounts) == (before.threads, before.mounts)
        assert (len(after.fds), len(after.groups)) == (len(before.fds), len(before.groups))
        assert len(after.descendants) == len(before.descendants) == 3, "the zygote, and the two of a spare child"


def test_twenty_zygotes_leave_nothing() -> None:
    with nothing_left():
        for _ in range(20):
            ProcessIsolator.create().close()


def test_children_ignored_by_the_application() -> None:
    """SIGCHLD ignored means that the kernel reaps, and statuses are lost: ours do not come from there."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="always")) as isolator:
            with pytest.raises(ChildTerminated) as caught:
                isolator.invoke_method(INSIDE, "leave", 3)
            assert caught.value.exit_info.exit_code == 3
            assert isolator.run_source("1").value == 1
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_an_application_that_reaps_everything() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        os.kill(zygote_of(isolator), signal.SIGKILL)
        os.waitpid(-1, 0)
        assert wait_until(lambda: state_of(isolator.pid or 0) in ("", "Z"))
        assert isolator.run_source("1").value == 1


def test_made_in_a_thread_that_has_ended() -> None:
    """A death signal towards the host would fire here: it is a thread's end that counts, not the process's."""
    made: list[ProcessIsolator] = []
    with nothing_left():
        in_thread(lambda: made.append(ProcessIsolator.create()))
        time.sleep(0.1)
        with made.pop() as isolator:
            pid = isolator.pid
            assert isolator.run_source("1").value == 1
            assert isolator.pid == pid


def test_a_fork_of_the_application() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid = isolator.pid
        assert in_fork(lambda: isolator.run_source("1")) == "IsolatorClosed"
        assert in_fork(lambda: isolator.submit(len, [])) == "IsolatorClosed"
        assert in_fork(isolator.close) == "None"
        assert in_fork(_with_a_child_of_its_own) == "42"
        assert (isolator.run_source("1").value, isolator.pid) == (1, pid)
        isolator.terminate()
        assert isolator.run_source("2").value == 2, "the zygote is the original's still"


def _with_a_child_of_its_own() -> int:
    with ProcessIsolator.create() as isolator:
        value: int = isolator.run_source("6 * 7").value
        return value


def test_an_application_with_thousands_of_descriptors() -> None:
    with nothing_left():
        kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        try:
            with ProcessIsolator.create() as isolator:
                assert isolator.execute(f"{INSIDE}:talk").value == "value"
                isolator.terminate()
                assert isolator.submit(len, "abc").result(5) == 3
        finally:
            for fd in kept:
                os.close(fd)


def test_an_interrupted_call() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        pid = isolator.pid
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            isolator.invoke(time.sleep, 1000)
        timer.join()
        assert not os.path.exists(f"/proc/{pid}")
        assert isolator.run_source("1").value == 1


def test_closed_by_another_thread_in_a_call() -> None:
    with nothing_left():
        isolator = ProcessIsolator.create()
        timer = threading.Timer(0.2, isolator.close)
        timer.start()
        with pytest.raises((ChildTerminated, IsolatorClosed)):
            isolator.invoke(time.sleep, 1000)
        timer.join()


APPLICATION = """
    import os, sys, time
    from pisupervisor import ProcessIsolator
    isolator = ProcessIsolator.create()
    if os.fork() == 0:          # a daemon of the application that keeps every fd open
        time.sleep(20)
        os._exit(0)
    print(isolator._keeper.template.zygote.pid, flush=True)
    isolator.invoke_method({inside!r}, "spin_with_family")
"""


def test_nothing_outlives_a_host_that_is_killed() -> None:
    """parity: 11. Double-forked grandchildren in sessions of their own, deaf to signals, and a fork that holds all fds."""
    source = textwrap.dedent(APPLICATION).format(inside=str(INSIDE))
    application = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert application.stdout is not None
    zygote = int(application.stdout.readline())
    assert wait_until(lambda: len(descendants(zygote)) == 8), "PID 1, the payload, three and three"
    family, [daemon] = (
        [zygote, *descendants(zygote)],
        set(descendants(application.pid)) - {zygote, *descendants(zygote)},
    )
    try:
        application.kill()
        application.wait()
        assert wait_until(lambda: not any(state_of(pid) in ("R", "S", "D", "T") for pid in family), 2)
        assert state_of(daemon) == "S"
    finally:
        os.kill(daemon, signal.SIGKILL)
        application.stdout.close()
    ProcessIsolator.create().close()
    assert not own_groups(application.pid), "the next supervisor sweeps up its groups"


def test_a_host_that_just_ends() -> None:
    """Without close(): the interpreter's exit is enough."""
    source = "from pisupervisor import ProcessIsolator as P; i = P.create(); print(i._keeper.template.zygote.pid)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert wait_until(lambda: state_of(int(done.stdout)) in ("", "Z"), 2)
    assert done.stderr == ""


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
