"""compressed-tensors: what llm-compressor writes, and vLLM and transformers load, for integers and FP8 alike.

Layouts: the project's own ``compressors`` for pack-quantized, int-quantized and float-quantized, version 0.20.
"""

from collections.abc import Iterator, Mapping
from operator import mod
from typing import Any, Literal

import torch
from torch import Tensor

from llmopt.exporters.checkpoint.layout import Layout, linears_in_float
from llmopt.exporters.checkpoint.shards import Part
from llmopt.optimizer.bit_stream import packed, unsigned
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["CompressedTensors"]

_VERSION = "0.15.0"
"""Of compressed-tensors that is needed at least."""

_INT8_CACHE = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "tensor",
    "dynamic": False,
    "observer": "minmax",
}
"""With the scales of each layer's attention in ``k_scale`` and ``v_scale``, ``[1]``."""

_Format = Literal["pack-quantized", "int-quantized", "float-quantized"]


class CompressedTensors(Layout):
    """Integers in streams of bits, int8 and FP8; several schemes in one checkpoint.

    ``weight_packed`` int32 ``[out, ceil(in * bits / 32)]`` holds ``values + 2 ** (bits - 1)`` as a stream of bits, and
    ``weight_zero_point`` int32 ``[ceil(out * bits / 32), groups]`` the zero points packed along the rows. In the other
    two formats ``weight`` is int8 or FP8 E4M3 ``[out, in]``. ``weight_scale`` is ``[out, groups]``, or ``[1]`` for a
    tensor.
    """

    def refusal(self, scheme: Scheme, shape: tuple[int, ...] | None = None) -> str | None:
        """See ``Layout.refusal``."""
        weights, inputs = scheme.weights, scheme.input_activations
        if shape is not None and weights.block_structure is not None and any(map(mod, shape, weights.block_structure)):
            blocks = "x".join(map(str, weights.block_structure))
            return f"compressed-tensors takes whole blocks of {blocks} only, and this weight is {shape[0]}x{shape[1]}"
        if weights.type == "int" and weights.strategy not in ("channel", "group", "tensor"):
            return "compressed-tensors takes integers' scales per tensor, per channel or per group"
        if weights.strategy == "tensor" and not weights.symmetric:
            return "compressed-tensors packs zero points of channels and groups only"
        return None if inputs is None else _inputs_refusal(weights, inputs)

    def model_refusal(self, packed: Mapping[str, QuantWeight]) -> str | None:
        """See ``Layout.model_refusal``."""
        ordered = next((module for module, weight in packed.items() if weight.has_group_index), None)
        if ordered is None:
            return None
        return (
            f"{ordered} was quantized in the order of activations (desc_act), which compressed-tensors 0.20 no longer "
            "takes; format: gptq does"
        )

    def part(self, module: str, weight: QuantWeight, dtype: torch.dtype) -> Part:
        """See ``Layout.part``."""
        spec, (rows, columns) = weight.scheme.weights, weight.shape
        form, scales = _format(weight.scheme), spec.scale_shape(rows, columns)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if form == "pack-quantized":
            tensors["weight_packed"] = torch.int32, (rows, -(-columns * spec.num_bits // 32))
            tensors["weight_shape"] = torch.int64, (2,)
        else:
            tensors["weight"] = torch.int8 if form == "int-quantized" else torch.float8_e4m3fn, (rows, columns)
        tensors["weight_scale"] = dtype, (1,) if spec.strategy == "tensor" else scales
        if not spec.symmetric:
            tensors["weight_zero_point"] = torch.int32, (-(-rows * spec.num_bits // 32), scales[1])
        if weight.scheme.needs_input_scale:
            tensors["input_scale"] = dtype, (1,)

        def blocks() -> Iterator[Tensor]:
            stored = weight.load()
            if form == "pack-quantized":
                yield packed(unsigned(stored.values, spec.num_bits), spec.num_bits)
                yield torch.tensor([rows, columns])
            else:
                yield stored.values
            yield stored.scale.to(dtype)
            if stored.zero is not None:
                yield packed(unsigned(stored.zero, spec.num_bits).T.contiguous(), spec.num_bits).T
            if stored.input_scale is not None:
                yield stored.input_scale.to(dtype)

        return Part({f"{module}.{name}": entry for name, entry in tensors.items()}, blocks)

    def config(self, model: Model, packed: Mapping[str, QuantWeight]) -> dict[str, Any]:
        """See ``Layout.config``: modules by scheme, and by name all that stay in float."""
        groups: dict[Scheme, list[str]] = {}
        for module, weight in packed.items():
            groups.setdefault(weight.scheme, []).append(module)
        formats = {_format(scheme) for scheme in groups}
        return {
            "quant_method": "compressed-tensors",
            "version": _VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None if model.cache_scales(0) is None else _INT8_CACHE,
            "ignore": linears_in_float(model, packed),
            "config_groups": {
                f"group_{number}": _group(scheme, ["Linear"] if len(groups) == 1 else modules)
                for number, (scheme, modules) in enumerate(groups.items())
            },
        }


def _inputs_refusal(weights: QuantSpec, inputs: QuantSpec) -> str | None:
    if weights.type == "int" and (weights.num_bits != 8 or not weights.symmetric):
        return "compressed-tensors stores integers beside rounded inputs as symmetric 8-bit numbers"
    by_token = ("token", "group") if weights.type == "float" else ("token",)
    fits = inputs.strategy in by_token if inputs.dynamic else inputs.strategy == "tensor"
    if not fits or (inputs.type, inputs.num_bits, inputs.symmetric) != (weights.type, 8, True):
        return "its loaders round inputs to 8 bits as weights are, symmetric: dynamic per token, or static per tensor"
    return None


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    inputs = scheme.input_activations
    return {
        "targets": targets,
        "format": _format(scheme),
        "weights": _arguments(scheme.weights),
        "input_activations": None if inputs is None else _arguments(inputs),
        "output_activations": None,
    }


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    """A spec in the words of compressed-tensors, which are ours and a few more."""
    observer = None if spec.dynamic else "minmax"
    return {**spec.model_dump(mode="json"), "actorder": None, "observer": observer, "observer_kwargs": {}}


def _format(scheme: Scheme) -> _Format:
    if scheme.weights.type == "float":
        return "float-quantized"
    return "pack-quantized" if scheme.input_activations is None else "int-quantized"
