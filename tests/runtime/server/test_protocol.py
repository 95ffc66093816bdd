import logging

import pytest

from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.protocol import ChatBody, CompletionBody, parse

CHAT = {"messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"prompt": "x"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 1000),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("logit_bias", {"1": 101}),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("stream_options", {"include_usage": True}),
        ("response_format", "json"),
        ("priority", "high"),
        ("tools", [{}]),
        ("tool_choice", "required"),
        ("suffix", "end"),
        ("seed", "x"),
    ],
)
@pytest.mark.parametrize(("kind", "base"), [(ChatBody, CHAT), (CompletionBody, COMPLETION)])
def test_what_is_wrong_or_not_implemented_is_refused_by_name(kind, base, field, value):
    with pytest.raises(ApiError) as caught:
        parse(kind, base | {field: value})
    assert caught.value.status == 400
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("kind", "data", "param"),
    [
        (ChatBody, {}, "messages"),
        (ChatBody, {"messages": []}, "messages"),
        (ChatBody, {"messages": [{"content": "x"}]}, "messages"),
        (ChatBody, CHAT | {"top_logprobs": 3}, "top_logprobs"),
        (ChatBody, CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CompletionBody, {}, "prompt"),
        (CompletionBody, {"prompt": ""}, "prompt"),
        (CompletionBody, {"prompt": []}, "prompt"),
        (CompletionBody, {"prompt": [1.5]}, "prompt"),
        (CompletionBody, COMPLETION | {"logprobs": 21}, "logprobs"),
        (CompletionBody, COMPLETION | {"best_of": 3}, "best_of"),
        (CompletionBody, "x", None),
    ],
)
def test_what_only_one_kind_has_is_checked_too(kind, data, param):
    with pytest.raises(ApiError) as caught:
        parse(kind, data)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"tools": None, "suffix": None, "best_of": 1},
        {"user": "me", "store": False, "metadata": {"a": "b"}},
        {"stop": ["a"] * 20, "top_k": -1, "seed": -3},
        {"n": None, "temperature": None, "max_tokens": None, "stream": None},
    ],
)
def test_fields_that_ask_for_nothing_special_are_accepted(extra):
    parse(ChatBody, CHAT | extra)
    parse(CompletionBody, COMPLETION | extra)


def test_an_unknown_field_is_ignored_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        parse(ChatBody, CHAT | {"frobnicate": 1})
    assert "frobnicate" in caplog.text
