"""The command line: ``pisupervisor run``, ``learn`` and ``doctor``. Thin: arguments in, text and an exit code out."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pisupervisor.isolator import ProcessIsolator
    from pisupervisor.options import IsolationOptions
    from pisupervisor.results import CallResult, ExitInfo

FAILED, USAGE, TIMED_OUT, NOT_ENFORCED, NOT_FOUND, INTERRUPTED, OUT_OF_MEMORY = 1, 2, 124, 126, 127, 130, 137
LARGEST_OWN_CODE = 125
MOST_ITEMS = 10_000  # of a target that is a generator

_EPILOG = """\
exit codes of run: the target's own when it is an int from 0 to 125; 124 timeout, 137 memory limit, 126 a required
protection is missing, 127 target not found, 1 exception or another death, 2 bad usage, 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: sys.argv) and return its exit code. Raises SystemExit(2) for bad usage."""
    _have_streams()
    own, arguments = _split(sys.argv[1:] if argv is None else argv)
    parsed = _parser().parse_args(own)
    if arguments and parsed.command == "doctor":
        _parser().error(f"{parsed.command} takes no arguments after --")
    if parsed.command != "doctor" and parsed.stdin:
        _check_stdin(parsed.restart)
    _end_cleanly()
    try:
        if parsed.command == "doctor":
            from pisupervisor.doctor import main as doctor

            return doctor(as_json=parsed.json)
        return _run(parsed, arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # who reads our output has gone, or has no room for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter would complain when it flushes
        if not isinstance(error, BrokenPipeError):
            print(f"pisupervisor: error: {error}", file=sys.stderr)
        return FAILED


def _have_streams() -> None:
    """Whoever starts us with stdout or stderr closed does not want to read them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the end


def _check_stdin(restart: bool) -> None:
    if restart:
        _parser().error("--stdin and --restart: what a child has read is gone for the next one; leave one of them out")
    if sys.stdin is None:  # then descriptor 0 may be any file of ours
        _parser().error("--stdin: it is closed")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what stands behind the first ``--`` for the target."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _end_cleanly() -> None:
    """Groups are removed and children ended on SIGTERM too: this process is ours."""
    import signal

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        hint = "; what the target is to get stands behind --" if message.startswith("unrecognized arguments") else ""
        self.exit(USAGE, f"pisupervisor: error: {message}{hint}\n")


def _parser() -> argparse.ArgumentParser:
    from pisupervisor import __version__

    parser = _Parser(
        prog="pisupervisor", description="Runs code nobody has to trust, in a fully confined child.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"pisupervisor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="run a function of a file, or a file as a script", epilog=_EPILOG, allow_abbrev=False,
        usage="pisupervisor run FILE[:TARGET] [options] [-- ARGS]",
        description="Call TARGET (function or Class.method) of FILE (.py, package folder, .zip, .whl or module name) with"
        " ARGS as strings; without :TARGET run FILE as a script.",
    )  # fmt: skip
    _add_run_options(run)
    run.add_argument("--restart", action="store_true", help="start again, a few times, when the child crashes")
    run.add_argument("--json", action="store_true", help="print one JSON object with result, output and usage")
    run.add_argument(
        "--trace",
        action="store_const",
        dest="watch",
        const="trace",
        help="show on stderr which system calls are refused",
    )
    learn = commands.add_parser(
        "learn", help="run as run does, and write a seccomp profile for what was used", allow_abbrev=False,
        usage="pisupervisor learn FILE[:TARGET] [-o PROFILE] [options] [-- ARGS]",
        description="The profile is the part of --profile that the program used; what it was refused is told. It runs"
        " slowly, behind all other walls. Its output and result go to stderr.",
    )  # fmt: skip
    _add_run_options(learn)
    learn.add_argument("-o", "--output", metavar="PROFILE", help="where to write the profile (default: stdout)")
    learn.set_defaults(watch="learn", restart=False, json=False, profile="permissive")
    doctor = commands.add_parser("doctor", help="what this host can enforce, proved in a real child")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def _add_run_options(run: argparse.ArgumentParser) -> None:
    option = run.add_argument
    option("code", metavar="FILE[:TARGET]")
    option("--memory", metavar="SIZE", help="such as 256M (default 512M)")
    option("--cpus", type=float, metavar="CORES", help="such as 0.5 (default 1.0)")
    option("--pids", type=int, metavar="N", help="processes and threads (default 64)")
    option("--timeout", type=float, metavar="SECONDS", help="kill the child after so long (default: never)")
    option("--network", choices=("none", "loopback", "host"), default="none", help="default: none")
    option(
        "--profile",
        default="default",
        metavar="NAME",
        help="default, strict, permissive or a seccomp profile's path (learn: what may be used at most; permissive)",
    )
    option("--degrade", action="append", default=[], metavar="NAME", help="this protection may be missing (repeatable)")
    option("--import-path", action="append", default=[], metavar="DIR", help="folder to import from (repeatable)")
    option("--python", metavar="PATH", help="another interpreter, or the folder of a venv")
    option("--stdin", action="store_true", help="the target reads our stdin, a file or a pipe (default: it is empty)")


# --- run -----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of a run: the exit code, why, and what is shown. ``error`` is None when the target returned."""

    code: int
    reason: str
    value: Any = None
    error: BaseException | None = None
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    duration: float | None = None
    cpu_time: float | None = None
    peak_memory: int | None = None


def _run(parsed: argparse.Namespace, arguments: list[str]) -> int:
    file, target = split_code(parsed.code)
    try:
        outcome = _outcome_of(parsed, file, target, arguments)
    except KeyboardInterrupt as interrupt:
        outcome = Outcome(INTERRUPTED, "interrupted", error=interrupt)
    from pisupervisor import cli_output

    if parsed.command == "learn":
        with contextlib.redirect_stdout(sys.stderr):
            cli_output.show_text(outcome, is_script=target is None)
        return outcome.code
    show = cli_output.show_json if parsed.json else cli_output.show_text
    show(outcome, is_script=target is None)
    return outcome.code


def split_code(code: str) -> tuple[str, str | None]:
    """``"plugin.py:Tools.shrink"`` -> ("plugin.py", "Tools.shrink"); no target where a file has that very name."""
    file, colon, target = code.rpartition(":")
    if not colon or os.path.exists(code):
        return code, None
    return file, target


def _outcome_of(parsed: argparse.Namespace, file: str, target: str | None, arguments: list[str]) -> Outcome:
    from pathlib import Path

    from pisupervisor.errors import IsolationError
    from pisupervisor.isolator import ProcessIsolator

    isolator = None
    try:
        with ProcessIsolator.create(_options(parsed)) as isolator, _report(parsed, isolator):
            if parsed.stdin:
                from pisupervisor.link.descriptors import Descriptor

                isolator.invoke(os.dup2, Descriptor(0), 0)
            if target is None:
                return _script_outcome(isolator.run_script(Path(file), arguments, idempotent=parsed.restart))
            path = os.path.abspath(file) if os.path.isfile(file) else file  # a bare name would be taken for a module's
            return _returned(isolator.execute(f"{path}:{target}", *arguments, idempotent=parsed.restart))
    except IsolationError as error:
        return _failure(error, isolator)


@contextlib.contextmanager
def _report(parsed: argparse.Namespace, isolator: ProcessIsolator) -> Iterator[None]:
    """What was seen of the program's system calls, however it ends; nothing where it has not begun."""
    from pisupervisor.errors import OptionsError, TargetNotFound

    has_run = True
    try:
        yield
    except (OptionsError, TargetNotFound):
        has_run = False
        raise
    finally:
        if parsed.watch is not None and has_run:
            from pisupervisor import cli_learn

            calls = isolator.system_calls()
            cli_learn.write_profile(parsed, calls) if parsed.watch == "learn" else cli_learn.show_refused(calls)


def _options(parsed: argparse.Namespace) -> IsolationOptions:
    from pisupervisor.options import IsolationOptions, Limits, RestartPolicy, Security

    given = {name: getattr(parsed, name) for name in ("memory", "cpus", "pids") if getattr(parsed, name) is not None}
    return IsolationOptions(
        limits=Limits(**given), network=parsed.network, security=Security(seccomp=parsed.profile, watch=parsed.watch),
        restart=RestartPolicy(mode="on-failure" if parsed.restart else "never"), call_timeout=parsed.timeout,
        degrade=parsed.degrade, import_paths=parsed.import_path, python=parsed.python,
    )  # fmt: skip


def _returned(result: CallResult) -> Outcome:
    value = _all_items(result.value)
    own = type(value) is int and 0 <= value <= LARGEST_OWN_CODE
    return Outcome(
        value if own else 0, "returned", value, None, result.stdout, result.stderr, result.truncated, result.duration,
        result.usage.cpu_time, result.usage.peak_memory,
    )  # fmt: skip


def _all_items(value: Any) -> Any:
    """A generator's items, as a list. Raises SerializationError for one that does not end."""
    from pisupervisor.objects import IsolatedStream

    if not isinstance(value, IsolatedStream):
        return value
    from itertools import islice

    items = list(islice(value, MOST_ITEMS + 1))
    if len(items) > MOST_ITEMS:
        from pisupervisor.errors import SerializationError

        raise SerializationError(f"the target yields more than {MOST_ITEMS} items", direction="from child")
    return items


def _script_outcome(info: ExitInfo) -> Outcome:
    code = INTERRUPTED if info.exit_code is None else info.exit_code if info.exit_code <= LARGEST_OWN_CODE else FAILED
    return Outcome(
        code, info.reason.value, info.exit_code, None, info.stdout, info.stderr, info.truncated, info.duration,
        info.cpu_time, info.peak_memory,
    )  # fmt: skip


def _failure(error: Exception, isolator: ProcessIsolator | None) -> Outcome:
    stdout, stderr = getattr(error, "stdout", ""), getattr(error, "stderr", "")
    truncated = getattr(error, "truncated", False)
    if getattr(error, "type_name", "") == "SystemExit":  # the way in which many a main() returns its code
        code, said = _exit_of(getattr(error, "message", ""))
        return Outcome(code, "exited", None, None, stdout, stderr + said, truncated)
    code, reason = classify(error)
    info = getattr(error, "exit_info", None)
    if reason == "restart_limit" and isolator is not None:
        info = isolator.wait_for_exit(0)  # the last of the crashes
        code = OUT_OF_MEMORY if info.reason.value == "memory" else code
    return Outcome(
        code, reason if info is None else info.reason.value, None, error, stdout, stderr, truncated,
        getattr(info, "duration", None), getattr(info, "cpu_time", None), getattr(info, "peak_memory", None),
    )  # fmt: skip


def classify(error: BaseException) -> tuple[int, str]:
    """The exit code for an error of this library, and a word for it."""
    from pisupervisor import errors

    missing_file = isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError))
    if isinstance(error, errors.OptionsError) and missing_file:
        return NOT_FOUND, "not_found"
    table: tuple[tuple[type[BaseException], int, str], ...] = (
        (errors.OptionsError, USAGE, "usage"), (errors.FeatureUnavailable, NOT_ENFORCED, "unavailable"),
        (errors.LaunchError, NOT_ENFORCED, "launch"), (errors.CallTimeout, TIMED_OUT, "timeout"),
        (errors.MemoryLimitExceeded, OUT_OF_MEMORY, "memory"), (errors.TargetNotFound, NOT_FOUND, "not_found"),
        (errors.RemoteError, FAILED, "raised"), (errors.CompileError, FAILED, "compile"),
        (errors.SerializationError, FAILED, "not_data"), (errors.ProtocolError, FAILED, "protocol"),
        (errors.RestartLimitReached, FAILED, "restart_limit"),
    )  # fmt: skip
    return next(((code, reason) for kind, code, reason in table if isinstance(error, kind)), (FAILED, "failed"))


def _exit_of(text: str) -> tuple[int, str]:
    """Exit code, and what belongs on stderr, of a ``SystemExit`` whose ``str()`` is ``text``: as CPython would have it."""
    if text in ("", "None"):
        return 0, ""
    if text.isascii() and text.isdigit() and len(text) < 4:
        return (int(text) if int(text) <= LARGEST_OWN_CODE else FAILED), ""
    return FAILED, f"{text}\n"
