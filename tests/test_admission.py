"""Who may use a child, and who reads a link: the rules alone."""

from __future__ import annotations

import random

import pytest

from pisupervisor.errors import IsolationError
from pisupervisor.link.leader import Leader
from pisupervisor.supervise.admission import Admission, Ticket
from pisupervisor.supervise.turn import Turn


def waiting(rules: Admission, key: int, use: str) -> Ticket:
    assert not rules.enter(key, use)  # type: ignore[arg-type]
    ticket = Ticket(key, use, lambda: None)  # type: ignore[arg-type]
    rules.wait(ticket)
    return ticket


def test_so_many_plain_calls() -> None:
    rules = Admission(2)
    assert rules.enter(1, "plain")
    assert rules.enter(2, "plain")
    third = waiting(rules, 3, "plain")
    assert rules.leave(1) == [third]
    assert set(rules.users) == {2, 3}


def test_one_captured_call_which_plain_ones_pass() -> None:
    rules = Admission(3)
    assert rules.enter(1, "captured")
    second = waiting(rules, 2, "captured")
    assert rules.enter(3, "plain")
    assert rules.enter(4, "plain")
    fifth = waiting(rules, 5, "plain")
    assert rules.leave(3) == [fifth]
    assert rules.leave(1) == [second]


def test_a_plain_call_passes_nobody_else() -> None:
    rules = Admission(3)
    rules.enter(1, "captured")
    captured, alone = waiting(rules, 2, "captured"), waiting(rules, 3, "alone")
    late = waiting(rules, 4, "plain")
    assert rules.leave(1) == [captured]
    assert rules.leave(2) == [alone]
    assert rules.leave(3) == [late]


def test_a_captured_call_is_not_waited_for_by_plain_ones() -> None:
    rules = Admission(3)
    rules.enter(1, "captured")
    rules.enter(2, "plain")
    rules.enter(3, "plain")
    captured, plain = waiting(rules, 4, "captured"), waiting(rules, 5, "plain")
    assert rules.leave(2) == [plain]
    assert rules.leave(1) == [captured]


def test_who_wants_it_alone_is_overtaken_by_nobody() -> None:
    rules = Admission(3)
    rules.enter(1, "plain")
    alone, late = waiting(rules, 2, "alone"), waiting(rules, 3, "plain")
    assert rules.leave(1) == [alone]
    assert rules.leave(2) == [late]


def test_who_gives_up_lets_others_in() -> None:
    rules = Admission(2)
    rules.enter(1, "plain")
    alone, late = waiting(rules, 2, "alone"), waiting(rules, 3, "plain")
    assert rules.give_up(alone) == [late]


def test_a_captured_call_within_a_plain_one_waits_for_captured_ones_only() -> None:
    rules = Admission(3)
    assert all(rules.enter(key, use) for key, use in ((1, "captured"), (2, "plain"), (3, "plain")))  # type: ignore[arg-type]
    assert not rules.rise(2)
    rising = [Ticket(key, "captured", lambda: None) for key in (2, 3)]
    rules.rising += rising
    fourth = waiting(rules, 4, "captured")
    assert rules.leave(1) == [rising[0]], "its own place is what the fourth waits for"
    assert rules.give_up(rising[1]) == []
    assert rules.sink(2) == [fourth]
    assert rules.users == {2: "plain", 3: "plain", 4: "captured"}
    assert not rules.rise(3)
    assert rules.leave(4) == []
    assert rules.rise(3)
    assert rules.leave(3) == []
    assert rules.enter(5, "captured")


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_forgotten(seed: int) -> None:
    """Whatever happens in whatever order, the rules hold, and in the end everybody has had the turn."""
    chance, rules, served = random.Random(seed), Admission(3), set()
    tickets: dict[int, Ticket] = {}
    for key in range(200):
        use = chance.choice(("plain", "plain", "captured", "alone"))
        if rules.enter(key, use):  # type: ignore[arg-type]
            served.add(key)
        else:
            tickets[key] = Ticket(key, use, lambda: None)  # type: ignore[arg-type]
            rules.wait(tickets[key])
        while rules.users and chance.random() < 0.5:
            served |= {ticket.key for ticket in rules.leave(chance.choice([*rules.users]))}
        uses = [*rules.users.values()]
        assert len(uses) <= 3
        assert uses.count("captured") <= 1
        assert "alone" not in uses or len(uses) == 1
    while rules.users:
        served |= {ticket.key for ticket in rules.leave(next(iter(rules.users)))}
    assert served == set(range(200))


def test_a_turn_is_not_taken_twice() -> None:
    turn = Turn()
    assert turn.take()
    with pytest.raises(IsolationError, match="middle of a call"):
        turn.take()
    turn.give()
    assert turn.take(0)


# --- leader ------------------------------------------------------------------------------------------------------


def test_one_reads_and_the_next_follows() -> None:
    leader = Leader()
    assert leader.may_read("a")
    assert leader.may_read("a")
    assert not leader.may_read("b")
    assert not leader.may_read("c")
    assert leader.leave("b") is None  # a reads on
    assert leader.leave("a") == "c"
    assert leader.may_read("c")
    assert leader.leave("c") is None


def test_who_was_woken_and_goes_passes_it_on() -> None:
    leader = Leader()
    assert leader.may_read("a")
    leader.may_read("b")
    leader.may_read("c")
    assert leader.leave("a") == "b"
    assert leader.leave("b") == "c", "b was woken to read, was interrupted, and c sleeps for ever"


@pytest.mark.parametrize("seed", range(20))
def test_somebody_always_reads_or_is_woken(seed: int) -> None:
    chance, leader = random.Random(seed), Leader()
    asleep: set[int] = set()
    awake: set[int] = set()
    for key in range(300):
        awake.add(key)
        for one in tuple(awake):
            move = chance.random()
            if move < 0.5 and not leader.may_read(one):
                awake.discard(one)
                asleep.add(one)
            elif move > 0.8:
                awake.discard(one)
                woken = leader.leave(one)
                if woken is not None:
                    asleep.discard(woken)  # type: ignore[arg-type]
                    awake.add(woken)  # type: ignore[arg-type]
        assert not asleep or awake, "all sleep, and nobody reads"
