from itertools import pairwise

import pytest

from llmopt.benchmarks.load.trace import Trace, arrivals, read_trace, scaled
from llmopt.optimizer.errors import InputError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_lengths_are_scaled_by_one_factor_and_the_few_longest_are_cut():
    lengths = [*range(10, 1000, 10), 50_000]
    found = scaled(lengths, 99)
    assert found[-1] == 99
    assert found[10:20] == [round(length / 10) for length in lengths[10:20]]
    assert found[0] == 4, "none is shorter than four tokens"


def test_short_lengths_are_not_made_longer():
    assert scaled([10, 20, 30], 100) == [10, 20, 30]


def test_a_trace_is_read_with_its_times_from_the_first_request_on(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9305900,400,109\n"
    path.write_text(HEADER + rows, encoding="utf-8")
    trace = read_trace(path)
    assert trace.seconds == pytest.approx((0.0, 4.25))
    assert trace.context[0] < trace.context[1] <= 512
    assert max(trace.generated) <= 128


@pytest.mark.parametrize("text", ["a,b\n1,2\n", HEADER + "yesterday,1,2\n"])
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"trace\.csv"):
        read_trace(path)


def test_requests_arrive_at_the_rate_that_is_wanted_with_the_gaps_of_the_trace():
    trace = Trace((0.0, 1.0, 2.0, 5.0, 6.0, 8.0), (1,) * 6, (10,) * 6)
    found = arrivals(trace, 0, [10] * 6, rate=4.0, seconds=10.0)
    assert len(found) == 4, "40 tokens in 10 s are four answers of ten"
    assert found[0] == 0
    gaps = [b - a for a, b in pairwise([*found, 10.0])]
    assert gaps == pytest.approx([10 / 6 * gap for gap in (1.0, 1.0, 3.0, 1.0)])


def test_arrivals_go_on_at_the_beginning_of_the_trace_when_it_ends():
    trace = Trace((0.0, 1.0, 3.0), (1,) * 3, (1,) * 3)
    found = arrivals(trace, 2, [1] * 50, rate=5.0, seconds=2.0)
    assert len(found) == 10
    assert found == sorted(found)
    assert found[-1] <= 2.0


def test_a_low_rate_still_sends_two_requests():
    trace = Trace((0.0, 1.0, 3.0), (1,) * 3, (1,) * 3)
    assert len(arrivals(trace, 0, [100] * 5, rate=0.1, seconds=1.0)) == 2
