"""What linears cost, against what checkpoints and engines really store."""

import pytest

from llmopt.exporters.onnx.lowering import finished, stages
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.target import TARGETS
from llmopt.passes._cost import checkpoint_bits, engine_bytes, other_engine_bytes
from llmopt.passes.round_to_nearest import RoundToNearest

W4 = PRESETS["W4A16"]


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (W4, 4 + 16 / 128),
        (W4.with_group_size(32), 4.5),
        (PRESETS["W4A16_ASYM"].with_group_size(32), 4 + 20 / 32),
        (PRESETS["W8A16"], 8 + 16 / 256),
        (PRESETS["W8A8"], 8 + 16 / 256),
        (PRESETS["FP8_BLOCK"], 8 + 16 / 128**2),
        (None, 16),
    ],
)
def test_bits_of_a_checkpoint_count_scales_and_zero_points(scheme, bits) -> None:
    assert checkpoint_bits((512, 256), scheme) == 512 * 256 * bits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("scheme", "group"),
    [
        ("W4A16", 64),
        ("W4A16", 32),
        ("W4A16", 16),
        ("W4A16_ASYM", 32),
        ("W3A16", 32),
        ("W2A16", 32),
        ("W8A16", -1),
        ("W8A8", None),
    ],
)
def test_bytes_are_those_of_the_lowered_graph(float_model_of, scheme, group, tied) -> None:
    model = float_model_of(tie_word_embeddings=tied, num_hidden_layers=2)
    quantizer = RoundToNearest(scheme=scheme, group_size=group)
    graph, _ = finished(stages(quantizer.run(model, PassContext()), TARGETS["cpu"], capacity=8))
    # A table that embedding and head share has two names, and is written once.
    stored = sum(map(len, {value.const_value.tobytes() for value in graph.graph.initializers.values()}))
    assigned = quantizer.assign(model)
    inside = sum(
        engine_bytes(model.weights[model.weight_of(module)].shape, assigned[module]) for module in model.linears()[:-1]
    )
    found = inside + other_engine_bytes(model, assigned["lm_head"])
    # Rope tables and small constants come on top.
    assert 0 <= stored - found < 6000
