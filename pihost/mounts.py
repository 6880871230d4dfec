"""What a root is made of: Bind, Layer, Tmpfs, Overlay, Proc, Folder, File, Symlink, each with ``describe()`` and ``execute()``.

Bind sources are taken (open_tree) before anything is mounted: no path of the host is walked twice, and a source below
the folder that the new root is built on stays reachable. They go to an fd, not to a path, for the same reason.
"""

from __future__ import annotations

import os
import stat

from pihost import syscalls

if False:  # typing costs 5 ms, and only a type checker reads this
    from typing import Any


READ_ONLY = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV
WRITABLE = syscalls.MS_NOSUID | syscalls.MS_NODEV
DEVICE = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
_OPTIONS = {"ro": syscalls.MS_RDONLY, "nosuid": 2, "nodev": 4, "noexec": 8}


class Mount:
    target: str

    def describe(self) -> str:
        """For the report, should it fail."""
        return f"{type(self).__name__.lower()} {self.target}"

    def execute(self, base: str, kernel: Any = syscalls) -> None:
        """Make it below ``base``. Raises OSError."""


class Bind(Mount):
    """A file or folder of the host, with everything mounted below it; ``flags`` hold for all of it."""

    def __init__(self, source: str, target: str, flags: int) -> None:
        self.source, self.target, self.flags = source, target, flags
        self.tree, self.late = -1, False

    def describe(self) -> str:
        return f"{type(self).__name__.lower()} {self.source} at {self.target}"

    def open(self, kernel: Any = syscalls) -> None:
        """Take the source, while it can be seen. Its flags are set before anything can be reached through it."""
        self.tree = kernel.open_tree(self.source)
        try:
            if self.flags:
                kernel.set_mount_flags(self.tree, self.flags)
        except OSError as error:
            if error.errno != 38:  # ENOSYS: Linux before 5.12
                raise
            self.late = True

    def execute(self, base: str, kernel: Any = syscalls) -> None:
        if self.tree < 0:
            self.open(kernel)
        target = open_target(base, self.target, stat.S_ISDIR(os.fstat(self.tree).st_mode))
        try:
            kernel.move_mount(self.tree, target)
            if self.late:  # nothing runs yet that could reach it in between
                set_flags_late(os.readlink(f"/proc/self/fd/{target}"), self.flags, kernel)
        finally:
            os.close(target)
            os.close(self.tree)


def set_flags_late(path: str, flags: int, kernel: Any) -> None:
    """Add flags to what is mounted at ``path`` and below it, one by one; those that are set stay (some are locked)."""
    is_listed = False
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        for fields in [os.fsdecode(line).split(" ") for line in mountinfo]:
            point = unescaped(fields[4])
            if (point + "/").startswith(path + "/"):
                held = sum(flag for name, flag in _OPTIONS.items() if name in fields[5].split(","))
                kernel.mount("", point, "", syscalls.MS_REMOUNT | syscalls.MS_BIND | flags | held)
                is_listed |= point == path
    if not is_listed:
        raise OSError(2, "a mount that is not listed keeps the flags of the host's", path)


def unescaped(text: str) -> str:
    """A path of mountinfo as it is."""
    for code, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(code, char)
    return text


class Layer(Bind):
    """A read-only folder that does not change, as a layer of an overlay (45 us; beside an empty one, for it takes two): no
    lock in it is one outside, nor a path of it in mountinfo. Where the kernel refuses: Bind with ``flags``; 0: an error.
    """

    def open(self, kernel: Any = syscalls) -> None:  # noqa: ARG002
        self.tree = os.open(self.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # old kernels: no detached layers

    def execute(self, base: str, kernel: Any = syscalls) -> None:
        fds = [self.tree, *(open_target(base, path, True) for path in ("/pis/empty", self.target))]
        tree, empty, target = (f"/proc/self/fd/{fd}" for fd in fds)
        try:
            layers = f"lowerdir={tree}:{empty},redirect_dir=nofollow,xino=off"
            kernel.mount("overlay", target, "overlay", READ_ONLY, layers)
        except OSError:
            if not self.flags:
                raise
            Bind(tree, self.target, self.flags).execute(base, kernel)
        finally:
            for fd in fds:
                os.close(fd)


def open_target(base: str, path: str, folder: bool) -> int:
    """An O_PATH fd of ``base + path``, made where it is missing. No symbolic link is followed on the way: somebody may
    have planted one in a folder that is shown here (CVE-2021-30465), and this runs with rights. Raises OSError.
    """
    parts = [part for part in path.split("/") if part]
    folders = parts if folder else parts[:-1]
    opened = [os.open(base or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        for name in folders:
            make_missing(os.mkdir, name, 0o755, dir_fd=opened[-1])
            opened.append(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened[-1]))
        if not folder:
            make_missing(os.mknod, parts[-1], stat.S_IFREG | 0o444, dir_fd=opened[-1])
            opened.append(os.open(parts[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened[-1]))
        if stat.S_ISLNK(os.fstat(opened[-1]).st_mode):
            raise OSError(40, "a symbolic link stands where something is to be shown", path)
        return opened.pop()
    finally:
        for fd in opened:
            os.close(fd)


def make_missing(make: Any, name: str, mode: int, dir_fd: int) -> None:
    try:
        make(name, mode, dir_fd=dir_fd)
    except FileExistsError:
        pass


class Tmpfs(Mount):
    """Memory-backed scratch of at most ``size`` bytes and ``inodes`` files, owned by the child."""

    def __init__(self, target: str, size: int, inodes: int, uid: int, gid: int) -> None:
        self.target = target
        self.data = f"size={size},nr_inodes={inodes},mode=1777,uid={uid},gid={gid}"

    def execute(self, base: str, kernel: Any = syscalls) -> None:
        kernel.mount("tmpfs", base + self.target, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, self.data)


class Overlay(Mount):
    """What is at ``target`` already, with a layer of the child's own on top: a tmpfs, which is then out of sight."""

    def __init__(self, target: str, place: str, size: int, inodes: int, uid: int, gid: int) -> None:
        self.target, self.place = target, place
        self.scratch = Tmpfs(place, size, inodes, uid, gid)

    def execute(self, base: str, kernel: Any = syscalls) -> None:
        self.scratch.execute(base, kernel)
        upper, work = f"{base}{self.place}/upper", f"{base}{self.place}/work"
        for folder in (upper, work):
            os.mkdir(folder, 0o755)
        target = open_target(base, self.target, folder=True)  # no symbolic link is followed on the way
        layers = f"lowerdir=/proc/self/fd/{target},upperdir={upper},workdir={work},userxattr"
        try:
            kernel.mount("overlay", f"/proc/self/fd/{target}", "overlay", WRITABLE, layers)
        finally:
            os.close(target)
        kernel.umount_detach(base + self.place)


class Proc(Mount):
    """A /proc of the new pid namespace: its own processes, nothing of the kernel."""

    def __init__(self, target: str, options: str) -> None:
        self.target, self.options = target, options

    def execute(self, base: str, kernel: Any = syscalls) -> None:
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        kernel.mount("proc", base + self.target, "proc", flags, self.options)


class Folder(Mount):
    def __init__(self, target: str) -> None:
        self.target = target

    def execute(self, base: str, kernel: Any = syscalls) -> None:  # noqa: ARG002
        os.close(open_target(base, self.target, True))


class File(Mount):
    """A small file of our own, such as /etc/passwd."""

    def __init__(self, target: str, text: str) -> None:
        self.target, self.text = target, text

    def execute(self, base: str, kernel: Any = syscalls) -> None:  # noqa: ARG002
        target = base + self.target
        os.makedirs(os.path.dirname(target), exist_ok=True)
        fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444)
        os.write(fd, self.text.encode())
        os.close(fd)


class Symlink(Mount):
    def __init__(self, target: str, to: str) -> None:
        self.target, self.to = target, to

    def execute(self, base: str, kernel: Any = syscalls) -> None:  # noqa: ARG002
        os.makedirs(os.path.dirname(base + self.target), exist_ok=True)
        os.symlink(self.to, base + self.target)


KINDS = {
    "bind": Bind, "layer": Layer, "overlay": Overlay, "tmpfs": Tmpfs, "proc": Proc, "folder": Folder, "file": File,
    "symlink": Symlink,
}  # fmt: skip


def read(entries: list[list[Any]]) -> list[Mount]:
    """The objects for ``[kind, *arguments]`` entries of a plan."""
    return [KINDS[kind](*arguments) for kind, *arguments in entries]
