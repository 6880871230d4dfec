"""Whose groups are whose on cgroup v2, what is written into them, and what to do about the rest: all pure."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from pisupervisor.errors import FeatureUnavailable, OptionsError
from pisupervisor.launch import kernels, requirements
from pisupervisor.limits import cgroups, delegation, systemd, v2, v2_files
from pisupervisor.limits.cgroups import CgroupHost, GroupLimits, Place
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.limits.delegation import LEAF, find_claim, unit_of
from pisupervisor.limits.detect import detect
from pisupervisor.options import IoLimit, IsolationOptions

MIB = 1 << 20
CG = "/sys/fs/cgroup"
USER = f"{CG}/user.slice/user-1000.slice/user@1000.service"


def claim(own: str, *delegated: str, systemd_runs: bool = True, uid: int = 1000) -> delegation.Claim:
    return find_claim(own, CG, lambda unit: unit in delegated, systemd_runs=systemd_runs, uid=uid)


@pytest.mark.parametrize(
    ("own", "unit"),
    [
        (f"{CG}/system.slice/a.service", f"{CG}/system.slice/a.service"),
        (f"{CG}/system.slice/a.service/deep/down", f"{CG}/system.slice/a.service"),
        (f"{USER}/app.slice/run-1.scope/x", f"{USER}/app.slice/run-1.scope"),  # not the user's whole systemd
        (f"{CG}/system.slice", ""),
        (CG, ""),
    ],
)
def test_the_unit_of_a_group_is_the_nearest_one(own: str, unit: str) -> None:
    assert unit_of(own, CG) == unit


def test_a_delegated_unit_is_ours() -> None:
    own = f"{CG}/system.slice/a.service"
    found = claim(own, own)
    assert (found.base, found.top, found.why) == (own, own, "")
    assert found.how == "delegated by systemd to a.service"


def test_from_the_leaf_the_groups_go_beside_it() -> None:
    unit = f"{USER}/app.slice/run-1.scope"
    assert claim(f"{unit}/{LEAF}", unit).base == unit
    assert claim(f"{unit}/worker/{LEAF}", unit).base == f"{unit}/worker"
    assert claim(f"{unit}/worker", unit)[:2] == (f"{unit}/worker", unit)


def test_what_systemd_keeps_is_not_ours_though_the_rights_would_do() -> None:
    """user@1000.service is delegated, but to the user's systemd: a unit below it is that one's."""
    own = f"{USER}/app.slice/editor.service"
    found = claim(own, USER)
    assert "systemd has not delegated" in found.why
    assert "systemd-run --user --scope -p Delegate=yes" in found.remedy
    assert "--user" not in claim(f"{CG}/system.slice/a.service", uid=0).remedy
    assert "no part of a unit" in claim(CG).why


def test_without_systemd_the_own_group_is_ours() -> None:
    assert claim(CG, systemd_runs=False)[:2] == (CG, CG)
    found = claim(f"{CG}/box", systemd_runs=False)
    assert found.remedy == f"as root: chown 1000 {CG}/box {CG}/box/cgroup.procs {CG}/box/cgroup.subtree_control"


def test_which_systemd_is_asked() -> None:
    assert systemd.manager_of(f"{USER}/app.slice/a.service") == "--user"
    assert systemd.manager_of(USER) == "--system"
    assert systemd.manager_of(f"{CG}/system.slice/a.service") == "--system"


def test_controllers_are_turned_on_from_the_top_down() -> None:
    assert delegation._levels("/a", "/a") == ["/a"]
    assert delegation._levels("/a", "/a/b/c") == ["/a", "/a/b", "/a/b/c"]


def tree(folder: Path, have: str, given: str = "", procs: str = "", *, root: bool = False) -> Path:
    """A folder that looks like a group; regular files do not judge what is written, they show it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"cgroup.controllers": have, "cgroup.subtree_control": given, "cgroup.procs": procs}
    for name, text in files.items():
        (folder / name).write_text(text)
    if not root:
        (folder / "cgroup.type").write_text("domain\n")
    return folder


def test_only_what_is_there_and_not_yet_on_is_turned_on(tmp_path: Path) -> None:
    group = tree(tmp_path, "cpu hugetlb pids", "cpu")
    delegation.enable(str(group))
    assert (group / "cgroup.subtree_control").read_text() == "+pids"


def test_processes_move_before_anything_is_turned_on(tmp_path: Path) -> None:
    """The first of cpu and pids would make the group a threaded one, with no memory controller ever after."""
    group = tree(tmp_path, "memory pids", procs="7\n")
    (group / LEAF).mkdir()
    (group / LEAF / "cgroup.procs").write_text("")
    delegation.move_into_leaf(str(group))
    assert (group / LEAF / "cgroup.procs").read_text() == "7"
    assert delegation._is_occupied(str(group))
    assert not delegation._is_occupied(str(tree(tmp_path / "root", "memory", procs="7\n", root=True)))


def test_a_process_from_outside_of_the_namespace_cannot_be_moved(tmp_path: Path) -> None:
    group = tree(tmp_path, "memory", procs="0\n")
    with pytest.raises(OSError, match="outside of this namespace") as caught:
        delegation.hand_down(str(group), str(group))
    assert caught.value.errno == errno.EBUSY
    assert "a group of its own" in delegation.refusal_remedy(caught.value)


def test_a_read_only_tree_names_the_containers_switch() -> None:
    told = delegation.refusal_remedy(OSError(errno.EROFS, ""))
    for words in ("unmask=/sys/fs/cgroup", "writable-cgroups=true", "mount -o remount,bind,rw /sys/fs/cgroup"):
        assert words in told  # "bind": without it a v1 mount is busy, as real containers showed
    assert delegation.refusal_remedy(OSError(errno.EACCES, "")) == "", "who may is told by the claim"


def test_what_is_read_only_needs_that_lifted_before_rights_help(monkeypatch: pytest.MonkeyPatch) -> None:
    found = claim(CG, systemd_runs=False)
    assert delegation._refused(found, OSError(errno.EACCES, ""), 1000) == found.remedy
    monkeypatch.setattr(delegation, "_is_read_only", lambda _path: True)
    for number in (errno.EACCES, errno.EROFS):
        told = delegation._refused(found, OSError(number, ""), 1000)
        assert told.index("mount -o remount,bind,rw") < told.index(f"then as root: chown 1000 {CG}")
        assert "chown" not in delegation._refused(found, OSError(number, ""), 0)


@pytest.mark.parametrize(
    ("base", "words"),
    [(f"{CG}/user.slice/user-7.slice/user@7.service/app.slice/a.scope", "systemctl restart user@7.service;"),
     (f"{CG}/system.slice/a.service", "Delegate=cpu cpuset io memory pids into the unit a.service"),
     (CG, "engine")],
)  # fmt: skip
def test_who_can_hand_a_controller_down(base: str, words: str) -> None:
    told = delegation._place("io", base, frozenset()).remedy
    assert words in told
    assert ("user@" in told) == ("user@" in base)


def test_a_group_that_was_named_is_used_and_no_other(tmp_path: Path) -> None:
    group = str(tree(tmp_path / "mine", "memory"))
    outside = delegation.claim_given(group, f"{CG}/elsewhere", 0)
    assert (outside.base, outside.scope, outside.how, outside.why) == (group, group, f"{group}, as asked", "")
    for own in (group, f"{group}/{LEAF}"):
        assert delegation.claim_given(group, own, 0).scope == "", "children are born in it anyway"
    assert f"chown 1000 {group}" in delegation.claim_given(group, CG, 1000).remedy


def test_a_group_where_others_live_is_not_taken(tmp_path: Path) -> None:
    group = str(tree(tmp_path / "theirs", "memory", procs="7\n"))
    assert "somebody else" in delegation.claim_given(group, CG, 0).why
    assert delegation.claim_given(group, group, 0).why == "", "this process may move itself and what it lives with"


@pytest.mark.parametrize("path", ["/not/there", "/tmp", 7])
def test_what_is_no_group_is_refused(path: object) -> None:
    with pytest.raises(OptionsError, match="cgroup: "):
        IsolationOptions(cgroup=path)  # type: ignore[arg-type]


def test_a_named_group_needs_cgroup_v2_alone(need: Callable[..., None]) -> None:
    need("v1")
    with pytest.raises(OptionsError, match="on v1"):
        detect(group="/sys/fs/cgroup/unified")


# --- hosts ---------------------------------------------------------------------------------------------------------

EVERYTHING = GroupLimits(
    memory=64 * MIB, memory_high=48 * MIB, swap=0, cpus=0.5, cpu_weight=50, cpuset=CpuSet([0]), pids=32,
    io=(IoLimit(device="/", read_bps=1),),
)  # fmt: skip


def host(why: str = "", remedy: str = "", *, lacking: str = "", memsw: bool = True, swap_on: bool = True) -> CgroupHost:
    places = {
        name: Place("/cg", None, why or (f"no {name}" if name == lacking else ""), remedy)
        for name in delegation.CONTROLLERS
    }
    return CgroupHost("v2", places, memsw=memsw, swap_on=swap_on, uid=1000, how="delegated by systemd to a.service")


def test_nothing_is_missing_in_a_delegated_group() -> None:
    assert cgroups.missing(host(), EVERYTHING) == []
    assert host().directories() == ["/cg"]


def test_one_controller_may_be_missing() -> None:
    (entry,) = cgroups.missing(host(lacking="io"), EVERYTHING)
    assert (entry.feature, entry.why) == ("io", "no io")


def test_swap_needs_no_memory_limit_but_the_kernels_accounting() -> None:
    assert cgroups.missing(host(), GroupLimits(swap=0)) == []
    (entry,) = cgroups.missing(host(memsw=False), GroupLimits(swap=0))
    assert "swapaccount=1" in entry.remedy
    assert cgroups.missing(host(memsw=False, swap_on=False), GroupLimits(swap=0)) == []


def test_no_delegation_is_one_cause_and_one_command() -> None:
    where = host("nothing is delegated", systemd.start_delegated(1000), swap_on=False)
    with pytest.raises(FeatureUnavailable) as caught:
        requirements.lacking_limits(IsolationOptions(), where)
    text = str(caught.value)
    assert text.count("nothing is delegated") == 1
    assert text.count("systemd-run --user --scope -p Delegate=yes -- COMMAND") == 1
    assert "memory, cpus, pids: " in text


# --- what is written -----------------------------------------------------------------------------------------------


def written(limits: GroupLimits, swap_files: bool = True) -> dict[str, bytes]:
    return {write.file: write.value for write in v2_files.file_writes(limits, swap_files)}


def test_every_limit_has_its_file() -> None:
    assert written(EVERYTHING) == {
        "pids.max": b"32", "memory.max": b"%d" % (64 * MIB), "memory.oom.group": b"1",
        "memory.high": b"%d" % (48 * MIB), "memory.swap.max": b"0", "cpu.max": b"50000 100000", "cpu.weight": b"50",
        "cpuset.cpus": b"0",
    }  # fmt: skip
    assert written(GroupLimits()) == {}
    assert "memory.swap.max" not in written(EVERYTHING, swap_files=False)


def test_the_kernel_takes_no_quota_below_a_millisecond() -> None:
    assert [v2_files.quota(cpus) for cpus in (0.001, 0.01, 0.5, 3.0)] == [1000, 1000, 50_000, 300_000]


def test_io_rates_have_the_kernels_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pisupervisor.limits.blockdev.block_device", lambda _path: "254:0")
    limit = IoLimit(device="/", read_bps="1M", write_iops=50)
    assert v2_files.io_line(limit) == "254:0 rbps=1048576 wiops=50"


def test_pressure_is_a_share() -> None:
    text = b"some avg10=12.50 avg60=3.00 avg300=0.10 total=5\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=1\n"
    assert v2.some_pressure(text) == 0.125


# --- what is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "first"),
    [
        ("5.10.0-46-cloud-amd64", "overlay mounts in a user namespace"),
        ("6.1.0-56-cloud-amd64", "who is born in a group is bound to its CPUs"),
        ("6.12.118+deb13-cloud-amd64", "sockets that take no descriptors"),
        ("6.18.44-fc", None),
        ("7.3.4", None),
    ],
)
def test_what_a_kernel_is_too_old_for(release: str, first: str | None) -> None:
    found = [entry.what for entry in kernels.too_old_for(release)]
    assert (found[0] if found else None) == first


def test_the_page_on_platforms_has_the_table_of_kernels() -> None:
    page = (Path(__file__).parent.parent / "docs/platforms.md").read_text()
    rows = [f"| {entry.what} | {entry.version} | {entry.fallback} |\n" for entry in kernels.TABLE]
    assert "".join(rows) in page
    versions = [tuple(map(int, entry.version.split("."))) for entry in kernels.TABLE]
    assert versions == sorted(versions)
