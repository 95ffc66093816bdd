"""GGUF files as a model source: tensors under Hugging Face names, dequantized when asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.checkpoint import some
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.gguf_header import Header, TensorEntry
from llmopt.optimizer.model import DenseWeight

__all__ = ["architecture", "check_scale", "llama3_factors", "open_weights", "rope_parameters"]

_SCORES = "query_pre_attn_scalar"

_WHOLE = "full_attention"
"""Layers without a window, where the two kinds have ropes of their own."""

# Frequency factors of Llama 3.1 and later; their config.json says where they come from, GGUF stores only the result.
_ROPE_FACTORS = "rope_freqs.weight"


def architecture(header: Header, path: Path) -> str:
    """The file's ``general.architecture``.

    Raises:
        InputError: It has none.
        UnsupportedError: The file is one part of several, or one of its tensors cannot be dequantized.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise InputError(f"{path} names no general.architecture", hint="is it a model file?")
    if header.metadata.get("split.count", 0) > 1:
        raise UnsupportedError(
            f"{path} is one of {header.metadata['split.count']} parts", hint="join them: llama-gguf-split --merge"
        )
    kinds = {entry.kind for entry in header.tensors.values()}
    unknown = sorted(kind.name for kind in kinds if not _can_dequantize(kind))
    if unknown:
        raise UnsupportedError(
            f"{path} stores tensors as {', '.join(unknown)}, which the gguf library cannot dequantize",
            hint="take a file in F16, BF16, Q8_0 or a K-quant",
        )
    return name


def check_scale(path: Path, arch: Arch, config: Mapping[str, Any]) -> None:
    """Raise ``UnsupportedError`` where the scale of the scores is not ``1 / sqrt(head_dim)``, which no file says.

    Of Gemma 3, the model of 27 billion parameters is such a one; its heads have another size than those of all others.
    """
    scale = arch.attention.scale
    if scale is not None and scale.name == _SCORES and config["head_dim"] != config[_SCORES]:
        raise UnsupportedError(
            f"{path}: heads of {config['head_dim']} columns need {_SCORES}, which a GGUF file does not store",
            hint="take the checkpoint with its config.json",
        )


def open_weights(
    path: Path, header: Header, arch: Arch, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, DenseWeight]:
    """Every tensor of the file as a float32 weight that is dequantized each time it is loaded.

    Args:
        path: The file.
        header: Its header.
        arch: The family, for the names.
        config: The completed config, for the numbers of heads and layers.
        shapes: Hugging Face parameter name -> shape, of all parameters the model may have.

    Raises:
        InputError: A tensor that the model needs is missing.
        UnsupportedError: The file holds tensors that the model has no place for.
    """
    names = _names(arch, int(config["num_hidden_layers"]), shapes)
    if config["tie_word_embeddings"]:
        names.pop(f"{arch.head}.weight", None)
    missing = [f"{theirs} ({ours})" for ours, theirs in names.items() if theirs not in header.tensors]
    if missing:
        raise InputError(f"{path} lacks {len(missing)} tensors that its metadata asks for: {some(missing)}")
    extra = sorted(header.tensors.keys() - set(names.values()) - {_ROPE_FACTORS})
    if extra:
        raise UnsupportedError(f"{path} holds tensors that a plain {arch.name} model has no place for: {some(extra)}")
    heads = _interleaved_heads(arch, config) if arch.gguf_interleaves else {}
    weights = {}
    for ours, theirs in names.items():
        entry = header.tensors[theirs]
        count = next((heads[module] for module in heads if f".{module}." in ours), 0)
        added = arch.norm_offset if ours.endswith("norm.weight") else 0.0
        weights[ours] = DenseWeight(entry.shape, torch.float32, _Tensor(path, entry, count, added))
    return weights


def rope_parameters(path: Path, header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's ``rope_parameters`` with the scaling that transformers leaves in the file.

    Raises:
        UnsupportedError: The scaling is neither linear nor Llama 3's.
    """
    parameters = dict(config["rope_parameters"])
    prefix = f"{header.metadata['general.architecture']}.rope.scaling"
    scaling = header.metadata.get(f"{prefix}.type", "none")
    if scaling == "linear":
        linear = {"rope_type": "linear", "factor": float(header.metadata[f"{prefix}.factor"])}
        if _WHOLE in parameters:  # layers with a window have a rope of their own, which is not scaled
            return {**parameters, _WHOLE: {**parameters[_WHOLE], **linear}}
        return {**parameters, **linear}
    if scaling != "none":
        raise UnsupportedError(f"{path}: rope scaling {scaling} cannot be read from a GGUF file")
    if _ROPE_FACTORS not in header.tensors:
        return parameters
    factors = _Tensor(path, header.tensors[_ROPE_FACTORS])()
    llama3 = {
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(int(config["head_dim"]), float(parameters["rope_theta"]), llama3)
    # The file holds them in float32 of a float64 or float32 computation.
    if expected.shape != factors.shape or not torch.allclose(expected, factors, rtol=1e-4):
        raise UnsupportedError(f"{path}: {_ROPE_FACTORS} is not the scaling of a Llama 3 model")
    return {**parameters, **llama3}


def llama3_factors(head_dim: int, theta: float, rope: Mapping[str, Any]) -> Tensor:
    """By what each of the ``head_dim / 2`` frequencies is divided: float32.

    Source: Llama 3.1's frequency scaling as in transformers' ``rope_type: llama3``.
    """
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _names(arch: Arch, num_layers: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Hugging Face parameter name -> tensor name in the file."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.gguf)
    table = gguf.get_tensor_name_map(kind, num_layers)
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in shapes}


def _interleaved_heads(arch: Arch, config: Mapping[str, Any]) -> dict[str, int]:
    """The query and key linears, below a layer, with their numbers of heads."""
    query, key = arch.attention.query, arch.attention.key
    assert query is not None
    assert key is not None
    return {query: int(config["num_attention_heads"]), key: int(config["num_key_value_heads"])}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Loads one tensor of a file in float32; a ``RowLoader``. What it reads is mapped only while it is in use.

    Attributes:
        path: The file.
        entry: Where it lies.
        interleaved_heads: When not 0, the two halves of each head's rows alternate in the file, and are put apart.
        added: What the file's numbers have more than the checkpoint's: norms have their offset added there.
    """

    path: Path
    entry: TensorEntry
    interleaved_heads: int = 0
    added: float = 0.0

    def __call__(self) -> Tensor:
        tensor = self._dequantized(0, self.entry.shape)
        if not self.interleaved_heads:
            return tensor
        pairs = tensor.reshape(self.interleaved_heads, -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def rows(self, first: int, past_end: int) -> Tensor:
        """See ``RowLoader.rows``."""
        below = self.entry.shape[1:]
        if self.interleaved_heads or not below:
            return self()[first:past_end]
        return self._dequantized(first, (past_end - first, *below))

    def _dequantized(self, first: int, shape: tuple[int, ...]) -> Tensor:
        block, size = gguf.GGML_QUANT_SIZES[self.entry.kind]
        row = math.prod(shape[1:]) // block * size
        packed_shape = (*shape[:-1], shape[-1] // block * size)
        # Copy-on-write, because torch warns of arrays it could not write to.
        packed = np.memmap(self.path, np.uint8, "c", self.entry.offset + first * row, packed_shape)
        values = torch.from_numpy(gguf.dequantize(np.asarray(packed), self.entry.kind))
        return values - self.added if self.added else values
