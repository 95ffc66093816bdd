"""Texts and conversations as token ids."""

import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from llmopt.calibration import encoding
from llmopt.calibration.documents import Document
from llmopt.calibration.encoding import Encoder
from llmopt.optimizer.errors import InputError

CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]


@pytest.fixture
def beginning(tiny_llama, tmp_path):
    """The tiny tokenizer, which here puts its second token before every text."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_llama / name, directory)
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_text_gets_the_special_tokens_of_any_text(beginning, tiny_llama):
    plain = Encoder(tiny_llama).encode(Document("f:1", "The river comes."))
    assert Encoder(beginning).encode(Document("f:1", "The river comes.")) == [1, *plain]


def test_a_conversation_is_rendered_by_the_template_and_gets_no_more_tokens(beginning):
    encoder = Encoder(beginning)
    text = encoder.decode(encoder.encode(Document("f:1", CHAT)))
    assert text == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
    )


def test_messages_of_from_and_value_are_the_same_conversation(tiny_llama):
    names = {"user": "human", "assistant": "gpt"}
    theirs = [{"from": names[each["role"]], "value": each["content"]} for each in CHAT]
    encoder = Encoder(tiny_llama)
    assert encoder.encode(Document("f:1", theirs)) == encoder.encode(Document("f:1", CHAT))


def test_a_long_text_is_cut_at_line_ends_only(beginning, monkeypatch):
    text = "The river comes down from the hills.\nIn spring the water is high.\n" * 20
    whole = Encoder(beginning).encode(Document("f", text))
    monkeypatch.setattr(encoding, "_PIECE", 50)
    assert Encoder(beginning).encode(Document("f", text)) == whole


def test_an_empty_text_has_no_tokens(tiny_llama):
    assert Encoder(tiny_llama).encode(Document("f", "")) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "f:7: holds 3, which is neither text nor"),
        (None, "f:7: holds None"),
        ([], "f:7: holds an empty list"),
        (["a", "b"], "f:7: holds \\['a', 'b'\\]"),
        ([CHAT[0], {"role": "user"}], "f:7: message 2: has the keys role, not role and content"),
        ([{"role": "user", "content": ["a"]}], "f:7: message 1"),
    ],
)
def test_what_is_neither_text_nor_messages_is_refused(tiny_llama, value, said):
    with pytest.raises(InputError, match=said) as caught:
        Encoder(tiny_llama).encode(Document("f:7", value))
    assert caught.value.hint


def test_messages_without_a_template_are_refused(tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="f:7: holds chat messages, and this model has no chat template"):
        Encoder(tmp_path).encode(Document("f:7", CHAT))


def test_what_the_template_refuses_is_named(tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(InputError, match="f:7: the chat template cannot render these messages: no such role"):
        Encoder(tmp_path).encode(Document("f:7", CHAT))
