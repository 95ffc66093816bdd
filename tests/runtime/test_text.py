import json
import random
import shutil

import pytest

from llmopt.optimizer.errors import InputError
from llmopt.runtime.text import StopMatcher, TextStream, Tokenizer


@pytest.fixture
def tokenizer(byte_tokenizer):
    return Tokenizer(byte_tokenizer)


def pieces(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.is_stopped:
            return found
    return [*found, stream.finish()]


@pytest.mark.parametrize(
    "text", ["plain", "héllo wörld", "日本語のテキスト", "👩‍👩‍👧 and 🇫🇷!", "a\n\tb  c", "\ufffd genuine \ufffd!"]
)
def test_streamed_text_is_the_text_and_never_half_a_character(tokenizer, text):
    found = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(found) == text
    assert sum(piece.count("\ufffd") for piece in found) == text.count("\ufffd")


def test_each_token_of_plain_text_gives_its_piece_at_once(tokenizer):
    assert pieces(tokenizer, tokenizer.encode("abc", add_special_tokens=False)) == ["a", "b", "c", ""]


def test_an_unfinished_character_is_left_out_at_the_end(tokenizer):
    ids = tokenizer.encode("ok 語", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids[:-1])) == "ok "


def test_bytes_that_are_no_text_do_not_hold_the_stream_up(tokenizer):
    broken = tokenizer.encode("語", add_special_tokens=False)[1]
    found = pieces(tokenizer, [broken] * 20 + tokenizer.encode("after", add_special_tokens=False))
    assert "".join(found).endswith("after")
    assert max(len(piece) for piece in found) <= 6


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    ids = [256, *tokenizer.encode("hi", add_special_tokens=False)]
    assert "".join(pieces(tokenizer, ids)) == "hi"
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)) == "<s>hi"


def test_a_stop_string_is_found_across_tokens_and_removed(tokenizer):
    ids = tokenizer.encode("one END two", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, stop=["END"])) == "one "
    assert "".join(pieces(tokenizer, ids, stop=["END"], include_stop=True)) == "one END"


def test_only_a_possible_beginning_of_a_stop_string_is_held_back(tokenizer):
    ids = tokenizer.encode("a ENx", add_special_tokens=False)
    assert pieces(tokenizer, ids, stop=["END"]) == ["a", " ", "", "", "ENx", ""]


def test_a_beginning_at_the_end_of_the_text_is_given_out(tokenizer):
    assert "".join(pieces(tokenizer, tokenizer.encode("the EN", add_special_tokens=False), stop=["END"])) == "the EN"


@pytest.mark.parametrize("seed", range(30))
def test_stopping_does_not_depend_on_how_the_text_is_cut(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("ab", k=40))
    stops = ["".join(rng.choices("ab", k=rng.randint(1, 7))) for _ in range(3)]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    matcher, found, rest = StopMatcher(stops), "", text
    while rest and not matcher.is_stopped:
        size = rng.randint(1, 5)
        found += matcher.push(rest[:size])
        rest = rest[size:]
    if not matcher.is_stopped:
        found += matcher.finish()
    assert found == expected


def test_all_eos_tokens_end_a_generation(byte_tokenizer, tmp_path):
    shutil.copytree(byte_tokenizer, tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert Tokenizer(tmp_path / "t").stop_ids == {3, 4, 257}


def test_token_bytes_are_those_of_the_text(tokenizer):
    text = "é日!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert tokenizer.token_bytes(257) == b"</s>"
    assert tokenizer.token_bytes(9999) == b""


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("context", "text"), [((), "world"), ((1,), " world")])
def test_a_completion_keeps_the_space_between_the_prompt_and_its_first_word(spaced_tokenizer, context, text):
    stream = TextStream(Tokenizer(spaced_tokenizer), context=context)
    assert stream.push(2) + stream.finish() == text


def test_a_token_has_its_leading_space_whatever_decoders_drop_at_the_start_of_a_text(spaced_tokenizer, tokenizer):
    spaced = Tokenizer(spaced_tokenizer)
    assert [spaced.token_text(token) for token in (0, 1, 2, 3)] == ["<s>", " Hello", " world", "\ufffd"]
    assert [spaced.token_bytes(token) for token in (0, 1, 2, 3)] == [b"<s>", b" Hello", b" world", b"\xe6"]
    (space,) = tokenizer.encode(" ", add_special_tokens=False)
    assert (tokenizer.token_text(space), tokenizer.token_bytes(space)) == (" ", b" ")


def test_vocabularies_are_the_same_when_all_tokens_are(byte_tokenizer, spaced_tokenizer):
    one, other = Tokenizer(byte_tokenizer), Tokenizer(spaced_tokenizer)
    assert one.has_vocabulary_of(Tokenizer(byte_tokenizer))
    assert not one.has_vocabulary_of(other)
    assert not other.has_vocabulary_of(one)
