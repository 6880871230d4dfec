"""What an isolator's owner does with its child beside calling into it: end, pause and restart it, and look at it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from pisupervisor.results import Applied, ExitInfo, SystemCall, Usage
    from pisupervisor.supervise.keeper import Keeper
    from pisupervisor.supervise.lifecycle import State


class Master:
    """Of one child, of which there is no copy."""

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} is one child's master: it cannot be copied, pickled, or sent to a child"
        )


class Control(Master):
    """The half of ``ProcessIsolator`` that is no call."""

    _keeper: Keeper

    def exit(self, reason: str | None = None, timeout: float = 5.0) -> ExitInfo:
        """Have the child leave by itself after the call that runs: its threads are waited for, its exit handlers run.
        ``reason`` is in the ExitInfo and the events. What has not left after ``timeout`` seconds is killed.

        Where the restart mode is not "always", later calls raise IsolatorClosed until ``restart()``.
        """
        from pisupervisor.supervise import stopping

        return stopping.leave(self._keeper, reason, timeout)

    def terminate(self, grace: float = 1.0) -> bool:
        """SIGTERM to the child's own process, and after ``grace`` seconds SIGKILL to everything in it. True: all is dead.

        A call under way raises ChildTerminated; the next call starts another child.
        """
        from pisupervisor.supervise import stopping

        return stopping.terminate(self._keeper, grace)

    def abort(self, reason: str | None = None) -> bool:
        """SIGABRT to the child's own process; what survives that is killed. Otherwise like ``terminate``."""
        from pisupervisor.supervise import stopping

        return stopping.abort(self._keeper, reason)

    def restart(self) -> None:
        """Kill the child, if there is one, and start another, whatever the policy says. Raises what ``create`` raises."""
        from pisupervisor.supervise import stopping

        stopping.restart(self._keeper)

    def pause(self) -> None:
        """Freeze every process of the child. Calls wait meanwhile, and their deadlines run on. Raises IsolationError where
        there is no child. A callback that pauses its child must resume it, or leave that to another thread: where there is none,
        the child is resumed and told that the callback failed.
        """
        from pisupervisor.supervise import stopping

        stopping.pause(self._keeper)

    def resume(self) -> None:
        """Let a paused child run on."""
        from pisupervisor.supervise import stopping

        stopping.resume(self._keeper)

    def wait_for_exit(self, timeout: float | None = None) -> ExitInfo:
        """Wait for the exit after which the policy starts no other child, and return how that was; restarts on the way are
        done here. An exit that has already happened is returned as it is. Raises TimeoutError after ``timeout`` seconds.
        """
        from pisupervisor.supervise import stopping

        return stopping.wait_for_exit(self._keeper, timeout)

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The payload's process id as the host numbers it, None while there is no child."""
        self._keeper.notice()
        child = self._keeper.child
        return child.pid if child is not None else None

    @property
    def state(self) -> State:
        """One of starting ready busy paused stopping backoff stopped failed."""
        self._keeper.notice()
        return self._keeper.state

    @property
    def applied(self) -> Mapping[str, Applied]:
        """What holds of each protection, as the host read it back when the present (or last) child was started, and how
        often it has run into its limits since.
        """
        child = self._keeper.child
        if child is None:
            return self._keeper.applied
        from pisupervisor.supervise.metrics import with_counts

        return with_counts(child.applied, child.meter.events())

    def resource_usage(self) -> Usage:
        """What the present child and all it started have used so far; nothing where there is no child."""
        self._keeper.check_open()
        self._keeper.notice()
        child = self._keeper.child
        if child is None:
            from pisupervisor.results import Usage

            return Usage()
        return child.meter.whole_usage()

    def pids(self) -> list[int]:
        """Every process of the child, as the host numbers them."""
        self._keeper.check_open()
        self._keeper.notice()
        child = self._keeper.child
        return child.meter.pids() if child is not None else []

    def system_calls(self) -> tuple[SystemCall, ...]:
        """What a seccomp listener has seen of all children so far, each different call once with its count, of one
        name at most 64 sets of arguments. Empty where nobody listens (see ``Security.watch``). Also after ``close``.
        """
        return self._keeper.log.calls() if self._keeper.log is not None else ()
