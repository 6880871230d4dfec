"""The probes of ``pisupervisor doctor``, as data: what is tried in a child, and in what control it must get through.

A source ends with ``got``, a list of what it could do. Empty: it was stopped. It runs behind the constants of the
scene (see ``Lab.constants``), whose names are in capitals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pisupervisor.options import IoLimit, Limits

RIVALS = "rivals"  # the name of a probe's source that is none: two children compete for one CPU


@dataclass(frozen=True, kw_only=True)
class Probe:
    """``options`` are changes to the child's, ``control`` those of the control, which has the steps ``without`` left
    out; ``plain``: the control is a bare interpreter beside the doctor. ``killed``: reasons of an end that mean "held".
    """

    name: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    plain: bool = False
    killed: tuple[str, ...] = ()


def probes(scene: Mapping[str, Any]) -> tuple[Probe, ...]:
    """One for each protection, in the order of ``options.PROTECTIONS``; ``io`` only where the scene has a BLOCK file."""
    small, free = "32M", {"limits": Limits(memory=None, swap=None)}
    table = [
        Probe(name="memory", source=_MEMORY, options=_limits(memory=small), control=free, killed=("memory",)),
        Probe(name="swap", source=_MEMORY, options=_limits(memory=small, swap=0),
              control=_limits(memory=small, swap=None), killed=("memory",)),
        Probe(name="cpus", source=_CPUS, options=_limits(cpus=0.1), control=_limits(cpus=None)),
        Probe(name="cpu_weight", source=RIVALS, options=_limits(cpu_weight=10), control=_limits(cpu_weight=1000)),
        Probe(name="cpuset", source=_CPUSET, options=_limits(cpuset=str(scene["FIRST"]))),
        Probe(name="pids", source=_PIDS, options=_limits(pids=16), control=_limits(pids=None)),
        Probe(name="devices", source=_DEVICES, plain=True),
        Probe(name="user", source=_USER, plain=True),
        Probe(name="mount", source=_MOUNT, plain=True),
        Probe(name="pid", source=_PID, plain=True),
        Probe(name="network", source=_NETWORK, control={"network": "host"}),
        Probe(name="ipc", source=_IPC, without=("ipc namespace",)),
        Probe(name="uts", source=_UTS, without=("uts namespace", "hostname")),
        Probe(name="cgroup", source=_CGROUP, without=("cgroup namespace",)),
        Probe(name="time", source=_TIME, without=("time namespace",)),
        Probe(name="landlock", source=_LANDLOCK, options={"network": "host"}, control={"network": "host"},
              without=("landlock",)),
        Probe(name="seccomp", source=_SECCOMP, without=("seccomp",)),
        Probe(name="capabilities", source=_CAPABILITIES, without=("capabilities",)),
    ]  # fmt: skip
    if scene["BLOCK"]:
        limit = IoLimit(device=scene["BLOCK"], read_bps="1M")
        table.insert(6, Probe(name="io", source=_IO, options=_limits(io=[limit])))
    return tuple(table)


def _limits(**changes: Any) -> dict[str, Any]:
    return {"limits": Limits(**changes)}


_MEMORY = """
block = b"x" * (64 << 20)
got = [f"took {len(block) >> 20} MiB of memory"]
"""

_CPUS = """
import time
begin, used = time.monotonic(), time.process_time()
while time.monotonic() - begin < 0.3:
    pass
share = (time.process_time() - used) / (time.monotonic() - begin)
got = [f"used {share:.0%} of a CPU"] if share > 0.25 else []
"""

#: run by two children on one CPU; how much each used is read from outside
RIVAL = """
import os, time
os.sched_setaffinity(0, [FIRST])
begin = time.monotonic()
while time.monotonic() - begin < 15:
    pass
"""

_CPUSET = """
import os
try:
    os.sched_setaffinity(0, range(os.cpu_count()))
except OSError:
    pass
others = sorted(os.sched_getaffinity(0) - {FIRST})
got = [f"could use the CPUs {others} too"] if others else []
"""

_PIDS = """
import os, signal
born = []
try:
    while len(born) < 40:
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        born.append(pid)
except BlockingIOError:
    pass
for pid in born:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
got = [f"had {len(born)} processes at once"] if len(born) == 40 else []
"""

_IO = """
import mmap, os, time
with open(IO_PATH, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_DIRECT)) as file:
    page, begin = mmap.mmap(-1, 1 << 18), time.monotonic()
    count = os.preadv(file.fileno(), [page], 0) + os.preadv(file.fileno(), [page], 1 << 18)
    took = time.monotonic() - begin
got = [f"read {count >> 10} KiB from the disk in {took * 1000:.0f} ms"] if took < 0.25 else []
"""

# Named, not searched for: to open a device such as a watchdog is to start it.
_DEVICES = """
import os, stat
got, node = [], f"/tmp/pisupervisor-doctor-{DECOY}-node"
try:
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.close(os.open(node, os.O_RDWR))
    got.append("made a device node and opened it")
except OSError:
    pass
finally:
    if os.path.lexists(node):
        os.unlink(node)
for path in ("/dev/ptmx", "/dev/fuse", "/dev/net/tun"):
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NOCTTY))
        got.append(f"opened {path}")
    except OSError:
        pass
"""

_USER = """
import os
got = ["saw the host's root as user 0"] if os.stat("/usr").st_uid == 0 else []
"""

_MOUNT = """
try:
    with open(PATH) as file:
        got = ["read a file of the host"] if file.read() == TOKEN else []
except OSError:
    got = []
"""

_PID = """
import os
got = ["found a process of the host in /proc"] if os.path.exists(f"/proc/{DECOY}") else []
try:
    os.kill(DECOY, 0)
    got.append("could send a signal to it")
except OSError:
    pass
"""

_NETWORK = """
import socket
try:
    socket.create_connection(("127.0.0.1", PORT), 2).close()
    got = ["connected to the host's loopback"]
except OSError:
    got = []
"""

# The standard library has no name for System V shared memory; this runs in the child.
IPC_MAKE = "import ctypes\ngot = [ctypes.CDLL(None).shmget(KEY, 4096, 0o3644)]"
IPC_REMOVE = "import ctypes\nlibc = ctypes.CDLL(None)\ngot = [libc.shmctl(libc.shmget(KEY, 0, 0), 0, None)]"
_IPC = """
import ctypes
got = ["found a shared memory segment of the host"] if ctypes.CDLL(None).shmget(KEY, 0, 0) >= 0 else []
"""

_UTS = """
import os
got = [f"read the host's name, {HOST}"] if os.uname().nodename == HOST else []
"""

_CGROUP = """
with open("/proc/self/cgroup") as file:
    paths = [line.rstrip().split(":", 2)[2] for line in file]
got = [f"read where its group lies: {path}" for path in paths if path != "/"][:1]
"""

_TIME = """
import time
up = time.clock_gettime(time.CLOCK_BOOTTIME)
got = [f"read the host's uptime, {up:.0f} s"] if up >= BOOT else []
"""

_LANDLOCK = """
import socket
got = []
try:
    with open("/proc/self/comm", "w") as file:
        file.write("renamed")
    got.append("wrote to a file in /proc")
except OSError:
    pass
with socket.socket(socket.AF_UNIX) as client:
    try:
        client.connect(SOCKET or "\\0nobody listens here")
        got.append("reached an abstract socket of the host")
    except OSError:
        pass
"""

_SECCOMP = """
import ctypes, os, socket
got = []
try:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
    got.append("opened a netlink socket")
except OSError:
    pass
if ctypes.CDLL(None).unshare(0x10000000) == 0:
    got.append("made a user namespace of its own")
# that is refused to who has a detached root, too, and a unit of systemd's may refuse netlink: this is the filter's alone
if ctypes.CDLL(None).process_vm_readv(os.getpid(), None, 0, None, 0, 0) == 0:
    got.append("called for the memory of a process")
"""

_CAPABILITIES = """
import os
with open("/proc/self/status") as file:
    sets = [line.split() for line in file if line.startswith("Cap")]
got = [f"held capabilities: {name} {value}" for name, value in sets if value.strip("0")]
path = "/tmp/mode-000"
os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o000))
try:
    os.close(os.open(path, os.O_RDONLY))
    got.append("read a file against its mode")
except OSError:
    pass
"""

#: python-prctl, run inside, says the same by other means
WITNESS = """
import sys
sys.path.append(WITNESS_PATH)
import prctl
held = [name for flag in prctl.ALL_FLAG_NAMES for name in prctl.ALL_CAP_NAMES if getattr(getattr(prctl, "cap_" + flag), name)]
held += [name for name in prctl.ALL_CAP_NAMES if getattr(prctl.capbset, name, False)]
got = {"capabilities": held, "securebits": prctl.get_securebits(), "no_new_privs": prctl.get_no_new_privs(),
       "seccomp": prctl.get_seccomp()}
"""
