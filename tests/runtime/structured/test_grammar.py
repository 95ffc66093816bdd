"""Grammars, against a naive mask, json, jsonschema and re."""

import importlib.util
import json
import re
import threading

import jsonschema
import numpy as np
import pytest
import tokenizers

from llmopt.optimizer.errors import MissingExtraError, UnsupportedError
from llmopt.runtime.structured.grammar import Constraint, GrammarError, Grammars
from llmopt.runtime.structured.trial import Trial
from llmopt.runtime.text import Tokenizer

STOP = 257
PERSON = {
    "$defs": {"tag": {"enum": ["new", "old", "caf\u00e9 \U0001f600"]}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        "born": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SUM = 'start: term ("+" term)*\nterm: /[0-9]{1,3}/ | "(" start ")"\n'
CHOICES = ["yes", "no", "not sure", 'a "quoted" \\ word', "caf\u00e9 \U0001f600\n", ""]


def schema(content) -> Constraint:
    return Constraint("json_schema", json.dumps(content))


def closing(grammars):
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def grammars(byte_tokenizer):
    yield from closing(Grammars(Tokenizer(byte_tokenizer), 258))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer with tokens of several bytes, three stop tokens and one special token."""
    directory = tmp_path_factory.mktemp("words")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>", "<other end>", "<image>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([json.dumps({"name": "Anna", "tags": ["new", "old"], "ok": True})] * 3, trainer)
    made.add_tokens(["</plain end>"])
    made.save(str(directory / "tokenizer.json"))
    plain = made.token_to_id("</plain end>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [plain, 1, 0]}))
    return Tokenizer(directory)


def allowed(grammar) -> list[int]:
    mask = np.full(grammar.words, -1, np.int32)
    grammar.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walked(grammar, tokenizer, rng, steps=4000) -> str:
    """The text of random tokens that were allowed; those that come to an end are likelier."""
    tokens = []
    for _ in range(steps):
        choices = allowed(grammar)
        assert choices
        weights = np.array([30 if tokenizer.token_text(t)[:1] in tuple('"}],:)') else 1 for t in choices], float)
        weights[[t in tokenizer.stop_ids for t in choices]] = 5
        token = int(rng.choice(choices, p=weights / weights.sum()))
        grammar.accept(token)
        if token not in tokenizer.stop_ids:
            tokens.append(token)
        if grammar.is_complete:
            return tokenizer.decode(tokens, skip_special_tokens=False)
    raise AssertionError("no end in sight")


def is_sum(text: str) -> bool:
    return re.fullmatch(r"[0-9+()]+", text) is not None and eval(re.sub(r"\b0+(?=\d)", "", text)) >= 0


def is_person(text: str) -> bool:
    validator = jsonschema.Draft202012Validator
    validator(PERSON, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))
    return True


@pytest.mark.parametrize(
    ("constraint", "obeys"),
    [
        (Constraint("json_object"), lambda text: isinstance(json.loads(text), dict)),
        (schema(PERSON), is_person),
        (Constraint("regex", r"[A-C]{2}-\d{1,3}(x|yz)?"), lambda text: re.fullmatch(r"[A-C]{2}-\d{1,3}(x|yz)?", text)),
        (Constraint("grammar", SUM), is_sum),
        (Constraint("grammar", 'root ::= term ("+" term)*\nterm ::= [0-9] [0-9]?\n'), is_sum),
        (Constraint("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    ],
    ids=["json_object", "json_schema", "regex", "lark", "gbnf", "choice"],
)
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_whatever_allowed_tokens_are_chosen_the_answer_obeys(constraint, obeys, kind, grammars, byte_tokenizer, words):
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer(byte_tokenizer) if kind == "bytes" else words
    for made in closing(Grammars(tokenizer, tokenizer.vocab_size)) if kind == "words" else [grammars]:
        start = made.compile(constraint)
        for _ in range(20):
            text = walked(start.copy(), tokenizer, rng)
            assert obeys(text), text


@pytest.mark.parametrize("vocab_size", [280, 285, 320])
def test_masks_are_what_a_fresh_grammar_accepts_token_by_token(words, vocab_size):
    """Also where the logits are narrower or wider than the tokenizer's vocabulary."""
    assert words.vocab_size == 285
    before = words.encode('{"name": "An", "age": 1', add_special_tokens=False)
    forced = 0
    for made in closing(Grammars(words, vocab_size)):
        start = made.compile(schema(PERSON))
        for place in range(len(before) + 1):
            grammar = start.copy()
            for token in before[:place]:
                grammar.accept(token)
            naive = [t for t in range(vocab_size) if is_accepted(start.copy(), before[:place], t)]
            assert naive == [t for t in range(vocab_size) if grammar.accepts([t])]
            if len(found := allowed(grammar)) == 1:
                # Only one text can follow, and llguidance gives the token that the tokenizer would begin it with.
                forced += len(naive) > 1
                assert found[0] == max(naive, key=lambda t: len(words.token_bytes(t)))
            else:
                assert found == naive
    assert 0 < forced < place / 2


def is_accepted(grammar, before, token) -> bool:
    try:
        for each in [*before, token]:
            grammar.accept(each)
    except GrammarError:
        return False
    return True


def test_a_stop_token_is_allowed_only_where_the_text_may_end(grammars):
    grammar = grammars.compile(Constraint("regex", "A{2,3}"))
    (letter,) = [t for t in allowed(grammar) if t != STOP]
    ends = []
    for _ in range(3):
        ends.append(STOP in allowed(grammar))
        assert not grammar.is_complete
        grammar.accept(letter)
    assert ends == [False, False, True]
    assert grammar.is_complete
    assert allowed(grammar) == [STOP]
    grammar.accept(STOP)
    assert grammar.is_complete


def test_a_stop_token_completes_what_might_go_on(grammars):
    grammar = grammars.compile(Constraint("regex", "A*"))
    assert not grammar.is_complete
    grammar.accept(STOP)
    assert grammar.is_complete


def test_every_stop_token_ends_the_text_and_none_is_part_of_it(words):
    """Also one whose text the grammar would allow; and special tokens are no text."""
    assert len(words.stop_ids) == 3
    for made in closing(Grammars(words, words.vocab_size)):
        start = made.compile(Constraint("regex", "(.|\n)+"))
        assert not {*words.stop_ids, 2} & set(allowed(start))
        start.accept(words.encode("A", add_special_tokens=False)[0])
        assert set(allowed(start)) >= words.stop_ids
        for stop in words.stop_ids:
            grammar = start.copy()
            assert grammar.accepts([stop, 50]) == 1
            grammar.accept(stop)
            assert grammar.is_complete


def test_a_token_that_is_not_allowed_is_refused(grammars):
    for token in (STOP, 5, 1000):
        grammar = grammars.compile(Constraint("choice", '["yes"]'))
        with pytest.raises(GrammarError, match="cannot be followed"):
            grammar.accept(token)
        # A mask of the stop token alone would end the answer as if it were whole.
        with pytest.raises(GrammarError, match="cannot be followed"):
            grammar.fill(np.zeros(grammar.words, np.int32))


def test_a_grammar_that_turns_out_too_large_on_the_way_fails_and_does_not_end_the_answer(grammars):
    many = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1000)}}
    grammar = grammars.compile(schema(many))
    (brace,) = allowed(grammar)
    with pytest.raises(GrammarError, match=r"cannot be followed.*4007 items"):
        grammar.accept(brace)


def test_asking_what_would_be_accepted_changes_nothing(grammars, byte_tokenizer):
    tokens = Tokenizer(byte_tokenizer).encode("yes", add_special_tokens=False)
    grammar = grammars.compile(Constraint("choice", '["yes"]'))
    before = allowed(grammar)
    assert grammar.accepts(tokens) == 3
    assert grammar.accepts([*tokens, STOP]) == 4
    assert grammar.accepts([tokens[0], STOP]) == 1
    assert grammar.accepts([tokens[0], tokens[0]]) == 1
    assert grammar.accepts([STOP]) == grammar.accepts([1000]) == grammar.accepts([]) == 0
    assert allowed(grammar) == before
    for token in tokens:
        grammar.accept(token)
    assert grammar.accepts([STOP]) == grammar.accepts([STOP, STOP]) == 1
    assert grammar.accepts(tokens) == grammar.accepts([1000]) == grammar.accepts([]) == 0


def test_requests_with_one_grammar_do_not_disturb_each_other(grammars, byte_tokenizer):
    yes, no = (Tokenizer(byte_tokenizer).encode(text, add_special_tokens=False) for text in ("yes", "no"))
    constraint = Constraint("choice", '["yes", "no"]')
    first, second = grammars.compile(constraint), grammars.compile(constraint)
    first.accept(yes[0])
    third = first.copy()
    for token in no:
        second.accept(token)
    with pytest.raises(GrammarError):
        third.accept(no[0])
    assert allowed(first) == [yes[1]]
    assert second.is_complete
    assert sorted(allowed(grammars.compile(constraint))) == sorted([yes[0], no[0]])


def test_threads_compile_and_walk_side_by_side(grammars, byte_tokenizer):
    tokenizer, texts = Tokenizer(byte_tokenizer), []

    def work(seed):
        texts.append(walked(grammars.compile(schema(PERSON)), tokenizer, np.random.default_rng(seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4
    assert all(is_person(text) for text in texts)


def test_json_may_be_indented_but_not_padded(grammars, byte_tokenizer):
    def count(text):
        return grammars.compile(Constraint("json_object")).accepts(tokens_of(text))

    def tokens_of(text):
        return Tokenizer(byte_tokenizer).encode(text, add_special_tokens=False)

    value = {"a": [1, {"b": None}], "c": "d e"}
    for indent in (None, 1, 2, 4):
        assert count(json.dumps(value, indent=indent)) == len(json.dumps(value, indent=indent))
    assert count(json.dumps(value, separators=(",", ":"))) == len(json.dumps(value, separators=(",", ":")))
    assert count('{"a":  1}') == 6
    assert count('{\n\n"a": 1}') == 2


def chain(length: int) -> str:
    """Schemas that refer to each other in a row, in the fewest characters."""
    definitions = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(length)}
    return json.dumps({"$defs": definitions | {str(length): {}}, "$ref": "#/$defs/0"}, separators=(",", ":"))


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        (schema({"type": "array", "uniqueItems": True}), r"'uniqueItems' is not supported \(at \$\)"),
        (schema({"properties": {"a": {"nullable": True}}}), r"'nullable' is not supported \(at \$\.properties\.a\)"),
        (schema({"anyOf": [{}, {"items": [{"typo": 1}]}]}), r"'typo' .*\$\.anyOf\[1\]\.items\[0\]"),
        (schema({"x-guidance": {"lenient": True}, "type": "array"}), "'x-guidance'"),
        (schema({"type": "string", "contentEncoding": "base64"}), "'contentEncoding'"),
        (schema({"not": {}}), "'not'"),
        (
            schema({"$schema": "http://json-schema.org/draft-07/schema#", "dependentRequired": {}}),
            "'dependentRequired'",
        ),
        (schema({"type": "object", "minProperties": 2}), "'minProperties'"),
        (schema({"type": "integer", "format": "int32"}), "'format'"),
        (schema({"type": "string", "format": "card"}), "format: card"),
        (schema({"oneOf": [{"type": "string"}, {"maxLength": 3}]}), "oneOf"),
        (schema({"$ref": "https://example.com/schema"}), "example.com"),
        (schema({"type": "card"}), "card"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (schema({"enum": ["\ud800"]}), "cannot be compiled"),
        (Constraint("regex", "(?<=a)b"), "look-around"),
        (Constraint("regex", "(a"), "unclosed"),
        (Constraint("regex", "\ud800"), "half a character"),
        (Constraint("regex", "a" * 70_000), "the regex is longer than 65536 characters"),
        (Constraint("grammar", "start: missing"), "missing"),
        (Constraint("grammar", "no grammar"), "neither Lark nor GBNF"),
        (Constraint("grammar", '{"grammars": [{"json_schema": {"typo": 1}}]}'), "neither Lark nor GBNF"),
        (Constraint("grammar", 'start: %json {"items": {"typo": 1}}'), "'typo'"),
        (Constraint("grammar", 'start: a\na[temperature=0]: "a"'), "'temperature'"),
        (Constraint("grammar", "start: start"), "allows nothing"),
        (Constraint("choice", '["\\ud800"]'), "cannot be compiled"),
        # These two end the process that tries them: the first fills its stack, the second Python's.
        (Constraint("json_schema", chain(2000)), "too complex"),
        (Constraint("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), "too complex"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_and_named_and_the_next_one_compiles(grammars, constraint, named):
    with pytest.raises(GrammarError, match=named):
        grammars.compile(constraint)
    assert not grammars.compile(Constraint("choice", '["yes"]')).is_complete


def test_keywords_that_describe_are_no_reason_to_refuse(grammars):
    described = {"title": "t", "description": "d", "default": 1, "examples": [1], "$comment": "c", "deprecated": True}
    names = {"type": "object", "properties": {"uniqueItems": {"type": "null"}}, "patternProperties": {"^not": {}}}
    grammars.compile(schema({"type": "integer", **described}))
    grammars.compile(schema(names))


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_compiles(byte_tokenizer):
    # Languages of all texts with these words in them: their intersection has more states than there is time for.
    slow = Constraint("grammar", "start: A\nA: " + " & ".join(f"/(.*{i}.*)/" for i in range(500)))
    for grammars in closing(Grammars(Tokenizer(byte_tokenizer), 258, seconds=2)):
        with pytest.raises(GrammarError, match=r"longer than 2 s"):
            grammars.compile(slow)
        grammars.compile(Constraint("choice", '["yes"]'))


def test_a_constraint_is_compiled_once_until_others_push_it_out(byte_tokenizer, monkeypatch):
    tried = []
    run = Trial.run

    def watched(self, constraint):
        tried.append(constraint.text)
        return run(self, constraint)

    monkeypatch.setattr(Trial, "run", watched)
    others = [f"c{i}" for i in range(32)]
    for grammars in closing(Grammars(Tokenizer(byte_tokenizer), 258)):
        for text in ["a", "b", "a", "b", *others, "a"]:
            grammars.compile(Constraint("regex", text))
    assert tried == ["a", "b", *others, "a"]


def test_without_llguidance_the_extra_is_named_when_a_constraint_is_asked_for(byte_tokenizer, monkeypatch):
    grammars = Grammars(Tokenizer(byte_tokenizer), 258)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        grammars.compile(Constraint("json_object"))
    assert caught.value.hint == "pip install 'llmopt[serve]'"


def test_a_build_without_a_stop_token_cannot_follow_grammars(spaced_tokenizer):
    with pytest.raises(UnsupportedError, match="no token that ends"):
        Grammars(Tokenizer(spaced_tokenizer), 4).compile(Constraint("json_object"))
