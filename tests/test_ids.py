"""Outer ids: one for each child, never twice at a time, from a block that belongs to this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pisupervisor.errors import LaunchError
from pisupervisor.launch import ids
from pisupervisor.launch.ids import BLOCK, FIRST, IdBlock


def test_blocks_do_not_meet(tmp_path: Path) -> None:
    blocks = [IdBlock(str(tmp_path / "lock")) for _ in range(3)]
    assert [block.base for block in blocks] == [FIRST, FIRST + BLOCK, FIRST + 2 * BLOCK]
    blocks[1].close()
    again = IdBlock(str(tmp_path / "lock"))
    assert again.base == FIRST + BLOCK
    for block in (blocks[0], blocks[2], again):
        block.close()


def test_the_range_is_above_all_subordinate_ones_and_below_the_sign() -> None:
    assert FIRST > 0x6FFF_FFFF
    assert FIRST + BLOCK * ids.BLOCKS <= 1 << 31


def test_no_id_is_given_twice_until_it_is_given_back(tmp_path: Path) -> None:
    block = IdBlock(str(tmp_path / "lock"))
    taken = {block.take() for _ in range(BLOCK)}
    assert taken == set(range(block.base, block.base + BLOCK))
    with pytest.raises(LaunchError, match="65536 outer ids of this process are in use") as caught:
        block.take()
    assert (caught.value.step, caught.value.remedy) == ("ids", "close isolators")
    block.give_back(block.base + 5)
    assert block.take() == block.base + 5
    block.close()


def test_a_returned_id_is_not_the_next_one(tmp_path: Path) -> None:
    """So that a child does not come to own what a dead one left somewhere."""
    block = IdBlock(str(tmp_path / "lock"))
    first = block.take()
    block.give_back(first)
    assert block.take() == first + 1
    block.close()


def test_all_blocks_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "BLOCKS", 2)
    fds = len(os.listdir("/proc/self/fd"))
    kept = [IdBlock(str(tmp_path / "lock")) for _ in range(2)]
    with pytest.raises(LaunchError, match="all 2 blocks of outer ids are taken"):
        IdBlock(str(tmp_path / "lock"))
    for block in kept:
        block.close()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_no_place_for_the_lock(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        IdBlock(str(tmp_path / "nowhere" / "lock"))
    assert (caught.value.step, caught.value.errno) == ("ids", 2)
    assert "writable" in str(caught.value.remedy)


def test_a_link_in_the_locks_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LaunchError):
        IdBlock(str(tmp_path / "lock"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_dead_process_holds_no_block(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    source = f"import os; from pisupervisor.launch.ids import IdBlock; print(IdBlock({lock!r}).base); os._exit(1)"
    first = IdBlock(lock)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert int(done.stdout) == first.base + BLOCK
    second = IdBlock(lock)
    assert second.base == first.base + BLOCK
    first.close()
    second.close()
