from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt.benchmarks.plain_checkpoint import write_checkpoint
from llmopt.optimizer.sources import load_model


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_llama_untied", "tiny_llama_biased"])
def test_another_program_reads_the_same_model(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    original: Path = request.getfixturevalue(fixture)
    copy = write_checkpoint(load_model(str(original), cache=tmp_path), tmp_path / "copy")
    ids = torch.arange(24)[None]
    networks = [AutoModelForCausalLM.from_pretrained(each).eval() for each in (original, copy)]
    with torch.inference_mode():
        expected, found = (network(ids).logits for network in networks)
    assert torch.equal(found, expected)
    assert AutoTokenizer.from_pretrained(copy)("The river").input_ids


def test_a_checkpoint_that_exists_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama), cache=tmp_path)
    kept = write_checkpoint(model, tmp_path / "copy") / "model.safetensors"
    before = kept.stat().st_mtime_ns
    write_checkpoint(model, tmp_path / "copy")
    assert kept.stat().st_mtime_ns == before
