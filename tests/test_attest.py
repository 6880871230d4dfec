"""Reading back what holds: each single deviation from the plan is refused, by name."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
from test_planning import child, features

from pisupervisor.errors import LaunchError
from pisupervisor.launch import attest
from pisupervisor.launch.attest import Readings, limits_text
from pisupervisor.launch.features import NAMESPACE_LINKS
from pisupervisor.options import PROTECTIONS, IsolationOptions, Limits, Security
from pisupervisor.results import Applied

OUTER = 1879048192
STATUS = {
    "Uid": "\t".join([str(OUTER)] * 4), "CapInh": "0" * 16, "CapPrm": "0" * 16, "CapEff": "0" * 16, "CapBnd": "0" * 16,
    "CapAmb": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2", "Seccomp_filters": "1",
}  # fmt: skip
RLIMITS = "Limit                     Soft Limit           Hard Limit           Units     \n" + "".join(
    f"{name:25} {soft:20} {hard:20} {'bytes':10}\n"
    for name, soft, hard in [
        ("Max cpu time", "unlimited", "unlimited"), ("Max file size", "unlimited", "unlimited"), ("Max data size", "1", "1"),
        ("Max stack size", "1", "1"), ("Max core file size", "0", "0"), ("Max resident set", "1", "1"),
        ("Max processes", "1", "1"), ("Max open files", "256", "512"),
    ]
)  # fmt: skip
LINKS = {name: f"{link}:[2]" for name, link in NAMESPACE_LINKS.items()}
HOST_LINKS = {name: f"{link}:[1]" for name, link in NAMESPACE_LINKS.items()}


def groups(options: IsolationOptions) -> dict[str, Applied]:
    asked = {name: value for name, value in limits_text(options.limits).items() if value is not None}
    return {name: Applied(asked=value, holds=True, how="cgroup v1") for name, value in asked.items()}


def readings(status: dict[str, str] | None = None, **changes: Any) -> Readings:
    values = {
        "status": {**STATUS, **(status or {})}, "links": LINKS, "host_links": HOST_LINKS,
        "uid_map": f"      1000 {OUTER}          1\n", "mounts": "", "own_proc": True, "cgroup": "",
        "rlimits": RLIMITS,
    }  # fmt: skip
    return Readings(**{**values, **changes})


def verify(
    found: Readings, options: IsolationOptions | None = None, *, filtered: bool = True, without: tuple[str, ...] = (), **more: Any
) -> dict[str, Applied]:  # fmt: skip
    options = options or IsolationOptions()
    given = {"groups": groups(options), "missing": {}, **more}
    plan = child(options, outer_id=OUTER, without=without)
    plan.rlimits = [[resource.RLIMIT_CORE, 0, 0], [resource.RLIMIT_NOFILE, 256, 512], [resource.RLIMIT_FSIZE, -1, -1]]
    return attest.verify(plan, options, found, filtered=filtered, **given)


def refused(found: Readings, match: str, **more: Any) -> None:
    with pytest.raises(LaunchError, match=match) as caught:
        verify(found, **more)
    assert caught.value.step == "attest"
    assert caught.value.remedy


def test_a_child_as_planned() -> None:
    applied = verify(readings())
    assert set(applied) == set(PROTECTIONS)
    asked = {name: entry for name, entry in applied.items() if entry.asked is not None and entry.asked is not False}
    assert all(entry.holds and entry.how for entry in asked.values())
    assert {"memory", "cpus", "pids", "swap", "devices", "seccomp", "landlock", "capabilities"} <= asked.keys()


@pytest.mark.parametrize("name", ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
def test_a_capability_left_in_any_set(name: str) -> None:
    refused(readings({name: "0000000000200000"}), "capabilities was planned but does not hold")


@pytest.mark.parametrize("name", ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
def test_a_set_that_cannot_be_read_is_no_empty_set(name: str) -> None:
    status = {key: value for key, value in STATUS.items() if key != name}
    refused(readings()._replace(status=status), "capabilities was planned but does not hold")


@pytest.mark.parametrize("status", [{"Seccomp": "0"}, {"Seccomp": "1"}, {"Seccomp": ""}, {"NoNewPrivs": "0"}])
def test_no_filter(status: dict[str, str]) -> None:
    refused(readings(status), "seccomp was planned but does not hold")


def test_the_hosts_own_filter_is_not_ours() -> None:
    refused(readings(), "seccomp was planned", filtered=False)


def test_no_filter_was_asked_for() -> None:
    options = IsolationOptions(security=Security(seccomp=None))
    applied = verify(readings({"Seccomp": "0"}), options, filtered=False)
    assert (applied["seccomp"].asked, applied["seccomp"].holds) == (None, False)


@pytest.mark.parametrize("name", NAMESPACE_LINKS)
def test_a_namespace_that_is_the_hosts(name: str) -> None:
    refused(readings(links={**LINKS, name: HOST_LINKS[name]}), f"{name} was planned but does not hold")


@pytest.mark.parametrize("name", NAMESPACE_LINKS)
def test_a_namespace_that_is_not_there(name: str) -> None:
    links = {key: value for key, value in LINKS.items() if key != name}
    refused(readings(links=links), f"{name} was planned but does not hold")


def test_a_root_whose_mounts_can_be_listed() -> None:
    line = "300 200 254:0 /srv/app /data ro,nosuid - ext4 /dev/vda rw\n"
    refused(readings(mounts=line), "mount was planned but does not hold .*/srv/app")
    assert not verify(readings(mounts=line), without=("mount table",))["mount"].holds


def test_a_proc_that_is_the_hosts() -> None:
    refused(readings(own_proc=False), "mount was planned but does not hold .its /proc is the host's")


V1 = "4:memory:/outer/group-1\n3:cpu,cpuacct:/../group-1\n1:name=systemd:/init\n0::/group-1\n"


@pytest.mark.parametrize(
    ("cgroup", "places"),
    [
        (V1, {"memory": "/sys/fs/cgroup/memory/group-1", "cpu": "/sys/fs/cgroup/cpu/group-1", "": "/unified/group-1"}),
        ("0::/group-1\n", {"": "/sys/fs/cgroup/mine/group-1"}),
    ],
)
def test_a_child_in_its_group_and_one_beside_it(cgroup: str, places: dict[str, str]) -> None:
    assert verify(readings(cgroup=cgroup), places=places)["memory"].holds
    for controller in places:
        refused(readings(cgroup=cgroup), "not in its group", places={**places, controller: "/sys/fs/cgroup/group-2"})
    refused(readings(cgroup=""), "not in its group", places=places)


@pytest.mark.parametrize("name", NAMESPACE_LINKS)
def test_what_may_be_missing_is_reported_as_missing(name: str) -> None:
    applied = verify(readings(links={**LINKS, name: HOST_LINKS[name]}), IsolationOptions(degrade=[name]))
    assert not applied[name].holds


def test_the_hosts_network_as_asked() -> None:
    links = {**LINKS, "network": HOST_LINKS["network"]}
    applied = verify(readings(links=links), IsolationOptions(network="host"))
    assert (applied["network"].asked, applied["network"].holds) == (False, False)


@pytest.mark.parametrize(
    "uid_map",
    ["", "0 0 4294967295\n", "0 1879048192 1\n", "1000 0 1\n", "1000 1879048193 1\n", "1000 1879048192 65536\n"],
)
def test_another_id_map(uid_map: str) -> None:
    refused(readings(uid_map=uid_map), "the id map is")


@pytest.mark.parametrize("uids", ["0\t0\t0\t0", f"{OUTER}\t0\t{OUTER}\t{OUTER}", f"{OUTER}\t{OUTER}\t0\t{OUTER}"])
def test_root_outside(uids: str) -> None:
    refused(readings({"Uid": uids}), "root outside")


def test_groups_of_somebody_outside() -> None:
    refused(readings({"Groups": "65534 4444 "}), "the child has groups: ")


def test_uids_that_cannot_be_read() -> None:
    status = {key: value for key, value in STATUS.items() if key != "Uid"}
    refused(readings()._replace(status=status), "root outside")


@pytest.mark.parametrize("name", ["memory", "swap", "cpus", "pids"])
def test_a_limit_that_the_kernel_does_not_show(name: str) -> None:
    options = IsolationOptions()
    lost = {**groups(options), name: Applied(asked=1, holds=False, detail="max")}
    refused(readings(), f"{name} was planned but does not hold", groups=lost)


def test_a_limit_that_nobody_wrote() -> None:
    refused(readings(), "memory was planned but does not hold", groups={}, missing={"memory": "no right"})


def test_devices_are_denied_without_a_group_too() -> None:
    options = IsolationOptions(limits=Limits(memory=None, swap=None, cpus=None, pids=None))
    applied = verify(readings(), options, groups={})
    assert applied["devices"].holds
    assert "user namespace" in applied["devices"].how


@pytest.mark.parametrize(
    "change", [("256 ", "257 "), ("512 ", "unlimited "), ("core file size        0", "core file size        9")]
)
def test_a_limit_of_the_process_that_does_not_hold(change: tuple[str, str]) -> None:
    assert RLIMITS.replace(*change) != RLIMITS
    refused(readings(rlimits=RLIMITS.replace(*change)), "a limit of the process does not hold")
    verify(readings(rlimits=RLIMITS.replace(*change)), without=("rlimits",))


def test_no_landlock_where_it_was_asked_for() -> None:
    options = IsolationOptions()
    plan = child(options, outer_id=OUTER, features=features(landlock_abi=0))
    with pytest.raises(LaunchError, match="landlock was planned"):
        attest.verify(plan, options, readings(), filtered=True, groups=groups(options), missing={})


def test_what_an_ablation_left_out_is_let_pass_and_nothing_else() -> None:
    applied = verify(readings({"Seccomp": "0"}), without=("seccomp",))
    assert not applied["seccomp"].holds
    refused(readings({"Seccomp": "0"}), "seccomp", without=("landlock",))


def test_reading_a_real_process() -> None:
    found = attest.read(os.getpid(), HOST_LINKS)
    assert {"Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"} <= found.status.keys()
    assert found.links["pid"] == os.readlink("/proc/self/ns/pid")
    assert found.uid_map.split()


def test_a_child_that_is_gone() -> None:
    with pytest.raises(LaunchError, match="cannot read the child back") as caught:
        attest.read(0x3FFFFF, HOST_LINKS)
    assert (caught.value.step, caught.value.errno) == ("attest", 2)
