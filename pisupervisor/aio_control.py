"""What an ``AsyncProcessIsolator``'s owner does with its child beside calling into it: ``control``, awaited."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pisupervisor.aio_objects import Pids
from pisupervisor.aio_workers import run_in
from pisupervisor.control import Master
from pisupervisor.isolator import ProcessIsolator
from pisupervisor.results import Applied, ExitInfo, SystemCall, Usage
from pisupervisor.worker import Worker

if TYPE_CHECKING:
    from pisupervisor.supervise.lifecycle import State


class AsyncControl(Master):
    """The half of ``AsyncProcessIsolator`` that is no call."""

    _isolator: ProcessIsolator

    @abstractmethod
    async def _act(self, method: Callable[..., Any], /, *args: Any) -> Any:
        """In a thread that no call stands in the way of."""

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
            info: ExitInfo = await run_in(waiter, self._isolator.wait_for_exit, timeout)
            return info
        finally:
            waiter.end()

    # --- looking ----------------------------------------------------------------------------------------------

    async def resource_usage(self) -> Usage:
        """See ``ProcessIsolator.resource_usage``."""
        usage: Usage = await self._act(self._isolator.resource_usage)
        return usage

    def pids(self) -> Pids:
        """See ``ProcessIsolator.pids``."""
        return Pids(self._isolator.pids())

    def system_calls(self) -> tuple[SystemCall, ...]:
        """See ``ProcessIsolator.system_calls``."""
        return self._isolator.system_calls()

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
