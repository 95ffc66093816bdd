"""Adapters of a build by name: found when it is opened, chosen per request."""

import numpy as np
import pytest
from click.testing import CliRunner

from llmopt.optimizer.cli.main import cli
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.fitting import slots_of
from llmopt.optimizer.manifest import Manifest
from llmopt.runtime import LLM, Options
from llmopt.runtime.catalogue import Catalogue


def run(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_an_adapter_of_the_original_works_on_a_rotated_and_quantized_base(
    lora_build, peft_adapters, built_with, tiny_llama, tmp_path
):
    run("adapter", "add", lora_build, peft_adapters / "support", "--name", "first", "--force")
    merge = f"merge_lora: {{adapters: [{{path: {peft_adapters / 'support'}}}]}}, "
    passes = merge + "rotate: {}, round_to_nearest: {scheme: W8A8}"
    merged = built_with(tiny_llama, passes, "", tmp_path / "merged")
    prompt = np.arange(3, 30)
    found = []
    for directory, adapter in ((lora_build, "first"), (merged, None), (lora_build, None)):
        with LLM(directory, slots=2, threads=1) as llm:
            backend = llm.build.backend
            if adapter is not None:
                backend.adapters.load(1, llm.build.adapters.find(adapter))
                backend.adapters.choose([1])
            found.append(backend.prefill(0, prompt, 0, np.arange(len(prompt))))
    modular, merged_logits, base = found
    # Both round to 8 bits, one of them the adapter too; what the adapter does is many times that.
    assert np.abs(modular - merged_logits).mean() < 0.25 * np.abs(base - merged_logits).mean()


def test_requests_with_more_adapters_than_slots_are_answered_as_if_alone(lora_build, peft_adapters):
    for name in ("support", "french", "small"):
        run("adapter", "add", lora_build, peft_adapters / name, "--force")
    prompts, adapters = [f"The river {i}" for i in range(12)], [None, "support", "french", "small"]
    options = [Options(max_tokens=8, adapter=adapters[i % 4]) for i in range(12)]
    with LLM(lora_build, slots=4, threads=2) as llm:
        together = {piece.index: piece.answer for piece in llm.stream(prompts, options) if piece.answer}
        assert llm.engine.statistics.adapter_loads > 3
        alone = [
            llm.generate([prompt], Options(max_tokens=8), adapter=each.adapter)[0].tokens
            for prompt, each in zip(prompts, options, strict=True)
        ]
    assert [together[i].tokens for i in range(12)] == alone
    assert len({tuple(alone[i]) for i in range(4)}) > 1


def test_a_name_that_is_not_there_is_refused(lora_build):
    with LLM(lora_build, slots=1, threads=1) as llm, pytest.raises(InputError, match="has no adapter 'suport'"):
        llm.generate(["a"], adapter="suport")


def test_a_build_without_lora_takes_no_adapters(tiny_float_build):
    with pytest.raises(InputError, match="takes no adapters"):
        slots_of(tiny_float_build, Manifest.load(tiny_float_build))
    with pytest.raises(InputError, match="takes no adapters"):
        Catalogue(tiny_float_build, None).find("support")


def test_adapters_can_be_taken_in_while_a_build_is_open(lora_build, peft_adapters):
    catalogue = Catalogue(lora_build, slots_of(lora_build, Manifest.load(lora_build)), {})
    file = catalogue.add("support", peft_adapters / "support")
    assert catalogue.find("support") == file
    assert file.path.parent != lora_build / "adapters"
    with pytest.raises(InputError, match="there is an adapter support already"):
        catalogue.add("support", peft_adapters / "support")
    catalogue.remove("support")
    assert not file.path.exists()
    assert "support" not in catalogue
