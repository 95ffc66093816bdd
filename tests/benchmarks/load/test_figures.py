import math

import pytest

from llmopt.benchmarks.load.events import Answer
from llmopt.benchmarks.load.figures import latency, percentile, throughput


def test_a_percentile_is_one_of_the_values():
    values = list(range(1, 101))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([7], 0.01) == 7
    assert percentile([7], 0.99) == 7


def test_of_nothing_it_is_infinite():
    assert percentile([], 0.5) == math.inf


def test_times_are_counted_from_when_a_request_was_due(answer):
    found = latency([answer(0.1, (0.01, 0.03), begun=5.0), answer(0.3, (0.02,), begun=6.0)])
    assert found.first_p50 == pytest.approx(0.1)
    assert found.first_p99 == pytest.approx(0.3)
    assert found.next_p50 == pytest.approx(0.02)
    assert found.next_p99 == pytest.approx(0.03)
    assert (found.asked, found.finished) == (2, 2)


def test_requests_without_an_answer_are_the_slowest(answer):
    silent = Answer(1.0)
    found = latency([answer(0.1), answer(0.2), answer(0.3), silent])
    assert found.first_p50 == pytest.approx(0.2)
    assert found.first_p99 == math.inf
    assert found.finished == 3


def test_only_what_came_within_the_time_counts(answer):
    answers = [answer(0.5, (1.0, 1.0, 1.0)), answer(9.5, (1.0,), finish=None)]
    assert throughput(answers, [4, 50], start=1.0, end=10.0) == pytest.approx(4 / 9)


def test_pieces_of_several_tokens_count_as_several(answer):
    answers = [answer(1.0, (1.0, 1.0)), answer(1.0, (1.0, 1.0, 1.0), finish=None)]
    assert throughput(answers, [6, 100], start=0.0, end=7.0) == pytest.approx(7 * 2 / 7)
