"""Keys and elements of a child's choosing, on their way into dicts and sets of the host.

Hashes of text are secret, those of numbers and tuples are not. A child could choose such as take hours to insert, in one call
of the interpreter that no deadline ends: keys of one hash; keys of different hashes, each of which goes past nearly all that are
there already (4.9 ms a key, and 7 MB hold 70,000); numbers of one hash that take long to compare (two, in half a MB: 6.2 s).
"""

from __future__ import annotations

import time
from datetime import timedelta
from decimal import Decimal
from itertools import islice
from operator import eq
from uuid import UUID

from pisupervisor.errors import ProtocolError, SerializationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

MAX_COLLISIONS = 100  # keys of one hash: a legitimate set of powers of two reaches that at 6,100 elements
MAX_BITS = 512  # of a whole number that a Decimal is compared with, which takes the square of them
_TEXT = frozenset((str, bytes))
_KNOWN = frozenset((bool, int, float, complex, Decimal, timedelta, UUID, frozenset))  # whose hashes are no secret
_FEW = 1000  # keys that are inserted without a look at the clock
_STEP = 64  # keys between two looks
_PATIENCE = 4  # times as long as hashing and sorting them took: about what the keys of an honest child take


class Keys:
    """Of one answer. ``spare``: seconds of CPU time that inserting all of them may take beyond what is usual."""

    def __init__(self, spare: float = 1.0) -> None:
        self._spare = spare

    def set_of(self, elements: list[Any]) -> set[Any]:
        """Raises ProtocolError, and SerializationError for what may be honest."""
        built: set[Any] = set()
        self._insert(built, elements, lambda part: elements[part])
        return built

    def dict_of(self, keys: list[Any], values: list[Any]) -> dict[Any, Any]:
        """Raises ProtocolError, and SerializationError for what may be honest."""
        built: dict[Any, Any] = {}
        self._insert(built, keys, lambda part: zip(keys[part], values[part], strict=True))
        return built

    def try_lists(self, value: Any) -> None:
        """For somebody who makes sets of lists: every one in ``value``, whichever it is. Raises SerializationError."""
        for elements in _lists(value):
            began = time.thread_time()
            if _are_shared(sorted(map(hash, elements))):
                check_comparable(elements)
            if len(elements) > MAX_COLLISIONS:
                self._insert_many(set(), elements, elements.__getitem__, began)

    def _insert(self, built: Any, keys: list[Any], take: Callable[[slice], Iterable[Any]]) -> None:
        began = time.thread_time() if len(keys) > _FEW else 0.0
        is_secret = _TEXT.issuperset(map(type, keys))
        if not is_secret:
            check(keys)
        if is_secret or len(keys) <= _FEW:
            built.update(take(slice(None)))
        else:
            self._insert_many(built, keys, take, began)
        if len(built) != len(keys):
            raise ProtocolError("a key or element that comes twice")

    def _insert_many(self, built: Any, keys: list[Any], take: Callable[[slice], Iterable[Any]], began: float) -> None:
        """Their hashes were computed and sorted since ``began``."""
        now = time.thread_time()
        usual = now + _PATIENCE * (now - began)
        for start in range(0, len(keys), _STEP):
            built.update(take(slice(start, start + _STEP)))
            if time.thread_time() > usual + self._spare:
                raise _refused("keys or elements that take too long to insert")
        self._spare -= max(0.0, time.thread_time() - usual)


def check(keys: list[Any]) -> None:
    """Raises SerializationError for too many of one hash. Sorted, for their table could be attacked as well."""
    hashes = sorted(map(hash, keys))
    if _are_shared(hashes):
        if _are_shared(hashes, MAX_COLLISIONS):
            raise _refused(f"more than {MAX_COLLISIONS} keys or elements of one hash")
        check_comparable(keys)


def _are_shared(hashes: list[int], others: int = 1) -> bool:
    """Whether one of them is that of so many others."""
    return any(map(eq, hashes, islice(hashes, others, None)))


def check_comparable(values: Iterable[Any]) -> None:
    """Raises SerializationError where a Decimal among them might be compared with a large whole number, in tuples too."""
    level, decimals, large = list(values), False, False
    while level:
        decimals |= any(type(value) is Decimal for value in level)
        large |= any(type(value) is int and value.bit_length() > MAX_BITS for value in level)
        level = [inner for value in level if type(value) in (tuple, frozenset) for inner in value]
    if decimals and large:
        raise _refused(f"a Decimal beside a whole number of more than {MAX_BITS} bits, of one hash")


def _lists(value: Any) -> Iterator[list[Any]]:
    """The lists in a decoded value, as far as a hash of what is in them is known."""
    level = [value]
    while level:
        below: list[Any] = []
        for part in level:
            if type(part) is dict:
                below += part.values()
            elif type(part) in (list, tuple):
                below += part
                if len(part) > 1:
                    yield [each for each in map(_as_element, part) if each is not None]
        level = [part for part in below if type(part) in (dict, list, tuple)]


def _as_element(value: Any) -> Any:
    """What would stand in a set for it; None for what cannot, or is secret."""
    if type(value) in (list, tuple):
        return tuple(map(_as_element, value))
    return value if type(value) in _KNOWN else None


def _refused(what: str) -> SerializationError:
    return SerializationError(f"{what}; a list will do", direction="from child")
