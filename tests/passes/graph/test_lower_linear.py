"""Quantized linears on integer kernels: W8A8 to the last integer, weight-only within the kernel's own rounding."""

import numpy as np
import onnx_ir as ir
import pytest

X = ("float32", ("batch", "tokens", "columns"))
EXACT = 1e-6
"""The integers are the same; the floats around them are multiplied in another order."""
FLOATS = 1e-5
"""576 products of floats, added in another order: the square root of their number times float32's epsilon."""
ROUNDED = 0.02
"""MatMulNBits rounds each block of 16 to 64 activations to int8: half of 1/127 of the block's largest, at most."""


def dequantized(numbers, rows, columns, *, bits=8, block=None, asymmetric=False, prefix=""):
    """Writes a DequantizeLinear ``[rows, columns]`` with a scale per column, or per ``block`` rows of a column."""
    half = 1 << (bits - 1)
    generator = np.random.default_rng(7)
    shape, groups = (rows, columns), (rows // block if block else 1, columns)
    values = generator.integers(-half, half, shape).astype(np.int8)
    scale = (np.abs(numbers(*groups)) + 0.1).astype(np.float32)
    zero = generator.integers(-half, half, groups).astype(np.int8)
    dtypes = [ir.DataType.INT8 if bits == 8 else ir.DataType.INT4, ir.DataType.FLOAT]

    def write(builder):
        count = 3 if asymmetric else 2
        arrays = [values, *(array if block else array[0] for array in (scale, zero))]
        tensors = [
            ir.tensor(array, dtype=dtype, name=prefix + name)
            for array, dtype, name in zip(arrays, [*dtypes, dtypes[0]], ("weight", "scale", "zero"), strict=True)
        ]
        inputs = [builder.initializer(tensor) for tensor in tensors[:count]]
        attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
        return builder.op("DequantizeLinear", *inputs, **attributes)

    return write


def rounded_rows(builder, x, *, exchanged=False, axis=-1):
    """``x`` as uint8 integers times the largest magnitude of each row."""
    step, middle = (builder.constant(number, f"{number.dtype}") for number in (np.float32(1 / 127), np.uint8(128)))
    axes = builder.constant(np.array([axis]), "axis")
    largest = builder.op("ReduceMax", builder.op("Abs", x), axes, keepdims=1)
    integers = builder.op("QuantizeLinear", builder.op("Div", x, largest), step, middle)
    factors = builder.op("DequantizeLinear", integers, step, middle), largest
    return builder.op("Mul", *(reversed(factors) if exchanged else factors))


def linear(weight, *, rounded=False, **how):
    def write(builder, x):
        if rounded:
            x = rounded_rows(builder, x, **how)
        return builder.op("MatMul", x, weight(builder))

    return write


@pytest.mark.parametrize("exchanged", [False, True])
def test_w8a8_is_exact(rewrite, graph_of, numbers, exchanged):
    graph = graph_of(linear(dequantized(numbers, 40, 24), rounded=True, exchanged=exchanged), x=X)
    result = rewrite("lower_linear", graph, {"x": 30 * numbers(2, 5, 40)}, {"x": numbers(1, 1, 40)})
    assert result.applied == 1
    assert result.ops["MatMulIntegerToFloat"] == 1
    assert result.ops["DequantizeLinear"] == 0
    assert result.difference() < EXACT


@pytest.mark.parametrize("host", ["avx2", "vnni"])
def test_without_vnni_both_factors_are_unsigned(rewrite, graph_of, numbers, host, monkeypatch):
    monkeypatch.setattr("llmopt.passes.graph.lower_linear.host_instructions", lambda: host)
    graph = graph_of(linear(dequantized(numbers, 40, 24), rounded=True), x=X)
    result = rewrite("lower_linear", graph, {"x": numbers(2, 5, 40)})
    (node,) = (node for node in result.graph.graph if node.op_type == "MatMulIntegerToFloat")
    unsigned = host == "avx2"
    assert (node.inputs[1].dtype == ir.DataType.UINT8) == unsigned
    assert len(node.inputs) == 5 + unsigned
    if unsigned:  # exact on every CPU
        assert result.difference() < EXACT
    tables = [value for value in result.graph.graph.initializers.values() if len(value.shape) == 2]
    assert len(tables) == 1


def test_w8a8_rows_do_not_see_each_other(rewrite, graph_of, numbers):
    graph = graph_of(linear(dequantized(numbers, 40, 24), rounded=True), x=X)
    x = numbers(1, 6, 40)
    x[0, 2] *= 1e6
    together, *alone = rewrite("lower_linear", graph, {"x": x}, *({"x": x[:, i : i + 1]} for i in range(6))).after
    for i, (row,) in enumerate(alone):
        np.testing.assert_array_equal(together[0][:, i : i + 1], row)


def test_a_token_of_zeros_gives_zeros(rewrite, graph_of, numbers):
    graph = graph_of(linear(dequantized(numbers, 40, 24), rounded=True), x=X)
    x = numbers(2, 3, 40)
    x[1, 1] = 0
    result = rewrite("lower_linear", graph, {"x": x})
    assert (result.before[0][0][1, 1] == 0).all()
    assert (result.after[0][0][1, 1] == 0).all()
    assert result.difference() < EXACT


@pytest.mark.parametrize("size", [1e-38, 1e-44, 1e30])
def test_tokens_of_any_size_are_finite(rewrite, graph_of, numbers, size):
    graph = graph_of(linear(dequantized(numbers, 40, 24), rounded=True), x=X)
    x = np.sign(numbers(1, 3, 40)) * np.float32(size)
    result = rewrite("lower_linear", graph, {"x": x})
    assert result.difference() < 1e-5


def test_linears_that_share_a_rounding_share_the_integers(rewrite, graph_of, numbers):
    first, second = (dequantized(numbers, 40, columns, prefix=f"w{columns}.") for columns in (24, 8))

    def write(builder, x):
        x = rounded_rows(builder, x)
        return builder.op("MatMul", x, first(builder)), builder.op("MatMul", x, second(builder))

    result = rewrite("lower_linear", graph_of(write, x=X), {"x": numbers(2, 3, 40)})
    assert result.applied == 2
    assert (result.ops["QuantizeLinear"], result.ops["MatMulIntegerToFloat"]) == (1, 2)
    assert result.difference() < EXACT


BLOCKS = [(8, None), (8, 16), (8, 48), (8, 96), (8, 192), (4, None), (4, 16), (4, 32), (4, 48), (4, 96), (4, 192)]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "block"), BLOCKS)
def test_weight_only_is_right_within_its_own_rounding(rewrite, graph_of, numbers, bits, block, asymmetric):
    weight = dequantized(numbers, 576, 24, bits=bits, block=block, asymmetric=asymmetric)
    result = rewrite(
        "lower_linear", graph_of(linear(weight), x=X), {"x": numbers(2, 5, 576)}, {"x": numbers(1, 1, 576)}
    )
    assert result.applied == 1
    assert result.ops == {"MatMulNBits": 1}
    assert result.difference() < ROUNDED
    assert result.notes == ["MatMulNBits rounds activations to int8 per block inside the kernel (accuracy_level 4)"]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "block", "expected"),
    [(8, None, 64), (8, 16, 16), (8, 128, 128), (4, None, 64), (4, 32, 32), (4, 64, 64), (4, 128, 128), (4, 384, 128)],
)
def test_for_cuda_a_groups_scale_is_stored_once_and_activations_stay(
    rewrite, graph_of, numbers, bits, block, expected, asymmetric
):
    """Blocks need not be small there: nothing promises that rows do not depend on their batch."""
    columns = 384 if expected == 128 else 576
    weight = dequantized(numbers, columns, 24, bits=bits, block=block, asymmetric=asymmetric)
    x = numbers(2, 5, columns)
    result = rewrite("lower_linear", graph_of(linear(weight), x=X), {"x": x}, executor="cuda")
    (node,) = result.graph.graph
    attributes = {name: node.attributes.get_int(name) for name in ("bits", "block_size", "accuracy_level")}
    assert attributes == {"bits": bits, "block_size": expected, "accuracy_level": 0}
    assert result.difference() < FLOATS
    assert result.notes == []


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "columns"), [(8, 72), (8, 40), (4, 72), (4, 24), (8, 8), (4, 8)])
def test_a_channel_that_is_no_whole_number_of_blocks_is_padded(rewrite, graph_of, numbers, bits, columns, asymmetric):
    weight = dequantized(numbers, columns, 24, bits=bits, asymmetric=asymmetric)
    x = numbers(2, 5, columns)
    result = rewrite("lower_linear", graph_of(linear(weight), x=X), {"x": x}, {"x": x[:1, :1]})
    assert result.applied == 1
    assert result.difference() < ROUNDED


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_zero_points_of_an_odd_number_of_blocks_fill_whole_bytes(rewrite, graph_of, numbers, blocks):
    weight = dequantized(numbers, 16 * blocks, 24, bits=4, block=16, asymmetric=True)
    x = numbers(2, 5, 16 * blocks)
    result = rewrite("lower_linear", graph_of(linear(weight), x=X), {"x": x}, {"x": x[:1, :1]})
    assert result.applied == 1
    assert result.difference() < ROUNDED


def test_activations_that_are_exact_in_int8_show_the_packing_is_exact(rewrite, graph_of, numbers):
    weight = dequantized(numbers, 96, 24, bits=4, block=48, asymmetric=True)
    x = np.random.default_rng(1).integers(-127, 128, (1, 4, 96)).astype(np.float32)
    x[..., ::16] = 127  # so that each block's scale is 1
    result = rewrite("lower_linear", graph_of(linear(weight), x=X), {"x": x})
    assert result.difference() < EXACT


def test_a_head_that_shares_its_float_table_is_not_transposed(rewrite, graph_of, numbers):
    table = numbers(24, 40)

    def write(builder, x):
        return builder.op("MatMul", x, builder.op("Transpose", builder.constant(table, "table"), perm=[1, 0]))

    result = rewrite("lower_linear", graph_of(write, x=X), {"x": numbers(2, 3, 40)})
    assert result.applied == 1
    assert result.ops == {"FusedMatMul": 1}
    assert result.difference() < EXACT


def test_the_transpose_of_something_computed_is_declined(rewrite, graph_of, numbers):
    def write(builder, x, y):
        return builder.op("MatMul", x, builder.op("Transpose", y, perm=[1, 0]))

    graph = graph_of(write, x=X, y=("float32", (24, 40)))
    result = rewrite("lower_linear", graph, {"x": numbers(2, 3, 40), "y": numbers(24, 40)})
    assert result.applied == 0
    assert result.unchanged
    assert "the transposed value is no initializer" in result.declined[0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits": 4}, "the kernel multiplies int8 weights, not INT4"),
        ({"block": 20}, "the kernel takes one weight scale per output channel"),
    ],
)
def test_w8a8_with_weights_the_kernel_does_not_take_is_declined(rewrite, graph_of, numbers, options, why):
    weight = dequantized(numbers, 40, 24, **options)
    result = rewrite("lower_linear", graph_of(linear(weight, rounded=True), x=X), {"x": numbers(2, 3, 40)})
    assert result.applied == 0
    assert result.unchanged
    assert any(reason.endswith(why) for reason in result.declined)


def test_w8a8_with_zero_points_is_declined(rewrite, graph_of, numbers):
    weight = dequantized(numbers, 40, 24, asymmetric=True)
    result = rewrite("lower_linear", graph_of(linear(weight, rounded=True), x=X), {"x": numbers(2, 3, 40)})
    assert result.applied == 0
    assert result.unchanged


@pytest.mark.parametrize("axis", [0, 1])
def test_activation_scales_that_rows_share_are_declined(rewrite, graph_of, numbers, axis):
    graph = graph_of(linear(dequantized(numbers, 40, 24), rounded=True, axis=axis), x=("float32", (2, 3, 40)))
    result = rewrite("lower_linear", graph, {"x": numbers(2, 3, 40)})
    assert result.applied == 0
    assert result.unchanged
    assert any("scales are not one per row" in reason for reason in result.declined)


def test_activations_of_another_type_are_declined(rewrite, graph_of, numbers):
    weight = dequantized(numbers, 40, 24)

    def write(builder, x):
        step, largest = builder.constant(np.float32(1 / 127), "step"), builder.constant(np.ones(1, np.float32), "one")
        middle = builder.constant(np.int8(0), "middle")
        integers = builder.op("QuantizeLinear", x, step, middle)
        rounded = builder.op("Mul", builder.op("DequantizeLinear", integers, step, middle), largest)
        return builder.op("MatMul", rounded, weight(builder))

    result = rewrite("lower_linear", graph_of(write, x=X), {"x": numbers(2, 3, 40)})
    assert result.applied == 0
    assert result.unchanged
    assert any("the activations are not uint8 with one step" in reason for reason in result.declined)


@pytest.mark.parametrize("block", [8, 20])
def test_a_group_without_a_kernel_is_declined(rewrite, graph_of, numbers, block):
    weight = dequantized(numbers, 40, 24, block=block)
    result = rewrite("lower_linear", graph_of(linear(weight), x=X), {"x": numbers(2, 3, 40)})
    assert result.applied == 0
    assert result.unchanged
    assert any(reason.endswith(f"no kernel's block divides a group of {block} columns") for reason in result.declined)


@pytest.mark.parametrize("shape", [(), (40,)])
def test_scales_that_are_not_per_output_are_declined(rewrite, graph_of, numbers, shape):
    values, scale = (20 * numbers(40, 24)).astype(np.int8), np.abs(numbers(*shape)) + np.float32(0.1)

    def write(builder, x):
        inputs = builder.constant(values, "weight"), builder.constant(np.asarray(scale), "scale")
        return builder.op("MatMul", x, builder.op("DequantizeLinear", *inputs, axis=0))

    result = rewrite("lower_linear", graph_of(write, x=X), {"x": numbers(2, 3, 40)})
    assert result.applied == 0
    assert result.unchanged
    assert result.declined


def test_a_weight_that_is_computed_is_declined(rewrite, graph_of, numbers):
    def write(builder, x, y):
        scale = builder.constant(np.ones(24, np.float32), "scale")
        integers = builder.op("Cast", y, to=ir.DataType.INT8.value)
        return builder.op("MatMul", x, builder.op("DequantizeLinear", integers, scale, axis=1))

    graph = graph_of(write, x=X, y=("float32", (40, 24)))
    result = rewrite("lower_linear", graph, {"x": numbers(2, 3, 40), "y": 20 * numbers(40, 24)})
    assert result.applied == 0
    assert any("the weight is not constant" in reason for reason in result.declined)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("exchanged", [False, True])
def test_a_bias_is_the_kernels_own(rewrite, graph_of, numbers, exchanged, asymmetric):
    weight, bias = dequantized(numbers, 96, 24, bits=4, block=32, asymmetric=asymmetric), numbers(24)

    def write(builder, x):
        operands = linear(weight)(builder, x), builder.constant(bias, "bias")
        return builder.op("Add", *(reversed(operands) if exchanged else operands))

    result = rewrite("lower_linear", graph_of(write, x=X), {"x": numbers(2, 3, 96)}, {"x": numbers(1, 1, 96)})
    assert result.applied == 2
    assert result.ops == {"MatMulNBits": 1}
    assert result.difference() < ROUNDED


@pytest.mark.parametrize("addend", ["residual", "number", "read twice"])
def test_an_addend_that_is_no_bias_stays(rewrite, graph_of, numbers, addend):
    weight = dequantized(numbers, 96, 24, bits=4, block=32)

    def write(builder, x, y):
        product = linear(weight)(builder, x)
        shape = (1,) if addend == "number" else (24,)
        other = y if addend == "residual" else builder.constant(numbers(*shape), "bias")
        total = builder.op("Add", product, other)
        return [total, builder.op("Abs", product)] if addend == "read twice" else total

    graph = graph_of(write, x=X, y=("float32", ("batch", "tokens", 24)))
    result = rewrite("lower_linear", graph, {"x": numbers(2, 3, 96), "y": numbers(2, 3, 24)})
    assert (result.applied, result.ops["Add"]) == (1, 1)
    assert result.difference() < ROUNDED


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
def test_every_linear_of_a_model_is_lowered(rewrite_model, model_of, scheme, biased):
    changes = {"num_hidden_layers": 1, "attention_bias": biased, "mlp_bias": biased, "tie_word_embeddings": False}
    result = rewrite_model("lower_linear", model_of(scheme, **changes), after=["share_activation_quantization"])
    assert result.applied == (15 if biased and scheme == "W8A16" else 8)  # the head has no bias
    assert (result.ops["MatMul"], result.ops["DequantizeLinear"]) == (0, 0)
    assert result.difference() < (0.1 if scheme == "W8A16" else 0.02)  # several linears one behind the other


def test_linears_in_float_are_left(rewrite_model, model_of):
    result = rewrite_model("lower_linear", model_of(num_hidden_layers=1, tie_word_embeddings=False))
    assert result.applied == 0
    assert result.unchanged
    assert result.notes == []
