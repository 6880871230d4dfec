"""The end of a script, whose process lives on: its threads are waited for, its exit handlers run."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class End:
    """``with End():`` around a script."""

    def __enter__(self) -> None:
        import atexit

        self._handlers: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._module, self._saved = atexit, (atexit.register, atexit.unregister)
        self._before = set(_threads())
        atexit.register, atexit.unregister = self._register, self._unregister  # type: ignore[assignment]

    def __exit__(self, *_error: object) -> None:
        try:
            self._wait_for_threads()
            self._run_handlers()
        finally:
            self._module.register, self._module.unregister = self._saved

    def _register(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        from pihost.inside.importer import Loader

        if not isinstance(sys._getframe(1).f_globals.get("__loader__"), Loader):
            return self._saved[0](function, *args, **kwargs)  # the library's modules stay, and so do their handlers
        self._handlers.append((function, args, kwargs))
        return function

    def _unregister(self, function: Callable[..., Any]) -> None:
        self._handlers = [handler for handler in self._handlers if handler[0] != function]
        self._saved[1](function)

    def _wait_for_threads(self) -> None:
        """But for those of executors, which wait for work until somebody tells them that there is no more."""
        while True:
            idle = getattr(sys.modules.get("concurrent.futures.thread"), "_threads_queues", ())
            new = [thread for thread in _threads() if thread not in self._before and thread not in idle]
            if not new:
                return
            new[0].join()

    def _run_handlers(self) -> None:
        from pihost.inside.run import print_exception

        while self._handlers:
            function, args, kwargs = self._handlers.pop()
            try:
                function(*args, **kwargs)
            except BaseException as error:
                print_exception(error)


def _threads() -> list[Any]:
    """That a process waits for at its end; those that calls run in, beside another, are none of threading's."""
    threading = sys.modules.get("threading")
    if threading is None:
        return []
    current, foreign = threading.current_thread(), threading._DummyThread
    return [
        thread
        for thread in threading.enumerate()
        if not (thread.daemon or thread is current or isinstance(thread, foreign))
    ]
