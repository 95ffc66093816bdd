"""The load generator in a process of its own, against the front that peers without a server have."""

import json
import sys

import pytest

from llmopt.benchmarks.child import run
from llmopt.benchmarks.server import free_port


@pytest.fixture
def ask(tmp_path):
    def answers(port: int, count: int, *, max_tokens: int = 5, **order):
        bodies = [{"prompt": f"prompt {number}", "max_tokens": max_tokens} for number in range(count)]
        path = tmp_path / "order.json"
        path.write_text(json.dumps({"port": port, "bodies": bodies, **order}), encoding="utf-8")
        command = [sys.executable, "-m", "llmopt.benchmarks.load.generator", str(path)]
        return json.loads(run(command, log=tmp_path / "log").output)

    return answers


def test_busy_clients_ask_everything_there_is(front, letters, ask):
    engine = letters()
    with front(engine) as port:
        found = ask(port, 7, clients=3, seconds=None)
    assert [len(each["times"]) for each in found] == [5] * 7
    assert {each["finish"] for each in found} == {"length"}
    assert engine.most <= 3


def test_a_client_asks_the_next_when_its_last_is_answered(front, letters, ask):
    with front(letters()) as port:
        first, second = ask(port, 2, clients=1, seconds=None)
    assert first["times"][-1] <= second["begun"]


def test_what_is_under_way_at_the_end_is_cut_off_and_the_server_told(front, letters, ask):
    engine = letters(seconds=0.02)
    with front(engine) as port:
        found = ask(port, 50, max_tokens=100_000, clients=2, seconds=0.5)
        while len(engine.dropped) < 2:
            pass
    assert [each["finish"] for each in found] == [None, None]
    assert all(each["times"] for each in found)


def test_requests_are_asked_at_their_times_whether_others_are_answered_or_not(front, letters, ask):
    engine = letters(seconds=0.01)
    with front(engine) as port:
        found = ask(port, 3, max_tokens=40, times=[0.0, 0.1, 0.2], patience=20.0)
    assert [each["begun"] for each in found] == [0.0, 0.1, 0.2]
    assert engine.most >= 2
    assert all(each["finish"] == "length" and each["times"][0] > each["begun"] for each in found)


def test_requests_without_an_answer_are_given_up(front, letters, ask):
    with front(letters(seconds=0.02)) as port:
        found = ask(port, 2, max_tokens=100_000, times=[0.0, 0.1], patience=0.3)
    assert [each["finish"] for each in found] == [None, None]


def test_a_client_that_is_refused_does_not_go_on(ask):
    found = ask(free_port(), 5, clients=1, seconds=None)
    assert [each["times"] for each in found] == [[]]
