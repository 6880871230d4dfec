"""Outer ids: one for each child, never twice at a time, from a block that belongs to this process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import DEGRADE

from pisupervisor.errors import LaunchError
from pisupervisor.launch import ids
from pisupervisor.launch.ids import BLOCK, FIRST, IdBlock

TOP = Path(__file__).parent.parent


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


WHOLE = "         0          0 4294967295\n"
ROOTLESS = "0 1001 1\n1 100000 65536\n"


@pytest.mark.parametrize(
    ("uid_map", "gid_map", "expected"),
    [
        (WHOLE, WHOLE, (FIRST, BLOCK, ids.BLOCKS)),
        (ROOTLESS, ROOTLESS, (0x7F80, 1020, 32)),  # a rootless container's: the last 256 are left alone
        ("0 700000 1024\n", "0 700000 1024\n", (512, 16, 32)),  # podman run --userns=auto
        (WHOLE, ROOTLESS, (0x7F80, 1020, 32)),
        ("0 5 20\n", WHOLE, (10, 1, 10)),
        ("0 0 1000000\n", WHOLE, (500000, 15625, 32)),
        ("5 5 1\n0 9 5\n6 20 10\n", WHOLE, (8, 1, 8)),  # in any order, and what touches is one
    ],
)
def test_a_container_has_other_ids(uid_map: str, gid_map: str, expected: tuple[int, int, int]) -> None:
    first, size, count = ids.blocks_here(uid_map, gid_map)
    assert (first, size, count) == expected
    assert first > 0


@pytest.mark.parametrize("uid_map", ["0 1000 1\n", "1000 1000 1\n", "", "0 1000 4\n10 20 900\n"])
def test_a_root_with_next_to_no_ids_is_told_so(uid_map: str) -> None:
    with pytest.raises(LaunchError, match="needs one of its own") as caught:
        ids.blocks_here(uid_map, WHOLE)
    assert caught.value.step == "ids"
    assert "--user 1000" in str(caught.value.remedy)


@pytest.mark.root
@pytest.mark.linux
def test_root_of_a_user_namespace_starts_children(tmp_path: Path) -> None:
    """As in a rootless container: 65536 ids, none of which is in the machine's range."""
    source = """
import ctypes, os, sys
from pisupervisor import *
reader, writer = os.pipe()
if os.fork() == 0:
    os.read(reader, 1)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{os.getppid()}/{name}", "w") as file: file.write("0 0 65536")
    os._exit(0)
assert ctypes.CDLL(None).unshare(0x10000000) == 0
os.write(writer, b"1")
os.wait()
with ProcessIsolator.create(degrade=PROTECTIONS) as isolator:
    print(isolator.run_source("6 * 7").value, isolator.applied["user"].holds, isolator.applied["user"].detail)
"""
    source = source.replace("PROTECTIONS", repr(("memory", "swap", "cpus", "pids", *DEGRADE)))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, cwd=TOP)
    assert done.stdout.startswith("42 True"), done.stderr


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


def test_the_first_ids_of_two_processes_differ(tmp_path: Path) -> None:
    """They get the same block one after the other; files that a child of the first left are no child's of the second."""
    first = set()
    for _ in range(5):
        block = IdBlock(str(tmp_path / "ids"))
        first.add(block.take())
        block.close()
    assert len(first) > 1
    assert all(FIRST <= each < FIRST + BLOCK for each in first)


def test_a_returned_id_is_not_the_next_one(tmp_path: Path) -> None:
    """So that a child does not come to own what a dead one left somewhere."""
    block = IdBlock(str(tmp_path / "lock"))
    first = block.take()
    block.give_back(first)
    assert block.take() == (first + 1 if first + 1 < block.base + BLOCK else block.base)
    block.close()


@pytest.mark.timeout(10)
def test_one_that_is_collected_meanwhile_gives_its_id_back(tmp_path: Path) -> None:
    """The collector may come between any two steps of ``take``, and close an isolator that was forgotten."""

    class Collecting(set[int]):
        def __contains__(self, number: object) -> bool:
            block.give_back(forgotten)
            return super().__contains__(number)

    block = IdBlock(str(tmp_path / "lock"))
    forgotten = block.take()
    block._used = Collecting(block._used)
    assert block.take() != forgotten
    assert forgotten not in set(block._used)
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
    assert str(caught.value.remedy).startswith(f"outer ids are claimed in {tmp_path}/nowhere,")


def test_a_place_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fds = os.listdir("/proc/self/fd")
    monkeypatch.setattr(ids.fcntl, "fcntl", refuse)
    with pytest.raises(LaunchError, match=r"cannot lock .*: No locks available") as caught:
        IdBlock(str(tmp_path / "lock"))
    assert (caught.value.step, caught.value.errno) == ("ids", errno.ENOLCK)
    assert os.listdir("/proc/self/fd") == fds


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


def test_a_read_only_run_is_told_the_engines_switch(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        IdBlock(str(tmp_path / "missing" / "ids"))
    assert f"docker or podman run --tmpfs {tmp_path / 'missing'}" in str(caught.value.remedy)
