"""transformers' module without memory: the tables that no checkpoint holds are transformers' own."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llmopt.calibration.skeleton import Tables, skeleton
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.sources import load_model


@pytest.mark.parametrize("family_name", ["llama-yarn-rope", "gemma2", "gemma3", "phi3-longrope", "falcon", "gpt_neox"])
def test_tables_are_those_of_a_loaded_model(family_name, family_of, tmp_path):
    made = skeleton(load_model(str(family_of(family_name)), cache=tmp_path), torch.float32)
    expected = dict(AutoModelForCausalLM.from_pretrained(family_of(family_name), dtype=torch.float32).named_buffers())
    found = dict(made.named_buffers())
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_parameter_has_memory(tiny_llama, tmp_path):
    made = skeleton(load_model(str(tiny_llama), cache=tmp_path), torch.float32)
    assert all(parameter.is_meta for parameter in made.parameters())


@pytest.mark.parametrize(("family_name", "attention"), [("gemma2", "eager"), ("gemma3", "sdpa")])
def test_capped_scores_are_computed_by_the_attention_that_caps(family_name, attention, family_of, tmp_path):
    made = skeleton(load_model(str(family_of(family_name)), cache=tmp_path), torch.float32)
    assert made.config._attn_implementation == attention


@pytest.mark.parametrize("values", [torch.ones(2), torch.ones(2, dtype=torch.bool)], ids=["floats", "booleans"])
def test_a_table_that_transformers_does_not_compute_again_is_refused(values, tiny_llama, tmp_path, monkeypatch):
    model = load_model(str(tiny_llama), cache=tmp_path)
    make = LlamaForCausalLM.__init__

    def with_a_table(self, config):
        make(self, config)
        self.model.register_buffer("slopes", values.to("meta"), persistent=False)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_a_table)
    with pytest.raises(UnsupportedError, match=r"llama keeps tables .* does not compute again: model\.slopes"):
        skeleton(model, torch.float32)


def test_restored_tables_are_the_first_ones():
    class Rope(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.arange(3.0))
            self.longest = 8

    network = nn.Sequential(nn.Linear(2, 2), Rope())
    weight = network[0].weight
    tables = Tables(network)
    for _ in range(2):
        network[1].frequencies[0], network[1].longest = 7.0, 99
        tables.restore()
        assert (network[1].frequencies.tolist(), network[1].longest) == ([0.0, 1.0, 2.0], 8)
    assert network[0].weight is weight
