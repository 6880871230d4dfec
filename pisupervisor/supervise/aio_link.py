"""The commonest call, made by an event loop itself: sent at once, its answer read when the loop sees it. Whatever else comes of
it, a thread goes on with, on the way of all calls.
"""

from __future__ import annotations

import asyncio
import os

from pisupervisor.link.connection import Connection, LinkClosed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pisupervisor.supervise.session import Short

_PATIENCE = 1.0  # seconds without an answer, after which a thread waits for it, and looks around as it does


class LoopLink:
    """One child's link on a loop. Only one call at a time is waited for here."""

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.connection, self._loop = connection, loop
        self._fd = os.dup(connection.link.fileno())  # the other may be closed by a thread, and its number used anew
        self._future: asyncio.Future[bytes] | None = None
        self._rounds = 0
        loop.add_reader(self._fd, self._readable)
        self._timer = loop.call_later(_PATIENCE, self._look)

    def wait(self) -> asyncio.Future[bytes]:
        """What comes next, b"" at the end. TimeoutError: nothing has come for a while."""
        self._future, self._rounds = self._loop.create_future(), 0
        return self._future

    def close(self) -> None:
        """The loop reads no more."""
        fd, self._fd, self._future = self._fd, -1, None
        if fd >= 0:
            self._timer.cancel()
            self._loop.remove_reader(fd)
            os.close(fd)

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def _readable(self) -> None:
        future = self._future
        if future is None or future.done():
            self.close()  # its end, or what no honest child says: the next call will see
            return
        try:
            said = self.connection.receive_at_once()
        except LinkClosed:
            said = b""
        if said is not None:
            self._future = None
            future.set_result(said)

    def _look(self) -> None:
        """Once a second. Where nothing was waited for meanwhile, the loop is left alone."""
        self._rounds += 1
        future = self._future
        if self._rounds > 1 and future is not None and not future.done():
            future.set_exception(TimeoutError())
        elif self._rounds > 1 and future is None:
            self.close()
            return
        self._timer = self._loop.call_later(_PATIENCE, self._look)


async def answer_to(short: Short, link: LoopLink, deadline: float | None) -> bytes | None:
    """The text of the answer, where that is plain data in one frame and comes soon; else None."""
    future, timer = link.wait(), None
    if deadline is not None:
        loop = asyncio.get_running_loop()
        timer = loop.call_at(deadline, _late, future)  # the loop's clock is time.monotonic
    try:
        said = await future
    except TimeoutError:
        return None
    finally:
        if timer is not None:
            timer.cancel()
    return short.connection.understand(short.ident, said)


def _late(future: asyncio.Future[bytes]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
