"""GGUF files and recipes of the tiny model, and passes of another distribution.

The GGUF files are written with the gguf library the way llama.cpp's converter lays tensors out.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

GgufWriter = Callable[..., Path]
RecipeWriter = Callable[..., Path]
Installer = Callable[..., Path]

GATE = {"metric": "kl", "max": 10, "windows": 2, "tokens": 32}
"""Passed by any quantization of the tiny model, and measured in no time."""


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row ``h*d + i`` of the first half of a head goes to ``h*d + 2i``, of the second half to ``h*d + 2i + 1``."""
    size = len(weight) // heads
    rows = []
    for head in range(heads):
        for index in range(size // 2):
            rows += [head * size + index, head * size + size // 2 + index]
    return weight[rows]


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template((directory / "chat_template.jinja").read_text())


@pytest.fixture
def write_gguf(tmp_path: Path) -> GgufWriter:
    """Writes the checkpoint in ``directory`` as GGUF; ``kind`` is how its matrices are stored.

    ``skip`` leaves tensors out by their GGUF name, ``extra`` adds some, ``values`` adds metadata.
    """

    def write(
        directory: Path,
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        *,
        arch: str = "llama",
        skip: tuple[str, ...] = (),
        extra: dict[str, np.ndarray] | None = None,
        values: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    ) -> Path:
        config = json.loads((directory / "config.json").read_text())
        path = tmp_path / f"model-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_name("tiny")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        rope = config["rope_parameters"]
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        if arch == "gemma3":
            writer.add_key_length(config["head_dim"])
            writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_vocab_size(config["vocab_size"])
        add_tokenizer(writer, directory)
        values(writer)
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(kinds.get(arch, gguf.MODEL_ARCH.LLAMA), config["num_hidden_layers"])
        for name, tensor in load_file(directory / "model.safetensors").items():
            theirs = names.get_name(name, try_suffixes=(".weight",))
            stored = tensor
            if arch == "gemma3" and name.endswith("norm.weight"):
                stored = tensor + 1
            if arch == "llama" and "q_proj" in name:
                stored = interleaved(tensor, config["num_attention_heads"])
            if arch == "llama" and "k_proj" in name:
                stored = interleaved(tensor, config["num_key_value_heads"])
            if theirs in skip:
                continue
            if tensor.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
                writer.add_tensor(theirs, gguf.quantize(stored, kind), raw_dtype=kind)
            else:
                writer.add_tensor(theirs, stored)
        for name, tensor in (extra or {}).items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def recipe_of(tiny_llama: Path, tmp_path: Path) -> RecipeWriter:
    """Writes a recipe that builds the tiny model in W8A8 within a second; keywords replace its keys."""

    def write(name: str = "recipe.yaml", **changes: Any) -> Path:
        settings = {
            "version": 1,
            "model": str(tiny_llama),
            "passes": [{"round_to_nearest": {"scheme": "W8A8"}}],
            "export": [{"onnx": {"target": "cpu"}}],
            "accept": [GATE],
            "verify": "none",
            "resources": {"threads": 1},
        }
        path = tmp_path / name
        path.write_text(json.dumps(settings | changes), encoding="utf-8")  # JSON is YAML
        return path

    return write


@pytest.fixture
def install_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Puts a distribution with a weight pass on the path; returns the folder, for the PYTHONPATH of a subprocess."""
    folder = tmp_path / "site"
    folder.mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(str(folder))
    added: list[str] = []

    def install(name: str, source: str) -> Path:
        module = f"{name}_of_{tmp_path.name.replace('-', '_')}"
        added.append(module)
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        info = folder / f"{name}_passes-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-passes\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[llmopt.passes]\n{name} = {module}\n")
        return folder

    yield install
    for module in added:
        sys.modules.pop(module, None)
