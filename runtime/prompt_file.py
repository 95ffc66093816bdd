"""Files of prompts and of answers: JSON lines in, JSON lines out, and what was answered before is not asked again."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmopt.optimizer.errors import InputError
from llmopt.runtime.llm import LLM, Answer, Options, Prompt

__all__ = ["AnswerFile", "Asked", "answer_all", "read_prompts"]

_FORMS = ("prompt", "messages", "turns", "ids")
_FORMS_SAID = "'prompt' (a text), 'messages' (a conversation), 'turns' (what a user says one after the other) or 'ids'"


@dataclass(frozen=True, slots=True)
class Asked:
    """A line of a file of prompts.

    Attributes:
        line: From 1.
        id: Its ``id``, else its line.
        prompt: What to answer first.
        turns: What the user says afterwards, each after an answer.
        max_tokens: Its own limit, if it has one.
        digest: Of the line's text.
    """

    line: int
    id: Any
    prompt: Prompt
    turns: tuple[str, ...]
    max_tokens: int | None
    digest: str


def read_prompts(path: Path) -> list[Asked]:
    """The prompts of a file of JSON lines, each an object with ``prompt``, ``messages``, ``turns`` or ``ids``.

    Raises:
        InputError: A line is none of them; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    found = [_asked(path, number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not found:
        raise InputError(f"{path} has no prompts", hint=f"each line is a JSON object with {_FORMS_SAID}")
    return found


def _asked(path: Path, number: int, line: str) -> Asked:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON: {error.msg}, column {error.colno}") from error
    given = [form for form in _FORMS if isinstance(entry, dict) and entry.get(form) is not None]
    if len(given) != 1:
        what = f"has {' and '.join(given)}" if given else "has no prompt"
        raise InputError(f"{path}:{number}: the line {what}", hint=f"give it one of {_FORMS_SAID}")
    value, max_tokens = entry[given[0]], entry.get("max_tokens")
    if not value or not _is_right(given[0], value):
        raise InputError(
            f"{path}:{number}: {given[0]} is empty or not what it should be", hint=f"it is one of {_FORMS_SAID}"
        )
    if max_tokens is not None and not (isinstance(max_tokens, int) and max_tokens > 0):
        raise InputError(f"{path}:{number}: max_tokens is not a positive number")
    turns: tuple[str, ...] = ()
    if given[0] == "turns":
        value, turns = [{"role": "user", "content": value[0]}], tuple(value[1:])
    digest = hashlib.sha256(line.strip().encode()).hexdigest()
    return Asked(number, entry.get("id", number), value, turns, max_tokens, digest)


def _is_right(form: str, value: Any) -> bool:
    if form == "prompt":
        return isinstance(value, str)
    kinds: Mapping[str, type] = {"messages": dict, "turns": str, "ids": int}
    return isinstance(value, list) and all(isinstance(each, kinds[form]) for each in value)


class AnswerFile:
    """Answers as JSON lines, appended as they come; put in the order of the prompts at the end.

    Args:
        path: Of the file; its folder is made. Lines that are there already, of the same prompts and settings, are kept.
        settings: Everything that answers depend on beside the prompts.

    Raises:
        InputError: The file has answers of something else.
    """

    def __init__(self, path: Path, prompts: Sequence[Asked], settings: Mapping[str, Any]) -> None:
        self._path = path
        self._keys = {each.line: _key(each, settings) for each in prompts}
        self._lines: dict[int, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
            self._rewrite()

    @property
    def done(self) -> frozenset[int]:
        """Lines of prompts that have been answered."""
        return frozenset(self._lines)

    def add(self, asked: Asked, answers: Sequence[Answer]) -> None:
        """Append the answers to a prompt and to each of its further turns."""
        last = answers[-1]
        entry = {"line": asked.line, "id": asked.id, "text": last.text, "finish_reason": last.finish}
        if asked.turns:
            entry["turns"] = [answer.text for answer in answers]
        if last.error is not None:
            entry["error"] = last.error
        entry |= {
            "prompt_tokens": last.prompt_tokens,
            "cached_tokens": last.cached_tokens,
            "completion_tokens": len(last.tokens),
            "key": self._keys[asked.line],
        }
        line = json.dumps(entry, ensure_ascii=False)
        self._lines[asked.line] = line
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Put the lines in the order of the prompts."""
        self._rewrite()

    def _read(self) -> None:
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                number, key = entry["line"], entry["key"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line that was being written when the program was killed
            if self._keys.get(number) != key:
                raise InputError(
                    f"{self._path} has answers to other prompts, or of other settings or another build",
                    hint="choose another --out, or delete it",
                )
            if "error" not in entry:
                self._lines[number] = line

    def _rewrite(self) -> None:
        partial = self._path.with_name(f".{self._path.name}.partial")
        lines = [self._lines[number] for number in sorted(self._lines)]
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.replace(self._path)


def _key(asked: Asked, settings: Mapping[str, Any]) -> str:
    text = json.dumps([asked.digest, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer_all(llm: LLM, prompts: Sequence[Asked], options: Options) -> Iterator[tuple[Asked, list[Answer]] | int]:
    """Answer prompts and all their turns.

    Yields:
        A prompt with its answers when all of them are there; a number of tokens each time some were written.

    Raises:
        InputError: A prompt is empty or does not fit: before anything is answered, if it is the first turn's.
    """
    for each in prompts:
        _named(llm, each, each.prompt, _own(each, options))
    answers: dict[int, list[Answer]] = {each.line: [] for each in prompts}
    conversations = {each.line: each.prompt for each in prompts}
    left = list(prompts)
    while left:
        asked, left = left, []
        own = [_own(each, options) for each in asked]
        for piece in llm.stream([conversations[each.line] for each in asked], own):
            if piece.answer is None:
                yield 1
                continue
            each = asked[piece.index]
            answers[each.line].append(piece.answer)
            said = len(answers[each.line])
            if said > len(each.turns) or piece.answer.error is not None:
                yield each, answers.pop(each.line)
                continue
            before = [message for message in conversations[each.line] if isinstance(message, Mapping)]
            answered = {"role": "assistant", "content": piece.answer.text}
            conversations[each.line] = [*before, answered, {"role": "user", "content": each.turns[said - 1]}]
            left.append(each)


def _own(asked: Asked, options: Options) -> Options:
    return options if asked.max_tokens is None else replace(options, max_tokens=asked.max_tokens)


def _named(llm: LLM, asked: Asked, prompt: Prompt, options: Options) -> None:
    try:
        llm.request(prompt, options)
    except InputError as error:
        raise InputError(f"line {asked.line}: {error.message}", hint=error.hint) from error
