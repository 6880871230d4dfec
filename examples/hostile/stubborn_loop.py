"""Never ends, ignores every signal that can be ignored and blocks the rest."""

from __future__ import annotations

import signal


def attack() -> None:
    for number in signal.valid_signals():
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):  # SIGKILL and SIGSTOP
            continue
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        pass
