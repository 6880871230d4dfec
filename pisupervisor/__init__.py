"""Runs code nobody has to trust, in fully confined Linux children, inside the host application's own call.

    from pisupervisor import ProcessIsolator

    with ProcessIsolator.create() as isolator:
        isolator.invoke_method("plugin.py", "Tools.shrink", data, size=128)

Names load when they are first used: importing this package costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself costs 6 ms; type checkers know this name

if TYPE_CHECKING:
    from typing import Any

    from pisupervisor.aio import AsyncProcessIsolator as AsyncProcessIsolator
    from pisupervisor.aio_objects import (
        AsyncIsolatedMethod as AsyncIsolatedMethod,
        AsyncIsolatedObject as AsyncIsolatedObject,
        AsyncIsolatedStream as AsyncIsolatedStream,
    )
    from pisupervisor.codecs import Serializer as Serializer, TypeCodec as TypeCodec
    from pisupervisor.errors import (
        CallError as CallError,
        CallTimeout as CallTimeout,
        ChildTerminated as ChildTerminated,
        CompileError as CompileError,
        CpuLimitExceeded as CpuLimitExceeded,
        FeatureUnavailable as FeatureUnavailable,
        IsolationError as IsolationError,
        IsolatorClosed as IsolatorClosed,
        LaunchError as LaunchError,
        MemoryLimitExceeded as MemoryLimitExceeded,
        ObjectReleased as ObjectReleased,
        OptionsError as OptionsError,
        OutputLimitExceeded as OutputLimitExceeded,
        PidsLimitExceeded as PidsLimitExceeded,
        ProfileError as ProfileError,
        ProtocolError as ProtocolError,
        RemoteError as RemoteError,
        RestartLimitReached as RestartLimitReached,
        SerializationError as SerializationError,
        SyscallViolation as SyscallViolation,
        TargetNotFound as TargetNotFound,
        UnknownCallback as UnknownCallback,
    )
    from pisupervisor.events import IsolationEvents as IsolationEvents
    from pisupervisor.executor import IsolationExecutor as IsolationExecutor
    from pisupervisor.futures import CallCancelled as CallCancelled, IsolationFuture as IsolationFuture
    from pisupervisor.isolator import ProcessIsolator as ProcessIsolator
    from pisupervisor.launch.seccomp import SeccompProfile as SeccompProfile
    from pisupervisor.limits.cpuset import CpuSet as CpuSet
    from pisupervisor.link.descriptors import Descriptor as Descriptor
    from pisupervisor.objects import (
        IsolatedMethod as IsolatedMethod,
        IsolatedObject as IsolatedObject,
        IsolatedStream as IsolatedStream,
    )
    from pisupervisor.oci import unpack_image as unpack_image
    from pisupervisor.options import (
        Filesystem as Filesystem,
        IoLimit as IoLimit,
        IsolationOptions as IsolationOptions,
        Limits as Limits,
        RestartPolicy as RestartPolicy,
        Security as Security,
    )
    from pisupervisor.plugins import (
        IsolationContext as IsolationContext,
        NullHost as NullHost,
        Plugin as Plugin,
        PluginHost as PluginHost,
        PluginResult as PluginResult,
        ProcessHost as ProcessHost,
        RootfsHost as RootfsHost,
        ScannedHost as ScannedHost,
    )
    from pisupervisor.results import (
        Applied as Applied,
        CallResult as CallResult,
        ExitInfo as ExitInfo,
        ExitReason as ExitReason,
        SystemCall as SystemCall,
        Usage as Usage,
    )
    from pisupervisor.template import Template as Template

__version__ = "0.1.0"

_HOMES = {
    "aio": ("AsyncProcessIsolator",),
    "aio_objects": ("AsyncIsolatedMethod", "AsyncIsolatedObject", "AsyncIsolatedStream"),
    "codecs": ("Serializer", "TypeCodec"),
    "errors": (
        "CallError", "CallTimeout", "ChildTerminated", "CompileError", "CpuLimitExceeded", "FeatureUnavailable",
        "IsolationError", "IsolatorClosed", "LaunchError", "MemoryLimitExceeded",
        "ObjectReleased", "OptionsError", "OutputLimitExceeded",
        "PidsLimitExceeded", "ProfileError", "ProtocolError", "RemoteError", "RestartLimitReached",
        "SerializationError", "SyscallViolation", "TargetNotFound", "UnknownCallback",
    ),
    "events": ("IsolationEvents",),
    "executor": ("IsolationExecutor",),
    "futures": ("CallCancelled", "IsolationFuture"),
    "isolator": ("ProcessIsolator",),
    "launch.seccomp": ("SeccompProfile",),
    "link.descriptors": ("Descriptor",),
    "limits.cpuset": ("CpuSet",),
    "objects": ("IsolatedMethod", "IsolatedObject", "IsolatedStream"),
    "oci": ("unpack_image",),
    "options": ("Filesystem", "IoLimit", "IsolationOptions", "Limits", "RestartPolicy", "Security"),
    "plugins": (
        "IsolationContext", "NullHost", "Plugin", "PluginHost", "PluginResult", "ProcessHost", "RootfsHost", "ScannedHost",
    ),
    "results": ("Applied", "CallResult", "ExitInfo", "ExitReason", "SystemCall", "Usage"),
    "template": ("Template",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    *sorted(_HOME_OF),
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(__import__(f"{__name__}.{home}", fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
