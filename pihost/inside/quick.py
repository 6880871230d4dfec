"""The commonest calls in as few steps as can be: of a target that was called before, answered with numbers, text or what else
JSON has. Everything else goes the long way, which is ``Worker.serve_one``.
"""

from __future__ import annotations

import _pickle
import struct

from pihost import wire
from pihost.inside import arenas, encode
from pihost.inside.failures import answer_to, unloadable
from pihost.inside.resolve import is_still

if False:  # typing costs 5 ms, and only a type checker reads this
    from collections.abc import Callable
    from typing import Any

    from pihost.inside.link import Link
    from pihost.inside.resolve import Found
    from pihost.inside.serve import Worker

_CALL = struct.Struct("<IQII")  # a header, whose first fields are one number here, and the length of the call's head
_RESULT = struct.Struct("<IQIII")
_CALL_WORD = wire.MAGIC | wire.VERSION << 16 | wire.CALL << 24
_RESULT_WORD = wire.MAGIC | wire.VERSION << 16 | wire.RESULT << 24
_MOST = 1000
_SMALL = wire.PIECE_SIZE - 8  #: what is larger goes in pieces


class Quick:
    """What one thread's worker knows by the heads of calls: the functions that they come to."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._known: dict[bytes, Found] = {}

    def learn(self, head: bytes, call: tuple[Any, ...], answer: tuple[int, list[bytes]]) -> None:
        """That call has come to a value: the next one of the same head need not look for what is called."""
        if answer[0] == wire.RESULT and call[0] in ("method", "kept") and not call[1] and self._worker.sends_plain:
            if len(self._known) >= _MOST:
                self.forget()
            found = self._worker.target_of(call)
            if found is not None:
                self._known[head] = found

    def forget(self) -> None:
        """An object is kept no longer."""
        self._known.clear()

    def serve(self, link: Link) -> int:
        """Answer calls until the host closes the link."""
        worker, known, lent, host = self._worker, self._known, arenas.arguments.lent, self._worker.host
        while True:
            data, at = link.data, link.at
            if len(data) - at >= _CALL.size and not (worker.released or link.postponed or lent):
                word, ident, length, head = _CALL.unpack_from(data, at)
                start = at + _CALL.size + head
                end = at + wire.HEADER.size + length
                if word == _CALL_WORD and end <= len(data):
                    found = known.get(bytes(data[at + _CALL.size : start]))
                    # Most have no name below the first: one call less.
                    if found and found[1].get(found[2]) is found[3] and (not found[4] or is_still(found)):
                        link.at = end
                        if host is not None:
                            host.call_id = ident
                        self.answer(link, ident, found[0], data[start:end])
                        continue
            elif at == len(data) and not link.postponed:
                if not link.read():
                    return 0
                continue
            frame = link.receive_postponed() or link.receive()
            if frame is None:
                return 0
            worker.serve_one(frame)

    def answer(self, link: Link, ident: int, function: Callable[..., Any], arguments: bytes | bytearray) -> None:
        """Run it and reply."""
        worker, text, answer = self._worker, b"", None
        try:
            try:
                args, kwargs = _pickle.loads(arguments)
            except Exception as error:
                raise unloadable(error) from error
            value = function(*args, **kwargs)
            plain = encode.PLAIN.get(type(value))
            written = None if plain is None else plain(value)
            if written is None or len(written) > worker.limits["result"] or len(written) > _SMALL:
                answer = worker.pack_users(value)
            else:
                text = written
        except BaseException as error:
            answer = answer_to(error)
        if answer is not None:
            worker.reply(ident, answer)
            return
        worker.end_copy()
        size = len(text)
        link.sock.sendall(_RESULT.pack(_RESULT_WORD, ident, size + 8, size, 0) + text)
