"""Talking to one child, here a peer on a socketpair that says whatever a hostile one could."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from helpers import open_fds, wait_until

from pihost import wire
from pisupervisor.errors import ProtocolError
from pisupervisor.link import answers, channel
from pisupervisor.link.connection import Connection, DeadlinePassed, LinkClosed
from pisupervisor.link.frames import Frames, Pending

LARGEST = 1 << 20


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection whose calls are numbered from 1, and the peer."""
    numbers = itertools.count(1)
    monkeypatch.setattr(Connection, "new_ident", lambda _self: next(numbers))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Connection(ours, LARGEST), theirs


def frame(kind: int = wire.RESULT, ident: int = 1, body: bytes = b"body") -> bytes:
    return wire.pack_header(kind, ident, len(body)) + body


def refused(pair: tuple[Connection, socket.socket], said: bytes, match: str) -> None:
    link, peer = pair
    peer.sendall(said)
    with pytest.raises(ProtocolError, match=match):
        link.call(b"x")


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_call_and_its_answer(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    peer.sendall(frame(body=b"42"))
    assert link.call(b"question")[:2] == (wire.RESULT, b"42")
    assert peer.recv(100) == frame(wire.CALL, 1, b"question")


def test_an_answer_in_pieces_and_a_byte_at_a_time(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    said = frame(wire.PIECE, 1, b"one ") + frame(wire.PIECE, 1, b"two ") + frame(wire.RAISED, 1, b"three")
    thread = in_background(lambda: [peer.sendall(bytes([byte])) for byte in said])
    answer = link.call(b"x")
    thread.join()
    assert (answer.kind, answer.body) == (wire.RAISED, b"one two three")


def test_calls_are_told_apart(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    for ident in (1, 2, 3):
        peer.sendall(frame(ident=ident))
        link.call(b"x")


def test_nobody_can_answer_a_call_before_it_is_made() -> None:
    """Code that a call left behind in the child cannot guess the id of the next one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Connection(ours, LARGEST)
        idents = {link.new_ident() for _ in range(100)}
    assert len(idents) == 100
    assert max(idents) > 1 << 60


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a frame of ours"),
        (b"\0" * 16, "not a frame of ours"),
        (wire.HEADER.pack(wire.MAGIC, 2, wire.RESULT, 1, 1), "version 2"),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESULT, 1, 0), "a frame of 0 bytes"),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESULT, 1, wire.MAX_FRAME + 1), "are allowed"),
        (frame(kind=99), "kind 99"),
        (frame(kind=0), "kind 0"),
        (frame(kind=wire.CALL), "which no child may send"),
        (frame(kind=wire.CODE), "which no child may send"),
        (frame(kind=wire.INNER), "which no child may send"),
        (frame(kind=wire.READY), "ready said twice"),
        (frame(ident=0), "an answer to call 0"),
        (frame(ident=2), "an answer to call 2"),
        (frame(ident=(1 << 64) - 1), "an answer to call"),
        (frame(wire.PIECE, 1) + frame(wire.RESULT, 2), "an answer to call 2"),
        (frame(wire.PIECE, 1, b"x") * 1100, "an answer in more than 1009 pieces"),
    ],
)
def test_what_is_no_answer(pair: tuple[Connection, socket.socket], said: bytes, match: str) -> None:
    refused(pair, said, match)


def test_a_lie_about_the_length_allocates_nothing(pair: tuple[Connection, socket.socket]) -> None:
    tracemalloc.start()
    try:
        refused(pair, wire.HEADER.pack(wire.MAGIC, 1, wire.RESULT, 1, 0xFFFFFFFF), "are allowed")
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_pieces_without_end_stop_at_the_bound(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair

    def flood() -> None:
        try:
            while True:
                peer.sendall(frame(wire.PIECE, 1, bytes(1 << 16)))
        except OSError:
            pass

    thread = in_background(flood)
    with pytest.raises(ProtocolError, match=f"more than {LARGEST + (1 << 16)} bytes"):
        link.call(b"x")
    link.link.close()
    thread.join()


def test_an_answer_said_twice_is_not_the_next_calls(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    peer.sendall(frame(body=b"first") + frame(body=b"again"))
    assert link.call(b"x").body == b"first"
    with pytest.raises(ProtocolError, match="an answer to call 1, where 2"):
        link.call(b"y")


@pytest.mark.parametrize(
    "said", [b"", frame()[:7], frame()[:16], frame()[:-1], frame(wire.PIECE), frame(wire.PIECE) + frame()[:3]]
)
def test_an_end_anywhere_is_an_end(pair: tuple[Connection, socket.socket], said: bytes) -> None:
    link, peer = pair
    peer.sendall(said)
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(LinkClosed):
        link.call(b"x")


def test_a_peer_that_is_gone(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    peer.close()
    with pytest.raises(LinkClosed):
        link.call(bytes(1 << 20))


@pytest.mark.alone
def test_a_slow_writer_holds_nobody(pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_FRAME_TIME", 0.3)
    link, peer = pair
    stop = threading.Event()

    def trickle() -> None:
        for byte in frame(body=bytes(1000)):
            peer.send(bytes([byte]))
            if stop.wait(0.02):
                return

    thread, started = in_background(trickle), time.monotonic()
    with pytest.raises(ProtocolError, match=r"not whole after 0\.3 s"):
        link.call(b"x")
    assert 0.25 < time.monotonic() - started < 1.0
    stop.set()
    thread.join()


def test_thinking_before_the_first_byte_is_allowed(
    pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_FRAME_TIME", 0.05)
    link, peer = pair
    timer = threading.Timer(0.3, peer.sendall, (frame(),))
    timer.start()
    assert link.call(b"x").body == b"body"
    timer.join()


@pytest.mark.alone
@pytest.mark.parametrize("said", [b"", frame()[:5], frame()[:-1]])
@pytest.mark.parametrize("output", [None, 100])
def test_the_deadline(pair: tuple[Connection, socket.socket], said: bytes, output: int | None) -> None:
    link, peer = pair
    peer.sendall(said)
    started = time.monotonic()
    with pytest.raises(DeadlinePassed):
        link.call(b"x", started + 0.1, output)
    assert 0.09 < time.monotonic() - started < 0.5


def test_the_deadline_holds_for_a_peer_that_does_not_read(pair: tuple[Connection, socket.socket]) -> None:
    link, _peer = pair
    with pytest.raises(DeadlinePassed):
        link.call(bytes(1 << 24), time.monotonic() + 0.1)


def test_a_deadline_of_one_call_is_not_the_next_ones(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    peer.sendall(frame())
    link.call(b"x", time.monotonic() + 0.05)
    timer = threading.Timer(0.15, peer.sendall, (frame(ident=2),))
    timer.start()
    assert link.call(b"y").body == b"body"
    timer.join()


@pytest.mark.parametrize("output", [None, 100])
def test_descriptors_that_a_child_attaches_are_dropped(
    pair: tuple[Connection, socket.socket], output: int | None
) -> None:
    link, peer = pair
    before = open_fds()
    socket.send_fds(peer, [frame()], [0, 1, 2] * 20)
    link.call(b"x", output=output)
    assert open_fds() == before


# --- output ------------------------------------------------------------------------------------------------------


def receive_pipes(peer: socket.socket) -> list[int]:
    """The write ends of stdout and stderr, as a child gets them with the call."""
    received: list[int] = []
    while not received:
        received = socket.recv_fds(peer, 4096, 2)[1]
    return received


def writing(peer: socket.socket, *chunks: tuple[int, bytes]) -> threading.Thread:
    """Plays a child that writes these (0 for stdout, 1 for stderr) and then answers."""

    def play() -> None:
        pipes = receive_pipes(peer)
        for which, data in chunks:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(pipes[which], rest) :]
        peer.sendall(frame())
        for pipe in pipes:
            os.close(pipe)

    return in_background(play)


def test_output_is_kept_by_stream(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    before = open_fds()
    thread = writing(peer, (0, b"out"), (1, b"err"), (0, b"more"))
    answer = link.call(b"x", output=100)
    thread.join()
    assert (answer.stdout, answer.stderr, answer.truncated) == (b"outmore", b"err", False)
    assert open_fds() == before


@pytest.mark.parametrize(("size", "truncated"), [(100, False), (101, True)])
def test_the_bound_is_exact(pair: tuple[Connection, socket.socket], size: int, truncated: bool) -> None:
    link, peer = pair
    thread = writing(peer, (1, bytes(size)))
    answer = link.call(b"x", output=100)
    thread.join()
    assert (len(answer.stderr), answer.truncated) == (100, truncated)


def test_a_flood_is_read_and_thrown_away(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    thread = writing(peer, (0, b"x" * (8 << 20)))
    tracemalloc.start()
    answer = link.call(b"x", output=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    thread.join()
    assert (answer.stdout, answer.truncated) == (b"x" * 1000, True)
    assert peak < 1 << 20


def test_who_writes_on_after_the_answer_is_not_waited_for(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    stop = threading.Event()

    def play() -> None:
        out, err = receive_pipes(peer)
        os.set_blocking(out, False)
        peer.sendall(frame())
        while not stop.is_set():
            try:
                os.write(out, bytes(1 << 16))
            except OSError:
                continue
        os.close(out)
        os.close(err)

    thread, started = in_background(play), time.monotonic()
    assert link.call(b"x", output=1000).kind == wire.RESULT
    assert time.monotonic() - started < 5.0
    stop.set()
    thread.join()


@pytest.mark.parametrize("said", [b"", b"junk that is no frame", frame(ident=7)])
def test_pipes_are_closed_whatever_happens(pair: tuple[Connection, socket.socket], said: bytes) -> None:
    link, peer = pair
    before = open_fds()
    peer.sendall(said)
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises((ProtocolError, LinkClosed)):
        link.call(b"x", output=10)
    assert open_fds() == before


# --- answers that nobody waits for yet ---------------------------------------------------------------------------


def under_way(link: Connection, count: int) -> list[Pending]:
    calls = [Pending(link.new_ident(), link.largest, owned=False) for _ in range(count)]
    link.send_frames(b"".join(link.header(pending, 1) + b"x" for pending in calls), None)
    return calls


def test_answers_of_calls_under_way_are_told_apart(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    calls = under_way(link, 3)
    peer.sendall(frame(ident=1, body=b"one") + frame(ident=2, body=b"two") + frame(wire.RAISED, 3, b"three"))
    assert [link.wait(pending).body for pending in calls] == [b"one", b"two", b"three"]
    assert link.calls == {}


def test_a_plain_answer_counts_besides_what_was_asked_before() -> None:
    """Else what it asked would be held against the child for ever."""
    frames, pending = Frames(), Pending(1, 1000, owned=False)
    pending.size = 100
    frames.feed(frame(ident=1, body=wire.pack_text(b"7")))
    assert frames.take_plain({1: pending}) == 9
    assert pending.size == 100 + 9


def test_of_what_was_taken_nothing_is_kept_though_the_next_has_always_begun() -> None:
    """Measured: a child that calls the host again and again in such a way had it keep 95 MB more each second."""
    frames, one = Frames(), frame(wire.CALLBACK, 1, b"x" * 60_000)
    frames.feed(one + one[:10])
    tracemalloc.start()
    try:
        for _ in range(100):
            assert frames.next() is not None
            assert frames.next() is None
            frames.feed(one[10:] + one[:10])
        assert tracemalloc.get_traced_memory()[0] < 5 * len(one)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_plain_answers_come_by_the_dozen(pair: tuple[Connection, socket.socket], step: int) -> None:
    """However they are cut, and what is no plain answer among them."""
    link, peer = pair
    calls = under_way(link, 40)
    whole = {n: frame(ident=n, body=wire.pack_text(b"%d" % n)) for n in range(1, 41)}
    whole[7] = frame(wire.RAISED, 7, b"{}")
    whole[9] = frame(wire.PIECE, 9, wire.pack_text(b"9")[:5]) + frame(wire.RESULT, 9, wire.pack_text(b"9")[5:])
    whole[11] = frame(ident=11, body=b"".join(wire.pack_value(b"1", [b"1"])))
    said = b"".join(whole.values())
    for at in range(0, len(said), step):
        peer.sendall(said[at : at + step])
        if step < len(said):
            link.dispatch_what_is_there(read=True)
    bodies = [link.wait(pending).body for pending in calls]
    assert [wire.unpack_value(body)[0] for n, body in enumerate(bodies, 1) if n != 7] == [
        b"1" if n == 11 else b"%d" % n for n in range(1, 41) if n != 7
    ]
    assert calls[0].text == b"1"
    assert link.calls == {}


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (frame(ident=2, body=wire.pack_text(b"1")) * 2, "answer to call 2"),
        (frame(ident=4, body=wire.pack_text(b"1")), "answer to call 4"),
        (wire.pack_header(wire.RESULT, 2, wire.MAX_FRAME + 1) + bytes(100), "are allowed"),
        (wire.pack_header(wire.CALL, 2, 9) + bytes(9), "no child may send"),
    ],
)
def test_what_is_no_answer_among_plain_ones(pair: tuple[Connection, socket.socket], said: bytes, match: str) -> None:
    link, peer = pair
    under_way(link, 3)
    peer.sendall(frame(ident=1, body=wire.pack_text(b"1")) + said)
    with pytest.raises(ProtocolError, match=match):
        link.dispatch_what_is_there(read=True)


def test_plain_answers_for_later_are_bounded(
    pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_HELD", 0)
    link, peer = pair
    under_way(link, 2)
    peer.sendall(frame(ident=2, body=wire.pack_text(b"1")))
    with pytest.raises(ProtocolError, match="nobody has asked for yet"):
        link.dispatch_what_is_there(read=True)


def test_what_lies_there_for_later_is_bounded(pair: tuple[Connection, socket.socket]) -> None:
    """A child that answers the first call last must not fill its host with all the others."""
    link, peer = pair
    calls = under_way(link, 20)

    def flood() -> None:
        try:
            for ident in range(2, 21):
                peer.sendall(frame(ident=ident, body=bytes(LARGEST)))
        except OSError:
            pass

    thread = in_background(flood)
    with pytest.raises(ProtocolError, match="nobody has asked for yet"):
        link.wait(calls[0])
    link.link.close()
    thread.join()


def test_what_comes_for_a_call_whose_time_is_up_is_no_breach() -> None:
    """Another caller may read it before the child is killed: it is told of that death, and not of one of its own making."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Connection(ours, LARGEST, shared=True)
        seen: list[BaseException] = []

        def read() -> None:
            try:
                link.call(b"y", ident=2)
            except Exception as error:
                seen.append(error)

        thread = in_background(read)
        wait_until(lambda: 2 in link.calls)
        time.sleep(0.1)  # it reads now
        with pytest.raises(DeadlinePassed):
            link.call(b"x", time.monotonic() + 0.1, ident=1)
        theirs.sendall(frame(ident=1))
        thread.join()
        assert [type(error) for error in seen] == [LinkClosed]


def test_answers_that_are_taken_or_not_wanted_are_no_burden(pair: tuple[Connection, socket.socket]) -> None:
    link, peer = pair
    for _ in range(3):
        calls = under_way(link, 7)
        for pending in calls[3:6]:
            pending.is_abandoned = True
        thread = in_background(
            lambda calls=calls: [peer.sendall(frame(ident=call.ident, body=bytes(LARGEST))) for call in calls]
        )
        for pending in (*calls[:3], calls[6]):
            assert len(link.wait(pending).body) == LARGEST
        thread.join()
        assert link.calls == {}


def test_what_is_released_while_two_threads_tell_of_it_is_told(pair: tuple[Connection, socket.socket]) -> None:
    """Calls side by side: what was added between a look and the next step was lost, and lived on in the child."""
    link, peer = pair
    others: list[threading.Thread] = []

    class Released(list[int]):
        def __getitem__(self, part: object) -> object:  # type: ignore[override]
            found = list(self)
            if not others:
                others.append(in_background(link.tidy))
                others[0].join(0.2)
                self.append(2)
            return found

    link.released = Released([1])
    link.tidy()
    others[0].join()
    link.tidy()
    said, told = peer.recv(1000), set()
    while said:
        kind, _ident, length = wire.unpack_header(said)
        assert kind == wire.RELEASE
        body, said = said[wire.HEADER.size : wire.HEADER.size + length], said[wire.HEADER.size + length :]
        told |= set(struct.unpack(f"<{length // 8}Q", body))
    assert told == {1, 2}
