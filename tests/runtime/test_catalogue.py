"""Adapters of a build by name: added to it, found when it is opened, chosen per request."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from llmopt.optimizer.build import build as build_recipe
from llmopt.optimizer.cli.main import cli
from llmopt.optimizer.errors import InputError, UnsupportedError, VerificationError
from llmopt.optimizer.lora.adapter_file import check_name, publish_adapter, read_index, remove_adapter
from llmopt.optimizer.lora.fitting import fit_adapter, slots_of
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.runtime import LLM, Options
from llmopt.runtime.catalogue import Catalogue

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GATE = "accept: [{metric: kl, max: 100, windows: 1, tokens: 8}]"


def built(model, passes, lora, output, cache):
    recipe = output.with_suffix(".yaml")
    recipe.write_text(
        f"version: 1\nmodel: {model}\npasses: [{passes}]\nexport: [onnx: {{target: cpu, {lora}}}]\nverify: none\n"
        f"{GATE}\nresources: {{threads: 2}}\n"
    )
    build_recipe(Recipe.load(recipe), output, cache=cache, progress=Silent())
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def peft(folder, tiny_llama, adapter_of):
    """Three adapters that were trained on the original."""
    for number, name in enumerate(("support", "french", "small")):
        adapter_of(folder / name, tiny_llama, seed=number, r=2 + number, target_modules=LINEARS[number:])
    return folder


@pytest.fixture(scope="module")
def rotated(folder, tiny_llama):
    """A base that was rotated and quantized; adapters of rank 4 fit, two at a time."""
    passes = "rotate: {}, round_to_nearest: {scheme: W8A8}"
    return built(tiny_llama, passes, "lora: {max_rank: 4, slots: 2}", folder / "rotated", folder / "cache")


def run(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_an_adapter_of_the_original_works_on_a_rotated_and_quantized_base(rotated, peft, folder, tiny_llama):
    run("adapter", "add", rotated, peft / "support", "--name", "first", "--force")
    merge = f"merge_lora: {{adapters: [{{path: {peft / 'support'}}}]}}, "
    passes = merge + "rotate: {}, round_to_nearest: {scheme: W8A8}"
    merged = built(tiny_llama, passes, "", folder / "merged", folder / "cache")
    prompt = np.arange(3, 30)
    found = []
    for directory, adapter in ((rotated, "first"), (merged, None), (rotated, None)):
        with LLM(directory, slots=2, threads=1) as llm:
            backend = llm.build.backend
            if adapter is not None:
                backend.adapters.load(1, llm.build.adapters.find(adapter))
                backend.adapters.choose([1])
            found.append(backend.prefill(0, prompt, 0, np.arange(len(prompt))))
    modular, merged_logits, base = found
    # Both round to 8 bits, one of them the adapter too; what the adapter does is many times that.
    assert np.abs(modular - merged_logits).mean() < 0.25 * np.abs(base - merged_logits).mean()


def test_requests_with_more_adapters_than_slots_are_answered_as_if_alone(rotated, peft):
    for name in ("support", "french", "small"):
        run("adapter", "add", rotated, peft / name, "--force")
    prompts, adapters = [f"The river {i}" for i in range(12)], [None, "support", "french", "small"]
    options = [Options(max_tokens=8, adapter=adapters[i % 4]) for i in range(12)]
    with LLM(rotated, slots=4, threads=2) as llm:
        together = {piece.index: piece.answer for piece in llm.stream(prompts, options) if piece.answer}
        assert llm.engine.statistics.adapter_loads > 3
        alone = [
            llm.generate([prompt], Options(max_tokens=8), adapter=each.adapter)[0].tokens
            for prompt, each in zip(prompts, options, strict=True)
        ]
    assert [together[i].tokens for i in range(12)] == alone
    assert len({tuple(alone[i]) for i in range(4)}) > 1


def test_a_name_that_is_not_there_is_refused(rotated):
    with LLM(rotated, slots=1, threads=1) as llm, pytest.raises(InputError, match="has no adapter 'suport'"):
        llm.generate(["a"], adapter="suport")


def test_adapters_are_listed_and_removed(rotated, peft):
    run("adapter", "add", rotated, peft / "small", "--name", "gone", "--force")
    assert "gone: rank 4 in 15 linears" in run("adapter", "list", rotated)
    assert json.loads(run("adapter", "list", rotated, "--json"))["gone"]["rank"] == 4
    assert "gone" in run("inspect", rotated)
    path = read_index(rotated)["gone"].path
    run("adapter", "remove", rotated, "gone")
    assert not path.exists()
    assert "gone" not in read_index(rotated)
    with pytest.raises(InputError, match="has no adapter gone"):
        remove_adapter(rotated, "gone")
    Manifest.load(rotated, verify=True)  # the manifest stays what the build wrote


def test_a_name_that_is_taken_is_not_replaced_unasked(rotated, peft):
    run("adapter", "add", rotated, peft / "support", "--force")
    before = read_index(rotated)["support"]
    with pytest.raises(InputError, match="has an adapter support"):
        publish_adapter(rotated, "support", {}, trained_on=None)
    assert read_index(rotated)["support"] == before


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "index", "a" * 200])
def test_a_name_that_is_no_files_is_refused(name):
    with pytest.raises(InputError, match="is no name for an adapter"):
        check_name(name)


def test_what_does_not_fit_is_refused(rotated, folder, tiny_llama, llama_of, adapter_of):
    lora = slots_of(rotated, Manifest.load(rotated))
    cases = {
        "large": (tiny_llama, {"r": 5, "target_modules": ["q_proj"]}, InputError, "has rank 5 in .*q_proj.* up to 4"),
        "head": (tiny_llama, {"target_modules": ["embed_tokens"]}, InputError, "where the engine takes no adapters"),
        "dora": (tiny_llama, {"target_modules": ["q_proj"], "use_dora": True}, UnsupportedError, "has DoRA"),
        "other": (llama_of(hidden_size=32), {"target_modules": ["q_proj"]}, InputError, "needs"),
    }
    for name, (base, settings, kind, message) in cases.items():
        adapter_of(folder / name, base, **settings)
        with pytest.raises(kind, match=message):
            fit_adapter(folder / name, rotated, lora)


def test_values_that_are_not_finite_are_refused(rotated, folder, peft):
    from safetensors.numpy import load_file, save_file

    broken = folder / "nan"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((peft / "support" / "adapter_config.json").read_bytes())
    tensors = load_file(peft / "support" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(InputError, match="values that are not finite"):
        fit_adapter(broken, rotated, slots_of(rotated, Manifest.load(rotated)))


def test_a_pickle_is_refused(rotated, folder, peft):
    (folder / "pickle").mkdir()
    (folder / "pickle" / "adapter_config.json").write_bytes((peft / "support" / "adapter_config.json").read_bytes())
    (folder / "pickle" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises((InputError, UnsupportedError), match="pickle"):
        fit_adapter(folder / "pickle", rotated, slots_of(rotated, Manifest.load(rotated)))


def test_a_build_without_lora_takes_no_adapters(tiny_float_build):
    with pytest.raises(InputError, match="takes no adapters"):
        slots_of(tiny_float_build, Manifest.load(tiny_float_build))
    with pytest.raises(InputError, match="takes no adapters"):
        Catalogue(tiny_float_build, None).find("support")


def test_a_damaged_index_is_named(rotated, tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "index.json").write_text('{"adapters": {"a": {"file": 3}}}')
    with pytest.raises(VerificationError, match=r"index.json is damaged"):
        read_index(tmp_path)


def test_adapters_can_be_taken_in_while_a_build_is_open(rotated, peft):
    catalogue = Catalogue(rotated, slots_of(rotated, Manifest.load(rotated)), {})
    file = catalogue.add("support", peft / "support")
    assert catalogue.find("support") == file
    assert file.path.parent != rotated / "adapters"
    with pytest.raises(InputError, match="there is an adapter support already"):
        catalogue.add("support", peft / "support")
    catalogue.remove("support")
    assert not file.path.exists()
    assert "support" not in catalogue
