"""Sizes as people write them: ``"256M"``, ``"3GB"``, or bytes as an int. 1024-based."""

from __future__ import annotations

import re

from pisupervisor.errors import OptionsError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE | re.ASCII)
_FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MAX = 1 << 62  # the kernel's counters are signed 64-bit pages at the most


def parse_size(value: int | str, name: str = "size") -> int:
    """Bytes as a non-negative int. Raises OptionsError for anything that is not a size; ``name`` says which option."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise OptionsError(f"{name}: expected bytes as an int or a string like '256M', not {value!r}")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise OptionsError(f"{name}: {value!r} is not a size; write bytes as an int, or '256M', '3GB', '1.5G'")
        size = int(float(match[1]) * _FACTOR[match[2].lower()])
    else:
        size = value
    if not 0 <= size <= _MAX:
        raise OptionsError(f"{name}: {value!r} is out of range (0 to 2**62 bytes)")
    return size
