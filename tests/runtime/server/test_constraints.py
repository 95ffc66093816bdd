"""The fields that constrain answers: what they mean, what is refused, and that requests get their grammars."""

import json

import pytest

from llmopt.runtime.server.constraints import constraint_of
from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.protocol import ChatBody, CompletionBody, parse
from llmopt.runtime.server.service import Service
from llmopt.runtime.structured.grammar import Constraint

CHAT = {"messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"prompt": "x"}
SCHEMA = {"type": "object", "properties": {"z": {}, "a": {}}}
SPELLED = '{"type":"object","properties":{"z":{},"a":{}}}'

bodies = pytest.mark.parametrize(("kind", "base"), [(ChatBody, CHAT), (CompletionBody, COMPLETION)])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            Constraint("json_schema", SPELLED),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint("json_schema", SPELLED)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Constraint("json_schema", SPELLED)),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object")),
        ({"structured_outputs": {"json_object": False, "regex": "a+"}}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint("choice", '["a", "b"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint("grammar", 'start: "a"')),
        ({"guided_json": SCHEMA}, Constraint("json_schema", SPELLED)),
        ({"guided_json": json.dumps(SCHEMA)}, Constraint("json_schema", SPELLED)),
        ({"guided_regex": ""}, Constraint("regex", "")),
        ({"guided_choice": ["a"]}, Constraint("choice", '["a"]')),
        ({"guided_grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
        ({"guided_regex": "a", "response_format": {"type": "text"}}, Constraint("regex", "a")),
        ({"guided_regex": "a", "guided_decoding_backend": "auto"}, Constraint("regex", "a")),
    ],
)
@bodies
def test_a_constraint_is_read_from_the_field_it_is_in(kind, base, fields, expected):
    assert constraint_of(parse(kind, base | fields)) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "n", "schema": {}}}}, "response_format"),
        ({"response_format": {"type": "text", "frobnicate": 1}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": " *"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": "true"}, "guided_json"),
        ({"guided_json": {"const": float("nan")}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ],
)
@bodies
def test_a_malformed_or_a_second_constraint_is_refused_by_the_name_of_its_field(kind, base, fields, param):
    with pytest.raises(ApiError) as caught:
        parse(kind, base | fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_two_constraints_are_both_named():
    with pytest.raises(ApiError, match="response_format and guided_choice"):
        parse(ChatBody, CHAT | {"response_format": {"type": "json_object"}, "guided_choice": ["a"]})


@pytest.mark.parametrize(("route", "base"), [("chat/completions", CHAT), ("completions", COMPLETION)])
@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"guided_json": {"uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "card"}}}},
            "response_format",
            "card",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_compiled_is_an_error_of_the_request(client, route, base, fields, param, named, stream):
    answer = client.post(f"/v1/{route}", json=base | fields | {"max_tokens": 2, "stream": stream})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert named in error["message"]


@pytest.mark.parametrize(("route", "base"), [("chat/completions", CHAT), ("completions", {"prompt": ["x", "y"]})])
def test_every_request_of_a_call_gets_a_grammar_of_its_own(client, monkeypatch, route, base):
    seen = []
    run = Service.run

    def watched(self, requests, http):
        seen.extend(request.guide for request in requests)
        return run(self, requests, http)

    monkeypatch.setattr(Service, "run", watched)
    count = 3 * len(base.get("prompt", "x"))
    body = base | {"n": 3, "max_tokens": 1, "guided_choice": ["yes", "no"]}
    assert client.post(f"/v1/{route}", json=body).status_code == 200
    assert len({id(grammar) for grammar in seen}) == count
    assert None not in seen


def test_a_request_without_a_constraint_has_no_grammar_and_starts_no_process(toy_server):
    with toy_server() as served, served.client() as client:
        assert client.post("/v1/completions", json=COMPLETION | {"max_tokens": 1}).status_code == 200
        assert served.service.build.grammars._compiler is None


def test_a_build_that_cannot_follow_grammars_says_so(toy_server, spaced_tokenizer):
    with toy_server(tokenizer=spaced_tokenizer) as served, served.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "Hello", "guided_regex": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "not_implemented"


def test_the_process_that_compiles_grammars_ends_with_the_server(toy_server):
    with toy_server() as served, served.client() as client:
        client.post("/v1/completions", json=COMPLETION | {"max_tokens": 1, "guided_regex": "a"})
        process = served.service.build.grammars._compiler.trial._process
        assert process.poll() is None
    assert process.poll() is not None
