"""PEFT's adapters in a build: added, listed, removed, and refused where they do not fit."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from llmopt.optimizer.cli.main import cli
from llmopt.optimizer.errors import InputError, UnsupportedError, VerificationError
from llmopt.optimizer.lora.adapter_file import check_name, publish_adapter, read_index, remove_adapter
from llmopt.optimizer.lora.fitting import fit_adapter, slots_of
from llmopt.optimizer.manifest import Manifest


def run(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_adapters_are_listed_and_removed(lora_build, peft_adapters):
    run("adapter", "add", lora_build, peft_adapters / "small", "--name", "gone", "--force")
    assert "gone: rank 4 in 15 linears" in run("adapter", "list", lora_build)
    assert json.loads(run("adapter", "list", lora_build, "--json"))["gone"]["rank"] == 4
    assert "gone" in run("inspect", lora_build)
    path = read_index(lora_build)["gone"].path
    run("adapter", "remove", lora_build, "gone")
    assert not path.exists()
    assert "gone" not in read_index(lora_build)
    with pytest.raises(InputError, match="has no adapter gone"):
        remove_adapter(lora_build, "gone")
    Manifest.load(lora_build, verify=True)  # the manifest stays what the build wrote


def test_a_name_that_is_taken_is_not_replaced_unasked(lora_build, peft_adapters):
    run("adapter", "add", lora_build, peft_adapters / "support", "--force")
    before = read_index(lora_build)["support"]
    with pytest.raises(InputError, match="has an adapter support"):
        publish_adapter(lora_build, "support", {}, trained_on=None)
    assert read_index(lora_build)["support"] == before


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "index", "a" * 200])
def test_a_name_that_is_no_files_is_refused(name):
    with pytest.raises(InputError, match="is no name for an adapter"):
        check_name(name)


def test_what_does_not_fit_is_refused(lora_build, tmp_path, tiny_llama, llama_of, adapter_of):
    lora = slots_of(lora_build, Manifest.load(lora_build))
    cases = {
        "large": (tiny_llama, {"r": 5, "target_modules": ["q_proj"]}, InputError, "has rank 5 in .*q_proj.* up to 4"),
        "head": (tiny_llama, {"target_modules": ["embed_tokens"]}, InputError, "where the engine takes no adapters"),
        "dora": (tiny_llama, {"target_modules": ["q_proj"], "use_dora": True}, UnsupportedError, "has DoRA"),
        "other": (llama_of(hidden_size=32), {"target_modules": ["q_proj"]}, InputError, "needs"),
    }
    for name, (base, settings, kind, message) in cases.items():
        adapter_of(tmp_path / name, base, **settings)
        with pytest.raises(kind, match=message):
            fit_adapter(tmp_path / name, lora_build, lora)


def test_values_that_are_not_finite_are_refused(lora_build, tmp_path, peft_adapters):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "nan"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((peft_adapters / "support" / "adapter_config.json").read_bytes())
    tensors = load_file(peft_adapters / "support" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(InputError, match="values that are not finite"):
        fit_adapter(broken, lora_build, slots_of(lora_build, Manifest.load(lora_build)))


def test_a_pickle_is_refused(lora_build, tmp_path, peft_adapters):
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_config.json").write_bytes(
        (peft_adapters / "support" / "adapter_config.json").read_bytes()
    )
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises((InputError, UnsupportedError), match="pickle"):
        fit_adapter(tmp_path / "pickle", lora_build, slots_of(lora_build, Manifest.load(lora_build)))


def test_a_damaged_index_is_named(lora_build, tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "index.json").write_text('{"adapters": {"a": {"file": 3}}}')
    with pytest.raises(VerificationError, match=r"index.json is damaged"):
        read_index(tmp_path)
