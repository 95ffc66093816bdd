"""The standard graph is valid ONNX and computes what torch computes of the same model."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest

MIXED = {
    "group_size": 32,
    "overrides": [
        {"match": "re:.*v_proj", "scheme": "W8A16"},
        {"match": "model.layers.0.mlp.down_proj", "scheme": "W8A8"},
        {"match": "re:.*o_proj", "scheme": "none"},
    ],
}
WEIGHT_ONLY = [
    ("W8A16", {}),
    ("W8A16", {"group_size": 32}),
    ("W4A16", {"group_size": 16}),
    ("W4A16", {"group_size": 32, "head": "none"}),
    ("W4A16_ASYM", {"group_size": 16}),
    ("W4A16_ASYM", {"group_size": -1}),
]
KINDS = [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}, {"dtype": "bfloat16"}]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=["tied", "untied", "biased", "bfloat16"])

FLOAT = 1e-4
"""The same float32 operations in another order; logits are of size 1 to 10."""


def check_median(error):
    """A number on the border of two integers may round either way, which moves every later number of its row."""
    assert np.median(error) < FLOAT
    assert (error < FLOAT).mean() > 0.6
    assert error.max() < 0.5


@by_kind
@pytest.mark.parametrize(("scheme", "options"), [(None, {}), ("W8A8", {}), *WEIGHT_ONLY[2:5:2], ("W4A16", MIXED)])
def test_the_checker_accepts_it(model_of, kind, scheme, options):
    graph = standard_graph(model_of(scheme, options, **kind), capacity=32)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 24, "llmopt": 1}
    assert {node.domain for node in proto.graph.node} <= {"", "llmopt"}


def test_every_family_is_valid_with_its_composites_and_without(family_of, family_name, tmp_path):
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    graph = standard_graph(model, capacity=32)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    common.InlinePass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 24}
    assert not proto.functions
    types = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph.value_info
    inferred = {value.name for value in types if value.type.tensor_type.HasField("shape")}
    assert inferred >= {name for node in proto.graph.node for name in node.output} - {
        value.name for value in proto.graph.output
    }


@pytest.mark.parametrize("family_name", ["gemma3", "gpt2", "gpt_neox", "falcon-40b", "qwen3_moe"])
def test_without_its_composites_plain_onnx_runtime_gives_the_same(family_of, engine_of, family_name, ids, tmp_path):
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    config = {"num_key_value_heads": model.decoder.kv_heads, "head_dim": model.decoder.head_dim}
    graph = standard_graph(model, capacity=32)
    expected = engine_of(graph, config, optimized=False).logits(ids)
    common.InlinePass()(graph)
    found = engine_of(graph, config).logits(ids)
    assert np.abs(found - expected).max() < 1e-5 * expected.std()


@by_kind
@pytest.mark.parametrize("optimized", [True, False])
def test_float_equals_torch(model_of, engine_of, reference_logits, ids, kind, optimized):
    model = model_of(**kind)
    engine = engine_of(standard_graph(model, capacity=32), model.config, optimized=optimized)
    np.testing.assert_allclose(engine.logits(ids), reference_logits(model, ids), atol=FLOAT)


@by_kind
@pytest.mark.parametrize(("scheme", "options"), WEIGHT_ONLY)
def test_integer_weights_equal_torch(model_of, engine_of, reference_logits, ids, kind, scheme, options):
    # With its optimizations ONNX Runtime makes MatMulNBits of the weights, which rounds activations.
    model = model_of(scheme, options, **kind)
    engine = engine_of(standard_graph(model, capacity=32), model.config, optimized=False)
    np.testing.assert_allclose(engine.logits(ids), reference_logits(model, ids), atol=FLOAT)


@by_kind
@pytest.mark.parametrize(("scheme", "options"), [("W8A8", {}), ("W8A8", {"head": "none"}), ("W4A16", MIXED)])
def test_rounded_activations_equal_torch(model_of, engine_of, reference_logits, row_error, ids, kind, scheme, options):
    model = model_of(scheme, options, **kind)
    engine = engine_of(standard_graph(model, capacity=32), model.config, optimized=False)
    check_median(row_error(engine.logits(ids), reference_logits(model, ids)))


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
@pytest.mark.parametrize("size", [48, 96, 192])
def test_groups_of_no_power_of_two_equal_torch(model_of, engine_of, reference_logits, ids, scheme, size):
    sizes = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48, "num_hidden_layers": 1}
    model = model_of(scheme, {"group_size": size}, **sizes)
    engine = engine_of(standard_graph(model, capacity=32), model.config, optimized=False)
    np.testing.assert_allclose(engine.logits(ids), reference_logits(model, ids), atol=FLOAT)


def test_a_chunk_and_single_tokens_equal_one_call(model_of, engine_of, ids):
    model = model_of()
    engine = engine_of(standard_graph(model, capacity=32), model.config)
    expected = engine.logits(ids[:1])[0]
    engine.start(1)
    chunks = [engine.run(ids[:1, first:last], [first]) for first, last in ((0, 5), (5, 10), (10, 11), (11, 12))]
    np.testing.assert_allclose(np.concatenate(chunks), expected, atol=FLOAT)


def test_sequences_of_different_length_decode_together(model_of, engine_of, ids):
    model = model_of()
    engine = engine_of(standard_graph(model, capacity=32), model.config)
    expected = engine.logits(ids)
    engine.start(3)
    engine.run(ids[:, :8], [0, 0, 0])
    lengths = [7, 3, 5]  # what lies behind them in the cache is not read
    found = engine.run(ids[[0, 1, 2], lengths][:, None], lengths)
    np.testing.assert_allclose(found, expected[[0, 1, 2], lengths], atol=FLOAT)


def test_rows_are_picked_in_the_order_asked_for_and_more_than_once(model_of, engine_of, ids):
    model = model_of()
    engine = engine_of(standard_graph(model, capacity=32), model.config)
    every = engine.logits(ids).reshape(36, -1)
    rows = [35, 0, 7, 7, 12]
    engine.start(3)
    np.testing.assert_array_equal(engine.run(ids, [0, 0, 0], rows), every[rows])


def test_the_inputs_and_outputs_are_the_contracts(model_of):
    graph = standard_graph(model_of(), capacity=32).graph
    described = {value.name: (value.dtype, str(value.shape)) for value in (*graph.inputs, *graph.outputs)}
    cache = (ir.DataType.FLOAT, "[batch,2,capacity,16]")
    assert described == {
        "input_ids": (ir.DataType.INT64, "[batch,tokens]"),
        "past_lengths": (ir.DataType.INT64, "[batch]"),
        "logit_rows": (ir.DataType.INT64, "[rows]"),
        "logits": (ir.DataType.FLOAT, "[rows,512]"),
        **{f"{when}.{i}.{kind}": cache for when in ("past", "present") for i in (0, 1) for kind in ("key", "value")},
    }


def test_inputs_of_several_linears_are_rounded_once(model_of):
    graph = standard_graph(model_of("W8A8", num_hidden_layers=1), capacity=32)
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("QuantizeDequantizePerToken") == 5  # of qkv, o, gate with up, down, and the head
    assert kinds.count("MatMul") == 8


def test_no_weight_is_read_before_the_graph_is_saved(model_of):
    def unread():
        raise AssertionError("a weight was read")

    model = model_of()
    lazy = {name: DenseWeight(weight.shape, weight.dtype, unread) for name, weight in model.weights.items()}
    graph = standard_graph(model.with_weights(lazy), capacity=32)
    with pytest.raises(ir.serde.SerdeError):
        ir.to_proto(graph)


@pytest.mark.parametrize("scheme", ["W8A8", None])
def test_a_token_whose_embedding_is_zero_gives_finite_logits(model_of, engine_of, reference_logits, ids, scheme):
    model = model_of(tie_word_embeddings=False)
    table = model.weights["model.embed_tokens.weight"].dense().clone()
    table[ids[0, 4]] = 0
    model = model.with_weights({"model.embed_tokens.weight": DenseWeight.of(table)})
    if scheme:
        model = RoundToNearest(scheme=scheme).run(model, PassContext())
    found = engine_of(standard_graph(model, capacity=32), model.config, optimized=False).logits(ids)
    assert np.isfinite(found).all()
    expected = reference_logits(model, ids)
    assert np.median(np.abs(found - expected)) < FLOAT
