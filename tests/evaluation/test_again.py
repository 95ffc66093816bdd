"""`llmopt eval` on a hand-made build whose engine is the reference execution."""

import hashlib
import json

import pytest
from click.testing import CliRunner

from llmopt.evaluation import proxy
from llmopt.evaluation.again import Question, evaluate
from llmopt.optimizer.cli.eval import command
from llmopt.optimizer.errors import InputError, RejectedError
from llmopt.optimizer.gates import Gate
from llmopt.optimizer.manifest import Manifest, Measurement, SourceEntry, Verdict
from llmopt.optimizer.progress import Silent
from llmopt.runtime.backends.opening import Executor
from llmopt.runtime.backends.toy import toy_engine


@pytest.fixture
def build_of(tiny_model, tiny_llama, tmp_path, backend_of, monkeypatch):
    """Makes a build with these gates; its engine multiplies the source's logits by ``factor``."""

    def make(*gates, factor=1.0, measurements=(), digest=None):
        backend = backend_of(tiny_model, lambda logits: logits * factor)
        monkeypatch.setattr(proxy, "open_backend", lambda *_, **__: backend)
        directory = tmp_path / "build"
        directory.mkdir()
        Manifest(
            llmopt="0",
            versions={},
            source=SourceEntry(spec=str(tiny_llama), digest=digest or tiny_model.source.digest, files={}),
            recipe={"accept": [Gate(**gate).model_dump(mode="json") for gate in gates], "seed": 3},
            architecture="llama",
            layers=[],
            passes=[],
            engines=[backend.engine],
            measurements=list(measurements),
            verdict=Verdict(status="unjudged"),
        ).save(directory)
        return directory

    return make


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "holdout.txt"
    path.write_text("The miller saw the fox and the clock. " * 60, encoding="utf-8")
    return path


KL = {"metric": "kl", "max": 0.01, "windows": 2, "tokens": 16}
PERPLEXITY = {"metric": "perplexity", "max_increase": "3%", "data": "data/holdout.txt", "windows": 2, "tokens": 32}


def test_gates_without_data_are_judged_on_sampled_text(build_of):
    result = evaluate(build_of(KL), Question(), Silent())
    assert result.verdict.status == "accepted"
    assert [(each.metric, each.data, each.tokens) for each in result.measurements] == [
        ("kl", "sampled", 32),
        ("top1", "sampled", 32),
    ]


def test_a_gate_with_data_needs_the_file_of_that_name(build_of, text):
    build = build_of(KL, PERPLEXITY)
    without = evaluate(build, Question(), Silent())
    assert [gate.metric for gate in without.not_judged] == ["perplexity"]
    assert len(without.verdict.gates) == 1
    given = evaluate(build, Question(data=(text,)), Silent())
    assert given.not_judged == []
    assert [each.passed for each in given.verdict.gates] == [True, True]
    assert [each.tokens for each in given.measurements if each.metric == "perplexity"] == [2 * 31]


def test_other_files_are_measured_in_the_windows_asked_for(build_of, text):
    result = evaluate(build_of(), Question(data=(text,), windows=3, tokens=20), Silent())
    assert {each.metric: each.tokens for each in result.measurements} == {"kl": 60, "top1": 60, "perplexity": 57}
    assert result.verdict.status == "unjudged"


def test_with_nothing_given_text_is_sampled(build_of):
    result = evaluate(build_of(), Question(windows=2, tokens=8), Silent())
    assert {each.data for each in result.measurements} == {"sampled"}


def test_another_model_than_the_one_built_from_is_refused(build_of):
    with pytest.raises(
        InputError, match=r"not the model this build was made from; other contents: .*model\.safetensors"
    ):
        evaluate(build_of(digest="f" * 64), Question(), Silent())


def test_a_model_that_moved_is_found_through_source(build_of, tiny_llama, tmp_path):
    build = build_of(KL)
    manifest = json.loads((build / "manifest.json").read_text())
    manifest["source"]["spec"] = str(tmp_path / "gone")
    (build / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="source model cannot be read"):
        evaluate(build, Question(), Silent())
    assert evaluate(build, Question(source=str(tiny_llama)), Silent()).verdict.status == "accepted"


@pytest.mark.parametrize("data", [False, True])
def test_windows_that_nobody_asked_for_fit_into_the_engine(build_of, text, data):
    build = build_of()
    manifest = json.loads((build / "manifest.json").read_text())
    manifest["engines"][0]["capacity"] = 24
    (build / "manifest.json").write_text(json.dumps(manifest))
    result = evaluate(build, Question(data=(text,) if data else ()), Silent())
    assert {each.tokens for each in result.measurements} <= ({8 * 24, 8 * 23} if data else {16 * 24})


def test_the_text_a_build_was_calibrated_on_is_refused(build_of, text):
    build = build_of()
    manifest = json.loads((build / "manifest.json").read_text())
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    entry = {"name": "chat.jsonl", "digest": digest, "samples": 1, "tokens": 2, "packing": "concat", "seed": 0}
    (build / "manifest.json").write_text(json.dumps({**manifest, "calibration": entry}))
    with pytest.raises(InputError, match=r"calibrated on chat\.jsonl, and .*holdout\.txt is the same text"):
        evaluate(build, Question(data=(text,), windows=1, tokens=16), Silent())
    assert evaluate(build, Question(windows=1, tokens=16), Silent()).measurements


def test_a_text_with_other_contents_than_at_build_time_is_noted(build_of, text):
    before = Measurement(metric="kl", value=1, data="data/holdout.txt", data_digest="0" * 64, tokens=5)
    result = evaluate(build_of(PERPLEXITY, measurements=[before]), Question(data=(text,)), Silent())
    assert len(result.notes) == 1
    assert "holdout.txt is not the text of that name" in result.notes[0]


def test_the_command_prints_metrics_and_gates(build_of, text):
    outcome = CliRunner().invoke(command, [str(build_of(KL, PERPLEXITY)), "--data", str(text)], catch_exceptions=False)
    assert outcome.exit_code == 0
    for words in ("kl", "100.00%", "perplexity", "gates: accepted"):
        assert words in outcome.stdout


def test_a_missed_gate_is_an_error_after_the_table(build_of):
    outcome = CliRunner().invoke(command, [str(build_of(KL, factor=3.0))])
    assert isinstance(outcome.exception, RejectedError)
    assert outcome.exception.exit_code == 4
    assert "gates: rejected" in outcome.stdout


def test_json_ends_with_the_result(build_of):
    outcome = CliRunner().invoke(command, [str(build_of(KL)), "--json"], catch_exceptions=False)
    last = json.loads(outcome.stdout.splitlines()[-1])
    assert last["event"] == "result"
    assert last["result"]["verdict"]["status"] == "accepted"
    assert {each["metric"] for each in last["result"]["measurements"]} == {"kl", "top1"}


def test_an_engine_for_a_gpu_is_measured_by_its_graph_unless_somebody_names_what_executes_it(tmp_path):
    engine = toy_engine().model_copy(update={"exporter": "onnx", "target": "cuda"})

    def proxy_of(**wanted):
        return proxy.measurable(tmp_path, engine, Executor(**wanted), longest=4, threads=1).proxy

    assert proxy_of() == proxy_of(provider="cpu") == "its graph, executed by ONNX Runtime on a CPU"
    assert proxy_of(provider="cuda") is proxy_of(engine="onnx") is None
