"""``POST /v1/completions`` with a tokenizer whose text of a prompt is not the prompt."""

import pytest


@pytest.mark.parametrize("prompt", ["Hello world", ["Hello world"], ["Hello world", "Hello"]])
@pytest.mark.parametrize("count", [1, 2])
def test_an_echo_is_the_text_that_was_sent(toy_server, spaced_tokenizer, prompt, count):
    body = {"prompt": prompt, "echo": True, "max_tokens": 0, "n": count}
    with toy_server(tokenizer=spaced_tokenizer) as served, served.client() as client:
        choices = client.post("/v1/completions", json=body).json()["choices"]
    sent = [prompt] if isinstance(prompt, str) else prompt
    assert [choice["text"] for choice in choices] == [text for text in sent for _ in range(count)]


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_an_echo_of_tokens_is_their_text(toy_server, spaced_tokenizer, prompt):
    body = {"prompt": prompt, "echo": True, "max_tokens": 0}
    with toy_server(tokenizer=spaced_tokenizer) as served, served.client() as client:
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "Hello world"


def test_tokens_of_logprobs_have_their_leading_space(toy_server, spaced_tokenizer):
    body = {"prompt": ["Hello world"], "echo": True, "max_tokens": 0, "logprobs": 1}
    with toy_server(tokenizer=spaced_tokenizer) as served, served.client() as client:
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["<s>", " Hello", " world"]
    assert [logprob is None for logprob in choice["logprobs"]["token_logprobs"]] == [True, False, False]
