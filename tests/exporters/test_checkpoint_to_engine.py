"""A quantized checkpoint becomes an engine without the loss of a bit: the kernels multiply with its own integers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.exporters.checkpoint.exporter import Checkpoint
from llmopt.exporters.checkpoint.gptq import Gptq
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

DOWN = "model.layers.1.mlp.down_proj"


def kernel(model: Model, directory: Path) -> ir.Node:
    """The MatMulNBits of one down projection in the engine that is made of ``model``."""
    Onnx(capacity=32).export(model, directory, PassContext(verify="none"))
    graph = ir.load(directory / "engine/model.onnx").graph
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    found = [node for node in nodes if str(node.inputs[1].name).startswith(DOWN)]
    assert len(found) == 1, [str(node.inputs[1].name) for node in nodes]
    return found[0]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("gptq", {"scheme": "W4A16", "group_size": 16}),
        ("gptq", {"scheme": "W8A16", "group_size": 32}),
        ("gptq_v2", {"scheme": "W4A16_ASYM", "group_size": 16}),
        ("awq", {"scheme": "W4A16_ASYM", "group_size": 16}),
        ("compressed-tensors", {"scheme": "W4A16", "group_size": 16}),
    ],
    ids=str,
)
def test_kernels_have_the_checkpoints_integers(form: Any, options, tiny_llama_untied: Path, tmp_path: Path) -> None:
    source = load_model(str(tiny_llama_untied), cache=tmp_path / "cache")
    made = RoundToNearest(head="none", **options).run(source, PassContext())
    Checkpoint(format=form).write(made, tmp_path / "it", PassContext())
    model = load_model(str(tmp_path / "it"), cache=tmp_path / "cache")
    weight = model.weights[f"{DOWN}.weight"]
    assert isinstance(weight, QuantWeight)
    tensors, bits = weight.load(), weight.scheme.weights.num_bits
    node = kernel(model, tmp_path / "build")
    packed = node.inputs[1].const_value.numpy()
    size = int(node.attributes["block_size"].as_int())
    rows, columns = weight.shape
    assert node.attributes["bits"].as_int() == bits
    numbers = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
    unsigned = torch.from_numpy(numbers.reshape(rows, columns).astype(np.int16))
    assert torch.equal(unsigned - (1 << (bits - 1)), tensors.values.to(torch.int16))
    scales = torch.from_numpy(node.inputs[2].const_value.numpy().reshape(rows, -1).copy())
    assert torch.equal(scales, tensors.scale.repeat_interleave(columns // tensors.scale.shape[1] // size, 1))


def test_experts_packed_one_by_one_are_read(family_of, tmp_path: Path) -> None:
    """As GPTQModel and vLLM have mixtures of experts; transformers' own checkpoints stack them."""
    source = load_model(str(family_of("qwen3_moe")), cache=tmp_path / "cache")
    made = RoundToNearest(scheme="W4A16", group_size=16, head="none").run(source, PassContext())
    layout, folder = Gptq("gptq"), tmp_path / "it"
    Checkpoint(format="safetensors").write(made, folder, PassContext())
    packed = {
        name.removesuffix(".weight"): each for name, each in made.weights.items() if isinstance(each, QuantWeight)
    }
    floats = load_file(folder / "model.safetensors")
    for module, weight in packed.items():
        part = layout.part(module, weight, torch.float16)
        del floats[f"{module}.weight"]
        floats |= dict(zip(part.tensors, part.blocks(), strict=True))
    save_file({name: tensor.contiguous() for name, tensor in floats.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = layout.config(made, packed)
    (folder / "config.json").write_text(json.dumps(config))
    found = load_model(str(folder), cache=tmp_path / "cache")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    ours, theirs = found.weights[name], made.weights[name]
    assert isinstance(ours, QuantWeight)
    assert isinstance(theirs, QuantWeight)
    assert torch.equal(ours.load().values, theirs.load().values)
    Onnx(capacity=32).check(found)
