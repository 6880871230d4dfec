"""What a call returns besides values: coroutines, which are run to their end, and generators, which give one item a call.

Of asyncio nothing is imported before it is needed: that takes a child 40 ms.
"""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


async def _coroutine() -> None: ...


async def _async_generator() -> Any:
    yield


_probe = _coroutine()
_COROUTINE, _GENERATOR, _ASYNC_GENERATOR = type(_probe), type(_ for _ in ()), type(_async_generator())
_probe.close()


class Stream:
    """An async generator and the loop in which it has begun."""

    def __init__(self, generator: Any, loop: Loop) -> None:
        self.generator, self.loop = generator, loop


class Loop:
    """The event loop of one thread that runs calls: the one of this child, or where calls run side by side, one for each.
    It runs only while a call does; what a call leaves pending waits for the next.
    """

    def __init__(self) -> None:
        self._loop: Any = None
        self._running = _thread.allocate_lock()
        self._runner = 0  # the thread that has it run

    def bound(self, generator: Any) -> Any:
        """What is to be kept of a generator."""
        return Stream(generator, self) if type(generator) is _ASYNC_GENERATOR else generator

    def complete(self, value: Any) -> Any:
        """The result of a coroutine; anything else as it is."""
        return self._run(value) if type(value) is _COROUTINE else value

    def next_of(self, generator: Any) -> list[Any]:
        """[whether it is over, its next item or what it returned]."""
        try:
            if type(generator) is Stream:
                return [False, generator.loop._run(_step(generator.generator))]
            return [False, next(generator)]
        except StopIteration as stop:
            return [True, stop.value]
        except StopAsyncIteration:
            return [True, None]

    def end(self, value: Any) -> None:
        """Of an async generator: its ``finally`` runs now. Others end by themselves when nobody holds them."""
        if type(value) is not Stream or value.loop._runner == _thread.get_ident():
            return  # one that waits for the host at this moment closes what is forgotten by itself
        if value.loop._loop is not None and not value.loop._loop.is_closed():
            value.loop._run(_close(value.generator))

    def _run(self, coroutine: Any) -> Any:
        if self._runner == _thread.get_ident():
            coroutine.close()
            raise RuntimeError("an async call is under way in this child already, and waits for the host")
        with self._running:  # a stream that another thread has begun may be asked for its next item in this one
            self._runner = _thread.get_ident()
            try:
                return self._run_here(coroutine)
            finally:
                self._runner = 0

    def _run_here(self, coroutine: Any) -> Any:
        if self._loop is None or self._loop.is_closed():
            import asyncio

            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(coroutine)

    def close(self) -> None:
        """At the end of the child: async generators are closed, as asyncio.run does."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


async def _step(generator: Any) -> Any:
    return await generator.__anext__()


async def _close(generator: Any) -> None:
    await generator.aclose()


def is_stream(value: Any) -> bool:
    return type(value) in (_GENERATOR, _ASYNC_GENERATOR)
