"""Graphs of encoders against transformers' own modules, and against the same texts in other company."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel

from llmopt.calibration.encoder_reference import EncoderReference
from llmopt.exporters.onnx.encoder_graph import encoder_graph
from llmopt.exporters.onnx.lowering import finished, passed
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import QuantWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.target import TARGETS
from llmopt.passes.round_to_nearest import RoundToNearest

CLOSE = 2e-5
"""Of the largest number: float32 sums of 64 products, in another order in each of up to four layers."""

PAD = 1


@pytest.fixture(scope="session")
def model_named(encoder_of, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return lambda name, **changes: load_model(str(encoder_of(name, **changes)), cache=cache)


@pytest.fixture(scope="session")
def lowered(tmp_path_factory):
    """``lowered(model)``: a session of the graph that the target cpu executes, made once for each model."""
    made = {}  # the model is held, so that its id stays its own

    def make(model):
        if id(model) not in made:
            graph, _ = finished(passed(encoder_graph(model), TARGETS["cpu"].encoder_passes))
            sessions = Sessions(tmp_path_factory.mktemp("weights"))
            made[id(model)] = model, sessions.open(sessions.serialized(graph))
        return made[id(model)][1]

    return make


def feeds_of(model, lengths, tokens=None, seed=0):
    """Texts of these lengths, padded on their right to ``tokens``; in the second half tokens are of another type."""
    tokens = tokens or max(lengths)
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, 512, (len(lengths), 64))[:, :tokens]
    mask = (np.arange(tokens) < np.array(lengths)[:, None]).astype(np.int64)
    feeds = {"input_ids": np.where(mask > 0, ids, PAD), "attention_mask": mask}
    if model.encoder.has_token_types:
        feeds["token_type_ids"] = np.broadcast_to(np.arange(tokens) > 3, ids.shape).astype(np.int64)
    return feeds


def run(session, feeds):
    return session.run(["last_hidden_state", "sentence_embedding"], feeds)


@pytest.fixture(scope="session")
def model(encoder_name, model_named):
    return model_named(encoder_name)


@pytest.mark.parametrize("lengths", [(12, 7, 1), (1,), (64, 33)], ids=str)
def test_vectors_are_those_of_transformers(encoder_of, encoder_name, model, lowered, lengths):
    feeds = feeds_of(model, lengths)
    hidden, vectors = run(lowered(model), feeds)
    network = AutoModel.from_pretrained(encoder_of(encoder_name), attn_implementation="eager").eval()
    with torch.no_grad():
        expected = network(**{name: torch.from_numpy(x) for name, x in feeds.items()}).last_hidden_state.numpy()
    real = feeds["attention_mask"] > 0
    largest = np.abs(expected[real]).max()
    assert np.abs(hidden - expected)[real].max() < CLOSE * largest
    means = np.stack([rows[mask].mean(0) for rows, mask in zip(expected, real, strict=True)])
    assert np.abs(vectors - means).max() < CLOSE * largest


def test_padding_and_company_change_nothing_but_rounding(model, lowered):
    session = lowered(model)
    together = run(session, feeds_of(model, (12, 7, 20), tokens=40))[1]
    for i, length in enumerate((12, 7, 20)):
        feeds = {name: x[i : i + 1, :length] for name, x in feeds_of(model, (12, 7, 20), tokens=40).items()}
        alone = run(session, feeds)[1][0]
        assert np.abs(alone - together[i]).max() < CLOSE * np.abs(alone).max()


def test_a_token_far_away_counts(model, lowered):
    feeds = feeds_of(model, (30,))
    before = run(lowered(model), feeds)[0]
    feeds["input_ids"][0, 29] += 1
    after = run(lowered(model), feeds)[0]
    assert np.abs(after - before)[0, 0].max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert"])
def test_w8a8_is_that_of_the_rounded_model_in_torch(model_named, lowered, name):
    model = model_named(name)
    rounded = RoundToNearest(scheme="W8A8").run(model, PassContext())
    assert all(isinstance(rounded.weights[f"{name}.weight"], QuantWeight) for name in model.linears())
    feeds = feeds_of(model, (12, 7, 20, 1, 16, 30))
    found = run(lowered(rounded), feeds)[1]
    reference = EncoderReference(rounded)
    expected = reference.pooled(*(torch.from_numpy(x) for x in feeds.values())).numpy()
    plain = EncoderReference(model).pooled(*(torch.from_numpy(x) for x in feeds.values())).numpy()
    lost, missed = (np.linalg.norm(each - expected, axis=1) for each in (plain, found))
    # An activation on the border of two integers rounds either way and moves what follows: most texts have none.
    assert np.median(missed) < 0.02 * np.median(lost)
    assert missed.max() < lost.max()


def test_w8a8_multiplies_integers_in_every_linear(model_named):
    model = model_named("bert", num_hidden_layers=2)
    model = RoundToNearest(scheme="W8A8", embedding="W8A16").run(model, PassContext())
    graph, records = finished(passed(encoder_graph(model), TARGETS["cpu"].encoder_passes, strict=True))
    operators = [node.op_type for node in graph.graph]
    assert operators.count("MatMulIntegerToFloat") == len(model.linears()) == 12
    assert operators.count("QuantizeLinear") == 8  # query, key and value share one
    assert operators.count("Attention") == 2
    assert not [text for record in records for text in record.fallbacks]


def test_all_inputs_and_outputs_have_names_and_sizes(model_named):
    graph = encoder_graph(model_named("roberta", num_hidden_layers=1)).graph
    assert [(value.name, [str(size) for size in value.shape]) for value in (*graph.inputs, *graph.outputs)] == [
        ("input_ids", ["batch", "tokens"]),
        ("attention_mask", ["batch", "tokens"]),
        ("last_hidden_state", ["batch", "tokens", "64"]),
        ("sentence_embedding", ["batch", "64"]),
    ]
    assert "llmopt" not in {node.domain for node in graph}


def test_weights_are_not_read_before_the_graph_is_saved(model_named):
    def fail():
        raise AssertionError("a weight was read")

    model = model_named("bert", num_hidden_layers=1)
    unread = model.with_weights({name: replace(weight, load=fail) for name, weight in model.weights.items()})
    graph = encoder_graph(unread)
    assert sum(value.const_value.nbytes for value in graph.graph.initializers.values()) > 4 * 512 * 64
