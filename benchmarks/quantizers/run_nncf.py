"""NNCF's 4-bit weight compression, symmetric, groups of 32, on OpenVINO's graph: run in its own environment.

What is written are the numbers that the compressed graph multiplies with, and how many bits it stores them in.
"""

import json
import sys
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

_BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8, "f16": 16, "f32": 16}
"""Of stored constants; scales in float32 are counted as a 16-bit model's."""


class Logits(torch.nn.Module):
    """A causal model as a function of ids alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of all positions; the mask is made here because transformers' own cannot be traced."""
        places = torch.arange(input_ids.shape[1])
        mask = torch.where(places[None] > places[:, None], torch.finfo(torch.float32).min, 0.0)[None, None]
        found = self.model(input_ids=input_ids, attention_mask=mask, position_ids=places[None], use_cache=False)
        logits: torch.Tensor = found.logits
        return logits


def weights_below(output: Any) -> tuple[list[Any], Any]:
    """The constants that ``output`` is made of, if it is made of nothing else, and their name."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return [node], node.get_friendly_name()
    found: list[Any] = []
    if not node.inputs():
        return [], None
    for each in node.inputs():
        constants, _ = weights_below(each.get_source_output())
        if not constants:
            return [], None
        found += constants
    return found, found[0].get_friendly_name()


def value_of(output: Any) -> Any:
    """What a subgraph of constants computes, in float32."""
    result = ov.opset13.convert(output, "f32")
    model = ov.Model([result.output(0)], [])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({})[0], dtype=np.float32)


def extra_scale(output: Any) -> Any:
    """What AWQ multiplies activations with before a linear, as the graph's ``awq_mul``; None where there is none."""
    node = output.get_node()
    if not node.get_friendly_name().endswith("awq_mul"):
        return None
    for each in node.inputs():
        constants, _ = weights_below(each.get_source_output())
        if constants:
            return value_of(each.get_source_output())
    return None


def parameter(name: str, known: set[str]) -> str | None:
    """The model's own name of a constant of the graph, which has prefixes and suffixes around it."""
    fitting = [each for each in known if f".{each}" in f".{name}"]
    return max(fitting, key=len) if fitting else None


def stored_bits(constant: Any) -> int:
    """Of values, scales and zero points; the sizes that reshapes are given, and single numbers, are not stored."""
    count = int(np.prod(list(constant.shape)))
    return count * _BITS.get(constant.get_element_type().get_type_name(), 0) if count > 1 else 0


def collect(model: Any, known: set[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Parameter name -> values of all linears and norms, and module name -> stored bits of the packed ones."""
    weights: dict[str, Any] = {}
    bits: dict[str, int] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in {"MatMul", "Multiply"}:
            continue
        for index, each in enumerate(node.inputs()):
            constants, label = weights_below(each.get_source_output())
            name = parameter(label, known) if constants else None
            if name is None:
                continue
            value = value_of(each.get_source_output())
            if node.get_type_name() == "Multiply":
                weights[name] = value.reshape(-1)
                continue
            value = value if node.get_attributes()["transpose_b"] else value.T
            scale = extra_scale(node.input(1 - index).get_source_output())
            weights[name] = np.ascontiguousarray(value if scale is None else value * scale.reshape(1, -1))
            packed = [c for c in constants if c.get_element_type().get_type_name() in {"i4", "u4"}]
            if packed:
                bits[name.removesuffix(".weight")] = sum(map(stored_bits, constants))
    return weights, bits


def main() -> None:
    """Convert, compress and write."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    windows = np.load(settings["windows"])
    network = AutoModelForCausalLM.from_pretrained(settings["checkpoint"], dtype=torch.float32).eval()
    known = set(network.state_dict())
    graph = ov.convert_model(Logits(network), example_input=torch.from_numpy(windows[:1, :64]))
    compressed = nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=32,
        ratio=1.0,
        dataset=nncf.Dataset([window[None] for window in windows]),
        subset_size=len(windows),
        **settings["options"],
    )
    weights, bits = collect(compressed, known)
    output = Path(settings["output"])
    output.mkdir(parents=True)
    save_file(weights, output / "model.safetensors")
    (output / "bits.json").write_text(json.dumps(bits))


if __name__ == "__main__":
    main()
