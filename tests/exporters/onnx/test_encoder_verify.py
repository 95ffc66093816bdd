"""Every graph pass of an encoder is run against the graph before it, and one that breaks a layer is named."""

import onnx_ir as ir
import pytest

from llmopt.exporters.onnx.encoder_verify import verify_encoder
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import VerificationError
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.target import TARGETS
from llmopt.passes.graph import fuse_self_attention, lower_linear
from llmopt.passes.round_to_nearest import RoundToNearest

CPU = TARGETS["cpu"]


@pytest.fixture
def model_of(encoder_of, tmp_path):
    def make(name, scheme=None, *, layers=1, **options):
        model = load_model(str(encoder_of(name, num_hidden_layers=layers)), cache=tmp_path)
        return model if scheme is None else RoundToNearest(scheme=scheme, **options).run(model, PassContext())

    return make


@pytest.mark.parametrize(("level", "layers"), [("none", []), ("quick", [0, 2, 3]), ("full", [0, 1, 2, 3])])
def test_a_level_says_which_layers_are_run(model_of, level, layers):
    found = verify_encoder(model_of("bert", layers=4), CPU, level=level, seed=0)
    assert list(found) == [f"layers.{i}" for i in layers]


def test_quick_runs_a_layer_of_every_kind(model_of):
    found = verify_encoder(model_of("modernbert", layers=5), CPU, level="quick", seed=0)
    assert list(found) == ["layers.0", "layers.2", "layers.3", "layers.4"]  # 1, 2 and 4 see a window; 0 has no norm


def test_quick_runs_a_layer_of_every_scheme(model_of):
    overrides = [{"match": r"re:encoder\.layer\.1\..*", "scheme": "W8A16"}]
    found = verify_encoder(model_of("bert", "W8A8", layers=4, overrides=overrides), CPU, level="quick", seed=0)
    assert list(found) == [f"layers.{i}" for i in range(4)]


@pytest.mark.parametrize("scheme", [None, "W8A8", "W8A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("name", ["bert"])
def test_a_right_lowering_stays_within_float_rounding(model_of, name, scheme):
    for differences in verify_encoder(model_of(name, scheme), CPU, level="quick", seed=0).values():
        assert "all" in differences
        assert all(0 <= difference < 1e-5 for difference in differences.values())


def wrong_scale(graph):
    for node in graph.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 1.01 * node.attributes["scale"].as_float())


def wrong_mask(graph):
    for node in graph.graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, None)


def wrong_weight(graph):
    products = [node for node in graph.graph if node.op_type == "MatMulIntegerToFloat"]
    first, second = (node.inputs[1] for node in products[:2])
    products[0].replace_input_with(1, second)
    products[1].replace_input_with(1, first)


@pytest.mark.parametrize(
    ("kind", "name", "spoil"),
    [
        (fuse_self_attention.FuseSelfAttention, "fuse_self_attention", wrong_scale),
        (fuse_self_attention.FuseSelfAttention, "fuse_self_attention", wrong_mask),
        (lower_linear.LowerLinear, "lower_linear", wrong_weight),
    ],
    ids=["scale", "mask", "weight"],
)
def test_a_pass_that_breaks_a_layer_is_named(model_of, monkeypatch, kind, name, spoil):
    right = kind.run

    def run(self, graph, context):
        right(self, graph, context)
        spoil(graph)
        return graph

    monkeypatch.setattr(kind, "run", run)
    with pytest.raises(VerificationError, match=f"^layer 0: {name} changes the result: vectors differ by") as error:
        verify_encoder(model_of("bert", "W8A8"), CPU, level="quick", seed=0)
    assert "a bug in that graph pass" in error.value.hint


def test_a_graph_that_does_not_run_is_told_with_the_pass(model_of, monkeypatch):
    def run(self, graph, context):
        context.detail("applied", 1)
        for node in graph.graph:
            if node.op_type == "Gelu":
                node.op_type = "NoSuchOperator"
        return graph

    monkeypatch.setattr(lower_linear.LowerLinear, "run", run)
    with pytest.raises(VerificationError, match="layer 0: ONNX Runtime does not run the graph behind lower_linear"):
        verify_encoder(model_of("bert"), CPU, level="quick", seed=0)
