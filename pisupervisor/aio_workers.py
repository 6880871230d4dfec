"""What an event loop has done in threads, since it may take time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from pisupervisor.errors import CallTimeout

if TYPE_CHECKING:
    from pisupervisor.worker import Line, Worker

NOT_STARTED = "other calls were still running at the deadline; this one was not started"
_HANDED_OVER = 0.01  # seconds: what is less than this is the way to a thread, and no wait for one


async def run_in(threads: Worker | Line, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """In one of those. Cancelled: taken back if it waits, its work killed if it runs."""
    return await asyncio.wrap_future(threads.add(method, args, keywords))


async def run_here(threads: Line, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """The same in the task's context, as ``asyncio.to_thread`` does it: callbacks run in there."""
    return await run_in(threads, copy_context().run, method, *args, **keywords)


async def run_within(limit: float, threads: Line, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """The same of a call whose time runs while it waits for a thread, too, as the plain class's does while it waits for its
    turn. Raises CallTimeout.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    cancelled = task.cancelling() if task is not None else 0
    future = threads.add(copy_context().run, (_begin, time.monotonic(), limit, method, *args), keywords)
    late: list[bool] = []
    timer = loop.call_later(limit, lambda: late.append(future.take_back()))
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if True not in late or (task is not None and task.cancelling() > cancelled):
            raise
        raise CallTimeout(NOT_STARTED) from None
    finally:
        timer.cancel()


def _begin(asked: float, limit: float, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    waited = time.monotonic() - asked
    if waited > _HANDED_OVER:
        limit = round(limit - waited, 3)
    if limit < 0:
        raise CallTimeout(NOT_STARTED)
    return method(*args, **{**keywords, "timeout": limit})
