"""Checkpoints in the real loader: transformers with compressed-tensors computes what our own reference does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, FineGrainedFP8Config

from llmopt.calibration.reference import Reference
from llmopt.exporters.checkpoint.exporter import Checkpoint
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.dequantize import Dequantize
from llmopt.passes.gptq import Gptq
from llmopt.passes.kv_cache import KvCache
from llmopt.passes.round_to_nearest import RoundToNearest

IDS = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(0))
W4 = {"scheme": "W4A16", "group_size": 16}
DOWN = {"match": "re:.*down_proj", "scheme": "W8A16"}

# Importing it warns of torch's own deprecated names.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    def make(model: Model, **options: Any) -> Path:
        Checkpoint(**options).export(model, tmp_path / "build", PassContext())
        return tmp_path / "build" / "checkpoint"

    return make


@pytest.fixture
def model(tiny_llama_untied: Path, tmp_path: Path) -> Model:
    return load_model(str(tiny_llama_untied), cache=tmp_path)


def quantized(model: Model, **options: Any) -> Model:
    tokens = Tokens(name="it", ids=IDS, digest="0")
    return RoundToNearest(**options).run(model, PassContext(calibration=lambda: tokens))


def logits(directory: Path, *, at_load: bool = False) -> torch.Tensor:
    """What transformers computes; compressed-tensors decompresses weights when they are used, or at load."""
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if at_load else {}
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **how)
    with torch.no_grad():
        return network(IDS).logits.float()


@pytest.mark.parametrize(
    "options",
    [
        W4,
        {"scheme": "W8A16"},
        {"scheme": "W8A16", "group_size": 32},
        {"scheme": "W3A16", "group_size": 16},
        {"scheme": "W2A16", "group_size": 16},
        {"scheme": "W8A16", "head": "none"},
        {**W4, "overrides": (DOWN,)},
    ],
    ids=str,
)
def test_transformers_computes_what_the_reference_does(options, model, export) -> None:
    made = quantized(model, **options)
    torch.testing.assert_close(logits(export(made)), Reference(made).logits(IDS), rtol=1e-4, atol=1e-4)


def test_zero_points_are_what_the_loader_takes(model, export) -> None:
    # Only at load, for which transformers 5.23 knows one scheme a model: the place that compressed-tensors 0.20 makes
    # for packed zero points is that of unpacked ones.
    made = quantized(model, **{**W4, "scheme": "W4A16_ASYM", "head": "none"})
    torch.testing.assert_close(logits(export(made), at_load=True), Reference(made).logits(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_where_inputs_are_rounded_the_loader_rounds_them_too(scheme, llama_of, tmp_path: Path, export) -> None:
    wide = llama_of(hidden_size=128, head_dim=32, tie_word_embeddings=False)
    model = load_model(str(wide), cache=tmp_path)
    made = quantized(model, scheme=scheme)
    found, expected, source = logits(export(made)), Reference(made).logits(IDS), Reference(model).logits(IDS)
    # The steps differ: compressed-tensors divides int8 inputs' maximum by 127.5 where the kernels here divide by 127,
    # so many values round the other way. Both lose about as much.
    loss, same = (float((each - source).square().mean()) for each in (found, expected))
    assert loss < 1.5 * same
    assert (found - expected).square().mean() < 1.5 * same
    if scheme != "W8A8":
        assert (found - expected).abs().median() < 1e-3 * expected.std()


def test_integers_are_written_to_the_bit(model, export) -> None:
    made = quantized(model, **{**W4, "scheme": "W4A16_ASYM"})
    tensors = load_file(export(made) / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    stored = made.weights[f"{module}.weight"].load()
    words = tensors[f"{module}.weight_packed"]
    nibbles = torch.stack([words >> (4 * place) & 15 for place in range(8)], dim=2).reshape(len(words), -1)
    assert torch.equal(nibbles - 8, stored.values.int())
    zeros = tensors[f"{module}.weight_zero_point"]
    columns = torch.stack([zeros >> (4 * place) & 15 for place in range(8)], dim=1).reshape(-1, zeros.shape[1])
    assert torch.equal(columns[: len(stored.zero)] - 8, stored.zero.int())
    assert torch.equal(tensors[f"{module}.weight_scale"], stored.scale)
    assert tensors[f"{module}.weight_shape"].tolist() == list(stored.values.shape)


def test_a_tied_table_is_written_in_float_and_the_head_is_ignored(tiny_llama: Path, tmp_path: Path, export) -> None:
    made = quantized(load_model(str(tiny_llama), cache=tmp_path), **W4)
    directory = export(made)
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    name = "model.embed_tokens.weight"
    assert torch.equal(load_file(directory / "model.safetensors")[name], made.weights[name].dense())
    torch.testing.assert_close(logits(directory), Reference(made).logits(IDS), rtol=1e-4, atol=1e-4)


def test_plain_floats_load_anywhere(model, export) -> None:
    made = quantized(model, **W4)
    directory = export(made, format="safetensors")
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    torch.testing.assert_close(logits(directory), Reference(made).logits(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "phi3", "gemma3", "qwen3_moe", "opt"])
def test_families_are_written_as_they_were_read(name, family_of, tmp_path: Path, export) -> None:
    model = load_model(str(family_of(name)), cache=tmp_path)
    torch.testing.assert_close(logits(export(model)), logits(family_of(name)), rtol=1e-5, atol=1e-5)


def test_a_16_bit_model_stays_one_and_says_what_was_rounded(tiny_llama_bf16: Path, tmp_path: Path) -> None:
    made = quantized(load_model(str(tiny_llama_bf16), cache=tmp_path), **W4)
    entry, _ = Checkpoint().export(made, tmp_path / "out", PassContext())
    tensors = load_file(tmp_path / "out/checkpoint/model.safetensors")
    assert entry.dtype == "bfloat16"
    assert (
        tensors["model.norm.weight"].dtype is tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype is torch.bfloat16
    )
    assert any("scales are stored in bfloat16" in note for note in entry.notes)
    exact, _ = Checkpoint(dtype="float32").export(made, tmp_path / "exact", PassContext())
    assert not any("rounded" in note or "stored" in note for note in exact.notes)


def test_the_tokenizer_comes_along(model, export) -> None:
    directory = export(quantized(model, **W4))
    text = "The capital of France"
    assert AutoTokenizer.from_pretrained(directory)(text) == AutoTokenizer.from_pretrained(model.source.tokenizer_dir)(
        text
    )


def test_gptq_s_integers_are_what_is_written(model, export) -> None:
    tokens = Tokens(name="it", ids=IDS, digest="0")
    made = Gptq(**W4).run(model, PassContext(calibration=lambda: tokens))
    torch.testing.assert_close(logits(export(made)), Reference(made).logits(IDS), rtol=1e-4, atol=1e-4)


def test_gpt_2_s_own_kind_of_linears_is_refused_where_they_are_packed(family_of, tmp_path: Path) -> None:
    model = load_model(str(family_of("gpt2")), cache=tmp_path)
    with pytest.raises(UnsupportedError, match="Conv1D"):
        Checkpoint().check(model)
    Checkpoint(format="safetensors").check(model)


def test_a_quantized_cache_is_the_loaders_too(model, export, tmp_path: Path) -> None:
    tokens = Tokens(name="it", ids=IDS, digest="0")
    in_float = quantized(model, **{**W4, "head": "none"})
    made = KvCache(strategy="tensor").run(in_float, PassContext(calibration=lambda: tokens))
    directory = export(made)
    expected = Reference(made).logits(IDS)
    torch.testing.assert_close(logits(directory), expected, rtol=1e-4, atol=1e-4)
    assert (expected - Reference(in_float).logits(IDS)).abs().max() > 1e-2
    again = load_model(str(directory), cache=tmp_path)
    assert again.weights.keys() == made.weights.keys()
    assert torch.equal(again.cache_scales(1)[0].dense(), made.cache_scales(1)[0].dense())


def test_transformers_reads_blocks_of_fp8_as_the_reference_does(llama_of, tmp_path: Path, export) -> None:
    source = load_model(str(llama_of(hidden_size=128, head_dim=32, tie_word_embeddings=False)), cache=tmp_path)
    made = quantized(source, scheme="FP8_BLOCK")
    # Its FP8 kernels need a GPU: on a CPU it makes floats of the weights, and rounds no inputs.
    how = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    network = AutoModelForCausalLM.from_pretrained(export(made, format="fp8"), dtype=torch.float32, **how)
    in_float = Dequantize().run(made, PassContext())
    for name, weight in in_float.weights.items():
        assert torch.equal(network.get_parameter(name), weight.dense())
    with torch.no_grad():
        torch.testing.assert_close(network(IDS).logits, Reference(in_float).logits(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_compressed_tensors_own_converter_reads_awq_as_we_do(scheme: str, model, tmp_path: Path) -> None:
    made = quantized(model, scheme=scheme, group_size=16, head="none")
    awq = Checkpoint(format="awq").write(made, tmp_path / "awq", PassContext())
    assert awq.format == "awq"
    settings = json.loads((tmp_path / "awq/config.json").read_text())["quantization_config"]
    theirs = AutoAWQConverter(group_size=settings["group_size"]).process(load_file(tmp_path / "awq/model.safetensors"))
    again = load_model(str(tmp_path / "awq"), cache=tmp_path)
    Checkpoint(dtype="float16").write(again, tmp_path / "ours", PassContext())
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)), name
