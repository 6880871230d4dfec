"""The threads in which an event loop has done what may take time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from pisupervisor.worker import Worker

if TYPE_CHECKING:
    from pisupervisor.supervise.session import Session


async def run_in(worker: Worker, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
    """In that thread. Cancelled: taken back if it waits, its work killed if it runs."""
    return await asyncio.wrap_future(worker.add(method, args, keywords))


class Workers:
    """Threads, made as they are needed, up to ``most``; each takes one call after another."""

    def __init__(self, name: str, session: Session | None, most: int, first: Worker | None = None) -> None:
        self._name, self._session, self._most = name, session, most
        self._load: dict[Worker, int] = {} if first is None else {first: 0}

    def _pick(self) -> Worker:
        worker = min(self._load, key=self._load.__getitem__, default=None)
        if worker is None or (self._load[worker] and len(self._load) < self._most):
            worker = Worker(f"{self._name}-{len(self._load) + 1}", self._session)
            self._load[worker] = 0
        return worker

    async def run(
        self, method: Callable[..., Any], /, *args: Any, cancel: Callable[[], object] | None = None, **keywords: Any
    ) -> Any:
        """The result, from one of them. Cancelled: taken back if it waits, its work killed if it runs."""
        worker = self._pick()
        self._load[worker] += 1
        try:
            # In the task's context, as ``asyncio.to_thread`` does it: callbacks run in there.
            return await run_in(worker, copy_context().run, method, *args, **keywords)
        except (asyncio.CancelledError, GeneratorExit):
            if cancel is not None:
                cancel()
            raise
        finally:
            self._load[worker] -= 1

    def add(self, method: Callable[..., Any], /, *args: Any) -> None:
        """Nobody waits for it."""
        self._pick().add(method, args, {})

    def end(self) -> None:
        for worker in self._load:
            worker.end()
