"""A host application that is about to be killed: ``python application.py STATE MARK``. Says on stdout when it is ready.

MARK is in the environment of all that it starts, and in no other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pisupervisor import IsolationOptions, ProcessIsolator, Security, Template
from pisupervisor.launch import templates
from pisupervisor.launch.zygote import Zygote

DYING = Path(__file__).with_name("dying.py")
MARKED: dict[str, Any] = {"environment": {"MARK": sys.argv[2]}}
KEPT: list[object] = []
UIDS = 0  # the first of the outer ids that its children get


def create(**more: Any) -> ProcessIsolator:
    global UIDS
    made = ProcessIsolator.create(**MARKED, **more)
    KEPT.append(made)
    ids = made._keeper.template.ids
    UIDS = UIDS or (ids.base if ids is not None else 0)
    return made


def zygote_of(made: ProcessIsolator) -> int:
    return made._keeper.template.zygote.pid


def idle() -> None:
    create().run_source("1")


def in_a_call() -> None:
    made = create()
    KEPT.append(made.submit_call(made.invoke_method, DYING, "wait_with_family"))
    while made.state != "busy" or len(made.pids()) < 5:
        time.sleep(0.01)


def with_a_fork() -> None:
    in_a_call()
    fork()


def paused() -> None:
    in_a_call()
    KEPT[0].pause()  # type: ignore[attr-defined]


def paused_with_a_fork() -> None:
    with_a_fork()
    KEPT[0].pause()  # type: ignore[attr-defined]


def with_a_spare_child() -> None:
    KEPT.append(Template(**MARKED))
    create()
    ProcessIsolator.create(**MARKED).close()


def several() -> None:
    for number in range(4):
        made = create(security=Security(hostname=f"host{number % 2}"))
        made.submit_call(made.invoke_method, DYING, "wait_deaf")


def with_the_zygote_stopped() -> None:
    in_a_call()
    os.kill(zygote_of(KEPT[0]), signal.SIGSTOP)  # type: ignore[arg-type]


def paused_with_the_zygote_stopped() -> None:
    paused()
    os.kill(zygote_of(KEPT[0]), signal.SIGSTOP)  # type: ignore[arg-type]


def in_a_launch_with_the_zygote_stopped() -> None:
    with_the_zygote_stopped()
    threading.Thread(target=create, daemon=True).start()
    time.sleep(0.05)


def closing_with_the_zygote_stopped() -> None:
    with_the_zygote_stopped()
    threading.Thread(target=KEPT[0].close, daemon=True).start()  # type: ignore[attr-defined]
    time.sleep(0.01)


def fork() -> None:
    """A daemon of the application keeps every descriptor open."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)


def with_the_zygote_stopped_and_a_fork() -> None:
    """Made in a thread that has ended since: that is what a death signal is sent for as well."""
    maker = threading.Thread(target=in_a_call)
    maker.start()
    maker.join()
    fork()
    os.kill(zygote_of(KEPT[0]), signal.SIGSTOP)  # type: ignore[arg-type]


def with_a_zygote_that_has_no_plan_yet_and_a_fork() -> None:
    """Before the zygote is told what to be; the fork keeps its socket open."""
    KEPT.append(Zygote("/usr/bin/python3"))
    fork()


def with_a_zygote_stopped_at_its_start() -> None:
    """Before it has run a line of ours."""
    zygote = Zygote("/usr/bin/python3")
    os.kill(zygote.pid, signal.SIGSTOP)
    KEPT.append(zygote)


def with_a_zygote_stopped_without_a_plan_and_a_fork() -> None:
    with_a_zygote_that_has_no_plan_yet_and_a_fork()
    time.sleep(0.3)  # its interpreter has started
    os.kill(KEPT[0].pid, signal.SIGSTOP)  # type: ignore[attr-defined]


def slow() -> None:
    """In a launch that takes its time, at the step that the third argument names, in that package."""
    templates.PACKAGE = sys.argv[4]
    threading.Thread(
        target=create, kwargs={"security": Security(hostname=f"slow at {sys.argv[3]}")}, daemon=True
    ).start()
    time.sleep(0.2)


def launching() -> None:
    """Again and again, without an end; ready at once."""
    say_ready()
    while True:
        create().run_source("1")
        if len(KEPT) > 3:
            KEPT.pop(0).close()  # type: ignore[attr-defined]


def without() -> None:
    """In a call, on a child that lacks the steps that are named further."""
    made = ProcessIsolator(IsolationOptions(**MARKED), without=tuple(sys.argv[3:]))
    made._start()
    KEPT.append(made)
    KEPT.append(made.submit_call(made.invoke_method, DYING, "wait_deaf"))
    while made.state != "busy":
        time.sleep(0.01)
    time.sleep(0.05)


def say_ready() -> None:
    print(json.dumps({"uids": UIDS}), flush=True)


if __name__ == "__main__":
    state: Callable[[], None] = globals()[sys.argv[1]]
    state()
    say_ready()
    time.sleep(20)
