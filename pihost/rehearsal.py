"""What a zygote does while nobody waits: imports, and calls that it makes up and answers itself, so that no child makes its
first call cold.

From 3.11 on the interpreter rewrites code as it runs for the first times; in a child each such write copies a page. With
the code rewritten before the fork, a child's first call took 1.2 ms instead of 2.2, with 100 page faults fewer. What is
called here is ours alone: nothing of a user's runs, and nothing stays but what the interpreter has learnt.
"""

from __future__ import annotations

import _pickle
import _socket

from pihost import wire
from pihost.inside import serve

TYPE_CHECKING = False  # importing typing costs 4 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: Not cloudpickle: it brings logging, whose fork hooks cost every child 0.35 ms; a host that sends closures asks for it.
_IMPORTS = ("pickle", "socket", "json", "traceback", "ast")
ROUNDS = 20  #: code is rewritten after 8 runs, the rewritten code once more after it was run
_SOURCE = b"""
class Tool:
    def turn(self, *args, **keywords):
        return [args, keywords, {"a": 1.5, "b": None}, "text", b"bytes"]

def answer():
    return 42

def fail():
    raise ValueError("rehearsed")
"""
_LIMITS = {"result": 1 << 20, "pickle": 0, "modules": 0}


def pieces(settle: Callable[[], None]) -> Iterator[bool]:
    """The whole of it in pieces of about a millisecond, each of which a request may have to wait for. Best effort."""
    for number in range(ROUNDS):
        try:
            once(number)
        except Exception:
            break  # a module of the user's that was preloaded may have changed anything
        yield False
    settle()
    for name in _IMPORTS:
        yield False
        keep([name])
        settle()


def keep(names: Iterable[str]) -> None:
    for name in names:
        try:
            __import__(name)
        except ImportError:
            continue


def once(number: int) -> None:
    """One child's first calls, in a worker and a library that are thrown away. ``number`` makes its module a new one."""
    ours, theirs = _socket.socketpair()
    worker = serve.Worker()
    worker.begin(serve.Link(theirs.detach()), _LIMITS)
    key = f"file:{number}"
    code = (key, "file", "rehearsed", "/rehearsed.py", (("rehearsed.py", _SOURCE),))
    calls = [("answer", ()), ("answer", ()), ("Tool.turn", (1, "two")), ("fail", ())]
    bodies = [_head("method", False, key, target) + _pickle.dumps((args, {}), 5) for target, args in calls]
    frames = [(wire.CODE, _pickle.dumps(code, 5)), *((wire.CALL, body) for body in bodies)]
    try:
        for kind, body in [*frames, (wire.CALL, _head("source", False, "x = 6 * 7\nx", "<source>"))]:
            ours.sendall(wire.pack_header(kind, 7, len(body)) + body)
        ours.shutdown(_socket.SHUT_WR)
        worker.quick.serve(worker.link)
    finally:
        worker.library.close()
        worker.link.sock.close()
        ours.close()


def _head(*parts: object) -> bytes:
    head = _pickle.dumps(parts, 5)
    return wire.HEAD.pack(len(head)) + head
