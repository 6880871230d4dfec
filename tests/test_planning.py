"""Options and features to plans: policy as data, decided without a kernel."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from pihost import mounts, syscalls
from pisupervisor.errors import FeatureUnavailable, OptionsError
from pisupervisor.launch import attest, landlock, planning, requirements, root
from pisupervisor.launch.features import NAMESPACE_LINKS, NAMESPACES, Features
from pisupervisor.launch.interpreter import Interpreter
from pisupervisor.limits.detect import CONTROLLERS, CgroupHost, Place
from pisupervisor.options import PROTECTIONS, Filesystem, IsolationOptions, Limits, Security

SYSTEM = Interpreter(executable="/usr/bin/python3.11", prefix="/usr", stdlib="/usr/lib/python3.11", version=(3, 11))
HOME = Interpreter(
    executable="/home/me/py/bin/python3", prefix="/home/me/py", stdlib="/home/me/py/lib/python3.12", version=(3, 12),
    packages=("/home/me/venv/lib/python3.12/site-packages",),
)  # fmt: skip


def groups(why: str = "") -> CgroupHost:
    places = {name: Place(f"/sys/fs/cgroup/{name}", 13 if why else None, why) for name in CONTROLLERS}
    return CgroupHost(mode="v1", places=MappingProxyType(places), memsw=True, swap_on=True, uid=0)


def features(**changes: Any) -> Features:
    values: dict[str, Any] = {
        "root": True, "uid": 0, "gid": 0, "kernel": "6.1", "namespaces": frozenset(NAMESPACES), "landlock_abi": 6,
        "cgroups": groups(),
    }  # fmt: skip
    return Features(**{**values, **changes})


def template(options: IsolationOptions, interpreter: Interpreter = SYSTEM, **changes: Any) -> Any:
    values: dict[str, Any] = {"package": "/lib/pihost", "cloudpickle": None, "program": b"", "host_environment": {}}
    return planning.template_plan(options, features(), interpreter, **{**values, **changes})


def child(options: IsolationOptions, interpreter: Interpreter = SYSTEM, **changes: Any) -> Any:
    values: dict[str, Any] = {"outer_id": 1879048192, "rlimits": [(4, 0, 0)], "cgroups": 0}
    seen = changes.pop("features", features())
    return planning.child_plan(options, seen, interpreter=interpreter, **{**values, **changes})


# --- what must be there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "link"), NAMESPACE_LINKS.items())
def test_a_missing_namespace_is_named(name: str, link: str) -> None:
    lacking = features(namespaces=frozenset(NAMESPACES) - {link})
    with pytest.raises(FeatureUnavailable) as caught:
        requirements.check_kernel(IsolationOptions(), lacking)
    assert caught.value.feature == name
    assert f"degrade=({name!r},)" in caught.value.remedy
    requirements.check_kernel(IsolationOptions(degrade=[name]), lacking)


def test_the_hosts_network_needs_no_network_namespace() -> None:
    requirements.check_kernel(IsolationOptions(network="host"), features(namespaces=frozenset(NAMESPACES) - {"net"}))


def test_landlock_that_is_not_there() -> None:
    with pytest.raises(FeatureUnavailable, match="lsm=landlock"):
        requirements.check_kernel(IsolationOptions(), features(landlock_abi=0))
    requirements.check_kernel(IsolationOptions(degrade=["landlock"]), features(landlock_abi=0))
    requirements.check_kernel(IsolationOptions(security=Security(landlock=False)), features(landlock_abi=0))


@pytest.mark.parametrize("kernel", ["5.10.0-8-amd64", "4.19.0", "5.4.0-generic", "odd"])
def test_overlays_that_a_kernel_does_not_let_a_child_mount(kernel: str) -> None:
    options = IsolationOptions(filesystem=Filesystem(overlay=["/srv"]))
    with pytest.raises(FeatureUnavailable, match=r"lets no child mount") as caught:
        requirements.check_kernel(options, features(kernel=kernel))
    assert caught.value.feature == "overlay"
    for newer in ("5.11.0", "5.15.0-91-generic", "6.18.44-fc", "10.0"):
        requirements.check_kernel(options, features(kernel=newer))
    requirements.check_kernel(IsolationOptions(), features(kernel=kernel))


def test_everything_there() -> None:
    requirements.check_kernel(IsolationOptions(), features())
    assert requirements.lacking_limits(IsolationOptions(), groups()) == {}


def test_limits_that_no_group_can_hold_are_all_named_at_once() -> None:
    host = groups("no right to make a group there")
    with pytest.raises(FeatureUnavailable) as caught:
        requirements.lacking_limits(IsolationOptions(), host)
    assert caught.value.feature in ("memory", "cpus", "pids")
    for name in ("memory", "swap", "cpus", "pids"):
        assert name in str(caught.value).partition(": no right to make a group there")[0]
        assert repr(name) in caught.value.remedy
    accepted = requirements.lacking_limits(IsolationOptions(degrade=["memory", "swap", "cpus", "pids"]), host)
    assert set(accepted) == {"memory", "swap", "cpus", "pids"}


def test_a_half_degraded_host_names_the_rest() -> None:
    with pytest.raises(FeatureUnavailable) as caught:
        requirements.lacking_limits(IsolationOptions(degrade=["memory", "swap", "cpus"]), groups("no"))
    assert caught.value.feature == "pids"
    assert "memory" not in str(caught.value)


def test_what_was_not_asked_for_lacks_nothing() -> None:
    options = IsolationOptions(limits=Limits(memory=None, swap=None, cpus=None, pids=None))
    assert requirements.lacking_limits(options, groups("no")) == {}


# --- namespaces and ids ------------------------------------------------------------------------------------------


def test_all_namespaces_at_once() -> None:
    """The cgroup's and the time's are entered later, the network's is made ahead by the zygote."""
    kinds = ("NEWUSER", "NEWNS", "NEWPID", "NEWIPC", "NEWUTS")
    assert child(IsolationOptions()).namespaces == sum(getattr(syscalls, f"CLONE_{kind}") for kind in kinds)


@pytest.mark.parametrize("name", planning.CLONE_FLAGS)
def test_a_namespace_less(name: str) -> None:
    everything = child(IsolationOptions()).namespaces
    left_out = child(IsolationOptions(), without=(f"{name} namespace",))
    assert left_out.namespaces == everything & ~planning.CLONE_FLAGS[name]
    lacking = features(namespaces=frozenset(NAMESPACES) - {NAMESPACE_LINKS[name]})
    assert child(IsolationOptions(), features=lacking).namespaces == left_out.namespaces


@pytest.mark.parametrize("name", ["time", "cgroup"])
def test_a_degraded_kernel_skips_the_later_steps_too(name: str) -> None:
    lacking = features(namespaces=frozenset(NAMESPACES) - {name})
    assert f"{name} namespace" in child(IsolationOptions(degrade=[name]), features=lacking).without


def test_the_id_inside_is_the_users_choice_and_outside_one_of_ours() -> None:
    plan = child(IsolationOptions(security=Security(user=4242)))
    assert (plan.uid, plan.gid) == (4242, 4242)
    assert plan.uid_map == plan.gid_map == "4242 1879048192 1"


def test_an_ordinary_user_has_one_id_which_the_zygote_sees_as_0() -> None:
    assert child(IsolationOptions(), outer_id=None).uid_map == "1000 0 1"
    user = planning.template_plan(
        IsolationOptions(), features(root=False, uid=1000, gid=1001), SYSTEM, package="/p", cloudpickle=None,
        program=b"", host_environment={},
    )  # fmt: skip
    assert user.own_ids == [1000, 1001]
    assert template(IsolationOptions()).own_ids == []


# --- the root ----------------------------------------------------------------------------------------------------


def test_everything_of_the_host_is_read_only() -> None:
    root = template(IsolationOptions(), HOME, cloudpickle="/cp").root
    binds = [entry for entry in root if entry[0] in ("bind", "layer")]
    writable = [entry for entry in binds if not entry[3] & syscalls.MS_RDONLY]
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    assert [entry[1] for entry in writable] == [*devices, "/proc"]
    assert {target for _, source, target, _ in binds if source.startswith("/home")} == {"/py", *HOME.packages}


def test_no_folder_of_ours_shows_where_it_lies_on_the_host() -> None:
    """A bind's source is in mountinfo for the child to read; a layer's is not."""
    root = template(IsolationOptions(), HOME, cloudpickle="/cp").root
    layers = {entry[2]: entry[3:] for entry in root if entry[0] == "layer"}
    assert layers == {place: [mounts.READ_ONLY] for place in ("/py", "/pis/pihost", "/pis/cloudpickle")}


def test_etc_is_made_up() -> None:
    files = {entry[1]: entry[2] for entry in template(IsolationOptions()).root if entry[0] == "file"}
    assert files["/etc/passwd"].count("\n") == 3
    assert files["/etc/hosts"].splitlines()[0] == "127.0.0.1 localhost pihost"
    assert "user:x:1000:1000" in files["/etc/passwd"]
    assert files["/etc/hostname"] == "pihost\n"
    shown = [entry[1] for entry in template(IsolationOptions()).root if entry[0] == "bind" and "/etc/" in entry[1]]
    assert not {"/etc/shadow", "/etc/resolv.conf", "/etc/ssl"} & set(shown)


def test_the_hosts_network_brings_the_hosts_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root.os.path, "exists", lambda path: True)
    entries = template(IsolationOptions(network="host")).root
    assert ["bind", "/etc/resolv.conf", "/etc/resolv.conf", mounts.READ_ONLY] in entries
    assert "/etc/hosts" not in [entry[1] for entry in entries if entry[0] == "file"]


def test_what_belongs_below_tmp_is_put_aside_first(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    options = IsolationOptions(filesystem=Filesystem(read_only=[(str(data), "/tmp/in")], writable=[(str(data), "/w")]))
    assert sorted(root.binds(options, SYSTEM)) == [
        (str(data), "/pis/aside/1", "/tmp/in", mounts.READ_ONLY), (str(data), "/w", "/w", mounts.WRITABLE),
    ]  # fmt: skip
    shown = [entry[2] for entry in template(options).root if entry[:2] == ["bind", str(data)]]
    assert shown == ["/w", "/pis/aside/1", "/tmp/in"], "also in its place, for what is preloaded from there"
    own = child(options).mounts
    assert own[-1] == ["bind", "/pis/aside/1", "/tmp/in", 0]
    assert [entry[:2] for entry in own[:3]] == [["tmpfs", "/tmp"], ["tmpfs", "/dev/shm"], ["proc", "/proc"]]


def test_what_lies_deeper_comes_later_and_nothing_twice(tmp_path: Path) -> None:
    """Else a writable folder would cover a read-only part of it."""
    part, whole = (str(tmp_path), "/w/part"), (str(tmp_path), "/w")
    options = IsolationOptions(filesystem=Filesystem(read_only=[part], writable=[whole]))
    assert [final for _, _, final, _ in root.binds(options, SYSTEM)] == ["/w", "/w/part"]
    options = IsolationOptions(filesystem=Filesystem(read_only=[whole], writable=[whole]))
    with pytest.raises(OptionsError, match="two things are to be shown at /w"):
        root.binds(options, SYSTEM)
    same = IsolationOptions(import_paths=[tmp_path], filesystem=Filesystem(read_only=[tmp_path]))
    assert len(root.binds(same, SYSTEM)) == 1


def test_usr_is_not_shown_twice() -> None:
    assert root.binds(IsolationOptions(import_paths=["/usr/lib"]), SYSTEM) == []


def test_scratch_has_a_size_and_a_number_of_files() -> None:
    own = child(IsolationOptions(limits=Limits(scratch="1M"), security=Security(user=7))).mounts
    assert own[:2] == [["tmpfs", place, 1 << 20, 4096, 7, 7] for place in ("/tmp", "/dev/shm")]


def test_a_relocated_interpreter_is_seen_in_a_place_of_its_own() -> None:
    plan = template(IsolationOptions(), HOME)
    assert plan.interpreter == "/py/bin/python3"
    assert plan.sys_path == ["/py/lib/python3.12", "/py/lib/python3.12/lib-dynload", "/pis"]
    assert plan.import_paths == [*HOME.packages], "apart: the zygote is privileged and imports nothing from there"


# --- landlock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("abi", "bits", "network", "scopes"),
    [(0, 0, 0, 0), (1, 13, 0, 0), (2, 14, 0, 0), (3, 15, 0, 0), (4, 15, 3, 0), (5, 16, 3, 0), (6, 16, 3, 3), (9, 16, 3, 3)],
)  # fmt: skip
def test_each_version_handles_all_it_knows(abi: int, bits: int, network: int, scopes: int) -> None:
    plan = child(IsolationOptions(), features=features(landlock_abi=abi))
    assert (plan.landlock_fs, plan.landlock_net, plan.landlock_scopes) == ((1 << bits) - 1, network, scopes)
    assert bool(plan.landlock) is bool(abi)


@pytest.mark.parametrize("abi", range(1, 8))
def test_no_rule_allows_what_the_version_does_not_know_or_making_devices(abi: int) -> None:
    plan = child(IsolationOptions(filesystem=Filesystem(writable=["/opt"])), features=features(landlock_abi=abi))
    for _path, access in plan.landlock:
        assert access & ~plan.landlock_fs == 0
        assert not access & (landlock.MAKE_CHAR | landlock.MAKE_BLOCK | landlock.IOCTL_DEV)


def test_write_only_where_scratch_or_a_writable_bind_is(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    shown = Filesystem(
        writable=[(str(tmp_path), "/w"), (str(tmp_path / "f"), "/file")], read_only=[(str(tmp_path), "/r")]
    )
    rules = dict(child(IsolationOptions(filesystem=shown)).landlock)
    assert {path for path, access in rules.items() if access & landlock.WRITE_FILE} == {
        "/dev", "/tmp", "/dev/shm", "/w", "/file",
    }  # fmt: skip
    assert rules["/"] == landlock.EXECUTE | landlock.READ_FILE | landlock.READ_DIR
    assert not rules["/file"] & landlock.READ_DIR, "directory rights on a file are EINVAL"


@pytest.mark.parametrize("network", ["loopback", "host"])
def test_a_network_that_was_asked_for_is_not_forbidden(network: Any) -> None:
    assert child(IsolationOptions(network=network)).landlock_net == 0


def test_landlock_that_was_not_asked_for() -> None:
    plan = child(IsolationOptions(security=Security(landlock=False)))
    assert (plan.landlock_abi, plan.landlock) == (0, [])


# --- environment and the rest ------------------------------------------------------------------------------------


def test_the_environment_starts_from_four_names() -> None:
    """parity: 55"""
    host = {"HOST_SECRET": "hunter2", "TZ": "UTC", "PATH": "/evil"}
    assert template(IsolationOptions(), host_environment=host).environment == {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8",
    }  # fmt: skip


def test_what_is_inherited_and_what_is_said_wins() -> None:
    options = IsolationOptions(
        inherit_environment=["TZ", "NOT_SET", "BOTH"], environment={"BOTH": "mine", "PATH": "/x"}
    )
    found = template(options, host_environment={"TZ": "UTC", "BOTH": "host"}).environment
    assert (found["TZ"], found["BOTH"], found["PATH"], "NOT_SET" in found) == ("UTC", "mine", "/x", False)


def test_preloaded_libraries_are_told_to_start_no_threads() -> None:
    assert template(IsolationOptions(preload=["numpy"])).environment["OPENBLAS_NUM_THREADS"] == "1"


def test_the_inside_knows_no_more_than_it_must() -> None:
    plan = child(IsolationOptions(limits=Limits(result="2M"), results="pickle"))
    assert plan.limits == {"result": 2 << 20, "pickle": 1, "modules": 0, "concurrency": 1, "lines": 0}


def test_every_limit_that_is_reported_is_a_protection() -> None:
    assert set(attest.limits_text(Limits())) <= set(PROTECTIONS)
