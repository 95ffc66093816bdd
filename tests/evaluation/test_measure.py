"""Metrics of known engines: the model itself, the model with changed logits, and a quantized one."""

from dataclasses import replace

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.evaluation.measure import compare, measure, measure_model
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.model import QuantTensors, QuantWeight
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.tokens import SAMPLED, Tokens
from llmopt.passes.round_to_nearest import RoundToNearest


def values(measurements):
    return {found.metric: found.value for found in measurements}


def test_the_model_itself_loses_nothing(tiny_model, backend_of, text):
    found = {each.metric: each for each in measure(tiny_model, lambda: backend_of(tiny_model), [text])}
    # The engine sees the text in chunks, so sums have other orders: float32's last bits.
    assert found["kl"].value == pytest.approx(0, abs=1e-6)
    assert found["top1"].value == 1
    assert found["perplexity"].value == pytest.approx(found["perplexity"].source, rel=1e-5)


def test_every_metric_is_the_naive_one(tiny_model, backend_of, text):
    def change(logits):
        return logits * 0.8

    found = {each.metric: each for each in measure(tiny_model, lambda: backend_of(tiny_model, change), [text])}
    source = Reference(tiny_model).logits(text.ids).double()
    p, q = source.softmax(-1), (source * 0.8).softmax(-1)
    assert found["kl"].value == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found["top1"].value == 1
    for logits, value in ((source, found["perplexity"].source), (source * 0.8, found["perplexity"].value)):
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 512), text.ids[:, 1:].reshape(-1))
        assert value == pytest.approx(float(losses.exp()), rel=1e-5)


def test_positions_are_counted_as_they_are_used(tiny_model, backend_of, text):
    found = measure(tiny_model, lambda: backend_of(tiny_model), [text])
    assert {each.metric: each.tokens for each in found} == {"kl": 3 * 41, "top1": 3 * 41, "perplexity": 3 * 40}
    assert {(each.data, each.data_digest) for each in found} == {("some.txt", "d" * 64)}


def test_no_perplexity_on_text_the_source_wrote_itself(tiny_model, backend_of, text):
    found = measure(tiny_model, lambda: backend_of(tiny_model), [replace(text, name=SAMPLED)])
    assert [each.metric for each in found] == ["kl", "top1"]


def test_several_texts_are_measured_in_order(tiny_model, backend_of, text):
    other = replace(text, name="other.txt", ids=text.ids[:1, :9])
    found = measure(tiny_model, lambda: backend_of(tiny_model), [text, other])
    assert [each.data for each in found] == ["some.txt"] * 3 + ["other.txt"] * 3


def test_a_quantized_engine_is_measured_against_the_unquantized_source(tiny_model, backend_of, text):
    def int8(weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return QuantWeight.of(QuantTensors((weight / scale).round().to(torch.int8), scale, None), PRESETS["W8A8"])

    names = [tiny_model.weight_of(name) for name in tiny_model.linears()]
    quantized = tiny_model.with_weights({name: int8(tiny_model.weights[name].dense()) for name in names})
    found = values(measure(tiny_model, lambda: backend_of(quantized), [text]))
    assert 1e-6 < found["kl"] < 0.1
    assert 0.5 < found["top1"] <= 1


def test_no_chunk_has_a_single_token(tiny_model, backend_of, text):
    backend = backend_of(tiny_model, max_chunk=8)
    measure(tiny_model, lambda: backend, [text])
    assert sum(length for _, length in backend.chunks) == text.ids.numel()
    assert min(length for _, length in backend.chunks) >= 2


def test_the_largest_difference_of_two_logits_is_reported(tiny_model, backend_of, text):
    def change(logits):
        return logits + torch.zeros_like(logits).index_fill(1, torch.tensor([7]), 0.25)

    reference = Reference(tiny_model)
    hidden = reference.hidden_states(text.ids)
    found = compare(reference, hidden, backend_of(tiny_model, change), text.ids)
    assert found.largest == pytest.approx(0.25, abs=1e-5)


def test_the_engine_is_opened_when_the_source_has_left_its_layers(tiny_model, backend_of, text, monkeypatch):
    order = []
    hidden_states = Reference.hidden_states
    monkeypatch.setattr(Reference, "hidden_states", lambda *a, **o: order.append("source") or hidden_states(*a, **o))
    measure(tiny_model, lambda: order.append("engine") or backend_of(tiny_model), [text, text])
    assert order[:3] == ["source", "source", "engine"]


def test_windows_longer_than_a_slot_are_refused(tiny_model, backend_of, text):
    with pytest.raises(InputError, match="windows have 41 tokens, the engine takes at most 40"):
        measure(tiny_model, lambda: backend_of(tiny_model, capacity=40), [text])


def test_no_text_is_an_error(tiny_model, backend_of):
    with pytest.raises(InputError, match="nothing to measure on"):
        measure(tiny_model, lambda: backend_of(tiny_model), [])


def test_progress_reaches_its_total(tiny_model, backend_of, text):
    calls = []
    measure(tiny_model, lambda: backend_of(tiny_model), [text, text], progress=lambda *call: calls.append(call))
    assert calls == [(done, 12) for done in range(1, 13)]


@pytest.mark.real_model
def test_source_perplexity_of_the_real_model_is_that_of_transformers(smollm2, backend_of, tmp_path):
    from pathlib import Path

    from transformers import AutoModelForCausalLM, LlamaConfig

    from llmopt.calibration.texts import read_tokens

    path = Path(__file__)
    read = read_tokens(path, smollm2.source.tokenizer_dir, windows=1, tokens=256)
    engine = backend_of(smollm2, capacity=256, max_chunk=128)
    found = {each.metric: each for each in measure(smollm2, lambda: engine, [read])}
    config = LlamaConfig.from_dict(dict(smollm2.config))
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.to_empty(device="cpu")
    network.load_state_dict({name: weight.dense() for name, weight in smollm2.weights.items()}, strict=False)
    network.tie_weights()
    network.model.rotary_emb = type(network.model.rotary_emb)(config=config)
    with torch.no_grad():
        expected = float(network.eval()(read.ids, labels=read.ids).loss.exp())
    # Blocks of rows, and other kernels, sum in other orders: through 30 layers, float32 leaves 1e-4 of the logits.
    assert found["perplexity"].source == pytest.approx(expected, rel=5e-5)
    assert found["perplexity"].value == pytest.approx(expected, rel=5e-5)
    assert 2 < expected < 100


def test_a_model_without_an_engine_is_measured_by_the_reference(tiny_model):
    model = RoundToNearest(scheme="W4A16", group_size=32).run(tiny_model, PassContext())
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    text = Tokens(name="it.txt", ids=ids, digest="0")
    found = {each.metric: each for each in measure_model(tiny_model, model, [text])}
    before, behind = (Reference(each).logits(ids).double().log_softmax(-1) for each in (tiny_model, model))
    # Logits are float32.
    assert found["kl"].value == pytest.approx(float((before.exp() * (before - behind)).sum(-1).mean()), rel=1e-4)
    assert found["kl"].tokens == 40
    nll = -behind[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert found["perplexity"].value == pytest.approx(float(nll.exp()), rel=1e-4)
    same = measure_model(tiny_model, tiny_model, [text])
    assert [each.value for each in same if each.metric == "kl"] == [0.0]
