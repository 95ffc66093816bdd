"""Graphs that are no engines yet, against the reference."""

import onnx_ir as ir
import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.evaluation import graph_logits as module
from llmopt.evaluation.graph_logits import graph_logits
from llmopt.exporters.onnx.lowering import stages
from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer.errors import VerificationError
from llmopt.optimizer.model import Model
from llmopt.optimizer.target import TARGETS
from llmopt.optimizer.tokens import Tokens


@pytest.fixture
def graph(tiny_model: Model) -> ir.Model:
    return standard_graph(tiny_model, capacity=64)


def test_the_standard_graph_predicts_what_the_model_does(graph: ir.Model, tiny_model: Model, text: Tokens) -> None:
    found = torch.cat(list(graph_logits(graph, text.ids, name="it", threads=1)))
    expected = Reference(tiny_model).logits(text.ids)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.std()) * 10  # sums in another order


def test_every_stage_of_a_lowering_can_be_run(tiny_model: Model, text: Tokens) -> None:
    """The graph is saved without being changed: the next graph pass goes on from it."""
    expected = Reference(tiny_model).logits(text.ids)
    names = []
    for stage in stages(tiny_model, TARGETS["cpu"], capacity=64):
        [found] = graph_logits(stage.graph, text.ids, name=stage.name, threads=1)
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.std()), stage.name
        names.append(stage.name)
    assert names == ["standard", *TARGETS["cpu"].graph_passes]


def test_logits_come_in_blocks_that_fit_in_memory(
    graph: ir.Model, text: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    [whole] = graph_logits(graph, text.ids, name="it", threads=1)
    monkeypatch.setattr(module, "_LOGITS", 2 * 41 * 512)
    blocks = list(graph_logits(graph, text.ids, name="it", threads=1))
    assert [len(block) for block in blocks] == [2, 1]
    assert float((torch.cat(blocks) - whole).abs().max()) < 1e-5
    monkeypatch.setattr(module, "_LOGITS", 1)
    assert [len(block) for block in graph_logits(graph, text.ids, name="it", threads=1)] == [1, 1, 1]


def test_a_graph_that_cannot_be_loaded_names_the_pass_that_made_it(graph: ir.Model, text: Tokens) -> None:
    for node in graph.graph:
        if node.op_type == "RMSNormalization":
            node.op_type = "RmsNormalisation"
    with pytest.raises(VerificationError, match=r"graph behind fuse_all: .*RmsNormalisation"):
        list(graph_logits(graph, text.ids, name="fuse_all", threads=1))


def test_a_graph_that_fails_while_it_runs_names_the_pass_that_made_it(graph: ir.Model, text: Tokens) -> None:
    with pytest.raises(VerificationError, match="graph behind fuse_all: "):
        list(graph_logits(graph, text.ids + 512, name="fuse_all", threads=1))
