"""``python -I -S <this folder> root|zygote CONTROL_FD HOST_PIDFD``: first builds the root, then becomes the zygote in it.

Two stages with an exec between them, so that the interpreter which forks children was started inside the private
root: its paths are right, and its memory holds nothing of the host.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    package = os.path.dirname(os.path.abspath(__file__))
    # -I <folder> puts the folder itself on the path, where our modules would shadow the standard library's.
    sys.path[0] = os.path.dirname(package)
    stage, control, host = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if stage == "root":
        enter_root(control, host)
    else:
        from pihost import zygote

        zygote.main(control, host)


def enter_root(control: int, host: int) -> None:
    """Read the template plan, build its root, and exec the interpreter that is inside it."""
    from pihost import root
    from pihost.jsontext import dump  # now: once the root is built, nothing of the host's can be imported any more
    from pihost.plan import PlanError, TemplatePlan

    data = os.read(control, 1 << 20)
    if not data:
        return  # the host thought better of it
    try:
        plan = TemplatePlan.load(data)
        root.build(plan)
    except PlanError as error:
        report(control, dump(root.StepFailed("plan", error).report()))
    except root.StepFailed as failure:
        report(control, dump(failure.report()))
    try:
        arguments = [plan.interpreter, "-I", "-S", plan.package, "zygote", str(control), str(host)]
        os.set_inheritable(control, True)
        os.set_inheritable(host, True)
        os.execve(plan.interpreter, arguments, plan.environment)  # noqa: S606
    except OSError as error:
        report(control, dump(root.StepFailed("interpreter", error).report()))


def report(control: int, failure: bytes) -> None:
    """Tell the host which step failed and end."""
    os.write(control, failure)
    os._exit(1)


if __name__ == "__main__":
    main()
