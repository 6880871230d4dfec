"""Options and features to plans: what the zygote is, and what each child is. Policy lives here as data; what is seen inside is
written in ``root``, what Landlock lets through in ``landlock``.
"""

from __future__ import annotations

from pihost import syscalls
from pihost.plan import ChildPlan, TemplatePlan
from pisupervisor.launch import landlock
from pisupervisor.launch.features import NAMESPACE_LINKS, Features
from pisupervisor.launch.interpreter import Interpreter
from pisupervisor.launch.root import OURS, child_mounts, import_paths, template_root
from pisupervisor.options import IsolationOptions

#: namespaces entered by clone3 at once; cgroup and time are entered later (see pihost.confine), the network's is made
#: ahead by the zygote
CLONE_FLAGS = {
    "user": syscalls.CLONE_NEWUSER, "mount": syscalls.CLONE_NEWNS, "pid": syscalls.CLONE_NEWPID,
    "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS,
}  # fmt: skip
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
#: libraries that start threads when imported would make the zygote unfit to fork
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_LOG_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}


def template_plan(
    options: IsolationOptions, features: Features, interpreter: Interpreter, *, package: str, cloudpickle: str | None,
    program: bytes, host_environment: dict[str, str], listen: bool = False, subordinate: bool = False,
) -> TemplatePlan:  # fmt: skip
    """What the zygote for these options is. ``package`` is pihost's folder, ``cloudpickle`` that package's, or None."""
    return TemplatePlan(
        root=template_root(options, interpreter, package, cloudpickle),
        own_ids=[] if features.root else [features.uid, features.gid, *([1] if subordinate else [])],
        interpreter=interpreter.inside(interpreter.executable),
        package=f"{OURS}/pihost",
        sys_path=[
            interpreter.inside(interpreter.stdlib),
            interpreter.inside(interpreter.stdlib) + "/lib-dynload",
            OURS,
        ],
        import_paths=import_paths(options, interpreter),
        preload=list(options.preload),
        environment=_environment(options, interpreter, host_environment),
        seccomp=program,
        listen=listen,
        network=options.network,
        log_level=_LOG_LEVELS[options.log_level or "WARNING"],
    )


def child_plan(
    options: IsolationOptions, features: Features, *, interpreter: Interpreter, outer_id: int | None,
    rlimits: list[tuple[int, int, int]], cgroups: int, clone_flags: int = 0, output: int = 1,
    without: tuple[str, ...] = (),
) -> ChildPlan:  # fmt: skip
    """What one child is. ``outer_id`` is its own id outside when the host is root, None for the user's single one;
    ``clone_flags`` are those of its group.
    """
    user, outer = options.security.user, 0 if outer_id is None else outer_id
    absent = {f"{name} namespace" for name, link in NAMESPACE_LINKS.items() if link not in features.namespaces}
    left_out = {*without, *absent, *(("mount table",) if options.security.nesting else ())}
    flags = clone_flags
    for name, flag in CLONE_FLAGS.items():
        flags |= 0 if f"{name} namespace" in left_out else flag
    return ChildPlan(
        namespaces=flags, uid_map=f"{user} {outer} 1", gid_map=f"{user} {outer} 1", uid=user, gid=user,
        hostname=options.security.hostname,
        mounts=child_mounts(options, interpreter),
        rlimits=[list(entry) for entry in rlimits], nice=options.limits.nice or 0,
        output=output, cgroups=cgroups,
        limits={
            "result": int(options.limits.result), "pickle": int(options.results == "pickle"),
            "modules": int(bool(options.modules)), "concurrency": options.max_concurrency, "lines": int(output == 2),
        },
        debug=options.debug, without=sorted(left_out), **landlock.ruleset(options, features.landlock_abi),
    )  # fmt: skip


def _environment(options: IsolationOptions, interpreter: Interpreter, host: dict[str, str]) -> dict[str, str]:
    variables = dict(_ENVIRONMENT)
    if options.preload:
        variables.update(_ONE_THREAD)
    library_path = interpreter.library_path()
    if library_path:
        variables["LD_LIBRARY_PATH"] = library_path
    variables.update((name, host[name]) for name in options.inherit_environment if name in host)
    variables.update(options.environment)
    return variables
