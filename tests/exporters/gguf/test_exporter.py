"""GGUF files: read back by our own reader they are the same model; what llama.cpp has no form for is refused."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from llmopt.exporters.gguf.exporter import Gguf
from llmopt.optimizer.build import build
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.gguf_header import read_header
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

STEPS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q5_0": 1 / 15, "Q4_0": 1 / 7}
"""The largest error of a number, as a share of the largest magnitude of its block."""


def written(model: Model, folder: Path, **options: str) -> Path:
    exporter = Gguf(**options)
    exporter.check(model)
    exporter.write(model, folder, PassContext())
    return next(folder.glob("*.gguf"))


@pytest.mark.parametrize("kind", STEPS)
def test_floats_come_back_within_a_step(kind: str, llama_of, tmp_path: Path) -> None:
    model = load_model(str(llama_of(tie_word_embeddings=False)), cache=tmp_path)
    again = load_model(str(written(model, tmp_path / "gguf", type=kind)), cache=tmp_path)
    assert again.weights.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        expected, found = weight.dense(), again.weights[name].dense()
        limit = expected.abs().max() * STEPS[kind]
        assert (found - expected).abs().max() <= limit, name


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"scheme": "W4A16", "group_size": 32}, Kind.Q4_0),
        ({"scheme": "W8A16", "group_size": 32}, Kind.Q8_0),
        ({"scheme": "W8A8"}, Kind.Q8_0),
    ],
)
def test_integers_are_transcribed_with_rows_in_llama_cpps_order(options, kind, tiny_llama, tmp_path: Path) -> None:
    model = RoundToNearest(**options).run(load_model(str(tiny_llama), cache=tmp_path), PassContext())
    path = written(model, tmp_path / "gguf", type="F16")
    again = load_model(str(path), cache=tmp_path)
    assert read_header(path).tensors["blk.0.attn_q.weight"].kind is kind
    assert read_header(path).tensors["token_embd.weight"].kind is Kind.Q8_0  # the tied head's scheme
    for name, weight in model.weights.items():
        if isinstance(weight, QuantWeight):
            tensors = weight.load()
            expected = tensors._replace(scale=tensors.scale.half().float()).dense()
            assert torch.equal(again.weights[name].dense(), expected), name


def test_sizes_tokens_and_templates_are_the_models(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama), cache=tmp_path)
    path = written(model, tmp_path / "gguf", type="Q4_0")
    again = load_model(str(path), cache=tmp_path)
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"):
        assert again.config[name] == model.config[name]
    kinds = {name: tensor.kind for name, tensor in read_header(path).tensors.items()}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_up.weight"]) == (Kind.Q8_0, Kind.Q4_0)
    assert kinds["blk.0.attn_norm.weight"] is Kind.F32
    template = (model.source.tokenizer_dir / "chat_template.jinja").read_text()
    assert read_header(path).metadata["tokenizer.chat_template"] == template
    assert (path.parent / "Modelfile").read_text().startswith(f"FROM ./{path.name}\n")


def test_columns_that_are_no_whole_blocks_stay_in_float_and_are_noted(llama_of, tmp_path: Path) -> None:
    model = load_model(str(llama_of(hidden_size=72, intermediate_size=136, num_hidden_layers=1)), cache=tmp_path)
    entry = Gguf(type="Q4_0").write(model, tmp_path / "gguf", PassContext())
    assert "weights whose columns are no multiple of 32 are stored in F16" in entry.notes
    assert read_header(tmp_path / "gguf/model-Q4_0.gguf").tensors["blk.0.attn_q.weight"].kind is Kind.F16


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("opt", "opt models are not written as GGUF"),
        ("mixtral", "mixtral models are not written"),
        ("gemma3", "windows in all layers but each 6th"),
        ("llama-dynamic-rope", "rope type dynamic"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, reason: str, family_of, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        Gguf().check(load_model(str(family_of(family)), cache=tmp_path))


def test_two_builds_write_the_same_file(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama), cache=tmp_path)
    first, second = (written(model, tmp_path / name, type="Q8_0").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_build_writes_it_and_is_judged(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    settings = {
        "version": 1, "model": str(tiny_llama), "export": [{"gguf": {"type": "F16"}}],
        "passes": [{"round_to_nearest": {"scheme": "W4A16", "group_size": 32}}],
        "accept": [{"metric": "kl", "max": 10, "windows": 2, "tokens": 32}],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    manifest = build(recipe, tmp_path / "it", cache=tmp_path / "cache", progress=Silent())
    (entry,) = manifest.checkpoints
    assert (entry.path, entry.format) == ("gguf", "gguf")
    assert {"gguf/model-F16.gguf", "gguf/Modelfile"} <= manifest.files.keys()
    assert manifest.verdict.status == "accepted"
