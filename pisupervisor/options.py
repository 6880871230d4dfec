"""What a host application asks for: frozen, keyword-only data that checks itself when it is built."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from pisupervisor import checks
from pisupervisor.errors import OptionsError
from pisupervisor.limits.cpuset import CpuSet
from pisupervisor.records import FrozenDict, dataclass, field, fields

TYPE_CHECKING = False  # typing costs 2 ms of a program's start; type checkers know this name
if TYPE_CHECKING:
    from typing import Any, Literal

    from pisupervisor.codecs import Serializer, TypeCodec
    from pisupervisor.events import IsolationEvents
    from pisupervisor.launch.seccomp import SeccompProfile

#: The protections that ``ProcessIsolator.applied`` reports, and the names that ``degrade`` takes.
PROTECTIONS = (
    "memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "io", "io_weight", "devices",
    "user", "mount", "pid", "network", "ipc", "uts", "cgroup", "time",
    "landlock", "seccomp", "capabilities",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IoLimit:
    """Throttle for one block device: ``device`` is a device node or any path on its file system; rates are per second."""

    device: str
    read_bps: int | str | None = None
    write_bps: int | str | None = None
    read_iops: int | None = None
    write_iops: int | None = None

    def __post_init__(self) -> None:
        _store(self, "device", checks.path(self.device, "io.device"))
        for name in ("read_bps", "write_bps", "read_iops", "write_iops"):
            _store(self, name, checks.size_or_none(getattr(self, name), f"io.{name}"))
            if getattr(self, name) == 0:
                raise OptionsError(f"io.{name}: 0 would be read as no limit; give a rate above zero, or None")
        if all(getattr(self, f.name) is None for f in fields(self) if f.name != "device"):
            raise OptionsError(f"io: the limit for {self.device!r} limits nothing; give a read or write rate")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one child and everything it starts may use up. None means: no limit of ours.

    memory      512M (536870912 bytes); resident and cached memory, socket and pipe buffers, tmpfs pages
    memory_high None; bytes above which the kernel throttles and reclaims (cgroup v2 only)
    swap        0 bytes
    cpus        1.0 cores
    cpu_weight  None; share against siblings, 1..10000, the kernel's default is 100
    cpu_time    None; seconds of CPU time in all
    cpuset      None; a CpuSet or what CpuSet.parse takes
    pids        64 processes and threads
    io          (); IoLimit entries
    io_weight   None; share of a disk against siblings, 1..10000, the kernel's default is 100; it counts on disks whose
                scheduler is bfq, and on v2 on those with io.cost switched on
    nice        None; 0..19
    open_files  256 file descriptors in one process
    file_size   None; largest file that can be written, bytes
    scratch     64M (67108864 bytes) each for /tmp and /dev/shm, counted in ``memory`` too
    output      1M (1048576 bytes) each of stdout and stderr of one call
    result      64M (67108864 bytes) for one encoded result, which has at most 2,000,000 items (an array is one)
    """

    memory: int | str | None = "512M"
    memory_high: int | str | None = None
    swap: int | str | None = 0
    cpus: float | None = 1.0
    cpu_weight: int | None = None
    cpu_time: float | None = None
    cpuset: CpuSet | str | None = None
    pids: int | None = 64
    io: Sequence[IoLimit] = ()
    io_weight: int | None = None
    nice: int | None = None
    open_files: int | None = 256
    file_size: int | str | None = None
    scratch: int | str = "64M"
    output: int | str = "1M"
    result: int | str = "64M"

    def __post_init__(self) -> None:
        for name in ("memory", "memory_high", "swap", "file_size", "scratch", "output", "result"):
            _store(self, name, checks.size_or_none(getattr(self, name), name))
        if self.memory is not None and int(self.memory) < 8 << 20:
            raise OptionsError(f"memory: {self.memory} bytes is too little for a Python child; give at least 8M")
        for name in ("scratch", "output", "result"):
            if not getattr(self, name):
                raise OptionsError(f"{name}: give a size above zero")
        _store(self, "cpus", checks.number_or_none(self.cpus, "cpus", 0.01, 4096.0))
        _store(self, "cpu_time", checks.number_or_none(self.cpu_time, "cpu_time", 0.01, 1e9))
        checks.count_or_none(self.cpu_weight, "cpu_weight", 1, 10000)
        checks.count_or_none(self.io_weight, "io_weight", 1, 10000)
        checks.count_or_none(self.pids, "pids", 4, 1 << 22)  # PID 1, the payload, and room to report
        checks.count_or_none(self.nice, "nice", 0, 19)
        checks.count_or_none(self.open_files, "open_files", 32, 1 << 20)
        if self.cpuset is not None and not isinstance(self.cpuset, CpuSet):
            _store(self, "cpuset", CpuSet.parse(self.cpuset))
        _store(self, "io", tuple(checks.sequence(self.io, "io")))
        if not all(isinstance(entry, IoLimit) for entry in self.io):
            raise OptionsError("io: expected IoLimit entries, such as io=[IoLimit(device='/dev/sda', write_bps='10M')]")


@dataclass(frozen=True, kw_only=True)
class Filesystem:
    """What the child sees beside the interpreter and its libraries.

    ``read_only`` and ``writable`` are host paths, shown at the same place, or ``(host path, path in the child)``.
    A UNIX socket in one of them can be connected to, as far as its mode allows; in a ``frozen`` one it cannot.

    ``frozen`` are folders likewise, read-only, for what does not change while children live (what does is seen late, or not
    at all, and file systems mounted below are not shown). The child's locks and watches on them concern nobody outside of
    its template.

    ``rootfs`` is the folder of a root file system with a Python 3.9 or newer: the child sees that, read-only, in the place
    of the host's system and of our ``/etc``; ``python=`` is then a path inside. That Python and its library become the
    zygote, with the rights of the application, as any interpreter does: take it from where you trust it.

    ``overlay`` are folders in the child's tree that it may change, each by up to ``Limits.scratch`` bytes: what it writes
    there is its own, and gone with it. Files that were there stay as they are: they can be read and deleted, and be
    replaced, but not be written to.
    """

    read_only: Sequence[str | os.PathLike[str] | tuple[str, str]] = ()
    writable: Sequence[str | os.PathLike[str] | tuple[str, str]] = ()
    frozen: Sequence[str | os.PathLike[str] | tuple[str, str]] = ()
    rootfs: str | os.PathLike[str] | None = None
    overlay: Sequence[str] = ()

    def __post_init__(self) -> None:
        _store(self, "rootfs", checks.rootfs(self.rootfs))
        _store(self, "overlay", checks.overlay(self.overlay))
        for name in ("read_only", "writable", "frozen"):
            _store(self, name, tuple(checks.bind(entry, name) for entry in checks.sequence(getattr(self, name), name)))
        for source, _ in self.shown("frozen"):
            if not os.path.isdir(source):
                raise OptionsError(f"frozen: {source} is no folder; a file can be shown with read_only")

    def shown(self, name: Literal["read_only", "writable", "frozen"]) -> tuple[tuple[str, str], ...]:
        """(host path, path in the child) of each bind: the fields as they were checked."""
        shown: tuple[tuple[str, str], ...] = getattr(self, name)
        return shown


@dataclass(frozen=True, kw_only=True)
class Security:
    """The walls. ``seccomp`` is ``"default"``, ``"strict"``, ``"permissive"``, a profile's path, a SeccompProfile or
    None (no filter). ``user`` is the numeric id inside the child, never 0 (None: 1000). ``hostname`` is what the child is told.

    ``watch`` has the host listen to the filter, at some 20 us for each call that it is asked about (see ``system_calls()`` and
    ``IsolationEvents.syscall``): "kills" names the call that a child was killed for; "trace" tells what is refused, and
    refuses with EPERM where the profile would kill; "learn" tells every call, too, and is slow. A profile with rules
    marked SCMP_ACT_NOTIFY is listened to as with "kills": those calls are refused, and told.

    ``nesting``: code in the child may use pisupervisor itself. Landlock then has no rules for files, with which nobody
    inside could mount (the inner isolator has its own), the filter lets through what makes namespaces and mounts, and the
    child can read its mount table. Much more of the kernel is in reach of it: for code that you trust with that.

    ``subordinate_ids``: an ordinary user's children get ids of their own outside, from /etc/subuid, in place of the user's
    (root's always have their own). Then they reach only those of the user's files that everybody may read.
    """

    seccomp: str | os.PathLike[str] | SeccompProfile | None = "default"
    landlock: bool = True
    user: int | None = 1000
    hostname: str = "pihost"
    watch: Literal["kills", "trace", "learn"] | None = None
    nesting: bool = False
    subordinate_ids: bool = False

    def __post_init__(self) -> None:
        if self.watch not in (None, "kills", "trace", "learn"):
            raise OptionsError(f"watch: {self.watch!r} is none of 'kills', 'trace', 'learn', None")
        if self.watch is not None and self.seccomp is None:
            raise OptionsError(f"watch={self.watch!r}: without a seccomp profile there is nothing to watch")
        checks.profile(self.seccomp)
        _store(self, "user", 1000 if self.user is None else self.user)
        checks.count_or_none(self.user, "user", 1, 65533)
        for name in ("landlock", "nesting", "subordinate_ids"):
            if not isinstance(getattr(self, name), bool):
                raise OptionsError(f"{name}: expected True or False, not {getattr(self, name)!r}")
        name = self.hostname
        if not (isinstance(name, str) and 0 < len(name) <= 63 and name.isascii() and name.isprintable()):
            raise OptionsError(f"hostname: {name!r} is no host name (1 to 63 ASCII characters)")


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """What happens after a child died: at most ``max_restarts`` crashes ``within`` seconds, each waited for with a
    delay that starts at ``backoff`` seconds and doubles up to ``max_backoff``. Kills that the supervisor ordered
    (a timeout, a cancelled call) never count.
    """

    mode: Literal["on-failure", "always", "never"] = "on-failure"
    max_restarts: int = 10
    within: float = 60.0
    backoff: float = 0.1
    max_backoff: float = 5.0

    def __post_init__(self) -> None:
        if self.mode not in ("on-failure", "always", "never"):
            raise OptionsError(f"restart mode: {self.mode!r} is none of 'on-failure', 'always', 'never'")
        checks.count(self.max_restarts, "max_restarts", 0, 1 << 31)
        for name in ("within", "backoff", "max_backoff"):
            _store(self, name, checks.number(getattr(self, name), name, 0.0, 1e9))


@dataclass(frozen=True, kw_only=True)
class IsolationOptions:
    """Everything about one isolator. The defaults are safe for code nobody has read.

    network              "none": no interface but a dead ``lo``; "loopback": ``lo`` up, its own; "host": the host's
    events               handlers for what happens, see IsolationEvents
    on_start             a function without parameters that runs in every new child before its first call; what it
                         raises there is a LaunchError
    environment          variables for the child; it starts from nothing but PATH, HOME, LANG, TMPDIR
    inherit_environment  names that are copied from the host's environment
    python               another interpreter, or the folder of a venv (its packages can then be imported)
    preload              modules imported once in the template, so that a fresh child has them at no cost
    import_paths         folders, zips or wheels that the child may import from, read-only
    tenant               whose children these are: those of different tenants have no zygote in common, and so neither hash
                         seed nor address layout, which children of one zygote share
    modules              loaders for what the child may import as source: folders and zips of the host, which it does not
                         see, or functions from a dotted name to source text or None; asked in order, last of all
    results              "data": what comes back can never run code in the host; "pickle": the caller trusts the child; or a
                         Serializer of the caller's own, who trusts that with the child's bytes
    types                what may come back beside plain data: TypeCodec entries for objects of the caller's own types; "arrow"
                         for pandas' and pyarrow's, whose bytes pyarrow then reads in the host (extra "arrow")
    zero_copy            results that are big arrays are used where the child has put them, and can still write: for those
                         who trust the child; the default is a copy
    degrade              names of protections that may be missing (see PROTECTIONS); ``applied`` then says so. Limits of
                         memory, cpus and pids that no group holds are watched instead (docs/platforms.md)
    start_timeout        seconds for create(), None waits without end
    call_timeout         default for calls that give no ``timeout``
    idle_timeout         seconds without a call, and without a stream under way, after which the child is ended; the next call
                         starts another
    max_calls            answered calls after which the child is replaced by another, once no stream is under way in it (a
                         stream is one call)
    max_concurrency      calls that run side by side in the child, each in a thread of its own there; what captures its
                         output runs one at a time all the same
    callback_rate        calls of registered callbacks in a second; what is more gets an error in the child
    callback_bytes       bytes of what registered callbacks are called with in a second; likewise
    callback_depth       how deep calls from callbacks from calls may be nested
    die_on_crash         the application gets a SIGTERM when a child crashes, unless a handler says ``handled``
    debug                the child stops itself (SIGSTOP) before user code, and says so on the host's stderr
    cgroup               an empty cgroup v2 group that children's groups are made in, instead of what is found; full path
    log_level            of the child's side, on the host's stderr; default: PISUPERVISOR_LOG_LEVEL, else WARNING
    """

    limits: Limits = field(default_factory=Limits)
    network: Literal["none", "loopback", "host"] = "none"
    filesystem: Filesystem = field(default_factory=Filesystem)
    security: Security = field(default_factory=Security)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    events: IsolationEvents | None = None
    on_start: Callable[[], object] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    inherit_environment: Sequence[str] = ()
    python: str | os.PathLike[str] | None = None
    preload: Sequence[str] = ()
    import_paths: Sequence[str | os.PathLike[str]] = ()
    tenant: str | None = None
    modules: Sequence[str | os.PathLike[str] | Callable[[str], str | bytes | None]] = ()
    results: Literal["data", "pickle"] | Serializer = "data"
    types: Sequence[TypeCodec | Literal["arrow"]] = ()
    zero_copy: bool = False
    degrade: Sequence[str] = ()
    start_timeout: float | None = 30.0
    call_timeout: float | None = None
    idle_timeout: float | None = None
    max_calls: int | None = None
    max_concurrency: int = 1
    callback_rate: float | None = 10_000.0
    callback_bytes: int | str | None = "64M"
    callback_depth: int = 16
    die_on_crash: bool = False
    debug: bool = False
    cgroup: str | os.PathLike[str] | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None = None

    def __post_init__(self) -> None:
        for name, kind in _PARTS:
            if not isinstance(getattr(self, name), kind):
                raise OptionsError(f"{name}: expected {kind.__name__}(...), not {getattr(self, name)!r}")
        checks.choice(self.network, "network", ("none", "loopback", "host"))
        _store(self, "types", checks.types(self.types, self.results))
        _store(self, "environment", FrozenDict(checks.environment(self.environment)))
        _store(self, "inherit_environment", checks.variable_names(self.inherit_environment, "inherit_environment"))
        for name in ("preload", "degrade"):
            _store(self, name, checks.strings(getattr(self, name), name))
        for module in self.preload:
            if not all(part.isidentifier() for part in module.split(".")):
                raise OptionsError(f"preload: {module!r} is no module name")
        unknown = sorted(set(self.degrade) - set(PROTECTIONS))
        if unknown:
            raise OptionsError(f"degrade: {', '.join(unknown)} is no protection; known: {', '.join(PROTECTIONS)}")
        if self.python is not None:
            # inside a rootfs too: from its top
            _store(self, "python", checks.absolute(checks.path(self.python, "python")))
        _store(self, "import_paths", checks.existing(self.import_paths, "import_paths"))
        _store(self, "cgroup", checks.cgroup(self.cgroup))
        if not isinstance(self.tenant, (str, type(None))):
            raise OptionsError(f"tenant: expected a name, not {self.tenant!r}")
        longest = checks.LONGEST
        _store(self, "start_timeout", checks.number_or_none(self.start_timeout, "start_timeout", 0.0, longest) or None)
        for name in ("call_timeout", "idle_timeout"):
            _store(self, name, checks.number_or_none(getattr(self, name), name, 0.001, longest))
        checks.count_or_none(self.max_calls, "max_calls", 1, 1 << 62)
        checks.count(self.max_concurrency, "max_concurrency", 1, 1000)
        _store(self, "callback_rate", checks.number_or_none(self.callback_rate, "callback_rate", 0.001, 1e9))
        _store(self, "callback_bytes", checks.size_or_none(self.callback_bytes, "callback_bytes"))
        checks.count_or_none(self.callback_depth, "callback_depth", 0, 50)
        checks.functions(self.events, self.on_start)
        _store(self, "modules", checks.loaders(self.modules))
        _store(self, "log_level", checks.log_level(self.log_level))

    def needs_first_calls(self) -> bool:
        """Whether there is something that each new child has to do before it is anybody's."""
        return self.on_start is not None or bool(self.types) or not isinstance(self.results, str)


_PARTS: tuple[tuple[str, type], ...] = (
    ("limits", Limits), ("filesystem", Filesystem), ("security", Security), ("restart", RestartPolicy), ("debug", bool),
    ("die_on_crash", bool), ("zero_copy", bool),
)  # fmt: skip


def _store(target: object, name: str, value: Any) -> None:
    object.__setattr__(target, name, value)
