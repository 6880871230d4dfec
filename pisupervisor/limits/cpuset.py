"""Sets of CPUs, as people write them and as the kernel does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pisupervisor.errors import OptionsError

#: The kernel's own ceiling (CONFIG_NR_CPUS of the largest distribution kernels).
MAX_CPU = 8191

_TO_SPACES = str.maketrans(":;,|", "    ")


class CpuSet:
    """An immutable, never empty set of CPU numbers (0..8191). Iterates in ascending order; ``str()`` is ``"0-2,5"``.

    Raises OptionsError when a number is no int, out of range, or when there is none.
    """

    __slots__ = ("_cpus",)

    def __init__(self, cpus: Iterable[int]) -> None:
        try:
            numbers = frozenset(cpus)
        except TypeError:
            raise OptionsError(f"cpuset: expected CPU numbers, not {cpus!r}") from None
        for cpu in numbers:
            if isinstance(cpu, bool) or not isinstance(cpu, int) or not 0 <= cpu <= MAX_CPU:
                raise OptionsError(f"cpuset: {cpu!r} is no CPU number from 0 to {MAX_CPU}")
        if not numbers:
            raise OptionsError("cpuset: the set is empty; a child needs at least one CPU")
        self._cpus = numbers

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        """``"cpu0 cpu2"``, ``"0;1|3"``, ``"0-3,cpu5-cpu7"`` -> CpuSet.

        Names ``cpuN`` (any case) or plain numbers, and ranges of them, parted by any run of space ``: ; , |``.
        Raises OptionsError for anything else.
        """
        if not isinstance(text, str):
            raise OptionsError(f"cpuset: expected a CpuSet or text such as 'cpu0 cpu2', not {text!r}")
        # Not str.split(): that would let tabs, newlines and Unicode spaces through.
        words = [word for word in text.translate(_TO_SPACES).split(" ") if word]
        if not words:
            raise OptionsError(f"cpuset: {text!r} names no CPU; write 'cpu0 cpu2' or '0-3'")
        return cls(cpu for word in words for cpu in _parse_word(word))

    @classmethod
    def from_mask(cls, mask: int) -> CpuSet:
        """The CPUs whose bits are set: ``0b101`` -> CPUs 0 and 2. OptionsError below 1 or above CPU 8191."""
        if isinstance(mask, bool) or not isinstance(mask, int) or mask <= 0:
            raise OptionsError(f"cpuset: {mask!r} is no CPU mask (an int above zero)")
        return cls(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)

    def to_mask(self) -> int:
        """An int with bit N set for CPU N; as wide as it needs to be, so that CPU 33 is not CPU 1."""
        return sum(1 << cpu for cpu in self._cpus)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._cpus))

    def __len__(self) -> int:
        return len(self._cpus)

    def __contains__(self, cpu: object) -> bool:
        return cpu in self._cpus

    def __eq__(self, other: object) -> bool:
        return self._cpus == other._cpus if isinstance(other, CpuSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._cpus)

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for cpu in self:
            if runs and cpu == runs[-1][1] + 1:
                runs[-1][1] = cpu
            else:
                runs.append([cpu, cpu])
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

    def __repr__(self) -> str:
        return f"CpuSet.parse({str(self)!r})"


def _parse_word(word: str) -> range:
    first, dash, last = word.partition("-")
    start = _parse_cpu(first, word)
    end = _parse_cpu(last, word) if dash else start
    if end < start:
        raise OptionsError(f"cpuset: the range {word!r} runs backwards; write '{end}-{start}'")
    return range(start, end + 1)


def _parse_cpu(name: str, word: str) -> int:
    digits = name[3:] if name[:3].lower() == "cpu" else name
    # isdigit alone takes "²"; the length check keeps int() away from megabytes of digits.
    if not (digits.isascii() and digits.isdigit()):
        raise OptionsError(f"cpuset: {word!r} is neither 'cpuN', a number, nor a range such as '0-3'")
    if len(digits) > 4 or int(digits) > MAX_CPU:
        raise OptionsError(f"cpuset: {word[:40]!r} is out of range (0 to {MAX_CPU})")
    return int(digits)
