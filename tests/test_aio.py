"""The awaited face: the same calls, a loop that is never blocked, and tasks whose cancelling kills."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from helpers import in_fork, linux, nothing_left, open_fds, state_of, wait_until, write

from pisupervisor import (
    AsyncProcessIsolator,
    CallTimeout,
    ChildTerminated,
    ExitReason,
    IsolationEvents,
    IsolatorClosed,
    LaunchError,
    ObjectReleased,
    OptionsError,
    ProcessIsolator,
    ProtocolError,
    RemoteError,
    RestartPolicy,
    SerializationError,
)
from pisupervisor.events import Event
from pisupervisor.supervise.aio_link import LoopLink
from pisupervisor.supervise.keeper import Keeper
from pisupervisor.worker import Line

pytestmark = linux

PLUGIN = """
    import pihost

    class Counter:
        def __init__(self, value=0):
            self.value = value

        def add(self, n=1):
            self.value += n
            return self.value

        def upto(self, n):
            yield from range(n)

        def _secret(self):
            return "private"

    def double(x):
        return 2 * x

    def ask(name, *args):
        return pihost.call_host(name, *args)

    def count(n):
        yield from range(n)
        return "over"
"""


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with nothing_left():
        return asyncio.run(main())


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("aio"), "plugin.py", PLUGIN)


def test_the_same_names_and_parameters() -> None:
    plain = {name for name in dir(ProcessIsolator) if name[0] != "_"}
    awaited = {name for name in dir(AsyncProcessIsolator) if name[0] != "_"}
    assert plain - awaited <= {"id", "options"}
    assert awaited - plain <= {"id", "options"}
    for name in ("exit", "terminate", "abort", "wait_for_exit", "register_callback", "create"):
        assert [*inspect.signature(getattr(AsyncProcessIsolator, name)).parameters] == [
            *inspect.signature(getattr(ProcessIsolator, name)).parameters
        ]


def test_created_in_every_way() -> None:
    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            assert await isolator.invoke(len, "abc") == 3
        with pytest.raises(IsolatorClosed):
            await isolator.invoke(len, "abc")
        isolator = await asyncio.create_task(AsyncProcessIsolator.create())
        await isolator.close()
        isolator = await asyncio.wait_for(AsyncProcessIsolator.create(), 30)
        await isolator.close()
        with pytest.raises(OptionsError):
            async with AsyncProcessIsolator.create(network="nonsense"):
                pass

    with nothing_left():
        asyncio.run(main())


def test_what_is_no_path_and_no_name_is_told_as_by_the_plain_class(plugin: Path) -> None:
    async def main() -> None:
        wrong: Any = ["x"]
        async with AsyncProcessIsolator.create() as isolator:
            for call in (isolator.invoke_method(wrong, "f"), isolator.invoke_method(plugin, wrong)):
                with pytest.raises(OptionsError, match=r"a path or a module name|no dotted name"):
                    await call
            counter = await isolator.create_object(plugin, "Counter", 5)
            for name in ("value", "_value"):
                with pytest.raises(AttributeError, match="setattr"):
                    setattr(counter, name, 6)
            with pytest.raises(OptionsError, match="expected the name of a method"):
                await counter.invoke(wrong)
            assert await counter.add() == 6

    with nothing_left():
        asyncio.run(main())


def test_calls_of_all_kinds(plugin: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            assert await isolator.invoke_method(plugin, "double", 21) == 42
            assert await isolator.invoke(lambda: "closure") == "closure"
            shown = await isolator.execute(lambda: print("hello"))
            assert shown.stdout == "hello\n"
            assert (await isolator.run_source("6 * 7")).value == 42
            assert (await isolator.run_script(write(tmp_path, "tool.py", "import sys; sys.exit(3)"))).exit_code == 3
            counter = await isolator.create_object(plugin, "Counter", 5)
            assert [await counter.add(), await counter.invoke("add", n=10)] == [6, 16]
            assert (await isolator.invoke(counter.add, 0), await asyncio.create_task(counter.add(0))) == (16, 16)
            assert (await counter._secret(), hasattr(counter, "__len__")) == ("private", False)
            assert await isolator.invoke(lambda c: c.value, counter) == 16
            assert [n async for n in await counter.upto(3)] == [0, 1, 2]
            add = await isolator.get_method(plugin, "Counter.add")
            assert (await add.invoke(counter), await add()) == (17, 1)
            async with await isolator.copy_object([1, 2]) as copied:
                assert await copied.invoke("__len__") == 2
            assert await isolator.object_count() == 1
            assert (await isolator.resource_usage()).pids == 2
            assert (isolator.state, len(isolator.pids())) == ("ready", 2)
            assert isolator.applied["seccomp"].holds
            isolator.set_data("a", 1)
            assert isolator.get_data("a") == 1

    run(main)


def test_what_is_done_at_once_can_be_awaited_too(plugin: Path) -> None:
    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            await isolator.register_callback("double", lambda x: 2 * x)
            assert await isolator.invoke_method(plugin, "ask", "double", 21) == 42
            await isolator.unregister_callback("double")
            await isolator.set_data("a", 1)
            assert (isolator.get_data("a"), await isolator.pids()) == (1, isolator.pids())
            counter = await isolator.create_object(plugin, "Counter", 5)
            await counter.release()
            with pytest.raises(ObjectReleased):
                await counter.add()

    run(main)


def test_submitted_calls_are_tasks(plugin: Path) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            assert await isolator.submit(pow, 2, 10) == 1024
            calls = [isolator.submit(pow, 2, n) for n in range(5)]
            assert await asyncio.gather(*calls) == [1, 2, 4, 8, 16]
            called = isolator.submit_call(isolator.invoke_method, plugin, "double", 21)
            assert (await called, called.result()) == (42, 42)
            with pytest.raises(ZeroDivisionError):
                await isolator.submit(lambda: 1 / 0)
            pid, call = isolator.pid, isolator.submit(time.sleep, 1000)
            await asyncio.sleep(0.1)
            assert call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await isolator.submit(len, "abc") == 3
            assert isolator.pid != pid, "the work was killed"
        with pytest.raises(IsolatorClosed):
            isolator.submit(len, "abc")

    run(main)


def test_submit_call_runs_nothing_here(plugin: Path) -> None:
    ran: list[int] = []

    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            with pytest.raises(OptionsError, match="submit_call"):
                isolator.submit_call(ran.append, 1)  # type: ignore[arg-type]
            counter, double = (
                await isolator.create_object(plugin, "Counter"),
                await isolator.get_method(plugin, "double"),
            )
            assert await isolator.submit_call(counter.add, 2) == 2
            assert await isolator.submit_call(counter.invoke, "add", 2) == 4
            assert await isolator.submit_call(double, 2) == 4

    run(main)
    assert ran == []


def test_streams(plugin: Path) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            stream = await isolator.invoke_method(plugin, "count", 4)
            async with stream:
                assert [n async for n in stream] == [0, 1, 2, 3]
            assert stream.value == "over"

    run(main)


def test_streams_of_captured_calls_are_awaited_too(plugin: Path) -> None:
    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            shown = await isolator.execute(f"{plugin}:count", 3)
            assert [n async for n in shown.value] == [0, 1, 2]
            shown = await isolator.run_source("(n for n in range(3))")
            assert [n async for n in shown.value] == [0, 1, 2]

    run(main)


def test_handles_are_no_more_to_be_copied_or_sent_than_plain_ones(plugin: Path) -> None:
    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            counter = await isolator.create_object(plugin, "Counter", 5)
            for a_copy in (copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="a handle cannot be copied"):
                    a_copy(counter)
            double = await isolator.get_method(plugin, "double")
            with pytest.raises(SerializationError, match="map and execute take the text"):
                await isolator.invoke(double, 3)
            assert f"of isolator {isolator.id}>" in repr(counter)
            assert repr(double) == f"<AsyncIsolatedMethod {plugin}:double of isolator {isolator.id}>"

    run(main)


def test_coroutine_functions_as_handlers_run_in_the_loop() -> None:
    """parity: 36"""
    seen: list[tuple[str, bool]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def handler(event: Event) -> None:
            await asyncio.sleep(0.01)
            seen.append((event.kind, asyncio.get_running_loop() is loop))

        events = IsolationEvents(started=handler, stdout=handler, exited=handler)
        async with AsyncProcessIsolator.create(events=events) as isolator:
            await isolator.invoke(os.write, 1, b"a line\n")
            while len(seen) < 2:
                await asyncio.sleep(0.01)

    run(main)
    assert seen == [("started", True), ("stdout", True), ("exited", True)]


def test_a_handler_in_the_loop_may_close_its_isolator() -> None:
    async def main() -> float:
        closed = asyncio.Event()

        async def handler(event: Event) -> None:
            await isolator.close()
            closed.set()

        isolator = await AsyncProcessIsolator.create(events=IsolationEvents(exit_with_error=handler))
        with pytest.raises(ChildTerminated):
            await isolator.invoke(os._exit, 3)
        started = time.monotonic()
        await closed.wait()
        return time.monotonic() - started

    assert run(main) < 4


def test_one_loop_after_another(plugin: Path) -> None:
    """A program of several ``asyncio.run``, as scripts and notebooks have them."""

    async def call(isolator: AsyncProcessIsolator) -> None:
        for _ in range(3):  # the second one is made by the loop itself
            assert await isolator.invoke_method(plugin, "double", 21) == 42

    with nothing_left():
        loop = asyncio.new_event_loop()

        async def create() -> AsyncProcessIsolator:
            return await AsyncProcessIsolator.create()

        isolator = asyncio.run(create())
        asyncio.run(call(isolator))
        loop.run_until_complete(call(isolator))
        asyncio.run(call(isolator))
        loop.run_until_complete(call(isolator))
        loop.close()
        asyncio.run(isolator.close())


REQUEST: ContextVar[str] = ContextVar("REQUEST", default="none")


def test_callbacks_see_the_context_of_the_task_that_called(plugin: Path) -> None:
    async def answer(_x: int) -> str:
        return REQUEST.get()

    async def call(isolator: AsyncProcessIsolator, name: str, request: str) -> None:
        REQUEST.set(request)
        for _ in range(3):
            assert await isolator.invoke_method(plugin, "ask", name, 1) == request

    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            isolator.register_callback("awaited", answer)
            isolator.register_callback("plain", lambda _x: REQUEST.get())
            for name in ("awaited", "plain"):
                await asyncio.gather(*[call(isolator, name, f"request {number}") for number in range(3)])
        assert REQUEST.get() == "none"

    run(main)


class Answers:
    async def __call__(self, x: int) -> int:
        await asyncio.sleep(0)
        return x + 3


def test_callbacks_run_in_the_loop(plugin: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def answer(x: int) -> int:
            await asyncio.sleep(0.01)
            assert asyncio.get_running_loop() is loop
            return x + 1

        async with await AsyncProcessIsolator.create() as isolator:
            isolator.register_callback("answer", answer)
            isolator.register_callback("plain", lambda x: x + 2)
            isolator.register_callback("object", Answers())
            assert await isolator.invoke_method(plugin, "ask", "object", 1) == 4
            assert await isolator.invoke_method(plugin, "ask", "answer", 1) == 2
            assert await isolator.invoke_method(plugin, "ask", "plain", 1) == 3
            isolator.unregister_callback("plain")

    run(main)


@pytest.mark.parametrize("end", ["timeout", "cancel", "death"])
def test_a_callback_that_never_ends_does_not_outlive_its_call(plugin: Path, end: str) -> None:
    """A deadline is one whatever the call waits for; the coroutine that nobody waits for any more is cancelled."""

    async def main() -> list[str]:
        seen: list[str] = []

        async def wait() -> None:
            seen.append("begun")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        async with await AsyncProcessIsolator.create() as isolator:
            isolator.register_callback("wait", wait)
            limit = 0.3 if end == "timeout" else None
            call = asyncio.create_task(isolator.invoke_method(plugin, "ask", "wait", timeout=limit))
            while not seen:
                await asyncio.sleep(0.01)
            if end == "cancel":
                call.cancel()
            if end == "death":
                os.kill(isolator.pid or 0, signal.SIGKILL)
            errors = {"timeout": CallTimeout, "cancel": asyncio.CancelledError, "death": ChildTerminated}
            with pytest.raises(errors[end]):
                await asyncio.wait_for(asyncio.shield(call), 5)
            assert await asyncio.wait_for(isolator.invoke_method(plugin, "double", 2), 5) == 4
        return seen

    with nothing_left():
        assert run(main) == ["begun", "cancelled"]


@pytest.mark.parametrize("at_once", [1, 3])
def test_calls_that_a_callback_makes_at_once_come_in_turn(plugin: Path, at_once: int) -> None:
    """One thread speaks with the child, whether the callback awaits all of them or not."""

    async def main() -> None:
        async with AsyncProcessIsolator.create(max_concurrency=at_once) as isolator:
            left: list[asyncio.Task[Any]] = []

            async def gather(n: int) -> list[Any]:
                calls = (isolator.invoke_method(plugin, "double", x) for x in range(n))
                shown, *doubled = await asyncio.gather(isolator.execute(print, "shown"), *calls)
                return [shown.stdout, *doubled]

            async def leave() -> str:
                left.append(asyncio.create_task(isolator.invoke(time.sleep, 0.1)))
                return "left"

            isolator.register_callback("gather", gather)
            isolator.register_callback("leave", leave)
            for _ in range(3):
                answers = asyncio.gather(*(isolator.invoke_method(plugin, "ask", "gather", n) for n in (3, 5)))
                assert await asyncio.wait_for(answers, 20) == [["shown\n", 0, 2, 4], ["shown\n", 0, 2, 4, 6, 8]]
                assert await asyncio.wait_for(isolator.invoke_method(plugin, "ask", "leave"), 20) == "left"
            assert await asyncio.gather(*left) == [None] * 3

    run(main)


def test_cancelling_a_call_of_a_callback_kills_its_work(plugin: Path) -> None:
    async def main() -> None:
        async with AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:

            async def give_up() -> None:
                await asyncio.wait_for(isolator.invoke(time.sleep, 30), 0.2)

            isolator.register_callback("give up", give_up)
            with pytest.raises(ChildTerminated):
                await asyncio.wait_for(isolator.invoke_method(plugin, "ask", "give up"), 10)
            assert await isolator.invoke_method(plugin, "double", 2) == 4

    run(main)


def test_a_close_goes_on_whoever_waits_for_it() -> None:
    async def main() -> None:
        for rounds in range(1, 8):
            isolator = await AsyncProcessIsolator.create()
            closing = asyncio.create_task(isolator.close())
            for _ in range(rounds):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            assert await asyncio.to_thread(wait_until, lambda made=isolator: made.state == "stopped", 5.0)
            await isolator.close()

    run(main)


def test_the_loop_goes_on() -> None:
    async def main() -> int:
        ticks = 0
        async with await AsyncProcessIsolator.create() as isolator:
            call = asyncio.ensure_future(isolator.invoke(time.sleep, 0.5))
            while not call.done():
                await asyncio.sleep(0.01)
                ticks += 1
        return ticks

    assert run(main) > 20


def test_cancelling_a_task_kills_its_work() -> None:
    """parity: 72"""

    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            pid = isolator.pid or 0
            task = asyncio.ensure_future(isolator.invoke(_spin_with_family))
            await asyncio.sleep(0.2)
            family = isolator.pids()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert wait_until(lambda: not any(state_of(each) not in ("", "Z") for each in [pid, *family]), 2)
            assert await isolator.invoke(len, "abc") == 3

    run(main)


def _spin_with_family() -> None:
    import os

    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
    while True:
        pass


def test_cancelled_while_it_waits_for_its_turn() -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            first = asyncio.ensure_future(isolator.invoke(time.sleep, 0.3))
            second = asyncio.ensure_future(isolator.invoke(time.sleep, 1000))
            await asyncio.sleep(0.1)
            second.cancel()
            assert await first is None
            assert await isolator.invoke(len, "abc") == 3

    run(main)


@pytest.mark.parametrize("form", ["invoke", "method", "object", "execute", "stream"])
def test_the_time_that_a_call_waits_is_its_own(plugin: Path, form: str) -> None:
    """As with the plain class. It waited as long as others took, and then had all of its time."""

    async def main() -> None:
        async with AsyncProcessIsolator.create(call_timeout=0.2) as isolator:
            counter = await isolator.create_object(plugin, "Counter")
            double, stream = await isolator.get_method(plugin, "double"), await isolator.invoke(iter_three)
            forms: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                "invoke": lambda: isolator.invoke(len, "abc"),
                "method": lambda: double(3),
                "object": lambda: counter.add(),
                "execute": lambda: isolator.execute(len, "abc"),
                "stream": lambda: stream.__anext__(),
            }
            long = isolator.submit(time.sleep, 1, timeout=5)
            await asyncio.sleep(0.1)
            began, pid = time.monotonic(), isolator.pid
            with pytest.raises(CallTimeout, match="this one was not started"):
                await forms[form]()
            assert time.monotonic() - began < 0.7
            await long
            assert isolator.pid == pid  # it was taken back, and killed nobody

    run(main)


def iter_three() -> Generator[int, None, None]:
    yield from range(3)


def test_what_is_left_of_a_call_that_waited_is_all_it_has() -> None:
    async def main() -> None:
        async with AsyncProcessIsolator.create() as isolator:
            long = isolator.submit(time.sleep, 0.5)
            await asyncio.sleep(0.1)
            began = time.monotonic()
            with pytest.raises(CallTimeout, match="still running"):
                await isolator.invoke(time.sleep, 5, timeout=0.8)
            assert time.monotonic() - began < 1.1
            await long

    run(main)


def test_wait_for_a_timeout_kills() -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(isolator.invoke(time.sleep, 1000), 0.2)
            with pytest.raises(CallTimeout):
                await isolator.invoke(time.sleep, 1000, timeout=0.2)
            assert await isolator.invoke(len, "abc") == 3

    run(main)


def test_ends_and_pauses_do_not_stand_behind_a_call() -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            call = asyncio.ensure_future(isolator.invoke(time.sleep, 1000))
            await asyncio.sleep(0.1)
            await isolator.pause()
            assert isolator.state == "paused"
            await isolator.resume()
            assert await isolator.terminate()
            with pytest.raises(ChildTerminated):
                await call
            await isolator.restart()
            assert await isolator.abort("why not")
            assert await isolator.invoke(len, "abc") == 3
            waiter = asyncio.ensure_future(isolator.wait_for_exit())
            await asyncio.sleep(0.1)
            assert (await isolator.exit("bye")).message == "bye"
            assert (await waiter).reason is ExitReason.EXITED

    run(main)


def test_many_at_once() -> None:
    async def one(number: int) -> int:
        async with await AsyncProcessIsolator.create() as isolator:
            return sum(await asyncio.gather(*(isolator.invoke(pow, number, each) for each in range(5))))

    async def main() -> list[int]:
        return await asyncio.gather(*(one(number) for number in range(1, 5)))

    assert run(main) == [sum(number**each for each in range(5)) for number in range(1, 5)]


def test_closed_is_closed() -> None:
    async def main() -> None:
        isolator = await AsyncProcessIsolator.create()
        call = asyncio.ensure_future(isolator.invoke(time.sleep, 1000))
        await asyncio.sleep(0.1)
        await isolator.close()
        await isolator.close()
        with pytest.raises((ChildTerminated, IsolatorClosed)):
            await call
        for act in (isolator.invoke(len, "abc"), isolator.pause(), isolator.run_source("1")):
            with pytest.raises(IsolatorClosed):
                await act

    run(main)


def test_a_launch_that_fails_leaves_no_thread() -> None:
    async def main() -> None:
        with pytest.raises(LaunchError):
            await AsyncProcessIsolator.create(on_start=lambda: 1 / 0)

    run(main)


def test_a_create_that_is_cancelled_leaves_nothing() -> None:
    async def main() -> None:
        task = asyncio.ensure_future(AsyncProcessIsolator.create(on_start=lambda: time.sleep(0.5)))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(1.0)

    run(main)


# --- calls that the loop makes itself: those made before ----------------------------------------------------------


def test_a_warm_call_is_made_by_the_loop(plugin: Path) -> None:
    """No thread has anything to do with it: none is there to be woken."""

    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            double = await isolator.get_method(plugin, "double")
            assert await double(1) == 2
            isolator._calls.end()
            assert [await double(n) for n in range(50)] == [2 * n for n in range(50)]
            assert isolator.state == "ready"

    run(main)


def test_streams_and_built_results_are_the_loops_too(plugin: Path) -> None:
    """No thread is there for them either."""

    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            count, double = await isolator.get_method(plugin, "count"), await isolator.get_method(plugin, "double")
            counter = await isolator.create_object(plugin, "Counter", 5)
            for last in (3, 40):
                stream = await count(last)
                assert [n async for n in stream] == list(range(last))
                assert stream.value == "over"
                assert isinstance(await double(2, returns=float), float)
                assert [n async for n in await count(3, returns=Generator[float, None, str])] == [0.0, 1.0, 2.0]
                assert await counter.add(1, returns=int) > 5
                with pytest.raises(SerializationError):
                    await double(1, returns=str)
                with pytest.raises(SerializationError, match="Iterator"):
                    await count(1, returns=list[int])
                isolator._calls.end()
            async for n in await count(1000):
                if n == 10:
                    break
            assert isolator.state == "ready"

    run(main)


def test_a_stream_whose_child_lies_is_no_stream(plugin: Path) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            stream = await isolator.invoke_method(plugin, "count", 10)
            assert [await anext(stream), await anext(stream)] == [0, 1]
            await isolator.invoke(_lie_about_items)
            with pytest.raises(ProtocolError, match="none to such a call"):
                await anext(stream)
            assert [n async for n in stream] == []

    run(main)


def _lie_about_items() -> None:
    from pihost.inside import serve

    serve.VERBS["next"] = lambda *_: [1, 2, 3]


def test_two_tasks_that_wait_and_one_is_cancelled(plugin: Path) -> None:
    """The one whose call is under way; the other's is made on the next child."""

    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            await isolator.invoke(time.sleep, 0)
            first = asyncio.ensure_future(isolator.invoke(time.sleep, 1000))
            second = asyncio.ensure_future(isolator.invoke(pow, 2, 5))
            await asyncio.sleep(0.2)
            first.cancel()
            assert await second == 32
            assert first.cancelled()

    run(main)


def test_a_warm_call_within_a_timeout_of_asyncio() -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            await isolator.invoke(time.sleep, 0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(isolator.invoke(time.sleep, 1000), 0.2)
            assert await asyncio.wait_for(isolator.invoke(pow, 2, 5), 20) == 32

    run(main)


def test_warm_calls_of_all_kinds_of_ends(plugin: Path) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            assert await isolator.invoke(len, "abc") == 3
            assert await isolator.invoke(len, "abcd") == 4
            with pytest.raises(RemoteError, match="no len"):
                await isolator.invoke(len, 5)
            assert len(await isolator.invoke(str.__mul__, "x", 3 << 20)) == 3 << 20
            assert await isolator.invoke(lambda: {"a": (1, 2), "b": b"x" * 1000}) == {"a": (1, 2), "b": b"x" * 1000}
            assert [n async for n in await isolator.invoke(lambda: (n for n in range(3)))] == [0, 1, 2]
            assert await isolator.invoke(len, "abc", returns=int) == 3
            with pytest.raises(ChildTerminated):
                await isolator.invoke(_exit)
            assert await isolator.invoke(len, "abc") == 3
            os.kill(isolator.pid or 0, signal.SIGKILL)
            assert wait_until(lambda: isolator.state == "backoff")
            assert await isolator.invoke(len, "abc") == 3

    run(main)


def _exit() -> None:
    import os

    os._exit(3)


@pytest.mark.alone
@pytest.mark.parametrize("limit", [0.3, 1.7])
def test_a_warm_call_that_takes_too_long(limit: float) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            await isolator.invoke(time.sleep, 0)
            started = time.monotonic()
            with pytest.raises(CallTimeout):
                await isolator.invoke(time.sleep, 1000, timeout=limit)
            assert limit <= time.monotonic() - started < limit + 1
            assert await isolator.invoke(len, "abc") == 3

    run(main)


def test_a_warm_call_that_takes_its_time() -> None:
    """After a second a thread waits for it, and the loop reads no more."""

    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            await isolator.invoke(time.sleep, 0)
            assert await isolator.invoke(time.sleep, 2.5) is None
            assert await isolator.invoke(len, "abc") == 3
            await asyncio.sleep(2.5)
            assert await isolator.invoke(len, "abc") == 3

    run(main)


@pytest.mark.parametrize("after", [0.2, 1.6])
def test_cancelling_a_warm_call_kills_its_work(after: float) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            await isolator.invoke(time.sleep, 0)
            pid = isolator.pid or 0
            task = asyncio.ensure_future(isolator.invoke(time.sleep, 1000))
            await asyncio.sleep(after)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert wait_until(lambda: state_of(pid) in ("", "Z"), 2)
            assert await isolator.invoke(len, "abc") == 3

    run(main)


@pytest.mark.parametrize("after", [0, 1.6])
def test_a_warm_call_whose_coroutine_is_closed_gives_its_turn_back(after: float) -> None:
    """At once, and when a thread has gone on with it."""

    async def main() -> None:
        async with await AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            await isolator.invoke(time.sleep, 0)
            pid = isolator.pid or 0
            call = isolator.invoke(time.sleep, 1000)
            waits_for = call.send(None)
            if after:
                waits_for.add_done_callback(lambda _reply: call.send(None))
                await asyncio.sleep(after)
            call.close()
            assert await asyncio.wait_for(isolator.invoke(len, "abc"), 5) == 3
            assert isolator.pid != pid

    run(main)


@pytest.mark.parametrize("error", [KeyError, TimeoutError])
def test_interrupted_when_a_warm_call_had_just_ended(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """As by a signal's handler: nothing is ended twice, and the child lives on."""
    honest = Keeper.end_at_once

    def end(*args: Any) -> None:
        honest(*args)
        raise error("by a handler")

    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            await isolator.invoke(len, "abc")
            pid = isolator.pid
            with monkeypatch.context() as patch:
                patch.setattr(Keeper, "end_at_once", end)
                with pytest.raises(error, match="by a handler"):
                    await isolator.invoke(len, "abc")
            assert (await isolator.invoke(len, "abcd"), isolator.pid) == (4, pid)

    run(main)


def test_a_loop_that_cannot_read_a_link_costs_no_descriptor() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    with ProcessIsolator.create() as isolator:
        connection = isolator._keeper.connection
        assert connection is not None
        before = open_fds()
        with pytest.raises(RuntimeError, match="closed"):
            LoopLink(connection, loop)
        assert open_fds() == before


def test_many_warm_calls_at_once_come_in_order() -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            await isolator.invoke(pow, 1, 1)
            assert await asyncio.gather(*(isolator.invoke(pow, 2, n) for n in range(30))) == [2**n for n in range(30)]

    run(main)


def test_callbacks_that_call(plugin: Path) -> None:
    """Host, child, host, child, and so on: a coroutine that answers may await calls."""

    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:

            async def down(n: int) -> int:
                return 0 if n == 0 else 1 + int(await isolator.invoke_method(plugin, "ask", "down", n - 1))

            isolator.register_callback("down", down)
            assert await isolator.invoke_method(plugin, "ask", "down", 4) == 4
            assert await isolator.invoke_method(plugin, "ask", "down", 3) == 3

    run(main)


@pytest.mark.alone
def test_side_by_side() -> None:
    """parity: 19"""

    async def main() -> None:
        async with await AsyncProcessIsolator.create(max_concurrency=3) as isolator:
            await isolator.invoke(time.sleep, 0)
            started = time.monotonic()
            await asyncio.gather(*(isolator.invoke(time.sleep, 0.5) for _ in range(3)))
            assert time.monotonic() - started < 1.2

    run(main)


@pytest.mark.parametrize(
    ("function", "items", "keywords", "error"),
    [
        (5, [1], {}, OptionsError), ("no target", [1], {}, OptionsError), ("a.py:1x", [1], {}, OptionsError),
        (abs, [1], {"timeout": -1}, OptionsError), (abs, [1], {"in_flight": 0}, OptionsError),
        (abs, [1], {"returns": 5}, OptionsError), (abs, 5, {}, TypeError), (abs, [1], {"tiemout": 1}, TypeError),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_told_at_once(
    function: Any, items: Any, keywords: Any, error: type[Exception]
) -> None:
    """As by the plain class, and in the same words."""

    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            told = []
            for each in (isolator, isolator._isolator):
                with pytest.raises(error) as caught:
                    each.map(function, items, **keywords)
                told.append(str(caught.value))
            assert told[0].removeprefix("Async") == told[1]

    run(main)


def test_what_takes_time_of_a_map_is_told_with_its_first_item(tmp_path: Path) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            with open(tmp_path / "open", "w") as file:
                for function, error in ((lambda _: file, SerializationError), (f"{tmp_path}/gone.py:f", OptionsError)):
                    results = isolator.map(function, [1])
                    with pytest.raises(error):
                        await anext(results)

    run(main)


def test_map(plugin: Path) -> None:
    async def main() -> None:
        async with await AsyncProcessIsolator.create() as isolator:
            assert [x async for x in isolator.map(f"{plugin}:double", range(1000))] == [2 * n for n in range(1000)]
            async with isolator.map(lambda n: 6 // (2 - n), range(5)) as results:
                assert [await anext(results), await anext(results)] == [3, 6]
                with pytest.raises(RemoteError):
                    await anext(results)
                assert [x async for x in results] == []
            pairs = [(x, await isolator.invoke(len, "x" * x)) async for x in isolator.map(abs, range(20))]
            assert pairs == [(n, n) for n in range(20)]

    run(main)


def test_what_is_forgotten_leaves_nothing_behind(plugin: Path) -> None:
    async def main() -> None:
        isolator = await AsyncProcessIsolator.create()
        for _ in range(3):
            assert await isolator.invoke_method(plugin, "double", 21) == 42
        await isolator.resource_usage()  # by a thread of another kind

    with nothing_left():
        before = open_fds()
        asyncio.run(main())
        gc.collect()
        assert wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("pisupervisor")])
        assert wait_until(lambda: open_fds() == before)


def test_a_fork_that_forgets_an_isolator_takes_nothing_from_the_loop(plugin: Path) -> None:
    """They have one epoll in common: what the fork took out of it was missed here, a call took two seconds."""

    async def create() -> AsyncProcessIsolator:
        isolator = await AsyncProcessIsolator.create()
        for _ in range(3):
            assert await isolator.invoke_method(plugin, "double", 21) == 42
        return isolator

    with asyncio.Runner() as runner:
        isolator = runner.run(create())
        assert in_fork(isolator.__del__) == "None"
        started = time.monotonic()
        assert runner.run(isolator.invoke_method(plugin, "double", 21)) == 42
        assert time.monotonic() - started < 0.9
        runner.run(isolator.close())


def test_a_call_that_is_cancelled_while_its_thread_is_waited_for_gives_its_turn_back(tmp_path: Path) -> None:
    """The loop has begun it; what comes of it is for a thread, which is busy. All later calls waited for ever."""
    path = write(tmp_path, "plugin.py", "def some(n):\n    return bytes(n)\n")
    busy = threading.Event()

    async def main() -> Any:
        async with AsyncProcessIsolator.create(restart=RestartPolicy(backoff=0.0)) as isolator:
            await isolator.invoke_method(path, "some", 1)
            isolator._rest = Line("rest", None, 1)
            isolator._rest.add(busy.wait, (), {})
            task = isolator.submit_call(isolator.invoke_method, path, "some", 5000)
            await asyncio.sleep(0.3)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            busy.set()
            return await asyncio.wait_for(isolator.invoke_method(path, "some", 3), 20)

    assert asyncio.run(main()) == bytes(3)


def test_a_create_that_nobody_awaited_is_told_about_it() -> None:
    creating = AsyncProcessIsolator.create()
    with pytest.raises(
        AttributeError, match="no 'invoke' yet: the isolator is still to be made, by await or async with"
    ):
        creating.invoke(len, "abc")  # type: ignore[attr-defined]
    creating.close()
