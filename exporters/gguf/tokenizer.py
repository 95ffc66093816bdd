"""``tokenizer.json`` as GGUF's metadata: tokens, merges or scores, and which splitting llama.cpp has to do before.

llama.cpp has the expressions that split text in its source, under names; a wrong name tokenizes differently without
a word. So a tokenizer whose splitting is none of those known here is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.hf_config import read_json

__all__ = ["Vocabulary", "read_vocabulary", "write_vocabulary"]

_SPACE = "\u2581"
"""What SentencePiece has for a space."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

_SPLITS: Mapping[str, str] = {
    f"{_CONTRACTIONS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}|\\p{{N}}|{_REST}": "qwen2",
}
"""Expression of a ``Split`` before byte-level BPE -> llama.cpp's name."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp needs to tokenize.

    Attributes:
        kind: ``gpt2``: byte-level BPE with merges; ``llama``: SentencePiece's BPE with scores.
        pre: Name of the splitting, for ``gpt2``.
        tokens: By id; ids without a token have names of their own.
        types: Of each token.
        merges: Pairs in order, for ``gpt2``.
        scores: Of each token, higher is merged first, for ``llama``.
        ids: ``bos``, ``eos``, ``eot``, ``unk``, ``pad``, where the model has them.
        adds_bos: Whether a text begins with the first token.
        adds_space: Whether a space is put before a text.
    """

    kind: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    ids: Mapping[str, int]
    adds_bos: bool
    adds_space: bool


def read_vocabulary(directory: Path, size: int, *, pre: str | None = None) -> Vocabulary:
    """From the tokenizer's files.

    Args:
        directory: With tokenizer.json, tokenizer_config.json and generation_config.json.
        size: Rows of the embedding; ids above the tokenizer's get tokens that nothing produces.
        pre: llama.cpp's name of the splitting; None: told by the tokenizer.

    Raises:
        UnsupportedError: The tokenizer is of a kind that llama.cpp does not have, or splits text in an unknown way.
    """
    tokenizer = read_json(directory / "tokenizer.json")
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"a tokenizer of the kind {model.get('type')} is not written as GGUF", hint="written are BPE tokenizers"
        )
    vocab: dict[str, int] = dict(model["vocab"])
    added = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or ()}
    vocab |= {content: entry["id"] for content, entry in added.items()}
    tokens = [f"[PAD{i}]" for i in range(max(size, max(vocab.values()) + 1))]
    types = [int(TokenType.UNUSED)] * len(tokens)
    for content, number in vocab.items():
        tokens[number], types[number] = content, int(_type(content, added.get(content), model))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    byte_fallback = bool(model.get("byte_fallback"))
    return Vocabulary(
        kind="llama" if byte_fallback else "gpt2",
        pre="" if byte_fallback else pre or _pre(tokenizer),
        tokens=tokens,
        types=types,
        merges=[] if byte_fallback else merges,
        scores=_scores(tokens, model["merges"]) if byte_fallback else [],
        ids=_ids(directory, vocab),
        adds_bos=_adds_bos(tokenizer),
        adds_space=byte_fallback and _adds_space(tokenizer),
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, template: str | None) -> None:
    """Add it, and the chat template, to a file's metadata."""
    writer.add_tokenizer_model(vocabulary.kind)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, number in vocabulary.ids.items():
        adders[name](number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if template is not None:
        writer.add_chat_template(template)


def _type(content: str, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> TokenType:
    if content == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    is_byte = len(content) == 6 and content.startswith("<0x") and content.endswith(">")
    return TokenType.BYTE if is_byte and model.get("byte_fallback") else TokenType.NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[str | Sequence[str]]) -> list[float]:
    """SentencePiece merges by the score of what comes out: the earlier a merge, the higher. Others come last."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _steps(tokenizer: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one or several."""
    found = tokenizer.get(name)
    if found is None:
        return []
    inner = found.get("normalizers") or found.get("pretokenizers")
    return list(inner) if found.get("type") == "Sequence" and inner is not None else [found]


def _pre(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of what the pre-tokenizer does."""
    steps = _steps(tokenizer, "pre_tokenizer")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression = steps[0].get("pattern", {}).get("Regex", "")
        if expression in _SPLITS and not steps[0].get("invert"):
            return _SPLITS[expression]
    raise UnsupportedError(
        f"the tokenizer splits text in a way that llmopt has no name of llama.cpp's for: {json.dumps(steps)[:200]}",
        hint="if you know it, give it: pre_tokenizer: NAME, as in llama.cpp's tokenizer.ggml.pre",
    )


def _ids(directory: Path, vocab: Mapping[str, int]) -> dict[str, int]:
    generation = read_json(directory / "generation_config.json")
    config = read_json(directory / "tokenizer_config.json")
    named = {name: _id_of(config.get(f"{name}_token"), vocab) for name in ("bos", "eos", "unk", "pad")}
    given = {name: generation.get(f"{name}_token_id") for name in ("bos", "pad")}
    ends = generation.get("eos_token_id")
    stops = [each for each in (ends if isinstance(ends, list) else [ends]) if each is not None]
    eos = named["eos"] if named["eos"] in stops or not stops else stops[0]
    eot = next((each for each in stops if each != eos), None)
    found = {"bos": given["bos"], "eos": eos, "eot": eot, "unk": named["unk"], "pad": given["pad"]}
    found |= {name: named[name] for name in ("bos", "pad") if found[name] is None}
    return {name: int(number) for name, number in found.items() if number is not None}


def _id_of(token: Any, vocab: Mapping[str, int]) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return vocab.get(content) if isinstance(content, str) else None


def _adds_bos(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the post-processor puts a special token before a text."""
    processors = tokenizer.get("post_processor") or {}
    inner = processors.get("processors") or [processors]
    for each in inner:
        first = (each.get("single") or [{}])[0] if each.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return True
    return False


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    for step in [*_steps(tokenizer, "normalizer"), *_steps(tokenizer, "pre_tokenizer")]:
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            return True
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False
