"""The command line: real runs of ``python -m pisupervisor``, and its pure parts."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import features
import pytest
from conftest import OrdinaryUser

from pisupervisor import cli, errors
from pisupervisor.cli_output import escaped, plain, shown

TOP = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "pisupervisor"]
PLUGIN = """
import os, sys

class Tools:
    @staticmethod
    def join(*parts):
        return "+".join(parts)

def code(text): return int(text)
def nothing(): pass
def talk():
    print("to stdout")
    os.write(2, b"to stderr\\n")
    return {"answer": (1, 2.5, None)}
def odd(): return {(1, 2): {3}, "nan": float("nan"), "big": 10 ** 5000, "bytes": b"x"}
def boom():
    print("said before")
    raise ValueError("no good")
def loop():
    while True: pass
def hoard():
    print("said before", flush=True)
    block = []
    while True: block.append(bytearray(1 << 20))
def leave(text): sys.exit(int(text) if text.isdigit() else text)
def drive(): print("\\x1b]0;owned\\x07\\x9b31m"); return "\\x1b[2J"
def flood(): print("x" * (2 << 20))
def folders():
    import helper
    return helper.NAME
def crash():
    os.kill(os.getpid(), 11)
"""
TOOL = """
import sys
print(sys.argv[1:])
sys.exit(int(sys.argv[1]) if sys.argv[1:] else 0)
"""

root_and_linux = [pytest.mark.linux, pytest.mark.root]


def run(*arguments: str, cwd: Path = TOP, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment, stdin=stdin,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def _full_pipe(data: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    return str(file)


@pytest.fixture
def tool(tmp_path: Path) -> str:
    file = tmp_path / "tool.py"
    file.write_text(TOOL)
    return str(file)


# --- what run returns ------------------------------------------------------------------------------------------------


class TestRun:
    pytestmark = root_and_linux

    def test_arguments_are_strings_and_the_result_is_printed(self, plugin: str) -> None:
        done = run("run", f"{plugin}:Tools.join", "--", "1", "--memory", "--")
        assert (done.returncode, done.stdout, done.stderr) == (0, "1+--memory+--\n", "")

    def test_nothing_is_printed_for_none(self, plugin: str) -> None:
        done = run("run", f"{plugin}:nothing")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_what_the_target_writes_is_passed_on(self, plugin: str) -> None:
        done = run("run", f"{plugin}:talk")
        assert done.stdout == "to stdout\n{'answer': (1, 2.5, None)}\n"
        assert done.stderr == "to stderr\n"

    def test_a_generators_items_are_its_result(self, plugin: str) -> None:
        with open(plugin, "a") as file:
            file.write("def count(stop):\n    n = 0\n    while n != int(stop):\n        yield n\n        n += 1\n")
        assert run("run", f"{plugin}:count", "--", "3").stdout == "[0, 1, 2]\n"
        done = run("run", f"{plugin}:count", "--", "-1")
        assert (done.returncode, done.stdout) == (1, "")
        assert "more than 10000 items" in done.stderr

    def test_output_is_bounded_and_says_so(self, plugin: str) -> None:
        done = run("run", f"{plugin}:flood")
        assert len(done.stdout) == 1 << 20
        assert "note: the output was longer than the limit" in done.stderr

    def test_a_module_is_a_file_too(self) -> None:
        assert run("run", "json:dumps", "--", "text").stdout == '"text"\n'

    def test_a_file_with_a_bare_name_is_found(self, plugin: str) -> None:
        os.rename(plugin, os.path.join(os.path.dirname(plugin), "bare"))
        assert run("run", "bare:Tools.join", "--", "a", cwd=Path(plugin).parent).stdout == "a\n"

    def test_options_reach_the_child(self, plugin: str, tmp_path: Path) -> None:
        folder = tmp_path / "lib"
        folder.mkdir()
        (folder / "helper.py").write_text("NAME = 'found'\n")
        limits = ["--memory", "64M", "--cpus", "0.5", "--pids", "8", "--network", "loopback", "--profile", "strict"]
        more = ["--import-path", str(folder), "--python", sys.executable, "--degrade", "io", "--timeout", "20"]
        assert run("run", f"{plugin}:folders", *limits, *more).stdout == "found\n"

    def test_a_script_gets_argv_and_its_exit_code_is_ours(self, tool: str) -> None:
        done = run("run", tool, "--", "7", "--fast")
        assert (done.returncode, done.stdout) == (7, "['7', '--fast']\n")

    @pytest.mark.parametrize("target", ["", ":shout"])
    @pytest.mark.parametrize("kind", ["file", "pipe"])
    def test_stdin_is_the_targets_where_that_is_asked_for(self, tmp_path: Path, target: str, kind: str) -> None:
        code = tmp_path / "code.py"
        code.write_text("def shout():\n    print(input().upper())\n\nif __name__ == '__main__':\n    shout()\n")
        (tmp_path / "text").write_text("hello\n")
        with open(tmp_path / "text") as file:
            given = file.fileno() if kind == "file" else _full_pipe(b"hello\n")
            done = run("run", f"{code}{target}", "--stdin", stdin=given)
            assert (done.returncode, done.stdout, done.stderr) == (0, "HELLO\n", "")
            done = run("run", f"{code}{target}", stdin=given)
            assert done.returncode == 1
            assert "EOFError" in done.stderr
        if kind == "pipe":
            os.close(given)

    def test_a_stdin_that_cannot_pass_says_why(self, plugin: str) -> None:
        done = run("run", f"{plugin}:nothing", "--stdin")
        assert done.returncode == 1
        assert "device" in done.stderr
        line = f"{sys.executable} -m pisupervisor run {plugin}:nothing --stdin <&-"
        closed = subprocess.run(["sh", "-c", line], cwd=TOP, capture_output=True, text=True, timeout=60, check=False)
        assert closed.returncode == 2
        assert "--stdin: it is closed" in closed.stderr

    @pytest.mark.parametrize("target", ["", ":f"])
    def test_a_module_that_is_missing_is_told_with_the_options_of_the_command(
        self, tmp_path: Path, target: str
    ) -> None:
        (tmp_path / "code.py").write_text("import numpy\ndef f(): pass\n")
        done = run("run", f"{tmp_path}/code.py{target}")
        assert done.returncode == 1
        assert done.stderr.endswith("note: on this command line: --import-path DIR, or --python VENV\n")


class TestExitCodes:
    pytestmark = root_and_linux

    @pytest.mark.parametrize(("value", "code"), [("0", 0), ("5", 5), ("125", 125), ("126", 0), ("-1", 0)])
    def test_the_targets_own(self, plugin: str, value: str, code: int) -> None:
        assert run("run", f"{plugin}:code", "--", value).returncode == code

    @pytest.mark.parametrize(("said", "code"), [("3", 3), ("0", 0), ("200", 1), ("a message", 1)])
    def test_sys_exit(self, plugin: str, said: str, code: int) -> None:
        done = run("run", f"{plugin}:leave", "--", said)
        assert done.returncode == code
        assert done.stderr == ("" if said.isdigit() else f"{said}\n")

    def test_an_exit_code_of_a_script_that_is_ours_to_give_becomes_1(self, tool: str) -> None:
        assert run("run", tool, "--", "137").returncode == 1

    def test_a_script_that_was_interrupted(self, tmp_path: Path) -> None:
        """As a shell has it."""
        file = tmp_path / "tool.py"
        file.write_text("raise KeyboardInterrupt")
        assert run("run", str(file)).returncode == 130
        done = run("run", str(file), "--json")
        told = json.loads(done.stdout)
        assert (told["ok"], told["exit_code"], told["reason"], told["code"]) == (True, None, "signaled", 130)

    def test_timeout(self, plugin: str) -> None:
        done = run("run", f"{plugin}:loop", "--timeout", "0.3")
        assert done.returncode == 124
        assert done.stderr.startswith("pisupervisor: error: the call was still running after 0.3 s")

    def test_memory(self, plugin: str) -> None:
        done = run("run", f"{plugin}:hoard", "--memory", "40M")
        assert done.returncode == 137
        assert "memory limit" in done.stderr

    def test_exception(self, plugin: str) -> None:
        done = run("run", f"{plugin}:boom")
        assert done.returncode == 1
        assert "pisupervisor: error: ValueError: no good" in done.stderr
        assert f'File "{plugin}", line' in done.stderr

    @pytest.mark.parametrize("code", ["plugin.py:absent", "nowhere.py:f", "nowhere.py", "no_such_module:f"])
    def test_not_found(self, plugin: str, code: str) -> None:
        done = run("run", code, cwd=Path(plugin).parent)
        assert done.returncode == 127
        assert done.stderr.startswith("pisupervisor: error: ")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--memory", "much"], ["--memory", "3"], ["--pids", "x"], ["--cpus", "-1"], ["--network", "all"],
            ["--profile", "/nowhere"], ["--degrade", "gravity"], ["--import-path", "/nowhere"], ["--timeout", "0"],
            ["--python", "/nowhere"], ["stray"], ["--unknown"], ["--stdin", "--restart"],
        ],
    )  # fmt: skip
    def test_bad_usage(self, plugin: str, arguments: list[str]) -> None:
        done = run("run", f"{plugin}:nothing", *arguments)
        assert done.returncode == 2
        assert "pisupervisor: error: " in done.stderr
        assert "Traceback" not in done.stderr

    def test_arguments_without_their_mark_are_told_about_it(self, plugin: str) -> None:
        assert (
            "arguments: a b; what the target is to get stands behind --"
            in run("run", f"{plugin}:code", "a", "b").stderr
        )

    @pytest.mark.parametrize("target", ["", "1st", "a..b", "f()"])
    def test_a_target_that_is_no_name_is_bad_usage(self, plugin: str, target: str) -> None:
        assert run("run", f"{plugin}:{target}").returncode == 2

    @pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["doctor", "--", "x"]])
    def test_bad_commands(self, arguments: list[str]) -> None:
        assert run(*arguments).returncode == 2

    def test_a_crash_is_told_with_its_signal(self, plugin: str) -> None:
        done = run("run", f"{plugin}:crash")
        assert done.returncode == 1
        assert "SIGSEGV" in done.stderr

    def test_output_before_a_failure_is_shown(self, plugin: str) -> None:
        if not hasattr(errors.IsolationError, "stdout"):
            pytest.skip("errors do not carry the output of their call")
        assert run("run", f"{plugin}:boom").stdout == "said before\n"
        assert run("run", f"{plugin}:hoard", "--memory", "40M").stdout == "said before\n"


@pytest.mark.rootless
def test_a_missing_protection(ordinary_user: OrdinaryUser) -> None:
    file = ordinary_user.home / "plugin.py"
    file.write_text(PLUGIN)
    command = [ordinary_user.python, "-m", "pisupervisor", "run", f"{file}:Tools.join"]
    environment = {"PYTHONPATH": str(TOP), **ordinary_user.environment}
    user = OrdinaryUser(ordinary_user.home, ordinary_user.python, environment)
    done = user.run(*command, "--", "a")
    if done.returncode == 0:
        pytest.skip("this user may make groups here")
    assert done.returncode == 126
    assert "remedy: " in done.stderr
    assert "--degrade NAME" in done.stderr
    assert "Traceback" not in done.stderr
    degraded = [word for name in ("memory", "swap", "cpus", "pids") for word in ("--degrade", name)]
    done = user.run(*command, *degraded, "--", "a", "b")
    assert (done.returncode, done.stdout) == (0, "a+b\n")


# --- json ------------------------------------------------------------------------------------------------------------


class TestJson:
    pytestmark = root_and_linux

    def test_a_result(self, plugin: str) -> None:
        done = run("run", f"{plugin}:talk", "--json")
        told = json.loads(done.stdout)
        assert told["ok"] is True
        assert told["value"] == {"answer": [1, 2.5, None]}
        assert (told["stdout"], told["stderr"], told["truncated"]) == ("to stdout\n", "to stderr\n", False)
        assert (told["reason"], told["code"]) == ("returned", 0)
        assert told["duration"] > 0
        assert told["usage"]["cpu_time"] > 0
        assert told["usage"]["peak_memory"] > 1 << 20
        assert done.stderr == ""

    def test_what_json_lacks_is_shown_by_repr(self, plugin: str) -> None:
        value = json.loads(run("run", f"{plugin}:odd", "--json").stdout)["value"]
        assert value["(1, 2)"] == "{3}"
        assert (value["nan"], value["bytes"]) == ("nan", "b'x'")
        assert int(value["big"], 16) == 10**5000

    def test_an_error(self, plugin: str) -> None:
        done = run("run", f"{plugin}:boom", "--json")
        told = json.loads(done.stdout)
        assert (told["ok"], told["reason"], told["code"], done.returncode) == (False, "raised", 1, 1)
        assert told["error"]["type"] == "RemoteError"
        assert told["error"]["type_name"] == "ValueError"
        assert told["error"]["message"] == "no good"
        assert "plugin.py" in told["error"]["remote_traceback"]

    @pytest.mark.parametrize(
        ("target", "arguments", "code", "reason"),
        [
            ("loop", ["--timeout", "0.3"], 124, "timeout"), ("hoard", ["--memory", "40M"], 137, "memory"),
            ("absent", [], 127, "not_found"), ("nothing", ["--memory", "3"], 2, "usage"),
            ("crash", [], 1, "signaled"),
        ],
    )  # fmt: skip
    def test_reasons(self, plugin: str, target: str, arguments: list[str], code: int, reason: str) -> None:
        done = run("run", f"{plugin}:{target}", "--json", *arguments)
        told = json.loads(done.stdout)
        assert (told["ok"], told["code"], told["reason"], done.returncode) == (False, code, reason, code)
        assert told["error"]["message"]

    def test_a_script(self, tool: str) -> None:
        told = json.loads(run("run", tool, "--json", "--", "7").stdout)
        assert (told["ok"], told["exit_code"], told["reason"], told["stdout"]) == (True, 7, "exited", "['7']\n")


# --- restart, interruption, terminals ----------------------------------------------------------------------------------


@pytest.mark.linux
@pytest.mark.root
@pytest.mark.parametrize("name", ["once.py:work", "once.py"])
def test_restart_repeats_the_call(tmp_path: Path, name: str) -> None:
    """The first child dies; the second finds out by the host's loopback that it is not the first."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (tmp_path / "once.py").write_text(
            "import os, socket\n"
            "def work():\n"
            f"    with socket.create_connection(('127.0.0.1', {port})) as link:\n"
            "        if link.recv(1) == b'1': os.kill(os.getpid(), 11)\n"
            "    print('second')\n"
            "if __name__ == '__main__': work()\n"
        )
        command = [*COMMAND, "run", name, "--network", "host", "--restart"]
        environment = {**os.environ, "PYTHONPATH": str(TOP)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
            listener.settimeout(20)
            for number in (b"1", b"2"):
                with listener.accept()[0] as link:
                    link.sendall(number)
            assert process.communicate(timeout=20)[0] == "second\n"
        assert process.returncode == 0


@contextmanager
def looping(plugin: str) -> Iterator[subprocess.Popen[str]]:
    """A run that is in the middle of its call."""
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    command = [*COMMAND, "run", f"{plugin}:loop"]
    with subprocess.Popen(command, cwd=TOP, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 20
            while not groups_of(process.pid) or not busy(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def groups_of(pid: int) -> list[Path]:
    base = features.own_cgroup("memory")
    assert base is not None
    return list(base.glob(f"pisupervisor/{pid}-*"))


def busy(pid: int) -> bool:
    """Whether the child has burned some CPU time: it is in its loop then."""
    members = [int(line) for group in groups_of(pid) for line in (group / "cgroup.procs").read_text().split()]
    ticks = [sum(map(int, Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:13])) for one in members]
    return sum(ticks) >= 10


@pytest.mark.linux
@pytest.mark.root
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_child_and_us(plugin: str, number: int, code: int) -> None:
    with looping(plugin) as process:
        members = [int(line) for line in (groups_of(process.pid)[0] / "cgroup.procs").read_text().split()]
        process.send_signal(number)
        told = process.communicate(timeout=20)[1]
        assert process.returncode == code
        assert "Traceback" not in told
        assert groups_of(process.pid) == []
        assert members
        assert not [pid for pid in members if Path(f"/proc/{pid}").exists()]


@pytest.mark.linux
@pytest.mark.root
def test_a_child_does_not_drive_the_terminal(plugin: str) -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    done = subprocess.run(
        [*COMMAND, "run", f"{plugin}:drive"],
        cwd=TOP,
        env=environment,
        stdout=slave,
        stderr=slave,
        timeout=60,
        check=False,
    )
    os.close(slave)
    shown_there = os.read(master, 1 << 16)
    os.close(master)
    assert done.returncode == 0
    assert shown_there == b"\\x1b]0;owned\\x07\\x9b31m\r\n\\x1b[2J\r\n"
    assert run("run", f"{plugin}:drive").stdout == "\x1b]0;owned\x07\x9b31m\n\x1b[2J\n"  # a pipe gets what was said


@pytest.mark.linux
@pytest.mark.root
def test_a_reader_that_leaves_is_no_traceback(plugin: str) -> None:
    pipe, ours = os.pipe()
    os.close(pipe)
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    done = subprocess.run(
        [*COMMAND, "run", f"{plugin}:flood"], cwd=TOP, env=environment, stdout=ours, stderr=subprocess.PIPE, timeout=60,
        check=False,
    )  # fmt: skip
    os.close(ours)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.linux
@pytest.mark.root
@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">&- 2>&-", 7, ""),
        (">&-", 7, ""),
        ("> /dev/full", 1, "pisupervisor: error: [Errno 28] No space left on device\n"),
    ],
)
def test_output_that_nobody_can_read(plugin: str, streams: str, code: int, said: str) -> None:
    command = f"{sys.executable} -m pisupervisor run {plugin}:code {streams} -- 7"
    done = subprocess.run(["/bin/sh", "-c", command], cwd=TOP, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


# --- pure ------------------------------------------------------------------------------------------------------------


def test_escaping() -> None:
    assert escaped("a\tb\nc") == "a\tb\nc"
    assert escaped("\x00\x07\r\x1b\x7f\x85\x9b") == "\\x00\\x07\\x0d\\x1b\\x7f\\x85\\x9b"
    assert escaped("grüße ☃ \u202e\u2066\u061c\u2029") == "grüße ☃ \\u202e\\u2066\\u061c\\u2029"


def test_plain_values() -> None:
    assert plain((1, [True, None], {"a": 1.5})) == [1, [True, None], {"a": 1.5}]
    assert plain({1: 2, None: 3}) == {"1": 2, "None": 3}
    assert plain(math.inf) == "inf"
    assert plain(1 << 2000) == str(1 << 2000)
    assert json.dumps(plain([10**5000]))
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert json.dumps(plain(deep))


def test_shown_values() -> None:
    assert shown("text") == "text"
    assert shown(10**5000) == hex(10**5000)
    assert shown([10**5000]).startswith("<list that cannot be shown")


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("plugin.py:Tools.shrink", ("plugin.py", "Tools.shrink")), ("tool.py", ("tool.py", None)),
        ("a:b/c.py:f", ("a:b/c.py", "f")), ("json:dumps", ("json", "dumps")), ("plugin.py:", ("plugin.py", "")),
    ],
)  # fmt: skip
def test_split_code(code: str, parts: tuple[str, str | None]) -> None:
    assert cli.split_code(code) == parts


def test_split_code_prefers_a_file_with_a_colon(tmp_path: Path) -> None:
    file = tmp_path / "odd:name"
    file.touch()
    assert cli.split_code(str(file)) == (str(file), None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FeatureUnavailable("no", feature="landlock", remedy="boot"), 126),
        (errors.LaunchError("no", step="clone", remedy="none"), 126), (errors.OptionsError("no"), 2),
        (errors.ProfileError("no"), 2), (errors.TargetNotFound("no"), 127), (errors.CallTimeout("no"), 124),
        (errors.CompileError("no"), 1), (errors.SerializationError("no", direction="from child"), 1),
        (errors.RemoteError("KeyError", "no"), 1), (errors.IsolatorClosed("no"), 1),
    ],
)  # fmt: skip
def test_every_error_has_its_code(error: Exception, code: int) -> None:
    assert cli.classify(error)[0] == code


def test_importing_the_command_line_costs_little() -> None:
    source = "import sys; before = set(sys.modules); import pisupervisor.cli; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", source], cwd=TOP, capture_output=True, text=True, check=True).stdout
    ours = {name for name in loaded.split() if name.startswith(("pisupervisor", "pihost"))}
    assert ours == {"pisupervisor", "pisupervisor.cli"}
    assert not {"json", "dataclasses", "subprocess", "msgspec", "logging", "socket"} & set(loaded.split())


def test_help_and_version() -> None:
    assert "exit codes of run" in run("run", "--help").stdout
    assert run("--version").stdout.startswith("pisupervisor 0.")
