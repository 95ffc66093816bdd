"""Text files as windows of tokens, and what is said when that does not work."""

import hashlib

import pytest
from tokenizers import Tokenizer

from llmopt.calibration.texts import read_tokens
from llmopt.optimizer.errors import InputError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The river comes down from the hills. " * 40, encoding="utf-8")
    return path


def test_windows_lie_one_behind_the_other_from_the_start(text, tiny_llama):
    read = read_tokens(text, tiny_llama, windows=3, tokens=16)
    ids = Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode(text.read_text()).ids
    assert read.ids.tolist() == [ids[:16], ids[16:32], ids[32:48]]
    assert read.digest == hashlib.sha256(text.read_bytes()).hexdigest()
    assert read.name == str(text)
    assert not read.is_sampled


def test_the_text_is_taken_as_it_is(tmp_path, tiny_llama):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a <unk> @-@ b\r\n\r\n  c" * 5)
    read = read_tokens(path, tiny_llama, windows=1, tokens=20)
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    assert path.read_bytes().decode().startswith(tokenizer.decode(read.ids[0].tolist()))


def test_a_missing_file_is_named(tmp_path, tiny_llama):
    with pytest.raises(InputError, match=r"none\.txt: No such file"):
        read_tokens(tmp_path / "none.txt", tiny_llama, windows=1, tokens=2)


def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, tiny_llama):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(InputError, match="byte 3 is 0xe9"):
        read_tokens(path, tiny_llama, windows=1, tokens=2)


def test_a_short_text_says_how_many_tokens_it_has_and_what_would_fit(text, tiny_llama):
    count = len(Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode(text.read_text()).ids)
    with pytest.raises(InputError, match=f"has {count} tokens, 100 windows of 64 need 6400") as caught:
        read_tokens(text, tiny_llama, windows=100, tokens=64)
    assert f"windows: {count // 64} would fit" in caught.value.hint


def test_an_empty_text_is_refused(tmp_path, tiny_llama):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="has 0 tokens"):
        read_tokens(tmp_path / "empty.txt", tiny_llama, windows=1, tokens=2)


def test_a_model_without_a_tokenizer_is_refused(text, tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        read_tokens(text, tmp_path, windows=1, tokens=2)
