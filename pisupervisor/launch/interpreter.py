"""Which Python runs in the child: where it lies, what belongs to it, and where that is seen inside."""

from __future__ import annotations

import _signal  # signal makes an enum of every signal, which takes a start 2 ms
import os
import sys

from pisupervisor.errors import LaunchError, OptionsError
from pisupervisor.records import dataclass

OLDEST = (3, 9)
INSIDE = "/py"  # an interpreter that does not live below /usr is shown here: its own folder may lie in a private home
_PATIENCE = 20.0  # seconds
_QUESTION = (
    "import sys,os;print(repr((sys.version_info[:2],os.path.realpath(sys.base_prefix),"
    "os.path.realpath(getattr(sys,'_base_executable',None) or sys.executable),os.path.dirname(os.path.realpath(os.__file__)),"
    "[p for p in sys.path if p.endswith(('site-packages','dist-packages'))])))"
)


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """``prefix`` holds the interpreter, ``stdlib`` is its library folder, ``packages`` a venv's site folders. With
    ``rootfs`` all of them are paths inside of that, and ``site`` are its own folders of packages.
    """

    executable: str
    prefix: str
    stdlib: str
    version: tuple[int, int]
    packages: tuple[str, ...] = ()
    rootfs: str | None = None
    site: tuple[str, ...] = ()

    @property
    def relocated(self) -> bool:
        return self.rootfs is None and self.prefix != "/usr" and not self.prefix.startswith("/usr/")

    def inside(self, path: str) -> str:
        """Where a path of this interpreter is seen by the child."""
        if self.relocated and (path == self.prefix or path.startswith(self.prefix + "/")):
            return INSIDE + path[len(self.prefix) :]
        return path

    def library_path(self) -> str | None:
        """Folder for LD_LIBRARY_PATH when a relocated interpreter has a shared libpython, else None."""
        folder = os.path.join(self.prefix, "lib")
        try:
            shared = any(
                name.startswith("libpython") and ".so" in name for name in os.listdir((self.rootfs or "") + folder)
            )
        except OSError:
            return None
        elsewhere = self.relocated or (self.rootfs is not None and self.prefix != "/usr")
        return self.inside(folder) if shared and elsewhere else None


def host_python() -> str:
    """The interpreter this application runs on (the base one below a venv), as an absolute path. Raises LaunchError where
    there is none, as in a program that embeds one.
    """
    named = getattr(sys, "_base_executable", None) or sys.executable or ""
    found = os.path.realpath(named)
    if not os.path.isfile(found):
        why, remedy = f"sys.executable is {named!r}: no interpreter", "name one: python='/usr/bin/python3'"
        raise LaunchError(why, step="interpreter", remedy=remedy)
    return found


def find_interpreter(python: str | None, patience: float | None = None) -> Interpreter:
    """The interpreter for ``IsolationOptions.python`` (an executable, or a venv's folder); None is the host's own. It has
    ``patience`` seconds (None: 20) to say what it is.

    Raises OptionsError for what is no interpreter, LaunchError (step "interpreter") for one that does not start.
    """
    if python is None:
        return Interpreter(
            executable=host_python(), prefix=os.path.realpath(sys.base_prefix),
            stdlib=os.path.dirname(os.path.realpath(os.__file__)), version=sys.version_info[:2],
        )  # fmt: skip
    executable = _executable(python)
    version, prefix, base, stdlib, packages = _ask(executable, patience or _PATIENCE)
    if version < OLDEST:
        raise OptionsError(
            f"python: {python} is Python {version[0]}.{version[1]}; a child needs {OLDEST[0]}.{OLDEST[1]}"
        )
    return Interpreter(
        executable=base, prefix=prefix, stdlib=stdlib, version=version,
        packages=tuple(p for p in packages if os.path.isdir(p)) if _is_venv(executable) else (),
    )  # fmt: skip


def _executable(python: str) -> str:
    path = os.path.join(python, "bin", "python") if os.path.isdir(python) else python
    if not os.path.exists(path):
        raise OptionsError(f"python: {path} does not exist; give an interpreter or the folder of a venv")
    if not os.access(path, os.X_OK) or os.path.isdir(path):
        raise OptionsError(f"python: {path} is not executable")
    return path


def _is_venv(executable: str) -> bool:
    return os.path.exists(os.path.join(os.path.dirname(os.path.dirname(executable)), "pyvenv.cfg"))


def _ask(executable: str, patience: float) -> tuple[tuple[int, int], str, str, str, list[str]]:
    import ast
    from subprocess import TimeoutExpired

    remedy = f"try it by hand: {executable} -I -c pass"
    try:
        code, out, err = _run([executable, "-I", "-c", _QUESTION], patience)
    except TimeoutExpired:
        why = f"{executable} did not say within {patience:g} s which Python it is"
        raise LaunchError(why, step="interpreter", remedy=f"{remedy}; or raise start_timeout") from None
    except (OSError, UnicodeDecodeError) as error:
        why, number = f"{executable} does not start: {error}", getattr(error, "errno", None)
        raise LaunchError(why, step="interpreter", errno=number, remedy=remedy) from None
    try:
        answer = ast.literal_eval(out)
    except (ValueError, SyntaxError):
        answer = None
    if not _is_answer(answer):
        message = f"{executable} is no working Python (exit code {code}): {(err or out).strip()[-300:]}"
        raise LaunchError(message, step="interpreter", remedy=remedy)
    version, prefix, base, stdlib, packages = answer
    return version, prefix, base, stdlib, packages


def _run(command: list[str], patience: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr. What is not over in time is killed with all that a wrapper may have started."""
    from subprocess import DEVNULL, PIPE, Popen

    with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=patience)
        except BaseException:
            if process.returncode is None:  # not reaped yet: the group is its own
                os.killpg(process.pid, _signal.SIGKILL)
            raise
    return process.returncode, out, err


def _is_answer(found: object) -> bool:
    """Whether that is what ``_QUESTION`` prints, and not what some other program does."""
    if not isinstance(found, tuple) or [type(part) for part in found] != [tuple, str, str, str, list]:
        return False
    return [type(part) for part in found[0]] == [int, int]
