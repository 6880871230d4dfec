"""The commonest call, made by an event loop itself: sent at once, its answer read when the loop sees it. Whatever else comes of
it, a thread goes on with, on the way of all calls.
"""

from __future__ import annotations

import asyncio
import os

from pisupervisor.link.connection import Connection, LinkClosed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextvars import Context

_PATIENCE = 1.0  # seconds without an answer, after which a thread waits for it, and looks around as it does


class Reply:
    """What one task awaits. A future in all that a task asks of one (``_asyncio_future_blocking`` makes it one); but the task
    goes on in the very round of the loop in which the answer is read, not in the next: another system call, and a third of
    the time of a call.
    """

    _asyncio_future_blocking = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._said: bytes | None = None
        self._error: BaseException | None = None
        self._wake: tuple[Callable[[Reply], object], Context | None] | None = None

    def __await__(self) -> Generator[Reply, None, bytes]:
        if not self.done():
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def done(self) -> bool:
        return self._said is not None or self._error is not None

    def result(self) -> bytes:
        if self._said is None:
            raise self._error or asyncio.InvalidStateError("no answer yet")
        return self._said

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, wake: Callable[[Reply], object], *, context: Context | None = None) -> None:
        """By the one task that awaits it."""
        self._wake = wake, context

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002 - tasks give one
        """By that task, while it is cancelled: it is woken soon, as by any future."""
        return self.fail(asyncio.CancelledError())

    def fail(self, error: BaseException) -> bool:
        """False where it is done already."""
        if self.done():
            return False
        self._error = error
        if self._wake is not None:
            wake, context = self._wake
            self._loop.call_soon(wake, self, context=context)
        return True

    def answer(self, said: bytes) -> None:
        """Once. The task runs on before this returns."""
        self._said = said
        if self._wake is not None:
            wake, context = self._wake
            if context is None:
                wake(self)
            else:
                context.run(wake, self)


class LoopLink:
    """One child's link on a loop. Only one call at a time is waited for here."""

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.connection, self.loop = connection, loop
        # The other may be closed by a thread, and its number used anew. -1 when this one is closed.
        self.fd = os.dup(connection.link.fileno())
        self._reply: Reply | None = None
        self._rounds = 0
        try:
            loop.add_reader(self.fd, self._readable)
        except BaseException:  # a closed loop, no memory for one more in epoll
            os.close(self.fd)
            raise
        self._timer = loop.call_later(_PATIENCE, self._look)

    def wait(self) -> Reply:
        """What comes next, b"" at the end. TimeoutError: nothing has come for a while."""
        self._reply, self._rounds = Reply(self.loop), 0
        return self._reply

    def close(self) -> None:
        """The loop reads no more."""
        fd, self.fd, self._reply = self.fd, -1, None
        if fd >= 0:
            self._timer.cancel()
            if not self.loop.is_closed():
                self.loop.remove_reader(fd)
            os.close(fd)

    def forget(self) -> None:
        """``close`` from wherever the collector runs."""
        try:
            here = asyncio.get_running_loop() is self.loop
        except RuntimeError:
            here = False
        if here or not self.loop.is_running():
            self.close()
        else:
            self.loop.call_soon_threadsafe(self.close)

    def _readable(self) -> None:
        reply = self._reply
        if reply is None or reply._error is not None:
            self.close()  # its end, or what no honest child says: the next call will see
            return
        try:
            said = self.connection.receive_at_once()
        except LinkClosed as gone:
            self._reply = None
            reply.fail(gone)
            return
        if said is not None:
            self._reply = None
            reply.answer(said)

    def _look(self) -> None:
        """Once a second. Where nothing was waited for meanwhile, the loop is left alone."""
        self._rounds += 1
        reply = self._reply
        if self._rounds > 1 and reply is None:
            self.close()
            return
        if self._rounds > 1 and reply is not None:
            reply.fail(TimeoutError())
        self._timer = self.loop.call_later(_PATIENCE, self._look)


async def until(deadline: float, reply: Reply) -> bytes:
    """Raises TimeoutError when that is over."""
    timer = asyncio.get_running_loop().call_at(deadline, reply.fail, TimeoutError())  # its clock is time.monotonic
    try:
        return await reply
    finally:
        timer.cancel()
