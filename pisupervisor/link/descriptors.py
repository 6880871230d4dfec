"""Open files, pipes and sockets among the arguments: which may go to a child, and how they are rebuilt there.

A descriptor is a power that no wall takes back: what it is open on can be used whatever mount namespace, Landlock or
network namespace say. So this is a list of what may pass; what is not known to be harmless is refused, with the reason.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import stat
import sys
from typing import Any

from pisupervisor.errors import OptionsError, SerializationError

_O_PATH = 0o10000000
_SO_PROTOCOL, _SO_DOMAIN = 38, 39
#: file systems that hold files and nothing else; the kernel's own (proc, sysfs, cgroup ...) hold switches
_FILE_SYSTEMS = frozenset((
    "9p", "apfs", "bcachefs", "btrfs", "ceph", "cifs", "ecryptfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuse",
    "fuseblk", "hfsplus", "iso9660", "jfs", "lustre", "nfs", "nfs4", "nilfs2", "ntfs", "ntfs3", "overlay", "ramfs",
    "rootfs", "smb3", "squashfs", "tmpfs", "ubifs", "udf", "vfat", "virtiofs", "xfs", "zfs",
))  # fmt: skip
_WAY_OUT = "open it in the host and send what it holds, or pass a pipe or one end of socket.socketpair()"


class Passed:
    """A copy of a descriptor on its way to a child. What was looked at is what is sent, even if the original is closed and
    its number used for something else meanwhile.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if "fd" in self.__dict__:
            self.close()


class Descriptor:
    """A bare descriptor as an argument: ``isolator.invoke(work, Descriptor(fd))``. The child gets a number of its own, which
    is its to close; plain ints stay ints.
    """

    def __init__(self, fd: int | Any) -> None:
        if not isinstance(fd, int) and not hasattr(fd, "fileno"):
            raise OptionsError(f"Descriptor: expected a number, or something with a fileno(), not {fd!r}"[:200])
        self.fd: int = fd if isinstance(fd, int) else fd.fileno()

    def fileno(self) -> int:
        return self.fd


def reduce(obj: Any, passed: list[Passed], networked: bool) -> Any:
    """How an object with a ``fileno`` is pickled: NotImplemented if it is none of those that can travel."""
    if isinstance(obj, socket.socket):
        return _reduce_socket(obj, passed, networked)
    if isinstance(obj, io.IOBase):
        return _reduce_file(obj, passed, networked)
    if isinstance(obj, Descriptor):
        from pihost.inside.attached import descriptor

        return descriptor, (_pass(obj.fd, passed, networked),)
    if type(obj).__module__ == "tempfile" and hasattr(obj, "file"):
        return _reduce_file(obj.file, passed, networked)
    if type(obj).__module__ == "multiprocessing.connection":
        raise _refused(
            "a multiprocessing Connection", "recv() at the other end unpickles, and so runs, what the child sends"
        )
    return NotImplemented


def _reduce_socket(sock: socket.socket, passed: list[Passed], networked: bool) -> Any:
    if isinstance(sock, getattr(sys.modules.get("ssl"), "SSLSocket", ())):
        raise _refused("a TLS socket", "its keys are in this process, and the child would see the cipher text only")
    from pihost.inside.attached import socket as build

    return build, (_pass(sock.fileno(), passed, networked), sock.gettimeout())


def _reduce_file(file: Any, passed: list[Passed], networked: bool) -> Any:
    if isinstance(file, (io.BytesIO, io.StringIO)):
        return NotImplemented  # data
    if file in (sys.stdin, sys.stdout, sys.stderr):
        return NotImplemented  # by name: the child has its own
    if not _is_plain(file):  # such as GzipFile, which has the descriptor of what it unpacks
        raise _refused(f"a {type(file).__name__}", "what it reads or writes is not what stands at its descriptor")
    try:
        fd = file.fileno()
    except (OSError, ValueError):
        raise _refused("a file object", "it is closed, or has no descriptor") from None
    from pihost.inside.attached import file as build

    _settle(file)
    mode = "r+" if file.readable() and file.writable() else "w" if file.writable() else "r"
    index = _pass(fd, passed, networked)
    if isinstance(file, io.TextIOBase):
        buffering = 1 if getattr(file, "line_buffering", False) else -1
        return build, (index, mode, buffering, (file.encoding, file.errors))
    return build, (index, mode + "b", 0 if isinstance(file, io.RawIOBase) else -1, None)


def _is_plain(file: Any) -> bool:
    """Whether it is made of what ``open`` and ``makefile`` make, all the way down."""
    if isinstance(file, io.TextIOWrapper):
        file = file.buffer
    if isinstance(file, (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)):
        file = file.raw
    return isinstance(file, (io.FileIO, socket.SocketIO))


def _settle(file: Any) -> None:
    """The child begins where the host is: what is written here is flushed, what was read ahead is given back."""
    try:
        if file.writable():
            file.flush()
        if file.readable() and file.seekable() and not isinstance(file, io.RawIOBase):
            file.seek(file.tell())
            binary = file.buffer if isinstance(file, io.TextIOWrapper) else file
            os.lseek(file.fileno(), binary.tell(), os.SEEK_SET)
    except OSError:
        return


def _pass(fd: int, passed: list[Passed], networked: bool) -> int:
    try:
        copy = Passed(fd)
    except (OSError, TypeError, ValueError, OverflowError) as error:
        raise _refused(f"descriptor {fd!r}", f"it cannot be copied: {error}") from None
    passed.append(copy)
    check(copy.fd, networked)
    return len(passed) - 1


def check(fd: int, networked: bool) -> None:
    """Raises SerializationError for a descriptor that no child may have. ``networked``: it lives in the host's network."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & _O_PATH:
        raise _refused("an O_PATH descriptor", "it is a place in the host's file system, not an open file")
    kind = os.fstat(fd).st_mode
    if stat.S_ISFIFO(kind):
        return
    if stat.S_ISSOCK(kind):
        _check_socket(fd, networked)
    elif stat.S_ISREG(kind):
        _check_file(fd)
    elif stat.S_ISDIR(kind):
        raise _refused("a directory", "all that is below it, and above it through '..', could be opened from it")
    elif stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        raise _refused("a device", "its driver would be reached past the rules for devices")
    else:
        raise _refused("a descriptor of the kernel's own kind", f"{os.readlink(f'/proc/self/fd/{fd}')} is no open file")


def _check_file(fd: int) -> None:
    system = _file_system(fd)
    if system is None:
        _check_memory(fd)
    elif system.partition(".")[0] not in _FILE_SYSTEMS:
        raise _refused(f"a file of the file system {system!r}", "it is not known to hold plain files only")


def _file_system(fd: int) -> str | None:
    """The type of what it is mounted from, None for what is mounted nowhere here."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        mount = next(line.split()[1] for line in info if line.startswith(b"mnt_id:"))
    with open("/proc/self/mountinfo", "rb") as mounts:  # names of mount points are of any bytes
        for line in mounts:
            fields = line.split(b" ")
            if fields[0] == mount:
                return fields[fields.index(b"-", 6) + 1].decode("ascii", "replace")
    return None


def _check_memory(fd: int) -> None:
    """A memfd may pass if nobody can shrink it, of which a host that has mapped it dies by SIGBUS. How it was opened says
    nothing: its mode is 0777, so that /proc/self/fd opens it for writing anew. pidfds and namespaces look alike.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        what = os.readlink(f"/proc/self/fd/{fd}")
        raise _refused(
            "a descriptor of the kernel's own kind", f"{what} is on no file system that is seen here"
        ) from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise _refused("a memory file", "the child could shrink it under who has mapped it; add F_SEAL_SHRINK first")


def _check_socket(fd: int, networked: bool) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        domain = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        if domain == socket.AF_UNIX:
            settled = _is_connected(sock) or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if kind not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET) or not settled:
                why = "it could be connected to any abstract address of the host; stream and seqpacket pairs can pass"
                raise _refused("a UNIX socket that is not connected for good", why)
        elif domain in (socket.AF_INET, socket.AF_INET6) and kind == socket.SOCK_STREAM:
            protocol = sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)
            if not networked or protocol != socket.IPPROTO_TCP:
                why = "it stays in the host's network, and could be reconnected or made to listen there"
                raise _refused("a network socket", f'{why}; pass a socketpair and pump, or create with network="host"')
        else:
            raise _refused("a socket of such a family", f"{sock.family!r} {sock.type!r} is not known to be harmless")


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _refused(what: str, why: str) -> SerializationError:
    return SerializationError(f"{what} cannot be passed to the child: {why}\n  {_WAY_OUT}", direction="to child")
