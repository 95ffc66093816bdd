"""What observers are shown: the very rows that transformers' linears and experts multiply."""

import pytest
import torch
from torch.nn import functional

from llmopt.calibration.observe import observing
from llmopt.calibration.reference import Reference
from llmopt.optimizer.sources import load_model

IDS = torch.arange(3 * 17).reshape(3, 17) * 5 % 101


@pytest.fixture
def model_of(family_of, tmp_path):
    return lambda name: load_model(str(family_of(name)), cache=tmp_path)


def seen_by(reference, layer, hidden, *, mask=None):
    """What each linear of a layer was given, once."""
    seen = {}

    def observer(module, rows):
        assert module not in seen
        seen[module] = rows

    index = reference.model.decoder.layers.index(layer)
    with observing(reference, layer.linears, observer, mask=mask):
        left = reference.layer(index, hidden)
    return seen, left


def test_every_linear_of_every_family_is_observed_once_and_nothing_changes(family_name, model_of):
    reference = Reference(model_of(family_name))
    hidden = reference.embed(IDS)
    for index, layer in enumerate(reference.model.decoder.layers):
        seen, left = seen_by(reference, layer, hidden)
        assert seen.keys() == set(layer.linears)
        for module, rows in seen.items():
            assert rows.shape[1] == reference.model.weights[f"{module}.weight"].shape[1]
        assert torch.equal(left, reference.layer(index, hidden))
        hidden = left


def test_a_row_that_is_shown_gives_the_linears_output(model_of):
    model = model_of("qwen2")
    reference, layer = Reference(model), model.decoder.layers[0]
    outputs = {}
    for module in layer.linears:
        hook = lambda _, __, output, module=module: outputs.setdefault(module, output)  # noqa: E731
        reference.module(module).register_forward_hook(hook)
    seen, _ = seen_by(reference, layer, reference.embed(IDS))
    for module, rows in seen.items():
        bias = model.weights.get(f"{module}.bias")
        expected = functional.linear(rows, model.weights[f"{module}.weight"].dense(), bias and bias.dense())
        torch.testing.assert_close(outputs[module].reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family_name", ["mixtral", "qwen3_moe"])
def test_experts_are_shown_the_tokens_that_the_router_sends_them(family_name, model_of):
    """The sum over experts of their outputs, by the router's weights, is the mixture's."""
    model = model_of(family_name)
    reference = Reference(model)
    mlp = next(layer for layer in model.decoder.layers if layer.linears[-1] in model.decoder.expert_linears).mlp
    layer = next(layer for layer in model.decoder.layers if layer.mlp is mlp)
    given = {}
    experts = reference.module(f"{mlp.router.rpartition('.')[0]}.experts")
    experts.register_forward_hook(lambda _, inputs, output: given.update(inputs=inputs, output=output))
    seen, _ = seen_by(reference, layer, reference.embed(IDS))
    hidden, chosen, weights = given["inputs"]
    expected = torch.zeros_like(hidden)
    for expert, (gate, up, down) in enumerate(mlp.experts):
        tokens = (chosen == expert).any(-1).nonzero()[:, 0]
        assert torch.equal(seen[gate], hidden[tokens])
        assert torch.equal(seen[up], hidden[tokens])
        share = (weights * (chosen == expert)).sum(-1)[tokens]
        expected[tokens] += functional.linear(seen[down], model.weights[f"{down}.weight"].dense()) * share[:, None]
    torch.testing.assert_close(given["output"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family_name", ["llama", "mixtral"])
def test_padding_is_not_shown(family_name, model_of):
    reference = Reference(model_of(family_name))
    layer = reference.model.decoder.layers[0]
    hidden = reference.embed(IDS)
    mask = torch.arange(17) < torch.tensor([17, 5, 0])[:, None]
    masked, _ = seen_by(reference, layer, hidden, mask=mask)
    alone: dict[str, list[torch.Tensor]] = {}
    for number, length in ((0, 17), (1, 5)):
        for module, rows in seen_by(reference, layer, hidden[number : number + 1, :length])[0].items():
            alone.setdefault(module, []).append(rows)
    for module, rows in masked.items():
        torch.testing.assert_close(rows, torch.cat(alone[module]), rtol=1e-4, atol=1e-5)


def test_nothing_is_observed_afterwards(model_of):
    reference = Reference(model_of("mixtral"))
    layer = reference.model.decoder.layers[0]
    hidden = reference.embed(IDS)
    with observing(reference, layer.linears, lambda module, rows: pytest.fail(module)):
        pass
    reference.layer(0, hidden)
