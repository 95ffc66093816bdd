"""What the JSON files beside a tokenizer say: its named special tokens and its chat template."""

import json
from pathlib import Path
from typing import Any

from llmopt.optimizer.chat_template import ChatTemplate
from llmopt.optimizer.errors import InputError

__all__ = ["chat_template", "read_object", "special_tokens"]


def chat_template(directory: Path) -> ChatTemplate | None:
    """The template in chat_template.jinja, or the one named default in tokenizer_config.json; None when there is none.

    Raises:
        InputError: tokenizer_config.json is damaged.
    """
    path = directory / "chat_template.jinja"
    config = read_object(directory / "tokenizer_config.json")
    template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return ChatTemplate(template, special_tokens(directory)) if isinstance(template, str) else None


def special_tokens(directory: Path) -> dict[str, str]:
    """The named special tokens, such as ``bos_token``, of tokenizer_config.json, each as its text.

    Raises:
        InputError: tokenizer_config.json is damaged.
    """
    found = {}
    for name, value in read_object(directory / "tokenizer_config.json").items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[name] = content
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing.

    Raises:
        InputError: It is damaged.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged: it is not an object")
    return data
