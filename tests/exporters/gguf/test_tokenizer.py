"""The vocabulary in GGUF's terms, and tokenizers that have none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from llmopt.exporters.gguf.tokenizer import read_vocabulary
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.sources import load_model

LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


@pytest.fixture
def changed(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny Llama's tokenizer files, with entries of tokenizer.json or generation_config.json replaced."""

    def make(generation: dict[str, Any] | None = None, **entries: Any) -> Path:
        source = load_model(str(tiny_llama), cache=tmp_path / "cache").source.tokenizer_dir
        directory = Path(shutil.copytree(source, tmp_path / "tokenizer", dirs_exist_ok=True))
        for name, changes in (("tokenizer.json", entries), ("generation_config.json", generation or {})):
            content = json.loads((directory / name).read_text()) | changes
            (directory / name).write_text(json.dumps(content))
        return directory

    return make


def test_tokens_lie_at_their_ids_and_special_ones_are_control(changed) -> None:
    found = read_vocabulary(changed(), 520)
    assert (found.kind, found.pre, found.adds_bos, found.adds_space) == ("gpt2", "gpt-2", False, False)
    assert found.tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert found.types[:3] == [TokenType.CONTROL] * 3
    assert found.tokens[512:] == [f"[PAD{i}]" for i in range(512, 520)]
    assert set(found.types[512:]) == {TokenType.UNUSED}
    assert all(len(merge.split(" ")) == 2 for merge in found.merges)
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}


def test_a_second_end_is_the_end_of_a_turn(changed) -> None:
    found = read_vocabulary(changed(generation={"eos_token_id": [0, 2]}), 512)
    assert (found.ids["eos"], found.ids["eot"]) == (2, 0)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}}, {"type": "ByteLevel", "use_regex": False}], "llama-bpe"),
        (
            [
                {"type": "Split", "pattern": {"Regex": LLAMA3.replace("{1,3}", "")}},
                {"type": "ByteLevel", "use_regex": False},
            ],
            "qwen2",
        ),
    ],
)
def test_how_text_is_split_has_a_name(steps, name: str, changed) -> None:
    directory = changed(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert read_vocabulary(directory, 512).pre == name


def test_an_unknown_way_is_refused_unless_it_is_named(changed) -> None:
    steps = [{"type": "Split", "pattern": {"Regex": "\\d"}}, {"type": "ByteLevel", "use_regex": False}]
    directory = changed(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    with pytest.raises(UnsupportedError, match="splits text in a way") as caught:
        read_vocabulary(directory, 512)
    assert "pre_tokenizer: NAME" in str(caught.value.hint)
    assert read_vocabulary(directory, 512, pre="tekken").pre == "tekken"


def test_sentencepieces_merges_become_scores(changed) -> None:
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "ab": 4, "\u2581a": 5, "\u2581": 6},
        "merges": ["a b", ["\u2581", "a"]],
    }
    normalizer = {"type": "Prepend", "prepend": "\u2581"}
    found = read_vocabulary(changed(model=model, normalizer=normalizer, added_tokens=[]), 7)
    assert (found.kind, found.pre, found.adds_space) == ("llama", "", True)
    assert found.scores[4] > found.scores[5] > found.scores[2]
    assert found.types[:3] == [TokenType.UNKNOWN, TokenType.BYTE, TokenType.NORMAL]
    assert found.merges == []


def test_other_kinds_of_tokenizers_are_refused(changed) -> None:
    with pytest.raises(UnsupportedError, match="Unigram"):
        read_vocabulary(changed(model={"type": "Unigram", "vocab": []}), 512)
