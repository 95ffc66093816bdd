"""Mixtures of experts on ONNX Runtime's kernels: right, the same in any batch, and declined where no kernel fits."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.instructions import host_instructions
from llmopt.passes.graph.lower_experts import LowerExperts

EXPERTS, HIDDEN, INNER = 6, 96, 48
EXACT = 1e-6
"""Sums in another order."""
ROUNDED = 0.05
"""QMoE rounds each block of 16 to 64 activations to int8 in front of both of its products."""

FLOATS = ("x", ("float32", ("batch", "tokens", HIDDEN))), ("scores", ("float32", ("batch", "tokens", EXPERTS)))


def floats(seed, experts, height, out):
    """Writes an initializer ``[experts, height, out]``."""
    array = 0.2 * np.random.default_rng(seed).standard_normal((experts, height, out), np.float32)
    return lambda builder: builder.constant(array, f"floats.{seed}")


def integers(seed, experts, height, out, *, bits=4, group=None, asymmetric=False, axis=1):
    """Writes a DequantizeLinear ``[experts, height, out]`` with a scale for each ``group`` inputs of an output."""
    generator, half, size = np.random.default_rng(seed), 1 << (bits - 1), group or height
    grouped = (experts, height // size, out)
    dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    arrays = {
        "values": generator.integers(-half, half, (experts, height, out)).astype(np.int8),
        "scale": (generator.uniform(0.5, 1.5, grouped) * 0.2 / half).astype(np.float32),
        "zero": generator.integers(-half // 2, half // 2, grouped).astype(np.int8),
    }
    kinds = {"values": dtype, "scale": ir.DataType.FLOAT, "zero": dtype}
    names = ["values", "scale", "zero"] if asymmetric else ["values", "scale"]

    def write(builder):
        inputs = [
            builder.initializer(ir.tensor(arrays[name], dtype=kinds[name], name=f"{name}.{seed}")) for name in names
        ]
        return builder.op("DequantizeLinear", *inputs, axis=axis, block_size=size)

    return write


def mixture(gate_up, down, *, top_k=2, normalize=1, activation="silu"):
    def write(builder, x, scores):
        return builder.op(
            "Experts", x, scores, gate_up(builder), down(builder),
            domain="llmopt", top_k=top_k, normalize=normalize, activation=activation, name="layer.experts.output",
        )  # fmt: skip

    return write


def both(make, *, experts=EXPERTS, hidden=HIDDEN, inner=INNER, **options):
    """Gate and up, and down."""
    return make(1, experts, hidden, 2 * inner, **options), make(2, experts, inner, hidden, **options)


def call(*shape, hidden=HIDDEN, experts=EXPERTS, size=1.0):
    generator = np.random.default_rng(3)
    x, scores = (generator.standard_normal((*shape, width), np.float32) for width in (hidden, experts))
    return {"x": np.float32(size) * x, "scores": np.float32(2 * size) * scores}


def run(graph, feeds, *, threads=2, exact=False):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if exact:  # what is not packed ahead is turned into floats and multiplied as floats
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    return [session.run(None, each)[0] for each in feeds]


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("top_k", [1, 2, 5, EXPERTS])
def test_float_experts_are_exact(rewrite, graph_of, top_k, normalize):
    graph = graph_of(mixture(*both(floats), top_k=top_k, normalize=normalize), **dict(FLOATS))
    result = rewrite("lower_experts", graph, call(2, 9), call(1, 1), call(3, 1), call(1, 5, size=100))
    assert result.applied == 1
    assert (result.ops["MoE"], result.ops["Experts"]) == (1, 0)
    assert result.difference() < EXACT
    assert result.notes == []


def test_a_batch_of_rows_without_a_batch_dimension_is_lowered(rewrite, graph_of):
    inputs = {"x": ("float32", ("rows", HIDDEN)), "scores": ("float32", ("rows", EXPERTS))}
    result = rewrite("lower_experts", graph_of(mixture(*both(floats)), **inputs), call(7), call(1))
    assert result.applied == 1
    assert result.difference() < EXACT


def test_equal_scores_reach_the_experts_that_the_body_chooses(rewrite, graph_of):
    feeds = call(1, 4)
    feeds["scores"][:] = 1
    result = rewrite("lower_experts", graph_of(mixture(*both(floats), top_k=3), **dict(FLOATS)), feeds)
    assert result.difference() < EXACT


GROUPS = [(4, None), (4, 16), (4, 48), (8, None), (8, 16), (8, 48)]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_integer_experts_are_packed_exactly(rewrite, graph_of, bits, group, asymmetric):
    weights = both(integers, bits=bits, group=group, asymmetric=asymmetric)
    calls = [call(2, 9), call(1, 1)]
    result = rewrite("lower_experts", graph_of(mixture(*weights, top_k=3), **dict(FLOATS)), *calls)
    assert result.applied == 1
    assert (result.ops["QMoE"], result.ops["Experts"], result.ops["DequantizeLinear"]) == (1, 0, 0)
    assert result.difference() < ROUNDED
    assert result.notes == ["QMoE rounds activations to int8 per block inside the kernel (accuracy_level 4)"]
    for found, (expected,) in zip(run(result.graph, calls, exact=True), result.before, strict=True):
        np.testing.assert_allclose(found, expected, atol=EXACT * np.abs(expected).max())


def test_shares_that_do_not_sum_to_one_are_kept(rewrite, graph_of):
    graph = graph_of(mixture(*both(integers), top_k=2, normalize=0), **dict(FLOATS))
    calls = [call(2, 9)]
    result = rewrite("lower_experts", graph, *calls)
    ((expected,),) = result.before
    np.testing.assert_allclose(run(result.graph, calls, exact=True)[0], expected, atol=EXACT * np.abs(expected).max())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"bits": 4}, {"bits": 8}),
        ({"bits": 8, "group": 48}, {"bits": 4, "group": 16}),
        ({"bits": 4, "asymmetric": True}, {"bits": 4}),
        ({"bits": 4}, {"bits": 8, "asymmetric": True}),
    ],
)
def test_down_may_have_a_scheme_of_its_own(graph_of, first, second):
    gate_up, _ = both(integers, **first)
    _, down = both(integers, **second)
    calls = [call(2, 9)]
    graph = graph_of(mixture(gate_up, down), **dict(FLOATS))
    (expected,), fallbacks = run(graph, calls), []
    LowerExperts().run(graph, PassContext(fallback=fallbacks.append))
    np.testing.assert_allclose(run(graph, calls, exact=True)[0], expected, atol=EXACT * np.abs(expected).max())
    assert np.abs(run(graph, calls)[0] - expected).max() < ROUNDED * np.abs(expected).max()
    widths = {first["bits"], second["bits"]}
    text = "1 mixtures of experts store 4-bit weights in 8 bits: layer.experts.output"
    assert fallbacks == ([text] if widths == {4, 8} else [])


@pytest.mark.parametrize(
    ("sizes", "options", "block"),
    [
        ({"hidden": 256, "inner": 128}, {"bits": 8}, 64),
        ({"hidden": 256, "inner": 128}, {"bits": 4}, 32),
        ({"hidden": 256, "inner": 128}, {"bits": 8, "group": 32}, 32),
        ({"hidden": 96, "inner": 48}, {"bits": 4}, 16),
        ({"hidden": 96, "inner": 48}, {"bits": 8, "group": 48}, 16),
        ({"hidden": 64, "inner": 64}, {"bits": 8}, 32),
    ],
)
def test_the_block_is_the_largest_that_fits_both_and_keeps_rows_apart(rewrite, graph_of, sizes, options, block):
    inputs = {"x": ("float32", (1, "tokens", sizes["hidden"])), "scores": ("float32", (1, "tokens", EXPERTS))}
    graph = graph_of(mixture(*both(integers, **sizes, **options)), **inputs)
    result = rewrite("lower_experts", graph, call(1, 4, hidden=sizes["hidden"]))
    (node,) = (node for node in result.graph.graph if node.op_type == "QMoE")
    expected = block if host_instructions() == "vnni" or options["bits"] == 8 else 16
    assert node.attributes["block_size"].as_int() == expected


WEIGHTS = [
    both(floats),
    *(both(integers, bits=bits, group=group, asymmetric=bool(group)) for bits, group in GROUPS),
    both(integers, hidden=256, inner=128, bits=8),
]
SIZES = [HIDDEN] * (len(WEIGHTS) - 1) + [256]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("weights", "hidden"), list(zip(WEIGHTS, SIZES, strict=True)), ids=["float", *map(str, GROUPS), "(8, None), wide"]
)
def test_a_row_is_the_same_bits_in_any_batch(graph_of, weights, hidden, threads):
    inputs = {"x": ("float32", ("batch", "tokens", hidden)), "scores": ("float32", ("batch", "tokens", EXPERTS))}
    graph = graph_of(mixture(*weights, top_k=3), **inputs)
    LowerExperts().run(graph, PassContext())
    whole = call(1, 23, hidden=hidden)
    parts = [
        (first, past_end) for first in range(23) for past_end in (first + 1, first + 2, first + 7) if past_end < 24
    ]
    feeds = [{name: array[:, slice(*part)] for name, array in whole.items()} for part in parts]
    batched = {name: array.reshape(23, 1, -1) for name, array in whole.items()}
    together, apart, *found = run(graph, [whole, batched, *feeds], threads=threads)
    np.testing.assert_array_equal(apart[:, 0], together[0])
    for part, rows in zip(parts, found, strict=True):
        np.testing.assert_array_equal(rows, together[:, slice(*part)])


def halves(builder):
    return builder.constant(np.zeros((EXPERTS, HIDDEN, 2 * INNER), np.float16), "halves")


def computed(builder):
    return builder.op("Mul", floats(1, EXPERTS, HIDDEN, 2 * INNER)(builder), builder.constant(np.float32(2), "two"))


GATE_UP, DOWN = both(integers, group=16)
FLOAT_GATE_UP, FLOAT_DOWN = both(floats)


@pytest.mark.parametrize(
    ("weights", "options", "why"),
    [
        ((GATE_UP, DOWN), {"activation": "gelu"}, "the kernels gate with silu, not with gelu"),
        ((FLOAT_GATE_UP, FLOAT_DOWN), {"activation": "relu"}, "the kernels gate with silu, not with relu"),
        ((computed, FLOAT_DOWN), {}, "the weights are not constant"),
        ((halves, FLOAT_DOWN), {}, "the weights are neither float32 nor integers"),
        ((GATE_UP, FLOAT_DOWN), {}, "of gate_up and down one is quantized and one is not"),
        ((FLOAT_GATE_UP, DOWN), {}, "of gate_up and down one is quantized and one is not"),
        (
            both(integers, bits=8, group=8),
            {},
            "no block of the kernel divides groups of 8 of 96 and 8 of 48 columns, with two blocks a row at least",
        ),
        (
            (both(integers, group=48)[0], both(integers, group=8)[1]),
            {},
            "no block of the kernel divides groups of 48 of 96 and 8 of 48 columns, with two blocks a row at least",
        ),
        (
            (integers(1, EXPERTS, HIDDEN, 2 * INNER, group=HIDDEN, axis=2), DOWN),
            {},
            "the weights are not 4- or 8-bit integers with scales along their inputs",
        ),
    ],
)
def test_what_no_kernel_computes_is_declined(graph_of, weights, options, why):
    graph = graph_of(mixture(*weights, **options), **dict(FLOATS))
    before = ir.to_proto(graph).graph.SerializeToString(deterministic=True)
    details, fallbacks = {}, []
    LowerExperts().run(graph, PassContext(detail=details.__setitem__, fallback=fallbacks.append))
    assert details == {"applied": 0, "declined": [f"layer.experts.output: {why}"]}
    assert fallbacks == ["1 mixtures of experts compute every expert for every token: layer.experts.output"]
    assert ir.to_proto(graph).graph.SerializeToString(deterministic=True) == before


def test_rows_with_a_single_block_are_declined(graph_of):
    inputs = {"x": ("float32", (1, "tokens", 16)), "scores": ("float32", (1, "tokens", EXPERTS))}
    graph = graph_of(mixture(*both(integers, hidden=16, inner=32)), **inputs)
    details = {}
    LowerExperts().run(graph, PassContext(detail=details.__setitem__))
    assert details["applied"] == 0
    assert "groups of 16 of 16 and 32 of 32 columns" in details["declined"][0]
