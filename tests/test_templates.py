"""Templates: one zygote for equal options, alive as long as somebody holds it, and a spare child for the next user."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import features
import pytest
from helpers import descendants, in_fork, nothing_left, parent_of, state_of, wait_until, zygote_of

from pisupervisor import (
    ChildTerminated,
    ExitReason,
    Filesystem,
    IsolationOptions,
    IsolatorClosed,
    LaunchError,
    Limits,
    OptionsError,
    ProcessIsolator,
    ProfileError,
    RestartPolicy,
    Security,
    Template,
)
from pisupervisor.launch import attest
from pisupervisor.launch.templates import template_key
from pisupervisor.link.arguments import dump_function

pytestmark = [pytest.mark.linux, pytest.mark.matrix]


def test_equal_options_share_a_zygote() -> None:
    with nothing_left(), ProcessIsolator.create() as one, ProcessIsolator.create() as two:
        assert zygote_of(one) == zygote_of(two)
        assert zygote_of(one) in descendants(os.getpid())


class _Vanishing(os.PathLike[str]):
    """The path of a file that is gone when one asks again."""

    def __init__(self, path: Path) -> None:
        self._path, self._asked = path, False

    def __fspath__(self) -> str:
        if self._asked:
            self._path.unlink(missing_ok=True)
        self._asked = True
        return str(self._path)


def test_a_profile_that_goes_while_equal_options_are_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    with nothing_left(), pytest.raises(ProfileError, match=r"profile\.json"):
        ProcessIsolator.create(security=Security(seccomp=_Vanishing(path)))


def test_the_last_user_ends_it() -> None:
    one, two = ProcessIsolator.create(), ProcessIsolator.create()
    zygote = zygote_of(one)
    one.close()
    assert state_of(zygote) in "RS"
    two.close()
    assert not os.path.exists(f"/proc/{zygote}")


def test_a_template_keeps_it_warm() -> None:
    with nothing_left():
        with Template() as template:
            with template.create() as isolator:
                zygote = zygote_of(isolator)
            with ProcessIsolator.create() as isolator:
                assert zygote_of(isolator) == zygote
            assert state_of(zygote) in "RS"
        assert not os.path.exists(f"/proc/{zygote}")
        template.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "loopback"}, {"environment": {"A": "1"}}, {"inherit_environment": ["PATH"]}, {"preload": ["json"]},
        {"import_paths": ["/usr/share"]}, {"filesystem": Filesystem(read_only=["/var"])}, {"log_level": "DEBUG"},
        {"security": Security(seccomp="strict")}, {"security": Security(user=7)}, {"security": Security(hostname="x")},
        {"security": Security(landlock=False)}, {"python": "/usr/bin/python3"}, {"degrade": ["time"]},
        {"tenant": "me"},
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_another_template(changes: dict[str, object]) -> None:
    assert template_key(IsolationOptions(**changes)) != template_key(IsolationOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": Limits(memory="1G")}, {"restart": RestartPolicy(mode="never")}, {"results": "pickle"},
        {"call_timeout": 5}, {"start_timeout": 5}, {"debug": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not(changes: dict[str, object]) -> None:
    assert template_key(IsolationOptions(**changes)) == template_key(IsolationOptions())  # type: ignore[arg-type]


def test_what_the_outside_world_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is inherited, and the contents of a profile, are part of what a zygote is."""
    options = IsolationOptions(inherit_environment=["SHARED"])
    before = template_key(options)
    monkeypatch.setenv("SHARED", "now set")
    assert template_key(options) != before
    path = tmp_path / "profile.json"
    path.write_text("{}")
    options = IsolationOptions(security=Security(seccomp=path))
    before = template_key(options)
    path.write_text("{ }")
    assert template_key(options) != before


def test_children_of_one_zygote_share_nothing() -> None:
    """parity: 54"""
    with ProcessIsolator.create() as one, ProcessIsolator.create() as two:
        one.run_source("import json; json.mine = 1; open('/tmp/file', 'w').write('x'); open('/dev/shm/file', 'w'); 0")
        assert two.run_source("import json, os; hasattr(json, 'mine'), os.listdir('/tmp'), os.listdir('/dev/shm')").value == (
            False, [], [],
        )  # fmt: skip
        seeds = [isolator.run_source("import random; random.random()").value for isolator in (one, two)]
        assert seeds[0] != seeds[1], "each child has a random state of its own"


def test_the_second_create_is_far_faster() -> None:
    """parity: 54"""
    cold = min(_seconds_to_create(IsolationOptions()) for _ in range(3))
    with Template() as template:
        _seconds_to_create(template.options)
        warm = min(_seconds_to_create(template.options) for _ in range(10))
    assert warm * 5 <= cold, f"cold {cold * 1e3:.1f} ms, warm {warm * 1e3:.1f} ms"


def _seconds_to_create(options: IsolationOptions) -> float:
    started = time.perf_counter()
    with ProcessIsolator.create(options):
        return time.perf_counter() - started


# --- the spare child ---------------------------------------------------------------------------------------------


def spare_of(template: Template) -> int:
    """How many processes wait in the template: PID 1 and payload of a spare child are two."""
    return len(descendants(zygote_under(template)))


def zygote_under(template: Template) -> int:
    assert template._template is not None
    return template._template.zygote.pid


def test_a_spare_child_waits_while_a_template_is_open() -> None:
    """From the first moment on, and again after a close."""
    with nothing_left(), Template() as template:
        for _ in range(3):
            assert wait_until(lambda: spare_of(template) == 2)
            [payload] = [pid for pid in descendants(zygote_under(template)) if parent_of(pid) != zygote_under(template)]
            with template.create() as isolator:
                assert isolator.pid == payload
                assert isolator.run_source("1").value == 1


def test_who_opens_one_after_the_other_finds_the_next_ready() -> None:
    """Without closing any: the zygote launches it as soon as nobody wants anything."""
    with nothing_left(), ProcessIsolator.create() as first, ProcessIsolator.create() as second:
        zygote = zygote_of(first)
        known = set(descendants(zygote))
        assert wait_until(lambda: len(set(descendants(zygote)) - known) == 2)
        with ProcessIsolator.create() as third:
            assert third.pid in set(descendants(zygote)) - known
            assert len({first.pid, second.pid, third.pid}) == 3


def test_who_does_not_wait_for_the_spare_gets_it_at_once() -> None:
    """It is still to be launched when it is wanted."""
    with nothing_left(), Template() as template:
        isolators = [template.create() for _ in range(6)]
        assert [isolator.run_source("6 * 7").value for isolator in isolators] == [42] * 6
        assert len({isolator.pid for isolator in isolators}) == 6
        for isolator in isolators:
            isolator.close()


def test_a_single_isolator_has_no_spare() -> None:
    with nothing_left(), ProcessIsolator.create() as only:
        only.restart()
        only.restart()
        time.sleep(0.1)
        assert len(descendants(zygote_of(only))) == 2


def test_there_is_one_at_the_most() -> None:
    with nothing_left(), Template() as template:
        isolators = [template.create() for _ in range(4)]
        for isolator in isolators:
            isolator.close()
        assert wait_until(lambda: spare_of(template) == 2)


def test_a_spare_for_other_options_is_not_handed_out() -> None:
    with nothing_left(), Template() as template:
        template.create().close()
        with ProcessIsolator.create(limits=Limits(memory="64M")) as isolator:
            assert isolator.applied["memory"].asked == 64 << 20


def test_a_spare_that_died() -> None:
    with nothing_left(), Template() as template:
        template.create().close()
        assert template._template is not None
        assert wait_until(lambda: spare_of(template) == 2)
        for pid in descendants(template._template.zygote.pid):
            with suppress(ProcessLookupError):  # PID 1 takes the other along
                os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: spare_of(template) == 0)
        with template.create() as isolator:
            assert isolator.run_source("1").value == 1


def test_a_spare_is_as_fresh_as_any(tmp_path: Path) -> None:
    with nothing_left(), Template() as template:
        template.create().close()
        time.sleep(0.05)
        with template.create() as isolator:
            assert isolator.run_source("import time; time.clock_gettime(time.CLOCK_MONOTONIC) < 30").value is True
            assert isolator.run_source("import os; os.listdir('/tmp')").value == []
            asked = {name: entry.holds for name, entry in isolator.applied.items() if entry.asked not in (None, False)}
            assert all(holds for name, holds in asked.items() if name not in isolator.options.degrade)


def test_a_child_that_is_debugged_is_never_a_spare() -> None:
    with nothing_left(), Template(debug=True) as template:
        isolator = template.create()
        isolator.close()
        assert spare_of(template) == 0


# --- rough use ---------------------------------------------------------------------------------------------------


# --- the group of a dead child -------------------------------------------------------------------------------------


def group_of(isolator: ProcessIsolator) -> int:
    """Which directory the (memory) group of an isolator's child is, whatever its name."""
    places = isolator._keeper.child._group.places()  # type: ignore[union-attr]
    return os.stat(places.get("memory") or places[""]).st_ino


def test_the_next_child_gets_the_group_of_a_dead_one() -> None:
    features.need("v1", "limits")
    with nothing_left(), ProcessIsolator.create() as keeper:
        seen = set()
        for _ in range(6):
            with ProcessIsolator.create() as isolator:
                assert isolator.run_source("1").value == 1
                seen.add(group_of(isolator))
                assert all(isolator.applied[name].holds for name in ("memory", "swap", "cpus", "pids", "devices"))
        assert len(seen) < 6
        assert group_of(keeper) not in seen


def test_a_group_tells_nothing_of_who_had_it_before() -> None:
    """parity: 27"""
    features.need("limits")
    limits = Limits(memory="64M", pids=16)
    had: list[int] = []
    with nothing_left(), ProcessIsolator.create(limits=limits) as keeper:
        for _ in range(3):
            with ProcessIsolator.create(limits=limits) as bomb:
                had.append(group_of(bomb))
                with pytest.raises(ChildTerminated) as caught:
                    bomb.run_source("bytearray(1 << 27)")
            assert caught.value.exit_info.reason is ExitReason.MEMORY
            with ProcessIsolator.create(limits=limits) as isolator:
                had.append(group_of(isolator))
                assert isolator.applied["memory"].reached == isolator.applied["pids"].reached == 0
                usage = isolator.run_source("1").usage
                assert (usage.peak_memory or 0) < 40 << 20
                assert (usage.cpu_time or 0) < 2
                with pytest.raises(ChildTerminated) as killed:
                    isolator.run_source("import os; os.kill(os.getpid(), 9)")
                assert killed.value.exit_info.reason is ExitReason.SIGNALED
        assert keeper.run_source("1").value == 1
    assert features.missing("v1") or len(set(had)) < len(had), "none was used again"


def test_the_group_of_a_launch_that_failed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perhaps it was the reason."""
    features.need("v1", "limits")
    with nothing_left(), ProcessIsolator.create() as keeper:
        with monkeypatch.context() as patch:
            patch.setattr(
                attest, "verify", lambda *_, **__: (_ for _ in ()).throw(LaunchError("no", step="walls", remedy="none"))
            )
            with pytest.raises(LaunchError):
                ProcessIsolator.create()
        assert keeper._keeper.template.free_group is None
        template = keeper._keeper.template
        # Not the first one's at any rate: the stacks of the dead stay charged until the kernel gets to freeing them.
        assert wait_until(lambda: (ProcessIsolator.create().close(), template.free_group)[1])


def test_a_group_with_other_limits_is_not_handed_out() -> None:
    features.need("limits")
    with nothing_left(), Template() as template:
        with template.create():
            pass
        for pids in (11, 12, 11):
            with ProcessIsolator.create(limits=Limits(memory="96M", pids=pids)) as isolator:
                assert isolator.applied["memory"].holds
                assert isolator.applied["pids"].holds
                assert str(pids) in (isolator.applied["pids"].detail or "")


def test_many_threads_at_once() -> None:
    with nothing_left():
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(_six_by_seven())) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [42] * 12


def _six_by_seven() -> int:
    with ProcessIsolator.create() as isolator:
        value: int = isolator.run_source("6 * 7").value
        return value


def test_a_fork_has_templates_of_its_own() -> None:
    with nothing_left(), Template() as template, template.create() as isolator:
        zygote = zygote_of(isolator)
        assert in_fork(_six_by_seven) == "42"
        assert in_fork(template.close) == "IsolatorClosed"
        assert state_of(zygote) in "RS"
        assert isolator.run_source("1").value == 1


def test_a_template_that_cannot_be_leaves_nothing() -> None:
    with nothing_left():
        for _ in range(3):
            with pytest.raises(OptionsError):
                Template(python="/nowhere/python")


def test_a_fork_in_the_middle_of_another_threads_pickling() -> None:
    """Whose lock nobody would ever give back in the fork."""

    def sent_by_value() -> int:
        signal.alarm(30)
        with ProcessIsolator.create() as isolator:
            value: int = isolator.invoke(lambda: 6 * 7)
            return value

    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            inside.set()
            go_on.wait(60)
            return int, ("7",)

    with nothing_left():
        thread = threading.Thread(target=dump_function, args=(abs, (Slow(),), {}, lambda _name: True))
        thread.start()
        inside.wait(10)
        assert in_fork(sent_by_value) == "42"
        go_on.set()
        thread.join()


def test_a_forgotten_template_leaves_nothing() -> None:
    with nothing_left():
        with Template() as kept:
            Template()
            gc.collect()
            with kept.create() as isolator:
                assert isolator.run_source("1").value == 1
        Template()
        gc.collect()


def test_one_that_is_collected_while_it_is_looked_for() -> None:
    """Its last isolator was forgotten, and goes while keys are compared."""
    forgotten: list[ProcessIsolator] = []

    class Collecting(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            forgotten.clear()
            gc.collect()
            return str.__eq__(self, other)

    with nothing_left():
        forgotten.append(ProcessIsolator.create(tenant=Collecting("a")))
        forgotten[0].set_data("me", forgotten[0])
        with ProcessIsolator.create(tenant=Collecting("a")) as isolator:
            assert isolator.run_source("1").value == 1


@pytest.mark.filterwarnings("ignore::ImportWarning")
def test_an_application_with_a_module_finder_of_the_old_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_module(self, _name: str, _path: object = None) -> None:
            return None

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with nothing_left(), ProcessIsolator.create(tenant="of its own") as isolator:
        assert isolator.invoke(lambda: 6 * 7) == 42


def test_after_close() -> None:
    template = Template()
    isolator = template.create()
    template.close()
    assert isolator.run_source("1").value == 1, "an isolator holds it as well"
    isolator.close()
    with pytest.raises(IsolatorClosed):
        isolator.run_source("1")
