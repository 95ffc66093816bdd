import math

from llmopt.benchmarks.load.events import Answer
from llmopt.benchmarks.load.tables import busy_table, latency_panels, latency_table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_those_within_a_round(entrant):
    ours = entrant("llmopt", throughput={16: [100.0, 30.0]}, peak_bytes=250_000_000, cold=[1.0], warm=[0.25])
    peer = entrant("peer", throughput={16: [50.0, 10.0]}, peak_bytes=1_500_000_000)
    _, _, first, second = busy_table([ours, peer], (16,)).splitlines()
    assert cells(first) == ["llmopt 1.0", "all", "65", "-", "-", "250", "1.000", "0.250"]
    assert cells(second) == ["peer 1.0", "all", "30", "2.50x", "2.00 - 3.00", "1,500", "-", "-"]


def test_a_server_that_failed_is_a_row_that_says_why(entrant):
    ours = entrant("llmopt", throughput={16: [100.0]})
    header, _, good, failed = busy_table([ours, entrant("peer", "Error: a | b")], (16,)).splitlines()
    assert "failed: Error: a / b" in failed
    assert header.count("|") == good.count("|") == failed.count("|")


def test_peers_are_shown_where_ours_failed(entrant):
    table = busy_table([entrant("llmopt", "it broke"), entrant("peer", throughput={16: [50.0]})], (16,))
    assert cells(table.splitlines()[-1])[2:5] == ["50", "-", "-"]


def test_latencies_of_all_rounds_are_taken_together(entrant, answer):
    ours = entrant("llmopt", open={0.5: [[answer(0.1, (0.01,))], [answer(0.2, (0.01,))]]})
    peer = entrant("peer", open={0.5: [[answer(0.3, (0.02,))], [Answer(0.0)]]})
    _, _, first, second = latency_table([ours, peer], (0.5,), seconds=4.0).splitlines()
    assert cells(first) == ["50%", "0.25", "llmopt 1.0", "2 of 2", "0.100", "0.200", "10.0", "10.0"]
    shown = ["0.300 (3.00x)", "no answer in time", "20.0 (2.00x)", "20.0 (2.00x)"]
    assert cells(second) == ["50%", "0.25", "peer 1.0", "1 of 2", *shown]


def test_a_server_that_was_never_asked_has_no_latency_and_no_line(entrant, answer):
    ours, failed = entrant("llmopt", open={0.5: [[answer(0.1, (0.01,))]]}), entrant("peer", "it broke")
    assert len(latency_table([ours, failed], (0.5,), seconds=4.0).splitlines()) == 3
    assert [len(panel.lines) for panel in latency_panels([ours, failed])] == [1, 1]


def test_the_picture_shows_milliseconds_by_ascending_load(entrant, answer):
    ours = entrant("llmopt", open={0.8: [[answer(0.2, (0.02,))]], 0.4: [[answer(0.1)]]})
    first, following = (panel.lines[0] for panel in latency_panels([ours]))
    assert list(first.loads) == [0.4, 0.8]
    assert first.p50 == [100.0, 200.0]
    assert following.p99[0] == math.inf
    assert round(following.p99[1], 6) == 20.0
