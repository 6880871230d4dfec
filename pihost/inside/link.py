"""The socket to the host: whole frames in, whole frames out, large ones in pieces."""

from __future__ import annotations

# The C modules behind socket and threading: the packages would import enum and re, most of a zygote's start.
import _socket
import _thread
import struct

from pihost import wire

if False:  # typing costs 5 ms, and only a type checker reads this
    from collections.abc import Iterator

_BUFFER = 1 << 16
_LARGEST = 1 << 32  # the host's frames may be as long as their header says
_FD_SPACE = _socket.CMSG_SPACE((wire.MAX_DESCRIPTORS + 2) * 4)  # two are for what the call writes
_HEADER = wire.HEADER.size


class Link:
    """One thread receives; any may send."""

    def __init__(self, fd: int) -> None:
        self.sock = _socket.socket(fileno=fd)  # socket.socket would turn its numbers into enums at every start
        self.data: bytes | bytearray = b""  # what was read, from ``at`` on not yet taken
        self.at = 0
        self._batches: list[list[int]] = []  # of descriptors, each of one frame
        self.postponed: list[tuple[tuple[int, int, bytes], list[int]]] = []
        self._fds: list[int] = []  # of the frame that was received last
        self._sending = _thread.allocate_lock()

    def receive(self) -> tuple[int, int, bytes] | None:
        """The next frame, None at the end. Several may have come with one system call."""
        while True:
            data, at = self.data, self.at
            need = at + _HEADER
            if len(data) >= need:
                kind, ident, length = wire.unpack_header(data, at, _LARGEST)
                need += length
                if len(data) >= need:
                    self.at = need
                    if kind & wire.RIDING:
                        self._fds = self._batches.pop(0)
                        kind ^= wire.RIDING
                    return kind, ident, bytes(data[at + _HEADER : need])
            if not self.read(need - len(data)):
                return None

    def read(self, missing: int = 0) -> bool:
        """Wait for more; False at the end."""
        # Always recvmsg: a plain recv would drop descriptors that ride on the bytes it takes.
        size = _BUFFER if missing < _BUFFER else min(missing, 1 << 24)
        data, ancillary, flags, _address = self.sock.recvmsg(size, _FD_SPACE, _socket.MSG_CMSG_CLOEXEC)
        # The kernel joins nothing behind what carries descriptors: each batch belongs to one frame, and they come in order.
        if ancillary or flags & _socket.MSG_CTRUNC:  # truncated: there was no number left for them
            self._batches.append(
                [fd for _level, _kind, content in ancillary for (fd,) in struct.iter_unpack("i", content)]
            )
        rest = len(self.data) - self.at
        if not rest:
            self.data, self.at = data, 0
        elif missing < _BUFFER and rest < _BUFFER:
            self.data, self.at = bytes(self.data[self.at :]) + data, 0
        else:
            if type(self.data) is bytes:
                self.data, self.at = bytearray(self.data[self.at :]), 0
            self.data += data
        return bool(data)

    def take_fds(self) -> list[int]:
        """What came with the frame that was received last."""
        if not self._fds:
            return self._fds
        fds, self._fds = self._fds, []
        return fds

    def has_fds(self, fds: list[int]) -> None:
        """They came with the frame that is to be served next, and were taken when that was put off."""
        self._fds = fds

    def postpone(self, frame: tuple[int, int, bytes]) -> None:
        """It comes when the call that runs is over: that waits for the host, and this is nothing of its own."""
        self.postponed.append((frame, self.take_fds()))

    def receive_postponed(self) -> tuple[int, int, bytes] | None:
        if not self.postponed:
            return None
        frame, self._fds = self.postponed.pop(0)
        return frame

    def send_whole(self, kind: int, ident: int, parts: list[bytes]) -> None:
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        with self._sending:
            self.sock.sendall(wire.HEADER.pack(wire.MAGIC, wire.VERSION, kind, ident, len(body)) + body)

    def send(self, kind: int, ident: int, parts: list[bytes]) -> None:
        total = 0
        for part in parts:
            total += len(part) if type(part) is bytes else memoryview(part).nbytes
        if total <= wire.PIECE_SIZE:
            self.send_whole(kind, ident, parts)
            return
        for piece, last in _pieces(parts):
            with self._sending:
                self.sock.sendall(wire.pack_header(kind if last else wire.PIECE, ident, len(piece)))
                self.sock.sendall(piece)


def _pieces(parts: list[bytes]) -> Iterator[tuple[memoryview, bool]]:
    """(piece, is it the last) over the concatenation of ``parts``, without building it."""
    views = [view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes]
    for number, view in enumerate(views):
        for start in range(0, view.nbytes, wire.PIECE_SIZE):
            piece = view[start : start + wire.PIECE_SIZE]
            yield piece, number == len(views) - 1 and start + piece.nbytes == view.nbytes
