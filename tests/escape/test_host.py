"""The host's side of the link, against children that do not keep to the protocol. One named test for each of the 29 checks
known from other sandboxes (H01 to H34, as they are numbered there), each beside a neighbour that must not notice anything.
"""

# ruff: noqa: E501  (hostile code is data here; broken over lines it reads worse)
from __future__ import annotations

import array
import ast
import json
import os
import pickle
import random
import shutil
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import features
import numpy as np
import pytest
from helpers import descendants, open_fds, resident, state_of, take_descriptors, wait_until
from hostile import PRELUDE, attack, bounded, limits

import pihost
import pisupervisor
from pihost import wire
from pisupervisor import (
    CallError,
    CallTimeout,
    ChildTerminated,
    Descriptor,
    Filesystem,
    IsolationError,
    IsolatorClosed,
    LaunchError,
    OptionsError,
    ProcessIsolator,
    ProtocolError,
    RemoteError,
    RestartLimitReached,
    RestartPolicy,
    Security,
    SerializationError,
)
from pisupervisor.launch import templates
from pisupervisor.link import channel, serializer
from pisupervisor.link.calls import unpack_answer
from pisupervisor.link.connection import Answer, Connection, LinkClosed
from pisupervisor.link.reader import DATA
from pisupervisor.results import ExitReason
from pisupervisor.supervise.reports import Reports

pytestmark = [pytest.mark.linux, pytest.mark.root]

MIB = 1 << 20


@pytest.fixture
def isolator() -> Iterator[ProcessIsolator]:
    """The attacked one. Nothing of the attack is left in the host: no descriptor, no thread, and little memory."""
    with ProcessIsolator.create(limits=limits(), restart=RestartPolicy(backoff=0.0)) as made:
        made.submit(len, "abc").result(10)  # what only a first call makes is there
        made.run_source("1")
        made.register_callback("now", time.time)
        fds, threads = len(open_fds()), threading.active_count()
        yield made
        assert made.run_source("6 * 7", timeout=10.0).value == 42
        assert wait_until(lambda: len(open_fds()) <= fds), open_fds()
        assert threading.active_count() <= threads


@pytest.fixture(autouse=True)
def neighbour() -> Iterator[None]:
    """Another child, called all the while: every answer is right, and it waits no longer than it would anyway."""
    took: list[float] = []
    over = threading.Event()

    def call(other: ProcessIsolator) -> None:
        while not over.wait(0.02):
            started = time.monotonic()
            if other.invoke(pow, 3, 2) == 9:
                took.append(time.monotonic() - started)

    with ProcessIsolator.create(limits=limits()) as other:
        assert other.invoke(pow, 3, 2) == 9
        thread = threading.Thread(target=call, args=(other,))
        thread.start()
        try:
            yield
            time.sleep(0.1)
        finally:
            over.set()
            thread.join()
    assert took, "the neighbour was never answered"
    assert statistics.median(took) < 0.1


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that children may write to, outside /tmp (which they have one of their own of)."""
    folder = Path(tempfile.mkdtemp(prefix="pisupervisor-shared-", dir="/var/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def breaks_the_protocol(isolator: ProcessIsolator, code: str, match: str = "") -> None:
    """One ProtocolError, and the child is dead of it."""
    before = isolator.invoke(os.getpid) and isolator.pid
    with pytest.raises(ProtocolError, match=match or None):
        isolator.run_source(PRELUDE + code, timeout=20.0)
    assert before
    assert wait_until(lambda: state_of(before) in ("", "Z"))
    assert isolator.pid != before
    exit_info = isolator._keeper.last_exit
    assert exit_info is not None
    assert exit_info.reason is ExitReason.PROTOCOL


# --- frames --------------------------------------------------------------------------------------------------------


def test_H01_a_lie_about_a_frames_length(isolator: ProcessIsolator) -> None:
    isolator.invoke(lambda: [1.5])  # what decoding imports is there
    tracemalloc.start()
    try:
        breaks_the_protocol(
            isolator, "send(HEADER.pack(0x5149, 1, RESULT, ident(), 0xFFFFFFFF)); time.sleep(100)", "are allowed"
        )
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_H02_a_byte_a_second(isolator: ProcessIsolator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for a frame runs from its first byte, not from read to read: ten seconds, here one."""
    assert channel._FRAME_TIME == 10.0
    monkeypatch.setattr(channel, "_FRAME_TIME", 1.0)
    with bounded(4.0):
        breaks_the_protocol(
            isolator,
            "for b in frame(RESULT, ident(), value(b'1')): send(bytes([b])); time.sleep(0.2)",
            "not whole after 1 s",
        )


def test_H04_a_frame_of_nothing(isolator: ProcessIsolator) -> None:
    """Not the end of the link, which on a SEQPACKET socket would look the same: ours is a stream."""
    assert isolator._keeper.connection is not None
    assert isolator._keeper.connection.link.type == socket.SOCK_STREAM
    breaks_the_protocol(
        isolator, "send(HEADER.pack(0x5149, 1, RESULT, ident(), 0)); time.sleep(100)", "a frame of 0 bytes"
    )


@pytest.mark.parametrize(
    "text",
    [
        "b'[' * 10**6",
        "b'[' * 10**6 + b']' * 10**6",
        """b'{"a":' * 10**6""",
        """b'{"$":"tuple","v":[' * 10**5 + b']}' * 10**5""",
    ],
)
def test_H05_a_nesting_bomb(isolator: ProcessIsolator, text: str) -> None:
    with bounded(5.0):
        breaks_the_protocol(isolator, f"forge(RESULT, value({text}))")


@pytest.mark.parametrize("kind", ["RESULT", "PICKLED", "RAISED", "REFUSED", "CALLBACK"])
def test_H06_a_pickle_in_any_slot_runs_nothing(isolator: ProcessIsolator, tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o777)
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    evil = pickle.dumps(Evil())
    number = {"CALLBACK": 70}.get(kind, kind)
    for body in (f"{evil!r}", f"value({evil!r})", f"value(b'0', {evil!r})"):
        breaks_the_protocol(isolator, f"send(frame({number}, ident(), {body})); time.sleep(100)")
    assert not canary.exists()
    pickle.loads(evil)  # the control: where somebody reads it, it does run
    assert canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        """b'{"$":"pickle","v":"gASVAAAA"}'""", """b'{"$":"own","v":["builtins.eval","1"]}'""", """b'{"$":"serialized","v":"gASVAAAA"}'""",
        """b'{"$":"array","v":["|O",[1],"AAAAAAAAAAA="]}'""", """b'{"$":"scalar","v":["O8","AAAAAAAAAAA="]}'""",
        """b'{"$":"array","v":["V8",[1],"AAAAAAAAAAA="]}'""", """b'{"$":"array","v":["f8,O",[1],"AAAAAAAAAAA="]}'""",
    ],
)  # fmt: skip
def test_H07_a_pickle_in_an_allowed_type(isolator: ProcessIsolator, text: str) -> None:
    breaks_the_protocol(isolator, f"forge(RESULT, value({text}))")
    inert = isolator.invoke(lambda: [pickle.dumps(os.getcwd), {"pickle": pickle.dumps(os.getcwd)}])
    assert inert == [pickle.dumps(os.getcwd), {"pickle": pickle.dumps(os.getcwd)}], "bytes are bytes"


@pytest.mark.parametrize(
    "text",
    ["b'[' + b'[],' * 5_000_000 + b'0]'", "b'[' + b'{},' * 5_000_000 + b'0]'", "b'[' + b'0,' * 8_000_000 + b'0]'"],
)
def test_H09_amplification(isolator: ProcessIsolator, text: str) -> None:
    """Items are counted in the text, before anything is made of it."""
    isolator.invoke(lambda: [1.5])
    before = resident()
    with bounded(8.0):
        breaks_the_protocol(isolator, f"forge(RESULT, value({text}))", "more than 2000000 items")
    assert resident() - before < 128 * MIB


@pytest.mark.parametrize("said", ["ident() + 1", "ident() - 1", "0", "1", "999", "2**64 - 1"])
def test_H10_an_answer_to_another_call(isolator: ProcessIsolator, said: str) -> None:
    waiting = isolator.submit(lambda: "its turn comes")
    breaks_the_protocol(isolator, f"send(frame(RESULT, {said}, value(b'1'))); time.sleep(100)", "is under way")
    assert waiting.result(10) == "its turn comes"


def test_H10_an_answer_given_twice(isolator: ProcessIsolator) -> None:
    attack(isolator, "send(frame(RESULT, ident(), value(b'1'))); 2")
    with pytest.raises(ProtocolError):
        isolator.run_source("6 * 7", timeout=5.0)


def test_H11_a_deadline_holds_though_a_socket_takes_long_to_close() -> None:
    """Whoever reads what a socket rides on closes it, and waits for its last bytes as long as its SO_LINGER says: 30 s here."""
    code = """
import array
lingering, far = socket.socket(), socket.create_server(("127.0.0.1", 0))
far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
try:
    lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
except PermissionError:
    pass
lingering.connect(far.getsockname())
lingering.setblocking(False)
try:
    while lingering.send(bytes(65536)): pass
except BlockingIOError:
    pass
link = socket.socket(fileno=os.dup(3))
try:
    link.sendmsg([b"Q"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [lingering.fileno()]))])
except PermissionError:
    pass
lingering.close()
time.sleep(100)
"""
    with ProcessIsolator.create(limits=limits(), network="loopback") as isolator:
        assert isolator.run_source("6 * 7").value == 42
        with bounded(5.0):
            assert isinstance(attack(isolator, code, timeout=1.0), CallTimeout)


def test_H11_no_descriptor_can_be_sent_to_the_host(isolator: ProcessIsolator) -> None:
    features.need("passrights")
    code = "socket.send_fds(socket.socket(fileno=os.dup(3)), [b'x'], [1])"
    assert isinstance(attack(isolator, code), PermissionError)


def test_a_lie_about_a_callbacks_size_is_not_held_against_the_next_child(isolator: ProcessIsolator) -> None:
    """``callback_bytes`` are paid for afterwards: by who has been given a hundred billion years to do so, never."""
    code = """
text = b'"now"'
send(frame(76, ident(), struct.pack("<QII", 1, len(text), 1000) + struct.pack("<1000Q", *[1 << 62] * 1000) + text))
time.sleep(100)
"""

    def ask() -> object:
        import pihost

        return pihost.call_host("now")

    breaks_the_protocol(isolator, code, "an arena that is not there")
    assert isinstance(isolator.invoke(ask), float)


def test_a_callback_in_each_arena_that_an_answer_is_to_come_in(isolator: ProcessIsolator) -> None:
    """A large answer of a callback has the host ask the child to take memory for it; the child asks for the next one first."""
    code = """
link = socket.socket(fileno=os.dup(3))
INNER, ANSWER, RIDING = 3, 7, 32
def read(size):
    data = b""
    while len(data) < size: data += link.recvmsg(size - len(data), 1000)[0]
    return data
def ask(number): send(frame(70, number, value(b'["large",[],{}]')))
mine = ident()
ask(mine)
while True:
    kind, number, length = HEADER.unpack(read(16))[2:]
    read(length)
    if kind & ~RIDING == INNER: ask(number)
    elif kind & ~RIDING == ANSWER and number == mine: break
    elif kind & ~RIDING == ANSWER: send(frame(RESULT, number, value(b"false")))
6 * 7
"""
    large, calls = bytes(1 << 20), [0]

    def make() -> bytes:
        calls[0] += 1
        return large

    isolator.register_callback("large", make)
    threads = threading.active_count()
    with bounded(10.0):
        assert attack(isolator, code) == 42
    assert 10 < calls[0] < 50
    assert wait_until(lambda: threading.active_count() <= threads)  # who looks at deadlines stays for a moment


@pytest.mark.parametrize("body", ["frame(PIECE, ident(), b'x')", "b'x'"])
def test_H11_a_flood_of_attached_descriptors(isolator: ProcessIsolator, body: str) -> None:
    """As before Linux 6.16, which lets the host refuse them."""
    take_descriptors(isolator)
    before = open_fds()
    code = f"link = socket.socket(fileno=os.dup(3))\nfor _ in range(100): socket.send_fds(link, [{body}], [1] * 253)\nsend(b'?' * 99); time.sleep(100)"
    seen = [len(before)]
    watching = threading.Event()
    watcher = threading.Thread(
        target=lambda: [seen.append(len(open_fds())) for _ in iter(lambda: watching.wait(0.01), True)]
    )
    watcher.start()
    try:
        breaks_the_protocol(isolator, code)
    finally:
        watching.set()
        watcher.join()
    assert max(seen) < len(before) + 100, "25,300 were sent"


def _rights(*fds: int) -> tuple[int, int, Any]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)


@pytest.mark.parametrize("text", [b"{}", b'{"launched":7}', b"no JSON", b"[]"])
@pytest.mark.parametrize("rights", [[], [(0,)], [(0, 1)], [(0, 1, 2) * 80], [(0,), (1,)]])
def test_H12_descriptors_where_one_is_expected(text: bytes, rights: list[tuple[int, ...]]) -> None:
    """The zygote's reports may carry one pidfd. What is more is closed, and so is that of a report that cannot be read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        before = open_fds()
        try:
            theirs.sendmsg([text], [_rights(*fds) for fds in rights])
        except OSError:
            pytest.skip("this kernel sends no second header")
        reports = Reports(ours)
        assert reports._take(kill=False) is (text[:1] == b"{")
        assert open_fds() == before


def test_H12_an_inherited_descriptor_is_close_on_exec() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.sendmsg([b"{}"], [_rights(0)])
        _message, fds = Reports(ours).read()
        assert [os.get_inheritable(fd) for fd in fds] == [False]
        os.close(fds[0])


def test_H14_a_result_that_is_written_to_while_it_is_read(isolator: ProcessIsolator) -> None:
    """What the host has got is a copy of its own, whatever the child does to the array it returned."""

    def scribble() -> Any:
        import threading

        import numpy

        result = numpy.zeros(4_000_000)

        def write() -> None:
            while True:
                result[:] += 1.0

        threading.Thread(target=write, daemon=True).start()
        return result

    packages = os.path.dirname(os.path.dirname(np.__file__))
    with ProcessIsolator.create(import_paths=[packages], limits=limits(memory="1G", pids=None)) as other:
        got = other.invoke(scribble)
        first = got.copy()
        time.sleep(0.3)
        assert np.array_equal(got, first)
        assert got.dtype == np.float64


@pytest.mark.parametrize(
    "code",
    [
        "class E(Exception):\n    def __str__(self): return 'x' * (100 << 20)\nraise E()",
        "class E(Exception):\n    def __str__(self): return 5\nraise E()",
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E()",
        "def f(n): return f(n - 1) if n else 1 / 0\nsys.setrecursionlimit(10**6)\nf(5000)",
        "a, b = ValueError('a'), ValueError('b')\na.__cause__, b.__cause__ = b, a\nraise a",
        "a = ValueError('a')\nfor n in range(10**5):\n    b = ValueError(n); b.__context__ = a; a = b\nraise a",
        "raise ExceptionGroup('g', [ValueError(n) for n in range(10**5)])",
        "E = type('E' * 10**6, (Exception,), {'__module__': 'm' * 10**6})\nraise E('x')",
        "class E(Exception):\n    __class__ = property(lambda self: 1 / 0)\n    def __getattribute__(self, name): raise ZeroDivisionError\nraise E()",
    ],
    ids=["huge", "no text", "exits", "deep", "cycle", "chain", "group", "names", "attributes"],
)  # fmt: skip
def test_H15_an_evil_exception(isolator: ProcessIsolator, code: str) -> None:
    pid = isolator.pid
    with bounded(15.0), pytest.raises(RemoteError) as caught:
        isolator.run_source(PRELUDE + code, timeout=14.0)
    assert len(caught.value.message) <= 64 << 10
    assert len(caught.value.remote_traceback) <= 64 << 10
    assert isolator.pid == pid, "an exception ends nothing but its call"


def test_H15_an_exception_whose_text_never_ends(isolator: ProcessIsolator) -> None:
    with bounded(5.0), pytest.raises(CallTimeout):
        isolator.run_source(
            "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E()", timeout=1.0
        )


@pytest.mark.parametrize(
    "name",
    ["__class__.__init__", "os.system", "now.__globals__", "now.__call__", "NOW", "now\0", " now", "", "*", "../now"],
)
def test_H16_names_are_no_paths(isolator: ProcessIsolator, name: str) -> None:
    def ask(name: str) -> str:
        import pihost

        try:
            return repr(pihost.call_host(name))
        except Exception as error:
            return type(error).__name__

    assert isolator.invoke(ask, name) == "UnknownCallback"
    assert float(isolator.invoke(ask, "now")) > 0


def test_H17_a_storm_of_callbacks() -> None:
    """One at a time, ten thousand a second at the most, and what is over that costs the host next to nothing."""

    def storm(seconds: float) -> tuple[int, int]:
        import time

        import pihost

        good = bad = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                pihost.call_host("count")
                good += 1
            except pihost.HostError:
                bad += 1
        return good, bad

    counted: list[int] = []
    with ProcessIsolator.create(limits=limits(), callback_rate=500) as isolator:
        isolator.register_callback("count", lambda: counted.append(1))
        good, bad = isolator.invoke(storm, 2.0)
    assert len(counted) == good <= 500 * 2 + 500 + 50
    assert bad > 0


def test_H17_callbacks_within_callbacks() -> None:
    depths: list[int] = []

    def down(depth: int) -> Any:
        import pihost

        return pihost.call_host("down", depth + 1)

    with ProcessIsolator.create(limits=limits()) as isolator:

        def again(depth: int) -> Any:
            depths.append(depth)
            return isolator.invoke(down, depth)

        isolator.register_callback("down", again, expose_errors=True)
        with bounded(10.0), pytest.raises((RemoteError, CallError), match="nested more than 16 deep"):
            isolator.invoke(down, 0)
        assert max(depths) <= 17
        assert isolator.invoke(len, "abc") == 3


# Not os.close(3): the thread that reads holds the socket open, and to the host that is a child that says nothing.
SIDE_BY_SIDE = [
    "send(HEADER.pack(0x5149, 1, RESULT, 1, 0xFFFFFFFF))", "send(b'garbage' * 100)", "send(HEADER.pack(0x5149, 1, RESULT, 1, 0))",
    "send(frame(RESULT, 999, value(b'1')))", "send(frame(READY, 0, b'1'))", "send(frame(2, 0, b'1'))", "send(frame(70, 2**64 - 1, b'x'))",
    "link = socket.socket(fileno=os.dup(3))\ntry:\n socket.send_fds(link, [b'x'], [1] * 253)\nexcept PermissionError:\n pass\n"
    "send(b'?' * 99)",  # from Linux 6.16 on the host takes no descriptors
    "socket.socket(fileno=os.dup(3)).shutdown(socket.SHUT_WR)",
]  # fmt: skip


def _attack_from_within(code: str) -> None:
    names: dict[str, Any] = {}
    exec(PRELUDE + code + "\ntime.sleep(100)", names)


@pytest.mark.parametrize("code", SIDE_BY_SIDE)
def test_a_bad_word_among_calls_side_by_side(code: str) -> None:
    """It ends the child, and each of the calls in it, with one error of ours: nobody waits for ever."""
    with ProcessIsolator.create(limits=limits(), max_concurrency=4, restart=RestartPolicy(backoff=0.0)) as isolator:
        ends: list[BaseException] = []

        def call(code: str) -> None:
            try:
                isolator.invoke(_attack_from_within, code)
            except IsolationError as error:
                ends.append(error)

        threads = [threading.Thread(target=call, args=(each,)) for each in ("", "", "", code)]
        with bounded(10.0):
            for thread in threads:
                thread.start()
                time.sleep(0.1)
            for thread in threads:
                thread.join(10.0)
        assert len(ends) == 4
        assert all(isinstance(end, (ProtocolError, ChildTerminated)) for end in ends), ends
        reasons = {end.exit_info.reason for end in ends if isinstance(end, ChildTerminated)}
        assert reasons <= {ExitReason.PROTOCOL}
        assert isolator.invoke(len, "abc") == 3


# --- the child itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", ["seccomp", "capabilities", "ids", "no_new_privs", "join cgroup", "mounts"])
def test_H19_ready_said_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: str) -> None:
    """A pihost that says ready without having put up a wall: the host reads back itself, before any code is sent. Of Landlock
    the kernel tells nobody.
    """
    package = tmp_path / "pihost"
    shutil.copytree(Path(pihost.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "confine.py").open("a") as source:
        source.write(
            "\n_honest = run\n\n\ndef run(steps, plan, fds, kernel=syscalls, log=None):\n"
            f"    kept = [(name, act) for name, act in steps if {skipped!r} not in name]\n"
            "    _honest(kept, plan, fds, kernel, log)\n"
        )
    monkeypatch.setattr(templates, "PACKAGE", str(package))
    with pytest.raises(LaunchError):
        ProcessIsolator.create(
            security=Security(hostname=f"early-{skipped.replace('_', '-').replace(' ', '-')}")
        ).close()


@pytest.mark.parametrize(
    "code",
    [
        "link = socket.socket(fileno=os.dup(3)); link.shutdown(socket.SHUT_RD); os.close(3); link.close(); time.sleep(100)",
        "socket.socket(fileno=os.dup(3)).shutdown(socket.SHUT_WR); time.sleep(100)",
        "socket.socket(fileno=os.dup(3)).shutdown(socket.SHUT_RDWR); time.sleep(100)",
        "os.close(3); time.sleep(100)",
        "os.dup2(os.open('/dev/null', 2), 3); time.sleep(100)",
    ],
)  # fmt: skip
def test_H20_a_link_that_is_half_closed(isolator: ProcessIsolator, code: str) -> None:
    before = isolator.pid
    with bounded(3.0), pytest.raises(ChildTerminated) as caught:
        isolator.run_source(PRELUDE + code, timeout=60.0)
    assert caught.value.exit_info.reason is ExitReason.PROTOCOL
    assert before is not None
    assert state_of(before) in ("", "Z")


def test_H20_a_child_that_hears_nothing_more(isolator: ProcessIsolator) -> None:
    """It shuts its own ear alone, and answers: to it that is the end of the link, so it leaves, with exit code 0. The next call
    cannot be sent, and gets one error or, as it never ran, another child.
    """
    attack(isolator, "socket.socket(fileno=os.dup(3)).shutdown(socket.SHUT_RD); 1")
    with bounded(5.0):
        try:
            assert isolator.run_source("1", timeout=3.0).value == 1
        except (ChildTerminated, IsolatorClosed):
            pass
        isolator.restart()  # what has left by itself is not replaced unasked


@pytest.mark.parametrize(
    "code", ["while True: os.write(1, b'x' * 65536)", "for _ in range(300): os.write(1, b'x' * 65536)\n'right'"]
)
def test_H21_a_flood_of_output(isolator: ProcessIsolator, code: str) -> None:
    before = resident()
    if code.startswith("while"):
        with bounded(5.0), pytest.raises(CallTimeout):
            isolator.run_source(PRELUDE + code, timeout=1.0)
    else:
        done = isolator.run_source(PRELUDE + code, timeout=20.0)
        assert (done.value, len(done.stdout), done.truncated) == ("right", MIB, True)
    assert resident() - before < 64 * MIB


def test_H21_the_pipe_it_floods_cannot_be_made_larger(isolator: ProcessIsolator) -> None:
    code = "fcntl.fcntl(1, 1031, 1 << 20)"
    assert isinstance(attack(isolator, code), PermissionError)
    with ProcessIsolator.create(security=Security(seccomp=None)) as unfiltered:
        assert attack(unfiltered, code) == 1 << 20, "the control: without the filter it can"


def test_H22_a_child_that_stops_itself(isolator: ProcessIsolator) -> None:
    with bounded(4.0), pytest.raises(CallTimeout) as caught:
        isolator.run_source("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", timeout=0.5)
    assert caught.value.exit_info.reason is ExitReason.TIMEOUT


@pytest.mark.parametrize(
    "sent",
    [
        "frame(RESULT, ident(), value(b'1'))[:16]",
        "frame(RESULT, ident(), value(b'1'))[:-1]",
        "frame(RESULT, ident(), value(b'1'))[:7]",
        "frame(PIECE, ident(), b'part')",
    ],
)
def test_H23_dead_between_header_and_body(isolator: ProcessIsolator, sent: str) -> None:
    with bounded(3.0), pytest.raises(ChildTerminated) as caught:
        isolator.run_source(PRELUDE + f"send({sent}); os._exit(3)", timeout=60.0)
    assert caught.value.exit_info.exit_code == 3


APPLICATION = """
import os, time
from pisupervisor import ProcessIsolator
code = '''
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0)
for _ in range(3):
    if os.fork() == 0:
        os.setsid(); ctypes.CDLL(None).prctl(1, 0); time.sleep(1000)
1
'''
isolator = ProcessIsolator.create()
isolator.run_source(code)
print(isolator.pid, flush=True)
time.sleep(1000)
"""


def test_H24_the_host_is_killed_and_the_child_had_cleared_its_death_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", APPLICATION], stdout=subprocess.PIPE, text=True) as application:
        assert application.stdout is not None
        payload = int(application.stdout.readline())
        below = [payload, *descendants(application.pid)]
        assert len(below) >= 6
        application.kill()
    assert wait_until(lambda: all(state_of(pid) in ("", "Z") for pid in below), 1.0)


def test_H26_a_number_that_belongs_to_a_stranger_by_now() -> None:
    """Signals go through pidfds: whoever has got the number since is not meant by anything."""
    with subprocess.Popen(["sleep", "1000"]) as stranger, ProcessIsolator.create(limits=limits()) as isolator:
        try:
            child = isolator._keeper.child
            assert child is not None
            child.pid = child.init_pid = stranger.pid
            isolator.pause()
            isolator.resume()
            isolator.terminate(grace=0.1)
            isolator.invoke(len, "abc")
            assert isolator._keeper.child is not None
            isolator._keeper.child.pid = isolator._keeper.child.init_pid = stranger.pid
            isolator.abort()
            assert stranger.poll() is None
            assert state_of(stranger.pid) == "S"
        finally:
            stranger.kill()


def test_H26_no_signal_by_number() -> None:
    """In the library, os.kill is for the application's own process alone."""
    found = {
        (path.name, ast.unparse(node.args[0]))
        for path in Path(pisupervisor.__file__).parent.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.kill", "os.killpg", "signal.pthread_kill")
    }  # fmt: skip
    # The application itself (die_on_crash); a zygote of which no pidfd could be had, and the group of an interpreter that does
    # not say what it is, both of which nobody has reaped.
    assert found == {("keeper.py", "self.owner"), ("zygote.py", "pid"), ("interpreter.py", "process.pid")}


# --- what a child leaves behind in a folder -------------------------------------------------------------------------


def planted(shared: Path, code: str) -> None:
    with ProcessIsolator.create(limits=limits(), filesystem=Filesystem(writable=[str(shared)])) as isolator:
        isolator.run_source(f"import os\nos.chdir({str(shared)!r})\n{code}")


def test_H27_a_symlink_in_a_shared_folder(shared: Path, tmp_path: Path) -> None:
    """Where the host reads code from a folder that a child may write to, it reads nothing that lies outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "sub.py").write_text("VALUE = 'of the host'\ndef f(): return VALUE\n")
    (shared / "package").mkdir()
    (shared / "package").chmod(0o777)
    planted(
        shared,
        f"os.symlink({str(outside)!r}, 'loaded'); os.symlink({str(outside)!r}, 'package/below')\nopen('package/__init__.py', 'w').write('def f(): return 1')",
    )
    with ProcessIsolator.create(limits=limits(), modules=[shared]) as isolator:
        with pytest.raises(ImportError):
            isolator.run_source("import loaded.sub; loaded.sub.VALUE")
        with pytest.raises(OptionsError, match="leads out of the package"):
            isolator.invoke_method(shared / "package", "f")


@pytest.mark.parametrize(
    "code",
    [
        "os.mkfifo('plugin.py')",
        "os.truncate(os.open('plugin.py', os.O_CREAT | os.O_RDWR), 1 << 40)",
        "import socket; socket.socket(socket.AF_UNIX).bind('plugin.py')",
        "os.mkdir('plugin.py')",
    ],
)
def test_H28_odd_files_in_a_shared_folder(shared: Path, code: str) -> None:
    planted(shared, code)
    before = resident()
    with ProcessIsolator.create(limits=limits(), modules=[shared]) as isolator, bounded(5.0):
        with pytest.raises(OptionsError):
            isolator.invoke_method(shared / "plugin.py", "f")
        with pytest.raises(ImportError):
            isolator.run_source("import plugin")
    assert resident() - before < 64 * MIB


def test_H29_a_child_holds_no_folder_of_the_host(isolator: ProcessIsolator) -> None:
    def held() -> list[tuple[int, bool]]:
        import os
        import stat

        found = []
        for fd in range(64):
            try:
                found.append((fd, stat.S_ISDIR(os.fstat(fd).st_mode)))
            except OSError:
                continue
        return found

    assert isolator.invoke(held) == [(fd, False) for fd in (0, 1, 2, 3)]
    with tempfile.TemporaryDirectory() as folder:
        number = os.open(folder, os.O_RDONLY)
        try:
            assert stat.S_ISDIR(os.fstat(number).st_mode)
            assert isolator.invoke(held) == [(fd, False) for fd in (0, 1, 2, 3)], "a number is a number"
            assert isolator.invoke(abs, number) == number
            for flags in (os.O_RDONLY, os.O_PATH):
                given = os.open(folder, flags)
                with pytest.raises(SerializationError, match=r"directory|O_PATH"):
                    isolator.invoke(held, Descriptor(given))
                os.close(given)
        finally:
            os.close(number)


# --- decoding ------------------------------------------------------------------------------------------------------


def _honest() -> list[tuple[int, bytes]]:
    from pihost.inside import encode

    values = [1, None, "text", [1, 2.5, {"a": (1, 2)}], {"x": {1, 2}}, b"x" * 600, 1 << 80, {"deep": [[[[]]]]}]
    honest = [(wire.RESULT, b"".join(map(bytes, wire.pack_value(*encode.encode(value, MIB))))) for value in values]
    report = {"module": "builtins", "type": "ValueError", "message": "x", "traceback": "y", "errno": None, "causes": []}
    return [
        *honest,
        (wire.RAISED, json.dumps(report).encode()),
        (wire.REFUSED, b'{"kind":"not_found","message":"x"}'),
        (wire.STREAM, bytes(8)),
    ]


def _flipped(dice: random.Random, body: bytes) -> bytes:
    data = bytearray(body)
    for _ in range(dice.randint(1, 8)):
        if data and dice.random() < 0.7:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        elif dice.random() < 0.5:
            del data[dice.randrange(len(data) + 1) :]
        else:
            data += dice.randbytes(dice.randrange(20))
    return bytes(data)


def test_H30_fuzz_of_answers() -> None:
    """10^5 random and bit-flipped answers: a value, or an error of ours. Nothing else, and no growth."""
    dice, honest = random.Random(30), _honest()
    refused = 0
    before = resident()
    for number in range(100_000):
        kind, body = dice.choice(honest)
        said = dice.randbytes(dice.randrange(64)) if number % 4 == 0 else _flipped(dice, body)
        try:
            unpack_answer(Answer(dice.choice((kind, kind, kind, dice.randrange(256))), said), DATA)
        except IsolationError:
            refused += 1
    assert 50_000 < refused < 100_000
    assert resident() - before < 64 * MIB


def test_H30_fuzz_of_frames() -> None:
    dice, honest, ends = random.Random(31), _honest(), {"answer": 0, "refused": 0, "closed": 0}
    for _ in range(3_000):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            link = Connection(ours, MIB)
            ident = link.new_ident()
            kind, body = dice.choice(honest)
            said = wire.pack_header(kind, ident, len(body)) + body
            said = said if dice.random() < 0.1 else _flipped(dice, said) if dice.random() < 0.8 else dice.randbytes(50)
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)
            try:
                link.call(b"x", time.monotonic() + 5, ident=ident)
                ends["answer"] += 1
            except ProtocolError:
                ends["refused"] += 1
            except LinkClosed:
                ends["closed"] += 1
    assert all(ends.values()), ends


@pytest.mark.parametrize(
    "text",
    [
        b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"1" * 5000, b'"\\ud800"', b'"\xed\xa0\x80"', b'"\xff"', b"{1:2}", b'{"$":"set","v":[[]]}',
        b'{"$":"dict","v":["a",1,"a",2]}', b'{"$":"dict","v":[1,1,true,2]}', b'{"$":"set","v":[1,1]}', b'{"$":"float","v":"NaN"}', b'{"$":"int","v":"1_0"}',
    ],
)  # fmt: skip
def test_H31_corner_values_that_are_no_values(isolator: ProcessIsolator, text: bytes) -> None:
    breaks_the_protocol(isolator, f"forge(RESULT, value({text!r}))")


@dataclass
class Corner:
    name: str
    make: Callable[[], Any]


CORNERS = [
    Corner("nan", lambda: [float("nan"), float("-inf"), -0.0]), Corner("long int", lambda: 7**9000), Corner("negative", lambda: -(1 << 64)),
    Corner("lone surrogate", lambda: "\ud800x\udfff"), Corner("keys", lambda: {1: "int", "1": "str", b"1": "bytes", (1,): "tuple", None: 0}),
    Corner("NUL", lambda: "a\0b"), Corner("dollar", lambda: {"$": "tuple", "v": []}), Corner("edges", lambda: [(1 << 63) - 1, -(1 << 63), 1 << 63]),
]  # fmt: skip


@pytest.mark.parametrize("corner", CORNERS, ids=lambda corner: corner.name)
def test_H31_corner_values_that_come_back_as_they_went(isolator: ProcessIsolator, corner: Corner) -> None:
    sys.set_int_max_str_digits(0)
    try:
        assert repr(isolator.invoke(corner.make)) == repr(corner.make())
    finally:
        sys.set_int_max_str_digits(4300)


def test_H31_a_member_that_comes_twice_is_one_member(isolator: ProcessIsolator) -> None:
    """JSON's own objects: the last one counts. It is a dict like any other, and no more than the child could say anyway."""
    assert attack(isolator, """forge(RESULT, value(b'{"a":1,"a":2}'))""") == {"a": 2}
    attack(isolator, "1", timeout=0.5)  # ends the child, which still sleeps in the first call


def test_H32_a_compression_bomb(tmp_path: Path) -> None:
    """Nothing that a child sends is decompressed. What is read from a zip of code has its bound before it is inflated."""
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.py", bytes(200 << 20))
    assert bomb.stat().st_size < MIB
    before = resident()
    with (
        ProcessIsolator.create(limits=limits()) as isolator,
        bounded(5.0),
        pytest.raises(OptionsError, match="more than"),
    ):
        isolator.invoke_method(bomb, "f")
    assert resident() - before < 64 * MIB
    imported = {
        name.name.partition(".")[0]
        for path in Path(serializer.__file__).parent.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) for name in node.names
    }  # fmt: skip
    assert not imported & {"zlib", "bz2", "lzma", "gzip", "zstandard"}


def test_H33_the_link_of_another_child(isolator: ProcessIsolator) -> None:
    """A socket pair has no name that anybody could connect to, neither a path nor an abstract one."""

    def names() -> list[str]:
        with open("/proc/net/unix") as table:
            return [line.split()[7] for line in table if len(line.split()) > 7 and line.split()[0] != "Num"]

    connection = isolator._keeper.connection
    assert connection is not None
    assert connection.link.getsockname() == connection.link.getpeername() == ""
    with pytest.raises((FileNotFoundError, PermissionError)):  # nor does it see who has any
        isolator.invoke(names)


def test_H34_a_child_that_crashes_at_once_for_ever(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text("import os\nos._exit(1)\n")
    policy = RestartPolicy(max_restarts=3, within=60, backoff=0.05, max_backoff=0.2)
    ends: list[type[BaseException] | None] = []
    with ProcessIsolator.create(limits=limits(), restart=policy) as isolator, bounded(10.0):
        started = time.monotonic()
        for _ in range(6):
            try:
                isolator.invoke_method(tmp_path / "plugin.py", "f")
            except IsolationError as error:
                ends.append(type(error))
        assert ends in ([ChildTerminated] * n + [RestartLimitReached] * (6 - n) for n in (3, 4))
        assert time.monotonic() - started > 0.05 + 0.1, "each waited longer than the one before"
        assert isolator.state == "failed"


def test_all_checks_are_here() -> None:
    left_out = {3, 8, 13, 18, 25}  # numbers that the catalogue does not use
    names = [name for name in globals() if name.startswith("test_H")]
    assert {int(name[6:8]) for name in names} == set(range(1, 35)) - left_out
