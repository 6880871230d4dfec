"""One module of CPython's own tests, run here: id of each test -> what became of it. Runs inside children and outside.

Standard library only, like all that is sent to a child.
"""

from __future__ import annotations

import os
import sys
import tempfile
import unittest

_LOOPBACK = ("test_socketserver",)


class _Outcomes(unittest.TestResult):
    """The first thing that happens to a test is its outcome: ``ok``, ``fail``, ``error``, ``skip`` and so on."""

    def __init__(self, reasons: bool) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self._wanted = reasons

    def _note(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        if self.outcomes.setdefault(test.id(), outcome) == outcome and why and self._wanted:
            self.reasons.setdefault(test.id(), why[-2000:])

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._note(test, "ok")

    def addFailure(self, test: unittest.TestCase, err: object) -> None:
        super().addFailure(test, err)  # type: ignore[arg-type]
        self._note(test, "fail", self.failures[-1][1])

    def addError(self, test: unittest.TestCase, err: object) -> None:
        super().addError(test, err)  # type: ignore[arg-type]
        self._note(test, "error", self.errors[-1][1])

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: object) -> None:
        super().addSubTest(test, subtest, err)  # type: ignore[arg-type]
        if err is not None:
            self._note(test, "fail", (self.failures + self.errors)[-1][1])

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._note(test, "skip", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: object) -> None:
        self._note(test, "expected failure")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._note(test, "unexpected success")


def run(module: str, reasons: bool = False) -> dict[str, dict[str, str]]:
    """Runs ``test.<module>`` in a fresh working directory. ``{"outcomes": {id: outcome}, "reasons": {id: text}}``."""
    from test import support

    # Nothing that needs the internet, gigabytes or minutes. These ask for a network, and then use loopback alone.
    support.use_resources = ["network"] if module in _LOOPBACK else []
    support.verbose = 0
    result = _Outcomes(reasons)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            __import__(f"test.{module}")  # unittest would make a failing test of a missing one
            unittest.defaultTestLoader.loadTestsFromName(f"test.{module}").run(result)
        except unittest.SkipTest as skipped:  # the whole module, at import
            result.outcomes[module] = "skip"
            result.reasons[module] = str(skipped)
        finally:
            os.chdir(before)
    return {"outcomes": result.outcomes, "reasons": result.reasons}


if __name__ == "__main__":
    import json
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))  # as inside
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it
    answer = os.dup(1)  # tests print, and close what they find
    os.dup2(2, 1)
    with os.fdopen(answer, "w") as out:
        json.dump(run(sys.argv[1], reasons=True), out)
