"""Deaths in, between and around calls. Each is told exactly, once, in time; nothing is left; the next call is right."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from helpers import descendants, living, nothing_left, state_of, wait_until, zygote_of
from zoo import (
    AT_ONCE,
    DEATHS,
    DYING,
    INSIDE,
    LIMITS,
    SECCOMP,
    SOON,
    VICTIMS,
    Death,
    isolator,
    lives_on,
    within,
)

from pihost import wire
from pisupervisor import (
    AsyncProcessIsolator,
    CallTimeout,
    ChildTerminated,
    ExitReason,
    LaunchError,
    ProcessIsolator,
    ProtocolError,
    RestartLimitReached,
    RestartPolicy,
    Security,
)

pytestmark = pytest.mark.linux
Made = ProcessIsolator

# --- the child dies of what it does ------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., Any]] = {
    "plain": lambda made, *how: made.invoke_method(DYING, *how),
    "captured": lambda made, name, *more: made.execute(f"{DYING}:{name}", *more),
    "in the pieces of a result": lambda made, *how: made.invoke_method(DYING, "in_the_result", *how),
    "submitted": lambda made, *how: made.submit_call(made.invoke_method, DYING, *how).result(10),
}
OTHERS = cycle(sorted(CALLS.keys() - {"plain"}))
TABLE = [(death, place) for death in DEATHS for place in ("plain", next(OTHERS))]


def dies(made: ProcessIsolator, death: Death, place: str) -> None:
    with pytest.raises(ChildTerminated) as caught:
        CALLS[place](made, *death.how)
    assert type(caught.value) is death.error
    assert death.is_told_by(caught.value.exit_info)


@pytest.mark.parametrize(("death", "place"), TABLE)
def test_a_death(death: str, place: str) -> None:
    """parity: 15"""
    with isolator() as made:
        dies(made, DEATHS[death], place)
        assert lives_on(made)


@pytest.mark.root
@pytest.mark.parametrize("place", ["plain", "captured"])
@pytest.mark.parametrize("death", LIMITS)
def test_a_death_at_a_limit(death: str, place: str) -> None:
    with isolator(**LIMITS[death].options) as made:
        dies(made, LIMITS[death], place)
        assert lives_on(made)


@pytest.mark.parametrize("place", CALLS)
def test_a_death_by_the_filter(tmp_path: Path, place: str) -> None:
    path = tmp_path / "profile.json"
    rules = [{"names": ["sync"], "action": "SCMP_ACT_KILL_PROCESS"}]
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    with isolator(security=Security(seccomp=path)) as made:
        dies(made, SECCOMP, place)
        assert lives_on(made)


def test_a_kill_is_not_blamed_on_a_limit_that_was_far_away() -> None:
    with isolator(**LIMITS["cpu time"].options) as made:
        dies(made, DEATHS["SIGKILL"], "plain")


@pytest.mark.parametrize(
    ("stubborn", "place"),
    [
        ("stop", "plain"), ("spin_deaf", "plain"), ("wait_deaf", "captured"), ("wait_with_family", "captured"),
        ("stop", "in the pieces of a result"), ("spin_deaf", "in the pieces of a result"),
    ],
)  # fmt: skip
def test_what_does_not_die_is_killed_at_the_deadline(stubborn: str, place: str) -> None:
    with isolator(call_timeout=0.2) as made:
        with within(0.2 + SOON), pytest.raises(CallTimeout) as caught:
            CALLS[place](made, stubborn)
        assert caught.value.exit_info is not None
        assert caught.value.exit_info.reason is ExitReason.TIMEOUT
        assert living(zygote_of(made)) == []
        assert lives_on(made)


@pytest.mark.parametrize("death", ["SIGKILL", "exit 0", "exit 3", "family"])
def test_a_death_between_two_calls(death: str) -> None:
    """Found by the next call, which it does not fail."""
    with isolator() as made:
        made.invoke_method(DYING, "later", 0.1, *DEATHS[death].how)
        assert wait_until(lambda: made.state in ("backoff", "stopped"))
        assert DEATHS[death].is_told_by(made.wait_for_exit(0))
        if death == "exit 0":
            made.restart()  # nobody starts another child after an end that looks wanted
        assert lives_on(made)


def test_a_link_that_is_closed_between_two_calls() -> None:
    """Found by the next call. It fails if the child has still read it, which the kernel allows where that waits in recvmsg."""
    with isolator() as made:
        made.invoke_method(DYING, "later", 0.1, *DEATHS["link closed"].how)
        time.sleep(0.3)
        with within(SOON):
            try:
                assert made.run_source("1").value == 1
            except ChildTerminated:
                pass
        info = made._keeper.last_exit
        assert info is not None
        assert (info.reason, info.exit_code) == (ExitReason.EXITED, 1)
        assert lives_on(made)


@pytest.mark.parametrize("death", [*sorted(DEATHS)[::2], "raises"])
def test_a_death_in_on_start(death: str) -> None:
    """It is a failed launch, at create() and at each restart."""
    how = DEATHS[death].how if death in DEATHS else ("no_such_function",)
    with nothing_left(), within(2 * SOON), pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(on_start=_from_source(DYING.read_text(), *how))
    assert caught.value.step == "on_start"


def _from_source(source: str, name: str, *arguments: Any) -> Callable[[], None]:
    def begin() -> None:
        names: dict[str, Any] = {}
        exec(source, names)
        names[name](*arguments)

    return begin


def test_an_on_start_that_does_not_come_back() -> None:
    with nothing_left(), within(0.3 + 2 * SOON), pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(on_start=_from_source(DYING.read_text(), "wait_with_family"), start_timeout=0.3)
    assert caught.value.step == "on_start"


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
    with nothing_left(), ProcessIsolator.create() as made:
        pid = made.pid
        with pytest.raises(ProtocolError):
            made.invoke(_write_and_wait, data)
        assert not os.path.exists(f"/proc/{pid}")
        assert made.wait_for_exit(0).reason is ExitReason.PROTOCOL
        assert made.run_source("1").value == 1


def _write_and_wait(data: bytes) -> None:
    import os
    import time

    os.write(3, data)
    time.sleep(1000)


def test_a_child_that_closes_its_link() -> None:
    with nothing_left(), ProcessIsolator.create() as made:
        with pytest.raises(ChildTerminated) as caught:
            made.invoke_method(INSIDE, "close_link")
        assert caught.value.exit_info.reason is ExitReason.PROTOCOL
        assert made.run_source("1").value == 1


def test_a_child_that_leaves_with_a_family() -> None:
    """What it started does not outlive it, however far it ran."""
    source = "import os\nfor _ in range(3):\n  if os.fork() == 0:\n    os.setsid()\n    while True: pass\nos._exit(3)"
    with nothing_left(), ProcessIsolator.create() as made:
        zygote = zygote_of(made)
        with pytest.raises(ChildTerminated) as caught:
            made.run_source(source)
        assert (caught.value.exit_info.exit_code, caught.value.exit_info.reason) == (3, ExitReason.EXITED)
        assert living(zygote) == []


def test_a_payload_that_uses_up_its_descriptors() -> None:
    source = "import os\nkept = []\ntry:\n  while True: kept.append(os.dup(0))\nexcept OSError: pass\nlen(kept)"
    with nothing_left(), ProcessIsolator.create() as made:
        assert made.run_source(source, timeout=5).value > 200
        with pytest.raises(OSError, match="none left for what the call would write"):
            made.run_source("1", timeout=5)
        assert made.invoke(len, "abc", timeout=5) == 3
        made.terminate()
        assert made.run_source("1", timeout=5).value == 1


# --- something is killed from outside ----------------------------------------------------------------------------


def in_a_call(made: Made) -> Future[Any]:
    return _begun(made, made.submit_call(made.invoke_method, DYING, "wait_with_family"))


def in_a_captured_call(made: Made) -> Future[Any]:
    return _begun(made, made.submit_call(made.execute, f"{DYING}:spin_deaf"))


def in_a_result(made: Made) -> Future[Any]:
    return _begun(made, made.submit_call(made.invoke_method, DYING, "in_the_result", "wait"))


def in_a_paused_call(made: Made) -> Future[Any]:
    future = in_a_call(made)
    made.pause()
    return future


def _begun(made: Made, future: Future[Any]) -> Future[Any]:
    assert wait_until(lambda: made.state == "busy")
    time.sleep(0.05)
    return future


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("place", [in_a_call, in_a_captured_call, in_a_result, in_a_paused_call])
def test_killed_while_a_call_runs(place: Callable[[Made], Future[Any]], victim: str) -> None:
    """parity: 15"""
    with isolator() as made:
        future = place(made)
        VICTIMS[victim].kill(made)
        error = future.exception(SOON)
        assert type(error) is ChildTerminated
        assert VICTIMS[victim].is_told_by(error.exit_info)
        assert lives_on(made)


UNREAD: dict[str, Callable[[Made], Any]] = {
    "plain": lambda made: made.invoke(len, "abc"),
    "captured": lambda made: len(made.run_source("'abc'").value),
    "with code": lambda made: made.invoke_method(INSIDE, "sleep", 0.003) * 1000,
    "with shared memory": lambda made: made.invoke(len, bytes(30 << 20)) - (30 << 20) + 3,
}


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("call", UNREAD)
def test_killed_before_it_reads_the_call(call: str, victim: str) -> None:
    """It cannot have begun it, and another child gets it. The kernel tells: the link is reset, not just closed."""
    with isolator() as made:
        UNREAD[call](made)
        os.kill(made.pid or 0, signal.SIGSTOP)
        future = _begun(made, _in_a_thread(UNREAD[call], made))
        VICTIMS[victim].kill(made)
        assert future.result(SOON) == 3


@pytest.mark.parametrize("call", UNREAD)
def test_one_that_is_killed_at_once_fails_no_call(call: str) -> None:
    with isolator() as made:
        for _ in range(10):
            UNREAD[call](made)
            os.kill(made.pid or 0, signal.SIGKILL)
            assert UNREAD[call](made) == 3


def test_one_that_is_killed_at_once_fails_no_awaited_call() -> None:
    async def run() -> None:
        async with await AsyncProcessIsolator.create(restart=AT_ONCE) as made:
            for _ in range(10):
                assert await made.invoke(len, "abc") == 3
                os.kill(made.pid or 0, signal.SIGKILL)
                assert await made.invoke(len, "abc") == 3

    with nothing_left():
        asyncio.run(run())


def test_a_child_that_dies_before_every_call_is_not_replaced_for_ever() -> None:
    def kill_and_call(made: Made) -> None:
        for _ in range(10):
            os.kill(made.pid or 0, signal.SIGKILL)
            assert made.invoke(len, "abc") == 3

    with isolator(restart=RestartPolicy(max_restarts=3, backoff=0.0)) as made, pytest.raises(RestartLimitReached):
        kill_and_call(made)


def _in_a_thread(call: Callable[[Made], Any], made: Made) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(made))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def fresh(_made: Made) -> None:
    """READY, and no call yet."""


def idle(made: Made) -> None:
    made.run_source("1")


def paused(made: Made) -> None:
    made.pause()


def stopped(made: Made) -> None:
    os.kill(made.pid or 0, signal.SIGSTOP)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("place", [fresh, idle, paused, stopped])
def test_killed_while_nobody_calls(place: Callable[[Made], None], victim: str) -> None:
    """parity: 13"""
    with isolator() as made:
        place(made)
        pid = made.pid
        VICTIMS[victim].kill(made)
        assert wait_until(lambda: made.state == "backoff", SOON)
        assert VICTIMS[victim].is_told_by(made.wait_for_exit(0))
        assert lives_on(made)
        assert made.pid != pid


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_in_on_start(victim: str) -> None:
    """The host learns of the child only when that has begun, so the test finds it through the zygote."""
    kept: list[ProcessIsolator] = []
    with nothing_left(), ProcessIsolator.create() as other:
        zygote = zygote_of(other)
        before = set(descendants(zygote))
        thread = threading.Thread(target=_create, args=(kept, _from_source(DYING.read_text(), "wait")))
        thread.start()
        assert wait_until(lambda: _init_and_payload(zygote, before))
        time.sleep(0.3)  # it may take a busy machine so long from the fork of the payload to on_start
        init, payload = _init_and_payload(zygote, before)
        bystander = other.pid or 0
        os.kill({"payload": payload, "PID 1": init, "zygote": zygote}[victim], signal.SIGKILL)
        thread.join(2 * SOON)
        [error] = kept
        assert isinstance(error, LaunchError)
        assert error.step == "on_start"
        if victim == "zygote":  # a dying one closes its descriptors before the kernel ends its children
            assert wait_until(lambda: state_of(bystander) in ("", "Z"), SOON)
        assert lives_on(other)


def _create(kept: list[Any], on_start: Callable[[], None]) -> None:
    try:
        kept.append(ProcessIsolator.create(on_start=on_start))
    except Exception as error:
        kept.append(error)


def _init_and_payload(zygote: int, before: set[int]) -> list[int]:
    found = [pid for pid in descendants(zygote) if pid not in before]
    return found if len(found) == 2 else []


@pytest.mark.parametrize("victim", VICTIMS)
def test_two_threads_at_once(victim: str) -> None:
    """The call that ran fails, once; the one that waited for its turn is answered by the next child."""
    with isolator() as made:
        first = in_a_call(made)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(made.run_source("6 * 7", timeout=10).value))
        waiting.start()
        time.sleep(0.05)
        VICTIMS[victim].kill(made)
        error = first.exception(SOON)
        assert isinstance(error, ChildTerminated)
        assert VICTIMS[victim].is_told_by(error.exit_info)
        waiting.join(10)
        assert answers == [42]


def test_the_zygote_killed_in_the_backoff() -> None:
    """parity: 13"""
    with isolator(restart=RestartPolicy(backoff=0.3)) as made:
        dies(made, DEATHS["SIGKILL"], "plain")
        assert made.state == "backoff"
        zygote = zygote_of(made)
        os.kill(zygote, signal.SIGKILL)
        assert wait_until(lambda: state_of(zygote) in ("", "Z"))
        assert lives_on(made)
        assert zygote_of(made) != zygote


def test_an_idempotent_call_survives_them_all() -> None:
    """parity: 15"""
    with isolator(restart=AT_ONCE) as made:
        for victim in VICTIMS.values():
            future = made.submit_call(made.invoke_method, INSIDE, "sleep", 0.3, idempotent=True)
            assert wait_until(lambda: made.state == "busy")
            time.sleep(0.05)
            victim.kill(made)
            assert future.result(5) == 0.3


def test_a_large_result_and_a_random_kill() -> None:
    """Either the whole answer or none."""
    with isolator() as made:
        for number in range(8):
            future = made.submit(bytes, 8 << 20)
            time.sleep(0.004 * number)
            pid = made.pid
            if pid is not None:
                with suppress(ProcessLookupError):  # the last one's: its death is being told
                    os.kill(pid, signal.SIGKILL)
            if (error := future.exception(5)) is None:
                assert future.result() == bytes(8 << 20)
            else:
                assert type(error) is ChildTerminated
