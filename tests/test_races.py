"""What happens when two things happen at once: found in a review, each made to happen here."""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    in_fork,
    in_thread,
    init_of,
    leftovers,
    linux,
    new_since,
    nothing_left,
    open_fds,
    sleeps,
    spare_is_there,
    state_of,
    wait_until,
    zygote_of,
)

from pisupervisor import (
    AsyncProcessIsolator,
    CallTimeout,
    ChildTerminated,
    ExitReason,
    IsolationError,
    IsolationEvents,
    IsolationExecutor,
    IsolationOptions,
    IsolatorClosed,
    LaunchError,
    Limits,
    OptionsError,
    ProcessIsolator,
    RestartLimitReached,
    RestartPolicy,
    Security,
    Template,
)
from pisupervisor.launch import zygote as zygote_module
from pisupervisor.limits import freezer
from pisupervisor.supervise import child as child_module, spare
from pisupervisor.supervise.child import Child
from pisupervisor.supervise.keeper import Keeper
from pisupervisor.supervise.starting import FirstCall
from pisupervisor.supervise.watch import Watch
from pisupervisor.worker import Crew

pytestmark = linux

CRASH = "import os; os._exit(3)"
PATIENT = RestartPolicy(backoff=5.0, max_backoff=5.0)
QUICK = RestartPolicy(backoff=0.0)
LARGE_PIPES = Security(seccomp=None)  # every packaged filter denies F_SETPIPE_SZ


def crash(isolator: ProcessIsolator) -> None:
    with pytest.raises(ChildTerminated):
        isolator.run_source(CRASH)


def within(seconds: float, act: Callable[[], Any]) -> Any:
    started = time.monotonic()
    result = act()
    assert time.monotonic() - started < seconds
    return result


# --- a call that is cancelled before it runs -------------------------------------------------------------------------


def test_cancelled_while_a_restart_is_waited_for(tmp_path: Path) -> None:
    policy = RestartPolicy(backoff=0.5, max_backoff=0.5)
    with nothing_left(), ProcessIsolator.create(restart=policy) as isolator:
        crash(isolator)
        future = isolator.submit(time.sleep, 1000)
        time.sleep(0.1)
        assert future.cancel()
        assert within(3, lambda: isolator.invoke(len, "abc")) == 3


def test_cancelled_while_a_child_is_launched() -> None:
    with nothing_left(), ProcessIsolator.create(restart=QUICK) as isolator:
        crash(isolator)
        os.kill(zygote_of(isolator), signal.SIGSTOP)
        future = isolator.submit(time.sleep, 1000)
        assert wait_until(lambda: isolator.state == "starting")
        time.sleep(0.05)
        assert future.cancel()
        os.kill(zygote_of(isolator), signal.SIGCONT)
        assert within(3, lambda: isolator.invoke(len, "abc")) == 3


def test_cancelled_just_before_it_takes_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no child to kill yet, and the call must not be sent either."""
    original = Keeper.begin_at_once
    cancelled: list[bool] = []
    futures: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def begin(self: Keeper, caller: int, connection: Any) -> Any:
        if not cancelled:
            cancelled.append(futures.get(timeout=5).cancel())
        return original(self, caller, connection)

    with nothing_left(), ProcessIsolator.create(restart=QUICK) as isolator:
        isolator.invoke(len, "abc")
        monkeypatch.setattr(Keeper, "begin_at_once", begin)
        future = isolator.submit(time.sleep, 1000)
        futures.put(future)
        assert wait_until(lambda: cancelled == [True])
        assert within(3, lambda: isolator.invoke(len, "abc")) == 3
        assert future.cancelled()


def test_many_cancelled_at_any_moment() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with nothing_left(), ProcessIsolator.create(restart=QUICK) as isolator:
            for number in range(100):
                future = isolator.submit(time.sleep, 1000)
                time.sleep(number / 100_000)
                assert future.cancel()
            assert within(10, lambda: isolator.invoke(len, "abc")) == 3
    finally:
        sys.setswitchinterval(before)


# --- a stop while a child is launched --------------------------------------------------------------------------------


def _slow_start() -> None:
    import time

    time.sleep(1000)


@pytest.mark.parametrize("act", ["terminate", "exit", "abort", "close"])
def test_a_stop_ends_a_launch_under_way(act: str) -> None:
    with nothing_left():
        isolator = ProcessIsolator.create(restart=QUICK)
        crash(isolator)
        from pisupervisor.link.calls import pack_call

        slow = pack_call("function", False, isolator._packer.function(_slow_start, (), {}))
        isolator._keeper.first_calls = [FirstCall("on_start", slow)]
        errors: list[BaseException] = []

        def call() -> None:
            try:
                isolator.invoke(len, "abc")
            except BaseException as error:
                errors.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        assert wait_until(lambda: isolator._keeper.launching is not None and isolator._keeper.launching.pid > 0)
        launched = isolator._keeper.launching
        assert launched is not None
        within(2, lambda: getattr(isolator, act)())
        assert not os.path.exists(f"/proc/{launched.pid}"), "it came back before what was launched had gone"
        assert launched.exit_info is not None
        caller.join(2)
        assert not caller.is_alive()
        assert [type(error) for error in errors] == [IsolatorClosed]
        assert isolator.state == "stopped"
        isolator.close()


def test_restart_overtakes_a_backoff() -> None:
    with nothing_left(), ProcessIsolator.create(restart=PATIENT) as isolator:
        crash(isolator)
        future = isolator.submit(len, "abc")
        time.sleep(0.1)
        within(2, isolator.restart)
        assert isinstance(future.exception(1), IsolatorClosed)
        assert isolator.invoke(len, "abc") == 3


def test_restarts_at_once() -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        strange: list[BaseException] = []

        def restart() -> None:
            try:
                isolator.restart()
            except IsolationError:
                pass
            except BaseException as error:
                strange.append(error)

        threads = [threading.Thread(target=restart) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert strange == []
        assert isolator.invoke(len, "abc") == 3


# --- a zygote that stands still --------------------------------------------------------------------------------------


def test_a_stopped_zygote_holds_nobody() -> None:
    with nothing_left():
        isolator = ProcessIsolator.create(restart=QUICK)
        zygote = zygote_of(isolator)
        os.kill(zygote, signal.SIGSTOP)
        with pytest.raises(CallTimeout):
            within(2, lambda: isolator.run_source("while True: pass", timeout=0.2))
        within(2, isolator.close)
        assert state_of(zygote) in ("", "Z")


def test_a_pid_1_that_waits_for_cpu_time_still_tells_what_the_payload_died_of() -> None:
    """On a busy machine it took more than the quarter of a second after which a child is said to live on without its link."""
    with nothing_left(), ProcessIsolator.create(restart=QUICK) as isolator:
        future = isolator.submit(time.sleep, 1000)
        assert wait_until(lambda: sleeps(isolator))
        init = init_of(isolator)
        os.kill(init, signal.SIGSTOP)
        os.kill(isolator.pid or 0, signal.SIGKILL)
        threading.Timer(1.0, os.kill, (init, signal.SIGCONT)).start()
        error = future.exception(10)
        assert isinstance(error, ChildTerminated)
        assert (error.exit_info.reason, error.exit_info.signal) == (ExitReason.SIGNALED, signal.SIGKILL)


@contextmanager
def a_full_zygote() -> Iterator[tuple[ProcessIsolator, int]]:
    """One that stands still, with no room for another request."""
    with ProcessIsolator.create() as isolator:
        zygote = isolator._keeper.template.zygote
        os.kill(zygote.pid, signal.SIGSTOP)
        try:
            with suppress(TimeoutError):
                while zygote.control.send(b"import sys" + b" sys" * 5000):
                    pass
            yield isolator, zygote.pid
        finally:
            os.kill(zygote.pid, signal.SIGCONT)


@pytest.mark.unhurried
def test_a_zygote_with_no_room_for_a_request_has_start_timeout_and_no_more() -> None:
    with nothing_left(), a_full_zygote() as (isolator, _zygote):
        started = time.monotonic()
        with pytest.raises(LaunchError, match=r"no answer within start_timeout=0\.3 s") as caught:
            ProcessIsolator.create(start_timeout=0.3)
        assert 0.3 <= time.monotonic() - started < 1.0
        assert caught.value.step == "start_timeout"
        assert isolator.run_source("1").value == 1  # the living child is none of the zygote's business


@pytest.mark.unhurried
def test_a_zygote_with_no_room_for_a_request_is_waited_for() -> None:
    """A busy one may take seconds: a network namespace is made behind those that the kernel is taking apart."""
    with nothing_left(), a_full_zygote() as (_isolator, zygote):
        waker = threading.Timer(3.0, os.kill, (zygote, signal.SIGCONT))
        waker.start()
        with ProcessIsolator.create() as other:
            assert not waker.is_alive()
            assert other.run_source("1").value == 1
        waker.join()


def test_a_zygote_that_another_thread_has_replaced_is_explained() -> None:
    """Its socket is closed then: whoever still holds it must be told what makes them try the new one."""
    zygote = zygote_module.Zygote(sys.executable)
    zygote.close()
    assert zygote.explain_end().step == "zygote"


# --- a link that somebody else holds ---------------------------------------------------------------------------------


def test_a_fork_that_holds_the_childs_end_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread of the application forks in the microseconds in which we hold both ends."""
    held: list[int] = []
    original = zygote_module.Zygote.launch

    def launch(self: Any, plan: Any, fds: list[int], **more: Any) -> bool:
        held.append(os.dup(fds[0]))
        return original(self, plan, fds)

    monkeypatch.setattr(zygote_module.Zygote, "launch", launch)
    isolator = ProcessIsolator.create(restart=QUICK)
    try:
        future = isolator.submit(time.sleep, 1000)
        assert wait_until(lambda: sleeps(isolator))
        os.kill(isolator.pid or 0, signal.SIGKILL)
        assert isinstance(future.exception(3), ChildTerminated)
    finally:
        isolator.close()
        for fd in held:
            os.close(fd)


@pytest.mark.rootless
def test_a_payload_that_reads_its_own_stderr_does_not_block_pid_1(ordinary_user: Any) -> None:
    """It may open the pipe through /proc/self/fd, and take what PID 1 was told of."""
    source = """
        from pisupervisor import *
        def steal():
            import os, threading
            fd = os.open("/proc/self/fd/2", os.O_RDONLY | os.O_NONBLOCK)
            def read():
                while True:
                    try: os.read(fd, 65536)
                    except BlockingIOError: pass
            threading.Thread(target=read, daemon=True).start()
            for _ in range(20000): os.write(2, b"x")
            os._exit(7)
        with ProcessIsolator.create(degrade=("memory", "swap", "cpus", "pids")) as isolator:
            try: isolator.invoke(steal, timeout=20)
            except ChildTerminated as error: print(error.exit_info.exit_code)
    """
    import textwrap

    done = ordinary_user.run_python(textwrap.dedent(source))
    assert done.stdout == "7\n", done.stderr


# --- pauses ----------------------------------------------------------------------------------------------------------


def test_resumed_while_it_is_being_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_left(), ProcessIsolator.create() as isolator:
        original = freezer.V2Freezer.pause

        def pause(self: Any) -> None:
            isolator._keeper.lock.acquire()
            isolator._keeper.lock.release()
            resumer = threading.Thread(target=isolator.resume)
            resumer.start()
            time.sleep(0.05)
            original(self)

        monkeypatch.setattr(freezer.V2Freezer, "pause", pause)
        isolator.pause()
        assert wait_until(lambda: isolator.state == "ready")
        assert isolator.invoke(len, "abc", timeout=2) == 3


def test_dead_while_it_is_being_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_left(), ProcessIsolator.create(restart=QUICK) as isolator:
        child = isolator._keeper.child
        assert child is not None
        os.kill(init_of(isolator), signal.SIGKILL)
        assert wait_until(lambda: child.ended)
        child.finish()
        with pytest.raises(IsolationError):
            child.pause()


@pytest.mark.parametrize("count", [1, 4])
def test_processes_that_continue_each_other_are_not_called_paused(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    with ProcessIsolator.create() as isolator:
        host = isolator._keeper.template.features.cgroups
        features = isolator._keeper.template.features
        from pisupervisor.records import replace

        monkeypatch.setattr(
            isolator._keeper.template, "features", replace(features, cgroups=host._replace(unified=None))
        )
        future = isolator.submit(_continue_each_other, count)
        assert wait_until(lambda: len(isolator.pids()) == count + 1)
        time.sleep(0.1)
        try:
            isolator.pause()
        except IsolationError:
            assert isolator.state == "busy"
        else:
            assert all(state_of(pid) == "T" for pid in isolator.pids() if pid != init_of(isolator))
        isolator.terminate(0)
        future.exception(2)


def _continue_each_other(count: int) -> None:
    import os
    import signal

    for _ in range(count - 1):
        if os.fork() == 0:
            break
    while True:
        os.kill(-1, signal.SIGCONT)


def test_the_lifeline_of_a_paused_child_works() -> None:
    """PID 1 is left out of a pause: it holds the lifeline, and reaps."""
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        isolator.pause()
        os.kill(isolator.pid or 0, signal.SIGKILL)
        assert wait_until(lambda: isolator.state == "stopped"), "PID 1 has seen it"


def test_an_idle_timeout_spares_a_paused_child() -> None:
    with ProcessIsolator.create(idle_timeout=0.1) as isolator:
        pid = isolator.pid
        isolator.pause()
        time.sleep(0.4)
        assert (isolator.state, isolator.pid) == ("paused", pid)
        isolator.resume()
        assert wait_until(lambda: isolator.state == "stopped", 2)


# --- handlers --------------------------------------------------------------------------------------------------------


def test_a_handler_that_exits(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def leave(event: Any) -> None:
        seen.append(event.line)
        sys.exit(3)

    with nothing_left(), ProcessIsolator.create(events=IsolationEvents(stdout=leave)) as isolator:
        isolator.invoke(_write_lines, 3)
        assert wait_until(lambda: seen == ["0", "1", "2"])


def _write_lines(count: int) -> None:
    import os

    os.write(1, b"".join(b"%d\n" % number for number in range(count)))


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_handled_crash_is_none_however_few_are_allowed(delay: float) -> None:
    def handle(event: Any) -> None:
        time.sleep(delay)
        event.handled = True

    policy = RestartPolicy(max_restarts=0, backoff=0.0)
    with (
        nothing_left(),
        ProcessIsolator.create(restart=policy, events=IsolationEvents(exit_with_error=handle)) as isolator,
    ):
        for _ in range(5):
            crash(isolator)
            assert isolator.invoke(len, "abc") == 3


def test_an_unhandled_one_is_one_too_many() -> None:
    policy = RestartPolicy(max_restarts=0, backoff=0.0)
    with ProcessIsolator.create(restart=policy, events=IsolationEvents(exit_with_error=lambda event: None)) as isolator:
        crash(isolator)
        with pytest.raises(RestartLimitReached, match="1 crashes"):
            isolator.invoke(len, "abc")


def test_a_flood_of_empty_lines_is_bounded() -> None:
    count = [0]

    def handle(event: Any) -> None:
        count[0] += 1

    with nothing_left(), ProcessIsolator.create(events=IsolationEvents(stdout=handle)) as isolator:
        with pytest.raises(CallTimeout):
            isolator.invoke(_flood, timeout=1.0)
        used = time.process_time()
        within(3, isolator.close)
        assert count[0] < 100_000
        assert time.process_time() - used < 2


def _flood() -> None:
    import os

    while True:
        os.write(1, b"\n" * 65536)


def test_a_pipe_full_of_empty_lines_at_death_is_bounded() -> None:
    events = IsolationEvents(stdout=lambda event: None)
    with ProcessIsolator.create(events=events, restart=QUICK, security=LARGE_PIPES) as isolator:
        with pytest.raises(ChildTerminated):
            within(3, lambda: isolator.invoke(_fill_with_nothing))
        assert within(3, lambda: isolator.invoke(len, "abc")) == 3


def _fill_with_nothing() -> None:
    import fcntl
    import os

    fcntl.fcntl(1, 1031, 1 << 20)  # F_SETPIPE_SZ
    os.set_blocking(1, False)
    try:
        while True:
            os.write(1, b"\n" * 65536)
    except BlockingIOError:
        os._exit(3)


def test_the_last_lines_of_a_pipe_that_was_made_larger() -> None:
    seen: list[str] = []
    with ProcessIsolator.create(
        events=IsolationEvents(stdout=lambda event: (time.sleep(0.0005), seen.append(event.line))),
        security=LARGE_PIPES,
    ) as isolator:
        with pytest.raises(ChildTerminated):
            isolator.invoke(_fill_a_large_pipe)
        assert wait_until(lambda: seen[-1:] == ["the end"], 5)


def _fill_a_large_pipe() -> None:
    import fcntl
    import os

    fcntl.fcntl(1, 1031, 1 << 20)  # F_SETPIPE_SZ
    os.write(1, (b"x" * 999 + b"\n") * 500 + b"the end\n")
    os._exit(3)


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_waiting_is_no_work() -> None:
    """A backoff that is longer than the wait."""
    with ProcessIsolator.create(restart=PATIENT) as isolator:
        found: list[BaseException] = []

        def wait() -> None:
            try:
                isolator.wait_for_exit(1.0)
            except TimeoutError as error:
                found.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)
        used = time.process_time()
        os.kill(isolator.pid or 0, signal.SIGKILL)
        waiter.join(5)
        assert len(found) == 1
        assert time.process_time() - used < 0.5


def test_waiting_while_it_is_closed() -> None:
    for _ in range(30):
        isolator = ProcessIsolator.create()
        found: list[Any] = []
        waiter = threading.Thread(target=lambda isolator=isolator, found=found: found.append(isolator.wait_for_exit()))
        waiter.start()
        in_thread(isolator.close)
        waiter.join(5)
        assert [info.reason for info in found] == [ExitReason.KILLED]


def test_a_launch_that_fails_where_none_will_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    events = IsolationEvents(exited=lambda event: None)
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="never"), events=events) as isolator:
        with monkeypatch.context() as patch:
            patch.setattr(Child, "request", _refuse)
            with pytest.raises(LaunchError):
                isolator.restart()
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.2
        assert isolator.state == "stopped"
        isolator.restart()
        assert isolator.invoke(len, "abc") == 3


def _refuse(*_arguments: object, **_more: object) -> None:
    raise LaunchError("refused", step="cgroup", errno=errno.ENOSPC, remedy="none")


# --- want of everything ----------------------------------------------------------------------------------------------


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """No more than ``count`` descriptors are to be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_fds()) + 20, hard))
    try:
        while True:
            try:
                kept.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for _ in range(count):
            os.close(kept.pop())
        yield
    finally:
        for fd in kept:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_watch_outlives_a_want_of_descriptors() -> None:
    with nothing_left(), ProcessIsolator.create(idle_timeout=1.5) as isolator:
        with room_for(0):
            assert isolator.state == "ready"
            time.sleep(0.3)
        assert wait_until(lambda: isolator.state == "stopped", 4), "the watch still watches"


def test_a_child_that_cannot_be_watched_ends_and_the_next_one_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a defect of ours, or what /proc says. The thread ended of it, and nobody held any limit from then on."""

    def fail(_watch: Watch, _child: Child) -> None:
        raise RuntimeError("a defect")

    with nothing_left(), ProcessIsolator.create(idle_timeout=0.5) as isolator:
        with monkeypatch.context() as patch:
            patch.setattr(Watch, "_idle", fail)
            isolator._keeper.wake_watch()
            assert "could not be watched: RuntimeError: a defect" in isolator.wait_for_exit(5).message
        assert isolator.invoke(len, "abc") == 3
        assert wait_until(lambda: isolator.state == "stopped", 4), "idle for too long"


def test_a_captured_call_among_others_in_a_want_of_descriptors() -> None:
    with nothing_left(), ProcessIsolator.create(max_concurrency=2) as isolator:
        assert isolator.execute(len, "abc").value == 3
        pid = isolator.pid
        with room_for(0), pytest.raises(IsolationError, match="ulimit"):
            isolator.execute(len, "abc")
        assert isolator.execute(len, "abc").value == 3
        assert isolator.pid == pid, "the child was ended for it"


def test_an_exit_is_waited_for_in_a_want_of_descriptors() -> None:
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(mode="never")) as isolator:
        with pytest.raises(TimeoutError):
            isolator.wait_for_exit(timeout=0)
        pid = isolator.pid
        assert pid is not None
        with room_for(0):
            with pytest.raises(TimeoutError):
                isolator.wait_for_exit(timeout=0.05)
            killer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
            killer.start()
            assert isolator.wait_for_exit(timeout=5).signal == signal.SIGKILL
        killer.join()


def test_an_awaited_call_in_a_want_of_descriptors() -> None:
    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            for _ in range(2):  # the first one, made by a thread, leaves the loop nothing to read yet
                assert await isolator.invoke(len, "abc") == 3
            isolator._close_link()  # as after some time without a call
            pid = isolator.pid
            with room_for(0):
                assert await isolator.invoke(len, "abc") == 3
            assert await isolator.invoke(len, "abc") == 3
            assert isolator.pid == pid

    with nothing_left():
        asyncio.run(main())


@pytest.mark.parametrize("room", range(16))
def test_no_descriptors_for_a_child(room: int) -> None:
    """However far it gets: a typed error, and all that was taken is given back."""
    with nothing_left(), ProcessIsolator.create() as keeper:
        with room_for(room), suppress(LaunchError):
            ProcessIsolator.create(keeper.options).close()
        assert keeper.invoke(len, "abc") == 3


@pytest.mark.parametrize("room", [0, *range(2, 12)])  # with one, CPython's own subprocess module loses it
def test_no_descriptors_for_a_zygote(room: int) -> None:
    with nothing_left():
        with room_for(room), suppress(IsolationError):
            ProcessIsolator.create(log_level="ERROR").close()
        ProcessIsolator.create(log_level="ERROR").close()


def test_no_thread_for_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with nothing_left():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(LaunchError, match="thread"):
                ProcessIsolator.create(idle_timeout=10)
        ProcessIsolator.create(idle_timeout=10).close()


def test_an_account_that_was_interrupted_closes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_left():
        isolator = ProcessIsolator.create()
        child = isolator._keeper.child
        assert child is not None
        with monkeypatch.context() as patch:
            patch.setattr(child_module, "explain_exit", _interrupt)
            child.kill(ExitReason.KILLED, "test")
            with pytest.raises(KeyboardInterrupt):
                child.finish()
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
        child.finish()
        for fd in others:
            os.close(fd)  # ours still
        isolator.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_interrupted_when_the_call_had_just_ended(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """As by a signal's handler: nothing is ended twice, and the child lives on."""
    honest = Keeper.end_at_once

    def end(keeper: Keeper, caller: int, child: Child) -> None:
        honest(keeper, caller, child)
        raise error

    with ProcessIsolator.create() as isolator:
        isolator.invoke(len, "abc")
        pid = isolator.pid
        with monkeypatch.context() as patch:
            patch.setattr(Keeper, "end_at_once", end)
            with pytest.raises(error):
                isolator.invoke(len, "abc")
        assert isolator.invoke(len, "abcd") == 4
        assert isolator.pid == pid


def _interrupt(*_arguments: object, **_keywords: object) -> None:
    raise KeyboardInterrupt


# --- wrong arguments, odd limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "arguments"),
    [
        ("exit", {"timeout": -2}), ("exit", {"timeout": float("inf")}), ("exit", {"timeout": "1"}), ("exit", {"reason": 3}),
        ("terminate", {"grace": "1"}), ("terminate", {"grace": -1}), ("terminate", {"grace": float("nan")}),
        ("abort", {"reason": b"x"}),
    ],
)  # fmt: skip
def test_arguments_are_checked_before_anything_happens(act: str, arguments: dict[str, Any]) -> None:
    with ProcessIsolator.create() as isolator:
        pid = isolator.pid
        with pytest.raises(OptionsError):
            getattr(isolator, act)(**arguments)
        assert (isolator.state, isolator.pid) == ("ready", pid)


def test_a_reason_that_is_no_proper_text() -> None:
    with ProcessIsolator.create() as isolator:
        assert isolator.exit("odd \udc80").message == "odd \\udc80"


@pytest.mark.parametrize("size", [0, 1024])
def test_the_end_of_stderr_does_not_count_as_a_file(size: int) -> None:
    with ProcessIsolator.create(limits=Limits(file_size=size), restart=QUICK) as isolator:
        with pytest.raises(ChildTerminated) as caught:
            isolator.invoke(_say_and_leave)
        assert (caught.value.exit_info.exit_code, caught.value.exit_info.stderr_tail) == (3, "x" * 3000)


def _say_and_leave() -> None:
    import os
    import time

    os.write(2, b"x" * 3000)
    time.sleep(0.05)
    os._exit(3)


@pytest.mark.root
def test_a_kill_by_somebody_is_no_cpu_time() -> None:
    with ProcessIsolator.create(limits=Limits(cpu_time=100), restart=RestartPolicy(mode="never")) as isolator:
        os.kill(isolator.pid or 0, signal.SIGKILL)
        assert isolator.wait_for_exit(5).reason is ExitReason.SIGNALED


def test_why_it_died_in_on_start() -> None:
    with pytest.raises(LaunchError, match="died in on_start: exited with code 9") as caught:
        ProcessIsolator.create(on_start=lambda: os._exit(9))
    assert caught.value.step == "on_start"


def test_an_interrupt_just_after_a_launch(monkeypatch: pytest.MonkeyPatch):
    """Nothing of it has failed, so what is raised is the interrupt, and no word about a state that cannot be."""
    wake = Keeper.wake_watch

    def interrupted(keeper: Keeper) -> None:
        wake(keeper)
        raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "wake_watch", interrupted)
    with nothing_left(), pytest.raises(KeyboardInterrupt):
        ProcessIsolator.create()


def test_an_interrupted_close_is_completed_by_the_next(monkeypatch: pytest.MonkeyPatch):
    """The thread that ``submit`` uses was forgotten by the first, and lived on."""
    with nothing_left():
        isolator = ProcessIsolator.create()
        assert isolator.submit(int, "7").result() == 7
        with monkeypatch.context() as patch:
            patch.setattr(Crew, "close", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                isolator.close()
        isolator.close()


@pytest.mark.parametrize(("kind", "name"), [(Crew, "close"), (Keeper, "bury")])
@pytest.mark.parametrize("more", [{}, {"idle_timeout": 60}], ids=str)
def test_an_interrupted_close_is_completed_when_the_isolator_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, more: dict[str, Any]
):
    """The child's group and descriptors stayed for as long as the application lived."""

    def application() -> None:
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt), ProcessIsolator.create(**more) as isolator:
            assert isolator.submit(int, "7").result() == 7
            patch.setattr(kind, name, _interrupted)

    with nothing_left():
        application()


@pytest.mark.parametrize("moment", ["_make_group", "_make_output", "_send_plan"])
def test_the_last_who_closes_while_a_spare_is_asked_for(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """By another thread, for an isolator that has just been opened. What was made for it was given back before it was made."""
    make, before = getattr(Child, moment), leftovers()
    first = ProcessIsolator.create(tenant=moment)
    second = ProcessIsolator.create(tenant=moment)
    template, options = second._keeper.template, second.options
    spare.closing(template, options)
    taken = spare.take(template, options, None)
    assert taken is not None
    taken.discard("not wanted")

    def closing(child: Child, *args: Any) -> Any:
        monkeypatch.undo()
        in_thread(first.close)
        in_thread(second.close)
        return make(child, *args)

    with suppress(IsolatorClosed):
        monkeypatch.setattr(Child, moment, closing)
        spare.prepare(template, options)
    assert wait_until(lambda: not new_since(before)), new_since(before)


def test_an_interrupted_request_for_a_spare_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch):
    with nothing_left(), Template() as template:
        with ProcessIsolator.create() as isolator:
            isolator.invoke(len, "abc")
            with monkeypatch.context() as patch:
                patch.setattr(Child, "request", _interrupted)
                with pytest.raises(KeyboardInterrupt):
                    isolator.close()
        template.create().close()
        assert wait_until(spare_is_there)


@pytest.mark.parametrize("error", [OSError(errno.ESRCH, "no such process"), KeyboardInterrupt()], ids=repr)
def test_a_zygote_that_is_lost_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch, error: BaseException):
    def fail(*_: object) -> None:
        raise error

    with nothing_left():
        with monkeypatch.context() as patch:
            patch.setattr(zygote_module, "_kill_at_hangup", fail)
            with pytest.raises(LaunchError if isinstance(error, OSError) else KeyboardInterrupt):
                ProcessIsolator.create()
        ProcessIsolator.create().close()


@pytest.mark.parametrize("ends", ["terminate", "abort", "close"])
def test_a_handler_that_ends_a_child_in_the_middle_of_its_account(monkeypatch: pytest.MonkeyPatch, ends: str):
    """The account has a lock, which the handler would wait for in the thread that holds it."""
    part_with, told = Child._part_with, []

    def end(*_signal: object) -> None:
        try:
            getattr(isolator, ends)()
        except IsolationError as error:
            told.append(error)

    def interrupted(child: Child, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)
        part_with(child, *arguments)

    before = signal.signal(signal.SIGUSR1, end)
    try:
        with nothing_left(), ProcessIsolator.create() as isolator:
            monkeypatch.setattr(Child, "_part_with", interrupted)
            with pytest.raises(ChildTerminated):
                isolator.invoke(os._exit, 3)
            monkeypatch.undo()
            assert len(told) == 1
            if ends != "close":
                isolator.restart()
                assert isolator.invoke(len, "abc") == 3
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_process_that_ends_between_a_look_and_its_kill(monkeypatch: pytest.MonkeyPatch):
    """And that somebody else reaps, as an application may which ignores SIGCHLD."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    monkeypatch.setattr(zygote_module, "has_ended", lambda *_: False)
    zygote_module.end_process(pidfd, 0.0)
    os.close(pidfd)


def _interrupted(*_arguments: object, **_keywords: object) -> None:
    raise KeyboardInterrupt


def test_what_a_handler_raises_while_an_answer_is_decoded_is_no_lie_of_the_childs(monkeypatch: pytest.MonkeyPatch):
    import msgspec.json

    class OutOfTime(Exception):
        pass

    def decode(_text: bytes) -> None:
        raise OutOfTime

    with ProcessIsolator.create() as isolator:
        assert isolator.invoke_method("json", "loads", "[1.5]") == [1.5]
        monkeypatch.setattr(msgspec.json, "decode", decode)
        with pytest.raises(OutOfTime):
            isolator.invoke_method("json", "loads", "[1.5]")


@pytest.mark.parametrize("name", ["pisupervisor.launch.seccomp", "msgspec.json"])
def test_a_module_that_another_thread_is_just_importing(monkeypatch: pytest.MonkeyPatch, name: str):
    """It stands in sys.modules before it has its names: found by the soak, whose hosts have threads."""
    with ProcessIsolator.create() as isolator:
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
        IsolationOptions(security=Security(seccomp="strict"))
        assert isolator.invoke_method("json", "loads", "[1.5]") == [1.5]


# --- forks of the application ----------------------------------------------------------------------------------------


def in_fork_while(lock: Any, work: Callable[[], object]) -> str:
    """Another thread has ``lock`` when this one forks: in the fork nobody will ever let go of it."""

    def impatient() -> object:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        return work()

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        return in_fork(impatient)
    finally:
        done.set()
        thread.join()


def test_a_fork_of_an_application_that_submits_in_another_thread() -> None:
    with ProcessIsolator.create() as isolator, IsolationExecutor(max_workers=1) as executor:
        assert in_fork_while(isolator._crew_lock, isolator.close) == "None"
        assert in_fork_while(isolator._crew_lock, isolator.__del__) == "None"
        assert in_fork_while(isolator._crew_lock, lambda: isolator.submit(len, "abc")) == "IsolatorClosed"
        assert in_fork_while(executor._pool._lock, lambda: executor.submit(len, "abc")) == "IsolatorClosed"
        assert (isolator.submit(len, "abc").result(), executor.submit(len, "abc").result()) == (3, 3)
