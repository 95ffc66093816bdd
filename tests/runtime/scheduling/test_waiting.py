import random

import pytest

from llmopt.runtime.scheduling.waiting import AGEING, WaitingLine


def drain(line, tokens=1):
    order = []
    while (request := line.next()) is not None:
        line.admit(request)
        line.charge(request, tokens)
        order.append(request)
    return order


def test_who_came_first_is_first():
    line = WaitingLine()
    for place, request in enumerate("abc"):
        line.add(request, arrival=place)
    assert drain(line) == ["a", "b", "c"]


def test_of_those_that_came_at_once_the_one_added_first_is_first():
    line = WaitingLine()
    for request in "cab":
        line.add(request)
    assert drain(line) == ["c", "a", "b"]


def test_a_lower_priority_number_is_earlier():
    line = WaitingLine()
    line.add("usual", arrival=0)
    line.add("urgent", priority=-1, arrival=5)
    line.add("idle", priority=3, arrival=0)
    assert drain(line) == ["urgent", "usual", "idle"]


def test_waiting_long_is_worth_a_priority():
    line = WaitingLine()
    line.add("idle", priority=1, arrival=0)
    line.add("usual", priority=0, arrival=AGEING + 1)
    assert drain(line) == ["idle", "usual"]


def test_tenants_take_turns_by_what_they_cost():
    line = WaitingLine()
    for number in range(4):
        line.add(("a", number), tenant="a")
    for number in range(2):
        line.add(("b", number), tenant="b")
    order = []
    while (request := line.next()) is not None:
        line.admit(request)
        line.charge(request, 10 if request[0] == "a" else 30)
        order.append(request[0])
    assert order == ["a", "b", "a", "a", "a", "b"]


def test_a_tenant_that_comes_back_has_no_credit():
    line = WaitingLine()
    line.add("a1", tenant="a")
    line.admit("a1")
    line.charge("a1", 1000)
    for number in range(3):
        line.add(f"b{number}", tenant="b")
    line.add("a2", tenant="a")
    # "b" begins with what was spent on "a", and not with 1000 tokens to make up for.
    order = []
    while (request := line.next()) is not None:
        line.admit(request)
        line.charge(request, 10)
        order.append(request)
    assert order.index("a2") < 2


def test_those_that_leave_are_not_next():
    line = WaitingLine()
    for request in "abc":
        line.add(request)
    line.remove("a")
    line.remove("b")
    assert len(line) == 1
    assert drain(line) == ["c"]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_lost_or_served_twice(seed):
    rng = random.Random(seed)
    line, there, served = WaitingLine(), set(), []
    for number in range(200):
        line.add(number, tenant=str(rng.randrange(4)), priority=rng.randint(-2, 2), arrival=number)
        there.add(number)
        if rng.random() < 0.4 and (request := line.next()) is not None:
            line.admit(request)
            line.charge(request, rng.randrange(50))
            served.append(request)
        if rng.random() < 0.3:
            gone = rng.choice(sorted(there))
            there.remove(gone)
            line.remove(gone)
    left = drain(line)
    assert len(set(served + left)) == len(served + left)
    assert there <= set(served + left)


def test_those_that_may_begin_pass_in_their_order():
    line = WaitingLine()
    for number in range(6):
        line.add(number, tenant="ab"[number % 2], arrival=number)
    line.admit(0)
    line.charge(0, 10)
    assert line.next_of(lambda request: True) == line.next() == 1
    assert line.next_of(lambda request: request != 1) == 3
    assert line.next_of(lambda request: request % 2 == 0) == 2
    assert line.next_of(lambda request: False) is None
    assert len(line) == 5
