"""The requests of ``benchmarks/serving.py``, which no server may answer with fewer tokens than were asked for."""

import json
import sys
from pathlib import Path

from llmopt.benchmarks.child import run
from llmopt.benchmarks.load.servers import OURS, SERVERS, Subject


def test_the_load_generator_is_streamed_exactly_the_tokens_it_asks_for(served, tmp_path):
    fields = SERVERS[OURS].prepare(Subject(Path(), None, tmp_path, threads=1)).fields
    counts = [3, 17, 40, 8]
    bodies = [{"prompt": f"{n}. Who?", "max_tokens": count, "stream": True, **fields} for n, count in enumerate(counts)]
    order = {"port": int(served.url.rpartition(":")[2]), "bodies": bodies, "clients": 2, "seconds": None}
    (tmp_path / "order.json").write_text(json.dumps(order), encoding="utf-8")
    command = [sys.executable, "-m", "llmopt.benchmarks.load.generator", str(tmp_path / "order.json")]
    answers = json.loads(run(command, log=tmp_path / "log").output)
    assert [answer["error"] for answer in answers] == [None] * 4
    assert [answer["finish"] for answer in answers] == ["length"] * 4
    for answer, count in zip(answers, counts, strict=True):
        assert 1 <= len(answer["times"]) <= count
        assert answer["times"] == sorted(answer["times"])
