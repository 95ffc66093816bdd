"""The composites' standard bodies against naive numpy."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from llmopt.calibration.reference import quantize_per_token
from llmopt.exporters.onnx.composites import DOMAIN, OPSET, quantize_dequantize_per_token, select_rows, slot_attention
from llmopt.exporters.onnx.standard import IR_VERSION

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 2, 8, 12
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def run(function, inputs, outputs=1, **attributes):
    """Call ``function`` in a graph of one node; ``inputs`` maps its input names to arrays."""
    kinds = {np.dtype(np.float32): FLOAT, np.dtype(np.int64): INT64}
    values = [
        ir.Value(name=name, type=ir.TensorType(kinds[array.dtype]), shape=ir.Shape([None] * array.ndim))
        for name, array in inputs.items()
    ]
    node = ir.node(function.name, values, attributes, domain=DOMAIN, num_outputs=outputs)
    for i, value in enumerate(node.outputs):
        value.name, value.type = f"out{i}", ir.TensorType(FLOAT)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="one")
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[function]))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, inputs
    )


@pytest.fixture
def numbers():
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape, np.float32)


def test_activations_are_rounded_as_the_reference_rounds_them(numbers):
    x = numbers(2, 3, 40) * np.float32(10)
    (found,) = run(quantize_dequantize_per_token(), {"x": x})
    expected = quantize_per_token(torch.from_numpy(x)).numpy()
    step = np.abs(x).max(-1, keepdims=True) / 127
    # One float operation apart: a number on the border of two integers may round either way, nothing else differs.
    off = np.abs(found - expected) / step
    assert ((off < 1e-4) | (np.abs(off - 1) < 1e-4)).all()
    assert (off < 1e-4).mean() > 0.99
    assert np.abs(found - x).max() <= (step / 2 * 1.0001).max()


def test_the_largest_number_of_a_token_is_kept(numbers):
    x = numbers(1, 5, 16)
    x[0, 1] = -np.abs(x[0, 1])
    (found,) = run(quantize_dequantize_per_token(), {"x": x})
    largest = np.abs(x).argmax(-1)[..., None]
    np.testing.assert_allclose(np.take_along_axis(found, largest, -1), np.take_along_axis(x, largest, -1), rtol=1e-6)


def test_a_token_of_zeros_stays_zeros(numbers):
    x = numbers(2, 2, 16)
    x[0, 1] = 0
    (found,) = run(quantize_dequantize_per_token(), {"x": x})
    assert (found[0, 1] == 0).all()
    assert np.isfinite(found).all()


def test_rows_count_through_batch_and_tokens(numbers):
    x, rows = numbers(3, 4, 5), np.array([11, 0, 4, 4])
    (found,) = run(select_rows(), {"x": x, "rows": rows})
    np.testing.assert_array_equal(found, x.reshape(12, 5)[rows])


def turned(x, cos, sin):
    """Rope of the two halves of ``[heads, head_dim]``."""
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def naive_attention(query, key, value, past_key, past_value, lengths, cos, sin, scale):
    """Token by token and head by head, in float64."""
    past_key, past_value = past_key.astype(np.float64), past_value.astype(np.float64)
    batch, tokens, _ = query.shape
    output = np.zeros((batch, tokens, HEADS, HEAD_DIM))
    for b in range(batch):
        for t in range(tokens):
            p = lengths[b] + t
            past_key[b, :, p] = turned(key[b, t].reshape(KV_HEADS, HEAD_DIM), cos[p], sin[p])
            past_value[b, :, p] = value[b, t].reshape(KV_HEADS, HEAD_DIM)
            for head, q in enumerate(turned(query[b, t].reshape(HEADS, HEAD_DIM), cos[p], sin[p])):
                kv = head // (HEADS // KV_HEADS)
                weights = np.exp(scale * past_key[b, kv, : p + 1] @ q)
                output[b, t, head] = weights @ past_value[b, kv, : p + 1] / weights.sum()
    return output.reshape(batch, tokens, -1), past_key, past_value


@pytest.mark.parametrize(("tokens", "lengths"), [(5, [0]), (5, [7]), (4, [0, 0, 0]), (1, [0, 5, 11]), (3, [2, 9, 0])])
@pytest.mark.parametrize("scale", [HEAD_DIM**-0.5, 1.0])
def test_attention_is_the_naive_one(numbers, tokens, lengths, scale):
    batch = len(lengths)
    angles = np.arange(CAPACITY)[:, None] / 10 ** (np.arange(HEAD_DIM // 2) / 4)
    inputs = {
        "query": numbers(batch, tokens, HEADS * HEAD_DIM),
        "key": numbers(batch, tokens, KV_HEADS * HEAD_DIM),
        "value": numbers(batch, tokens, KV_HEADS * HEAD_DIM),
        "past_key": numbers(batch, KV_HEADS, CAPACITY, HEAD_DIM),
        "past_value": numbers(batch, KV_HEADS, CAPACITY, HEAD_DIM),
        "past_lengths": np.array(lengths),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    function = slot_attention(num_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    found = run(function, inputs, 3, num_heads=HEADS, kv_num_heads=KV_HEADS, scale=scale)
    for result, expected in zip(found, naive_attention(*inputs.values(), scale), strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-5)
