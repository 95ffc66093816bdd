"""Which calls are timed and what is made of the times; how fast anything is, no test says."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from llmopt.evaluation import speed
from llmopt.evaluation.speed import Plan, Rate, Speed, measure_speed, run_plan
from llmopt.optimizer.cli.bench import command
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.manifest import Manifest, SourceEntry, Verdict
from llmopt.runtime.backends.toy import ToyBackend, toy_engine

PLAN = Plan(prompts=((1, 40), (3, 10)), batches=(1, 4), past=6, steps=5, repeats=2, threads=1)
FOUND = Speed(
    rates=(Rate("prefill", 1, 512, 2500.0, 0.1, 0.2), Rate("decode", 16, 128, 640.0, 0.05, 0.025)),
    load_seconds=0.5,
    peak_bytes=300_000_000,
    threads=2,
    cpu_features=("avx2",),
)


@pytest.fixture
def build(tmp_path):
    """A build whose engine no backend can load."""
    Manifest(
        llmopt="0",
        versions={},
        source=SourceEntry(spec="x", digest="0" * 64, files={}),
        recipe={},
        architecture="llama",
        layers=[],
        passes=[],
        engines=[toy_engine(capacity=1024).model_copy(update={"exporter": "onnx", "target": "cpu"})],
        verdict=Verdict(status="unjudged"),
    ).save(tmp_path)
    return tmp_path


def test_each_round_runs_every_shape_once_in_turn():
    runs = []
    backend = ToyBackend(
        toy_engine(), slots=4, before_run=lambda kind, slots: runs.append((kind, len(slots), slots[0]))
    )
    rates = run_plan(backend, PLAN)
    assert [(rate.kind, rate.sequences, rate.tokens) for rate in rates] == [
        ("prefill", 1, 40),
        ("prefill", 3, 10),
        ("decode", 1, 6),
        ("decode", 4, 6),
    ]
    filling = [("prefill", 1, slot) for slot in range(4)]
    chunks = [("prefill", 1, 0)] * 3  # 40 tokens in chunks of 16
    one_round = [
        *chunks,
        *(("prefill", 1, slot) for slot in range(3)),
        *[("decode", 1, 0)] * 5,
        *[("decode", 4, 0)] * 5,
    ]
    assert runs == filling + one_round * 3


def test_rates_follow_from_the_times(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(now)))
    rates = run_plan(ToyBackend(toy_engine(), slots=4), PLAN)
    # Every action takes one second of this clock.
    assert [rate.rate for rate in rates] == [40, 30, 5, 20]
    assert [rate.latency for rate in rates] == [1, 1, 1 / 5, 1 / 5]
    assert [rate.spread for rate in rates] == [0, 0, 0, 0]


def test_a_plan_without_decoding_needs_no_room_for_it():
    plan = Plan(prompts=((2, 8),), batches=())
    assert (plan.slots, plan.capacity) == (2, 8)
    assert len(run_plan(ToyBackend(toy_engine(), slots=2), plan)) == 1


def test_the_measuring_process_imports_no_torch():
    code = "import sys, llmopt.evaluation.speed, llmopt.runtime.backends.onnxruntime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_what_the_measuring_process_refuses_is_said(build):
    with pytest.raises(UnsupportedError, match="cannot load"):
        measure_speed(build, Plan())


def test_shapes_beyond_the_engine_are_refused(build):
    with pytest.raises(InputError, match="sequences of 2000 tokens were asked for, the engine takes 1024"):
        measure_speed(build, Plan(prompts=((1, 2000),)))


def test_the_command_passes_the_shapes_on(build, monkeypatch):
    plans = []
    monkeypatch.setattr(speed, "measure_speed", lambda directory, plan: plans.append(plan) or FOUND)
    options = [
        "--prompt",
        "64",
        "--prompt",
        "32x4",
        "--batch",
        "2, 8",
        "--decode",
        "7",
        "--past",
        "9",
        "--threads",
        "3",
    ]
    outcome = CliRunner().invoke(command, [str(build), *options, "--repeat", "5"], catch_exceptions=False)
    assert plans == [Plan(((1, 64), (4, 32)), (2, 8), past=9, steps=7, repeats=5, threads=3)]
    for words in ("2,500", "200.0 ms to first token", "16 after 128", "25.0 ms a token", "peak memory 300 MB", "avx2"):
        assert words in outcome.stdout


def test_the_default_shapes_are_a_long_prompt_and_eight_short_ones(build, monkeypatch):
    plans = []
    monkeypatch.setattr(speed, "measure_speed", lambda directory, plan: plans.append(plan) or FOUND)
    CliRunner().invoke(command, [str(build)], catch_exceptions=False)
    assert (plans[0].prompts, plans[0].batches) == (((1, 512), (8, 128)), (1, 4, 8, 16))


def test_json_can_be_read_back(build, monkeypatch):
    monkeypatch.setattr(speed, "measure_speed", lambda directory, plan: FOUND)
    outcome = CliRunner().invoke(command, [str(build), "--json"], catch_exceptions=False)
    assert Speed.from_dict(json.loads(outcome.stdout)) == FOUND


@pytest.mark.parametrize(
    "options", [["--prompt", "12x"], ["--prompt", "0x3"], ["--prompt", "long"], ["--batch", "1,,2"]]
)
def test_shapes_that_make_no_sense_are_usage_errors(build, options):
    outcome = CliRunner().invoke(command, [str(build), *options])
    assert outcome.exit_code == 2
    assert options[1] in outcome.stderr
