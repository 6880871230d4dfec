"""The walls of one child, looked at from outside through /proc and from inside, each beside a child that lacks it."""

from __future__ import annotations

import os
import socket
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import features
import pytest
from helpers import init_of, start_without, status_of, write, zygote_of

from pisupervisor import Filesystem, IsolationOptions, Limits, ProcessIsolator
from pisupervisor.launch.features import NAMESPACE_LINKS
from pisupervisor.launch.ids import BLOCK, BLOCKS, FIRST

pytestmark = [pytest.mark.linux, pytest.mark.bed]
INSIDE = Path(__file__).with_name("inside.py")
CLONE_NEWUSER = 0x10000000
LINKS = sorted(NAMESPACE_LINKS.values())
#: clocks that began at zero show at most the age of this test run, never that of the machine
YOUNG = 120.0


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessIsolator]:
    patch = pytest.MonkeyPatch()
    patch.setenv("HOST_SECRET", "hunter2")
    with ProcessIsolator.create(limits=Limits(scratch="1M")) as isolator:
        yield isolator
    patch.undo()


@pytest.fixture(scope="module")
def facts(child: ProcessIsolator) -> dict[str, Any]:
    found: dict[str, Any] = child.invoke_method(INSIDE, "facts")
    return found


def inside(isolator: ProcessIsolator, function: str, *arguments: Any) -> Any:
    return isolator.invoke_method(INSIDE, function, *arguments)


def without(steps: tuple[str, ...], function: str, *arguments: Any, **changes: Any) -> Any:
    """The same look from a child that lacks these layers."""
    with closing(start_without(*steps, **changes)) as isolator:
        return inside(isolator, function, *arguments)


def link(pid: int | str | None, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


MOUNT_TABLES = ("self/mountinfo", "self/mounts", "self/mountstats", "thread-self/mountinfo", "thread-self/mounts")


def listed(isolator: ProcessIsolator) -> str:
    """All that /proc says of mounts, to the payload and to a program that it starts."""
    source = f"""
        import subprocess
        subprocess.check_output(["/bin/cat", "/proc/self/mountinfo"], text=True) + "".join(
            open("/proc/" + name).read() for name in {MOUNT_TABLES!r})
    """
    return str(isolator.run_source(textwrap.dedent(source)).value)


def test_what_is_shown_does_not_say_where_it_lies(tmp_path: Path) -> None:
    """A mount's line names the folder it shows as the host knows it: there is none to be read, of whatever it is."""
    names = ("given", "written", "modules")
    given, written, modules = (str(tmp_path / name) for name in names)
    for name in names:
        (tmp_path / name).mkdir()
    os.chmod(written, 0o777)
    shown = Filesystem(read_only=[(given, "/given")], writable=[(written, "/written"), (written, "/tmp/written")])
    with ProcessIsolator.create(filesystem=shown, import_paths=[modules]) as isolator:
        assert listed(isolator) == ""
        for place in ("/written/file", "/tmp/written/other"):
            assert inside(isolator, "can_write", place) == "done"
        for pid in (isolator.pid, init_of(isolator)):
            assert Path(f"/proc/{pid}/mountinfo").read_text() == "", "nor can the host, looking at a child, list any"
        assert isolator.applied["mount"].holds
    with closing(start_without("mount table", filesystem=shown, import_paths=[modules])) as isolator:
        # From the root of their own file system on, which need not be that of the host.
        assert [name for name in names if f"{tmp_path.name}/{name} " not in listed(isolator)] == []
        assert not isolator.applied["mount"].holds


# --- namespaces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKS)
def test_each_namespace_is_its_own(child: ProcessIsolator, name: str) -> None:
    with ProcessIsolator.create() as other:
        assert len({link(pid, name) for pid in ("self", child.pid, other.pid)}) == 3
        if name != "time":  # PID 1 makes the payload's, and stays outside of it
            assert link(init_of(child), name) == link(child.pid, name)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("mnt", ("mount namespace", "mounts", "mount table")),
        ("pid", ("pid namespace", "mounts")),
        ("ipc", ("ipc namespace",)),
        ("uts", ("uts namespace", "hostname")),
        ("cgroup", ("cgroup namespace",)),
        ("time", ("time namespace",)),
    ],
)
def test_without_it_it_is_the_zygotes(name: str, steps: tuple[str, ...]) -> None:
    with closing(start_without(*steps)) as isolator:
        assert link(isolator.pid, name) == link(zygote_of(isolator), name)


def test_only_its_own_processes(child: ProcessIsolator, facts: dict[str, Any]) -> None:
    assert facts["pid"] == 2
    assert [name for name in facts["proc"] if not name.isdigit()] == ["self", "thread-self"]
    assert [name for name in facts["proc"] if name.isdigit()] == ["2"], "PID 1 hides"
    assert inside(child, "can_signal", os.getpid()) == "ESRCH"
    assert inside(child, "can_signal", init_of(child)) == "ESRCH"
    assert without(("pid namespace", "mounts"), "facts")["pid"] > 2


@pytest.mark.unhurried
@pytest.mark.timeout(300)  # of a machine that has only just been started it waits for YOUNG
def test_the_clocks_since_boot_are_its_own(facts: dict[str, Any]) -> None:
    if time.clock_gettime(time.CLOCK_BOOTTIME) < YOUNG:
        time.sleep(YOUNG)
    assert max(facts["clocks"]) < YOUNG
    assert min(without(("time namespace",), "facts")["clocks"]) > YOUNG


def test_the_hostname_is_its_own(facts: dict[str, Any]) -> None:
    assert facts["hostname"] == "pihost"
    assert without(("hostname",), "facts")["hostname"] == os.uname().nodename


@pytest.mark.root
def test_its_group_is_the_root_of_what_it_sees(facts: dict[str, Any]) -> None:
    groups = facts["cgroup"].split()
    held = [line for line in groups if "memory" in line] or groups  # v2 names no controllers
    assert {line.split(":", 2)[2] for line in held} == {"/"}
    assert "/pisupervisor/" in without(("cgroup namespace",), "facts")["cgroup"]


# --- ids and privileges ------------------------------------------------------------------------------------------


@pytest.mark.root
def test_root_neither_inside_nor_outside(child: ProcessIsolator, facts: dict[str, Any]) -> None:
    assert facts["ids"] == ((1000,) * 3, (1000,) * 3, [])
    with ProcessIsolator.create() as other:
        outer = {int(status_of(pid or 0)["Uid"].split()[0]) for pid in (child.pid, other.pid)}
        assert len(outer) == 2, "two children cannot touch each other as the same user"
        assert all(FIRST <= uid < FIRST + BLOCK * BLOCKS for uid in outer)
        for pid in (child.pid or 0, init_of(child)):
            status = status_of(pid)
            assert len(set(status["Uid"].split() + status["Gid"].split())) == 1
            assert not status["Groups"]


@pytest.mark.parametrize("who", ["payload", "PID 1"])
def test_no_privileges(child: ProcessIsolator, who: str) -> None:
    status = status_of(child.pid or 0 if who == "payload" else init_of(child))
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "1")


@pytest.mark.parametrize(
    ("steps", "field", "lacking"),
    [
        (("bounding set",), "CapBnd", "0" * 16),
        (("capabilities",), "CapEff", "0" * 16),
        (("no_new_privs", "seccomp", "landlock"), "NoNewPrivs", "1"),
        (("seccomp",), "Seccomp", "2"),
    ],
)
def test_each_of_them_is_the_work_of_one_step(steps: tuple[str, ...], field: str, lacking: str) -> None:
    with closing(start_without(*steps)) as isolator:
        assert status_of(isolator.pid or 0)[field] != lacking


def test_capabilities_would_be_of_use(child: ProcessIsolator) -> None:
    assert inside(child, "can_set_hostname", "mine") == "EPERM"
    assert without(("capabilities", "seccomp"), "can_set_hostname", "mine") == "done"
    assert inside(child, "can_mount") == "EPERM"
    assert without(("capabilities", "seccomp", "landlock"), "can_mount") in ("EINVAL", "ENOENT"), (
        "its root is in no mount namespace"
    )
    assert without(("capabilities", "seccomp", "landlock", "mount table"), "can_mount") == "done"


def test_the_filter_holds_what_nothing_else_does(child: ProcessIsolator) -> None:
    assert inside(child, "can_be_another_personality") == "EPERM"
    assert without(("seccomp",), "can_be_another_personality") == "done"


def test_a_user_namespace_stands_behind_two_walls(child: ProcessIsolator) -> None:
    assert inside(child, "can_unshare", CLONE_NEWUSER) == "EPERM"
    assert without(("seccomp",), "can_unshare", CLONE_NEWUSER) == "EPERM"
    assert without(("mount table",), "can_unshare", CLONE_NEWUSER) == "EPERM"
    assert without(("seccomp", "mount table"), "can_unshare", CLONE_NEWUSER) == "done"


def test_landlock_holds_what_nothing_else_does(child: ProcessIsolator, need: Callable[..., None]) -> None:
    need("landlock_net")
    assert inside(child, "can_bind") == "EACCES"
    assert without(("landlock",), "can_bind") == "done"


def test_devices_cannot_be_made(child: ProcessIsolator) -> None:
    assert inside(child, "can_make_device", "/tmp/disk") in ("EPERM", "EACCES")


def test_pid_1_cannot_be_looked_into(child: ProcessIsolator) -> None:
    for name in ("environ", "mem", "maps", "fd", "root", "status"):
        assert inside(child, "can_open", f"/proc/1/{name}") in ("ENOENT", "EACCES", "EPERM")
    assert inside(child, "can_open", "/proc/self/environ") == "done"
    assert inside(child, "can_signal", 1) in ("EPERM", "done")  # a signal without a handler does nothing to PID 1
    assert inside(child, "can_signal", 1, 9) in ("EPERM", "done")
    assert inside(child, "facts")["pid"] == 2, "it lives on"
    if os.geteuid() == 0:  # a process that is not dumpable belongs to root, whoever it runs as
        assert os.stat(f"/proc/{init_of(child)}/environ").st_uid == 0
        assert os.stat(f"/proc/{child.pid}/environ").st_uid >= FIRST


def test_an_independent_witness() -> None:
    """python-prctl, whose code has nothing to do with ours, says the same from inside."""
    options = IsolationOptions(import_paths=[sysconfig.get_path("platlib")])
    with ProcessIsolator.create(options) as isolator:
        source = (
            "import prctl; [prctl.get_no_new_privs(), prctl.get_securebits(), prctl.capbset_read(prctl.CAP_SYS_ADMIN)]"
        )
        assert isolator.run_source(source).value == [1, 0b1110_1111, False]


# --- what it holds -----------------------------------------------------------------------------------------------


def test_four_descriptors_and_no_more(child: ProcessIsolator, facts: dict[str, Any]) -> None:
    held = {name: os.readlink(f"/proc/{child.pid}/fd/{name}") for name in os.listdir(f"/proc/{child.pid}/fd")}
    assert sorted(held) == sorted(facts["fds"]) == ["0", "1", "2", "3"]
    assert [held[name] for name in "01"] == ["/dev/null"] * 2
    assert held["2"].startswith("pipe:"), "its end is kept by PID 1"
    assert held["3"].startswith("socket:")
    left_open = without(("close fds",), "facts")["fds"]
    assert set(left_open) > {"0", "1", "2", "3"}


def test_a_session_of_its_own(facts: dict[str, Any]) -> None:
    assert facts["session"] is True
    assert without(("session",), "facts")["session"] is False


def test_nothing_of_the_hosts_environment(child: ProcessIsolator, facts: dict[str, Any]) -> None:
    """parity: 55"""
    assert len(facts["environment"]) < 8
    assert "HOST_SECRET" not in facts["environment"]
    for pid in (child.pid, init_of(child), zygote_of(child)):
        assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert facts["argv"] == [""]


def test_limits_of_the_process(facts: dict[str, Any]) -> None:
    rlimits = facts["rlimits"]
    assert (rlimits["RLIMIT_CORE"], rlimits["RLIMIT_NOFILE"]) == ((0, 0), (256, 256))
    assert (rlimits["RLIMIT_MEMLOCK"], rlimits["RLIMIT_NICE"], rlimits["RLIMIT_RTPRIO"]) == ((0, 0),) * 3
    assert facts["umask"] == 0o077
    assert without(("rlimits",), "facts")["rlimits"]["RLIMIT_NOFILE"] != (256, 256)


@pytest.mark.root
def test_the_group_holds_what_the_process_does_not() -> None:
    small = Limits(memory="48M", pids=16)
    with ProcessIsolator.create(limits=small) as isolator:
        assert inside(isolator, "fork_bomb", 60) == 14
    assert without(("limits",), "fork_bomb", 60, limits=small) == 60
    assert without(("limits",), "eat", 96 << 20, limits=small) == 96 << 20


# --- what it sees ------------------------------------------------------------------------------------------------

ROOT = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "pis", "proc", "py", "sbin", "tmp", "usr"}
ETC = {
    "alternatives",
    "group",
    "hostname",
    "hosts",
    "ld.so.cache",
    "localtime",
    "nsswitch.conf",
    "passwd",
    "protocols",
    "services",
}
DEV = {"null", "zero", "full", "random", "urandom", "fd", "stdin", "stdout", "stderr", "shm"}


def test_only_what_it_needs(child: ProcessIsolator, facts: dict[str, Any]) -> None:
    assert facts["cwd"] == "/"
    assert set(facts["root"]) <= ROOT
    assert set(facts["etc"]) <= ETC
    assert set(facts["dev"]) == DEV
    assert inside(child, "text", "/etc/passwd").count("\n") == 3  # root, the user, nobody
    for path in ("/etc/shadow", "/root", "/home", "/sys", "/var", "/run", str(INSIDE), "/proc/sys", "/proc/kcore"):
        assert inside(child, "can_open", path) == "ENOENT", path


@pytest.mark.parametrize("path", ["/new", "/usr/new", "/etc/passwd", "/pis/pihost/new", "/dev/new", "/proc/new"])
def test_read_only(child: ProcessIsolator, path: str) -> None:
    assert inside(child, "can_write", path) in ("EROFS", "EACCES", "EPERM", "ENOENT")
    assert without(("landlock",), "can_write", path) in ("EROFS", "EACCES", "EPERM", "ENOENT")


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_scratch_is_private_and_bounded(child: ProcessIsolator, folder: str) -> None:
    assert inside(child, "fill", f"{folder}/big", 8 << 20) == (1 << 20, "ENOSPC")
    made, ended = inside(child, "fill_inodes", folder, 6000)
    assert ended == "ENOSPC"
    assert 4000 < made < 4096
    with ProcessIsolator.create() as other:
        assert inside(other, "can_open", f"{folder}/0") == "ENOENT"
    assert not os.path.exists(f"{folder}/4000")


def test_what_was_given_is_there_as_it_was_given(tmp_path: Path) -> None:
    write(tmp_path / "in", "data.txt", "given")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    shown = Filesystem(
        read_only=[tmp_path / "in", (str(tmp_path / "in"), "/data"), (str(tmp_path / "in"), "/tmp/deep/data")],
        writable=[(str(tmp_path / "out"), "/out"), (str(tmp_path / "out"), "/tmp/out")],
    )
    with ProcessIsolator.create(filesystem=shown) as isolator:
        for path in (str(tmp_path / "in"), "/data", "/tmp/deep/data"):
            assert inside(isolator, "text", f"{path}/data.txt") == "given"
            assert inside(isolator, "can_write", f"{path}/new") == "EROFS"
            assert inside(isolator, "can_open", f"{path}/data.txt", os.O_RDWR) in ("EROFS", "EACCES")
        assert inside(isolator, "can_write", "/out/one") == "done"
        assert inside(isolator, "can_write", "/tmp/out/two") == "done"
        assert inside(isolator, "can_make_device", "/out/disk") in ("EPERM", "EACCES")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "two"]
    assert not (tmp_path / "in" / "new").exists()


@pytest.mark.parametrize("name", ["M\udcfcller", "a b", "a\\b", "a\nb", "a,b:c"], ids=ascii)
def test_a_folder_of_any_name_is_shown(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    folder.chmod(0o777)
    write(folder, "data.txt", "given")
    write(folder, "tool.py", "def where(): return __file__")
    here = (str(folder), f"/shown/{name}")
    ways = [Filesystem(read_only=[folder, here]), Filesystem(writable=[here])]
    if not features.missing("overlay"):
        ways.append(Filesystem(frozen=[here]))
    for shown in ways:
        with ProcessIsolator.create(filesystem=shown, import_paths=[folder]) as isolator:
            for place in (str(folder), here[1]):
                assert isolator.run_source(f"open({place + '/data.txt'!r}).read()").value == "given"
            assert isolator.invoke_method("tool", "where") == f"{folder}/tool.py"


# --- network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[int]:
    """Of a listener on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_no_network(child: ProcessIsolator, facts: dict[str, Any], port: int) -> None:
    assert facts["interfaces"] == {"lo": False}
    assert inside(child, "can_connect", port) in ("ENETUNREACH", "EACCES")
    assert without(("landlock", "seccomp"), "can_connect", port) == "ENETUNREACH", "the namespace alone holds it"


def test_a_loopback_of_its_own(port: int) -> None:
    options = IsolationOptions(network="loopback")
    with ProcessIsolator.create(options) as one, ProcessIsolator.create(options) as other:
        assert inside(one, "facts")["interfaces"] == {"lo": True}
        assert inside(one, "can_connect", port) == "ECONNREFUSED"
        own = inside(one, "listen")
        assert inside(one, "can_connect", own) == "done"
        assert inside(other, "can_connect", own) == "ECONNREFUSED"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", own), 1)


def test_the_hosts_network_for_those_who_ask(port: int) -> None:
    with ProcessIsolator.create(network="host") as isolator:
        assert link(isolator.pid, "net") == link("self", "net")
        assert inside(isolator, "can_connect", port) == "done"
        assert isolator.applied["network"].asked is False


def test_on_the_hosts_network_landlocks_scope_keeps_abstract_sockets_apart(need: Callable[..., None]) -> None:
    need("landlock_scopes")
    name = f"pisupervisor-test-host-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        with ProcessIsolator.create(network="host") as isolator:
            assert inside(isolator, "abstract", name, False) == "EPERM"
        assert without(("landlock",), "abstract", name, False, network="host") == "done"


def test_abstract_sockets_are_apart(child: ProcessIsolator) -> None:
    name = f"pisupervisor-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        assert inside(child, "abstract", name, False) == "ECONNREFUSED"
    assert inside(child, "abstract", name, True) == "done"
    with ProcessIsolator.create() as other:
        assert inside(other, "abstract", name, False) == "ECONNREFUSED"


def test_a_used_network_is_like_a_new_one() -> None:
    """Children that follow each other may get the same empty network namespace; nothing of the last may be in it."""
    with ProcessIsolator.create(environment={"A_ZYGOTE": "of its own too"}) as isolator:
        for _ in range(5):
            assert inside(isolator, "abstract", "left-over", True) == "done"
            isolator.terminate()
