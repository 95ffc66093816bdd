"""The openai package as the judge of our answers: it validates every one strictly."""

from contextlib import contextmanager

import httpx
import openai
import pytest


@contextmanager
def opened(served, *, strict):
    with openai.OpenAI(
        base_url=served.url + "/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.Client(trust_env=False),
        _strict_response_validation=strict,
    ) as found:
        yield found


@pytest.fixture
def ai(served):
    with opened(served, strict=True) as found:
        yield found


@pytest.fixture
def lenient(served):
    """For two things that the API does and its own types do not allow: no finish_reason in the chunks of a completion,
    and no log-probability of a prompt's first token."""
    with opened(served, strict=False) as found:
        yield found


MESSAGES = [{"role": "user", "content": "hello"}]
FIXED = {"model": "toy", "temperature": 0, "max_tokens": 12}


def chat(ai, **options):
    return ai.chat.completions.create(messages=MESSAGES, **(FIXED | options))


def complete(ai, **options):
    return ai.completions.create(**(FIXED | {"prompt": "hello"} | options))


def test_a_chat_is_answered(ai):
    answer = chat(ai)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "toy"
    assert answer.system_fingerprint == "fp_toy"
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_streamed_chat_is_the_same_answer(ai):
    whole = chat(ai)
    chunks = list(chat(ai, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_usage_where_asked_for(ai):
    chunks = list(chat(ai, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(ai).usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_reports_running_usage_where_asked_for(ai):
    chunks = list(chat(ai, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_a_prompt_is_completed_in_all_four_forms(ai):
    plain = complete(ai)
    assert plain.object == "text_completion"
    ids = [5, 6, 7, 8, 9]
    assert complete(ai, prompt=["hello"]).choices[0].text == plain.choices[0].text
    several = complete(ai, prompt=["hello", "other"])
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == plain.choices[0].text
    by_ids = complete(ai, prompt=ids)
    assert complete(ai, prompt=[ids, [1, 2]]).choices[0].text == by_ids.choices[0].text
    assert by_ids.usage.prompt_tokens == 5


def test_a_streamed_completion_is_the_same_text(lenient):
    pieces = list(complete(lenient, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == complete(lenient).choices[0].text
    assert pieces[-1].choices[0].finish_reason == "length"


def test_several_choices_differ_and_are_repeatable(ai):
    first = complete(ai, n=3, temperature=1, seed=4)
    again = complete(ai, n=3, temperature=1, seed=4)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in again.choices]
    assert first.usage.prompt_tokens == 5
    assert first.usage.completion_tokens == 36


def test_several_choices_stream_by_index(lenient):
    whole = complete(lenient, n=3, temperature=1, seed=4)
    texts = ["", "", ""]
    for piece in complete(lenient, n=3, temperature=1, seed=4, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_chat_logprobs_name_the_chosen_and_the_best(ai):
    content = chat(ai, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 3
        assert entry.bytes == entry.top_logprobs[0].bytes


def test_streamed_logprobs_are_those_of_the_whole(ai):
    whole = chat(ai, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    streamed = []
    for chunk in chat(ai, logprobs=True, top_logprobs=1, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == whole


def test_an_echo_scores_the_prompt(lenient):
    answer = complete(lenient, echo=True, logprobs=2, max_tokens=1).choices[0]
    found = answer.logprobs
    assert answer.text.startswith("hello")
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 6
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert found.tokens[:5] == list("hello")
    assert found.text_offset == [0, 1, 2, 3, 4, 5]
    for token, logprob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert top[token] >= logprob
    assert found.token_logprobs[5] == max(found.top_logprobs[5].values())


def test_an_echo_may_generate_nothing(lenient):
    answer = complete(lenient, echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "hello"
    assert len(answer.choices[0].logprobs.tokens) == 5
    assert answer.usage.completion_tokens == 0


def test_a_streamed_echo_begins_with_the_prompt(lenient):
    pieces = list(complete(lenient, echo=True, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == complete(lenient, echo=True).choices[0].text


def test_a_stop_string_ends_the_answer(ai):
    free = complete(ai, max_tokens=60).choices[0].text
    stop = free[10:12]
    stopped = complete(ai, max_tokens=60, stop=[stop]).choices[0]
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"


def test_lengths_can_be_forced(ai):
    answer = complete(ai, max_tokens=300, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 300


def test_max_completion_tokens_wins(ai):
    assert chat(ai, max_completion_tokens=3).usage.completion_tokens == 3


def test_models_are_listed(ai):
    (model,) = ai.models.list().data
    assert model.id == "toy"
    assert ai.models.retrieve("toy").id == "toy"


def test_errors_are_those_the_client_knows(ai):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        chat(ai, model="other")
    with pytest.raises(openai.BadRequestError) as caught:
        complete(ai, max_tokens=600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(ai, tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"
