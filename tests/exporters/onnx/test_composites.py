"""The composites' standard bodies against naive numpy."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from llmopt.calibration.activations import quantize_activations, quantize_per_token
from llmopt.exporters.onnx.composites import (
    DOMAIN,
    OPSET,
    experts,
    lora_add,
    quantize_dequantize_fp8_per_group,
    quantize_dequantize_fp8_per_token,
    quantize_dequantize_per_token,
    quantize_dequantize_static,
    rotate_blocks,
    select_rows,
    sliding_window_mask,
    slot_attention,
)
from llmopt.exporters.onnx.standard import IR_VERSION
from llmopt.optimizer.scheme import PRESETS, QuantSpec

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 2, 8, 12
FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL
KINDS = {"float32": FLOAT, "int64": ir.DataType.INT64, "bool": BOOL}


def run(function, inputs, outputs=1, dtype=FLOAT, **attributes):
    """Call ``function`` in a graph of one node; ``inputs`` maps its input names to arrays, in order."""
    values = [
        ir.Value(name=name, type=ir.TensorType(KINDS[str(array.dtype)]), shape=ir.Shape([None] * array.ndim))
        for name, array in inputs.items()
    ]
    node = ir.node(function.name, values, attributes, domain=DOMAIN, num_outputs=outputs)
    for i, value in enumerate(node.outputs):
        value.name, value.type = f"out{i}", ir.TensorType(dtype)
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


@pytest.mark.parametrize("shape", [(2, 3, 24), (5, 24), (1, 1, 8)])
def test_columns_are_rotated_block_by_block(numbers, shape):
    x, rotation = numbers(*shape), numbers(8, 8)
    (found,) = run(rotate_blocks(), {"x": x, "rotation": rotation})
    expected = x @ np.kron(np.eye(shape[-1] // 8, dtype=np.float32), rotation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [40, 128, 300])
@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK"])
def test_fp8_is_rounded_as_the_reference_rounds_it(numbers, name, columns):
    x = numbers(2, 3, columns) * np.float32(10)
    x[1, 2] = 0
    grouped = name == "FP8_BLOCK"
    function = quantize_dequantize_fp8_per_group() if grouped else quantize_dequantize_fp8_per_token()
    (found,) = run(function, {"x": x}, **({"size": 128} if grouped else {}))
    expected = quantize_activations(torch.from_numpy(x), PRESETS[name].input_activations).numpy()
    np.testing.assert_array_equal(found, expected)  # the same float operations in the same order


@pytest.mark.parametrize(("kind", "scale"), [("int", 0.05), ("float", 0.003)])
def test_a_static_scale_rounds_as_the_reference_does(numbers, kind, scale):
    x = np.concatenate([numbers(4, 40), [[1e6, -1e6, 0, scale] * 10]]).astype(np.float32)
    inputs = {"x": x, "scale": np.array(scale, np.float32)}
    (found,) = run(quantize_dequantize_static(kind), inputs)
    spec = QuantSpec(num_bits=8, type=kind, strategy="tensor")
    expected = quantize_activations(torch.from_numpy(x), spec, torch.tensor([scale])).numpy()
    np.testing.assert_array_equal(found, expected)


def test_rows_count_through_batch_and_tokens(numbers):
    x, rows = numbers(3, 4, 5), np.array([11, 0, 4, 4])
    (found,) = run(select_rows(), {"x": x, "rows": rows})
    np.testing.assert_array_equal(found, x.reshape(12, 5)[rows])


def seen(position, window):
    """The cached tokens that the token at ``position`` sees."""
    first = 0 if window is None else max(position - window + 1, 0)
    return slice(first, position + 1)


def mask_of(window, lengths, tokens):
    """Token by token: bool ``[batch, 1, tokens, CAPACITY]``."""
    mask = np.zeros((len(lengths), 1, tokens, CAPACITY), bool)
    for b, length in enumerate(lengths):
        for t in range(tokens):
            mask[b, 0, t, seen(length + t, window)] = True
    return mask


def naive_attention(query, key, value, past_key, past_value, lengths, *, scale, softcap, window):
    """Token by token and head by head, in float64."""
    past_key, past_value = past_key.astype(np.float64), past_value.astype(np.float64)
    batch, tokens, _ = query.shape
    output = np.zeros((batch, tokens, HEADS, HEAD_DIM))
    for b in range(batch):
        for t in range(tokens):
            p = lengths[b] + t
            past_key[b, :, p] = key[b, t].reshape(KV_HEADS, HEAD_DIM)
            past_value[b, :, p] = value[b, t].reshape(KV_HEADS, HEAD_DIM)
            for head, q in enumerate(query[b, t].reshape(HEADS, HEAD_DIM)):
                kv, reached = head // (HEADS // KV_HEADS), seen(p, window)
                scores = scale * past_key[b, kv, reached] @ q
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores)
                output[b, t, head] = weights @ past_value[b, kv, reached] / weights.sum()
    return output.reshape(batch, tokens, -1), past_key, past_value


CALLS = pytest.mark.parametrize(
    ("tokens", "lengths"), [(5, [0]), (5, [7]), (4, [0, 0, 0]), (1, [0, 5, 11]), (3, [2, 9, 0])]
)


@CALLS
@pytest.mark.parametrize("window", [None, 1, 3, 7, CAPACITY + 1])
@pytest.mark.parametrize(("scale", "softcap"), [(HEAD_DIM**-0.5, 0.0), (1.0, 0.0), (2.0, 1.5)])
def test_attention_is_the_naive_one(numbers, tokens, lengths, window, scale, softcap):
    batch = len(lengths)
    inputs = {
        "query": numbers(batch, tokens, HEADS * HEAD_DIM),
        "key": numbers(batch, tokens, KV_HEADS * HEAD_DIM),
        "value": numbers(batch, tokens, KV_HEADS * HEAD_DIM),
        "past_key": numbers(batch, KV_HEADS, CAPACITY, HEAD_DIM),
        "past_value": numbers(batch, KV_HEADS, CAPACITY, HEAD_DIM),
        "past_lengths": np.array(lengths),
    }
    expected = naive_attention(*inputs.values(), scale=scale, softcap=softcap, window=window)
    if window is not None:
        inputs["mask"] = mask_of(window, lengths, tokens)
    found = run(
        slot_attention(), inputs, 3,
        num_heads=HEADS, kv_num_heads=KV_HEADS, scale=scale, softcap=softcap, is_causal=int(window is None),
    )  # fmt: skip
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-5)


@CALLS
@pytest.mark.parametrize("window", [1, 3, 7, CAPACITY + 1])
def test_a_window_reaches_back_from_each_token(numbers, tokens, lengths, window):
    positions = np.array(lengths)[:, None] + np.arange(tokens)
    past_key = numbers(len(lengths), KV_HEADS, CAPACITY, HEAD_DIM)
    (found,) = run(sliding_window_mask(), {"positions": positions, "past_key": past_key}, dtype=BOOL, window=window)
    np.testing.assert_array_equal(found, mask_of(window, lengths, tokens))


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def naive_experts(x, scores, gate_up, down, *, activation, top_k, normalize):
    """Token by token and expert by expert, in float64."""
    tokens, logits, gate_up, down = (torch.from_numpy(array).double() for array in (x, scores, gate_up, down))
    flat = tokens.reshape(-1, tokens.shape[-1])
    output = torch.zeros_like(flat)
    for t, probabilities in enumerate(logits.reshape(len(flat), -1).softmax(-1)):
        best = probabilities.argsort(descending=True)[:top_k]
        total = probabilities[best].sum() if normalize else 1
        for e in best:
            gate, up = (flat[t] @ gate_up[e]).chunk(2)
            output[t] += probabilities[e] / total * ((ACTIVATIONS[activation](gate) * up) @ down[e])
    return output.reshape(tokens.shape).numpy()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (4, 1)])
def test_a_mixture_is_the_naive_one(numbers, activation, normalize, top_k, shape):
    inputs = {
        "x": numbers(*shape, 16),
        "scores": numbers(*shape, 5),
        "gate_up": numbers(5, 16, 24),
        "down": numbers(5, 12, 16),
    }
    (found,) = run(experts(activation), inputs, top_k=top_k, normalize=int(normalize))
    expected = naive_experts(*inputs.values(), activation=activation, top_k=top_k, normalize=normalize)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_the_shares_of_far_apart_scores_are_finite(numbers):
    """Where a softmax leaves nothing of the second best, its share is zero and not undefined."""
    inputs = {
        "x": numbers(1, 3, 16),
        "scores": 300 * numbers(1, 3, 5),
        "gate_up": numbers(5, 16, 24),
        "down": numbers(5, 12, 16),
    }
    (found,) = run(experts("silu"), inputs, top_k=2, normalize=1)
    expected = naive_experts(*inputs.values(), activation="silu", top_k=2, normalize=True)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("biased", [False, True])
def test_lora_add_changes_each_row_by_its_own_adapter(numbers, biased):
    max_rank, inputs, columns, first = 5, 8, 6, 3
    size = 2 + max_rank * inputs + (max_rank + biased) * columns
    adapters, ranks = np.array([[[2], [0], [1]], [[3], [2], [2]]]), np.array([[9, 5], [9, 2], [9, 0]])
    given = {
        "y": numbers(2, 3, 12),
        "x": numbers(2, 3, inputs),
        "adapters": adapters,
        "factors": numbers(3, size),
        "ranks": ranks,
        "part": np.array([[1, 2, 2 + max_rank * inputs, first, columns, int(biased)]]),
    }
    expected = given["y"].astype(np.float64)
    for place in np.ndindex(2, 3):
        slot = adapters[place][0]
        if slot == 0 or ranks[slot - 1, 1] == 0:
            continue
        rank, own = ranks[slot - 1, 1], given["factors"][slot - 1].astype(np.float64)
        down = own[2:][: rank * inputs].reshape(rank, inputs)
        up = own[2 + max_rank * inputs :][: rank * columns].reshape(rank, columns)
        expected[place][first : first + columns] += up.T @ (down @ given["x"][place])
        if biased:
            expected[place][first : first + columns] += own[-columns:]
    (found,) = run(lora_add(biased=biased), given, max_rank=max_rank)
    np.testing.assert_allclose(found, expected, atol=1e-4)  # sums of 40 float32 products of up to 10
