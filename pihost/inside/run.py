"""Source snippets and scripts: code that runs in a namespace of its own, where ``__name__`` is ``"__main__"``."""

from __future__ import annotations

import builtins
import os
import sys

from pihost.inside.capture import flush
from pihost.inside.importer import CompileFailed, Importer, Loader, Unit, compile_failed
from pihost.inside.resolve import IMPORT_HINT, NotFound

TYPE_CHECKING = False  # importing typing costs 4 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType, ModuleType, TracebackType
    from typing import Any

    from pihost.inside.resolve import Library

_KEPT_SNIPPETS = 64
_SIGINT = 2
_HIDDEN = (__file__.rpartition("/inside/")[0] + "/", "<frozen importlib")


def source_module() -> ModuleType:
    """A new ``__main__`` for ``run_source``: once it is in ``sys.modules``, dataclasses and pickle find its classes there."""
    main = type(sys)("__main__")
    main.__dict__["__builtins__"] = builtins
    return main


def run_source(namespace: dict[str, Any], source: str, filename: str = "<source>") -> Any:
    """Run statements in ``namespace``; the value of the last one if it is an expression, else None.

    From the second snippet on a name such as ``<source>`` is numbered, ``<source 2>``, so that a traceback through
    functions of an earlier one shows the right lines. Raises CompileFailed, and what the source raises.
    """
    snippets = namespace.get("__loader__")
    if not isinstance(snippets, Snippets):
        snippets = namespace["__loader__"] = Snippets()
    filename = snippets.add(filename, source)
    statements, value = _compile_snippet(source, filename)
    try:
        exec(statements, namespace)  # noqa: S102
        return eval(value, namespace) if value else None  # noqa: S307
    except BaseException:
        snippets.show_all()
        raise


def _compile_snippet(source: str, filename: str) -> tuple[CodeType, CodeType | None]:
    # Not at the top: it is 0.8 ms of a zygote's start. Not ast, which imports enum and contextlib: 4 ms.
    from _ast import Expr, Expression, PyCF_ONLY_AST

    try:
        tree: Any = compile(source, filename, "exec", PyCF_ONLY_AST, dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], Expr) else None
        statements = compile(tree, filename, "exec", dont_inherit=True)
        value = compile(Expression(last.value), filename, "eval", dont_inherit=True) if last else None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise compile_failed(error, source, filename) from error
    return statements, value


class Snippets:
    """The last sources that ran in one namespace, by file name, for tracebacks. Lives there as ``__loader__``."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self.count = 0

    def add(self, filename: str, source: str) -> str:
        """Remember ``source``; the file name it is to be compiled under."""
        self.count += 1
        if self.count > 1 and filename.endswith(">"):
            filename = f"{filename[:-1]} {self.count}>"
        self.sources[filename] = source
        if "linecache" in sys.modules:  # else nobody can have asked for lines yet
            self.show(filename)
        if len(self.sources) > _KEPT_SNIPPETS:
            self.forget(next(iter(self.sources)))
        return filename

    def show(self, filename: str) -> None:
        """Give linecache the lines: it looks for no loader of a file whose name is in angle brackets."""
        import linecache

        source = self.sources[filename]
        lines = [line + "\n" for line in source.splitlines()]  # the last one too: traceback counts columns from the end
        linecache.cache[filename] = (len(source), None, lines, filename)

    def show_all(self) -> None:
        for filename in self.sources:
            self.show(filename)

    def forget(self, filename: str) -> None:
        del self.sources[filename]
        if "linecache" in sys.modules:
            sys.modules["linecache"].cache.pop(filename, None)


def run_script(library: Library, key: str, argv: Sequence[str]) -> int:
    """Run the code ``key`` as a script does whose ``sys.argv`` is ``argv``; the exit code, 0 to 255, or -2 for SIGINT.

    A package folder runs its ``__main__.py`` (as ``python -m package``), so does a zip (its own, or that of its only
    package). Modules of both are loaded anew for each run. An uncaught exception is printed to stderr, exit code 1; after a
    KeyboardInterrupt a process would die of its SIGINT.
    Threads that it has begun are waited for, and exit handlers that it has registered itself run, as at the end of a
    process; what modules of the library have registered is left for the child's own end. Raises NotFound where there is
    no ``__main__.py`` and for module names.
    """
    unit = library.unit(key)
    if unit.kind == "file":
        return _run_as_main(unit, unit.name + ".py", "", argv)
    unit = Unit((unit.key, unit.kind, unit.name, unit.origin, unit.files.items()))
    file = _main_file(unit)
    importer = Importer()
    importer.register(unit)
    try:
        return _run_as_main(unit, file, unit.names.get(file.rpartition("/")[0], ""), argv)
    finally:
        importer.remove()


def _main_file(unit: Unit) -> str:
    if unit.kind == "module":
        raise NotFound(
            "module", f"{unit.name!r} is a module name; a script is a file, or a folder or zip with __main__.py"
        )
    candidates = [f"{top}/__main__.py" for top in unit.tops()]
    found = [file for file in candidates if file in unit.files]
    if unit.kind == "archive" and "__main__.py" in unit.files:
        return "__main__.py"
    if len(found) != 1:
        raise NotFound("module", f"{unit.origin}: cannot be run as a script: {len(found) or 'no'} __main__.py in it")
    return found[0]


def _run_as_main(unit: Unit, file: str, package: str, argv: Sequence[str]) -> int:
    from pihost.inside.ending import End

    loader = Loader(unit, file)
    main = _main_module(unit, loader, package)
    saved = sys.modules.get("__main__"), sys.argv, sys.excepthook
    own_pid = os.getpid()
    sys.modules["__main__"], sys.argv = main, [*argv]
    try:
        with End():
            code = _execute(main, loader, package)
    finally:
        sys.argv, sys.excepthook = saved[1:]
        if saved[0] is not None:
            sys.modules["__main__"] = saved[0]
        flush()
    if os.getpid() != own_pid:
        os._exit(code if code >= 0 else 128 - code)  # it forked: only the original process goes on and answers
    return code


def _main_module(unit: Unit, loader: Loader, package: str) -> ModuleType:
    main = type(sys)("__main__")
    main.__dict__.update(
        __file__=loader.get_filename(), __loader__=loader, __package__=package or None, __cached__=None,
        __builtins__=unit.builtins or builtins,
    )  # fmt: skip
    return main


def _execute(main: ModuleType, loader: Loader, package: str) -> int:
    try:
        if package:
            __import__(package)
        exec(loader.get_code("__main__"), main.__dict__)  # type: ignore[arg-type]  # noqa: S102
        return 0
    except BaseException as error:
        uncaught = error  # told below: what raises in the script's excepthook comes of that alone
    return code_after(uncaught)


def code_after(uncaught: BaseException) -> int:
    """What a process that lets it out ends with, 0 to 255, or -2 for SIGINT; it is told on stderr."""
    if isinstance(uncaught, SystemExit):
        return exit_code(uncaught.code)
    code = print_exception(uncaught)
    return -_SIGINT if code == 1 and isinstance(uncaught, KeyboardInterrupt) else code


def leave(close_loop: Callable[[], None]) -> int:
    """What the interpreter does at its end: wait for threads, run exit handlers, flush. The exit code."""
    try:
        close_loop()
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        import atexit

        atexit._run_exitfuncs()
        return 0
    except BaseException as error:
        return print_exception(error)
    finally:
        flush()


def exit_code(code: object) -> int:
    """What CPython makes of ``sys.exit(code)``: None is 0, an int keeps 8 bits, anything else is printed and is 1."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    try:
        print(code, file=sys.stderr)
    except Exception:  # noqa: S110  its __str__ is user code, stderr may be closed: the exit code stands
        pass
    return 1


def print_exception(error: BaseException) -> int:
    """To stderr as the interpreter does, or through the ``sys.excepthook`` of the script; user frames only. The exit code is 1,
    unless that hook exits with another.
    """
    if isinstance(error, CompileFailed) and error.__cause__ is not None:
        error = error.__cause__.with_traceback(error.__traceback__)
        error.__context__ = None
    strip_frames(error)
    try:
        if sys.excepthook is sys.__excepthook__:
            _print(error)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
    except SystemExit as stop:
        return exit_code(stop.code)
    except BaseException as failed:
        strip_frames(failed)
        _print(failed, "Error in sys.excepthook:\n")
        _print(error, "\nOriginal exception was:\n")
    return 1


def _print(error: BaseException, before: str = "") -> None:
    try:
        import traceback  # the interpreter's own hook reads lines from files, which are not here

        from pihost.inside.raised import without_site

        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        hint = f"  hint: {IMPORT_HINT}\n" if isinstance(error, ModuleNotFoundError) else ""
        print(before + without_site(text) + hint, end="", file=sys.stderr)
    except Exception:  # noqa: S110  stderr may be closed or replaced by user code
        pass


def strip_frames(error: BaseException) -> None:
    """Take our own frames and the import machinery's out of the tracebacks of ``error`` and of what led to it."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    groups = getattr(builtins, "BaseExceptionGroup", ())
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = _user_frames(one.__traceback__)
            pending += [one.__cause__, one.__context__]
            pending += one.exceptions if isinstance(one, groups) else ()


def _user_frames(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and _is_hidden(trace):
        trace = trace.tb_next
    first = trace
    while trace is not None and trace.tb_next is not None:
        if _is_hidden(trace.tb_next):
            trace.tb_next = trace.tb_next.tb_next
        else:
            trace = trace.tb_next
    return first


def _is_hidden(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename.startswith(_HIDDEN)
