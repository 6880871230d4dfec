"""Sizes as people write them: ``"256M"``, ``"3GB"``, or bytes as an int. 1024-based."""

from __future__ import annotations

from pisupervisor.errors import OptionsError

_SPACE = " \t\n\r\f\v"
_FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LONGEST = 40  # characters of a number: int() refuses thousands, float() makes them infinite
_MAX = 1 << 62  # the kernel's counters are signed 64-bit pages at the most


def parse_size(value: int | str, name: str = "size") -> int:
    """Bytes as a non-negative int. Raises OptionsError for anything that is not a size; ``name`` says which option."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise OptionsError(f"{name}: expected bytes as an int or a string like '256M', not {value!r}")
    if isinstance(value, str):
        parsed = _parse(value)
        if parsed is None:
            raise OptionsError(f"{name}: {value!r} is not a size; write bytes as an int, or '256M', '3GB', '1.5G'")
        size = parsed
    else:
        size = value
    if not 0 <= size <= _MAX:
        raise OptionsError(f"{name}: {value!r} is out of range (0 to 2**62 bytes)")
    return size


def _parse(text: str) -> int | None:
    """``1.5 GiB`` -> bytes, None for what is no size. By hand: re takes 3 ms to import, and a start parses three sizes."""
    if not text.isascii():
        return None
    text = text.strip(_SPACE).lower()
    if text.endswith("b"):
        text = text[:-1].removesuffix("i")
    unit = text[-1:] if text[-1:] in _FACTOR else ""
    number = text.removesuffix(unit).rstrip(_SPACE)
    whole, point, part = number.partition(".")
    if not whole.isdigit() or (point and not part.isdigit()) or len(number) > _LONGEST:
        return None
    return int(float(number) * _FACTOR[unit]) if point else int(whole) * _FACTOR[unit]
