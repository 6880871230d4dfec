"""``AsyncProcessIsolator``: the surface of ``ProcessIsolator``, awaited.

Calls wait in a thread of their own, one after another as on the isolator itself; what ends or pauses a child goes by a
second one, so that it never stands behind a call. The event loop is never blocked, and cancelling a task that awaits a
call kills the work.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pisupervisor.isolator import ProcessIsolator
from pisupervisor.objects import IsolatedMethod, IsolatedObject, IsolatedStream
from pisupervisor.options import IsolationOptions
from pisupervisor.results import Applied, CallResult, ExitInfo, SystemCall, Usage
from pisupervisor.worker import Worker

if TYPE_CHECKING:
    from pisupervisor.supervise.lifecycle import State

_OVER = object()


class AsyncProcessIsolator:
    """One confined child and the calls into it, from coroutines of one event loop. Made by ``await create``.

    Methods, parameters and errors are those of ``ProcessIsolator``. Callbacks may be coroutine functions, which run in
    the loop; objects and streams are awaited, too.
    """

    def __init__(self, isolator: ProcessIsolator, calls: Worker) -> None:
        """Use ``create``."""
        self._isolator, self._calls = isolator, calls
        self._control: Worker | None = None

    @classmethod
    async def create(cls, options: IsolationOptions | None = None, **changes: Any) -> Self:
        """A new isolator whose child has every wall up. Raises what ``ProcessIsolator.create`` raises."""
        calls = Worker("pisupervisor-async")
        try:
            isolator = await _wait(calls, ProcessIsolator.create, options, **changes)
        except BaseException:
            calls.end()  # a child that comes too late is closed by the collector
            raise
        calls.session = isolator._session
        return cls(isolator, calls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- calls ------------------------------------------------------------------------------------------------

    async def invoke_method(self, path: str | os.PathLike[str], target: str, /, *args: Any, **keywords: Any) -> Any:
        """See ``ProcessIsolator.invoke_method``."""
        return self._awaited(await self._call(self._isolator.invoke_method, path, target, *args, **keywords))

    async def invoke(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        """See ``ProcessIsolator.invoke``. Of a generator the caller gets a stream for ``async for``."""
        return self._awaited(await self._call(self._isolator.invoke, function, *args, **keywords))

    async def execute(self, function: Callable[..., Any] | str, /, *args: Any, **keywords: Any) -> CallResult:
        """See ``ProcessIsolator.execute``."""
        result: CallResult = await self._call(self._isolator.execute, function, *args, **keywords)
        return result

    async def run_source(self, source: str, **keywords: Any) -> CallResult:
        """See ``ProcessIsolator.run_source``."""
        result: CallResult = await self._call(self._isolator.run_source, source, **keywords)
        return result

    async def run_script(self, path: str | os.PathLike[str], argv: Any = (), **keywords: Any) -> ExitInfo:
        """See ``ProcessIsolator.run_script``."""
        info: ExitInfo = await self._call(self._isolator.run_script, path, argv, **keywords)
        return info

    async def create_object(self, code: Any, /, *args: Any, **keywords: Any) -> AsyncIsolatedObject:
        """See ``ProcessIsolator.create_object``; methods of the handle are awaited."""
        return AsyncIsolatedObject(self, await self._call(self._isolator.create_object, code, *args, **keywords))

    async def copy_object(self, value: Any, *, timeout: float | None = None) -> AsyncIsolatedObject:
        """See ``ProcessIsolator.copy_object``."""
        return AsyncIsolatedObject(self, await self._call(self._isolator.copy_object, value, timeout=timeout))

    async def get_method(self, path: str | os.PathLike[str], target: str) -> AsyncIsolatedMethod:
        """See ``ProcessIsolator.get_method``."""
        return AsyncIsolatedMethod(self, await self._call(self._isolator.get_method, path, target))

    def register_callback(self, name: str, function: Callable[..., Any], *, expose_errors: bool = False) -> None:
        """See ``ProcessIsolator.register_callback``. A plain function runs in a thread, a coroutine function in the running
        loop.
        """
        if inspect.iscoroutinefunction(function):
            function = _in_loop(function, asyncio.get_running_loop())
        self._isolator.register_callback(name, function, expose_errors=expose_errors)

    def unregister_callback(self, name: str) -> None:
        """See ``ProcessIsolator.unregister_callback``."""
        self._isolator.unregister_callback(name)

    def shared_array(self, shape: int | Sequence[int], dtype: Any = "float64") -> Any:
        """See ``ProcessIsolator.shared_array``."""
        return self._isolator.shared_array(shape, dtype)

    # --- life -------------------------------------------------------------------------------------------------

    async def exit(self, reason: str | None = None, timeout: float = 5.0) -> ExitInfo:
        """See ``ProcessIsolator.exit``."""
        info: ExitInfo = await self._act(self._isolator.exit, reason, timeout)
        return info

    async def terminate(self, grace: float = 1.0) -> bool:
        """See ``ProcessIsolator.terminate``."""
        return bool(await self._act(self._isolator.terminate, grace))

    async def abort(self, reason: str | None = None) -> bool:
        """See ``ProcessIsolator.abort``."""
        return bool(await self._act(self._isolator.abort, reason))

    async def restart(self) -> None:
        """See ``ProcessIsolator.restart``."""
        await self._act(self._isolator.restart)

    async def pause(self) -> None:
        """See ``ProcessIsolator.pause``."""
        await self._act(self._isolator.pause)

    async def resume(self) -> None:
        """See ``ProcessIsolator.resume``."""
        await self._act(self._isolator.resume)

    async def wait_for_exit(self, timeout: float | None = None) -> ExitInfo:
        """See ``ProcessIsolator.wait_for_exit``. Waits in a thread that is there for this alone."""
        waiter = Worker("pisupervisor-async-wait")
        try:
            info: ExitInfo = await _wait(waiter, self._isolator.wait_for_exit, timeout)
            return info
        finally:
            waiter.end()

    async def close(self) -> None:
        """See ``ProcessIsolator.close``. Ends its threads, too."""
        control, self._control = self._control or Worker("pisupervisor-async-control"), None
        try:
            await asyncio.shield(_wait(control, self._isolator.close))
        finally:
            control.end()
            self._calls.end()

    async def resource_usage(self) -> Usage:
        """See ``ProcessIsolator.resource_usage``."""
        usage: Usage = await self._act(self._isolator.resource_usage)
        return usage

    async def object_count(self) -> int:
        """See ``ProcessIsolator.object_count``."""
        return int(await self._call(self._isolator.object_count))

    def pids(self) -> list[int]:
        """See ``ProcessIsolator.pids``."""
        return self._isolator.pids()

    def system_calls(self) -> tuple[SystemCall, ...]:
        """See ``ProcessIsolator.system_calls``."""
        return self._isolator.system_calls()

    def set_data(self, name: str, value: Any) -> None:
        """See ``ProcessIsolator.set_data``."""
        self._isolator.set_data(name, value)

    def get_data(self, name: str) -> Any:
        """See ``ProcessIsolator.get_data``."""
        return self._isolator.get_data(name)

    @property
    def id(self) -> int:
        """The isolator's number."""
        return self._isolator.id

    @property
    def options(self) -> IsolationOptions:
        """What it was made with."""
        return self._isolator.options

    @property
    def pid(self) -> int | None:
        """See ``ProcessIsolator.pid``."""
        return self._isolator.pid

    @property
    def state(self) -> State:
        """See ``ProcessIsolator.state``."""
        return self._isolator.state

    @property
    def applied(self) -> Mapping[str, Applied]:
        """See ``ProcessIsolator.applied``."""
        return self._isolator.applied

    # --- waiting ----------------------------------------------------------------------------------------------

    async def _call(self, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        self._isolator._keeper.check_open()
        return await _wait(self._calls, method, *args, **keywords)

    async def _act(self, method: Callable[..., Any], /, *args: Any) -> Any:
        self._isolator._keeper.check_open()
        if self._control is None:
            self._control = Worker("pisupervisor-async-control")
        return await _wait(self._control, method, *args)

    def _awaited(self, value: Any) -> Any:
        return AsyncIsolatedStream(self, value) if isinstance(value, IsolatedStream) else value


class AsyncIsolatedObject:
    """An object in the child: ``await obj.add(2)``, or ``await obj.invoke("add", 2)``. See ``IsolatedObject``."""

    def __init__(self, isolator: AsyncProcessIsolator, handle: IsolatedObject) -> None:
        self._isolator, self._handle = isolator, handle

    async def invoke(self, name: str, /, *args: Any, **keywords: Any) -> Any:
        """See ``IsolatedObject.invoke``."""
        value = await self._isolator._call(self._handle.invoke, name, *args, **keywords)
        return self._isolator._awaited(value)

    def find_method(self, name: str) -> Callable[..., Any]:
        """See ``IsolatedObject.find_method``."""
        return functools.partial(self.invoke, name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{name!r}: call what is private with invoke({name!r}, ...)")
        return self.find_method(name)

    def release(self) -> None:
        """See ``IsolatedObject.release``."""
        self._handle.release()

    def __reduce__(self) -> Any:
        return self._handle.__reduce__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.release()


class AsyncIsolatedMethod:
    """See ``IsolatedMethod``."""

    def __init__(self, isolator: AsyncProcessIsolator, handle: IsolatedMethod) -> None:
        self._isolator, self._handle = isolator, handle

    async def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._isolator._awaited(await self._isolator._call(self._handle, *args, **keywords))

    async def invoke(self, obj: AsyncIsolatedObject, /, *args: Any, **keywords: Any) -> Any:
        """See ``IsolatedMethod.invoke``."""
        value = await self._isolator._call(self._handle.invoke, obj._handle, *args, **keywords)
        return self._isolator._awaited(value)


class AsyncIsolatedStream:
    """The items of a generator in the child, for ``async for``. See ``IsolatedStream``."""

    def __init__(self, isolator: AsyncProcessIsolator, stream: IsolatedStream) -> None:
        self._isolator, self._stream = isolator, stream

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        item = await self._isolator._call(next, self._stream, _OVER)
        if item is _OVER:
            raise StopAsyncIteration
        return item

    @property
    def value(self) -> Any:
        """What the generator returned at its end."""
        return self._stream.value

    async def aclose(self) -> None:
        """Let go of the generator, which ends it."""
        self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()


async def _wait(worker: Worker, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """In that thread. Cancelled: taken back if it waits, its work killed if it runs."""
    return await asyncio.wrap_future(worker.add(method, args, keywords))


def _in_loop(function: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(function(*args, **keywords), loop).result()

    return call
