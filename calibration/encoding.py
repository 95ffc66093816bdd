"""Documents as token ids: plain text as the tokenizer takes it, conversations through the model's chat template."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmopt.calibration.documents import Document
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tokenizer_config import chat_template

__all__ = ["Encoder", "open_tokenizer"]

_PIECE = 1 << 20
"""Characters encoded at once: the tokenizer needs a hundred times as many bytes while it works."""

_SENDERS = {"human": "user", "gpt": "assistant"}
"""Roles by their names in conversations of ``from`` and ``value``, as ShareGPT wrote them."""


class Encoder:
    """Makes token ids of documents.

    Args:
        directory: Holds tokenizer.json, and the chat template where there is one.

    Raises:
        InputError: There is no tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = open_tokenizer(directory)
        self._template = chat_template(directory)

    def encode(self, document: Document) -> list[int]:
        """The token ids of a text, with the special tokens the tokenizer adds to any text; or of a conversation, with
        those its template writes.

        Raises:
            InputError: The document is neither, or the model has no chat template; with file and line.
        """
        if isinstance(document.value, str):
            return [token for ids in self._by_pieces(document.value) for token in ids]
        text = self._rendered(_messages(document), document.where)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _by_pieces(self, text: str) -> Iterator[list[int]]:
        """The ids of a text; a long one is cut at ends of lines, which are ends of tokens nearly everywhere."""
        start = 0
        while start < len(text) or start == 0:
            end = text.find("\n", start + _PIECE) + 1 or len(text)
            yield self._tokenizer.encode(text[start:end], add_special_tokens=start == 0).ids
            start = max(end, 1)

    def _rendered(self, messages: list[dict[str, str]], where: str) -> str:
        if self._template is None:
            raise InputError(
                f"{where}: holds chat messages, and this model has no chat template",
                hint="calibration.field names a field of plain text instead",
            )
        try:
            return self._template.render(messages, add_generation_prompt=False)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", hint=error.hint) from error


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in ``directory``, which neither cuts nor pads.

    Raises:
        InputError: There is none.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{directory} has no tokenizer.json, so no text can be read for it")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _messages(document: Document) -> list[dict[str, str]]:
    """The conversation of a document, each message with role and content."""
    value = document.value
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        raise InputError(
            f"{document.where}: holds {'an empty list' if value == [] else _shown(value)}, which is neither text nor "
            "chat messages",
            hint="a field is a string, or a list of messages with role and content",
        )
    return [_message(each, f"{document.where}: message {number}") for number, each in enumerate(value, start=1)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if "from" in message and "role" not in message:
        role, content = _SENDERS.get(str(message["from"]), message["from"]), message.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            f"{where}: has the keys {', '.join(map(str, message)) or 'none'}, not role and content as strings",
            hint="messages are written {role: user, content: ...}; from and value are understood too",
        )
    return {"role": role, "content": content}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
