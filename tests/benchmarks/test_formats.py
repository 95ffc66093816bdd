"""The table of formats and loaders: what loads agrees, what does not says why."""

from pathlib import Path

import pytest

from llmopt.benchmarks import formats
from llmopt.benchmarks.child import ChildError
from llmopt.benchmarks.formats import ROWS, Bench, Result, table
from llmopt.benchmarks.loaders.programs import LOADERS
from llmopt.calibration.sampling import Sampling, sample_tokens
from llmopt.optimizer.sources import load_model


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path) -> Bench:
    model = load_model(str(tiny_llama), cache=tmp_path / "cache")
    folder = tmp_path / "work"
    folder.mkdir()
    return Bench(model, sample_tokens(model, Sampling("evaluation", 1, 16), threads=1), folder, threads=1)


def test_every_row_has_a_loader_and_none_is_twice() -> None:
    assert {row.loader for row in ROWS} == set(LOADERS)
    assert len({(row.form, row.scheme, row.loader) for row in ROWS}) == len(ROWS)
    for loader in LOADERS.values():
        assert loader.script.is_file()


def test_a_checkpoint_is_written_loaded_and_compared(bench: Bench) -> None:
    result = bench.result(next(row for row in ROWS if row.scheme == "W8A16"))
    assert result.error is None
    assert result.difference == pytest.approx(0, abs=1e-4)  # the same float32 operators on the same weights
    assert result.top1 == 1


def test_a_program_that_does_not_load_it_is_a_row_with_its_last_words(bench: Bench, monkeypatch) -> None:
    def fails(*_, **__):
        raise ChildError("python ended with 1:\ntrace\nValueError: unknown quantization\n")

    monkeypatch.setattr(formats, "run_script", fails)
    row = next(row for row in ROWS if row.loader == "transformers")
    result = bench.result(row)
    assert result.error == "ValueError: unknown quantization"
    assert "no: ValueError: unknown quantization" in table([result])


def test_differences_are_also_a_share_of_the_logits_deviation() -> None:
    line = table([Result(ROWS[0], difference=0.5, spread=2.0, top1=0.75)]).splitlines()[-1]
    assert line == "| safetensors | float | transformers | yes | 0.5 | 0.25 | 75.00% |"
