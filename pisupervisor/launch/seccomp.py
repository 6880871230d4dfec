"""Seccomp profiles: OCI-format JSON in, the bytes of a BPF program out. The child only loads bytes.

A profile decides in this order, whatever the order of its rules: denials with conditions on arguments, allowances,
other denials, ``defaultAction``. So "allow socket() for these families" plus "socket() answers EAFNOSUPPORT" says what
it seems to say, and a denial is never lost beside an allowance of the same call.

Always, whatever a profile says: a foreign architecture and the x32 range are killed, numbers newer than our table and
clone3 (a filter cannot see its flags) answer ENOSYS, and no listener can be attached to a filter.

This module is on the path of every first launch: it imports nothing but what a cached program needs.
"""

from __future__ import annotations

import os
import stat

from pisupervisor.checks import absolute
from pisupervisor.errors import ProfileError
from pisupervisor.launch import seccomp_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

    from pisupervisor.launch.seccomp_rules import Flaw

PACKAGED = ("default", "strict", "permissive")
#: what a launch does that no profile of ours lets through (clone3 is for cgroups, of which a child has none to give)
NESTING = (
    "chroot", "clone", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "mount",
    "mount_setattr", "open_tree", "move_mount", "pivot_root", "seccomp", "setdomainname", "sethostname", "setns",
    "umount2", "unshare",
)  # fmt: skip

_MAX_SOURCE = 1 << 20  # Docker's own profile has 17 KB; what is larger than this is no profile
_FORMAT = b"7"  # raise it whenever the same profile shall give another program
_LIBSECCOMP = ("/usr/lib/{0}-linux-gnu/libseccomp.so.2", "/usr/lib64/libseccomp.so.2", "/usr/lib/libseccomp.so.2")


class SeccompProfile:
    """A checked, immutable profile. ``name`` is for messages, ``source`` its JSON text as bytes, ``file`` where it was
    read from (None for a dict). Raises ProfileError for anything that is not a profile.
    """

    __slots__ = ("file", "name", "source")

    name: str
    source: bytes
    file: str | None

    def __init__(self, source: bytes, name: str, file: str | None = None) -> None:
        for key, value in (("source", source), ("name", name), ("file", file)):
            object.__setattr__(self, key, value)
        if not isinstance(source, bytes):
            raise ProfileError(f"expected a profile's JSON text as bytes, not {source!r}"[:300])
        from pisupervisor.launch.seccomp_rules import Flaw, parse_profile

        try:
            parse_profile(source)
        except Flaw as flaw:
            self._refuse(flaw)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SeccompProfile:
        """The profile in a JSON file, such as Docker's or Podman's own. Raises ProfileError with file and line."""
        file = _absolute(path, "a path")
        return cls(_read_source(file), os.path.basename(file), file)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], name: str = "<dict>") -> SeccompProfile:
        """The profile in a mapping of the same form as the JSON. Raises ProfileError."""
        import json

        try:
            source = json.dumps(dict(mapping), default=dict).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ProfileError(f"a profile is made of dicts, lists, strings and numbers: {error}", file=name) from None
        return cls(source, name)

    def compile(self, watch: str | None = None) -> bytes:
        """The program as raw ``struct sock_filter`` bytes, compiled now; ``watch``: see ``Security``. Raises ProfileError,
        FeatureUnavailable.
        """
        from pisupervisor.launch.seccomp_compile import compile_rules
        from pisupervisor.launch.seccomp_rules import Flaw, parse_profile

        try:
            return compile_rules(parse_profile(self.source), watch=watch)
        except Flaw as flaw:
            self._refuse(flaw)

    def _refuse(self, flaw: Flaw) -> NoReturn:
        line = flaw.line_in(self.source) if self.file else None
        raise ProfileError(flaw.message, file=self.file or self.name, line=line) from None

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"SeccompProfile is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"SeccompProfile is immutable; cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeccompProfile) and (self.name, self.source) == (other.name, other.source)

    def __hash__(self) -> int:
        return hash((self.name, self.source))

    def __reduce__(self) -> tuple[Any, ...]:
        return SeccompProfile, (self.source, self.name, self.file)

    def __repr__(self) -> str:
        return f"SeccompProfile({self.name!r})"


def load_profile(profile: str | os.PathLike[str] | SeccompProfile) -> SeccompProfile:
    """The checked profile of that name, at that path, or itself. Raises ProfileError."""
    if isinstance(profile, SeccompProfile):
        return profile
    file = _path_of(profile)
    return SeccompProfile(_read_source(file), os.path.basename(file), file)


def for_nesting(profile: SeccompProfile) -> SeccompProfile:
    """The same, and what makes namespaces and mounts is let through. A filter inside a filter can only take away."""
    import json

    mapping = json.loads(profile.source)
    kept = []
    for rule in mapping.get("syscalls") or ():
        names = [name for name in rule.get("names") or [rule["name"]] if name not in NESTING]
        if names:
            kept.append({**{key: value for key, value in rule.items() if key != "name"}, "names": names})
    mapping["syscalls"] = [*kept, {"names": list(NESTING), "action": "SCMP_ACT_ALLOW"}]
    return SeccompProfile.from_dict(mapping, f"{profile.name} with nesting")


def is_listened_to(program: bytes) -> bool:
    """Whether the program hands calls over to a listener: one of its instructions returns SECCOMP_RET_USER_NOTIF."""
    instructions = (program[at : at + 8] for at in range(0, len(program), 8))
    return any(code[:2] == b"\x06\0" and code[6:] == b"\xc0\x7f" for code in instructions)


def compile_profile(profile: str | os.PathLike[str] | SeccompProfile, *, cache_dir: str | None = None) -> bytes:
    """The BPF program of a profile as raw ``struct sock_filter`` bytes, from the cache when it is there.

    ``profile`` is "default", "strict", "permissive", a path or a SeccompProfile; ``cache_dir`` replaces the user's
    cache folder. Raises ProfileError (file and line) for a bad profile, FeatureUnavailable without libseccomp.
    """
    if isinstance(profile, SeccompProfile):
        name, file, source = profile.name, profile.file, profile.source
    else:
        file = _path_of(profile)
        name, source = os.path.basename(file), _read_source(file)
    key = _cache_key(source)
    program = seccomp_cache.load(key, cache_dir)
    if program is None:
        program = SeccompProfile(source, name, file).compile()
        seccomp_cache.store(key, program, cache_dir)
    return program


def _path_of(profile: object) -> str:
    if isinstance(profile, str) and profile in PACKAGED:
        return packaged_path(profile)
    return _absolute(profile, "a name, a path or a SeccompProfile")


def _absolute(path: object, expected: str) -> str:
    named = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(named, str):
        raise ProfileError(f"expected {expected}, not {path!r}"[:300])
    return absolute(named)


def packaged_path(name: str) -> str:
    """Where a profile of ours lies: in the installed package, else at the top of the checkout."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for folder in (package, os.path.dirname(package)):
        path = os.path.join(folder, "seccomp_profiles", f"{name}.json")
        if os.path.exists(path):
            return path
    raise ProfileError(f"the packaged profile {name!r} is missing; install pisupervisor again", file=path)


def _read_source(file: str) -> bytes:
    """All bytes of a regular file. O_NONBLOCK, so that a FIFO is an error and not a hang."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        known = ", ".join(PACKAGED)
        why = error.strerror if isinstance(error, OSError) else error
        raise ProfileError(f"cannot read the profile: {why} (packaged profiles: {known})", file=file) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProfileError("cannot read the profile: not a regular file", file=file)
        source = os.read(fd, _MAX_SOURCE + 1)
    except OSError as error:
        raise ProfileError(f"cannot read the profile: {error.strerror}", file=file) from None
    finally:
        os.close(fd)
    if len(source) > _MAX_SOURCE:
        raise ProfileError(f"cannot read the profile: larger than {_MAX_SOURCE} bytes", file=file)
    return source


def _cache_key(source: bytes) -> str:
    """Everything the program depends on; the kernel's release only where a rule asks for it."""
    host = os.uname()
    release = host.release if b"minKernel" in source else ""
    parts = (_FORMAT, host.machine.encode(), release.encode(), libseccomp_version(host.machine).encode(), source)
    return seccomp_cache.sha256(b"\0".join(parts)).hex()


def libseccomp_version(machine: str) -> str:
    """The name behind libseccomp.so.2, such as ``libseccomp.so.2.5.4``; "" where it lies elsewhere."""
    for path in _LIBSECCOMP:
        try:
            return os.path.basename(os.readlink(path.format(machine)))
        except OSError:
            continue
    return ""
