"""Whatever an application is: it keeps what is its own, and no child inherits what would be a privilege."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import DEGRADE

pytestmark = [pytest.mark.linux, pytest.mark.root, pytest.mark.matrix]

TOP = Path(__file__).parent.parent
CALL = 'isolator.invoke_method("json", "dumps", [1])'


def run(before: str, after: str = "") -> str:
    """What an application prints that has done ``before``, made an isolator, called, and done ``after``."""
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(TOP)!r})  # also where it is not installed, and the working directory is another
{textwrap.dedent(before)}
from pisupervisor import ProcessIsolator
with ProcessIsolator.create(degrade={DEGRADE}) as isolator:
    assert {CALL} == "[1]"
{textwrap.indent(textwrap.dedent(after), "    ")}
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
    assert done.stdout.endswith("still here\n")
    return done.stdout.removesuffix("still here\n")


def test_a_dead_child_is_no_sigpipe():
    """An application that ends with its pipeline (SIGPIPE as it was born) does not end with a child, when that dies unseen."""
    run(
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
        f"""
        from pisupervisor import ChildTerminated
        connection = isolator._keeper.connection
        os.kill(isolator.pid, signal.SIGSTOP)   # so that no thread of ours buries it before we write
        connection.link.shutdown(2)
        try:
            {CALL}
        except ChildTerminated:
            pass
        for pause in (0, 0.001, 0.01, 0.1):
            if isolator.pid:
                os.kill(isolator.pid, signal.SIGKILL)
            time.sleep(pause)
            try:
                {CALL}
            except ChildTerminated:
                pass
        """,
    )


def test_a_child_has_random_addresses_where_the_application_has_none():
    """``setarch -R``, or a debugger's doing: a personality is inherited by all children, and READ_IMPLIES_EXEC is one too."""
    told = run(
        """
        import ctypes
        ctypes.CDLL(None).personality(0x0440000)  # ADDR_NO_RANDOMIZE | READ_IMPLIES_EXEC, which exec keeps
        """,
        """
        print(isolator.run_source("open('/proc/self/personality').read()").value.strip())
        """,
    )
    assert told == "00000000\n"


def test_a_childs_memory_is_merged_with_nobodys():
    """``MemoryKSM=yes`` in a unit is inherited by all that it starts. -1: Linux before 6.4 has no such thing."""
    told = run(
        """
        import ctypes
        prctl = ctypes.CDLL(None).prctl
        ours = prctl(67, 1, 0, 0, 0), prctl(68, 0, 0, 0, 0)
        """,
        """
        look = "import ctypes; ctypes.CDLL(None).prctl(68, 0, 0, 0, 0)"
        print(ours, isolator.run_source(look.replace("; ", "\\n")).value)
        """,
    )
    assert told in ("(0, 1) 0\n", "(-1, -1) -1\n")


def test_a_dead_zygote_is_no_sigpipe():
    run(
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
        f"""
        from pathlib import Path
        zygote = int(Path(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read_text().split()[0])
        os.kill(zygote, signal.SIGKILL)
        time.sleep(0.1)
        assert {CALL} == "[1]"
        """,
    )


@pytest.mark.parametrize("mask", ["0o777", "0"])
def test_the_mask_for_new_files_is_the_applications_own(mask: str):
    """0o777 would deny a child the folders of its own root."""
    assert run(f"os.umask({mask})", f"print(os.umask({mask}))") == f"{int(mask, 8)}\n"


FACTS = """
from pathlib import Path
import psutil
adjusted = int(Path(f"/proc/{isolator.pid}/oom_score_adj").read_text())
print(os.sched_getscheduler(isolator.pid), os.getpriority(os.PRIO_PROCESS, isolator.pid),
      int(psutil.Process(isolator.pid).ionice()[0]), adjusted)
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        pytest.param("", "0 0 0 0", id="nothing"),
        pytest.param("os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))", "0 0 0 0", id="real-time"),
        pytest.param("os.nice(-5)", "0 0 0 0", id="before others"),
        pytest.param("import psutil; psutil.Process().ionice(psutil.IOPRIO_CLASS_RT, 0)", "0 0 0 0", id="disk"),
        pytest.param(
            "from pathlib import Path; Path('/proc/self/oom_score_adj').write_text('-1000')",
            "0 0 0 0",
            id="never killed",
        ),
        pytest.param("os.nice(7)", "0 7 0 0", id="behind others"),
        pytest.param(
            "from pathlib import Path; Path('/proc/self/oom_score_adj').write_text('500')",
            "0 0 0 500",
            id="killed first",
        ),
    ],
)
def test_a_child_goes_before_nobody(before: str, expected: str):
    """Else a child of a real-time application could stop the machine, and at -1000 the kernel kills nobody for memory."""
    allowed = subprocess.run(
        [sys.executable, "-c", f"import os\n{before}"], capture_output=True, text=True, check=False
    )
    if allowed.returncode:
        pytest.skip(f"ahead: this user may not: {allowed.stderr.splitlines()[-1]}")
    assert run(before, FACTS) == f"{expected}\n"


def test_signals_blocked_or_ignored_stay_the_applications():
    """A child starts with none of either: it could not be interrupted."""
    shown = run(
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGRTMIN, signal.SIG_IGN)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        """,
        """
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
        fields = dict(line.split(":\\t") for line in open(f"/proc/{isolator.pid}/status").read().splitlines())
        print(fields["SigBlk"], fields["SigIgn"])
        """,
    )
    blocked, ignored = shown.split()
    python = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    libc = 0b11 << 31  # its own two, which posix_spawn of glibc has ignored
    assert (int(blocked, 16), int(ignored, 16) & ~libc) == (0, python)


def test_an_application_that_reaps_everything():
    """A thread that waits for any child takes away the statuses of ours: reasons are told all the same."""
    run(
        """
        import threading
        over = threading.Event()
        def reap():
            while not over.wait(0.0005):
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    pass
        threading.Thread(target=reap, daemon=True).start()
        """,
        f"""
        from pisupervisor import ChildTerminated
        try:
            isolator.invoke_method("os", "_exit", 5)
        except ChildTerminated as error:
            assert error.exit_info.exit_code == 5, error.exit_info
        assert {CALL} == "[1]"
        over.set()
        """,
    )


@pytest.mark.parametrize("before", ["os.close(2)", "os.close(2); os.open('/dev/null', os.O_RDWR | os.O_CLOEXEC)"])
def test_a_daemon_without_stderr(before: str):
    """Its zygote's first descriptor was number 2 then, and no child had a stderr."""
    run(
        before,
        """
        from pisupervisor import ChildTerminated
        assert isolator.invoke(lambda: sys.stderr.fileno()) == 2
        assert isolator.invoke(lambda: [os.fstat(fd) and fd for fd in range(3)]) == [0, 1, 2]
        try:
            isolator.invoke(lambda: os.write(2, b"last words") and os._exit(3))
        except ChildTerminated as error:
            assert error.exit_info.stderr_tail == "last words"
        """,
    )


def test_a_working_directory_that_is_gone():
    run("""
        import tempfile
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        os.rmdir(folder)
    """)


@pytest.mark.parametrize("name", ["M\udcfcller", "a\rb", "a\x85b", "a\u3000- proc"], ids=ascii)
def test_something_is_mounted_at_a_place_of_any_name(tmp_path: Path, name: str):
    """As a volume with an old label is. What is open on it can be passed, for it is a file system of files."""
    run(
        f"""
        import ctypes
        libc, place = ctypes.CDLL(None), os.fsencode({str(tmp_path / name)!r})
        os.mkdir(place)
        assert libc.unshare(0x20000) == 0
        assert libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0
        assert libc.mount(b"tmpfs", place, b"tmpfs", 0, None) == 0
        with open(place + b"/file", "w") as file:
            file.write("hello")
        """,
        """
        with open(place + b"/file") as file:
            assert isolator.invoke(lambda file: file.read(), file) == "hello"
        """,
    )
