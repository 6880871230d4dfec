"""What a call returns besides values: coroutines, which are run to their end, and generators, which give one item a call.

Of asyncio nothing is imported before it is needed: that takes a child 40 ms.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


async def _coroutine() -> None: ...


async def _async_generator() -> Any:
    yield


_probe = _coroutine()
_COROUTINE, _GENERATOR, _ASYNC_GENERATOR = type(_probe), type(_ for _ in ()), type(_async_generator())
_probe.close()


class Loop:
    """The one event loop of this child. It runs only while a call does; what a call leaves pending waits for the next."""

    def __init__(self) -> None:
        self._loop: Any = None

    def complete(self, value: Any) -> Any:
        """The result of a coroutine; anything else as it is."""
        return self._run(value) if type(value) is _COROUTINE else value

    def next_of(self, generator: Any) -> list[Any]:
        """[whether it is over, its next item or what it returned]."""
        try:
            if type(generator) is _ASYNC_GENERATOR:
                return [False, self._run(_step(generator))]
            return [False, next(generator)]
        except StopIteration as stop:
            return [True, stop.value]
        except StopAsyncIteration:
            return [True, None]

    def end(self, value: Any) -> None:
        """Of an async generator: its ``finally`` runs now. Others end by themselves when nobody holds them."""
        if type(value) is _ASYNC_GENERATOR and self._loop is not None and not self._loop.is_closed():
            self._loop.run_until_complete(value.aclose())

    def _run(self, coroutine: Any) -> Any:
        if self._loop is not None and self._loop.is_running():
            coroutine.close()
            raise RuntimeError("an async call is under way in this child already, and waits for the host")
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


def is_stream(value: Any) -> bool:
    return type(value) in (_GENERATOR, _ASYNC_GENERATOR)
