"""What an adapter's folder and configuration may be, and PEFT's rules of names."""

import json
from pathlib import Path

import pytest

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.lora.config import AdapterConfig, read_config

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.fixture
def folder_of(tmp_path):
    """Writes an adapter's folder without any tensor; keywords change its configuration."""

    def make(name: str = "a", **changes) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
        (folder / "adapter_model.safetensors").touch()
        return folder

    return make


def test_what_peft_writes_today_is_read(folder_of) -> None:
    """All entries of PEFT 0.21, at their defaults."""
    empty = dict.fromkeys(
        ["alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config", "exclude_modules",
         "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config",
         "megatron_config", "modules_to_save", "monteclora_config", "revision", "target_parameters",
         "trainable_token_indices", "use_bdlora", "velora_config"]
    )  # fmt: skip
    others = {
        "alpha_pattern": {}, "base_model_name_or_path": "org/base", "bias": "none", "ensure_weight_tying": False,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "loftq_config": {},
        "lora_bias": False, "lora_dropout": 0.05, "megatron_core": "megatron.core", "peft_version": "0.21.2",
        "qalora_group_size": 16, "rank_pattern": {}, "task_type": "CAUSAL_LM", "use_dora": False, "use_qalora": False,
        "use_rslora": False,
    }  # fmt: skip
    config = read_config(folder_of(**empty, **others))
    assert (config.r, config.scaling_of("x"), config.base_model_name_or_path) == (8, 2.0, "org/base")


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.eq_proj", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "model.layers.0.self_attn.q_proj.x", False),
        ("layers.1.*", "model.layers.1.mlp.up_proj", True),
        ("^model.layers.1.*", "model.layers.1.mlp.up_proj", True),
        ("^layers.1.*", "model.layers.1.mlp.up_proj", False),
        (r"layers\.[02]\..*_proj", "model.layers.2.mlp.up_proj", True),
    ],
)
def test_a_pattern_is_matched_from_a_dot_to_the_end(pattern, module, matches) -> None:
    config = AdapterConfig(peft_type="LORA", r=8, lora_alpha=8, rank_pattern={pattern: 2}, alpha_pattern={pattern: 6})
    assert config.rank_of(module) == (2 if matches else 8)
    assert config.scaling_of(module) == (3 if matches else 1)


def test_patterns_agree_with_peft() -> None:
    from peft.utils.other import get_pattern_key

    from llmopt.optimizer.lora.config import _pattern_key

    patterns = {
        "q_proj": 1,
        "layers.1.*": 2,
        "^model.layers.[02].mlp": 3,
        ".*down_proj": 4,
        "model.layers.0.mlp.up_proj": 5,
    }
    modules = [
        f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    for module in modules:
        assert _pattern_key(patterns, module) == get_pattern_key(patterns.keys(), module)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "mlp.up_proj", "lm_head"]},
        {"target_modules": r".*layers\.1\..*(q|k)_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*up.*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "layers.0"]},
    ],
    ids=str,
)
def test_targets_agree_with_peft(settings) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = [
        f"model.layers.{i}.{name}"
        for i in range(12)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ]
    theirs, ours = LoraConfig(**settings), AdapterConfig(peft_type="LORA", **settings)
    for module in (*modules, "lm_head", "model.embed_tokens"):
        found = check_target_module_exists(theirs, module)
        assert ours.targets_module(module) is (bool(found) and type(found).__name__ != "_ExcludedModule")


@pytest.mark.parametrize("kind", ["IA3", "VERA", "LOHA", "ADALORA", "PREFIX_TUNING", None])
def test_another_kind_of_adapter_is_refused_by_name(kind, folder_of) -> None:
    with pytest.raises(UnsupportedError, match=f"is an adapter of the type {kind}, and llmopt reads LORA"):
        read_config(folder_of(peft_type=kind))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_replication": [[0, 2], [1, 3]]}, "with layer_replication, .*: it repeats layers of the base"),
        ({"alora_invocation_tokens": [5]}, "with alora_invocation_tokens"),
        ({"trainable_token_indices": [1, 2]}, "with trainable_token_indices"),
        ({"use_qalora": True}, "with use_qalora"),
        ({"use_something_new": True}, "has entries that llmopt does not know: use_something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "was trained from init_lora_weights: pissa_niter_4, on other weights"),
        ({"init_lora_weights": "loftq"}, "was trained from init_lora_weights: loftq"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, said, folder_of) -> None:
    with pytest.raises(UnsupportedError, match=said):
        read_config(folder_of(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "r is 0, and a rank is at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' is 0, and a rank is at least 1"),
        ({"r": "many"}, r"adapter_config.json: r: .*integer"),
        ({"bias": "some"}, "adapter_config.json: bias: "),
        ({"target_modules": "(q_proj"}, r"'\(q_proj' is no regular expression"),
        ({"rank_pattern": {"[": 2}}, r"'\[' is no regular expression"),
    ],
)
def test_a_wrong_entry_is_named(changes, said, folder_of) -> None:
    with pytest.raises(InputError, match=said):
        read_config(folder_of(**changes))


def test_there_has_to_be_a_folder(tmp_path) -> None:
    with pytest.raises(InputError, match="there is no adapter"):
        read_config(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not an adapter's folder"):
        read_config(tmp_path / "file")


def test_a_pickle_is_refused(folder_of) -> None:
    folder = folder_of()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has its weights in adapter_model\.bin, a pickle") as raised:
        read_config(folder)
    assert "save_pretrained" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, folder_of) -> None:
    folder = folder_of()
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"lacks {name}"):
        read_config(folder)


def test_a_folder_around_adapters_says_what_is_in_it(folder_of, tmp_path) -> None:
    folder_of("first")
    with pytest.raises(InputError, match=r"lacks adapter_config\.json") as raised:
        read_config(tmp_path)
    assert raised.value.hint == "folders in it that are adapters: first"


def test_a_model_is_no_adapter(tiny_llama) -> None:
    with pytest.raises(InputError, match=r"lacks adapter_config\.json") as raised:
        read_config(tiny_llama)
    assert raised.value.hint == "it is a model"


def test_a_damaged_configuration_is_an_error(folder_of) -> None:
    folder = folder_of()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_config(folder)
