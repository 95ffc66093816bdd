"""Ollama's ``Modelfile``: which file, how a conversation is written, when to stop and how to sample."""

from collections.abc import Mapping
from typing import Any

from llmopt.exporters.gguf.tokenizer import Vocabulary
from llmopt.optimizer.chat_template import ChatTemplate
from llmopt.optimizer.errors import InputError

__all__ = ["modelfile"]

_CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
"""In Go's template language, which Ollama has instead of Jinja."""

_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""``generation_config.json`` -> Ollama's parameter."""


def modelfile(
    filename: str, vocabulary: Vocabulary, template: str | None, generation: Mapping[str, Any], *, context: int
) -> str:
    """The text of a ``Modelfile`` beside ``filename``.

    Only ChatML is translated: Ollama recognizes the templates of well-known models in the file itself.

    Args:
        filename: The GGUF file's name.
        vocabulary: Has the tokens that end an answer.
        template: The chat template, in Jinja; None where the model has none.
        generation: ``generation_config.json``.
        context: The longest sequence in tokens.
    """
    lines = [f"FROM ./{filename}"]
    if template is not None and _is_chatml(template):
        lines.append(f'TEMPLATE """{_CHATML}"""')
    for name in ("eos", "eot"):
        if name in vocabulary.ids:
            lines.append(f'PARAMETER stop "{vocabulary.tokens[vocabulary.ids[name]]}"')
    if generation.get("do_sample", True):
        lines += [
            f"PARAMETER {theirs} {generation[ours]}" for ours, theirs in _PARAMETERS.items() if ours in generation
        ]
    else:
        lines.append("PARAMETER temperature 0")
    lines.append(f"PARAMETER num_ctx {min(context, 8192)}")
    return "\n".join(lines) + "\n"


def _is_chatml(template: str) -> bool:
    """Whether the template writes a conversation as ChatML, apart from a system message of its own."""
    messages = [{"role": role, "content": f"a {role} b"} for role in ("system", "user", "assistant", "user")]
    expected = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
    try:
        written = ChatTemplate(template, {}).render(messages)
    except InputError:
        return False
    return written == f"{expected}<|im_start|>assistant\n"
