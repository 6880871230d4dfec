"""Objects that stay in the child: the host holds numbers, and calls methods by them."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


class Released(LookupError):
    """A number that stands for nothing: the object was released, or belongs to another child."""


class Objects:
    """Numbers are random: one that belongs to another child is found in none."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}

    def keep(self, value: Any) -> int:
        number = int.from_bytes(os.urandom(7), "little")  # a small int for JSON
        self._kept[number] = value
        return number

    def get(self, number: int) -> Any:
        try:
            return self._kept[number]
        except KeyError:
            raise Released(f"object {number} was released, or belongs to another child") from None

    def find(self, number: int) -> Any:
        """The same, None where there is no such object."""
        return self._kept.get(number)

    def release(self, numbers: Iterable[int]) -> list[Any]:
        """What was kept under these numbers, and is no more."""
        return [self._kept.pop(number) for number in numbers if number in self._kept]

    def __len__(self) -> int:
        return len(self._kept)


kept = Objects()  # one child, one table: arguments that are such objects are found here while they are loaded


def find(number: int) -> Any:
    """What an ``IsolatedObject`` among the arguments of a call becomes."""
    return kept.get(number)
