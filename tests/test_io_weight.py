"""The share of a disk: where a weight counts (from files), then two groups at one disk of ours, and what is said elsewhere."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import features
import pytest
from helpers import DEGRADE

from pisupervisor import FeatureUnavailable, IsolationOptions, Limits, ProcessIsolator
from pisupervisor.limits import io_weight
from pisupervisor.limits.cgroups import CgroupHost, ChildGroup, GroupLimits, create_group, detect, group_name, missing

MIB = 1 << 20
COST = Path("/sys/fs/cgroup/io.cost.qos")


def disks(folder: Path, **schedulers: str) -> Path:
    for number, (name, scheduler) in enumerate(schedulers.items()):
        (folder / name / "queue").mkdir(parents=True)
        (folder / name / "queue" / "scheduler").write_text(scheduler + "\n")
        (folder / name / "dev").write_text(f"8:{number}\n")
    return folder


def test_only_bfq_weighs_requests_and_on_v2_what_root_has_switched_on(tmp_path: Path) -> None:
    block = str(disks(tmp_path / "block", sda="none mq-deadline [bfq]", sdb="[none] bfq", sdc="[mq-deadline]"))
    cost = tmp_path / "cost"
    cost.write_text("8:1 enable=1 ctrl=auto rpct=0.00\n8:2 enable=0 ctrl=auto\n8:77 enable=1\n")
    assert io_weight.weighing_disks("v1", block, str(cost)) == [("sda", "bfq")]
    assert io_weight.weighing_disks("v2", block, str(cost)) == [("sda", "bfq"), ("sdb", "io.cost")]
    assert io_weight.weighing_disks("v2", str(tmp_path / "none"), str(tmp_path / "none")) == []


def test_the_scale_of_bfq() -> None:
    assert [io_weight.bfq_weight(weight) for weight in (1, 50, 100, 101, 1000, 10000)] == [1, 50, 100, 100, 181, 1000]


def test_every_file_that_there_is_gets_its_number(tmp_path: Path) -> None:
    assert list(io_weight.writes(str(tmp_path), 500, io_weight.V2_FILES)) == []
    for name in ("io.weight", "io.bfq.weight"):
        (tmp_path / name).touch()
    assert dict(io_weight.writes(str(tmp_path), 500, io_weight.V2_FILES)) == {
        "io.weight": b"500", "io.bfq.weight": b"136",
    }  # fmt: skip


@pytest.mark.root
@pytest.mark.linux
def test_where_no_disk_knows_weights_it_is_an_error_with_the_way_out_or_degraded() -> None:
    if io_weight.weighing_disks(detect().mode):
        pytest.skip("no_weights: a disk of this machine schedules by weight")
    with pytest.raises(FeatureUnavailable) as caught:
        ProcessIsolator.create(limits=Limits(io_weight=200))
    assert caught.value.feature == "io_weight"
    assert "bfq > /sys/block/DISK/queue/scheduler" in str(caught.value.remedy)
    with ProcessIsolator.create(limits=Limits(io_weight=200), degrade=("io_weight",)) as isolator:
        entry = isolator.applied["io_weight"]
        assert (entry.asked, entry.holds) == (200, False)
        assert "no disk here" in entry.detail


# --- a disk of our own --------------------------------------------------------------------------------------------


@pytest.fixture
def disk(need: object, tmp_path: Path) -> Iterator[str]:
    """The path of a loop device with bfq, gone afterwards."""
    features.need("root", "loop_bfq")
    image = tmp_path / "image"
    image.write_bytes(os.urandom(32 * MIB))
    attach = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    scheduler = Path(f"/sys/block/{os.path.basename(device)}/queue/scheduler")
    scheduler.write_text("bfq")
    yield device
    scheduler.write_text("none")  # what a loop device begins with
    subprocess.run(["losetup", "--detach", device], check=True)


def reads_in_a_second(group: ChildGroup, disk: int, say: int) -> None:
    """Never returns. The device is open already: the group's members may open none."""
    try:
        for fd in group.attach_fds[bool(group.clone_flags) :]:
            os.write(fd, b"0")
        page, end, count = mmap.mmap(-1, MIB >> 2), time.monotonic() + 1.0, 0
        while time.monotonic() < end:
            os.preadv(disk, [page], random.randrange(120) * (MIB >> 2))
            count += 1
        os.write(say, b"%d" % count)
    finally:
        os._exit(0)


def share(host: CgroupHost, disk: str, weights: tuple[int, int]) -> float:
    """How many times as much as the second the first group has read from the disk."""
    groups = [
        create_group(host, GroupLimits(io_weight=weight), group_name(number)) for number, weight in enumerate(weights)
    ]
    assert all(group.read_back()["io_weight"].holds for group in groups)
    opened = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    readers = []
    try:
        for group in groups:
            reader, writer = os.pipe()
            if os.fork() == 0:
                reads_in_a_second(group, opened, writer)
            os.close(writer)
            readers.append(reader)
        first, second = (int(os.read(reader, 100)) for reader in readers)
        return first / second
    finally:
        for group in groups:
            group.kill()
            os.wait()
            group.remove()
        for fd in (opened, *readers):
            os.close(fd)


@pytest.mark.alone
@pytest.mark.root
def test_two_groups_share_a_disk_by_their_weights(disk: str, need: object) -> None:
    """parity: 34"""
    features.need("v1", "cgroups")
    host = detect()
    assert missing(host, GroupLimits(io_weight=10)) == []
    heavy, light, alike = (share(host, disk, weights) for weights in ((1000, 10), (10, 1000), (100, 100)))
    assert heavy > 2 * light, (heavy, light, alike)
    assert light < alike < heavy, "the control, where both weigh the same, lies between them"


@pytest.mark.alone
@pytest.mark.root
def test_a_child_gets_its_weight_and_applied_says_on_which_disk(disk: str, need: object) -> None:
    features.need("limits")
    with ProcessIsolator.create(limits=Limits(io_weight=50)) as isolator:
        entry = isolator.applied["io_weight"]
        assert entry.holds
        assert f"50; counts on: {os.path.basename(disk)} (bfq)" in entry.detail
        assert isolator.run_source("6 * 7").value == 42


@pytest.mark.bed
@pytest.mark.root
@pytest.mark.v2
def test_on_v2_the_remedy_helps(need: object) -> None:
    """io.cost is switched on for a disk, as the error says, and off again."""
    features.need("own_machine", "limits", "v2_io")
    if not COST.exists():
        pytest.skip("io_cost: the top of the tree does not show it here")
    options = IsolationOptions(limits=Limits(io_weight=300), degrade=DEGRADE)
    with pytest.raises(FeatureUnavailable) as caught:
        ProcessIsolator.create(options)
    assert "MAJOR:MINOR enable=1" in str(caught.value.remedy)
    device = Path("/sys/block/vda/dev").read_text().strip()
    COST.write_text(f"{device} enable=1")
    try:
        with ProcessIsolator.create(options) as isolator:
            entry = isolator.applied["io_weight"]
            assert entry.holds
            assert "io.weight 300" in entry.detail
            assert "vda (io.cost)" in entry.detail
    finally:
        COST.write_text(f"{device} enable=0")
