"""A quantized table that embedding and head share is stored once and read by both."""

import numpy as np
import onnx_ir as ir
import pytest

VOCABULARY = 20
INPUTS = {"ids": ("int64", ("batch", "tokens")), "x": ("float32", ("batch", "tokens", "columns"))}
EXACT = 1e-6
ROUNDED = 0.02
"""MatMulNBits rounds each block of activations to int8."""


def table_of(numbers, columns, *, bits=8, block=None, asymmetric=False):
    """Writes a DequantizeLinear ``[VOCABULARY, columns]``."""
    half = 1 << (bits - 1)
    generator = np.random.default_rng(7)
    groups = (VOCABULARY, columns // block) if block else (VOCABULARY,)
    arrays = [
        generator.integers(-half, half, (VOCABULARY, columns)).astype(np.int8),
        np.abs(numbers(*groups)) + np.float32(0.1),
        generator.integers(-half, half, groups).astype(np.int8),
    ]
    integers = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    kinds = zip(arrays, (integers, ir.DataType.FLOAT, integers), ("weight", "scale", "zero"), strict=True)
    tensors = [ir.tensor(array, dtype=dtype, name=f"embed.{name}") for array, dtype, name in kinds]

    def write(builder):
        inputs = [builder.initializer(tensor) for tensor in tensors[: 3 if asymmetric else 2]]
        attributes = {"axis": 1, "block_size": block} if block else {"axis": 0}
        return builder.op("DequantizeLinear", *inputs, name="embed.weight_dequantized", **attributes)

    return write


def tied(table, *, rounded=False, head=True, embedding=True):
    def write(builder, ids, x):
        weight = table(builder)
        if rounded:
            x = builder.op("QuantizeDequantizePerToken", x, domain="llmopt")
        outputs = []
        if embedding:
            outputs.append(builder.op("Gather", weight, ids, axis=0))
        if head:
            outputs.append(builder.op("MatMul", x, builder.op("Transpose", weight, perm=[1, 0])))
        return outputs

    return write


@pytest.fixture
def feeds(numbers):
    def make(columns):
        ids = np.array([[0, 3, VOCABULARY - 1], [3, 3, 7]])
        return {"ids": ids, "x": numbers(2, 3, columns)}

    return make


def copies(graph, nbytes):
    """How many initializers are as large as the packed table."""
    return sum(value.const_value.nbytes >= nbytes for value in graph.graph.initializers.values())


def test_int8_rows_are_looked_up_in_the_heads_integers(rewrite, graph_of, numbers, feeds):
    graph = graph_of(tied(table_of(numbers, 40), rounded=True), **INPUTS)
    result = rewrite("lower_embedding", graph, feeds(40))
    assert result.applied == 2
    assert copies(result.graph, VOCABULARY * 40) == 1
    assert result.is_identical()


def test_the_heads_new_form_is_what_lower_linear_takes(rewrite, graph_of, numbers, feeds):
    graph = graph_of(tied(table_of(numbers, 40), rounded=True), **INPUTS)
    for earlier in ("lower_embedding", "share_activation_quantization"):
        graph = rewrite(earlier, graph, feeds(40)).graph
    result = rewrite("lower_linear", graph, feeds(40))
    assert result.applied == 1
    assert result.ops["MatMulIntegerToFloat"] == 1
    assert result.difference() < EXACT


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "columns", "block"),
    [
        (8, 96, None), (8, 80, 16), (8, 96, 96), (8, 96, 48), (8, 192, 192),
        (4, 96, None), (4, 48, 16), (4, 80, 16), (4, 96, 32), (4, 96, 48),
    ],
)  # fmt: skip
def test_blocks_are_shared_by_both(rewrite, graph_of, numbers, feeds, bits, columns, block, asymmetric):
    table = table_of(numbers, columns, bits=bits, block=block, asymmetric=asymmetric)
    result = rewrite("lower_embedding", graph_of(tied(table), **INPUTS), feeds(columns))
    assert result.applied == 2
    assert (result.ops["GatherBlockQuantized"], result.ops["MatMulNBits"]) == (1, 1)
    assert copies(result.graph, VOCABULARY * columns * bits // 8) == 1
    embedded, logits = result.after[0]
    np.testing.assert_allclose(embedded, result.before[0][0], rtol=1e-6)
    assert np.abs(logits - result.before[0][1]).max() < ROUNDED * np.abs(logits).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_for_cuda_both_share_the_groups_blocks(rewrite, graph_of, numbers, feeds, bits):
    graph = graph_of(tied(table_of(numbers, 128, bits=bits, block=128)), **INPUTS)
    result = rewrite("lower_embedding", graph, feeds(128), executor="cuda")
    blocks = {node.op_type: node.attributes.get_int("block_size", 0) for node in result.graph.graph}
    assert blocks["MatMulNBits"] == blocks["GatherBlockQuantized"] == 128
    assert result.difference() < EXACT


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W8A8", {}),
        ("W8A16", {}),
        ("W4A16", {"group_size": 32}),
        ("W4A16", {"group_size": 32, "head": "W8A8"}),
        ("W8A8", {"head": "W8A16"}),
        ("W4A16", {"group_size": 16, "overrides": [{"match": "lm_head", "scheme": "W4A16_ASYM"}]}),
    ],
)
def test_a_tied_models_table_is_shared(rewrite_model, model_of, scheme, options):
    changes = {"hidden_size": 128, "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}
    result = rewrite_model("lower_embedding", model_of(scheme, options, **changes), after=["select_rows"])
    assert result.applied == 2
    assert result.difference() < ROUNDED


def test_a_table_in_float_is_left(rewrite_model, model_of):
    result = rewrite_model("lower_embedding", model_of("W8A16", {"head": "none"}, num_hidden_layers=1))
    assert result.applied == 0
    assert result.unchanged


def test_an_untied_model_is_left(rewrite_model, model_of):
    result = rewrite_model("lower_embedding", model_of("W8A8", num_hidden_layers=1, tie_word_embeddings=False))
    assert result.applied == 0
    assert result.unchanged


def test_columns_that_need_padding_are_declined(rewrite, graph_of, numbers, feeds):
    table = table_of(numbers, 72)
    result = rewrite("lower_embedding", graph_of(tied(table), **INPUTS), feeds(72))
    assert result.ops["MatMulNBits"] == 0
    assert any("72 columns are no whole number of blocks of 16" in reason for reason in result.declined)
    assert result.difference() < EXACT


@pytest.mark.parametrize("block", [8, 20])
def test_groups_without_a_kernel_are_declined(rewrite, graph_of, numbers, feeds, block):
    table = table_of(numbers, 40, block=block)
    result = rewrite("lower_embedding", graph_of(tied(table), **INPUTS), feeds(40))
    assert result.applied == 0
    assert result.unchanged
    assert any(f"no kernel's block divides a group of {block} columns" in reason for reason in result.declined)


@pytest.mark.parametrize("options", [{"asymmetric": True}, {"block": 20}, {"bits": 4}])
def test_rounded_activations_with_a_table_the_kernel_does_not_take_are_declined(
    rewrite, graph_of, numbers, feeds, options
):
    graph = graph_of(tied(table_of(numbers, 40, **options), rounded=True), **INPUTS)
    result = rewrite("lower_embedding", graph, feeds(40))
    assert result.applied == 0
    assert result.unchanged
    assert any("the table" in reason for reason in result.declined)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "columns", "block"), [(8, 96, 32), (8, 192, 96), (4, 96, 32), (4, 80, 16), (4, 96, None)]
)
def test_a_table_that_no_head_reads_has_blocks_of_its_own(
    rewrite, graph_of, numbers, feeds, bits, columns, block, asymmetric
):
    table = table_of(numbers, columns, bits=bits, block=block, asymmetric=asymmetric)
    result = rewrite("lower_embedding", graph_of(tied(table, head=False), **INPUTS), feeds(columns))
    assert result.applied == 1
    assert result.ops["GatherBlockQuantized"] == 1
    assert copies(result.graph, VOCABULARY * columns * bits // 8) == 1
    np.testing.assert_allclose(result.after[0][0], result.before[0][0], rtol=1e-6)


def test_int8_rows_that_no_head_reads_stay_as_they_are_stored(rewrite, graph_of, numbers, feeds):
    result = rewrite("lower_embedding", graph_of(tied(table_of(numbers, 40), head=False), **INPUTS), feeds(40))
    assert result.applied == 1
    assert (result.ops["GatherBlockQuantized"], result.ops["DequantizeLinear"]) == (0, 0)
    assert result.is_identical()


def test_a_table_that_must_become_floats_in_every_call_is_a_fallback(rewrite, graph_of, numbers, feeds):
    table = table_of(numbers, 40, block=20)
    result = rewrite("lower_embedding", graph_of(tied(table, head=False), **INPUTS), feeds(40))
    assert result.applied == 0
    (told,) = result.fallbacks
    assert "turns its whole table into floats in every call" in told


@pytest.mark.parametrize("options", [{"embedding": "W8A16"}, {"embedding": "W4A16_ASYM", "head": "none"}])
def test_an_untied_models_embedding_is_looked_up_in_integers(rewrite_model, model_of, options):
    model = model_of("W8A16", options, hidden_size=128, num_hidden_layers=1, tie_word_embeddings=False)
    result = rewrite_model("lower_embedding", model)
    assert result.applied == 1
    assert result.difference() < EXACT


def test_a_third_reader_keeps_the_floats_it_reads(rewrite, graph_of, numbers, feeds):
    table = table_of(numbers, 40)

    def write(builder, ids, x):
        outputs = tied(table, rounded=True)(builder, ids, x)
        return [*outputs, builder.op("Sigmoid", outputs[0].producer().inputs[0])]

    result = rewrite("lower_embedding", graph_of(write, **INPUTS), feeds(40))
    assert result.difference() < EXACT
