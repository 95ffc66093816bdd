"""Composite operators of the standard graph: one node each, whose standard body is the reference for its lowering.

They are ONNX local functions in the domain ``llmopt``. A graph pass matches the one node; a runtime that knows
nothing of it runs the body.
"""

from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.optimizer.decoder import Activation

__all__ = [
    "DOMAIN",
    "OPSET",
    "activated",
    "experts",
    "lora_add",
    "quantize_dequantize_fp8_per_group",
    "quantize_dequantize_fp8_per_token",
    "quantize_dequantize_per_token",
    "quantize_dequantize_static",
    "rotate_blocks",
    "select_rows",
    "sliding_window_mask",
    "slot_attention",
]

DOMAIN = "llmopt"
OPSET = 24

_FP8_ZERO = ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn))


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


def rotate_blocks() -> ir.Function:
    """``RotateBlocks(x, rotation) -> y``: float32 ``[..., columns]``, each b columns times ``rotation`` ``[b, b]``."""
    builder = GraphBuilder()
    x, rotation = _values("x", "rotation")
    width = builder.op("Shape", rotation, start=0, end=1)
    blocks = builder.op("Reshape", x, builder.op("Concat", _ints(builder, -1), width, axis=0))
    y = builder.op("Reshape", builder.op("MatMul", blocks, rotation), builder.op("Shape", x), name="y")
    return _function("RotateBlocks", [x, rotation], [y], builder, [])


def quantize_dequantize_static(kind: Literal["int", "float"]) -> ir.Function:
    """``QuantizeDequantizeStatic(x, scale) -> y``: rounding of activations with a scale known in advance.

    ``y = q * scale`` with q = ``x / scale`` rounded to an integer in -128..127, kept as uint8 around 128; with kind
    float the composite is ``QuantizeDequantizeFp8Static``, and q is rounded to E4M3.
    """
    builder = GraphBuilder()
    x, scale = _values("x", "scale")
    zero = builder.op("Constant", value=ir.tensor(np.uint8(128)) if kind == "int" else _FP8_ZERO)
    y = builder.op("DequantizeLinear", builder.op("QuantizeLinear", x, scale, zero), scale, zero, name="y")
    name = "QuantizeDequantizeStatic" if kind == "int" else "QuantizeDequantizeFp8Static"
    return _function(name, [x, scale], [y], builder, [])


def quantize_dequantize_fp8_per_token() -> ir.Function:
    """``QuantizeDequantizeFp8PerToken(x) -> y``: FP8 rounding of activations with one scale a token.

    For each row of ``x`` float32 ``[..., columns]``: ``s = max(max|x| / 448, 2^-126)``, ``y = e4m3(x / s) * s``.
    """
    builder = GraphBuilder()
    (x,) = _values("x")
    return _function("QuantizeDequantizeFp8PerToken", [x], [_fp8_rows(builder, x, "y")], builder, [])


def quantize_dequantize_fp8_per_group() -> ir.Function:
    """``QuantizeDequantizeFp8PerGroup(x; size) -> y``: the same with one scale for each ``size`` columns of a token.

    The last group of a row may be narrower.
    """
    builder = GraphBuilder()
    (x,) = _values("x")
    columns, size = builder.op("Shape", x, start=-1), _attribute(builder, "size", 0)
    beyond = builder.op("Mod", builder.op("Neg", columns), size)
    pads = builder.op("Concat", _ints(builder, 0), beyond, axis=0)
    padded = builder.op("Pad", x, pads, None, _ints(builder, -1))
    groups = builder.op("Concat", builder.op("Shape", x, end=-1), _ints(builder, -1), size, axis=0)
    rounded = _fp8_rows(builder, builder.op("Reshape", padded, groups), "rounded")
    whole = builder.op("Reshape", rounded, builder.op("Shape", padded))
    y = builder.op("Slice", whole, _ints(builder, 0), columns, _ints(builder, -1), name="y")
    return _function("QuantizeDequantizeFp8PerGroup", [x], [y], builder, ["size"])


def _fp8_rows(builder: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """``x`` rounded to E4M3 with one scale for each row of its last dimension."""
    most, least = (builder.op("Constant", value=ir.tensor(np.float32(number))) for number in (448, 2.0**-126))
    largest = builder.op("ReduceMax", builder.op("Abs", x), _ints(builder, -1), keepdims=1)
    scale = builder.op("Max", builder.op("Div", largest, most), least)
    rounded = builder.op("Cast", builder.op("Div", x, scale), to=ir.DataType.FLOAT8E4M3FN.value)
    return builder.op("Mul", builder.op("Cast", rounded, to=ir.DataType.FLOAT.value), scale, name=name)


def lora_add(*, biased: bool) -> ir.Function:
    """``LoraAdd(y, x, adapters, factors, ranks, part; max_rank) -> y'``: low-rank changes of some rows of a linear.

    - y ``[..., width]``, in which the linear's results are some columns; x ``[..., in]``, what it reads;
    - adapters int64 ``[..., 1]``: whose factors each row takes, 1 to slots, or 0 for nobody's: then y' is y;
    - factors float32 or bfloat16 ``[slots, size]``; ranks int64 ``[slots, modules]``: of the factors for each linear;
    - part int64 ``[1, 6]``: the linear's number, where down ``[max_rank, in]`` and up ``[max_rank, columns]`` begin,
      the first of its columns in y, how many there are, and whether a bias ``[columns]`` follows up.

    y' is y with ``up (down x)`` of the factors' first rank rows added. The composite ``LoraAddBiased`` adds the bias as
    well, where the rank is not 0. This body multiplies all rows with all adapters' factors and keeps their own.
    """
    builder = GraphBuilder()
    inputs = _values("y", "x", "adapters", "factors", "ranks", "part")
    y, x, adapters, factors, ranks, part = inputs
    max_rank, inside = _attribute(builder, "max_rank", 0), builder.op("Shape", x, start=-1)
    fields = builder.op("Reshape", part, _ints(builder, -1))
    number, down, up, first, columns = (builder.op("Gather", fields, _ints(builder, i), axis=0) for i in range(5))
    zero, one = (builder.op("Constant", value_int=value) for value in (0, 1))
    slots = builder.op("Shape", factors, start=0, end=1)
    factors = builder.op("Cast", factors, to=ir.DataType.FLOAT.value)

    def matrix(begin: ir.Value, width: ir.Value, count: ir.Value) -> ir.Value:
        """``[slots * count, width]`` of all adapters."""
        end = builder.op("Add", begin, builder.op("Mul", width, count))
        block = builder.op("Slice", factors, begin, end, _ints(builder, 1))
        return builder.op("Reshape", block, builder.op("Concat", _ints(builder, -1), width, axis=0))

    own = builder.op("Unsqueeze", builder.op("Gather", ranks, number, axis=1), _ints(builder, 0))
    numbers = builder.op("Add", builder.op("Range", zero, builder.op("Squeeze", slots), one), one)
    each = builder.op("Reshape", numbers, _ints(builder, 1, -1, 1))
    is_mine = builder.op("Equal", builder.op("Reshape", adapters, _ints(builder, -1, 1, 1)), each)
    places = builder.op("Range", zero, builder.op("Squeeze", max_rank), one)
    is_used = builder.op(
        "And", is_mine, builder.op("Less", builder.op("Reshape", places, _ints(builder, 1, 1, -1)), own)
    )
    inner = builder.op(
        "MatMul", _flat(builder, x), builder.op("Transpose", matrix(down, inside, max_rank), perm=[1, 0])
    )
    inner = builder.op("Reshape", inner, builder.op("Concat", _ints(builder, -1), slots, max_rank, axis=0))
    nothing = builder.op("Constant", value=ir.tensor(np.float32(0)))
    inner = _flat(builder, builder.op("Where", is_used, inner, nothing), axis=1)
    added = builder.op("MatMul", inner, matrix(up, columns, max_rank))
    if biased:
        has_factors = builder.op("And", is_mine, builder.op("Greater", own, zero))
        chosen = builder.op("Cast", _flat(builder, has_factors, axis=1), to=ir.DataType.FLOAT.value)
        begin = builder.op("Add", up, builder.op("Mul", max_rank, columns))
        added = builder.op("Add", added, builder.op("MatMul", chosen, matrix(begin, columns, _ints(builder, 1))))
    behind = builder.op("Sub", builder.op("Sub", builder.op("Shape", y, start=-1), first), columns)
    pads = builder.op("Concat", _ints(builder, 0), first, _ints(builder, 0), behind, axis=0)
    whole = builder.op("Reshape", builder.op("Pad", added, pads), builder.op("Shape", y))
    name = "LoraAddBiased" if biased else "LoraAdd"
    return _function(name, inputs, [builder.op("Add", y, whole, name="added")], builder, ["max_rank"])


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


def sliding_window_mask() -> ir.Function:
    """``SlidingWindowMask(positions, past_key; window) -> mask``: which cached tokens a token with a window sees.

    positions int64 ``[batch, tokens]``, past_key ``[batch, kv_heads, capacity, head_dim]`` for its capacity; mask bool
    ``[batch, 1, tokens, capacity]``: True where the cached token is one of the last ``window`` up to the token itself.
    """
    builder = GraphBuilder()
    positions, past_key = _values("positions", "past_key")
    zero, one = (builder.op("Constant", value_int=number) for number in (0, 1))
    capacity = builder.op("Squeeze", builder.op("Shape", past_key, start=2, end=3))
    cached = builder.op("Range", zero, capacity, one)
    distance = builder.op("Sub", builder.op("Unsqueeze", positions, _ints(builder, 1, 3)), cached)
    is_near = builder.op("Less", distance, _attribute(builder, "window"))
    mask = builder.op("And", is_near, builder.op("GreaterOrEqual", distance, zero), name="mask")
    return _function("SlidingWindowMask", [positions, past_key], [mask], builder, ["window"])


def slot_attention(*, int8: bool = False) -> ir.Function:
    """Causal attention of new tokens over a slot's cache, which it appends to in place.

    ``SlotAttention(query, key, value, past_key, past_value, past_lengths[, mask[, key_scale, value_scale]]; num_heads,
    kv_num_heads, scale, softcap, is_causal)``:

    - query ``[batch, tokens, heads*head_dim]``, key and value ``[batch, tokens, kv_heads*head_dim]``, behind rope;
    - past_key, past_value ``[batch, kv_heads, capacity, head_dim]``; past_lengths int64 ``[batch]``;
    - mask bool ``[batch, 1, tokens, capacity]``, True where a cached token is seen: then is_causal is 0, because
      TensorRT takes one or the other. Without it is_causal is 1 and all tokens up to the token itself are seen;
    - key_scale, value_scale ``[kv_heads*head_dim]``, with ``int8`` only: then the caches hold ``x / scale``, rounded to
      even within -128..127, and all keys and values are seen as they are in the cache, new ones too.

    Outputs the attention's result ``[batch, tokens, heads*head_dim]``, then the caches with the new tokens written
    at ``past_lengths``. Token t of a row sees that row's cache up to ``past_lengths + t``. Scores s, scaled, become
    ``softcap * tanh(s / softcap)`` unless softcap is 0.
    """
    builder = GraphBuilder()
    names = ("query", "key", "value", "past_key", "past_value", "past_lengths", "mask", "key_scale", "value_scale")
    inputs = _values(*names if int8 else names[:-2])
    query, key, value, past_key, past_value, past_lengths, mask, *scales = inputs

    def split_heads(x: ir.Value, count: str) -> ir.Value:
        shape = builder.op("Concat", _ints(builder, 0, 0), _attribute(builder, count, 0), _ints(builder, -1), axis=0)
        split = builder.op("Reshape", x, shape)
        return builder.op("Transpose", split, perm=[0, 2, 1, 3])

    def stored(x: ir.Value, scale: ir.Value | None) -> ir.Value:
        if scale is not None:
            x = builder.op("QuantizeLinear", x, scale, axis=-1, output_dtype=ir.DataType.INT8.value)
        return split_heads(x, "kv_num_heads")

    def seen(cached: ir.Value, scale: ir.Value | None) -> ir.Value:
        if scale is None:
            return cached
        heads = builder.op(
            "Concat", _ints(builder, 1), _attribute(builder, "kv_num_heads", 0), _ints(builder, 1, -1), axis=0
        )
        numbers = builder.op("Cast", cached, to=ir.DataType.FLOAT.value)
        return builder.op("Mul", numbers, builder.op("Reshape", scale, heads))

    key_scale, value_scale = scales or (None, None)
    present_key, present_value = (
        builder.op("TensorScatter", past, stored(x, scale), past_lengths, axis=2, name=name)
        for past, x, scale, name in (
            (past_key, key, key_scale, "present_key"),
            (past_value, value, value_scale, "present_value"),
        )
    )
    lengths = builder.op("Add", past_lengths, builder.op("Shape", query, start=1, end=2))
    attended = builder.op(
        "Attention", split_heads(query, "num_heads"), seen(present_key, key_scale), seen(present_value, value_scale),
        mask, None, None, lengths,
        is_causal=ir.RefAttr("is_causal", "is_causal", ir.AttributeType.INT),
        scale=ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
        softcap=ir.RefAttr("softcap", "softcap", ir.AttributeType.FLOAT),
    )  # fmt: skip
    merged = builder.op("Transpose", attended, perm=[0, 2, 1, 3])
    output = builder.op("Reshape", merged, _ints(builder, 0, 0, -1), name="output")
    outputs = [output, present_key, present_value]
    attributes = ["num_heads", "kv_num_heads", "scale", "softcap", "is_causal"]
    return _function("SlotAttention", inputs, outputs, builder, attributes)


def activated(builder: GraphBuilder, activation: Activation, x: ir.Value, *, name: str | None = None) -> ir.Value:
    """``activation(x)`` in standard operators: one of them, or two for silu, which has none."""
    if activation == "silu":
        return builder.op("Mul", x, builder.op("Sigmoid", x), name=name)
    if activation == "relu":
        return builder.op("Relu", x, name=name)
    return builder.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none", name=name)


def experts(activation: Activation) -> ir.Function:
    """``Experts(x, scores, gate_up, down; top_k, normalize, activation) -> y``: a mixture of gated experts.

    - x ``[batch, tokens, hidden]``; scores ``[batch, tokens, experts]``, the router's logits;
    - gate_up ``[experts, hidden, 2*inner]``, gate's columns, then up's; down ``[experts, inner, hidden]``.

    With p = softmax(scores), y is the sum over the ``top_k`` experts with the largest p of p times
    ``down(activation(gate(x)) * up(x))``; with normalize the p of these experts are divided by their sum. This body
    computes all experts for all tokens and multiplies with zero those that a token does not reach. Its activation is
    that of ``activation``: the attribute tells those who replace the body.
    """
    builder = GraphBuilder()
    inputs = _values("x", "scores", "gate_up", "down")
    x, scores, gate_up, down = inputs
    best, indices = builder.op_multi(
        "TopK", builder.op("Softmax", _flat(builder, scores), axis=-1), _attribute(builder, "top_k", 0),
        axis=-1, names=("best", "indices"),
    )  # fmt: skip
    total = builder.op("ReduceSum", best, _ints(builder, -1), keepdims=1)
    is_normalized = builder.op("Cast", _attribute(builder, "normalize"), to=ir.DataType.BOOL.value)
    one, zero = (builder.op("Constant", value=ir.tensor(np.float32(number))) for number in (1, 0))
    best = builder.op("Div", best, builder.op("Where", is_normalized, total, one))
    nothing = builder.op("Expand", zero, builder.op("Shape", _flat(builder, scores)))
    shares = builder.op("ScatterElements", nothing, indices, best, axis=-1)
    # [experts, tokens of all rows, columns] from here on
    gate, up = builder.op_multi(
        "Split", builder.op("MatMul", _flat(builder, x), gate_up), axis=-1, num_outputs=2, names=("gate", "up")
    )
    each = builder.op("MatMul", builder.op("Mul", activated(builder, activation, gate), up), down)
    shares = builder.op("Unsqueeze", builder.op("Transpose", shares, perm=[1, 0]), _ints(builder, 2))
    mixed = builder.op("ReduceSum", builder.op("Mul", each, shares), _ints(builder, 0), keepdims=0)
    y = builder.op("Reshape", mixed, builder.op("Shape", x), name="y")
    return _function("Experts", inputs, [y], builder, ["top_k", "normalize", "activation"])


def _flat(builder: GraphBuilder, x: ir.Value, *, axis: int = -1) -> ir.Value:
    """``[..., columns]`` as ``[rows, columns]``; with ``axis`` more of the last dimensions are columns."""
    return builder.op("Flatten", x, axis=axis)


def _attribute(builder: GraphBuilder, name: str, axis: int | None = None) -> ir.Value:
    """An integer attribute of the function's node as a scalar, or with ``axis`` as a vector of one."""
    number = builder.op("Constant", value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))
    return number if axis is None else builder.op("Unsqueeze", number, _ints(builder, axis))
