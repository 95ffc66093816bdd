"""GGUF as a source: the same model as the checkpoint it was written from."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.gguf_header import read_header
from llmopt.optimizer.sources import load_model

GgufWriter = Callable[..., Path]


def test_a_float_gguf_holds_the_checkpoint_it_was_written_from(
    tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path
) -> None:
    model = load_model(str(write_gguf(tiny_llama)), cache=tmp_path)
    original = load_file(tiny_llama / "model.safetensors")
    assert model.weights.keys() == original.keys()
    for name, weight in model.weights.items():
        assert weight.shape == tuple(original[name].shape)
        assert torch.equal(weight.load(), original[name]), name


def test_an_untied_head_is_kept(tiny_llama_untied: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    model = load_model(str(write_gguf(tiny_llama_untied)), cache=tmp_path)
    original = load_file(tiny_llama_untied / "model.safetensors")
    assert not model.is_tied
    assert model.config["tie_word_embeddings"] is False
    assert torch.equal(model.weights["lm_head.weight"].load(), original["lm_head.weight"])


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_stored_blocks_are_dequantized_to_float32(
    kind: Kind, tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path
) -> None:
    model = load_model(str(write_gguf(tiny_llama, kind)), cache=tmp_path)
    original = load_file(tiny_llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        # Quantizing works row by row, so the order of the rows does not matter to this oracle.
        expected = gguf.dequantize(gguf.quantize(original[name].numpy(), kind), kind)
        assert model.weights[name].dtype is torch.float32
        np.testing.assert_array_equal(model.weights[name].load().numpy(), expected)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_some_rows_are_the_same_as_in_the_whole(
    kind: Kind, tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path
) -> None:
    model = load_model(str(write_gguf(tiny_llama, kind)), cache=tmp_path)
    for weight in model.weights.values():
        assert torch.equal(weight.rows(3, 9), weight.load()[3:9])


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_read_as_the_gguf_library_reads_them(
    kind: Kind,
    llama_of: Callable[..., Path],
    write_gguf: GgufWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = llama_of(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    block, size = gguf.GGML_QUANT_SIZES[kind]

    def random_blocks(tensor: np.ndarray, kind: Kind) -> np.ndarray:
        # Bytes below 64 keep the float16 scales finite; gguf cannot quantize to these formats.
        return np.random.default_rng(0).integers(0, 64, (len(tensor), tensor.shape[1] // block * size), np.uint8)

    monkeypatch.setattr(gguf, "quantize", random_blocks)
    path = write_gguf(checkpoint, kind)
    model = load_model(str(path), cache=tmp_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    expected = gguf.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(model.weights["model.layers.0.mlp.up_proj.weight"].load().numpy(), expected)


def test_the_header_says_what_the_gguf_library_says(tiny_llama: Path, write_gguf: GgufWriter) -> None:
    path = write_gguf(tiny_llama, Kind.Q8_0)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert entry.kind == tensor.tensor_type
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)
    for name, value in header.metadata.items():
        assert reader.fields[name].contents() == value


def test_config_and_tokenizer_come_from_the_metadata(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    model = load_model(str(write_gguf(tiny_llama)), cache=tmp_path / "cache")
    original = load_model(str(tiny_llama), cache=tmp_path / "cache")
    computed = ("architectures", "hidden_size", "head_dim", "num_key_value_heads", "rope_parameters", "vocab_size",
                "intermediate_size", "num_hidden_layers", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
    assert {name: model.config[name] for name in computed} == {name: original.config[name] for name in computed}
    assert not [name for name in model.config if name.startswith("_")]
    assert json.loads((model.source.tokenizer_dir / "config.json").read_text()) == model.config
    text = "<|im_start|>The capital of France is Paris.<|im_end|>\n  def add(first, second):"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (model.source.tokenizer_dir, tiny_llama))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)


def test_neighbours_of_the_file_are_not_read(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama)
    expected = load_model(str(path), cache=tmp_path / "cache").source
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        path.with_name(name).write_text('{"auto_map": {"AutoTokenizer": ["x.X", null]}}')
    path.with_name("chat_template.jinja").write_text("another model's")
    assert load_model(str(path), cache=tmp_path / "other").source.files == expected.files


def test_a_second_end_token_stops_too(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, values=lambda writer: writer.add_eot_token_id(0))
    settings = load_model(str(path), cache=tmp_path).source.tokenizer_dir / "generation_config.json"
    assert '"eos_token_id": [\n    2,\n    0\n  ]' in settings.read_text()


def test_the_derived_files_are_made_once(
    tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_llama)
    first = load_model(str(path), cache=tmp_path / "cache")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the tokenizer was converted again")

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", fail)
    second = load_model(str(path), cache=tmp_path / "cache")
    assert second.source == first.source


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """The loop of llama.cpp's converter."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama_3_scaling_is_recognized_by_its_factors(
    llama_of: Callable[..., Path], write_gguf: GgufWriter, tmp_path: Path
) -> None:
    checkpoint = llama_of(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = llama3_factors(16, 500000.0, 32.0)
    model = load_model(str(write_gguf(checkpoint, extra={"rope_freqs.weight": factors})), cache=tmp_path)
    assert model.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in model.weights


def test_other_frequency_factors_are_refused(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    factors = np.linspace(1, 2, 8, dtype=np.float32)
    with pytest.raises(UnsupportedError, match="not the scaling of a Llama 3 model"):
        load_model(str(write_gguf(tiny_llama, extra={"rope_freqs.weight": factors})), cache=tmp_path)


def test_linear_scaling_is_taken_over_and_others_are_refused(
    tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path
) -> None:
    def scale(kind: gguf.RopeScalingType) -> Callable[[gguf.GGUFWriter], None]:
        def add(writer: gguf.GGUFWriter) -> None:
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(4.0)

        return add

    model = load_model(str(write_gguf(tiny_llama, values=scale(gguf.RopeScalingType.LINEAR))), cache=tmp_path)
    assert model.config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedError, match="rope scaling yarn"):
        load_model(str(write_gguf(tiny_llama, values=scale(gguf.RopeScalingType.YARN))), cache=tmp_path)


def test_gemma_3_has_an_offset_in_its_norms_and_two_ropes(
    family_of: Callable[[str], Path], write_gguf: GgufWriter, tmp_path: Path
) -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    directory = gemma_of(family_of, tmp_path, head_dim=256)
    model = load_model(str(write_gguf(directory, arch="gemma3", values=scale)), cache=tmp_path)
    original = load_model(str(directory), cache=tmp_path)
    assert model.weights.keys() == original.weights.keys()
    for name, weight in model.weights.items():
        # Adding one and taking it away rounds twice.
        torch.testing.assert_close(weight.load(), original.weights[name].load(), rtol=0, atol=2.4e-7)
    assert model.config["rope_parameters"] == original.config["rope_parameters"]
    assert model.config["sliding_window"] == original.config["sliding_window"]


def test_heads_whose_scale_the_file_does_not_store_are_refused(
    family_of: Callable[[str], Path], write_gguf: GgufWriter, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="heads of 16 columns need query_pre_attn_scalar"):
        load_model(str(write_gguf(family_of("gemma3"), arch="gemma3")), cache=tmp_path)


def gemma_of(family_of: Callable[[str], Path], folder: Path, *, head_dim: int) -> Path:
    """The tiny Gemma 3 with heads of another size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = folder / "gemma"
    shutil.copytree(family_of("gemma3"), directory)
    config = AutoConfig.from_pretrained(directory)
    config.head_dim = config.query_pre_attn_scalar = head_dim
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    network.save_pretrained(directory)
    return directory


def test_a_truncated_file_is_refused_at_every_length(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    whole = write_gguf(tiny_llama).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [8, 20, 24, 60, 200, 3000, 12_000, 20_000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated"):
            read_header(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" * 10, b"GGML" + bytes(100)])
def test_another_kind_of_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a GGUF file"):
        load_model(str(path), cache=tmp_path / "cache")


def test_damaged_headers_are_input_errors(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tiny_llama).read_bytes())
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    for _ in range(200):
        damaged = bytearray(whole)
        for position in generator.integers(4, 2000, 3):
            damaged[position] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except InputError as error:
            assert str(path) in error.message  # noqa: PT017


def test_an_unknown_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(InputError, match="GGUF version 1"):
        read_header(path)


def test_an_unknown_architecture_is_named(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="GGUF architecture lama is not supported") as caught:
        load_model(str(write_gguf(tiny_llama, arch="lama")), cache=tmp_path)
    assert caught.value.hint == "supported: gemma3, llama; other families are read from safetensors checkpoints"


def test_missing_tensors_are_named(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, skip=("blk.0.attn_q.weight", "blk.2.ffn_up.weight"))
    with pytest.raises(
        InputError, match=r"lacks 2 tensors.*blk\.0\.attn_q\.weight \(model\.layers\.0\.self_attn\.q_proj"
    ):
        load_model(str(path), cache=tmp_path)


def test_tensors_without_a_place_are_refused(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, extra={"blk.0.attn_q.bias": np.ones(64, np.float32)})
    with pytest.raises(UnsupportedError, match=r"no place for: blk\.0\.attn_q\.bias"):
        load_model(str(path), cache=tmp_path)


def test_one_part_of_several_is_refused(tiny_llama: Path, write_gguf: GgufWriter, tmp_path: Path) -> None:
    path = write_gguf(tiny_llama, values=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(UnsupportedError, match="one of 3 parts"):
        load_model(str(path), cache=tmp_path)


@pytest.mark.real_model
def test_the_real_file_equals_what_transformers_makes_of_it(smollm2: Any, smollm2_spec: str) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    from llmopt.optimizer.cache import cache_root
    from llmopt.optimizer.sources import locate

    path = locate(smollm2_spec, cache=cache_root())
    network = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    parameters = dict(network.named_parameters())
    assert smollm2.weights.keys() == parameters.keys()
    for name, weight in smollm2.weights.items():
        assert torch.equal(weight.load(), parameters[name]), name
