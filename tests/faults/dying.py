"""How a child may end, or fail to. Plain code that knows nothing of pisupervisor; sent by file."""

import ctypes
import os
import signal
import struct
import sys
import threading
import time

MAGIC, VERSION, PIECE = 0x5149, 1, 69  # of a frame


def by_signal(number):
    os.kill(os.getpid(), number)
    time.sleep(1000)


def by_exit(code):
    os._exit(code)


def by_fault():
    ctypes.string_at(0)


def by_exec():
    os.execv("/usr/bin/true", ["true"])


def by_closing_the_link():
    os.close(3)
    time.sleep(1000)


def by_closing_everything():
    os.closerange(0, 256)
    time.sleep(1000)


def by_memory():
    kept = []
    while True:
        kept.append(bytearray(1 << 20))


def by_cpu_time():
    while True:
        pass


def by_refused_forks():
    try:
        while True:
            if os.fork() == 0:
                time.sleep(1000)
    except OSError:
        os._exit(3)


def by_system_call():
    """One that the profile of the test kills for."""
    os.sync()


def by_chain():
    """Every process forks and ends; the first one is the payload."""
    while os.fork() == 0:
        pass
    os._exit(0)


def family(code=3):
    """Two in sessions of their own, deaf, orphaned; then it leaves."""
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            turn_deaf()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
    os._exit(code)


def without_death_signal(number=9):
    """It cannot help it: the end of PID 1 needs no signal."""
    clear_death_signal()
    by_signal(number)


def turn_deaf():
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue


def clear_death_signal():
    if ctypes.CDLL(None, use_errno=True).prctl(1, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def in_the_result(name, *arguments):
    """Dies in the middle of a result that takes several frames: one piece and a half are sent."""
    ident = next(frame.f_locals["ident"] for frame in _frames() if "ident" in frame.f_locals)  # of the call under way
    header = struct.pack("<HBBQI", MAGIC, VERSION, PIECE, ident, 1 << 20)
    for data in (header, bytes(1 << 20), header, bytes(1 << 19)):
        view = memoryview(data)
        while view:
            view = view[os.write(3, view) :]
    globals()[name](*arguments)


def _frames():
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def later(seconds, name, *arguments):
    """Returns; that comes afterwards, while nobody calls."""
    threading.Thread(target=lambda: (time.sleep(seconds), globals()[name](*arguments)), daemon=True).start()


def at_exit(name, *arguments):
    """When it is told to leave."""
    import atexit

    atexit.register(globals()[name], *arguments)


def at_sigterm(name, *arguments):
    signal.signal(signal.SIGTERM, lambda *_: globals()[name](*arguments))


def wait(_nothing=None):
    time.sleep(1000)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


def spin_deaf():
    turn_deaf()
    while True:
        pass


def wait_deaf():
    turn_deaf()
    while True:
        time.sleep(1)


def wait_with_family():
    """Orphans in sessions of their own, deaf to all signals, their death signals cleared; then deaf too."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            turn_deaf()
            if os.fork() != 0:
                os._exit(0)
            clear_death_signal()
            time.sleep(1000)
    clear_death_signal()
    wait_deaf()


def count():
    return sum(1 for name in os.listdir("/proc") if name.isdigit())
