"""Composite operators of the standard graph: one node each, whose standard body is the reference for its lowering.

They are ONNX local functions in the domain ``llmopt``. A graph pass matches the one node; a runtime that knows
nothing of it runs the body.
"""

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx.builder import GraphBuilder

__all__ = ["DOMAIN", "OPSET", "quantize_dequantize_per_token", "select_rows", "slot_attention"]

DOMAIN = "llmopt"
OPSET = 24


def _ints(builder: GraphBuilder, *values: int) -> ir.Value:
    return builder.op("Constant", value_ints=list(values))


def _function(
    name: str, inputs: list[ir.Value], outputs: list[ir.Value], builder: GraphBuilder, attributes: list[str]
) -> ir.Function:
    graph = ir.Graph(inputs, outputs, nodes=builder.nodes, opset_imports={"": OPSET}, name=name)
    declared = [ir.Attr(attribute, ir.AttributeType.UNDEFINED, None) for attribute in attributes]
    return ir.Function(DOMAIN, name, graph=graph, attributes=declared)


def _values(*names: str) -> list[ir.Value]:
    return [ir.Value(name=name) for name in names]


def quantize_dequantize_per_token() -> ir.Function:
    """``QuantizeDequantizePerToken(x) -> y``: int8 rounding of activations with one scale a token.

    For each row of ``x`` float32 ``[..., columns]``: ``m = max|x|``, ``q = round(x / m * 127)``,
    ``y = q / 127 * m``. The integers are kept as uint8 around 128, as the CPU's kernels take them.
    """
    builder = GraphBuilder()
    (x,) = _values("x")
    largest = builder.op("ReduceMax", builder.op("Abs", x), _ints(builder, -1), keepdims=1)
    scale = builder.op("Constant", value=ir.tensor(np.float32(1 / 127)))
    zero = builder.op("Constant", value=ir.tensor(np.uint8(128)))
    quantized = builder.op("QuantizeLinear", builder.op("Div", x, largest), scale, zero)
    y = builder.op("Mul", builder.op("DequantizeLinear", quantized, scale, zero), largest, name="y")
    return _function("QuantizeDequantizePerToken", [x], [y], builder, [])


def select_rows() -> ir.Function:
    """``SelectRows(x, rows) -> y``: ``[batch, tokens, columns]``, int64 ``[n]`` -> ``[n, columns]``.

    ``rows`` counts through batch and tokens.
    """
    builder = GraphBuilder()
    x, rows = _values("x", "rows")
    columns = builder.op("Shape", x, start=-1)
    flat = builder.op("Reshape", x, builder.op("Concat", _ints(builder, -1), columns, axis=0))
    y = builder.op("Gather", flat, rows, axis=0, name="y")
    return _function("SelectRows", [x, rows], [y], builder, [])


def slot_attention(*, num_heads: int, kv_heads: int, head_dim: int) -> ir.Function:
    """Rotary causal attention of new tokens over a slot's cache, which it appends to in place.

    ``SlotAttention(query, key, value, past_key, past_value, past_lengths, cos, sin)``:

    - query ``[batch, tokens, heads*head_dim]``, key and value ``[batch, tokens, kv_heads*head_dim]``, before rope;
    - past_key, past_value ``[batch, kv_heads, capacity, head_dim]``; past_lengths int64 ``[batch]``;
    - cos, sin ``[positions, head_dim/2]``.

    Outputs the attention's result ``[batch, tokens, heads*head_dim]``, then the caches with the new tokens written
    at ``past_lengths``. Token t of a row sees that row's cache up to ``past_lengths + t``.
    """
    builder = GraphBuilder()
    names = ("query", "key", "value", "past_key", "past_value", "past_lengths", "cos", "sin")
    inputs = _values(*names)
    query, key, value, past_key, past_value, past_lengths, cos, sin = inputs
    tokens = builder.op("Shape", query, start=1, end=2)
    zero, one = (builder.op("Constant", value_int=number) for number in (0, 1))
    steps = builder.op("Range", zero, builder.op("Squeeze", tokens), one)
    positions = builder.op("Add", builder.op("Unsqueeze", past_lengths, _ints(builder, 1)), steps)

    def split_heads(x: ir.Value, heads: int) -> ir.Value:
        split = builder.op("Reshape", x, _ints(builder, 0, 0, heads, head_dim))
        return builder.op("Transpose", split, perm=[0, 2, 1, 3])

    rotated_query = builder.op("RotaryEmbedding", split_heads(query, num_heads), cos, sin, positions)
    rotated_key = builder.op("RotaryEmbedding", split_heads(key, kv_heads), cos, sin, positions)
    present_key = builder.op("TensorScatter", past_key, rotated_key, past_lengths, axis=2, name="present_key")
    present_value = builder.op(
        "TensorScatter", past_value, split_heads(value, kv_heads), past_lengths, axis=2, name="present_value"
    )
    lengths = builder.op("Add", past_lengths, tokens)
    attended = builder.op(
        "Attention", rotated_query, present_key, present_value, None, None, None, lengths,
        is_causal=1, scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
    )  # fmt: skip
    merged = builder.op("Transpose", attended, perm=[0, 2, 1, 3])
    output = builder.op("Reshape", merged, _ints(builder, 0, 0, num_heads * head_dim), name="output")
    outputs = [output, present_key, present_value]
    return _function("SlotAttention", inputs, outputs, builder, ["num_heads", "kv_num_heads", "scale"])
