"""From decisions by system call to one BPF program of our own shape. Pure.

    arch | foreign: kill
    nr   | a tree over the ranges of numbers that are decided alike
         |   leaf: an action, or a chain of comparisons of arguments with one

Every child loads the program. Of that time, as measured (kernel 6.18): 15 us whatever it holds, 0.2 us an instruction
(copying, checking, JIT), and 4 ns for each instruction on the way of each of 470 numbers, because the kernel runs it for
every number to learn which are always allowed; those then cost a bitmap's look-up and no filter. Hence: alike numbers
share a leaf, equal chains and equal ends of chains are written once, no word is masked twice in a row, what cases have in
common is asked once, and the tree is the one that costs least by these figures (see ``_Shape``).

The program is written from its end, so that whatever an instruction leads to is already there.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pisupervisor.launch.seccomp_rules import Condition

    Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value

INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter
_LOAD, _AND, _JUMP, _RETURN = 0x20, 0x54, 0x05, 0x06
_EQUAL, _GREATER, _AT_LEAST, _ANY_BIT = 0x15, 0x25, 0x35, 0x45
_TESTS = frozenset((_EQUAL, _GREATER, _AT_LEAST, _ANY_BIT))
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_REACH = 240  # a conditional jump reaches over 255 instructions; room is kept for the long jumps that help it
_WORD = 0xFFFFFFFF
_INSTRUCTION, _STEP = 50, 1  # costs: an instruction more, and one more on the way of a number
_NEAR = 4  # cuts tried on either side of the middle: more (8, 16, all) finds less than 0.1 us, in seconds

# libseccomp's numbering of comparisons
_NE, _LT, _LE, _EQ, _GE, _GT, _MASKED_EQ = range(1, 8)


class Decision(NamedTuple):
    """What happens to one call: the first of ``cases`` whose conditions all hold gives the action, else ``final``."""

    cases: tuple[tuple[tuple[Condition, ...], int], ...]
    final: int


class Range(NamedTuple):
    """Numbers from ``first`` up to the next range's; ``weight`` of them are ones that the kernel asks for."""

    first: int
    decision: Decision
    weight: int


class _Place(NamedTuple):
    """Where a piece begins, counted from the program's end. If it begins by loading ``word``, and by keeping the bits of
    ``mask``, whoever has that already goes on at ``behind``, and who has the whole word at ``masked``.
    """

    at: int
    word: int = -1
    mask: int = 0
    behind: int = -1
    masked: int = -1

    def entry(self, word: int, mask: int) -> int:
        """Where to go on for who has these bits of that word."""
        if self.word != word or mask not in (self.mask, _WORD):
            return self.at
        return self.behind if mask == self.mask else self.masked


def ranges(decisions: Mapping[int, Decision], beyond: Sequence[tuple[int, Decision]]) -> list[Range]:
    """``decisions`` for every number from 0 to the highest, then ``beyond``: from a number on to the next."""
    merged: list[Range] = []
    for number in sorted(decisions):
        if merged and merged[-1].decision == decisions[number]:
            merged[-1] = merged[-1]._replace(weight=merged[-1].weight + 1)
        else:
            merged.append(Range(number, decisions[number], 1))
    return merged + [Range(first, decision, 0) for first, decision in beyond]


def assemble(arch: int, otherwise: int, parts: list[Range]) -> list[Instruction]:
    """The whole program; ``otherwise`` is the action for every other architecture."""
    writer = _Writer()
    tree = writer.tree(parts)
    if tree != len(writer.code) - 1:
        tree = writer.jump_to(tree)
    writer.code.append((_LOAD, 0, 0, _NUMBER))
    writer.code += [(_RETURN, 0, 0, otherwise), (_EQUAL, 1, 0, arch), (_LOAD, 0, 0, _ARCH)]
    return _without_dead(writer.code[::-1])


class _Cost(NamedTuple):
    """Of a part of the tree, and where it is cut; 0: it is a leaf."""

    cost: int
    cut: int = 0


class _Shape:
    """The cheapest tree over ranges: where to cut which stretch of them, and what to look for one by one instead."""

    def __init__(self, parts: list[Range]) -> None:
        self.parts = parts
        self.passed = [0]  # how many numbers lie before each range
        for part in parts:
            self.passed.append(self.passed[-1] + part.weight)
        self.found: dict[tuple[int, int], _Cost] = {}

    def best(self, start: int, end: int) -> _Cost:
        if (start, end) not in self.found:
            ways = [_Cost(self.cost_of_cut(start, cut, end), cut) for cut in self.cuts(start, end)]
            _usual, odd = self.leaf(start, end)
            if all(part.weight == 1 for part in odd):
                ways = [_Cost(self.cost_of_leaf(start, end, len(odd))), *(ways if odd else [])]
            self.found[start, end] = min(ways)
        return self.found[start, end]

    def leaf(self, start: int, end: int) -> tuple[Decision, list[Range]]:
        """What most numbers of the stretch get, and those that get something else."""
        parts = self.parts[start:end]
        weights = dict.fromkeys((part.decision for part in parts), 0)
        for part in parts:
            weights[part.decision] += part.weight
        usual = max(weights, key=weights.__getitem__)
        return usual, [part for part in parts if part.decision != usual]

    def cost_of_leaf(self, start: int, end: int, odd: int) -> int:
        others = self.passed[end] - self.passed[start] - odd
        return odd * _INSTRUCTION + (odd * others + odd * (odd + 1) // 2) * _STEP

    def cost_of_cut(self, start: int, cut: int, end: int) -> int:
        here = _INSTRUCTION + (self.passed[end] - self.passed[start]) * _STEP
        return here + self.best(start, cut).cost + self.best(cut, end).cost

    def cuts(self, start: int, end: int) -> range:
        """Those near the middle: where about as many numbers lie on both sides."""
        half = (self.passed[start] + self.passed[end]) / 2
        middle = min(range(start + 1, end), key=lambda cut: abs(self.passed[cut] - half), default=end)
        return range(max(start + 1, middle - _NEAR), min(end, middle + _NEAR + 1))


class _Writer:
    def __init__(self) -> None:
        self.code: list[Instruction] = []  # the last instruction first
        self.written: dict[Decision, _Place] = {}
        self.returns: dict[int, _Place] = {}
        self.jumps: dict[Instruction, int] = {}  # with targets in the place of distances
        self.steps: dict[tuple[int, int, int], int] = {}  # loads and masks, by what they lead to

    def tree(self, parts: list[Range]) -> int:
        """Where a tree over these ranges begins; the number is loaded by then."""
        return self.subtree(_Shape(parts), 0, len(parts))

    def subtree(self, shape: _Shape, start: int, end: int) -> int:
        cut = shape.best(start, end).cut
        if cut:
            left, right = self.subtree(shape, start, cut), self.subtree(shape, cut, end)
            return self.jump(_AT_LEAST, shape.parts[cut].first, right, left)
        usual, odd = shape.leaf(start, end)
        place = self.decision(usual).at
        for part in odd:
            place = self.jump(_EQUAL, part.first, self.decision(part.decision).at, place)
        return place

    def decision(self, decision: Decision) -> _Place:
        place = self.written.get(decision) if decision.cases else self.action(decision.final)
        if place is None:
            place = self.written[decision] = self.cases(decision.cases, self.action(decision.final))
        return place

    def cases(self, cases: Iterable[tuple[tuple[Condition, ...], int]], otherwise: _Place) -> _Place:
        place = otherwise
        for action, shared, rests in reversed(_alike(cases)):
            inner = self.cases([(rest, action) for rest in rests], place) if len(rests) > 1 else self.action(action)
            place = self.case(shared, inner, place)
        return place

    def action(self, action: int) -> _Place:
        place = self.returns.get(action)
        if place is None or self.is_far(place.at):
            self.code.append((_RETURN, 0, 0, action))
            place = self.returns[action] = _Place(len(self.code) - 1)
        return place

    def case(self, conditions: Iterable[Condition], yes: _Place, no: _Place) -> _Place:
        for condition in conditions:
            yes = self.condition(condition, yes, no)
        return yes

    def condition(self, condition: Condition, yes: _Place, no: _Place) -> _Place:
        low = _ARGUMENTS + 8 * condition.argument  # little-endian, as every machine that we know
        op, value, two = condition.op, condition.value, condition.value_two
        if op in (_NE, _LT, _LE):
            op, yes, no = {_NE: _EQ, _LT: _GE, _LE: _GT}[op], no, yes
        if op == _MASKED_EQ:
            for word, mask, wanted in ((low, value & _WORD, two & _WORD), (low + 4, value >> 32, two >> 32)):
                yes = self.masked(word, mask, wanted, yes, no)
            return yes
        above, below = value >> 32, value & _WORD
        if op == _EQ:
            return self.test(low + 4, _EQUAL, above, self.test(low, _EQUAL, below, yes, no), no)
        equal = self.test(low, _GREATER if op == _GT else _AT_LEAST, below, yes, no)
        return self.test(low + 4, _GREATER, above, yes, self.test(low + 4, _EQUAL, above, equal, no))

    def masked(self, word: int, mask: int, wanted: int, yes: _Place, no: _Place) -> _Place:
        """``(word & mask) == wanted``; one instruction where no bit or the only bit of the mask is wanted."""
        if mask == 0:
            return yes
        if mask == _WORD:
            return self.test(word, _EQUAL, wanted, yes, no)
        if wanted == 0:
            return self.test(word, _ANY_BIT, mask, no, yes)
        if wanted == mask and mask & (mask - 1) == 0:
            return self.test(word, _ANY_BIT, mask, yes, no)
        return self.test(word, _EQUAL, wanted, yes, no, mask)

    def test(self, word: int, code: int, value: int, yes: _Place, no: _Place, mask: int = _WORD) -> _Place:
        """Load, mask, compare, and go on behind the load and mask of what compares the same again."""
        behind = self.jump(code, value, yes.entry(word, mask), no.entry(word, mask))
        masked = behind if mask == _WORD else self.step(_AND, mask, behind)
        return _Place(self.step(_LOAD, word, masked), word, mask, behind, masked)

    def step(self, code: int, value: int, then: int) -> int:
        """An instruction that is no jump, and on to ``then``."""
        at = self.steps.get((code, value, then))
        if at is None or self.is_far(at):
            if then != len(self.code) - 1:
                self.jump_to(then)
            at = self.steps[code, value, then] = len(self.code)
            self.code.append((code, 0, 0, value))
        return at

    def jump(self, code: int, value: int, yes: int, no: int) -> int:
        if self.is_far(yes):
            yes = self.jump_to(yes)
        if self.is_far(no):
            no = self.jump_to(no)
        at = self.jumps.get((code, yes, no, value))
        if at is None or self.is_far(at):
            at = self.jumps[code, yes, no, value] = len(self.code)
            self.code.append((code, at - yes - 1, at - no - 1, value))
        return at

    def is_far(self, target: int) -> bool:
        return len(self.code) - target > _REACH

    def jump_to(self, target: int) -> int:
        """The same again where it is near: a return as such, else a long jump."""
        near = self.code[target]
        self.code.append(near if near[0] == _RETURN else (_JUMP, 0, 0, len(self.code) - target - 1))
        return len(self.code) - 1


def _alike(
    cases: Iterable[tuple[tuple[Condition, ...], int]],
) -> list[tuple[int, list[Condition], list[tuple[Condition, ...]]]]:
    """Neighbours with one action and conditions in common, which are asked for once: (action, those, the others of each)."""
    groups: list[tuple[int, list[Condition], list[tuple[Condition, ...]]]] = []
    for conditions, action in cases:
        last, common, members = groups[-1] if groups else (None, [], [])
        shared = [condition for condition in common if condition in conditions]
        if shared and last == action:
            groups[-1] = (action, shared, [*members, conditions])
        else:
            groups.append((action, list(conditions), [conditions]))
    return [
        (action, shared, [tuple(condition for condition in member if condition not in shared) for member in members])
        for action, shared, members in groups
    ]


def _without_dead(code: list[Instruction]) -> list[Instruction]:
    """Without what nothing leads to: loads, most of all, that everybody comes to with the word loaded already."""
    alive = {0}
    for at, (kind, *_rest) in enumerate(code):
        if at in alive:
            alive |= set(_following(at, code[at])) if kind != _RETURN else set()
    moved = {old: new for new, old in enumerate(sorted(alive))}
    shorter = []
    for old, new in moved.items():
        kind, yes, no, value = code[old]
        if kind == _JUMP:
            value = moved[old + value + 1] - new - 1
        elif kind in _TESTS:
            yes, no = moved[old + yes + 1] - new - 1, moved[old + no + 1] - new - 1
        shorter.append((kind, yes, no, value))
    return shorter


def _following(at: int, instruction: Instruction) -> tuple[int, ...]:
    kind, yes, no, value = instruction
    if kind in _TESTS:
        return at + yes + 1, at + no + 1
    return (at + value + 1,) if kind == _JUMP else (at + 1,)
