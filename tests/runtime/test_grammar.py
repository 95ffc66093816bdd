import json
import re
import threading

import jsonschema
import numpy as np
import pytest

from llmopt.runtime.grammar import Constraint, GrammarError, Grammars
from llmopt.runtime.text import Tokenizer

pytest.importorskip("llguidance")

VOCAB = 260  # two more than the tokenizer has
STOP = 257
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return Tokenizer(byte_tokenizer)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB)


def allowed(grammar):
    mask = np.zeros(grammar.words, np.int32)
    grammar.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(grammar, tokenizer, seed, printable=range(256)):
    """A random answer; where it may end, it does every other time."""
    rng, tokens = np.random.default_rng(seed), []
    while not grammar.is_complete:
        choices = allowed(grammar)
        if STOP in choices and rng.random() < 0.5:
            grammar.accept(STOP)
            break
        inside = [int(token) for token in choices if token in printable and token != STOP]
        tokens.append(int(rng.choice(inside)))
        grammar.accept(tokens[-1])
    return tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def printable(tokenizer):
    """ASCII only, so that any sequence of tokens is text."""
    return {token for token in range(256) if tokenizer.token_bytes(token).isascii()}


@pytest.mark.parametrize("seed", range(5))
def test_answers_follow_a_json_schema(grammars, tokenizer, printable, seed):
    found = json.loads(
        walk(grammars.compile(Constraint("json_schema", json.dumps(SCHEMA))), tokenizer, seed, printable)
    )
    jsonschema.validate(found, SCHEMA)


@pytest.mark.parametrize("seed", range(5))
def test_answers_match_a_regular_expression(grammars, tokenizer, seed):
    pattern = r"[0-9]{3}-[a-c]{2,6}x?"
    assert re.fullmatch(pattern, walk(grammars.compile(Constraint("regex", pattern)), tokenizer, seed))


def test_answers_are_one_of_the_choices(grammars, tokenizer):
    choices = ["yes", "no", 'a "quoted" \\ one', "né"]
    found = {walk(grammars.compile(Constraint("choice", json.dumps(choices))), tokenizer, seed) for seed in range(40)}
    assert found == set(choices)


@pytest.mark.parametrize("text", ['start: ("a" | "b")+ "c"', 'root ::= ("a" | "b")+ "c"'])
def test_answers_follow_a_grammar_in_either_dialect(grammars, tokenizer, text):
    for seed in range(5):
        assert re.fullmatch("[ab]+c", walk(grammars.compile(Constraint("grammar", text)), tokenizer, seed))


def test_an_object_begins_with_a_brace(grammars, tokenizer):
    grammar = grammars.compile(Constraint("json_object"))
    assert tokenizer.decode([int(token) for token in allowed(grammar)]) == "{"


def test_a_stop_token_may_come_where_the_answer_may_end(grammars, tokenizer):
    grammar = grammars.compile(Constraint("regex", "a+"))
    assert STOP not in allowed(grammar)
    (first,) = tokenizer.encode("a", add_special_tokens=False)
    grammar.accept(first)
    assert set(allowed(grammar)) == {first, STOP}
    grammar.accept(STOP)
    assert grammar.is_complete


def test_an_answer_is_complete_as_soon_as_nothing_can_follow(grammars, tokenizer):
    grammar = grammars.compile(Constraint("choice", '["ab"]'))
    for token in tokenizer.encode("ab", add_special_tokens=False):
        assert not grammar.is_complete
        grammar.accept(token)
    assert grammar.is_complete


def test_answers_of_one_constraint_do_not_disturb_each_other(grammars, tokenizer):
    first, second = (grammars.compile(Constraint("choice", '["ab", "cd"]')) for _ in range(2))
    first.accept(*tokenizer.encode("a", add_special_tokens=False))
    assert tokenizer.decode([int(token) for token in allowed(first)]) == "b"
    assert {tokenizer.decode([int(token)]) for token in allowed(second)} == {"a", "c"}
    third = first.copy()
    first.accept(*tokenizer.encode("b", add_special_tokens=False))
    assert not third.is_complete


def test_a_token_that_is_not_allowed_is_an_error(grammars, tokenizer):
    grammar = grammars.compile(Constraint("choice", '["ab"]'))
    with pytest.raises(GrammarError, match="cannot go on"):
        grammar.accept(*tokenizer.encode("z", add_special_tokens=False))


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("json_schema", "{"), "JSON schema cannot be read"),
        (Constraint("json_schema", '{"not": {}}'), '"not"'),
        (Constraint("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Constraint("json_schema", '{"type": "nonsense"}'), "nonsense"),
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("grammar", "???"), "grammar cannot be read"),
        (Constraint("choice", "[]"), "empty"),
    ],
)
def test_what_cannot_be_used_is_refused_and_named(grammars, constraint, words):
    with pytest.raises(GrammarError) as caught:
        grammars.compile(constraint)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_what_takes_too_long_is_refused(tokenizer, monkeypatch):
    go, grammars = threading.Event(), Grammars(tokenizer, VOCAB, seconds=0.05)
    monkeypatch.setattr(grammars, "_compile", lambda constraint: go.wait(10))
    with pytest.raises(GrammarError, match=r"longer than 0\.05 s"):
        grammars.compile(Constraint("regex", "a"))
    go.set()


def test_what_was_compiled_is_kept(grammars, monkeypatch):
    constraint = Constraint("regex", "kept")
    grammars.compile(constraint)
    monkeypatch.setattr(grammars, "_compile", None)
    assert not grammars.compile(constraint).is_complete
