"""Templates: one zygote for all isolators with equal options, alive as long as one of them (or a Template) is open.

The table below is the only thing that isolators share. It owns nothing by itself: when the last user of a template
closes, its zygote ends, and threads, fds and children are as they were.
"""

from __future__ import annotations

import os
import sys
import threading

from pisupervisor.errors import IsolatorClosed
from pisupervisor.launch.interpreter import Interpreter, find_interpreter, host_python
from pisupervisor.launch.zygote import PACKAGE, Zygote, host_failure
from pisupervisor.options import IsolationOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pisupervisor.launch.features import Features
    from pisupervisor.launch.ids import IdBlock
    from pisupervisor.launch.seccomp_watch import Answers
    from pisupervisor.limits.cgroups import ChildGroup, GroupLimits

    class Spare(Protocol):
        """What a template must know of a spare child."""

        requesting: bool

        def discard(self, why: str) -> object: ...


class Template:
    """A zygote and what was found out for it. Made by ``acquire``; every user calls ``release`` once."""

    def __init__(self, options: IsolationOptions) -> None:
        """Raises OptionsError, FeatureUnavailable or LaunchError; nothing is left behind then."""
        self.lock = threading.RLock()  # re-entered when a forgotten isolator is collected under it
        self.users = 0
        self.closed = False
        self.spare: Spare | None = None  # a child made ready while nobody waited; see supervise.spare
        self.free_group: tuple[GroupLimits, ChildGroup] | None = None  # of a dead child; see supervise.groups
        self.free_group_lock = threading.Lock()
        self.opened_last = False  # whether the last that happened is that an isolator opened
        self.reader: Any = None  # the isolators' CodeReader
        self.ids: IdBlock | None = None
        self._warmed = False
        self._cgroup, self._patience = options.cgroup, options.start_timeout
        self._write_maps: Callable[[int], None] | None = None
        self.outside = 0  # what is added to an id of a child, as the zygote numbers it, to number it as we do
        try:
            self.interpreter: Interpreter = _interpreter(options)
            # What builds the root runs outside of it: nothing of a rootfs is run before that has become "/".
            self.python = self.interpreter.executable if self.interpreter.rootfs is None else host_python()
            program, self.answers = _program(options)
        except OSError as error:
            raise host_failure(error) from error
        self.zygote = Zygote(self.python)
        try:
            self._prepare(options, program)
        except OSError as error:
            self.close()
            raise host_failure(error) from error
        except BaseException:
            self.close()
            raise

    def _prepare(self, options: IsolationOptions, program: bytes) -> None:
        # Imported while the interpreter wakes up: 8 ms.
        from pisupervisor.launch import ids, planning, requirements, root
        from pisupervisor.launch.attest import read_links
        from pisupervisor.launch.features import probe
        from pisupervisor.limits import cgroups

        self.features: Features = probe(self.zygote.pid, options.cgroup)
        requirements.check_kernel(options, self.features)
        subordinate = options.security.subordinate_ids and not self.features.root
        root.check_writable(options, self.features, others=subordinate)
        if subordinate:
            self._use_subordinate_ids()
        requirements.lacking_limits(options, self.features.cgroups)
        self.cloudpickle = _cloudpickle_folder() if self.interpreter.version == sys.version_info[:2] else None
        self.plan = planning.template_plan(
            options, self.features, self.interpreter, package=PACKAGE, cloudpickle=self.cloudpickle, program=program,
            listen=self.answers is not None, subordinate=self._write_maps is not None,
            host_environment=dict(os.environ),
        )  # fmt: skip
        self.zygote.prepare(self.plan, self._write_maps, self._patience)
        cgroups.sweep(self.features.cgroups)
        self.host_links = read_links("self")
        if self.features.root:
            self.ids = ids.claim()

    def _use_subordinate_ids(self) -> None:
        from functools import partial

        from pisupervisor.launch import subids

        found = subids.find(self.features.uid)
        self.ids = subids.claim(self.features.uid, found)
        self.outside = found.uid - 1
        self._write_maps = partial(subids.write_maps, uid=self.features.uid, gid=self.features.gid, found=found)

    def warm_cloudpickle(self) -> None:
        """Closures are used: the next children shall find cloudpickle imported (it takes a child 15 to 27 ms)."""
        if not self._warmed:
            self._warmed = True
            self.zygote.warm(["cloudpickle.cloudpickle"])

    def usable_zygote(self) -> Zygote:
        """The zygote, a new one where the old has ended."""
        with self.lock:
            if self.closed:
                raise IsolatorClosed("this isolator is closed")
            if not self.zygote.alive():
                self.zygote.close()
                self.zygote, self._warmed = self._another_zygote(), False
            return self.zygote

    def _another_zygote(self) -> Zygote:
        """Told its plan before another thread can see it: that must be the first."""
        zygote = Zygote(self.python)
        try:
            zygote.prepare(self.plan, self._write_maps, self._patience)
            if self.features.cgroups.scope:  # it has died with the old one
                from pisupervisor.launch.features import probe

                self.features = probe(zygote.pid, self._cgroup)
        except BaseException:
            zygote.close()
            raise
        return zygote

    def close(self) -> None:
        with self.lock:
            self.closed = True
            spare, self.spare = self.spare, None
        # One that is still asked for is not whole yet: who asks for it sees that we are closed.
        if spare is not None and not spare.requesting:
            spare.discard("its template was closed")
        free, self.free_group = self.free_group, None
        if free is not None:
            free[1].remove()
        with self.lock:
            self.zygote.close()
            if self.ids is not None:
                self.ids.close()


class _Table:
    def __init__(self) -> None:
        self.owner = os.getpid()
        self.lock = threading.RLock()  # re-entered when a forgotten isolator is collected under it
        self.templates: dict[Any, Template] = {}
        self.starting = threading.RLock()  # held for one that is being started; a signal's handler may want another


_table = _Table()


def _own_table() -> _Table:
    """The table of this process: a fork of the application must not touch what belongs to the original."""
    global _table
    if _table.owner != os.getpid():
        _table = _Table()
    return _table


def acquire(options: IsolationOptions) -> Template:
    """The template for these options, started if nobody has it open. Raises what starting it raises."""
    table, key = _own_table(), template_key(options)
    template = _known(table, key)
    if template is not None:
        return template
    with table.starting:
        template = _known(table, key)  # who was before us may have started it
        if template is None:
            # Not under the table's lock: it takes long, and what is collected meanwhile, in whatever thread, needs that.
            template = Template(options)
            template.users = 1
            with table.lock:
                table.templates[key] = template
        return template


def _known(table: _Table, key: Any) -> Template | None:
    """One more user of the template that is there."""
    with table.lock:
        template = table.templates.get(key)
        if template is None or template.closed:  # as when its last isolator was collected while keys were compared
            return None
        template.users += 1
        return template


def release(template: Template) -> None:
    """Give a template back; the last one to do so ends its zygote."""
    table = _own_table()
    if template.zygote.owner != table.owner:
        raise IsolatorClosed("this template belongs to the process that started it, not to a fork of it")
    with table.lock:
        template.users -= 1
        if template.users:
            return
        table.templates = {key: kept for key, kept in table.templates.items() if kept is not template}
    template.close()


def template_key(options: IsolationOptions) -> tuple[Any, ...]:
    """What two isolators must have in common to share a zygote."""
    inherited = tuple((name, os.environ.get(name)) for name in options.inherit_environment)
    return (
        options.python, options.preload, options.import_paths, options.filesystem, options.network, options.log_level,
        _profile_key(options.security.seccomp), options.security.watch, options.security.user, options.security.hostname,
        options.security.landlock, options.security.nesting,
        options.security.subordinate_ids, options.degrade, options.cgroup,
        tuple(sorted(options.environment.items())), inherited,
        options.tenant,
    )  # fmt: skip


def _profile_key(profile: Any) -> Any:
    """A profile's file may change under the same name."""
    if not isinstance(profile, (str, os.PathLike)):
        return profile
    try:
        found = os.stat(profile)
    except (OSError, ValueError):  # which reading it says better
        return profile
    return os.path.abspath(profile), found.st_mtime_ns, found.st_size, found.st_ino


def _interpreter(options: IsolationOptions) -> Interpreter:
    python = None if options.python is None else os.fspath(options.python)
    root = options.filesystem.rootfs
    if root is None:
        return find_interpreter(python, options.start_timeout)
    from pisupervisor.launch.rootfs import find_python

    return find_python(os.fspath(root), python)


def _program(options: IsolationOptions) -> tuple[bytes, Answers | None]:
    """The filter, and what to answer where it asks the host."""
    profile, watch = options.security.seccomp, options.security.watch
    if profile is None:
        return b"", None
    from pisupervisor.launch.seccomp import compile_profile, for_nesting, is_listened_to, load_profile

    if options.security.nesting:
        profile = for_nesting(load_profile(profile))
    program = compile_profile(profile) if watch is None else load_profile(profile).compile(watch)
    if not is_listened_to(program):
        return program, None
    from pisupervisor.launch.seccomp_watch import answers_of

    return program, answers_of(load_profile(profile), watch)


def _cloudpickle_folder() -> str | None:
    """Where it is installed, without importing it, nor importlib.util."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)  # those of an application may be of the old kind, which has none
        spec = None if find_spec is None else find_spec("cloudpickle", None)
        if spec is not None:
            return os.path.dirname(spec.origin) if spec.origin else None
    return None
