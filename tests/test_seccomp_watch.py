"""Listening to the filter: what is handed over and answered (pure), what is seen of real children, learning a profile."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import bpf
import pyseccomp
import pytest
from helpers import nothing_left, wait_until
from test_seccomp import ORDINARY_WORK

from pisupervisor import (
    AsyncProcessIsolator,
    ExitReason,
    IsolationEvents,
    Limits,
    OptionsError,
    ProcessIsolator,
    SeccompProfile,
    Security,
    SyscallViolation,
)
from pisupervisor.launch import seccomp_compile, seccomp_watch
from pisupervisor.launch.seccomp import PACKAGED, is_listened_to, load_profile, packaged_path
from pisupervisor.launch.seccomp_rules import ALLOW, NOTIFY, parse_profile
from pisupervisor.supervise import listener

X86 = seccomp_compile._ARCHES["x86_64"]
EINVAL, EIO, EPERM = 22, 5, 1
SAMPLES = ((0,) * 6, (1, 0x5412, 0o4755, 0o4755, 0, 0), (16, 3, 8, 1, 1, 1), ((1 << 64) - 1,) * 6, (1, 8, 0, 0, 0, 0))


def decisions_of(profile: str) -> dict[int, Any]:
    policy = parse_profile(Path(packaged_path(profile)).read_bytes())
    return seccomp_compile.decide(policy, X86, pyseccomp)


def nr(name: str) -> int:
    return int(pyseccomp.resolve_syscall(bpf.X86_64, name))


# Pure --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PACKAGED)
def test_the_host_reads_the_rules_as_the_program_does(profile: str) -> None:
    program = seccomp_compile.compile_rules(parse_profile(Path(packaged_path(profile)).read_bytes()), "x86_64")
    for number, decision in decisions_of(profile).items():
        for arguments in SAMPLES:
            assert seccomp_watch.evaluate(decision, arguments) == bpf.run(program, number, arguments)


@pytest.mark.parametrize("watch", seccomp_watch.WATCHES)
@pytest.mark.parametrize("profile", PACKAGED)
def test_a_watch_lets_nothing_pass_that_the_profile_refuses(profile: str, watch: str) -> None:
    """And asks about nothing that it need not know of."""
    decisions = decisions_of(profile)
    policy = parse_profile(Path(packaged_path(profile)).read_bytes())
    program = seccomp_compile.compile_rules(policy, "x86_64", watch)
    spared = {nr(name) for name in seccomp_watch.UNWATCHED}
    for number, decision in decisions.items():
        for arguments in SAMPLES:
            plain, watched = seccomp_watch.evaluate(decision, arguments), bpf.run(program, number, arguments)
            answer = seccomp_watch.answer(decision, arguments, watch)
            if watched == ALLOW:
                assert plain == ALLOW
            elif watched == NOTIFY:
                assert (answer.action == "allowed") == (plain == ALLOW)
                assert plain != ALLOW or watch == "learn"
            else:
                assert watched == plain
            assert watch != "learn" or (watched == NOTIFY) == (number not in spared or plain != ALLOW)


@pytest.mark.parametrize(
    ("action", "watch", "error", "kill"),
    [
        ("KILL_PROCESS", "kills", 0, True), ("KILL_THREAD", "kills", 0, True), ("TRAP", "kills", 0, True),
        ("KILL_PROCESS", "trace", EPERM, False), ("TRAP", "learn", EPERM, False), ("ERRNO", "trace", EIO, False),
        ("ERRNO", "learn", EIO, False), ("NOTIFY", "kills", EIO, False), ("NOTIFY", "learn", EIO, False),
        ("TRACE", "learn", 38, False), ("ALLOW", "learn", 0, False), ("LOG", "learn", 0, False),
        ("ALLOW", "trace", EPERM, False), ("ALLOW", "kills", EPERM, False),  # never handed over: then not let go on
    ],
)  # fmt: skip
def test_answers(action: str, watch: str, error: int, kill: bool) -> None:
    rules = [{"names": ["chroot"], "action": f"SCMP_ACT_{action}", "errnoRet": EIO}]
    default = "SCMP_ACT_ERRNO" if action in ("ALLOW", "LOG") else "SCMP_ACT_ALLOW"
    policy = parse_profile(json.dumps({"defaultAction": default, "syscalls": rules}).encode())
    decision = seccomp_compile.decide(policy, X86, pyseccomp)[nr("chroot")]
    assert seccomp_watch.answer(decision, (0,) * 6, watch) == (error, kill)


def test_a_profile_with_a_notify_rule_is_listened_to_and_no_other() -> None:
    notify = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_NOTIFY"}]}
    assert is_listened_to(SeccompProfile.from_dict(notify).compile())
    assert is_listened_to(SeccompProfile.from_dict({"defaultAction": "SCMP_ACT_NOTIFY"}).compile())
    for profile in PACKAGED:
        assert not is_listened_to(load_profile(profile).compile())
        assert is_listened_to(load_profile(profile).compile("trace"))


def test_bad_watches() -> None:
    with pytest.raises(OptionsError, match="none of 'kills', 'trace', 'learn'"):
        Security(watch="all")  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="nothing to watch"):
        Security(watch="trace", seccomp=None)


def test_learnt_profile_keeps_conditions_and_denials_of_what_was_used() -> None:
    learnt = seccomp_watch.learnt(load_profile("default"), frozenset(("openat", "socket", "read")), "why")
    program = SeccompProfile.from_dict(learnt).compile()
    assert bpf.run(program, nr("openat"), (0, 0, 0o100, 0o644)) == ALLOW
    assert bpf.run(program, nr("openat"), (0, 0, 0o100, 0o4755)) == bpf.errno_action(EPERM)
    assert bpf.run(program, nr("socket"), (1, 1, 0)) == ALLOW
    assert bpf.run(program, nr("socket"), (40, 1, 0)) == bpf.errno_action(97)
    assert bpf.run(program, nr("io_uring_setup")) == bpf.errno_action(38)  # who tries falls back
    assert bpf.run(program, nr("mkdir")) == bpf.errno_action(EPERM)
    assert [bpf.run(program, nr(name)) for name in ("brk", "exit_group", "futex")] == [ALLOW] * 3
    assert learnt["comment"] == "why"


def test_learning_from_a_deny_list_makes_an_allow_list() -> None:
    base = SeccompProfile.from_dict({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"name": "ioctl", "action": "SCMP_ACT_ERRNO", "args": [
            {"index": 1, "value": 0x5412, "op": "SCMP_CMP_EQ"}]}],
    })  # fmt: skip
    program = SeccompProfile.from_dict(seccomp_watch.learnt(base, frozenset(("ioctl", "read")), "")).compile()
    assert bpf.run(program, nr("read")) == bpf.run(program, nr("ioctl"), (0, 1)) == ALLOW
    assert bpf.run(program, nr("ioctl"), (0, 0x5412)) == bpf.run(program, nr("mkdir")) == bpf.errno_action(EPERM)


# Real children -----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.linux
KILLS = SeccompProfile.from_dict({
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [
        {"names": ["ptrace"], "action": "SCMP_ACT_KILL_PROCESS"},
        {"names": ["sethostname"], "action": "SCMP_ACT_NOTIFY", "errnoRet": EIO},
        {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": EINVAL},
    ],
}, name="kills.json")  # fmt: skip


def errno_of(name: str) -> int:
    """In the child: what calling it with harmless arguments answers."""
    libc = ctypes.CDLL(None, use_errno=True)
    if name == "ptrace":  # with all six words: what the C library leaves in the others would make it another call
        number = {"x86_64": 101, "aarch64": 117}[os.uname().machine]
        result = libc.syscall(*map(ctypes.c_long, (number, -1, 0, 0, 0, 0, 0)))
    else:
        result = getattr(libc, name)(*{"sethostname": (b"x", 1), "chroot": (b"/nowhere",)}[name])
    return ctypes.get_errno() if result < 0 else 0


def names_of(isolator: Any) -> dict[str, str]:
    return {call.name: call.action for call in isolator.system_calls()}


def test_trace_tells_what_is_refused_and_stops_nothing() -> None:
    with ProcessIsolator.create(security=Security(seccomp=KILLS, watch="trace")) as isolator:
        answers = [isolator.invoke(errno_of, name) for name in ("ptrace", "sethostname", "chroot", "ptrace")]
        assert answers == [EPERM, EIO, EINVAL, EPERM]
        calls = {call.name: call for call in isolator.system_calls()}
        assert set(calls) == {"ptrace", "sethostname", "chroot"}
        assert {call.action for call in calls.values()} == {"refused"}
        assert calls["ptrace"].arguments[0] & 0xFFFFFFFF == 0xFFFFFFFF
        assert calls["ptrace"].pid == isolator.pid
        assert calls["chroot"].errno == EINVAL
    assert names_of(isolator) == dict.fromkeys(calls, "refused")  # after close too


def test_without_a_watch_nobody_tells_and_a_kill_has_no_name() -> None:
    """The control: the same profile without the rule that asks for a listener."""
    quiet = json.loads(KILLS.source)
    del quiet["syscalls"][1]
    with ProcessIsolator.create(security=Security(seccomp=SeccompProfile.from_dict(quiet))) as isolator:
        assert isolator.invoke(errno_of, "chroot") == EINVAL
        with pytest.raises(SyscallViolation) as caught:
            isolator.invoke(errno_of, "ptrace")
        assert (caught.value.syscall, caught.value.exit_info.signal) == (None, 31)
        assert isolator.system_calls() == ()


@pytest.mark.parametrize("watch", [None, "kills"])
def test_a_kill_is_named_where_somebody_listens(watch: Any) -> None:
    """A notify rule makes somebody listen, too."""
    threads = threading.active_count()
    with ProcessIsolator.create(security=Security(seccomp=KILLS, watch=watch)) as isolator:
        assert isolator.invoke(errno_of, "sethostname") == EIO
        assert isolator.invoke(errno_of, "chroot") == EINVAL
        with pytest.raises(SyscallViolation, match="ptrace") as caught:
            isolator.invoke(errno_of, "ptrace")
        info = caught.value.exit_info
        assert (caught.value.syscall, info.syscall, info.reason) == ("ptrace", "ptrace", ExitReason.SECCOMP)
        assert isolator.invoke(errno_of, "sethostname") == EIO  # the next child is listened to as well
        assert names_of(isolator) == {"ptrace": "killed", "sethostname": "refused"}
    assert threading.active_count() == threads


def test_events_tell_each_different_call_once() -> None:
    seen: list[Any] = []
    events = IsolationEvents(syscall=seen.append)
    with ProcessIsolator.create(security=Security(seccomp=KILLS, watch="trace"), events=events) as isolator:
        for _ in range(3):
            isolator.invoke(errno_of, "ptrace")
        pid = isolator.pid
    assert [(event.kind, event.pid, event.call.name) for event in seen] == [("syscall", pid, "ptrace")]
    assert next(call.count for call in isolator.system_calls()) == 3


def test_many_calls_hide_no_other() -> None:
    def flood() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        for number in range(2000):
            libc.ptrace(-1, number, 0, 0)
        return libc.chroot(b"/nowhere")

    with ProcessIsolator.create(security=Security(seccomp=KILLS, watch="trace")) as isolator:
        assert isolator.invoke(flood) == -1
        calls = isolator.system_calls()
    assert sum(call.count for call in calls) == 2001
    assert len(calls) == 65
    assert "chroot" in {call.name for call in calls}


def test_threads_and_processes_of_a_watched_child() -> None:
    def work() -> list[int]:
        thread = threading.Thread(target=errno_of, args=("chroot",))
        thread.start()
        done = subprocess.run([sys.executable, "-c", "import os\ntry: os.chroot('/x')\nexcept OSError as e: print(e.errno)"],
                              capture_output=True, check=True)  # fmt: skip
        thread.join()
        return [int(done.stdout)]

    with ProcessIsolator.create(security=Security(seccomp=KILLS, watch="learn")) as isolator:
        assert isolator.invoke(work) == [EINVAL]
        assert {"execve", "clone", "pipe2"} <= set(names_of(isolator))
        assert sum(call.count for call in isolator.system_calls() if call.name == "chroot") == 2


def test_a_watched_child_in_async() -> None:
    async def work() -> tuple[int, dict[str, str]]:
        async with await AsyncProcessIsolator.create(security=Security(seccomp=KILLS, watch="trace")) as isolator:
            return await isolator.invoke(errno_of, "ptrace"), names_of(isolator)

    assert asyncio.run(work()) == (EPERM, {"ptrace": "refused"})


def test_a_deadline_ends_a_watched_child_and_nothing_is_left() -> None:
    from pisupervisor import CallTimeout

    before = len(os.listdir("/proc/self/fd"))
    with ProcessIsolator.create(security=Security(watch="learn")) as isolator:
        with pytest.raises(CallTimeout):
            isolator.run_source("import os\nwhile True: os.getppid()", timeout=0.5)
        assert isolator.run_source("1 + 1").value == 2
    assert len(os.listdir("/proc/self/fd")) == before
    assert "pisupervisor-seccomp" not in {thread.name for thread in threading.enumerate()}


def test_a_listener_that_fails_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than have it wait for ever."""
    from pisupervisor import ChildTerminated

    with ProcessIsolator.create(security=Security(seccomp=KILLS, watch="trace")) as isolator:
        assert isolator.invoke(errno_of, "chroot") == EINVAL
        monkeypatch.setattr(seccomp_watch, "answer", lambda *_: 1 / 0)
        with pytest.raises(ChildTerminated, match="can no longer be answered: ZeroDivisionError"):
            isolator.invoke(errno_of, "ptrace", timeout=20)


def test_a_forgotten_isolator_that_is_collected_in_the_thread_that_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not to wait for its own end, nor for a lock that it has itself."""
    forgotten: list[ProcessIsolator] = []
    add = listener.Log.add

    def collecting(log: listener.Log, call: Any) -> None:
        add(log, call)
        forgotten.clear()
        gc.collect()

    def ask_all_the_time() -> None:
        import time

        def ask() -> None:
            while True:
                errno_of("chroot")
                time.sleep(0.01)

        threading.Thread(target=ask, daemon=True).start()

    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with nothing_left():
        forgotten.append(ProcessIsolator.create(security=Security(seccomp=KILLS, watch="trace")))
        forgotten[0].invoke(ask_all_the_time)
        forgotten[0].set_data("me", forgotten[0])
        monkeypatch.setattr(listener.Log, "add", collecting)
        assert wait_until(lambda: not forgotten)
    assert not raised


def test_a_listener_that_was_not_waited_for_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stood still for a while. What it had listened to is closed, and the number somebody else's."""
    begun, go_on = threading.Event(), threading.Event()

    def serve(_self: listener.Listener) -> None:
        begun.set()
        go_on.wait(10)
        raise OSError

    monkeypatch.setattr(listener, "_JOIN", 0.05)
    monkeypatch.setattr(listener.Listener, "_serve", serve)
    reader, writer = os.pipe()
    os.write(writer, b"to be read")
    answers = seccomp_watch.Answers("trace", {}, {})
    late = listener.Listener(os.dup(reader), answers, listener.Log(lambda _call: None), lambda _why: True)
    assert begun.wait(10)
    fd = late._fd
    late.close()
    os.dup2(reader, fd)
    go_on.set()
    late._thread.join(5)
    assert not late._thread.is_alive()
    for each in (reader, writer, fd):
        os.close(each)


def test_an_answer_that_a_signal_interrupts_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel says where another thread of the child asks at the same time."""
    honest, interrupted = fcntl.ioctl, set()

    def ioctl(fd: int, request: int, *more: Any) -> Any:
        if request not in interrupted:
            interrupted.add(request)
            raise InterruptedError
        return honest(fd, request, *more)

    with ProcessIsolator.create(security=Security(watch="trace")) as isolator:
        monkeypatch.setattr(fcntl, "ioctl", ioctl)
        assert isolator.invoke(errno_of, "chroot", timeout=10) == EPERM
    assert interrupted == {listener._RECEIVE, listener._SEND}


def test_a_watched_child_holds_no_listener() -> None:
    """Nor does its PID 1: whoever has it could answer for itself."""
    with ProcessIsolator.create(security=Security(watch="learn")) as isolator:
        assert isolator.run_source("import os; sorted(os.listdir('/proc/self/fd'))").value[:4] == ["0", "1", "2", "3"]
        processes = isolator.pids()
        assert len(processes) >= 2
        shown = {os.readlink(f"/proc/{pid}/fd/{fd}") for pid in processes for fd in os.listdir(f"/proc/{pid}/fd")}
        assert not any("seccomp" in name for name in shown)
        assert any("seccomp" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))  # the control


@pytest.mark.root
def test_a_watched_child_ends_with_its_host() -> None:
    program = """if 1:
        from pisupervisor import ProcessIsolator, Security
        with ProcessIsolator.create(security=Security(watch="learn")) as isolator:
            print(*isolator.pids(), flush=True)
            isolator.run_source("import os\\nwhile True: os.getppid()")
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        processes = [int(word) for word in host.stdout.readline().split()]
        assert len(processes) >= 2
        host.kill()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in processes), 10.0)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in processes)


PROGRAM = """
import ctypes, os, socket, sys, tempfile

def main(*arguments):
    with tempfile.TemporaryFile() as file:
        file.write(b"hello")
    print("refused", ctypes.CDLL(None).ptrace(-1, 0, 0, 0))
    return len(arguments)

def other():
    os.mkdir("/tmp/folder")
"""


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pisupervisor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)


def test_learn_writes_a_profile_that_the_program_runs_under_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    learnt = run("learn", "program.py:main", "-o", "learnt.json", "--", "a", "b", cwd=tmp_path)
    assert (learnt.returncode, learnt.stdout) == (2, ""), learnt.stderr
    assert "refused: ptrace" in learnt.stderr
    assert "refused -1\n" in learnt.stderr
    again = run("run", "program.py:main", "--profile", "learnt.json", "--", "a", "b", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "refused -1\n2\n"), again.stderr
    other = run("run", "program.py:other", "--profile", "learnt.json", cwd=tmp_path)
    assert other.returncode == 1
    assert "Operation not permitted" in other.stderr
    assert run("run", "program.py:other", cwd=tmp_path).returncode == 0  # the control
    assert "Learnt from one run of program.py:main" in json.loads((tmp_path / "learnt.json").read_text())["comment"]


def test_what_pid_1_does_later_is_learnt_from_a_quick_call_too() -> None:
    """It sleeps for the first 20 ms: a program that had ended by then left a profile under which no child lived."""
    with ProcessIsolator.create(security=Security(watch="learn")) as isolator:
        isolator.run_source("1")
        payload = isolator.pid
        isolator.exit()
    used = frozenset(call.name for call in isolator.system_calls() if call.pid == payload or call.name == "clone")
    profile = SeccompProfile.from_dict(seccomp_watch.learnt(load_profile("default"), used, ""))
    with ProcessIsolator.create(security=Security(seccomp=profile)) as isolator:
        pid_1 = min(isolator.pids())
        assert wait_until(lambda: "poll" in Path(f"/proc/{pid_1}/wchan").read_text())
        isolator.run_source("1")
        isolator.exit()
        assert isolator.wait_for_exit().reason is ExitReason.EXITED


IMPORTS = """
def main():
    pass

def more():
    import decimal, sqlite3
    return 5
"""


def test_what_the_zygote_imported_may_be_imported_later(tmp_path: Path) -> None:
    """Of modules that it had already, in its idle time, a run reads no file: the profile let a quicker one not import them."""
    (tmp_path / "program.py").write_text(IMPORTS)
    with ProcessIsolator.create(security=Security(seccomp="permissive", watch="learn")) as isolator:
        isolator.execute(f"{tmp_path}/program.py:main")
    unseen = {"openat", "read", "newfstatat", "getdents64", "lseek", "ioctl", "epoll_create1"}
    used = frozenset(call.name for call in isolator.system_calls() if call.action == "allowed") - unseen
    learnt = SeccompProfile.from_dict(seccomp_watch.learnt(load_profile("permissive"), used, ""))
    with ProcessIsolator.create(security=Security(seccomp=learnt)) as isolator:
        assert isolator.execute(f"{tmp_path}/program.py:more").value == 5


def test_learn_to_stdout_and_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    shown = run("learn", "program.py:main", cwd=tmp_path)
    assert json.loads(shown.stdout)["defaultAction"] == "SCMP_ACT_ERRNO"
    failed = run("learn", "program.py:main", "-o", "no/such/folder.json", cwd=tmp_path)
    assert failed.returncode == 2
    assert "cannot write the profile" in failed.stderr


def test_learn_writes_nothing_of_a_program_that_did_not_run_and_all_of_one_that_failed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM + "def fail():\n    os.getcwd()\n    raise ValueError('no')\n")
    for code, number in (("program.py:missing", 127), ("missing.py:main", 127)):
        assert run("learn", code, "-o", "learnt.json", cwd=tmp_path).returncode == number
        assert not (tmp_path / "learnt.json").exists()
    assert run("learn", "program.py:fail", "-o", "learnt.json", cwd=tmp_path).returncode == 1
    assert "getcwd" in (tmp_path / "learnt.json").read_text()


def test_run_with_trace_shows_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    traced = run("run", "program.py:main", "--trace", cwd=tmp_path)
    assert (traced.returncode, traced.stdout) == (0, "refused -1\n0\n"), traced.stderr
    assert "pisupervisor: ptrace(0xffffffff" in traced.stderr
    assert "refused, Operation not permitted" in traced.stderr
    assert "ptrace" not in run("run", "program.py:main", cwd=tmp_path).stderr


def test_strict_allows_what_ordinary_programs_are_seen_to_use(tmp_path: Path) -> None:
    """Threads, asyncio, subprocess, multiprocessing, shared memory, ssl, sockets, files and numpy, under a listener."""
    import sysconfig

    program = textwrap.dedent(ORDINARY_WORK.removeprefix("if 1:")).replace("sys.argv[1]", "'/etc/hostname'")
    (tmp_path / "ordinary.py").write_text(f"import os, sys\n{program}")
    rules = json.loads(Path(packaged_path("strict")).read_text())["syscalls"]
    allowed = {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    with ProcessIsolator.create(
        network="loopback", import_paths=[sysconfig.get_path("purelib")], limits=Limits(memory="1G"),
        security=Security(seccomp="permissive", watch="learn"),
    ) as isolator:  # fmt: skip
        info = isolator.run_script(tmp_path / "ordinary.py")
        assert (info.exit_code, info.stdout) == (0, "[1, 2, 3, 4, 5]\n"), info.stderr
    used = {call.name for call in isolator.system_calls() if call.action == "allowed"}
    assert len(used) > 50
    assert used - allowed <= {"listxattr"}  # shutil.copy2 takes the ENOTSUP that strict answers
