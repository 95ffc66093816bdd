"""From a recipe's ``model:`` to a ``Model``, and a clear sentence where there is none."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from llmopt.optimizer import arch as families
from llmopt.optimizer import digests
from llmopt.optimizer.cache import digest_of
from llmopt.optimizer.digests import file_digests
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.sources import load_model

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a checkpoint, so that a test may change it."""
    return lambda directory: Path(shutil.copytree(directory, tmp_path / "copy"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local hub cache, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def set_config(directory: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in remove}))


def test_a_directory_becomes_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama), cache=tmp_path)
    assert model.arch.name == "llama"
    assert model.is_tied
    assert "lm_head.weight" not in model.weights
    assert list(model.weights)[:2] == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert all(f"{module}.weight" in model.weights for module in model.linears()[:-1])
    assert set(json.loads((tiny_llama / "config.json").read_text())) - {"transformers_version"} <= set(model.config)


def test_biases_are_weights_too(tiny_llama_biased: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama_biased), cache=tmp_path)
    assert model.weights["model.layers.0.mlp.down_proj.bias"].shape == (64,)


def test_the_source_names_every_file_that_was_read(tiny_llama_sharded: Path, tmp_path: Path) -> None:
    source = load_model(str(tiny_llama_sharded), cache=tmp_path).source
    assert set(source.files) == {path.name for path in tiny_llama_sharded.iterdir()}
    for name, digest in source.files.items():
        assert digest == hashlib.sha256((tiny_llama_sharded / name).read_bytes()).hexdigest()
    assert source.digest == digest_of(dict(source.files))
    assert source.spec == str(tiny_llama_sharded)


def test_relative_paths_are_relative_to_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(f"./{tiny_llama.name}", cache=tmp_path, base=tiny_llama.parent)
    assert model.num_layers == 3


def test_a_directory_that_looks_like_a_hub_id_wins(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "org" / "name")
    assert load_model("org/name", cache=tmp_path / "cache", base=tmp_path).num_layers == 3


@pytest.mark.parametrize("spec", ["./nothing", "nothing", "/no/such/model", "~/no-such-model", "org/model.gguf", "a b"])
def test_a_path_that_does_not_exist_is_no_such_file(spec: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory"):
        load_model(spec, cache=tmp_path, base=tmp_path)


def test_an_unknown_architecture_is_named_with_the_nearest(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    set_config(directory, architectures=["LlamaForCausalML"])
    message = "architecture LlamaForCausalML is not supported; unlike LlamaForCausalLM, the nearest that is"
    with pytest.raises(UnsupportedError, match=message) as caught:
        load_model(str(directory), cache=tmp_path / "cache")
    assert caught.value.exit_code == 5


def test_the_model_type_decides_where_no_architecture_is_named() -> None:
    assert families.find({"model_type": "llama"}).name == "llama"
    with pytest.raises(UnsupportedError, match="model type mamba"):
        families.find({"model_type": "mamba", "architectures": None})
    with pytest.raises(UnsupportedError, match="neither architectures nor model_type"):
        families.find({})


def test_every_family_has_a_name_of_its_own() -> None:
    names = [name for family in families.known() for name in family.models]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("text", ["{", "[1]", '"llama"', "\x00"])
def test_a_config_that_is_none_is_refused(
    text: str, tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    (directory / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(str(directory), cache=tmp_path / "cache")


def test_a_config_with_a_value_of_the_wrong_type_is_refused(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    set_config(directory, hidden_size="64")
    with pytest.raises(InputError, match="hidden_size"):
        load_model(str(directory), cache=tmp_path / "cache")


def test_an_older_config_is_completed(tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = copy_of(tiny_llama)
    scaling = {"type": "linear", "factor": 2.0}
    set_config(
        directory,
        remove=("head_dim", "rope_parameters", "attention_bias", "mlp_bias", "dtype", "pretraining_tp"),
        rope_theta=20000.0,
        rope_scaling=scaling,
        torch_dtype="float32",
    )
    config = load_model(str(directory), cache=tmp_path / "cache").config
    assert config["head_dim"] == 16
    assert config["attention_bias"] is config["mlp_bias"] is False
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 20000.0)


def test_the_completed_config_makes_the_same_transformers_config(tiny_llama: Path, tmp_path: Path) -> None:
    config = load_model(str(tiny_llama), cache=tmp_path).config
    ours, theirs = LlamaConfig(**config).to_dict(), LlamaConfig.from_pretrained(tiny_llama).to_dict()
    assert {name for name in theirs if ours.get(name) != theirs[name]} <= {"_name_or_path", "transformers_version"}
    json.dumps(config)


def test_a_stored_copy_of_a_tied_head_is_dropped(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, directory / "model.safetensors"
    )
    model = load_model(str(directory), cache=tmp_path / "cache")
    assert model.is_tied
    assert model.config["tie_word_embeddings"] is True


def test_a_stored_head_that_differs_counts_whatever_the_config_says(
    tiny_llama_untied: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama_untied)
    set_config(directory, tie_word_embeddings=True)
    model = load_model(str(directory), cache=tmp_path / "cache")
    assert not model.is_tied
    assert model.config["tie_word_embeddings"] is False


def test_an_untied_config_needs_a_head(tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = copy_of(tiny_llama)
    set_config(directory, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lacks 1 of the 30 weights that its config needs: lm_head\.weight"):
        load_model(str(directory), cache=tmp_path / "cache")


def test_the_tokenizer_directory_is_complete(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama), cache=tmp_path)
    directory = model.source.tokenizer_dir
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"}
    assert {path.name for path in directory.iterdir()} == names
    assert (directory / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert json.loads((directory / "config.json").read_text()) == model.config
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 2


def test_an_embedded_chat_template_becomes_a_file(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    made = load_model(str(directory), cache=tmp_path / "cache").source.tokenizer_dir
    assert (made / "chat_template.jinja").read_text() == template
    assert "chat_template" not in json.loads((made / "tokenizer_config.json").read_text())


def test_stop_tokens_come_from_the_config_where_no_file_has_them(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    (directory / "generation_config.json").unlink()
    made = load_model(str(directory), cache=tmp_path / "cache").source.tokenizer_dir
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((made / "generation_config.json").read_text()) == expected


def test_an_older_tokenizer_format_is_converted(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    made = load_model(str(directory), cache=tmp_path / "cache").source.tokenizer_dir
    text = "What is the capital of France?"
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (made, tiny_llama))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_directory_without_any_tokenizer_is_refused(
    tiny_llama: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(tiny_llama)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_model(str(directory), cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokenizers").iterdir() if path.is_dir()]


@pytest.mark.parametrize("family_name", ["qwen2", "gpt2", "gpt_neox", "opt", "falcon", "gemma2"])
def test_no_family_gets_an_empty_tokenizer(
    family_name: str, family_of: Callable[[str], Path], copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = copy_of(family_of(family_name))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json, and"):
        load_model(str(directory), cache=tmp_path / "cache")


def test_a_directory_of_gguf_files_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "model-Q8_0.gguf").touch()
    with pytest.raises(InputError, match="name one of them") as caught:
        load_model(str(tmp_path), cache=tmp_path / "cache")
    assert caught.value.hint == "model-Q8_0.gguf"


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    first = file_digests({"w": path}, tmp_path / "cache")
    assert first == {"w": hashlib.sha256(b"one").hexdigest()}
    monkeypatch.setattr(digests, "_sha256", lambda path: "hashed again")
    assert file_digests({"w": path}, tmp_path / "cache") == first
    path.write_bytes(b"two")
    assert file_digests({"w": path}, tmp_path / "cache") == {"w": "hashed again"}


def test_a_file_that_has_just_changed_is_hashed_each_time(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    file_digests({"w": path}, tmp_path / "cache")
    assert not (tmp_path / "cache" / "digests.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}'])
def test_a_damaged_memory_of_digests_is_started_anew(text: str, tmp_path: Path) -> None:
    import os

    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    memory = tmp_path / "cache" / "digests.json"
    memory.parent.mkdir()
    memory.write_text(text)
    expected = {"w": hashlib.sha256(b"one").hexdigest()}
    assert file_digests({"w": path}, tmp_path / "cache") == expected
    assert json.loads(memory.read_text())[str(path)]["sha256"] == expected["w"]


def put_into_hub(hub: Path, directory: Path, commit: str = COMMIT) -> None:
    home = hub / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    shutil.copytree(directory, home / "snapshots" / commit)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("revision", ["12fd25f", COMMIT])
def test_a_cached_hub_model_is_found_by_the_start_of_its_commit(
    revision: str, hub: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    put_into_hub(hub, tiny_llama)
    spec = f"HuggingFaceTB/SmolLM2-135M-Instruct@{revision}"
    model = load_model(spec, cache=tmp_path / "cache", base=tmp_path)
    assert model.num_layers == 3
    assert model.source.spec == spec


def test_a_snapshot_that_was_not_finished_is_not_used(hub: Path, tiny_llama_sharded: Path, tmp_path: Path) -> None:
    put_into_hub(hub, tiny_llama_sharded)
    next(hub.rglob("model-00003-of-00004.safetensors")).unlink()
    with pytest.raises(InputError, match="is not in the local hub cache"):
        load_model("HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f", cache=tmp_path, base=tmp_path)


def test_the_start_of_a_commit_is_resolved_and_downloaded_online(
    hub: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    class Api:
        def model_info(self, repo: str, revision: str) -> Any:
            asked.append((repo, revision))
            return SimpleNamespace(sha=COMMIT)

    def download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert "model.safetensors" in allow_patterns
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("org/name@12fd25f", cache=tmp_path, base=tmp_path).num_layers == 3
    assert asked == [("org/name", "12fd25f"), ("org/name", COMMIT)]
    with pytest.raises(InputError, match="not pinned") as caught:
        load_model("org/name", cache=tmp_path, base=tmp_path)
    assert caught.value.hint == f"write org/name@{COMMIT}, which is what main is now"


def test_an_ambiguous_commit_asks_for_more_digits(hub: Path, tiny_llama: Path, tmp_path: Path) -> None:
    put_into_hub(hub, tiny_llama)
    put_into_hub(hub, tiny_llama, "12fd25f" + "0" * 33)
    with pytest.raises(InputError, match="stands for 2 commits"):
        load_model("HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f", cache=tmp_path, base=tmp_path)


def test_a_hub_model_that_is_not_cached_fails_in_one_sentence_when_offline(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not in the local hub cache, and the hub may not be asked") as caught:
        load_model("HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f", cache=tmp_path, base=tmp_path)
    assert "\n" not in caught.value.message
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct --revision 12fd25f" in (caught.value.hint or "")


@pytest.mark.parametrize("suffix", ["", "@main", "@v1.0"])
def test_a_hub_model_must_be_pinned(suffix: str, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not pinned to a commit") as caught:
        load_model(f"HuggingFaceTB/SmolLM2-135M-Instruct{suffix}", cache=tmp_path, base=tmp_path)
    assert "SmolLM2-135M-Instruct@COMMIT" in (caught.value.hint or "")


@pytest.mark.parametrize("suffix", ["", "@main"])
def test_the_commit_to_write_is_told_where_it_is_known(
    suffix: str, hub: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    put_into_hub(hub, tiny_llama)
    with pytest.raises(InputError, match="not pinned to a commit") as caught:
        load_model(f"HuggingFaceTB/SmolLM2-135M-Instruct{suffix}", cache=tmp_path, base=tmp_path)
    assert f"write HuggingFaceTB/SmolLM2-135M-Instruct@{COMMIT}" in (caught.value.hint or "")


@pytest.mark.real_model
def test_the_real_model_is_what_it_is_known_to_be(smollm2: Any) -> None:
    assert sum(torch.Size(weight.shape).numel() for weight in smollm2.weights.values()) == 134_515_008
    assert smollm2.is_tied
    assert (smollm2.config["hidden_size"], smollm2.num_layers, smollm2.config["head_dim"]) == (576, 30, 64)
    assert smollm2.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    tokenizer = AutoTokenizer.from_pretrained(smollm2.source.tokenizer_dir)
    assert tokenizer.decode(tokenizer("The capital of France")["input_ids"]) == "The capital of France"
