"""What a host must be able to do for these options. What cannot hold is an error with its remedy, unless ``degrade`` has it."""

from __future__ import annotations

from pisupervisor.errors import FeatureUnavailable
from pisupervisor.launch.features import NAMESPACE_LINKS, Features
from pisupervisor.limits.cgroups import CgroupHost, Missing, missing, wanted_limits
from pisupervisor.limits.rlimits import at_least
from pisupervisor.options import IsolationOptions


def check_kernel(options: IsolationOptions, features: Features) -> None:
    """Raises FeatureUnavailable for the first of the kernel's protections that was asked for and cannot hold."""
    for name, link in NAMESPACE_LINKS.items():
        wanted = name not in options.degrade and not (name == "network" and options.network == "host")
        if wanted and link not in features.namespaces:
            raise FeatureUnavailable(
                f"this kernel ({features.kernel}) has no {name} namespaces", feature=name,
                remedy=f"run a kernel with them (time: 5.6), or say degrade=({name!r},)",
            )  # fmt: skip
    if options.filesystem.overlay and not at_least(features.kernel, 5, 11):
        raise FeatureUnavailable(
            f"this kernel ({features.kernel}) lets no child mount an overlay of its own", feature="overlay",
            remedy="run Linux 5.11 or newer, or leave Filesystem(overlay=...) out",
        )  # fmt: skip
    if options.security.landlock and not features.landlock_abi and "landlock" not in options.degrade:
        raise _no_landlock(features.kernel)


def _no_landlock(kernel: str) -> FeatureUnavailable:
    from pisupervisor.launch import userns  # to explain a failure

    boot = "boot with lsm=landlock,... on Linux 5.13 or newer, or say degrade=('landlock',)"
    filtered = userns.situation().filtered
    return FeatureUnavailable(
        f"this kernel ({kernel}) has no Landlock, or it is not switched on{', or a filter refuses it' if filtered else ''}",
        feature="landlock", remedy=f"{userns.FILTER}; else {boot}" if filtered else boot,
    )  # fmt: skip


def lacking_limits(options: IsolationOptions, host: CgroupHost) -> dict[str, str]:
    """Why limits have no group to hold them, by name. Raises FeatureUnavailable unless all of those are in ``degrade``."""
    lacking = missing(host, wanted_limits(options.limits))
    refused = [entry for entry in lacking if entry.feature not in options.degrade]
    if refused:
        reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in _by_cause(refused).items())
        names = tuple(dict.fromkeys(entry.feature for entry in refused))
        fixes = "\n          ".join(dict.fromkeys(entry.fix for entry in refused))
        raise FeatureUnavailable(
            f"limits that cannot be enforced here: {reasons}", feature=refused[0].feature,
            remedy=f"{fixes}\n          or accept all of that: IsolationOptions(degrade={names!r})",
        )  # fmt: skip
    return {entry.feature: entry.why for entry in lacking}


def _by_cause(refused: list[Missing]) -> dict[str, list[str]]:
    causes: dict[str, list[str]] = {}
    for entry in refused:
        causes.setdefault(entry.why, []).append(entry.feature)
    return causes
