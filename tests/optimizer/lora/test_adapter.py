"""An adapter that does not fit is refused by what does not, before anything is computed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.adapter import read_adapter
from llmopt.optimizer.lora.changes import Dora, LowRank, Replaced
from llmopt.optimizer.sources import load_model

PREFIX = "base_model.model."
FIRST = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tiny_llama_untied, tmp_path_factory):
    return load_model(str(tiny_llama_untied), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def saved(adapter_of, tiny_llama_untied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    targets = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True}
    adapter_of(folder, tiny_llama_untied, **targets)
    return folder


@pytest.fixture
def changed(saved, tmp_path):
    """A copy of the adapter whose tensors a function changes; keywords change its configuration."""

    def make(change=lambda tensors: None, **settings):
        folder = tmp_path / "adapter"
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return make


def test_every_change_has_our_name(saved, model) -> None:
    adapter = read_adapter(saved, model)
    queries = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    assert adapter.changes.keys() == {*queries, "model.embed_tokens.weight", "lm_head.weight"}
    assert isinstance(adapter.changes["lm_head.weight"], Replaced)
    table = adapter.changes["model.embed_tokens.weight"]
    assert isinstance(table, Dora)
    assert (table.along, table.product.down.read().shape) == ("columns", (4, 64))
    assert not adapter.is_low_rank


def test_reading_it_reads_no_tensor(saved, model, monkeypatch) -> None:
    monkeypatch.setattr("llmopt.optimizer.tensor_file.FileTensor._map", lambda *_: pytest.fail("a tensor was read"))
    read_adapter(saved, model)


def test_plain_lora_is_low_rank(changed, model) -> None:
    def plain(tensors):
        for name in [name for name in tensors if "q_proj.lora_A" not in name and "q_proj.lora_B" not in name]:
            del tensors[name]

    adapter = read_adapter(changed(plain, use_dora=False, target_modules=["q_proj"], modules_to_save=None), model)
    assert adapter.is_low_rank
    assert all(isinstance(change, LowRank) for change in adapter.changes.values())


def remove(name):
    return lambda tensors: tensors.pop(name)


def add(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove(f"{FIRST}.lora_B.weight"), r"lacks model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight"),
        (remove(f"{FIRST}.lora_magnitude_vector"), r"lacks .*q_proj\.lora_magnitude_vector"),
        (remove(f"{PREFIX}lm_head.weight"), r"lacks lm_head\.weight, which adapter_config\.json names"),
        (
            lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(FIRST)],
            r"lacks model\.layers\.0\.self_attn\.q_proj, which",
        ),
        (
            add(f"{PREFIX}model.layers.3.self_attn.q_proj.lora_A.weight", 4, 64),
            r"fit nothing in .*: model\.layers\.3\.self_attn\.q_proj\.lora_A",
        ),
        (add(f"{PREFIX}score.weight", 2, 64), r"fit nothing in .*: score\.weight"),
        (add(f"{PREFIX}model.layers.0.mlp.up_proj.bias", 128), r"fit nothing in .*up_proj\.bias"),
        (add(f"{FIRST}.base_layer.base_layer.lora_A.weight", 4, 64), "fit nothing in"),
        (add("encoder.lora_A.weight", 4, 64), r"is not PEFT's: it holds encoder\.lora_A\.weight"),
        (lambda tensors: tensors.clear(), "is not PEFT's: it is empty"),
        (
            add(f"{FIRST}.lora_A.weight", 4, 32),
            r"q_proj\.lora_A\.weight is \[4, 32\], and .* needs \[4, 64\]",
        ),
        (add(f"{FIRST}.lora_B.weight", 64, 0), r"lora_B\.weight is \[64, 0\], and .* needs \[64, 4\]"),
        (add(f"{FIRST}.lora_magnitude_vector", 63), r"lora_magnitude_vector is \[63\], and .* needs \[64\]"),
        (add(f"{PREFIX}lm_head.weight", 513, 64), r"lm_head\.weight is \[513, 64\], and .* needs \[512, 64\]"),
        (
            add(f"{PREFIX}model.embed_tokens.base_layer.weight", 520, 64),
            r"embed_tokens\.base_layer\.weight is \[520, 64\], and .* needs \[512, 64\]",
        ),
        (add(f"{FIRST}.lora_B.bias", 64), "adds a bias to model.layers.0.self_attn.q_proj, which has none"),
    ],
)
def test_what_is_missing_too_much_or_of_another_shape_is_named(change, said, changed, model) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_adapter(changed(change), model)
    assert raised.value.hint


def test_another_base_is_named(changed, model) -> None:
    folder = changed(add(f"{FIRST}.lora_A.weight", 4, 32), base_model_name_or_path="org/other-1B")
    with pytest.raises(InputError, match="needs") as raised:
        read_adapter(folder, model)
    assert "org/other-1B" in str(raised.value.hint)


def test_a_rank_that_is_not_the_factors_is_an_error(changed, model) -> None:
    with pytest.raises(InputError, match=r"is \[64, 4\], and .* needs \[64, 8\]"):
        read_adapter(changed(r=8), model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_when_they_are_read(value, changed, model) -> None:
    def damage(tensors):
        tensors[f"{FIRST}.lora_A.weight"][1, 2] = value

    adapter = read_adapter(changed(damage), model)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(
        InputError, match=r"adapter_model\.safetensors: .*q_proj\.lora_A\.weight has values that are not"
    ):
        adapter.changes[name].of(model.weights[name].dense())


def test_a_truncated_file_is_an_error(changed, model) -> None:
    folder = changed()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is truncated or not a safetensors file"):
        read_adapter(folder, model)


@pytest.mark.parametrize(
    ("trained_on", "spec", "other"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "./models/smollm2-135m/", None),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M@12ab", None),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M@12ab", "HuggingFaceTB/SmolLM2-135M"),
        (None, "./anything", None),
    ],
)
def test_a_base_of_another_name_is_told_by_the_last_part(trained_on, spec, other, changed, model) -> None:
    adapter = read_adapter(changed(base_model_name_or_path=trained_on), model)
    assert adapter.other_base(spec) == other
