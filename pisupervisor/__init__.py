"""Runs code nobody has to trust, in fully confined Linux children, inside the host application's own call.

    from pisupervisor import ProcessIsolator

    with ProcessIsolator.create() as isolator:
        isolator.invoke_method("plugin.py", "Tools.shrink", data, size=128)

Names load when they are first used: importing this package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pisupervisor.errors import (
        CallError as CallError,
    )
    from pisupervisor.errors import (
        CallTimeout as CallTimeout,
    )
    from pisupervisor.errors import (
        ChildTerminated as ChildTerminated,
    )
    from pisupervisor.errors import (
        CompileError as CompileError,
    )
    from pisupervisor.errors import (
        CpuLimitExceeded as CpuLimitExceeded,
    )
    from pisupervisor.errors import (
        FeatureUnavailable as FeatureUnavailable,
    )
    from pisupervisor.errors import (
        IsolationError as IsolationError,
    )
    from pisupervisor.errors import (
        IsolatorClosed as IsolatorClosed,
    )
    from pisupervisor.errors import (
        LaunchError as LaunchError,
    )
    from pisupervisor.errors import (
        MemoryLimitExceeded as MemoryLimitExceeded,
    )
    from pisupervisor.errors import (
        OptionsError as OptionsError,
    )
    from pisupervisor.errors import (
        OutputLimitExceeded as OutputLimitExceeded,
    )
    from pisupervisor.errors import (
        PidsLimitExceeded as PidsLimitExceeded,
    )
    from pisupervisor.errors import (
        ProfileError as ProfileError,
    )
    from pisupervisor.errors import (
        ProtocolError as ProtocolError,
    )
    from pisupervisor.errors import (
        RemoteError as RemoteError,
    )
    from pisupervisor.errors import (
        RestartLimitReached as RestartLimitReached,
    )
    from pisupervisor.errors import (
        SerializationError as SerializationError,
    )
    from pisupervisor.errors import (
        SyscallViolation as SyscallViolation,
    )
    from pisupervisor.errors import (
        TargetNotFound as TargetNotFound,
    )
    from pisupervisor.futures import CallCancelled as CallCancelled
    from pisupervisor.futures import IsolationFuture as IsolationFuture
    from pisupervisor.isolator import ProcessIsolator as ProcessIsolator
    from pisupervisor.isolator import Template as Template
    from pisupervisor.launch.seccomp import SeccompProfile as SeccompProfile
    from pisupervisor.limits.cpuset import CpuSet as CpuSet
    from pisupervisor.options import (
        Filesystem as Filesystem,
    )
    from pisupervisor.options import (
        IoLimit as IoLimit,
    )
    from pisupervisor.options import (
        IsolationOptions as IsolationOptions,
    )
    from pisupervisor.options import (
        Limits as Limits,
    )
    from pisupervisor.options import (
        RestartPolicy as RestartPolicy,
    )
    from pisupervisor.options import (
        Security as Security,
    )
    from pisupervisor.results import (
        Applied as Applied,
    )
    from pisupervisor.results import (
        CallResult as CallResult,
    )
    from pisupervisor.results import (
        ExitInfo as ExitInfo,
    )
    from pisupervisor.results import (
        ExitReason as ExitReason,
    )
    from pisupervisor.results import (
        Usage as Usage,
    )

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "CallError", "CallTimeout", "ChildTerminated", "CompileError", "CpuLimitExceeded", "FeatureUnavailable",
        "IsolationError", "IsolatorClosed", "LaunchError", "MemoryLimitExceeded", "OptionsError", "OutputLimitExceeded",
        "PidsLimitExceeded", "ProfileError", "ProtocolError", "RemoteError", "RestartLimitReached",
        "SerializationError", "SyscallViolation", "TargetNotFound",
    ),
    "futures": ("CallCancelled", "IsolationFuture"),
    "isolator": ("ProcessIsolator", "Template"),
    "launch.seccomp": ("SeccompProfile",),
    "limits.cpuset": ("CpuSet",),
    "options": ("Filesystem", "IoLimit", "IsolationOptions", "Limits", "RestartPolicy", "Security"),
    "results": ("Applied", "CallResult", "ExitInfo", "ExitReason", "Usage"),
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
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
