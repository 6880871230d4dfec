"""``AsyncProcessIsolator``: the surface of ``ProcessIsolator``, awaited.

The commonest call is made by the loop itself, which reads the answer when it is there. What takes longer, or is more than
plain values, goes on in a thread, as do all other calls; what ends or pauses a child (``aio_control``) goes by one of its
own, so that it never stands behind a call. The event loop is never blocked, and cancelling a task that awaits a call kills
the work.

What captures its output waits for three descriptors, and drains two to the last byte; results of a ``map`` come by the dozen. For
either the loop would need a way of its own beside the plain class's; a thread takes that one, for half more of a captured call's
time at most, and a third more of a map's (measured).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from contextvars import ContextVar, copy_context
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pisupervisor.aio_control import AsyncControl
from pisupervisor.aio_objects import (
    AsyncIsolatedMethod,
    AsyncIsolatedObject,
    AsyncIsolatedStream,
    AsyncPipeline,
    Done,
)
from pisupervisor.aio_workers import run_here, run_in, run_within
from pisupervisor.callbacks import is_coroutine_function
from pisupervisor.checks import check_timeout
from pisupervisor.isolator import ProcessIsolator
from pisupervisor.link.bells import PollBell
from pisupervisor.link.callers import acting_for, this_caller
from pisupervisor.link.returns import build
from pisupervisor.objects import BoundMethod, IsolatedStream, check_call
from pisupervisor.options import IsolationOptions
from pisupervisor.records import replace
from pisupervisor.results import CallResult, ExitInfo, ExitReason
from pisupervisor.supervise.aio_link import LoopLink, until
from pisupervisor.supervise.call import Sent
from pisupervisor.template import chosen
from pisupervisor.worker import Crew, Line, Worker

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pisupervisor.link.connection import Connection
    from pisupervisor.supervise.child import Child
    from pisupervisor.supervise.keeper import Keeper

Made = TypeVar("Made", bound="AsyncProcessIsolator")
_KNOWN = 1000
_UNTIMED = frozenset(("get_method", "object_count", "_take"))  # what takes no timeout, or looks after its own


class _Callback:
    """One that runs in the loop: whose it is, and of which call. Its calls into the child come one after the other, as those of
    a plain function do: the child does nothing else meanwhile, and one thread here speaks with it.
    """

    def __init__(self, caller: int, ident: int) -> None:
        self.caller, self.ident, self.is_over = caller, ident, False
        self.turn = asyncio.Lock()

    async def run(self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """It is over when the calls are that it has begun, awaited or not."""
        _within.set(self)
        try:
            return await function(*args, **keywords)
        finally:
            async with self.turn:
                self.is_over = True


_within: ContextVar[_Callback | None] = ContextVar("_within", default=None)


class AsyncProcessIsolator(AsyncControl):
    """One confined child and the calls into it, from coroutines of one event loop at a time. Made by ``await create()``, or
    ``async with create()``.

    Methods, parameters and errors are those of ``ProcessIsolator``. Callbacks may be coroutine functions, which run in
    the loop; objects and streams are awaited, too.
    """

    def __init__(self, isolator: ProcessIsolator, control: Worker) -> None:
        """Use ``create``."""
        self._isolator = isolator
        self._calls = Crew("pisupervisor-async", isolator._session, isolator.options.max_concurrency)
        # of calls that the loop has begun; of callbacks' calls
        self._rest = Line("pisupervisor-async-rest", None, 1 << 16)
        self._control: Worker | None = control
        self._link: LoopLink | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._known: set[Any] = set()  # what was called before: nothing of it must be imported or read first

    @classmethod
    def create(cls, options: IsolationOptions | None = None, **changes: Any) -> Creating[Self]:
        """A new isolator whose child has every wall up: awaited, or entered at once. Raises what ``ProcessIsolator.create``
        raises.
        """
        return Creating(cls._create(options, changes))

    @classmethod
    async def _create(cls, options: IsolationOptions | None, changes: dict[str, Any]) -> Self:
        control = Worker("pisupervisor-async-control")
        try:
            isolator = await run_in(control, _created, asyncio.get_running_loop(), options, changes)
        except BaseException:
            control.end()  # a child that comes too late is closed by the collector
            raise
        return cls(isolator, control)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {self._isolator._keeper.state}>"

    def __del__(self) -> None:
        """The last net: nobody called close(). The child ends with the isolator in here."""
        if "_known" not in self.__dict__ or os.getpid() != self._isolator._keeper.owner:
            return  # a fork has no such threads, and shares the loop's epoll
        for threads in (self._calls, self._rest, self._control):
            if threads is not None:
                threads.end()
        if self._link is not None:
            self._link.forget()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- calls ------------------------------------------------------------------------------------------------

    async def invoke_method(self, path: str | os.PathLike[str], target: str, /, *args: Any, **keywords: Any) -> Any:
        """See ``ProcessIsolator.invoke_method``."""
        return await self._plain((path, target), self._isolator.invoke_method, path, target, *args, **keywords)

    async def invoke(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        """See ``ProcessIsolator.invoke``. Of a generator the caller gets a stream for ``async for``."""
        return await self._plain(None, self._isolator.invoke, function, *args, **keywords)

    def submit(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> asyncio.Task[Any]:
        """``invoke`` as a task, which can be awaited later; cancelling it kills its work."""
        return self.submit_call(self.invoke, function, *args, **keywords)

    def submit_call(
        self, method: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, **keywords: Any
    ) -> asyncio.Task[Any]:
        """Any of the calls here as a task: ``isolator.submit_call(isolator.invoke_method, "a.py", "f", 1)``."""
        check_call(method, self, (BoundMethod, AsyncIsolatedMethod, AsyncIsolatedObject))
        self._isolator._keeper.check_open()
        task = asyncio.get_running_loop().create_task(method(*args, **keywords))
        self._tasks.add(task)  # a loop holds its tasks but weakly
        task.add_done_callback(self._tasks.discard)
        return task

    async def execute(self, function: Callable[..., Any] | str, /, *args: Any, **keywords: Any) -> CallResult:
        """See ``ProcessIsolator.execute``."""
        return self._shown(await self._call(self._isolator.execute, function, *args, **keywords))

    async def run_source(self, source: str, **keywords: Any) -> CallResult:
        """See ``ProcessIsolator.run_source``."""
        return self._shown(await self._call(self._isolator.run_source, source, **keywords))

    async def run_script(self, path: str | os.PathLike[str], argv: Any = (), **keywords: Any) -> ExitInfo:
        """See ``ProcessIsolator.run_script``."""
        info: ExitInfo = await self._call(self._isolator.run_script, path, argv, **keywords)
        return info

    def map(
        self, function: Callable[..., Any] | str, /, *iterables: Iterable[Any], timeout: float | None = None,
        returns: Any = None, idempotent: bool = False, in_flight: int = 128,
    ) -> AsyncPipeline:  # fmt: skip
        """See ``ProcessIsolator.map``: an async iterator. What is there at once is fetched at once. Wrong arguments are told at
        once; a file that is not there and a function that cannot be sent with the first item, since that may take time.
        """
        from pisupervisor.supervise.pipeline import check_map

        check_map(function, timeout, returns, in_flight)
        self._isolator._keeper.check_open()
        columns = [iter(each) for each in iterables]
        return AsyncPipeline(
            self,
            partial(
                self._isolator.map, function, *columns, timeout=timeout, returns=returns, idempotent=idempotent,
                in_flight=in_flight,
            ),
        )  # fmt: skip

    async def create_object(self, code: Any, /, *args: Any, **keywords: Any) -> AsyncIsolatedObject:
        """See ``ProcessIsolator.create_object``; methods of the handle are awaited."""
        return AsyncIsolatedObject(self, await self._call(self._isolator.create_object, code, *args, **keywords))

    async def copy_object(
        self, value: Any, *, timeout: float | None = None, idempotent: bool = False
    ) -> AsyncIsolatedObject:
        """See ``ProcessIsolator.copy_object``."""
        copying = self._call(self._isolator.copy_object, value, timeout=timeout, idempotent=idempotent)
        return AsyncIsolatedObject(self, await copying)

    async def get_method(self, path: str | os.PathLike[str], target: str) -> AsyncIsolatedMethod:
        """See ``ProcessIsolator.get_method``."""
        return AsyncIsolatedMethod(self, await self._call(self._isolator.get_method, path, target))

    def register_callback(self, name: str, function: Callable[..., Any], *, expose_errors: bool = False) -> Done:
        """See ``ProcessIsolator.register_callback``. A plain function runs in a thread, a coroutine function in the running
        loop.
        """
        if is_coroutine_function(function):
            function = _in_loop(function, asyncio.get_running_loop(), self._isolator._keeper)
        self._isolator.register_callback(name, function, expose_errors=expose_errors)
        return Done()

    def unregister_callback(self, name: str) -> Done:
        """See ``ProcessIsolator.unregister_callback``."""
        self._isolator.unregister_callback(name)
        return Done()

    def shared_array(self, shape: int | Sequence[int], dtype: Any = "float64") -> Any:
        """See ``ProcessIsolator.shared_array``."""
        return self._isolator.shared_array(shape, dtype)

    async def object_count(self) -> int:
        """See ``ProcessIsolator.object_count``."""
        return int(await self._call(self._isolator.object_count))

    def set_data(self, name: str, value: Any) -> Done:
        """See ``ProcessIsolator.set_data``."""
        self._isolator.set_data(name, value)
        return Done()

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

    # --- the end ----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """See ``ProcessIsolator.close``. Ends its threads, too. It goes on when the task that awaits it is cancelled."""
        control, self._control = self._control or Worker("pisupervisor-async-control"), None
        closing = control.add(self._isolator.close, (), {})
        closing.add_done_callback(lambda _done: control.end())
        try:
            await asyncio.shield(asyncio.wrap_future(closing))
        finally:
            self._calls.end()
            self._rest.end()
            if self._link is not None:
                self._link.close()

    # --- waiting ----------------------------------------------------------------------------------------------

    async def _call(self, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        self._isolator._keeper.check_open()
        callback = _within.get()
        if callback is not None and self._runs(callback):
            async with callback.turn:
                if self._runs(callback):
                    return await self._call_from(callback, method, *args, **keywords)
        limit = self._limit(method, keywords)
        if limit is None:
            return await run_here(self._calls.line_for(method), method, *args, **keywords)
        return await run_within(limit, self._calls.line_for(method), method, *args, **keywords)

    def _limit(self, method: Callable[..., Any], keywords: dict[str, Any]) -> float | None:
        limit = keywords.get("timeout")
        if limit is not None:
            return check_timeout(limit)
        return None if getattr(method, "__name__", "") in _UNTIMED else self._isolator.options.call_timeout

    def _runs(self, callback: _Callback) -> bool:
        connection = self._isolator._keeper.connection
        if connection is None or callback.is_over:
            return False
        return callback.ident in connection.callbacks_of(callback.caller)

    async def _call_from(self, callback: _Callback, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        child = self._isolator._keeper.child
        try:
            return await run_here(self._rest, _acting, callback.caller, method, *args, **keywords)
        except (asyncio.CancelledError, GeneratorExit):
            if child is not None:
                _kill(child)
            raise

    async def _plain(self, known: Any, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        """A call that the loop may make itself, where the same was made before and nothing stands in its way."""
        try:
            is_known = known in self._known
        except TypeError:  # no path, no name of a method: which the call itself says better
            return self._awaited(await self._call(method, *args, **keywords))
        if is_known:
            sent = self._isolator._session.on_loop(method, args, keywords)
            if sent is not None:
                return await self._answer(sent)
        if len(self._known) > _KNOWN:
            self._known.clear()
        self._known.add(known)
        return self._awaited(await self._call(method, *args, **keywords))

    async def _answer(self, sent: Sent) -> Any:
        short, is_next, error, types = sent
        session, text = self._isolator._session, None
        try:
            if is_next:
                reply, deadline = self._link_to(short.connection).wait(), short.call.deadline
                text = short.connection.understand(
                    short.ident, await (reply if deadline is None else until(deadline, reply))
                )
                if text is not None:
                    value = session.end_short(short, text)
        except (asyncio.CancelledError, GeneratorExit) as cancelled:  # or closed in the middle: nothing is awaited here
            self._close_link()
            _kill(short.child)
            self._rest.add(session.finish, (short, cancelled), {})
            raise
        except Exception as raised:
            if not session.keeper.turn.has(short.caller):
                raise  # by a signal's handler, when the call had ended
            if text is not None or not isinstance(raised, TimeoutError):
                error = raised  # else a thread waits on, or finds that it is too late
        if text is not None and error is None:
            return value if short.call.returns is None else build(value, short.call.returns)
        self._close_link()  # from here on a thread reads
        finishing = self._rest.add(copy_context().run, (session.finish, short, error), {})
        try:
            done = await asyncio.shield(
                asyncio.wrap_future(finishing)
            )  # it gives the turn back, whatever becomes of this
        except (asyncio.CancelledError, GeneratorExit):
            _kill(short.child)
            raise
        return self._awaited(self._isolator._result(done, short.call.limit, types))

    def _link_to(self, connection: Connection) -> LoopLink:
        link, loop = self._link, asyncio.get_running_loop()
        if link is None or link.fd < 0 or link.connection is not connection or link.loop is not loop:
            self._close_link()
            try:
                link = self._link = LoopLink(connection, loop)
            except OSError:  # no descriptor to be had: a thread waits instead
                raise TimeoutError from None
        return link

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close()

    async def _act(self, method: Callable[..., Any], /, *args: Any) -> Any:
        self._isolator._keeper.check_open()
        if self._control is None:
            self._control = Worker("pisupervisor-async-control")
        return await run_in(self._control, method, *args)

    def _awaited(self, value: Any) -> Any:
        return AsyncIsolatedStream(self, value) if isinstance(value, IsolatedStream) else value

    def _shown(self, result: CallResult) -> CallResult:
        return replace(result, value=self._awaited(result.value))


class Creating(Coroutine[Any, Any, Made]):
    """An isolator that is being made. A coroutine; and a context manager, which closes what it has made."""

    def __init__(self, making: Coroutine[Any, Any, Made]) -> None:
        self._making = making
        self._made: Made | None = None

    def __await__(self) -> Generator[Any, Any, Made]:
        return self._making.__await__()

    def send(self, value: Any) -> Any:
        return self._making.send(value)

    def throw(self, *error: Any) -> Any:
        return self._making.throw(*error)

    def close(self) -> None:
        self._making.close()

    if not TYPE_CHECKING:  # a type checker has its own words for it

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"no {name!r} yet: the isolator is still to be made, by await or async with")

    async def __aenter__(self) -> Made:
        self._made = await self._making
        return self._made

    async def __aexit__(self, *_error: object) -> None:
        if self._made is not None:
            await self._made.close()


def _created(
    loop: asyncio.AbstractEventLoop, options: IsolationOptions | None, changes: dict[str, Any]
) -> ProcessIsolator:
    """In a thread; handlers of events that are coroutine functions run in the loop all the same."""
    options = chosen(options, changes)
    if options.events is None:
        return ProcessIsolator.create(options)
    from pisupervisor.supervise.dispatch import handlers_in

    with handlers_in(loop):
        return ProcessIsolator.create(options)


def _kill(child: Child) -> None:
    child.kill(ExitReason.KILLED, "the call was cancelled")


def _acting(caller: int, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    with acting_for(caller):
        return method(*args, **keywords)


def _in_loop(function: Callable[..., Any], loop: asyncio.AbstractEventLoop, keeper: Keeper) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        caller, connection = this_caller(), keeper.connection
        callback = _Callback(caller, 0 if connection is None else connection.in_callback(caller))
        work = callback.run(function, args, keywords)
        try:
            running = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:  # the loop in which it was registered is closed
            work.close()
            raise
        child = keeper.child or keeper.launching
        return running.result() if child is None else _result(running, child)

    return call


def _result(running: Future[Any], child: Child) -> Any:
    """Of a callback that runs in the loop. Where its child ends first nobody asks for that: it is cancelled."""
    bell = PollBell()
    try:
        running.add_done_callback(lambda _done: bell.ring())
        if child.wait_with(bell) and not running.done():
            running.cancel()
            return None
        return running.result()
    finally:
        bell.close()
