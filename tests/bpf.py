"""A user-space evaluator of classic BPF as seccomp runs it: filters are tested without loading them.

It knows only the instructions that the kernel's seccomp check accepts and our programs use; anything else is an error.
"""

from __future__ import annotations

import struct

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
ALLOW, KILL_PROCESS, KILL_THREAD, LOG = 0x7FFF0000, 0x80000000, 0x00000000, 0x7FFC0000

_LOAD_ABSOLUTE, _AND, _RETURN, _JUMP = 0x20, 0x54, 0x06, 0x05
_TESTS = {
    0x15: lambda a, k: a == k,
    0x25: lambda a, k: a > k,
    0x35: lambda a, k: a >= k,
    0x45: lambda a, k: bool(a & k),
}


def errno_action(number: int) -> int:
    """SECCOMP_RET_ERRNO with its errno."""
    return 0x00050000 | number


def instructions(program: bytes) -> list[tuple[int, int, int, int]]:
    """(code, jt, jf, k) of every instruction."""
    return list(struct.iter_unpack("=HBBI", program))


def check(program: bytes) -> None:
    """What the kernel checks before it takes a program. Raises ValueError."""
    code = instructions(program)
    if not 0 < len(code) <= 4096:
        raise ValueError(f"{len(code)} instructions")
    for place, (op, jt, jf, k) in enumerate(code):
        farthest = k if op == _JUMP else max(jt, jf) if op in _TESTS else 0
        if op not in (_LOAD_ABSOLUTE, _AND, _RETURN, _JUMP, *_TESTS):
            raise ValueError(f"instruction {place}: code {op:#x}")
        if op == _LOAD_ABSOLUTE and (k % 4 or k > 60):
            raise ValueError(f"instruction {place}: load from {k}")
        if op != _RETURN and place + 1 + farthest >= len(code):
            raise ValueError(f"instruction {place}: leaves the program")
    if code[-1][0] != _RETURN:
        raise ValueError("does not end with a return")


def run(program: bytes, nr: int, args: tuple[int, ...] = (), arch: int = X86_64) -> int:
    """The action for one system call: what the kernel would do with ``nr`` and up to six ``args``."""
    words = [arg & 0xFFFFFFFFFFFFFFFF for arg in (*args, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=IIQ6Q", nr & 0xFFFFFFFF, arch, 0, *words)
    return _execute(instructions(program), data)


def _execute(code: list[tuple[int, int, int, int]], data: bytes) -> int:
    place = accumulator = 0
    while True:
        op, jt, jf, k = code[place]
        place += 1
        if op == _RETURN:
            return k
        if op == _LOAD_ABSOLUTE:
            accumulator = int(struct.unpack_from("=I", data, k)[0])
        elif op == _AND:
            accumulator &= k
        elif op == _JUMP:
            place += k
        else:
            place += jt if _TESTS[op](accumulator, k) else jf
