"""IsolationExecutor and IsolationFuture under CPython's own tests for executors and futures.

They come from the ``test`` package of this interpreter. Each of them is run, or named in DOES_NOT_APPLY with the reason.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
import sysconfig
from types import ModuleType
from typing import Any
from unittest import mock

import features
from helpers import linux, nothing_left

from pisupervisor import (
    ChildTerminated,
    IsolationExecutor,
    IsolationFuture,
    IsolationOptions,
    RemoteError,
    RestartPolicy,
    SerializationError,
)

features.need("testsuite")
pytestmark = linux

# The functions of the tests travel by value, like those of any application.
OPTIONS = IsolationOptions(restart=RestartPolicy(backoff=0.0, max_restarts=1000))


def _trusting() -> IsolationOptions:
    """For results that are objects: pickled, and of classes that the child imports, too."""
    return IsolationOptions(restart=OPTIONS.restart, results="pickle", import_paths=[sysconfig.get_path("stdlib")])


class Future(IsolationFuture):
    """One without an executor, as these tests make them. They look for this name in its representation."""

    def __init__(self) -> None:
        super().__init__(lambda _: None)


def _parts() -> list[ModuleType]:
    """One module in Python 3.11, a package later."""
    top = importlib.import_module("test.test_concurrent_futures")
    names = [f"{top.__name__}.{part.name}" for part in pkgutil.iter_modules(getattr(top, "__path__", []))]
    return [top, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))]


with mock.patch("concurrent.futures._base.Future", Future):  # they import it from there
    PARTS = _parts()


def _found(name: str) -> Any:
    return next(vars(part)[name] for part in PARTS if name in vars(part))


# --- what does not apply ------------------------------------------------------------------------------------------

AT_EXIT = (
    "imports the executor from concurrent.futures, whose atexit hooks do what waits while the interpreter ends;"
    " here a child ends with its application"
)
THREADS = "looks at the threads of a ThreadPoolExecutor"
SHARED = "caller and callee share a lock, an event or a list; a confined child shares no memory"
PROCESSES = "looks at the processes of a ProcessPoolExecutor"
CHUNKS = "sends calls in chunks; here as in a ThreadPoolExecutor the chunksize has no effect, so -1 is no error"
UNBREAKABLE = "wants one dead child to break the executor; here it is one failed call"
INITIALIZER = "passes an initializer; here that is IsolationOptions.on_start"
TEXT_ONLY = "wants the exact class and its arguments; here it is a RemoteError, which is that builtin too, and text"
FORK = "is about a ProcessPoolExecutor that forks beside a ThreadPoolExecutor"
MANAGER = "calls a server of the caller's from the child, by a socket; a confined child has no way to it"
WINDOWS = "is about Windows"
UNPICKLED = (
    "wants SystemExit of a result's pickle to be another; results='pickle' runs it as the application's own code"
)
WAKEUP = "replaces a private class of ProcessPoolExecutor"

DOES_NOT_APPLY = {
    "ExecutorShutdownTest.test_interpreter_shutdown": AT_EXIT,
    "ExecutorShutdownTest.test_submit_after_interpreter_shutdown": AT_EXIT,
    "ExecutorShutdownTest.test_hang_gh83386": AT_EXIT,
    "ExecutorShutdownTest.test_hang_gh94440": AT_EXIT,
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": "joins the manager thread of a ProcessPoolExecutor",
    "ExecutorDeadlockTest.test_gh105829_should_not_deadlock_if_wakeup_pipe_full": WAKEUP,
    "ExecutorDeadlockTest.test_exit_during_result_unpickle_in_result_handler": UNPICKLED,
    "InitializerMixin.test_initializer": INITIALIZER,
    "FailingInitializerMixin.test_initializer": INITIALIZER,
    "FailingInitializerResourcesTest.test_spawn": INITIALIZER,
    "FailingInitializerResourcesTest.test_forkserver": INITIALIZER,
    "ThreadPoolShutdownTest.test_threads_terminate": THREADS,
    "ThreadPoolShutdownTest.test_context_manager_shutdown": THREADS,
    "ThreadPoolShutdownTest.test_del_shutdown": THREADS,
    "ThreadPoolShutdownTest.test_shutdown_no_wait": THREADS,
    "ThreadPoolShutdownTest.test_thread_names_assigned": THREADS,
    "ThreadPoolShutdownTest.test_thread_names_default": THREADS,
    "ThreadPoolShutdownTest.test_cancel_futures_wait_false": AT_EXIT,
    "ThreadPoolWaitTests.test_pending_calls_race": SHARED,
    "ThreadPoolExecutorTest.test_map_submits_without_iteration": SHARED,
    "ThreadPoolExecutorTest.test_default_workers": "looks at a private field; here the default is one child for each CPU",
    "ThreadPoolExecutorTest.test_saturation": THREADS,
    "ThreadPoolExecutorTest.test_idle_thread_reuse": THREADS,
    "ThreadPoolExecutorTest.test_hang_global_shutdown_lock": FORK,
    "ThreadPoolExecutorTest.test_executor_map_current_future_cancel": SHARED,
    "ProcessPoolShutdownTest.test_processes_terminate": PROCESSES,
    "ProcessPoolShutdownTest.test_context_manager_shutdown": PROCESSES,
    "ProcessPoolShutdownTest.test_del_shutdown": PROCESSES,
    "ProcessPoolShutdownTest.test_shutdown_no_wait": PROCESSES,
    "ProcessPoolExecutorTest.test_max_workers_too_large": WINDOWS,
    "ProcessPoolExecutorTest.test_killed_child": UNBREAKABLE,
    "ProcessPoolExecutorTest.test_map_chunksize": CHUNKS,
    "ProcessPoolExecutorTest.test_traceback": TEXT_ONLY,
    "ProcessPoolExecutorTest.test_ressources_gced_in_workers": MANAGER,
    "ProcessPoolExecutorTest.test_saturation": PROCESSES,
    "ProcessPoolExecutorTest.test_idle_process_reuse_one": PROCESSES,
    "ProcessPoolExecutorTest.test_idle_process_reuse_multiple": PROCESSES,
    "ProcessPoolExecutorTest.test_max_tasks_per_child": PROCESSES,
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": PROCESSES,
    "ProcessPoolExecutorTest.test_python_finalization_error": AT_EXIT,
}

# --- what does ----------------------------------------------------------------------------------------------------


APPLIED: list[str] = []


def _own_tests(case: type) -> list[str]:
    return [name for name in vars(case) if name.startswith("test_")]


def _applies(name: str) -> Any:
    """That class of CPython's tests: only the tests that it defines itself, and of these only what applies."""
    APPLIED.append(name)
    case = _found(name)
    inherited = {test for base in case.__mro__[1:] for test in _own_tests(base)} - {*_own_tests(case)}
    left_out = inherited.union(test for test in _own_tests(case) if f"{name}.{test}" in DOES_NOT_APPLY)
    return type(f"Applying{name}", (case,), dict.fromkeys(left_out))


class Isolated(_found("ExecutorMixin")):  # type: ignore[misc]
    """``self.executor`` of each test; nothing of it may be left behind."""

    executor_type: Any = IsolationExecutor

    def setUp(self) -> None:
        self.enterContext(nothing_left())
        self.executor_kwargs = {"options": self.options()}
        super().setUp()

    def options(self) -> IsolationOptions:
        return _trusting() if self._testMethodName == "test_free_reference" else OPTIONS


class LikeProcessPool(Isolated):
    """For tests that pass what only ProcessPoolExecutor knows."""

    @staticmethod
    def executor_type(
        max_workers: int, mp_context: None = None, max_tasks_per_child: int | None = None, **more: Any
    ) -> Any:
        return IsolationExecutor(more.pop("options", _trusting()), max_workers, max_calls=max_tasks_per_child, **more)

    def get_context(self) -> Any:
        return mock.Mock(get_start_method=lambda allow_none: "no start method")


BaseTestCase = _found("BaseTestCase")


class ExecutorTest(Isolated, _applies("ExecutorTest"), BaseTestCase):  # type: ignore[misc]
    pass


class ShutdownTest(Isolated, _applies("ExecutorShutdownTest"), BaseTestCase):  # type: ignore[misc]
    pass


class WaitTest(Isolated, _applies("WaitTests"), BaseTestCase):  # type: ignore[misc]
    pass


class AsCompletedTest(Isolated, _applies("AsCompletedTests"), BaseTestCase):  # type: ignore[misc]
    pass


class ProcessPoolTest(LikeProcessPool, _applies("ProcessPoolExecutorTest"), BaseTestCase):  # type: ignore[misc]
    pass


class DeadlockTest(LikeProcessPool, _applies("ExecutorDeadlockTest"), BaseTestCase):  # type: ignore[misc]
    """Crashes at every place: no call and no shutdown may hang, and what is raised tells what happened."""

    def setUp(self) -> None:
        super().setUp()
        module = sys.modules[self._check_crash.__module__]
        self.enterContext(mock.patch.multiple(module, create=True, **STANDS_FOR))


#: What is raised here in the place of the exception that these tests name.
STANDS_FOR = {
    "BrokenProcessPool": (ChildTerminated, SerializationError, RemoteError),
    "PicklingError": (SerializationError, RemoteError),
    "SystemExit": RemoteError,
}


class FutureTest(_applies("FutureTests")):  # type: ignore[misc]
    def setUp(self) -> None:
        self.enterContext(nothing_left())
        self.enterContext(mock.patch.object(logging.getLogger(), "handlers", []))  # pytest's: the tests look at stderr
        super().setUp()


def test_each_test_is_run_or_listed() -> None:
    cases = {name: case for part in PARTS for name, case in vars(part).items() if isinstance(case, type)}
    there = {f"{name}.{test}" for name, case in cases.items() if name not in APPLIED for test in _own_tests(case)}
    assert there - {*DOES_NOT_APPLY} == set()
