"""Objects that stay in the child: the host holds numbers, and calls methods by them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


class Released(LookupError):
    """A number that stands for nothing: the object was released, or belongs to another child."""


class Objects:
    """Numbers are never used twice: a late release cannot hit another object."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}
        self._last = 0

    def keep(self, value: Any) -> int:
        self._last += 1
        self._kept[self._last] = value
        return self._last

    def get(self, number: int) -> Any:
        try:
            return self._kept[number]
        except KeyError:
            raise Released(f"object {number} was released") from None

    def release(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._kept.pop(number, None)

    def __len__(self) -> int:
        return len(self._kept)


kept = Objects()  # one child, one table: arguments that are such objects are found here while they are loaded


def find(number: int) -> Any:
    """What an ``IsolatedObject`` among the arguments of a call becomes."""
    return kept.get(number)
