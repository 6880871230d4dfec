"""Calls, maps, streams, objects and callbacks of every size at once, some of them ended or cancelled: each comes to its own
value, or to one of the errors for that, and none waits for ever. By other seeds: ``PIS_SEED=5 pytest tests/test_at_random.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import random
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import linux, nothing_left

from pisupervisor import (
    AsyncProcessIsolator,
    CallCancelled,
    CallTimeout,
    ChildTerminated,
    IsolationError,
    IsolatorClosed,
    Limits,
    ObjectReleased,
    ProcessIsolator,
    RestartPolicy,
)

pytestmark = linux
SEED = int(os.environ.get("PIS_SEED", "1"))
ENDED = (CallCancelled, CallTimeout, ChildTerminated, IsolatorClosed, ObjectReleased)
OPTIONS: dict[str, Any] = {
    "import_paths": [sysconfig.get_path("purelib")], "callback_rate": None, "callback_bytes": None,
    "limits": Limits(memory="1G", cpus=None), "restart": RestartPolicy(mode="always", max_restarts=10_000, backoff=0.0),
}  # fmt: skip


def work(seed: int) -> tuple[int, Any]:
    """In the child: asks for all kinds of things, and looks at what it gets."""
    import random

    import numpy as np

    import pihost

    chance, kept = random.Random(seed), []
    for _ in range(4):
        kind, size = chance.randrange(6), chance.choice([10, 1000, 70_000, 300_000])
        if kind == 0:
            got = pihost.call_host("array", size, seed)
            assert len(got) == size
            assert (got == seed).all()
            got[:] = 0
            kept.append(got)
        elif kind == 1:
            assert pihost.call_host("count", np.full(size, seed), seed) == size
        elif kind == 2:
            assert pihost.call_host("length", chr(97 + seed % 26) * (size * 8)) == size * 8
        elif kind == 3:
            assert pihost.call_host_raw("raw", bytes([seed]) * size) == bytes([seed]) * size
        elif kind == 4:
            with pihost.call_host("file", seed) as file:
                assert file.read() == str(seed)
        else:
            got = pihost.call_host("nested", size, seed)
            assert len(got) == size
            assert (got == seed + 1).all()
    assert all((array == 0).all() for array in kept)
    return seed, np.full(50_000, seed)


def stream(count: int) -> Iterator[Any]:
    import pihost

    for n in range(count):
        yield pihost.call_host("array", 5, n)


class Sum:
    def __init__(self) -> None:
        self.value = 0

    def add(self, n: int) -> int:
        import pihost

        self.value += n
        return int(pihost.call_host("array", 10, self.value).sum())


def file_of(seed: int) -> Any:
    file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it is the child's from now on
    file.write(str(seed))
    file.seek(0)
    return file


def check(answer: Any, seed: int) -> None:
    assert answer[0] == seed
    assert (answer[1] == seed).all()


# --- threads ---------------------------------------------------------------------------------------------------------------


def register(isolator: ProcessIsolator) -> None:
    isolator.register_callback("array", lambda size, seed: np.full(size, seed))
    isolator.register_callback("count", lambda array, seed: int((array == seed).sum()))
    isolator.register_callback("length", lambda text: len(text) if text == text[0] * len(text) else 0)
    isolator.register_callback("raw", lambda data: data)
    isolator.register_callback("file", file_of)
    isolator.register_callback("nested", lambda size, seed: isolator.invoke(lambda a: a + 1, np.full(size, seed)))


def one(isolator: ProcessIsolator, chance: random.Random) -> None:
    seed, kind = chance.randrange(1, 250), chance.randrange(10)
    if kind == 0:
        check(isolator.execute(work, seed).value, seed)
    elif kind == 1:
        with isolator.map(work, [seed] * chance.randrange(1, 5)) as results:
            check(next(results), seed)
    elif kind == 2:
        check(isolator.invoke(work, seed, timeout=chance.choice([0.05, 20.0])), seed)
    elif kind == 3:
        check(isolator.submit(work, seed).result(), seed)
    elif kind == 4:
        future = isolator.submit(work, seed)
        time.sleep(chance.random() * 0.05)
        future.cancel()
    elif kind == 5:
        assert [int(each[0]) for each in isolator.invoke(stream, 5)] == [0, 1, 2, 3, 4]
    elif kind == 6:
        with isolator.create_object(Sum) as total:
            assert (total.add(1), total.add(2)) == (10, 30)
    elif kind == 7:
        source = f"import pihost; pihost.call_host('nested', 100, {seed})"
        assert isolator.run_source(source).value[0] == seed + 1
    elif kind == 8 and chance.random() < 0.2:
        chance.choice([isolator.restart, lambda: isolator.terminate(0.1), isolator.abort])()
    elif kind == 9 and chance.random() < 0.2:
        with contextlib.suppress(IsolationError):  # there may be no child
            isolator.pause()
            isolator.resume()


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("zero_copy", [False, True])
def test_threads(at_once: int, zero_copy: bool) -> None:
    wrong: list[BaseException] = []

    def make(isolator: ProcessIsolator, number: int) -> None:
        chance = random.Random(SEED * 1000 + number)
        try:
            for _ in range(30):
                with contextlib.suppress(*ENDED):
                    one(isolator, chance)
        except BaseException as error:
            wrong.append(error)

    with (
        nothing_left(),
        ProcessIsolator.create(max_concurrency=at_once, zero_copy=zero_copy, **OPTIONS) as isolator,
    ):
        register(isolator)
        threads = [threading.Thread(target=make, args=(isolator, number), daemon=True) for number in range(5)]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + 60
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            faulthandler.dump_traceback(all_threads=True)
            pytest.fail("somebody waits for ever")
        assert not wrong, wrong


# --- tasks -----------------------------------------------------------------------------------------------------------------


def register_coroutines(isolator: AsyncProcessIsolator) -> None:
    async def array(size: int, seed: int) -> Any:
        await asyncio.sleep(0)
        return np.full(size, seed)

    async def nested(size: int, seed: int) -> Any:
        return await isolator.invoke(lambda a: a + 1, np.full(size, seed))

    isolator.register_callback("array", array)
    isolator.register_callback("nested", nested)
    isolator.register_callback("count", lambda array, seed: int((array == seed).sum()))
    isolator.register_callback("length", len)
    isolator.register_callback("raw", lambda data: data)
    isolator.register_callback("file", file_of)


async def one_awaited(isolator: AsyncProcessIsolator, chance: random.Random) -> None:
    seed, kind = chance.randrange(1, 250), chance.randrange(7)
    if kind == 0:
        check((await isolator.execute(work, seed)).value, seed)
    elif kind == 1:
        async with isolator.map(work, [seed] * chance.randrange(1, 4)) as results:
            check(await anext(results), seed)
    elif kind == 2:
        check(await isolator.invoke(work, seed, timeout=chance.choice([0.05, 20.0])), seed)
    elif kind == 3:
        assert [int(each[0]) async for each in await isolator.invoke(stream, 5)] == [0, 1, 2, 3, 4]
    elif kind == 4:
        task = isolator.submit(work, seed)
        await asyncio.sleep(chance.random() * 0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    elif kind == 5:
        assert await isolator.invoke_method("operator", "neg", seed) == -seed
    else:
        check(await isolator.invoke(work, seed), seed)


@pytest.mark.parametrize("at_once", [1, 3])
def test_tasks(at_once: int) -> None:
    async def make(isolator: AsyncProcessIsolator, number: int) -> None:
        chance = random.Random(SEED * 2000 + number)
        for _ in range(25):
            with contextlib.suppress(*ENDED):
                await one_awaited(isolator, chance)

    async def main() -> None:
        async with AsyncProcessIsolator.create(max_concurrency=at_once, **OPTIONS) as isolator:
            register_coroutines(isolator)
            await asyncio.wait_for(asyncio.gather(*(make(isolator, number) for number in range(5))), 60)

    with nothing_left():
        asyncio.run(main())
