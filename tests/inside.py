"""What runs in a child for the tests: plain code that knows nothing of pisupervisor. Sent by file, never imported here."""

import ctypes
import errno
import os
import resource
import signal
import socket
import sys
import time

# --- looking around ----------------------------------------------------------------------------------------------


def facts():
    """Everything that is the same for every look, at once."""
    return {
        "pid": os.getpid(),
        "ids": (os.getresuid(), os.getresgid(), os.getgroups()),
        "session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "cwd": os.getcwd(),
        "umask": os.umask(0o077),
        "environment": dict(os.environ),
        "hostname": os.uname().nodename,
        "root": sorted(os.listdir("/")),
        "etc": sorted(os.listdir("/etc")),
        "dev": sorted(os.listdir("/dev")),
        "proc": sorted(os.listdir("/proc")),
        "fds": {name: link("/proc/self/fd/" + name) for name in fd_names()},
        "clocks": (time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)),
        "rlimits": {
            name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:7] == "RLIMIT_"
        },
        "interfaces": interfaces(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "argv": list(sys.argv),
        "cpus": sorted(os.sched_getaffinity(0)),
        "cgroup": text("/proc/self/cgroup"),
    }


def fd_names():
    """Those that are open beside the one that listing them takes."""
    return [name for name in os.listdir("/proc/self/fd") if link("/proc/self/fd/" + name) is not None]


def link(path):
    try:
        return os.readlink(path)
    except OSError:
        return None


def text(path):
    with open(path) as file:
        return file.read()


def interfaces():
    """Name -> whether it is up."""
    import fcntl
    import struct

    found = {}
    names = []
    for number in range(1, 17):  # not /proc/self/net/dev: on Linux 5.10 subset=pid hides that too
        try:
            names.append(socket.if_indextoname(number))
        except OSError:
            continue
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            flags = fcntl.ioctl(probe, 0x8913, struct.pack("16sh22x", name.encode(), 0))
            found[name] = bool(struct.unpack_from("16xh", flags)[0] & 1)
    return found


def attempt(function, *arguments):
    """What came of it: the errno's name, or "done"."""
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "done"


def can_open(path, flags=os.O_RDONLY):
    return attempt(lambda: os.close(os.open(path, flags)))


def can_write(path):
    return can_open(path, os.O_WRONLY | os.O_CREAT)


def can_list(path):
    return attempt(os.listdir, path)


def can_make_device(path):
    return attempt(os.mknod, path, 0o600 | 0o060000, os.makedev(7, 0))


def can_signal(pid, number=0):
    return attempt(os.kill, pid, number)


def can_connect(port, host="127.0.0.1"):
    def connect():
        with socket.socket() as probe:
            probe.settimeout(2)
            probe.connect((host, port))

    return attempt(connect)


def can_mount():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == 0:
        return "done"
    return errno.errorcode[ctypes.get_errno()]


def can_unshare(flags):
    libc = ctypes.CDLL(None, use_errno=True)
    return "done" if libc.unshare(flags) == 0 else errno.errorcode[ctypes.get_errno()]


def can_be_another_personality():
    libc = ctypes.CDLL(None, use_errno=True)
    return "done" if libc.personality(0x0040000) >= 0 else errno.errorcode[ctypes.get_errno()]  # ADDR_NO_RANDOMIZE


def can_set_hostname(name):
    libc = ctypes.CDLL(None, use_errno=True)
    return "done" if libc.sethostname(name.encode(), len(name)) == 0 else errno.errorcode[ctypes.get_errno()]


def can_bind():
    with socket.socket() as probe:
        return attempt(probe.bind, ("0.0.0.0", 0))


def listen():
    """Keeps a listener of its own for as long as the child lives; its port."""
    global listener
    listener = socket.create_server(("127.0.0.1", 0))
    return listener.getsockname()[1]


def abstract(name, listening):
    """Listens on, or connects to, a socket in the abstract namespace."""
    global listener
    probe = socket.socket(socket.AF_UNIX)
    address = "\0" + name
    if listening:
        listener = probe
        return attempt(lambda: (probe.bind(address), probe.listen()))
    return attempt(probe.connect, address)


def fill(path, size):
    """Bytes that could be written to a new file, at the most ``size``, and what ended it."""
    written, chunk = 0, bytes(1 << 16)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while written < size:
            written += os.write(fd, chunk)
    except OSError as error:
        return written, errno.errorcode[error.errno]
    finally:
        os.close(fd)
        os.unlink(path)
    return written, "done"


def write_all(path, size):
    """Like any program that does not think of a full disk."""
    try:
        with open(path, "wb") as file:
            return file.write(bytes(size))
    finally:
        os.unlink(path)


def fill_inodes(folder, most):
    made = 0
    try:
        for made in range(most):
            os.close(os.open(f"{folder}/{made}", os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        return made, errno.errorcode[error.errno]
    return made, "done"


# --- being difficult ---------------------------------------------------------------------------------------------


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def ignore_signals():
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue


def spin():
    while True:
        pass


def spin_deaf():
    ignore_signals()
    spin()


def spin_in_c():
    """A regular expression that takes longer than anyone waits, without giving the interpreter back."""
    import re

    re.match(r"(a+)+$", "a" * 64 + "b")


def spin_with_family():
    """Grandchildren in sessions of their own, deaf too, and then no end."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            ignore_signals()
            if os.fork() == 0:
                time.sleep(1000)
            time.sleep(1000)
    spin_deaf()


def eat(size, hold=0.0):
    """Uses that much memory for good."""
    block = bytearray(size)
    for position in range(0, size, 4096):
        block[position] = 1
    time.sleep(hold)
    return len(block)


def eat_in_children(count, size):
    """Each child alone stays below; their sum does not have to."""
    children = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                eat(size, 1.0)
            finally:
                os._exit(0)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def fork_bomb(most):
    """How many processes could be had at the same time."""
    pids = []
    try:
        for _ in range(most):
            pid = os.fork()
            if pid == 0:
                time.sleep(1000)
                os._exit(0)
            pids.append(pid)
    except OSError:
        pass
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(pids)


def burn(seconds):
    """CPU seconds that were to be had in that much time."""
    start, used = time.monotonic(), time.process_time()
    while time.monotonic() - start < seconds:
        sum(range(1000))
    return time.process_time() - used


def leave(code):
    os._exit(code)


def die(number):
    signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), number)
    time.sleep(10)


def close_link():
    os.close(3)
    time.sleep(1000)


def say(data):
    """Writes to the link whatever was asked for, then waits for what comes of it."""
    os.write(3, data)
    time.sleep(1000)


def forge_ready():
    import struct

    os.write(3, struct.pack("<HBBQI", 0x5149, 1, 64, 0, 1) + b"1")
    time.sleep(1000)


# --- output ------------------------------------------------------------------------------------------------------


def talk():
    import subprocess

    print("printed")
    print("warned", file=sys.stderr)
    os.write(1, b"raw\n")
    os.system("echo shell")
    subprocess.run(["sh", "-c", "echo sub; echo suberr >&2"], check=True)
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    return "value"


def flood(size):
    chunk = b"x" * (1 << 16)
    for _ in range(size >> 16):
        os.write(1, chunk)
    print("the end", file=sys.stderr)
    return size
