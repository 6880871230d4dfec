"""Attacks by hand, as hostile code would: forged frames, floods, lies, ways out. Every one has a bound on its time."""

# ruff: noqa: E501  (hostile code is data here; broken over lines it reads worse)
from __future__ import annotations

import ast
import contextlib
import ctypes
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import box
import features
import pytest
from helpers import zygote_of
from hostile import PRELUDE, SYSTEM_CALLS, attack, bounded, limits

from pisupervisor import (
    CallTimeout,
    ChildTerminated,
    Filesystem,
    IsolationError,
    IsolationOptions,
    LaunchError,
    OptionsError,
    ProcessIsolator,
    ProtocolError,
    RestartPolicy,
    Security,
)
from pisupervisor.supervise.metrics import has_signal_pending, usage_from_proc

pytestmark = [pytest.mark.linux, pytest.mark.root]


@pytest.fixture
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create(limits=limits(), restart=RestartPolicy(backoff=0.0)) as made:
        yield made


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that children may write to, outside /tmp (which they have one of their own of)."""
    folder = Path(tempfile.mkdtemp(prefix="pisupervisor-shared-", dir="/var/tmp"))
    folder.chmod(0o777)
    yield folder
    subprocess.run(["rm", "-rf", "--", str(folder)], check=True)


def recovers(isolator: ProcessIsolator) -> None:
    """A child whose forged answer was taken may still sleep: the next call may fail, the one after it must not."""
    try:
        isolator.run_source("1", timeout=1.0)
    except IsolationError:
        pass
    still_works(isolator)


def still_works(isolator: ProcessIsolator) -> None:
    assert isolator.run_source("6 * 7", timeout=10.0).value == 42


# --- the zygote ----------------------------------------------------------------------------------------------------


def test_untrusted_import_paths_do_not_run_in_the_zygote(shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = shared / "org" / "python"
    package.mkdir(parents=True)
    (shared / "org" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "core.py").write_text("import os\nos.write(2, b'HOSTILE uid %d' % os.getuid())\nPyStringMap = dict\n")
    with ProcessIsolator.create(import_paths=[str(shared)]):
        time.sleep(0.7)  # it warms up when nobody asks anything of it
    assert "HOSTILE uid 0" not in capfd.readouterr().err


def test_a_planted_symlink_makes_nothing_on_the_host(shared: Path) -> None:
    victim, plain, folder = shared / "victim", shared / "plain", shared / "folder"
    victim.mkdir()
    folder.mkdir()
    folder.chmod(0o777)
    plain.write_text("data")
    with ProcessIsolator.create(filesystem=Filesystem(writable=[str(folder)])) as isolator:
        isolator.run_source(f"import os; os.symlink({str(victim)!r}, {str(folder / 'link')!r})")
    nested = Filesystem(read_only=[str(folder), (str(plain), str(folder / "link" / "made" / "by_root"))])
    try:
        ProcessIsolator.create(filesystem=nested).close()
    except (LaunchError, OptionsError):
        pass
    assert list(victim.iterdir()) == []


def test_read_only_below_writable_stays_read_only(shared: Path) -> None:
    secret = shared / "secret"
    secret.mkdir()
    secret.chmod(0o777)
    filesystem = Filesystem(read_only=[str(secret)], writable=[str(shared)])
    with ProcessIsolator.create(filesystem=filesystem, limits=limits()) as isolator:
        attack(isolator, f"open({str(secret / 'written')!r}, 'w').close()")
    assert list(secret.iterdir()) == []


def test_no_path_of_the_host_is_to_be_seen() -> None:
    """Where our own code lies, cloudpickle and an interpreter outside /usr."""
    import cloudpickle

    import pihost

    asked = "".join(f"open('/proc/self/{name}').read() + " for name in ("mountinfo", "mounts", "mountstats", "maps"))
    with ProcessIsolator.create(limits=limits()) as isolator:
        seen = isolator.run_source(f"{asked}open('/proc/self/cgroup').read()").value
        assert isolator.invoke(lambda: 42) == 42, "cloudpickle is there all the same"
    for module in (pihost, cloudpickle):
        assert os.path.dirname(os.path.dirname(os.path.abspath(module.__file__))) not in seen
    with box.isolator_without(IsolationOptions(limits=limits()), "mount table") as isolator:
        assert " /pis/pihost ro," in isolator.run_source("open('/proc/self/mountinfo').read()").value


def test_a_lock_in_a_frozen_folder_is_none_outside(shared: Path) -> None:
    """Nor can it be written, and a second wall hides where it lies; with read_only, the control, the lock is one outside."""
    import fcntl

    features.need("overlay")
    (shared / "data").write_text("words")
    code = "import fcntl; file = open('/given/data'); fcntl.flock(file, fcntl.LOCK_EX); kept = file; file.read()"
    frozen = IsolationOptions(filesystem=Filesystem(frozen=[(str(shared), "/given")]), limits=limits())
    with box.isolator_without(frozen, "mount table") as isolator:
        assert str(shared) not in isolator.run_source("open('/proc/self/mountinfo').read()").value
        assert isinstance(attack(isolator, "open('/given/new', 'w')"), OSError)
        assert isolator.run_source(code).value == "words"
        with open(shared / "data") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    read_only = IsolationOptions(filesystem=Filesystem(read_only=[(str(shared), "/given")]), limits=limits())
    with box.isolator_without(read_only, "mount table") as isolator:
        assert str(shared) in isolator.run_source("open('/proc/self/mountinfo').read()").value
        isolator.run_source(code)
        with open(shared / "data") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(("how", "answer"), [("read_only", 0), ("frozen", 111)])
def test_a_socket_in_a_folder_that_is_shown(shared: Path, how: str, answer: int) -> None:
    """SECURITY.md says so: read-only is no wall before a socket, nor is Landlock (of ABI 7)."""
    features.need("overlay")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared / "service"))
        listener.listen()
        (shared / "service").chmod(0o777)
        with ProcessIsolator.create(filesystem=Filesystem(**{how: [(str(shared), "/given")]})) as isolator:
            assert attack(isolator, "socket.socket(socket.AF_UNIX).connect_ex('/given/service')") == answer


def test_a_frozen_folder_below_scratch_and_what_no_layer_can_be(shared: Path) -> None:
    (shared / "data").write_text("words")
    with ProcessIsolator.create(filesystem=Filesystem(frozen=[(str(shared), "/tmp/given")])) as isolator:
        assert isolator.run_source("open('/tmp/given/data').read()").value == "words"
        assert str(shared) not in isolator.run_source("open('/proc/self/mountinfo').read()").value
    with pytest.raises(LaunchError) as caught:
        ProcessIsolator.create(filesystem=Filesystem(frozen=[("/proc/self/task", "/given")]))
    assert caught.value.step == "layer /proc/self/task at /given"
    assert "read_only" in str(caught.value.remedy)


def test_what_shows_our_own_code_cannot_be_written_nor_locked_for_others(isolator: ProcessIsolator) -> None:
    """A lock on a file of a layer is one on the overlay's inode, which children of this template share, and nobody else."""
    import fcntl

    import pihost

    for code in ("open('/pis/pihost/wire.py', 'a')", "import os; os.unlink('/pis/pihost/wire.py')"):
        assert isinstance(attack(isolator, code), OSError)
    isolator.run_source("import fcntl; file = open('/pis/pihost/wire.py'); fcntl.flock(file, fcntl.LOCK_EX)")
    with open(os.path.join(os.path.dirname(os.path.abspath(pihost.__file__)), "wire.py")) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_SCAN = """
import re
pattern, found = re.compile({pattern!r}), []  # which must not match itself
for line in open("/proc/self/maps"):
    span, rights = line.split()[:2]
    if "r" not in rights or "[v" in line: continue
    low, high = (int(x, 16) for x in span.split("-"))
    with open("/proc/self/mem", "rb") as memory:
        memory.seek(low)
        try: found += [line] if pattern.search(memory.read(high - low)) else []
        except OSError: pass
found
"""


def found_in_memory(isolator: ProcessIsolator, pattern: bytes) -> list[str]:
    """The mappings of a child in which that is."""
    found: list[str] = attack(isolator, _SCAN.format(pattern=pattern), 30.0)
    return found


def test_memory_holds_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zygote is exec'd with an environment and a plan of its own: nothing of the host's, not even where we lie."""
    import pihost

    monkeypatch.setenv("PISUPERVISOR_TEST_SECRET", "s3cr3t-" + "of-the-host")
    folder = os.path.dirname(os.path.dirname(os.path.abspath(pihost.__file__))).encode()
    with ProcessIsolator.create(limits=limits(memory="512M"), preload=["json"]) as isolator:
        assert found_in_memory(isolator, b"s3cr3t-of-the-hos[t]") == []
        if sys.version_info < (3, 13):  # which keeps the names that compiled files have of themselves (README says so)
            assert found_in_memory(isolator, re.escape(folder[:-1]) + b"[" + folder[-1:] + b"]/p") == []


def test_memory_holds_nothing_of_another_isolator(isolator: ProcessIsolator) -> None:
    """Not even of one with the same zygote, which runs no calls: neither what it was sent nor what it found."""
    secret = "s3cr3t-" + "of-a-tenant"
    with ProcessIsolator.create(limits=limits(), restart=RestartPolicy(backoff=0.0)) as other:
        assert zygote_of(other) == zygote_of(isolator)
        other.run_source(f"kept = [{secret!r}] * 1000; print(kept)")
        assert len(found_in_memory(other, b"s3cr3t-of-a-tenan[t]")) > 0, "the control"
        isolator.restart()
        assert found_in_memory(isolator, b"s3cr3t-of-a-tenan[t]") == []


def test_children_share_no_random_state() -> None:
    """numpy.random as well: it knows nothing of forks (NEP 19)."""
    numpy = find_spec("numpy")  # not imported: its threads would be in the way of tests that clone in the same process
    assert numpy is not None
    assert numpy.origin is not None
    packages = os.path.dirname(os.path.dirname(os.path.abspath(numpy.origin)))
    preload = ["random", "numpy.random", "ssl", "multiprocessing.process", "uuid", "secrets"]
    shared = {"limits": limits(), "preload": preload, "import_paths": [packages]}
    code = """
import os, random, secrets, ssl, tempfile, uuid, numpy.random, multiprocessing.process
[random.random(), numpy.random.random(), ssl.RAND_bytes(8), next(tempfile._get_candidate_names()), os.urandom(8), uuid.uuid1().hex,
 uuid.uuid4().hex, secrets.token_bytes(8), bytes(multiprocessing.process.current_process().authkey)]
"""
    with ProcessIsolator.create(**shared) as one, ProcessIsolator.create(**shared) as two:
        first, second = one.run_source(code).value, two.run_source(code).value
        assert zygote_of(one) == zygote_of(two)
    assert [a for a, b in zip(first, second, strict=True) if a == b] == []


_USED_EARLY = "import ssl, tempfile\nssl.RAND_bytes(8)\nnext(tempfile._get_candidate_names())\n"
_IN_A_CONTAINER = """
import sys
sys.path[:0] = {paths!r}
from helpers import zygote_of
from pisupervisor import IsolationOptions, ProcessIsolator
shared = IsolationOptions(preload=["early"], import_paths=[{folder!r}], degrade={degrade!r})
ProcessIsolator.create(shared).close()  # what starts other programs, if the filter is compiled for the first time
with open("/proc/sys/kernel/ns_last_pid", "w") as last: last.write("1")
with ProcessIsolator.create(shared) as one, ProcessIsolator.create(shared) as two:
    code = "import ssl, tempfile; [ssl.RAND_bytes(8), next(tempfile._get_candidate_names())]"
    print([zygote_of(one), one.run_source(code).value, two.run_source(code).value])
"""


def test_children_share_no_random_state_where_their_pid_is_the_zygotes(shared: Path) -> None:
    """OpenSSL draws anew when the pid is another. To an application that is PID 1 of a container the first zygote is 2."""
    (shared / "early.py").write_text(_USED_EARLY)
    top, degrade = Path(__file__).parents[2], ("memory", "swap", "cpus", "pids", "devices")
    source = _IN_A_CONTAINER.format(paths=[str(top), str(top / "tests")], folder=str(shared), degrade=degrade)
    inside = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", source]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    zygote, first, second = ast.literal_eval(done.stdout)
    assert zygote == 2, "the case that is tried"
    assert [one for one, two in zip(first, second, strict=True) if one == two] == []


def test_tenants_share_no_hash_seed_and_no_address() -> None:
    """Children of one zygote do (they are forks): whoever knows his own could aim at the others'."""
    code = "(hash('a'), id(Ellipsis), open('/proc/self/maps').read().split('[heap]')[0].splitlines()[-1].split('-')[0])"
    mine = ProcessIsolator.create(limits=limits(), tenant="me")
    with (
        mine,
        ProcessIsolator.create(limits=limits(), tenant="you") as yours,
        ProcessIsolator.create(tenant="me") as again,
    ):
        seen = [isolator.run_source(code).value for isolator in (mine, yours, again)]
    assert seen[0] == seen[2], "the control: the same tenant's"
    assert seen[0][0] != seen[1][0]
    assert seen[0][2] != seen[1][2]


# --- what an answer costs the host ---------------------------------------------------------------------------------


_MEASURED = """
import resource, sys, time
sys.path[:0] = {paths!r}
from hostile import attack, limits
from pisupervisor import ProcessIsolator, RemoteError
with ProcessIsolator.create(limits=limits(memory="512M")) as isolator:
    isolator.run_source("1")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    error = attack(isolator, {code!r}, 60.0)
    print(type(error).__name__, time.monotonic() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def cost(code: str) -> tuple[str, float, int]:
    """(what it ended in, seconds, MiB) of one hostile answer, in a host of its own."""
    top = Path(__file__).parents[2]
    source = _MEASURED.format(paths=[str(top), str(Path(__file__).parent)], code=code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=100, check=True)
    name, seconds, size = done.stdout.split()
    return name, float(seconds), int(size)


@pytest.mark.alone
def test_millions_of_empty_buffers_are_refused_at_once() -> None:
    name, seconds, size = cost("n = 7_900_000\nforge(RESULT, struct.pack('<II', 1, n) + bytes(8 * n) + b'1')")
    assert name == "ProtocolError"
    assert seconds < 3.0
    assert size < 400


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["RAISED", "REFUSED"])
def test_an_error_report_of_millions_of_lists_is_refused(kind: str) -> None:
    code = f"""
n = ident()
send(frame(PIECE, n, b'{{"kind":"compile","message":"x","a":[[]'))
part = frame(PIECE, n, b",[]" * 300000)
for _ in range(70): send(part)
send(frame({kind}, n, b"]}}"))
time.sleep(100)
"""
    name, seconds, size = cost(code)
    assert name == "ProtocolError"
    assert seconds < 3.0
    assert size < 400


@pytest.mark.alone
@pytest.mark.parametrize(
    "text",
    [
        """b"[" + b",".join([b'{"$":"datetime","v":["2024-01-01T00:00:00",0,"Europe/Berlin"]}'] * 330000) + b"]" """,
        """b"[" + b",".join([b'{"$":"array","v":["<f8",[0],""]}'] * 280000) + b"]" """,
        """b"[" + b",".join([b'{"$":"path","v":"a/b/c/d/e"}'] * 600000) + b"]" """,
        """b"[" + b'{"a":0},' * 950000 + b"0]" """,
        """b'"' + b'\\\\"' * 20000000 + b'"' """,
        """b"[" * 1000000""",
        """b"1" * 40000000""",
        """b'{"$":"set","v":[' + b",".join(b'{"$":"decimal","v":"1E+%d"}' % i for i in range(200000)) + b"]}" """,
        """b'{"$":"int","v":"' + b"f" * (1 << 20) + b'"}' """,
        """b'{"$":"array","v":["<f8",[0,4611686018427387903,4611686018427387903],""]}' """,
        """b'{"$":"array","v":["O",[1],"AAAAAAAAAAA="]}' """,
        """b'{"$":"datetime","v":["2024-01-01T00:00:00",0,"../../../../etc/passwd"]}' """,
    ],
    ids=["datetimes", "arrays", "paths", "dicts", "quotes", "nesting", "digits", "decimals", "hex", "shape", "objects", "zone"],
)  # fmt: skip
def test_the_dearest_answers_have_a_bound(isolator: ProcessIsolator, text: str) -> None:
    with bounded(8.0):
        attack(isolator, f"forge(RESULT, value({text.strip()}))", 20.0)
    recovers(isolator)


# --- forged frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "os.write(3, b'garbage' * 100); time.sleep(100)",
        "send(frame(READY, ident(), b'1')); time.sleep(100)",
        "send(frame(READY, 0, b'1')); time.sleep(100)",
        "send(frame(2, ident(), b'1')); time.sleep(100)",
        "send(frame(200, ident(), b'1')); time.sleep(100)",
        "send(frame(PICKLED, ident(), b'cos\\nsystem\\n(S\"true\"\\ntR.')); time.sleep(100)",
        "send(HEADER.pack(0x5149, 1, RESULT, ident(), 0)); time.sleep(100)",
        "send(HEADER.pack(0x5149, 1, RESULT, ident(), 0xFFFFFFFF)); time.sleep(100)",
        "send(HEADER.pack(0x5149, 2, RESULT, ident(), 1)); time.sleep(100)",
        "send(frame(RESULT, ident() + 1, value(b'1'))); time.sleep(100)",
        "send(frame(RESULT, ident(), b'1')); time.sleep(100)",
        "send(frame(RESULT, ident(), struct.pack('<II', 0xFFFFFFFF, 0xFFFFFFFF))); time.sleep(100)",
        "send(frame(RESULT, ident(), value(b'{\"$\":\"bytes\",\"v\":0}', b'x', b'y'))); time.sleep(100)",
        "send(frame(RAISED, ident(), b'[]')); time.sleep(100)",
        "send(frame(RAISED, ident(), b'{\"module\":\"os\",\"type\":[],\"message\":{}}')); time.sleep(100)",
        "send(frame(REFUSED, ident(), b'{\"kind\":\"eval\",\"message\":\"x\"}')); time.sleep(100)",
        "send(frame(PIECE, ident(), b'x' * 65536) * 1100); time.sleep(100)",
    ],
)  # fmt: skip
def test_a_forged_frame_is_a_protocol_error_and_ends_the_child(isolator: ProcessIsolator, code: str) -> None:
    before = isolator.pid
    with bounded(5.0):
        assert isinstance(attack(isolator, code), ProtocolError)
    still_works(isolator)
    assert isolator.pid != before


def test_an_answer_given_ahead_ends_the_child(isolator: ProcessIsolator) -> None:
    """Answered twice: the second answer is not taken for that of the next call (which has another number)."""
    attack(isolator, "send(frame(RESULT, ident(), value(b'1'))); 2")
    with pytest.raises(ProtocolError):
        isolator.run_source("6 * 7", timeout=5.0)
    still_works(isolator)


def test_a_reply_to_a_call_that_was_not_made_yet_is_not_believed(isolator: ProcessIsolator) -> None:
    code = """
own = ident()
if os.fork() == 0:
    os.setsid(); time.sleep(0.2)
    send(frame(RESULT, own + 1, value(b"1337")))
    os._exit(0)
1
"""
    isolator.invoke_method("json", "dumps", 1)
    attack(isolator, code)
    time.sleep(0.4)
    try:
        assert isolator.invoke_method("json", "dumps", 1, timeout=5.0) == "1"
    except ProtocolError:
        pass


def test_no_terminal_control_in_the_text_of_a_refusal(isolator: ProcessIsolator) -> None:
    code = """send(frame(REFUSED, ident(), b'{"kind":"not_found","message":"\\\\u001b[2J\\\\u001b]0;x\\\\u0007"}')); time.sleep(9)"""
    assert "\x1b" not in str(attack(isolator, code))


def test_no_terminal_control_in_the_text_of_an_exception(isolator: ProcessIsolator) -> None:
    assert "\x1b" not in str(attack(isolator, "raise ValueError('\\x1b[2J')"))


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("os.close(3); time.sleep(100)", 2.0),
        ("socket.socket(fileno=os.dup(3)).shutdown(2); time.sleep(100)", 2.0),
        ("if os.fork() == 0:\n    os.setsid()\n    while True: send(frame(RESULT, ident(), value(b'7')))\nos._exit(3)", 2.0),
        ("os.kill(os.getpid(), signal.SIGSTOP)", 3.0),
        ("for byte in frame(RESULT, ident(), value(b'1')):\n    os.write(3, bytes([byte])); time.sleep(1)", 3.0),
        ("part = frame(PIECE, ident(), b'x') * 3000\nwhile True: send(part)", 3.0),
        ("link = socket.socket(fileno=os.dup(3))\nfor _ in range(50): link.send(b'Z', socket.MSG_OOB)\ntime.sleep(100)", 3.0),
        ("link = socket.socket(fileno=os.dup(3))\nsocket.send_fds(link, [frame(RESULT, ident(), value(b'7'))], [0, 1, 2])\n"
         "time.sleep(100)", 3.0),
        ("for number in range(1, 65):\n    try: os.kill(1, number)\n    except OSError: pass\nos.kill(1, 9); time.sleep(100)", 3.0),
    ],
    ids=["close", "shutdown", "orphan", "stopped", "drip", "pieces", "oob", "fds", "kill init"],
)  # fmt: skip
def test_the_host_waits_no_longer_than_it_said(isolator: ProcessIsolator, code: str, most: float) -> None:
    with bounded(most):
        attack(isolator, code, timeout=1.5)
    recovers(isolator)


def test_descriptors_that_a_child_sends_are_dropped(isolator: ProcessIsolator) -> None:
    still_works(isolator)
    before = len(os.listdir("/proc/self/fd"))
    attack(
        isolator,
        "link = socket.socket(fileno=os.dup(3))\nfor _ in range(20): socket.send_fds(link, [b'x'], [0] * 50)\ntime.sleep(.2)",
    )
    still_works(isolator)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# --- output --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writers", [0, 1, 8])
def test_an_output_flood_does_not_move_the_deadline(writers: int) -> None:
    code = f"""
for fd in (1, 2): fcntl.fcntl(fd, 1031, 1 << 20)
for number in range({writers}):
    if os.fork() == 0:
        while True: os.write(1 + number % 2, b"x" * 65536)
while True: os.write(1, b"x" * 65536)
"""
    no_filter = Security(seccomp=None)  # which would deny the larger pipes
    with ProcessIsolator.create(limits=limits(cpus=None), security=no_filter) as isolator, bounded(5.0):
        assert isinstance(attack(isolator, code, 1.0), CallTimeout)


def test_packets_of_one_byte_do_not_hold_the_reader(isolator: ProcessIsolator) -> None:
    with bounded(4.0):
        attack(isolator, "fcntl.fcntl(1, 4, os.O_DIRECT)\nwhile True: os.write(1, b'x')", 1.0)


def test_a_writer_left_behind_reaches_no_later_call(isolator: ProcessIsolator) -> None:
    attack(
        isolator,
        "if os.fork() == 0:\n    while True:\n        try: os.write(1, b'STALE')\n        except OSError: os._exit(0)\n1",
    )
    assert "STALE" not in isolator.run_source("print('fresh')").stdout


# --- using up ------------------------------------------------------------------------------------------------------


def test_throttled_processes_die_soon() -> None:
    code = """
for _ in range(20):
    if os.fork() == 0:
        kept = []
        while True: kept.append(bytearray(1 << 16))
time.sleep(30)
"""
    with ProcessIsolator.create(limits=limits(cpus=0.05, memory="32M")) as isolator, bounded(5.0):
        attack(isolator, code, 3.0)


def test_used_up_pids_stop_neither_the_end_nor_the_next_child() -> None:
    code = """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try: os.fork()
    except OSError: pass
"""
    with ProcessIsolator.create(limits=limits(pids=100)) as isolator:
        with bounded(4.0):
            assert isinstance(attack(isolator, code, 1.0), CallTimeout)
        still_works(isolator)


def test_a_chain_of_forks_ends(isolator: ProcessIsolator) -> None:
    code = "while True:\n    try:\n        if os.fork() and os.getpid() != 2: os._exit(0)\n    except OSError: pass"
    with bounded(4.0):
        attack(isolator, code, 1.0)
    still_works(isolator)


def test_memory_used_up_by_many_ends() -> None:
    code = "for _ in range(20):\n    if os.fork() == 0:\n        kept = []\n        while True: kept.append(bytearray(1 << 16))\ntime.sleep(5)"
    with ProcessIsolator.create(limits=limits(memory="48M", pids=30)) as isolator:
        with bounded(8.0):
            attack(isolator, code, 1.0)
        still_works(isolator)


def test_one_child_cannot_take_the_machines_aio_contexts(isolator: ProcessIsolator) -> None:
    code = """
contexts = []
for _ in range(40):
    contexts.append(ctypes.c_ulong(0))
    if system_call("io_setup", 1000, ctypes.byref(contexts[-1])) < 0: break
"""
    before = int(Path("/proc/sys/fs/aio-nr").read_text())
    attack(isolator, code)
    assert int(Path("/proc/sys/fs/aio-nr").read_text()) - before < 1000


@pytest.mark.parametrize(("profile", "left"), [("default", True), ("permissive", False)])
def test_one_child_cannot_take_what_the_hosts_root_may_watch(profile: str, left: bool) -> None:
    """What is used in a user namespace counts to whoever made it, too: with inotify let through, all services of root are
    without it, and so are all other children.
    """
    libc, code = ctypes.CDLL(None, use_errno=True), "while (fd := libc.inotify_init()) >= 0: pass\nfd"
    most = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    given = IsolationOptions(limits=limits(open_files=most + 50), security=Security(seccomp=profile))
    with ProcessIsolator.create(given) as isolator:
        attack(isolator, code)
        fd = libc.inotify_init()
    if fd >= 0:
        os.close(fd)
    assert (fd >= 0) == left


@pytest.mark.parametrize("name", [b"\xff\xfe\xff", b") R 1 2 3", b"a\nVmHWM:\t1"])
def test_names_of_processes_that_are_no_text(isolator: ProcessIsolator, name: bytes) -> None:
    """They stand in /proc/PID/stat and status as they were given, where the host reads what a child has used."""
    assert attack(isolator, f"libc.prctl(15, {name!r}, 0, 0, 0); kept = bytearray(1 << 24); 5") == 5
    used, pid = isolator.resource_usage(), isolator.pid
    assert pid is not None
    assert used.pids == 2
    read = usage_from_proc(pid)
    assert read.peak_memory is not None
    assert read.peak_memory > 1 << 24
    assert has_signal_pending(pid) is False


@pytest.mark.parametrize(("profile", "least"), [("default", 2000), ("strict", 0)])
def test_locks_on_parts_of_files_that_nobody_counts(profile: str, least: int) -> None:
    """SECURITY.md says so: sqlite needs them, their memory (192 bytes each) counts to no group, and "strict" lets none pass."""
    code = """
file, taken = open("/tmp/locked", "wb"), 0
try:
    while taken < 2000:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK if taken % 2 else fcntl.F_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, 0, taken * 2, 1, 0))
        taken += 1
except PermissionError: pass
taken
"""
    with ProcessIsolator.create(limits=limits(), security=Security(seccomp=profile)) as isolator:
        assert attack(isolator, code) == least


def test_used_up_descriptors_spoil_no_reply(isolator: ProcessIsolator) -> None:
    code = "kept = []\ntry:\n    while True: kept.append(os.open('/dev/null', 0))\nexcept OSError: pass\n5"
    assert attack(isolator, code) == 5


def test_exit_zero_in_a_call_does_not_close_the_isolator(isolator: ProcessIsolator) -> None:
    assert isinstance(attack(isolator, "os._exit(0)"), ChildTerminated)
    still_works(isolator)


# --- lies ----------------------------------------------------------------------------------------------------------


def test_a_poisoned_child_is_alone_with_it() -> None:
    poison = """
import builtins, json, pickle
import pihost.inside.encode as encode, pihost.inside.serve as serve
encode.encode = lambda value, most: (b'"owned"', [])
serve.Worker.run_source = lambda *ignored: "owned"
builtins.len = lambda thing: 0
json.dumps = pickle.dumps = None
sys.modules.clear()
"""
    with ProcessIsolator.create(limits=limits()) as bad, ProcessIsolator.create(limits=limits()) as good:
        attack(bad, poison, 3.0)
        still_works(good)
        with ProcessIsolator.create(limits=limits()) as fresh:
            still_works(fresh)


@pytest.mark.parametrize(
    "code",
    [
        "class E(Exception):\n    def __str__(self): raise SystemExit(3)\n    __class__ = property(lambda self: int)\nraise E()",
        "class E(Exception):\n    def __reduce__(self): return (eval, ('1/0',))\nraise E()",
        "class M(type):\n    def __getattribute__(c, n): raise KeyboardInterrupt\nclass E(Exception, metaclass=M): pass\nraise E",
        "class E(BaseException):\n    __traceback__ = 5\n    __cause__ = property(lambda self: self)\nraise E()",
        "class S(str):\n    def __len__(self): return 10**9\nclass E(Exception):\n    def __str__(self): return S('x')\nraise E()",
        "raise SystemExit('x' * 10**8)",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "raise StopIteration(5)",
        "raise ExceptionGroup('g', [ExceptionGroup('h', [ValueError(1)])] * 100)",
        "import pisupervisor",
        "sys.exit(0)",
        "x = []\nx.append(x)\nx",
        "x = 0\nfor _ in range(100000): x = [x]\nx",
        "{i: i for i in range(10**6)}",
        "'x' * (70 << 20)",
        "class D(dict):\n    def items(self): raise MemoryError\nD(a=object())",
        "lambda: 1",
    ],
)  # fmt: skip
def test_evil_exceptions_and_results_become_errors_of_ours(isolator: ProcessIsolator, code: str) -> None:
    with bounded(5.0):
        assert isinstance(attack(isolator, code), IsolationError)
    still_works(isolator)


@pytest.mark.parametrize(
    ("code", "plain"),
    [
        ("class I(int):\n    def __repr__(self): return ']'\n    __class__ = str\nI(5)", 5),
        ("class D(dict):\n    def items(self): raise 1\n    def __iter__(self): return iter(range(10**9))\nD(a=1)", {"a": 1}),
        ("class B(bytes):\n    def __len__(self): return 1 << 60\nB(b'abc')", b"abc"),
        ("class S(str):\n    def encode(self, *a): return 7\n    def __str__(self): return 'lie'\nS('true')", "true"),
        ("class F(float):\n    def __repr__(self): return '[]'\nF(1.5)", 1.5),
        ("class L(list):\n    def __iter__(self): return iter([1] * 10**9)\nL([1])", [1]),
    ],
)  # fmt: skip
def test_subclasses_that_lie_become_what_they_are_built_on(isolator: ProcessIsolator, code: str, plain: object) -> None:
    with bounded(5.0):
        value = attack(isolator, code)
    assert type(value) is type(plain)
    assert value == plain


# --- ways out ------------------------------------------------------------------------------------------------------


def test_the_links_other_end_is_of_no_use(isolator: ProcessIsolator) -> None:
    """SO_PEERPIDFD (Linux 6.5) gives the child a pidfd of the host application: it must open nothing."""
    code = """
link, got = socket.socket(fileno=os.dup(3)), []
try: fd = struct.unpack("i", link.getsockopt(1, 77, 4))[0]
except OSError: fd = -1
if fd >= 0:
    tries = [lambda: signal.pidfd_send_signal(fd, 0), lambda: os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)]
    tries += [lambda n=n: fcntl.ioctl(fd, 0xFF00 | n, 0) for n in range(1, 11)]
    for number, attempt in enumerate(tries):
        try: attempt()
        except OSError: continue
        got.append(number)
    if system_call("pidfd_getfd", fd, 0, 0) >= 0: got.append("pidfd_getfd")
    if system_call("setns", fd, 0x20000) >= 0: got.append("setns")
    got += [line for line in open(f"/proc/self/fdinfo/{fd}") if line.startswith("Pid:") and line.split()[1] != "0"]
got
"""
    assert attack(isolator, code) == []


def test_namespace_descriptors_lead_to_no_other_namespace(isolator: ProcessIsolator) -> None:
    """NS_GET_PARENT, and NS_MNT_GET_NEXT and PREV (Linux 6.12), which walk over the mount namespaces of the host."""
    code = """
got = []
for name in os.listdir("/proc/self/ns"):
    fd = os.open("/proc/self/ns/" + name, os.O_RDONLY)
    own_user = os.stat("/proc/self/ns/user").st_ino
    for request in (0xB702, 0x8010B70B, 0x8010B70C):
        try: got.append((name, hex(request), fcntl.ioctl(fd, request, bytearray(16) if request > 0xFFFF else 0)))
        except OSError: pass
    try:
        owner = fcntl.ioctl(fd, 0xB701, 0)
        if os.fstat(owner).st_ino != own_user: got.append((name, "owner"))
    except OSError: pass
got
"""
    assert attack(isolator, code) == []


HARMLESS_HERE = ("creat", "fchmodat2", "io_setup", "seccomp")  # other tests try these


@pytest.mark.arch
def test_no_system_call_of_the_kind_that_escapes_use(isolator: ProcessIsolator) -> None:
    """EPERM or ENOSYS for wild arguments too: the kernel's own EINVAL or EFAULT would mean that it was reached."""
    names = [name for name in SYSTEM_CALLS if name not in HARMLESS_HERE]
    code = f"{{name: system_call(name, -1, -1, -1, -1, -1, -1) for name in {names!r}}}"
    assert {name: got for name, got in attack(isolator, code).items() if got not in (-1, -38)} == {}


def test_no_seccomp_listener_by_any_flags(isolator: ProcessIsolator) -> None:
    code = """
class Program(ctypes.Structure): _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
program = Program(1, struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
[system_call("seccomp", 1, flags, ctypes.byref(program)) for flags in (8, 9, 8 | 16, 8 | 4, 0x28, 8 | (1 << 40))]
"""
    assert all(result < 0 for result in attack(isolator, code))


def test_the_i386_door_is_shut(isolator: ProcessIsolator) -> None:
    code = r"""
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
pid = os.fork()
if pid == 0:
    os._exit(1 if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0 else 2)
os.waitpid(pid, 0)[1]
"""
    if os.uname().machine != "x86_64":
        pytest.skip("absent here: int 0x80 is x86's")
    assert attack(isolator, code) & 0x7F == 31  # SIGSYS


@pytest.mark.arch
def test_the_32_bit_door_of_aarch64_is_shut(isolator: ProcessIsolator, tmp_path: Path) -> None:
    """A program of 32-bit ARM's calls by other numbers: outside it runs, where the CPU has that mode."""
    features.need("arm32")
    code = f"""
fd = os.memfd_create("program", 0)
os.write(fd, {features.arm32_program(tmp_path).read_bytes()!r})
pid = os.fork()
if pid == 0:
    os.execve(fd, ["program"], {{}})
os.waitpid(pid, 0)[1]
"""
    assert attack(isolator, code) & 0x7F == 31  # SIGSYS


@pytest.mark.parametrize("network", ["none", "loopback", "host"])
def test_two_children_share_no_abstract_socket(network: str) -> None:
    """parity: 92"""
    options = {"network": network, "limits": limits()}
    with ProcessIsolator.create(**options) as one, ProcessIsolator.create(**options) as two:  # type: ignore[arg-type]
        one.run_source("import socket\ns = socket.socket(socket.AF_UNIX); s.bind('\\0pis_pair'); s.listen()")
        error = attack(two, "socket.socket(socket.AF_UNIX).connect('\\0pis_pair')")
    assert isinstance(error, (ConnectionRefusedError, PermissionError))


def test_nothing_is_left_in_a_network_that_is_used_again(isolator: ProcessIsolator) -> None:
    """Network namespaces of dead children are given to others: sockets that only a cycle of messages holds are gone with
    them. (Landlock forbids TCP ports.)
    """
    leave = """
import array
left, (one, two), port = socket.socket(socket.AF_UNIX), socket.socketpair(), socket.socket(type=socket.SOCK_DGRAM)
left.bind("\\0pis_left"); left.listen(); port.bind(("0.0.0.0", 4711))
one.sendmsg([b"x"], [(1, 1, array.array("i", [each.fileno() for each in (one, two, left, port)]))])
for each in (one, two, left, port): each.close()
(os.stat("/proc/self/ns/net").st_ino, socket.socket(socket.AF_UNIX).connect_ex("\\0pis_left"))
"""
    look = """
port, other = socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
port.bind(("0.0.0.0", 4711))
(os.stat("/proc/self/ns/net").st_ino, other.connect_ex("\\0pis_left"), "pis_left" in open("/proc/self/net/unix").read())
"""
    left, seen = set(), []
    for _ in range(4):
        network, connected = attack(isolator, leave)
        assert connected == 0, "the control: held by messages alone, it listens as long as its child lives"
        left.add(network)
        isolator.restart()
        seen.append(attack(isolator, look))
    assert [found[1:] for found in seen] == [(111, False)] * 4  # ECONNREFUSED
    assert left & {found[0] for found in seen}, "none was used again: nothing was tried"


def test_the_hosts_domain_is_not_told() -> None:
    """A new UTS namespace is a copy: of the name that is set in it, and of NIS's domain, which uname(2) tells as well."""
    source = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
from pisupervisor import ProcessIsolator
uname = "import ctypes; told = ctypes.create_string_buffer(390); ctypes.CDLL(None).uname(told); told.raw"
with ProcessIsolator.create(degrade=("memory", "swap", "cpus", "pids", "devices")) as isolator:
    print(b"of.the.host" in isolator.run_source(uname).value, b"(none)" in isolator.run_source(uname).value)
"""
    named = 'echo of.the.host > /proc/sys/kernel/domainname && exec "$@"'
    inside = ["unshare", "--uts", "sh", "-c", named, "sh", sys.executable, "-c", source]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "False True\n", done.stderr


_SENT_IN_VAIN = """
for family, address in ((2, ("10.1.2.3", 5)), (10, ("fd00::1", 5))):
    plain = socket.socket(family, 2)
    for _ in range(99):
        try: plain.sendto(b"x", address)
        except OSError: pass
"""
_LABELS = """
kept = socket.socket(10, 2)
for number in range(1, 20):
    said = b"left for another" + struct.pack(">I", number) + struct.pack("BBHHHI", 0, 255, 1, 60, 60, 0)
    libc.setsockopt(kept.fileno(), 41, 32, said, len(said))
"""


@pytest.mark.parametrize("leave", ["", _SENT_IN_VAIN, _LABELS], ids=["nothing", "counters", "labels"])
def test_a_network_that_tells_of_its_last_child_is_not_used_again(isolator: ProcessIsolator, leave: str) -> None:
    look = """
def told(name):
    try: return open(f"/proc/self/net/{name}").read()
    except OSError: return ""
[os.stat("/proc/self/ns/net").st_ino, *(told(name) for name in ("snmp", "snmp6", "netstat", "rt6_stats", "ip6_flowlabel"))]
"""
    seen, first, again = set(), attack(isolator, look), 0
    with contextlib.ExitStack() as held:
        for _ in range(4):
            held.callback(
                os.close, os.open(f"/proc/{isolator.pid}/ns/net", os.O_RDONLY)
            )  # else its number is given anew
            network, *told = attack(isolator, look)
            assert told == first[1:]
            again += network in seen
            seen.add(network)
            attack(isolator, leave)
            assert attack(isolator, look)[1:] != told or not leave, "the control: here it tells"
            isolator.restart()
    assert (again > 0) == (not leave)


@pytest.mark.parametrize("limit", ["CPU", "NOFILE", "AS", "FSIZE", "STACK"])
def test_pid_1_without_limits_ends_in_time(isolator: ProcessIsolator, limit: str) -> None:
    """The payload may change those of PID 1, which has its id, and make it the last of all: that harms itself alone."""
    code = f"""
import resource
os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)); os.setpriority(os.PRIO_PROCESS, 1, 19)
resource.prlimit(1, resource.RLIMIT_{limit}, (0, 0))
os._exit(7)
"""
    with bounded(5.0):
        assert isinstance(attack(isolator, code), ChildTerminated)
    still_works(isolator)


def test_the_hosts_network_gives_no_raw_access() -> None:
    code = """
got = []
for family, kind in ((2, 3), (10, 3), (17, 3), (16, 3), (40, 1)):
    try: got.append((family, socket.socket(family, kind)))
    except OSError: pass
got
"""
    with ProcessIsolator.create(network="host", limits=limits()) as isolator:
        assert attack(isolator, code) == []


def test_two_children_see_nothing_of_each_other(isolator: ProcessIsolator) -> None:
    with ProcessIsolator.create(limits=limits()) as other:
        other.run_source("open('/tmp/mine', 'w').write('x'); open('/dev/shm/mine', 'w').write('x')")
        other.run_source("import ctypes; ctypes.CDLL(None).shmget(4711, 4096, 0o1666)")
        code = "[os.listdir('/tmp'), os.listdir('/dev/shm'), libc.shmget(4711, 4096, 0), [p for p in os.listdir('/proc') if p.isdigit()]]"
        assert attack(isolator, code) == [[], [], -1, ["2"]]


def test_files_written_through_a_writable_bind_carry_no_privilege(shared: Path) -> None:
    code = f"""
os.chdir({str(shared)!r})
def attempt(act):
    try: act()
    except OSError: pass
for number, bits in enumerate((0o4755, 0o2755, 0o6777)):
    attempt(lambda: os.close(os.open(f"a{{number}}", os.O_CREAT | os.O_WRONLY, bits)))
    attempt(lambda: os.chmod(f"b{{number}}", bits) if not open(f"b{{number}}", "w").close() else None)
    attempt(lambda: os.mknod(f"c{{number}}", 0o100000 | bits))
    attempt(lambda: os.mkdir(f"d{{number}}", bits))
    system_call("creat", f"e{{number}}".encode(), bits)
    system_call("fchmodat2", -100, f"b{{number}}".encode(), bits, 0)
attempt(lambda: os.mknod("dev", 0o60666, os.makedev(254, 0)))
attempt(lambda: os.setxattr("b0", "security.capability", struct.pack("<5I", 0x02000001, 0xFFFFFFFF, 0, 0, 0)))
"""
    with ProcessIsolator.create(filesystem=Filesystem(writable=[str(shared)]), limits=limits()) as isolator:
        attack(isolator, code)
    made = [path.lstat() for path in shared.iterdir()]
    assert made
    assert [oct(found.st_mode) for found in made if found.st_mode & 0o6000] == []
    assert {found.st_uid for found in made if found.st_uid < 0x7000_0000} == set()
    assert not any(os.listxattr(path) for path in shared.iterdir())


def test_a_bad_answer_beside_a_good_one_is_no_defect_of_ours(
    isolator: ProcessIsolator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer is understood within its turn: no second thread can be in the middle of a call when the child is killed."""
    from pisupervisor.link.connection import Connection

    answered, decoded = threading.Event(), threading.Event()
    ask, value, strange = Connection.ask, isolator._session.value, []

    def slow_ask(self: Connection, *arguments: Any) -> bytes | None:
        answer = ask(self, *arguments)
        if threading.current_thread().name == "good":
            answered.set()
            decoded.wait(0.5)
        return answer

    def slow_value(*arguments: object) -> object:
        if threading.current_thread().name == "bad":
            answered.wait(0.5)
        try:
            return value(*arguments)  # type: ignore[arg-type]
        finally:
            decoded.set()

    monkeypatch.setattr(Connection, "ask", slow_ask)
    monkeypatch.setattr(isolator._session, "value", slow_value)
    once = """
import pihost.inside.serve as serve
honest = serve.encode.encode
def bad(value, most):
    serve.encode.encode = honest
    return b"[[[[", []
serve.encode.encode = bad
1
"""

    def good() -> None:
        time.sleep(0.2)
        try:
            isolator.invoke_method("json", "dumps", 1, timeout=5.0)
        except IsolationError:
            pass
        except Exception as error:
            strange.append(error)

    threads = [
        threading.Thread(target=attack, args=(isolator, once), name="bad"),
        threading.Thread(target=good, name="good"),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15.0)
    assert strange == []


def test_threads_at_once_and_hostile_answers_make_no_defect_of_ours() -> None:
    """Errors of ours only, whatever the order in which threads see a bad answer and the end of their child."""
    strange: list[BaseException] = []
    code = PRELUDE + "body = value(b'[' * 100000)\nsend(frame(RESULT, ident(), body)); time.sleep(.01); 1"
    policy = RestartPolicy(max_restarts=100000, backoff=0.0, max_backoff=0.0)
    with ProcessIsolator.create(limits=limits(), restart=policy) as isolator:
        until = time.monotonic() + 3.0

        def work(hostile: bool) -> None:
            while time.monotonic() < until:
                try:
                    if hostile:
                        isolator.run_source(code, timeout=2.0)
                    else:
                        isolator.invoke_method("json", "dumps", 1, timeout=2.0)
                except IsolationError:
                    pass
                except BaseException as error:
                    strange.append(error)

        threads = [threading.Thread(target=work, args=(number == 0,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
            assert not thread.is_alive()
    assert strange == []


LINK = "import fcntl, os, socket, struct\nlink = socket.socket(fileno=os.dup(3))\n"


def test_the_link_is_of_the_childs_own_network(isolator: ProcessIsolator) -> None:
    """A UNIX socket stays in the network namespace that it was made in, with its abstract names and its interfaces."""
    code = (
        LINK
        + "def name(n):\n try: return fcntl.ioctl(link, 0x8910, struct.pack('16si20x', b'', n))[:16].rstrip(b'\\0')\n"
    )
    code += " except OSError: return b''\n[name(n) for n in range(1, 9) if name(n)]"
    assert isolator.run_source(code).value == [b"lo"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0pis_link_name")
        listener.listen()
        asked = isolator.run_source(LINK + "link.connect_ex('\\0pis_link_name')").value
        assert asked == isolator.run_source(LINK + "link.connect_ex('\\0pis_no_such_name')").value
        assert isolator.run_source(LINK + "link.bind('\\0pis_link_name')").value is None, "a name of its own"
