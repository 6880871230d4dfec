"""The face: ``ProcessIsolator``, one supervised child and the ways to call into it. How its owner ends, pauses and sees the child
is written in ``control``.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time

from pihost import wire
from pisupervisor.checks import check_argv, check_stdin, merged, split_target
from pisupervisor.control import Control
from pisupervisor.errors import OptionsError
from pisupervisor.launch.templates import acquire, release
from pisupervisor.options import IsolationOptions
from pisupervisor.template import chosen

# What is not needed to start a zygote is imported while that wakes up (see ``ProcessIsolator.__init__``).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Any

    from pisupervisor.futures import IsolationFuture
    from pisupervisor.link.calls import StreamTypes
    from pisupervisor.link.connection import Connection
    from pisupervisor.link.sources import Code
    from pisupervisor.modules import Modules
    from pisupervisor.objects import IsolatedMethod, IsolatedObject
    from pisupervisor.results import CallResult, ExitInfo
    from pisupervisor.supervise.call import Outcome
    from pisupervisor.supervise.pipeline import Pipeline
    from pisupervisor.worker import Crew

_ids = itertools.count(1)


def _modules(options: IsolationOptions) -> Modules | None:
    if not options.modules:
        return None
    from pisupervisor.modules import Modules

    return Modules(options.modules)


class ProcessIsolator(Control):
    """One confined child and the calls into it. Made by ``create``; a context manager. Any thread may use it.

    As many calls run at once as ``options.max_concurrency`` says, by default one; others wait for their turn. After a child
    has died the next call starts a new one, as ``options.restart`` allows; modules, objects and the state of ``run_source``
    are then gone.
    """

    def __init__(self, options: IsolationOptions, *, without: tuple[str, ...] = ()) -> None:
        """Use ``create``. ``without`` leaves out steps of the launch: for tests that show what each is good for."""
        template = acquire(options)  # starts the zygote, which wakes up while this process imports the rest
        from pisupervisor.callbacks import Callbacks
        from pisupervisor.link.calls import pack_head
        from pisupervisor.link.packing import Packer
        from pisupervisor.link.sources import CodeReader
        from pisupervisor.supervise.call import Outcome, Sent
        from pisupervisor.supervise.keeper import Keeper
        from pisupervisor.supervise.session import Session

        self.options = options
        self.id = next(_ids)
        self._crew: Crew | None = None
        self._crew_lock = threading.Lock()
        try:
            self._keeper = Keeper(options, template, self.id, without)
        except BaseException:
            release(template)
            raise
        self._session, self._pack_head = Session(self._keeper), pack_head
        self._outcome, self._sent = Outcome, Sent
        modules = _modules(options)
        self._packer = Packer(options, self._keeper.present_template, modules, self.id)
        self._callbacks = Callbacks(
            self._packer.plain_value, options.callback_rate, modules, self._keeper.reader,
            None if options.callback_bytes is None else int(options.callback_bytes), self._keeper.ends_pause,
        )  # fmt: skip
        self._keeper.answer = self._callbacks.answer
        with template.lock:  # the next isolator's files are most often the same ones
            if template.reader is None:
                template.reader = CodeReader()
        self._reader: CodeReader = template.reader
        self._data: dict[str, Any] = {}

    @classmethod
    def create(cls, options: IsolationOptions | None = None, **changes: Any) -> ProcessIsolator:
        """A new isolator whose child has every wall up. ``changes`` replace single options.

        Raises OptionsError (the caller's mistake), FeatureUnavailable (a protection that cannot hold here, with the
        remedy) or LaunchError (the step that failed); nothing is left behind then.
        """
        isolator = cls(chosen(options, changes))
        try:
            isolator._start()
        except BaseException:
            isolator.close()
            raise
        return isolator

    def _start(self) -> None:
        from pisupervisor.supervise.starting import first_calls, start

        if self.options.needs_first_calls():
            self._keeper.first_calls = first_calls(self.options, self._packer, self._reader)
        with self._keeper.turn:
            start(self._keeper)

    # --- calls ------------------------------------------------------------------------------------------------

    def invoke_method(
        self, path: str | os.PathLike[str], target: str, /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False, kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        """Call ``target`` (dotted: ``func``, ``Class.method``, ``sub.module.func``) of a ``.py`` file, a package folder,
        a ``.zip`` or ``.whl`` or a module by name, in the child, and return its result.

        The file is read here and sent; the child needs no sight of it. ``timeout`` in seconds kills the child when it
        runs out; with 0 nothing is waited for, and what is there at once is returned all the same. ``returns`` checks and builds
        the result; ``kwargs`` is for parameters named like these. What ``async def`` returns is awaited in the child; of a
        generator the caller gets a stream, each item fetched when it is asked for; ``returns=Iterator[X]`` is for a generator
        of X, ``Generator[X, S, R]`` for one whose ``value`` is an R.
        Raises OptionsError, TargetNotFound, CompileError, RemoteError, CallTimeout, ChildTerminated, SerializationError.
        """
        code = self._code(path, target)
        if kwargs is not None:
            keywords = merged(keywords, kwargs)
        call = ("method", code.key, target, self._packer.arguments(args, keywords))
        return self._invoke(call, None, code, timeout, returns, idempotent)

    def invoke(
        self, function: Callable[..., Any], /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False, kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        """Call a function, lambda or closure in the child. It is sent by value with cloudpickle; what it changes there
        changes nothing here. Parameters and errors as for ``invoke_method``.
        """
        payload = self._packer.function(function, args, merged(keywords, kwargs))
        return self._invoke(("function", payload), None, None, timeout, returns, idempotent)

    def execute(
        self, function: Callable[..., Any] | str, /, *args: Any, timeout: float | None = None, returns: Any = None,
        idempotent: bool = False, kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> CallResult:  # fmt: skip
        """Like ``invoke``, with what was written to fds 1 and 2 meanwhile, also by C code and subprocesses.

        ``function`` may be a target as text: ``"plugin.py:Tools.shrink"``. Each stream is kept up to ``Limits.output``
        bytes (``truncated`` says if there was more) and decoded as UTF-8 with replacement.
        """
        keywords = merged(keywords, kwargs)
        if isinstance(function, str):
            path, target = split_target(function)
            code = self._code(path, target)
            call: tuple[Any, ...] = ("method", code.key, target, self._packer.arguments(args, keywords))
            return self._captured(call, code, timeout, returns, idempotent)
        return self._captured(
            ("function", self._packer.function(function, args, keywords)), None, timeout, returns, idempotent
        )

    def run_source(
        self, source: str, *, timeout: float | None = None, returns: Any = None, idempotent: bool = False
    ) -> CallResult:
        """Run a snippet in a namespace that is kept between calls; ``value`` is that of the last expression, or None.

        Raises CompileError with the line when it does not compile, RemoteError when it raises, OptionsError for what is
        no text.
        """
        if not isinstance(source, str):
            raise OptionsError(f"source: expected text, not {source!r}"[:200])
        return self._captured(("source", source, "<source>"), None, timeout, returns, idempotent)

    def run_script(
        self, path: str | os.PathLike[str], argv: Sequence[str] = (), *, stdin: Any = None, timeout: float | None = None,
        idempotent: bool = False,
    ) -> ExitInfo:  # fmt: skip
        """Run a file like ``python tool.py --fast``: ``argv`` without the name, which is ``path`` as it is given. Threads that
        it starts are waited for, and its exit handlers run. The child lives on; the ExitInfo is the script's: its exit
        code (or SIGINT as its ``signal``, after a KeyboardInterrupt that it does not catch), stdout and stderr.

        ``stdin`` is what it reads: text or bytes (in a file of the child's memory, so up to ``Limits.file_size``), or an open
        file, pipe or socket, which it gets as it is; nothing by default.
        """
        from pisupervisor.link.calls import is_exit_code
        from pisupervisor.results import ExitInfo, ExitReason

        code = self._reader.read(path)
        call: tuple[Any, ...] = ("script", code.key, check_argv(argv, os.fspath(path)))
        if stdin is not None:
            call += (self._packer.arguments((check_stdin(stdin, idempotent),), {}),)
        result = self._captured(call, code, timeout, None, idempotent, is_exit_code)
        number = -result.value if result.value < 0 else None
        return ExitInfo(
            exit_code=result.value if number is None else None, signal=number,
            reason=ExitReason.EXITED if number is None else ExitReason.SIGNALED, duration=result.duration,
            cpu_time=result.usage.cpu_time, peak_memory=result.usage.peak_memory, stderr_tail=result.stderr[-4096:],
            stdout=result.stdout, stderr=result.stderr, truncated=result.truncated,
        )  # fmt: skip

    def map(
        self, function: Callable[..., Any] | str, /, *iterables: Iterable[Any], timeout: float | None = None,
        returns: Any = None, idempotent: bool = False, in_flight: int = 128,
    ) -> Pipeline:  # fmt: skip
        """``function`` (or a target as text, ``"plugin.py:shrink"``) on each item, as ``map`` does it: an iterator over the
        results, in order. The function is sent once; up to ``in_flight`` calls are on their way or wait in the child, and so
        many items are fetched ahead.

        ``timeout`` is for each call, from the answer before it. What a call raises ends the iteration; those that are under
        way then are done all the same. A child that dies ends it too, unless ``idempotent``.
        """
        from pisupervisor.supervise.pipeline import Pipeline, Target, check_map

        check_map(function, timeout, returns, in_flight)
        limit = self.options.call_timeout if timeout is None else timeout
        if isinstance(function, str):
            path, name = split_target(function)
            target = Target(self._code(path, name), name)
        else:
            target = Target(None, "", self._packer.function(function, (), {}))
        self._keeper.check_open()
        arguments = self._packer.arguments
        payloads = (arguments(items, {}) for items in zip(*iterables))  # noqa: B905 - as map does it
        finish = None
        if returns is not None:
            from functools import partial

            from pisupervisor.link.returns import build

            finish = partial(build, returns=returns)
        return Pipeline(self._session, target, payloads, limit, in_flight, idempotent, finish, owner=self)

    def submit(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> IsolationFuture:
        """``invoke`` without waiting: a future. Its ``cancel()`` kills the work if it runs already. As many run at once as
        ``options.max_concurrency`` says, the others wait in the order in which they came. Their ``timeout`` begins after that.
        """
        return self.submit_call(self.invoke, function, *args, **keywords)

    def submit_call(self, method: Callable[..., Any], /, *args: Any, **keywords: Any) -> IsolationFuture:
        """Any of the calls above without waiting: ``isolator.submit_call(isolator.invoke_method, "a.py", "f", 1)``."""
        from pisupervisor.objects import BoundMethod, IsolatedMethod, IsolatedObject, check_call
        from pisupervisor.worker import Crew

        check_call(method, self, (BoundMethod, IsolatedMethod, IsolatedObject))
        self._keeper.check_owner()  # before the lock, which in a fork may be held for ever
        with self._crew_lock:
            self._keeper.check_open()
            if self._crew is None:
                self._crew = Crew(f"pisupervisor-{self.id}", self._session, self.options.max_concurrency)
            return self._crew.line_for(method).add(method, args, keywords)

    # --- objects, callbacks and data --------------------------------------------------------------------------

    def create_object(
        self, code: str | os.PathLike[str] | Callable[..., Any], /, *args: Any, timeout: float | None = None,
        idempotent: bool = False, kwargs: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> IsolatedObject:  # fmt: skip
        """Make an object that lives in the child: ``create_object("plugin.py", "Counter", 5)``, with a class or a function
        that makes the object as the target (or ``"plugin.py:Counter"``), or ``create_object(Counter, 5)`` for a class or
        function sent by value. ``idempotent``: should the child die meanwhile, the object is made in another.
        """
        keywords = merged(keywords, kwargs)
        if callable(code):
            call: tuple[Any, ...] = ("create by value", self._packer.function(code, args, keywords))
            return self._keep(call, None, timeout, idempotent)
        target, *rest = args or (None,)
        if isinstance(code, str) and ":" in code and not os.path.exists(code):
            (code, target), rest = split_target(code), [*args]
        if not isinstance(target, str):
            raise OptionsError('create_object: name a class too, as in create_object("plugin.py", "Counter", 5)')
        read = self._code(code, target)
        call = ("create", read.key, target, self._packer.arguments(tuple(rest), keywords))
        return self._keep(call, read, timeout, idempotent)

    def copy_object(self, value: Any, *, timeout: float | None = None, idempotent: bool = False) -> IsolatedObject:
        """A copy of ``value`` that lives in the child. ``idempotent``: see ``create_object``."""
        return self._keep(("copy", self._packer.value(value)), None, timeout, idempotent)

    def get_method(self, path: str | os.PathLike[str], target: str) -> IsolatedMethod:
        """A handle to a function or method: ``method(*args)`` as ``invoke_method``, ``method.invoke(obj, *args)`` on objects.
        The code is read now, and once: whatever becomes of the file, the handle stands for what was in it.
        """
        from pisupervisor.objects import IsolatedMethod

        self._keeper.check_open()
        return IsolatedMethod(self, self._code(path, target), path, target)

    def shared_array(self, shape: int | Sequence[int], dtype: Any = "float64") -> Any:
        """A numpy array of zeros whose memory this process and the isolator's children both see. As an argument it costs the
        same whatever its size, and so does any view of it; results are copies. Every later child sees it too.

        It lives as long as something refers to it, here or there, also after ``close()``, when nobody else sees it any
        more. The child may write to it at any moment: copy what must not change between check and use, and above all what
        is used as an index. Raises OptionsError for what is no shape or no dtype of numbers, bool or times.
        """
        self._keeper.check_open()
        from pisupervisor import shared

        return shared.shared_array(self.id, shape, dtype, self._keeper.forget_memory)

    def object_count(self) -> int:
        """How many objects and streams live in the child for the sake of a handle here."""
        from pisupervisor.link.calls import is_number

        count: int = self._session.call("count objects", check=is_number).value
        return count

    def register_callback(self, name: str, function: Callable[..., Any], *, expose_errors: bool = False) -> None:
        """Let code in the child call ``function``: ``pihost.call_host(name, *args, **kwargs)``. Arguments are data, at most
        ``Limits.result`` bytes; the result travels as arguments of a call do, big arrays, open files and shared arrays too.

        It runs in the thread that made the call which the child works on, and may call into the child in turn. What it
        raises is logged here; the child is told that it failed, and only with ``expose_errors`` how.
        """
        self._keeper.check_open()
        self._callbacks.register(name, function, expose_errors)

    def unregister_callback(self, name: str) -> None:
        """Raises OptionsError where there is none of that name."""
        self._callbacks.unregister(name)

    def set_data(self, name: str, value: Any) -> None:
        """Keep something beside this isolator, in the host; it never reaches the child."""
        self._data[name] = value

    def get_data(self, name: str) -> Any:
        """What ``set_data`` kept, or None."""
        return self._data.get(name)

    def _keep(
        self, call: tuple[Any, ...], code: Code | None, timeout: float | None, idempotent: bool
    ) -> IsolatedObject:
        from pisupervisor.link.calls import is_number
        from pisupervisor.objects import IsolatedObject

        done = self._session.call(*call, code=code, timeout=timeout, idempotent=idempotent, check=is_number)
        return IsolatedObject(self, done.connection, done.value)

    # --- one call ---------------------------------------------------------------------------------------------

    def _invoke(
        self, call: tuple[Any, ...], head: bytes | None, code: Code | None, timeout: float | None, returns: Any,
        idempotent: bool = False, only_on: Connection | None = None,
    ) -> Any:  # fmt: skip
        """The value of a call; of one that returned a generator, a stream of its items. ``head``: see ``call_plain``."""
        streams, value_type, stream_types = True, None, None
        if returns is not None:
            from pisupervisor.link.calls import split_returns

            streams, value_type, stream_types = split_returns(returns)
        head = head or self._pack_head(call[0], False, *call[1:-1])
        done = self._session.call_plain(
            call, head, call[-1], code, timeout, idempotent, only_on, value_type, None, streams
        )  # fmt: skip
        if type(done) is self._outcome:
            return self._result(done, timeout, stream_types)
        return done if stream_types is None or type(done) is not self._sent else done._replace(types=stream_types)

    def _captured(
        self, call: tuple[Any, ...], code: Code | None, timeout: float | None, returns: Any, idempotent: bool,
        check: Callable[[Any], bool] | None = None,
    ) -> CallResult:  # fmt: skip
        from pisupervisor.link.calls import split_returns
        from pisupervisor.results import CallResult, Usage

        streams, value_type, stream_types = split_returns(returns)
        started = time.monotonic()
        done = self._session.call(
            *call, code=code, timeout=timeout, idempotent=idempotent, capture=True, returns=value_type, check=check,
            streams=streams and check is None,
        )  # fmt: skip
        used, answer = done.after, done.answer
        cpu = None if used.cpu_time is None else max(0.0, used.cpu_time - (done.before.cpu_time or 0.0))
        return CallResult(
            value=self._result(done, timeout, stream_types), stdout=answer.stdout.decode("utf-8", "replace"),
            stderr=answer.stderr.decode("utf-8", "replace"), truncated=answer.truncated,
            duration=time.monotonic() - started, usage=Usage(cpu_time=cpu, peak_memory=used.peak_memory),
        )  # fmt: skip

    def _result(self, done: Outcome, timeout: float | None, types: StreamTypes | None = None) -> Any:
        if done.answer.kind != wire.STREAM:
            return done.value
        from pisupervisor.link.calls import StreamTypes
        from pisupervisor.objects import IsolatedStream

        return IsolatedStream(self, done.connection, done.value, timeout, types or StreamTypes())

    def _code(self, path: str | os.PathLike[str], target: str) -> Code:
        from pisupervisor.link.sources import check_target

        check_target(target)
        return self._reader.read(path)

    # --- the end ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the child and everything in it, and give back every thread, fd, group and process. Idempotent."""
        self._keeper.close()
        self._close_crew()

    def _close_crew(self) -> None:
        if os.getpid() != self._keeper.owner:
            return  # in a fork of the application the lock may be held for ever
        with self._crew_lock:
            crew = self._crew
        if crew is not None:
            crew.close()
        self._crew = None  # not before: what a signal's handler interrupts is done by the next close

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {self._keeper.state}>"

    def __enter__(self) -> ProcessIsolator:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        keeper = getattr(self, "_keeper", None)
        if keeper is None or (keeper.is_given_back and self._crew is None) or sys.is_finalizing():
            return  # when the application ends, all children end with it
        keeper.abandon()  # the last net: nobody called close(), or what it did was interrupted
        self._close_crew()
