"""Lines of a file as texts: which are taken, how they are cut and padded, and what is refused."""

import hashlib

import pytest

from llmopt.calibration.encoding import open_tokenizer
from llmopt.calibration.lines import read_lines
from llmopt.optimizer.errors import InputError


@pytest.fixture
def tokenizer_dir(encoder_of):
    return encoder_of("bert")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("The river comes down.\n\n  A fox and a clock \nRome\n", encoding="utf-8")
    return path


def test_each_line_that_is_not_empty_is_a_text(text, tokenizer_dir):
    found = read_lines(text, tokenizer_dir, lines=3, tokens=64)
    tokenizer = open_tokenizer(tokenizer_dir)
    expected = [tokenizer.encode(line).ids for line in ("The river comes down.", "A fox and a clock", "Rome")]
    assert [row[:n].tolist() for row, n in zip(found.ids, found.lengths, strict=True)] == expected
    assert all(ids[0] == 0 and ids[-1] == 2 for ids in expected)  # framed by special tokens
    assert found.count == sum(map(len, expected))
    assert found.ids.shape == (3, max(map(len, expected)))
    assert not found.ids[~found.mask].any()


def test_long_lines_are_cut_and_keep_their_last_special_token(text, tokenizer_dir):
    found = read_lines(text, tokenizer_dir, lines=2, tokens=4)
    assert found.lengths.tolist() == [4, 4]
    assert found.ids[:, -1].tolist() == [2, 2]


def test_the_text_is_known_by_its_file(text, tokenizer_dir):
    found = read_lines(text, tokenizer_dir, lines=1, tokens=64)
    assert (found.name, found.digest) == (str(text), hashlib.sha256(text.read_bytes()).hexdigest())
    assert read_lines(text, tokenizer_dir, lines=1, tokens=64, name="a.txt").name == "a.txt"


def test_too_few_lines_are_refused_with_how_many_there_are(text, tokenizer_dir):
    with pytest.raises(InputError, match="has 3 lines of text, not 4") as error:
        read_lines(text, tokenizer_dir, lines=4, tokens=64)
    assert error.value.hint == "windows: 3 would fit"


def test_a_file_that_is_no_text_is_refused(tmp_path, tokenizer_dir):
    (tmp_path / "texts.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="is not UTF-8 text: byte 3 is 0xe9"):
        read_lines(tmp_path / "texts.txt", tokenizer_dir, lines=1, tokens=64)
