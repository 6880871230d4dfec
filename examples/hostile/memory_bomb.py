"""Takes memory until something stops it."""

from __future__ import annotations


def attack() -> None:
    hoard = []
    while True:
        hoard.append(b"x" * (4 << 20))  # written to, so that the pages are really there
