"""Plugins: an object with ``execute(context)``, run by a host of some kind, its output and its changes brought back.

The same plugin runs in this process (``NullHost``, which isolates nothing) or in a confined child (``ProcessHost``);
``ScannedHost`` looks at its imports first. All hosts are context managers, and ``execute_plugin`` means the same on each.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
import threading
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from pihost.inside.encode import NotData, encode
from pihost.inside.plugins import run_plugin
from pisupervisor.errors import IsolatorClosed, OptionsError, RemoteError, SerializationError
from pisupervisor.isolator import ProcessIsolator
from pisupervisor.link.serializer import decode
from pisupervisor.options import IsolationOptions
from pisupervisor.records import replace


@dataclass
class IsolationContext:
    """What a plugin is given, and may change: ``properties`` by name, ``arguments`` in order. Plain data."""

    properties: dict[str, Any] = field(default_factory=dict)
    arguments: list[Any] = field(default_factory=list)


class Plugin:
    """Base class of plugins. Anything that has ``execute(context)`` will do."""

    def execute(self, context: IsolationContext) -> Any:
        """Do the work; the result is plain data."""
        raise NotImplementedError(f"{type(self).__name__} has no execute of its own")


@dataclass(frozen=True, kw_only=True)
class PluginResult:
    """What it wrote, what it returned, and the context as it left it (the caller's own object)."""

    stdout: str
    stderr: str
    result: Any
    context: IsolationContext


class PluginHost(Protocol):
    """Something that runs plugins."""

    def execute_plugin(
        self, plugin: Any, context: IsolationContext | None = None, timeout: float | None = None
    ) -> PluginResult:
        """Run ``plugin``: an instance, whose state travels, or a class, of which one is made without arguments.

        Raises OptionsError for what is no plugin, RemoteError for what it raised, CallTimeout, ChildTerminated.
        """

    def close(self) -> None:
        """Give back what the host holds. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_error: object) -> None: ...


class _Host:
    def __init__(self) -> None:
        self._closed = False

    def close(self) -> None:
        """Give back what the host holds. Idempotent."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _check(self, plugin: Any, context: IsolationContext | None) -> IsolationContext:
        if self._closed:
            raise IsolatorClosed("this host is closed")
        check_plugin(plugin)
        if context is not None and not isinstance(context, IsolationContext):
            raise OptionsError(f"expected an IsolationContext, not {context!r}")
        context = context if context is not None else IsolationContext()
        for name, kind in (("properties", dict), ("arguments", list)):
            if not isinstance(getattr(context, name, None), kind):
                raise OptionsError(f"context.{name}: expected a {kind.__name__}, not {getattr(context, name, None)!r}")
        return context


def check_plugin(plugin: Any) -> None:
    """Raises OptionsError for what cannot be run as a plugin, before anything is started."""
    kind = plugin if isinstance(plugin, type) else type(plugin)
    try:
        execute = getattr(kind, "execute", None)
        abstract = sorted(getattr(kind, "__abstractmethods__", ()))
    except Exception as error:  # a metaclass may do what it likes
        raise OptionsError(
            f"{type(kind).__name__} is no plugin: {type(error).__name__} when it was looked at"
        ) from None
    if not callable(execute) or execute is Plugin.execute:
        raise OptionsError(f"{kind.__name__} is no plugin: it has no method execute(self, context)")
    if abstract:
        raise OptionsError(f"{kind.__name__} is no plugin yet: it is abstract, {', '.join(abstract)} not defined")


class ProcessHost(_Host):
    """Plugins run in one confined child, which is kept from one to the next (and replaced when it dies)."""

    def __init__(self, options: IsolationOptions | None = None) -> None:
        super().__init__()
        self.isolator = ProcessIsolator.create(options)

    def execute_plugin(
        self, plugin: Any, context: IsolationContext | None = None, timeout: float | None = None
    ) -> PluginResult:
        """See ``PluginHost``. stdout and stderr are what was written to the file descriptors, up to ``Limits.output``."""
        context = self._check(plugin, context)
        payload = self.isolator._packer.function(run_plugin, (plugin, context), {})
        done = self.isolator._captured(("function", payload), None, timeout, None, False, _is_outcome)
        _take_over(context, done.value["properties"], done.value["arguments"])
        return PluginResult(stdout=done.stdout, stderr=done.stderr, result=done.value["result"], context=context)

    def close(self) -> None:
        super().close()
        self.isolator.close()


class RootfsHost(ProcessHost):
    """The same in a root file system of the caller's, read-only: a folder with one, an OCI bundle (a folder with
    ``config.json`` and ``rootfs``), or an OCI image layout, which is unpacked for as long as the host is open (see
    ``unpack_image`` for more than one host). Nothing of it is run outside. Its Python must be of this one's minor version, for
    plugins travel as closures do. ``Security(user=...)`` says as whom, ``Filesystem(overlay=...)`` what may be changed.

    Raises OptionsError where no Python is found in it.
    """

    def __init__(self, rootfs: str | os.PathLike[str], options: IsolationOptions | None = None) -> None:
        options = options or IsolationOptions()
        if options.filesystem.rootfs is not None:
            raise OptionsError("RootfsHost has its root file system: leave Filesystem(rootfs=...) out")
        if not isinstance(rootfs, (str, os.PathLike)):
            raise OptionsError(f"rootfs: expected the path of a folder, not {rootfs!r}"[:300])
        self._unpacked: Any = None  # a TemporaryDirectory, which goes also when this host is forgotten
        try:
            filesystem = replace(options.filesystem, rootfs=self._root_of(os.fspath(rootfs)))
            super().__init__(replace(options, filesystem=filesystem))
        except BaseException:
            self._forget()
            raise

    def _root_of(self, folder: str) -> str:
        from pisupervisor.oci import is_layout, unpack_image

        if is_layout(folder):
            import tempfile

            self._unpacked = tempfile.TemporaryDirectory(prefix="pisupervisor-rootfs-", ignore_cleanup_errors=True)
            root = os.path.join(self._unpacked.name, "rootfs")
            unpack_image(folder, root)
            return root
        is_bundle = all(os.path.exists(os.path.join(folder, name)) for name in ("config.json", "rootfs"))
        return os.path.join(folder, "rootfs") if is_bundle else folder

    def close(self) -> None:
        super().close()
        self._forget()

    def _forget(self) -> None:
        unpacked, self._unpacked = self._unpacked, None
        if unpacked is not None:
            unpacked.cleanup()


def _is_outcome(value: Any) -> bool:
    """What ``run_plugin`` gives."""
    if not isinstance(value, dict) or value.keys() != {"result", "properties", "arguments"}:
        return False
    return isinstance(value["properties"], dict) and isinstance(value["arguments"], list)


def _take_over(context: IsolationContext, properties: dict[str, Any], arguments: list[Any]) -> None:
    """The caller's own dict and list show what the plugin did to its copies."""
    context.properties.clear()
    context.properties.update(properties)
    context.arguments[:] = arguments


_stdout_lock = threading.RLock()


class NullHost(_Host):
    """UNSAFE: runs plugins in this very process, without any isolation, limit or deadline. For tests and for one's own code.

    Output is captured at Python level only, and one plugin runs at a time, because sys.stdout belongs to the process.
    """

    def execute_plugin(
        self, plugin: Any, context: IsolationContext | None = None, timeout: float | None = None
    ) -> PluginResult:
        """See ``PluginHost``; a ``timeout`` is an OptionsError, for nothing here could be killed."""
        context = self._check(plugin, context)
        if timeout is not None:
            raise OptionsError("NullHost cannot end a plugin: leave timeout out, or use ProcessHost")
        own = _copied(context)  # as elsewhere, the caller's shows what a plugin did that has come to an end
        out, err = io.StringIO(), io.StringIO()
        with _stdout_lock, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                outcome = run_plugin(plugin, own)
                if inspect.iscoroutine(outcome):
                    import asyncio

                    outcome = asyncio.run(outcome)
                text, buffers = encode(outcome, sys.maxsize)
            except (Exception, SystemExit) as error:
                told = _as_told(error)
                told.stdout, told.stderr = out.getvalue(), err.getvalue()
                raise told from error
        outcome = decode(text, [memoryview(bytearray(each)) for each in buffers])  # as it would come from a child
        _take_over(context, outcome["properties"], outcome["arguments"])
        return PluginResult(stdout=out.getvalue(), stderr=err.getvalue(), result=outcome["result"], context=context)


def _copied(context: IsolationContext) -> IsolationContext:
    try:
        return deepcopy(context)
    except Exception as error:
        text = f"the context holds what is no plain data, and cannot be copied: {type(error).__name__}: {error}"
        raise SerializationError(text[:300], direction="to child") from error


def _as_told(error: BaseException) -> RemoteError | SerializationError:
    """The error that a caller would get from a child."""
    if isinstance(error, NotData):
        return SerializationError(str(error), direction="from child")
    import pihost
    from pihost.inside.raised import describe_exception
    from pisupervisor.link.remote_errors import remote_error

    return remote_error(describe_exception(error, (os.path.dirname(pihost.__file__), __file__)))


class ScannedHost(_Host):
    """Looks at what a plugin's source imports before ``inner`` runs it. Advisory: who wants to can hide an import from
    any scan, so this catches mistakes, and the child's walls catch the rest.

    ``deny``: modules that must not be imported; ``allow``, if any are given: the only ones that may (the standard
    library's too). A name stands for all below it. What a plugin imports of the application's own modules is looked
    at as well, what is installed is not; all of it must pass.
    """

    def __init__(self, inner: PluginHost, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> None:
        super().__init__()
        if not callable(getattr(inner, "execute_plugin", None)):
            raise OptionsError(f"inner: expected a host such as ProcessHost(), not {inner!r}"[:300])
        self.inner = inner
        self.allow, self.deny = _names(allow, "allow"), _names(deny, "deny")

    def execute_plugin(
        self, plugin: Any, context: IsolationContext | None = None, timeout: float | None = None
    ) -> PluginResult:
        """See ``PluginHost``; raises OptionsError that names the import which is not allowed, and where it stands."""
        context = self._check(plugin, context)
        from pisupervisor.scan import scan

        for found in scan(plugin if inspect.isclass(plugin) else type(plugin)):
            self._judge(found.module, f"{os.path.basename(found.file)}:{found.line}")
        return self.inner.execute_plugin(plugin, context, timeout)

    def _judge(self, module: str, where: str) -> None:
        if any(_covers(name, module) for name in self.deny):
            raise OptionsError(f"{where}: imports {module!r}, which is denied")
        if self.allow and not any(_covers(name, module) for name in self.allow):
            raise OptionsError(f"{where}: imports {module!r}, which is not among what is allowed")

    def close(self) -> None:
        super().close()
        self.inner.close()


def _names(names: Iterable[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise OptionsError(f"{what}: expected a list of module names, not {names!r}")
    found = tuple(names)
    if not all(isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) for name in found):
        raise OptionsError(f"{what}: expected module names, not {found!r}")
    return found


def _covers(name: str, module: str) -> bool:
    return module == name or module.startswith(name + ".")
