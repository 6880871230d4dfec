"""The launch plan: plain data from the host, checked on arrival. Policy is decided on the host; nothing is decided here.

Two parts: a ``TemplatePlan`` for one zygote (its root, interpreter, preloaded modules, filter) and a ``ChildPlan`` for
each child. They travel as marshal, version 2: built into every interpreter (no import before the walls are up), the
same bytes since Python 2.4, and only ever read by the zygote, which trusts its host.
"""

from __future__ import annotations

import marshal

if False:  # typing costs 5 ms, and only a type checker reads this
    from typing import Any, TypeVar

    _AnyPlan = TypeVar("_AnyPlan", bound="Plan")

_TEXTS = (list, str)  # a list whose items are text


class PlanError(ValueError):
    """The plan is not what this version of pihost understands."""


class Plan:
    """Base of both plans: keyword fields, each with its type; ``(list, kind)`` means a list of that kind."""

    FIELDS: dict[str, object] = {}

    if False:  # what FIELDS says is checked at run time, for every plan that arrives

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **values: object) -> None:
        if values.keys() != self.FIELDS.keys():
            odd = sorted(values.keys() ^ self.FIELDS.keys())
            raise PlanError(f"{type(self).__name__}: missing or unknown fields: {', '.join(odd)}")
        for name, kind in self.FIELDS.items():
            if not _fits(values[name], kind):
                raise PlanError(f"{type(self).__name__}.{name}: {values[name]!r}")
            setattr(self, name, values[name])

    def dump(self) -> bytes:
        return marshal.dumps({name: getattr(self, name) for name in self.FIELDS}, 2)

    @classmethod
    def load(cls: type[_AnyPlan], data: bytes) -> _AnyPlan:
        values = marshal.loads(data)  # noqa: S302  from our own host only
        if not isinstance(values, dict):
            raise PlanError(f"{cls.__name__}: not a mapping")
        return cls(**values)


def _fits(value: object, kind: object) -> bool:
    if isinstance(kind, tuple) and kind and kind[0] is list:
        return isinstance(value, list) and all(isinstance(item, kind[1]) for item in value)
    return isinstance(value, kind)  # type: ignore[arg-type]


class TemplatePlan(Plan):
    """What one zygote is: everything that its children share.

    root         mounts in order, each ``[kind, *arguments]`` (see ``mounts.py``)
    own_ids      ``[uid, gid]`` of an ordinary user, who needs a user namespace to mount at all; empty for root. A third: wait
                 until the host has mapped subordinate ids, too
    interpreter  path inside the new root
    package      folder of pihost inside the new root
    sys_path     import path of the zygote: the standard library and our own package
    import_paths what a payload may import from as well; the zygote, which is privileged, only while it preloads
    preload      modules imported before the first child
    environment  the whole environment
    seccomp      filter program, empty for none
    listen       whether the host answers for calls that the filter hands to it
    network      "none", "loopback" or "host"
    log_level    10, 20, 30, 40 as in logging
    """

    FIELDS = {
        "root": (list, list), "own_ids": (list, int), "interpreter": str, "package": str, "sys_path": _TEXTS,
        "import_paths": _TEXTS, "preload": _TEXTS, "environment": dict, "seccomp": bytes, "listen": bool,
        "network": str, "log_level": int,
    }  # fmt: skip


class ChildPlan(Plan):
    """What one child is.

    namespaces   flags for clone3; NEWCGROUP and NEWTIME are entered later, see ``confine``. With INTO_CGROUP the first fd
                 of ``cgroups`` is the directory of the v2 group to begin in
    uid_map      lines for /proc/PID/uid_map, as the zygote's user namespace sees it; gid_map likewise
    uid, gid     ids inside
    hostname     what uname says inside
    mounts       mounts of this child alone: scratch, proc
    rlimits      ``[resource, soft, hard]``
    nice         0..19
    landlock     ``[path, access]`` rules; with ``landlock_abi`` 0 there is no Landlock
    landlock_fs, landlock_net, landlock_scopes   what the ruleset handles
    output       how many fds follow for what it writes: 2 are pipes for stdout and stderr, which the host reads; 3 are a
                 file in which PID 1 keeps the end of stderr, and the two ends of the pipe by which it learns of that
    cgroups      how many fds of groups follow after that: ``tasks`` files, to be joined by writing ``0``
    limits       what the inside must know: ``result`` bytes, ``pickle`` allowed, ``modules`` can be asked of the host,
                 ``concurrency`` of calls
    debug        stop before user code
    without      names of steps left out: only the ablation tests say any
    """

    FIELDS = {
        "namespaces": int, "uid_map": str, "gid_map": str, "uid": int, "gid": int, "hostname": str,
        "mounts": (list, list), "rlimits": (list, list), "nice": int,
        "landlock": (list, list), "landlock_abi": int, "landlock_fs": int, "landlock_net": int, "landlock_scopes": int,
        "output": int, "cgroups": int, "limits": dict, "debug": bool, "without": _TEXTS,
    }  # fmt: skip
