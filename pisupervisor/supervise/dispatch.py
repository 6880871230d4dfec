"""Where an application's handlers run: one thread for each isolator that has any, never in the way of a call.

Lines are read only while no handler runs and no other event waits, and so many in a second: a child that writes faster
waits, and costs its host no more than that.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pisupervisor.callbacks import is_coroutine_function
from pisupervisor.events import ErrorLine, Event, IsolationEvents, OutputLine
from pisupervisor.link.bells import PollBell
from pisupervisor.supervise.output import Line, OutputPipes

_FAREWELL = 5.0  # seconds that close() gives the handlers to see the last events
_LINES_PER_SECOND = 20_000  # a line costs its host some 5 us: at most a tenth of a core


class Dispatcher:
    """``settle`` is told of each event after its handler has run (or at once, where there is none)."""

    def __init__(self, events: IsolationEvents, isolator_id: int, settle: Callable[[Event], None]) -> None:
        self.events, self.id = events, isolator_id
        self.wanted = events.wanted()
        self._settle = settle
        self._queue: deque[Event] = deque()
        self._outputs: dict[OutputPipes, int] = {}  # pipes -> the child's pid
        self._quiet_until = 0.0  # no line is read before
        self._loop = _handlers_loop.get() or _running_loop()
        self._closing = threading.Event()
        self._given_up = False
        self._hurry = False  # close() is called by the loop: what runs in that cannot be waited for
        self._wake = PollBell()
        self._thread = threading.Thread(target=self._run, name=f"pisupervisor-events-{isolator_id}", daemon=True)
        self._wake.start(self._thread)

    def emit(self, event: Event) -> None:
        """Queue it for its handler. Never waits."""
        if event.kind not in self.wanted:
            self._settle(event)
            return
        self._queue.append(event)
        self._wake.ring()

    def attach(self, output: OutputPipes, pid: int) -> None:
        """From now on the lines of that child are events."""
        self._outputs[output] = pid
        self._wake.ring()

    def detach(self, output: OutputPipes, last: list[Line]) -> None:
        """The child is dead: what it wrote last comes before the event of its end."""
        pid = self._outputs.pop(output, None)
        for line in last:
            self.emit(self._event(line, pid))

    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """End the thread when it has told all. Handlers that take too long for that are told no more."""
        self._hurry |= self._loop is not None and _running_loop() is self._loop
        self._closing.set()
        self._wake.ring()
        if not self.is_own_thread():
            self._thread.join(_FAREWELL)
            self._given_up = True

    def _event(self, line: Line, pid: int | None) -> Event:
        kind = OutputLine if line.stream == "stdout" else ErrorLine
        return kind(isolator_id=self.id, pid=pid, line=line.text)

    # --- in the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._given_up and (self._queue or not self._closing.is_set()):
                if self._queue:
                    self._handle(self._queue.popleft())
                else:
                    self._wait()
        finally:
            self._wake.close()

    def _wait(self) -> None:
        """For the next event or line."""
        quiet = self._quiet_until - time.monotonic()
        outputs = dict(self._outputs) if quiet <= 0 else {}
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for output in outputs:
            for fd in output.readers():
                poll.register(fd, select.POLLIN)
        ready = poll.poll(None if quiet <= 0 else quiet * 1000)
        if self._wake.fileno() in [fd for fd, _events in ready]:
            self._wake.clear()
        lines = [self._event(line, pid) for output, pid in outputs.items() for line in output.read()]
        self._queue.extend(line for line in lines if line.kind in self.wanted)
        self._quiet_until = time.monotonic() + len(lines) / _LINES_PER_SECOND

    def _handle(self, event: Event) -> None:
        try:
            self._call(getattr(self.events, event.kind), event)
        except BaseException:  # sys.exit() in a handler too: the next event has a handler of its own
            import logging

            logging.getLogger("pisupervisor").exception("the handler of the event %r raised", event.kind)
        self._settle(event)

    def _call(self, handler: Callable[[Event], object], event: Event) -> None:
        if self._loop is not None and self._loop.is_running() and is_coroutine_function(handler):
            # Made there: a loop that ends before leaves nothing unawaited.
            self._complete_in_loop(lambda: handler(event))
            return
        result = handler(event)
        if not hasattr(result, "__await__"):
            return
        if self._loop is not None and self._loop.is_running():
            self._complete_in_loop(lambda: result)
        else:
            import asyncio

            asyncio.run(_awaited(lambda: result))

    def _complete_in_loop(self, make: Callable[[], Any]) -> None:
        """In the loop of whoever created the isolator. Not waited for where close() is called from there, and no longer
        where it is called meanwhile: perhaps by this very handler.
        """
        from concurrent.futures import CancelledError, Future

        future: Future[Any] = Future()
        tasks = []  # a loop holds its tasks but weakly
        was_closing = self._closing.is_set()

        def begin() -> None:
            task = self._loop.create_task(_awaited(make))
            tasks.append(task)
            task.add_done_callback(lambda task: _hand_over(task, future))

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:
            return  # it was closed in this moment
        while not future.done() and self._loop.is_running():
            if self._hurry or self._given_up or self._closing.is_set() != was_closing:
                break
            try:
                future.exception(0.05)
            except TimeoutError:
                continue
            except CancelledError:
                return  # with the loop
        if future.done() and not future.cancelled():
            future.result()


async def _awaited(make: Callable[[], Any]) -> object:
    return await make()  # not before: a task that is cancelled before it begins makes nothing that waits for ever


def _hand_over(task: Any, future: Any) -> None:
    if task.cancelled():
        future.cancel()
    elif task.exception() is not None:
        future.set_exception(task.exception())
    else:
        future.set_result(task.result())


_handlers_loop: ContextVar[Any] = ContextVar("_handlers_loop", default=None)


@contextmanager
def handlers_in(loop: Any) -> Iterator[None]:
    """What this thread creates meanwhile has that event loop for its handlers."""
    token = _handlers_loop.set(loop)
    try:
        yield
    finally:
        _handlers_loop.reset(token)


def _running_loop() -> Any:
    """The event loop of this thread; whoever has one has imported asyncio."""
    asyncio = sys.modules.get("asyncio")
    try:
        return asyncio.get_running_loop() if asyncio is not None else None
    except RuntimeError:
        return None
