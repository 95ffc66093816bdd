"""The lowered graph computes what the standard graph and torch do, and a row's bits depend on nothing but the row."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from llmopt.exporters.onnx.lowering import finished, stages
from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.target import TARGETS
from llmopt.passes.round_to_nearest import RoundToNearest

CPU = TARGETS["cpu"]
KINDS = [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=["tied", "untied", "biased"])
EXACT = [(None, {}), ("W8A8", {}), ("W8A8", {"head": "none"})]
"""What the kernels compute without rounding anything the standard graph does not round."""
ROUNDED = [
    ("W8A16", {}),
    ("W8A16", {"group_size": 32}),
    ("W4A16", {"group_size": 16}),
    ("W4A16", {"group_size": 32, "head": "none"}),
    ("W4A16", {"group_size": 32, "head": "W8A8"}),
    ("W4A16_ASYM", {"group_size": 16}),
    ("W4A16_ASYM", {"group_size": -1}),
    ("W8A8", {"overrides": [{"match": "re:.*v_proj", "scheme": "W8A16"}, {"match": "re:.*down", "scheme": "none"}]}),
]
BATCH_INVARIANT = [
    (None, {}),
    ("W8A8", {}),
    ("W4A16", {"group_size": 32}),
    ("W8A16", {}),
    ("W4A16_ASYM", {"group_size": 16}),
]


@by_kind
@pytest.mark.parametrize(("scheme", "options"), EXACT)
@pytest.mark.parametrize("optimized", [True, False])
def test_exact_schemes_equal_torch(
    model_of, lowered_of, engine_of, reference_logits, row_error, ids, kind, scheme, options, optimized
):
    model = model_of(scheme, options, **kind)
    found = engine_of(lowered_of(model), model.config, optimized=optimized).logits(ids)
    error = row_error(found, reference_logits(model, ids))
    # A number on the border of two integers may round either way: that reaches few rows, and not the median.
    assert np.median(error) < 1e-4
    assert error.max() < (0.5 if scheme else 1e-4)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1] | KINDS[2]], ids=["tied", "untied and biased"])
@pytest.mark.parametrize(("scheme", "options"), ROUNDED)
def test_weight_only_schemes_stay_within_the_kernels_rounding(
    model_of, lowered_of, engine_of, reference_logits, row_error, ids, kind, scheme, options
):
    model = model_of(scheme, options, **kind)
    found = engine_of(lowered_of(model), model.config).logits(ids)
    error = row_error(found, reference_logits(model, ids))
    assert np.median(error) < 0.05
    assert error.max() < 0.5


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "W4A16_ASYM"])
@pytest.mark.parametrize("size", [48, 96, 192])
def test_groups_of_no_power_of_two(model_of, lowered_of, engine_of, reference_logits, row_error, ids, scheme, size):
    sizes = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48, "num_hidden_layers": 1}
    model = model_of(scheme, {"group_size": size}, **sizes)
    graph = lowered_of(model)
    assert "DequantizeLinear" not in {node.op_type for node in graph.graph}
    error = row_error(engine_of(graph, model.config).logits(ids), reference_logits(model, ids))
    assert np.median(error) < 0.05


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("scheme", "options"), [("W8A16", {}), ("W4A16_ASYM", {"group_size": -1}), ("W8A8", {})])
def test_columns_that_are_no_whole_number_of_blocks(
    model_of, lowered_of, engine_of, reference_logits, row_error, ids, scheme, options, tied
):
    sizes = {"hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    model = model_of(scheme, options, **sizes)
    error = row_error(engine_of(lowered_of(model), model.config).logits(ids), reference_logits(model, ids))
    assert np.median(error) < (1e-4 if scheme == "W8A8" else 0.05)


def test_an_odd_number_of_blocks_with_zero_points(model_of, lowered_of, engine_of, reference_logits, row_error, ids):
    sizes = {"hidden_size": 48, "intermediate_size": 80}
    model = model_of("W4A16_ASYM", {"group_size": 16, "head": "none"}, num_hidden_layers=1, **sizes)
    error = row_error(engine_of(lowered_of(model), model.config).logits(ids), reference_logits(model, ids))
    assert np.median(error) < 0.05


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_groups_whose_columns_lie_apart(model_of, lowered_of, engine_of, reference_logits, row_error, ids, scheme):
    model = model_of(scheme, {"group_size": 16, "head": "none"}, tie_word_embeddings=False)
    changed = {}
    for name, weight in model.weights.items():
        if isinstance(weight, QuantWeight):  # one order for all linears that read the same columns, as GPTQ has it
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
            tensors = weight.load()._replace(group_index=(order // 16).to(torch.int32))
            changed[name] = QuantWeight.of(tensors, weight.scheme)
    graph = lowered_of(apart := model.with_weights(changed))
    error = row_error(engine_of(graph, model.config).logits(ids), reference_logits(apart, ids))
    assert np.median(error) < 0.05
    gathers = [sum(node.op_type == "Gather" for node in each.graph) for each in (graph, lowered_of(model))]
    # In each of two layers: for query, key and value together, output, gate and up together, and down.
    assert gathers[0] == gathers[1] + 8


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1] | KINDS[2]], ids=["tied", "untied and biased"])
@pytest.mark.parametrize(("scheme", "options"), [EXACT[0], EXACT[1], *ROUNDED[:6:4]])
def test_the_checker_accepts_it_and_nothing_standard_is_left_over(model_of, lowered_of, kind, scheme, options):
    graph = lowered_of(model_of(scheme, options, **kind))
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto)
    assert {opset.domain for opset in proto.opset_import} == {"", "com.microsoft"}
    assert not proto.functions
    names = [output for node in proto.graph.node for output in node.output if output]
    assert len(names) == len(set(names))
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("GroupQueryAttention") == kinds.count("QuickGelu") == 2
    assert kinds.count("SkipSimplifiedLayerNormalization") == 4
    assert "RotaryEmbedding" not in kinds


def test_there_is_a_record_for_each_graph_pass_in_order(model_of):
    _, records = finished(stages(model_of("W8A8"), CPU, capacity=32))
    assert [record.name for record in records] == list(CPU.graph_passes)
    assert {record.name for record in records if not record.changed} == {"lower_experts"}
    assert all(record.changed == (record.details["applied"] > 0) for record in records)
    declined = {record.name for record in records if record.details["declined"]}
    assert declined <= {"fold_constants", "share_weights"}  # weights are not read, and not stored in a second form


def test_records_count_operators_before_and_after(model_of):
    graph, records = finished(stages(model_of("W8A8"), CPU, capacity=32))
    counts = [record.details["operators"] for record in records]
    assert counts[0]["before"]["llmopt::QuantizeDequantizePerToken"] == 9
    assert all(first["after"] == second["before"] for first, second in itertools.pairwise(counts))
    names = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph)
    assert counts[-1]["after"] == names
    assert counts[-1]["after"]["com.microsoft::MatMulIntegerToFloat"] == 9


def test_stages_are_one_graph_behind_each_pass(model_of):
    model = model_of()
    names, graphs, operators = [], set(), []
    for stage in stages(model, CPU, capacity=32):
        names.append(stage.name)
        graphs.add(id(stage.graph))
        operators.append(len(stage.graph.graph))
        assert (stage.record is None) == (stage.name == "standard")
    assert names == ["standard", *CPU.graph_passes]
    assert len(graphs) == 1
    assert operators[-1] < operators[0]


def test_a_single_layer_can_be_lowered(model_of):
    model = model_of(num_hidden_layers=3)
    single = replace(model.decoder, layers=(model.decoder.layers[1],))
    graph, _ = finished(stages(model, CPU, capacity=32, decoder=single))
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.graph) == 1
    assert {name.split(".")[2] for name in graph.graph.initializers if name.startswith("model.layers")} == {"1"}


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_of_w8a8_has_at_most_thirty_operators(model_of, biased):
    sizes = []
    for count in (2, 3):
        changes = {"attention_bias": biased, "mlp_bias": biased, "num_hidden_layers": count}
        graph, _ = finished(stages(model_of("W8A8", **changes), CPU, capacity=32))
        sizes.append(len(graph.graph))
    assert sizes[1] - sizes[0] <= 30 + 4 * biased


def test_a_pass_with_nothing_to_do_is_recorded_as_such(model_of):
    _, records = finished(stages(model_of(), CPU, capacity=32))
    record = next(record for record in records if record.name == "lower_embedding")
    assert (record.changed, record.details["applied"]) == (False, 0)


def test_inputs_and_outputs_stay_the_contracts(model_of, lowered_of):
    model = model_of("W8A8")
    graphs = standard_graph(model, capacity=32), lowered_of(model)
    described = [
        [(value.name, value.dtype, str(value.shape)) for value in (*graph.graph.inputs, *graph.graph.outputs)]
        for graph in graphs
    ]
    assert described[0] == described[1]


def chunked(backend, slot, sequence, size=4):
    """The last row's logits of a prompt that is written in chunks."""
    for start in range(0, len(sequence), size):
        part = sequence[start : start + size]
        logits = backend.prefill(slot, part, start, np.array([len(part) - 1]))
    return logits[0].copy()


@pytest.mark.parametrize(("scheme", "options"), [*EXACT[:2], ROUNDED[3]])
def test_chunks_and_decode_steps_in_place_equal_one_call(
    model_of, lowered_of, engine_of, backend_of, reference_logits, row_error, ids, scheme, options
):
    model = model_of(scheme, options)
    backend, expected = backend_of(model), reference_logits(model, ids[:1])[0]
    sequence = ids[0]
    found = [backend.prefill(0, sequence[:4], 0, np.arange(4)), backend.prefill(0, sequence[4:8], 4, np.arange(4))]
    found += [backend.decode(sequence[i : i + 1], np.array([i])).copy() for i in range(8, 12)]
    found = np.concatenate(found)
    whole = engine_of(lowered_of(model), model.config).logits(ids[:1])[0]
    limit = 0.05 if scheme == "W4A16" else 1e-4
    assert np.median(row_error(found, expected)) < limit
    assert np.median(row_error(found, whole)) < limit


def test_a_batch_without_a_past_equals_each_sequence_alone(model_of, lowered_of, engine_of, ids):
    model = model_of("W8A8")
    engine = engine_of(lowered_of(model), model.config)
    together = engine.logits(ids)
    for i in range(3):
        np.testing.assert_array_equal(together[i], engine.logits(ids[i : i + 1])[0])


@pytest.mark.parametrize("head_dim", [32, 48, 80])
def test_heads_of_any_multiple_of_sixteen(model_of, lowered_of, engine_of, reference_logits, ids, head_dim):
    model = model_of(head_dim=head_dim, num_hidden_layers=1)
    found = engine_of(lowered_of(model), model.config).logits(ids)
    np.testing.assert_allclose(found, reference_logits(model, ids), atol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("scheme", "options"), BATCH_INVARIANT)
def test_ragged_decode_is_bit_identical_to_each_row_alone(model_of, backend_of, biased, scheme, options):
    backend = backend_of(model_of(scheme, options, attention_bias=biased, mlp_bias=biased))
    generator = np.random.default_rng(2)
    lengths = [9, 2, 16, 5]
    prompts = [generator.integers(3, 512, length) for length in lengths]
    tokens = generator.integers(3, 512, (3, 4))

    def steps(slots):
        for slot, sequence in enumerate(slots):
            chunked(backend, slot, prompts[sequence], size=len(prompts[sequence]))
        held = np.array([lengths[sequence] for sequence in slots])
        return np.stack([backend.decode(row[list(slots)], held + i).copy() for i, row in enumerate(tokens)])

    together = steps([0, 1, 2, 3])
    for sequence in range(4):
        np.testing.assert_array_equal(together[:, sequence], steps([sequence])[:, 0])


@pytest.mark.parametrize(("scheme", "options"), BATCH_INVARIANT)
def test_chunks_of_two_or_more_tokens_are_bit_identical_to_one(model_of, backend_of, ids, scheme, options):
    backend = backend_of(model_of(scheme, options))
    whole = backend.prefill(0, ids[0], 0, np.array([11]))[0]
    for size in (2, 3, 4, 6):
        np.testing.assert_array_equal(chunked(backend, 1, ids[0], size), whole)


@pytest.mark.parametrize(("scheme", "options"), BATCH_INVARIANT)
def test_rows_are_picked_in_the_order_asked_for_and_more_than_once(model_of, backend_of, ids, scheme, options):
    backend = backend_of(model_of(scheme, options))
    every = backend.prefill(0, ids[0], 0, np.arange(12))
    rows = np.array([11, 0, 7, 7, 3])
    found = backend.prefill(1, ids[0], 0, rows)
    np.testing.assert_allclose(found, every[rows], atol=1e-4)
    np.testing.assert_array_equal(found[2], found[3])


def test_a_token_of_zeros_gives_finite_logits(model_of, backend_of, ids):
    model = model_of()
    table = model.weights["model.embed_tokens.weight"].dense().clone()
    table[int(ids[0, 4])] = 0
    model = model.with_weights({"model.embed_tokens.weight": DenseWeight.of(table)})
    for scheme in ("W8A8", "W8A16"):
        backend = backend_of(RoundToNearest(scheme=scheme).run(model, PassContext()))
        assert np.isfinite(backend.prefill(0, ids[0], 0, np.arange(12))).all()
        assert np.isfinite(backend.decode(ids[0, 4:5], np.array([0]))).all()
