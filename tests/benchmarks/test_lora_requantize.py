"""What the benchmark of quantized bases prints, and what it needs before it starts."""

import sys
from pathlib import Path

from llmopt.benchmarks.lora_requantize import Row, line, main
from llmopt.optimizer.manifest import Measurement


def found(**values: float) -> dict[str, Measurement]:
    return {
        metric: Measurement(metric=metric, value=value, data="t", data_digest="0", tokens=8)
        for metric, value in values.items()
    }


def test_a_line_has_what_is_kept_where_weights_are_rounded_again() -> None:
    figures = found(kl=0.00301, top1=0.984, perplexity=1.6412)
    assert line(Row("W8A16", "merge_lora", 0.9, figures)) == ["W8A16", "merge_lora", "90%", "1.641", "0.0030", "98.4%"]
    assert line(Row("W8A16", "nothing", None, figures))[2] == ""


def test_without_an_adapter_it_says_what_trains_one(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["lora_requantize", "--out", str(tmp_path)])
    assert main() == 1
    said = capsys.readouterr().err
    assert f"error: there is no {tmp_path / 'lora-demo/adapter'}" in said
    assert "hint: python -m llmopt.benchmarks.lora_demo trains it" in said
