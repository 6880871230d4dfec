"""The call loop: receive, resolve, run, reply. One call at a time, in the main thread, without a thread switch; for calls
side by side see ``threads``.
"""

from __future__ import annotations

# The C modules behind socket, pickle and signal: the packages would import enum and re, most of a zygote's start.
import _pickle
import _signal
import os
import struct
import sys

from pihost import wire
from pihost.inside import arenas, attached, awaiting, callbacks, encode, objects, resolve, run, taught
from pihost.inside.capture import Capture, StandardInput, redirect
from pihost.inside.failures import answer_to, unloadable
from pihost.inside.link import Link as Link
from pihost.inside.quick import Quick
from pihost.jsontext import dump

if False:  # typing costs 5 ms, and only a type checker reads this
    from collections.abc import Callable
    from typing import Any

    from pihost.inside.threads import Inbox


def serve(worker: Worker, link: Link, limits: dict[str, int], debug: bool) -> int:
    """Answer calls until the host closes the link; the exit code of the payload, unless it dies as a process does of SIGINT."""
    if debug:
        os.kill(os.getpid(), _signal.SIGSTOP)
    reseed()
    worker.begin(link, limits)
    if limits["modules"]:
        from pihost.inside import asking

        asking.install()
    if limits["lines"] and sys.__stdout__ is not None:  # somebody waits for them: not only when 8 KB are full
        sys.__stdout__.reconfigure(line_buffering=True)
    if limits["concurrency"] > 1:
        from pihost.inside.threads import Threads

        answer = Threads(worker, limits["concurrency"]).serve
    else:
        worker.host = callbacks.host = callbacks.Host(link, worker.serve_one, limits["result"])
        answer = lambda: worker.quick.serve(link)  # noqa: E731
    try:
        return answer()
    except OSError:
        return 1  # of the link: nobody is there to be told
    except BaseException as error:
        uncaught = error  # of a signal's handler, between two calls: what a process does then
    link.sock.close()  # who calls now goes to another child, and does not wait for this one's threads
    code = run.code_after(uncaught)
    worker.leave()
    if code < 0:
        _signal.signal(-code, _signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def reseed() -> None:
    """What was preloaded and keeps random state, which all children of a zygote would share. Python's own generator reseeds
    itself after a fork. OpenSSL and tempfile do so when the pid is another, and in a container the zygote can be pid 2, as
    every payload is; numpy and multiprocessing never do.
    """
    loaded = sys.modules.get
    if (numpy_random := loaded("numpy.random")) is not None:
        numpy_random.seed()
    if (ssl := loaded("_ssl")) is not None:
        ssl.RAND_add(os.urandom(32), 32.0)
    if (tempfile := loaded("tempfile")) is not None:
        tempfile._name_sequence = None  # type: ignore[attr-defined]
    if (process := loaded("multiprocessing.process")) is not None:
        process.current_process().authkey = os.urandom(32)


class Worker:
    """Runs calls. What they leave behind (modules, the namespace of source snippets) stays for the next ones. A zygote makes
    one, for all its children to be born with.
    """

    link: Link
    limits: dict[str, int]
    own_pid: int
    inbox: Link | Inbox  # where frames come from: the link, or whoever reads that for all
    sends_plain: bool  # numbers, text and what JSON has, at once and as they are

    def __init__(self) -> None:
        self.host: callbacks.Host | None = None  # the way back to it, for what runs here
        self.loop = awaiting.Loop()
        self.loops = [self.loop]
        self.released: list[int] = []
        # Pipes for what the next call writes, if that is captured: the first that ride on it.
        self.output: list[int] = []
        self.library = resolve.Library()
        self.main = run.source_module()
        self.namespace = self.main.__dict__
        self.quick = Quick(self)

    def begin(self, link: Link, limits: dict[str, int]) -> None:
        """In the child."""
        sys.modules["__main__"] = self.main  # the zygote's rehearsals had their own
        self.link = self.inbox = link
        self.limits, self.sends_plain = limits, not limits["pickle"]
        self.own_pid = os.getpid()

    def twin(self) -> Worker:
        """Another one, for another thread, with the same modules, objects and namespace."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__, loop=awaiting.Loop(), released=[], output=[])
        self.loops.append(twin.loop)
        return twin

    def serve_one(self, frame: tuple[int, int, bytes]) -> None:
        """Do what one frame says. Also while user code waits for the host: see ``callbacks``."""
        kind, ident, body = frame
        if kind == wire.CALL or kind == wire.INNER:
            self.serve_call(ident, body, 0 if kind == wire.CALL else wire.OUTER.size)
        elif kind == wire.CODE:
            self.library.add(_pickle.loads(body))
        elif kind == wire.STDIO:
            redirect(self.inbox.take_fds(), body[0])
        elif kind == wire.RELEASE:
            self.released += struct.unpack(f"<{len(body) // 8}Q", body)
        elif kind == wire.EXIT:
            os._exit(self.leave())

    def serve_call(self, ident: int, body: bytes, at: int) -> None:
        """The call that begins at that place of a frame's body."""
        if self.host is not None:
            self.host.call_id = ident
        at += wire.HEAD.size
        end = at + wire.HEAD.unpack_from(body, at - wire.HEAD.size)[0]
        head = body[at:end]
        call = _pickle.loads(head)
        if end < len(body):
            call += (body[end:],)
        fds = self.inbox.take_fds()
        if call[1]:
            self.output, fds = fds[:2], fds[2:]
        if fds or self.released or attached.has_parts(call):
            with attached.Call(call, fds):
                self.drop_released()
                answer = self.answer(call)
        else:
            answer = self.answer(call)
            self.quick.learn(head, call, answer)
        self.reply(ident, answer)

    def reply(self, ident: int, answer: tuple[int, list[bytes]]) -> None:
        self.end_copy()
        if arenas.arguments.lent:
            arenas.arguments.give_back([])  # in which callbacks' answers came
        self.link.send(answer[0], ident, answer[1])

    def end_copy(self) -> None:
        """User code may have forked, in whatever way, and let the copy return: only the original may answer."""
        if os.getpid() != self.own_pid:
            os._exit(0)

    def leave(self) -> int:
        """As the interpreter does; the exit code."""
        callbacks.host = None  # nobody listens any more
        callbacks.of_threads.clear()
        return run.leave(self.close_loops)

    def close_loops(self) -> None:
        for loop in self.loops:
            loop.close()

    def drop_released(self) -> None:
        """Only when a call has been read whole: what ends with an object may call the host, which then listens."""
        numbers, self.released = self.released, []
        self.quick.forget()
        attached.forget(numbers)
        for value in objects.kept.release(numbers):
            self.loop.end(value)

    def take_output(self) -> list[int]:
        pipes, self.output = self.output, []
        return pipes

    def answer(self, call: tuple[Any, ...]) -> tuple[int, list[bytes]]:
        """(kind, parts) of the reply to one call. Whatever user code does is an answer too."""
        verb, capture, arguments = call[0], call[1], call[2:]
        try:
            if capture:
                with Capture(self.take_output()):
                    value = self.loop.complete(VERBS[verb](self, *arguments))
            else:
                value = VERBS[verb](self, *arguments)
                plain = encode.PLAIN.get(type(value)) if self.sends_plain else None
                if plain is not None:
                    text = plain(value)
                    if text is not None and len(text) <= self.limits["result"]:
                        return wire.RESULT, [wire.pack_text(text)]
                value = self.loop.complete(value)
            if verb == "arena":  # the host's own question, for which it unpickles nothing
                return wire.RESULT, wire.pack_value(dump(value), [])
            return self.pack(taught.serialized(value) if verb in OF_USERS else value)
        except BaseException as error:  # whatever user code does is an answer too
            return answer_to(error)

    def pack_users(self, value: object) -> tuple[int, list[bytes]]:
        """What user code has returned, awaited where that is to be done."""
        return self.pack(taught.serialized(self.loop.complete(value)))

    def pack(self, value: object) -> tuple[int, list[bytes]]:
        if awaiting.is_stream(value):
            return wire.STREAM, [struct.pack("<Q", objects.kept.keep(self.loop.bound(value)))]
        if self.limits["pickle"]:
            return arenas.ship_pickled(value, self.limits["result"])
        text, buffers = encode.encode(value, self.limits["result"])
        return arenas.ship(text, buffers)

    def call_method(self, key: str, target: str, arguments: bytes) -> object:
        function = self.library.callable_for(key, target)
        args, kwargs = load(arguments)
        return function(*args, **kwargs)

    def target_of(self, call: tuple[Any, ...]) -> resolve.Found | None:
        """What a call of the verbs "method" and "kept" calls, None where it was released meanwhile."""
        if call[0] == "method":
            return self.library.find(call[2], call[3])
        function = objects.kept.find(call[2])
        return None if function is None else (function, {}, "", None, [], None)

    def add_arena(self, number: int, size: int, kept: bool, dropped: list[int]) -> bool:
        try:
            fd = attached.take(0)
        except OSError:
            return False
        return arenas.arguments.add(fd, number, size, kept, dropped)

    def call_function(self, arguments: bytes) -> object:
        function, args, kwargs = load(arguments)
        return function(*args, **kwargs)

    def start(self, arguments: bytes) -> object:
        """What it returns is nobody's; but a generator has not run."""
        value = self.loop.complete(self.call_function(arguments))
        return value if awaiting.is_stream(value) else None

    def keep_function(self, arguments: bytes) -> int:
        return objects.kept.keep(load(arguments)[0])

    def call_kept(self, number: int, arguments: bytes) -> object:
        args, kwargs = load(arguments)
        return objects.kept.get(number)(*args, **kwargs)

    def create_object(self, key: str, target: str, arguments: bytes) -> int:
        return objects.kept.keep(self.loop.complete(self.call_method(key, target, arguments)))

    def create_by_value(self, arguments: bytes) -> int:
        return objects.kept.keep(self.loop.complete(self.call_function(arguments)))

    def copy_object(self, arguments: bytes) -> int:
        (value,), _nothing = load(arguments)
        return objects.kept.keep(value)

    def call_on_object(self, number: int, name: str, arguments: bytes) -> object:
        method = resolve.method_of(objects.kept.get(number), name)
        args, kwargs = load(arguments)
        return method(*args, **kwargs)

    def apply_method(self, key: str, target: str, number: int, arguments: bytes) -> object:
        function = self.library.function_for(key, target)
        args, kwargs = load(arguments)
        return function(objects.kept.get(number), *args, **kwargs)

    def next_item(self, number: int) -> list[object]:
        over, item = self.loop.next_of(objects.kept.get(number))
        return [over, taught.serialized(item)]

    def learn(self, arguments: bytes) -> None:
        (entries, serializer, arrow), _nothing = load(arguments)
        found = [(name, self.find(kind), self.find(encoder)) for name, kind, encoder in entries]
        taught.learn(found, serializer, arrow)
        self.sends_plain &= serializer is None

    def find(self, part: Any) -> Any:
        """The class or function itself, or what (key of the code, target) stands for."""
        return self.library.function_for(*part) if isinstance(part, tuple) else part

    def count_objects(self) -> int:
        return len(objects.kept)

    def run_source(self, source: str, filename: str) -> object:
        return run.run_source(self.namespace, source, filename)

    def run_script(self, key: str, argv: list[str], stdin: Any = None) -> int:
        if stdin is None:
            return run.run_script(self.library, key, argv)
        (source,), _nothing = load(stdin)
        with StandardInput(source):
            return run.run_script(self.library, key, argv)


VERBS: dict[str, Callable[..., object]] = {
    "method": Worker.call_method,
    "function": Worker.call_function,
    "start": Worker.start,
    "keep function": Worker.keep_function,
    "kept": Worker.call_kept,
    "source": Worker.run_source,
    "script": Worker.run_script,
    "create": Worker.create_object,
    "create by value": Worker.create_by_value,
    "copy": Worker.copy_object,
    "on object": Worker.call_on_object,
    "apply": Worker.apply_method,
    "next": Worker.next_item,
    "count objects": Worker.count_objects,
    "learn": Worker.learn,
    "arena": Worker.add_arena,
}
OF_USERS = frozenset(("method", "function", "source", "on object", "apply", "kept"))  # whose values are the user's own


def load(arguments: Any) -> Any:
    """Arguments, or a function and its arguments: a pickle, or one with what came beside it."""
    try:
        return callbacks.loads(arguments) if type(arguments) is bytes else attached.load(*arguments)
    except Exception as error:
        raise unloadable(error) from error
