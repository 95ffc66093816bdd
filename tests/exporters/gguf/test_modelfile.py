"""Ollama's Modelfile says what the model's own files say."""

import pytest

from llmopt.exporters.gguf.modelfile import modelfile
from llmopt.exporters.gguf.tokenizer import Vocabulary

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def vocabulary() -> Vocabulary:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Vocabulary("gpt2", "gpt-2", tokens, [3, 3, 3], [], [], {"eos": 2, "eot": 0}, False, False)


def test_it_stops_where_the_model_does_and_samples_as_it_says(vocabulary: Vocabulary) -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    lines = modelfile("model-Q8_0.gguf", vocabulary, None, generation, context=4096).splitlines()
    assert lines == [
        "FROM ./model-Q8_0.gguf",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 4096",
    ]


def test_chatml_is_translated_and_nothing_else_is(vocabulary: Vocabulary) -> None:
    assert "TEMPLATE" in modelfile("m.gguf", vocabulary, CHATML, {}, context=64)
    for other in (CHATML.replace("im_start", "start"), "{{ messages[0]['content'] }}", "{% broken"):
        assert "TEMPLATE" not in modelfile("m.gguf", vocabulary, other, {}, context=64)


def test_a_greedy_model_has_no_temperature(vocabulary: Vocabulary) -> None:
    assert "PARAMETER temperature 0\n" in modelfile("m.gguf", vocabulary, None, {"do_sample": False}, context=64)
