"""CpuSet: what it reads, how it writes, what it refuses. parity: 25"""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from pisupervisor.errors import OptionsError
from pisupervisor.limits.cpuset import MAX_CPU, CpuSet
from pisupervisor.options import Limits

PARSED = [
    # one CPU, as a name or a number
    ("cpu0", {0}), ("0", {0}), ("cpu1", {1}), ("CPU2", {2}), ("Cpu3", {3}), ("cPu4", {4}), ("63", {63}),
    ("cpu31", {31}), ("cpu32", {32}), ("cpu33", {33}), ("cpu63", {63}), ("cpu64", {64}), ("cpu8191", {8191}),
    ("007", {7}),
    # each of the five delimiters
    ("cpu0 cpu2", {0, 2}), ("cpu0:cpu2", {0, 2}), ("cpu0;cpu2", {0, 2}), ("cpu0,cpu2", {0, 2}), ("cpu0|cpu2", {0, 2}),
    ("0 1", {0, 1}), ("0:1", {0, 1}), ("0;1", {0, 1}), ("0,1", {0, 1}), ("0|1", {0, 1}),
    # runs and mixtures of delimiters, also around the text
    ("cpu0  cpu1", {0, 1}), ("cpu0, cpu1", {0, 1}), ("0 ; 1 | 2", {0, 1, 2}), (" cpu5 ", {5}), (",1,,2,", {1, 2}),
    ("cpu0 cpu1:cpu2;cpu3,cpu4|cpu5", {0, 1, 2, 3, 4, 5}), ("cpu0,1 CPU2", {0, 1, 2}),
    # order and repetition mean nothing
    ("cpu2 cpu0", {0, 2}), ("3 3 3", {3}), ("cpu1 1 CPU1", {1}),
    # ranges
    ("0-3", {0, 1, 2, 3}), ("cpu0-cpu3", {0, 1, 2, 3}), ("cpu0-3", {0, 1, 2, 3}), ("CPU6-CPU7", {6, 7}), ("5-5", {5}),
    ("0-1,3", {0, 1, 3}), ("0-2 1-4", {0, 1, 2, 3, 4}), ("30-34", {30, 31, 32, 33, 34}),
]  # fmt: skip

REFUSED = [
    "", " ", ",", " : ; , | ", "cpu", "cpux", "cpu-1", "-1", "1-", "-", "0--3", "0-1-2", "3-1", "cpu3-cpu1", "cpu 0",
    "cpu0 - cpu3", "cpu0/cpu1", "cpu0\tcpu1", "cpu0\n", "0x1", "1.0", "+1", "1_0", "²", "٣", "core0", "xcpu0", "cpu0x",
    "cpu8192", "8192", "0-8192", "99999999999999999999", "9" * 5000, "all", "*", "cpucpu1", "cpu0\0",
]  # fmt: skip

WRITTEN = [
    ({0}, "0"), ({0, 1}, "0-1"), ({0, 2}, "0,2"), ({0, 1, 2, 5}, "0-2,5"), ({5, 2, 1, 0}, "0-2,5"),
    ({1, 3, 5}, "1,3,5"), ({0, 1, 3, 4}, "0-1,3-4"), ({31, 32, 33}, "31-33"), ({8191}, "8191"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cpus"), PARSED)
def test_parse(text: str, cpus: set[int]) -> None:
    assert CpuSet.parse(text) == CpuSet(cpus)


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    with pytest.raises(OptionsError, match="cpuset: "):
        CpuSet.parse(text)


@pytest.mark.parametrize("text", [None, 3, b"cpu0", ["cpu0"], 0.5])
def test_only_text_is_parsed(text: object) -> None:
    with pytest.raises(OptionsError, match="expected a CpuSet or text"):
        CpuSet.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cpus", "text"), WRITTEN)
def test_written_as_the_kernel_lists_cpus(cpus: set[int], text: str) -> None:
    assert str(CpuSet(cpus)) == text


@pytest.mark.parametrize(
    ("cpus", "mask"), [({0}, 1), ({1}, 2), ({0, 2}, 5), ({33}, 1 << 33), ({0, 63, 64}, 1 | 3 << 63)]
)
def test_masks(cpus: set[int], mask: int) -> None:
    assert CpuSet(cpus).to_mask() == mask
    assert CpuSet.from_mask(mask) == CpuSet(cpus)


@pytest.mark.parametrize("mask", [0, -1, True, 1.0, "1", None, 1 << (MAX_CPU + 1)])
def test_masks_that_are_none(mask: object) -> None:
    with pytest.raises(OptionsError):
        CpuSet.from_mask(mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("cpus", [[], [-1], [8192], ["0"], [True], [1.0], 3, None, [[0]]])
def test_numbers_that_are_no_cpus(cpus: object) -> None:
    with pytest.raises(OptionsError):
        CpuSet(cpus)  # type: ignore[arg-type]


def test_cpu33_is_not_cpu1() -> None:
    assert CpuSet.parse("cpu33") != CpuSet.parse("cpu1")
    assert CpuSet.parse("cpu33").to_mask() & CpuSet.parse("cpu1").to_mask() == 0
    assert 1 not in CpuSet.parse("cpu33")


def test_it_is_a_value() -> None:
    cpus = CpuSet([5, 0, 2, 0])
    assert list(cpus) == [0, 2, 5]
    assert len(cpus) == 3
    assert 2 in cpus
    assert 1 not in cpus
    assert cpus == CpuSet.parse("5 2 0")
    assert cpus != {0, 2, 5}
    assert len({cpus, CpuSet.parse("0,2,5")}) == 1
    assert eval(repr(cpus), {"CpuSet": CpuSet}) == cpus
    with pytest.raises(AttributeError):
        cpus.extra = 1  # type: ignore[attr-defined]


def test_limits_takes_text_or_a_set() -> None:
    assert Limits(cpuset="cpu0 cpu2").cpuset == Limits(cpuset=CpuSet([0, 2])).cpuset == CpuSet([0, 2])
    with pytest.raises(OptionsError):
        Limits(cpuset="cpu0 or so")


@given(st.sets(st.integers(0, MAX_CPU), min_size=1, max_size=40))
def test_round_trips(cpus: set[int]) -> None:
    one = CpuSet(cpus)
    assert set(one) == cpus
    assert CpuSet.parse(str(one)) == CpuSet.from_mask(one.to_mask()) == one


@given(st.text(max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        assert len(CpuSet.parse(text)) > 0
    except OptionsError:
        pass
