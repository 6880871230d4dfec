"""Handles to what lives in a child, awaited: the ``objects`` of ``AsyncProcessIsolator``, and the results of its ``map``."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Self

from pisupervisor.objects import Handle, IsolatedMethod, IsolatedObject, IsolatedStream

if TYPE_CHECKING:
    from pisupervisor.aio import AsyncProcessIsolator
    from pisupervisor.supervise.pipeline import Pipeline


class Done:
    """What was done at once and has no result. It can be awaited like the rest of these methods, and need not be."""

    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()


class Pids(list[int]):
    """The same for process ids."""

    def __await__(self) -> Generator[Any, Any, Self]:
        yield from ()
        return self


class AsyncIsolatedObject(Handle):
    """An object in the child: ``await obj.add(2)``, or ``await obj.invoke("add", 2)``. See ``IsolatedObject``."""

    def __init__(self, isolator: AsyncProcessIsolator, handle: IsolatedObject) -> None:
        self._isolator, self._handle = isolator, handle

    async def invoke(self, name: str, /, *args: Any, **keywords: Any) -> Any:
        """See ``IsolatedObject.invoke``."""
        return await self._isolator._plain(name, self._handle.invoke, name, *args, **keywords)

    def release(self) -> Done:
        """See ``IsolatedObject.release``."""
        self._handle.release()
        return Done()

    def __reduce__(self) -> Any:
        return self._handle.__reduce__()

    def __copy__(self) -> Any:
        return self._handle.__copy__()

    def __deepcopy__(self, _memo: object) -> Any:
        return self._handle.__copy__()

    def __repr__(self) -> str:
        return f"<Async{repr(self._handle)[1:]}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.release()


class AsyncIsolatedMethod:
    """See ``IsolatedMethod``."""

    def __init__(self, isolator: AsyncProcessIsolator, handle: IsolatedMethod) -> None:
        self._isolator, self._handle = isolator, handle

    def __call__(self, /, *args: Any, **keywords: Any) -> Coroutine[Any, Any, Any]:
        return self._isolator._plain(self._handle, self._handle, *args, **keywords)

    async def invoke(self, obj: AsyncIsolatedObject, /, *args: Any, **keywords: Any) -> Any:
        """See ``IsolatedMethod.invoke``."""
        handle = obj._handle if isinstance(obj, AsyncIsolatedObject) else obj
        return await self._isolator._plain(self._handle, self._handle.invoke, handle, *args, **keywords)

    def __reduce__(self) -> Any:
        return self._handle.__reduce__()

    def __repr__(self) -> str:
        return f"<Async{repr(self._handle)[1:]}"


class AsyncIsolatedStream:
    """The items of a generator in the child, for ``async for``. See ``IsolatedStream``."""

    def __init__(self, isolator: AsyncProcessIsolator, stream: IsolatedStream) -> None:
        self._isolator, self._stream = isolator, stream

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._stream._object._number is None:
            raise StopAsyncIteration
        try:
            step = await self._isolator._plain(IsolatedStream, self._stream.ask, timeout=self._stream._timeout)
        except BaseException:
            self._stream.close()  # a generator that has raised is over
            raise
        try:
            return self._stream.take(step)
        except StopIteration:
            raise StopAsyncIteration from None

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


class AsyncPipeline:
    """The results of ``map``, for ``async for``."""

    def __init__(self, isolator: AsyncProcessIsolator, begin: Callable[[], Pipeline]) -> None:
        self._isolator, self._begin = isolator, begin
        self._results: Pipeline | None = None
        self._ready: deque[Any] = deque()
        self._error: BaseException | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self._ready and self._error is None:
            values, self._error = await self._isolator._call(self._take)
            self._ready.extend(values)
        if self._ready:
            return self._ready.popleft()
        error, self._error = self._error, StopIteration()
        if isinstance(error, StopIteration):
            raise StopAsyncIteration
        raise error or StopAsyncIteration

    def _take(self) -> tuple[list[Any], BaseException | None]:
        values: list[Any] = []
        try:
            if self._results is None:
                self._results = self._begin()
            values.append(next(self._results))
            while self._results.has_next():
                values.append(next(self._results))
        except Exception as error:
            return values, error
        return values, None

    async def aclose(self) -> None:
        """See ``Pipeline.close``."""
        if self._results is not None:
            self._results.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()
