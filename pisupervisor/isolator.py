"""The face: ``ProcessIsolator``, one supervised child and the ways to call into it."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pihost import wire
from pisupervisor.errors import (
    CallTimeout,
    IsolatorClosed,
    LaunchError,
    ProtocolError,
    RestartLimitReached,
    SerializationError,
)
from pisupervisor.launch import templates
from pisupervisor.launch.planning import import_paths
from pisupervisor.launch.templates import acquire, release
from pisupervisor.link.calls import pack_call, unpack_answer
from pisupervisor.link.connection import Answer, Connection, DeadlinePassed, LinkClosed
from pisupervisor.link.sources import Code, CodeReader, check_target
from pisupervisor.options import IsolationOptions
from pisupervisor.results import Applied, CallResult, ExitInfo, ExitReason, Usage
from pisupervisor.supervise import restart, spare
from pisupervisor.supervise.child import Child
from pisupervisor.supervise.exits import termination
from pisupervisor.supervise.lifecycle import Event, State, next_state

if TYPE_CHECKING:
    from types import TracebackType

    from pisupervisor.futures import IsolationFuture

_ids = itertools.count(1)
_CLOSED_LINK_GRACE = 0.25  # a child that closed its link but lives gets this long to die of what it was doing


class Template:
    """Keeps the zygote for ``options`` warm while it is open, whether or not an isolator is.

    Without one, the zygote lives from the first isolator with equal options to the last; a program that creates and
    closes isolators one after another pays its start (about 40 ms) each time.
    """

    def __init__(self, options: IsolationOptions | None = None, **changes: Any) -> None:
        self.options = _options(options, changes)
        self._template: templates.Template | None = acquire(self.options)

    def create(self) -> ProcessIsolator:
        """A new isolator from this template."""
        return ProcessIsolator.create(self.options)

    def close(self) -> None:
        """Let go; the zygote ends with its last user. Idempotent."""
        template, self._template = self._template, None
        if template is not None:
            release(template)

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _options(options: IsolationOptions | None, changes: dict[str, Any]) -> IsolationOptions:
    return replace(options, **changes) if options is not None else IsolationOptions(**changes)


class ProcessIsolator:
    """One confined child and the calls into it. Made by ``create``; a context manager. Any thread may use it.

    One call runs at a time; others wait for their turn. After a child has died the next call starts a new one, as
    ``options.restart`` allows; modules, objects and the state of ``run_source`` are then gone.
    """

    def __init__(self, options: IsolationOptions, *, without: tuple[str, ...] = ()) -> None:
        self.options = options
        self.id = next(_ids)
        self._without = without  # steps left out, for tests that show what each of them is good for
        self._owner = os.getpid()
        self._state: State = "starting"
        self._turn = threading.Lock()  # held for the time of one call
        self._state_lock = threading.Lock()
        self._child: Child | None = None
        self._connection: Connection | None = None
        self._sent: set[str] = set()
        self._crashes: list[float] = []
        self._last_exit: ExitInfo | None = None
        self._data: dict[str, Any] = {}
        self._reader = CodeReader()
        self._known_importable: Callable[[str], bool] | None = None
        self._worker: _Worker | None = None
        self._template: templates.Template | None = acquire(options)

    @classmethod
    def create(cls, options: IsolationOptions | None = None, **changes: Any) -> ProcessIsolator:
        """A new isolator whose child has every wall up. ``changes`` replace single options.

        Raises OptionsError (the caller's mistake), FeatureUnavailable (a protection that cannot hold here, with the
        remedy) or LaunchError (the step that failed); nothing is left behind then.
        """
        isolator = cls(_options(options, changes))
        try:
            isolator._start()
        except BaseException:
            isolator.close()
            raise
        return isolator

    # --- calls ------------------------------------------------------------------------------------------------

    def invoke_method(
        self, path: str | os.PathLike[str], target: str, /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False, kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        """Call ``target`` (dotted: ``func``, ``Class.method``, ``sub.module.func``) of a ``.py`` file, a package folder,
        a ``.zip`` or ``.whl`` or a module by name, in the child, and return its result.

        The file is read here and sent; the child needs no sight of it. ``timeout`` in seconds kills the child when it
        runs out; ``returns`` checks and builds the result; ``kwargs`` is for parameters named like these.
        Raises OptionsError, TargetNotFound, CompileError, RemoteError, CallTimeout, ChildTerminated, SerializationError.
        """
        code = self._reader.read(path)
        check_target(target)
        arguments = self._arguments(args, {**keywords, **(kwargs or {})})
        answer, _child = self._call(
            "method", code.key, target, arguments, code=code, timeout=timeout, idempotent=idempotent
        )
        return self._value(answer, returns)

    def invoke(
        self, function: Callable[..., Any], /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False, kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        """Call a function, lambda or closure in the child. It is sent by value with cloudpickle; what it changes there
        changes nothing here. Parameters and errors as for ``invoke_method``.
        """
        payload = self._function(function, args, {**keywords, **(kwargs or {})})
        answer, _child = self._call("function", payload, timeout=timeout, idempotent=idempotent)
        return self._value(answer, returns)

    def execute(
        self, function: Callable[..., Any] | str, /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False, kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> CallResult:  # fmt: skip
        """Like ``invoke``, with what was written to fds 1 and 2 meanwhile, also by C code and subprocesses.

        ``function`` may be a target as text: ``"plugin.py:Tools.shrink"``. Each stream is kept up to ``Limits.output``
        bytes (``truncated`` says if there was more) and decoded as UTF-8 with replacement.
        """
        merged = {**keywords, **(kwargs or {})}
        if isinstance(function, str):
            path, _, target = function.rpartition(":")
            code = self._reader.read(path)
            check_target(target)
            call: tuple[Any, ...] = ("method", code.key, target, self._arguments(args, merged))
            return self._captured(call, code, timeout, returns, idempotent)
        return self._captured(("function", self._function(function, args, merged)), None, timeout, returns, idempotent)

    def run_source(self, source: str, *, timeout: float | None = None, returns: Any = None) -> CallResult:
        """Run a snippet in a namespace that is kept between calls; ``value`` is that of the last expression, or None.

        Raises CompileError with the line when it does not compile, RemoteError when it raises.
        """
        return self._captured(("source", source, "<source>"), None, timeout, returns, False)

    def run_script(
        self, path: str | os.PathLike[str], argv: Sequence[str] = (), *, timeout: float | None = None
    ) -> ExitInfo:
        """Run a file like ``python tool.py --fast``: ``argv`` without the name. The child lives on; the ExitInfo is the
        script's: its exit code, stdout and stderr.
        """
        code = self._reader.read(path)
        result = self._captured(("script", code.key, [os.fspath(path), *argv]), code, timeout, int, False)
        return ExitInfo(
            exit_code=result.value, signal=None, reason=ExitReason.EXITED, duration=result.duration,
            cpu_time=result.usage.cpu_time, peak_memory=result.usage.peak_memory, stderr_tail=result.stderr[-4096:],
            stdout=result.stdout, stderr=result.stderr, truncated=result.truncated,
        )  # fmt: skip

    def submit(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> IsolationFuture:
        """``invoke`` without waiting: a future. Its ``cancel()`` kills the work if it runs already."""
        return self.submit_call(self.invoke, function, *args, **keywords)

    def submit_call(self, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> IsolationFuture:
        """Any of the calls above without waiting: ``isolator.submit_call(isolator.invoke_method, "a.py", "f", 1)``."""
        self._check_open()
        with self._state_lock:
            if self._worker is None:
                self._worker = _Worker(self)
            return self._worker.add(method, args, keywords)

    # --- one call ---------------------------------------------------------------------------------------------

    def _captured(
        self, call: tuple[Any, ...], code: Code | None, timeout: float | None, returns: Any, idempotent: bool
    ) -> CallResult:
        started = time.monotonic()
        before = self._usage_now()
        verb, *rest = call
        answer, child = self._call(verb, *rest, code=code, timeout=timeout, idempotent=idempotent, capture=True)
        used = child.usage()
        value = self._value(answer, returns)
        cpu = None if used.cpu_time is None else max(0.0, used.cpu_time - (before.cpu_time or 0.0))
        return CallResult(
            value=value, stdout=answer.stdout.decode("utf-8", "replace"), stderr=answer.stderr.decode("utf-8", "replace"),
            truncated=answer.truncated, duration=time.monotonic() - started,
            usage=Usage(cpu_time=cpu, peak_memory=used.peak_memory),
        )  # fmt: skip

    def _usage_now(self) -> Usage:
        child = self._child
        return child.usage() if child is not None else Usage()

    def _call(
        self, verb: str, *arguments: Any, code: Code | None = None, timeout: float | None = None, idempotent: bool = False,
        capture: bool = False,
    ) -> tuple[Answer, Child]:  # fmt: skip
        limit = self.options.call_timeout if timeout is None else timeout
        deadline = None if limit is None else time.monotonic() + limit
        body = pack_call(verb, capture, *arguments)
        self._take_turn(deadline, limit)
        try:
            while True:
                child, connection = self._ready_child()
                try:
                    return self._exchange(child, connection, code, body, deadline, capture), child
                except LinkClosed:
                    info = self._bury(child)
                    if not idempotent or info.reason is ExitReason.KILLED:
                        raise termination(info) from None
                except DeadlinePassed:
                    child.kill(ExitReason.TIMEOUT, f"the call was still running after {limit:g} s")
                    self._bury(child)
                    raise CallTimeout(f"the call was still running after {limit:g} s; its child was killed") from None
        finally:
            self._turn.release()

    def _exchange(
        self,
        child: Child,
        connection: Connection,
        code: Code | None,
        body: bytes,
        deadline: float | None,
        capture: bool,
    ) -> Answer:
        self._enter("call")
        if code is not None and code.key not in self._sent:
            connection.send(wire.CODE, pickle.dumps(code.payload(), 5), deadline=deadline)
            self._sent.add(code.key)
        try:
            answer = connection.call(body, deadline, int(self.options.limits.output) if capture else None)
        except ProtocolError as error:
            self._break(child, error)
            raise
        self._enter("answered")
        return answer

    def _value(self, answer: Answer, returns: Any) -> Any:
        try:
            return unpack_answer(answer, pickled=self.options.results == "pickle", returns=returns)
        except ProtocolError as error:
            child = self._child
            if child is not None:
                self._break(child, error)
            raise

    def _break(self, child: Child, error: ProtocolError) -> None:
        child.kill(ExitReason.PROTOCOL, str(error))
        self._bury(child)

    def _take_turn(self, deadline: float | None, limit: float | None) -> None:
        self._check_open()
        left = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._turn.acquire(timeout=left):
            raise CallTimeout(f"other calls were still running after {limit:g} s; this one was not started")
        try:
            self._check_open()
        except BaseException:
            self._turn.release()
            raise

    def _arguments(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> bytes:
        from pisupervisor.link.arguments import dump_call

        same = self._same_python()
        payload, needs_cloudpickle = dump_call(args, keywords, importable=self._importable(), python_minor_matches=same)
        if needs_cloudpickle:
            self._need_cloudpickle()
        return payload

    def _function(self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> bytes:
        from pisupervisor.link.arguments import dump_function

        if not callable(function):
            from pisupervisor.errors import OptionsError

            raise OptionsError(f"expected a function, not {function!r}; for a file use invoke_method(path, target)")
        self._need_cloudpickle()
        return dump_function(function, args, keywords, self._importable())

    def _importable(self) -> Callable[[str], bool]:
        """Whether the child can import a module by name; what it cannot travels by value."""
        if self._known_importable is None:
            from pisupervisor.link.arguments import child_importable

            template = self._open_template()
            self._known_importable = child_importable(import_paths(self.options, template.interpreter))
        return self._known_importable

    def _open_template(self) -> templates.Template:
        template = self._template
        if template is None:
            raise IsolatorClosed("this isolator is closed")
        return template

    def _same_python(self) -> bool:
        return self._open_template().interpreter.version == sys.version_info[:2]

    def _need_cloudpickle(self) -> None:
        template = self._open_template()
        if template.cloudpickle is None:
            version = ".".join(map(str, template.interpreter.version))
            raise SerializationError(
                f"functions cannot be sent to Python {version} from {sys.version_info[0]}.{sys.version_info[1]}: their byte"
                " code differs; use invoke_method with a file", direction="to child",
            )  # fmt: skip

    # --- life -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Launch a child. The state is "starting"."""
        template = self._open_template()
        limit = self.options.start_timeout
        deadline = None if limit is None else time.monotonic() + limit
        try:
            child = None if self._without else spare.take(template, self.options, deadline)
            if child is None:
                child = Child(self.options, template)
                child.launch(deadline, self._without)
        except BaseException:
            self._enter("launch_failed")
            raise
        self._connection = Connection(child.link, int(self.options.limits.result))
        self._sent = set()
        self._child = child
        self._enter("launched")
        if self.options.debug:
            sys.stderr.write(
                f"pisupervisor: child {child.pid} is stopped before user code; attach a debugger, then: kill -CONT {child.pid}\n"
            )
            sys.stderr.flush()

    def _ready_child(self) -> tuple[Child, Connection]:
        """The child for the next call, started anew where the last one has died. Called with the turn held."""
        child = self._child
        if child is not None and child.exit_info is None and child.ended:
            self._bury(child)
        if self._child is None:
            self._restart()
        if self._child is None or self._connection is None:
            raise IsolatorClosed("this isolator is closed")
        return self._child, self._connection

    def _restart(self) -> None:
        policy, info = self.options.restart, self._last_exit
        if info is not None and not restart.permits(policy, info):
            raise IsolatorClosed(f"the child {info.describe()}, and restart mode {policy.mode!r} starts no other")
        while True:
            delay = restart.decide(policy, self._crashes, time.monotonic())
            if delay is None:
                self._enter("gave_up")
                raise RestartLimitReached(
                    f"{len(self._crashes)} crashes within {policy.within:g} s; the last: {info.describe() if info else 'launch'}"
                )
            if delay:
                time.sleep(delay)
            self._enter("restart")
            try:
                self._start()
            except LaunchError:
                self._crashes.append(time.monotonic())
                raise
            return

    def _bury(self, child: Child) -> ExitInfo:
        """Take the account of a child that is dying or closed its link, and remember it for the restart policy."""
        if not _wait_readable(child.init_pidfd, _CLOSED_LINK_GRACE):
            child.kill(ExitReason.PROTOCOL, "it closed its link and lived on")
        info = child.finish()
        with self._state_lock:
            if self._child is not child:
                return info
            self._child = self._connection = None
        self._last_exit = info
        if restart.is_crash(info):
            self._crashes = [*self._crashes, time.monotonic()][-self.options.restart.max_restarts - 1 :]
        self._enter("child_died")
        return info

    def _enter(self, event: Event) -> None:
        with self._state_lock:
            self._state = next_state(self._state, event)

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise IsolatorClosed("this isolator belongs to the process that created it, not to a fork of it")
        if self._state == "stopped":
            raise IsolatorClosed("this isolator is closed")

    def terminate(self) -> None:
        """Kill the child and everything in it, now. A call under way raises ChildTerminated; the next one starts anew."""
        self._check_open()
        child = self._child
        if child is not None:
            child.kill(ExitReason.KILLED, "terminate() was called")
            _wait_readable(child.init_pidfd, _CLOSED_LINK_GRACE * 4)

    def wait_for_exit(self, timeout: float | None = None) -> ExitInfo:
        """Wait until the present child has ended, and return how. Raises TimeoutError after ``timeout`` seconds."""
        child = self._child
        if child is None:
            if self._last_exit is None:
                raise IsolatorClosed("this isolator has no child")
            return self._last_exit
        if not _wait_readable(child.init_pidfd, timeout):
            raise TimeoutError(f"the child is still running after {timeout:g} s")
        return child.finish()

    def close(self) -> None:
        """End the child and everything in it, and give back every thread, fd, group and process. Idempotent."""
        if os.getpid() != self._owner:
            return  # a fork of the application must not end what belongs to the original
        with self._state_lock:
            self._state = next_state(self._state, "close")
            child, self._child, self._connection = self._child, None, None
            worker, self._worker = self._worker, None
            template, self._template = self._template, None
        if child is not None:
            child.kill(ExitReason.KILLED, "the isolator was closed")
            self._last_exit = child.finish()
        if worker is not None:
            worker.close()
        if template is not None:
            if template.users > 1 and child is not None and not self._without:
                spare.prepare(template, self.options)
            release(template)

    def __enter__(self) -> ProcessIsolator:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_template", None) is not None:  # the last net: nobody called close()
            self.close()

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The payload's process id as the host numbers it, None while there is no child."""
        child = self._child
        return child.pid if child is not None else None

    @property
    def state(self) -> State:
        """One of starting ready busy paused stopping backoff stopped failed."""
        return self._state

    @property
    def applied(self) -> Mapping[str, Applied]:
        """What holds of each protection, as the host read it back when the present (or last) child was started."""
        child = self._child
        if child is not None:
            self._applied = child.applied
        return getattr(self, "_applied", {})

    def resource_usage(self) -> Usage:
        """CPU seconds and peak memory of the present child and all it started."""
        self._check_open()
        return self._usage_now()

    def pids(self) -> list[int]:
        """Every process of the child, as the host numbers them."""
        self._check_open()
        child = self._child
        return child.pids() if child is not None else []

    def set_data(self, name: str, value: Any) -> None:
        """Keep something beside this isolator, in the host; it never reaches the child."""
        self._data[name] = value

    def get_data(self, name: str) -> Any:
        """What ``set_data`` kept, or None."""
        return self._data.get(name)


def _wait_readable(fd: int, timeout: float | None) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


class _Worker:
    """The one thread that runs submitted calls, in order. It exists from the first ``submit`` to ``close``."""

    def __init__(self, isolator: ProcessIsolator) -> None:
        import queue
        import weakref

        self._isolator = weakref.ref(isolator)  # the thread must not keep a forgotten isolator alive
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: IsolationFuture | None = None
        self._thread = threading.Thread(target=self._run, name=f"pisupervisor-{isolator.id}", daemon=True)
        self._thread.start()

    def add(self, method: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> IsolationFuture:
        from pisupervisor.futures import IsolationFuture

        future = IsolationFuture(self._kill)
        self._queue.put((future, method, args, keywords))
        return future

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, method, args, keywords = item
            del item
            with self._lock:
                if future.cancelled():
                    continue
                self._running = future
                future.started = True
            try:
                outcome, value = future.set_result, method(*args, **keywords)
            except BaseException as error:
                outcome, value = future.set_exception, error
            with self._lock:
                self._running = None
                wanted = future.set_running_or_notify_cancel()
            if wanted:
                outcome(value)
            del future, method, args, keywords, outcome, value

    def _kill(self, future: IsolationFuture) -> None:
        """Kill the child if it runs this very call."""
        isolator = self._isolator()
        with self._lock:
            child = isolator._child if isolator is not None else None
            if self._running is future and child is not None:
                child.kill(ExitReason.KILLED, "the call was cancelled")

    def close(self) -> None:
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                item[0].cancel()
