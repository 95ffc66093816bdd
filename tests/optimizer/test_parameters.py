"""A checkpoint's names and transformers' own: every spelling that checkpoints have gives the same model."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.parameters import expected_parameters, their_name
from llmopt.optimizer.sources import load_model

Spell = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def model_of(family_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    return cache(lambda name: load_model(str(family_of(name)), cache=tmp_path_factory.mktemp("cache")))


@pytest.fixture
def spelled(family_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str, Spell], Model]:
    """Loads a family's checkpoint whose tensors were changed."""

    def load(name: str, spell: Spell) -> Model:
        directory = Path(shutil.copytree(family_of(name), tmp_path / "copy"))
        tensors = spell(load_file(directory / "model.safetensors"))
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
        return load_model(str(directory), cache=tmp_path / "cache")

    return load


def assert_equal(found: Model, expected: Model) -> None:
    assert list(found.weights) == list(expected.weights)
    for name, weight in expected.weights.items():
        assert found.weights[name].shape == weight.shape == tuple(found.weights[name].load().shape)
        assert torch.equal(found.weights[name].dense(), weight.dense()), name


def without(prefix: str) -> Spell:
    return lambda tensors: {name.removeprefix(prefix): value for name, value in tensors.items()}


def also(**buffers: Tensor) -> Spell:
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in buffers.items()}


def test_every_family_keeps_the_names_of_its_checkpoint(
    family_name: str, family_of: Callable[[str], Path], model_of: Callable[[str], Model]
) -> None:
    model = model_of(family_name)
    stored = load_file(family_of(family_name) / "model.safetensors")
    assert model.weights.keys() == stored.keys()
    transposed = {f"{layer.name}.{name}.weight" for layer in model.decoder.layers for name in model.arch.transposed}
    for name, tensor in stored.items():
        assert torch.equal(model.weights[name].dense(), tensor.T if name in transposed else tensor)


def test_every_linear_of_a_family_is_out_by_in(family_name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(family_name)
    for layer in model.decoder.layers:
        heads = layer.attention
        assert model.weights[f"{heads.output}.weight"].shape == (
            model.decoder.hidden_size,
            heads.heads * heads.head_dim,
        )
        for name in layer.mlp.linears:
            rows, columns = model.weights[f"{name}.weight"].shape
            assert model.decoder.hidden_size == (columns if name in layer.mlp.inputs else rows)


@pytest.mark.parametrize("family_name", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_what_transformers_saves_in_its_own_spelling_is_the_same_model(
    family_name: str, family_of: Callable[[str], Path], model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(family_of(family_name), tmp_path / "copy"))
    network = AutoModelForCausalLM.from_pretrained(directory)
    network.save_pretrained(directory, save_original_format=False)
    stored = load_file(directory / "model.safetensors")
    assert stored.keys() != model_of(family_name).weights.keys()
    assert_equal(load_model(str(directory), cache=tmp_path / "cache"), model_of(family_name))


@pytest.mark.parametrize(
    ("family_name", "spell"),
    [
        ("gpt2", without("transformer.")),
        ("falcon", without("transformer.")),
        ("opt", without("model.")),
        ("opt-350m", without("model.")),
        ("gpt2", also(transformer__h__0__attn__bias=torch.ones(1, 1, 8, 8, dtype=torch.bool))),
        ("gpt2", also(h__0__attn__masked_bias=torch.tensor(-1e4))),
        ("gpt_neox", also(gpt_neox__layers__0__attention__bias=torch.ones(1, 1, 8, 8, dtype=torch.uint8))),
        ("gpt_neox", also(gpt_neox__layers__1__attention__masked_bias=torch.tensor(-1e9))),
        ("gpt_neox", also(gpt_neox__layers__1__attention__rotary_emb__inv_freq=torch.ones(2))),
        ("falcon", also(transformer__h__0__self_attention__maybe_rotary__inv_freq=torch.ones(8))),
        ("gemma3", also(model__rotary_emb_local__inv_freq=torch.ones(8))),
        ("llama", also(rotary_emb__inv_freq=torch.ones(8))),
        ("opt", also(model__decoder__version=torch.tensor([3.0]))),
    ],
)
def test_other_spellings_and_old_buffers_are_the_same_model(
    family_name: str,
    spell: Spell,
    spelled: Callable[[str, Spell], Model],
    model_of: Callable[[str], Model],
) -> None:
    assert_equal(spelled(family_name, spell), model_of(family_name))


@pytest.mark.parametrize(
    ("family_name", "spell", "message"),
    [
        ("gpt2", also(lm_head2__weight=torch.ones(512, 64)), "holds 1 weights that its config has no place for"),
        (
            "gpt_neox",
            also(lm_head__weight=torch.ones(512, 64)),
            r"holds embed_out\.weight twice: as embed_out\.weight and as lm_head\.weight",
        ),
        (
            "gpt2",
            also(wpe__weight=torch.ones(256, 64)),
            r"holds transformer\.wpe\.weight twice: as transformer\.wpe\.weight and as wpe\.weight",
        ),
        (
            "mixtral",
            lambda tensors: {
                **{name: value for name, value in tensors.items() if ".0.block_sparse_moe.experts." not in name},
                "model.layers.0.mlp.experts.down_proj": torch.ones(5, 64, 96),
            },
            r"mlp\.experts\.down_proj is \[5, 64, 96\], but config\.json asks for \[4, 64, 96\]",
        ),
        (
            "mixtral",
            lambda tensors: {name: value for name, value in tensors.items() if "0.block_sparse_moe.gate" not in name},
            r"lacks 1 of the 60 weights that its config needs: model\.layers\.0\.block_sparse_moe\.gate\.weight",
        ),
        (
            "gpt2",
            lambda tensors: {name: value.T if "c_attn.weight" in name else value for name, value in tensors.items()},
            r"c_attn\.weight is \[64, 192\], not \[192, 64\]",
        ),
    ],
    ids=["unknown", "head-twice", "positions-twice", "stacked-shape", "no-router", "not-transposed"],
)
def test_anything_else_is_refused(
    family_name: str, spell: Spell, message: str, spelled: Callable[[str, Spell], Model]
) -> None:
    with pytest.raises(InputError, match=message):
        spelled(family_name, spell)


def test_parameters_are_joined_as_transformers_holds_them(
    family_name: str, family_of: Callable[[str], Path], model_of: Callable[[str], Model]
) -> None:
    model = model_of(family_name)
    network = AutoModelForCausalLM.from_pretrained(family_of(family_name), dtype=torch.float32)
    for name, parameter in expected_parameters(model.config, model.arch, "here").items():
        weights = [weight for weight in parameter.weights if weight in model.weights]
        if weights:  # a tied head has none
            joined = parameter.join(model.weights[weight].dense() for weight in weights)
            assert torch.equal(joined, network.get_parameter(name)), name


def test_an_expert_is_read_without_the_others(
    family_of: Callable[[str], Path], model_of: Callable[[str], Model]
) -> None:
    model = model_of("mixtral")
    parameters = expected_parameters(model.config, model.arch, "here")
    parameter = parameters["model.layers.0.mlp.experts.gate_up_proj"]
    read = []

    class Rows:
        def __call__(self) -> Tensor:
            raise AssertionError("the whole tensor was read")

        def rows(self, first: int, past_end: int) -> Tensor:
            read.append((first, past_end))
            return torch.arange(first, past_end).float().reshape(-1, 1, 1).expand(-1, *parameter.shape[1:])

    pieces = parameter.split(DenseWeight(parameter.shape, torch.float32, Rows()))
    assert float(pieces["model.layers.0.block_sparse_moe.experts.2.w3.weight"].load().mean()) == 2.0
    assert read == [(2, 3)]


def test_names_of_modules_are_translated_part_by_part(model_of: Callable[[str], Model]) -> None:
    assert their_name(model_of("gpt_neox").arch, "embed_out") == "lm_head"
    assert their_name(model_of("mixtral").arch, "model.layers.1.block_sparse_moe.gate") == "model.layers.1.mlp.gate"
    assert their_name(model_of("gpt2").arch, "transformer.h.0.attn.c_attn") == "transformer.h.0.attn.c_attn"


def test_a_config_that_transformers_makes_no_module_of_is_refused(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    config = json.loads(json.dumps(dict(model.config))) | {"vocab_size": -1, "pad_token_id": None}
    with pytest.raises(InputError, match=r"here: config\.json describes no model"):
        expected_parameters(config, model.arch, "here")
