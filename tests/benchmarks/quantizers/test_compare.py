import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmopt.benchmarks.child import ChildError, Finished
from llmopt.benchmarks.quantizers import compare
from llmopt.benchmarks.quantizers.compare import Bench
from llmopt.benchmarks.quantizers.judge import Judge
from llmopt.benchmarks.quantizers.rows import Row
from llmopt.benchmarks.quantizers.run_passes import main as run_passes
from llmopt.benchmarks.quantizers.subject import Subject
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

RTN = Row("rtn", "round_to_nearest", "W4A16 g32", passes=[{"round_to_nearest": {"scheme": "W4A16", "group_size": 32}}])
GPTQ = Row("gptq", "gptq", "W4A16 g32", passes=[{"gptq": {"scheme": "W4A16", "group_size": 32}}])


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Small, with its child processes run in this one: importing PyTorch again takes longer than the rest."""

    def in_this_process(command: list[str], *, log: Path, environment: Any) -> Finished:
        assert command[1:3] == ["-m", "llmopt.benchmarks.quantizers.run_passes"]
        monkeypatch.setattr("sys.argv", command[2:])
        run_passes()
        return Finished("", 1.5, 1 << 30)

    monkeypatch.setattr(compare, "run", in_this_process)
    model = load_model(str(tiny_llama), cache=tmp_path / "cache")
    ids = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "windows.npy", torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(1)).numpy())
    subject = Subject(tiny_llama, model, Tokens("text", ids, "0"), 8)
    return Bench(subject, Judge(model, ids, threads=1), tmp_path / "windows.npy", tmp_path / "out", 1)


@pytest.mark.parametrize("row", [RTN, GPTQ], ids=lambda row: row.name)
def test_a_row_of_ours_is_run_judged_and_cleared_away(bench: Bench, row: Row) -> None:
    result = bench.result(row)
    assert result.error is None
    assert result.size is not None
    assert result.figures is not None
    assert result.size.bits_per_weight == 4.5
    assert result.figures.kl > 0
    assert not (bench.folder / "quantized" / row.name).exists()
    plain = json.loads(json.dumps(result.plain()))
    assert (plain["seconds"], plain["peak_bytes"], plain["program"]) == (1.5, 1 << 30, "llmopt")


def test_a_row_that_was_finished_is_not_run_again_but_on_another_text(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.result(RTN)
    runs: list[Any] = []

    def counted(*command: Any, **_: Any) -> Finished:
        runs.append(command)
        raise ChildError("it does not run")

    monkeypatch.setattr(compare, "run", counted)
    assert replace(bench.result(RTN), finished=None) == replace(first, finished=None)
    assert not runs
    np.save(bench.windows, np.load(bench.windows) + 1)
    assert bench.result(RTN).error == "it does not run"
    assert bench.result(RTN).error == "it does not run"  # a failure is tried again
    assert len(runs) == 2


def test_a_row_without_passes_is_the_float_model(bench: Bench) -> None:
    result = bench.result(Row("float", "none", "float", rounds_head=False))
    assert result.figures is not None
    assert result.figures.kl == 0
    assert result.finished is None


def test_another_programs_checkpoint_is_read_and_judged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str, directory: Path) -> Path:
        return Path("python")

    def quantizes_to_zero(python: Path, name: str, options: Any, *, output: Path, **_: Any) -> Finished:
        output.mkdir(parents=True)
        module = "model.layers.0.mlp.up_proj"
        save_file({f"{module}.weight": torch.zeros(128, 64)}, output / "model.safetensors")
        (output / "bits.json").write_text(json.dumps({module: 128 * 64 * 4}))
        return Finished("", 2.0, 1)

    monkeypatch.setattr(compare, "make_environment", installed)
    monkeypatch.setattr(compare, "run_peer", quantizes_to_zero)
    result = bench.result(Row("nncf", "rtn", "W4A16 g32", program="nncf"))
    model = bench.subject.model
    weights = sum(model.weights[f"{m}.weight"].dense().numel() for m in model.linears() if m != "lm_head")
    assert result.error is None
    assert result.size is not None
    assert result.size.bits == 16 * weights - 12 * 128 * 64
    assert result.figures is not None
    assert result.figures.kl > 0


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_program_that_does_not_install_is_a_row_with_its_last_words(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ChildError("pip ended with 1:\nlooking\nERROR: no matching distribution\n\n", hint="the log is here")
    monkeypatch.setattr(compare, "make_environment", failing(error))
    result = bench.result(Row("peer", "gptq", "W4A16 g32", program="gptqmodel"))
    assert (result.error, result.figures) == ("ERROR: no matching distribution", None)
    assert result.program.startswith("GPTQModel")


def test_a_program_that_packs_nothing_has_failed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(*_: Any, output: Path, **__: Any) -> Finished:
        shutil.copytree(bench.subject.checkpoint, output)
        (output / "bits.json").write_text("{}")
        return Finished("", 1.0, 1)

    monkeypatch.setattr(compare, "make_environment", lambda name, directory: Path("python"))
    monkeypatch.setattr(compare, "run_peer", copies)
    result = bench.result(Row("nncf", "rtn", "W4A16 g32", program="nncf"))
    assert result.error is not None
    assert "packed no weight" in result.error
