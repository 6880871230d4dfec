"""The launch as a list of steps, against a kernel that only writes down what it is asked."""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

import pytest
from fake_kernel import NEW_FD, FakeOs, Recorder
from test_plan import CHILD

from pihost import confine, root, syscalls
from pihost.confine import BEFORE_FORK, PAYLOAD, Fds
from pihost.plan import ChildPlan
from pihost.root import StepFailed

FDS = Fds(link=5, status=7, go=8, host=11, zygote=12, output=[13, 14, 15], cgroups=[20, 21])
NAMES = [name for name, _ in BEFORE_FORK + PAYLOAD]


def plan(**changes: Any) -> ChildPlan:
    return ChildPlan(**{**CHILD, **changes})


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch, Recorder())


def install(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> Recorder:
    fake = FakeOs(recorder)
    for name in ("os", "resource"):
        monkeypatch.setattr(confine, name, fake)
    monkeypatch.setattr(root, "os", fake)
    monkeypatch.setattr(confine.select, "poll", lambda: QuietPoll())
    return recorder


class QuietPoll:
    """Neither host nor zygote has ended."""

    def register(self, fd: int, events: int) -> None: ...

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        return []


def acts(steps: Any, recorder: Recorder, a_plan: ChildPlan | None = None) -> list[str]:
    confine.run(steps, a_plan or plan(), FDS, recorder)
    return recorder.names()


def test_the_fake_has_the_names_and_parameters_of_the_real_one() -> None:
    real = {name: entry for name, entry in vars(syscalls).items() if inspect.isfunction(entry) and name[0] != "_"}
    fake = {name: getattr(Recorder(), name) for name in real}
    assert all(inspect.signature(fake[name]) == inspect.signature(real[name]) for name in real)
    extra = set(dir(Recorder)) - set(real) - {"names", "note"}
    assert not [name for name in extra if not name.startswith("__")]


def test_the_order_is_the_documented_one() -> None:
    assert [name for name, _ in BEFORE_FORK] == [
        "close fds", "join cgroup", "id maps", "cgroup namespace", "ids", "death signal", "mounts", "mount table",
        "time namespace", "hostname", "stdio", "rlimits", "bounding set", "capabilities", "no_new_privs", "landlock",
    ]  # fmt: skip
    assert [name for name, _ in PAYLOAD] == ["session", "payload fds"]


def test_what_the_kernel_is_asked_in_that_order(kernel: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = acts(BEFORE_FORK, kernel)
    order = [
        "close_range", "write", "read", "unshare", "set_ids", "set_dumpable", "set_death_signal", "mount", "open_tree",
        "chroot", "unshare", "sethostname", "dup2", "setrlimit", "drop_bounding_set", "lock_securebits", "drop_capabilities",
        "set_no_new_privs", "landlock_ruleset", "landlock_allow", "landlock_restrict",
    ]  # fmt: skip
    rest = iter(asked)
    assert [name for name in order if name in rest] == order


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("join cgroup", "cgroup namespace"),
        ("ids", "mounts"),
        ("ids", "death signal"),
        ("bounding set", "capabilities"),
        ("mounts", "landlock"),
        ("mounts", "mount table"),
        ("mount table", "stdio"),  # else the path of /dev/null in the old tree would be the child's to read
        ("mount table", "landlock"),
        ("mounts", "time namespace"),
        ("no_new_privs", "landlock"),
        ("close fds", "join cgroup"),
    ],
)
def test_the_reasons_given_for_the_order(before: str, after: str) -> None:
    assert NAMES.index(before) < NAMES.index(after)


def test_all_but_ours_is_closed(kernel: Recorder) -> None:
    acts(BEFORE_FORK[:1], kernel)
    ranges = [call[1:] for call in kernel.calls]
    kept = [fd for fd in range(3, 100) if not any(low <= fd <= high for low, high in ranges)]
    assert kept == FDS.all() == [5, 7, 8, 11, 12, 13, 14, 15, 20, 21]


def test_the_child_joins_each_group_itself(kernel: Recorder) -> None:
    acts(BEFORE_FORK[1:2], kernel)
    assert kernel.calls == [("write", 20, b"0"), ("write", 21, b"0"), ("close", 20), ("close", 21)]


def test_the_payload_keeps_one_fd(kernel: Recorder) -> None:
    FDS.root = [40]
    acts(PAYLOAD, kernel)
    assert kernel.calls == [
        ("setsid",), ("set_dumpable", True), ("dup", 5), ("close", 5), ("close", 7), ("close", 11), ("close", 12),
        ("close", 13), ("close", 14), ("close", 40), ("dup2", NEW_FD, confine.LINK, False), ("close", NEW_FD),
    ]  # fmt: skip


def test_ids_change_once_and_stay_visible(kernel: Recorder) -> None:
    confine.run(BEFORE_FORK[4:5], plan(uid=1234, gid=55), FDS, kernel)
    assert kernel.calls == [("set_ids", 1234, 55), ("set_dumpable", True)]


def test_landlock_handles_what_the_plan_says(kernel: Recorder) -> None:
    rules = [["/", 13], ["/tmp", 99]]
    acts(BEFORE_FORK[-1:], kernel, plan(landlock=rules, landlock_abi=5, landlock_fs=7, landlock_net=0))
    assert kernel.calls[0] == ("landlock_ruleset", 5, 7, 0, 3)
    assert kernel.calls[1:3] == [("landlock_allow", NEW_FD, "/", 13), ("landlock_allow", NEW_FD, "/tmp", 99)]


@pytest.mark.parametrize(("abi", "quiet"), [(6, False), (7, True), (9, True)])
def test_what_landlock_denies_is_not_audited_where_it_would_be(kernel: Recorder, abi: int, quiet: bool) -> None:
    """From Linux 6.15 on (version 7): a child could fill the machine's audit log."""
    acts(BEFORE_FORK[-1:], kernel, plan(landlock_abi=abi))
    assert ("landlock_restrict", NEW_FD, quiet) in kernel.calls


def test_without_landlock_nothing_is_asked(kernel: Recorder) -> None:
    assert acts(BEFORE_FORK[-1:], kernel, plan(landlock_abi=0)) == []


def test_the_priority_is_lowered_only_when_asked(kernel: Recorder) -> None:
    assert "setpriority" not in acts(BEFORE_FORK, kernel)
    assert "setpriority" in acts(BEFORE_FORK, kernel, plan(nice=5))


REFUSED = {
    "write": "join cgroup", "read": "id maps", "unshare": "cgroup namespace", "set_ids": "ids",
    "set_death_signal": "death signal", "mount": "mounts", "chroot": "mount table", "sethostname": "hostname", "dup2": "stdio",
    "setrlimit": "rlimits", "drop_bounding_set": "bounding set", "drop_capabilities": "capabilities",
    "set_no_new_privs": "no_new_privs", "landlock_restrict": "landlock",
}  # fmt: skip


@pytest.mark.parametrize(("call", "step"), REFUSED.items())
def test_a_refused_step_is_named_and_the_rest_not_done(call: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = install(monkeypatch, Recorder(failing=call))
    with pytest.raises(StepFailed) as caught:
        confine.run(BEFORE_FORK, plan(), FDS, recorder)
    assert (caught.value.step, caught.value.errno) == (step, 1)
    assert caught.value.report() == {"failed": step, "errno": 1, "detail": f"{call}: Operation not permitted"}
    assert recorder.names()[-1] == call


def test_a_host_that_is_gone_ends_the_launch(kernel: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuietPoll, "poll", lambda self, timeout: [(11, 1)])
    with pytest.raises(StepFailed, match="the host or the zygote is gone"):
        confine.run(BEFORE_FORK, plan(), FDS, kernel)
    assert "mount" not in kernel.names()


@pytest.mark.parametrize("name", NAMES)
def test_an_ablation_leaves_out_exactly_that_step(name: str) -> None:
    done: list[str] = []
    steps = [(step, lambda *_, step=step: done.append(step)) for step in NAMES]
    confine.run(steps, plan(without=[name]), FDS, Recorder())
    assert done == [step for step in NAMES if step != name]


def test_each_step_is_logged_before_it_is_done(kernel: Recorder) -> None:
    lines: list[str] = []
    confine.run(BEFORE_FORK, plan(), FDS, kernel, log=lines.append)
    assert lines == [f"step {name}" for name, _ in BEFORE_FORK]


def test_step_names_are_unique_and_readable() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(re.fullmatch(r"[a-z_ ]+", name) for name in NAMES)


def test_a_real_refusal_names_the_call() -> None:
    for nothing in (b"", b"1234567", bytes(8 * 4097), bytes(8 * 65537)):
        with pytest.raises(OSError, match="Invalid argument") as caught:
            syscalls.load_seccomp(syscalls.seccomp_program(nothing))
        assert caught.value.filename == "seccomp"
    with pytest.raises(OSError) as caught:
        syscalls.pivot_root(os.devnull, os.devnull)
    assert caught.value.filename == "pivot_root"
