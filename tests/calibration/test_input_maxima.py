"""The largest inputs of linears against hooks on transformers' own module."""

from dataclasses import replace

import pytest
import torch

from llmopt.calibration.input_maxima import input_maxima
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.tokens import Tokens

IDS = torch.arange(3 * 17).reshape(3, 17) % 101


def reading(ids, lengths=None):
    return PassContext(calibration=lambda: Tokens("some", ids, "", lengths=lengths))


def theirs(network, ids):
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, name=name: found.update(
                    {name: max(found.get(name, 0.0), float(x[0].detach().abs().max()))}
                )
            )
    for row in ids:
        network(row[None])
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_they_are_what_transformers_module_sees(pair_of, tied):
    model, network = pair_of(tie_word_embeddings=tied)
    found = input_maxima(model, model.linears(), reading(IDS))
    assert list(found) == model.linears()
    # Sums of some hundred float32 terms in another order differ by a few of their last bits.
    assert found == pytest.approx(theirs(network, IDS), rel=1e-5)


def test_padding_is_not_looked_at(pair_of):
    model, network = pair_of()
    padded = torch.cat([IDS[:2, :9], torch.full((2, 8), 7)], 1)
    lengths = torch.tensor([9, 5])
    found = input_maxima(model, model.linears(), reading(padded, lengths))
    assert found == pytest.approx(theirs(network, [IDS[0, :9], IDS[1, :5]]), rel=1e-5)


def test_what_exceeds_the_memory_lies_in_a_file_that_disappears_with_it(pair_of, tmp_path, monkeypatch):
    model, _ = pair_of()
    expected = input_maxima(model, model.linears(), reading(IDS))
    mapped, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **o: mapped.append(o["size"]) or from_file(*a, **o))
    found = input_maxima(model, model.linears(), replace(reading(IDS), work=tmp_path, activation_bytes=100))
    assert found == expected
    assert mapped == [IDS.numel() * model.decoder.hidden_size]
    assert list(tmp_path.iterdir()) == []


def test_only_the_modules_asked_for_are_returned(pair_of):
    model, _ = pair_of()
    name = "model.layers.1.mlp.down_proj"
    assert list(input_maxima(model, [name], reading(IDS))) == [name]


def test_what_is_not_finite_is_named(pair_of):
    model, _ = pair_of()
    name = "model.layers.1.mlp.up_proj.weight"
    model = model.with_weights({name: DenseWeight.of(torch.full(model.weights[name].shape, 1e38))})
    with pytest.raises(PassError, match=r"model.layers.1.mlp.down_proj is not finite"):
        input_maxima(model, model.linears(), reading(IDS))
