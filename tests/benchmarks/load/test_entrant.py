"""A server that takes part, from its start to its failure."""

import json
import sys
from contextlib import ExitStack

import pytest

from llmopt.benchmarks.child import ChildError
from llmopt.benchmarks.load.entrant import Entrant
from llmopt.benchmarks.load.phases import Plan, measure_round, soak, warm_up
from llmopt.benchmarks.load.servers import Contender, Launch
from llmopt.benchmarks.load.trace import Trace
from llmopt.benchmarks.load.workload import Workload
from llmopt.runtime.text import Tokenizer

SERVER = """
import asyncio, importlib.util, json, sys, time
given = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("run_server", given["front"])
run_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_server)

class Letters:
    def __init__(self): self.left = {}
    def add(self, key, ids, max_tokens): self.left[key] = max_tokens
    def drop(self, key): self.left.pop(key, None)
    def is_busy(self): return bool(self.left)
    def step(self):
        time.sleep(0.002)
        self.left = {key: count - 1 for key, count in self.left.items()}
        news = [run_server.News(key, [64], count == 0) for key, count in self.left.items()]
        self.left = {key: count for key, count in self.left.items() if count}
        return news

tokenizer = run_server.Tokenizer.from_file(given["tokenizer"])
async def serve(): await run_server.Front(Letters, tokenizer).serve(given["port"])
asyncio.run(serve())
"""

PLAN = Plan(clients=(2,), saturated=0.6, warm=0.1, loads=(0.3,), open=0.5, patience=2.0, prefixes=1)


@pytest.fixture
def workload(byte_tokenizer):
    return Workload(Trace((0.0, 0.1, 0.3), (20, 30, 40), (4, 5, 6)), ["What is that?"], Tokenizer(byte_tokenizer))


@pytest.fixture
def letters(byte_tokenizer, tmp_path):
    """An entrant whose server answers with letters."""
    from llmopt.benchmarks.load import run_server

    script = tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    given = {"front": run_server.__file__, "tokenizer": str(byte_tokenizer / "tokenizer.json")}

    def command(port: int) -> list[str]:
        return [sys.executable, str(script), json.dumps({**given, "port": port})]

    def make(name: str) -> Entrant:
        return Entrant(name, Contender(name, "all", lambda subject: Launch(command)), tmp_path)

    return make


def test_a_round_measures_everything_of_everybody(letters, workload):
    entrants = [letters("llmopt"), letters("peer")]
    with ExitStack() as stack:
        for entrant in entrants:
            entrant.start(None, stack)
        warm_up(entrants, workload)
        measure_round(entrants, workload, PLAN)
    assert [entrant.error for entrant in entrants] == [None, None]
    for entrant in entrants:
        assert entrant.measured.throughput[2][0] > 0
        assert len(entrant.measured.cold) == len(entrant.measured.warm) == 1
        assert entrant.measured.peak_bytes > 1e6
    ours, theirs = ([answer.begun for answer in each.measured.open[0.3][0]] for each in entrants)
    assert ours == theirs, "all are asked at the same times"


def test_a_server_that_does_not_start_is_left_out_and_the_others_go_on(letters, workload, tmp_path):
    broken = Contender("broken", "all", lambda subject: Launch(lambda port: [sys.executable, "-c", "1 / 0"]))
    entrants = [letters("llmopt"), Entrant("broken", broken, tmp_path)]
    with ExitStack() as stack:
        for entrant in entrants:
            entrant.start(None, stack)
        measure_round(entrants, workload, PLAN)
    assert "ZeroDivisionError" in (entrants[1].error or "")
    assert entrants[0].error is None
    assert entrants[0].measured.open


def test_nothing_is_asked_at_shares_of_what_ours_does_where_ours_failed(entrant, letters, workload):
    peer = letters("peer")
    with ExitStack() as stack:
        peer.start(None, stack)
        measure_round([entrant("llmopt", "it broke"), peer], workload, PLAN)
    assert peer.measured.throughput
    assert not peer.measured.open


def test_memory_is_watched_while_many_short_requests_are_answered(letters, workload):
    ours = letters("llmopt")
    with ExitStack() as stack:
        ours.start(None, stack)
        found = soak(ours, workload, 60)
    assert found.requests == 60
    assert found.first > 1e6
    assert found.last > 1e6


def test_a_server_that_has_ended_is_an_error(letters, workload):
    ours = letters("llmopt")
    with ExitStack() as stack:
        ours.start(None, stack)
    with pytest.raises(ChildError, match="has ended"):
        ours.ask(workload.take(1), clients=1, seconds=None)
