"""Every family in W8A8: every linear on an integer kernel; and each graph pass verified on a family of each kind."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Experts
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

VERIFIED = (
    "llama-odd",
    "mistral",
    "qwen3",
    "gemma2",
    "phi3-longrope",
    "olmo2",
    "gpt_neox",
    "falcon",
    "opt-350m",
    "mixtral",
)
"""One of each way in which layers are put together; verification takes seconds."""


def test_every_linear_of_a_w8a8_model_multiplies_integers(
    family_name: str, family_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(str(family_of(family_name)), cache=tmp_path / "cache")
    quantized = RoundToNearest(scheme="W8A8").run(model, PassContext())
    fallbacks: list[str] = []
    (tmp_path / "build").mkdir()
    verify = "quick" if family_name in VERIFIED else "none"
    Onnx(capacity=32).export(quantized, tmp_path / "build", PassContext(verify=verify, fallback=fallbacks.append))
    graph = onnx.load(tmp_path / "build/engine/model.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    routers = sum(isinstance(layer.mlp, Experts) for layer in model.decoder.layers)
    projections = 2 if model.decoder.project_in else 0
    assert operators["MatMul"] == routers + projections  # both stay in floating point
    assert (operators["DequantizeLinear"], operators["MatMulNBits"]) == (0, 0)
    assert operators["QMoE"] == routers
    assert operators["MatMulIntegerToFloat"] > 0
    expected = ["attentions take time in proportion to the cache's capacity"] if model.decoder.head_dim % 8 else []
    assert [text for text in fallbacks if not any(known in text for known in expected)] == []


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_ASYM"])
@pytest.mark.parametrize("family_name", ["gemma3", "falcon-40b", "gpt2", "qwen3_moe"])
def test_every_linear_of_a_weight_only_model_has_a_block_kernel(
    family_name: str, scheme: str, family_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(str(family_of(family_name)), cache=tmp_path / "cache")
    quantized = RoundToNearest(scheme=scheme, group_size=16).run(model, PassContext())
    fallbacks: list[str] = []
    (tmp_path / "build").mkdir()
    Onnx(capacity=32).export(quantized, tmp_path / "build", PassContext(verify="none", fallback=fallbacks.append))
    graph = onnx.load(tmp_path / "build/engine/model.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    routers = sum(isinstance(layer.mlp, Experts) for layer in model.decoder.layers)
    assert operators["MatMul"] == routers + (2 if model.decoder.project_in else 0)
    assert operators["MatMulNBits"] > 0
    assert fallbacks == []
