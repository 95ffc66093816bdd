"""Attention without a kernel in TensorRT: the same numbers in several steps, and only where there is no kernel."""

import pytest

TOLERANCE = 1e-5
"""Of the largest logit: sums of a few dozen float32 numbers in another order."""


@pytest.mark.parametrize(
    ("family", "expanded"),
    [("gemma2", 3), ("mistral", 3), ("llama-odd", 3), ("llama", 0), ("qwen2-window", 0)],
)
def test_soft_caps_and_odd_heads_are_computed_in_steps(family, expanded, family_model, rewrite_model):
    result = rewrite_model("expand_attention", family_model(family), after=["inline_composites"])

    assert result.applied == expanded
    assert result.ops["Softmax"] == expanded
    assert result.ops["Attention"] == 3 - expanded
    assert result.difference() < TOLERANCE
    assert bool(result.fallbacks) == bool(expanded)


def test_encoders_keep_their_attention(rewrite, graph_of):
    def write(builder, x):
        return builder.op("Attention", x, x, x, q_num_heads=2, kv_num_heads=2)

    graph = graph_of(write, x=("float32", [1, 3, 10]))

    assert rewrite("expand_attention", graph).applied == 0
