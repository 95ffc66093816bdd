import json

from llmopt.benchmarks.load.entrant import Entrant, Measured
from llmopt.benchmarks.load.events import Answer
from llmopt.benchmarks.load.servers import SERVERS
from llmopt.benchmarks.serving import plain


def test_what_was_measured_is_json_even_where_nobody_answered(tmp_path):
    answers = [[Answer(0.0, (0.25, 0.5), "length"), Answer(1.0)]]
    measured = Measured({16: [50.0, 60.0]}, {0.5: answers}, cold=[1.0], warm=[float("inf")], peak_bytes=7)
    found = plain(Entrant("genai", SERVERS["genai"], tmp_path, measured))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["tokens_per_second"] == {"16": [50.0, 60.0]}
    assert found["loads"]["0.5"][0]["first_p50"] == 0.25
    assert found["loads"]["0.5"][0]["first_p99"] is None
    assert found["prefix"] == {"new": [1.0], "seen": [None]}


def test_a_server_that_failed_is_kept_with_its_reason(tmp_path):
    found = plain(Entrant("openvino", SERVERS["openvino"], tmp_path, error="it broke"))
    assert found["error"] == "it broke"
    assert found["loads"] == {}
