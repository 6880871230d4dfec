"""What an event loop has done in threads, since it may take time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pisupervisor.worker import Line, Worker


async def run_in(threads: Worker | Line, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """In one of those. Cancelled: taken back if it waits, its work killed if it runs."""
    return await asyncio.wrap_future(threads.add(method, args, keywords))


async def run_here(threads: Line, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """The same in the task's context, as ``asyncio.to_thread`` does it: callbacks run in there."""
    return await run_in(threads, copy_context().run, method, *args, **keywords)
