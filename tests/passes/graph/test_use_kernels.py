"""ONNX Runtime's kernels and ours compute the same."""

import numpy as np
import pytest
import torch

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.kernels import DOMAIN
from llmopt.optimizer.target import TARGETS
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.kv_cache import KvCache

LOWERED = TARGETS["cpu"].graph_passes
CLOSE = 5e-6
"""Both sum the same float32 products, in another order."""

FLIPPED = 0.02
"""Activations that round the other way: a 127th of a row's largest in one column, seen through the layers behind."""


def ours(result):
    return sorted(node.op_type for node in result.graph.graph if node.domain == DOMAIN)


def test_every_attention_gets_our_kernel(rewrite_model, model_of):
    result = rewrite_model("use_kernels", model_of(num_hidden_layers=2), after=LOWERED)
    assert ours(result) == ["GroupQueryAttention"] * 2
    assert result.applied == 2
    assert result.difference() < CLOSE


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3", "gpt_neox", "qwen3", "falcon", "gpt2", "opt", "olmo2"])
def test_attentions_of_all_kinds_get_it(rewrite_model, family_model, name):
    result = rewrite_model("use_kernels", family_model(name), after=LOWERED)
    assert ours(result) == ["GroupQueryAttention"] * result.applied
    assert "SlotAttention" not in result.ops
    assert result.difference() < CLOSE


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_an_int8_cache_has_a_kernel_of_its_own(rewrite_model, model_of, strategy):
    ids = torch.arange(64).reshape(2, 32) % 50
    context = PassContext(calibration=lambda: Tokens("text", ids, ""))
    model = KvCache(strategy=strategy).run(model_of(num_hidden_layers=2), context)
    result = rewrite_model("use_kernels", model, after=LOWERED)
    assert ours(result) == ["GroupQueryAttentionInt8"] * 2
    assert result.difference() < CLOSE


def test_a_layer_rounds_four_values_and_the_head_one(rewrite_model, model_of):
    result = rewrite_model("use_kernels", model_of("W8A8", num_hidden_layers=2), after=LOWERED)
    assert ours(result) == sorted(
        ["GroupQueryAttention", "QuantizeGatedRows"] * 2 + ["QuantizeNormedRows"] * 4 + ["QuantizeRows"] * 3
    )
    assert not {"Abs", "Div", "QuantizeLinear"} & result.ops.keys()
    assert result.difference() < FLIPPED


def chain(axes=-1, step=1 / 127, middle=128):
    def write(builder, x):
        largest = builder.op("ReduceMax", builder.op("Abs", x), builder.constant(np.array([axes]), "axes"), keepdims=1)
        numbers = builder.constant(np.float32(step), "step"), builder.constant(np.uint8(middle), "middle")
        integers = builder.op("QuantizeLinear", builder.op("Div", x, largest), *numbers)
        return builder.op("Mul", builder.op("DequantizeLinear", integers, *numbers), largest)

    return write


def test_a_rounding_that_is_read_in_full_becomes_one_operator(rewrite, graph_of, numbers):
    result = rewrite("use_kernels", graph_of(chain(), x=("float32", ("n", 24))), {"x": numbers(5, 24)})
    assert (result.applied, ours(result)) == (1, ["QuantizeRows"])
    assert result.difference() < 1e-6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"axes": 0}, "the kernel looks for the largest of each row"),
        ({"step": 1 / 100}, "127ths"),
        ({"middle": 0}, "127ths"),
    ],
)
def test_another_rounding_stays(rewrite, graph_of, numbers, changes, reason):
    result = rewrite("use_kernels", graph_of(chain(**changes), x=("float32", ("n", 24))), {"x": numbers(5, 24)})
    assert result.applied == 0
    assert result.unchanged
    assert reason in result.declined[0]
