"""Text to tokens and back: the tokenizer of a build, text that grows token by token, and stop strings."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tokenizer_config import chat_template, read_object, special_tokens

__all__ = ["StopMatcher", "TextStream", "Tokenizer"]

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # tokens: a character has at most four bytes, and a token at least one


class Tokenizer:
    """The tokenizer files of a build.

    Attributes:
        special_tokens: The named special tokens, such as ``bos_token``, as the chat template sees them.
        stop_ids: Every token that ends a generation.
        chat_template: None when the build has none.

    Raises:
        InputError: A file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{directory} has no tokenizer.json", hint="build it again from a source with a tokenizer")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library's errors have no class of their own
            raise InputError(f"{path} is damaged: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.special_tokens = special_tokens(directory)
        self.stop_ids = self._stop_ids(directory)
        self.chat_template = chat_template(directory)

    @property
    def vocab_size(self) -> int:
        """Tokens with a text; a model's vocabulary may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def serialized(self) -> str:
        """The content of tokenizer.json, without padding and truncation."""
        return self._tokenizer.to_str()

    def has_vocabulary_of(self, other: "Tokenizer") -> bool:
        """Whether all tokens of both mean the same."""
        mine, theirs = (each._tokenizer.get_vocab(with_added_tokens=True) for each in (self, other))
        return mine == theirs

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``, with the special tokens around it that the tokenizer adds by itself, or without."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_cut(self, text: str, tokens: int) -> list[int]:
        """The first ``tokens`` ids of ``text``, its special tokens kept: those behind the text, too."""
        self._tokenizer.enable_truncation(tokens)
        try:
            return self.encode(text, add_special_tokens=True)
        finally:
            self._tokenizer.no_truncation()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; unknown ids have none."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str:
        """The text of one token within a text, with its leading space; half a character is a replacement character."""
        once = self.decode([token], skip_special_tokens=False)
        if self._is_byte_level:
            return once
        # Decoders that work on words drop a space, or put one, where a text begins.
        return self.decode([token, token], skip_special_tokens=False)[len(once) :]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, also of half a character where the tokenizer works on bytes."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if token not in self._added and self._is_byte_level and all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return self.token_text(token).encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._tokenizer.decoder)

    def _stop_ids(self, directory: Path) -> frozenset[int]:
        """All ``eos_token_id`` of generation_config.json, or of config.json, and the tokenizer's own eos token."""
        found: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            value = read_object(directory / name).get("eos_token_id")
            if value is not None:
                found = set(value) if isinstance(value, list) else {value}
        eos = self.special_tokens.get("eos_token")
        own = self._tokenizer.token_to_id(eos) if eos is not None else None
        return frozenset(found if own is None else found | {own})


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte.

    Source: Radford et al. 2019, GPT-2: printable bytes stand for themselves, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class TextStream:
    """The text of one generation, given out as it becomes certain.

    Two things are held back: a character whose last bytes are still to come, and text that may be the beginning of a
    stop string. What was given out is never taken back, and all pieces together are the text of the answer.

    ``context`` is what the text continues: some tokenizers write a word without its space at the start of a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._matcher = StopMatcher(stop, include_stop=include_stop)
        # A context that ends within a character cannot be cut off again; its last tokens are enough.
        before = [int(token) for token in context[-2 * _LONGEST_CHARACTER :]]
        self._tokens = [] if self._decode(before).endswith(_REPLACEMENT) else before
        # Tokens before _begin are finished; those up to _end are given out, and kept because some tokenizers write a
        # token differently at the start of a text.
        self._begin = 0
        self._end = len(self._tokens)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._matcher.is_stopped

    def push(self, token: int) -> str:
        """Take one token and return the text that is now certain."""
        self._tokens.append(token)
        return self._matcher.push(self._advance(is_last=False))

    def finish(self) -> str:
        """Return what was held back: no more tokens follow. An unfinished character is left out."""
        return self._matcher.push(self._advance(is_last=True)) + self._matcher.finish()

    def _advance(self, *, is_last: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._end])
        now = self._decode(self._tokens[self._begin :])
        if is_last:
            return now.rstrip(_REPLACEMENT)[len(before) :]
        is_split = now.endswith(_REPLACEMENT) and len(self._tokens) - self._end < _LONGEST_CHARACTER
        if is_split or len(now) <= len(before):
            return ""
        self._begin, self._end = self._end, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)


class StopMatcher:
    """Ends a text at the stop string that is complete first, wherever the pieces it arrives in are cut."""

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.is_stopped = False

    def push(self, piece: str) -> str:
        """Take the next piece and return the text that no stop string can still begin in."""
        if self.is_stopped or not piece:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            end, place = min(found)
            self.is_stopped, self._held = True, ""
            return text[: end if self._include_stop else place]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
