"""Functions of the application, called from the child: by exact names, with data, in turn, and not too often."""

from __future__ import annotations

import array
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, state_of, wait_until, write

from pihost import wire
from pisupervisor import (
    CallError,
    CallTimeout,
    ChildTerminated,
    ExitReason,
    IsolationError,
    IsolationFuture,
    IsolatorClosed,
    Limits,
    OptionsError,
    ProcessIsolator,
    ProtocolError,
    RemoteError,
    RestartPolicy,
    UnknownCallback,
)
from pisupervisor.callbacks import Callbacks

pytestmark = linux

PLUGIN = """
    import os, sys, threading
    import pihost

    def ask(name, *args, **kwargs):
        return pihost.call_host(name, *args, **kwargs)

    def ask_raw(name, *parts):
        return pihost.call_host_raw(name, *parts)

    def ask_raw_without_pickle(name, part):
        sys.modules.pop("pickle", None)
        answer = pihost.call_host_raw(name, part)
        return [answer, "pickle" in sys.modules]

    def catch(name, *args):
        try:
            return pihost.call_host(name, *args)
        except Exception as error:
            return [type(error).__name__, str(error)]

    def many(name, count):
        answers = [catch(name) for _ in range(count)]
        return [sum(answer == "ok" for answer in answers), answers[-1]]

    def down(depth):
        return depth if depth == 0 else pihost.call_host("down", depth)

    def from_a_thread(name):
        found = []
        thread = threading.Thread(target=lambda: found.append(catch(name)))
        thread.start()
        thread.join()
        return found[0]

    def from_a_fork(name):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.write(writer, catch(name)[0].encode())
            os._exit(0)
        os.close(writer)
        os.wait()
        return os.read(reader, 100).decode()

    def say(text):
        print(text, flush=True)

    def say_around(text):
        print("before", flush=True)
        pihost.call_host("say", text)
        print("after", flush=True)
        return "done"

    def die():
        os._exit(3)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("callbacks"), "plugin.py", PLUGIN)


@pytest.fixture
def isolator() -> Iterator[ProcessIsolator]:
    with nothing_left(), ProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
        yield isolator


def test_parameters_and_results(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 48"""
    seen: list[Any] = []

    def take(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return {"answer": (1, 2.5, b"x", None)}

    isolator.register_callback("take", take)
    isolator.register_callback("nothing", lambda: None)
    assert isolator.invoke_method(plugin, "ask", "take", 1, [2, (3,)], key={"a": b"b"}) == {
        "answer": (1, 2.5, b"x", None)
    }
    assert seen == [((1, [2, (3,)]), {"key": {"a": b"b"}})]
    assert isolator.invoke_method(plugin, "ask", "nothing") is None


def test_the_same_from_a_closure(isolator: ProcessIsolator) -> None:
    def ask() -> Any:
        import pihost

        return pihost.call_host("now")

    isolator.register_callback("now", lambda: 42)
    assert isolator.invoke(ask) == 42


def test_raw_bytes(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 50"""
    isolator.register_callback("join", lambda *parts: b"|".join(parts))
    assert isolator.invoke_method(plugin, "ask_raw", "join", b"a", b"", b"\xff" * 100_000) == b"a||" + b"\xff" * 100_000
    assert isolator.invoke_method(plugin, "ask_raw_without_pickle", "join", b"x") == [b"x", False]
    isolator.register_callback("text", lambda part: "no bytes")
    with pytest.raises(RemoteError, match="failed"):
        isolator.invoke_method(plugin, "ask_raw", "text", b"a")


@pytest.mark.parametrize("name", ["unknown", "now.__class__", "__init__", "NOW", "now ", "", "x" * 5000])
def test_only_exact_names(isolator: ProcessIsolator, plugin: Path, name: str) -> None:
    """parity: 48"""
    isolator.register_callback("now", time.time)
    with pytest.raises(UnknownCallback, match="has registered no function"):
        isolator.invoke_method(plugin, "ask", name)
    assert isolator.invoke_method(plugin, "catch", name)[0] == "UnknownCallback"


def test_none_are_registered(isolator: ProcessIsolator, plugin: Path) -> None:
    with pytest.raises(UnknownCallback):
        isolator.invoke_method(plugin, "ask", "anything")


def test_a_name_that_is_no_text_is_the_childs_mistake(isolator: ProcessIsolator, plugin: Path) -> None:
    pid = isolator.pid
    with pytest.raises(TypeError, match="the name of a function of the host is text, not int"):
        isolator.invoke_method(plugin, "ask", 5)
    assert isolator.pid == pid


def test_arguments_that_are_no_data_are_named(isolator: ProcessIsolator) -> None:
    def ask() -> None:
        import pihost

        pihost.call_host("any", 1, [object()])

    with pytest.raises(TypeError, match=r"args\[1\]\[0\]: <class 'object'> is not data"):
        isolator.invoke(ask)


def test_unregistered_is_unknown(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.register_callback("now", lambda: 1)
    isolator.register_callback("now", lambda: 2)
    assert isolator.invoke_method(plugin, "ask", "now") == 2
    isolator.unregister_callback("now")
    with pytest.raises(UnknownCallback):
        isolator.invoke_method(plugin, "ask", "now")
    with pytest.raises(OptionsError, match="no callback 'now'"):
        isolator.unregister_callback("now")


async def _double(x: int) -> int:
    return 2 * x


class _Doubler:
    async def __call__(self, x: int) -> int:
        return 2 * x

    async def double(self, x: int) -> int:
        return 2 * x


@pytest.mark.parametrize(
    "function",
    [_double, functools.partial(_double, 1), _Doubler(), _Doubler().double],
    ids=["def", "partial", "object", "method"],
)
def test_coroutine_functions_are_for_an_event_loop(isolator: ProcessIsolator, function: Any) -> None:
    with pytest.raises(OptionsError, match="use AsyncProcessIsolator"):
        isolator.register_callback("double", function)


def _fail() -> None:
    raise ValueError("a secret of the host")


def test_errors_are_kept_from_the_child(
    isolator: ProcessIsolator, plugin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """parity: 49"""
    isolator.register_callback("fail", _fail)
    with caplog.at_level(logging.ERROR, "pisupervisor"):
        kind, text = isolator.invoke_method(plugin, "catch", "fail")
    assert (kind, text) == ("HostError", "the host's function 'fail' failed")
    assert "a secret of the host" in caplog.text
    with pytest.raises(RemoteError) as caught:
        isolator.invoke_method(plugin, "ask", "fail")
    assert "secret" not in str(caught.value)


def test_errors_are_shown_where_asked(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.register_callback("fail", _fail, expose_errors=True)
    assert isolator.invoke_method(plugin, "catch", "fail")[1].endswith("ValueError: a secret of the host")


def test_wrong_arguments_are_an_error_of_the_callback(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.register_callback("one", lambda x: x)
    assert isolator.invoke_method(plugin, "catch", "one", 1, 2)[0] == "HostError"
    assert isolator.invoke_method(plugin, "catch", "one", 1) == 1


def test_host_and_child_call_each_other(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 48. Host to child to host to child ..."""
    depths: list[int] = []

    def down(depth: int) -> int:
        depths.append(depth)
        return int(isolator.invoke_method(plugin, "down", depth - 1))

    isolator.register_callback("down", down)
    assert isolator.invoke_method(plugin, "down", 6) == 0
    assert depths == [6, 5, 4, 3, 2, 1]
    assert isolator.state == "ready"


def test_not_too_deep(plugin: Path) -> None:
    with ProcessIsolator.create(callback_depth=3) as isolator:
        isolator.register_callback(
            "down", lambda depth: isolator.invoke_method(plugin, "down", depth - 1), expose_errors=True
        )
        assert isolator.invoke_method(plugin, "down", 3) == 0
        with pytest.raises(RemoteError, match="nested more than 3 deep"):
            isolator.invoke_method(plugin, "down", 5)
        assert isolator.invoke_method(plugin, "down", 1) == 0


def test_not_too_often(plugin: Path) -> None:
    with ProcessIsolator.create(callback_rate=2) as isolator:
        isolator.register_callback("ok", lambda: "ok")
        good, last = isolator.invoke_method(plugin, "many", "ok", 200)
        assert 2 <= good < 50
        assert last == ["HostError", "more than 2 calls of the host in a second"]


def test_not_too_many_bytes(plugin: Path) -> None:
    """The first second's worth passes at once; decoding is what costs, so what is more is not decoded."""
    with ProcessIsolator.create(callback_bytes="8M") as isolator:
        isolator.register_callback("size", lambda part: len(part))

        def send(count: int) -> list[str]:
            import pihost

            refused = []
            for _ in range(count):
                try:
                    pihost.call_host("size", b"x" * 3_000_000)
                except pihost.HostError as error:
                    refused.append(str(error))
            return refused

        refused = isolator.invoke(send, 20)
        assert 10 <= len(refused) <= 18
        assert set(refused) == {"more than 8388608 bytes for the host in a second"}
        assert isolator.invoke(len, "abc") == 3


def test_one_large_request_passes_however_small_the_budget(isolator: ProcessIsolator, plugin: Path) -> None:
    with ProcessIsolator.create(callback_bytes=1) as thrifty:
        thrifty.register_callback("size", lambda part: len(part))
        assert thrifty.invoke_method(plugin, "ask", "size", b"x" * 4_000_000) == 4_000_000
        assert thrifty.invoke_method(plugin, "catch", "size", b"x" * 4_000_000)[0] == "HostError"
    with ProcessIsolator.create(callback_bytes=None, callback_rate=None) as generous:
        generous.register_callback("size", lambda part: len(part))
        assert generous.invoke(
            lambda: [__import__("pihost").call_host("size", b"x" * 4_000_000) for _ in range(25)][-1]
        )


def test_what_is_refused_or_too_large_keeps_no_room(isolator: ProcessIsolator) -> None:
    """An honest child may catch what it is told, and go on."""

    def send(count: int, size: int) -> list[str]:
        import pihost

        said = []
        for _ in range(count):
            try:
                said.append(str(pihost.call_host("size", b"x" * size)))
            except Exception as error:
                said.append(type(error).__name__)
        return said

    with ProcessIsolator.create() as usual:
        usual.register_callback("size", len)
        size = 40 << 20
        assert set(usual.invoke(send, 8, size)) == {str(size), "HostError"}
        assert usual.invoke(lambda: b"x" * (1 << 20)) == b"x" * (1 << 20)
    with ProcessIsolator.create(limits=Limits(memory="192M")) as small:
        small.register_callback("size", len)
        assert small.invoke(send, 1, 50 << 20) == [str(50 << 20)]  # more room than there is: over the socket
        assert small.invoke(send, 3, 70 << 20) == ["ValueError"] * 3
        assert small.invoke(send, 1, 5 << 20) == [str(5 << 20)]


def test_another_thread_and_what_is_too_large_take_no_arena() -> None:
    def waste() -> list[str]:
        import threading

        import pihost

        said = []

        def call(*args: object) -> None:
            try:
                said.append(str(pihost.call_host("count", *args)))
            except Exception as error:
                said.append(type(error).__name__)

        call(b"x" * 1_000_000)
        thread = threading.Thread(target=call, args=(b"x" * 1_000_000,))
        thread.start()
        thread.join()
        call(b"x" * 1_000_000, "x" * 9_000_000)
        call(b"x" * 1_000_000)
        return said

    with ProcessIsolator.create(limits=Limits(result="8M")) as isolator:
        isolator.register_callback("count", lambda *args: len(args))
        assert isolator.invoke(waste) == ["1", "RuntimeError", "ValueError", "1"]
        assert len(isolator._keeper.connection.arenas()._out) == 1  # type: ignore[union-attr]


def test_more_than_the_budget_passes_once() -> None:
    callbacks = Callbacks(lambda value: b"%d" % value, None, size=1)
    callbacks.register("size", lambda part: len(part), False)
    body = packed(b'["size",[{"$bytes":0}],{}]', b"")
    assert callbacks._bytes.may_pass(wire.MAX_FRAME + 1)
    assert not callbacks._bytes.may_pass(1)
    assert b"more than 1 bytes" in callbacks.answer(wire.CALLBACK, body)


def test_who_says_goodbye_while_many_are_let_go(isolator: ProcessIsolator) -> None:
    """What is released calls the host as it goes, with more than a socket holds, while the host sends the next call: each
    would wait for the other, if the objects were let go before that call is read whole.
    """

    class Goodbye:
        def __del__(self) -> None:
            import pihost

            pihost.call_host("goodbye", b"x" * 2_000_000)

    sizes: list[int] = []
    isolator.register_callback("goodbye", lambda data: sizes.append(len(data)))
    thing = isolator.create_object(Goodbye)
    connection = isolator._keeper.connection
    assert connection is not None
    connection.released.extend(range(200_000))  # numbers of nothing; the frame is larger than any socket's buffer
    thing.release()
    assert isolator.invoke(len, b"y" * 4_000_000, timeout=20) == 4_000_000
    assert sizes == [2_000_000]


def test_exit_handlers_have_no_host_to_call(isolator: ProcessIsolator, capfd: pytest.CaptureFixture[str]) -> None:
    def register() -> None:
        import atexit
        import os

        import pihost

        def ask() -> None:
            try:
                pihost.call_host("now")
            except RuntimeError as error:
                os.write(2, f"refused: {error}".encode())

        atexit.register(ask)

    isolator.register_callback("now", time.time)
    isolator.invoke(register)
    info = isolator.exit(timeout=5)
    assert (info.exit_code, info.stderr_tail) == (0, "refused: this process has no host to call")


def test_from_another_thread_or_process_of_the_child(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.register_callback("now", time.time)
    assert isolator.invoke_method(plugin, "from_a_thread", "now")[0] == "RuntimeError"
    assert isolator.invoke_method(plugin, "from_a_fork", "now") == "RuntimeError"
    assert isolator.invoke_method(plugin, "ask", "now") > 0


def test_output_of_nested_calls_stays_apart(isolator: ProcessIsolator, plugin: Path) -> None:
    inner: list[str] = []

    def say(text: str) -> None:
        inner.append(isolator.execute(f"{plugin}:say", text).stdout)
        isolator.invoke_method(plugin, "say", "uncaptured")

    isolator.register_callback("say", say)
    outer = isolator.execute(f"{plugin}:say_around", "within")
    assert (outer.value, outer.stdout, inner) == ("done", "before\nuncaptured\nafter\n", ["within\n"])


def test_a_child_that_dies_in_a_nested_call(isolator: ProcessIsolator, plugin: Path) -> None:
    inner: list[Exception] = []

    def die() -> None:
        try:
            isolator.invoke_method(plugin, "die")
        except ChildTerminated as error:
            inner.append(error)
            raise

    isolator.register_callback("die", die)
    with pytest.raises(ChildTerminated) as caught:
        isolator.invoke_method(plugin, "ask", "die")
    assert [error.exit_info for error in inner] == [caught.value.exit_info]  # type: ignore[attr-defined]
    assert isolator.invoke_method(plugin, "down", 0) == 0


def test_the_deadline_of_the_outer_call_counts_in_callbacks(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.register_callback("sleep", time.sleep)
    with pytest.raises(CallTimeout):
        isolator.invoke_method(plugin, "ask", "sleep", 0.3, timeout=0.1)
    assert isolator.invoke_method(plugin, "down", 0) == 0


def test_a_child_is_dead_at_its_deadline_while_a_callback_goes_on(isolator: ProcessIsolator, plugin: Path) -> None:
    """Nobody can end the application's function, but all that the child does beside it."""
    seen: list[bool] = []

    def look(pid: int) -> None:
        seen.append(wait_until(lambda: state_of(pid) == "", 2.0))

    isolator.register_callback("look", look)
    isolator.invoke_method(plugin, "down", 0)
    with pytest.raises(CallTimeout) as caught:
        isolator.invoke_method(plugin, "ask", "look", isolator.pid, timeout=0.1)
    assert seen == [True]
    assert caught.value.exit_info is not None
    assert caught.value.exit_info.reason is ExitReason.TIMEOUT
    assert "pisupervisor-overtime" not in [thread.name for thread in threading.enumerate()]


def test_a_callback_that_is_over_in_time_ends_nothing(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.register_callback("sleep", time.sleep)
    isolator.invoke_method(plugin, "ask", "sleep", 0)
    pid = isolator.pid
    for limit in (30, 0.2, 30):
        isolator.invoke_method(plugin, "ask", "sleep", 0.01, timeout=limit)
    isolator.invoke_method(plugin, "ask", "sleep", 0.3, timeout=30)
    assert isolator.pid == pid


def test_a_nested_call_that_times_out(isolator: ProcessIsolator, plugin: Path) -> None:
    def hang() -> None:
        isolator.run_source("while True: pass", timeout=0.1)

    isolator.register_callback("hang", hang)
    with pytest.raises(ChildTerminated) as caught:
        isolator.invoke_method(plugin, "ask", "hang")
    assert caught.value.exit_info.reason.name == "TIMEOUT"


def test_an_interrupted_callback_ends_the_call(isolator: ProcessIsolator, plugin: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    isolator.register_callback("interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        isolator.invoke_method(plugin, "ask", "interrupt")
    assert isolator.invoke_method(plugin, "down", 0) == 0


def test_a_callback_that_waits_for_a_submitted_call(plugin: Path) -> None:
    """That one waits for its turn, which this thread has: neither would ever end."""
    futures: list[IsolationFuture] = []
    seen: list[BaseException] = []

    def submits() -> int:
        futures.append(isolator.submit(len, "abc"))
        for wait in (futures[0].result, futures[0].exception):
            try:
                wait()
            except CallError as error:
                seen.append(error)
        return int(isolator.invoke(len, "ab"))

    with nothing_left(), ProcessIsolator.create() as isolator:
        isolator.register_callback("submits", submits)
        assert isolator.invoke_method(plugin, "ask", "submits", timeout=10) == 2
        assert ["invoke()" in str(error) for error in seen] == [True, True]
        assert futures[0].result(10) == 3  # afterwards it has its turn


def test_a_callback_that_closes_its_isolator(plugin: Path) -> None:
    with nothing_left():
        isolator = ProcessIsolator.create()
        isolator.register_callback("close", isolator.close)
        with pytest.raises((ChildTerminated, IsolatorClosed)):
            isolator.invoke_method(plugin, "ask", "close")


def test_callbacks_are_there_again_after_a_restart(isolator: ProcessIsolator, plugin: Path) -> None:
    """parity: 15"""
    isolator.register_callback("now", lambda: "now")
    with pytest.raises(ChildTerminated):
        isolator.invoke_method(plugin, "die")
    assert isolator.invoke_method(plugin, "ask", "now") == "now"


def test_on_start_may_call_the_host() -> None:
    def begin() -> None:
        import pihost

        try:
            pihost.call_host("not there yet")
        except pihost.UnknownCallback:
            return
        raise AssertionError

    with ProcessIsolator.create(on_start=begin) as isolator:
        assert isolator.invoke(len, "abc") == 3


def test_what_is_not_data_does_not_leave_the_child(isolator: ProcessIsolator) -> None:
    def ask() -> Any:
        import pihost

        return pihost.call_host("take", object())

    isolator.register_callback("take", lambda value: None)
    with pytest.raises(TypeError, match=r"call_host\('take'\): .*object'> is not data"):
        isolator.invoke(ask)


@pytest.mark.parametrize(("name", "function"), [("", print), (3, print), ("x", "print"), ("x", None)])
def test_what_is_no_callback(isolator: ProcessIsolator, name: Any, function: Any) -> None:
    with pytest.raises(OptionsError):
        isolator.register_callback(name, function)


# --- a child that cheats -------------------------------------------------------------------------------------------


def packed(text: bytes, *buffers: bytes) -> bytes:
    return b"".join(wire.pack_value(text, list(buffers)))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (wire.CALLBACK, b""), (wire.CALLBACK, b"\0"), (wire.CALLBACK, packed(b"[]")), (wire.CALLBACK, packed(b'"now"')),
        (wire.CALLBACK, packed(b'["now",{},[]]')), (wire.CALLBACK, packed(b'[3,[],{}]')), (wire.CALLBACK, packed(b"{")),
        (wire.CALLBACK, packed(b'["now",[],{"$":"dict","v":[1,2]}]')), (wire.CALLBACK, packed(b"[" * 5000)),
        (wire.CALLBACK_RAW, packed(b"3", b"x")), (wire.CALLBACK_RAW, packed(b'["now"]')), (wire.CALLBACK_RAW, b"\xff" * 20),
    ],
)  # fmt: skip
def test_requests_that_no_honest_child_sends(kind: int, body: bytes) -> None:
    called: list[object] = []
    callbacks = Callbacks(lambda value: b"", None)
    callbacks.register("now", lambda *args, **kwargs: called.append(args), False)
    with pytest.raises(ProtocolError):
        callbacks.answer(kind, body)
    assert called == []


def test_a_forged_request_kills_the_child(isolator: ProcessIsolator) -> None:
    isolator.register_callback("now", time.time)
    with pytest.raises(ProtocolError):
        isolator.invoke(os.write, 3, wire.pack_header(wire.CALLBACK, 1, 3) + b"abc")
    assert isolator.wait_for_exit().reason.name == "PROTOCOL"
    assert isolator.invoke(len, "abc") == 3


def test_requests_of_no_call_are_refused(isolator: ProcessIsolator) -> None:
    """A thread of the child asks between two calls: the next caller's thread does not answer that."""
    called: list[int] = []

    def ask_later() -> None:
        import os
        import threading
        import time

        from pihost import wire
        from pihost.inside import callbacks

        body = b"".join(wire.pack_value(b'["now",[],{}]', []))
        frame = wire.pack_header(wire.CALLBACK, callbacks.host.call_id, len(body)) + body  # type: ignore[union-attr]
        threading.Thread(target=lambda: (time.sleep(0.1), os.write(3, frame)), daemon=True).start()

    isolator.register_callback("now", lambda: called.append(1))
    isolator.invoke(ask_later)
    time.sleep(0.3)
    with pytest.raises(ProtocolError):
        isolator.invoke(len, "abc")
    assert called == []


def test_large_arguments_and_too_large_ones(plugin: Path) -> None:
    with ProcessIsolator.create(
        callback_bytes=None
    ) as isolator:  # a fast machine moves more than the default in a second
        isolator.register_callback("size", lambda *parts: len(parts[0]))
        isolator.register_callback("same", lambda part: part)
        isolator.register_callback("joined", lambda *parts: b"".join(parts))
        assert isolator.invoke_method(plugin, "ask", "size", b"x" * 2_000_000) == 2_000_000
        assert isolator.invoke_method(plugin, "ask_raw", "same", b"x" * 3_000_000) == b"x" * 3_000_000
        assert isolator.invoke_method(plugin, "ask", "size", b"x" * (5 << 20)) == 5 << 20
        pid = isolator.pid
        for part in (b"x" * (5 << 20), bytearray(20 << 20), array.array("d", [1.0]) * (1 << 20)):
            assert isolator.invoke_method(plugin, "ask_raw", "same", part) == bytes(part)
        assert isolator.invoke_method(plugin, "ask_raw", "joined", b"", b"y" * 200_000, b"z") == b"y" * 200_000 + b"z"
        for text in (
            "x" * (5 << 20),
            "\u00e4" * (10 << 20),
            ["y" * (6 << 20), b"z" * (5 << 20)],
        ):  # in pieces, one beside an arena
            assert isolator.invoke_method(plugin, "ask", "same", text) == text
        for name, large in (
            ("ask", "x" * (65 << 20)),
            ("ask_raw", b"x" * (65 << 20)),
            ("ask", [b"x" * (33 << 20)] * 2),
        ):
            with pytest.raises(ValueError, match=r"more than 67108864 bytes \(Limits.result\); send them in parts"):
                isolator.invoke_method(plugin, name, "size", large)
        assert isolator.invoke_method(plugin, "down", 0) == 0
        assert isolator.pid == pid


def test_what_cannot_be_asked_raises_in_the_child_that_asks_it(isolator: ProcessIsolator, plugin: Path) -> None:
    """And does not end it: to the host that would be a broken protocol."""
    isolator.register_callback("joined", lambda *parts: b"".join(parts))
    pid = isolator.pid
    assert len(isolator.invoke_method(plugin, "ask_raw", "joined", *[b"x"] * wire.MAX_BUFFERS)) == wire.MAX_BUFFERS
    for parts, kind in (
        (["joined", *[b"x"] * (wire.MAX_BUFFERS + 1)], ValueError), (["\ud800", b"x"], UnicodeEncodeError),
        ([5, b"x"], TypeError), (["joined", "text"], TypeError),
    ):  # fmt: skip
        with pytest.raises(kind):
            isolator.invoke_method(plugin, "ask_raw", *parts)
    assert isolator.pid == pid


def test_the_time_of_the_outer_call_is_the_most_that_an_inner_one_gets(isolator: ProcessIsolator, plugin: Path) -> None:
    isolator.register_callback("hang", lambda: isolator.run_source("while True: pass"))
    started = time.monotonic()
    with pytest.raises((ChildTerminated, CallTimeout)):
        isolator.invoke_method(plugin, "ask", "hang", timeout=0.3)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("act", ["restart", "exit", "wait_for_exit"])
def test_what_would_wait_for_itself_is_refused(isolator: ProcessIsolator, plugin: Path, act: str) -> None:
    isolator.register_callback("act", lambda: getattr(isolator, act)(), expose_errors=True)
    started = time.monotonic()
    kind, text = isolator.invoke_method(plugin, "catch", "act", timeout=5)
    assert (kind, "callback" in text) == ("HostError", True)
    assert time.monotonic() - started < 2
    assert isolator.invoke_method(plugin, "down", 0) == 0


def test_a_callback_of_on_start_cannot_call_into_the_child() -> None:
    refused: list[str] = []
    isolators: list[ProcessIsolator] = []

    def begin() -> None:
        import pihost

        try:
            pihost.call_host("call")
        except (pihost.HostError, pihost.UnknownCallback):
            pass

    def call() -> None:
        try:
            isolators[0].invoke(len, "abc")
        except IsolationError as error:
            refused.append(str(error))
            raise

    with ProcessIsolator.create(on_start=begin) as isolator:
        isolators.append(isolator)
        isolator.register_callback("call", call)
        isolator.restart()
        assert len(refused) == 1
        assert "not ready yet" in refused[0]
        assert isolator.invoke(len, "abc") == 3


def test_a_handler_of_a_signal_in_the_middle_of_a_call_is_told_so(isolator: ProcessIsolator) -> None:
    refused: list[str] = []

    def handle(*_args: Any) -> None:
        with pytest.raises(IsolationError) as caught:
            isolator.invoke(len, "abc")
        refused.append(str(caught.value))

    before = signal.signal(signal.SIGUSR1, handle)
    alarm = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        isolator.invoke(len, "abc")
        alarm.start()
        isolator.invoke(time.sleep, 0.6)
    finally:
        alarm.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(refused) == 1
    assert "in the middle of a call" in refused[0]


def test_what_a_callback_returns_brings_no_code_of_the_application(isolator: ProcessIsolator, plugin: Path) -> None:
    class Secretive:
        password = "hunter2"

    isolator.register_callback("object", Secretive)
    assert isolator.invoke_method(plugin, "catch", "object")[0] == "HostError"


def test_failed_callbacks_do_not_flood_the_log(
    isolator: ProcessIsolator, plugin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    isolator.register_callback("fail", lambda: 1 / 0)
    with caplog.at_level(logging.ERROR, "pisupervisor"):
        isolator.invoke_method(plugin, "many", "fail", 500)
    assert 1 <= len(caplog.records) < 100


def test_a_nested_calls_output_is_not_the_outer_errors(plugin: Path) -> None:
    with ProcessIsolator.create(restart=RestartPolicy(backoff=0.0), limits=Limits(output="1K")) as isolator:
        isolator.register_callback("say", lambda text: isolator.execute(f"{plugin}:say", text).truncated)

        def say_and_die() -> None:
            import os

            import pihost

            pihost.call_host("say", "x" * 5000)
            os.write(2, b"last words of the outer call")
            os._exit(3)

        with pytest.raises(ChildTerminated) as caught:
            isolator.invoke(say_and_die)
        assert (caught.value.stdout, caught.value.exit_info.reason.name) == ("", "EXITED")
        assert caught.value.exit_info.stderr_tail == "last words of the outer call"


def test_a_flood_of_requests_ends(isolator: ProcessIsolator) -> None:
    """A child that never waits for an answer only fills its own socket, until one is to be written to it."""

    def flood() -> None:
        import os

        from pihost import wire
        from pihost.inside import callbacks

        body = b"".join(wire.pack_value(b'["now",[],{}]', []))
        frame = wire.pack_header(wire.CALLBACK, callbacks.host.call_id, len(body)) + body  # type: ignore[union-attr]
        while True:
            os.write(3, frame)

    answered: list[int] = []
    isolator.register_callback("now", lambda: answered.append(1))
    with pytest.raises(ProtocolError, match="not answered yet"):  # it takes an emulated machine a second
        isolator.invoke(flood, timeout=20)
    assert len(answered) < 1000  # 279 fill a socket of the default size (net.core.wmem_default)
    assert isolator.invoke(len, "abc") == 3


def test_nobody_is_called_by_exit_handlers(tmp_path: Path) -> None:
    """The host that has said goodbye listens no more; a handler that asks it learns that, and does not wait."""
    called: list[str] = []

    def prepare() -> None:
        import atexit

        import pihost

        atexit.register(lambda: pihost.call_host("note", "too late"))

    with ProcessIsolator.create() as made:
        made.register_callback("note", called.append)
        made.invoke(prepare)
        started = time.monotonic()
        info = made.exit("bye", timeout=5)
        assert time.monotonic() - started < 4
    assert (info.exit_code, called) == (0, [])
    assert "no host to call" in info.stderr_tail
