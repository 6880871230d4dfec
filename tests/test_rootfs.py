"""A root file system of the caller's: what is found in it (pure), and children that live in one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import OrdinaryUser
from helpers import linux, nothing_left
from rootfs import shared

from pisupervisor import (
    Filesystem,
    IsolationContext,
    IsolationOptions,
    LaunchError,
    Limits,
    OptionsError,
    Plugin,
    ProcessIsolator,
    RootfsHost,
    Security,
)
from pisupervisor.launch import rootfs

OVERLAY = "/var/lib/app"
NAME = f"python{sys.version_info[0]}.{sys.version_info[1]}"


# Pure --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "root/usr/bin").mkdir(parents=True)
    (tmp_path / "root/usr/bin/tool").write_text("")
    (tmp_path / "secret").write_text("outside")
    for name, target in {
        "bin": "usr/bin", "absolute": "/usr/bin/tool", "up": "../../../../usr", "out": "../secret", "away": "/../secret",
        "round": "about", "about": "round", "dangling": "nowhere", "deep": "up/bin/tool",
    }.items():  # fmt: skip
        (tmp_path / "root" / name).symlink_to(target)
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/usr/bin/tool", "/usr/bin/tool"), ("/bin/tool", "/usr/bin/tool"), ("/absolute", "/usr/bin/tool"),
        ("/up", "/usr"), ("/deep", "/usr/bin/tool"), ("/usr/../bin/./tool", "/usr/bin/tool"), ("/..", "/"), ("/", "/"),
        ("/out", None), ("/away", None), ("/round", None), ("/dangling", None), ("/usr/bin/tool/x", None),
        ("/../../secret", None),
    ],
)  # fmt: skip
def test_links_lead_where_they_would_after_chroot(tree: Path, path: str, found: str | None) -> None:
    assert rootfs.resolve(str(tree), path) == found


def test_python_is_found_without_running_it(tree: Path) -> None:
    """The file is no program at all."""
    (tree / "usr/bin" / "python3.11").write_text("not a program")
    (tree / "usr/bin" / "python3.11").chmod(0o755)
    (tree / "usr/bin" / "python3").symlink_to("/usr/bin/python3.11")
    (tree / "usr/lib/python3.11").mkdir(parents=True)
    (tree / "usr/lib/python3/dist-packages").mkdir(parents=True)
    with pytest.raises(OptionsError, match="no standard library"):
        rootfs.find_python(str(tree), None)
    (tree / "usr/lib/python3.11/os.py").write_text("")
    found = rootfs.find_python(str(tree), None)
    assert (found.executable, found.version, found.prefix) == ("/usr/bin/python3.11", (3, 11), "/usr")
    assert found.site == ("/usr/lib/python3/dist-packages",)
    assert found.rootfs == str(tree)
    assert rootfs.find_python(str(tree), "/bin/python3") == found


@pytest.mark.parametrize(("name", "says"), [("python", "named pythonX.Y"), ("python3.8", "older than Python 3.9")])
def test_what_is_no_python_for_a_child(tree: Path, name: str, says: str) -> None:
    (tree / "usr/bin" / name).write_text("")
    (tree / "usr/bin" / name).chmod(0o755)
    with pytest.raises(OptionsError, match=says):
        rootfs.find_python(str(tree), f"/usr/bin/{name}")
    with pytest.raises(OptionsError, match="no Python in"):
        rootfs.find_python(str(tree), None)


def test_entries_are_the_top_but_for_what_is_ours(tree: Path) -> None:
    for name in ("proc", "dev", "tmp", "sys", "pis", "etc"):
        (tree / name).mkdir()
    os.mkfifo(tree / "fifo")
    (tree / "file").write_text("")
    found = {entry[-1] if entry[0] == "symlink" else entry[2]: entry[0] for entry in rootfs.entries(str(tree))}
    assert found["/usr"] == found["/etc"] == "layer"
    assert (found["/file"], found["usr/bin"]) == ("bind", "symlink")
    assert found.keys().isdisjoint({"/proc", "/dev", "/tmp", "/sys", "/pis", "/fifo"})


def test_places_that_cannot_be_made_are_refused(tree: Path) -> None:
    rootfs.check_places(str(tree), ["/usr/bin", "/mine", "/mine/deeper", "/tmp/x"])
    for place in ("/usr/missing", "/bin/tool", "/up"):
        with pytest.raises(OptionsError, match="is no place in"):
            rootfs.check_places(str(tree), [place])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rootfs": "/no/such/folder"}, "no folder"), ({"rootfs": "/"}, "no folder"), ({"rootfs": 5}, "expected a path"),
        ({"rootfs": "/etc/passwd"}, "no folder"), ({"overlay": ["var"]}, "no folder in the child"),
        ({"overlay": ["/tmp/x"]}, "no folder in the child"), ({"overlay": ["/"]}, "no folder in the child"),
        ({"overlay": ["/var/../etc"]}, "no folder in the child"), ({"overlay": ["/a:b"]}, "no folder in the child"),
        ({"overlay": ["/var", "/var"]}, "twice"), ({"overlay": ["/var", "/var/lib"]}, "below"), ({"overlay": "/var"}, "list"),
        ({"overlay": [5]}, "expected a path"), ({"overlay": ["//var"]}, "no folder in the child"),
    ],
)  # fmt: skip
def test_bad_options(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionsError, match=says):
        Filesystem(**wrong)


# Children ----------------------------------------------------------------------------------------------------------


def attempt(path: str, mode: str = "w") -> str:
    """In the child: write there, or the kernel's word."""
    try:
        with open(path, mode) as file:
            return file.read() if mode == "r" else str(file.write("x"))
    except OSError as error:
        return os.strerror(error.errno)


def delete(path: str) -> None:
    os.unlink(path)


def inside(**filesystem: Any) -> ProcessIsolator:
    return ProcessIsolator.create(
        filesystem=Filesystem(rootfs=shared(), **filesystem), security=Security(user=1234), limits=Limits(scratch="1M")
    )


@linux
def test_a_child_sees_that_root_and_is_another_user() -> None:
    """parity: 63, 64"""
    with nothing_left(), inside() as isolator:
        assert isolator.invoke(attempt, "/etc/hostname", "r") == "of-the-rootfs\n" != Path("/etc/hostname").read_text()
        assert isolator.run_source("import os, pwd; (os.getuid(), pwd.getpwuid(os.getuid()).pw_name)").value == (
            1234,
            "app",
        )
        top = isolator.run_source("sorted(os.listdir('/'))").value
        assert set(top) == {*os.listdir(shared()), "pis"} - {"sys"}
        assert isolator.run_source("os.path.realpath(os.__file__)").value == f"/usr/local/lib/{NAME}/os.py"
        assert isolator.run_source("open('/shortcut/present').read(), open('/top-file').read()").value == (
            "as it was", "at the top",
        )  # fmt: skip
        assert all(entry.holds for name, entry in isolator.applied.items() if entry.asked and name != "io")


@linux
def test_it_is_read_only_and_so_is_what_is_shown_in_it(tmp_path: Path) -> None:
    """parity: 64"""
    (tmp_path / "plugin.py").write_text("VALUE = 1")
    tmp_path.chmod(0o777)
    with inside(read_only=[(str(tmp_path), "/plugins")]) as isolator:
        places = ("/etc/x", "/usr/x", "/x", f"{OVERLAY}/x", "/plugins/x", "/plugins/plugin.py", f"{OVERLAY}/present")
        assert {isolator.invoke(attempt, place) for place in places} == {"Read-only file system"}
        assert isolator.invoke(attempt, "/plugins/plugin.py", "r") == "VALUE = 1"
        assert isolator.invoke(attempt, "/tmp/x") == "1"
        flags = isolator.run_source("import os; os.statvfs('/usr').f_flag").value
        assert flags & 7 == os.ST_RDONLY | os.ST_NOSUID | 4  # nodev


@linux
def test_an_overlay_is_the_childs_own_and_gone_with_it() -> None:
    with inside(overlay=[OVERLAY, "/home/user"]) as isolator, inside(overlay=[OVERLAY, "/home/user"]) as other:
        for place in (f"{OVERLAY}/new", "/home/user/new"):
            assert isolator.invoke(attempt, place) == "1"
            assert other.invoke(attempt, place, "r") == "No such file or directory"
        assert isolator.invoke(attempt, f"{OVERLAY}/present", "r") == "as it was"
        isolator.invoke(delete, f"{OVERLAY}/present")
        assert isolator.invoke(attempt, f"{OVERLAY}/present") == "1"  # replaced
        assert other.invoke(attempt, f"{OVERLAY}/present", "r") == "as it was"
        assert isolator.invoke(attempt, "/var/lib/x") == "Read-only file system"
        assert isolator.run_source("import os; os.listdir('/pis/over/0')").value == []  # what holds it is out of sight
        isolator.restart()
        assert isolator.invoke(attempt, f"{OVERLAY}/new", "r") == "No such file or directory"
    assert os.listdir(f"{shared()}{OVERLAY}") == ["present"]
    assert Path(f"{shared()}{OVERLAY}/present").read_text() == "as it was"


@linux
def test_an_overlay_is_bounded() -> None:
    source = f"""
with open("{OVERLAY}/big", "wb", buffering=0) as file:
    try:
        while True: file.write(bytes(1 << 16))
    except OSError as error:
        reached = error.strerror, file.tell() <= 1 << 20
reached"""
    with inside(overlay=[OVERLAY]) as isolator:
        assert isolator.run_source(source).value == ("No space left on device", True)


@linux
def test_an_overlay_without_a_rootfs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")
    tmp_path.chmod(0o755)  # what a child cannot read it cannot read there either
    shown = Filesystem(read_only=[(str(tmp_path), "/shown")], overlay=["/shown"])
    with ProcessIsolator.create(filesystem=shown) as isolator:
        assert isolator.invoke(attempt, "/shown/new") == "1"
        assert isolator.invoke(attempt, "/shown/file", "r") == "as it was"
    assert os.listdir(tmp_path) == ["file"]


@linux
@pytest.mark.parametrize("place", ["/shortcut", "/etc/hostname", "/nowhere/at/all"])
def test_an_overlay_where_no_folder_is(place: str) -> None:
    """No link is followed: it might lead to what is ours."""
    with pytest.raises(LaunchError, match="mounts"):
        inside(overlay=[place])


@linux
def test_a_rootfs_whose_python_does_not_start(tmp_path: Path) -> None:
    (tmp_path / f"usr/lib/{NAME}").mkdir(parents=True)
    (tmp_path / f"usr/lib/{NAME}/os.py").write_text("")
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/python3").symlink_to(NAME)
    (tmp_path / "usr/bin" / NAME).write_text("no program")
    (tmp_path / "usr/bin" / NAME).chmod(0o755)
    with pytest.raises(LaunchError, match="interpreter"):
        ProcessIsolator.create(filesystem=Filesystem(rootfs=tmp_path))


class Reader(Plugin):
    def execute(self, context: IsolationContext) -> Any:
        context.properties["uid"] = os.getuid()
        with open(context.arguments[0]) as file:
            return file.read()


@linux
def test_a_plugin_host_takes_a_folder_or_a_bundle(tmp_path: Path) -> None:
    """parity: 64"""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rootfs").symlink_to(shared())
    options = IsolationOptions(security=Security(user=77))
    for path in (shared(), str(tmp_path)):
        with nothing_left(), RootfsHost(path, options) as host:
            done = host.execute_plugin(Reader(), IsolationContext(arguments=["/etc/hostname"]))
            assert (done.result, done.context.properties) == ("of-the-rootfs\n", {"uid": 77})
    with pytest.raises(OptionsError, match="leave"):
        RootfsHost(shared(), IsolationOptions(filesystem=Filesystem(rootfs=shared())))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionsError, match="no Python in"):
        RootfsHost(tmp_path / "empty")


@linux
@pytest.mark.root
def test_as_an_ordinary_user(ordinary_user: OrdinaryUser) -> None:
    program = f"""
import json
from pisupervisor import Filesystem, Limits, ProcessIsolator
nothing = Limits(memory=None, swap=None, cpus=None, pids=None)
with ProcessIsolator.create(limits=nothing, filesystem=Filesystem(rootfs={shared()!r}, overlay=["{OVERLAY}"])) as isolator:
    isolator.run_source("open('{OVERLAY}/new', 'w').write('x')")
    print(json.dumps(isolator.run_source("import os; [open('/etc/hostname').read(), os.listdir('{OVERLAY}')]").value))
"""
    done = ordinary_user.run(ordinary_user.python, "-c", program)
    assert done.returncode == 0, done.stderr
    hostname, listed = json.loads(done.stdout)
    assert (hostname, sorted(listed)) == ("of-the-rootfs\n", ["new", "present"])
