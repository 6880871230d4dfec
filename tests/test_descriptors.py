"""Open files, pipes and sockets as arguments: which arrive as such in the child, and which are refused with the reason."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import io
import lzma
import multiprocessing
import os
import pty
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import linux, nothing_left, open_fds, take_descriptors

from pisupervisor import Descriptor, Limits, OptionsError, ProcessIsolator, SerializationError
from pisupervisor.link.descriptors import check

# --- which may pass, without a child ---------------------------------------------------------------------------------


def memory(seals: int = 0, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("x", flags)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only_memory() -> int:
    fd = memory()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def listening() -> int:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0pisupervisor-test-{os.getpid()}")
    sock.listen()
    return sock.detach()


GOOD: dict[str, Callable[[], int]] = {
    "file": lambda: os.open(__file__, os.O_RDONLY),
    "temporary file": lambda: os.open("/tmp", os.O_RDWR | os.O_TMPFILE),
    "shared memory file": lambda: os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE),
    "pipe": lambda: _one(*os.pipe()),
    "stream pair": lambda: _one(*(end.detach() for end in socket.socketpair())),
    "seqpacket pair": lambda: _one(*(end.detach() for end in socket.socketpair(type=socket.SOCK_SEQPACKET))),
    "listening UNIX socket": listening,
    "sealed memory": lambda: memory(fcntl.F_SEAL_SHRINK),
}
OPEN: list[int] = []  # other ends, kept open for the time of a test


def _one(taken: int, other: int) -> int:
    OPEN.append(other)
    return taken


@pytest.fixture(autouse=True)
def _close_other_ends() -> Iterator[None]:
    yield
    while OPEN:
        os.close(OPEN.pop())


@pytest.mark.parametrize("name", GOOD)
def test_what_may_pass(name: str) -> None:
    fd = GOOD[name]()
    try:
        check(fd, networked=False)
    finally:
        os.close(fd)


def tty() -> int:
    return _one(*pty.openpty()[::-1])


def epoll() -> int:
    with select.epoll() as poll:
        return os.dup(poll.fileno())


def sock(*kind: int) -> int:
    return socket.socket(*kind).detach()


def connected_tcp() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()).detach()


BAD: dict[str, tuple[Callable[[], int], str]] = {
    "directory": (lambda: os.open("/tmp", os.O_RDONLY), "a directory .* '..'"),
    "O_PATH file": (lambda: os.open(__file__, os.O_PATH), "O_PATH"),
    "O_PATH directory": (lambda: os.open("/", os.O_PATH), "O_PATH"),
    "device": (lambda: os.open("/dev/null", os.O_RDWR), "a device"),
    "terminal": (tty, "a device"),
    "proc": (lambda: os.open("/proc/self/status", os.O_RDONLY), "file system 'proc'"),
    "proc mem": (lambda: os.open("/proc/self/mem", os.O_RDWR), "file system 'proc'"),
    "sysfs": (lambda: os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY), "file system 'sysfs'"),
    "namespace": (lambda: os.open("/proc/self/ns/net", os.O_RDONLY), "kernel's own kind"),
    "pidfd": (lambda: os.pidfd_open(os.getpid()), "kernel's own kind"),
    "eventfd": (lambda: os.eventfd(0), "kernel's own kind"),
    "epoll": (epoll, "kernel's own kind"),
    "memory that can be shrunk": (memory, "F_SEAL_SHRINK"),
    "memory without seals": (lambda: memory(flags=0), "F_SEAL_SHRINK"),
    "memory for reading only": (read_only_memory, "F_SEAL_SHRINK"),
    "UNIX datagram pair": (
        lambda: _one(*(end.detach() for end in socket.socketpair(type=socket.SOCK_DGRAM))),
        "not connected for good",
    ),
    "UNIX socket, not connected": (lambda: sock(socket.AF_UNIX), "not connected for good"),
    "TCP": (connected_tcp, 'network="host"'),
    "UDP": (lambda: sock(socket.AF_INET, socket.SOCK_DGRAM), "such a family"),
    "netlink": (lambda: sock(socket.AF_NETLINK, socket.SOCK_RAW), "such a family"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_and_why(name: str) -> None:
    make, why = BAD[name]
    fd = make()
    try:
        with pytest.raises(SerializationError, match=why) as caught:
            check(fd, networked=False)
        assert caught.value.direction == "to child"
        assert "socketpair()" in str(caught.value)  # a way out
    finally:
        os.close(fd)


def test_a_tcp_socket_may_pass_into_the_hosts_network_only() -> None:
    fd = connected_tcp()
    check(fd, networked=True)
    os.close(fd)


# --- in a child -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def isolator() -> Iterator[ProcessIsolator]:
    with ProcessIsolator.create() as isolator:
        yield isolator


@linux
def test_text_files_begin_where_the_host_is(isolator: ProcessIsolator, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("erste\nzweite\ndrítte\n", encoding="latin-1")
    with nothing_left(), open(path, encoding="latin-1") as file:
        assert file.readline() == "erste\n"
        found = isolator.invoke(lambda file: (file.encoding, file.mode, file.readlines()), file)
    assert found == ("latin-1", "r", ["zweite\n", "drítte\n"])


@linux
def test_binary_files_both_ways(isolator: ProcessIsolator, tmp_path: Path) -> None:
    def work(file: Any, more: Any, raw: Any) -> tuple[bytes, str]:
        more.write(b" and the child")
        more.close()
        raw.write(b"raw")
        return file.read(), type(raw).__name__

    (tmp_path / "in").write_bytes(b"0123456789")
    with (
        open(tmp_path / "in", "rb") as file,
        open(tmp_path / "out", "wb") as more,
        open(tmp_path / "raw", "wb", 0) as raw,
    ):
        file.read(4)
        more.write(b"the host")
        assert isolator.invoke(work, file, more=more, raw=raw) == (b"456789", "FileIO")
    assert (tmp_path / "out").read_bytes() == b"the host and the child"
    assert (tmp_path / "raw").read_bytes() == b"raw"


@linux
def test_a_file_for_update_and_a_temporary_one(isolator: ProcessIsolator) -> None:
    def swap(file: Any) -> None:
        text = file.read()
        file.seek(0)
        file.write(text[::-1])
        file.flush()

    with tempfile.TemporaryFile() as plain, tempfile.NamedTemporaryFile("w+") as named:
        for file, text in ((plain, b"abc"), (named, "abc")):
            file.write(text)  # type: ignore[arg-type]
            file.seek(0)
            isolator.invoke(swap, file)
            file.seek(0)
            assert file.read() == text[::-1]


@linux
def test_pipes_from_and_to_other_processes(isolator: ProcessIsolator) -> None:
    with subprocess.Popen([sys.executable, "-c", "print('piped')"], stdout=subprocess.PIPE, text=True) as process:
        assert isolator.invoke(lambda pipe: pipe.read(), process.stdout) == "piped\n"
    reader, writer = os.pipe()
    with open(reader) as back:
        with open(writer, "w") as pipe:
            isolator.invoke(lambda pipe: pipe.write("from the child"), pipe)
        assert back.read() == "from the child"


@linux
def test_a_protocol_of_their_own_over_a_socket_pair(isolator: ProcessIsolator) -> None:
    def serve(sock: Any) -> Any:
        with sock, sock.makefile("rw") as lines:
            for line in lines:
                lines.write(f"{int(line) ** 2}\n")
                lines.flush()
            return sock.gettimeout()

    ours, theirs = socket.socketpair()
    with ours, nothing_left():
        theirs.settimeout(7)
        call = isolator.submit(serve, theirs)
        with ours.makefile("rw") as lines:
            for number in (3, 4, 1000):
                lines.write(f"{number}\n")
                lines.flush()
                assert lines.readline() == f"{number**2}\n"
        theirs.close()
        ours.shutdown(socket.SHUT_RDWR)
        assert call.result(10) == 7
        isolator._close_crew()


@linux
def test_bare_descriptors_and_ints(isolator: ProcessIsolator) -> None:
    def write(fd: int, number: int) -> int:
        os.write(fd, b"x" * number)
        os.close(fd)
        return number

    reader, writer = os.pipe()
    assert isolator.invoke(write, Descriptor(writer), 5) == 5
    os.close(writer)
    assert os.read(reader, 100) == b"xxxxx"
    os.close(reader)


@linux
def test_files_in_closures_containers_and_objects(isolator: ProcessIsolator, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with open(tmp_path / "a") as one, open(tmp_path / "a") as two:
        assert isolator.invoke(lambda: one.read()) == "a"
        keeper = isolator.copy_object([two])
        one.seek(0)
        assert isolator.invoke(lambda files: files["x"][0].read(), {"x": [one]}) == "a"
    assert isolator.invoke(lambda files: files[0].read(), keeper) == "a"  # the child has one of its own


@linux
def test_standard_streams_are_the_childs_own() -> None:
    """Whatever those of the host are, a function that closes over one means the one where it runs."""
    source = """
        import sys
        from pisupervisor import ProcessIsolator

        out = sys.stdout
        with ProcessIsolator.create() as isolator:
            shown = isolator.execute(lambda: (print("inside", file=out), out is sys.stdout)[1])
        assert (shown.value, shown.stdout) == (True, "inside\\n"), shown
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@linux
def test_data_in_memory_is_data(isolator: ProcessIsolator) -> None:
    assert isolator.invoke(lambda a, b: (a.read(), b.read()), io.BytesIO(b"x"), io.StringIO("y")) == (b"x", "y")


def connection() -> Any:
    return multiprocessing.Pipe()[0]


@linux
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (connection, "unpickles"),
        (lambda: Descriptor(os.open("/dev/null", os.O_RDWR)), "a device"),
        (lambda: ssl.create_default_context().wrap_socket(socket.socket(), server_hostname="x"), "a TLS socket"),
        (lambda: Descriptor(os.open("/", os.O_RDONLY)), "a directory"),
        (lambda: Descriptor(99999), "cannot be copied"),
        (lambda: [socket.socket(socket.AF_UNIX)] * 2, "not connected for good"),
    ],
    ids=["connection", "device", "tls", "directory", "no descriptor", "unconnected"],
)
def test_what_is_refused_is_not_sent(isolator: ProcessIsolator, make: Callable[[], Any], why: str) -> None:
    thing = make()
    before = open_fds()
    with pytest.raises(SerializationError, match=why):
        isolator.invoke_method("builtins", "print", thing)
    with pytest.raises(SerializationError, match=why):
        isolator.invoke(lambda: thing)
    assert open_fds() == before
    if isinstance(thing, Descriptor) and thing.fd < 99999:
        os.close(thing.fd)


@linux
def test_a_closed_file_is_refused(isolator: ProcessIsolator, tmp_path: Path) -> None:
    with open(tmp_path / "x", "w") as file:
        pass
    with pytest.raises(SerializationError, match="closed"):
        isolator.invoke(print, file)


@linux
@pytest.mark.parametrize(
    "make",
    [
        lambda path: gzip.GzipFile(path, "wb"), lambda path: io.TextIOWrapper(gzip.GzipFile(path, "wb")),
        lambda path: bz2.BZ2File(path, "wb"), lambda path: lzma.LZMAFile(path, "wb"),  # noqa: SIM115
        lambda path: tempfile.SpooledTemporaryFile(),  # noqa: SIM115
        lambda path: socket.socketpair()[0].makefile("rw"),
    ],
    ids=["gzip", "gzip text", "bz2", "lzma", "spooled", "both ways"],
)  # fmt: skip
def test_what_is_more_than_its_descriptor_is_refused(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """The child would write to the bare descriptor, and past what packs it."""
    with ProcessIsolator.create() as isolator, make(tmp_path / "x") as file, pytest.raises(SerializationError):
        isolator.invoke(print, file)


@linux
@pytest.mark.parametrize("wrong", ["x", None, 1.5], ids=repr)
def test_what_is_no_descriptor(wrong: Any) -> None:
    with pytest.raises(OptionsError, match="Descriptor: expected a number"):
        Descriptor(wrong)


@linux
def test_too_many_at_once_are_refused() -> None:
    pipes = [os.pipe() for _ in range(33)]
    ends = [Descriptor(end) for pipe in pipes for end in pipe]
    with ProcessIsolator.create(limits=Limits(open_files=32)) as isolator:
        with pytest.raises(SerializationError, match="66 descriptors with one call"):
            isolator.invoke(len, ends)
        with pytest.raises(SerializationError, match="Too many open files in the child"):
            isolator.invoke(len, ends[:40])  # more than its rlimit lets it have
        assert isolator.invoke(len, ends[:10]) == 10
    for end in ends:
        os.close(end.fd)


@linux
def test_what_a_call_does_not_take_is_closed_in_the_child(isolator: ProcessIsolator) -> None:
    def fds() -> list[str]:
        return sorted(os.listdir("/proc/self/fd"))

    before = isolator.invoke(fds)
    with open(__file__) as file:
        for _ in range(3):
            with pytest.raises(LookupError):
                isolator.invoke_method("json", "no_such", file)
            with pytest.raises(SerializationError):
                isolator.invoke_method("json", "dumps", [file, Unloadable()])
            isolator.invoke(lambda file: None, file)
    assert isolator.invoke(fds) == before


class Unloadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


@linux
def test_what_the_child_starts_does_not_inherit_them(isolator: ProcessIsolator) -> None:
    def listing(file: Any) -> str:
        import subprocess

        return subprocess.run(["/bin/ls", "/proc/self/fd"], capture_output=True, text=True, close_fds=False).stdout

    with open(__file__) as file:
        assert isolator.invoke(listing, file).split() == ["0", "1", "2", "3"]  # 3 is ls's own


@linux
def test_a_thousand_files_leave_nothing(isolator: ProcessIsolator) -> None:
    with open(__file__) as file, nothing_left():
        for _ in range(1000):
            isolator.invoke(lambda file: file.fileno(), file)


# --- as an attacker ---------------------------------------------------------------------------------------------------


@linux
def test_what_was_opened_for_reading_stays_so(isolator: ProcessIsolator, tmp_path: Path) -> None:
    """Through /proc/self/fd a descriptor can be opened anew; the file's own permissions and Landlock stand there."""

    def reopen(file: Any) -> list[str]:
        found = []
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
            try:
                os.close(os.open(f"/proc/self/fd/{file.fileno()}", flags))
                found.append("opened")
            except OSError as error:
                found.append(type(error).__name__)
        try:
            os.write(file.fileno(), b"x")
        except OSError:
            found.append("bad descriptor")
        return found

    path = tmp_path / "precious"
    path.write_text("precious")
    path.chmod(0o666)  # the child's own id could write to it
    tmp_path.chmod(0o777)
    with open(path) as file:
        assert isolator.invoke(reopen, file) == ["PermissionError"] * 3 + ["bad descriptor"]
    assert path.read_text() == "precious"


@linux
@pytest.mark.root
def test_one_end_of_a_pipe_is_no_way_to_the_other(isolator: ProcessIsolator) -> None:
    def reopen(pipe: Any, flags: int) -> str:
        try:
            os.close(os.open(f"/proc/self/fd/{pipe.fileno()}", flags))
        except OSError as error:
            return type(error).__name__
        return "opened"

    reader, writer = os.pipe()
    with open(reader, "rb") as back, open(writer, "wb") as pipe:
        assert isolator.invoke(reopen, back, os.O_WRONLY) == "PermissionError"
        assert isolator.invoke(reopen, pipe, os.O_RDONLY) == "PermissionError"


@linux
def test_nothing_but_data_comes_back(isolator: ProcessIsolator) -> None:
    """Descriptors that ride on an answer are dropped by the host's kernel, because the host never asks for them."""

    def send_descriptors() -> str:
        import array
        import socket

        from pihost import wire
        from pihost.inside import serve

        def send(link: Any, kind: int, ident: int, parts: list[bytes]) -> None:
            body = b"".join(parts)
            rights = array.array("i", [0, 1, 2] * 50)
            link.sock.sendmsg(
                [wire.pack_header(kind, ident, len(body)), body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            )

        serve.Link.send = send  # type: ignore[method-assign]
        return "sent"

    assert isolator.invoke(len, "") == 0
    take_descriptors(isolator)
    before = open_fds()
    for _ in range(3):
        assert isolator.invoke(send_descriptors) == "sent"
    assert open_fds() == before
    isolator.restart()


@linux
@pytest.mark.parametrize("profile", ["default", "strict"])
def test_they_work_behind_each_profile(profile: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        open(tmp_path / "x", "w+b") as file,
        ProcessIsolator.create(security=_security(profile)) as isolator,
    ):

        def work(sock: Any, file: Any) -> bytes:
            sock.sendall(b"ping")
            file.write(sock.recv(10))
            file.seek(0)
            return file.read()

        ours.sendall(b"pong")
        assert isolator.invoke(work, theirs, file) == b"pong"
        assert ours.recv(10) == b"ping"


def _security(profile: str) -> Any:
    from pisupervisor import Security

    return Security(seccomp=profile)


@linux
def test_an_encoding_that_the_child_lacks_is_told_and_closes_nothing_else(tmp_path: Path) -> None:
    """A codec of the application's own: the descriptor is closed once, by who took it."""
    import codecs

    def find(name: str) -> codecs.CodecInfo | None:
        return codecs.lookup("latin-1") if name == "pisupervisor_own" else None

    path = tmp_path / "text"
    path.write_text("a\n")
    codecs.register(find)
    try:
        with (
            nothing_left(),
            open(path, encoding="pisupervisor_own") as file,
            ProcessIsolator.create(tenant="own") as isolator,  # no spare child stays for others of this file
        ):
            before = isolator.invoke(lambda: len(__import__("os").listdir("/proc/self/fd")))
            with pytest.raises(SerializationError, match="unknown encoding"):
                isolator.invoke(lambda file: file.read(), file)
            assert isolator.invoke(lambda: len(__import__("os").listdir("/proc/self/fd"))) == before
    finally:
        codecs.unregister(find)
