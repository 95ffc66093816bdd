"""The engine over ONNX Runtime and builds made by llmopt itself: exact under load, and the same as transformers."""

import numpy as np
import pytest

from llmopt.optimizer.errors import InputError, RejectedError, VerificationError
from llmopt.optimizer.manifest import Manifest, Verdict
from llmopt.runtime.build import open_build
from llmopt.runtime.engine import Engine
from llmopt.runtime.llm import LLM, Options
from llmopt.runtime.request import Generation, Request
from llmopt.runtime.sampler import Sampling
from llmopt.runtime.sizing import pool_bytes
from llmopt.runtime.text import TextStream, Tokenizer


class Asked:
    def __init__(self, tokenizer, ids, **generation):
        self.events = []
        self.request = Request(
            np.array(ids), Generation(**generation), text=TextStream(tokenizer), receive=self.events.append
        )

    @property
    def answer(self):
        return [(event.token, event.text, event.logprob, event.finish) for event in self.events]


def test_greedy_answers_are_those_of_transformers(tiny_float_build, tiny_llama):
    import torch
    from transformers import LlamaForCausalLM

    ids = [5, 99, 300, 42, 7, 7, 250]
    network = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        expected = network.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    build = open_build(tiny_float_build, threads=1)
    asked = Asked(build.tokenizer, ids, max_tokens=40, sampling=Sampling(temperature=0))
    engine = Engine(build.backend)
    engine.submit(asked.request)
    while engine.step():
        pass
    assert asked.request.output == expected[0, len(ids) :].tolist()


@pytest.mark.real_model
def test_the_real_model_knows_the_capital_of_france(smollm2_build):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with LLM(smollm2_build, slots=1, threads=2) as llm:
        assert "Paris" in llm.generate([question], Options(max_tokens=20))[0].text


@pytest.mark.real_model
def test_the_real_chat_template_renders_as_in_transformers(smollm2_build):
    from transformers import AutoTokenizer

    messages = [
        {"role": "user", "content": 'Say "hi" to <b>Zoë</b>'},
        {"role": "assistant", "content": "hi 👋"},
        {"role": "user", "content": "and bye"},
    ]
    reference, ours = AutoTokenizer.from_pretrained(smollm2_build), Tokenizer(smollm2_build)
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        text = ours.chat_template.render(system + messages)
        assert text == reference.apply_chat_template(system + messages, add_generation_prompt=True, tokenize=False)
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.apply_chat_template(system + messages, add_generation_prompt=True).input_ids
        assert ours.stop_ids == {reference.eos_token_id}


def test_defaults_follow_the_engine(tiny_build):
    build = open_build(tiny_build, threads=1)
    assert (build.backend.slots, build.backend.capacity) == (32, 256)
    assert open_build(tiny_build, slots=2, context=64, threads=1).backend.capacity == 64
    assert build.fingerprint == open_build(tiny_build, threads=1).fingerprint
    # 3 layers, keys and values, 2 heads of 16 float32, 8 slots of 256 tokens.
    assert pool_bytes(build.backend.engine, 8, 256) == 3 * 2 * 2 * 16 * 4 * 8 * 256


def copied(directory, tmp_path, **changes):
    import shutil

    shutil.copytree(directory, tmp_path / "copy")
    manifest = Manifest.load(directory).model_copy(update=changes)
    manifest.save(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_rejected_build_opens_only_by_force(tiny_build, tmp_path):
    rejected = copied(tiny_build, tmp_path, verdict=Verdict(status="rejected"))
    with pytest.raises(RejectedError):
        open_build(rejected, threads=1)
    open_build(rejected, threads=1, force=True)


def test_a_changed_size_is_found_always_and_a_changed_byte_by_verifying(tiny_build, tmp_path):
    build = copied(tiny_build, tmp_path)
    path = build / "engine" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    open_build(build, threads=1)
    with pytest.raises(VerificationError, match="was changed"):
        open_build(build, threads=1, verify=True)
    path.write_bytes(data[:-1])
    with pytest.raises(VerificationError, match="bytes instead of"):
        open_build(build, threads=1)


def test_a_build_without_an_engine_for_this_machine_is_refused(tiny_build, tmp_path):
    with pytest.raises(InputError, match="no engine"):
        open_build(copied(tiny_build, tmp_path, engines=[]), threads=1)


def test_no_build_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not a build"):
        open_build(tmp_path)
